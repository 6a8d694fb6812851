//! Layouts of other versions: what an agent of the version before left stays in force until it is removed.

use std::io::{Read as _, Write as _};

use super::*;

/// The programs of layout 2, as they were released.
static OBJECT: &[u8] = aya::include_bytes_aligned!("layout2.bpf.o");

/// What an agent of layout 2 leaves of an enrolled pod: its programs, attached and pinned, and their maps.
pub(in crate::agent) struct Former {
    node: PathBuf,
    pub(in crate::agent) folder: PathBuf,
}

impl Former {
    pub(in crate::agent) fn new(scratch: &Scratch, pod: &TestPod, host: &Netns, listeners: &ListenerSet) -> Self {
        let root = scratch.bpffs().join("v2");
        let (node, folder) = (root.join("node"), root.join("pods").join(folder_name("uid/a")));
        for path in [&node, &folder] {
            fs::create_dir_all(path).unwrap();
        }
        let mut loader = aya::EbpfLoader::new();
        loader.override_global(abi::GLOBAL_LOG_LEVEL, &0_u8, true);
        for map in loader::NODE_MAPS {
            loader.map_pin_path(map, node.join(map));
        }
        for map in [abi::MAP_SOCKETS, abi::MAP_POD, abi::MAP_OLDER] {
            loader.map_pin_path(map, folder.join(map));
        }
        let mut object = loader.load(OBJECT).unwrap();
        // The same entry; what is the interface now was in reserve.
        let mut map: aya::maps::Array<MapData, [u8; PodEntry::SIZE]> = take(&mut object, abi::MAP_POD).unwrap();
        map.set(0, entry(FLAG_DNS).to_bytes(), 0).unwrap();
        // Values of four bytes.
        let mut sockets: aya::maps::SockMap<MapData> = take(&mut object, abi::MAP_SOCKETS).unwrap();
        sockets.set(abi::SOCKET_OUTBOUND, &Raw(listeners.outbound.as_fd()), 0).unwrap();
        let lookup: &mut aya::programs::SkLookup = object.program_mut(abi::PROGRAM_LOOKUP).unwrap().try_into().unwrap();
        lookup.load().unwrap();
        let id = lookup.attach(pod.netns.as_fd()).unwrap();
        loader::pin(lookup.take_link(id).unwrap().into(), &folder.join("link")).unwrap();
        let mut pods: Pods = take(&mut object, abi::MAP_PODS).unwrap();
        pods.insert(pod.netns.cookie(), entry(FLAG_DNS).to_bytes(), 0).unwrap();
        let mut routes = Routes::new(take(&mut object, abi::MAP_ROUTES).unwrap()).unwrap();
        routes.set(pod.netns.cookie(), &everywhere()).unwrap();
        cgroup::connect_hooks(&mut object, &node, &cgroup_root()).unwrap();
        let guard = guard(pod, host);
        host.run(|| guard::attach(&mut object, &folder, guard, &pod.netns)).unwrap().unwrap();
        Self { node, folder }
    }

    /// As its agent exempts a socket of the proxy.
    fn exempt(&self, socket: &impl std::os::fd::AsFd) {
        let mut exempt: SkStorage<MapData, u32> = loader::open_map(&self.node, abi::MAP_EXEMPT).unwrap();
        exempt.insert(&Raw(socket.as_fd()), 1, 0).unwrap();
    }

    /// As its agent notes a connection from before the enrolment.
    fn note_older(&self, socket: &impl std::os::fd::AsFd) {
        let mut older: HashMap<MapData, u64, u32> = loader::open_map(&self.folder, abi::MAP_OLDER).unwrap();
        older.insert(cookie(socket), 1, 0).unwrap();
    }
}

fn guard(pod: &TestPod, host: &Netns) -> Guard {
    let index = pod_network::find_interface(&pod.netns, A.into(), host).unwrap().host_end.unwrap();
    Guard::HostEnd { index }
}

fn cookie(socket: &impl std::os::fd::AsFd) -> u64 {
    socket2::SockRef::from(&socket.as_fd()).cookie().unwrap()
}

/// A fresh socket in a pod's namespace.
fn fresh(pod: &TestPod) -> Socket {
    pod.netns.run(|| Socket::new(Domain::IPV4, Type::STREAM, None)).unwrap().unwrap()
}

#[test]
fn pods_of_the_layout_before_are_captured_all_the_time() {
    let scratch = Scratch::new();
    let (a, b) = pair();
    pod_network::prepare(&a.netns, &NEEDS).unwrap();
    let listeners = ListenerSet::open(&a.netns, true).unwrap();
    let application = listen(&b.netns, PORT);
    let outbound = TcpListener::from(listeners.outbound.try_clone().unwrap());
    let captured = |when: &str| {
        let client = connect(&a.netns, at(B, PORT)).unwrap();
        assert!(accept(&outbound).is_some(), "{when}");
        assert!(accept_within(&application, Duration::ZERO).is_none(), "{when}");
        client
    };
    let mut older = connect(&a.netns, at(B, PORT)).unwrap();
    let (mut server, _) = accept(&application).unwrap();
    let former = Former::new(&scratch, &a, &b.netns, &listeners);
    former.note_older(&older);
    let of_former = captured("no agent");
    // What its agent made for the proxy, and what the proxy has in use.
    let stock = [fresh(&a), fresh(&a), fresh(&a)];
    stock.iter().for_each(|socket| former.exempt(socket));
    let [in_use, first, last] = stock;
    in_use.connect_timeout(&at(B, PORT).into(), PATIENCE).unwrap();
    let (mut served, _) = accept(&application).expect("the proxy's");

    let node = NodeCapture::open(&scratch.bpffs(), &cgroup_root(), None, false).unwrap();
    assert_eq!(node.former_layouts(), [2]);
    assert_eq!(node.entries().unwrap(), [entry(FLAG_DNS)], "known by the former one");
    assert!(node.adopt_pod("uid/a").is_none(), "nothing of this layout yet");
    captured("this version's hooks stand beside, and know no pod");
    let exempt = |socket: &Socket| node.exempt(socket.as_fd()).map_err(io::Error::other);
    connect_with(&a.netns, at(B, PORT), exempt).unwrap();
    assert!(accept(&application).is_some(), "the former hooks leave the proxy's sockets alone too");

    node.set_routes(a.netns.cookie(), &everywhere()).unwrap();
    attach(&node, &a.netns, &b.netns, FLAG_DNS, &listeners, guard(&a, &b.netns));
    captured("both");
    first.connect_timeout(&at(B, PORT).into(), PATIENCE).unwrap();
    assert!(accept(&application).is_some(), "the former agent's stock is exempt from this version's hooks");
    node.remove_layout(2).unwrap();
    captured("this version alone");
    last.connect_timeout(&at(B, PORT).into(), PATIENCE).unwrap();
    assert!(accept(&application).is_some(), "also when the former one is gone");
    let mut bytes = [0; 4];
    for (mut client, server) in [(&older, &mut server), (&TcpStream::from(in_use), &mut served)] {
        client.write_all(b"more").unwrap();
        server.set_nonblocking(false).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        server.read_exact(&mut bytes).unwrap();
    }
    older.write_all(b"more").unwrap();
    let notes: HashMap<MapData, u64, u32> = loader::open_map(&node.pod_folder("uid/a"), abi::MAP_OLDER).unwrap();
    let noted: Vec<u64> = notes.keys().map(Result::unwrap).collect();
    assert_eq!(noted, [cookie(&older)], "what the former one captured is not older than the enrolment");
    assert_ne!(cookie(&of_former), cookie(&older));
    assert_eq!(node.former_layouts(), Vec::<u32>::new());
    assert!(!scratch.bpffs().join("v2").exists());
    assert_eq!(node.counter(Counter::GuardDropped).unwrap(), 0);
}

#[test]
fn pod_that_is_withdrawn_leaves_the_layout_before_too() {
    let scratch = Scratch::new();
    let (a, b) = pair();
    pod_network::prepare(&a.netns, &NEEDS).unwrap();
    let listeners = ListenerSet::open(&a.netns, true).unwrap();
    let application = listen(&b.netns, PORT);
    let former = Former::new(&scratch, &a, &b.netns, &listeners);
    let node = NodeCapture::open(&scratch.bpffs(), &cgroup_root(), None, false).unwrap();
    node.release(a.netns.cookie()).unwrap();
    b.netns.run(|| node.unpin_pod("uid/a")).unwrap().unwrap();
    assert!(!former.folder.exists());
    connect(&a.netns, at(B, PORT)).unwrap();
    assert!(accept(&application).is_some());
}

#[test]
fn own_layout_is_no_former_one() {
    let world = World::new();
    assert_eq!(world.node.former_layouts(), Vec::<u32>::new());
    world.node.remove_layout(abi::LAYOUT_VERSION).unwrap();
    connect(&world.a.netns, at(B, PORT)).unwrap();
    assert_eq!(world.counter(Counter::Captured), 1);
}
