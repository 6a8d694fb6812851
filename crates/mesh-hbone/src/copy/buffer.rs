//! Read buffers, kept per thread: a read has [`SIZE`] bytes of room, and a connection that waits for something to read holds
//! nothing. Under pressure a read has little room, and what was read is copied out of the thread's buffer.

use std::cell::RefCell;
use std::io;
use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::Plain;
use crate::memory::Pressure;
use crate::pace;
use crate::piece::Piece;

/// Bytes that one read may return, and so the largest DATA frame that we send.
pub(super) const SIZE: usize = 256 << 10;
/// Bytes that one read may return under pressure.
pub(super) const SPARING: usize = 8 << 10;
/// A read that returns no more is copied out of the buffer; more is given away with the buffer itself.
const COPIED: usize = 32 << 10;
/// Buffers that a thread keeps for later.
const KEPT: usize = 16;

thread_local! {
    static FREE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`SIZE`] initialised bytes, which returns to the thread that drops it.
struct Buffer(Vec<u8>);

impl Buffer {
    fn take() -> Self {
        let kept = FREE.try_with(|free| free.borrow_mut().pop()).ok().flatten();
        Buffer(kept.unwrap_or_else(|| vec![0; SIZE]))
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT {
                free.push(buffer);
            }
        });
    }
}

/// Bytes that one read may return.
fn room(pressure: Pressure) -> usize {
    match pressure {
        Pressure::Low => pace::limit(SIZE),
        Pressure::High => SPARING,
    }
}

/// The next bytes of `plain`; empty at its end.
pub(super) fn poll_read(cx: &mut Context<'_>, plain: &impl Plain, pressure: Pressure) -> Poll<io::Result<Piece>> {
    let mut buffer = Buffer::take();
    let n = ready!(plain.poll_read(cx, &mut buffer.0[..room(pressure)]))?;
    if n <= COPIED {
        return Poll::Ready(Ok(Piece::own(Bytes::copy_from_slice(&buffer.0[..n]))));
    }
    Poll::Ready(Ok(Piece::new(Bytes::from_owner(buffer).slice(..n), SIZE)))
}
