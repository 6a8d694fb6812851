//! One direction of one conversation.

use std::net::SocketAddr;

use super::packet::Packet;
use super::scan::Scanner;

/// Bytes kept of the beginning of a flow.
const FIRST: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    protocol: u8,
    source: SocketAddr,
    destination: SocketAddr,
}

impl Key {
    pub(super) fn of(packet: &Packet<'_>) -> Self {
        Self { protocol: packet.protocol, source: packet.source, destination: packet.destination }
    }
}

/// What was seen of one direction of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// IP protocol number: 6 TCP, 17 UDP.
    pub protocol: u8,
    /// Sender; port 0 where the protocol has no ports.
    pub source: SocketAddr,
    /// Receiver.
    pub destination: SocketAddr,
    /// TCP connections (SYNs with a new sequence number).
    pub connections: u32,
    /// Packets.
    pub packets: u64,
    /// Payload bytes, retransmissions included.
    pub payload: u64,
    /// The first 64 bytes of payload.
    pub first: Vec<u8>,
    /// Markers seen in clear.
    pub markers: Vec<String>,
    /// How the stream reads as TLS records.
    pub tls: Tls,
}

impl Flow {
    /// True if every byte lies in TLS records of version 3.3 as TLS 1.3 frames them, and application data was seen.
    pub fn is_tls(&self) -> bool {
        !self.tls.broken && self.tls.application > 0
    }
}

/// A TCP stream read as TLS records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// Handshake records (type 22): those in clear.
    pub handshake: u64,
    /// Application data records (type 23): all that TLS 1.3 encrypts.
    pub application: u64,
    /// Change-cipher-spec and alert records (types 20 and 21).
    pub other: u64,
    /// Something that is no such record was met; what follows it was not read.
    pub broken: bool,
}

#[derive(Debug, Default)]
pub(super) struct State {
    connections: u32,
    packets: u64,
    payload: u64,
    first: Vec<u8>,
    markers: Vec<usize>,
    tls: Tls,
    records: Records,
    /// Sequence number expected next.
    next: Option<u32>,
    tail: Vec<u8>,
}

impl State {
    pub(super) fn take(&mut self, packet: &Packet<'_>, scanner: &Scanner) {
        self.packets += 1;
        self.payload += packet.payload.len() as u64;
        let Some((sequence, syn)) = packet.tcp else {
            self.keep_first(packet.payload);
            scanner.scan(&mut Vec::new(), packet.payload, &mut self.markers);
            return;
        };
        if syn {
            if self.next != Some(sequence.wrapping_add(1)) {
                self.connections += 1;
                self.records = Records::default();
                self.tail.clear();
            }
            self.next = Some(sequence.wrapping_add(1));
            return;
        }
        if packet.payload.is_empty() {
            // Acknowledgements tell nothing; those after a FIN count one byte that was never there.
            return;
        }
        let expected = self.next.unwrap_or(sequence);
        // Positive: bytes seen before (a retransmission or a keepalive). Negative: bytes missed.
        let overlap = expected.wrapping_sub(sequence).cast_signed();
        let fresh = match usize::try_from(overlap) {
            Ok(overlap) => packet.payload.get(overlap..).unwrap_or_default(),
            Err(_missed) => {
                self.tail.clear();
                self.tls.broken = true;
                packet.payload
            }
        };
        if fresh.is_empty() {
            return;
        }
        self.next = Some(sequence.wrapping_add(u32::try_from(packet.payload.len()).unwrap_or(0)));
        self.keep_first(fresh);
        scanner.scan(&mut self.tail, fresh, &mut self.markers);
        if !self.tls.broken {
            self.records.read(fresh, &mut self.tls);
        }
    }

    fn keep_first(&mut self, bytes: &[u8]) {
        let room = FIRST - self.first.len();
        self.first.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    pub(super) fn report(&self, key: &Key, scanner: &Scanner) -> Flow {
        Flow {
            protocol: key.protocol,
            source: key.source,
            destination: key.destination,
            connections: self.connections,
            packets: self.packets,
            payload: self.payload,
            first: self.first.clone(),
            markers: self.markers.iter().filter_map(|m| scanner.name(*m)).map(str::to_owned).collect(),
            tls: self.tls.clone(),
        }
    }
}

/// Walks record headers (RFC 8446 section 5.1).
#[derive(Debug, Default)]
struct Records {
    header: [u8; 5],
    have: usize,
    left: usize,
    seen: bool,
}

impl Records {
    fn read(&mut self, mut bytes: &[u8], tls: &mut Tls) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let skip = self.left.min(bytes.len());
                self.left -= skip;
                bytes = &bytes[skip..];
                continue;
            }
            self.header[self.have] = bytes[0];
            self.have += 1;
            bytes = &bytes[1..];
            if self.have < self.header.len() {
                continue;
            }
            self.have = 0;
            let [kind, major, minor, high, low] = self.header;
            // The very first record, a ClientHello, may say 3.1 (section 5.1).
            let version = major == 3 && (minor == 3 || (minor == 1 && !self.seen));
            self.seen = true;
            self.left = usize::from(u16::from_be_bytes([high, low]));
            match kind {
                22 => tls.handshake += 1,
                23 => tls.application += 1,
                20 | 21 => tls.other += 1,
                _ => tls.broken = true,
            }
            tls.broken |= !version || self.left == 0 || self.left > (1 << 14) + 256;
            if tls.broken {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::{parse, tcp_frame};
    use super::*;

    fn feed(state: &mut State, scanner: &Scanner, sequence: u32, syn: bool, payload: &[u8]) -> Flow {
        let frame = tcp_frame(sequence, syn, payload);
        let packet = parse(&frame).expect("a packet");
        state.take(&packet, scanner);
        state.report(&Key::of(&packet), scanner)
    }

    #[test]
    fn records_over_segments_and_retransmissions() {
        let (mut state, scanner) = (State::default(), Scanner::new(&[]));
        feed(&mut state, &scanner, u32::MAX, true, b"");
        feed(&mut state, &scanner, 0, false, &[22, 3, 1, 0, 3, 9]);
        // The same once more, with the rest of the record and half a header.
        feed(&mut state, &scanner, 0, false, &[22, 3, 1, 0, 3, 9, 9, 9, 23, 3]);
        let flow = feed(&mut state, &scanner, 10, false, &[3, 0, 1, 7, 20, 3, 3, 0, 1, 1]);
        assert_eq!(flow.tls, Tls { handshake: 1, application: 1, other: 1, broken: false });
        assert!(flow.is_tls());
        let flow = feed(&mut state, &scanner, 21, false, b"");
        assert!(flow.is_tls(), "an acknowledgement after the FIN is no gap");
        let flow = feed(&mut state, &scanner, 20, false, b"GET / HTTP/1.1");
        assert!(flow.tls.broken);
    }

    #[test]
    fn a_gap_is_not_tls_and_a_new_connection_starts_over() {
        let (mut state, scanner) = (State::default(), Scanner::new(&["secret".to_owned()]));
        feed(&mut state, &scanner, 0, true, b"");
        feed(&mut state, &scanner, 1, false, b"sec");
        let flow = feed(&mut state, &scanner, 4, false, b"ret");
        assert_eq!((flow.markers.as_slice(), flow.connections), (["secret".to_owned()].as_slice(), 1));
        let mut state = State::default();
        feed(&mut state, &scanner, 0, true, b"");
        feed(&mut state, &scanner, 1, false, b"sec");
        feed(&mut state, &scanner, 100, true, b"");
        let flow = feed(&mut state, &scanner, 101, false, b"ret");
        assert_eq!((flow.markers.len(), flow.connections), (0, 2));
        let flow = feed(&mut state, &scanner, 200, false, b"x");
        assert!(flow.tls.broken, "bytes were missed");
    }
}
