//! The pool: one dial for many callers, more tunnels when full, closed ones replaced, idle ones closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use mesh_hbone::pool::{IDLE_TIMEOUT, Pool, PoolError};
use mesh_hbone::server::{self, Request};
use mesh_hbone::{Headers, Options, Stream, Tunnel, client};
use tokio::sync::Semaphore;

use crate::support::{SOON, connect, pipe, soon, until};

#[derive(Debug, PartialEq)]
struct DialError(&'static str);

/// A peer whose every connection echoes; counts dials, which wait for permission.
#[derive(Clone)]
struct Peer {
    dials: Arc<AtomicUsize>,
    permission: Arc<Semaphore>,
    options: Options,
}

impl Peer {
    fn new(options: Options) -> Self {
        Peer { dials: Arc::default(), permission: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)), options }
    }

    fn dials(&self) -> usize {
        self.dials.load(Ordering::SeqCst)
    }

    async fn dial(self) -> Result<(Tunnel, usize), DialError> {
        let number = self.dials.fetch_add(1, Ordering::SeqCst);
        let permit = self.permission.acquire().await.unwrap();
        permit.forget();
        let (near, far) = pipe();
        let options = self.options.clone();
        tokio::spawn(async move { server::serve(far, &options, std::future::pending(), echo).await });
        let (tunnel, driver) = client::handshake(near, &self.options).await.unwrap();
        tokio::spawn(driver);
        Ok((tunnel, number))
    }
}

async fn echo(request: Request) {
    let mut stream = request.accept(&Headers::new()).unwrap();
    while let Ok(Some(data)) = stream.read().await {
        stream.write(data).await.unwrap();
    }
    let _ = stream.finish().await;
}

fn pool() -> Pool<&'static str, usize, DialError> {
    Pool::new(IDLE_TIMEOUT)
}

async fn open(pool: &Pool<&'static str, usize, DialError>, key: &'static str, peer: &Peer) -> Stream {
    let place = soon(pool.get(&key, || peer.clone().dial())).await.unwrap();
    place.slot.open(connect("10.0.0.1:80"), SOON).await.unwrap().1
}

#[tokio::test]
async fn tunnel_is_shared_by_key() {
    let (pool, peer) = (pool(), Peer::new(Options::default()));
    let _a = open(&pool, "a", &peer).await;
    let _b = open(&pool, "a", &peer).await;
    assert_eq!(peer.dials(), 1);
    let _c = open(&pool, "other", &peer).await;
    assert_eq!((peer.dials(), pool.tunnels()), (2, 2));
}

#[tokio::test]
async fn concurrent_callers_share_one_dial() {
    let (pool, mut peer) = (pool(), Peer::new(Options::default()));
    peer.permission = Arc::new(Semaphore::new(0));
    let callers: Vec<_> = (0..50)
        .map(|_| {
            let (pool, peer) = (pool.clone(), peer.clone());
            tokio::spawn(async move { pool.get(&"a", || peer.dial()).await })
        })
        .collect();
    until(|| peer.dials() == 1).await;
    peer.permission.add_permits(100);
    for caller in callers {
        soon(caller).await.unwrap().unwrap();
    }
    assert_eq!(peer.dials(), 1);
}

#[tokio::test]
async fn failed_dial_fails_all_who_waited_and_only_them() {
    let pool = pool();
    let gate = Arc::new(Semaphore::new(0));
    let dials = Arc::new(AtomicUsize::new(0));
    let callers: Vec<_> = (0..10)
        .map(|_| {
            let (pool, gate, dials) = (pool.clone(), Arc::clone(&gate), Arc::clone(&dials));
            tokio::spawn(async move {
                let dial = || async move {
                    dials.fetch_add(1, Ordering::SeqCst);
                    let _ = gate.acquire().await;
                    Err(DialError("no route"))
                };
                pool.get(&"a", dial).await
            })
        })
        .collect();
    until(|| dials.load(Ordering::SeqCst) == 1).await;
    gate.add_permits(1);
    for caller in callers {
        match soon(caller).await.unwrap() {
            Err(PoolError::Dial(error)) => assert_eq!(*error, DialError("no route")),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(dials.load(Ordering::SeqCst), 1);
    // The next caller dials again.
    let peer = Peer::new(Options::default());
    let _stream = open(&pool, "a", &peer).await;
}

#[tokio::test]
async fn caller_who_gives_up_does_not_stop_the_dial() {
    let (pool, mut peer) = (pool(), Peer::new(Options::default()));
    peer.permission = Arc::new(Semaphore::new(0));
    let first = tokio::spawn({
        let (pool, peer) = (pool.clone(), peer.clone());
        async move { pool.get(&"a", || peer.dial()).await.map(|_| ()) }
    });
    until(|| peer.dials() == 1).await;
    let second = tokio::spawn({
        let (pool, peer) = (pool.clone(), peer.clone());
        async move { pool.get(&"a", || peer.dial()).await.map(|_| ()) }
    });
    first.abort();
    let _ = first.await;
    peer.permission.add_permits(1);
    soon(second).await.unwrap().unwrap();
    assert_eq!((peer.dials(), pool.tunnels()), (1, 1));
}

#[tokio::test]
async fn dropped_dial_is_replaced() {
    let pool = pool();
    let lost = pool.get(&"a", || async { panic!("a bug in the dial") }).await;
    assert!(matches!(lost, Err(PoolError::Unusable)), "{lost:?}");
    let peer = Peer::new(Options::default());
    let _stream = open(&pool, "a", &peer).await;
}

#[tokio::test]
async fn full_tunnel_gets_a_second_one() {
    let (pool, peer) = (pool(), Peer::new(Options { client_streams: 3, ..Options::default() }));
    let mut streams = Vec::new();
    for _ in 0..7 {
        streams.push(open(&pool, "a", &peer).await);
    }
    assert_eq!((peer.dials(), pool.tunnels()), (3, 3));
    // Room that becomes free is used again.
    streams.clear();
    let _again = open(&pool, "a", &peer).await;
    assert_eq!(peer.dials(), 3);
}

#[tokio::test]
async fn five_hundred_parallel_streams() {
    let (pool, peer) = (pool(), Peer::new(Options::default()));
    let callers: Vec<_> = (0..500u32)
        .map(|i| {
            let (pool, peer) = (pool.clone(), peer.clone());
            tokio::spawn(async move {
                let mut stream = open(&pool, "a", &peer).await;
                let text = Bytes::from(i.to_string().repeat(1000));
                stream.write(text.clone()).await.unwrap();
                stream.finish().await.unwrap();
                let mut got = Vec::new();
                while let Some(data) = stream.read().await.unwrap() {
                    got.extend_from_slice(&data);
                }
                assert_eq!(got, text);
                // All of them are open at once.
                stream
            })
        })
        .collect();
    let mut open = Vec::new();
    for caller in callers {
        open.push(soon(caller).await.unwrap());
    }
    assert_eq!((peer.dials(), pool.tunnels()), (5, 5));
}

#[tokio::test]
async fn closed_tunnel_is_replaced() {
    let (pool, peer) = (pool(), Peer::new(Options::default()));
    let (near, far) = pipe();
    let (drain, drained) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(async move {
        let drain = async move {
            let _ = drained.await;
        };
        server::serve(far, &Options::default(), drain, echo).await
    });
    let (tunnel, driver) = client::handshake(near, &Options::default()).await.unwrap();
    let driver = tokio::spawn(driver);
    let slot = pool.get(&"a", || std::future::ready(Ok((tunnel, 0)))).await.unwrap();
    drop(slot);
    drain.send(()).unwrap();
    soon(driver).await.unwrap().unwrap();
    let _stream = open(&pool, "a", &peer).await;
    assert_eq!((peer.dials(), pool.tunnels()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn idle_tunnels_are_closed_and_busy_ones_kept() {
    let (pool, peer) = (pool(), Peer::new(Options::default()));
    let busy = open(&pool, "busy", &peer).await;
    drop(open(&pool, "idle", &peer).await);
    tokio::time::sleep(IDLE_TIMEOUT / 2).await;
    assert_eq!(pool.tunnels(), 2);
    tokio::time::sleep(IDLE_TIMEOUT).await;
    assert_eq!(pool.tunnels(), 1);
    drop(busy);
    tokio::time::sleep(IDLE_TIMEOUT * 2).await;
    assert_eq!(pool.tunnels(), 0);
    // The task that closes them starts again.
    drop(open(&pool, "idle", &peer).await);
    assert_eq!(pool.tunnels(), 1);
    tokio::time::sleep(IDLE_TIMEOUT * 2).await;
    assert_eq!(pool.tunnels(), 0);
}

/// Moves `bytes` there and back, in large pieces.
async fn bulk(stream: &mut Stream, bytes: usize) {
    let piece = Bytes::from(vec![7; 64 << 10]);
    for _ in 0..bytes / piece.len() {
        stream.write(piece.clone()).await.unwrap();
        let mut got = 0;
        while got < piece.len() {
            got += soon(stream.read()).await.unwrap().unwrap().len();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn bulk_streams_spread_over_tunnels_which_are_closed_when_idle() {
    let (pool, peer) = (pool(), Peer::new(Options::default()));
    let mut streams = Vec::new();
    // Who comes when all tunnels carry bulk data is not kept waiting; another tunnel is made for the next.
    for (expected, tunnels) in [(0, 1), (0, 2), (1, 2), (1, 3)] {
        let place = soon(pool.get(&"a", || peer.clone().dial())).await.unwrap();
        assert_eq!(place.about, expected);
        let mut stream = place.slot.open(connect("10.0.0.1:80"), SOON).await.unwrap().1;
        bulk(&mut stream, 2 << 20).await;
        streams.push(stream);
        until(|| pool.tunnels() == tunnels).await;
    }
    // The tunnel that is dialled last stays free for small messages, as many as there are.
    let mut small = Vec::new();
    for _ in 0..20 {
        let place = soon(pool.get(&"a", || peer.clone().dial())).await.unwrap();
        small.push(place.slot.open(connect("10.0.0.1:80"), SOON).await.unwrap().1);
    }
    assert_eq!(pool.tunnels(), 3);
    drop((streams, small));
    tokio::time::sleep(IDLE_TIMEOUT * 3 / 4).await;
    assert_eq!(pool.tunnels(), 1, "spare ones are closed early");
    tokio::time::sleep(IDLE_TIMEOUT).await;
    assert_eq!(pool.tunnels(), 0);
}

#[tokio::test]
async fn small_messages_share_one_tunnel_however_many_they_are() {
    let (pool, peer) = (pool(), Peer::new(Options::default()));
    let mut stream = open(&pool, "a", &peer).await;
    for _ in 0..2000 {
        stream.write(Bytes::from_static(&[1; 1000])).await.unwrap();
        let mut got = 0;
        while got < 1000 {
            got += soon(stream.read()).await.unwrap().unwrap().len();
        }
    }
    let _second = open(&pool, "a", &peer).await;
    assert_eq!((peer.dials(), pool.tunnels()), (1, 1));
}

#[tokio::test]
async fn a_tunnel_for_more_room_that_fails_harms_nobody_and_is_not_tried_at_once() {
    let (pool, peer) = (pool(), Peer::new(Options::default()));
    let mut first = open(&pool, "a", &peer).await;
    bulk(&mut first, 2 << 20).await;
    let dials = Arc::new(AtomicUsize::new(0));
    for _ in 0..10 {
        let dials = Arc::clone(&dials);
        let dial = || async move {
            dials.fetch_add(1, Ordering::SeqCst);
            Err(DialError("no room"))
        };
        let place = soon(pool.get(&"a", dial)).await.unwrap();
        place.slot.open(connect("10.0.0.1:80"), SOON).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!((dials.load(Ordering::SeqCst), pool.tunnels()), (1, 1));
}

#[tokio::test]
async fn retain_drops_tunnels_but_not_their_streams() {
    let (pool, peer) = (pool(), Peer::new(Options::default()));
    let mut a = open(&pool, "a", &peer).await;
    let _b = open(&pool, "b", &peer).await;
    pool.retain(|key| *key == "b");
    assert_eq!(pool.tunnels(), 1);
    a.write(Bytes::from_static(b"goes on")).await.unwrap();
    assert_eq!(soon(a.read()).await.unwrap().unwrap(), "goes on");
    let _again = open(&pool, "a", &peer).await;
    assert_eq!(peer.dials(), 3);
}

#[tokio::test]
async fn futures_are_send_and_small() {
    fn check<T: Send>(value: &T) -> usize {
        size_of_val(value)
    }
    let (pool, peer) = (pool(), Peer::new(Options::default()));
    let get = pool.get(&"a", || peer.clone().dial());
    assert!(check(&get) <= 1200, "{}", check(&get));
    tokio::time::timeout(Duration::from_secs(20), get).await.unwrap().unwrap();
}
