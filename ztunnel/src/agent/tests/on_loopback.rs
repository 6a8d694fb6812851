//! Pods whose address is on `lo`, as some networks have it: what leads out of them is captured and guarded all the same, and a
//! pod of which that cannot be told is refused.

use futures_util::TryStreamExt as _;
use rtnetlink::RouteMessageBuilder;
use socket2::Protocol;
use ztunnel_ebpf::Counter;

use super::drift::Drift;
use super::testing::{C, D, configure, index_of, node_and_pod, second_link};
use super::*;

/// Takes all addresses off the pod's interface, puts [`A`] on `lo`, and removes what leads out but for the way to [`B`].
fn move_to_loopback(pod: &TestPod) {
    configure(&pod.netns, async |handle| {
        let index = index_of(&handle, "eth0").await;
        let all: Vec<_> = handle.address().get().set_link_index_filter(index).execute().try_collect().await.unwrap();
        for address in all {
            handle.address().del(address).execute().await.unwrap();
        }
        handle.address().add(1, A.into(), 32).execute().await.unwrap();
    });
    lead_out(pod, B, 32, None);
}

/// Adds a route by the pod's `eth0`.
fn lead_out(pod: &TestPod, to: Ipv4Addr, prefix: u8, gateway: Option<Ipv4Addr>) {
    configure(&pod.netns, async |handle| {
        let index = index_of(&handle, "eth0").await;
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, prefix).output_interface(index);
        let route = match gateway {
            Some(gateway) => route.gateway(gateway),
            None => route.scope(rtnetlink::packet_route::route::RouteScope::Link),
        };
        handle.route().add(route.build()).execute().await.unwrap();
    });
}

/// Sends the beginning of a connection past the connect hooks.
fn send_raw(pod: &TestPod) {
    let mut syn = [0; 20];
    syn[..2].copy_from_slice(&4000_u16.to_be_bytes());
    syn[2..4].copy_from_slice(&PORT.to_be_bytes());
    (syn[12], syn[13]) = (5 << 4, 2);
    pod.netns
        .run(|| {
            let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP)).unwrap();
            // What the guard stops at the pod's own interface may be said to the sender.
            let _ = raw.send_to(&syn, &at(B, 0).into());
        })
        .unwrap();
}

/// Outbound and inbound connections reach the proxy, and the guard stops what is no connection of an application.
#[track_caller]
fn is_held(agent: &Agent, listeners: &[OwnedFd], a: &TestPod, other: &TestPod) {
    let client = connect(a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]), Some((at(B, PORT), client.local_addr().unwrap())));
    let client = connect(other, at(A, PORT)).unwrap();
    assert_eq!(accept(&listeners[1]), Some((at(A, PORT), client.local_addr().unwrap())));
    let dropped = || agent.host.capture.counter(Counter::GuardDropped).unwrap();
    let before = dropped();
    send_raw(a);
    eventually(|| (dropped() > before).then_some(())).expect("the guard stops it");
}

#[test]
fn pod_with_its_address_on_lo_is_captured_and_guarded_at_its_way_out() {
    let scratch = Scratch::new();
    let (node, a) = node_and_pod();
    move_to_loopback(&a);
    lead_out(&a, Ipv4Addr::UNSPECIFIED, 0, Some(B));
    let agent = node.netns.run(|| Agent::start(&scratch)).unwrap();
    agent.announcer().enrol(UID, &a, "").unwrap();
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);
    assert_eq!(agent.announcer().states()[0].weaker_reason, "", "the guard stands on the node");
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    is_held(&agent, &listeners, &a, &node);
}

#[test]
fn address_that_lo_has_as_well_is_the_other_interfaces() {
    let scratch = Scratch::new();
    let (a, b) = pair();
    let agent = Agent::start(&scratch);
    agent.announcer().enrol(UID, &a, "").unwrap();
    configure(&a.netns, async |handle| handle.address().add(1, A.into(), 32).execute().await.unwrap());
    let home = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
    let found = pod_network::find_interface(&a.netns, A.into(), &home).unwrap();
    assert!(!found.is_on_loopback && found.leads_out(), "{found:?}");
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    is_held(&agent, &listeners, &a, &b);
}

#[test]
fn way_out_that_comes_later_is_captured_and_guarded_and_until_then_the_pod_is_held_less_firmly() {
    let scratch = Scratch::new();
    let (a, b) = pair();
    move_to_loopback(&a);
    configure(&a.netns, async |handle| {
        let query = RouteMessageBuilder::<Ipv4Addr>::new().table_id(254).build();
        let routes: Vec<_> = handle.route().get(query).execute().try_collect().await.unwrap();
        let main = routes.into_iter().filter(|route| route.header.table == 254);
        for route in main {
            handle.route().del(route).execute().await.unwrap();
        }
    });
    let agent = Agent::start(&scratch);
    agent.announcer().enrol(UID, &a, "").unwrap();
    let weaker = || agent.announcer().states().remove(0).weaker_reason;
    assert!(weaker().contains("no guard"), "{}", weaker());
    lead_out(&a, B, 32, None);
    eventually(|| weaker().contains("PACKET_QDISC_BYPASS").then_some(())).expect("the guard stands in the pod");
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    is_held(&agent, &listeners, &a, &b);
    for what in Drift::ALL {
        assert_eq!(agent.host.drift.get(what), 0, "{what}: a change is no drift");
    }
}

#[test]
fn pod_with_its_address_on_lo_and_several_ways_out_is_refused_with_the_remedy() {
    let scratch = Scratch::new();
    let (a, b) = pair();
    second_link(&a, &b);
    move_to_loopback(&a);
    let agent = Agent::start(&scratch);
    let refused = agent.announcer().enrol(UID, &a, "").unwrap_err();
    assert!(refused.contains("several interfaces") && refused.contains("one default route"), "{refused}");
    assert!(unprepared(&a), "nothing is left of it");
    connect(&a, at(D, PORT)).expect_err("nobody listens");
    lead_out(&a, Ipv4Addr::UNSPECIFIED, 0, Some(B));
    agent.announcer().enrol(UID, &a, "").expect("the remedy helps");
    // A second default route makes it unclear again, and the pod is reported.
    configure(&a.netns, async |handle| {
        let index = index_of(&handle, "net1").await;
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(Ipv4Addr::UNSPECIFIED, 0).gateway(D);
        let route = route.output_interface(index).priority(7).pref_source(C);
        handle.route().add(route.build()).execute().await.unwrap();
    });
    let announcer = agent.announcer();
    let reason = || announcer.list().remove(0).1;
    eventually(|| reason().contains("several interfaces").then_some(())).expect("reported, with the reason");
}
