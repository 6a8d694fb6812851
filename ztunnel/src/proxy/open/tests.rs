use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::proxy::testing::{open_sockets, soon, until};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn tcp() -> OwnedFd {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.into()
}

fn udp() -> OwnedFd {
    let socket = std::net::UdpSocket::bind(ANY).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.into()
}

/// A connection of the pod, as it was accepted, and its peer.
async fn accepted(open: &Arc<OpenSockets>) -> (PodStream, TcpStream) {
    let listener = TcpListener::bind(ANY).await.unwrap();
    let gate = open.gate();
    let (peer, came) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), soon(gate.accept(&listener)));
    let Came::In(stream, _) = came.unwrap() else { panic!("there is room") };
    (stream, peer.unwrap())
}

/// How the connection ends, seen from its peer, whatever came before.
async fn end(peer: &mut TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    while soon(peer.read(&mut buffer)).await? > 0 {}
    Ok(())
}

fn is_reset(end: io::Result<()>) -> bool {
    end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

fn is_pending(future: Pin<&mut impl Future>) -> bool {
    future.poll(&mut Context::from_waker(std::task::Waker::noop())).is_pending()
}

#[tokio::test]
async fn what_is_ended_by_force_is_reset_and_what_it_had_to_send_is_not_sent() {
    let open = open_sockets();
    let (mut stream, mut peer) = accepted(&open).await;
    let (quiet, mut quiet_peer) = accepted(&open).await;
    // More than the peer takes before it reads.
    let more = vec![1; 1 << 16];
    stream.writable().await.unwrap();
    while stream.try_write(&more).is_ok() {
        tokio::task::yield_now().await;
    }
    assert_eq!(open.abort().await, Aborted { ended: 2, left: 0 });
    assert!(is_reset(end(&mut peer).await));
    assert!(is_reset(end(&mut quiet_peer).await));
    assert!(stream.write_all(b"more").await.is_err());
    assert_eq!(open.count(), 2, "their owners have them still");
    drop((stream, quiet));
    assert_eq!(open.count(), 0);
}

#[tokio::test]
async fn what_is_not_connected_when_the_pod_goes_never_is() {
    let open = open_sockets();
    let [early, late] = [tcp(), tcp()].map(|socket| open.enter(socket).unwrap());
    let listener = TcpListener::bind(ANY).await.unwrap();
    let to = listener.local_addr().unwrap();
    open.close();
    early.connect(to).await.unwrap_err();
    assert_eq!(open.abort().await, Aborted { ended: 1, left: 0 });
    late.connect(to).await.unwrap_err();
    let (full, _) = open.enter(tcp()).unwrap_err();
    assert_eq!(full, Full::PodGone);
    let _other = TcpStream::connect(to).await.unwrap();
    soon(listener.accept()).await.unwrap();
    assert!(is_pending(std::pin::pin!(listener.accept())), "only the other one came");
}

#[tokio::test]
async fn what_is_connecting_when_the_pod_goes_is_ended() {
    let open = open_sockets();
    // Its queue is full: nobody is answered any more.
    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    full.bind(&ANY.into()).unwrap();
    full.listen(0).unwrap();
    let to = full.local_addr().unwrap().as_socket().unwrap();
    let _first = TcpStream::connect(to).await.unwrap();
    let connecting = tokio::spawn(open.enter(tcp()).unwrap().connect(to));
    tokio::task::yield_now().await;
    assert!(!connecting.is_finished());
    assert_eq!(open.abort().await, Aborted { ended: 1, left: 0 });
    soon(connecting).await.unwrap().unwrap_err();
}

#[tokio::test]
async fn a_number_that_its_owner_has_closed_is_left_alone() {
    let open = open_sockets();
    let (stream, _peer) = accepted(&open).await;
    let number = stream.as_raw_fd();
    drop(stream);
    let failed = open.enter(tcp()).unwrap().map(|socket| {
        drop(socket);
        Err::<OwnedFd, _>(io::ErrorKind::OutOfMemory.into())
    });
    failed.unwrap_err();
    // Whoever has the numbers now.
    let mut pairs: Vec<_> = (0..64).map(|_| UnixStream::pair().unwrap()).collect();
    assert_eq!(open.abort().await, Aborted::default(), "{number}");
    for (a, b) in &mut pairs {
        std::io::Write::write_all(a, b"x").unwrap();
        std::io::Read::read_exact(b, &mut [0]).unwrap();
    }
}

#[tokio::test]
async fn nothing_comes_in_once_the_pod_is_gone() {
    let open = open_sockets();
    let listener = TcpListener::bind(ANY).await.unwrap();
    let gate = open.gate();
    let _peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    open.close();
    assert!(is_pending(std::pin::pin!(gate.accept(&listener))));
    assert_eq!(open.count(), 0);
}

#[tokio::test]
async fn one_that_is_too_much_is_reset() {
    // One is kept free.
    let open = OpenSockets::new(Descriptors::new(8));
    let listener = TcpListener::bind(ANY).await.unwrap();
    let to = listener.local_addr().unwrap();
    let held: Vec<_> = (0..4).map(|_| open.enter(tcp()).unwrap()).collect();
    let (full, _) = open.enter(tcp()).unwrap_err();
    assert_eq!(full, Full::TooMany);
    let gate = open.gate();
    let mut peer = TcpStream::connect(to).await.unwrap();
    let came = soon(gate.accept(&listener)).await.unwrap();
    let Came::TooMany { peer: from, local } = came else { panic!("{came:?}") };
    assert_eq!((from, local), (peer.local_addr().unwrap(), to));
    assert!(is_reset(end(&mut peer).await));
    drop(held);
    let _peer = TcpStream::connect(to).await.unwrap();
    assert!(matches!(soon(gate.accept(&listener)).await.unwrap(), Came::In(..)));
}

#[tokio::test]
async fn datagrams_are_neither_sent_nor_received_any_more() {
    let open = open_sockets();
    let resolver = UdpSocket::bind(ANY).await.unwrap();
    let connected = open.enter(udp()).unwrap().connect_datagrams(resolver.local_addr().unwrap()).unwrap();
    let own = connected.local_addr().unwrap();
    connected.send(b"before").await.unwrap();
    assert_eq!(soon(resolver.recv(&mut [0; 16])).await.unwrap(), 6);
    assert_eq!(open.abort().await, Aborted { ended: 1, left: 0 });
    connected.send(b"after").await.unwrap_err();
    // Refused, or lost.
    let _ = resolver.send_to(b"answer", own).await;
    assert!(!matches!(connected.try_recv(&mut [0; 16]), Ok(1..)));
}

#[tokio::test]
async fn what_the_kernel_does_not_end_is_told() {
    let open = open_sockets();
    let (odd, _other) = UnixStream::pair().unwrap();
    let _odd = open.enter(odd).unwrap();
    let (_stream, mut peer) = accepted(&open).await;
    assert_eq!(open.abort().await, Aborted { ended: 1, left: 1 });
    assert!(is_reset(end(&mut peer).await));
}

/// Threads accept and connect without pause, and what they have got is never dropped; the pod goes meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_is_under_way_when_the_pod_goes_ends() {
    for _ in 0..20 {
        let open = open_sockets();
        let inside = Arc::new(TcpListener::bind(ANY).await.unwrap());
        let outside = Arc::new(TcpListener::bind(ANY).await.unwrap());
        let [into, out_of] = [&inside, &outside].map(|listener| listener.local_addr().unwrap());
        let (kept, peers) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let keep = |streams: &Arc<Mutex<Vec<_>>>, stream| lock(streams).push(stream);
        let accepting = tokio::spawn({
            let (open, inside, kept) = (Arc::clone(&open), Arc::clone(&inside), Arc::clone(&kept));
            async move {
                let gate = open.gate();
                while let Ok(Came::In(stream, _)) = gate.accept(&inside).await {
                    keep(&kept, stream);
                }
            }
        });
        let connecting = tokio::spawn({
            let (open, kept) = (Arc::clone(&open), Arc::clone(&kept));
            async move {
                while let Ok(socket) = open.enter(tcp()) {
                    if let Ok(stream) = socket.connect(out_of).await {
                        keep(&kept, stream);
                    }
                }
            }
        });
        let coming = tokio::spawn({
            let peers = Arc::clone(&peers);
            async move {
                while let Ok(peer) = TcpStream::connect(into).await {
                    lock(&peers).push(peer);
                }
            }
        });
        let reached = tokio::spawn({
            let (peers, outside) = (Arc::clone(&peers), Arc::clone(&outside));
            async move {
                while let Ok((peer, _)) = outside.accept().await {
                    lock(&peers).push(peer);
                }
            }
        });
        until(|| lock(&kept).len() > 50).await;
        assert_eq!(open.abort().await.left, 0);
        soon(connecting).await.unwrap();
        accepting.abort();
        coming.abort();
        reached.abort();
        let _ = (accepting.await, coming.await, reached.await);
        // All that reached the listener outside before it was ended; what waits in the one inside has reached nobody.
        drop(inside);
        let mut peers = std::mem::take(&mut *lock(&peers));
        while let Ok((peer, _)) = SockRef::from(&*outside).accept() {
            peer.set_nonblocking(true).unwrap();
            peers.push(TcpStream::from_std(peer.into()).unwrap());
        }
        for peer in &mut peers {
            assert!(is_reset(end(peer).await), "the pod has its other end open, and it carries");
        }
        assert!(!lock(&kept).is_empty());
    }
}
