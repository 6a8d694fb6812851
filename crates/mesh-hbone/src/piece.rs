//! Bytes that wait, with the memory that they keep: a few bytes of a large buffer keep all of it.

use bytes::{Buf, Bytes};

use crate::memory::Pressure;

/// Bytes that wait.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    data: Bytes,
    /// Bytes of memory that are in use as long as it is.
    keeps: usize,
}

impl Piece {
    /// Of a buffer of which it keeps so many bytes.
    pub(crate) fn new(data: Bytes, keeps: usize) -> Self {
        Piece { keeps: keeps.max(data.len()), data }
    }

    /// Of a buffer of its own size.
    pub(crate) fn own(data: Bytes) -> Self {
        Piece { keeps: data.len(), data }
    }

    pub(crate) fn data(&self) -> &Bytes {
        &self.data
    }

    pub(crate) fn into_data(self) -> Bytes {
        self.data
    }

    pub(crate) fn keeps(&self) -> usize {
        self.keeps
    }

    pub(crate) fn len(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Passes over the first `n` bytes; the memory is kept.
    pub(crate) fn advance(&mut self, n: usize) {
        self.data.advance(n);
    }

    /// Takes the first `n` bytes, and their part of the memory.
    pub(crate) fn take(&mut self, n: usize) -> Piece {
        if n >= self.data.len() {
            return std::mem::take(self);
        }
        let keeps = (self.keeps / self.data.len()).saturating_mul(n);
        self.keeps -= keeps;
        Piece { data: self.data.split_to(n), keeps }
    }

    /// It has to wait: copies it if it keeps too much for what is left of it.
    pub(crate) fn settle(&mut self, pressure: Pressure) {
        if is_to_be_copied(self.data.len(), self.keeps, pressure) {
            *self = Piece::own(Bytes::copy_from_slice(&self.data));
        }
    }
}

/// Whether bytes that wait are worth copying, for the memory that they keep. Bytes that are copied again, when some more of
/// them have been taken, have become fewer by half at least: all copies together are at most twice the bytes.
const fn is_to_be_copied(left: usize, keeps: usize, pressure: Pressure) -> bool {
    let at_most = match pressure {
        Pressure::Low => keeps / 8,
        Pressure::High => keeps / 2,
    };
    left > 0 && left <= at_most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_of_a_large_buffer_is_copied() {
        let cases = [
            (256, 256, Pressure::Low, false),
            (33, 256, Pressure::Low, false),
            (32, 256, Pressure::Low, true),
            (129, 256, Pressure::High, false),
            (128, 256, Pressure::High, true),
            (0, 256, Pressure::High, false),
            (1, 1, Pressure::High, false),
        ];
        for (left, keeps, pressure, expected) in cases {
            assert_eq!(is_to_be_copied(left, keeps, pressure), expected, "{left} of {keeps}, {pressure:?}");
        }
    }

    #[test]
    fn parts_keep_together_what_the_whole_kept() {
        let mut piece = Piece::new(Bytes::from_static(b"0123456789"), 105);
        piece.advance(1);
        let part = piece.take(4);
        assert_eq!((&part.data()[..], &piece.data()[..]), (&b"1234"[..], &b"56789"[..]));
        assert_eq!(part.keeps() + piece.keeps(), 105);
        let rest = piece.take(99);
        assert_eq!(part.keeps() + rest.keeps(), 105);
        assert_eq!((piece.len(), piece.keeps()), (0, 0));
    }

    #[test]
    fn what_is_copied_keeps_itself_alone_and_is_the_same() {
        let mut piece = Piece::new(Bytes::from(vec![7; 1000]), 1000);
        piece.advance(900);
        piece.settle(Pressure::Low);
        assert_eq!((piece.len(), piece.keeps()), (100, 100));
        assert_eq!(piece.data()[..], [7; 100]);
    }
}
