//! What netfilter holds in the calling thread's network namespace, asked of the kernel by netlink.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};

/// `NFNL_SUBSYS_CTNETLINK` and `NFNL_SUBSYS_NFTABLES` of `linux/netfilter/nfnetlink.h`.
const CONNTRACK: u16 = 1;
const NFTABLES: u16 = 10;
const DUMP: u16 = 0x300;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// What was found; all empty is what a namespace of the mesh must show.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// nft tables, counted.
    pub nft_tables: usize,
    /// Entries of the connection table, counted.
    pub conntrack_entries: usize,
    /// Tables that legacy iptables has made.
    pub iptables: Vec<String>,
}

/// Asks the kernel about the calling thread's network namespace.
pub fn findings() -> io::Result<Findings> {
    let legacy = ["/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"];
    let iptables = legacy.iter().filter_map(|f| fs::read_to_string(f).ok());
    Ok(Findings {
        nft_tables: dump(NFTABLES, 1)?,
        conntrack_entries: dump(CONNTRACK, 1)?,
        iptables: iptables.flat_map(|t| t.lines().map(str::to_owned).collect::<Vec<_>>()).collect(),
    })
}

/// Makes an empty nft table of that name, to show that `findings` would see one.
pub fn make_nft_table(name: &str) -> io::Result<()> {
    let mut attribute = Vec::new();
    let text = [name.as_bytes(), &[0]].concat();
    attribute.extend(u16::try_from(4 + text.len()).unwrap().to_ne_bytes());
    attribute.extend(1_u16.to_ne_bytes());
    attribute.extend(&text);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    let mut batch = message(0x10, REQUEST, 0, NFTABLES, &[]);
    batch.extend(message(NFTABLES << 8, REQUEST | ACK | 0x400, 2, 0, &attribute));
    batch.extend(message(0x11, REQUEST, 0, NFTABLES, &[]));
    let netlink = open()?;
    send(netlink.as_raw_fd(), &batch, MsgFlags::empty())?;
    let mut answer = vec![0; 8192];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    for (kind, body) in messages(&answer[..length]) {
        let code = i32::from_ne_bytes(body[..4].try_into().unwrap());
        if kind == ERROR && code != 0 {
            return Err(io::Error::from_raw_os_error(-code));
        }
    }
    Ok(())
}

/// Counts what a dump request of this subsystem answers.
fn dump(subsystem: u16, get: u16) -> io::Result<usize> {
    let netlink = open()?;
    send(netlink.as_raw_fd(), &message(subsystem << 8 | get, REQUEST | DUMP, 0, 0, &[]), MsgFlags::empty())?;
    let mut found = 0;
    let mut answer = vec![0; 65536];
    loop {
        let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        for (kind, body) in messages(&answer[..length]) {
            match kind {
                DONE => return Ok(found),
                ERROR => {
                    let code = i32::from_ne_bytes(body[..4].try_into().unwrap());
                    return Err(io::Error::from_raw_os_error(-code));
                }
                _ => found += 1,
            }
        }
    }
}

fn open() -> io::Result<std::os::fd::OwnedFd> {
    let netlink =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(netlink)
}

/// A netlink message with its `nfgenmsg`: family, version 0, resource id.
fn message(kind: u16, flags: u16, family: u8, resource: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(20 + body.len()).unwrap();
    let mut out = length.to_ne_bytes().to_vec();
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend([0; 8]);
    out.extend([family, 0]);
    out.extend(resource.to_be_bytes());
    out.extend(body);
    out
}

fn messages(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while bytes.len() >= 16 {
        let length = u32::from_ne_bytes(bytes[..4].try_into().unwrap()) as usize;
        let kind = u16::from_ne_bytes(bytes[4..6].try_into().unwrap());
        if length < 16 || length > bytes.len() {
            break;
        }
        found.push((kind, &bytes[16..length]));
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    found
}
