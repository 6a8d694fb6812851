//! TLS connections for the servers: a bounded number, also of one address, each with a bounded time for its handshake and for the
//! beginning of what it is for, and none of them able to hold up the others.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_runtime::drain;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tracing::{debug, warn};

/// Bytes that a client sends first: the preface of HTTP/2 (RFC 9113 section 3.4), after which its keepalive tells whether the
/// client lives. A request by HTTP/1.1 has as many.
const PREFACE: usize = 24;
/// Pause after a failed accept, which mostly means that descriptors ran out.
const PAUSE: Duration = Duration::from_millis(100);

/// What clients may have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Connections at a time, in all; more wait.
    pub(crate) all: usize,
    /// Connections at a time from one address, if it is not this machine's loopback; more are closed.
    pub(crate) of_one: usize,
    /// Time for the handshake, and then for what a client sends first.
    pub(crate) patience: Duration,
}

/// Accepts until `watcher` drains, within `bounds`.
pub(crate) fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    bounds: Bounds,
    watcher: drain::Watcher,
) -> ReceiverStream<io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        let permits = Arc::new(Semaphore::new(bounds.all));
        let sources = Sources::default();
        loop {
            let accepted = async {
                // The permit first: a connection over the limit stays in the kernel's queue.
                let permit = Arc::clone(&permits).acquire_owned().await;
                (permit, listener.accept().await)
            };
            let (permit, accepted) = tokio::select! {
                accepted = accepted => accepted,
                () = watcher.draining() => return,
                () = sender.closed() => return,
            };
            match (permit, accepted) {
                (Ok(permit), Ok((stream, peer))) => {
                    if let Some(source) = sources.admit(peer.ip().to_canonical(), bounds.of_one) {
                        let place = Place(permit, source);
                        tokio::spawn(handshake(stream, acceptor.clone(), place, bounds.patience, sender.clone()));
                    } else {
                        debug!(%peer, "closed: too many connections from its address");
                    }
                }
                (Ok(_), Err(error)) => {
                    warn!(%error, "accept failed");
                    tokio::time::sleep(PAUSE).await;
                }
                // The semaphore is never closed.
                (Err(_), _) => return,
            }
        }
    });
    ReceiverStream::new(receiver)
}

async fn handshake(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    place: Place,
    patience: Duration,
    sender: mpsc::Sender<io::Result<Connection>>,
) {
    let peer = stream.connect_info();
    let _ = stream.set_nodelay(true);
    match tokio::time::timeout(patience, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => {
            let _ = sender
                .send(Ok(Connection { stream, peer, preface: Some(Preface::within(patience)), _place: place }))
                .await;
        }
        Ok(Err(error)) => debug!(peer = ?peer.remote_addr, %error, "TLS handshake failed"),
        Err(_) => debug!(peer = ?peer.remote_addr, "TLS handshake took too long"),
    }
}

/// One accepted connection, which counts until it is dropped.
pub(crate) struct Connection {
    stream: TlsStream<TcpStream>,
    peer: TcpConnectInfo,
    preface: Option<Preface>,
    _place: Place,
}

/// What a connection counts as: one of all, one of its address.
struct Place(#[expect(dead_code, reason = "held")] OwnedSemaphorePermit, #[expect(dead_code, reason = "held")] Source);

/// Connections of each address.
#[derive(Clone, Default)]
struct Sources(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One connection of an address.
struct Source(Sources, IpAddr);

impl Sources {
    fn admit(&self, address: IpAddr, max: usize) -> Option<Source> {
        let mut sources = self.lock();
        let count = sources.entry(address).or_default();
        // Behind loopback is whoever may enter this network namespace, or someone whose connection is forwarded by the kubelet.
        if *count >= max && !address.is_loopback() {
            return None;
        }
        *count += 1;
        Some(Source(self.clone(), address))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let mut sources = self.0.lock();
        if let Some(count) = sources.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                sources.remove(&self.1);
            }
        }
    }
}

/// The beginning of what a client says, which it owes.
struct Preface {
    missing: usize,
    deadline: Pin<Box<Sleep>>,
}

impl Preface {
    fn within(patience: Duration) -> Self {
        Self { missing: PREFACE, deadline: Box::pin(tokio::time::sleep(patience)) }
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let Some(preface) = &mut self.preface else { return read };
        preface.missing = preface.missing.saturating_sub(buffer.filled().len() - before);
        if preface.missing == 0 {
            self.preface = None;
        } else if read.is_pending() && preface.deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use mesh_identity::authority::Authority;
    use mesh_identity::{Clock, tls};
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, ServerName};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client;
    use tokio_stream::StreamExt as _;

    use super::*;
    use crate::ca::{always, serving_config};

    /// Longest wait for something that will happen.
    const BOUND: Duration = Duration::from_secs(60);

    async fn connect(authority: &Authority, address: std::net::SocketAddr) -> client::TlsStream<TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        let pem = authority.roots_pem();
        roots.add_parsable_certificates(CertificateDer::pem_slice_iter(pem.as_bytes()).map(Result::unwrap));
        let builder = rustls::ClientConfig::builder_with_provider(tls::provider().clone());
        let builder = builder.with_safe_default_protocol_versions().unwrap();
        let config = builder.with_root_certificates(roots).with_no_client_auth();
        let name = ServerName::try_from("localhost").unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }

    #[tokio::test]
    async fn who_says_nothing_is_ended_and_who_has_begun_is_not() {
        let authority = Arc::new(Authority::generate("cluster.local", SystemTime::now()).unwrap());
        let names = vec!["localhost".to_owned()];
        let acceptor = TlsAcceptor::from(serving_config(always(authority.clone()), names, Clock::system()).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (signal, watcher) = drain::channel();
        let bounds = Bounds { all: 2, of_one: 2, patience: Duration::from_secs(4) };
        let mut incoming = accept(listener, acceptor, bounds, watcher);
        tokio::spawn(async move {
            while let Some(Ok(mut connection)) = incoming.next().await {
                tokio::spawn(async move {
                    // As a server that waits for whatever its client says.
                    let mut buffer = [0; 64];
                    while connection.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
                });
            }
        });
        let mut begun = connect(&authority, address).await;
        begun.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        // Each of them takes the one place that is left, and leaves it.
        for said in [&b""[..], b"P", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r"] {
            let mut silent = connect(&authority, address).await;
            silent.write_all(said).await.unwrap();
            let end = tokio::time::timeout(BOUND, silent.read(&mut [0])).await.expect("its end");
            assert!(!end.is_ok_and(|read| read > 0), "{said:?}");
        }
        let next = tokio::time::timeout(Duration::from_millis(10), begun.read(&mut [0])).await;
        assert!(next.is_err(), "it lives: {next:?}");
        drop(signal);
    }

    #[test]
    fn an_address_has_its_share() {
        let sources = Sources::default();
        let [one, other] = ["192.0.2.1", "192.0.2.2"].map(|address| address.parse::<IpAddr>().unwrap());
        let first = sources.admit(one, 2).unwrap();
        let _second = sources.admit(one, 2).unwrap();
        assert!(sources.admit(one, 2).is_none());
        let _other = sources.admit(other, 2).unwrap();
        drop(first);
        let _third = sources.admit(one, 2).unwrap();
        let near: Vec<_> = (0..9).filter_map(|_| sources.admit(IpAddr::from([127, 0, 0, 1]), 2)).collect();
        assert_eq!(near.len(), 9);
        drop(near);
        assert_eq!(sources.lock().len(), 2, "nobody is remembered who has gone");
    }
}
