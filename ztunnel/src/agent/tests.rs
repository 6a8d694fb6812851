//! The agent as its two clients see it: whoever announces pods, and the proxy. Both are played by the test, on the real
//! kernel.

mod adoption;
mod drifting;
mod ending;
mod families;
mod hooks;
mod leftovers;
mod networks;
mod on_loopback;
mod reading;

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_proto::node::{self, SocketKind, agent_message, pod_request, proxy_message};
use mesh_runtime::seqpacket::BlockingSocket;
use prost::Message as _;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::runtime::Runtime;

use super::testing::{A, A6, B, B6, Scratch, TestPod, cgroup_root, pair, unname};
use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
const PORT: u16 = 8080;
const UID: &str = "uid-a";

/// An agent in this process; dropping it is as a SIGKILL: nothing is cleaned up.
struct Agent {
    runtime: Option<Runtime>,
    _run_dir: RunDir,
    _tasks: Tasks,
    host: Arc<Host>,
    manager: Manager,
    run: PathBuf,
}

impl Agent {
    fn start(scratch: &Scratch) -> Self {
        Self::start_with(scratch, choices())
    }

    fn start_with(scratch: &Scratch, choices: Choices) -> Self {
        let run = scratch.path("run");
        let run_dir = RunDir::open(&run, 65534).unwrap();
        let capture = NodeCapture::open(&scratch.bpffs(), &cgroup_root(), None, false).unwrap();
        let host = Arc::new(Host::new(capture, cgroup_root(), choices).unwrap());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut tasks = Tasks::new();
        let guard = runtime.enter();
        let manager = super::start(&run_dir, 65534, &host, None, &Readiness::new(), &mut tasks).unwrap();
        drop(guard);
        Self { runtime: Some(runtime), _run_dir: run_dir, _tasks: tasks, host, manager, run }
    }

    fn announcer(&self) -> Announcer {
        Announcer(BlockingSocket::connect(&self.run.join("cni.sock"), PATIENCE).unwrap())
    }

    fn proxy(&self, kept: Vec<(&str, Vec<OwnedFd>)>) -> Proxy {
        self.proxy_of_version(handover::VERSION, kept)
    }

    /// A source of labels shows all pods that exist.
    fn listed(&self, uids: &[&str]) {
        let uids = uids.iter().map(|uid| (*uid).to_owned()).collect();
        self.runtime.as_ref().unwrap().block_on(self.manager.listed(uids));
    }

    fn proxy_of_version(&self, version: u32, kept: Vec<(&str, Vec<OwnedFd>)>) -> Proxy {
        Proxy::connect(&self.run.join("proxy/agent.sock"), version, kept)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_timeout(PATIENCE);
    }
}

/// The defaults. Other tests attach a stranger, and the hooks of a former layout, which are none of these tests' business.
fn choices() -> Choices {
    let allowed_programs = ["stranger", "connect4", "connect6"].map(String::from).into();
    Choices { allowed_programs, ..Choices::default() }
}

struct Announcer(BlockingSocket);

impl Announcer {
    fn ask(&self, kind: pod_request::Kind, fds: &[BorrowedFd<'_>]) -> node::PodResponse {
        self.0.send(&node::PodRequest { kind: Some(kind) }.encode_to_vec(), fds).unwrap();
        node::PodResponse::decode(self.0.recv(64 << 10).unwrap().0).unwrap()
    }

    fn enrol(&self, uid: &str, pod: &TestPod, path: &str) -> Result<(), String> {
        self.enrol_in(uid, pod, path, "")
    }

    fn enrol_in(&self, uid: &str, pod: &TestPod, path: &str, sandbox: &str) -> Result<(), String> {
        let pod_wire = Some(wire(uid, pod.address));
        let request = node::EnrolPod { pod: pod_wire, netns_path: path.into(), container_id: sandbox.into() };
        ok(self.ask(pod_request::Kind::Enrol(request), &[pod.netns.as_fd()]))
    }

    /// As the plugin asks.
    fn admit(&self, uid: &str, pod: &TestPod, sandbox: &str) -> Result<(), String> {
        let pod_wire = Some(wire(uid, pod.address));
        let request = node::AdmitPod { pod: pod_wire, container_id: sandbox.into(), ..Default::default() };
        ok(self.ask(pod_request::Kind::Admit(request), &[pod.netns.as_fd()]))
    }

    fn withdraw(&self, uid: &str) -> Result<(), String> {
        self.withdraw_from(uid, "")
    }

    fn withdraw_from(&self, uid: &str, sandbox: &str) -> Result<(), String> {
        let request = node::WithdrawPod { pod_uid: uid.into(), container_id: sandbox.into() };
        ok(self.ask(pod_request::Kind::Withdraw(request), &[]))
    }

    /// UID and reason of every pod.
    fn list(&self) -> Vec<(String, String)> {
        self.states().into_iter().map(|state| (state.pod.unwrap().uid, state.not_enrolled_reason)).collect()
    }

    fn states(&self) -> Vec<node::PodState> {
        self.ask(pod_request::Kind::List(node::ListPods::default()), &[]).pods
    }
}

fn ok(response: node::PodResponse) -> Result<(), String> {
    if response.error.is_empty() { Ok(()) } else { Err(response.error) }
}

fn wire(uid: &str, address: Ipv4Addr) -> node::Pod {
    node::Pod {
        uid: uid.into(),
        name: "a".into(),
        namespace: "shop".into(),
        service_account: "web".into(),
        addresses: vec![address.octets().to_vec()],
    }
}

/// The proxy's end of the handover.
struct Proxy(BlockingSocket);

impl Proxy {
    /// Connects, says hello, and returns the listeners that it kept.
    fn connect(path: &Path, version: u32, kept: Vec<(&str, Vec<OwnedFd>)>) -> Self {
        let proxy = Self(BlockingSocket::connect(path, PATIENCE).unwrap());
        let hello = node::Hello { version, kept_pods: u32::try_from(kept.len()).unwrap() };
        proxy.say(proxy_message::Kind::Hello(hello), &[]);
        for (uid, sockets) in kept {
            let kinds = ListenerKinds::ALL.map(Into::into).into_iter().take(sockets.len()).collect();
            let sockets: Vec<_> = sockets.iter().map(|socket| socket.as_fd()).collect();
            proxy.say(proxy_message::Kind::PodKept(node::PodKept { pod_uid: uid.into(), listeners: kinds }), &sockets);
        }
        let agent_message::Kind::Hello(hello) = proxy.hear().0 else { panic!("the agent says hello first") };
        assert_eq!(hello.version, handover::VERSION);
        proxy
    }

    fn say(&self, kind: proxy_message::Kind, fds: &[BorrowedFd<'_>]) {
        self.0.send(&node::ProxyMessage { kind: Some(kind) }.encode_to_vec(), fds).unwrap();
    }

    fn hear(&self) -> (agent_message::Kind, Vec<OwnedFd>) {
        let (bytes, fds) = self.0.recv(64 << 10).unwrap();
        (node::AgentMessage::decode(bytes).unwrap().kind.unwrap(), fds)
    }

    fn ack(&self, uid: &str) {
        self.answer(uid, "");
    }

    fn answer(&self, uid: &str, error: &str) {
        self.say(proxy_message::Kind::Ack(node::Ack { pod_uid: uid.into(), error: error.into() }), &[]);
    }

    /// The pod that is announced next, acknowledged: its listeners.
    fn added(&self) -> (String, Vec<OwnedFd>) {
        let (agent_message::Kind::PodAdded(added), fds) = self.hear() else { panic!("a pod is announced") };
        assert_eq!(added.listeners().collect::<Vec<_>>(), ListenerKinds::ALL);
        assert_eq!(fds.len(), ListenerKinds::ALL.len());
        let uid = added.pod.unwrap().uid;
        self.ack(&uid);
        (uid, fds)
    }

    fn snapshot(&self) {
        assert!(matches!(self.hear().0, agent_message::Kind::SnapshotSent(_)));
    }

    fn sockets(&self, uid: &str, kind: SocketKind, count: u32) -> Result<Vec<OwnedFd>, String> {
        let request = node::SocketRequest { pod_uid: uid.into(), kind: kind.into(), count, address: Vec::new() };
        self.say(proxy_message::Kind::SocketRequest(request), &[]);
        let (agent_message::Kind::Sockets(answer), fds) = self.hear() else { panic!("sockets come") };
        assert_eq!((answer.kind(), answer.count as usize), (kind, fds.len()));
        if answer.error.is_empty() { Ok(fds) } else { Err(answer.error) }
    }
}

struct ListenerKinds;

impl ListenerKinds {
    const ALL: [node::Listener; 5] = [
        node::Listener::Outbound,
        node::Listener::InboundPlaintext,
        node::Listener::InboundHbone,
        node::Listener::DnsUdp,
        node::Listener::DnsTcp,
    ];
}

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}

/// Sockets for both families tell IPv4 as IPv6 has it.
fn canonical(address: SocketAddr) -> SocketAddr {
    (address.ip().to_canonical(), address.port()).into()
}

fn listen(pod: &TestPod, port: u16) -> TcpListener {
    pod.netns.run(|| TcpListener::bind(at(Ipv4Addr::UNSPECIFIED, port))).unwrap().unwrap()
}

fn connect(pod: &TestPod, to: SocketAddr) -> io::Result<TcpStream> {
    pod.netns.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(2))).unwrap()
}

/// The next connection of a listener: local and remote address.
fn accept(listener: &OwnedFd) -> Option<(SocketAddr, SocketAddr)> {
    let listener = TcpListener::from(listener.try_clone().unwrap());
    eventually(|| {
        let (stream, peer) = listener.accept().ok()?;
        Some((canonical(stream.local_addr().unwrap()), canonical(peer)))
    })
}

fn eventually<T>(mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return Some(value);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn pod_is_enrolled_served_and_withdrawn() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    let application = listen(&b, PORT);
    let announcer = agent.announcer();
    announcer.enrol(UID, &a, "").unwrap();
    announcer.enrol(UID, &a, "").expect("asking again is no error");
    assert_eq!(announcer.list(), [(UID.into(), String::new())]);

    let proxy = agent.proxy(Vec::new());
    let (uid, listeners) = proxy.added();
    proxy.snapshot();
    assert_eq!(uid, UID);
    let client = connect(&a, at(B, PORT)).unwrap();
    assert_eq!(accept(&listeners[0]), Some((at(B, PORT), client.local_addr().unwrap())));
    let client = connect(&b, at(A, PORT)).unwrap();
    assert_eq!(accept(&listeners[1]), Some((at(A, PORT), client.local_addr().unwrap())));
    connect(&b, at(A, 15008)).unwrap();
    assert_eq!(accept(&listeners[2]).unwrap().0, at(A, 15008));

    let withdrawing = std::thread::spawn(move || announcer.withdraw(UID));
    let (agent_message::Kind::PodRemoved(removed), _) = proxy.hear() else { panic!("the pod is withdrawn") };
    assert_eq!(removed.pod_uid, UID);
    drop(listeners);
    proxy.ack(UID);
    withdrawing.join().unwrap().unwrap();
    assert_eq!(agent.announcer().list(), []);
    assert_eq!(agent.host.capture.cookies().unwrap(), Vec::<u64>::new());
    assert_eq!(std::fs::read_dir(agent.run.join("pods")).unwrap().count(), 0);
    assert!(unprepared(&a));
    connect(&a, at(B, PORT)).unwrap();
    assert_eq!(application.accept().unwrap().1.ip(), A);
}

#[test]
fn proxy_that_is_connected_learns_of_new_pods() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let proxy = agent.proxy(Vec::new());
    proxy.snapshot();
    let (a, b) = pair();
    let announcer = agent.announcer();
    announcer.enrol(UID, &a, "").unwrap();
    assert_eq!(proxy.added().0, UID);
    announcer.enrol("uid-b", &b, "").unwrap();
    assert_eq!(proxy.added().0, "uid-b");
    // A second proxy, the successor, gets everything too.
    let successor = agent.proxy(Vec::new());
    let mut known = [successor.added().0, successor.added().0];
    known.sort();
    assert_eq!(known, [UID, "uid-b"]);
    successor.snapshot();
}

#[test]
fn upstream_sockets_are_exempt_and_in_the_pods_namespace() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    let application = listen(&b, PORT);
    agent.announcer().enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    proxy.added();
    proxy.snapshot();
    let sockets = proxy.sockets(UID, SocketKind::UpstreamV4, 253).unwrap();
    assert_eq!(sockets.len(), 253);
    let socket = Socket::from(sockets.into_iter().next().unwrap());
    assert!(socket.tcp_nodelay().unwrap());
    socket.set_nonblocking(false).unwrap();
    socket.connect_timeout(&at(B, PORT).into(), PATIENCE).unwrap();
    assert_eq!(application.accept().unwrap().1.ip(), A, "straight to the peer, not captured");
}

#[test]
fn delivery_socket_works_without_privilege() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    let application = listen(&a, PORT);
    agent.announcer().enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    proxy.added();
    proxy.snapshot();
    let socket = proxy.sockets(UID, SocketKind::DeliveryV4, 1).unwrap().remove(0);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "agent::tests::unprivileged_process", "--nocapture"])
        .env("CULVERT_TEST_SOCKET_ON_STDIN", "1")
        .stdin(Stdio::from(socket))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let (mut stream, peer) = application.accept().unwrap();
    assert_eq!(peer.ip(), Ipv4Addr::new(203, 0, 113, 9));
    stream.write_all(b"hello").unwrap();
    assert!(child.wait().unwrap().success());
}

/// Not a test of its own: what the child process of the one above does. The socket is its standard input.
#[test]
fn unprivileged_process() {
    if std::env::var_os("CULVERT_TEST_SOCKET_ON_STDIN").is_none() {
        return;
    }
    // Here and not by the parent: the checkout may lie where nobody else can read the program.
    nix::unistd::setgroups(&[]).unwrap();
    let (nobody, nogroup) = (nix::unistd::Uid::from_raw(65534), nix::unistd::Gid::from_raw(65534));
    nix::unistd::setresgid(nogroup, nogroup, nogroup).unwrap();
    nix::unistd::setresuid(nobody, nobody, nobody).unwrap();
    let own = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    own.set_ip_transparent_v4(true).expect_err("a socket of its own cannot be transparent");
    let stdin = std::io::stdin();
    let socket = SockRef::from(&stdin);
    socket.bind(&at(Ipv4Addr::new(203, 0, 113, 9), 0).into()).unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.connect_timeout(&at(A, PORT).into(), PATIENCE).unwrap();
    let mut stream = TcpStream::from(stdin.as_fd().try_clone_to_owned().unwrap());
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
}

#[test]
fn proxy_that_does_not_let_go_of_a_pod_is_cut_off() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    let announcer = agent.announcer();
    announcer.enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    proxy.added();
    proxy.snapshot();
    // It returns though nothing is acknowledged.
    announcer.withdraw(UID).unwrap();
    assert!(matches!(proxy.hear().0, agent_message::Kind::PodRemoved(_)));
    assert!(matches!(proxy.0.recv(4096), Err(mesh_runtime::seqpacket::Error::Closed)));
}

#[test]
fn what_is_not_acceptable_is_refused_with_the_reason() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    let announcer = agent.announcer();
    let enrol = |fds: &[BorrowedFd<'_>]| {
        let request = node::EnrolPod { pod: Some(wire(UID, A)), ..Default::default() };
        ok(announcer.ask(pod_request::Kind::Enrol(request), fds)).unwrap_err()
    };
    assert!(enrol(&[]).contains("0 descriptors"));
    let host = std::fs::File::open("/proc/self/ns/net").unwrap();
    assert!(enrol(&[host.as_fd()]).contains("host-network"), "the node itself is never captured");
    let other = std::fs::File::open("/proc/self/ns/mnt").unwrap();
    assert!(enrol(&[other.as_fd()]).contains("cannot enter"));
    let foreign = TestPod { address: Ipv4Addr::new(10, 9, 9, 9), ..a };
    assert!(announcer.enrol(UID, &foreign, "").unwrap_err().contains("no interface"), "not an address of the pod");
    assert!(unprepared(&foreign), "taken back");
    let a = TestPod { address: A, ..foreign };
    announcer.enrol(UID, &a, "").unwrap();
    assert!(announcer.enrol("uid-x", &a, "").unwrap_err().contains(UID), "one pod per namespace");
    assert_eq!(announcer.list().len(), 1);

    let proxy = agent.proxy(Vec::new());
    proxy.added();
    proxy.snapshot();
    for (uid, kind, count) in [
        ("unknown", SocketKind::UpstreamV4, 1),
        (UID, SocketKind::Unspecified, 1),
        (UID, SocketKind::UpstreamV4, 0),
        (UID, SocketKind::UpstreamV4, 254),
    ] {
        proxy.sockets(uid, kind, count).unwrap_err();
    }
}

#[test]
fn port_that_an_application_holds_is_named_and_everything_taken_back() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, b) = pair();
    let application = listen(&b, PORT);
    let holder = listen(&a, 15006);
    let error = agent.announcer().enrol(UID, &a, "").unwrap_err();
    assert!(error.contains("15006"), "{error}");
    assert_eq!(agent.announcer().list(), []);
    connect(&a, at(B, PORT)).unwrap();
    application.accept().unwrap();
    drop(holder);
    agent.announcer().enrol(UID, &a, "").unwrap();
}

#[test]
fn pod_that_the_proxy_refuses_is_told_again_and_listed_with_the_reason() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let proxy = agent.proxy(Vec::new());
    proxy.snapshot();
    let (a, _b) = pair();
    let announcer = agent.announcer();
    announcer.enrol(UID, &a, "").unwrap();
    assert!(matches!(proxy.hear().0, agent_message::Kind::PodAdded(_)));
    proxy.answer(UID, "no room");
    let reason = || announcer.list().remove(0).1;
    eventually(|| reason().contains("no room").then_some(())).expect("the reason is shown");
    proxy.added();
    eventually(|| reason().is_empty().then_some(())).expect("served after all");
}

#[test]
fn proxy_that_could_not_let_go_of_a_pod_is_cut_off() {
    let scratch = Scratch::new();
    let agent = Agent::start(&scratch);
    let (a, _b) = pair();
    let announcer = agent.announcer();
    announcer.enrol(UID, &a, "").unwrap();
    let proxy = agent.proxy(Vec::new());
    proxy.added();
    proxy.snapshot();
    let withdrawing = std::thread::spawn(move || announcer.withdraw(UID));
    assert!(matches!(proxy.hear().0, agent_message::Kind::PodRemoved(_)));
    proxy.answer(UID, "2 connections are still open");
    assert!(matches!(proxy.0.recv(4096), Err(mesh_runtime::seqpacket::Error::Closed)));
    withdrawing.join().unwrap().unwrap();
    let successor = agent.proxy(Vec::new());
    successor.snapshot();
}

/// Whether a pod's namespace has nothing of what capture needs.
fn unprepared(pod: &TestPod) -> bool {
    let needs = pod_network::Needs { addresses: &[A.into(), A6.into()], dns: true };
    let missing = pod_network::inspect(&pod.netns, &needs).unwrap();
    (missing.rules.len(), missing.routes.len(), missing.sysctls.len()) == (12, 2, 3)
}

/// A process in the pod's namespace, ended when the value is dropped.
struct Inside(std::process::Child);

impl Inside {
    /// The path of its namespace, as long as it lives.
    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn process_in(pod: &TestPod) -> Inside {
    Inside(pod.netns.run(|| Command::new("sleep").arg("60").spawn().unwrap()).unwrap())
}
