//! Joins two byte streams until both directions have ended: a tunnel's stream with a TCP connection, or two TCP connections.
//!
//! - An end (FIN, END_STREAM) on one side becomes an end on the other; the other direction goes on.
//! - A reset, or any other failure of one side, resets the other: RST_STREAM with CONNECT_ERROR (RFC 9113 section 8.5),
//!   TCP RST. So does dropping the future before its end: a cut never looks like an orderly end.
//!   A reset is seen in every state: also when that side has ended its direction and there is nothing to write to it, and
//!   when its bytes wait for the other side.
//! - Backpressure passes through: a side that takes no more stops the reading of the other, and of the peer behind it. What
//!   waits meanwhile is noted in the account of [`memory`](crate::memory); under its pressure as little as possible waits.
//!
//! Both directions are polled by one task. Read buffers belong to the thread, not to the connection: an idle connection holds
//! none.

mod buffer;
mod direction;
mod plain;

use std::future::poll_fn;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use thiserror::Error;

use crate::memory::{Hold, Pressure};
use crate::stream::{ResetReason, Stream, StreamError};
use direction::{FromPlain, FromStream, PlainSink, at};
pub use plain::Plain;

/// Bytes carried so far, readable at any time.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the first to the second argument of [`splice`] or [`relay`].
    pub left_to_right: AtomicU64,
    /// From the second to the first.
    pub right_to_left: AtomicU64,
    /// What is held for it now, and in whose account; by default in nobody's.
    pub hold: Hold,
}

impl Counters {
    /// Nothing is carried yet; what will be held is noted there.
    pub fn noted(hold: Hold) -> Self {
        Counters { hold, ..Counters::default() }
    }
}

/// Notes what a copy holds, until it ends.
struct Noting<'a> {
    counters: &'a Counters,
    pressure: Pressure,
    /// Bytes carried when it was noted last.
    carried: u64,
}

impl<'a> Noting<'a> {
    fn new(counters: &'a Counters) -> Self {
        Noting { counters, pressure: Pressure::Low, carried: 0 }
    }

    /// How the share is served, for one turn.
    fn pressure(&mut self) -> Pressure {
        self.pressure = self.counters.hold.pressure(self.pressure);
        self.pressure
    }

    /// The turn is over, and so much is held.
    fn note(&mut self, bytes: usize) {
        let Counters { left_to_right, right_to_left, hold } = self.counters;
        let carried = left_to_right.load(Ordering::Relaxed) + right_to_left.load(Ordering::Relaxed);
        hold.note(bytes, carried != self.carried);
        self.carried = carried;
    }
}

impl Drop for Noting<'_> {
    fn drop(&mut self) {
        self.counters.hold.note(0, false);
    }
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
    let result = match &plain.0 {
        Some(plain) => join(&mut stream, plain, counters).await,
        None => Ok(()),
    };
    match &result {
        Ok(()) => plain.finished(),
        Err(_) => stream.reset(ResetReason::Connect),
    }
    result
}

async fn join<P: Plain>(stream: &mut Stream, plain: &P, counters: &Counters) -> Result<(), CopyError> {
    let (read, write) = stream.halves();
    let (mut down, mut up, mut watch) = (FromStream::default(), FromPlain::default(), Watch::new(plain, Side::Right));
    let mut noting = Noting::new(counters);
    poll_fn(|cx| {
        let pressure = noting.pressure();
        let received = down.poll(cx, read, plain, &counters.left_to_right, pressure)?;
        let mut sent = up.poll(cx, plain, Side::Right, write, &counters.right_to_left, pressure);
        noting.note(down.held() + up.held());
        if sent.is_pending() && down.has_ended() {
            sent = write.poll_reset(cx).map(|error| Err(error.into()));
        }
        if let Poll::Ready(Err(CopyError::Tunnel(StreamError::Reset(ResetReason::NoError)))) = &sent
            && down.has_ended()
        {
            // The peer has said all it had to say and wants no more (RFC 9113 section 8.1): not a failure.
            up.stop();
            sent = Poll::Ready(Ok(()));
        }
        match (received, sent?) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
            (Poll::Ready(()) | Poll::Pending, Poll::Pending) | (Poll::Pending, Poll::Ready(())) => {
                watch.poll_unless(cx, up.is_reading())
            }
        }
    })
    .await
}

/// Joins two plain connections with the semantics of [`splice`].
///
/// # Errors
/// Which side failed, and how. The other one has been reset then.
pub async fn relay<L: Plain, R: Plain>(left: L, right: R, counters: &Counters) -> Result<(), CopyError> {
    let (mut left, mut right) = (Guarded(Some(left)), Guarded(Some(right)));
    if let (Some(left), Some(right)) = (&left.0, &right.0) {
        join_plain(left, right, counters).await?;
    }
    left.finished();
    right.finished();
    Ok(())
}

async fn join_plain<L: Plain, R: Plain>(left: &L, right: &R, counters: &Counters) -> Result<(), CopyError> {
    let (mut out, mut back) = (FromPlain::default(), FromPlain::default());
    let (mut to_left, mut to_right) =
        (PlainSink { plain: left, side: Side::Left }, PlainSink { plain: right, side: Side::Right });
    let (mut watch_left, mut watch_right) = (Watch::new(left, Side::Left), Watch::new(right, Side::Right));
    let mut noting = Noting::new(counters);
    poll_fn(|cx| {
        let pressure = noting.pressure();
        let sent = out.poll(cx, left, Side::Left, &mut to_right, &counters.left_to_right, pressure)?;
        let received = back.poll(cx, right, Side::Right, &mut to_left, &counters.right_to_left, pressure)?;
        noting.note(out.held() + back.held());
        match (sent, received) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
            (Poll::Ready(()) | Poll::Pending, Poll::Pending) | (Poll::Pending, Poll::Ready(())) => {
                match watch_left.poll_unless(cx, out.is_reading()) {
                    Poll::Pending => watch_right.poll_unless(cx, back.is_reading()),
                    failed => failed,
                }
            }
        }
    })
    .await
}

/// Waits for the failure of a plain connection that nobody reads.
struct Watch<'a, P> {
    plain: &'a P,
    side: Side,
    /// Made when it is first needed, which for most connections is never.
    failed: Option<BoxFuture<'a, io::Error>>,
}

impl<'a, P: Plain> Watch<'a, P> {
    fn new(plain: &'a P, side: Side) -> Self {
        Watch { plain, side, failed: None }
    }

    fn poll_unless(&mut self, cx: &mut Context<'_>, reading: bool) -> Poll<Result<(), CopyError>> {
        if reading {
            return Poll::Pending;
        }
        let failed = self.failed.get_or_insert_with(|| self.plain.failed());
        failed.poll_unpin(cx).map(|error| Err(at(self.side)(error)))
    }
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
