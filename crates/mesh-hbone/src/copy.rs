//! Joins two byte streams until both directions have ended: a tunnel's stream with a TCP connection, or two TCP connections.
//!
//! - An end (FIN, END_STREAM) on one side becomes an end on the other; the other direction goes on.
//! - A reset, or any other failure of one side, resets the other: RST_STREAM with CONNECT_ERROR (RFC 9113 section 8.5),
//!   TCP RST. So does dropping the future before its end: a cut never looks like an orderly end.
//! - Backpressure passes through: a side that takes no more stops the reading of the other, and of the peer behind it.
//!
//! Both directions are polled by one task. Read buffers belong to the thread, not to the connection: an idle connection holds
//! none.

mod buffer;
mod direction;

use std::future::poll_fn;
use std::io;
use std::sync::atomic::AtomicU64;
use std::task::Poll;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::stream::{ResetReason, Stream, StreamError};
use direction::{FromPlain, FromStream, PlainSink};

/// A plain connection, usually TCP: it can end one direction (`poll_shutdown`), and abort both.
pub trait Plain: AsyncRead + AsyncWrite + Unpin + Send {
    /// Makes the connection end with a reset when it is dropped, instead of an orderly end.
    fn abort(&self);
}

impl Plain for TcpStream {
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

/// Joins a tunnel's stream (left) with a plain connection (right), see the module's page.
///
/// # Errors
/// Which side failed, and how. The other one has been reset then.
pub async fn splice<P: Plain>(stream: Stream, plain: P, counters: &Counters) -> Result<(), CopyError> {
    let mut stream = stream;
    let mut plain = Guarded(Some(plain));
    let (mut down, mut up) = (FromStream::default(), FromPlain::default());
    let result = poll_fn(|cx| {
        let Some(tcp) = plain.0.as_mut() else { return Poll::Ready(Ok(())) };
        let (read, write) = stream.halves();
        let received = down.poll(cx, read, tcp, &counters.left_to_right)?;
        let sent = up.poll(cx, tcp, Side::Right, write, &counters.right_to_left);
        let sent = match (received, sent) {
            (Poll::Pending, sent) => {
                let _ = sent?;
                return Poll::Pending;
            }
            // Nobody reads the stream any more, so nobody else would see a reset.
            (Poll::Ready(()), Poll::Pending) => write.poll_reset(cx).map(|error| Err(error.into())),
            (Poll::Ready(()), Poll::Ready(sent)) => Poll::Ready(sent),
        };
        sent.map(|sent| match sent {
            // The peer has said all it had to say and wants no more (RFC 9113 section 8.1): not a failure.
            Err(CopyError::Tunnel(StreamError::Reset(ResetReason::NoError))) => Ok(()),
            sent => sent,
        })
    })
    .await;
    match &result {
        Ok(()) => plain.finished(),
        Err(_) => stream.reset(ResetReason::Connect),
    }
    result
}

/// Joins two plain connections with the semantics of [`splice`].
///
/// # Errors
/// Which side failed, and how. The other one has been reset then.
pub async fn relay<L: Plain, R: Plain>(left: L, right: R, counters: &Counters) -> Result<(), CopyError> {
    let (mut left, mut right) = (Guarded(Some(left)), Guarded(Some(right)));
    let (mut out, mut back) = (FromPlain::default(), FromPlain::default());
    poll_fn(|cx| {
        let (Some(l), Some(r)) = (left.0.as_mut(), right.0.as_mut()) else { return Poll::Ready(Ok(())) };
        let sent =
            out.poll(cx, l, Side::Left, &mut PlainSink { plain: r, side: Side::Right }, &counters.left_to_right)?;
        let received =
            back.poll(cx, r, Side::Right, &mut PlainSink { plain: l, side: Side::Left }, &counters.right_to_left)?;
        match (sent, received) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok::<_, CopyError>(())),
            (Poll::Ready(()) | Poll::Pending, Poll::Pending) | (Poll::Pending, Poll::Ready(())) => Poll::Pending,
        }
    })
    .await?;
    left.finished();
    right.finished();
    Ok(())
}

/// A plain connection that is aborted if it is dropped before its end.
struct Guarded<P: Plain>(Option<P>);

impl<P: Plain> Guarded<P> {
    fn finished(&mut self) {
        self.0 = None;
    }
}

impl<P: Plain> Drop for Guarded<P> {
    fn drop(&mut self) {
        if let Some(plain) = &self.0 {
            plain.abort();
        }
    }
}
