//! Descriptors that arrive when this process is at its limit of open files: the kernel hands over those that fit, and
//! they must not leak. The limit is the process's, so this test has a process to itself.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use mesh_runtime::seqpacket::{Error, Socket};
use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, setrlimit};

#[tokio::test]
async fn descriptors_cut_short_are_closed() {
    let (a, b) = Socket::pair().unwrap();
    let (read, write): (OwnedFd, OwnedFd) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    let mut read = File::from(read);
    // Descriptors are given out lowest first: room for exactly three more.
    let next = read.try_clone().unwrap().as_raw_fd();
    let limit = u64::try_from(next + 3).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit).unwrap();

    // The control: three do fit.
    a.send(b"fits", &[write.as_fd(); 3]).await.unwrap();
    assert_eq!(b.recv(16).await.unwrap().1.len(), 3);

    a.send(b"does not fit", &[write.as_fd(); 8]).await.unwrap();
    drop(write);
    assert!(matches!(b.recv(16).await, Err(Error::FdsTruncated)));
    assert_eq!(read.read(&mut [0]).expect("every write end is closed"), 0);
}
