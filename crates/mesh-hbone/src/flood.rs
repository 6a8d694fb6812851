//! Ends a connection whose peer sends more control frames than any tunnel needs.
//!
//! HTTP/2 makes the receiver work for frames that cost their sender nothing: PING and SETTINGS want answers, empty DATA,
//! PRIORITY and unknown frames must be looked at, resets and window updates touch streams. The HTTP/2 implementation bounds
//! the memory of all of them; this bounds the time. Frames are counted as they pass, by their headers alone.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::Backlog;

/// Length of the client's connection preface (RFC 9113 section 3.4).
const PREFACE: usize = 24;
/// Length of a frame's header.
const HEADER: usize = 9;

/// Frames that a tunnel sends a few of in its life: how many at once, and how many more in each second.
const IDLE: Rate = Rate { burst: 2_000.0, per_second: 200.0 };
/// Frames that come with streams and bytes: how many at once, and how many more in each second. A stream's bytes cost one
/// window update for each half window, its end at most one reset.
const BUSY: Rate = Rate { burst: 40_000.0, per_second: 20_000.0 };

#[derive(Clone, Copy)]
struct Rate {
    burst: f64,
    per_second: f64,
}

/// A bucket of tokens.
struct Bucket {
    rate: Rate,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn new(rate: Rate) -> Self {
        Self { rate, tokens: rate.burst, filled: Instant::now() }
    }

    /// Takes a token; false if there is none.
    fn take(&mut self) -> bool {
        if self.tokens < 1.0 {
            let now = Instant::now();
            let more = now.duration_since(self.filled).as_secs_f64() * self.rate.per_second;
            self.tokens = (self.tokens + more).min(self.rate.burst);
            self.filled = now;
        }
        let taken = self.tokens >= 1.0;
        if taken {
            self.tokens -= 1.0;
        }
        taken
    }
}

/// Follows the frames of one direction.
struct Frames {
    /// Bytes to pass over: the preface, or a frame's payload.
    skip: usize,
    /// Length of the payload that is passed over.
    length: usize,
    header: [u8; HEADER],
    have: usize,
    idle: Bucket,
    busy: Bucket,
}

impl Frames {
    /// What a client sends: the preface first.
    fn new() -> Self {
        Self { skip: PREFACE, ..Self::client() }
    }

    /// What a client gets: a server sends frames alone.
    fn client() -> Self {
        Self { skip: 0, length: 0, header: [0; HEADER], have: 0, idle: Bucket::new(IDLE), busy: Bucket::new(BUSY) }
    }

    /// Looks at what has come; false if it is too much.
    fn observe(&mut self, mut bytes: &[u8]) -> bool {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = bytes.get(skipped..).unwrap_or_default();
            let taken = (HEADER - self.have).min(bytes.len());
            let (now, rest) = bytes.split_at(taken);
            if let Some(room) = self.header.get_mut(self.have..self.have + taken) {
                room.copy_from_slice(now);
            }
            self.have += taken;
            bytes = rest;
            if self.have < HEADER {
                return true;
            }
            self.have = 0;
            let [a, b, c, kind, flags, ..] = self.header;
            self.skip = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            self.length = self.skip;
            let allowed = match kind {
                // DATA: only what is empty and no end.
                0 if self.skip > 0 || flags & 1 != 0 => true,
                // HEADERS: the streams have limits of their own.
                1 => true,
                // RST_STREAM, WINDOW_UPDATE.
                3 | 8 => self.busy.take(),
                _ => self.idle.take(),
            };
            if !allowed {
                return false;
            }
        }
    }

    /// Bytes that have come of a frame whose rest has not.
    fn arriving(&self) -> usize {
        if self.skip > 0 { self.length.saturating_sub(self.skip) } else { 0 }
    }
}

/// A byte stream whose reads fail once the peer floods. What has come of a frame that is not complete is noted.
pub(crate) struct Guarded<IO> {
    io: IO,
    frames: Frames,
    backlog: Arc<Backlog>,
}

impl<IO> Guarded<IO> {
    /// For a server, before anything was read.
    pub(crate) fn new(io: IO, backlog: &Arc<Backlog>) -> Self {
        Self { io, frames: Frames::new(), backlog: Arc::clone(backlog) }
    }

    /// For a client, before anything was read.
    pub(crate) fn client(io: IO, backlog: &Arc<Backlog>) -> Self {
        Self { io, frames: Frames::client(), backlog: Arc::clone(backlog) }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Guarded<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { io, frames, backlog } = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(io).poll_read(cx, buf))?;
        if frames.observe(buf.filled().get(before..).unwrap_or_default()) {
            backlog.set_arriving(frames.arriving());
            Poll::Ready(Ok(()))
        } else {
            tracing::debug!("a peer sends too many control frames");
            Poll::Ready(Err(io::Error::other("the peer sends too many control frames")))
        }
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Guarded<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        frame.resize(HEADER + payload, 0xff);
        frame
    }

    /// How many of these frames pass before it is too much, of 100,000; `step` bytes are looked at at a time.
    fn passed(frame: &[u8], step: usize) -> usize {
        let mut frames = Frames::new();
        assert!(frames.observe(&[0x50; PREFACE]));
        (0..100_000).find(|_| !frame.chunks(step).all(|part| frames.observe(part))).unwrap_or(100_000)
    }

    #[tokio::test(start_paused = true)]
    async fn what_costs_the_sender_nothing_is_counted_however_it_is_cut() {
        for (name, flood) in [
            ("PING", frame(6, 0, 8)),
            ("SETTINGS", frame(4, 0, 6)),
            ("acknowledgement", frame(4, 1, 0)),
            ("empty DATA", frame(0, 0, 0)),
            ("PRIORITY", frame(2, 0, 5)),
            ("CONTINUATION", frame(9, 0, 0)),
            ("unknown", frame(0xbe, 0, 3)),
        ] {
            for step in [1, 4, 100] {
                assert_eq!(passed(&flood, step), 2_000, "{name} by {step}");
            }
        }
        assert_eq!(passed(&frame(8, 0, 4), 100), 40_000, "WINDOW_UPDATE");
        assert_eq!(passed(&frame(3, 0, 4), 100), 40_000, "RST_STREAM");
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_and_streams_are_not_counted() {
        assert_eq!(passed(&frame(0, 0, 1), 100), 100_000, "DATA");
        assert_eq!(passed(&frame(0, 1, 0), 100), 100_000, "the end of a stream");
        assert_eq!(passed(&frame(1, 4, 20), 100), 100_000, "HEADERS");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_sends_no_preface() {
        let mut frames = Frames::client();
        let ping = frame(6, 0, 8);
        assert_eq!((0..100_000).find(|_| !frames.observe(&ping)), Some(2_000));
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_come_of_a_frame_is_known_until_its_rest_comes() {
        let mut frames = Frames::new();
        assert!(frames.observe(&[0x50; 20]));
        assert_eq!(frames.arriving(), 0, "the preface is no frame");
        assert!(frames.observe(&[0x50; 4]));
        let data = frame(0, 0, 1000);
        assert!(frames.observe(&data[..HEADER]));
        assert_eq!(frames.arriving(), 0);
        assert!(frames.observe(&data[HEADER..HEADER + 999]));
        assert_eq!(frames.arriving(), 999);
        assert!(frames.observe(&[&data[HEADER + 999..], &data[..HEADER + 5]].concat()));
        assert_eq!(frames.arriving(), 5, "of the next one");
        assert!(frames.observe(&data[HEADER + 5..]));
        assert_eq!(frames.arriving(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_peer_may_go_on_for_ever() {
        let mut frames = Frames::new();
        assert!(frames.observe(&[0; PREFACE]));
        for _ in 0..50_000 {
            assert!(frames.observe(&frame(6, 0, 8)));
            tokio::time::advance(Duration::from_millis(6)).await;
        }
    }
}
