//! Requests as they come in. A large one is read when it is its turn, and has its time: else there would be as many in memory as
//! there are clients, of which each may say how much it is going to send and then stop.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tonic::Status;

/// Largest request, in bytes, that needs no turn: an ACK, or some names.
const SMALL: u32 = 16 << 10;
/// What stands before each message (gRPC over HTTP/2, Length-Prefixed-Message): a flag, and the length in four bytes.
const PREFIX: usize = 5;

type Permits = [OwnedSemaphorePermit; 2];
type Acquire = dyn Future<Output = Result<Permits, AcquireError>> + Send;

/// Who may read a large request.
#[derive(Clone)]
pub(super) struct Turns {
    /// Of the streams of one client.
    pub(super) own: Arc<Semaphore>,
    /// Of all clients.
    pub(super) all: Arc<Semaphore>,
}

/// The body of one stream's requests.
pub(super) struct Intake<B> {
    body: Pin<Box<B>>,
    progress: Progress,
    /// Where a large request begins: nobody has seen it yet.
    held: Option<Frame<Bytes>>,
    turn: Turn,
    turns: Turns,
    /// Until something must have come; none when it has.
    silence: Option<Pin<Box<Sleep>>>,
    patience: Duration,
    reading: Duration,
}

/// To read a large request.
enum Turn {
    NotNeeded,
    Awaited(Pin<Box<Acquire>>, Pin<Box<Sleep>>),
    /// As long as the request is read, and until it was decoded and acted upon.
    Taken(#[expect(dead_code, reason = "held")] Permits, Pin<Box<Sleep>>),
}

impl<B> Intake<B> {
    /// What `body` brings, which begins within `patience`; its large requests have their turn within `patience` from their
    /// beginning, and are there within `reading` from then. Needs a tokio runtime.
    pub(super) fn new(body: B, turns: Turns, patience: Duration, reading: Duration) -> Self {
        let silence = Some(Box::pin(tokio::time::sleep(patience)));
        let (body, progress, held, turn) = (Box::pin(body), Progress::default(), None, Turn::NotNeeded);
        Self { body, progress, held, turn, turns, silence, patience, reading }
    }

    fn begin(&mut self) {
        // Where one large request follows upon another, the time for the first is that for both.
        if matches!(self.turn, Turn::NotNeeded) {
            let Turns { own, all } = self.turns.clone();
            let acquire = async move { Ok([own.acquire_owned().await?, all.acquire_owned().await?]) };
            self.turn = Turn::Awaited(Box::pin(acquire), Box::pin(tokio::time::sleep(self.patience)));
        }
    }

    /// Ready when it may be read on.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        if let Turn::Awaited(acquire, _) = &mut self.turn
            && let Poll::Ready(acquired) = acquire.as_mut().poll(cx)
        {
            let permits = acquired.map_err(|_| Status::unavailable("shutting down: reconnect"))?;
            self.turn = Turn::Taken(permits, Box::pin(tokio::time::sleep(self.reading)));
        }
        match &mut self.turn {
            Turn::NotNeeded => Poll::Ready(Ok(())),
            Turn::Awaited(_, deadline) => {
                ready!(deadline.as_mut().poll(cx));
                Poll::Ready(Err(Status::unavailable("busy: reconnect")))
            }
            Turn::Taken(_, deadline) => match deadline.as_mut().poll(cx) {
                Poll::Ready(()) => Poll::Ready(Err(Status::deadline_exceeded("the request did not come in time"))),
                Poll::Pending => Poll::Ready(Ok(())),
            },
        }
    }
}

impl<B> http_body::Body for Intake<B>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        // Who asks for more has done with all that is complete.
        if this.held.is_none() && !this.progress.is_large {
            this.turn = Turn::NotNeeded;
        }
        loop {
            ready!(this.poll_turn(cx))?;
            if let Some(frame) = this.held.take() {
                return Poll::Ready(Some(Ok(frame)));
            }
            let polled = this.body.as_mut().poll_frame(cx);
            if polled.is_ready() {
                this.silence = None;
            } else if let Some(silence) = &mut this.silence {
                ready!(silence.as_mut().poll(cx));
                return Poll::Ready(Some(Err(Status::deadline_exceeded("no request came"))));
            }
            let frame = match ready!(polled) {
                None => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(Status::from_error(error.into())))),
                Some(Ok(frame)) => frame,
            };
            let begins = frame.data_ref().is_some_and(|data| this.progress.take(data));
            if !begins {
                return Poll::Ready(Some(Ok(frame)));
            }
            this.begin();
            this.held = Some(frame);
        }
    }
}

/// Where in the messages of a stream it is.
#[derive(Debug, Default)]
struct Progress {
    prefix: [u8; PREFIX],
    /// Bytes of the prefix that are there.
    known: usize,
    /// Bytes of the message that are still to come.
    rest: u32,
    /// That message is large.
    is_large: bool,
}

impl Progress {
    /// Goes on by `data`; true if a large message begins in it.
    fn take(&mut self, mut data: &[u8]) -> bool {
        let mut begins = false;
        while !data.is_empty() {
            if self.rest > 0 {
                let here = u32::try_from(data.len()).unwrap_or(u32::MAX).min(self.rest);
                self.rest -= here;
                self.is_large &= self.rest > 0;
                data = data.get(here as usize..).unwrap_or_default();
                continue;
            }
            let missing = self.prefix.iter_mut().skip(self.known);
            let here = missing.zip(data).map(|(to, from)| *to = *from).count();
            self.known += here;
            data = data.get(here..).unwrap_or_default();
            if self.known == PREFIX {
                let [_, length @ ..] = self.prefix;
                self.known = 0;
                self.rest = u32::from_be_bytes(length);
                self.is_large = self.rest > SMALL;
                begins |= self.is_large;
            }
        }
        begins
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend(u32::try_from(length).unwrap().to_be_bytes());
        bytes.resize(PREFIX + length, 1);
        bytes
    }

    proptest! {
        /// However it is cut into frames: each large message begins once, and none is open at the end.
        #[test]
        fn large_messages_are_found_in_any_frames(
            lengths in prop::collection::vec(prop_oneof![Just(0), 0..100_usize, 16_380..16_390_usize, Just(40_000)], 0..8),
            sizes in prop::collection::vec(1..20_000_usize, 1..8),
        ) {
            let all: Vec<u8> = lengths.iter().flat_map(|length| message(*length)).collect();
            let (mut progress, mut left, mut found) = (Progress::default(), &all[..], 0);
            for size in sizes.iter().cycle() {
                if left.is_empty() {
                    break;
                }
                let (frame, rest) = left.split_at((*size).min(left.len()));
                let was_large = progress.is_large;
                let begins = progress.take(frame);
                prop_assert!(begins || was_large || !progress.is_large);
                found += usize::from(begins);
                left = rest;
            }
            prop_assert!(!progress.is_large && progress.rest == 0 && progress.known == 0);
            let large = lengths.iter().filter(|length| **length > SMALL as usize).count();
            // Several may begin in one frame.
            prop_assert!(found <= large && (found > 0) == (large > 0), "{found} of {large}");
        }
    }
}
