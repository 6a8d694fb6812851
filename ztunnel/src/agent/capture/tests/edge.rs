//! The guard: privileged processes in the pod try what they can, and the host's end of the link is watched.
#![expect(unsafe_code, reason = "addresses of packet sockets have no safe constructor")]

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::time::Instant;

use nix::sys::socket::{MsgFlags, recv};
use socket2::{Protocol, SockRef};
use ztunnel_ebpf::FLAG_DENY_OLDER;

use super::*;

/// `ETH_P_IP`.
const IPV4: u16 = 0x0800;
/// What is watched for: `ETH_P_IP`, `ETH_P_IPV6`, `ETH_P_8021Q`. A socket for everything would see packets before the
/// guard does.
const WATCHED: [u16; 3] = [IPV4, 0x86dd, 0x8100];
/// Ends a capture: the pod sends it by UDP, which the guard lets pass.
const MARKER: &[u8] = b"culvert-end-of-the-watch";

/// Sees every frame that arrives in the namespace that plays the node's, as far as the guard lets it.
struct Watch(Vec<OwnedFd>);

impl Watch {
    fn new(netns: &Netns) -> Self {
        Self(netns.run(|| WATCHED.map(|protocol| packet_socket(protocol).unwrap()).into()).unwrap())
    }

    /// Everything that came out of the pod until now: it is waited for by a datagram that is sent after it.
    fn seen(&self, pod: &Netns) -> Vec<Vec<u8>> {
        let socket = pod.run(|| UdpSocket::bind(at(A, 0))).unwrap().unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut frames = Vec::new();
        while !self.drain(&mut frames) {
            assert!(Instant::now() < deadline, "the marker came");
            // Again and again: a socket that is full loses it.
            socket.send_to(MARKER, at(B, 9)).unwrap();
            readable(&self.0[0], Duration::from_millis(10));
        }
        // What was sent before it is there by now, on whichever socket.
        self.drain(&mut frames);
        frames
    }

    /// Reads what is there; whether the marker was among it.
    fn drain(&self, frames: &mut Vec<Vec<u8>>) -> bool {
        let mut marked = false;
        for watched in &self.0 {
            let mut frame = vec![0; 65536];
            while let Ok(length) = recv(watched.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT) {
                if contains(&frame[..length], MARKER) {
                    marked = true;
                } else {
                    frames.push(frame[..length].to_vec());
                }
            }
        }
        marked
    }
}

fn packet_socket(protocol: u16) -> io::Result<OwnedFd> {
    let protocol = Protocol::from(i32::from(protocol.to_be()));
    Ok(Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?.into())
}

fn contains(frame: &[u8], bytes: &[u8]) -> bool {
    frame.windows(bytes.len()).any(|window| window == bytes)
}

/// Frames of TCP in IPv4 from A with something in them: payload, or a SYN that opens.
fn opening_or_payload(frames: &[Vec<u8>]) -> Vec<&[u8]> {
    let tells = |frame: &&[u8]| {
        if frame.get(12..14) != Some(&[8, 0]) || frame.get(23) != Some(&6) || frame.get(26..30) != Some(&A.octets()) {
            return false;
        }
        let tcp = 14 + usize::from(frame[14] & 0xf) * 4;
        let end = 14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        let payload = end > tcp + usize::from(frame[tcp + 12] >> 4) * 4;
        payload || frame[tcp + 13] & 0x12 == 2
    };
    frames.iter().map(Vec::as_slice).filter(tells).collect()
}

/// A TCP segment in an IPv4 packet from A to B.
fn packet(flags: u8, payload: &[u8]) -> Vec<u8> {
    let total = u16::try_from(40 + payload.len()).unwrap().to_be_bytes();
    let mut bytes = vec![0x45, 0, total[0], total[1], 0, 1, 0, 0, 64, 6, 0, 0];
    bytes.extend(A.octets());
    bytes.extend(B.octets());
    let checksum = !bytes.as_chunks::<2>().0.iter().fold(0_u32, |sum, pair| {
        let sum = sum + u32::from(u16::from_be_bytes(*pair));
        (sum & 0xffff) + (sum >> 16)
    }) as u16;
    bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
    bytes.extend([0x9c, 0x40, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(payload);
    bytes
}

/// An Ethernet frame to everybody.
fn frame(kind: [u8; 2], packet: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend([2, 0, 0, 0, 0, 1]);
    bytes.extend(kind);
    bytes.extend(packet);
    bytes
}

fn send_frames(pod: &Netns, frames: &[Vec<u8>]) {
    send_frames_as(IPV4, pod, frames);
}

/// Sends frames of which the packet socket says that they are of this protocol.
fn send_frames_as(protocol: u16, pod: &Netns, frames: &[Vec<u8>]) {
    use nix::sys::socket::{LinkAddr, SockaddrLike as _, sendto};
    pod.run(|| {
        let socket = packet_socket(IPV4).unwrap();
        let index = pod_network::find_interface(pod, A.into(), pod).unwrap().index;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: protocol.to_be(),
            sll_ifindex: index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0xff; 8],
        };
        // SAFETY: the structure is a whole link address of the length beside it.
        let address = unsafe {
            LinkAddr::from_raw(
                (&raw const address).cast(),
                Some(u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap()),
            )
        }
        .unwrap();
        for frame in frames {
            match sendto(socket.as_raw_fd(), frame, &address, MsgFlags::empty()) {
                Ok(sent) => assert_eq!(sent, frame.len()),
                // The guard at the pod's end drops it under the sender's eyes.
                Err(error) => assert_eq!(error, nix::errno::Errno::ENOBUFS),
            }
        }
    })
    .unwrap();
}

#[test]
fn forged_mark_of_the_proxy_and_device_are_captured_or_stopped() {
    let world = World::new();
    let watch = Watch::new(&world.b.netns);
    for mark in [ztunnel_ebpf::MARK_DELIVERY, ztunnel_ebpf::MARK_DNS] {
        connect_with(&world.a.netns, at(B, PORT), |socket| socket.set_mark(mark)).unwrap();
    }
    connect_with(&world.a.netns, at(B, PORT), |socket| socket.bind_device(Some(b"eth0"))).unwrap();
    assert_eq!(opening_or_payload(&watch.seen(&world.a.netns)), Vec::<&[u8]>::new());
    assert_eq!(world.counter(Counter::Captured), 3);
}

#[test]
fn raw_packets_and_frames_are_stopped() {
    let world = World::new();
    let watch = Watch::new(&world.b.netns);
    world
        .a
        .netns
        .run(|| {
            let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).unwrap();
            for bytes in [packet(2, b""), packet(0x18, b"secret-raw")] {
                raw.send_to(&bytes, &at(B, 0).into()).unwrap();
            }
        })
        .unwrap();
    let before = world.counter(Counter::GuardDropped);
    assert_eq!(before, 2);
    let mut fragment = packet(0x18, b"secret-fragment");
    // The second fragment: an offset, and no TCP header of its own.
    fragment[7] = 5;
    let mut tagged = vec![0, 5, 8, 0];
    tagged.extend(packet(0x18, b"secret-vlan"));
    // IPv6, a destination options header, TCP.
    let mut extended = vec![0x60, 0, 0, 0, 0, 8 + 20 + 10, 60, 64];
    extended.extend(A6.octets());
    extended.extend(B6.octets());
    extended.extend([6, 0, 1, 4, 0, 0, 0, 0]);
    extended.extend([0x9c, 0x40, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
    extended.extend(b"secret-ext");
    send_frames(
        &world.a.netns,
        &[
            frame([8, 0], &packet(2, b"")),
            frame([8, 0], &packet(0x18, b"secret-frame")),
            frame([8, 0], &fragment),
            frame([0x81, 0], &tagged),
            frame([0x86, 0xdd], &extended),
        ],
    );
    let frames = watch.seen(&world.a.netns);
    assert!(!frames.iter().any(|frame| contains(frame, b"secret-")), "{frames:?}");
    assert_eq!(opening_or_payload(&frames), Vec::<&[u8]>::new());
    assert_eq!(world.counter(Counter::GuardDropped), before + 5);
}

/// A fragment of IPv6 from A to B whose own header names this protocol. `offset`: in bytes, with the flag that more follow.
fn fragment_v6(next: u8, offset: u8, rest: &[u8]) -> Vec<u8> {
    let length = u8::try_from(8 + rest.len()).unwrap();
    let mut bytes = vec![0x60, 0, 0, 0, 0, length, 44, 64];
    bytes.extend(A6.octets());
    bytes.extend(B6.octets());
    bytes.extend([next, 0, 0, offset, 0, 0, 0, 9]);
    bytes.extend(rest);
    bytes
}

/// A TCP header of 24 bytes, an ACK.
const ACK: [u8; 24] = [0x9c, 0x40, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 1, 0x60, 0x10, 0xff, 0xff, 0, 0, 0, 0, 1, 1, 1, 1];

#[test]
fn first_fragments_of_tcp_are_stopped_though_they_say_nothing() {
    let world = World::new();
    let watch = Watch::new(&world.b.netns);
    let mut first = packet(0x10, b"");
    first[6] = 0x20;
    // A header whose end lies in the next fragment, and behind the packet what the frame is filled up with.
    let mut split = fragment_v6(60, 1, &[6, 1, 1, 4, 0, 0, 0, 0]);
    split.extend([0; 40]);
    send_frames(
        &world.a.netns,
        &[
            frame([8, 0], &first),
            frame([0x86, 0xdd], &fragment_v6(6, 1, &ACK)),
            frame([0x86, 0xdd], &split),
            // Says that it is UDP, which no receiver believes of it: it passes, and there is nothing that it adds to.
            frame([0x86, 0xdd], &fragment_v6(17, 24, b"second-fragment")),
        ],
    );
    let frames = watch.seen(&world.a.netns);
    let fragments =
        frames.iter().filter(|frame| frame.get(12..14) == Some(&[0x86, 0xdd]) && frame.get(20) == Some(&44));
    assert!(fragments.into_iter().all(|frame| contains(frame, b"second-fragment")), "{frames:?}");
    assert_eq!(world.counter(Counter::GuardDropped), 3);
    // Whole, though by a fragment's header: an ACK that says nothing.
    send_frames(&world.a.netns, &[frame([0x86, 0xdd], &fragment_v6(6, 0, &ACK))]);
    assert_eq!(world.counter(Counter::GuardDropped), 3);
}

#[test]
fn what_opens_nothing_and_says_nothing_passes_without_a_socket() {
    let world = World::new();
    let watch = Watch::new(&world.b.netns);
    // RST, ACK, SYN and ACK without a request (SYN cookies).
    send_frames(&world.a.netns, &[4, 0x10, 0x12].map(|flags| frame([8, 0], &packet(flags, b""))));
    let frames = watch.seen(&world.a.netns);
    let tcp = frames.iter().filter(|frame| frame.get(12..14) == Some(&[8, 0]) && frame.get(23) == Some(&6)).count();
    assert_eq!(tcp, 3, "{frames:?}");
    assert_eq!(world.counter(Counter::GuardDropped), 0);
}

#[test]
fn socket_whose_mark_is_removed_after_connect_says_nothing_outside() {
    let world = World::new();
    let watch = Watch::new(&world.b.netns);
    let mut client = connect(&world.a.netns, at(B, PORT)).unwrap();
    let proxy = accept(&TcpListener::from(world.listeners.outbound.try_clone().unwrap())).unwrap();
    SockRef::from(&client).set_mark(0).unwrap();
    client.write_all(b"secret-remarked").unwrap();
    let deadline = Instant::now() + PATIENCE;
    while world.counter(Counter::GuardDropped) == 0 {
        assert!(Instant::now() < deadline, "the segment was routed out of the pod and stopped there");
        std::thread::yield_now();
    }
    let frames = watch.seen(&world.a.netns);
    assert!(!frames.iter().any(|frame| contains(frame, b"secret-")));
    assert_eq!(opening_or_payload(&frames), Vec::<&[u8]>::new());
    drop(proxy);
}

/// A connection from A to B's application from before the enrolment, with the world around it.
fn older(flags: u32) -> (World, TcpStream, TcpStream) {
    let (a, b) = pair();
    let application = listen(&b.netns, 8081);
    let client = connect(&a.netns, at(B, 8081)).unwrap();
    let (server, _) = accept(&application).unwrap();
    server.set_nonblocking(false).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    (World::of(a, b, flags, false, None), client, server)
}

#[test]
fn connection_older_than_the_enrolment_goes_on_and_is_counted() {
    let (world, mut client, mut server) = older(0);
    let mut bytes = [0; 5];
    client.write_all(b"older").unwrap();
    server.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"older");
    assert!(world.counter(Counter::OlderPassed) >= 1);
    assert_eq!(world.counter(Counter::GuardDropped), 0);
    // A new one from the same process is captured.
    connect(&world.a.netns, at(B, 8081)).unwrap();
    assert_eq!(world.accepted(&world.listeners.outbound).0, at(B, 8081));
}

#[test]
fn connection_older_than_the_enrolment_is_cut_where_that_is_the_policy() {
    let (world, mut client, server) = older(FLAG_DENY_OLDER);
    let watch = Watch::new(&world.b.netns);
    client.write_all(b"secret-older").unwrap();
    let frames = watch.seen(&world.a.netns);
    assert!(!frames.iter().any(|frame| contains(frame, b"secret-")));
    assert!(!readable(&server, Duration::from_millis(100)));
    assert_eq!(world.counter(Counter::OlderPassed), 0);
    assert!(world.counter(Counter::GuardDropped) >= 1);
}

/// Moves this many bytes each way over a connection, and closes it.
fn exchange(mut one: TcpStream, mut other: TcpStream, bytes: usize) {
    for stream in [&one, &other] {
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    std::thread::scope(|scope| {
        scope.spawn(|| one.write_all(&vec![7; bytes]).unwrap());
        other.read_exact(&mut vec![0; bytes]).unwrap();
    });
    other.write_all(&vec![8; bytes / 64]).unwrap();
    one.read_exact(&mut vec![0; bytes / 64]).unwrap();
}

#[test]
fn sockets_of_the_proxy_pass_in_both_directions_with_large_segments() {
    for address in [(IpAddr::from(A), IpAddr::from(B)), (A6.into(), B6.into())] {
        let world = World::new();
        // Outwards: a socket that the agent exempted.
        let exempt = |socket: &Socket| world.node.exempt(socket.as_fd()).map_err(io::Error::other);
        let client = connect_with(&world.a.netns, at(address.1, PORT), exempt).unwrap();
        let (server, _) = accept(&world.application).expect("straight to the application");
        exchange(client, server, 8 << 20);
        // Inwards: the handshake of the proxy's listener, and what it accepts.
        let client = connect(&world.b.netns, at(address.0, ztunnel_ebpf::PORT_INBOUND_HBONE)).unwrap();
        let listener = TcpListener::from(world.listeners.inbound_hbone.try_clone().unwrap());
        let (server, _) = accept(&listener).expect("the proxy accepts");
        exchange(server, client, 8 << 20);
        assert_eq!(world.counter(Counter::GuardDropped), 0);
        assert_eq!(world.counter(Counter::OlderPassed), 0);
    }
}

#[test]
fn resets_and_data_of_closed_sockets_of_the_proxy_pass() {
    let world = World::new();
    let exempt = |socket: &Socket| world.node.exempt(socket.as_fd()).map_err(io::Error::other);
    let connect = || connect_with(&world.a.netns, at(B, PORT), exempt).unwrap();
    let reset = connect();
    let (mut server, _) = accept(&world.application).unwrap();
    server.set_nonblocking(false).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    SockRef::from(&reset).set_linger(Some(Duration::ZERO)).unwrap();
    drop(reset);
    assert_eq!(server.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    // More than fits into the peer's buffers: the rest leaves when no process has the socket any more.
    let mut closed = connect();
    let (mut server, _) = accept(&world.application).unwrap();
    server.set_nonblocking(false).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    closed.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while let Ok(written) = closed.write(&[7; 65536]) {
        sent += written;
    }
    drop(closed);
    assert_eq!(server.read_to_end(&mut Vec::new()).unwrap(), sent);
    drop(server);
    assert_eq!(world.counter(Counter::GuardDropped), 0);
}

#[test]
fn answers_of_an_application_that_was_not_steered_are_stopped() {
    let world = World::new();
    let own = listen(&world.a.netns, PORT);
    // Steering is taken away behind the agent's back: the guard is left.
    former::detach(&world.node.pod_folder("uid/a").join("link")).unwrap();
    let error = connect(&world.b.netns, at(A, PORT)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "the answer of the application's listener was stopped");
    assert!(world.counter(Counter::GuardDropped) >= 1);
    drop(own);
}

#[test]
fn guard_at_the_pods_end_does_the_same() {
    let world = World::new();
    let interface = pod_network::find_interface(&world.a.netns, A.into(), &world.b.netns).unwrap();
    let guard = Guard::PodEnd { index: interface.index };
    assert!(world.capture.verify_guard(&world.a.netns, Some(guard)).is_err());
    let capture = attach(&world.node, &world.a.netns, &world.b.netns, FLAG_DNS, &world.listeners, guard);
    capture.verify_guard(&world.a.netns, Some(guard)).unwrap();
    let watch = Watch::new(&world.b.netns);
    send_frames(&world.a.netns, &[frame([8, 0], &packet(0x18, b"secret-frame"))]);
    assert_eq!(opening_or_payload(&watch.seen(&world.a.netns)), Vec::<&[u8]>::new());
    // What the sender says of its frame counts for nothing.
    for protocol in [0x1234, 0x86dd] {
        send_frames_as(protocol, &world.a.netns, &[frame([8, 0], &packet(0x18, b"secret-named"))]);
    }
    assert_eq!(opening_or_payload(&watch.seen(&world.a.netns)), Vec::<&[u8]>::new());
    assert_eq!(world.counter(Counter::GuardDropped), 3);
    let exempt = |socket: &Socket| world.node.exempt(socket.as_fd()).map_err(io::Error::other);
    let client = connect_with(&world.a.netns, at(B, PORT), exempt).unwrap();
    exchange(client, accept(&world.application).unwrap().0, 1 << 20);
    assert_eq!(world.counter(Counter::GuardDropped), 3);
    // Makes room in the watching sockets.
    watch.seen(&world.a.netns);
    world.capture.unpin().unwrap();
    send_frames(&world.a.netns, &[frame([8, 0], &packet(0x18, b"at-large"))]);
    let frames = watch.seen(&world.a.netns);
    assert!(frames.iter().any(|frame| contains(frame, b"at-large")), "without it they pass");
}

#[test]
fn guard_is_a_filter_where_the_kernel_has_no_links_for_it() {
    let world = World::new();
    let (pod, folder) = (&world.a.netns, world.node.pod_folder("uid/a"));
    world.b.netns.run(|| guard::remove(&folder)).unwrap().unwrap();
    assert!(world.b.netns.run(|| world.capture.verify_guard(pod, Some(world.guard))).unwrap().is_err());
    let mut object = world.node.loader.pod(&folder, 1).unwrap();
    let attached = world
        .b
        .netns
        .run(|| guard::attach_by(guard::Means::Filter, guard::load(&mut object).unwrap(), &folder, world.guard, pod));
    attached.unwrap().unwrap();
    drop(object);
    let verify = || world.b.netns.run(|| world.capture.verify(pod, entry(FLAG_DNS), Some(world.guard))).unwrap();
    verify().unwrap();
    let watch = Watch::new(&world.b.netns);
    send_frames(pod, &[frame([8, 0], &packet(0x18, b"secret-frame"))]);
    assert_eq!(opening_or_payload(&watch.seen(pod)), Vec::<&[u8]>::new());
    assert_eq!(world.counter(Counter::GuardDropped), 1);
    // It is moved to the other end: the pod's entry is what it should be afterwards.
    let index = pod_network::find_interface(pod, A.into(), &world.b.netns).unwrap().index;
    let moved = Guard::PodEnd { index };
    attach(&world.node, pod, &world.b.netns, FLAG_DNS, &world.listeners, moved);
    send_frames(pod, &[frame([8, 0], &packet(0x18, b"secret-frame"))]);
    assert_eq!(world.counter(Counter::GuardDropped), 2);
    pod.run(|| guard::remove(&folder)).unwrap().unwrap();
    let attached = world.b.netns.run(|| {
        let mut object = world.node.loader.pod(&folder, 1).unwrap();
        guard::attach_by(guard::Means::Filter, guard::load(&mut object).unwrap(), &folder, world.guard, pod)
    });
    attached.unwrap().unwrap();
    let pin = folder.join("guard-filter");
    world.b.netns.run(|| guard::remove(&folder)).unwrap().unwrap();
    assert!(!pin.exists());
    assert!(verify().is_err());
    send_frames(pod, &[frame([8, 0], &packet(0x18, b"at-large"))]);
    let frames = watch.seen(pod);
    assert!(frames.iter().any(|frame| contains(frame, b"at-large")), "without it they pass");
    world.capture.unpin().unwrap();
    assert!(!folder.exists());
}
