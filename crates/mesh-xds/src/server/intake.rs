//! Requests as they come in. A large one is read when it is its turn, has its time, and leaves nothing behind: else there would be
//! as many in memory as there are clients, of which each may say how much it is going to send and then stop. tonic's own reader
//! makes room for whatever is announced, and keeps it as long as the stream lives.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use mesh_proto::discovery::DeltaDiscoveryRequest;
use prost::Message as _;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tonic::Status;

/// Largest request, in bytes, that needs no turn: an ACK, or some names.
const SMALL: usize = 16 << 10;
/// What stands before each message (gRPC over HTTP/2, Length-Prefixed-Message): a flag, and the length in four bytes.
const PREFIX: usize = 5;

type Permits = [OwnedSemaphorePermit; 2];
/// What the connection brings: a piece of data, an error, or the end.
type Source = dyn FnMut(&mut Context<'_>) -> Poll<Option<Result<Bytes, Status>>> + Send;
type Acquire = dyn Future<Output = Result<Permits, AcquireError>> + Send;

/// Who may read a large request.
#[derive(Clone)]
pub(super) struct Turns {
    /// Of the streams of one client.
    pub(super) own: Arc<Semaphore>,
    /// Of all clients.
    pub(super) all: Arc<Semaphore>,
}

/// What requests may take.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    /// Largest request, in bytes.
    pub(super) max: usize,
    /// Until the first has begun; for a large one, from then until it has its turn.
    pub(super) patience: Duration,
    /// For a large one, from its turn until it is there.
    pub(super) reading: Duration,
}

/// The requests of one stream.
pub(super) struct Intake {
    source: Box<Source>,
    is_over: bool,
    /// What has come and is not decoded: less than a frame, unless a large request has its turn.
    buffer: BytesMut,
    /// Length of the request that has begun.
    length: Option<usize>,
    turn: Turn,
    turns: Turns,
    bounds: Bounds,
    /// Until something must have come; none when it has.
    silence: Option<Pin<Box<Sleep>>>,
}

/// To read a large request.
enum Turn {
    NotNeeded,
    Awaited(Pin<Box<Acquire>>, Pin<Box<Sleep>>),
    /// As long as the request is read, and until it was acted upon.
    Taken(#[expect(dead_code, reason = "held")] Permits, Pin<Box<Sleep>>),
}

impl Intake {
    /// What `body` brings. Needs a tokio runtime.
    pub(super) fn new<B>(body: B, turns: Turns, bounds: Bounds) -> Self
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut body = Box::pin(body);
        let source = move |cx: &mut Context<'_>| {
            let frame = body.as_mut().poll_frame(cx);
            frame
                .map_ok(|frame| frame.into_data().unwrap_or_default())
                .map_err(|error| Status::from_error(error.into()))
        };
        Self {
            source: Box::new(source),
            is_over: false,
            buffer: BytesMut::new(),
            length: None,
            turn: Turn::NotNeeded,
            turns,
            bounds,
            silence: Some(Box::pin(tokio::time::sleep(bounds.patience))),
        }
    }

    /// The next request; none when there will be no more, also when asked again. Nothing is lost if it is not waited for.
    ///
    /// # Errors
    /// What came is no request, too large, or not there in time; or the connection failed.
    pub(super) async fn message(&mut self) -> Result<Option<DeltaDiscoveryRequest>, Status> {
        poll_fn(|cx| self.poll_message(cx)).await
    }

    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<DeltaDiscoveryRequest>, Status>> {
        // Who asks for more has done with what it got.
        if self.length.is_none_or(|length| length <= SMALL) {
            self.turn = Turn::NotNeeded;
        }
        loop {
            self.begin()?;
            if let Some(length) = self.length {
                if matches!(self.turn, Turn::Awaited(..)) {
                    ready!(self.poll_turn(cx))?;
                }
                if self.buffer.len() >= length {
                    return Poll::Ready(self.decode(length).map(Some));
                }
            }
            if self.is_over {
                return Poll::Ready(Ok(None));
            }
            let Poll::Ready(came) = (self.source)(cx) else {
                ready!(self.poll_deadline(cx))?;
                return Poll::Pending;
            };
            self.silence = None;
            match came {
                Some(Ok(data)) => self.buffer.extend_from_slice(&data),
                Some(Err(status)) => return Poll::Ready(Err(self.end(status))),
                None if self.length.is_some() || !self.buffer.is_empty() => {
                    return Poll::Ready(Err(self.end(Status::cancelled("the stream ended amid a request"))));
                }
                None => self.is_over = true,
            }
        }
    }

    /// Reads what stands before a request, if it is there.
    fn begin(&mut self) -> Result<(), Status> {
        let None = self.length else { return Ok(()) };
        let Some(&[flag, a, b, c, d]) = self.buffer.first_chunk::<PREFIX>() else { return Ok(()) };
        if flag != 0 {
            return Err(self.end(Status::unimplemented("compressed requests are not read")));
        }
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        let max = self.bounds.max;
        if length > max {
            return Err(self.end(Status::out_of_range(format!("a request of {length} bytes, more than {max}"))));
        }
        self.buffer.advance(PREFIX);
        self.length = Some(length);
        if length > SMALL {
            let Turns { own, all } = self.turns.clone();
            let acquire = async move { Ok([own.acquire_owned().await?, all.acquire_owned().await?]) };
            self.turn = Turn::Awaited(Box::pin(acquire), Box::pin(tokio::time::sleep(self.bounds.patience)));
        }
        Ok(())
    }

    /// Ready when a large request may be read.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        let Turn::Awaited(acquire, deadline) = &mut self.turn else { return Poll::Ready(Ok(())) };
        if let Poll::Ready(acquired) = acquire.as_mut().poll(cx) {
            let permits = acquired.map_err(|_| Status::unavailable("shutting down: reconnect"))?;
            self.turn = Turn::Taken(permits, Box::pin(tokio::time::sleep(self.bounds.reading)));
            return Poll::Ready(Ok(()));
        }
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(Err(self.end(Status::unavailable("busy: reconnect"))))
    }

    /// Ready when it has lasted too long that nothing comes.
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        let why = match (&mut self.turn, &mut self.silence) {
            (Turn::Taken(_, deadline), _) => {
                ready!(deadline.as_mut().poll(cx));
                "the request did not come in time"
            }
            (_, Some(silence)) => {
                ready!(silence.as_mut().poll(cx));
                "no request came"
            }
            (_, None) => return Poll::Pending,
        };
        Poll::Ready(Err(self.end(Status::deadline_exceeded(why))))
    }

    fn decode(&mut self, length: usize) -> Result<DeltaDiscoveryRequest, Status> {
        self.length = None;
        let message = self.buffer.split_to(length).freeze();
        if length > SMALL {
            // Else what it took would be kept with what is left.
            self.buffer = BytesMut::from(self.buffer.as_ref());
        }
        DeltaDiscoveryRequest::decode(message)
            .map_err(|error| self.end(Status::internal(format!("not a request: {error}"))))
    }

    /// Nothing more is read, and nothing held.
    fn end(&mut self, status: Status) -> Status {
        (self.is_over, self.length, self.buffer) = (true, None, BytesMut::new());
        self.turn = Turn::NotNeeded;
        status
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;

    use futures_util::FutureExt as _;
    use http_body::Frame;
    use proptest::prelude::*;

    use super::*;

    /// Frames that are there, and then the end.
    struct Frames(VecDeque<Bytes>);

    impl http_body::Body for Frames {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.pop_front().map(|data| Ok(Frame::data(data))))
        }
    }

    fn intake(bytes: &[u8], sizes: &[usize]) -> (Intake, Arc<Semaphore>) {
        let (mut frames, mut left) = (VecDeque::new(), bytes);
        for size in sizes.iter().cycle() {
            if left.is_empty() {
                break;
            }
            let (frame, rest) = left.split_at((*size).min(left.len()));
            frames.push_back(Bytes::copy_from_slice(frame));
            left = rest;
        }
        let all = Arc::new(Semaphore::new(1));
        let turns = Turns { own: Arc::new(Semaphore::new(1)), all: Arc::clone(&all) };
        let hour = Duration::from_secs(3600);
        (Intake::new(Frames(frames), turns, Bounds { max: 1 << 20, patience: hour, reading: hour }), all)
    }

    /// A request of about so many bytes, with its prefix.
    fn framed(size: usize) -> (DeltaDiscoveryRequest, Vec<u8>) {
        let request = DeltaDiscoveryRequest { response_nonce: "x".repeat(size), ..DeltaDiscoveryRequest::default() };
        let mut bytes = vec![0];
        bytes.extend(u32::try_from(request.encoded_len()).unwrap().to_be_bytes());
        bytes.extend(request.encode_to_vec());
        (request, bytes)
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
    }

    proptest! {
        /// However they are cut into frames, and without a turn left over.
        #[test]
        fn requests_come_out_as_they_went_in(
            sizes in prop::collection::vec(prop_oneof![Just(0), 1..100_usize, 16_370..16_390_usize, Just(40_000)], 0..8),
            frames in prop::collection::vec(1..20_000_usize, 1..8),
        ) {
            let (requests, bytes): (Vec<_>, Vec<_>) = sizes.iter().map(|size| framed(*size)).unzip();
            runtime().block_on(async {
                let (mut intake, all) = intake(&bytes.concat(), &frames);
                for request in requests {
                    prop_assert_eq!(intake.message().await.unwrap(), Some(request.clone()));
                    let is_large = request.encoded_len() > SMALL;
                    prop_assert_eq!(all.available_permits(), usize::from(!is_large), "until it is acted upon");
                    prop_assert!(intake.buffer.capacity() <= 64 << 10, "{} are kept", intake.buffer.capacity());
                }
                for _ in 0..2 {
                    prop_assert_eq!(intake.message().await.unwrap(), None);
                    prop_assert_eq!(all.available_permits(), 1);
                }
                Ok(())
            })?;
        }

        /// Whatever comes: an end or an error, and then nothing.
        #[test]
        fn nonsense_ends_and_holds_nothing(
            bytes in prop::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], 1..200),
            frames in prop::collection::vec(1..50_usize, 1..4),
        ) {
            runtime().block_on(async {
                let (mut intake, all) = intake(&bytes, &frames);
                while let Ok(Some(_)) = intake.message().await {}
                prop_assert_eq!(intake.message().await.unwrap(), None);
                prop_assert_eq!(all.available_permits(), 1);
                Ok(())
            })?;
        }
    }

    #[test]
    fn what_is_announced_and_never_comes_takes_no_room_without_a_turn() {
        runtime().block_on(async {
            let (_, large) = framed(500_000);
            let (mut intake, all) = intake(&large, &[10_000]);
            let taken = Arc::clone(&all).try_acquire_owned().unwrap();
            assert!(intake.message().now_or_never().is_none(), "it waits for its turn");
            assert!(intake.buffer.capacity() <= 64 << 10, "{}", intake.buffer.capacity());
            drop(taken);
            assert!(intake.message().await.unwrap().is_some());
            let (mut cut, all) = self::intake(&large[..20_000], &[10_000]);
            assert_eq!(cut.message().await.unwrap_err().code(), tonic::Code::Cancelled);
            assert_eq!(all.available_permits(), 1);
            let (mut huge, _) = self::intake(&[0, 1, 0, 0, 0], &[5]);
            assert_eq!(huge.message().await.unwrap_err().code(), tonic::Code::OutOfRange);
            let (mut compressed, _) = self::intake(&[1, 0, 0, 0, 0], &[5]);
            assert_eq!(compressed.message().await.unwrap_err().code(), tonic::Code::Unimplemented);
        });
    }
}
