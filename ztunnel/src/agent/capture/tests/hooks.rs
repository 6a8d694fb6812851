//! Programs on cgroups: the kubelet's connections, programs of others, hooks that were taken away.

use std::process::{Child, Command, Stdio};

use super::*;
use crate::agent::testing::Cgroup;

/// What tells the process of [`prober`] where it belongs and whom to ask.
const CGROUP: &str = "CULVERT_TEST_CGROUP";
const TARGET: &str = "CULVERT_TEST_TARGET";

/// A process in a cgroup and a namespace that does what [`probe`] does: this program, with the same test, which sees that it
/// is the other process.
fn prober(cgroup: &Cgroup, netns: &Netns, to: SocketAddr) -> Child {
    let (_, module) = module_path!().split_once("::").unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("{module}::kubelets_connections_pass_and_those_of_others_are_steered")]);
    command.env(CGROUP, &cgroup.0).env(TARGET, to.to_string()).stdout(Stdio::null());
    // A child is born in the network namespace of the thread that starts it.
    netns.run(|| command.spawn()).unwrap().unwrap()
}

/// Joins a cgroup, connects, says "probe", waits for "alive".
fn probe(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
    let mut stream = TcpStream::connect(std::env::var(TARGET).unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"probe").unwrap();
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"alive");
}

#[test]
fn kubelets_connections_pass_and_those_of_others_are_steered() {
    if let Some(cgroup) = std::env::var_os(CGROUP) {
        return probe(Path::new(&cgroup));
    }
    let (kubelet, other) = (Cgroup::new("kubelet"), Cgroup::new("other"));
    let (a, b) = pair();
    let world = World::of(a, b, FLAG_DNS, false, Some(&kubelet.0));
    let own = listen(&world.a.netns, PORT);
    for address in [IpAddr::from(A), A6.into()] {
        let mut child = prober(&kubelet, &world.b.netns, at(address, PORT));
        let (mut application, _) = accept(&own).expect("straight to the application");
        application.set_nonblocking(false).unwrap();
        let mut bytes = [0; 5];
        application.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"probe");
        // The answer passes the guard, though the socket is the application's.
        application.write_all(b"alive").unwrap();
        drop(application);
        assert!(child.wait().unwrap().success());

        let mut child = prober(&other, &world.b.netns, at(address, PORT));
        assert_eq!(world.accepted(&world.listeners.inbound_plaintext).0, at(address, PORT));
        assert!(!child.wait().unwrap().success(), "nobody answered it");
        assert!(accept_within(&own, Duration::ZERO).is_none(), "the application's own listener did not get it");
    }
    assert!(world.counter(Counter::ProbesPassed) >= 2);
    // They are forgotten with their end: the same ports opened by somebody else are nobody's probe.
    let probes: aya::maps::HashMap<MapData, [u8; 36], u32> =
        loader::open_map(&world.node.node_folder(), abi::MAP_PROBES).unwrap();
    let deadline = std::time::Instant::now() + PATIENCE;
    while probes.keys().count() > 0 {
        assert!(std::time::Instant::now() < deadline, "forgotten");
        std::thread::yield_now();
    }
}

#[test]
fn another_cgroup_can_be_followed_and_none() {
    let (one, two) = (Cgroup::new("one"), Cgroup::new("two"));
    let scratch = Scratch::new();
    let node = NodeCapture::open(&scratch.bpffs(), &cgroup_root(), Some(&one.0), false).unwrap();
    let pin = node.node_folder().join(abi::PROGRAM_PROBES);
    let target = || sys::link_target(sys::open_pin(&pin).unwrap().as_fd()).unwrap().target;
    let id = |cgroup: &Cgroup| std::os::unix::fs::MetadataExt::ino(&fs::metadata(&cgroup.0).unwrap());
    assert_eq!(target(), id(&one));
    assert!(!node.follow_kubelet(Some(&two.0)).unwrap(), "another is chosen: nothing was taken away");
    assert_eq!(target(), id(&two));
    // A kubelet that is restarted: the same path, another cgroup.
    fs::remove_dir(&two.0).unwrap();
    fs::create_dir(&two.0).unwrap();
    assert_ne!(target(), id(&two));
    assert!(!node.follow_kubelet(Some(&two.0)).unwrap(), "nor here");
    assert_eq!(target(), id(&two));
    assert!(!node.follow_kubelet(Some(&two.0)).unwrap());
    // Taken off its hook, and its pin taken away.
    former::detach(&pin).unwrap();
    assert!(node.follow_kubelet(Some(&two.0)).unwrap(), "it was taken away");
    assert_eq!(target(), id(&two));
    fs::remove_file(&pin).unwrap();
    assert!(node.follow_kubelet(Some(&two.0)).unwrap(), "it was taken away");
    assert_eq!(target(), id(&two));
    assert!(node.follow_kubelet(Some(&two.0.join("absent"))).unwrap_err().is_absence());
    assert!(!node.follow_kubelet(None).unwrap());
    assert!(!pin.exists());
}

/// A program for a connect hook that lets everything pass, attached as long as the link lives.
fn stranger(attach_type: u32) -> std::os::fd::OwnedFd {
    sys::attach_stranger(b"stranger", attach_type, &fs::File::open(cgroup_root()).unwrap()).unwrap()
}

#[test]
fn programs_of_others_on_the_connect_hooks_are_named() {
    let scratch = Scratch::new();
    let node = NodeCapture::open(&scratch.bpffs(), &cgroup_root(), None, false).unwrap();
    // Tests that run beside this one have programs of other names there.
    let found = || -> Vec<&'static str> {
        let programs = node.foreign_programs(&cgroup_root()).unwrap();
        programs.iter().filter(|program| program.name == "stranger").map(|program| program.attach).collect()
    };
    assert_eq!(found(), Vec::<&str>::new());
    let four = stranger(sys::ATTACH_CONNECT4);
    assert_eq!(found(), ["connect4"]);
    let six = stranger(sys::ATTACH_CONNECT6);
    assert_eq!(found(), ["connect4", "connect6"]);
    drop((four, six));
    let own = node.foreign_programs(&cgroup_root()).unwrap();
    let hook = sys::open_pin(&node.node_folder().join(abi::PROGRAM_CONNECT4)).unwrap();
    let id = sys::link_target(hook.as_fd()).unwrap().program_id;
    assert!(!own.iter().any(|program| program.id == id), "its own is none of them");
}

#[test]
fn connect_hooks_that_were_taken_away_are_attached_again() {
    let world = World::new();
    assert!(!world.node.mend_node().unwrap());
    let pins = [abi::PROGRAM_CONNECT4, abi::PROGRAM_CONNECT6].map(|name| world.node.node_folder().join(name));
    // The one is only detached. Of the other the pin is gone too; that alone leaves its program there for a moment, and both
    // would count.
    pins.iter().for_each(|pin| former::detach(pin).unwrap());
    fs::remove_file(&pins[1]).unwrap();
    assert!(world.node.mend_node().unwrap());
    connect(&world.a.netns, at(B, PORT)).unwrap();
    connect(&world.a.netns, at(B6, PORT)).unwrap();
    assert_eq!(world.counter(Counter::Captured), 2);
    assert!(!world.node.mend_node().unwrap());
}
