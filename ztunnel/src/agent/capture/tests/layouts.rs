//! Layouts of other versions: what an agent of version 1 left stays in force until it is removed.

use super::*;

/// The programs of layout 1, as they were released.
static OBJECT: &[u8] = aya::include_bytes_aligned!("layout1.bpf.o");

/// What an agent of version 1 leaves of an enrolled pod: its programs, attached and pinned, and their maps.
fn version_one(scratch: &Scratch, pod: &TestPod, listeners: &ListenerSet) {
    let root = scratch.bpffs().join("v1");
    let (node, folder) = (root.join("node"), root.join("pods").join(folder_name("uid/a")));
    for path in [&node, &folder] {
        fs::create_dir_all(path).unwrap();
    }
    let mut loader = aya::EbpfLoader::new();
    loader.override_global(abi::GLOBAL_LOG_LEVEL, &0_u8, true);
    for map in [abi::MAP_PODS, abi::MAP_EXEMPT, abi::MAP_COUNTERS, abi::MAP_LOGS] {
        loader.map_pin_path(map, node.join(map));
    }
    for map in [abi::MAP_SOCKETS, abi::MAP_POD] {
        loader.map_pin_path(map, folder.join(map));
    }
    let mut object = loader.load(OBJECT).unwrap();
    // Four IPv4 addresses, flags, and a word in reserve.
    let mut entry = [0; 24];
    entry[..4].copy_from_slice(&A.octets());
    let mut map: aya::maps::Array<MapData, [u8; 24]> = take(&mut object, abi::MAP_POD).unwrap();
    map.set(0, entry, 0).unwrap();
    let mut sockets: aya::maps::SockMap<MapData> = take(&mut object, abi::MAP_SOCKETS).unwrap();
    sockets.set(abi::SOCKET_OUTBOUND, &Raw(listeners.outbound.as_fd()), 0).unwrap();
    let lookup: &mut aya::programs::SkLookup = object.program_mut(abi::PROGRAM_LOOKUP).unwrap().try_into().unwrap();
    lookup.load().unwrap();
    let id = lookup.attach(pod.netns.as_fd()).unwrap();
    loader::pin(lookup.take_link(id).unwrap().into(), &folder.join("link")).unwrap();
    let mut pods: Pods<24> = take(&mut object, abi::MAP_PODS).unwrap();
    pods.insert(pod.netns.cookie(), entry, 0).unwrap();
    cgroup::connect_hooks(&mut object, &node, &cgroup_root()).unwrap();
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
    version_one(&scratch, &a, &listeners);
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
    connect(&a.netns, at(B6, PORT)).unwrap();
    assert!(accept(&outbound).is_some(), "IPv6, which the former one left alone");
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
