//! The copy between TCP connections, over a tunnel and direct: what one application does, the other sees.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use mesh_hbone::copy::{self, CopyError, Counters, Side};
use mesh_hbone::{ResetReason, StreamError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::support::{Checksum, Pair, Pattern, pair, soon, tcp, tcp_pair, until};

type Copy = JoinHandle<Result<(), CopyError>>;

/// Two applications and what joins them.
struct Chain {
    client: TcpStream,
    server: TcpStream,
    copies: Vec<Copy>,
    counters: Arc<Counters>,
    _pair: Option<Pair>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Tunnel,
    Relay,
}

const WAYS: [Way; 2] = [Way::Tunnel, Way::Relay];

async fn chain(way: Way) -> Chain {
    let ((client, near), (far, server)) = (tcp().await, tcp().await);
    let counters = Arc::new(Counters::default());
    match way {
        Way::Relay => {
            let counted = Arc::clone(&counters);
            let copies = vec![tokio::spawn(async move { copy::relay(near, far, &counted).await })];
            Chain { client, server, copies, counters, _pair: None }
        }
        Way::Tunnel => {
            let mut pair = tcp_pair().await;
            let (here, there) = pair.stream().await;
            let copies = vec![
                tokio::spawn(async move { copy::splice(here, near, &Counters::default()).await }),
                tokio::spawn({
                    let counted = Arc::clone(&counters);
                    async move { copy::splice(there, far, &counted).await }
                }),
            ];
            Chain { client, server, copies, counters, _pair: Some(pair) }
        }
    }
}

async fn send(tcp: &mut TcpStream, text: &str) {
    tcp.write_all(text.as_bytes()).await.unwrap();
}

async fn expect(tcp: &mut TcpStream, text: &str) {
    let mut got = vec![0; text.len()];
    soon(tcp.read_exact(&mut got)).await.unwrap();
    assert_eq!(got, text.as_bytes());
}

async fn expect_end(tcp: &mut TcpStream) {
    assert_eq!(soon(tcp.read(&mut [0])).await.unwrap(), 0);
}

async fn expect_reset(tcp: &mut TcpStream) {
    let error = soon(async {
        loop {
            match tcp.read(&mut [0; 4096]).await {
                Ok(0) => panic!("an orderly end instead of a reset"),
                Ok(_) => {}
                Err(error) => return error,
            }
        }
    })
    .await;
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn ends_pass_one_direction_at_a_time() {
    for way in WAYS {
        for client_first in [true, false] {
            let Chain { client, server, copies, counters, _pair } = chain(way).await;
            let (mut a, mut b) = if client_first { (client, server) } else { (server, client) };
            send(&mut a, "first").await;
            a.shutdown().await.unwrap();
            expect(&mut b, "first").await;
            expect_end(&mut b).await;
            send(&mut b, "later").await;
            expect(&mut a, "later").await;
            b.shutdown().await.unwrap();
            expect_end(&mut a).await;
            for copy in copies {
                soon(copy).await.unwrap().unwrap();
            }
            assert_eq!(counters.left_to_right.load(Ordering::Relaxed), 5, "{way:?}");
            assert_eq!(counters.right_to_left.load(Ordering::Relaxed), 5, "{way:?}");
        }
    }
}

#[tokio::test]
async fn resets_pass_in_both_directions() {
    for way in WAYS {
        for client_resets in [true, false] {
            let Chain { client, server, copies, counters: _, _pair } = chain(way).await;
            let (mut a, mut b) = if client_resets { (client, server) } else { (server, client) };
            send(&mut a, "half a message").await;
            expect(&mut b, "half a message").await;
            a.set_zero_linger().unwrap();
            drop(a);
            expect_reset(&mut b).await;
            for copy in copies {
                assert!(soon(copy).await.unwrap().is_err());
            }
        }
    }
}

#[tokio::test]
async fn reset_is_passed_on_after_the_other_direction_ended() {
    let Chain { mut client, mut server, copies, counters: _, _pair } = chain(Way::Tunnel).await;
    client.shutdown().await.unwrap();
    expect_end(&mut server).await;
    // The server's direction is open; its connection breaks.
    server.set_zero_linger().unwrap();
    drop(server);
    expect_reset(&mut client).await;
    for copy in copies {
        assert!(soon(copy).await.unwrap().is_err());
    }
}

/// Its end has been read, and nothing is to be written: nothing that is read or written would fail.
#[tokio::test]
async fn reset_of_a_half_closed_connection_is_passed_on() {
    for way in WAYS {
        for client_first in [true, false] {
            let Chain { client, server, copies, counters: _, _pair } = chain(way).await;
            let (mut a, mut b) = if client_first { (client, server) } else { (server, client) };
            a.shutdown().await.unwrap();
            expect_end(&mut b).await;
            a.set_zero_linger().unwrap();
            drop(a);
            // Whoever has read the end reads it again; the failure is seen in another way.
            soon(b.ready(tokio::io::Interest::ERROR)).await.unwrap();
            assert_eq!(b.take_error().unwrap().unwrap().kind(), ErrorKind::BrokenPipe);
            for copy in copies {
                assert!(soon(copy).await.unwrap().is_err(), "{way:?}");
            }
        }
    }
}

#[tokio::test]
async fn half_closed_connection_does_nothing_while_it_waits() {
    for way in WAYS {
        let Chain { mut client, mut server, copies, counters: _, _pair } = chain(way).await;
        client.shutdown().await.unwrap();
        expect_end(&mut server).await;
        let busy = || tokio::runtime::Handle::current().metrics().worker_total_busy_duration(0);
        let before = busy();
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        assert!(busy() - before < std::time::Duration::from_millis(50), "{way:?}: {:?}", busy() - before);
        send(&mut server, "later").await;
        expect(&mut client, "later").await;
        drop(copies);
    }
}

/// The peer's end has arrived, and waits behind data for an application that does not read.
#[tokio::test]
async fn reset_after_the_end_reaches_a_stuck_application() {
    let mut pair = pair().await;
    let (near, mut far) = pair.stream().await;
    let (mut app, plain) = tcp().await;
    socket2::SockRef::from(&plain).set_send_buffer_size(4096).unwrap();
    let counters = Arc::new(Counters::default());
    let counted = Arc::clone(&counters);
    let copying = tokio::spawn(async move { copy::splice(near, plain, &counted).await });
    far.write(Bytes::from(vec![0; 3 << 20])).await.unwrap();
    far.finish().await.unwrap();
    // What comes back shows that the end has gone out.
    send(&mut app, "x").await;
    assert_eq!(soon(far.read()).await.unwrap().unwrap(), "x");
    far.reset(ResetReason::Cancel);
    let error = soon(copying).await.unwrap().unwrap_err();
    assert!(matches!(error, CopyError::Tunnel(StreamError::Reset(ResetReason::Cancel))), "{error}");
    assert!(counters.left_to_right.load(Ordering::Relaxed) < 3 << 20);
    expect_reset(&mut app).await;
}

/// The application's direction waits for a peer that takes no more, the other one has ended.
#[tokio::test]
async fn reset_is_seen_while_the_peer_takes_no_more() {
    let mut pair = pair().await;
    let (near, mut far) = pair.stream().await;
    let (app, plain) = tcp().await;
    let copying = tokio::spawn(async move { copy::splice(near, plain, &Counters::default()).await });
    far.finish().await.unwrap();
    let mut app = app;
    expect_end(&mut app).await;
    let chunk = vec![1; 64 << 10];
    let mut full = 0;
    while full < 20 {
        match app.try_write(&chunk) {
            Ok(_) => full = 0,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                full += 1;
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        }
    }
    app.set_zero_linger().unwrap();
    drop(app);
    let error = soon(copying).await.unwrap().unwrap_err();
    assert!(matches!(error, CopyError::Plain { side: Side::Right, .. }), "{error}");
}

/// A peer that wants no more may say so while its last bytes still wait for the application.
#[tokio::test]
async fn peer_that_wants_no_more_does_not_cut_what_it_has_said() {
    let mut pair = pair().await;
    let (near, mut far) = pair.stream().await;
    let (mut app, plain) = tcp().await;
    socket2::SockRef::from(&plain).set_send_buffer_size(4096).unwrap();
    let copying = tokio::spawn(async move { copy::splice(near, plain, &Counters::default()).await });
    far.write(Bytes::from(vec![0; 3 << 20])).await.unwrap();
    far.finish().await.unwrap();
    send(&mut app, "x").await;
    assert_eq!(soon(far.read()).await.unwrap().unwrap(), "x");
    far.reset(ResetReason::NoError);
    // The reset has arrived when another stream has.
    let _other = pair.stream().await;
    let mut all = vec![0; 3 << 20];
    soon(app.read_exact(&mut all)).await.unwrap();
    expect_end(&mut app).await;
    soon(copying).await.unwrap().unwrap();
}

#[tokio::test]
async fn failures_name_their_side() {
    let mut pair = pair().await;
    let (near, mut far) = pair.stream().await;
    let (_app, plain) = tcp().await;
    let copying = tokio::spawn(async move { copy::splice(near, plain, &Counters::default()).await });
    far.reset(ResetReason::Connect);
    let error = soon(copying).await.unwrap().unwrap_err();
    assert!(matches!(error, CopyError::Tunnel(StreamError::Reset(ResetReason::Connect))), "{error}");

    let (near, mut far) = pair.stream().await;
    let (app, plain) = tcp().await;
    let copying = tokio::spawn(async move { copy::splice(near, plain, &Counters::default()).await });
    app.set_zero_linger().unwrap();
    drop(app);
    let error = soon(copying).await.unwrap().unwrap_err();
    assert!(matches!(error, CopyError::Plain { side: Side::Right, .. }), "{error}");
    assert_eq!(soon(far.read()).await, Err(StreamError::Reset(ResetReason::Connect)));
}

/// A server that has said everything may stop listening: its last bytes and its end arrive nevertheless.
#[tokio::test]
async fn peer_that_wants_no_more_is_no_failure() {
    let mut pair = pair().await;
    let (near, mut far) = pair.stream().await;
    let (mut app, plain) = tcp().await;
    let copying = tokio::spawn(async move { copy::splice(near, plain, &Counters::default()).await });
    far.write(Bytes::from_static(b"all there is")).await.unwrap();
    far.finish().await.unwrap();
    drop(far);
    expect(&mut app, "all there is").await;
    expect_end(&mut app).await;
    soon(copying).await.unwrap().unwrap();
}

#[tokio::test]
async fn lost_tunnel_resets_the_application() {
    let mut pair = pair().await;
    let (near, _far) = pair.stream().await;
    let (mut app, plain) = tcp().await;
    let copying = tokio::spawn(async move { copy::splice(near, plain, &Counters::default()).await });
    pair.driver.abort();
    expect_reset(&mut app).await;
    let error = soon(copying).await.unwrap().unwrap_err();
    assert!(matches!(error, CopyError::Tunnel(StreamError::TunnelClosed)), "{error}");
}

#[tokio::test]
async fn dropped_copy_resets_both_sides() {
    for way in WAYS {
        let Chain { mut client, mut server, copies, counters: _, _pair } = chain(way).await;
        send(&mut client, "x").await;
        expect(&mut server, "x").await;
        copies[0].abort();
        expect_reset(&mut client).await;
        expect_reset(&mut server).await;
    }
}

#[tokio::test]
async fn server_may_speak_first() {
    for way in WAYS {
        let mut chain = chain(way).await;
        send(&mut chain.server, "220 ready").await;
        expect(&mut chain.client, "220 ready").await;
        send(&mut chain.client, "hello").await;
        expect(&mut chain.server, "hello").await;
    }
}

async fn pump(tcp: TcpStream, seed: u64, total: usize) -> (u64, usize, u64) {
    let (mut read, mut write) = tcp.into_split();
    let sending = tokio::spawn(async move {
        let (mut pattern, mut sum, mut left) = (Pattern::new(seed), Checksum::new(), total);
        while left > 0 {
            let chunk = pattern.next(left.min(100_000));
            left -= chunk.len();
            sum.add(&chunk);
            write.write_all(&chunk).await.unwrap();
        }
        write.shutdown().await.unwrap();
        // Dropping it would be a second end.
        write.forget();
        sum.0
    });
    let (mut sum, mut n, mut buffer) = (Checksum::new(), 0, vec![0; 128 << 10]);
    loop {
        let got = read.read(&mut buffer).await.unwrap();
        if got == 0 {
            break;
        }
        n += got;
        sum.add(&buffer[..got]);
    }
    (sending.await.unwrap(), n, sum.0)
}

#[tokio::test]
async fn bulk_in_both_directions_at_once_arrives_whole() {
    const TOTAL: usize = 64 << 20;
    for way in WAYS {
        let Chain { client, server, copies, counters, _pair } = chain(way).await;
        let (a, b) = (tokio::spawn(pump(client, 1, TOTAL)), tokio::spawn(pump(server, 2, TOTAL)));
        let ((a_sent, a_n, a_got), (b_sent, b_n, b_got)) = (a.await.unwrap(), b.await.unwrap());
        assert_eq!((a_n, a_got), (TOTAL, b_sent), "{way:?}");
        assert_eq!((b_n, b_got), (TOTAL, a_sent), "{way:?}");
        for copy in copies {
            soon(copy).await.unwrap().unwrap();
        }
        assert_eq!(counters.left_to_right.load(Ordering::Relaxed), TOTAL as u64);
        assert_eq!(counters.right_to_left.load(Ordering::Relaxed), TOTAL as u64);
    }
}

#[tokio::test]
async fn application_that_does_not_read_stops_the_sender() {
    for way in WAYS {
        let Chain { client, server, copies: _copies, counters, _pair } = chain(way).await;
        let chunk = vec![1; 64 << 10];
        let mut sent = 0u64;
        // Both kernels' buffers and one window may fill; then the sender's socket is full for good.
        let mut full = 0;
        while full < 20 {
            match client.try_write(&chunk) {
                Ok(n) => (sent, full) = (sent + n as u64, 0),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    full += 1;
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                }
            }
            assert!(sent < 64 << 20, "{way:?}: nothing stops the sender");
        }
        // Everything arrives once the application reads.
        let mut server = server;
        let mut rest = vec![0; 1 << 20];
        let mut got = 0;
        while got < sent {
            got += soon(server.read(&mut rest)).await.unwrap() as u64;
        }
        assert!(counters.left_to_right.load(Ordering::Relaxed) >= sent, "{way:?}");
    }
}

/// Single bytes to an application that does not read: HTTP/2 counts their frames against the whole connection, so they must
/// not pile up in it.
#[tokio::test]
async fn tiny_frames_to_a_stuck_application_do_not_harm_other_streams() {
    let mut pair = pair().await;
    let (near, far) = pair.stream().await;
    let (_near_read, mut write) = near.split();
    let (mut app, plain) = tcp().await;
    socket2::SockRef::from(&plain).set_send_buffer_size(4096).unwrap();
    let counters = Arc::new(Counters::default());
    let counted = Arc::clone(&counters);
    let _copying = tokio::spawn(async move { copy::splice(far, plain, &counted).await });
    // The kernel takes some before the application counts as stuck.
    write.write(Bytes::from(vec![0; 3 << 20])).await.unwrap();
    let mut seen = 0;
    loop {
        let now = counters.left_to_right.load(Ordering::Relaxed);
        if now > 0 && now == seen {
            break;
        }
        seen = now;
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    const TINY: usize = 200_000;
    for i in 0..TINY {
        write.write(Bytes::from_static(b"a")).await.unwrap();
        if i % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    let (mut other, mut other_far) = pair.stream().await;
    other.write(Bytes::from_static(b"unharmed")).await.unwrap();
    assert_eq!(soon(other_far.read()).await.unwrap().unwrap(), "unharmed");
    write.finish().await.unwrap();
    let mut all = Vec::new();
    soon(app.read_to_end(&mut all)).await.unwrap();
    assert_eq!(all.len(), (3 << 20) + TINY);
    assert_eq!(all.iter().filter(|b| **b == b'a').count(), TINY);
}

#[tokio::test]
async fn counters_are_readable_while_the_connection_is_open() {
    let mut chain = chain(Way::Tunnel).await;
    send(&mut chain.client, "12345").await;
    expect(&mut chain.server, "12345").await;
    let counters = Arc::clone(&chain.counters);
    until(|| counters.left_to_right.load(Ordering::Relaxed) == 5).await;
    assert_eq!(counters.right_to_left.load(Ordering::Relaxed), 0);
}
