//! Frames without end, in a tunnel with a good certificate.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::scene::{ECHO, Scene, highest};
use crate::wire::{BOUND, CONTINUATION, DATA, END_HEADERS, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, WINDOW_UPDATE};
use crate::wire::{METHOD_CONNECT, Peer, authority, connect, frame, inside};

/// Longest that a flood is let in.
const LET_IN: Duration = Duration::from_secs(10);
/// What all floods together may make of the proxy's memory, in KiB, at any time: each of them holds at most the buffers of
/// one connection, its windows included.
const HIGHEST: usize = 64 << 10;

/// Sends `burst` again and again, which is made anew each time. True if the server has ended the connection.
async fn flood(peer: &mut Peer, mut burst: impl FnMut() -> Vec<u8>) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < LET_IN {
        match tokio::time::timeout(LET_IN, peer.send(&burst())).await {
            Ok(true) => {}
            Ok(false) => return true,
            // Nothing is read here: it waits for its answers to be taken.
            Err(_) => return peer.closed(BOUND).await,
        }
    }
    false
}

#[test]
fn floods_end_the_connection_that_they_come_by() {
    let scene = Scene::start();
    let certificate = scene.certificate();
    let (target, to) = (scene.target.at(15008), scene.target.at(ECHO));
    let ping = frame(PING, 0, 0, b"12345678").repeat(500);
    let settings = frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]).repeat(500);
    let acknowledgements = frame(SETTINGS, 1, 0, b"").repeat(500);
    let unknown = frame(0xbe, 0, 0, b"x").repeat(500);
    let priority = frame(2, 0, 1, &[0, 0, 0, 0, 16]).repeat(500);
    let empty = frame(DATA, 0, 1, b"").repeat(500);
    let open = connect(1, to);
    let window = frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]).repeat(500);
    let goaway = frame(GOAWAY, 0, 0, &[0; 8]).repeat(500);
    let cases: &[(&str, &[u8], &[u8])] = &[
        ("PING", &[], &ping),
        ("SETTINGS", &[], &settings),
        ("SETTINGS acknowledged", &[], &acknowledgements),
        ("unknown frames", &[], &unknown),
        ("PRIORITY", &[], &priority),
        ("empty DATA", &open, &empty),
        ("WINDOW_UPDATE", &open, &window),
        ("GOAWAY", &[], &goaway),
    ];
    inside(scene.peer.network(), async || {
        for (name, first, burst) in cases {
            let mut peer = Peer::http2(target, &certificate).await.unwrap();
            peer.send(first).await;
            assert!(flood(&mut peer, || burst.to_vec()).await, "{name}: goes on for ever");
        }
        // A header list that does not end.
        let mut peer = Peer::http2(target, &certificate).await.unwrap();
        peer.send(&frame(HEADERS, 0, 1, METHOD_CONNECT)).await;
        let more = frame(CONTINUATION, 0, 1, &[0x0f, 0x0d, 1, b'x'].repeat(200)).repeat(20);
        assert!(flood(&mut peer, || more.clone()).await, "CONTINUATION: goes on for ever");
        let mut peer = Peer::http2(target, &certificate).await.unwrap();
        peer.send(&frame(HEADERS, 0, 1, METHOD_CONNECT)).await;
        let nothing = frame(CONTINUATION, 0, 1, b"").repeat(500);
        assert!(flood(&mut peer, || nothing.clone()).await, "empty CONTINUATION: goes on for ever");
    });
    scene.victim_is_well("after floods");
    let highest = highest(scene.proxy());
    assert!(highest < HIGHEST, "{highest} KiB at the highest");
    scene.ends_as_it_was(32 << 10);
}

#[test]
fn windows_are_not_to_be_abused() {
    let scene = Scene::start();
    let certificate = scene.certificate();
    let (target, to) = (scene.target.at(15008), scene.target.at(ECHO));
    let overflow = frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]);
    let cases: &[(&str, Vec<u8>)] = &[
        ("no increment", frame(WINDOW_UPDATE, 0, 0, &[0; 4])),
        ("overflow", overflow.repeat(2)),
        ("a short one", frame(WINDOW_UPDATE, 0, 0, &[0])),
        ("a window too large", frame(SETTINGS, 0, 0, &[0, 4, 0xff, 0xff, 0xff, 0xff])),
        ("frames too small", frame(SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 1])),
        ("a frame too large", [&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1][..], &[0; 100]].concat()),
    ];
    inside(scene.peer.network(), async || {
        for (name, bytes) in cases {
            let mut peer = Peer::http2(target, &certificate).await.unwrap();
            peer.send(&connect(1, to)).await;
            let sent = tokio::time::timeout(BOUND, peer.send(bytes)).await;
            assert!(sent.is_err() || peer.closed(BOUND).await, "{name}: nothing happens");
        }
        // One stream whose window stays shut holds its own bytes alone: at most one stream window, 4 MiB.
        let mut peer = Peer::http2(target, &certificate).await.unwrap();
        peer.send(&frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0])).await;
        peer.send(&connect(1, to)).await;
        peer.send(&frame(DATA, 0, 1, &vec![b'x'; 1 << 20]).repeat(3)).await;
        scene.victim_is_well("a window that stays shut");
    });
    scene.ends_as_it_was(32 << 10);
}

/// Each request makes a connection to the application, and is given up at once. That costs what honest connections cost, so
/// it is not refused: it must take its share and no more.
#[test]
fn rapid_resets_leave_others_their_share() {
    let scene = Scene::start();
    let certificate = scene.certificate();
    let (target, to) = (scene.target.at(15008), scene.target.at(ECHO));
    let block = [METHOD_CONNECT, &authority(&to.to_string())].concat();
    let over = AtomicBool::new(false);
    let over = &over;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            inside(scene.peer.network(), async || {
                while !over.load(Ordering::Relaxed) {
                    let mut peer = Peer::http2(target, &certificate).await.unwrap();
                    let mut id = 1;
                    let mut burst = || {
                        let mut frames = Vec::new();
                        for _ in 0..100 {
                            frames.extend(frame(HEADERS, END_HEADERS, id, &block));
                            frames.extend(frame(RST_STREAM, 0, id, &[0, 0, 0, 8]));
                            id += 2;
                        }
                        frames
                    };
                    let flooding = async { while !over.load(Ordering::Relaxed) && peer.send(&burst()).await {} };
                    let _ = tokio::time::timeout(Duration::from_millis(500), flooding).await;
                }
            });
        });
        let checks = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..3 {
                scene.victim_is_well("rapid resets");
            }
        }));
        over.store(true, Ordering::Relaxed);
        if let Err(panic) = checks {
            std::panic::resume_unwind(panic);
        }
    });
    let highest = highest(scene.proxy());
    assert!(highest < HIGHEST, "{highest} KiB at the highest");
    scene.ends_as_it_was(32 << 10);
}
