//! Tunnels between a client and a server end, and test data.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use mesh_hbone::server::{self, Request};
use mesh_hbone::{Authority, Connect, ConnectionError, Headers, Options, ReadHalf, Tunnel, WriteHalf, client};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// How long anything may take that happens at once.
pub const SOON: Duration = Duration::from_secs(20);

pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what).await.expect("did not happen in time")
}

/// Waits until something is so.
pub async fn until(what: impl Fn() -> bool) {
    soon(async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

pub fn connect(authority: &str) -> Connect {
    Connect { authority: authority.parse::<Authority>().unwrap(), headers: Headers::new() }
}

/// One tunnel with both of its ends.
pub struct Pair {
    pub tunnel: Tunnel,
    /// CONNECT requests as they arrive.
    pub requests: mpsc::UnboundedReceiver<Request>,
    pub drain: Option<oneshot::Sender<()>>,
    pub server: JoinHandle<Result<(), ConnectionError>>,
    pub driver: JoinHandle<Result<(), ConnectionError>>,
}

/// A tunnel over these. What is held for it is noted for its server's end alone.
pub async fn pair_over<C, S>(client: C, server: S, options: &Options) -> Pair
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (tx, requests) = mpsc::unbounded_channel();
    let (drain, drained) = oneshot::channel::<()>();
    let server = tokio::spawn(serve(server, options.clone(), drained, tx));
    let unnoted = Options { backlog: std::sync::Arc::default(), ..options.clone() };
    let (tunnel, driver) = client::handshake(client, &unnoted).await.unwrap();
    Pair { tunnel, requests, drain: Some(drain), server, driver: tokio::spawn(driver) }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    io: S,
    options: Options,
    drained: oneshot::Receiver<()>,
    tx: mpsc::UnboundedSender<Request>,
) -> Result<(), ConnectionError> {
    let drain = async move {
        if drained.await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    server::serve(io, &options, drain, move |request| {
        let _ = tx.send(request);
        std::future::ready(())
    })
    .await
}

pub async fn pair() -> Pair {
    pair_with(&Options::default()).await
}

pub async fn pair_with(options: &Options) -> Pair {
    let (a, b) = pipe();
    pair_over(a, b, options).await
}

pub async fn tcp_pair() -> Pair {
    let (a, b) = tcp().await;
    pair_over(a, b, &Options::default()).await
}

pub fn pipe() -> (DuplexStream, DuplexStream) {
    tokio::io::duplex(256 << 10)
}

/// Both ends of a TCP connection over loopback.
pub async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (a, b) = tokio::join!(TcpStream::connect(address), listener.accept());
    (a.unwrap(), b.unwrap().0)
}

impl Pair {
    /// Opens a stream; both of its ends.
    pub async fn stream(&mut self) -> (mesh_hbone::Stream, mesh_hbone::Stream) {
        let opening = tokio::spawn({
            let tunnel = self.tunnel.clone();
            async move { tunnel.open(connect("10.0.0.1:80"), SOON).await }
        });
        let request = soon(self.requests.recv()).await.unwrap();
        let far = request.accept(&Headers::new()).unwrap();
        let (_, near) = soon(opening).await.unwrap().unwrap();
        (near, far)
    }
}

/// Bytes that differ by position, so that loss, duplication and reordering are seen.
pub struct Pattern(u64);

impl Pattern {
    pub fn new(seed: u64) -> Self {
        Pattern(seed | 1)
    }

    pub fn next(&mut self, n: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(n + 8);
        while bytes.len() < n {
            // xorshift64
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            bytes.extend_from_slice(&self.0.to_le_bytes());
        }
        bytes.truncate(n);
        bytes
    }
}

/// FNV-1a.
pub struct Checksum(pub u64);

impl Checksum {
    pub fn new() -> Self {
        Checksum(0xcbf2_9ce4_8422_2325)
    }

    pub fn add(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// Sends `total` patterned bytes and the end; the checksum of what was sent.
pub async fn send_all(mut write: WriteHalf, seed: u64, total: usize) -> u64 {
    let (mut pattern, mut sum, mut left) = (Pattern::new(seed), Checksum::new(), total);
    while left > 0 {
        let chunk = pattern.next(left.min(100_000));
        left -= chunk.len();
        sum.add(&chunk);
        write.write(Bytes::from(chunk)).await.unwrap();
    }
    write.finish().await.unwrap();
    sum.0
}

/// Receives to the end; length and checksum.
pub async fn receive_all(mut read: ReadHalf) -> (usize, u64) {
    let (mut sum, mut n) = (Checksum::new(), 0);
    while let Some(chunk) = read.read().await.unwrap() {
        n += chunk.len();
        sum.add(&chunk);
    }
    (n, sum.0)
}
