//! Garbage on every port of the mesh, and who may reach which.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use tests::netns::NetNs;

use crate::scene::{ECHO, Scene};
use crate::wire::BOUND;

/// Things to say to whoever listens.
fn garbage() -> Vec<(&'static str, Vec<u8>)> {
    let noise: Vec<u8> = (0..4096_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect();
    vec![
        ("noise", noise),
        ("zeroes", vec![0; 4096]),
        ("HTTP/1.1", b"GET /config_dump HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec()),
        ("a TLS record of nonsense", [&[0x16, 3, 1, 0x40, 0][..], &[0xff; 0x4000]].concat()),
        ("a TLS alert", vec![0x15, 3, 3, 0, 2, 2, 40]),
        ("PROXY", b"PROXY TCP4 127.0.0.1 127.0.0.1 1 15000\r\nGET / HTTP/1.0\r\n\r\n".to_vec()),
    ]
}

/// What came of saying something.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nobody took the connection.
    Refused,
    /// Closed, after these bytes.
    Closed(Vec<u8>),
    /// Still open.
    Open,
}

/// Says something to whoever listens, and no more; what comes back until the end.
pub fn say(from: &NetNs, to: SocketAddr, what: &[u8]) -> Outcome {
    tell(from, to, what, true)
}

/// `end`: no more will be said, and the other side is told so. A server of HTTP may take that for the end of the whole connection,
/// whether it has answered or not.
pub fn tell(from: &NetNs, to: SocketAddr, what: &[u8], end: bool) -> Outcome {
    let Ok(mut stream) = from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(3))).unwrap() else {
        return Outcome::Refused;
    };
    stream.set_read_timeout(Some(BOUND)).unwrap();
    // It may be closed under way.
    let _ = stream.write_all(what);
    if end {
        let _ = stream.shutdown(std::net::Shutdown::Write);
    }
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Outcome::Open,
        Ok(_) | Err(_) => Outcome::Closed(answer),
    }
}

#[test]
fn garbage_on_a_pods_ports_is_closed_without_a_word() {
    let scene = Scene::dual();
    let stranger = scene.cluster.host("stranger").unwrap();
    for (name, bytes) in garbage() {
        for port in [15001, 15006, 15008, 15053, 15000, 15020, 15021, 15080] {
            for (who, from) in [("a pod", scene.peer.network()), ("a stranger", &*stranger.network)] {
                for to in scene.target_at(port) {
                    match say(from, to, &bytes) {
                        Outcome::Refused => {}
                        // TLS alerts, at most: nothing of HTTP.
                        Outcome::Closed(answer) => {
                            assert!(!answer.windows(4).any(|w| w == b"HTTP"), "{name} to {to} from {who}: {answer:?}");
                            assert!(answer.len() < 64, "{name} to {to} from {who}: {answer:?}");
                        }
                        Outcome::Open => panic!("{name} to {to} from {who} hangs"),
                    }
                }
            }
        }
    }
    scene.victim_is_well("garbage");
    scene.ends_as_it_was(32 << 10);
}

/// The same ports as an application of an enrolled pod reaches them: through its own proxy.
#[test]
fn an_enrolled_application_reaches_no_port_of_the_mesh() {
    let scene = Scene::dual();
    let node = scene.cluster.node(2).unwrap();
    let proxy = node.mesh().unwrap().proxy().record.ip();
    let at = |ips: &[IpAddr], ports: &[u16]| -> Vec<SocketAddr> {
        ips.iter().flat_map(|ip| ports.iter().map(|port| (*ip, *port).into())).collect()
    };
    let targets = at(&scene.target.ips(), &[15001, 15006, 15008]);
    let own = at(&scene.friend.ips(), &[15001, 15006, 15008]);
    let loopback = at(&[Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()], &[15001, 15006, 15008, 15000, 15020]);
    let admin = at(&[proxy, node.address.into(), node.address_v6.unwrap().into()], &[15000]);
    for to in targets.iter().chain(&own).chain(&loopback).chain(&admin) {
        let is_own = to.port() == 15008 && (own.contains(to) || loopback.contains(to));
        let to = to.to_string();
        let args = ["connect", "--timeout", "4000", "--send", "GET / HTTP/1.0\r\n\r\n", "--read", "4", "--to", &to];
        let output = scene.friend.run(args).unwrap();
        // The pod's own 15008 is there for it as for everybody: it wants a certificate, and says so with an alert.
        let alert = is_own && output.stdout.contains("\\u0015\\u0003");
        assert!(alert || !output.status.success(), "{to}: {output:?}");
        assert!(!output.stdout.contains("HTTP"), "{to}: {output:?}");
    }
    scene.victim_is_well("the mesh's own ports");
    scene.ends_as_it_was(32 << 10);
}

/// The proxy's own pages: metrics and readiness for whoever may reach the pod network, admin for its own namespace alone.
#[test]
fn the_proxys_own_pages_outlive_garbage_and_show_admin_to_nobody() {
    let scene = Scene::start();
    let node = scene.cluster.node(2).unwrap();
    let proxy = node.mesh().unwrap().proxy().record.ip();
    for (name, bytes) in garbage() {
        for port in [15020, 15021] {
            let outcome = say(scene.peer.network(), (proxy, port).into(), &bytes);
            assert!(!matches!(outcome, Outcome::Open), "{name} to {port}");
        }
        assert_eq!(say(scene.peer.network(), (proxy, 15000).into(), &bytes), Outcome::Refused, "{name}: admin");
        let control = scene.cluster.control().unwrap();
        let to = control.xds();
        assert!(!matches!(say(scene.peer.network(), to, &bytes), Outcome::Open), "{name} to culvertd {to}");
        for port in [15010, 15014] {
            let to = SocketAddr::new(to.ip(), port);
            assert_eq!(say(scene.peer.network(), to, &bytes), Outcome::Refused, "{name} to culvertd {to}");
        }
    }
    // A page of its own, asked for by a browser's rebound name, is not given.
    let dump = node.proxy_network().unwrap();
    let request = b"GET /config_dump HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    let rebound = tell(dump, ([127, 0, 0, 1], 15000).into(), request, false);
    let Outcome::Closed(answer) = rebound else { panic!("{rebound:?}") };
    assert!(answer.starts_with(b"HTTP/1.1 403"), "{}", String::from_utf8_lossy(&answer));
    // Profiles are not taken in the jail: the answer says how, and no signal disturbs the proxy.
    for path in ["/debug/pprof/profile?seconds=3600", "/debug/pprof/heap"] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let told = tell(dump, ([127, 0, 0, 1], 15000).into(), request.as_bytes(), false);
        let Outcome::Closed(answer) = told else { panic!("{path}: {told:?}") };
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with("HTTP/1.1 501") && answer.contains("From the node"), "{path}: {answer}");
    }
    assert!(node.metrics().is_ok() && node.config_dump().is_ok());
    // An application's port is only its own: what is said there is the application's business.
    assert!(
        matches!(say(scene.peer.network(), scene.target.at(ECHO), b"hello"), Outcome::Closed(all) if all == b"hello")
    );
    scene.victim_is_well("garbage for the proxy's pages");
    scene.ends_as_it_was(32 << 10);
}
