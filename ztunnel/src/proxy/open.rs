//! The sockets of one pod that its connections have open, each listed from before it can carry a byte until right before it is
//! closed. When the pod is gone, the thread that talks to the agent ends all of them by this list, whatever the tasks that own
//! them are doing or wait for.
//!
//! A descriptor is closed by its owner alone. What is ended by force is reset and shut down, and its number stays taken until
//! the owner's turn has come: a number that is in the list cannot be that of another file.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};

use futures_util::future::BoxFuture;
use mesh_hbone::copy::Plain;
use nix::errno::Errno;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::descriptors::Descriptors;
use super::live::Full;
use super::sys;

/// Sockets that are ended in one go; then others of the thread have their turn.
const ENDED_IN_A_ROW: usize = 64;

/// The sockets of one pod.
#[derive(Debug)]
pub struct OpenSockets {
    closed: AtomicBool,
    list: Mutex<List>,
    descriptors: Arc<Descriptors>,
}

#[derive(Debug, Default)]
struct List {
    next: u64,
    sockets: HashMap<u64, Arc<Slot>>,
    gates: Vec<Weak<Mutex<()>>>,
}

/// A socket in the list.
#[derive(Debug)]
struct Slot {
    /// `None` once its owner is about to close it. Locked while something is done to the socket that must not be done to one that was
    /// ended, or to another file of its number.
    fd: Mutex<Option<RawFd>>,
    /// Its place in the list of the pod.
    id: u64,
    of: Arc<OpenSockets>,
}

/// What became of sockets that were to be ended by force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Aborted {
    /// Those that carry nothing any more.
    pub ended: usize,
    /// Those that the kernel did not end.
    pub left: usize,
}

impl OpenSockets {
    /// None yet; how many there may be depends on the descriptors that are free.
    pub fn new(descriptors: Arc<Descriptors>) -> Arc<Self> {
        Arc::new(Self { closed: AtomicBool::new(false), list: Mutex::default(), descriptors })
    }

    /// Lists a socket that is not connected yet, or is none for connections. What is accepted comes in by a [`Gate`].
    ///
    /// # Errors
    /// When there are too many, or the pod is gone; the socket comes back.
    pub fn enter<S: AsFd>(self: &Arc<Self>, socket: S) -> Result<Open<S>, (Full, S)> {
        let mut list = self.list();
        let full = if self.is_closed() {
            Some(Full::PodGone)
        } else if self.descriptors.take(list.sockets.len()) {
            None
        } else {
            Some(Full::TooMany)
        };
        if let Some(full) = full {
            drop(list);
            return Err((full, socket));
        }
        let id = list.next;
        list.next += 1;
        let fd = Mutex::new(Some(socket.as_fd().as_raw_fd()));
        let slot = Arc::new(Slot { fd, id, of: Arc::clone(self) });
        list.sockets.insert(id, Arc::clone(&slot));
        drop(list);
        Ok(Open { entry: Entry(slot), socket })
    }

    /// A way in for what one listening socket accepts.
    pub fn gate(self: &Arc<Self>) -> Gate {
        let lock = Arc::new(Mutex::new(()));
        let mut list = self.list();
        list.gates.retain(|gate| gate.strong_count() > 0);
        list.gates.push(Arc::downgrade(&lock));
        drop(list);
        Gate { lock, of: Arc::clone(self) }
    }

    /// How many are open.
    pub fn count(&self) -> usize {
        self.list().sockets.len()
    }

    /// The pod is gone: from now on nothing is listed, accepted or connected. What is open goes on.
    pub fn close(&self) {
        // Whoever looks does so under a lock that `abort` takes later: it has seen this, or is found by `abort`.
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Whether the pod is gone.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// The pod is gone, and its tasks have not ended by themselves. When this returns, no socket of it carries anything or will,
    /// but those that it says are left.
    pub async fn abort(&self) -> Aborted {
        self.close();
        let gates: Vec<_> = self.list().gates.iter().filter_map(Weak::upgrade).collect();
        for gate in gates {
            // Who was accepting when it was closed has listed what it accepted by then.
            drop(lock(&gate));
        }
        let slots: Vec<_> = self.list().sockets.values().cloned().collect();
        let mut aborted = Aborted::default();
        for some in slots.chunks(ENDED_IN_A_ROW) {
            for slot in some {
                match slot.abort() {
                    Ok(true) => aborted.ended += 1,
                    Ok(false) => {}
                    Err(errno) => {
                        tracing::error!(%errno, "the kernel does not end a socket of a pod that is gone");
                        aborted.left += 1;
                    }
                }
            }
            tokio::task::yield_now().await;
        }
        aborted
    }

    fn list(&self) -> MutexGuard<'_, List> {
        lock(&self.list)
    }
}

impl Slot {
    /// False: its owner was about to close it.
    fn abort(&self) -> Result<bool, Errno> {
        let fd = lock(&self.fd);
        match *fd {
            Some(fd) => sys::abort(fd).map(|()| true),
            None => Ok(false),
        }
    }
}

/// Where the connections of one listening socket come in.
#[derive(Debug)]
pub struct Gate {
    /// Held from before a connection is accepted until it is listed.
    lock: Arc<Mutex<()>>,
    of: Arc<OpenSockets>,
}

/// A connection that was accepted.
#[derive(Debug)]
pub enum Came {
    /// It is listed.
    In(PodStream, SocketAddr),
    /// The pod has as many sockets as it may: it was reset.
    TooMany {
        /// Its far end.
        peer: SocketAddr,
        /// Its near end.
        local: SocketAddr,
    },
}

impl Gate {
    /// The next connection. None comes once the pod is gone.
    ///
    /// # Errors
    /// When accepting fails.
    pub async fn accept(&self, listener: &TcpListener) -> io::Result<Came> {
        poll_fn(|cx| self.poll_accept(cx, listener)).await
    }

    fn poll_accept(&self, cx: &mut Context<'_>, listener: &TcpListener) -> Poll<io::Result<Came>> {
        let _passing = lock(&self.lock);
        if self.of.is_closed() {
            return Poll::Pending;
        }
        let (stream, peer) = ready!(listener.poll_accept(cx))?;
        // What is not listed is closed here, while `abort` waits.
        match self.of.enter(stream) {
            Ok(stream) => Poll::Ready(Ok(Came::In(stream, peer))),
            Err((Full::TooMany, stream)) => {
                let local = stream.local_addr();
                // Fails only on what is no TCP socket.
                let _ = stream.set_zero_linger();
                Poll::Ready(local.map(|local| Came::TooMany { peer, local }))
            }
            Err((Full::PodGone, stream)) => {
                let _ = stream.set_zero_linger();
                Poll::Pending
            }
        }
    }
}

/// A place in the list, for its owner. One word, since there are several in the state of each connection.
#[derive(Debug)]
struct Entry(Arc<Slot>);

impl Drop for Entry {
    fn drop(&mut self) {
        let Slot { fd, id, of } = &*self.0;
        *lock(fd) = None;
        of.list().sockets.remove(id);
        of.descriptors.give_back();
    }
}

/// A socket that is in its pod's list as long as it is open.
#[derive(Debug)]
pub struct Open<S> {
    // Dropped first: the number must be out of the list when it becomes free.
    entry: Entry,
    socket: S,
}

/// A TCP connection of a pod, or a tunnel's.
pub type PodStream = Open<TcpStream>;

impl<S> Deref for Open<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.socket
    }
}

impl<S> Open<S> {
    /// The same socket as something else; when that fails it is closed.
    ///
    /// # Errors
    /// What `change` says.
    pub fn map<T>(self, change: impl FnOnce(S) -> io::Result<T>) -> io::Result<Open<T>> {
        let Self { socket, entry } = self;
        let mut fd = lock(&entry.0.fd);
        let changed = change(socket);
        if changed.is_err() {
            *fd = None;
        }
        drop(fd);
        Ok(Open { entry, socket: changed? })
    }
}

impl Open<OwnedFd> {
    /// Connects a TCP socket that does not block.
    ///
    /// # Errors
    /// When the kernel refuses, the destination does, or the pod is gone.
    pub async fn connect(self, to: SocketAddr) -> io::Result<PodStream> {
        self.begin(to)?;
        // Only now the runtime gets to know it: what is not connecting counts as ready to be written to.
        let stream = self.map(|socket| TcpStream::from_std(socket.into()))?;
        stream.writable().await?;
        match stream.take_error()? {
            Some(error) => Err(error),
            None => Ok(stream),
        }
    }

    /// Gives a UDP socket that does not block its peer.
    ///
    /// # Errors
    /// When the kernel refuses, or the pod is gone.
    pub fn connect_datagrams(self, to: SocketAddr) -> io::Result<Open<UdpSocket>> {
        self.begin(to)?;
        self.map(|socket| UdpSocket::from_std(socket.into()))
    }

    fn begin(&self, to: SocketAddr) -> io::Result<()> {
        let _held = lock(&self.entry.0.fd);
        if self.entry.0.of.is_closed() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the pod is gone"));
        }
        match SockRef::from(&self.socket).connect(&to.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
            done => done,
        }
    }
}

impl AsyncRead for PodStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for PodStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

impl Plain for PodStream {
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        Plain::poll_read(&self.socket, cx, buffer)
    }

    fn poll_write(&self, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Plain::poll_write(&self.socket, cx, bytes)
    }

    fn end(&self) -> io::Result<()> {
        self.socket.end()
    }

    fn failed(&self) -> BoxFuture<'_, io::Error> {
        self.socket.failed()
    }

    fn abort(&self) {
        self.socket.abort();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half done under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
