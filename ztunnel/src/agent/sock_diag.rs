//! The TCP connections of a pod's namespace, as the kernel lists them, and how they are ended: sock_diag(7).

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::time::{Duration, Instant};
use std::{io, thread};

use rtnetlink::packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};

use super::netlink::{self, Netlink, NetlinkError};
use super::netns::{Netns, NetnsError};

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// `SOCK_DESTROY`, Linux 4.5 with `CONFIG_INET_DIAG_DESTROY`.
const DESTROY: u16 = 21;
/// Attribute of an answer: the mark, a `u32`. Given to `CAP_NET_ADMIN` only.
const INET_DIAG_MARK: u16 = 15;
/// Attribute of a request: the maps of socket storage (in it `SK_DIAG_BPF_STORAGE_REQ_MAP_FD`, descriptors as `u32`) whose values
/// are asked for. Given to `CAP_BPF` only.
const REQUEST_STORAGES: u16 = 2;
/// In it: one map.
const REQUEST_MAP: u16 = 1;
/// Attribute of an answer: what those maps have for the socket. It is missing where they have nothing.
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
/// Bits of an attribute's type that are flags: nested, byte order.
const TYPE: u16 = 0x3fff;
/// The states that are asked for: `TCP_ESTABLISHED`, `TCP_SYN_SENT`, `TCP_SYN_RECV`, `TCP_FIN_WAIT1`, `TCP_FIN_WAIT2`,
/// `TCP_CLOSE_WAIT`, `TCP_LAST_ACK`, `TCP_CLOSING`, `TCP_NEW_SYN_RECV`. Sockets in `TCP_TIME_WAIT`, of which a pod can
/// have very many, in `TCP_CLOSE` or only bound have nothing to send.
const STATES: [u8; 9] = [1, 2, 3, 4, 5, 8, 9, 11, 12];
/// Those of them in which a connection is that its process has closed: `TCP_FIN_WAIT1`, `TCP_FIN_WAIT2`, `TCP_LAST_ACK`,
/// `TCP_CLOSING`.
const CLOSING: [u8; 4] = [4, 5, 9, 11];
/// Most connections that are kept of a list: as many as the programs can be told of.
const MAX_KEPT: usize = ztunnel_ebpf::OLDER_CAPACITY;
/// Bytes of `struct inet_diag_sockid`.
const ID: usize = 48;
/// Where it stands in an answer.
const ID_AT: usize = 4;
/// Bytes of `struct inet_diag_msg`.
const ANSWER: usize = 72;
/// Where the inode stands in it, a `u32`: 0 where no process has the socket.
const INODE_AT: usize = 68;
/// How long sockets may take to be gone.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why connections could not be listed or ended.
#[derive(Debug, thiserror::Error)]
pub enum SockDiagError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// No socket to ask with.
    #[error("cannot open a sock_diag socket: {0}")]
    Open(#[source] io::Error),
    /// The kernel refused.
    #[error("cannot {what} connections of the pod (CONFIG_INET_DIAG, CONFIG_INET_DIAG_DESTROY): {source}")]
    Netlink {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: NetlinkError,
    },
    /// Some are still there.
    #[error("{0} connections that were captured are still there")]
    Remaining(usize),
}

/// A TCP connection that can still send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Its address in the pod.
    pub local: SocketAddr,
    /// Its peer.
    pub remote: SocketAddr,
    /// Its mark, 0 if it has none.
    pub mark: u32,
    /// Whether the map of socket storage that was asked for has something for it.
    is_stored: bool,
    /// Whether its process has closed it, and only the kernel still sends its last bytes.
    is_closed: bool,
    family: u8,
    id: [u8; ID],
}

impl Connection {
    /// The cookie of its socket: never used twice while the machine is up.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        // The last two words of the id, the low one first.
        let [.., a, b, c, d, e, f, g, h] = self.id;
        u64::from(u32::from_ne_bytes([a, b, c, d])) | u64::from(u32::from_ne_bytes([e, f, g, h])) << 32
    }
}

/// The TCP connections of a namespace that can still send, the first [`ztunnel_ebpf::OLDER_CAPACITY`] that the kernel
/// lists. Blocks shortly.
///
/// # Errors
/// When the kernel refuses.
pub fn connections(netns: &Netns) -> Result<Vec<Connection>, SockDiagError> {
    list(&mut open(netns)?, None, |_| true)
}

/// Ends every TCP connection with one of these marks, and waits until they are gone: their peers are reset. Returns how
/// many there were. Blocks, for [`PATIENCE`] at most.
///
/// # Errors
/// When the kernel refuses, or some remain.
pub fn destroy(netns: &Netns, marks: &[u32]) -> Result<usize, SockDiagError> {
    destroy_all(netns, None, |connection| marks.contains(&connection.mark))
}

/// The same of every TCP connection for which this map of socket storage has something and that a process has open, or will get
/// from a listener.
///
/// # Errors
/// When the kernel refuses, or some remain.
pub fn destroy_stored(netns: &Netns, map: BorrowedFd<'_>) -> Result<usize, SockDiagError> {
    destroy_all(netns, Some(map), |connection| connection.is_stored && !connection.is_closed)
}

fn destroy_all(
    netns: &Netns,
    map: Option<BorrowedFd<'_>>,
    wanted: impl Fn(&Connection) -> bool,
) -> Result<usize, SockDiagError> {
    let mut netlink = open(netns)?;
    let deadline = Instant::now() + PATIENCE;
    let (mut ended, mut emptied) = (0, HashSet::new());
    loop {
        // Kernels before Linux 6.11 do not end a connection that its process has closed: they empty its queue alone, which leaves
        // nothing that could be sent, and no timer either. It stays listed as long as its peer says nothing.
        let is_empty = |connection: &Connection| connection.is_closed && emptied.contains(&connection.cookie());
        let found = list(&mut netlink, map, |connection| wanted(connection) && !is_empty(connection))?;
        if found.is_empty() {
            return Ok(ended);
        }
        if Instant::now() > deadline {
            return Err(SockDiagError::Remaining(found.len()));
        }
        for connection in &found {
            match netlink.change(request(DESTROY, connection.family, Some(&connection.id), None)) {
                Ok(()) => {
                    ended += 1;
                    if connection.is_closed {
                        emptied.insert(connection.cookie());
                    }
                }
                // Gone by itself.
                Err(error) if error.is(libc::ENOENT) => {}
                Err(source) => return Err(SockDiagError::Netlink { what: "end", source }),
            }
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn open(netns: &Netns) -> Result<Netlink, SockDiagError> {
    netns.run(|| Netlink::open(netlink::SOCK_DIAG))?.map_err(SockDiagError::Open)
}

/// Those connections that are wanted, [`MAX_KEPT`] at most, of a list that may be much longer.
fn list(
    netlink: &mut Netlink,
    map: Option<BorrowedFd<'_>>,
    wanted: impl Fn(&Connection) -> bool,
) -> Result<Vec<Connection>, SockDiagError> {
    let mut all = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let family = u8::try_from(family).unwrap_or_default();
        let see = |answer: Raw| {
            if all.len() < MAX_KEPT {
                all.extend(connection(&answer.bytes).filter(&wanted));
            }
        };
        match netlink.each(&request(BY_FAMILY, family, None, map), see) {
            Ok(()) => {}
            // The kernel has no IPv6.
            Err(error) if error.is(libc::ENOENT) || error.is(libc::EAFNOSUPPORT) => {}
            Err(source) => return Err(SockDiagError::Netlink { what: "list", source }),
        }
    }
    Ok(all)
}

/// `struct inet_diag_req_v2`: family, protocol, extensions, padding, states, id; and attributes.
fn request(kind: u16, family: u8, id: Option<&[u8; ID]>, map: Option<BorrowedFd<'_>>) -> Raw {
    let protocol = u8::try_from(libc::IPPROTO_TCP).unwrap_or_default();
    let states = STATES.iter().fold(0_u32, |states, state| states | 1 << state);
    let mut bytes = vec![family, protocol, 0, 0];
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id.unwrap_or(&[0; ID]));
    if let Some(map) = map {
        // Each begins with its length, itself included, and its type.
        bytes.extend([12, REQUEST_STORAGES, 8, REQUEST_MAP].iter().flat_map(|field| field.to_ne_bytes()));
        bytes.extend(map.as_raw_fd().to_ne_bytes());
    }
    Raw { kind, bytes }
}

/// Reads `struct inet_diag_msg`: family, state, timer, retransmissions, id (ports and addresses first), and attributes.
fn connection(bytes: &[u8]) -> Option<Connection> {
    let (family, state) = (*bytes.first()?, *bytes.get(1)?);
    if !STATES.contains(&state) {
        return None;
    }
    let id: [u8; ID] = bytes.get(ID_AT..ID_AT + ID)?.try_into().ok()?;
    let port = |at: usize| Some(u16::from_be_bytes(id.get(at..at + 2)?.try_into().ok()?));
    let address = |at: usize| {
        let octets: [u8; 16] = id.get(at..at + 16)?.try_into().ok()?;
        let [a, b, c, d, ..] = octets;
        let v4 = i32::from(family) == libc::AF_INET;
        // As the programs see it: an IPv6 socket can carry IPv4.
        Some(if v4 { IpAddr::V4(Ipv4Addr::new(a, b, c, d)) } else { Ipv6Addr::from(octets).to_canonical() })
    };
    let (local, remote) = ((address(4)?, port(0)?).into(), (address(20)?, port(2)?).into());
    let is_closed = CLOSING.contains(&state) && *bytes.get(INODE_AT..)?.first_chunk::<4>()? == 0_u32.to_ne_bytes();
    let attributes = bytes.get(ANSWER..).unwrap_or_default();
    let mark = attribute(attributes, INET_DIAG_MARK).and_then(|value| value.first_chunk().copied());
    let is_stored = attribute(attributes, INET_DIAG_SK_BPF_STORAGES).is_some_and(|values| !values.is_empty());
    Some(Connection { local, remote, mark: mark.map_or(0, u32::from_ne_bytes), is_stored, is_closed, family, id })
}

/// The value of one of the attributes: length, type, value, each padded to four bytes.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let [a, b, c, d, rest @ ..] = attributes {
        let length = usize::from(u16::from_ne_bytes([*a, *b])).saturating_sub(4);
        if u16::from_ne_bytes([*c, *d]) & TYPE == wanted {
            return rest.get(..length);
        }
        attributes = rest.get((length + 3) & !3..).unwrap_or_default();
    }
    None
}

/// A message whose content is made and read here.
#[derive(Clone, Debug)]
struct Raw {
    kind: u16,
    bytes: Vec<u8>,
}

impl NetlinkSerializable for Raw {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.bytes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        for (to, from) in buffer.iter_mut().zip(&self.bytes) {
            *to = *from;
        }
    }
}

impl NetlinkDeserializable for Raw {
    type Error = std::convert::Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self { kind: header.message_type, bytes: payload.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    use socket2::{Domain, SockRef, Socket, Type};

    use super::*;
    use crate::agent::testing::{A, B, pair};

    #[test]
    fn no_number_of_connections_is_too_long_a_list_and_what_is_over_is_not_in_it() {
        const COUNT: usize = 16_500;
        let (a, _b) = pair();
        let netns = &a.netns;
        let listener = netns
            .run(|| {
                std::fs::write("/proc/sys/net/core/somaxconn", "20000").unwrap();
                let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)).into()).unwrap();
                listener.listen(20_000).unwrap();
                TcpListener::from(listener)
            })
            .unwrap();
        let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, 8080)).unwrap();
        // Closed by the accepting end first: that is in TIME_WAIT in the end.
        let over = netns.run(connect).unwrap();
        drop(listener.accept().unwrap());
        drop(over);
        let waiting = || {
            let text = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/sockstat").unwrap()).unwrap();
            let mut words = text.lines().find(|line| line.starts_with("TCP:")).unwrap().split(' ');
            words.find(|word| *word == "tw").and_then(|_| words.next()).unwrap().parse::<usize>().unwrap()
        };
        let deadline = Instant::now() + PATIENCE;
        while waiting() != 1 || !connections(netns).unwrap().is_empty() {
            assert!(Instant::now() < deadline, "{:?}", connections(netns));
            thread::sleep(Duration::from_millis(2));
        }
        // The ends that nobody accepts stay.
        let marked = netns
            .run(|| {
                (0..COUNT).for_each(|_| drop(connect()));
                connect()
            })
            .unwrap();
        SockRef::from(&marked).set_mark(0x601).unwrap();
        assert!(connections(netns).unwrap().len() >= COUNT);
        assert_eq!(destroy(netns, &[0x601]).unwrap(), 1, "though the list is long");
        drop((listener, marked));
    }

    #[test]
    fn connection_that_its_process_closed_and_its_peer_does_not_read_holds_nobody_up() {
        let (a, b) = pair();
        let listener = b.netns.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8080))).unwrap().unwrap();
        let mut marked = a.netns.run(|| TcpStream::connect((B, 8080))).unwrap().unwrap();
        SockRef::from(&marked).set_mark(0x601).unwrap();
        let peer = listener.accept().unwrap().0;
        // Until the peer's window is shut and what is sent waits here.
        marked.set_nonblocking(true).unwrap();
        let mut full = 0;
        while full < 50 {
            // What was taken of it does not matter.
            if marked.write_all(&[0; 64 << 10]).is_ok() {
                full = 0;
            } else {
                full += 1;
                thread::sleep(Duration::from_millis(2));
            }
        }
        drop(marked);
        let closed = |found: &[Connection]| found.iter().any(|one| one.mark == 0x601 && one.is_closed);
        assert!(closed(&connections(&a.netns).unwrap()), "{:?}", connections(&a.netns));
        assert!(destroy(&a.netns, &[0x601]).unwrap() >= 1);
        drop(peer);
    }

    #[test]
    fn marked_connections_are_ended_and_others_live_on() {
        let (a, b) = pair();
        let listener = b.netns.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8080))).unwrap().unwrap();
        let connect = || a.netns.run(|| TcpStream::connect((B, 8080))).unwrap().unwrap();
        let (mut marked, kept) = (connect(), connect());
        SockRef::from(&marked).set_mark(0x601).unwrap();
        let (_peer, mut other) = (listener.accept().unwrap().0, listener.accept().unwrap().0);

        let found = connections(&a.netns).unwrap();
        let local = marked.local_addr().unwrap();
        let mine = found.iter().find(|connection| connection.local == local).unwrap();
        assert_eq!((mine.remote, mine.mark), ((B, 8080).into(), 0x601));
        assert_eq!(found.len(), 2);
        assert_ne!(found[0].cookie(), found[1].cookie());
        assert_eq!(local.ip(), A);

        assert_eq!(destroy(&a.netns, &[0x601, 0x602]).unwrap(), 1);
        marked.read(&mut [0]).expect_err("ended");
        assert_eq!(connections(&a.netns).unwrap().len(), 1);
        std::io::Write::write_all(&mut &kept, b"x").unwrap();
        assert_eq!(other.read(&mut [0]).unwrap(), 1);
        assert_eq!(destroy(&a.netns, &[0x601]).unwrap(), 0, "nothing to do");
    }
}
