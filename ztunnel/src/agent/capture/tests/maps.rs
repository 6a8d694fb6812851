//! Maps and their pins: programs and pins that do not belong together are found, and put together again.

use super::*;

/// The id of the map that is pinned in the pod's folder, or in the node's.
fn id(folder: &Path, name: &'static str) -> u32 {
    pins::ids(folder, &[name]).unwrap()[name]
}

fn verify(world: &World) -> Result<(), CaptureError> {
    world.b.netns.run(|| world.capture.verify(&world.a.netns, entry(FLAG_DNS), Some(world.guard))).unwrap()
}

/// Puts another map of the same kind in the place of one that is pinned.
fn replace(folder: &Path, name: &'static str) {
    let path = folder.join(name);
    fs::remove_file(&path).unwrap();
    let mut object = aya::EbpfLoader::new().load(include_bytes!(env!("CULVERT_EBPF_OBJECT"))).unwrap();
    object.take_map(name).unwrap().pin(&path).unwrap();
}

#[test]
fn pins_of_a_pods_maps_come_back_with_the_maps_that_its_programs_use() {
    let world = World::new();
    let folder = world.node.pod_folder("uid/a");
    for name in [abi::MAP_POD, abi::MAP_SOCKETS, abi::MAP_OLDER] {
        let before = id(&folder, name);
        fs::remove_file(folder.join(name)).unwrap();
        assert!(verify(&world).unwrap_err().is_absence(), "{name} is gone");
        assert!(world.capture.mend_pins().unwrap());
        assert_eq!(id(&folder, name), before);
        verify(&world).unwrap();
        replace(&folder, name);
        assert!(verify(&world).unwrap_err().is_absence(), "{name} is another");
        assert!(world.capture.mend_pins().unwrap());
        assert_eq!(id(&folder, name), before);
        verify(&world).unwrap();
    }
    assert!(!world.capture.mend_pins().unwrap(), "nothing to do");
}

#[test]
fn pins_of_the_nodes_maps_come_back_whether_the_agent_lives_or_is_started_again() {
    let world = World::new();
    let folder = world.node.node_folder();
    for name in [abi::MAP_PODS, abi::MAP_EXEMPT, abi::MAP_COUNTERS] {
        let before = id(&folder, name);
        fs::remove_file(folder.join(name)).unwrap();
        assert!(world.node.mend_node().unwrap());
        assert_eq!(id(&folder, name), before);
        replace(&folder, name);
        let next = NodeCapture::open(&world.scratch.bpffs(), &cgroup_root(), None, false).unwrap();
        assert_eq!(id(&folder, name), before, "what the attached programs use");
        assert_eq!(next.cookies().unwrap(), [world.a.netns.cookie()]);
    }
    assert!(!world.node.mend_node().unwrap());
    verify(&world).unwrap();
    connect(&world.a.netns, at(B, PORT)).unwrap();
    assert_eq!(world.counter(Counter::Captured), 1);
}

#[test]
fn program_that_uses_another_map_than_its_neighbours_is_attached_anew() {
    let world = World::new();
    let folder = world.node.pod_folder("uid/a");
    // A lookup program with maps of its own in the place of the pod's.
    let own = fs::read_dir(&folder).unwrap().count();
    for name in [abi::MAP_POD, abi::MAP_SOCKETS] {
        replace(&folder, name);
    }
    former::detach(&folder.join("link")).unwrap();
    fs::remove_file(folder.join("link")).unwrap();
    let capture = attach(&world.node, &world.a.netns, &world.b.netns, FLAG_DNS, &world.listeners, world.guard);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), own);
    capture.verify_listeners(world.listeners.borrow()).unwrap();
    connect(&world.a.netns, at(B, PORT)).unwrap();
    assert_eq!(world.accepted(&world.listeners.outbound).0, at(B, PORT));
}

#[test]
fn listeners_are_known_by_their_cookies() {
    let world = World::new();
    world.capture.verify_listeners(world.listeners.borrow()).unwrap();
    let sockets = crate::agent::capture::sockets::SocketMap::open(&world.node.pod_folder("uid/a")).unwrap();
    let cookie = |socket: &OwnedFd| socket2::SockRef::from(socket).cookie().unwrap();
    assert_eq!(sockets.cookie(abi::SOCKET_OUTBOUND).unwrap(), Some(cookie(&world.listeners.outbound)));
    assert_eq!(sockets.cookie(7).unwrap(), None);
    let own = listen(&world.a.netns, PORT);
    let spoil: [&dyn Fn(); 3] = [
        &|| sockets.clear(abi::SOCKET_INBOUND_HBONE).unwrap(),
        &|| sockets.set(abi::SOCKET_INBOUND_PLAINTEXT, own.as_fd()).unwrap(),
        &|| lock(&world.node.exempt).remove(&Raw(world.listeners.outbound.as_fd())).unwrap(),
    ];
    for spoil in spoil {
        spoil();
        assert!(world.capture.verify_listeners(world.listeners.borrow()).unwrap_err().is_absence());
        world.capture.replace_listeners(world.listeners.borrow()).unwrap();
        world.capture.verify_listeners(world.listeners.borrow()).unwrap();
    }
    let without = crate::agent::capture::Listeners { dns_udp: None, dns_tcp: None, ..world.listeners.borrow() };
    assert!(world.capture.verify_listeners(without).is_err(), "those for DNS are there and should not be");
    world.capture.replace_listeners(without).unwrap();
    world.capture.verify_listeners(without).unwrap();
}
