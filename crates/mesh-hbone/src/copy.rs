//! Joins two byte streams until both directions have ended: a tunnel's stream with a TCP connection, or two TCP connections.

use std::io;
use std::sync::atomic::AtomicU64;
use std::task::{Context, Poll};

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::stream::{Stream, StreamError};

/// A plain connection, usually TCP: it can end one direction (`poll_shutdown`), and abort both.
pub trait Plain: AsyncRead + AsyncWrite + Unpin + Send {
    /// Ready when a read would not wait. A buffer is taken only then, so an idle connection holds none.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Makes the connection end with a reset when it is dropped, instead of an orderly end.
    fn abort(&self);
}

impl Plain for TcpStream {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_read_ready(cx)
    }

    fn abort(&self) {
        // Fails only on a descriptor that is no TCP socket.
        let _ = self.set_zero_linger();
    }
}

/// Bytes carried so far, readable at any time.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the first to the second argument of [`splice`] or [`relay`].
    pub left_to_right: AtomicU64,
    /// From the second to the first.
    pub right_to_left: AtomicU64,
}

/// Which argument of [`splice`] or [`relay`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The first.
    Left,
    /// The second.
    Right,
}

/// Why a copy ended before both directions had ended in order. The other side has been reset.
#[derive(Debug, Error)]
pub enum CopyError {
    /// The tunnel's stream failed or was reset by the peer.
    #[error("tunnel: {0}")]
    Tunnel(#[from] StreamError),
    /// A plain connection failed or was reset.
    #[error("connection ({side:?}): {source}")]
    Plain {
        /// Which one.
        side: Side,
        /// How.
        source: io::Error,
    },
}

/// Joins a tunnel's stream (left) with a plain connection (right). See the module.
///
/// # Errors
/// Which side failed, and how. The other one has been reset then.
pub async fn splice<P: Plain>(stream: Stream, plain: P, counters: &Counters) -> Result<(), CopyError> {
    let _ = (stream, plain, counters);
    Err(CopyError::Tunnel(StreamError::TunnelClosed))
}

/// Joins two plain connections with the semantics of [`splice`].
///
/// # Errors
/// Which side failed, and how. The other one has been reset then.
pub async fn relay<L: Plain, R: Plain>(left: L, right: R, counters: &Counters) -> Result<(), CopyError> {
    let _ = (left, right, counters);
    Err(CopyError::Tunnel(StreamError::TunnelClosed))
}
