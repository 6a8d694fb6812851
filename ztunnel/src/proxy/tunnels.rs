//! The HBONE tunnels that are open, both directions, for the config dump: who is at each end, what was negotiated, and how
//! many bytes the wire has carried.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use mesh_hbone::Backlog;
use mesh_model::SpiffeId;
use rustls::CommonState;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

use super::open::PodStream;
use super::pods::Pod;
use super::record::Direction;

/// Longest that the kernel waits for the peer to acknowledge what was sent: no longer than for the answer to a PING, so that a
/// peer that is cut off is noticed as soon under load.
const USER_TIMEOUT: Duration = Duration::from_secs(20);

/// All tunnels of the proxy. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Tunnels(Arc<Register>);

#[derive(Debug, Default)]
struct Register {
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<TunnelFacts>>>,
}

/// One tunnel.
#[derive(Debug)]
pub struct TunnelFacts {
    /// Outbound: this proxy opened it.
    pub direction: Direction,
    /// The pod on this node, `<namespace>/<name>`.
    pub pod: String,
    /// Who the pod is.
    pub identity: SpiffeId,
    /// The tunnel's own end.
    pub local: Option<SocketAddr>,
    /// The tunnel's far end.
    pub peer: SocketAddr,
    /// When it was connected.
    pub since: SystemTime,
    /// What the TLS handshake brought; none while it runs.
    pub negotiated: OnceLock<Negotiated>,
    /// Bytes read from the wire, TLS included.
    pub read: AtomicU64,
    /// Bytes written to the wire, TLS included.
    pub written: AtomicU64,
    /// Streams that this end serves now. Inbound only.
    pub streams: AtomicUsize,
    /// Streams that this end has served. Inbound only.
    pub served: AtomicU64,
    /// What it holds beside what its connections do.
    pub backlog: Arc<Backlog>,
    is_told: AtomicBool,
    close: Notify,
}

impl TunnelFacts {
    /// Tells the tunnel to end.
    pub fn close(&self) {
        self.is_told.store(true, Ordering::Relaxed);
        self.close.notify_one();
    }

    /// Whether the tunnel was told to end.
    pub fn is_told(&self) -> bool {
        self.is_told.load(Ordering::Relaxed)
    }

    /// Resolves once the tunnel was told to end. For the one task that carries it.
    pub async fn told_to_close(&self) {
        self.close.notified().await;
    }
}

/// What a TLS handshake brought.
#[derive(Clone, Debug)]
pub struct Negotiated {
    /// Who is at the far end, proven by its certificate.
    pub peer: SpiffeId,
    /// TLS version.
    pub version: String,
    /// Cipher suite.
    pub suite: String,
    /// Key exchange group.
    pub group: String,
    /// Application protocol.
    pub alpn: String,
}

impl Negotiated {
    /// Of a finished handshake.
    pub fn of(peer: SpiffeId, connection: &CommonState) -> Self {
        let unknown = || "unknown".to_owned();
        Self {
            peer,
            version: connection.protocol_version().map_or_else(unknown, |version| format!("{version:?}")),
            suite: connection.negotiated_cipher_suite().map_or_else(unknown, |suite| format!("{:?}", suite.suite())),
            group: connection
                .negotiated_key_exchange_group()
                .map_or_else(unknown, |group| format!("{:?}", group.name())),
            alpn: connection.alpn_protocol().map_or_else(unknown, |alpn| String::from_utf8_lossy(alpn).into_owned()),
        }
    }
}

impl Tunnels {
    /// Lists a tunnel over `io` while the returned stream lives, and counts what it carries. What it holds is noted in
    /// `backlog`.
    pub fn list(
        &self,
        direction: Direction,
        pod: &Pod,
        peer: SocketAddr,
        io: PodStream,
        backlog: &Arc<Backlog>,
    ) -> Metered {
        // Fails only on what is no TCP socket.
        let _ = SockRef::from(&*io).set_tcp_user_timeout(Some(USER_TIMEOUT));
        let facts = Arc::new(TunnelFacts {
            direction,
            pod: format!("{}/{}", pod.namespace, pod.name),
            identity: pod.identity.clone(),
            local: io.local_addr().ok(),
            peer,
            since: SystemTime::now(),
            negotiated: OnceLock::new(),
            read: AtomicU64::new(0),
            written: AtomicU64::new(0),
            streams: AtomicUsize::new(0),
            served: AtomicU64::new(0),
            backlog: Arc::clone(backlog),
            is_told: AtomicBool::new(false),
            close: Notify::new(),
        });
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        self.0.open().insert(id, Arc::clone(&facts));
        Metered { io, facts, id, register: Arc::clone(&self.0) }
    }

    /// The tunnels that are open now.
    pub fn all(&self) -> Vec<Arc<TunnelFacts>> {
        self.0.open().values().cloned().collect()
    }
}

impl Register {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<TunnelFacts>>> {
        // Inserting and removing leave nothing half done.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A tunnel's TCP connection, with its bytes counted.
#[derive(Debug)]
pub struct Metered {
    io: PodStream,
    facts: Arc<TunnelFacts>,
    id: u64,
    register: Arc<Register>,
}

impl Metered {
    /// What is known of the tunnel.
    pub fn facts(&self) -> &Arc<TunnelFacts> {
        &self.facts
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        self.register.open().remove(&self.id);
    }
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        self.facts.read.fetch_add((buf.filled().len() - before) as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        self.facts.written.fetch_add(written as u64, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs))?;
        self.facts.written.fetch_add(written as u64, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
