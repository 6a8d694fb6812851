//! What one tunnel holds beside its copies: frames that wait for the socket, the frame that is arriving, and what came on
//! streams that are not answered yet.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::{Buf, Bytes};

use crate::memory::{Hold, Pressure, Share};
use crate::piece::Piece;

/// What a frame in the queue takes beside its bytes: a peer that reads nothing must not make us queue single bytes for free.
const PER_FRAME: usize = 256;

/// Less than this is not noted: it comes and goes with every message, and a tunnel itself takes more.
const NOTED_FROM: usize = 16 << 10;

/// One tunnel's account.
#[derive(Debug, Default)]
pub struct Backlog {
    hold: Hold,
    queued: AtomicUsize,
    arriving: AtomicUsize,
    unanswered: AtomicUsize,
    /// Whether something of the queue was written since the last note.
    went_on: AtomicBool,
}

impl Backlog {
    /// Of a tunnel that this share pays for.
    pub fn of(share: Share) -> Arc<Self> {
        Arc::new(Backlog { hold: Hold::of(share), ..Backlog::default() })
    }

    /// What it holds, as it was noted last.
    pub fn hold(&self) -> &Hold {
        &self.hold
    }

    pub(crate) fn pressure(&self, before: Pressure) -> Pressure {
        self.hold.pressure(before)
    }

    /// Bytes of the frame that is arriving.
    pub(crate) fn set_arriving(&self, bytes: usize) {
        self.arriving.store(bytes, Ordering::Relaxed);
    }

    /// Bytes came on a stream that is not answered yet.
    pub(crate) fn add_unanswered(&self, bytes: usize) {
        self.unanswered.fetch_add(bytes, Ordering::Relaxed);
        self.note();
    }

    /// The stream is answered.
    pub(crate) fn remove_unanswered(&self, bytes: usize) {
        self.unanswered.fetch_sub(bytes, Ordering::Relaxed);
        self.note();
    }

    /// Notes what is held now. For the tunnel's driver, when its turn is over.
    pub(crate) fn note(&self) {
        let parts = [&self.queued, &self.arriving, &self.unanswered];
        let bytes: usize = parts.iter().map(|part| part.load(Ordering::Relaxed)).sum();
        let went_on = self.went_on.load(Ordering::Relaxed);
        if went_on {
            self.went_on.store(false, Ordering::Relaxed);
        }
        self.hold.note(if bytes < NOTED_FROM { 0 } else { bytes }, went_on);
    }

    /// The tunnel has ended.
    pub(crate) fn end(&self) {
        self.hold.note(0, false);
    }
}

/// Bytes in HTTP/2's queue, counted until they are written or discarded.
#[derive(Debug, Default)]
pub(crate) struct Queued {
    data: Bytes,
    counted: Option<(Arc<Backlog>, usize)>,
}

impl Queued {
    pub(crate) fn new(piece: Piece, backlog: &Arc<Backlog>) -> Self {
        let counted = piece.keeps() + PER_FRAME;
        backlog.queued.fetch_add(counted, Ordering::Relaxed);
        Queued { data: piece.into_data(), counted: Some((Arc::clone(backlog), counted)) }
    }
}

impl Buf for Queued {
    fn remaining(&self) -> usize {
        self.data.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.data.chunk()
    }

    fn advance(&mut self, n: usize) {
        self.data.advance(n);
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        if let Some((backlog, counted)) = &self.counted {
            backlog.queued.fetch_sub(*counted, Ordering::Relaxed);
            backlog.went_on.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Limits, Memory};

    #[test]
    fn what_is_queued_counts_with_the_memory_that_it_keeps_until_it_is_gone() {
        let share = Memory::new(Limits::of(8 << 20)).share();
        let backlog = Backlog::of(share.clone());
        let mut piece = Piece::new(Bytes::from(vec![1; 1000]), 100_000);
        let mut first = Queued::new(piece.take(500), &backlog);
        first.advance(400);
        backlog.note();
        assert_eq!(share.held(), 50_000 + PER_FRAME);
        let second = Queued::new(piece, &backlog);
        backlog.note();
        assert_eq!(share.held(), 100_000 + 2 * PER_FRAME);
        drop((first, second));
        backlog.note();
        assert_eq!(share.held(), 0);
    }

    #[test]
    fn little_is_not_noted_and_single_bytes_are_not_little() {
        let share = Memory::new(Limits::of(8 << 20)).share();
        let backlog = Backlog::of(share.clone());
        let byte = || Queued::new(Piece::own(Bytes::from_static(b"x")), &backlog);
        let mut queue = vec![byte()];
        backlog.note();
        assert_eq!(share.held(), 0);
        queue.extend((0..1000).map(|_| byte()));
        backlog.set_arriving(5000);
        backlog.add_unanswered(700);
        assert_eq!(share.held(), 1001 * (PER_FRAME + 1) + 5700);
        backlog.remove_unanswered(700);
        assert_eq!(share.held(), 1001 * (PER_FRAME + 1) + 5000);
        backlog.end();
        assert_eq!(share.held(), 0);
    }
}
