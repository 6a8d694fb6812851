//! How much one poll of a connection may move. A connection whose bytes never end would otherwise stay in one poll for as
//! long as the socket gives and takes, which is milliseconds, and whoever shares the thread waits that long.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use crate::pace;

/// Pieces of a write that are looked at. HTTP/2 gives the header of a frame and its payload.
const SLICES: usize = 8;

/// What is left of one poll's budget. Reading and writing have one each: neither starves the other. Cheap to clone; clones
/// share it.
#[derive(Debug, Clone)]
pub(crate) struct Budget(Arc<Left>);

#[derive(Debug)]
struct Left {
    per_poll: usize,
    read: AtomicUsize,
    write: AtomicUsize,
}

impl Budget {
    /// So many bytes for each poll.
    pub(crate) fn new(per_poll: usize) -> Self {
        Self(Arc::new(Left { per_poll: per_poll.max(1), read: AtomicUsize::new(0), write: AtomicUsize::new(0) }))
    }

    /// The future that reads and writes under this budget: each of its polls has a whole one.
    pub(crate) fn of_each_poll<F: Future>(&self, future: F) -> EachPoll<F> {
        EachPoll { future, budget: self.clone() }
    }
}

pin_project! {
    /// See [`Budget::of_each_poll`].
    pub(crate) struct EachPoll<F> {
        #[pin]
        future: F,
        budget: Budget,
    }
}

impl<F: Future> Future for EachPoll<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let left = &this.budget.0;
        let bytes = pace::limit(left.per_poll);
        left.read.store(bytes, Ordering::Relaxed);
        left.write.store(bytes, Ordering::Relaxed);
        this.future.poll(cx)
    }
}

/// A byte stream that is read and written within a budget. Beyond it the stream is pending, and its task is woken at once:
/// it goes on in the next poll, after others.
#[derive(Debug)]
pub(crate) struct Budgeted<IO> {
    io: IO,
    budget: Budget,
}

impl<IO> Budgeted<IO> {
    pub(crate) fn new(io: IO, budget: Budget) -> Self {
        Self { io, budget }
    }
}

/// What is left; pending if that is nothing.
fn left(left: &AtomicUsize, cx: &Context<'_>) -> Poll<usize> {
    match left.load(Ordering::Relaxed) {
        0 => {
            cx.waker().wake_by_ref();
            Poll::Pending
        }
        some => Poll::Ready(some),
    }
}

fn spend(left: &AtomicUsize, bytes: usize) {
    left.store(left.load(Ordering::Relaxed).saturating_sub(bytes), Ordering::Relaxed);
}

impl<IO: AsyncRead + Unpin> AsyncRead for Budgeted<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { io, budget } = self.get_mut();
        let room = ready!(left(&budget.0.read, cx));
        let before = buf.filled().len();
        ready!(Pin::new(&mut io.take(room as u64)).poll_read(cx, buf))?;
        spend(&budget.0.read, buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Budgeted<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Self { io, budget } = self.get_mut();
        let room = ready!(left(&budget.0.write, cx)).min(buf.len());
        let written = ready!(Pin::new(io).poll_write(cx, buf.get(..room).unwrap_or(buf)))?;
        spend(&budget.0.write, written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self { io, budget } = self.get_mut();
        let mut room = ready!(left(&budget.0.write, cx));
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut count = 0;
        for (slice, buf) in slices.iter_mut().zip(bufs.iter().filter(|buf| !buf.is_empty())) {
            let part = buf.get(..room).unwrap_or(buf);
            room -= part.len();
            *slice = IoSlice::new(part);
            count += 1;
            if room == 0 {
                break;
            }
        }
        let written = ready!(Pin::new(io).poll_write_vectored(cx, slices.get(..count).unwrap_or(&slices)))?;
        spend(&budget.0.write, written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
