//! Layouts of other versions: what an agent of version 1 left stays in force until it is removed.

use super::*;

/// Plays what an agent of version 1 leaves: folders, and the names of maps and links in them.
///
/// The maps and programs are those of this version, which capture the same; of a pod's entry in the map of pods, which is
/// shorter there, nothing is asked.
fn version_one(scratch: &Scratch, pod: &TestPod, host: &TestPod, listeners: &ListenerSet) -> NodeCapture {
    let elsewhere = scratch.bpffs().join("played");
    fs::create_dir(&elsewhere).unwrap();
    let node = NodeCapture::open(&elsewhere, &cgroup_root(), None, false).unwrap();
    node.set_routes(pod.netns.cookie(), &everywhere()).unwrap();
    let entry = entry(0);
    let attachment = Attachment { uid: "uid/a", netns: &pod.netns, entry, listeners: listeners.borrow(), guard: None };
    host.netns.run(|| node.attach_pod(attachment)).unwrap().unwrap();
    fs::rename(elsewhere.join("v2"), scratch.bpffs().join("v1")).unwrap();
    node
}

#[test]
fn pods_of_layout_one_are_captured_all_the_time() {
    let scratch = Scratch::new();
    let (a, b) = pair();
    pod_network::prepare(&a.netns, &NEEDS).unwrap();
    let listeners = ListenerSet::open(&a.netns, true).unwrap();
    let application = listen(&b.netns, PORT);
    let outbound = TcpListener::from(listeners.outbound.try_clone().unwrap());
    let captured = |when: &str| {
        connect(&a.netns, at(B, PORT)).unwrap();
        assert!(accept(&outbound).is_some(), "{when}");
        assert!(accept_within(&application, Duration::ZERO).is_none(), "{when}");
    };
    drop(version_one(&scratch, &a, &b, &listeners));
    captured("no agent");

    let node = NodeCapture::open(&scratch.bpffs(), &cgroup_root(), None, false).unwrap();
    assert_eq!(node.former_layouts(), [1]);
    assert!(node.adopt_pod("uid/a").is_none(), "nothing of this layout yet");
    captured("this version's hooks stand beside, and know no pod");
    let exempt = |socket: &Socket| node.exempt(socket.as_fd()).map_err(io::Error::other);
    connect_with(&a.netns, at(B, PORT), exempt).unwrap();
    assert!(accept(&application).is_some(), "the former hooks leave the proxy's sockets alone too");

    node.set_routes(a.netns.cookie(), &everywhere()).unwrap();
    let index = pod_network::find_interface(&a.netns, A.into(), &b.netns).unwrap().host_end.unwrap();
    let guard = Guard::HostEnd { index };
    attach(&node, &a.netns, &b.netns, FLAG_DNS, &listeners, guard);
    captured("both");
    node.remove_layout(1).unwrap();
    captured("this version alone");
    assert_eq!(node.former_layouts(), Vec::<u32>::new());
    assert!(!scratch.bpffs().join("v1").exists());
    assert_eq!(node.counter(Counter::GuardDropped).unwrap(), 0);
}

#[test]
fn own_layout_is_no_former_one() {
    let world = World::new();
    assert_eq!(world.node.former_layouts(), Vec::<u32>::new());
    world.node.remove_layout(abi::LAYOUT_VERSION).unwrap();
    connect(&world.a.netns, at(B, PORT)).unwrap();
    assert_eq!(world.counter(Counter::Captured), 1);
}
