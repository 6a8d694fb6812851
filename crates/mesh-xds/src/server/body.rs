//! Responses as the body of a gRPC answer. tonic's own encoder would copy each of them into a buffer of each client.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;
use tokio::sync::Notify;
use tonic::Status;

use super::response::{Pieces, Response};
use super::service::{Place, lock};

/// What a stream and its body share: the responses that the connection has not taken yet.
#[derive(Debug)]
pub(super) struct Transfer {
    state: Mutex<State>,
    room: usize,
    taken: AtomicU64,
    drained: Notify,
    closed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// What is left of the response that is being sent.
    pieces: Option<Pieces>,
    queue: VecDeque<Response>,
    /// How it ends, once nothing is left.
    end: Option<Status>,
    /// It ends in the middle of a response.
    is_cut: bool,
    waker: Option<Waker>,
}

/// There is no room.
#[derive(Debug)]
pub(super) struct Full;

impl Transfer {
    /// One with room for so many responses behind the one that is being sent.
    pub(super) fn new(room: usize) -> Self {
        Self { state: Mutex::default(), room, taken: AtomicU64::new(0), drained: Notify::new(), closed: Notify::new() }
    }

    /// Puts a response behind those that are there.
    pub(super) fn send(&self, response: Response) -> Result<(), Full> {
        let mut state = lock(&self.state);
        if state.queue.len() >= self.room {
            return Err(Full);
        }
        state.queue.push_back(response);
        state.wake();
        Ok(())
    }

    /// Ends it after the response that is being sent, or, if the client is not to be waited for, in the middle of it:
    /// nothing is kept of it then.
    pub(super) fn end(&self, status: Status, waits: bool) {
        let mut state = lock(&self.state);
        if state.end.is_some() {
            return;
        }
        state.queue.clear();
        if !waits && state.pieces.take().is_some() {
            state.is_cut = true;
        }
        state.end = Some(status);
        state.wake();
    }

    /// Bytes that the connection has taken, into a bounded buffer.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Waits until the connection has taken all that there is.
    pub(super) async fn drained(&self) {
        while !lock(&self.state).is_drained() {
            self.drained.notified().await;
        }
    }

    /// Waits until the body is gone, and the client with it.
    pub(super) async fn closed(&self) {
        self.closed.notified().await;
    }
}

impl State {
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn is_drained(&self) -> bool {
        self.pieces.is_none() && self.queue.is_empty()
    }

    fn piece(&mut self) -> Option<Bytes> {
        loop {
            if let Some(piece) = self.pieces.as_mut().and_then(Iterator::next) {
                return Some(piece);
            }
            self.pieces = Some(self.queue.pop_front().map(Response::into_pieces)?);
        }
    }
}

/// The body of one stream's answer.
pub(super) struct Body {
    transfer: Arc<Transfer>,
    is_over: bool,
    /// As long as it is there the client has its place: it keeps a connection busy.
    _place: Arc<Place>,
}

impl Body {
    pub(super) fn new(transfer: Arc<Transfer>, place: Arc<Place>) -> Self {
        Self { transfer, is_over: false, _place: place }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let mut state = lock(&self.transfer.state);
        if let Some(piece) = state.piece() {
            self.transfer.taken.fetch_add(piece.len() as u64, Ordering::Relaxed);
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        // Completely sent, and not cut off any more.
        state.pieces = None;
        self.transfer.drained.notify_one();
        let Some(status) = state.end.take() else {
            state.waker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        // In the middle of a message there is no way to say why.
        let last = if state.is_cut { Err(status) } else { Ok(trailers(&status)) };
        drop(state);
        self.is_over = true;
        Poll::Ready(Some(last))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.transfer.closed.notify_one();
    }
}

fn trailers(status: &Status) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    if status.add_header(&mut trailers).is_err() {
        // Its text cannot be a header.
        let _ = Status::new(status.code(), "").add_header(&mut trailers);
    }
    Frame::trailers(trailers)
}
