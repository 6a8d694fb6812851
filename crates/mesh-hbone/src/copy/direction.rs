//! One direction of a copy, as a state machine that is polled.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};

use super::{CopyError, Plain, Side, buffer};
use crate::memory::Pressure;
use crate::pace;
use crate::piece::Piece;
use crate::stream::{ReadHalf, StreamError, WriteHalf};

/// Bytes that one direction moves in one go: one full read. Then it lets others run, however much there is.
fn turn() -> usize {
    pace::limit(buffer::SIZE)
}

/// Asks to be polled again after the others.
fn give_way<T>(cx: &Context<'_>) -> Poll<T> {
    cx.waker().wake_by_ref();
    Poll::Pending
}

/// Where a direction goes to.
pub(super) trait Sink {
    /// Takes all of `piece`; what is left in it has not been taken.
    fn poll_send(&mut self, cx: &mut Context<'_>, piece: &mut Piece) -> Poll<Result<(), CopyError>>;
    /// Ends the direction.
    fn end(&mut self) -> Result<(), CopyError>;
}

impl Sink for WriteHalf {
    fn poll_send(&mut self, cx: &mut Context<'_>, piece: &mut Piece) -> Poll<Result<(), CopyError>> {
        self.poll_put(cx, piece).map_err(CopyError::from)
    }

    fn end(&mut self) -> Result<(), CopyError> {
        self.finish_now().map_err(CopyError::from)
    }
}

/// A plain connection as the target of a direction.
pub(super) struct PlainSink<'a, P> {
    pub(super) plain: &'a P,
    pub(super) side: Side,
}

impl<P: Plain> Sink for PlainSink<'_, P> {
    fn poll_send(&mut self, cx: &mut Context<'_>, piece: &mut Piece) -> Poll<Result<(), CopyError>> {
        while !piece.is_empty() {
            let slices = [IoSlice::new(piece.data())];
            let n = ready!(self.plain.poll_write(cx, &slices)).and_then(nonzero).map_err(at(self.side))?;
            piece.advance(n);
        }
        Poll::Ready(Ok(()))
    }

    fn end(&mut self) -> Result<(), CopyError> {
        self.plain.end().map_err(at(self.side))
    }
}

/// From a plain connection to a sink.
#[derive(Debug, Default)]
pub(super) struct FromPlain {
    pending: Piece,
    done: bool,
}

impl FromPlain {
    /// Whether it waits for the source, which then shows every failure. Else it waits for the sink, or for nothing more.
    pub(super) fn is_reading(&self) -> bool {
        !self.done && self.pending.is_empty()
    }

    /// Nobody wants any more of it.
    pub(super) fn stop(&mut self) {
        *self = FromPlain { pending: Piece::default(), done: true };
    }

    /// Bytes of memory that are in use for it.
    pub(super) fn held(&self) -> usize {
        self.pending.keeps()
    }

    pub(super) fn poll<P: Plain, S: Sink>(
        &mut self,
        cx: &mut Context<'_>,
        plain: &P,
        side: Side,
        sink: &mut S,
        counter: &AtomicU64,
        pressure: Pressure,
    ) -> Poll<Result<(), CopyError>> {
        let mut moved = 0;
        while !self.done {
            let before = self.pending.len();
            if before > 0 {
                let sent = sink.poll_send(cx, &mut self.pending);
                counter.fetch_add((before - self.pending.len()) as u64, Ordering::Relaxed);
                if sent.is_pending() {
                    self.pending.settle(pressure);
                }
                ready!(sent)?;
                self.pending = Piece::default();
                moved += before;
                if moved >= turn() {
                    return give_way(cx);
                }
            }
            self.pending = ready!(buffer::poll_read(cx, plain, pressure)).map_err(at(side))?;
            if self.pending.is_empty() {
                sink.end()?;
                self.done = true;
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// Bytes of memory that the smallest chunk may keep: it is a part of what was read for the tunnel, up to the largest frame.
const BLOCK: usize = 256 << 10;
/// Chunks shorter than this are taken to keep all of that; longer ones, twice their own size.
const LONG: usize = 32 << 10;
/// Chunks shorter than this are joined while others wait before them.
const SMALL: usize = 1 << 10;
/// Joined chunks are closed at this length.
const JOINED: usize = 64 << 10;
/// Chunks that one write takes.
const SLICES: usize = 16;

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    #[default]
    Open,
    /// The source has ended; what is queued and the end are still to be sent.
    Ending,
    Done,
}

/// From a stream to a plain connection.
///
/// Everything that has arrived is taken from the stream at once, so that a reset is seen however much waits before it; the
/// window stays closed for what is not written yet, so no more than one window waits here. Small chunks are joined: a peer
/// that sends single bytes to a slow reader costs one window of memory, not a frame's overhead per byte. Those that have to
/// wait are copied if they keep much more memory than their own.
#[derive(Debug, Default)]
pub(super) struct FromStream {
    queue: VecDeque<Piece>,
    /// Bytes of memory that `queue` keeps.
    keeps: usize,
    /// Pieces at the front of `queue` that had to wait before.
    settled: usize,
    /// Small chunks, joined; comes after `queue`.
    tail: BytesMut,
    phase: Phase,
}

impl FromStream {
    /// Whether the stream's end has arrived: nobody reads it any more, so nobody would see a reset.
    pub(super) fn has_ended(&self) -> bool {
        self.phase != Phase::Open
    }

    /// Bytes of memory that are in use for it.
    pub(super) fn held(&self) -> usize {
        self.keeps + self.tail.capacity()
    }

    pub(super) fn poll<P: Plain>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut ReadHalf,
        plain: &P,
        counter: &AtomicU64,
        pressure: Pressure,
    ) -> Poll<Result<(), CopyError>> {
        let mut moved = 0;
        loop {
            if self.phase == Phase::Done {
                return Poll::Ready(Ok(()));
            }
            self.fill(cx, stream)?;
            if self.queue.is_empty() && self.tail.is_empty() {
                if self.phase == Phase::Open {
                    return Poll::Pending;
                }
                plain.end().map_err(at(Side::Right))?;
                self.phase = Phase::Done;
                continue;
            }
            let Poll::Ready(written) = self.poll_write(cx, plain) else {
                self.settle(pressure);
                return Poll::Pending;
            };
            let n = written.and_then(nonzero).map_err(at(Side::Right))?;
            self.advance(n);
            counter.fetch_add(n as u64, Ordering::Relaxed);
            stream.release(n);
            moved += n;
            if moved >= turn() {
                return give_way(cx);
            }
        }
    }

    /// Takes what has arrived; registers for more.
    fn fill(&mut self, cx: &mut Context<'_>, stream: &mut ReadHalf) -> Result<(), StreamError> {
        while self.phase == Phase::Open {
            match stream.poll_chunk(cx) {
                Poll::Ready(chunk) => match chunk? {
                    Some(chunk) => self.push(chunk),
                    None => self.phase = Phase::Ending,
                },
                Poll::Pending => break,
            }
        }
        Ok(())
    }

    fn push(&mut self, chunk: Bytes) {
        let first = self.queue.is_empty() && self.tail.is_empty();
        if !first && chunk.len() < SMALL && self.tail.len() < JOINED {
            self.tail.extend_from_slice(&chunk);
            return;
        }
        if !self.tail.is_empty() {
            let tail = std::mem::take(&mut self.tail);
            let keeps = tail.capacity();
            self.queue_up(Piece::new(tail.freeze(), keeps));
        }
        let keeps = if chunk.len() < LONG { BLOCK } else { 2 * chunk.len() };
        self.queue_up(Piece::new(chunk, keeps));
    }

    fn queue_up(&mut self, piece: Piece) {
        self.keeps += piece.keeps();
        self.queue.push_back(piece);
    }

    /// What is queued has to wait. Each piece is looked at once, and the first, of which some may be gone, again.
    fn settle(&mut self, pressure: Pressure) {
        let from = self.settled.max(1);
        let (first, rest) = (0..1, from..self.queue.len());
        for at in first.chain(rest) {
            let Some(piece) = self.queue.get_mut(at) else { break };
            self.keeps -= piece.keeps();
            piece.settle(pressure);
            self.keeps += piece.keeps();
        }
        self.settled = self.queue.len();
    }

    fn poll_write<P: Plain>(&self, cx: &mut Context<'_>, plain: &P) -> Poll<io::Result<usize>> {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let queued = self.queue.iter().map(|piece| piece.data().as_ref());
        let chunks = queued.chain([self.tail.as_ref()]).filter(|chunk: &&[u8]| !chunk.is_empty());
        let (mut n, mut room) = (0, turn());
        for (slice, chunk) in slices.iter_mut().zip(chunks) {
            let part = chunk.get(..room).unwrap_or(chunk);
            *slice = IoSlice::new(part);
            n += 1;
            room -= part.len();
            if room == 0 {
                break;
            }
        }
        plain.poll_write(cx, &slices[..n])
    }

    fn advance(&mut self, mut n: usize) {
        while let Some(first) = self.queue.front_mut() {
            if n < first.len() {
                first.advance(n);
                return;
            }
            n -= first.len();
            self.keeps -= first.keeps();
            self.settled = self.settled.saturating_sub(1);
            self.queue.pop_front();
        }
        self.tail.advance(n.min(self.tail.len()));
        if self.tail.is_empty() {
            // Gives the memory back: most connections wait most of the time.
            self.tail = BytesMut::new();
            if self.queue.capacity() > SLICES {
                self.queue = VecDeque::new();
            }
        }
    }
}

fn nonzero(n: usize) -> io::Result<usize> {
    if n == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(n) }
}

pub(super) fn at(side: Side) -> impl Fn(io::Error) -> CopyError {
    move |source| CopyError::Plain { side, source }
}
