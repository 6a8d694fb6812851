//! Capture on the real kernel: two namespaces, the real programs, the listeners of a proxy played by the test.

mod edge;
mod hooks;
pub(in crate::agent) mod layouts;
mod maps;

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use ztunnel_ebpf::{Counter, FLAG_DNS, PodEntry};

use super::*;
use crate::agent::netns::Netns;
use crate::agent::pod_network::{self, Needs};
use crate::agent::sockets::{self, Family, ListenerSet};
use crate::agent::testing::{A, A6, B, B6, Scratch, TestPod, cgroup_root, pair};

const PORT: u16 = 8080;
const PATIENCE: Duration = Duration::from_secs(5);
const NEEDS: Needs<'_> = Needs { addresses: &[IpAddr::V4(A), IpAddr::V6(A6)], dns: true };

/// A node with pod A enrolled and pod B beside it, not enrolled, with an application on [`PORT`]. B's end of the link
/// plays the host's end of A's.
struct World {
    node: NodeCapture,
    a: TestPod,
    b: TestPod,
    listeners: ListenerSet,
    capture: PodCapture,
    guard: Guard,
    application: TcpListener,
    before: pod_network::Before,
    scratch: Scratch,
}

impl World {
    fn new() -> Self {
        Self::with(FLAG_DNS, false)
    }

    fn with(flags: u32, log: bool) -> Self {
        let (a, b) = pair();
        Self::of(a, b, flags, log, None)
    }

    fn of(a: TestPod, b: TestPod, flags: u32, log: bool, kubelet: Option<&Path>) -> Self {
        let scratch = Scratch::new();
        let node = NodeCapture::open(&scratch.bpffs(), &cgroup_root(), kubelet, log).unwrap();
        let before = pod_network::before(&a.netns, &NEEDS).unwrap();
        pod_network::prepare(&a.netns, &NEEDS).unwrap();
        let listeners = ListenerSet::open(&a.netns, true).unwrap();
        let index = pod_network::find_interface(&a.netns, A.into(), &b.netns).unwrap().host_end.unwrap();
        let guard = Guard::HostEnd { index };
        node.set_routes(a.netns.cookie(), &everywhere()).unwrap();
        let capture = attach(&node, &a.netns, &b.netns, flags, &listeners, guard);
        pod_network::verify(&a.netns, &NEEDS).unwrap();
        let application = listen(&b.netns, PORT);
        Self { node, a, b, listeners, capture, guard, application, before, scratch }
    }

    /// The connection that a listener of the proxy got: its two addresses as the proxy sees them.
    fn accepted(&self, listener: &OwnedFd) -> (SocketAddr, SocketAddr) {
        let (stream, peer) = accept(&TcpListener::from(listener.try_clone().unwrap())).expect("a captured connection");
        (canonical(stream.local_addr().unwrap()), canonical(peer))
    }

    fn counter(&self, counter: Counter) -> u64 {
        self.node.counter(counter).unwrap()
    }
}

/// Attaches as the agent does, in the namespace that plays the node's, and verifies it there.
fn attach(
    node: &NodeCapture,
    pod: &Netns,
    host: &Netns,
    flags: u32,
    listeners: &ListenerSet,
    guard: Guard,
) -> PodCapture {
    let entry = entry(flags);
    let attachment = Attachment { uid: "uid/a", netns: pod, entry, listeners: listeners.borrow(), guard: Some(guard) };
    let capture = host.run(|| node.attach_pod(attachment)).unwrap().unwrap();
    host.run(|| capture.verify(pod, entry, Some(guard))).unwrap().unwrap();
    capture
}

fn everywhere() -> [Route; 2] {
    let route = |address: IpAddr| Route { address, prefix: 0, captured: true };
    [route(Ipv4Addr::UNSPECIFIED.into()), route(Ipv6Addr::UNSPECIFIED.into())]
}

fn entry(flags: u32) -> PodEntry {
    PodEntry::new(&[A.into(), A6.into()], 0, flags).unwrap()
}

fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

/// An IPv6 socket shows IPv4 as mapped.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Listens for both families.
fn listen(netns: &Netns, port: u16) -> TcpListener {
    let listener = netns.run(|| TcpListener::bind(at(Ipv6Addr::UNSPECIFIED, port))).unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

/// Waits for a connection; `None` if none came.
fn accept(listener: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    accept_within(listener, PATIENCE)
}

fn accept_within(listener: &TcpListener, patience: Duration) -> Option<(TcpStream, SocketAddr)> {
    if !readable(listener, patience) {
        return None;
    }
    match listener.accept() {
        Ok((stream, peer)) => Some((stream, canonical(peer))),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(error) => panic!("accept: {error}"),
    }
}

/// Waits until there is something to read.
fn readable(socket: &impl std::os::fd::AsFd, patience: Duration) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let timeout = PollTimeout::try_from(patience).unwrap();
    poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout).unwrap() > 0
}

fn connect(netns: &Netns, to: SocketAddr) -> io::Result<TcpStream> {
    connect_with(netns, to, |_| Ok(()))
}

fn connect_with(
    netns: &Netns,
    to: SocketAddr,
    options: impl FnOnce(&Socket) -> io::Result<()> + Send,
) -> io::Result<TcpStream> {
    netns
        .run(|| {
            let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
            let socket = Socket::new(domain, Type::STREAM, None)?;
            options(&socket)?;
            socket.connect_timeout(&to.into(), Duration::from_secs(2))?;
            Ok(TcpStream::from(socket))
        })
        .unwrap()
}

#[test]
fn connection_of_an_enrolled_pod_reaches_the_outbound_listener_with_true_addresses() {
    let world = World::new();
    let client = connect(&world.a.netns, at(B, PORT)).unwrap();
    let (local, peer) = world.accepted(&world.listeners.outbound);
    assert_eq!(local, at(B, PORT), "the listener sees the original destination");
    assert_eq!(peer, client.local_addr().unwrap());
    assert_eq!(client.peer_addr().unwrap(), at(B, PORT));
    assert_eq!(client.local_addr().unwrap().ip(), A);
    assert_eq!(world.counter(Counter::Captured), 1);
    assert!(accept_within(&world.application, Duration::ZERO).is_none(), "nothing left the pod");
}

#[test]
fn connection_of_another_namespace_is_left_alone() {
    let world = World::new();
    let application = listen(&world.b.netns, 8081);
    connect(&world.b.netns, at(B, 8081)).unwrap();
    assert!(accept(&application).is_some());
    assert_eq!(world.counter(Counter::Captured), 0);
}

#[test]
fn mark_and_device_of_the_application_are_overridden() {
    let world = World::new();
    connect_with(&world.a.netns, at(B, PORT), |socket| socket.set_mark(0x77)).unwrap();
    assert_eq!(world.accepted(&world.listeners.outbound).0, at(B, PORT));
    connect_with(&world.a.netns, at(B, PORT), |socket| socket.bind_device(Some(b"eth0"))).unwrap();
    assert_eq!(world.accepted(&world.listeners.outbound).0, at(B, PORT));
    assert!(accept_within(&world.application, Duration::ZERO).is_none(), "nothing left the pod");
}

#[test]
fn multipath_tcp_is_captured_on_its_first_subflow() {
    let world = World::new();
    let connected = world.a.netns.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(socket2::Protocol::MPTCP))?;
        socket.connect_timeout(&at(B, PORT).into(), PATIENCE)
    });
    connected.unwrap().unwrap();
    assert_eq!(world.accepted(&world.listeners.outbound).0, at(B, PORT));
    assert!(accept_within(&world.application, Duration::ZERO).is_none(), "nothing left the pod");
}

#[test]
fn delivery_mark_set_by_an_application_does_not_exempt() {
    let world = World::new();
    connect_with(&world.a.netns, at(B, PORT), |socket| socket.set_mark(ztunnel_ebpf::MARK_DELIVERY)).unwrap();
    assert_eq!(world.accepted(&world.listeners.outbound).0, at(B, PORT));
}

#[test]
fn ipv4_mapped_connection_of_an_ipv6_socket_is_captured() {
    let world = World::new();
    let mapped = SocketAddr::new(B.to_ipv6_mapped().into(), PORT);
    connect(&world.a.netns, mapped).unwrap();
    assert_eq!(world.accepted(&world.listeners.outbound).0, at(B, PORT));
}

#[test]
fn exempt_socket_is_not_captured() {
    let world = World::new();
    connect_with(&world.a.netns, at(B, PORT), |socket| world.node.exempt(socket.as_fd()).map_err(io::Error::other))
        .unwrap();
    assert_eq!(accept(&world.application).expect("it went straight to the application").1.ip(), A);
    assert_eq!(world.counter(Counter::Captured), 0);
}

#[test]
fn loopback_and_own_address_are_left_alone() {
    let world = World::new();
    let own = listen(&world.a.netns, PORT);
    for address in [Ipv4Addr::LOCALHOST, A, Ipv4Addr::UNSPECIFIED] {
        let client = connect(&world.a.netns, at(address, PORT)).unwrap();
        assert_eq!(accept(&own).expect("straight to the pod's own listener").1, client.local_addr().unwrap());
    }
    assert_eq!(world.counter(Counter::Captured), 0);
}

#[test]
fn listeners_of_the_proxy_cannot_be_addressed_from_inside() {
    let world = World::new();
    for port in [ztunnel_ebpf::PORT_OUTBOUND, ztunnel_ebpf::PORT_INBOUND_PLAINTEXT] {
        for address in [Ipv4Addr::LOCALHOST, A] {
            let error = connect(&world.a.netns, at(address, port)).unwrap_err();
            assert!(matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::TimedOut), "{error}");
        }
    }
    assert!(world.counter(Counter::Dropped) >= 4);
}

#[test]
fn plaintext_from_outside_reaches_the_inbound_listener() {
    let world = World::new();
    let own = listen(&world.a.netns, PORT);
    let client = connect(&world.b.netns, at(A, PORT)).unwrap();
    let (local, peer) = world.accepted(&world.listeners.inbound_plaintext);
    assert_eq!((local, peer), (at(A, PORT), client.local_addr().unwrap()));
    assert!(accept_within(&own, Duration::ZERO).is_none(), "the application's own listener did not get it");
    // A port of the proxy is no way in either: the proxy sees it as the destination that was asked for.
    connect(&world.b.netns, at(A, ztunnel_ebpf::PORT_OUTBOUND)).unwrap();
    assert_eq!(world.accepted(&world.listeners.inbound_plaintext).0, at(A, ztunnel_ebpf::PORT_OUTBOUND));
}

#[test]
fn hbone_from_outside_reaches_its_listener() {
    let world = World::new();
    connect(&world.b.netns, at(A, ztunnel_ebpf::PORT_INBOUND_HBONE)).unwrap();
    assert_eq!(world.accepted(&world.listeners.inbound_hbone).0, at(A, ztunnel_ebpf::PORT_INBOUND_HBONE));
}

#[test]
fn without_listeners_nothing_passes_in_either_direction() {
    let world = World::new();
    let own = listen(&world.a.netns, PORT);
    drop(world.listeners);
    let hbone = listen(&world.a.netns, ztunnel_ebpf::PORT_INBOUND_HBONE);
    assert!(connect(&world.b.netns, at(A, PORT)).is_err());
    assert!(connect(&world.b.netns, at(A, ztunnel_ebpf::PORT_INBOUND_HBONE)).is_err());
    assert!(connect(&world.a.netns, at(B, PORT)).is_err());
    for application in [&own, &hbone, &world.application] {
        assert!(accept_within(application, Duration::ZERO).is_none());
    }
    assert!(world.node.counter(Counter::Dropped).unwrap() >= 3);
}

#[test]
fn listeners_can_be_replaced() {
    let world = World::new();
    drop(world.listeners);
    let listeners = ListenerSet::open(&world.a.netns, true).unwrap();
    world.capture.replace_listeners(listeners.borrow()).unwrap();
    let client = connect(&world.a.netns, at(B, PORT)).unwrap();
    let accepted = accept(&TcpListener::from(listeners.outbound)).unwrap();
    assert_eq!(accepted.1, client.local_addr().unwrap());
}

#[test]
fn delivery_shows_the_clients_address_and_replies_return_over_lo() {
    let world = World::new();
    let own = listen(&world.a.netns, PORT);
    let stranger = Ipv4Addr::new(203, 0, 113, 9);
    let socket = Socket::from(world.a.netns.run(|| sockets::delivery(Family::V4)).unwrap().unwrap());
    world.node.exempt(socket.as_fd()).unwrap();
    socket.bind(&at(stranger, 0).into()).unwrap();
    socket.set_nonblocking(false).unwrap();
    // The socket keeps its namespace; this thread is in another.
    socket.connect_timeout(&at(A, PORT).into(), PATIENCE).unwrap();
    let (mut application, peer) = accept(&own).unwrap();
    assert_eq!(peer.ip(), stranger);
    application.set_nonblocking(false).unwrap();
    application.write_all(b"hello").unwrap();
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    assert_eq!(world.counter(Counter::Captured), 0);
}

#[test]
fn release_restores_everything() {
    let world = World::new();
    world.node.release(world.a.netns.cookie()).unwrap();
    world.capture.unpin().unwrap();
    pod_network::restore(&world.a.netns, world.before).unwrap();
    assert!(pod_network::verify(&world.a.netns, &NEEDS).is_err());
    assert_eq!(world.node.enrolled(world.a.netns.cookie()).unwrap(), None);
    assert!(world.node.held().unwrap().is_empty());
    connect(&world.a.netns, at(B, PORT)).unwrap();
    assert_eq!(accept(&world.application).expect("left alone").1.ip(), A);
    let own = listen(&world.a.netns, PORT);
    connect(&world.b.netns, at(A, PORT)).unwrap();
    assert_eq!(accept(&own).expect("left alone").1.ip(), B);
}

#[test]
fn capture_outlives_the_agent_and_is_adopted() {
    let World { node, a, b, listeners, capture, guard, application, scratch, .. } = World::new();
    drop((node, capture));
    connect(&a.netns, at(B, PORT)).unwrap();
    assert!(accept(&TcpListener::from(listeners.outbound.try_clone().unwrap())).is_some(), "no agent, still captured");
    let node = NodeCapture::open(&scratch.bpffs(), &cgroup_root(), None, false).unwrap();
    let capture = node.adopt_pod("uid/a").expect("pinned");
    let verify = |netns, entry, guard| b.netns.run(|| capture.verify(netns, entry, Some(guard))).unwrap();
    verify(&a.netns, entry(FLAG_DNS), guard).unwrap();
    assert_eq!(node.enrolled(a.netns.cookie()).unwrap(), Some(entry(FLAG_DNS)));
    assert_eq!(node.routes(a.netns.cookie()).unwrap().len(), 2);
    assert!(verify(&b.netns, entry(FLAG_DNS), guard).is_err(), "another namespace");
    assert!(verify(&a.netns, entry(0), guard).is_err(), "other flags");
    assert!(verify(&a.netns, PodEntry::new(&[B.into()], 0, FLAG_DNS).unwrap(), guard).is_err(), "another address");
    assert!(verify(&a.netns, entry(FLAG_DNS), Guard::HostEnd { index: 1 }).is_err(), "another device");
    assert!(!node.is_dead("uid/a"));
    assert_eq!(node.counter(Counter::Captured).unwrap(), 1, "the maps are the old ones");
    drop(application);
}

#[test]
fn ipv6_is_captured_as_ipv4_is() {
    let world = World::new();
    let client = connect(&world.a.netns, at(B6, PORT)).unwrap();
    let (local, peer) = world.accepted(&world.listeners.outbound);
    assert_eq!((local, peer), (at(B6, PORT), client.local_addr().unwrap()));
    assert_eq!(client.local_addr().unwrap().ip(), A6);
    connect(&world.b.netns, at(A6, PORT)).unwrap();
    assert_eq!(world.accepted(&world.listeners.inbound_plaintext).0, at(A6, PORT));
    connect(&world.b.netns, at(A6, ztunnel_ebpf::PORT_INBOUND_HBONE)).unwrap();
    assert_eq!(world.accepted(&world.listeners.inbound_hbone).0, at(A6, ztunnel_ebpf::PORT_INBOUND_HBONE));
    let own = listen(&world.a.netns, PORT);
    for address in [Ipv6Addr::LOCALHOST, A6, Ipv6Addr::UNSPECIFIED] {
        let client = connect(&world.a.netns, at(address, PORT)).unwrap();
        assert_eq!(accept(&own).expect("straight to the pod's own listener").1, client.local_addr().unwrap());
    }
    assert_eq!(world.counter(Counter::Captured), 1);
    assert!(accept_within(&world.application, Duration::ZERO).is_none(), "nothing left the pod");
}

#[test]
fn destinations_without_a_route_of_the_pod_are_left_alone_and_stopped() {
    let world = World::new();
    let cookie = world.a.netns.cookie();
    let other = Route { address: B.into(), prefix: 32, captured: false };
    world.node.set_routes(cookie, &[everywhere()[0], other]).unwrap();
    assert_eq!(world.node.routes(cookie).unwrap().len(), 2);
    let dropped = world.counter(Counter::GuardDropped);
    for address in [IpAddr::from(B), B6.into()] {
        let error = connect(&world.a.netns, at(address, PORT)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "it was not captured, and did not get out");
    }
    assert!(world.counter(Counter::GuardDropped) >= dropped + 2);
    assert_eq!(world.counter(Counter::Captured), 0);
    let neighbour = cookie + 1;
    world.node.set_routes(neighbour, &[other]).unwrap();
    world.node.set_routes(cookie, &everywhere()).unwrap();
    let told = world.node.routes(cookie).unwrap();
    assert!(told.len() == 2 && everywhere().iter().all(|route| told.contains(route)), "{told:?}");
    assert_eq!(world.node.routes(neighbour).unwrap(), [other], "another namespace keeps its own");
    connect(&world.a.netns, at(B, PORT)).unwrap();
    world.node.release(cookie).unwrap();
    assert_eq!(world.node.routes(cookie).unwrap(), []);
}

#[test]
fn queries_and_connections_to_resolvers_reach_the_dns_sockets() {
    let world = World::new();
    let dns = world.listeners.dns.as_ref().unwrap();
    let steered = UdpSocket::from(dns.udp.try_clone().unwrap());
    steered.set_nonblocking(true).unwrap();
    let mut bytes = [0; 16];
    for (own, resolver) in [(IpAddr::from(A), IpAddr::from(B)), (A6.into(), B6.into())] {
        let client = world.a.netns.run(|| UdpSocket::bind(at(own, 0))).unwrap().unwrap();
        client.send_to(b"query", at(resolver, 53)).unwrap();
        assert!(readable(&steered, PATIENCE), "a query to {resolver}");
        let (length, from) = steered.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..length], canonical(from)), (&b"query"[..], client.local_addr().unwrap()));
        let client = connect(&world.a.netns, at(resolver, 53)).unwrap();
        assert_eq!(world.accepted(&dns.tcp), (at(resolver, 53), client.local_addr().unwrap()));
    }
    assert_eq!(world.counter(Counter::DnsSteered), 4);
    // A resolver in the pod itself keeps working.
    let own = world.a.netns.run(|| UdpSocket::bind(at(Ipv4Addr::LOCALHOST, 53))).unwrap().unwrap();
    let client = world.a.netns.run(|| UdpSocket::bind(at(Ipv4Addr::LOCALHOST, 0))).unwrap().unwrap();
    client.send_to(b"inside", at(Ipv4Addr::LOCALHOST, 53)).unwrap();
    assert!(readable(&own, PATIENCE));
    assert_eq!(world.counter(Counter::DnsSteered), 4);
}

#[test]
fn without_the_flag_resolvers_are_destinations_like_others() {
    let world = World::with(0, false);
    connect(&world.a.netns, at(B, 53)).unwrap();
    assert_eq!(world.accepted(&world.listeners.outbound).0, at(B, 53));
    assert_eq!(world.counter(Counter::DnsSteered), 0);
}

#[test]
fn programs_with_log_records_are_accepted_and_work() {
    let world = World::with(0, true);
    connect(&world.a.netns, at(B, PORT)).unwrap();
    assert_eq!(world.accepted(&world.listeners.outbound).0, at(B, PORT));
    let ring = aya_log::EbpfLogger::init_from_id_with_logger(
        sys::link_target(sys::open_pin(&world.node.root.join("node/connect4")).unwrap().as_fd()).unwrap().program_id,
        Collect,
    );
    let mut ring = ring.unwrap();
    ring.flush();
    let records = COLLECTED.lock().unwrap().clone();
    let wanted = format!("captured: to {B}, namespace {}", world.a.netns.cookie());
    assert!(records.contains(&wanted), "{records:?}");
}

static COLLECTED: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());

struct Collect;

impl log::Log for Collect {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        COLLECTED.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

#[test]
fn purge_leaves_nothing() {
    let world = World::new();
    purge(&world.scratch.bpffs()).unwrap();
    assert!(!layout(&world.scratch.bpffs(), abi::LAYOUT_VERSION).exists());
    connect(&world.a.netns, at(Ipv4Addr::LOCALHOST, PORT)).unwrap_err();
    assert!(world.node.held().unwrap().is_empty());
}

#[test]
fn folder_names_suit_bpffs() {
    assert_eq!(folder_name("8c1e-4"), "8c1e-4");
    assert_eq!(folder_name("Kubernetes//Pod/ns/a.b"), "Kubernetes_2f_2fPod_2fns_2fa_2eb");
    assert_ne!(folder_name("a_2f"), folder_name("a/"));
}
