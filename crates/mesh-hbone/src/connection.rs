//! What both ends of an HTTP/2 connection share: how it fails, and the PING that notices a dead peer.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use thiserror::Error;
use tokio::time::{Instant, Sleep};

use crate::Options;

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
