//! Unix SEQPACKET sockets that carry messages and file descriptors between two processes of one node.
//!
//! Each packet is one message of 1 to [`MAX_MESSAGE`] bytes with up to [`MAX_FDS`] descriptors beside it. A packet that
//! was cut short, in bytes or in descriptors, is an error, and every descriptor that came with it is closed.

#![expect(
    unsafe_code,
    reason = "descriptors that the kernel hands over become owned here, and are registered with tokio; an ioctl without a \
              safe wrapper"
)]

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use nix::errno::Errno;
use nix::sys::socket::sockopt::{PeerCredentials as SoPeerCred, ReceiveTimeout, SendTimeout};
use nix::sys::socket::{self, AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};
use nix::sys::time::TimeVal;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Largest message, in bytes.
pub const MAX_MESSAGE: usize = 64 << 10;
/// Most descriptors beside one message: what the kernel's SCM_RIGHTS carries.
pub const MAX_FDS: usize = 253;

/// What can go wrong on a socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The peer closed the connection.
    #[error("the peer closed the connection")]
    Closed,
    /// A message was empty, which cannot be told from the end of the connection.
    #[error("empty message")]
    Empty,
    /// A message to send was larger than [`MAX_MESSAGE`].
    #[error("message of {0} bytes, the limit is {MAX_MESSAGE}")]
    TooLarge(usize),
    /// More descriptors to send than [`MAX_FDS`].
    #[error("{0} descriptors, the limit is {MAX_FDS}")]
    TooManyFds(usize),
    /// A received message was larger than the caller allowed.
    #[error("received a message larger than {0} bytes")]
    Truncated(usize),
    /// Not all descriptors of a received message arrived: this process is at its limit of open files.
    #[error("descriptors were lost on receipt; is the limit of open files (RLIMIT_NOFILE) reached?")]
    FdsTruncated,
    /// Another process listens on the path.
    #[error("another process listens on this path")]
    AddressInUse,
    /// The path exists and is not a socket.
    #[error("the path exists and is not a socket")]
    NotASocket,
    /// The system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// Who is at the other end, as the kernel recorded it when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process id, in this process's PID namespace; 0 if it has none there.
    pub pid: i32,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
}

/// Waits for connections on a path.
#[derive(Debug)]
pub struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens on `path`, whose file gets the permission bits `mode` (less the umask). A file that a dead process left
    /// is replaced; a socket that answers is [`Error::AddressInUse`]. Needs a tokio runtime.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, Error> {
        remove_stale(path)?;
        let fd = new_socket(SockFlag::SOCK_NONBLOCK)?;
        // Before bind: the kernel gives the file the socket's own mode, so there is no moment with a wider one.
        fchmod(&fd, Mode::from_bits_truncate(mode))?;
        socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        socket::listen(&fd, Backlog::new(16)?)?;
        Ok(Self(register(fd)?))
    }

    /// The next connection.
    pub async fn accept(&self) -> Result<Socket, Error> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        loop {
            let accepted = self.0.async_io(Interest::READABLE, |fd| Ok(socket::accept4(fd.as_raw_fd(), flags)?)).await;
            match accepted {
                Ok(fd) => return Ok(Socket(register(own(fd))?)),
                // The client gave up while it waited.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A connection, for tokio.
#[derive(Debug)]
pub struct Socket(AsyncFd<OwnedFd>);

impl Socket {
    /// Connects to the listener on `path`. A full backlog is an error (`WouldBlock`), not a wait. Needs a tokio runtime.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        Self::from_fd(connect(path, SockFlag::SOCK_NONBLOCK)?)
    }

    /// Two ends of a new connection. Needs a tokio runtime.
    pub fn pair() -> Result<(Self, Self), Error> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (a, b) = socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self::from_fd(a)?, Self::from_fd(b)?))
    }

    /// A connection made elsewhere; `fd` must be a non-blocking SEQPACKET socket. Needs a tokio runtime.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, Error> {
        Ok(Self(register(fd)?))
    }

    /// Sends one message with descriptors beside it; the caller keeps its own copies. Waits while the peer's queue is
    /// full. Cancel-safe: it was sent, or not at all.
    pub async fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        check(message, fds)?;
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        self.0.async_io(Interest::WRITABLE, |fd| send(fd.as_fd(), message, &raw)).await?;
        Ok(())
    }

    /// The next message, of at most `max` bytes, and its descriptors (close-on-exec). [`Error::Closed`] at the end.
    /// Cancel-safe.
    pub async fn recv(&self, max: usize) -> Result<(Bytes, Vec<OwnedFd>), Error> {
        let mut buffer = Buffer::new(max);
        let received = self.0.async_io(Interest::READABLE, |fd| receive(fd.as_fd(), &mut buffer)).await?;
        buffer.finish(received)
    }

    /// Resolves when the peer has read everything that was sent, or is gone. Until then the descriptors that were sent are
    /// held by the kernel, counted by no process's limit of open files. Cancel-safe; but what is sent after it was cancelled may
    /// wait until the peer has read something.
    pub async fn drained(&self) -> Result<(), Error> {
        loop {
            // Told by the kernel whenever the peer has read a message.
            let mut ready = self.0.writable().await?;
            if unread(ready.get_inner().as_fd())? == 0 {
                return Ok(());
            }
            ready.clear_ready();
        }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> Result<PeerCredentials, Error> {
        peer(self.0.get_ref().as_fd())
    }
}

/// A connection for programs without a runtime, such as a plugin that asks one question and ends.
#[derive(Debug)]
pub struct BlockingSocket(OwnedFd);

impl BlockingSocket {
    /// Connects to the listener on `path`. Each later send or receive fails after `timeout` (`WouldBlock`).
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, Error> {
        let fd = new_socket(SockFlag::empty())?;
        let timeout = TimeVal::new(
            timeout.as_secs().try_into().unwrap_or(i64::MAX),
            // Zero would mean no limit.
            i64::from(timeout.subsec_micros().max(1)),
        );
        socket::setsockopt(&fd, SendTimeout, &timeout)?;
        socket::setsockopt(&fd, ReceiveTimeout, &timeout)?;
        // The send timeout bounds the connect too.
        socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self(fd))
    }

    /// As [`Socket::send`].
    pub fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        check(message, fds)?;
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        Ok(send(self.0.as_fd(), message, &raw)?)
    }

    /// As [`Socket::recv`].
    pub fn recv(&self, max: usize) -> Result<(Bytes, Vec<OwnedFd>), Error> {
        let mut buffer = Buffer::new(max);
        let received = receive(self.0.as_fd(), &mut buffer)?;
        buffer.finish(received)
    }

    /// As [`Socket::peer`].
    pub fn peer(&self) -> Result<PeerCredentials, Error> {
        peer(self.0.as_fd())
    }
}

impl AsFd for BlockingSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn new_socket(flags: SockFlag) -> Result<OwnedFd, Error> {
    Ok(socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | flags, None)?)
}

fn connect(path: &Path, flags: SockFlag) -> Result<OwnedFd, Error> {
    let fd = new_socket(flags)?;
    socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

fn remove_stale(path: &Path) -> Result<(), Error> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(Error::NotASocket),
        Ok(_) => {}
    }
    match connect(path, SockFlag::SOCK_NONBLOCK) {
        Err(Error::Io(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(std::fs::remove_file(path)?),
        // Connected, or its backlog is full: somebody is there.
        Ok(_) => Err(Error::AddressInUse),
        Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Err(Error::AddressInUse),
        Err(error) => Err(error),
    }
}

fn check(message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
    match (message.len(), fds.len()) {
        (0, _) => Err(Error::Empty),
        (length, _) if length > MAX_MESSAGE => Err(Error::TooLarge(length)),
        (_, count) if count > MAX_FDS => Err(Error::TooManyFds(count)),
        _ => Ok(()),
    }
}

fn peer(fd: BorrowedFd<'_>) -> Result<PeerCredentials, Error> {
    let credentials = socket::getsockopt(&fd, SoPeerCred)?;
    Ok(PeerCredentials { pid: credentials.pid(), uid: credentials.uid(), gid: credentials.gid() })
}

/// Bytes, with the kernel's own for each message, that were sent and that the peer has not read: `SIOCOUTQ`, as unix(7) has
/// it.
fn unread(fd: BorrowedFd<'_>) -> Result<libc::c_int, Error> {
    let mut bytes = 0;
    // SAFETY: this request writes one int to where its argument points, which is one that lives through the call.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    Errno::result(answer)?;
    Ok(bytes)
}

fn send(fd: BorrowedFd<'_>, message: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let iov = [IoSlice::new(message)];
    // SEQPACKET sends a message whole or not at all.
    socket::sendmsg::<UnixAddr>(fd.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Where one packet is received into.
struct Buffer {
    max: usize,
    data: Vec<u8>,
    control: Vec<u8>,
}

impl Buffer {
    fn new(max: usize) -> Self {
        let max = max.min(MAX_MESSAGE);
        // Room for one SCM_RIGHTS of the kernel's maximum: the kernel merges several into one.
        Self { max, data: vec![0; max], control: vec![0; CONTROL] }
    }

    /// Judges what was received. The descriptors are owned first, so that every refusal closes them.
    fn finish(mut self, received: Received) -> Result<(Bytes, Vec<OwnedFd>), Error> {
        let fds: Vec<OwnedFd> = rights(&self.control).into_iter().map(own).collect();
        if received.flags.contains(MsgFlags::MSG_CTRUNC) {
            return Err(Error::FdsTruncated);
        }
        if received.flags.contains(MsgFlags::MSG_TRUNC) {
            return Err(Error::Truncated(self.max));
        }
        match (received.length, fds.is_empty()) {
            (0, true) => Err(Error::Closed),
            (0, false) => Err(Error::Empty),
            (length, _) => {
                self.data.truncate(length);
                Ok((self.data.into(), fds))
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Received {
    length: usize,
    flags: MsgFlags,
}

fn receive(fd: BorrowedFd<'_>, buffer: &mut Buffer) -> io::Result<Received> {
    let mut iov = [IoSliceMut::new(&mut buffer.data)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = socket::recvmsg::<UnixAddr>(fd.as_raw_fd(), &mut iov, Some(&mut buffer.control), flags)?;
    Ok(Received { length: message.bytes, flags: message.flags })
}

/// `cmsghdr`: length (a `size_t`, header included), level, type; then the data.
const CMSG_HEADER: usize = size_of::<usize>() + 2 * size_of::<i32>();
const CONTROL: usize = CMSG_HEADER + MAX_FDS * size_of::<RawFd>() + 8;

/// The descriptors in a control buffer that was zero before the kernel wrote to it. Read by hand because nix gives
/// nothing out of a truncated control message, and the descriptors in it are open in this process all the same.
/// Public for the fuzz target alone.
#[doc(hidden)]
pub fn rights(control: &[u8]) -> Vec<RawFd> {
    let mut found = Vec::new();
    let mut rest = control;
    while let Some((length, body)) = rest.split_first_chunk::<{ size_of::<usize>() }>() {
        let length = usize::from_ne_bytes(*length);
        if length < CMSG_HEADER || length > rest.len() {
            break;
        }
        let Some((level, body)) = body.split_first_chunk::<4>() else { break };
        let Some((kind, _)) = body.split_first_chunk::<4>() else { break };
        let is_rights = i32::from_ne_bytes(*level) == libc::SOL_SOCKET && i32::from_ne_bytes(*kind) == libc::SCM_RIGHTS;
        if is_rights && let Some(data) = rest.get(CMSG_HEADER..length) {
            found.extend(data.as_chunks::<4>().0.iter().map(|fd| RawFd::from_ne_bytes(*fd)));
        }
        let next = length.next_multiple_of(size_of::<usize>());
        rest = rest.get(next..).unwrap_or_default();
    }
    found
}

fn register(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, Error> {
    // SAFETY: an `OwnedFd` refers to one open descriptor until it is dropped, and nothing takes it out of the AsyncFd.
    unsafe { AsyncFd::register(fd) }.map_err(|error| Error::Io(error.into()))
}

fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: callers pass only descriptors that the kernel has just opened for this process (accept4, SCM_RIGHTS), each
    // exactly once, and nothing else in the process knows their numbers.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests;
