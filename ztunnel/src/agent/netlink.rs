//! Netlink requests without a runtime: the kernel answers while it is asked, so nothing here waits.
//!
//! A socket stays in the network namespace in which it was opened, whichever thread uses it later.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use rtnetlink::sys::{Socket, SocketAddr};

/// Routes, rules, links, addresses.
pub const ROUTE: isize = 0;
/// Sockets.
pub const SOCK_DIAG: isize = 4;

/// How often a list that changed while it was read is read again.
const ATTEMPTS: usize = 8;
/// Most messages of one answer that is kept whole: what a pod's namespace holds is bounded by the pod alone.
const MAX_MESSAGES: usize = 1 << 14;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket failed.
    #[error("netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel refused.
    #[error("{0}")]
    Refused(#[source] io::Error),
    /// The answer is none.
    #[error("netlink answer: {0}")]
    Answer(String),
    /// What was to be listed changed every time.
    #[error("the list changed while it was read, {ATTEMPTS} times")]
    Changing,
    /// The list is longer than any that makes sense.
    #[error("the kernel lists more than {MAX_MESSAGES} entries")]
    Long,
}

impl NetlinkError {
    /// Whether the kernel refused with this error number.
    #[must_use]
    pub fn is(&self, errno: i32) -> bool {
        match self {
            Self::Refused(error) => error.raw_os_error() == Some(errno),
            Self::Socket(_) | Self::Answer(_) | Self::Changing | Self::Long => false,
        }
    }
}

/// One netlink socket.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens one in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        // Lists are filtered by the kernel as the request says; before Linux 4.20 they come whole.
        let _ = socket.set_netlink_get_strict_chk(true);
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Everything that the kernel lists for a request.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn list<M: Message>(&mut self, request: &M) -> Result<Vec<M>, NetlinkError> {
        for _ in 0..ATTEMPTS {
            match self.ask(request.clone(), NLM_F_DUMP) {
                Err(NetlinkError::Changing) => {}
                other => return other,
            }
        }
        Err(NetlinkError::Changing)
    }

    /// Shows everything that the kernel lists for a request to `see`, one after the other: however long the list is,
    /// nothing of it is kept here. What changes meanwhile may be missing or shown twice.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn each<M: Message>(&mut self, request: &M, mut see: impl FnMut(M)) -> Result<(), NetlinkError> {
        let see = |answer| {
            see(answer);
            true
        };
        match self.ask_each(request.clone(), NLM_F_DUMP, see) {
            Err(NetlinkError::Changing) => Ok(()),
            other => other,
        }
    }

    /// The answers to a request for one thing.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn get<M: Message>(&mut self, request: M) -> Result<Vec<M>, NetlinkError> {
        self.ask(request, NLM_F_ACK)
    }

    /// Changes or removes something.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn change<M: Message>(&mut self, request: M) -> Result<(), NetlinkError> {
        self.ask(request, NLM_F_ACK).map(drop)
    }

    /// Adds something; that it is there already is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add<M: Message>(&mut self, request: M) -> Result<(), NetlinkError> {
        match self.ask(request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.is(libc::EEXIST) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Adds something in the place of what is there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn replace<M: Message>(&mut self, request: M) -> Result<(), NetlinkError> {
        self.ask(request, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE).map(drop)
    }

    fn ask<M: Message>(&mut self, request: M, flags: u16) -> Result<Vec<M>, NetlinkError> {
        let mut answers = Vec::new();
        self.ask_each(request, flags, |answer| {
            let room = answers.len() < MAX_MESSAGES;
            if room {
                answers.push(answer);
            }
            room
        })?;
        Ok(answers)
    }

    /// Asks, and gives each answer to `take`, which says whether it had room for it.
    fn ask_each<M: Message>(
        &mut self,
        request: M,
        flags: u16,
        mut take: impl FnMut(M) -> bool,
    ) -> Result<(), NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let (mut interrupted, mut long) = (false, false);
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message =
                    NetlinkMessage::<M>::deserialize(rest).map_err(|error| NetlinkError::Answer(error.to_string()))?;
                // Messages begin at multiples of four bytes.
                let length = usize::try_from(message.header.length).unwrap_or(usize::MAX).max(1);
                rest = rest.get(length.saturating_add(3) & !3..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    // Left over from a request that ended early.
                    continue;
                }
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    // Read to its end in any case: the next request would find the kernel in the middle of it.
                    NetlinkPayload::InnerMessage(answer) => long |= !take(answer),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                    NetlinkPayload::Error(error) => {
                        return Err(NetlinkError::Refused(io::Error::from_raw_os_error(-error.raw_code())));
                    }
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(NetlinkError::Refused(io::Error::from_raw_os_error(-done.code)));
                    }
                    NetlinkPayload::Done(_) if long => return Err(NetlinkError::Long),
                    NetlinkPayload::Done(_) if interrupted => return Err(NetlinkError::Changing),
                    NetlinkPayload::Done(_) => return Ok(()),
                    // Nothing, or something that this version of the library does not know: the end will come.
                    _ => {}
                }
            }
        }
    }
}

impl Debug for Netlink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Netlink").field("fd", &self.socket.as_raw_fd()).finish_non_exhaustive()
    }
}

/// A socket that hears of changes in a namespace. What it hears is only that there was one.
pub struct Changes(Socket);

/// `RTNLGRP_LINK`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_IFADDR`, `_IPV6_ROUTE`, `_IPV6_RULE`.
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];

impl Changes {
    /// Listens in the calling thread's network namespace for changes of links, addresses, routes and rules.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(ROUTE)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        // A flood of changes costs no more memory than this; that some are lost is told, and is a change too.
        socket.set_rx_buf_sz(32_u32 << 10)?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        Ok(Self(socket))
    }

    /// Whether anything changed since it was last asked.
    pub fn take(&self) -> bool {
        let mut changed = false;
        let mut head = [0_u8; 16];
        for _ in 0..MAX_MESSAGES {
            match self.0.recv(&mut head.as_mut_slice(), 0) {
                Ok(_) => changed = true,
                // Some were lost.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => changed = true,
                Err(_) => break,
            }
        }
        changed
    }
}

impl AsRawFd for Changes {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Changes").field(&self.0.as_raw_fd()).finish()
    }
}

/// What can be asked and answered.
pub trait Message: NetlinkSerializable + NetlinkDeserializable + Clone + Debug {}

impl<M: NetlinkSerializable + NetlinkDeserializable + Clone + Debug> Message for M {}
