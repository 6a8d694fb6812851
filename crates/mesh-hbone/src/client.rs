//! The client end: a tunnel over a byte stream, and the streams that are opened on it.

use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::backlog::Queued;
use crate::budget::{Budget, Budgeted};
use crate::connection::{Keepalive, Noted, Windows};
use crate::flood::Guarded;
use crate::headers::HeaderError;
use crate::stream::{ResetReason, Stream, StreamError};
use crate::{Authority, Backlog, ConnectionError, Headers, Options};

/// One connection to a peer, on which streams are opened. Cheap to clone; the connection ends after the last clone is dropped
/// and the last stream has ended.
#[derive(Debug, Clone)]
pub struct Tunnel {
    requests: h2::client::SendRequest<Queued>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    streams: AtomicUsize,
    /// Streams of these that carry bulk data.
    bulk: AtomicUsize,
    limit: usize,
    closed: AtomicBool,
    backlog: Arc<Backlog>,
}

/// Bytes in large pieces after which a stream counts as one that carries bulk data.
const BULK: u64 = 1 << 20;
/// Pieces shorter than this do not count for that: requests and answers, however many.
const LARGE: usize = 8 << 10;

/// A CONNECT request.
#[derive(Debug, Clone)]
pub struct Connect {
    /// The destination.
    pub authority: Authority,
    /// Fields beside it.
    pub headers: Headers,
}

/// What the peer said beside its 200.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// The answer's fields.
    pub headers: Headers,
}

/// Why a stream could not be opened.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum OpenError {
    /// The tunnel carries as many streams as it may.
    #[error("tunnel is full")]
    Full,
    /// The peer is going away (GOAWAY) and has not looked at the request.
    #[error("peer is going away")]
    GoAway,
    /// The connection ended before the peer answered.
    #[error("tunnel closed")]
    Closed,
    /// The peer answered with a status that is not 2xx.
    #[error("peer refused the connection with status {status}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The answer's fields.
        headers: Headers,
    },
    /// The peer reset the stream instead of answering.
    #[error("peer reset the stream: {0}")]
    Reset(ResetReason),
    /// The peer did not answer in the time that the caller gave.
    #[error("peer did not answer in time")]
    Timeout,
    /// The request cannot be sent, or the answer cannot be read.
    #[error("HTTP/2 error: {0}")]
    Protocol(String),
}

impl OpenError {
    /// Whether the same request may be tried on another tunnel: no byte of the application has been sent, and the fault is the
    /// tunnel's, not the destination's.
    pub fn is_retryable(&self) -> bool {
        match self {
            OpenError::Full | OpenError::GoAway | OpenError::Closed => true,
            OpenError::Reset(reason) => *reason == ResetReason::Refused,
            OpenError::Refused { .. } | OpenError::Timeout | OpenError::Protocol(_) => false,
        }
    }
}

/// One of a tunnel's streams: counted while it lives.
#[derive(Debug)]
pub(crate) struct StreamPermit {
    tunnel: Arc<Shared>,
    /// Bytes that it has moved in large pieces, both directions together.
    moved: AtomicU64,
}

impl StreamPermit {
    /// Notes a piece of this many bytes.
    pub(crate) fn moved(&self, bytes: usize) {
        if bytes < LARGE {
            return;
        }
        let bytes = bytes as u64;
        let before = self.moved.fetch_add(bytes, Ordering::Relaxed);
        if before < BULK && before + bytes >= BULK {
            self.tunnel.bulk.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        if *self.moved.get_mut() >= BULK {
            self.tunnel.bulk.fetch_sub(1, Ordering::Relaxed);
        }
        self.tunnel.streams.fetch_sub(1, Ordering::Release);
    }
}

/// Room for one stream on a tunnel, taken before it is opened, so that nobody else fills the tunnel meanwhile.
#[derive(Debug)]
pub struct Slot {
    requests: h2::client::SendRequest<Queued>,
    permit: StreamPermit,
}

/// Starts HTTP/2 on `io` as client. The driver moves the tunnel's bytes: spawn it. It ends when the connection has ended; if
/// it is dropped, the tunnel and all of its streams are closed. A connection that is lost while no stream is open has ended
/// in order.
///
/// # Errors
/// If the preface cannot be written in [`Options::handshake_timeout`].
pub async fn handshake<IO>(
    io: IO,
    options: &Options,
) -> Result<(Tunnel, impl Future<Output = Result<(), ConnectionError>> + Send + 'static), ConnectionError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut windows = Windows::new(options);
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(windows.size())
        .initial_connection_window_size(options.connection_window)
        .max_frame_size(options.max_frame_size)
        .max_header_list_size(options.max_header_list)
        .max_send_buffer_size(options.send_buffer)
        .initial_max_send_streams(options.client_streams)
        .enable_push(false);
    let budget = Budget::new(options.poll_budget);
    let noted = Noted(Arc::clone(&options.backlog));
    let io = Guarded::client(Budgeted::new(io, budget.clone()), &options.backlog);
    let handshake = builder.handshake::<_, Queued>(io);
    let (requests, mut connection) = timeout(options.handshake_timeout, budget.of_each_poll(handshake))
        .await
        .map_err(|_| ConnectionError::HandshakeTimeout)??;
    let shared = Arc::new(Shared {
        streams: AtomicUsize::new(0),
        bulk: AtomicUsize::new(0),
        limit: options.client_streams,
        closed: AtomicBool::new(false),
        backlog: Arc::clone(&options.backlog),
    });
    let mut keepalive = Keepalive::new(connection.ping_pong(), options);
    let closing = Closing(Arc::clone(&shared));
    let driver = async move {
        let (closing, noted) = (closing, noted);
        let moving = poll_fn(|cx| {
            windows.follow(|size| connection.set_initial_window_size(size).is_ok());
            let ended = std::pin::Pin::new(&mut connection).poll(cx);
            noted.0.note();
            if let Poll::Ready(result) = ended {
                return Poll::Ready(match result.map_err(ConnectionError::from) {
                    // Peers hang up without more ado when they are done.
                    Err(ConnectionError::Io(_)) if closing.0.streams.load(Ordering::Acquire) == 0 => Ok(()),
                    result => result,
                });
            }
            keepalive.poll(cx).map(|()| Err(ConnectionError::KeepaliveTimeout))
        });
        budget.of_each_poll(moving).await
    };
    Ok((Tunnel { requests, shared }, driver))
}

/// Marks the tunnel closed when its driver ends or is dropped.
struct Closing(Arc<Shared>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Release);
    }
}

impl Tunnel {
    /// Whether new streams may be opened, room aside: the connection lives and the peer is not going away.
    pub fn is_usable(&self) -> bool {
        if self.shared.closed.load(Ordering::Acquire) {
            return false;
        }
        // Ready(Err) after GOAWAY; registers nothing, since a fresh clone waits for no stream of its own.
        let mut probe = self.requests.clone();
        matches!(probe.poll_ready(&mut Context::from_waker(Waker::noop())), Poll::Ready(Ok(())))
    }

    /// Streams that are open or being opened through this tunnel.
    pub fn streams(&self) -> usize {
        self.shared.streams.load(Ordering::Acquire)
    }

    /// Streams of these that have carried much in large pieces: each can fill the connection by itself.
    pub fn bulk_streams(&self) -> usize {
        self.shared.bulk.load(Ordering::Relaxed)
    }

    /// Streams that this tunnel takes: the lower of [`Options::client_streams`] and the peer's limit.
    pub fn limit(&self) -> usize {
        self.shared.limit.min(self.requests.current_max_send_streams())
    }

    /// Takes room for one stream; `None` if the tunnel is full or not usable.
    pub fn reserve(&self) -> Option<Slot> {
        let permit = self.permit()?;
        self.is_usable().then(|| Slot { requests: self.requests.clone(), permit })
    }

    fn permit(&self) -> Option<StreamPermit> {
        let limit = self.limit();
        self.shared
            .streams
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < limit).then_some(n + 1))
            .ok()
            .map(|_| StreamPermit { tunnel: Arc::clone(&self.shared), moved: AtomicU64::new(0) })
    }

    /// Opens a stream and waits for the peer's answer, at most `within`. Given up on, the stream is reset.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(&self, connect: Connect, within: Duration) -> Result<(Accepted, Stream), OpenError> {
        let permit = self.permit().ok_or(OpenError::Full)?;
        if !self.is_usable() {
            return Err(if self.shared.closed.load(Ordering::Acquire) { OpenError::Closed } else { OpenError::GoAway });
        }
        Slot { requests: self.requests.clone(), permit }.open(connect, within).await
    }
}

impl Slot {
    /// Opens the stream and waits for the peer's answer, at most `within`. Given up on, the stream is reset.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(mut self, connect: Connect, within: Duration) -> Result<(Accepted, Stream), OpenError> {
        let request = request(&connect)?;
        let (response, send) = self.requests.send_request(request, false).map_err(|e| open_error(&e))?;
        // The clone of the connection's handle is not needed while the stream lives.
        drop(self.requests);
        let response = match timeout(within, response).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(open_error(&error)),
            Err(_) => return Err(OpenError::Timeout),
        };
        let (parts, recv) = response.into_parts();
        let headers = Headers::from_map(&parts.headers).map_err(|e| OpenError::Protocol(e.to_string()))?;
        if !parts.status.is_success() {
            return Err(OpenError::Refused { status: parts.status.as_u16(), headers });
        }
        let backlog = Arc::clone(&self.permit.tunnel.backlog);
        Ok((Accepted { headers }, Stream::new((recv, Bytes::new()), send, Some(self.permit), backlog)))
    }
}

fn request(connect: &Connect) -> Result<http::Request<()>, OpenError> {
    let invalid = |e: &dyn std::fmt::Display| OpenError::Protocol(e.to_string());
    let authority =
        http::uri::Authority::from_maybe_shared(Bytes::copy_from_slice(connect.authority.as_str().as_bytes()))
            .map_err(|e| invalid(&e))?;
    let mut request = http::Request::new(());
    *request.method_mut() = http::Method::CONNECT;
    *request.uri_mut() = http::Uri::from(authority);
    *request.headers_mut() = connect.headers.to_map().map_err(|e: HeaderError| invalid(&e))?;
    Ok(request)
}

fn open_error(error: &h2::Error) -> OpenError {
    if error.is_io() {
        return OpenError::Closed;
    }
    match error.reason() {
        Some(reason) if error.is_reset() => OpenError::Reset(reason.into()),
        Some(h2::Reason::NO_ERROR) if error.is_go_away() => OpenError::GoAway,
        Some(_) if error.is_go_away() => OpenError::Closed,
        Some(_) | None => OpenError::Protocol(error.to_string()),
    }
}

impl From<StreamError> for OpenError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Reset(reason) => OpenError::Reset(reason),
            StreamError::TunnelClosed => OpenError::Closed,
            StreamError::Finished => OpenError::Protocol(error.to_string()),
        }
    }
}
