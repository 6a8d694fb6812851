//! Nothing is left of a pod that was withdrawn: not in its namespace, not on the node, not in the agent.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::TryStreamExt as _;
use rtnetlink::{IpVersion, RouteMessageBuilder};

use super::sock_diag;
use super::sys;
use super::testing::{configure, node_and_pod};
use super::*;

const ROUNDS: usize = 100;
const CHILD: &str = "CULVERT_TEST_LEFTOVERS";

/// In a process of its own: descriptors are counted.
#[test]
fn hundred_rounds_leave_nothing_behind() {
    if std::env::var_os(CHILD).is_some() {
        return in_a_process_of_its_own();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "agent::tests::leftovers::hundred_rounds_leave_nothing_behind", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
}

fn in_a_process_of_its_own() {
    let scratch = Scratch::new();
    let (node, a) = node_and_pod();
    let agent = node.netns.run(|| Agent::start(&scratch)).unwrap();
    let announcer = agent.announcer();
    let proxy = agent.proxy(Vec::new());
    proxy.snapshot();
    let round = || {
        announcer.enrol(UID, &a, "").unwrap();
        let (_, listeners) = proxy.added();
        let objects = sys::pinned_objects(&scratch.bpffs().join(format!("v{}/pods", ztunnel_ebpf::LAYOUT_VERSION)));
        assert!(objects.len() >= 5, "programs, links and maps: {objects:?}");
        std::thread::scope(|scope| {
            let withdrawing = scope.spawn(|| announcer.withdraw(UID).unwrap());
            assert!(matches!(proxy.hear().0, agent_message::Kind::PodRemoved(_)));
            drop(listeners);
            proxy.ack(UID);
            withdrawing.join().unwrap();
        });
        objects
    };
    for (pod, device) in [(&a, "eth0"), (&node, "host0")] {
        eventually(|| has_settled(pod, device).then_some(())).expect("the kernel gives it a link-local address");
    }
    // What is made once and kept: threads, their descriptors.
    let mut objects: BTreeSet<sys::Object> = round().into_iter().collect();
    let before = (traces(&a, "eth0"), traces(&node, "host0"), tree(&scratch.bpffs()));
    let open = descriptors();
    let everything = || sys::objects_of(&scratch.bpffs().join(format!("v{}", ztunnel_ebpf::LAYOUT_VERSION)));
    // The kernel frees what the first round had in the background.
    eventually(|| (!objects.iter().any(sys::exists)).then_some(()))
        .unwrap_or_else(|| panic!("still in the kernel: {objects:?}"));
    let kernel = everything();
    assert!(kernel.len() >= 8, "connect hooks, their links, the node's maps: {kernel:?}");
    for _ in 0..ROUNDS {
        objects.extend(round());
    }
    assert!(objects.len() > ROUNDS);
    let after = (traces(&a, "eth0"), traces(&node, "host0"), tree(&scratch.bpffs()));
    assert!(after == before, "before: {before:#?}\nafter: {after:#?}");
    eventually(|| (descriptors() <= open).then_some(()))
        .unwrap_or_else(|| panic!("{open} descriptors before, {} after", descriptors()));
    // The kernel frees them in the background.
    eventually(|| {
        objects.retain(sys::exists);
        objects.is_empty().then_some(())
    })
    .unwrap_or_else(|| panic!("still in the kernel: {objects:?}"));
    // Also what was never pinned, wherever in the machine it is.
    eventually(|| (everything() == kernel).then_some(()))
        .unwrap_or_else(|| panic!("before: {kernel:?}\nafter: {:?}", everything()));
    drop(a);
    eventually(|| (!has_device(&node, "host0")).then_some(())).expect("nobody holds the pod's namespace");
}

fn has_device(pod: &TestPod, name: &str) -> bool {
    let text = pod.netns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap()).unwrap();
    text.lines().any(|line| line.split_once(':').is_some_and(|(device, _)| device.trim() == name))
}

/// Whether a device has its link-local address, and no other device of the link was found to have it.
fn has_settled(pod: &TestPod, device: &str) -> bool {
    const TENTATIVE: u32 = 0x40;
    let text = pod.netns.run(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap()).unwrap();
    let mut lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    lines.any(|words| {
        words[0].starts_with("fe80")
            && words[5] == device
            && u32::from_str_radix(words[4], 16).unwrap() & TENTATIVE == 0
    })
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn tree(folder: &Path) -> BTreeSet<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().filter_map(Result::ok);
    entries
        .flat_map(|entry| {
            let below = if entry.path().is_dir() { tree(&entry.path()) } else { BTreeSet::new() };
            below.into_iter().chain([entry.path()])
        })
        .collect()
}

/// Everything that enrolling may change in a namespace: rules, routes of all tables, sysctls, queueing disciplines, TCX.
fn traces(pod: &TestPod, device: &str) -> BTreeMap<&'static str, String> {
    let mut found = BTreeMap::new();
    let index = std::sync::Mutex::new(0);
    let dump = std::sync::Mutex::new(String::new());
    configure(&pod.netns, async |handle| {
        let mut text = String::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            let rules: Vec<_> = handle.rule().get(version).execute().try_collect().await.unwrap();
            text += &format!("{rules:#?}");
        }
        let v4: Vec<_> =
            handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute().try_collect().await.unwrap();
        let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
        let mut v6: Vec<_> = handle.route().get(v6).execute().try_collect().await.unwrap();
        for route in &mut v6 {
            // Its times of use change.
            use rtnetlink::packet_route::route::RouteAttribute;
            route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
        }
        text += &format!("{v4:#?}{v6:#?}");
        let disciplines: Vec<_> = handle.qdisc().get().execute().try_collect().await.unwrap();
        text += &format!(
            "{:?}",
            disciplines.iter().map(|found| (&found.header, found.attributes.first())).collect::<Vec<_>>()
        );
        *index.lock().unwrap() = super::testing::index_of(&handle, device).await;
        *dump.lock().unwrap() = text;
    });
    found.insert("rules, routes, disciplines", dump.into_inner().unwrap());
    let index = index.into_inner().unwrap();
    let names = ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"];
    let read = |name| std::fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap();
    found.insert("sysctls", pod.netns.run(|| names.map(read).concat()).unwrap());
    let attached =
        pod.netns.run(|| [sys::TCX_INGRESS, sys::TCX_EGRESS].map(|side| sys::attached_to_device(index, side)));
    found.insert("tcx", format!("{:?}", attached.unwrap()));
    found
}

#[test]
fn captured_connection_of_a_withdrawn_pod_ends_and_sends_nothing_in_clear() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    let announcer = agent.announcer();
    announcer.enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    let (_, listeners) = proxy.added();
    proxy.snapshot();
    let mut client = connect(&a, at(B, PORT)).unwrap();
    let accepted = TcpListener::from(listeners[0].try_clone().unwrap());
    let (accepted, _) = eventually(|| accepted.accept().ok()).unwrap();
    // What the proxy does not read waits in the client's socket, and would be sent again once the rules are gone.
    client.set_nonblocking(true).unwrap();
    while client.write(&[7; 65536]).is_ok() {}
    let marked = |pod: &TestPod| {
        let all = sock_diag::connections(&pod.netns).unwrap();
        all.into_iter().filter(|connection| connection.mark == ztunnel_ebpf::MARK_OUTBOUND).count()
    };
    assert_eq!(marked(&a), 2, "both ends are in the pod");
    let received = || segments_received(&b);
    let before = received();
    let withdrawing = std::thread::spawn(move || announcer.withdraw(UID));
    assert!(matches!(proxy.hear().0, agent_message::Kind::PodRemoved(_)));
    drop(listeners);
    proxy.ack(UID);
    withdrawing.join().unwrap().unwrap();
    assert_eq!(marked(&a), 0);
    let error = client.write(&[7]).unwrap_err();
    assert!(matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::ECONNRESET | libc::EPIPE)), "{error}");
    assert_eq!(received(), before, "no segment of it reached the peer");
    drop(accepted);
}

/// TCP segments that a namespace received.
fn segments_received(pod: &TestPod) -> u64 {
    let text = pod.netns.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap()).unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|name| name == "InSegs").unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

#[test]
fn pod_that_cannot_be_withdrawn_wholly_is_tried_again() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    let announcer = agent.announcer();
    announcer.enrol(UID, &a, "").unwrap();
    // A folder in the place of the pod's file: the last step fails.
    let file = std::fs::read_dir(agent.run.join("pods")).unwrap().next().unwrap().unwrap().path();
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    announcer.withdraw(UID).unwrap_err();
    let (uid, reason) = announcer.list().remove(0);
    assert_eq!(uid, UID);
    assert!(reason.contains("not wholly released"), "{reason}");
    std::fs::remove_dir(&file).unwrap();
    eventually(|| announcer.list().is_empty().then_some(())).expect("tried again");
    assert!(unprepared(&a));
    assert_eq!(agent.host.capture.cookies().unwrap(), Vec::<u64>::new());
}
