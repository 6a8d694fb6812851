//! Real sockets, real descriptors.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::*;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("seqpacket-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("test.sock")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A pipe whose read end sees the end of file once every write end is closed.
fn pipe() -> (File, OwnedFd) {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    (read.into(), write)
}

fn assert_closed_everywhere(mut read: File) {
    // A write end that is open makes the read block, for ever: make it an error instead.
    fcntl(&read, FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    assert_eq!(read.read(&mut [0]).expect("every write end is closed"), 0);
}

#[tokio::test]
async fn descriptors_arrive_and_work() {
    let folder = Folder::new("arrive");
    let listener = Listener::bind(&folder.socket(), 0o600).unwrap();
    let client = Socket::connect(&folder.socket()).unwrap();
    let server = listener.accept().await.unwrap();

    let path = folder.0.join("file");
    let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all(b"content").unwrap();
    file.rewind().unwrap();
    let (_read, write) = pipe();
    client.send(b"two", &[file.as_fd(), write.as_fd()]).await.unwrap();
    client.send(b"none", &[]).await.unwrap();

    let (message, fds) = server.recv(MAX_MESSAGE).await.unwrap();
    assert_eq!((&message[..], fds.len()), (&b"two"[..], 2));
    for fd in &fds {
        let flags = FdFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
    }
    let mut content = String::new();
    File::from(fds.into_iter().next().unwrap()).read_to_string(&mut content).unwrap();
    assert_eq!(content, "content");
    let (message, fds) = server.recv(MAX_MESSAGE).await.unwrap();
    assert_eq!((&message[..], fds.len()), (&b"none"[..], 0));

    drop(client);
    assert!(matches!(server.recv(MAX_MESSAGE).await, Err(Error::Closed)));
}

#[tokio::test]
async fn the_most_that_fits() {
    let (a, b) = Socket::pair().unwrap();
    let (_read, write) = pipe();
    let fds = vec![write.as_fd(); MAX_FDS];
    let message = vec![7; MAX_MESSAGE];
    a.send(&message, &fds).await.unwrap();
    let (received, fds) = b.recv(MAX_MESSAGE).await.unwrap();
    assert_eq!(received, message);
    assert_eq!(fds.len(), MAX_FDS);
}

#[tokio::test]
async fn wrong_shapes_are_not_sent() {
    let (a, _b) = Socket::pair().unwrap();
    let (_read, write) = pipe();
    assert!(matches!(a.send(b"", &[]).await, Err(Error::Empty)));
    assert!(matches!(a.send(&vec![0; MAX_MESSAGE + 1], &[]).await, Err(Error::TooLarge(_))));
    assert!(matches!(a.send(b"x", &vec![write.as_fd(); MAX_FDS + 1]).await, Err(Error::TooManyFds(254))));
}

#[tokio::test]
async fn a_message_cut_short_closes_its_descriptors() {
    let (a, b) = Socket::pair().unwrap();
    let (read, write) = pipe();
    a.send(b"longer than allowed", &[write.as_fd()]).await.unwrap();
    a.send(b"next", &[]).await.unwrap();
    drop(write);
    assert!(matches!(b.recv(4).await, Err(Error::Truncated(4))));
    assert_closed_everywhere(read);
    assert_eq!(&b.recv(4).await.unwrap().0[..], b"next");
}

#[tokio::test]
async fn an_empty_message_with_descriptors_closes_them() {
    let (a, b) = Socket::pair().unwrap();
    let (read, write) = pipe();
    let raw = [write.as_raw_fd()];
    // Past the checks of `Socket::send`, as a hostile peer would.
    send(a.0.get_ref().as_fd(), b"", &raw).unwrap();
    drop(write);
    assert!(matches!(b.recv(16).await, Err(Error::Empty)));
    assert_closed_everywhere(read);
}

#[tokio::test]
async fn the_peer_is_known() {
    let folder = Folder::new("peer");
    let listener = Listener::bind(&folder.socket(), 0o600).unwrap();
    let path = folder.socket();
    let client = tokio::task::spawn_blocking(move || {
        let client = BlockingSocket::connect(&path, Duration::from_secs(10)).unwrap();
        client.send(b"question", &[]).unwrap();
        let peer = client.peer().unwrap();
        (peer, client.recv(MAX_MESSAGE).unwrap().0)
    });
    let server = listener.accept().await.unwrap();
    let me = PeerCredentials {
        pid: std::process::id().cast_signed(),
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
    };
    assert_eq!(server.peer().unwrap(), me);
    assert_eq!(&server.recv(MAX_MESSAGE).await.unwrap().0[..], b"question");
    server.send(b"answer", &[]).await.unwrap();
    let (peer, answer) = client.await.unwrap();
    assert_eq!(peer, me);
    assert_eq!(&answer[..], b"answer");
}

#[tokio::test]
async fn a_blocking_receive_times_out() {
    let folder = Folder::new("timeout");
    let _listener = Listener::bind(&folder.socket(), 0o600).unwrap();
    let path = folder.socket();
    let outcome = tokio::task::spawn_blocking(move || {
        BlockingSocket::connect(&path, Duration::from_millis(20)).unwrap().recv(16).map(|_| ())
    });
    match outcome.await.unwrap() {
        Err(Error::Io(error)) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_full_queue_waits_for_the_reader() {
    let (a, b) = Socket::pair().unwrap();
    let sender = tokio::spawn(async move {
        for n in 0..200_u8 {
            a.send(&vec![n; 32 << 10], &[]).await.unwrap();
        }
    });
    for n in 0..200_u8 {
        assert_eq!(b.recv(MAX_MESSAGE).await.unwrap().0[0], n);
    }
    sender.await.unwrap();
}

#[tokio::test]
async fn only_dead_sockets_are_replaced() {
    use std::os::unix::fs::PermissionsExt as _;

    let folder = Folder::new("stale");
    let first = Listener::bind(&folder.socket(), 0o600).unwrap();
    let mode = std::fs::metadata(folder.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(matches!(Listener::bind(&folder.socket(), 0o600), Err(Error::AddressInUse)));
    drop(first);
    let second = Listener::bind(&folder.socket(), 0o600).unwrap();
    let _client = Socket::connect(&folder.socket()).unwrap();
    second.accept().await.unwrap();

    let path = folder.0.join("file");
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(Listener::bind(&path, 0o600), Err(Error::NotASocket)));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn control_messages_are_read_within_bounds() {
    let header = |length: usize, level: i32, kind: i32| {
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(level.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes
    };
    let mut good = header(CMSG_HEADER + 4, libc::SOL_SOCKET, libc::SCM_RIGHTS);
    good.extend(5_i32.to_ne_bytes());
    good.resize(CMSG_HEADER + 32, 0);
    assert_eq!(rights(&good), [5]);
    assert_eq!(rights(&header(CMSG_HEADER + 4, libc::SOL_SOCKET, libc::SCM_RIGHTS)), [0; 0]);
    assert_eq!(rights(&header(usize::MAX, libc::SOL_SOCKET, libc::SCM_RIGHTS)), [0; 0]);
    assert_eq!(rights(&header(3, libc::SOL_SOCKET, libc::SCM_RIGHTS)), [0; 0]);
    let mut other = header(CMSG_HEADER + 8, libc::SOL_SOCKET, libc::SCM_CREDENTIALS);
    other.extend([1; 8]);
    other.extend(&good);
    assert_eq!(rights(&other), [5]);
    assert_eq!(rights(&[]), [0; 0]);
}

#[tokio::test]
async fn what_was_sent_counts_as_read_when_the_peer_has_read_all_of_it() {
    let (here, there) = Socket::pair().unwrap();
    here.drained().await.unwrap();
    here.send(b"one", &[]).await.unwrap();
    here.send(b"two", &[]).await.unwrap();
    let mut drained = std::pin::pin!(here.drained());
    assert!(!is_over(drained.as_mut()).await);
    there.recv(MAX_MESSAGE).await.unwrap();
    assert!(!is_over(drained.as_mut()).await, "one is left");
    there.recv(MAX_MESSAGE).await.unwrap();
    drained.await.unwrap();
}

/// Whether a future is over when it is asked once.
async fn is_over(mut future: std::pin::Pin<&mut impl Future<Output = Result<(), Error>>>) -> bool {
    std::future::poll_fn(|cx| std::task::Poll::Ready(future.as_mut().poll(cx).is_ready())).await
}
