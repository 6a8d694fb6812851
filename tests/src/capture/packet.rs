//! Ethernet frames down to TCP and UDP payload.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// IP protocol numbers.
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// One IP packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Packet<'a> {
    pub protocol: u8,
    /// Port 0 where the protocol has none.
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// Sequence number and SYN flag.
    pub tcp: Option<(u32, bool)>,
    pub payload: &'a [u8],
}

/// None for what is not IP (ARP) or is cut off.
pub(super) fn parse(frame: &[u8]) -> Option<Packet<'_>> {
    let kind = u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?);
    let ip = frame.get(14..)?;
    let (protocol, source, destination, body): (u8, IpAddr, IpAddr, &[u8]) = match kind {
        0x0800 => {
            let header = usize::from(ip.first()? & 0x0f) * 4;
            let length = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
            // Length 0: longer than 64 KiB by offload. A shorter one cuts off Ethernet's padding.
            let body = if length == 0 { ip.get(header..)? } else { ip.get(header..length)? };
            let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
            (*ip.get(9)?, address(12)?.into(), address(16)?.into(), body)
        }
        0x86dd => {
            let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?));
            (*ip.get(6)?, address(8)?.into(), address(24)?.into(), ip.get(40..)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?));
    let (ports, tcp, payload) = match protocol {
        TCP => {
            let sequence = u32::from_be_bytes(body.get(4..8)?.try_into().ok()?);
            let header = usize::from(body.get(12)? >> 4) * 4;
            ((port(0)?, port(2)?), Some((sequence, body.get(13)? & 0x02 != 0)), body.get(header..)?)
        }
        UDP => ((port(0)?, port(2)?), None, body.get(8..)?),
        _ => ((0, 0), None, body),
    };
    let (source, destination) = (SocketAddr::new(source, ports.0), SocketAddr::new(destination, ports.1));
    Some(Packet { protocol, source, destination, tcp, payload })
}

#[cfg(test)]
pub(super) fn tcp_frame(sequence: u32, syn: bool, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0x08, 0x00]);
    let length = u16::try_from(40 + payload.len()).expect("short");
    frame.extend([0x45, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend(4000_u16.to_be_bytes());
    frame.extend(80_u16.to_be_bytes());
    frame.extend(sequence.to_be_bytes());
    frame.extend([0, 0, 0, 0, 0x50, if syn { 0x02 } else { 0x10 }, 0, 0, 0, 0, 0, 0]);
    frame.extend(payload);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_without_the_padding() {
        let mut frame = tcp_frame(7, false, b"ab");
        frame.extend([0; 4]);
        let packet = parse(&frame).expect("a packet");
        assert_eq!(packet.source, "10.0.0.1:4000".parse().expect("address"));
        assert_eq!(packet.destination, "10.0.0.2:80".parse().expect("address"));
        assert_eq!((packet.tcp, packet.payload), (Some((7, false)), &b"ab"[..]));
    }

    #[test]
    fn cut_off_anywhere_is_nothing() {
        let frame = tcp_frame(7, false, b"");
        for length in 0..frame.len() {
            assert_eq!(parse(&frame[..length]), None, "{length} bytes");
        }
    }
}
