//! Agents that find what an earlier one left, and pods that are announced again.

use std::fs;

use super::capture::tests::layouts::Former;
use super::drift::Drift;
use super::pod_network::Before;
use super::sockets::ListenerSet;
use super::sys;
use super::*;

#[test]
fn restarted_agent_gets_the_listeners_back_from_a_living_proxy() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    drop(agent);

    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT), "captured and served while no agent runs");

    // The namespace has no path here: it is found by a process in it.
    let inside = process_in(&a);
    let agent = Agent::start(&scratch);
    let (uid, reason) = agent.announcer().list().remove(0);
    assert_eq!(uid, UID);
    assert!(reason.contains("has not returned"), "{reason}");
    let kept = listeners.iter().map(|socket| socket.try_clone().unwrap()).collect();
    let proxy = agent.proxy(vec![(UID, kept)]);
    proxy.added();
    proxy.snapshot();
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);
    proxy.sockets(UID, SocketKind::UpstreamV4, 3).unwrap();
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT));
    drop(inside);
}

#[test]
fn listeners_of_a_proxy_without_dns_get_those_for_dns_beside_them() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    // One is adopted before its listeners are returned, the other is stranded then.
    agent.announcer().enrol(UID, &a, "").unwrap();
    agent.announcer().enrol("uid-b", &b, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    let mut kept = [proxy.added(), proxy.added()];
    kept.iter_mut().for_each(|(_, sockets)| sockets.truncate(3));
    drop((proxy, agent));

    let inside = process_in(&a);
    let agent = Agent::start(&scratch);
    assert!(agent.announcer().list().iter().all(|(_, reason)| !reason.is_empty()), "no listeners");
    let kept =
        kept.iter().map(|(uid, sockets)| (uid.as_str(), sockets.iter().map(|s| s.try_clone().unwrap()).collect()));
    let proxy = agent.proxy(kept.collect());
    assert_eq!(proxy.added().0, UID, "with all five");
    let announcer = agent.announcer();
    let reason = |uid: &str| announcer.list().into_iter().find(|(found, _)| found == uid).unwrap().1;
    assert_eq!(reason(UID), "");
    let inside_b = process_in(&b);
    eventually(|| reason("uid-b").is_empty().then_some(())).expect("adopted with listeners for DNS");
    drop((inside, inside_b));
}

#[test]
fn pod_whose_file_is_lost_stays_captured_and_is_taken_over() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    drop(agent);
    let files = scratch.path("run").join("pods");
    for file in fs::read_dir(&files).unwrap() {
        fs::write(file.unwrap().path(), "{\"version\": 999}").unwrap();
    }

    // The proxy still has the ports; whatever becomes of the enrolment, nothing passes it by.
    let agent = Agent::start(&scratch);
    assert_eq!(agent.announcer().list(), [], "nothing is known of it");
    agent.announcer().enrol(UID, &a, "").expect_err("its listeners are not returned yet");
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT));
    let kept = listeners.iter().map(|socket| socket.try_clone().unwrap()).collect();
    let proxy = agent.proxy(vec![(UID, kept)]);
    proxy.added();
    proxy.snapshot();
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT));
}

/// Runs a whole round of the agent: when a pod that is gone was withdrawn, everything has been looked at.
fn look_at_everything(agent: &Agent) {
    let (other, _neighbour) = pair();
    let dying = process_in(&other);
    let announcer = agent.announcer();
    announcer.enrol("uid-other", &other, &dying.path()).unwrap();
    drop(dying);
    eventually(|| announcer.list().iter().all(|(uid, _)| uid != "uid-other").then_some(())).expect("a gone pod goes");
}

#[test]
fn pod_whose_file_is_missing_is_known_by_its_capture() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    drop((proxy, agent));
    let inside = process_in(&a);
    let lose = || std::fs::remove_file(scratch.path("run/pods").join(format!("{UID}.json"))).unwrap();
    lose();

    let agent = Agent::start(&scratch);
    let (uid, reason) = agent.announcer().list().remove(0);
    assert!(uid == UID && reason.contains("is lost"), "{uid}: {reason}");
    // The end of a sandbox from before, which nobody can tell from the present one by now.
    agent.announcer().withdraw_from(UID, "of before").expect("nothing to do is no error");
    let kept = listeners.iter().map(|socket| socket.try_clone().unwrap()).collect();
    let proxy = agent.proxy(vec![(UID, kept)]);
    // Nobody knows whose identity it is to be served with.
    proxy.snapshot();
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT), "captured all the time");
    agent.announcer().enrol(UID, &a, "").unwrap();
    assert_eq!(proxy.added().0, UID, "with the listeners that the proxy kept");
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);
    drop((proxy, agent, listeners));

    // One that is not wanted any more leaves as every other does.
    lose();
    let agent = Agent::start(&scratch);
    assert_eq!(agent.announcer().list().len(), 1);
    agent.announcer().withdraw(UID).unwrap();
    // How its switches were set is not known any more.
    let needs = pod_network::Needs { addresses: &[A.into(), A6.into()], dns: true };
    let missing = pod_network::inspect(&a.netns, &needs).unwrap();
    assert_eq!((missing.rules.len(), missing.routes.len()), (12, 2));
    assert_eq!(agent.host.capture.cookies().unwrap(), Vec::<u64>::new());
    assert!(agent.host.capture.held().unwrap().is_empty());
    drop(inside);
}

#[test]
fn stranded_pod_that_is_announced_as_another_stays_captured() {
    let scratch = Scratch::new();
    let (a, _b) = pair();
    let (agent, listeners) = stranded(&scratch, &a);
    let mut other = wire(UID, A);
    other.service_account = "other".into();
    let request = node::EnrolPod { pod: Some(other), ..Default::default() };
    let error = ok(agent.announcer().ask(pod_request::Kind::Enrol(request), &[a.netns.as_fd()])).unwrap_err();
    assert!(error.contains("has not returned"), "{error}");
    assert_eq!(agent.host.capture.cookies().unwrap(), [a.netns.cookie()]);
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT), "captured all the time");
}

#[test]
fn enrolled_pod_that_is_announced_as_another_is_captured_all_the_time() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    let announcer = agent.announcer();
    announcer.enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    let announce = |address: Ipv4Addr| {
        let other = Some(node::Pod { service_account: "other".into(), ..wire(UID, address) });
        let request = node::EnrolPod { pod: other, ..Default::default() };
        ok(announcer.ask(pod_request::Kind::Enrol(request), &[a.netns.as_fd()]))
    };
    let objects = || sys::pinned_objects(&scratch.bpffs().join(format!("v{}/pods", ztunnel_ebpf::LAYOUT_VERSION)));
    let account = || announcer.states().remove(0).pod.unwrap().service_account;
    let captured = |when: &str| {
        connect(&a, at(B, PORT)).unwrap();
        assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT), "{when}");
    };
    let before = objects();
    assert!(!before.is_empty());
    let error = announce(B).expect_err("an address that it does not have");
    assert!(error.contains("no interface"), "{error}");
    captured("as what it was");
    assert_eq!((account(), objects() == before), (String::from("web"), true));

    announce(A).unwrap();
    assert_eq!(proxy.added().0, UID, "the proxy is told who it is now");
    captured("as what it is");
    assert_eq!(announcer.list(), [(UID.into(), String::new())]);
    assert_eq!((account(), objects() == before), (String::from("other"), true), "nothing was taken away meanwhile");
    let file = std::fs::read_to_string(agent.run.join("pods").join(format!("{UID}.json"))).unwrap();
    assert!(file.contains("\"other\""), "{file}");
}

#[test]
fn pod_that_is_known_by_its_capture_alone_is_not_taken_for_another() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    drop(agent);
    std::fs::remove_file(scratch.path("run/pods").join(format!("{UID}.json"))).unwrap();
    let inside = process_in(&a);
    let agent = Agent::start(&scratch);
    let announcer = agent.announcer();
    let error = announcer.enrol("uid-other", &a, "").unwrap_err();
    assert!(error.contains(UID), "{error}");
    assert_eq!(agent.host.capture.cookies().unwrap(), [a.netns.cookie()]);
    announcer.enrol(UID, &a, "").unwrap();
    assert_eq!(announcer.list(), [(UID.into(), String::new())]);
    drop(inside);
}

#[test]
fn guard_without_its_lookup_program_is_not_litter() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    drop(agent);
    let folder = scratch.bpffs().join(format!("v{}/pods/{UID}", ztunnel_ebpf::LAYOUT_VERSION));
    for lost in [scratch.path("run/pods").join(format!("{UID}.json")), folder.join("link")] {
        std::fs::remove_file(lost).unwrap();
    }
    let agent = Agent::start(&scratch);
    look_at_everything(&agent);
    assert!(folder.exists(), "an agent was ended while it put the program back");
    assert_eq!(agent.host.capture.cookies().unwrap(), [a.netns.cookie()]);
    agent.announcer().enrol(UID, &a, "").unwrap();
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);
}

#[test]
fn former_layout_stays_while_it_alone_holds_a_pod_of_which_nothing_is_known() {
    let scratch = Scratch::new();
    let (a, b) = pair();
    pod_network::prepare(&a.netns, &pod_network::Needs { addresses: &[A.into()], dns: true }).unwrap();
    let listeners = ListenerSet::open(&a.netns, true).unwrap();
    let outbound = listeners.outbound.try_clone().unwrap();
    let former = Former::new(&scratch, &a, &b.netns, &listeners);
    let captured = |when: &str| {
        connect(&a, at(B, PORT)).unwrap_or_else(|error| panic!("{when}: {error}"));
        assert_eq!(accept(&outbound).expect(when).0, at(B, PORT), "{when}");
    };
    captured("no agent");
    // Its namespace is not to be found, and then it is.
    let agent = Agent::start(&scratch);
    look_at_everything(&agent);
    assert_eq!((agent.announcer().list(), agent.host.capture.former_layouts()), (Vec::new(), vec![2]));
    captured("nobody knows of it");
    let inside = process_in(&a);
    let announcer = agent.announcer();
    eventually(|| (!announcer.list().is_empty()).then_some(())).expect("it is looked for again");
    look_at_everything(&agent);
    assert_eq!((agent.announcer().list().len(), agent.host.capture.former_layouts()), (1, vec![2]));
    captured("its UID is known");
    drop((outbound, listeners));
    eventually(|| announcer.enrol("uid/a", &a, "").ok()).expect("it is announced, and nobody has its ports");
    eventually(|| agent.host.capture.former_layouts().is_empty().then_some(())).expect("nothing depends on it now");
    assert!(!former.folder.exists());
    assert_eq!(agent.announcer().list(), [("uid/a".into(), String::new())]);
    drop(inside);
}

#[test]
fn restarted_agent_opens_listeners_when_the_proxy_died_too() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    drop(agent);
    connect(&a, at(B, PORT)).expect_err("no listener: nothing passes");

    let inside = process_in(&a);
    let agent = Agent::start(&scratch);
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT));
    drop(inside);
}

#[test]
fn pod_whose_namespace_vanished_while_no_agent_ran_is_buried() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    drop(agent);
    drop(a);
    // The kernel takes namespaces down in the background, and the agent looks again and again.
    let agent = Agent::start(&scratch);
    let announcer = agent.announcer();
    eventually(|| announcer.list().is_empty().then_some(())).unwrap_or_else(|| panic!("{:?}", announcer.list()));
    // What a pod leaves is taken away beside everything else.
    let left = || (agent.host.capture.cookies().unwrap(), agent.host.capture.held().unwrap());
    let is_clean = || left().0.is_empty() && left().1.is_empty();
    eventually(|| is_clean().then_some(())).unwrap_or_else(|| panic!("{:?} is left", left()));
}

#[test]
fn end_of_a_former_sandbox_leaves_the_present_one_enrolled() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (old, new) = pair();
    let announcer = agent.announcer();
    announcer.enrol_in(UID, &old, "", "old").unwrap();
    // The pod gets another sandbox: same UID, other namespace and address.
    announcer.enrol_in(UID, &new, "", "new").unwrap();
    announcer.withdraw_from(UID, "old").expect("nothing to do is no error");
    assert_eq!(announcer.list(), [(UID.into(), String::new())]);
    assert_eq!(agent.host.capture.cookies().unwrap(), [new.netns.cookie()]);
    drop(agent);

    // A restarted agent knows which sandbox it is.
    let inside = process_in(&new);
    let agent = Agent::start(&scratch);
    let announcer = agent.announcer();
    announcer.withdraw_from(UID, "old").unwrap();
    assert_eq!(agent.host.capture.cookies().unwrap(), [new.netns.cookie()]);
    announcer.withdraw_from(UID, "new").unwrap();
    assert_eq!(agent.host.capture.cookies().unwrap(), Vec::<u64>::new());
    drop(inside);
}

#[test]
fn end_of_a_former_sandbox_leaves_a_pod_that_was_found_enrolled() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    let announcer = agent.announcer();
    announcer.enrol(UID, &a, "").unwrap();
    // Its runtime clears away what was before the node's reboot, while the pod runs.
    let inside = process_in(&a);
    announcer.withdraw_from(UID, "of before").expect("nothing to do is no error");
    assert_eq!(agent.host.capture.cookies().unwrap(), [a.netns.cookie()]);
    // It is its own that ends when nothing runs in it any more.
    drop(inside);
    announcer.withdraw_from(UID, "its own").unwrap();
    assert_eq!(agent.host.capture.cookies().unwrap(), Vec::<u64>::new());
}

#[test]
fn pod_announced_again_before_the_proxy_is_back_stays_captured() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    drop(agent);

    let inside = process_in(&a);
    let agent = Agent::start(&scratch);
    let announcer = agent.announcer();
    let error = announcer.enrol(UID, &a, "").unwrap_err();
    assert!(error.contains("has not returned"), "{error}");
    let mut elsewhere = wire(UID, A);
    elsewhere.service_account = "other".into();
    let request = node::EnrolPod { pod: Some(elsewhere), ..Default::default() };
    ok(announcer.ask(pod_request::Kind::Enrol(request), &[a.netns.as_fd()])).expect_err("nor as somebody else");
    assert_eq!(agent.host.capture.cookies().unwrap(), [a.netns.cookie()]);
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT), "captured all the time");

    let kept = listeners.iter().map(|socket| socket.try_clone().unwrap()).collect();
    let proxy = agent.proxy(vec![(UID, kept)]);
    proxy.added();
    proxy.snapshot();
    announcer.enrol(UID, &a, "").unwrap();
    assert_eq!(announcer.list(), [(UID.into(), String::new())]);
    drop(inside);
}

#[test]
fn enrolled_pod_that_lost_something_is_mended_when_it_is_announced_again() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    let announcer = agent.announcer();
    announcer.enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    let before = Before { fwmark_accept: false, fwmark_reflect: false, fwmark_reflect_v6: None };
    pod_network::restore(&a.netns, before).unwrap();
    agent.host.capture.unpin_pod(UID).unwrap();
    agent.host.capture.release(a.netns.cookie()).unwrap();
    announcer.enrol(UID, &a, "").unwrap();
    assert_eq!(announcer.list(), [(UID.into(), String::new())]);
    // By the announcement, or by the agent itself, if it came first.
    let found = |what| agent.host.drift.get(what) > 0;
    assert!(found(Drift::Rule) && (found(Drift::Program) || found(Drift::Guard)), "both were missing");
    assert_eq!(agent.host.capture.cookies().unwrap(), [a.netns.cookie()]);
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT), "with the listeners that the proxy has");
}

#[test]
fn pod_whose_path_vanished_is_kept_while_a_process_lives_in_it() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    let (named, _other) = (process_in(&a), process_in(&a));
    agent.announcer().enrol(UID, &a, &named.path()).unwrap();
    drop(named);
    // When a pod that is gone was withdrawn, every pod has been looked at.
    let looked_after = |agent: &Agent| {
        let dying = process_in(&b);
        let announcer = agent.announcer();
        announcer.enrol("uid-b", &b, &dying.path()).unwrap();
        drop(dying);
        eventually(|| announcer.list().iter().all(|(uid, _)| uid != "uid-b").then_some(())).expect("a gone pod goes");
        announcer.list()
    };
    assert_eq!(looked_after(&agent), [(UID.into(), String::new())]);
    drop(agent);
    let agent = Agent::start(&scratch);
    assert_eq!(looked_after(&agent), [(UID.into(), String::new())]);
    assert!(agent.host.capture.cookies().unwrap().contains(&a.netns.cookie()));
}

/// An enrolled pod whose listeners a proxy has, and an agent that was restarted and does not find its namespace.
pub(super) fn stranded(scratch: &Scratch, a: &TestPod) -> (Agent, Vec<OwnedFd>) {
    let agent = Agent::start(scratch);
    agent.announcer().enrol(UID, a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    drop(agent);
    let agent = Agent::start(scratch);
    let (uid, reason) = agent.announcer().list().remove(0);
    assert_eq!(uid, UID);
    assert!(reason.contains("not found"), "{reason}");
    (agent, listeners)
}

#[test]
fn stranded_pod_stays_with_its_proxy_and_is_adopted_when_it_can_be() {
    let scratch = Scratch::new();
    let (a, _b) = pair();
    let (agent, listeners) = stranded(&scratch, &a);
    let kept = listeners.iter().map(|socket| socket.try_clone().unwrap()).collect();
    let proxy = agent.proxy(vec![(UID, kept)]);
    assert_eq!(proxy.added().0, UID, "else the proxy would drop it");
    proxy.snapshot();
    assert_ne!(agent.announcer().list()[0].1, "");

    let inside = process_in(&a);
    let announcer = agent.announcer();
    eventually(|| announcer.list()[0].1.is_empty().then_some(())).expect("tried again");
    proxy.added();
    proxy.sockets(UID, SocketKind::UpstreamV4, 1).unwrap();
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT));
    drop(inside);
}

#[test]
fn withdrawn_stranded_pod_gets_its_namespace_back_as_it_was() {
    let scratch = Scratch::new();
    let (a, b) = pair();
    let application = listen(&b, PORT);
    let before = sysctls(&a);
    let (agent, listeners) = stranded(&scratch, &a);
    assert_ne!(sysctls(&a), before);
    let proxy = agent.proxy(Vec::new());
    proxy.snapshot();
    let inside = process_in(&a);
    let announcer = agent.announcer();
    let withdrawing = std::thread::spawn(move || announcer.withdraw(UID));
    let (agent_message::Kind::PodRemoved(removed), _) = proxy.hear() else { panic!("the pod is withdrawn") };
    assert_eq!(removed.pod_uid, UID);
    drop(listeners);
    proxy.ack(UID);
    withdrawing.join().unwrap().unwrap();
    assert!(unprepared(&a));
    assert_eq!(sysctls(&a), before);
    assert_eq!(std::fs::read_dir(agent.run.join("pods")).unwrap().count(), 0);
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(application.accept().unwrap().1.ip(), A);
    drop(inside);
}

#[test]
fn stranded_pod_that_is_announced_again_is_adopted_and_remembers_what_was_before() {
    let scratch = Scratch::new();
    let (a, _b) = pair();
    let before = sysctls(&a);
    let (agent, listeners) = stranded(&scratch, &a);
    let announcer = agent.announcer();
    let error = announcer.enrol(UID, &a, "").unwrap_err();
    assert!(error.contains("has not returned"), "{error}");
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]).unwrap().0, at(B, PORT), "captured all the time");
    drop(listeners);
    eventually(|| announcer.enrol(UID, &a, "").ok()).expect("nobody has the ports any more");
    announcer.withdraw(UID).unwrap();
    assert_eq!(sysctls(&a), before);
}

#[test]
fn namespaces_of_no_pod_are_removed_from_the_map() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    agent.announcer().enrol(UID, &a, "").unwrap();
    let stale = 0x7777_0000_0001;
    agent.host.capture.enrol(stale, ztunnel_ebpf::PodEntry::new(&[A.into()], 0, 0).unwrap()).unwrap();
    drop(agent);
    // Not found any more, but captured: it stays in the map.
    let agent = Agent::start(&scratch);
    assert_eq!(agent.host.capture.cookies().unwrap(), [a.netns.cookie()]);
    drop(agent);
    // While a pod is not known for sure, nothing is removed.
    let file = std::fs::read_dir(scratch.path("run/pods")).unwrap().next().unwrap().unwrap().path();
    std::fs::write(file, "{").unwrap();
    let agent = Agent::start(&scratch);
    assert_eq!(agent.host.capture.cookies().unwrap(), [a.netns.cookie()]);
}

#[test]
fn pod_whose_withdrawal_was_cut_short_is_withdrawn_by_the_next_agent() {
    let scratch = Scratch::new();
    let (a, b) = pair();
    let application = listen(&b, PORT);
    let before = sysctls(&a);
    let agent = Agent::start(&scratch);
    agent.announcer().enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    let announcer = agent.announcer();
    let withdrawing = std::thread::spawn(move || announcer.withdraw(UID));
    assert!(matches!(proxy.hear().0, agent_message::Kind::PodRemoved(_)));
    // The proxy has not let go of it when the agent is killed.
    drop(agent);
    let _ = withdrawing.join();
    assert_ne!(sysctls(&a), before, "not finished");
    drop((proxy, listeners));

    let inside = process_in(&a);
    let agent = Agent::start(&scratch);
    let announcer = agent.announcer();
    assert!(announcer.list().iter().all(|(_, reason)| !reason.is_empty()), "not taken over");
    eventually(|| announcer.list().is_empty().then_some(())).expect("finished");
    assert!(unprepared(&a));
    assert_eq!(sysctls(&a), before);
    assert_eq!(agent.host.capture.cookies().unwrap(), Vec::<u64>::new());
    assert_eq!(std::fs::read_dir(agent.run.join("pods")).unwrap().count(), 0);
    connect(&a, at(B, PORT)).unwrap();
    application.accept().unwrap();
    drop(inside);
}

#[test]
fn pod_that_is_being_withdrawn_is_enrolled_anew_when_it_is_announced_again() {
    let scratch = Scratch::new();
    let (a, _b) = pair();
    let agent = Agent::start(&scratch);
    agent.announcer().enrol(UID, &a, "").unwrap();
    drop(agent);
    let file = std::fs::read_dir(scratch.path("run/pods")).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"leaving\":false", "\"leaving\":true")).unwrap();
    let inside = process_in(&a);
    let agent = Agent::start(&scratch);
    agent.announcer().enrol(UID, &a, "").unwrap();
    assert_eq!(agent.announcer().list(), [(UID.into(), String::new())]);
    assert!(std::fs::read_to_string(&file).unwrap().contains("\"leaving\":false"));
    drop(inside);
}

#[test]
fn failed_enrolment_that_cannot_be_taken_back_is_not_forgotten() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    // A folder in the place of the pod's file: the first step of enrolling fails, and the last one of undoing it.
    let file = agent.run.join("pods").join(format!("{UID}.json"));
    std::fs::create_dir(&file).unwrap();
    let announcer = agent.announcer();
    announcer.enrol(UID, &a, "").unwrap_err();
    let (uid, reason) = announcer.list().remove(0);
    assert_eq!(uid, UID);
    assert!(reason.contains("not wholly taken back") || reason.contains("not wholly released"), "{reason}");
    std::fs::remove_dir(&file).unwrap();
    eventually(|| announcer.list().is_empty().then_some(())).expect("tried again");
    assert!(unprepared(&a));
    announcer.enrol(UID, &a, "").unwrap();
}

/// The sysctls that enrolling changes.
fn sysctls(pod: &TestPod) -> [String; 2] {
    let names = ["tcp_fwmark_accept", "fwmark_reflect"];
    let read = |name| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap();
    pod.netns.run(|| names.map(read)).unwrap()
}
