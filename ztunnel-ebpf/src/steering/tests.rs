use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::*;
use crate::words;

/// The pod's own interface, and another of it.
const ETH0: u32 = 7;
const NET1: u32 = 9;

/// Addresses by what they are to the pod, of one family.
struct Family {
    own: IpAddr,
    /// Of its own interface, not announced.
    second: IpAddr,
    link_local: IpAddr,
    /// Of its other interface.
    beside: IpAddr,
    loopback: IpAddr,
    /// Somebody else's.
    peer: IpAddr,
}

const FAMILIES: [Family; 2] = [
    Family {
        own: v4(10, 244, 1, 5),
        second: v4(10, 244, 1, 99),
        link_local: v4(169, 254, 7, 7),
        beside: v4(192, 168, 7, 5),
        loopback: v4(127, 0, 0, 1),
        peer: v4(10, 244, 2, 8),
    },
    Family {
        own: v6(0xfd00, 5),
        second: v6(0xfd00, 99),
        link_local: v6(0xfe80, 5),
        beside: v6(0xfd07, 5),
        loopback: v6(0, 1),
        peer: v6(0xfd00, 8),
    },
];

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

const fn v6(first: u16, last: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, last))
}

fn pod(family: &Family, interface: u32, flags: u32) -> PodEntry {
    PodEntry::new(&[family.own], interface, flags).unwrap()
}

fn arrival(protocol: Protocol, device: u32, from: IpAddr, to: (IpAddr, u16)) -> Arrival {
    let (source, destination) = (words(from), words(to.0));
    Arrival { protocol, device, tuple: FourTuple { source, destination, source_port: 40000, destination_port: to.1 } }
}

fn tcp(pod: &PodEntry, device: u32, from: IpAddr, to: IpAddr) -> Steering {
    steer(pod, &arrival(Protocol::Tcp, device, from, (to, 8080)))
}

#[test]
fn every_way_a_connection_can_arrive() {
    use Steering::{Inbound, LeaveAlone, Outbound};
    for family in FAMILIES {
        let Family { own, second, link_local, beside, loopback, peer } = family;
        let pod = pod(&family, ETH0, FLAG_DNS);
        for (device, from, to, wanted) in [
            // Captured.
            (LOOPBACK, own, peer, Outbound),
            (LOOPBACK, second, peer, Outbound),
            (LOOPBACK, beside, peer, Outbound),
            // Inside the pod.
            (LOOPBACK, loopback, loopback, LeaveAlone),
            (LOOPBACK, own, loopback, LeaveAlone),
            (LOOPBACK, peer, own, LeaveAlone),
            (LOOPBACK, second, second, LeaveAlone),
            (ETH0, own, own, LeaveAlone),
            (ETH0, loopback, own, LeaveAlone),
            (ETH0, own, second, LeaveAlone),
            (ETH0, second, second, LeaveAlone),
            (ETH0, link_local, link_local, LeaveAlone),
            (NET1, own, beside, LeaveAlone),
            (NET1, beside, beside, LeaveAlone),
            // From outside by the pod's own interface, whatever address is asked for.
            (ETH0, peer, own, Inbound),
            (ETH0, peer, second, Inbound),
            (ETH0, peer, beside, Inbound),
            (ETH0, peer, link_local, Inbound),
            (ETH0, link_local, own, Inbound),
            (ETH0, beside, own, Inbound),
            // By another.
            (NET1, peer, beside, LeaveAlone),
            (NET1, peer, link_local, LeaveAlone),
            (NET1, peer, second, LeaveAlone),
            (NET1, peer, own, Inbound),
            (NET1, beside, own, Inbound),
        ] {
            assert_eq!(tcp(&pod, device, from, to), wanted, "by {device} from {from} to {to}");
        }
    }
}

#[test]
fn without_an_interface_of_its_own_all_are() {
    for family in FAMILIES {
        let pod = pod(&family, 0, 0);
        assert_eq!(tcp(&pod, NET1, family.peer, family.beside), Steering::Inbound);
        assert_eq!(tcp(&pod, NET1, family.beside, family.beside), Steering::LeaveAlone);
        assert_eq!(tcp(&pod, LOOPBACK, family.own, family.peer), Steering::Outbound);
    }
}

#[test]
fn ports_of_the_proxy_are_no_way_in() {
    for family in FAMILIES {
        let pod = pod(&family, ETH0, FLAG_DNS);
        let to = |device, from, to, port| steer(&pod, &arrival(Protocol::Tcp, device, from, (to, port)));
        for port in [PORT_OUTBOUND, PORT_INBOUND_PLAINTEXT, PORT_DNS] {
            assert_eq!(to(LOOPBACK, family.loopback, family.loopback, port), Steering::Drop);
            assert_eq!(to(LOOPBACK, family.own, family.peer, port), Steering::Outbound);
            assert_eq!(to(ETH0, family.own, family.own, port), Steering::Drop);
            assert_eq!(to(ETH0, family.second, family.second, port), Steering::Drop);
            assert_eq!(to(ETH0, family.peer, family.own, port), Steering::Inbound);
            assert_eq!(to(NET1, family.peer, family.beside, port), Steering::Drop);
        }
        assert_eq!(to(ETH0, family.own, family.own, PORT_INBOUND_HBONE), Steering::LeaveAlone);
        assert_eq!(to(ETH0, family.peer, family.own, PORT_INBOUND_HBONE), Steering::Inbound);
        assert_eq!(to(NET1, family.peer, family.beside, PORT_INBOUND_HBONE), Steering::Drop);
    }
}

#[test]
fn queries_are_steered_only_where_they_were_captured_and_dns_is_the_meshs() {
    for family in FAMILIES {
        let Family { own, beside, loopback, peer, .. } = family;
        let (with, without) = (pod(&family, ETH0, FLAG_DNS), pod(&family, ETH0, 0));
        for (device, from, to, wanted) in [
            (LOOPBACK, own, peer, Steering::Dns),
            (LOOPBACK, own, loopback, Steering::LeaveAlone),
            (LOOPBACK, own, own, Steering::LeaveAlone),
            (ETH0, own, own, Steering::LeaveAlone),
        ] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let query = arrival(protocol, device, from, (to, PORT_RESOLVER));
                assert_eq!(steer(&with, &query), wanted, "{query:?}");
            }
        }
        let udp = |pod, device, from, to, port| steer(pod, &arrival(Protocol::Udp, device, from, (to, port)));
        // Servers in the pod itself.
        assert_eq!(udp(&with, ETH0, peer, own, PORT_RESOLVER), Steering::LeaveAlone);
        assert_eq!(udp(&with, NET1, own, beside, PORT_RESOLVER), Steering::LeaveAlone);
        assert_eq!(udp(&with, LOOPBACK, own, peer, 123), Steering::LeaveAlone);
        assert_eq!(udp(&with, ETH0, peer, own, PORT_DNS), Steering::Drop, "the listener itself is for nobody");
        let query = |protocol| steer(&without, &arrival(protocol, LOOPBACK, own, (peer, PORT_RESOLVER)));
        assert_eq!((query(Protocol::Tcp), query(Protocol::Udp)), (Steering::Outbound, Steering::LeaveAlone));
        assert_eq!(udp(&without, ETH0, peer, own, PORT_DNS), Steering::LeaveAlone);
    }
}
