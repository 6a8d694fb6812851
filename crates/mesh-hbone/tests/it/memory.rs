//! What is held for receivers that do not take it: it is counted, it stays little, and it is given back.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_hbone::copy::{self, CopyError, Counters};
use mesh_hbone::memory::{Hold, Limits, Share};
use mesh_hbone::{Backlog, Memory, Options, Stream, client};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::support::{Pair, SOON, connect, pair_over, pair_with, pipe, soon, tcp, until};

const MIB: usize = 1 << 20;

/// A copy that is counted for this share.
fn counted(share: &Share) -> Arc<Counters> {
    Arc::new(Counters::noted(Hold::of(share.clone())))
}

/// Little room in the kernel.
async fn narrow() -> (TcpStream, TcpStream) {
    let (a, b) = tcp().await;
    for end in [&a, &b] {
        socket2::SockRef::from(end).set_send_buffer_size(4096).unwrap();
    }
    (a, b)
}

/// Writes until nothing more is taken from any of these.
async fn fill(clients: &mut [TcpStream]) {
    let chunk = vec![7; 64 << 10];
    let mut still = 0;
    while still < 20 {
        still += 1;
        for client in clients.iter() {
            while client.try_write(&chunk).is_ok() {
                still = 0;
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Fills until so many bytes are held and nothing more is taken: what the kernel sends again comes late.
async fn fill_until(held: usize, share: &Share, clients: &mut [TcpStream]) {
    let filling = async {
        fill(clients).await;
        while share.held() <= held {
            fill(clients).await;
        }
    };
    soon(filling).await;
}

type Copy = JoinHandle<Result<(), CopyError>>;

/// Direct, so that all of it waits here.
async fn relayed(share: &Share) -> (TcpStream, TcpStream, Copy) {
    let ((client, near), (far, server)) = (narrow().await, narrow().await);
    let counters = counted(share);
    (client, server, tokio::spawn(async move { copy::relay(near, far, &counters).await }))
}

#[tokio::test]
async fn hundreds_of_stalled_connections_hold_little_more_than_where_it_begins_to_be_spared() {
    const MANY: usize = 400;
    let limits = Limits::of(32 * MIB);
    let memory = Memory::new(limits);
    let share = memory.share();
    let (mut clients, mut servers, mut copies) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..MANY {
        let (client, server, copying) = relayed(&share).await;
        clients.push(client);
        servers.push(server);
        copies.push(copying);
    }
    fill_until(limits.soft / 2, &share, &mut clients).await;
    let held = share.held();
    // One read of the fast kind may be the last; each of the others, and each direction, a small one.
    assert!(held < limits.soft + (256 << 10) + MANY * (8 << 10), "{held}");
    assert_eq!(memory.held(), held);
    // All of it is there: what was sent arrives, in order and whole, while others hold.
    let mut got = 0;
    let mut into = vec![0; 64 << 10];
    clients[3].shutdown().await.unwrap();
    while let n @ 1.. = soon(servers[3].read(&mut into)).await.unwrap() {
        assert!(into[..n].iter().all(|byte| *byte == 7));
        got += n;
    }
    assert!(got > 0);
    drop((clients, servers));
    for copying in copies {
        let _ = soon(copying).await.unwrap();
    }
    assert_eq!((share.held(), memory.held()), (0, 0));
}

/// What others of its share hold makes a connection slower, and changes nothing of what it carries.
#[tokio::test]
async fn a_connection_under_pressure_carries_everything() {
    const TOTAL: usize = 8 * MIB;
    let memory = Memory::new(Limits::of(MIB / 2));
    let (share, other) = (memory.share(), memory.share());
    let (mut ends, mut kept) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let (client, server, copying) = relayed(&share).await;
        ends.push(client);
        kept.push((server, copying));
    }
    fill_until(memory.limits().soft, &share, &mut ends).await;
    for share in [share, other] {
        let (mut client, mut server, _copying) = relayed(&share).await;
        let sending = tokio::spawn(async move {
            client.write_all(&vec![5; TOTAL]).await.unwrap();
            client.shutdown().await.unwrap();
            client
        });
        let mut all = Vec::new();
        soon(server.read_to_end(&mut all)).await.unwrap();
        assert_eq!(all.len(), TOTAL);
        soon(sending).await.unwrap();
    }
    drop((ends, kept));
}

/// An application that does not read, at the end of a stream.
async fn unread(far: Stream, share: &Share) -> (TcpStream, Arc<Counters>, Copy) {
    let (app, plain) = narrow().await;
    let counters = counted(share);
    let copying = tokio::spawn({
        let counters = Arc::clone(&counters);
        async move { copy::splice(far, plain, &counters).await }
    });
    (app, counters, copying)
}

/// What a tunnel's streams hold stays within one window each while all is well, and becomes little under pressure; a window
/// that was made small is large again when the pressure is over.
#[tokio::test]
async fn windows_follow_the_pressure() {
    let limits = Limits::of(16 * MIB);
    let share = Memory::new(limits).share();
    let noted = || Options { backlog: Backlog::of(share.clone()), ..Options::default() };
    let mut stuck = pair_with(&Options::default()).await;
    let mut spared = tcp_pair_with(&noted()).await;
    let mut writers = Vec::new();
    let mut kept = Vec::new();
    for _ in 0..2 {
        let (mut near, far) = stuck.stream().await;
        kept.push(unread(far, &share).await);
        writers.push(tokio::spawn(async move {
            let _ = near.write(Bytes::from(vec![0; 6 * MIB])).await;
            near
        }));
    }
    until(|| share.held() > 6 * MIB).await;
    // The tunnel has not seen it: nothing has moved on it. The first stream's own window is what it was.
    let (_first, _second) = spared.stream().await;
    let (mut near, far) = spared.stream().await;
    let (mut app, counters, copying) = unread(far, &share).await;
    let writing = tokio::spawn(async move {
        near.write(Bytes::from(vec![9; 3 * MIB])).await.unwrap();
        near.finish().await.unwrap();
        near
    });
    until(|| counters.hold.bytes() > 64 << 10).await;
    // It takes no more.
    let mut before = 0;
    while before != counters.hold.bytes() {
        before = counters.hold.bytes();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(before <= 600 << 10, "{before}");
    assert!(!writing.is_finished());
    // The others go, and the rest comes.
    for writer in writers {
        writer.abort();
    }
    drop(kept);
    drop(stuck);
    let mut all = Vec::new();
    let reading = async {
        app.read_to_end(&mut all).await.unwrap();
    };
    soon(reading).await;
    assert_eq!(all.len(), 3 * MIB);
    soon(writing).await.unwrap();
    app.shutdown().await.unwrap();
    drop(app);
    let _ = soon(copying).await;
    until(|| share.held() == 0).await;
    // As large as ever.
    let (mut near, far) = spared.stream().await;
    let (_app, counters, _copying) = unread(far, &share).await;
    let writing = tokio::spawn(async move {
        near.write(Bytes::from(vec![9; 3 * MIB])).await.unwrap();
        near
    });
    // Its end would take back what waits.
    let _near = soon(writing).await.unwrap();
    until(|| counters.hold.bytes() > 2 * MIB).await;
}

async fn tcp_pair_with(options: &Options) -> Pair {
    let (a, b) = tcp().await;
    pair_over(a, b, options).await
}

/// A peer that does not read its tunnel: what is queued for it counts, single bytes with what they cost.
#[tokio::test]
async fn what_is_queued_for_a_tunnel_counts() {
    let share = Memory::new(Limits::of(64 * MIB)).share();
    let options = Options { backlog: Backlog::of(share.clone()), ..Options::default() };
    let (io, mut far) = pipe();
    let (tunnel, driver) = client::handshake(io, &options).await.unwrap();
    let driver = tokio::spawn(driver);
    // SETTINGS with windows of 4 MiB, the connection's window, and the answer to the first request.
    far.write_all(&[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0x40, 0, 0]).await.unwrap();
    far.write_all(&[0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0x40, 0, 0]).await.unwrap();
    let opening = tokio::spawn(async move { tunnel.open(connect("10.0.0.1:80"), SOON).await.unwrap() });
    let mut seen = Vec::new();
    while !has_headers(&seen) {
        let mut byte = [0];
        soon(far.read_exact(&mut byte)).await.unwrap();
        seen.push(byte[0]);
    }
    far.write_all(&[0, 0, 1, 1, 4, 0, 0, 0, 1, 0x88]).await.unwrap();
    let (_, mut stream) = soon(opening).await.unwrap();
    let writing = tokio::spawn(async move {
        let _ = stream.write(Bytes::from(vec![0; 2 * MIB])).await;
        stream
    });
    // The pipe takes 256 KiB, the queue of a stream 512.
    until(|| share.held() > 200 << 10).await;
    assert!(share.held() < MIB, "{}", share.held());
    writing.abort();
    let _ = writing.await;
    driver.abort();
    let _ = driver.await;
    until(|| share.held() == 0).await;
}

/// Whether a HEADERS frame has come completely, after the preface.
fn has_headers(seen: &[u8]) -> bool {
    let mut rest = seen.get(24..).unwrap_or_default();
    while let [a, b, c, kind, ..] = *rest {
        let length = 9 + (usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c));
        let Some(next) = rest.get(length..) else { return false };
        if kind == 1 {
            return true;
        }
        rest = next;
    }
    false
}
