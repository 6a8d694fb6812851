//! The agent's two sockets on its node: messages of every wrong shape, by root and by others.

use std::fs::File;
use std::io::{BufRead as _, BufReader, IoSlice, IoSliceMut, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use mesh_proto::node::{
    Ack, AgentMessage, EnrolPod, Hello, ListPods, Listener, Pod, PodKept, PodRequest, PodResponse, ProxyMessage,
    SocketRequest, WithdrawPod, pod_request, proxy_message,
};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, sendmsg, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;
use nix::unistd::{Uid, pipe, setfsuid};
use prost::Message as _;
use tests::cluster::PROXY_UID;
use tests::netns::NetNs;
use tests::wait;

use crate::scene::{BOUND, ECHO, Scene, highest, resident};

/// Largest packet that the agent takes, and one byte.
const TOO_LARGE: usize = (64 << 10) + 1;

/// Requests of a proxy that takes no answer, more than any buffer between the two holds.
const GREED: usize = 5000;
/// Proxies that say nothing, more than the agent serves at a time.
const MUTE: usize = 5;
/// What all of it may cost the agent, in KiB.
const AGENT_GROWTH: usize = 32 << 10;

/// A message, and the descriptors beside it.
type Packet<'a> = (Vec<u8>, Vec<&'a OwnedFd>);

fn open(path: &Path) -> Result<OwnedFd, Errno> {
    let own = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&own, sockopt::ReceiveTimeout, &TimeVal::new(20, 0)).unwrap();
    connect(own.as_raw_fd(), &UnixAddr::new(path).unwrap())?;
    Ok(own)
}

fn send(own: &OwnedFd, message: &[u8], fds: &[&OwnedFd]) -> bool {
    let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<UnixAddr>(own.as_raw_fd(), &[IoSlice::new(message)], control, MsgFlags::MSG_NOSIGNAL, None).is_ok()
}

/// The next message; None if the agent closed the connection.
fn receive(own: &OwnedFd) -> Option<Vec<u8>> {
    let mut answer = vec![0; 1 << 20];
    let mut into = [IoSliceMut::new(&mut answer)];
    match recvmsg::<UnixAddr>(own.as_raw_fd(), &mut into, None, MsgFlags::MSG_CMSG_CLOEXEC).map(|got| got.bytes) {
        Ok(0) | Err(Errno::ECONNRESET) => None,
        Ok(length) => {
            answer.truncate(length);
            Some(answer)
        }
        Err(error) => panic!("the agent neither answers nor closes: {error}"),
    }
}

/// Descriptors of every kind but a network namespace.
fn strange() -> Vec<(&'static str, OwnedFd)> {
    let file = |path: &str| OwnedFd::from(File::open(path).unwrap());
    vec![
        ("a file", file("/proc/self/status")),
        ("a device", file("/dev/zero")),
        ("a folder", file("/proc")),
        ("a pipe", pipe().unwrap().0),
        ("a socket", TcpListener::bind("127.0.0.1:0").unwrap().into()),
        ("a Unix socket", UnixStream::pair().unwrap().0.into()),
        ("a mount namespace", file("/proc/self/ns/mnt")),
        ("a process namespace", file("/proc/self/ns/pid")),
    ]
}

fn files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[test]
fn the_cni_socket_takes_requests_of_root_alone_and_of_the_right_shape() {
    let scene = Scene::start();
    let node = scene.cluster.node(2).unwrap();
    let path = node.run_dir().join("cni.sock");
    let agent = node.agent().unwrap().pid().unwrap();
    let pods = || scene.cluster.agent(2).unwrap().list().unwrap().len();
    let (listed, before) = (pods(), files(agent));
    let pod = Pod {
        uid: "11111111-2222-3333-4444-555555555555".to_owned(),
        name: "made-up".to_owned(),
        namespace: "default".to_owned(),
        service_account: "default".to_owned(),
        addresses: vec![vec![10, 244, 2, 200]],
    };
    let enrol = |pod: &Pod| {
        let enrol = EnrolPod { pod: Some(pod.clone()), ..EnrolPod::default() };
        PodRequest { kind: Some(pod_request::Kind::Enrol(enrol)) }.encode_to_vec()
    };
    let mut attempts: Vec<(String, Vec<u8>, Vec<&OwnedFd>)> = vec![
        ("noise".into(), vec![0xa5; 3000], vec![]),
        ("too large".into(), vec![0; TOO_LARGE], vec![]),
        ("nothing".into(), PodRequest::default().encode_to_vec(), vec![]),
        ("no namespace".into(), enrol(&pod), vec![]),
        (
            "no pod".into(),
            PodRequest { kind: Some(pod_request::Kind::Enrol(EnrolPod::default())) }.encode_to_vec(),
            vec![],
        ),
    ];
    let strange = strange();
    for (name, fd) in &strange {
        attempts.push(((*name).to_owned(), enrol(&pod), vec![fd]));
    }
    let good = scene.peer.network().as_fd().try_clone_to_owned().unwrap();
    attempts.push(("two namespaces".into(), enrol(&pod), vec![&good, &good]));
    attempts.push(("253 namespaces".into(), enrol(&pod), vec![&good; 253]));
    let root = node.network().as_fd().try_clone_to_owned().unwrap();
    attempts.push(("the node's own namespace".into(), enrol(&pod), vec![&root]));
    for (name, bad) in [
        ("a uid with a path", Pod { uid: "../../etc".into(), ..pod.clone() }),
        ("no uid", Pod { uid: String::new(), ..pod.clone() }),
        ("a long uid", Pod { uid: "u".repeat(5000), ..pod.clone() }),
        ("a name with spaces", Pod { name: "a b\n".into(), ..pod.clone() }),
        ("a namespace with slashes", Pod { namespace: "a/ns/b".into(), ..pod.clone() }),
        ("no address", Pod { addresses: vec![], ..pod.clone() }),
        ("half an address", Pod { addresses: vec![vec![10, 0]], ..pod.clone() }),
        ("loopback", Pod { addresses: vec![vec![127, 0, 0, 1]], ..pod.clone() }),
        ("many addresses", Pod { addresses: vec![vec![10, 244, 2, 9]; 1000], ..pod }),
    ] {
        attempts.push((name.to_owned(), enrol(&bad), vec![&good]));
    }
    for (name, message, fds) in &attempts {
        let own = open(&path).unwrap();
        if !send(&own, message, fds) {
            assert!(message.len() >= TOO_LARGE, "{name} cannot be sent");
            continue;
        }
        if let Some(answer) = receive(&own) {
            let answer = PodResponse::decode(answer.as_slice()).unwrap();
            assert!(!answer.error.is_empty(), "{name} is taken: {answer:?}");
            // The same connection is still good for what is right.
            send(&own, &PodRequest { kind: Some(pod_request::Kind::List(ListPods::default())) }.encode_to_vec(), &[]);
            let list = PodResponse::decode(receive(&own).expect(name).as_slice()).unwrap();
            assert_eq!(list.pods.len(), listed, "{name}");
        }
    }
    // A pod that nobody knows is withdrawn without harm.
    let own = open(&path).unwrap();
    let withdraw = WithdrawPod { pod_uid: "nobody".into(), ..WithdrawPod::default() };
    send(&own, &PodRequest { kind: Some(pod_request::Kind::Withdraw(withdraw)) }.encode_to_vec(), &[]);
    assert!(receive(&own).is_some());
    drop((own, attempts));
    assert_eq!(pods(), listed);
    wait::until("every descriptor is closed again", BOUND, || (files(agent) <= before).then_some(())).unwrap();
    assert_eq!(node.agent().unwrap().pid(), Some(agent), "the agent lives");
    scene.victim_is_well("bad requests to the agent");
    scene.ends_as_it_was(32 << 10);
}

#[test]
fn other_users_reach_neither_socket() {
    let scene = Scene::start();
    let run = scene.cluster.node(2).unwrap().run_dir();
    let sockets = [run.join("cni.sock"), run.join("proxy/agent.sock")];
    for path in &sockets {
        let mode = std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode & 0o007, 0, "{}: {mode:o}", path.display());
        assert!(open(path).is_ok(), "positive control: root");
        // The file system checks of this thread alone become another user's.
        let refused = std::thread::scope(|scope| {
            let attempt = scope.spawn(|| {
                setfsuid(Uid::from_raw(65_534));
                open(path)
            });
            attempt.join().unwrap()
        });
        assert_eq!(refused.unwrap_err(), Errno::EACCES, "{}", path.display());
    }
    scene.ends_as_it_was(32 << 10);
}

/// Path of the agent's socket and UID of the attacked pod, in the process that [`Intruder`] started.
const INTRUDER: [&str; 2] = ["CULVERT_TEST_SOCKET", "CULVERT_TEST_POD"];

/// A process of the proxy's user, in the network namespace of a pod: what a proxy is that was broken into. It goes from step to
/// step.
struct Intruder {
    process: Child,
    says: BufReader<ChildStdout>,
}

impl Intruder {
    /// Starts it, as the test of that name.
    fn start(test: &str, socket: &Path, pod: &tests::pod::Pod, network: &NetNs) -> Self {
        // The folder of the program may be closed to that user; the program itself is not.
        let mut command = Command::new("/proc/self/exe");
        command.args(["--exact", test, "--nocapture"]).uid(PROXY_UID).gid(PROXY_UID).current_dir("/");
        command.env(INTRUDER[0], socket).env(INTRUDER[1], pod.uid()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = network.run(|| command.spawn()).unwrap().unwrap();
        let says = BufReader::new(process.stdout.take().unwrap());
        Self { process, says }
    }

    /// Returns when it has done what that step says.
    fn until(&mut self, step: &str) {
        let mut lines = (&mut self.says).lines().map(Result::unwrap);
        assert!(lines.any(|line| line == step), "it failed before {step:?}");
    }

    /// Lets it do the next.
    fn go_on(&mut self) {
        writeln!(self.process.stdin.as_mut().unwrap()).unwrap();
    }

    fn ends_well(mut self) {
        self.go_on();
        assert!(self.process.wait().unwrap().success());
    }

    /// In the process: says that a step is done, and waits.
    fn done(step: &str) {
        println!("\n{step}");
        std::io::stdin().read_line(&mut String::new()).unwrap();
    }
}

impl Drop for Intruder {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn message(kind: proxy_message::Kind) -> Vec<u8> {
    ProxyMessage { kind: Some(kind) }.encode_to_vec()
}

fn hello(kept_pods: u32) -> Vec<u8> {
    message(proxy_message::Kind::Hello(Hello { version: 2, kept_pods }))
}

/// All that the process says to the agent.
fn intrude(path: &Path, pod: &str) {
    assert_eq!((Uid::current().as_raw(), Uid::effective().as_raw()), (PROXY_UID, PROXY_UID));
    let kept = |count: usize| {
        let listeners = [Listener::Outbound, Listener::InboundPlaintext, Listener::InboundHbone].map(i32::from);
        let listeners = listeners.iter().copied().cycle().take(count).collect();
        message(proxy_message::Kind::PodKept(PodKept { pod_uid: pod.to_owned(), listeners }))
    };
    let request = |kind, count| {
        let request = SocketRequest { pod_uid: pod.to_owned(), kind, count, ..SocketRequest::default() };
        message(proxy_message::Kind::SocketRequest(request))
    };
    let ack = |pod_uid: &str, error: &str| {
        message(proxy_message::Kind::Ack(Ack { pod_uid: pod_uid.to_owned(), error: error.to_owned() }))
    };
    let strange = strange();
    let all: Vec<&OwnedFd> = strange.iter().map(|(_, fd)| fd).collect();
    // This process is in the namespace of another pod.
    let foreign: Vec<OwnedFd> = (0..3).map(|_| TcpListener::bind("0.0.0.0:0").unwrap().into()).collect();
    let foreign: Vec<&OwnedFd> = foreign.iter().collect();
    let attempts: Vec<(&str, Vec<Packet<'_>>)> = vec![
        ("noise", vec![(vec![0x5a; 4000], vec![])]),
        ("too large", vec![(vec![0; TOO_LARGE], vec![])]),
        ("no hello", vec![(request(1, 8), vec![])]),
        ("an old version", vec![(message(proxy_message::Kind::Hello(Hello::default())), vec![])]),
        ("too many kept", vec![(hello(u32::MAX), vec![])]),
        ("kept without descriptors", vec![(hello(1), vec![]), (kept(3), vec![])]),
        ("kept with too many", vec![(hello(1), vec![]), (kept(3), all.clone())]),
        ("kept files", vec![(hello(1), vec![]), (kept(3), all[..3].to_vec())]),
        ("kept sockets of another pod", vec![(hello(1), vec![]), (kept(3), foreign)]),
        ("kept for ever", vec![(hello(4096), vec![]), (kept(0), vec![])]),
        ("hello twice", vec![(hello(0), vec![]), (hello(0), vec![])]),
        ("an unknown kind", vec![(hello(0), vec![]), (vec![0xfa, 0x07, 0], vec![])]),
        ("an acknowledgement of nothing", vec![(hello(0), vec![]), (ack("nobody", ""), vec![])]),
        ("refuses the pod", vec![(hello(0), vec![]), (ack(pod, "no"), vec![])]),
        ("descriptors that nobody wants", vec![(hello(0), vec![]), (request(1, 0), all)]),
        ("more sockets than there are", vec![(hello(0), vec![]), (request(1, u32::MAX), vec![])]),
        ("a kind that is none", vec![(hello(0), vec![]), (request(99, 1), vec![])]),
        ("a socket to answer from nowhere", vec![(hello(0), vec![]), (request(7, 1), vec![])]),
    ];
    for (name, messages) in &attempts {
        let own = open(path).unwrap();
        let greeting = receive(&own).unwrap_or_else(|| panic!("{name}: no greeting"));
        assert!(AgentMessage::decode(greeting.as_slice()).is_ok());
        for (message, fds) in messages {
            let _ = send(&own, message, fds);
        }
    }
    Intruder::done("shapes");
    // Requests without end whose answers nobody takes: most are forgotten, and the agent ends it in its time.
    let greedy = open(path).unwrap();
    setsockopt(&greedy, sockopt::SendTimeout, &TimeVal::new(20, 0)).unwrap();
    assert!(receive(&greedy).is_some() && send(&greedy, &hello(0), &[]));
    let ask = || send(&greedy, &request(1, 253), &[]);
    let _ = (0..GREED).take_while(|_| ask()).count();
    wait::until("the agent ends it", BOUND, || (!ask()).then_some(())).unwrap();
    drop(greedy);
    Intruder::done("greed");
    // Those that say nothing give their places up to the next ones, after the time that a hello may take.
    let mute: Vec<OwnedFd> = (0..MUTE).map(|_| open(path).unwrap()).collect();
    Intruder::done("mute");
    // One that says hello and then nothing for as long as it is there.
    let idle = open(path).unwrap();
    assert!(receive(&idle).is_some() && send(&idle, &hello(0), &[]), "its turn comes");
    drop(mute);
    Intruder::done("idle");
}

/// Nothing that a process of the proxy's user returns is taken for a pod's listener, what it makes the agent hold is bounded,
/// and the real proxy serves on.
#[test]
fn the_proxys_socket_outlives_every_wrong_message() {
    if let [Ok(path), Ok(pod)] = INTRUDER.map(std::env::var) {
        return intrude(Path::new(&path), &pod);
    }
    let scene = Scene::start();
    let node = scene.cluster.node(2).unwrap();
    let path = node.run_dir().join("proxy/agent.sock");
    let agent = node.agent().unwrap().pid().unwrap();
    let (before, memory) = (files(agent), resident(agent));
    let test = "local::the_proxys_socket_outlives_every_wrong_message";
    let mut intruder = Intruder::start(test, &path, &scene.target, scene.peer.network());
    for step in ["shapes", "greed", "mute"] {
        intruder.until(step);
        crate::common::until_connected(&scene.friend, &scene.target.at(ECHO).to_string());
        scene.victim_is_well(step);
        intruder.go_on();
    }
    // Pods still come and go.
    intruder.until("idle");
    let late = crate::common::echo(&scene.cluster, "late", 2).enrolled(true).start().unwrap();
    crate::common::until_connected(&scene.friend, &late.at(ECHO).to_string());
    scene.cluster.delete(&late).unwrap();
    intruder.ends_well();
    crate::common::until_connected(&scene.friend, &scene.target.at(ECHO).to_string());
    scene.victim_is_well("bad messages to the agent");
    // The pod that came and went may have left what is made once.
    wait::until("every descriptor is closed again", BOUND, || (files(agent) <= before + 8).then_some(())).unwrap();
    assert_eq!(node.agent().unwrap().pid(), Some(agent), "the agent lives");
    let (now, most) = (resident(agent), highest(agent));
    println!("agent: {memory} KiB before, {now} KiB after, {most} KiB at the highest");
    assert!(most < memory + AGENT_GROWTH, "{memory}, {now}, {most} KiB");
    scene.ends_as_it_was(32 << 10);
}
