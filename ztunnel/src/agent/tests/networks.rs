//! A pod with a second network, which is none of the mesh's: what comes by it and what the pod says to itself is left alone.
//! What comes by the pod's own interface never is, whatever address it asks for.

use std::net::{IpAddr, Ipv6Addr, SocketAddrV6};

use rtnetlink::RouteMessageBuilder;
use ztunnel_ebpf::Counter;

use super::testing::{C, C6, configure, index_of, second_link};
use super::*;

/// Another address of pod A's own interface, which nobody announces.
const SECOND: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 99);
const SECOND6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, 99);
/// One of its `lo`.
const VIRTUAL: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);

/// Pod A, enrolled, with two networks and an application; its neighbour in both.
struct World {
    agent: Agent,
    a: TestPod,
    b: TestPod,
    application: TcpListener,
    listeners: Vec<OwnedFd>,
    _proxy: Proxy,
    _scratch: Scratch,
}

impl World {
    fn new() -> Self {
        let scratch = Scratch::new();
        let (a, b) = pair();
        second_link(&a, &b);
        testing::give(&a.netns, "eth0", SECOND, SECOND6);
        testing::give(&a.netns, "lo", VIRTUAL, Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1));
        let agent = Agent::start(&scratch);
        let addresses = vec![A.octets().to_vec(), A6.octets().to_vec()];
        let request = node::EnrolPod { pod: Some(node::Pod { addresses, ..wire(UID, A) }), ..Default::default() };
        ok(agent.announcer().ask(pod_request::Kind::Enrol(request), &[a.netns.as_fd()])).unwrap();
        let proxy = agent.proxy(Vec::new());
        let (_, listeners) = proxy.added();
        proxy.snapshot();
        let application = a.netns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))).unwrap().unwrap();
        application.set_nonblocking(true).unwrap();
        Self { agent, a, b, application, listeners, _proxy: proxy, _scratch: scratch }
    }

    /// Connects, and says to whom: the application's listener, or one of the proxy's by its place.
    #[track_caller]
    fn got_by(&self, from: &TestPod, to: SocketAddr) -> &'static str {
        let client = connect(from, to).unwrap_or_else(|error| panic!("{to}: {error}"));
        let own = client.local_addr().unwrap();
        let listeners = [("application", self.application.as_fd())];
        let names = ["outbound", "plaintext", "hbone"];
        let listeners = listeners.into_iter().chain(names.into_iter().zip(self.listeners.iter().map(|fd| fd.as_fd())));
        let listeners: Vec<_> =
            listeners.map(|(name, fd)| (name, TcpListener::from(fd.try_clone_to_owned().unwrap()))).collect();
        eventually(|| {
            listeners.iter().find_map(|(name, listener)| {
                let peer = canonical(listener.accept().ok()?.1);
                assert_eq!((peer.ip(), peer.port()), (own.ip(), own.port()), "the connection to {to}");
                Some(*name)
            })
        })
        .expect("somebody gets it")
    }
}

fn to(address: impl Into<IpAddr>) -> SocketAddr {
    SocketAddr::new(address.into(), PORT)
}

/// The link-local address of a device, with its scope, when it is usable.
fn link_local(pod: &TestPod, device: &str) -> SocketAddr {
    eventually(|| {
        let text = pod.netns.run(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap()).unwrap();
        text.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (bits, index) =
                (u128::from_str_radix(words[0], 16).unwrap(), u32::from_str_radix(words[1], 16).unwrap());
            let address = Ipv6Addr::from_bits(bits);
            // Not tentative any more.
            let usable = u32::from_str_radix(words[4], 16).unwrap() & 0x40 == 0;
            let found = address.is_unicast_link_local() && words[5] == device && usable;
            found.then(|| SocketAddrV6::new(address, PORT, 0, index).into())
        })
    })
    .expect("a link-local address")
}

#[test]
fn what_a_pod_says_to_itself_is_left_alone_by_whatever_address() {
    let world = World::new();
    let own = [
        to(A),
        to(A6),
        to(SECOND),
        to(SECOND6),
        to(C),
        to(C6),
        to(VIRTUAL),
        to(Ipv4Addr::LOCALHOST),
        to(Ipv6Addr::LOCALHOST),
        link_local(&world.a, "eth0"),
        link_local(&world.a, "net1"),
    ];
    for address in own {
        assert_eq!(world.got_by(&world.a, address), "application", "{address}");
    }
    assert_eq!(world.agent.host.capture.counter(Counter::Captured).unwrap(), 0, "nor marked");
    for address in [to(B), to(B6)] {
        assert_eq!(world.got_by(&world.a, address), "outbound", "{address}");
    }
    assert_eq!(world.agent.host.capture.counter(Counter::Captured).unwrap(), 2);
}

#[test]
fn source_that_is_another_address_of_the_pod_changes_nothing() {
    let world = World::new();
    for (source, address) in [(SECOND, A), (A, SECOND), (A, C), (C, A), (Ipv4Addr::LOCALHOST, A)] {
        let client = world.a.netns.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.bind(&at(source, 0).into()).unwrap();
            socket.connect_timeout(&at(address, PORT).into(), Duration::from_secs(2)).map(|()| socket)
        });
        let client = client.unwrap().unwrap_or_else(|error| panic!("{source} to {address}: {error}"));
        // From an address that is not announced to one that is, it may go through the proxy.
        let through = [SECOND, C].contains(&source);
        let listener = TcpListener::from(world.listeners[1].try_clone().unwrap());
        let accepted = eventually(|| match (world.application.accept(), through) {
            (Ok(accepted), _) => Some(accepted),
            (Err(_), true) => listener.accept().ok(),
            (Err(_), false) => None,
        });
        assert!(accepted.is_some(), "{source} to {address}");
        drop(client);
    }
}

#[test]
fn connections_by_the_second_network_are_left_alone_but_for_the_pods_own_address() {
    let world = World::new();
    for address in [to(C), to(C6)] {
        assert_eq!(world.got_by(&world.b, address), "application", "{address}");
    }
    // The proxy's listeners are for nobody there.
    for (address, port) in [(IpAddr::from(C), 15001), (C6.into(), 15006), (C.into(), 15008), (C.into(), 15053)] {
        let refused = connect(&world.b, SocketAddr::new(address, port)).unwrap_err();
        assert!(matches!(refused.kind(), io::ErrorKind::TimedOut | io::ErrorKind::ConnectionRefused), "{refused}");
    }
    // The pod's own address is the mesh's, by whatever way one comes to it.
    route(&world.b, "peer1", (A, 32, C), (A6, 128, C6));
    for address in [to(A), to(A6)] {
        assert_eq!(world.got_by(&world.b, address), "plaintext", "{address}");
    }
    assert_eq!(world.agent.announcer().list(), [(UID.into(), String::new())]);
}

#[test]
fn what_comes_by_the_pods_own_interface_is_steered_for_all_its_addresses() {
    let world = World::new();
    // The kernel takes packets for any address of its own by any interface.
    route(&world.b, "peer", (C, 32, A), (C6, 128, A6));
    for address in [to(A), to(A6), to(SECOND), to(SECOND6), to(C), to(C6)] {
        assert_eq!(world.got_by(&world.b, address), "plaintext", "{address}");
    }
    let neighbour = link_local(&world.a, "eth0");
    let SocketAddr::V6(address) = neighbour else { unreachable!() };
    link_local(&world.b, "peer");
    let scope = std::sync::Mutex::new(0);
    configure(&world.b.netns, async |handle| *scope.lock().unwrap() = index_of(&handle, "peer").await);
    let address = SocketAddrV6::new(*address.ip(), PORT, 0, scope.into_inner().unwrap());
    assert_eq!(world.got_by(&world.b, address.into()), "plaintext", "{address}");
}

/// Routes an address of each family by a device, over a gateway.
fn route(pod: &TestPod, device: &str, v4: (Ipv4Addr, u8, Ipv4Addr), v6: (Ipv6Addr, u8, Ipv6Addr)) {
    configure(&pod.netns, async |handle| {
        let index = index_of(&handle, device).await;
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(v4.0, v4.1).gateway(v4.2);
        handle.route().add(route.output_interface(index).build()).execute().await.unwrap();
        let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(v6.0, v6.1).gateway(v6.2);
        handle.route().add(route.output_interface(index).build()).execute().await.unwrap();
    });
}
