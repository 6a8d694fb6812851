//! Pods with addresses of either family, and the sockets that the proxy gets for them.

use std::net::{IpAddr, Ipv6Addr, UdpSocket};

use super::*;

/// Announces a pod with these addresses.
pub fn announce(agent: &Agent, pod: &TestPod, addresses: &[IpAddr]) -> Result<(), String> {
    let addresses = addresses
        .iter()
        .map(|address| match address {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        })
        .collect();
    let pod_wire = Some(node::Pod { addresses, ..wire(UID, A) });
    let request = node::EnrolPod { pod: pod_wire, ..Default::default() };
    ok(agent.announcer().ask(pod_request::Kind::Enrol(request), &[pod.netns.as_fd()]))
}

fn connect_to(pod: &TestPod, to: (impl Into<IpAddr>, u16)) -> io::Result<TcpStream> {
    let to = SocketAddr::new(to.0.into(), to.1);
    pod.netns.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(2))).unwrap()
}

#[test]
fn pod_with_only_ipv6_is_enrolled_and_captured() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    announce(&agent, &a, &[A6.into()]).unwrap();
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    let client = connect_to(&a, (B6, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]), Some(((B6, PORT).into(), client.local_addr().unwrap())));
    let client = connect_to(&b, (A6, PORT)).unwrap();
    assert_eq!(accept(&listeners[1]), Some(((A6, PORT).into(), client.local_addr().unwrap())));
}

#[test]
fn both_families_of_a_pod_reach_the_same_listeners() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    announce(&agent, &a, &[A.into(), A6.into()]).unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    for (to, from) in [(IpAddr::from(B), IpAddr::from(A)), (B6.into(), A6.into())] {
        connect_to(&a, (to, PORT)).unwrap();
        let (local, peer) = accept(&listeners[0]).unwrap();
        assert_eq!((local, peer.ip()), ((to, PORT).into(), from));
    }
}

#[test]
fn sockets_of_ipv6_go_out_and_deliver() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    let listen = |pod: &TestPod| pod.netns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))).unwrap().unwrap();
    let (here, there) = (listen(&a), listen(&b));
    announce(&agent, &a, &[A6.into()]).unwrap();
    let proxy = agent.proxy(Vec::new());
    proxy.added();
    proxy.snapshot();
    let socket = |kind| {
        let socket = Socket::from(proxy.sockets(UID, kind, 1).unwrap().remove(0));
        socket.set_nonblocking(false).unwrap();
        socket
    };
    let upstream = socket(SocketKind::UpstreamV6);
    upstream.connect_timeout(&SocketAddr::from((B6, PORT)).into(), PATIENCE).unwrap();
    assert_eq!(there.accept().unwrap().1.ip(), A6, "straight to the peer, not captured");
    let delivery = socket(SocketKind::DeliveryV6);
    let client = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9);
    delivery.bind(&SocketAddr::from((client, 0)).into()).unwrap();
    delivery.connect_timeout(&SocketAddr::from((A6, PORT)).into(), PATIENCE).unwrap();
    assert_eq!(here.accept().unwrap().1.ip(), client);
}

#[test]
fn query_reaches_the_listener_for_dns_and_the_answer_comes_from_the_resolver_that_was_asked() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    announce(&agent, &a, &[A.into(), A6.into()]).unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    for (resolver, own) in [(IpAddr::from(B), IpAddr::from(A)), (B6.into(), A6.into())] {
        let client = a.netns.run(|| UdpSocket::bind((own, 0))).unwrap().unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.connect((resolver, 53)).unwrap();
        client.send(b"query").unwrap();
        let listener = UdpSocket::from(listeners[3].try_clone().unwrap());
        let mut bytes = [0; 16];
        let (length, peer) = eventually(|| listener.recv_from(&mut bytes).ok()).expect("the query is captured");
        assert_eq!((&bytes[..length], canonical(peer)), (&b"query"[..], client.local_addr().unwrap()));

        let reply = UdpSocket::from(reply_socket(&proxy, resolver).unwrap());
        reply.send_to(b"answer", canonical(peer)).unwrap();
        assert_eq!(client.recv(&mut bytes).unwrap(), 6, "a connected socket takes it from the resolver only");

        // The proxy's own queries leave.
        let family = if resolver.is_ipv4() { SocketKind::DnsUpstreamV4 } else { SocketKind::DnsUpstreamV6 };
        let upstream = UdpSocket::from(proxy.sockets(UID, family, 1).unwrap().remove(0));
        let server = b.netns.run(|| UdpSocket::bind((resolver, 53))).unwrap().unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        upstream.send_to(b"query", (resolver, 53)).unwrap();
        assert_eq!(server.recv_from(&mut bytes).unwrap().1.ip(), own);
    }
    for bad in ["127.0.0.1", "::1", "0.0.0.0", "224.0.0.251", "ff02::fb", "255.255.255.255"] {
        reply_socket(&proxy, bad.parse().unwrap()).unwrap_err();
    }
    reply_socket(&proxy, A.into()).unwrap_err();
    reply_socket(&proxy, A.to_ipv6_mapped().into()).unwrap_err();
    reply_socket(&proxy, A6.into()).unwrap_err();
}

fn reply_socket(proxy: &Proxy, resolver: IpAddr) -> Result<OwnedFd, String> {
    let address = match resolver {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let kind = SocketKind::DnsReply;
    let request = node::SocketRequest { pod_uid: UID.into(), kind: kind.into(), count: 1, address: address.clone() };
    proxy.say(proxy_message::Kind::SocketRequest(request), &[]);
    let (agent_message::Kind::Sockets(answer), mut fds) = proxy.hear() else { panic!("sockets come") };
    assert_eq!((answer.kind(), answer.address), (kind, address));
    if answer.error.is_empty() { Ok(fds.remove(0)) } else { Err(answer.error) }
}

#[test]
fn without_dns_there_are_no_listeners_and_queries_go_to_the_resolver() {
    let scratch = Scratch::new();
    let agent = Agent::start_with(&scratch, Choices { dns: config::Switch::Off, ..choices() });
    let (a, b) = pair();
    announce(&agent, &a, &[A.into()]).unwrap();
    let proxy = agent.proxy(Vec::new());
    let (agent_message::Kind::PodAdded(added), fds) = proxy.hear() else { panic!("a pod is announced") };
    assert_eq!((added.listeners.len(), fds.len()), (3, 3));
    let server = b.netns.run(|| UdpSocket::bind((B, 53))).unwrap().unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let client = a.netns.run(|| UdpSocket::bind((A, 0))).unwrap().unwrap();
    client.send_to(b"query", (B, 53)).unwrap();
    assert_eq!(server.recv_from(&mut [0; 16]).unwrap().1.ip(), A);
}

/// Whether a query of the pod reaches the resolver itself.
fn asks_the_resolver(a: &TestPod, server: &UdpSocket) -> bool {
    let client = a.netns.run(|| UdpSocket::bind((A, 0))).unwrap().unwrap();
    client.send_to(b"query", (B, 53)).unwrap();
    server.recv_from(&mut [0; 16]).is_ok()
}

#[test]
fn queries_go_to_the_resolver_until_a_proxy_comes_that_answers_them() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    let server = b.netns.run(|| UdpSocket::bind((B, 53))).unwrap().unwrap();
    server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    announce(&agent, &a, &[A.into()]).unwrap();
    let queries_go_there = || eventually(|| asks_the_resolver(&a, &server).then_some(()));
    queries_go_there().expect("no proxy yet");
    let former = agent.proxy_of_version(1, Vec::new());
    former.added();
    former.snapshot();
    queries_go_there().expect("one that may not answer");
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);

    let present = agent.proxy(Vec::new());
    let (_, listeners) = present.added();
    present.snapshot();
    assert!(!asks_the_resolver(&a, &server));
    let listener = UdpSocket::from(listeners[3].try_clone().unwrap());
    let mut bytes = [0; 16];
    assert_eq!(eventually(|| listener.recv_from(&mut bytes).ok()).expect("captured").0, 5);
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);

    drop(present);
    queries_go_there().expect("only the former one is left");
    drop(former);
    let present = agent.proxy(Vec::new());
    present.added();
    present.snapshot();
    assert!(!asks_the_resolver(&a, &server));
    drop((present, agent));
    // Nobody knows who comes next: what was stays.
    let inside = process_in(&a);
    let agent = Agent::start(&scratch);
    assert!(!asks_the_resolver(&a, &server));
    for what in super::drift::Drift::ALL {
        assert_eq!(agent.host.drift.get(what), 0, "{what}: what the agent chose is no drift");
    }
    drop(inside);
}

/// The listeners that an agent opened which knew only IPv4.
fn listeners_of_ipv4(pod: &TestPod) -> Vec<OwnedFd> {
    let ports = [
        (15001, Type::STREAM),
        (15006, Type::STREAM),
        (15008, Type::STREAM),
        (15053, Type::DGRAM),
        (15053, Type::STREAM),
    ];
    let listen = |(port, kind)| {
        let socket = Socket::new(Domain::IPV4, kind, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.set_ip_transparent_v4(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.bind(&at(Ipv4Addr::UNSPECIFIED, port).into()).unwrap();
        if kind == Type::STREAM {
            socket.listen(128).unwrap();
        }
        OwnedFd::from(socket)
    };
    pod.netns.run(|| ports.map(listen).into()).unwrap()
}

#[test]
fn listeners_of_a_former_agent_get_those_for_ipv6_beside_them() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    announce(&agent, &a, &[A.into(), A6.into()]).unwrap();
    drop(agent);
    let kept = listeners_of_ipv4(&a);
    let inside = process_in(&a);
    let agent = Agent::start(&scratch);
    let duplicates = kept.iter().map(|socket| socket.try_clone().unwrap()).collect();
    let proxy = agent.proxy(vec![(UID, duplicates)]);
    let (agent_message::Kind::PodAdded(added), listeners) = proxy.hear() else { panic!("a pod is announced") };
    assert_eq!(added.listeners().collect::<Vec<_>>(), [ListenerKinds::ALL, ListenerKinds::ALL].concat());
    proxy.ack(UID);
    proxy.snapshot();
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);
    for (address, place) in [(IpAddr::from(B), 0), (B6.into(), 5)] {
        connect_to(&a, (address, PORT)).unwrap();
        assert_eq!(accept(&listeners[place]).unwrap().0, (address, PORT).into());
    }
    for (address, place) in [(IpAddr::from(A), 1), (A6.into(), 6)] {
        connect_to(&b, (address, PORT)).unwrap();
        assert_eq!(accept(&listeners[place]).unwrap().0, (address, PORT).into());
    }
    // To a former proxy the pod would be another with them.
    let former = agent.proxy_of_version(1, Vec::new());
    assert_eq!(former.added().1.len(), 5);
    drop(inside);
}
