//! Messages with descriptors between two processes.

use std::fs::File;
use std::os::fd::AsFd as _;

use mesh_runtime::seqpacket::{Error, MAX_FDS, Socket, rights};

/// Reads the input as the kernel's control data, then sends it as a message with as many descriptors as its first byte says to
/// a receiver that takes as many bytes as the next two say.
pub fn run(input: &[u8]) {
    // Numbers alone: none of them is used as a descriptor.
    assert!(rights(input).len() <= input.len() / 4);
    let Some(([fds, high, low], message)) = input.split_first_chunk() else { return };
    let max = usize::from(u16::from_be_bytes([*high, *low]));
    crate::on_runtime(async {
        let (near, far) = Socket::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        let fds = vec![file.as_fd(); usize::from(*fds)];
        match near.send(message, &fds).await {
            Ok(()) => assert!(!message.is_empty() && fds.len() <= MAX_FDS),
            Err(Error::Empty) => return assert!(message.is_empty()),
            Err(Error::TooManyFds(count)) => return assert_eq!(count, fds.len()),
            // A machine's limits: a packet larger than the socket's buffer, or too many descriptors in flight.
            Err(_) => return,
        }
        match far.recv(max).await {
            Ok((received, with)) => {
                assert!(received.len() <= max && received == message);
                assert_eq!(with.len(), fds.len());
            }
            Err(error) => assert!(matches!(error, Error::Truncated(_)) && max < message.len(), "{error}"),
        }
    });
}
