//! The server end: serves the CONNECT requests of one connection.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::{future::poll_fn, pin::pin};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::backlog::Queued;
use crate::budget::{Budget, Budgeted};
use crate::connection::{Keepalive, Noted, Windows};
use crate::flood::Guarded;
use crate::headers::HeaderError;
use crate::memory::Pressure;
use crate::stream::{ResetReason, Stream, StreamError};
use crate::{Authority, Backlog, ConnectionError, Headers, Options};

/// Streams that a peer may have reset and that we have not looked at yet, before the connection is closed.
const MAX_PENDING_RESETS: usize = 50;
/// Requests that are handed out in one go; then others on the thread have their turn.
const REQUESTS_IN_A_ROW: usize = 16;
/// Bytes that a peer may send on a stream before it is answered. Most wait for the answer.
const EARLY: usize = 16 << 10;
/// Streams that we may have reset for the peer's faults before the connection is closed.
const MAX_FAULTS: usize = 256;

/// A CONNECT request that waits for its answer. Dropped unanswered, its stream is reset.
#[derive(Debug)]
pub struct Request {
    /// The destination.
    pub authority: Authority,
    /// Fields beside it.
    pub headers: Headers,
    answer: Option<Answer>,
}

#[derive(Debug)]
struct Answer {
    respond: h2::server::SendResponse<Queued>,
    recv: h2::RecvStream,
    early: Early,
}

/// What has come on a stream before its answer, for which nobody reads yet.
#[derive(Debug)]
struct Early {
    data: BytesMut,
    has_ended: bool,
    backlog: Arc<Backlog>,
}

impl Early {
    /// Takes some more; false if that is too much.
    fn take(&mut self, data: &[u8]) -> bool {
        let limit = match self.backlog.pressure(Pressure::Low) {
            Pressure::Low => EARLY,
            Pressure::High => 0,
        };
        if self.data.len() + data.len() > limit {
            return false;
        }
        self.data.extend_from_slice(data);
        self.backlog.add_unanswered(data.len());
        true
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        if !self.data.is_empty() {
            self.backlog.remove_unanswered(self.data.len());
        }
    }
}

/// Why a request need not be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GivenUp {
    /// The peer has given it up, or the tunnel is gone.
    ByPeer,
    /// The peer sends more than may wait before there is an answer.
    TooEarly,
}

impl Request {
    /// Answers 200 with these fields; from now on both sides may send.
    ///
    /// # Errors
    /// If the peer has reset the stream, or the tunnel is gone.
    pub fn accept(mut self, headers: &Headers) -> Result<Stream, StreamError> {
        let Some(Answer { mut respond, recv, mut early }) = self.answer.take() else {
            return Err(StreamError::Finished);
        };
        let mut response = http::Response::new(());
        *response.headers_mut() = headers.to_map().map_err(|_: HeaderError| StreamError::Finished)?;
        let send = respond.send_response(response, false)?;
        early.backlog.remove_unanswered(early.data.len());
        let data = std::mem::take(&mut early.data).freeze();
        Ok(Stream::new((recv, data), send, None, Arc::clone(&early.backlog)))
    }

    /// Answers with this status and ends the stream. A status outside of 300..=599 is sent as 500.
    pub fn refuse(mut self, status: u16) {
        if let Some(Answer { mut respond, .. }) = self.answer.take() {
            refuse(&mut respond, status);
        }
    }

    /// Resets the stream without an answer.
    pub fn reset(mut self, reason: ResetReason) {
        if let Some(Answer { mut respond, .. }) = self.answer.take() {
            respond.send_reset(reason.into());
        }
    }

    /// Completes when nobody waits for the answer any more, or the peer does not wait for it as it must. To be polled while
    /// the answer is being found: what comes meanwhile is taken, and bounded, by it.
    pub async fn given_up(&mut self) -> GivenUp {
        poll_fn(|cx| self.poll_given_up(cx)).await
    }

    fn poll_given_up(&mut self, cx: &mut Context<'_>) -> Poll<GivenUp> {
        let Some(Answer { respond, recv, early }) = &mut self.answer else { return Poll::Ready(GivenUp::ByPeer) };
        if respond.poll_reset(cx).is_ready() {
            return Poll::Ready(GivenUp::ByPeer);
        }
        while !early.has_ended {
            match ready!(recv.poll_data(cx)) {
                Some(Ok(data)) if early.take(&data) => {}
                Some(Ok(_)) => return Poll::Ready(GivenUp::TooEarly),
                Some(Err(_)) => return Poll::Ready(GivenUp::ByPeer),
                None => early.has_ended = true,
            }
        }
        Poll::Pending
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Some(mut answer) = self.answer.take() {
            answer.respond.send_reset(h2::Reason::INTERNAL_ERROR);
        }
    }
}

/// Serves one connection until it has ended. Every CONNECT is given to `handler`, whose future runs as a task of its own (it
/// outlives the connection if it has bytes left to deliver). What is not a plain CONNECT to `host:port` is answered 400.
/// When `drain` completes, the peer is told to open no more streams (GOAWAY); the open ones go on until they end. Dropping
/// the returned future closes the connection with all of its streams.
///
/// # Errors
/// How the connection ended, if not in order. A connection that is lost while no stream is open has ended in order.
pub fn serve<IO, D, H, F>(
    io: IO,
    options: &Options,
    drain: D,
    handler: H,
) -> impl Future<Output = Result<(), ConnectionError>>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    D: Future<Output = ()> + Send,
    H: Fn(Request) -> F + Send,
    F: Future<Output = ()> + Send + 'static,
{
    let budget = Budget::new(options.poll_budget);
    let io = Budgeted::new(io, budget.clone());
    budget.of_each_poll(serve_budgeted(io, options, drain, handler))
}

async fn serve_budgeted<IO, D, H, F>(io: IO, options: &Options, drain: D, handler: H) -> Result<(), ConnectionError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    D: Future<Output = ()> + Send,
    H: Fn(Request) -> F + Send,
    F: Future<Output = ()> + Send + 'static,
{
    let backlog = &options.backlog;
    let noted = Noted(Arc::clone(backlog));
    let mut windows = Windows::new(options);
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(windows.size())
        .initial_connection_window_size(options.connection_window)
        .max_frame_size(options.max_frame_size)
        .max_header_list_size(options.max_header_list)
        .max_send_buffer_size(options.send_buffer)
        .max_concurrent_streams(options.server_streams)
        .max_local_error_reset_streams(Some(MAX_FAULTS))
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS);
    let mut connection = timeout(options.handshake_timeout, builder.handshake::<_, Queued>(Guarded::new(io, backlog)))
        .await
        .map_err(|_| ConnectionError::HandshakeTimeout)??;
    let mut keepalive = Keepalive::new(connection.ping_pong(), options);
    let mut drain = pin!(drain);
    let mut draining = false;
    // A stream that its peer has reset no longer counts for HTTP/2, but its handler may still run.
    let running = Running { now: Arc::new(AtomicUsize::new(0)), limit: 2 * options.server_streams as usize };
    let mut requests = 0_usize;
    loop {
        if requests == REQUESTS_IN_A_ROW {
            requests = 0;
            tokio::task::yield_now().await;
        }
        requests += 1;
        let next = poll_fn(|cx| {
            if !draining && drain.as_mut().poll(cx).is_ready() {
                draining = true;
                connection.graceful_shutdown();
            }
            windows.follow(|size| connection.set_initial_window_size(size).is_ok());
            let next = connection.poll_accept(cx);
            noted.0.note();
            if let Poll::Ready(next) = next {
                return Poll::Ready(Ok(next));
            }
            keepalive.poll(cx).map(|()| Err(ConnectionError::KeepaliveTimeout))
        })
        .await?;
        let Some(next) = next else { return Ok(()) };
        let (request, mut respond) = match next.map_err(ConnectionError::from) {
            Ok(next) => next,
            // Clients hang up without more ado when they are done.
            Err(ConnectionError::Io(_)) if !connection.has_streams() => return Ok(()),
            Err(error) => return Err(error),
        };
        let Some(guard) = running.enter() else {
            respond.send_reset(h2::Reason::REFUSED_STREAM);
            continue;
        };
        match parse(&request) {
            Ok((authority, headers)) => {
                let early = Early { data: BytesMut::new(), has_ended: false, backlog: Arc::clone(backlog) };
                let answer = Some(Answer { respond, recv: request.into_body(), early });
                let handled = handler(Request { authority, headers, answer });
                tokio::spawn(async move {
                    let _guard = guard;
                    handled.await;
                });
            }
            Err(reason) => {
                tracing::debug!(reason, "bad request");
                refuse(&mut respond, 400);
            }
        }
    }
}

/// Counts the handlers of one connection.
struct Running {
    now: Arc<AtomicUsize>,
    limit: usize,
}

struct RunningGuard(Arc<AtomicUsize>);

impl Running {
    fn enter(&self) -> Option<RunningGuard> {
        if self.now.load(Ordering::Acquire) >= self.limit {
            return None;
        }
        self.now.fetch_add(1, Ordering::AcqRel);
        Some(RunningGuard(Arc::clone(&self.now)))
    }
}

impl Drop for RunningGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn parse(request: &http::Request<h2::RecvStream>) -> Result<(Authority, Headers), &'static str> {
    if request.method() != http::Method::CONNECT {
        return Err("not a CONNECT");
    }
    if request.extensions().get::<h2::ext::Protocol>().is_some() {
        return Err("extended CONNECT");
    }
    if request.uri().scheme().is_some() || request.uri().path_and_query().is_some() {
        return Err("CONNECT with :scheme or :path");
    }
    let authority = request.uri().authority().ok_or("CONNECT without :authority")?;
    let authority = authority.as_str().parse().map_err(|_| "invalid :authority")?;
    let headers = Headers::from_map(request.headers()).map_err(|_| "too many header fields")?;
    Ok((authority, headers))
}

fn refuse(respond: &mut h2::server::SendResponse<Queued>, status: u16) {
    let mut response = http::Response::new(());
    *response.status_mut() = http::StatusCode::from_u16(status)
        .ok()
        .filter(|status| (300..=599).contains(&status.as_u16()))
        .unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    // Fails only if the peer has reset the stream or is gone: nobody is left to be told.
    let _ = respond.send_response(response, true);
}
