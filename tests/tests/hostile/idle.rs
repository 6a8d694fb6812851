//! Connections that say nothing, or too little, in great numbers.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tests::metrics;
use tests::netns::NetNs;
use tests::wait;

use crate::scene::{ECHO, Scene, highest};
use crate::wire::{Answer, BOUND, Peer, connect, inside};

/// As the statement is: ten thousand.
const MANY: usize = 10_000;
/// Longest that a peer may say nothing, or not go on with a handshake, with room for a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(30);
/// What a carried connection may cost the proxy while it says nothing, in KiB: two sockets and their task.
const PER_CONNECTION: usize = 10;
/// What the proxy may have more than before, whatever it carries, in KiB.
const GROWTH: usize = 16 << 10;
/// Why a tunnel that says nothing, or too little, may be closed.
const TUNNEL_REASONS: [&str; 5] =
    ["silent", "too_many_from_peer", "too_many_tunnels", "too_many_handshakes", "tls_handshake"];
/// Why a connection in plain may be closed of which there are too many.
const PLAIN_REASONS: [&str; 2] = ["too_many_sockets", "too_many_connections"];

/// Opens many connections from inside a namespace, and says `first` on each. The kernel takes every one of them; those that were
/// closed before anything could be said are not returned.
///
/// # Panics
/// If one is not taken.
pub fn open(network: &NetNs, to: SocketAddr, count: usize, first: &[u8]) -> Vec<TcpStream> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    assert!(most > (count + 1000) as u64, "this test needs {count} descriptors and more, and may have {most}");
    let open = || {
        let mut opened = Vec::new();
        for number in 0..count {
            let mut stream = match TcpStream::connect_timeout(&to, BOUND) {
                Ok(stream) => stream,
                // It was taken, and reset at once.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => continue,
                Err(error) => panic!("connection {number} to {to} is not taken: {error}"),
            };
            if first.is_empty() || stream.write_all(first).is_ok() {
                stream.set_nonblocking(true).unwrap();
                opened.push(stream);
            }
        }
        opened
    };
    network.run(open).unwrap()
}

/// How many are still open.
fn alive(streams: &mut [TcpStream]) -> usize {
    let is_open =
        |stream: &mut TcpStream| matches!(stream.read(&mut [0; 64]), Err(e) if e.kind() == ErrorKind::WouldBlock);
    streams.iter_mut().map(|stream| usize::from(is_open(stream))).sum()
}

/// How many connections the attacked proxy refused for one of these reasons.
fn refused(scene: &Scene, reasons: &[&str]) -> usize {
    let text = scene.cluster.node(2).unwrap().metrics().unwrap();
    let of = |reason: &&str| metrics::sum(&text, "culvert_connection_failures_total", &[("reason", reason)]);
    // A count of connections is a whole number.
    reasons.iter().map(of).sum::<f64>() as usize
}

/// Somebody who opens tunnels and says nothing, or begins handshakes and stops, is cut off, each connection with its reason, and
/// meanwhile others' handshakes with the same pod go on.
#[test]
fn ten_thousand_silent_tunnels_and_half_handshakes_hold_nobody_up() {
    let scene = Scene::dual();
    let (v4, v6) = (scene.target.at(15008), scene.target.at_v6(15008).unwrap());
    let before = scene.resident();
    let newcomer = scene.cluster.pod("newcomer").node(1).service_account("newcomer").enrolled(false).start().unwrap();
    let good = crate::forge::names(&[crate::forge::uri(&newcomer.identity())]).signed(&scene.cluster);
    // The first bytes of a ClientHello: a handshake is begun, and never goes on.
    for (name, first, target) in
        [("silent", &[][..], v4), ("one byte", &[0x16][..], v6), ("half a hello", &[0x16, 3, 1, 2, 0, 1, 0][..], v4)]
    {
        let refused_before = refused(&scene, &TUNNEL_REASONS);
        let mut silent = open(scene.peer.network(), target, MANY, first);
        inside(newcomer.network(), async || {
            let mut peer = Peer::http2(target, &good).await.unwrap();
            peer.send(&connect(1, SocketAddr::new(target.ip(), ECHO))).await;
            assert_eq!(peer.answer(1).await, Answer::Status(200), "{name}");
        });
        // It did not have to wait until those were given up.
        assert!(alive(&mut silent) > 0, "{name}: another peer was served only after the last of them was cut off");
        scene.victim_is_well(name);
        wait::until(&format!("{name}: all are closed"), PATIENCE, || (alive(&mut silent) == 0).then_some(())).unwrap();
        let all_refused = || (refused(&scene, &TUNNEL_REASONS) - refused_before == MANY).then_some(());
        wait::until(&format!("{name}: each of them has its reason"), PATIENCE, all_refused)
            .unwrap_or_else(|error| panic!("{error}: {}", refused(&scene, &TUNNEL_REASONS) - refused_before));
        let grown = scene.resident().saturating_sub(before);
        println!("{name}: {} spoke, {grown} KiB more", silent.len());
        assert!(grown < GROWTH, "{name}: {grown} KiB more");
    }
    let highest = highest(scene.proxy()).saturating_sub(before);
    assert!(highest < 2 * GROWTH, "{highest} KiB more at the highest");
    scene.ends_as_it_was(GROWTH);
}

/// In plain a connection may be silent for ever, as without a mesh. All of one pod's connections take half of the proxy's
/// free files, two each: as many as that are carried, every one that is more is reset with its reason, and other pods have
/// theirs.
#[test]
fn ten_thousand_silent_connections_in_plain_are_carried_or_refused_for_want_of_files() {
    let scene = Scene::dual();
    let before = scene.resident();
    let (limit, free) = files(&scene);
    let share = (free / 4).min(MANY);
    let refused_before = refused(&scene, &PLAIN_REASONS);
    // The pod has one share for both of its addresses.
    let halves = scene.target_at(ECHO).into_iter().map(|to| open(scene.peer.network(), to, MANY / 2, &[]));
    let mut silent: Vec<TcpStream> = halves.flatten().collect();
    // Taking them is work, which is over once each is carried or was refused.
    let count =
        |silent: &mut [TcpStream]| (scene.carried(), refused(&scene, &PLAIN_REASONS) - refused_before, alive(silent));
    let settled = || {
        // The proxy carries the victim's as well.
        let (carried, refused, alive) = count(&mut silent);
        (carried >= alive && alive + refused == MANY).then_some(alive)
    };
    let held = wait::until("each is carried or was refused", 2 * PATIENCE, settled);
    let held = held.unwrap_or_else(|error| panic!("{error}: {:?} carried, refused, alive", count(&mut silent)));
    println!("plain: {held} of {MANY} carried, with {free} free files of {limit}");
    // The proxy looks at its other files from time to time only.
    assert!(held * 10 >= share * 9, "{held} carried, and {share} are its share");
    assert!(held == MANY || held * 2 <= limit / 2, "{held} carried, more than half of {limit} files");
    scene.victim_is_well("ten thousand connections");
    assert_eq!(alive(&mut silent), held, "those that are carried stay so");
    let grown = scene.resident().saturating_sub(before);
    println!("plain: {grown} KiB more");
    let most = held * PER_CONNECTION + GROWTH / 4;
    assert!(grown < most, "{grown} KiB more for {held}, and not {most}");
    drop(silent);
    scene.ends_as_it_was(most);
}

/// How many files the attacked proxy may have open, and how many of them it may give to pods still.
fn files(scene: &Scene) -> (usize, usize) {
    let text = scene.cluster.node(2).unwrap().metrics().unwrap();
    let [limit, open] = ["process_max_fds", "process_open_fds"].map(|name| metrics::sum(&text, name, &[]) as usize);
    assert!(limit > 0, "{text}");
    // What it keeps for itself.
    let reserve = (limit / 8).min(1024);
    (limit, limit.saturating_sub(reserve + open))
}

/// Handshakes that are done, and then nothing: no preface, or a preface and no SETTINGS.
#[test]
fn a_tunnel_that_never_begins_is_closed() {
    let scene = Scene::start();
    let certificate = scene.certificate();
    let target = scene.target.at(15008);
    inside(scene.peer.network(), async || {
        let mut nothing = Peer::tls(target, Some(&certificate)).await.unwrap();
        let mut half = Peer::tls(target, Some(&certificate)).await.unwrap();
        half.send(b"PRI * HTTP/2.0\r\n").await;
        let mut preface = Peer::tls(target, Some(&certificate)).await.unwrap();
        preface.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        let mut one = Peer::tls(target, Some(&certificate)).await.unwrap();
        one.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0").await;
        // The last two end as any tunnel whose peer answers no PING: interval and time-out are 10 and 20 s.
        let (nothing, half, preface, one) = tokio::join!(
            nothing.closed(PATIENCE),
            half.closed(PATIENCE),
            preface.closed(2 * PATIENCE),
            one.closed(2 * PATIENCE)
        );
        assert_eq!((nothing, half, preface, one), (true, true, true, true));
    });
    scene.ends_as_it_was(GROWTH);
}
