//! Every port of a node, of a proxy and of enrolled pods, tried by a stranger and by an enrolled application: what is open is what
//! is meant to be, and none of it is the mesh's own business.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tests::app::clients::scan::Report;
use tests::metrics;
use tests::pod::Pod;

use crate::common::{connect, echo_any};
use crate::ports::{Outcome, tell};
use crate::scene::{ECHO, Scene};

/// Longest that all ports of one address may take, on a machine that is busy.
const ALL_PORTS: Duration = Duration::from_secs(300);
/// Where tunnels come in.
const HBONE: u16 = 15008;
/// The proxy's own pages that are for whoever may reach the pod network: metrics and readiness.
const PAGES: [u16; 2] = [15020, 15021];
/// How long what is connected must say nothing to count as open, in milliseconds: less than a tunnel may take to begin.
const SILENCE: &str = "1000";
/// What a client asks for who looks for admin pages.
const DUMP: &[u8] = b"GET /config_dump HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// Tries every port of an address from inside a pod; which are open, and why the others are not.
fn scan(from: &Pod, to: IpAddr, at_a_time: usize) -> Report {
    let (address, at_a_time) = (to.to_string(), at_a_time.to_string());
    let args = ["scan", "--to", &address, "--at-a-time", &at_a_time, "--silence", SILENCE];
    let report: Report = from.run_for(ALL_PORTS, args).unwrap().json().unwrap();
    println!("{} to {to}: {report:?}", from.name());
    assert_eq!(report.tried(), usize::from(u16::MAX), "{to}: {report:?}");
    report
}

/// Ports on which nobody listens, as the kernel itself says: none of them took a connection first.
fn only(open: &[u16], report: &Report, to: IpAddr) {
    assert_eq!(report.open, open, "{to}: {report:?}");
    assert_eq!((report.ended, report.failed.get("refused")), (0, Some(&(usize::from(u16::MAX) - open.len()))), "{to}");
}

/// Failed connections of a node's proxy, by their reason.
fn failures(scene: &Scene, node: usize) -> BTreeMap<String, f64> {
    let text = scene.cluster.node(node).unwrap().metrics().unwrap();
    let samples = metrics::samples(&text, "culvert_connection_failures_total");
    let mut all = BTreeMap::new();
    samples.for_each(|s| *all.entry(s.label("reason").unwrap().to_owned()).or_default() += s.value);
    all
}

/// Connections were refused because they lead nowhere, and none because there were so many: a port that was refused so may be open.
fn refused_for(scene: &Scene, node: usize, before: &BTreeMap<String, f64>, reasons: &[&str]) {
    let now = failures(scene, node);
    let new: Vec<_> = now.iter().filter(|(reason, count)| before.get(*reason).is_none_or(|n| n < *count)).collect();
    println!("node {node}: {new:?}");
    assert!(new.iter().all(|(reason, _)| reasons.contains(&reason.as_str())), "node {node}: {new:?}");
}

/// What answers at an open port is asked for admin pages, and gives none.
fn shows_no_admin(scene: &Scene, to: SocketAddr) {
    // The application ends when it is told that this is all; the others are asked to close, and those of HTTP answer first.
    let outcome = tell(scene.peer.network(), to, DUMP, to.port() == ECHO);
    let Outcome::Closed(answer) = outcome else { panic!("{to}: {outcome:?}") };
    match to.port() {
        ECHO => assert_eq!(answer, DUMP, "{to}: the application"),
        HBONE => assert!(answer.starts_with(&[0x15, 3]) && answer.len() < 64, "{to}: an alert and not {answer:?}"),
        _ => assert!(answer.starts_with(b"HTTP/1.1 404"), "{to}: {}", String::from_utf8_lossy(&answer)),
    }
}

#[test]
fn a_stranger_finds_no_port_open_that_is_not_meant_to_be() {
    let scene = Scene::dual();
    let node = scene.cluster.node(2).unwrap();
    let proxy = node.mesh().unwrap().proxy().record.ip();
    for to in [node.address.into(), node.address_v6.unwrap().into()] {
        only(&[], &scan(&scene.peer, to, 4096), to);
    }
    only(&PAGES, &scan(&scene.peer, proxy, 4096), proxy);
    let before = failures(&scene, 2);
    // Each of a pod's ports takes connections: the proxy's listener does, and ends what leads nowhere.
    for to in scene.target.ips() {
        assert_eq!(scan(&scene.peer, to, 512).open, [ECHO, HBONE], "{to}");
    }
    refused_for(&scene, 2, &before, &["connect", "silent", "tls_handshake", "forbidden_port"]);
    let open = PAGES.map(|port| SocketAddr::new(proxy, port)).into_iter();
    for to in open.chain(scene.target_at(ECHO)).chain(scene.target_at(HBONE)) {
        shows_no_admin(&scene, to);
    }
    scene.victim_is_well("a scan from outside of the mesh");
    scene.ends_as_it_was(32 << 10);
}

#[test]
fn a_pod_that_takes_no_plaintext_has_no_port_open_but_that_of_tunnels() {
    let scene = Scene::start();
    let shut = echo_any(&scene.cluster, "shut", 2).enrolled(true).start().unwrap();
    crate::common::until_connected(&scene.friend, &shut.at(ECHO).to_string());
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                  metadata: {name: shut, namespace: default}\n\
                  spec: {selector: {matchLabels: {app: shut}}, mtls: {mode: STRICT}}\n";
    scene.cluster.apply("strict.yaml", strict).unwrap();
    let ask = ["--send", "hello", "--read", "5", "--timeout", "2000"];
    let is_refused = || (!connect(&scene.peer, &shut.at(ECHO).to_string(), &ask).ok).then_some(());
    tests::wait::until("the policy is known", crate::scene::BOUND, is_refused).unwrap();
    let before = failures(&scene, 2);
    assert_eq!(scan(&scene.peer, shut.ip(), 512).open, [HBONE]);
    refused_for(&scene, 2, &before, &["policy_denied", "silent", "tls_handshake", "forbidden_port"]);
    shows_no_admin(&scene, shut.at(HBONE));
    crate::common::until_connected(&scene.friend, &shut.at(ECHO).to_string());
    scene.victim_is_well("a scan of a pod that takes no plaintext");
    scene.ends_as_it_was(32 << 10);
}

#[test]
fn an_enrolled_application_finds_no_port_open_that_is_not_meant_to_be() {
    let scene = Scene::start();
    let node = scene.cluster.node(1).unwrap();
    let proxy = node.mesh().unwrap().proxy().record.ip();
    let before = [failures(&scene, 1), failures(&scene, 2)];
    for (to, open) in [(node.address.into(), &[][..]), (proxy, &PAGES), (scene.target.ip(), &[ECHO])] {
        assert_eq!(scan(&scene.friend, to, 512).open, open, "{to}");
    }
    refused_for(&scene, 1, &before[0], &["connect", "refused_by_peer", "forbidden_port"]);
    refused_for(&scene, 2, &before[1], &["connect"]);
    scene.victim_is_well("a scan from inside of the mesh");
    scene.ends_as_it_was(32 << 10);
}
