//! What both ends of an HTTP/2 connection share: how it fails, and the PING that notices a dead peer.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use thiserror::Error;
use tokio::time::{Instant, Sleep};

use crate::memory::Pressure;
use crate::{Backlog, Options};

/// The most that the window of a stream is while the share that pays for the tunnel is under pressure, in bytes: one read.
const SMALL_WINDOW: u32 = 256 << 10;

/// Why a tunnel's connection ended.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// The HTTP/2 handshake did not complete in [`Options::handshake_timeout`].
    #[error("HTTP/2 handshake timed out")]
    HandshakeTimeout,
    /// The peer did not answer a PING in [`Options::ping_timeout`].
    #[error("peer does not answer PING")]
    KeepaliveTimeout,
    /// The byte stream failed or ended without GOAWAY.
    #[error("tunnel connection failed: {0}")]
    Io(#[source] io::Error),
    /// One side broke the protocol, or the peer ended the connection with an error code.
    #[error("HTTP/2 error: {0}")]
    Protocol(String),
}

impl From<h2::Error> for ConnectionError {
    fn from(error: h2::Error) -> Self {
        if !error.is_io() {
            return ConnectionError::Protocol(error.to_string());
        }
        ConnectionError::Io(error.into_io().unwrap_or_else(|| io::ErrorKind::Other.into()))
    }
}

/// The flow-control window of a tunnel's streams, which follows the pressure on the share that pays for it. A change comes
/// into force when the peer has acknowledged it: one that does not keeps what it had.
pub(crate) struct Windows {
    full: u32,
    backlog: Arc<Backlog>,
    /// For which the window was chosen that is announced.
    pressure: Pressure,
}

impl Windows {
    pub(crate) fn new(options: &Options) -> Self {
        let backlog = Arc::clone(&options.backlog);
        Windows { full: options.stream_window, pressure: backlog.pressure(Pressure::Low), backlog }
    }

    /// As it is announced, in bytes.
    pub(crate) fn size(&self) -> u32 {
        match self.pressure {
            Pressure::Low => self.full,
            Pressure::High => self.full.min(SMALL_WINDOW),
        }
    }

    /// Announces by `set` what has changed; false: not now, the last change is not acknowledged yet.
    pub(crate) fn follow(&mut self, set: impl FnOnce(u32) -> bool) {
        let before = self.pressure;
        self.pressure = self.backlog.pressure(before);
        if self.pressure != before && !set(self.size()) {
            self.pressure = before;
        }
    }
}

/// Takes the tunnel's note out of the account when its driver ends or is dropped.
pub(crate) struct Noted(pub(crate) Arc<Backlog>);

impl Drop for Noted {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// PING at an interval; completes when the peer stays silent.
pub(crate) struct Keepalive {
    pings: Option<h2::PingPong>,
    timer: Pin<Box<Sleep>>,
    waiting: bool,
    interval: Duration,
    timeout: Duration,
}

impl Keepalive {
    pub(crate) fn new(pings: Option<h2::PingPong>, options: &Options) -> Self {
        Keepalive {
            pings,
            timer: Box::pin(tokio::time::sleep(options.ping_interval)),
            waiting: false,
            interval: options.ping_interval,
            timeout: options.ping_timeout,
        }
    }

    /// Ready when a PING was not answered in time.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(pings) = &mut self.pings else { return Poll::Pending };
        loop {
            if self.waiting {
                match pings.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => {
                        self.waiting = false;
                        self.timer.as_mut().reset(Instant::now() + self.interval);
                        continue;
                    }
                    // The connection is closed; its own future says how.
                    Poll::Ready(Err(_)) => {
                        self.pings = None;
                        return Poll::Pending;
                    }
                    Poll::Pending => {}
                }
                return self.timer.as_mut().poll(cx);
            }
            std::task::ready!(self.timer.as_mut().poll(cx));
            if pings.send_ping(h2::Ping::opaque()).is_err() {
                self.pings = None;
                return Poll::Pending;
            }
            self.waiting = true;
            self.timer.as_mut().reset(Instant::now() + self.timeout);
        }
    }
}
