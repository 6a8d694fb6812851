//! The packet socket of one link.
#![expect(unsafe_code, reason = "no safe form of bind and PACKET_STATISTICS for packet sockets")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, setsockopt, socket, sockopt};

/// Queue of a link. The payload is shared with the packet, not copied, until it is read.
const QUEUE: usize = 256 << 20;

#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// Opens the link `name` of the calling thread's network namespace, which may be down.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let index = if_nametoindex(name)?;
        // Protocol 0: nothing is received before the socket is bound to its link.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
        setsockopt(&fd, sockopt::RcvBufForce, &QUEUE)?;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as libc::c_ushort,
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: index.cast_signed(),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: `address` is a whole sockaddr_ll and `length` its size; the descriptor is open.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
        Errno::result(bound)?;
        Ok(Self { fd })
    }

    /// The next frame; the length may exceed the buffer's.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> nix::Result<usize> {
        recv(self.fd.as_raw_fd(), buffer, MsgFlags::MSG_TRUNC)
    }

    /// Packets dropped since the last call.
    pub(super) fn dropped(&self) -> u64 {
        let mut figures = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes, the size of `figures`.
        let got = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut figures).cast(),
                &raw mut length,
            )
        };
        // A capture whose losses are unknown counts as one that lost something.
        if got == 0 { u64::from(figures.tp_drops) } else { 1 }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
