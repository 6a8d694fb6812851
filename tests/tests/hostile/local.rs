//! The agent's two sockets on its node: messages of every wrong shape, by root and by others.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use mesh_proto::node::{
    AgentMessage, EnrolPod, Hello, ListPods, Listener, Pod, PodKept, PodRequest, PodResponse, ProxyMessage,
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
use tests::wait;

use crate::scene::{BOUND, Scene};

/// Largest packet that the agent takes, and one byte.
const TOO_LARGE: usize = (64 << 10) + 1;

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
            send(&own, &PodRequest { kind: Some(pod_request::Kind::List(ListPods {})) }.encode_to_vec(), &[]);
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

/// A process that says it is the proxy: nothing that it returns is taken for a pod's listener, and the real one serves on.
#[test]
fn the_proxys_socket_outlives_every_wrong_message() {
    let scene = Scene::start();
    let node = scene.cluster.node(2).unwrap();
    let path = node.run_dir().join("proxy/agent.sock");
    let agent = node.agent().unwrap().pid().unwrap();
    let before = files(agent);
    let message = |kind| ProxyMessage { kind: Some(kind) }.encode_to_vec();
    let hello = |kept_pods| message(proxy_message::Kind::Hello(Hello { version: 2, kept_pods }));
    let kept = |count: usize| {
        let listeners = [Listener::Outbound, Listener::InboundPlaintext, Listener::InboundHbone].map(i32::from);
        let listeners = listeners.iter().copied().cycle().take(count).collect();
        message(proxy_message::Kind::PodKept(PodKept { pod_uid: scene.target.uid(), listeners }))
    };
    let request = |count| {
        let request = SocketRequest { pod_uid: scene.target.uid(), kind: 1, count, ..SocketRequest::default() };
        message(proxy_message::Kind::SocketRequest(request))
    };
    let strange = strange();
    let all: Vec<&OwnedFd> = strange.iter().map(|(_, fd)| fd).collect();
    let foreign: Vec<OwnedFd> =
        (0..3).map(|_| scene.peer.network().listen(([0, 0, 0, 0], 0).into()).unwrap().into()).collect();
    let foreign: Vec<&OwnedFd> = foreign.iter().collect();
    let attempts: Vec<(&str, Vec<Packet<'_>>)> = vec![
        ("noise", vec![(vec![0x5a; 4000], vec![])]),
        ("too large", vec![(vec![0; TOO_LARGE], vec![])]),
        ("no hello", vec![(request(8), vec![])]),
        ("an old version", vec![(message(proxy_message::Kind::Hello(Hello::default())), vec![])]),
        ("too many kept", vec![(hello(u32::MAX), vec![])]),
        ("kept without descriptors", vec![(hello(1), vec![]), (kept(3), vec![])]),
        ("kept with too many", vec![(hello(1), vec![]), (kept(3), all.clone())]),
        ("kept files", vec![(hello(1), vec![]), (kept(3), all[..3].to_vec())]),
        ("kept sockets of another pod", vec![(hello(1), vec![]), (kept(3), foreign)]),
        ("hello twice", vec![(hello(0), vec![]), (hello(0), vec![])]),
        ("an unknown kind", vec![(hello(0), vec![]), (vec![0xfa, 0x07, 0], vec![])]),
        ("descriptors that nobody wants", vec![(hello(0), vec![]), (request(0), all)]),
        ("more sockets than there are", vec![(hello(0), vec![]), (request(u32::MAX), vec![])]),
    ];
    for (name, messages) in &attempts {
        let own = open(&path).unwrap();
        let greeting = receive(&own).unwrap_or_else(|| panic!("{name}: no greeting"));
        assert!(AgentMessage::decode(greeting.as_slice()).is_ok());
        for (message, fds) in messages {
            let _ = send(&own, message, fds);
        }
    }
    // One that says hello and then nothing for as long as it is there: pods still come and go.
    let idle = open(&path).unwrap();
    send(&idle, &hello(0), &[]);
    let late = crate::common::echo(&scene.cluster, "late", 2).enrolled(true).start().unwrap();
    crate::common::until_connected(&scene.friend, &late.at(crate::scene::ECHO).to_string());
    scene.cluster.delete(&late).unwrap();
    drop(idle);
    crate::common::until_connected(&scene.friend, &scene.target.at(crate::scene::ECHO).to_string());
    scene.victim_is_well("bad messages to the agent");
    // The pod that came and went may have left what is made once.
    wait::until("every descriptor is closed again", BOUND, || (files(agent) <= before + 8).then_some(())).unwrap();
    assert_eq!(node.agent().unwrap().pid(), Some(agent), "the agent lives");
    scene.ends_as_it_was(32 << 10);
}
