//! Requests that are no CONNECT to the pod, and headers that are not to be believed.

use tests::app::clients::connect::Report;

use crate::scene::{ECHO, Scene};
use crate::wire::{Answer, END_HEADERS, END_STREAM, HEADERS, METHOD_CONNECT, Peer, authority, connect, field, frame};
use crate::wire::{CONTINUATION, DATA, inside};

/// How many bytes one header list may have (16 KiB) is less than this.
const TOO_LONG: usize = 20 << 10;

#[test]
fn what_is_no_connect_to_the_pod_is_refused_and_the_tunnel_stays() {
    let scene = Scene::dual();
    let certificate = scene.certificate();
    let (target, to) = (scene.target.at(15008), scene.target.at(ECHO));
    let good = authority(&to.to_string());
    let victims = authority(&scene.victim.at(ECHO).to_string());
    let v6 = |pod: &tests::pod::Pod| pod.at_v6(ECHO).unwrap();
    let (target_v6, to_v6) = (scene.target.at_v6(15008).unwrap(), v6(&scene.target));
    let request = |fields: &[&[u8]]| frame(HEADERS, END_HEADERS, 1, &fields.concat());
    // `:method: GET`, `:scheme: http` and `:path: /` of the static table.
    let (get, http, path) = (&[0x82][..], &[0x86][..], &[0x84][..]);
    let many: Vec<u8> = (0..200).flat_map(|i| field(&format!("x-{i}"), "y")).collect();
    let refused = &[Answer::Status(400), Answer::Reset][..];
    let mapped = |pod: &tests::pod::Pod| format!("[::ffff:{}]:{ECHO}", pod.ip());
    let cases: &[(&str, Vec<u8>, &[Answer])] = &[
        ("no :authority", request(&[METHOD_CONNECT]), &[Answer::Status(400), Answer::Reset]),
        ("an empty :authority", request(&[METHOD_CONNECT, &authority("")]), &[Answer::Status(400), Answer::Reset]),
        ("CONNECT with :path", request(&[METHOD_CONNECT, &good, path]), &[Answer::Status(400), Answer::Reset]),
        ("CONNECT with :scheme", request(&[METHOD_CONNECT, &good, http]), &[Answer::Status(400), Answer::Reset]),
        ("GET", request(&[get, http, path, &good]), &[Answer::Status(400), Answer::Status(404)]),
        (
            "extended CONNECT",
            request(&[METHOD_CONNECT, &good, http, path, &field(":protocol", "websocket")]),
            &[Answer::Status(400), Answer::Reset],
        ),
        ("no port", request(&[METHOD_CONNECT, &authority("10.244.2.10")]), &[Answer::Status(400), Answer::Reset]),
        ("a user", request(&[METHOD_CONNECT, &authority(&format!("u@{to}"))]), &[Answer::Status(400), Answer::Reset]),
        ("two authorities", request(&[METHOD_CONNECT, &good, &victims]), &[Answer::Reset, Answer::Closed]),
        ("another pod", request(&[METHOD_CONNECT, &victims]), &[Answer::Status(400)]),
        ("loopback", request(&[METHOD_CONNECT, &authority("127.0.0.1:15000")]), &[Answer::Status(400)]),
        ("another pod in IPv6", request(&[METHOD_CONNECT, &authority(&v6(&scene.victim).to_string())]), refused),
        ("loopback in IPv6", request(&[METHOD_CONNECT, &authority("[::1]:15000")]), refused),
        ("mapped loopback", request(&[METHOD_CONNECT, &authority("[::ffff:127.0.0.1]:15000")]), refused),
        ("a mapped other pod", request(&[METHOD_CONNECT, &authority(&mapped(&scene.victim))]), refused),
        ("any address", request(&[METHOD_CONNECT, &authority("[::]:7000")]), refused),
        ("an interface", request(&[METHOD_CONNECT, &authority("[fe80::1%eth0]:7000")]), refused),
        ("no brackets", request(&[METHOD_CONNECT, &authority(&format!("{}:{ECHO}", to_v6.ip()))]), refused),
        (
            "a name",
            request(&[METHOD_CONNECT, &authority("target.default.svc.cluster.local:80")]),
            &[Answer::Status(400)],
        ),
        ("many fields", request(&[METHOD_CONNECT, &good, &many]), &[Answer::Status(400), Answer::Reset]),
        ("an upper-case name", request(&[METHOD_CONNECT, &good, &field("X-A", "b")]), &[Answer::Reset, Answer::Closed]),
        ("connection: close", request(&[METHOD_CONNECT, &good, &field("connection", "close")]), &[Answer::Reset]),
        ("a stream of the server's", frame(HEADERS, END_HEADERS, 2, METHOD_CONNECT), &[Answer::Closed]),
        ("no stream", frame(HEADERS, END_HEADERS, 0, METHOD_CONNECT), &[Answer::Closed]),
        ("DATA first", frame(DATA, 0, 1, b"hello"), &[Answer::Closed, Answer::Reset]),
        ("a bad header block", frame(HEADERS, END_HEADERS, 1, &[0xff; 40]), &[Answer::Closed]),
        ("a padding too long", frame(HEADERS, END_HEADERS | 8, 1, &[200, 0, 0]), &[Answer::Closed]),
    ];
    inside(scene.peer.network(), async || {
        // Both of the pod's addresses in turn: what is said of one is no different at the other.
        let doors = [(target, to), (target_v6, to_v6)];
        for ((name, bytes, allowed), (target, to)) in cases.iter().zip(doors.into_iter().cycle()) {
            let mut peer = Peer::http2(target, &certificate).await.unwrap();
            peer.send(bytes).await;
            let stream = u32::from_be_bytes(*bytes[5..].first_chunk().unwrap()).max(1);
            let answer = peer.answer(stream).await;
            assert!(allowed.contains(&answer), "{name}: {answer:?}, allowed {allowed:?}");
            if !matches!(answer, Answer::Closed) {
                peer.send(&connect(3, to)).await;
                assert_eq!(peer.answer(3).await, Answer::Status(200), "{name}: the tunnel is not good any more");
            }
        }
        // Larger than one frame may be read into, in one field and in many CONTINUATIONs.
        let mut peer = Peer::http2(target, &certificate).await.unwrap();
        let long = [METHOD_CONNECT, &good, b"\x00\x01x\x7f\x81\x9b\x01", &[b'y'; TOO_LONG]].concat();
        peer.send(&frame(HEADERS, 0, 1, &long[..10_000])).await;
        peer.send(&frame(CONTINUATION, END_HEADERS, 1, &long[10_000..])).await;
        let answer = peer.answer(1).await;
        assert!(matches!(answer, Answer::Status(400 | 431) | Answer::Reset | Answer::Closed), "{answer:?}");
    });
    scene.victim_is_well("bad requests");
    scene.ends_as_it_was(32 << 10);
}

/// An application that sends what proxies send is not believed: what it says is data, or no business of anybody's.
#[test]
fn forged_headers_are_not_believed() {
    let scene = Scene::start();
    let to = scene.target.at(ECHO).to_string();
    let proxy = format!("PROXY TCP4 {} {} 1 {ECHO}\r\n", scene.victim.ip(), scene.target.ip());
    for from in [&scene.friend, &scene.peer] {
        for said in [proxy.as_str(), "CONNECT 127.0.0.1:15000 HTTP/1.1\r\nx-forwarded-for: 10.0.0.1\r\n\r\n"] {
            let read = said.len().to_string();
            let seen: Report = from.run_json(["connect", "--to", &to, "--send", said, "--read", &read]).unwrap();
            assert!(seen.ok && seen.received == said, "it is the application's: {seen:?}");
        }
    }
    // The banner says whom the application sees.
    let banner = scene.cluster.pod("banner").node(2).enrolled(true);
    let banner = banner.command(["echo", "--listen", "0.0.0.0:7000", "--mode", "banner"]).start().unwrap();
    crate::common::until_connected(&scene.friend, &banner.at(ECHO).to_string());
    let certificate = scene.certificate();
    inside(scene.peer.network(), async || {
        let mut peer = Peer::http2(banner.at(15008), &certificate).await.unwrap();
        let forged = [
            METHOD_CONNECT,
            &authority(&banner.at(ECHO).to_string()),
            &field("forwarded", &format!("for=\"{}\";host=a.b", scene.victim.at(1))),
            &field("x-forwarded-for", &scene.victim.ip().to_string()),
            &field("baggage", "k8s.namespace.name=kube-system,k8s.pod.name=victim"),
            &field("x-istio-source", "waypoint"),
        ];
        peer.send(&frame(HEADERS, END_HEADERS, 1, &forged.concat())).await;
        assert_eq!(peer.answer(1).await, Answer::Status(200));
        let said = loop {
            let (kind, _, payload) = peer.frame().await.expect("the banner");
            if kind == DATA {
                break String::from_utf8_lossy(&payload).into_owned();
            }
        };
        assert!(
            said.contains(&format!("\"{}:", scene.peer.ip())),
            "the application sees the tunnel's own source: {said}"
        );
        assert!(!said.contains(&scene.victim.ip().to_string()), "{said}");
        peer.send(&frame(DATA, END_STREAM, 1, b"")).await;
    });
    let metrics = scene.cluster.node(2).unwrap().metrics().unwrap();
    assert!(metrics.contains("/sa/peer\""), "counted by the certificate");
    assert!(!metrics.contains("source_workload_namespace=\"kube-system\""), "not by what it says of itself");
    scene.ends_as_it_was(32 << 10);
}
