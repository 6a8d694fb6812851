//! TCP segments without a TCP socket, as a privileged process can send them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use clap::{Args, ValueEnum};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, setsockopt, socket,
    sockopt,
};
use serde_json::json;

use crate::app::net;

/// `culvert-app raw`. Says how many segments the kernel took.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Where the segments say they go.
    #[arg(long)]
    to: SocketAddr,
    /// Where they say they come from.
    #[arg(long)]
    from: SocketAddr,
    /// How they are sent.
    #[arg(long, value_enum)]
    how: How,
    /// The TCP flags of the segments that carry the marker, and of one SYN before them.
    #[arg(long, default_value_t = 0x18)]
    flags: u8,
    /// SO_MARK of the socket.
    #[arg(long)]
    mark: Option<u32>,
    /// What they carry instead of the marker.
    #[arg(long)]
    text: Option<String>,
    /// How many.
    #[arg(long, default_value_t = 3)]
    count: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum How {
    /// A raw socket of TCP; the kernel makes the IP header.
    Tcp,
    /// A raw socket that brings its own IP header (IPv4).
    Header,
    /// As `header`, in fragments of which only the first has the TCP header (IPv4).
    Fragments,
    /// Whole frames by way of a packet socket on `eth0` (IPv4).
    Packet,
}

/// Sends them.
///
/// # Errors
/// No such socket to be had, or the neighbour's address is not known. A refusal of the kernel to send is counted.
pub fn run(options: &Options) -> io::Result<bool> {
    let payload = format!("{} in a raw segment", options.text.clone().unwrap_or_else(net::marker));
    let (mut sent, mut refused) = (0, 0);
    for number in 0..=options.count {
        // The first is a SYN with the marker, the others pretend to be a connection that is open.
        let flags = if number == 0 { 0x02 } else { options.flags };
        let segment = segment(options, number, flags, payload.as_bytes());
        for packet in packets(options, &segment) {
            match send(options, &packet) {
                Ok(()) => sent += 1,
                Err(Errno::EPERM | Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EACCES) => refused += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }
    net::emit(&json!({"ok": true, "sent": sent, "refused": refused}));
    Ok(true)
}

fn packets(options: &Options, segment: &[u8]) -> Vec<Vec<u8>> {
    match options.how {
        How::Tcp => vec![segment.to_vec()],
        How::Header => vec![with_header(options, segment, 0)],
        How::Packet => vec![with_header(options, segment, 0)],
        How::Fragments => {
            // In units of 8 bytes: the header first, with more to come, then the rest.
            let (first, rest) = segment.split_at(24);
            vec![with_header(options, first, 0x2000), with_header(options, rest, 3)]
        }
    }
}

fn send(options: &Options, packet: &[u8]) -> Result<(), Errno> {
    let family = if options.to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC;
    let (fd, frame) = match options.how {
        How::Tcp => (socket(family, SockType::Raw, flags, SockProtocol::Tcp)?, None),
        How::Header | How::Fragments => (socket(family, SockType::Raw, flags, SockProtocol::Raw)?, None),
        How::Packet => {
            let (device, neighbour) = neighbour().ok_or(Errno::ENODEV)?;
            let own = device.addr().ok_or(Errno::ENODEV)?;
            let head = [&neighbour[..], &own[..], &[8, 0]].concat();
            (socket(AddressFamily::Packet, SockType::Raw, flags, None)?, Some((device, [&head, packet].concat())))
        }
    };
    if let Some(mark) = options.mark {
        setsockopt(&fd, sockopt::Mark, &mark)?;
    }
    match frame {
        Some((device, frame)) => sendto(fd.as_raw_fd(), &frame, &device, MsgFlags::empty())?,
        None => {
            // A raw socket of IPv6 takes no port.
            let to: SockaddrStorage = SocketAddr::new(options.to.ip(), 0).into();
            sendto(fd.as_raw_fd(), packet, &to, MsgFlags::empty())?
        }
    };
    Ok(())
}

/// `eth0`, and the link address of the pod's gateway, which must have been spoken to.
fn neighbour() -> Option<(LinkAddr, [u8; 6])> {
    let mut devices = nix::ifaddrs::getifaddrs().ok()?.filter(|i| i.interface_name == "eth0");
    let device = devices.find_map(|i| i.address?.as_link_addr().copied())?;
    let table = std::fs::read_to_string("/proc/net/arp").ok()?;
    let line = table.lines().find(|line| line.ends_with("eth0"))?;
    let mut bytes = line.split_whitespace().nth(3)?.split(':').map(|byte| u8::from_str_radix(byte, 16).ok());
    let mut address = [0; 6];
    for byte in &mut address {
        *byte = bytes.next()??;
    }
    Some((device, address))
}

/// A TCP header (RFC 9293 section 3.1) and the payload, with the right checksum.
fn segment(options: &Options, number: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(20 + payload.len());
    out.extend(options.from.port().to_be_bytes());
    out.extend(options.to.port().to_be_bytes());
    out.extend((1000 + number * 100).to_be_bytes());
    out.extend(1_u32.to_be_bytes());
    out.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    out.extend(payload);
    let mut pseudo = match (options.from.ip(), options.to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (from, to) => [from, to].into_iter().flat_map(octets).collect(),
    };
    pseudo.extend(u32::try_from(out.len()).unwrap_or(0).to_be_bytes());
    pseudo.extend([0, 0, 0, 6]);
    let sum = checksum(&[pseudo, out.clone()].concat());
    out[16..18].copy_from_slice(&sum.to_be_bytes());
    out
}

fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// An IPv4 header (RFC 791 section 3.1); `fragment` is the field of flags and offset.
fn with_header(options: &Options, body: &[u8], fragment: u16) -> Vec<u8> {
    let (IpAddr::V4(from), IpAddr::V4(to)) = (options.from.ip(), options.to.ip()) else { return body.to_vec() };
    let mut out = vec![0x45, 0];
    out.extend(u16::try_from(20 + body.len()).unwrap_or(0).to_be_bytes());
    out.extend([0x12, 0x34]);
    out.extend(fragment.to_be_bytes());
    out.extend([64, 6, 0, 0]);
    out.extend(from.octets());
    out.extend(to.octets());
    let sum = checksum(&out);
    out[10..12].copy_from_slice(&sum.to_be_bytes());
    out.extend(body);
    out
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}
