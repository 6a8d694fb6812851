//! Connections in great numbers that are filled and not read: what the proxy holds for them is bounded as is said, others
//! notice nothing, and it is given back.

use std::io::Write as _;
use std::net::TcpStream;
use std::time::Duration;

use tests::wait;

use crate::idle::open;
use crate::scene::{ECHO, Scene, highest};
use crate::wire::{DATA, Peer, connect, frame, inside};

/// What the proxy may hold for receivers, in MiB.
const HELD: usize = 64;
/// Connections of one pod that are filled.
const MANY: usize = 2000;
/// What a carried connection costs beside, in KiB.
const PER_CONNECTION: usize = 12;
/// Everything else, in KiB: buffers of the threads, and what the allocator cannot give back at once.
const SPARE: usize = 64 << 10;
/// Longest that the attacker takes.
const BOUND: Duration = Duration::from_secs(120);

/// Writes to all of them until none takes any more for a while.
fn fill(streams: &mut [TcpStream]) -> usize {
    let (chunk, mut total, mut still) = (vec![b'x'; 64 << 10], 0, 0);
    let begun = std::time::Instant::now();
    while still < 10 && begun.elapsed() < BOUND {
        still += 1;
        for stream in &mut *streams {
            while let Ok(n @ 1..) = stream.write(&chunk) {
                total += n;
                still = 0;
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    total
}

/// The target answers each byte, and its answers are not read, so that both directions wait.
#[test]
fn thousands_of_connections_in_plain_that_nobody_reads_are_bounded() {
    let scene = Scene::holding(HELD);
    let before = scene.resident();
    let to = scene.target.at(ECHO);
    let mut stalled = open(scene.peer.network(), to, MANY, &[]);
    assert!(stalled.len() > MANY / 2, "{} connected", stalled.len());
    for stream in &stalled {
        socket2::SockRef::from(stream).set_send_buffer_size(16 << 10).unwrap();
    }
    std::thread::scope(|scope| {
        let filling = scope.spawn(|| fill(&mut stalled));
        let mut rounds = 0;
        while !filling.is_finished() || rounds < 3 {
            scene.victim_is_well("stalled connections");
            rounds += 1;
        }
        println!("{} KiB sent while {rounds} rounds went on", filling.join().unwrap() >> 10);
    });
    let (most, now) = (highest(scene.proxy()).saturating_sub(before), scene.resident().saturating_sub(before));
    println!("{MANY} filled: {most} KiB more at the highest, {now} KiB at last");
    assert!(most < (HELD << 10) + MANY * PER_CONNECTION + SPARE, "{most} KiB more at the highest");
    drop(stalled);
    scene.ends_as_it_was(SPARE);
}

/// Tunnels whose windows are filled for an application that does not read, by a peer that acknowledges nothing.
#[test]
fn windows_that_are_filled_and_not_read_are_bounded() {
    const TUNNELS: usize = 24;
    let scene = Scene::holding(HELD);
    let certificate = scene.certificate();
    let (target, to) = (scene.target.at(15008), scene.target.at(ECHO));
    let before = scene.resident();
    inside(scene.peer.network(), async || {
        let mut tunnels = Vec::new();
        let full = vec![b'x'; 16 << 10];
        for _ in 0..TUNNELS {
            let mut peer = Peer::http2(target, &certificate).await.unwrap();
            // Four windows of streams are one of the connection.
            for stream in [1, 3, 5, 7] {
                peer.send(&connect(stream, to)).await;
                peer.answer(stream).await;
            }
            for stream in [1, 3, 5, 7] {
                let window = frame(DATA, 0, stream, &full).repeat(256);
                // It may be reset, or closed, for what it holds.
                let _ = tokio::time::timeout(Duration::from_secs(10), peer.send(&window)).await;
            }
            tunnels.push(peer);
        }
        scene.victim_is_well("filled windows");
    });
    let most = highest(scene.proxy()).saturating_sub(before);
    println!("{TUNNELS} tunnels: {most} KiB more at the highest");
    assert!(most < (HELD << 10) + SPARE, "{most} KiB more at the highest");
    wait::until("it is given back", 2 * BOUND, || (scene.resident() < before + SPARE).then_some(())).unwrap();
    scene.ends_as_it_was(SPARE);
}
