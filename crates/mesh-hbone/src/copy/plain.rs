//! Plain connections as a copy uses them: both directions through one shared reference, so that a failure can be waited for
//! beside them.

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::task::{Context, Poll, ready};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// A plain connection, usually TCP: it can end one direction, and abort both.
pub trait Plain: Send + Sync {
    /// Reads some bytes; 0 at the end. One task at a time may wait.
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>>;

    /// Writes some bytes of these, in this order. One task at a time may wait.
    fn poll_write(&self, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<io::Result<usize>>;

    /// Ends the direction that is written to; the other goes on.
    ///
    /// # Errors
    /// When the connection has failed.
    fn end(&self) -> io::Result<()>;

    /// Completes when the connection has failed or was reset, even when its end has been read and nothing is written.
    fn failed(&self) -> BoxFuture<'_, io::Error>;

    /// Makes the connection end with a reset when it is dropped, instead of an orderly end.
    fn abort(&self);
}

impl Plain for TcpStream {
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let room = buffer.len();
        loop {
            ready!(self.poll_read_ready(cx))?;
            let socket = SockRef::from(self);
            let done = attempt(self, Interest::READABLE, room, || (&*socket).read(buffer));
            if let Poll::Ready(done) = done {
                return Poll::Ready(done);
            }
        }
    }

    fn poll_write(&self, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let room = bytes.iter().map(|slice| slice.len()).sum();
        loop {
            ready!(self.poll_write_ready(cx))?;
            let socket = SockRef::from(self);
            let done = attempt(self, Interest::WRITABLE, room, || match bytes {
                [one] => (&*socket).write(one),
                many => (&*socket).write_vectored(many),
            });
            if let Poll::Ready(done) = done {
                return Poll::Ready(done);
            }
        }
    }

    fn end(&self) -> io::Result<()> {
        match SockRef::from(self).shutdown(Shutdown::Write) {
            // The peer has reset it meanwhile; reading says so.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            ended => ended,
        }
    }

    fn failed(&self) -> BoxFuture<'_, io::Error> {
        async move {
            // Not a matter of readability: after its end has been read, a socket is readable for ever.
            let failed = self.ready(Interest::ERROR).await.and_then(|_| self.take_error());
            failed.map_or_else(|error| error, |error| error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()))
        }
        .boxed()
    }

    fn abort(&self) {
        // Fails only on a descriptor that is no TCP socket.
        let _ = self.set_zero_linger();
    }
}

/// Makes a system call that moves up to `room` bytes. Pending: the socket was not ready, ask again.
///
/// Less than `room` means that the kernel's buffer is empty (or full): the next attempt would be in vain, and epoll, which is
/// used edge-triggered, tells when that changes (epoll(7), question 9). So the socket counts as not ready from then on.
fn attempt(
    stream: &TcpStream,
    interest: Interest,
    room: usize,
    call: impl FnOnce() -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    let mut part = None;
    let whole = stream.try_io(interest, || {
        let n = call()?;
        if 0 < n && n < room {
            part = Some(n);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(n)
    });
    match (part, whole) {
        (Some(n), _) => Poll::Ready(Ok(n)),
        (None, Err(error)) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
        (None, whole) => Poll::Ready(whole),
    }
}
