//! One CONNECT stream: a byte stream in each direction, each with its own end, with flow control end to end.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use thiserror::Error;

use crate::Backlog;
use crate::backlog::Queued;
use crate::client::StreamPermit;
use crate::piece::Piece;

/// Why a stream was reset: the error codes of RFC 9113 section 7 that matter to a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum ResetReason {
    /// NO_ERROR: the peer does not need the rest.
    #[error("NO_ERROR")]
    NoError,
    /// PROTOCOL_ERROR.
    #[error("PROTOCOL_ERROR")]
    Protocol,
    /// INTERNAL_ERROR.
    #[error("INTERNAL_ERROR")]
    Internal,
    /// REFUSED_STREAM: the peer has not looked at the request; it may be sent again.
    #[error("REFUSED_STREAM")]
    Refused,
    /// CANCEL: no longer wanted.
    #[error("CANCEL")]
    Cancel,
    /// CONNECT_ERROR: the TCP connection behind the tunnel was reset (RFC 9113 section 8.5).
    #[error("CONNECT_ERROR")]
    Connect,
    /// Any other code.
    #[error("HTTP/2 error code {0:#x}")]
    Other(u32),
}

/// Why a read or a write on a [`Stream`] failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum StreamError {
    /// The stream was reset, by the peer, or by us for a fault of the peer.
    #[error("stream reset: {0}")]
    Reset(ResetReason),
    /// The connection under the stream is gone: closed, failed, or dead by its keepalive.
    #[error("tunnel closed")]
    TunnelClosed,
    /// Written to after `finish` or `reset`.
    #[error("stream already finished")]
    Finished,
}

/// One CONNECT stream. Dropped before [`Stream::finish`], it is reset, so that a cut never looks like an end.
#[derive(Debug)]
pub struct Stream {
    read: ReadHalf,
    write: WriteHalf,
}

/// The half of a [`Stream`] that receives. Dropping it before the end makes the peer's later data be refused.
#[derive(Debug)]
pub struct ReadHalf {
    inner: h2::RecvStream,
    /// What came before the stream was answered.
    early: Bytes,
    /// Bytes handed out and not yet given back to the peer's window.
    held: usize,
    ended: bool,
    permit: Option<Arc<StreamPermit>>,
}

/// The half of a [`Stream`] that sends. Dropped before [`WriteHalf::finish`], it resets the stream.
#[derive(Debug)]
pub struct WriteHalf {
    inner: h2::SendStream<Queued>,
    finished: bool,
    permit: Option<Arc<StreamPermit>>,
    /// The tunnel's account.
    backlog: Arc<Backlog>,
}

impl Stream {
    /// `early` came from `recv` before.
    pub(crate) fn new(
        (recv, early): (h2::RecvStream, Bytes),
        send: h2::SendStream<Queued>,
        permit: Option<StreamPermit>,
        backlog: Arc<Backlog>,
    ) -> Self {
        let permit = permit.map(Arc::new);
        Stream {
            read: ReadHalf { inner: recv, early, held: 0, ended: false, permit: permit.clone() },
            write: WriteHalf { inner: send, finished: false, permit, backlog },
        }
    }

    /// See [`ReadHalf::read`].
    ///
    /// # Errors
    /// If the stream was reset or the tunnel is gone.
    pub async fn read(&mut self) -> Result<Option<Bytes>, StreamError> {
        self.read.read().await
    }

    /// See [`WriteHalf::write`].
    ///
    /// # Errors
    /// If the stream was finished or reset, or the tunnel is gone.
    pub async fn write(&mut self, data: Bytes) -> Result<(), StreamError> {
        self.write.write(data).await
    }

    /// See [`WriteHalf::finish`].
    ///
    /// # Errors
    /// If the stream was finished or reset, or the tunnel is gone.
    pub async fn finish(&mut self) -> Result<(), StreamError> {
        self.write.finish().await
    }

    /// Ends both directions at once with RST_STREAM. What is queued is discarded.
    pub fn reset(&mut self, reason: ResetReason) {
        self.write.reset(reason);
    }

    /// Both directions as values of their own, for two tasks or two futures.
    pub fn split(self) -> (ReadHalf, WriteHalf) {
        (self.read, self.write)
    }

    pub(crate) fn halves(&mut self) -> (&mut ReadHalf, &mut WriteHalf) {
        (&mut self.read, &mut self.write)
    }
}

impl ReadHalf {
    /// The next bytes, never empty; `None` after the peer's end. The window of what an earlier call returned opens for the
    /// peer when the next call is made: a reader that stops reading stops the sender.
    ///
    /// # Errors
    /// If the stream was reset or the tunnel is gone.
    pub async fn read(&mut self) -> Result<Option<Bytes>, StreamError> {
        poll_fn(|cx| self.poll_read(cx)).await
    }

    /// [`ReadHalf::read`] as a poll function.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        self.release(self.held);
        self.poll_chunk(cx)
    }

    /// The next bytes, without opening the window for earlier ones; [`ReadHalf::release`] does that.
    pub(crate) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        if !self.early.is_empty() {
            self.held += self.early.len();
            return Poll::Ready(Ok(Some(std::mem::take(&mut self.early))));
        }
        if self.ended {
            return Poll::Ready(Ok(None));
        }
        loop {
            match ready!(self.inner.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => {
                    self.held += data.len();
                    if let Some(permit) = &self.permit {
                        permit.moved(data.len());
                    }
                    return Poll::Ready(Ok(Some(data)));
                }
                Some(Err(error)) => return Poll::Ready(Err(error.into())),
                None => {
                    self.ended = true;
                    return Poll::Ready(Ok(None));
                }
            }
        }
    }

    /// Lets the peer send `bytes` more. WINDOW_UPDATE frames go out in batches of half a window.
    pub(crate) fn release(&mut self, bytes: usize) {
        let bytes = bytes.min(self.held);
        if bytes > 0 {
            self.held -= bytes;
            // Fails only if more is released than was received.
            let _ = self.inner.flow_control().release_capacity(bytes);
        }
    }
}

impl WriteHalf {
    /// Sends all of `data`; waits while the peer's window or our send buffer is full.
    ///
    /// # Errors
    /// If the stream was finished or reset, or the tunnel is gone.
    pub async fn write(&mut self, mut data: Bytes) -> Result<(), StreamError> {
        poll_fn(|cx| self.poll_write(cx, &mut data)).await
    }

    /// [`WriteHalf::write`] as a poll function. `data` shrinks by what was taken.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<Result<(), StreamError>> {
        let mut piece = Piece::own(std::mem::take(data));
        let written = self.poll_put(cx, &mut piece);
        *data = piece.into_data();
        written
    }

    /// [`WriteHalf::poll_write`] for bytes that keep more memory than their own.
    pub(crate) fn poll_put(&mut self, cx: &mut Context<'_>, piece: &mut Piece) -> Poll<Result<(), StreamError>> {
        while !piece.is_empty() {
            if self.finished {
                return Poll::Ready(Err(StreamError::Finished));
            }
            let mut room = self.inner.capacity();
            if room < piece.len() {
                self.inner.reserve_capacity(piece.len());
                room = self.inner.capacity();
            }
            if room == 0 {
                match ready!(self.inner.poll_capacity(cx)) {
                    Some(Ok(n)) => room = n,
                    Some(Err(error)) => return Poll::Ready(Err(error.into())),
                    None => return Poll::Ready(Err(self.failure())),
                }
            }
            let part = piece.take(room);
            if let Some(permit) = &self.permit {
                permit.moved(part.len());
            }
            if self.inner.send_data(Queued::new(part, &self.backlog), false).is_err() {
                return Poll::Ready(Err(self.failure()));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Ends this direction (END_STREAM) after what was written; the other direction goes on.
    ///
    /// # Errors
    /// If the stream was finished or reset, or the tunnel is gone.
    pub async fn finish(&mut self) -> Result<(), StreamError> {
        self.finish_now()
    }

    /// [`WriteHalf::finish`] without waiting: the end is queued behind what was written.
    pub(crate) fn finish_now(&mut self) -> Result<(), StreamError> {
        if self.finished {
            return Err(StreamError::Finished);
        }
        match self.inner.send_data(Queued::default(), true) {
            Ok(()) => {
                self.finished = true;
                Ok(())
            }
            Err(_) => Err(self.failure()),
        }
    }

    /// Ends both directions at once with RST_STREAM. What is queued is discarded.
    pub fn reset(&mut self, reason: ResetReason) {
        self.finished = true;
        self.inner.send_reset(reason.into());
    }

    /// Ready when the peer has reset the stream or the tunnel is gone. For writers that have nothing to write.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        match ready!(self.inner.poll_reset(cx)) {
            Ok(reason) => Poll::Ready(StreamError::Reset(reason.into())),
            Err(error) => Poll::Ready(error.into()),
        }
    }

    /// Why the stream takes no more data.
    fn failure(&mut self) -> StreamError {
        match self.poll_reset(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(error) => error,
            Poll::Pending => StreamError::Finished,
        }
    }
}

impl Drop for WriteHalf {
    fn drop(&mut self) {
        if !self.finished {
            self.inner.send_reset(h2::Reason::CANCEL);
        }
    }
}

impl From<h2::Error> for StreamError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => StreamError::Reset(reason.into()),
            Some(_) | None => StreamError::TunnelClosed,
        }
    }
}

impl From<h2::Reason> for ResetReason {
    fn from(reason: h2::Reason) -> Self {
        match reason {
            h2::Reason::NO_ERROR => ResetReason::NoError,
            h2::Reason::PROTOCOL_ERROR => ResetReason::Protocol,
            h2::Reason::INTERNAL_ERROR => ResetReason::Internal,
            h2::Reason::REFUSED_STREAM => ResetReason::Refused,
            h2::Reason::CANCEL => ResetReason::Cancel,
            h2::Reason::CONNECT_ERROR => ResetReason::Connect,
            other => ResetReason::Other(other.into()),
        }
    }
}

impl From<ResetReason> for h2::Reason {
    fn from(reason: ResetReason) -> Self {
        match reason {
            ResetReason::NoError => h2::Reason::NO_ERROR,
            ResetReason::Protocol => h2::Reason::PROTOCOL_ERROR,
            ResetReason::Internal => h2::Reason::INTERNAL_ERROR,
            ResetReason::Refused => h2::Reason::REFUSED_STREAM,
            ResetReason::Cancel => h2::Reason::CANCEL,
            ResetReason::Connect => h2::Reason::CONNECT_ERROR,
            ResetReason::Other(code) => code.into(),
        }
    }
}
