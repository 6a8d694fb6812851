//! Changes by hand behind the agent's back: found, counted, mended.

use std::net::Ipv6Addr;

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::packet_route::rule::RuleAttribute;
use rtnetlink::packet_route::tc::TcHandle;
use rtnetlink::{IpVersion, LinkUnspec, RouteMessageBuilder};

use super::drift::Drift;
use super::testing::{configure, node_and_pod};
use super::*;

/// An agent with an enrolled pod.
pub fn enrolled(scratch: &Scratch) -> (Agent, TestPod, TestPod) {
    let agent = Agent::start(scratch);
    let (a, b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    (agent, a, b)
}

/// Waits until each of these was found, and everything is in force again.
#[track_caller]
pub fn mended(agent: &Agent, wanted: &[Drift]) {
    for what in wanted {
        eventually(|| (agent.host.drift.get(*what) > 0).then_some(())).unwrap_or_else(|| panic!("{what} is found"));
    }
    let announcer = agent.announcer();
    eventually(|| (announcer.list() == [(UID.into(), String::new())]).then_some(())).expect("in force again");
    for what in Drift::ALL {
        assert_eq!(agent.host.drift.get(what) > 0, wanted.contains(&what), "{what}");
    }
}

/// Deletes all rules of the mesh of one family.
async fn delete_rules(handle: &rtnetlink::Handle, family: IpVersion) {
    let rules: Vec<_> = handle.rule().get(family).execute().try_collect().await.unwrap();
    let ours = |rule: &RuleAttribute| matches!(rule, RuleAttribute::Priority(1499..=1502));
    for rule in rules.into_iter().filter(|rule| rule.attributes.iter().any(ours)) {
        handle.rule().del(rule).execute().await.unwrap();
    }
}

/// Deletes the mesh's route of the family of `query`.
async fn delete_route(handle: &rtnetlink::Handle, query: RouteMessage) {
    let routes: Vec<_> = handle.route().get(query).execute().try_collect().await.unwrap();
    let ours = RouteAttribute::Table(ztunnel_ebpf::ROUTE_TABLE);
    for route in routes.into_iter().filter(|route| route.attributes.contains(&ours)) {
        handle.route().del(route).execute().await.unwrap();
    }
}

#[test]
fn deleted_rules_are_told_of_and_come_back() {
    let scratch = Scratch::new();
    let (agent, a, _b) = enrolled(&scratch);
    let changes = a.netns.changes().unwrap();
    configure(&a.netns, async |handle| delete_rules(&handle, IpVersion::V4).await);
    assert!(changes.take(), "the agent need not wait for its next look at the pod");
    mended(&agent, &[Drift::Rule]);
}

#[test]
fn deleted_route_comes_back() {
    let scratch = Scratch::new();
    let (agent, a, _b) = enrolled(&scratch);
    configure(&a.netns, async |handle| delete_route(&handle, RouteMessageBuilder::<Ipv4Addr>::new().build()).await);
    mended(&agent, &[Drift::Route]);
}

#[test]
fn sysctl_that_was_reset_is_set_again_whichever_it_is() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    super::families::announce(&agent, &a, &[A.into(), A6.into()]).unwrap();
    let all = ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"];
    for (count, name) in (1..).zip(all) {
        let path = format!("/proc/sys/net/{name}");
        a.netns.run(|| std::fs::write(&path, "0")).unwrap().unwrap();
        eventually(|| (agent.host.drift.get(Drift::Sysctl) == count).then_some(())).unwrap_or_else(|| panic!("{name}"));
        mended(&agent, &[Drift::Sysctl]);
        assert_eq!(a.netns.run(|| std::fs::read_to_string(&path)).unwrap().unwrap(), "1\n", "{name}");
    }
}

#[test]
fn lo_that_was_set_down_is_up_again_with_the_routes_that_it_took_along() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    super::families::announce(&agent, &a, &[A.into(), A6.into()]).unwrap();
    configure(&a.netns, async |handle| {
        handle.link().set(LinkUnspec::new_with_index(1).down().build()).execute().await.unwrap();
    });
    mended(&agent, &[Drift::Loopback, Drift::Route]);
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    for (to, from) in [(at(B, PORT), at(A, PORT)), ((B6, PORT).into(), (A6, PORT).into())] {
        connect(&a, to).unwrap();
        assert_eq!(accept(&listeners[0]).unwrap().0, to);
        connect(&b, from).unwrap();
        assert_eq!(accept(&listeners[1]).unwrap().0, from);
    }
}

#[test]
fn rules_and_route_of_ipv6_come_back() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    super::families::announce(&agent, &a, &[A.into(), A6.into()]).unwrap();
    configure(&a.netns, async |handle| delete_rules(&handle, IpVersion::V6).await);
    mended(&agent, &[Drift::Rule]);
    configure(&a.netns, async |handle| delete_route(&handle, RouteMessageBuilder::<Ipv6Addr>::new().build()).await);
    mended(&agent, &[Drift::Rule, Drift::Route]);
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    connect(&a, (B6, PORT).into()).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, (B6, PORT).into());
}

#[test]
fn programs_that_were_taken_off_are_attached_again() {
    let scratch = Scratch::new();
    let (agent, a, b) = enrolled(&scratch);
    agent.host.capture.unpin_pod(UID).unwrap();
    // They go one after the other: an agent that looks in between finds one missing, and attaches all.
    let drift = |what| agent.host.drift.get(what) > 0;
    let is_found = || (drift(Drift::Program) || drift(Drift::Guard)).then_some(());
    eventually(is_found).expect("what was taken off is found");
    let announcer = agent.announcer();
    eventually(|| (announcer.list() == [(UID.into(), String::new())]).then_some(())).expect("in force again");
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT));
    connect(&b, at(A, PORT)).unwrap();
    assert_eq!(accept(&listeners[1]).unwrap().0, at(A, PORT));
}

#[test]
fn guard_that_was_taken_off_is_attached_again() {
    let scratch = Scratch::new();
    let (agent, a, _b) = enrolled(&scratch);
    let pin = scratch.bpffs().join(format!("v{}/pods/{UID}/guard", ztunnel_ebpf::LAYOUT_VERSION));
    let is_link = pin.exists();
    if is_link {
        std::fs::remove_file(&pin).unwrap();
    } else {
        // Before Linux 6.6 it is a filter of the clsact qdisc.
        configure(&a.netns, async |handle| {
            let index = super::testing::index_of(&handle, "eth0").await;
            let mut request = handle.qdisc().del(index.cast_signed());
            request.message_mut().header.parent = TcHandle::INGRESS;
            request.execute().await.unwrap();
        });
    }
    mended(&agent, &[Drift::Guard]);
    assert_eq!(pin.exists(), is_link);
}

#[test]
fn entries_that_were_removed_from_maps_come_back() {
    let scratch = Scratch::new();
    let (agent, a, _b) = enrolled(&scratch);
    // One round, so that the agent knows what it told.
    eventually(|| (!agent.host.capture.routes(a.netns.cookie()).unwrap().is_empty()).then_some(())).unwrap();
    agent.host.capture.release(a.netns.cookie()).unwrap();
    mended(&agent, &[Drift::Entry, Drift::Destinations]);
    assert_ne!(agent.host.capture.routes(a.netns.cookie()).unwrap(), []);
}

#[test]
fn pin_of_a_map_that_was_removed_comes_back_and_nothing_else_is_touched() {
    let scratch = Scratch::new();
    let (agent, a, _b) = enrolled(&scratch);
    let folder = scratch.bpffs().join(format!("v{}/pods/{UID}", ztunnel_ebpf::LAYOUT_VERSION));
    let before: std::collections::BTreeSet<_> = sys::pinned_objects(&folder).into_iter().collect();
    std::fs::remove_file(folder.join(ztunnel_ebpf::MAP_POD)).unwrap();
    mended(&agent, &[Drift::Program]);
    assert_eq!(sys::pinned_objects(&folder).into_iter().collect::<std::collections::BTreeSet<_>>(), before);
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT));
}

#[test]
fn listener_that_was_taken_out_or_replaced_is_put_back() {
    let scratch = Scratch::new();
    let (agent, a, b) = enrolled(&scratch);
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    let map =
        scratch.bpffs().join(format!("v{}/pods/{UID}/{}", ztunnel_ebpf::LAYOUT_VERSION, ztunnel_ebpf::MAP_SOCKETS));
    let application = listen(&a, PORT);
    sys::put_socket(&map, ztunnel_ebpf::SOCKET_INBOUND_PLAINTEXT, Some(application.as_fd()));
    mended(&agent, &[Drift::Listeners]);
    connect(&b, at(A, PORT)).unwrap();
    assert_eq!(accept(&listeners[1]).unwrap().0, at(A, PORT));
    let found = agent.host.drift.get(Drift::Listeners);
    let announcer = agent.announcer();
    // Mended at any time: it is taken out until it is asked for in between.
    eventually(|| {
        sys::put_socket(&map, ztunnel_ebpf::SOCKET_OUTBOUND, None);
        announcer.list()[0].1.contains("another listener").then_some(())
    })
    .expect("not reported as enrolled meanwhile");
    eventually(|| (agent.host.drift.get(Drift::Listeners) > found).then_some(())).expect("found again");
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT));
}

#[test]
fn drift_that_cannot_be_mended_is_listed_while_it_lasts() {
    let scratch = Scratch::new();
    let (agent, a, _b) = enrolled(&scratch);
    let change = |add: bool| {
        configure(&a.netns, async |handle| {
            let index = super::testing::index_of(&handle, "eth0").await;
            if add {
                handle.address().add(index, A.into(), 24).execute().await.unwrap();
            } else {
                let all: Vec<_> =
                    handle.address().get().set_link_index_filter(index).execute().try_collect().await.unwrap();
                for address in all {
                    handle.address().del(address).execute().await.unwrap();
                }
            }
        });
    };
    change(false);
    let announcer = agent.announcer();
    let reason = || announcer.list().remove(0).1;
    assert!(reason().contains("no interface"), "{}", reason());
    change(true);
    eventually(|| reason().is_empty().then_some(())).expect("in force again");
}

#[test]
fn route_of_the_pod_is_told_to_the_programs_when_it_changes() {
    let scratch = Scratch::new();
    let (agent, a, _b) = enrolled(&scratch);
    let captured = |agent: &Agent| {
        let routes = agent.host.capture.routes(a.netns.cookie()).unwrap();
        routes.into_iter().find(|route| route.prefix == 0 && route.address.is_ipv4()).map(|route| route.captured)
    };
    assert_eq!(captured(&agent), None);
    configure(&a.netns, async |handle| {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(Ipv4Addr::UNSPECIFIED, 0).gateway(B);
        handle.route().add(route.build()).execute().await.unwrap();
    });
    eventually(|| (captured(&agent) == Some(true)).then_some(())).expect("told");
    assert_eq!(agent.host.drift.get(Drift::Destinations), 0, "a change is no drift");
}

#[test]
fn guard_stands_on_the_host_end_where_the_agent_sees_it() {
    let scratch = Scratch::new();
    let (node, a) = node_and_pod();
    let interface = node.netns.run(|| {
        let home = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
        pod_network::find_interface(&a.netns, A.into(), &home).unwrap()
    });
    let interface = interface.unwrap();
    assert!(interface.host_end.is_some());
    let elsewhere = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
    let from_elsewhere = pod_network::find_interface(&a.netns, A.into(), &elsewhere).unwrap();
    assert_eq!((from_elsewhere.index, from_elsewhere.host_end), (interface.index, None));

    let agent = node.netns.run(|| Agent::start(&scratch)).unwrap();
    agent.announcer().enrol(UID, &a, "").unwrap();
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);
    assert_eq!(agent.announcer().states()[0].weaker_reason, "");
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT));
    // What the proxy sends passes the guard, what others send does not.
    let application = listen(&node, PORT);
    let upstream = Socket::from(proxy.sockets(UID, SocketKind::UpstreamV4, 1).unwrap().remove(0));
    upstream.set_nonblocking(false).unwrap();
    upstream.connect_timeout(&at(B, PORT).into(), PATIENCE).unwrap();
    assert_eq!(application.accept().unwrap().1.ip(), A);
    agent.announcer().withdraw(UID).unwrap();
    connect(&a, at(B, PORT)).expect("nothing stops it any more");
}

#[test]
fn guard_in_the_pod_itself_is_reported_as_weaker() {
    let scratch = Scratch::new();
    let (agent, _a, _b) = enrolled(&scratch);
    let state = agent.announcer().states().remove(0);
    assert_eq!(state.not_enrolled_reason, "", "enrolled all the same");
    assert!(state.weaker_reason.contains("PACKET_QDISC_BYPASS"), "{}", state.weaker_reason);
}
