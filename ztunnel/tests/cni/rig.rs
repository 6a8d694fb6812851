//! An agent, a plugin, a runtime's environment, and pods that are network namespaces with a path.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mesh_proto::node::{self, pod_request};
use mesh_runtime::seqpacket::BlockingSocket;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use prost::Message as _;
use serde_json::{Value, json};

/// Bound of every wait; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(40);
/// For how long the plugin asks the agent, where nothing needs more.
const BRIEF: Duration = Duration::from_secs(6);
/// As long as an agent may take to start on a machine that is busy.
pub const PATIENT: Duration = Duration::from_secs(60);
const ZTUNNEL: &str = env!("CARGO_BIN_EXE_ztunnel");

/// One node's folders.
pub struct Rig {
    folder: tempfile::TempDir,
    number: u32,
}

impl Rig {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let folder = tempfile::Builder::new().prefix("culvert-cni-test-").tempdir().unwrap();
        let rig = Self { folder, number: NEXT.fetch_add(1, Ordering::Relaxed) };
        fs::create_dir(rig.path("bpf")).unwrap();
        fs::create_dir(rig.path("source")).unwrap();
        mount(Some("bpf"), &rig.path("bpf"), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts an agent and waits until it answers. Dropping it is a SIGKILL.
    pub fn agent(&self) -> Agent {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("agent.log")).unwrap();
        let child = Command::new(ZTUNNEL)
            .arg("agent")
            .arg("--run-dir")
            .arg(self.path("run"))
            .arg("--bpffs")
            .arg(self.path("bpf"))
            .arg("--cgroup-root")
            .arg(cgroup_root())
            .arg("--source-dir")
            .arg(self.path("source"))
            .env_clear()
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut agent = Agent(child);
        wait("the agent answers", || {
            if let Some(status) = agent.0.try_wait().unwrap() {
                panic!("the agent ended: {status}: {}", fs::read_to_string(self.path("agent.log")).unwrap());
            }
            self.status().0.status.success()
        });
        agent
    }

    /// An agent that has left word of this pod.
    pub fn agent_that_knows(&self, pod: &str) -> Agent {
        let agent = self.agent();
        let (namespace, name) = pod.split_once('/').unwrap();
        wait("the agent leaves word", || {
            let text = fs::read(self.path("run/enrolment.json")).unwrap_or_default();
            let known: Value = serde_json::from_slice(&text).unwrap_or_default();
            known["pods"][namespace][name].is_object()
        });
        agent
    }

    pub fn wait_for_log(&self, sandbox: &str, what: &str) {
        wait(what, || {
            let log = fs::read_to_string(self.path("agent.log")).unwrap();
            log.lines().any(|line| line.contains(sandbox) && line.contains(what))
        });
    }

    /// Writes a Namespace with this mode; empty: no label.
    pub fn namespace(&self, name: &str, mode: &str) {
        let object =
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels(mode) } });
        self.write(name, &object);
    }

    /// Writes a Pod.
    pub fn pod(&self, namespace: &str, name: &str, uid: &str, mode: &str) {
        self.pod_of_class(namespace, name, uid, mode, &Value::Null);
    }

    /// Writes a Pod with this runtime class.
    pub fn pod_of_class(&self, namespace: &str, name: &str, uid: &str, mode: &str, class: &Value) {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": namespace, "uid": uid, "labels": labels(mode) },
            "spec": { "serviceAccountName": format!("{name}-account"), "runtimeClassName": class },
        });
        self.write(&format!("{namespace}.{name}"), &object);
    }

    fn write(&self, name: &str, object: &Value) {
        let partial = self.path(name);
        fs::write(&partial, object.to_string()).unwrap();
        fs::rename(partial, self.path("source").join(format!("{name}.yaml"))).unwrap();
    }

    /// What the plugins before this one say of a pod.
    pub fn previous(&self, net: &PodNet) -> Value {
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [{ "name": "eth0", "sandbox": net.path() }],
            "ips": [{ "address": format!("{}/24", net.address), "interface": 0 }],
        })
    }

    pub fn add(&self, namespace: &str, name: &str, uid: &str, sandbox: &str, net: &PodNet) -> Done {
        self.plugin("ADD", &pod_arguments(namespace, name, uid), sandbox, Some(net), &json!({}), BRIEF)
    }

    pub fn add_patiently(&self, namespace: &str, name: &str, uid: &str, sandbox: &str, net: &PodNet) -> Done {
        self.plugin("ADD", &pod_arguments(namespace, name, uid), sandbox, Some(net), &json!({}), PATIENT)
    }

    pub fn delete(&self, namespace: &str, name: &str, uid: &str, sandbox: &str, net: &PodNet) -> Done {
        self.plugin("DEL", &pod_arguments(namespace, name, uid), sandbox, Some(net), &json!({}), BRIEF)
    }

    pub fn check(&self, namespace: &str, name: &str, uid: &str, sandbox: &str, net: &PodNet) -> Done {
        self.plugin("CHECK", &pod_arguments(namespace, name, uid), sandbox, Some(net), &json!({}), BRIEF)
    }

    pub fn gc(&self, valid: &[&str]) -> Done {
        let valid: Vec<Value> = valid.iter().map(|id| json!({ "containerID": id, "ifname": "eth0" })).collect();
        self.plugin("GC", "", "", None, &json!({ "cni.dev/valid-attachments": valid }), BRIEF)
    }

    pub fn status(&self) -> Done {
        self.plugin("STATUS", "", "", None, &json!({}), BRIEF)
    }

    fn plugin(
        &self,
        command: &str,
        arguments: &str,
        sandbox: &str,
        net: Option<&PodNet>,
        more: &Value,
        patience: Duration,
    ) -> Done {
        let mut configuration = json!({
            "cniVersion": "1.1.0", "name": "net", "type": "ztunnel",
            "culvert": { "agentSocket": self.path("run/cni.sock"), "patienceSeconds": patience.as_secs() },
        });
        let fields = configuration.as_object_mut().unwrap();
        if let Some(net) = net {
            fields.insert("prevResult".into(), self.previous(net));
        }
        fields.extend(more.as_object().unwrap().clone());
        let mut plugin = Command::new(ZTUNNEL)
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", sandbox)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env("CNI_ARGS", arguments)
            .env("CNI_NETNS", net.map(PodNet::path).unwrap_or_default())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        serde_json::to_writer(plugin.stdin.take().unwrap(), &configuration).unwrap();
        Done(plugin.wait_with_output().unwrap())
    }

    /// Removes what an agent has written down of a pod.
    pub fn lose(&self, uid: &str) {
        fs::remove_file(self.path("run/pods").join(format!("{uid}.json"))).unwrap();
    }

    /// Takes the mesh off the node.
    pub fn uninstall(&self) {
        let uninstall = Command::new(ZTUNNEL)
            .args(["agent", "--uninstall", "--run-dir"])
            .arg(self.path("run"))
            .arg("--bpffs")
            .arg(self.path("bpf"))
            .arg("--cgroup-root")
            .arg(cgroup_root())
            .env_clear()
            .output();
        drop(uninstall);
    }

    /// How many pods have anything pinned, in the present layout.
    pub fn captured(&self) -> usize {
        let layout = fs::read_dir(self.path("bpf")).unwrap().next().unwrap().unwrap().path();
        fs::read_dir(layout.join("pods")).unwrap().count()
    }

    /// UID and service account of the pods that are enrolled, as checked in the kernel.
    pub fn enrolled(&self) -> Vec<(String, String)> {
        let socket = BlockingSocket::connect(&self.path("run/cni.sock"), PATIENCE).unwrap();
        let request = node::PodRequest { kind: Some(pod_request::Kind::List(node::ListPods::default())) };
        socket.send(&request.encode_to_vec(), &[]).unwrap();
        let answer = node::PodResponse::decode(socket.recv(64 << 10).unwrap().0).unwrap();
        let in_force = answer.pods.into_iter().filter(|state| state.not_enrolled_reason.is_empty());
        in_force.map(|state| state.pod.unwrap()).map(|pod| (pod.uid, pod.service_account)).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.uninstall();
        let _ = umount2(&self.path("bpf"), MntFlags::MNT_DETACH);
        if thread::panicking() {
            for name in ["agent.log", "run/cni.log"] {
                eprintln!("{name}:\n{}", fs::read_to_string(self.path(name)).unwrap_or_default());
            }
        }
    }
}

fn labels(mode: &str) -> Value {
    if mode.is_empty() { json!({}) } else { json!({ "istio.io/dataplane-mode": mode }) }
}

fn pod_arguments(namespace: &str, name: &str, uid: &str) -> String {
    format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={uid}")
}

/// A process that is killed when the value is dropped.
pub struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the plugin did.
pub struct Done(Output);

impl Done {
    /// Its result; nothing at all is `Null`.
    pub fn ok(&self) -> Value {
        assert!(self.0.status.success(), "{}", self.text());
        self.json()
    }

    /// The code of its error.
    pub fn code(&self) -> u64 {
        assert!(!self.0.status.success(), "{}", self.text());
        let error = self.json();
        assert_eq!(error["cniVersion"], "1.1.0");
        error["code"].as_u64().unwrap()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned() + &String::from_utf8_lossy(&self.0.stderr)
    }

    /// Standard output holds one JSON value or nothing.
    fn json(&self) -> Value {
        assert!(self.0.stderr.is_empty(), "{}", self.text());
        if self.0.stdout.is_empty() { Value::Null } else { serde_json::from_slice(&self.0.stdout).unwrap() }
    }
}

/// A pod's network namespace with a path, and one address on a link to nowhere.
pub struct PodNet {
    name: String,
    pub address: Ipv4Addr,
}

impl PodNet {
    pub fn new(rig: &Rig) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("culvert-cni-{}-{}-{number}", std::process::id(), rig.number);
        let octet = u8::try_from(number % 250 + 1).unwrap();
        let net = Self { name, address: Ipv4Addr::new(10, 244, 9, octet) };
        ip(&["netns", "add", &net.name]);
        net.ip(&["link", "set", "lo", "up"]);
        net.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "peer"]);
        net.ip(&["address", "add", &format!("{}/24", net.address), "dev", "eth0"]);
        net.ip(&["link", "set", "eth0", "up"]);
        net.ip(&["link", "set", "peer", "up"]);
        net.ip(&["route", "add", "default", "via", "10.244.9.254"]);
        net
    }

    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    fn ip(&self, arguments: &[&str]) -> String {
        ip(&[&["-n", &self.name], arguments].concat())
    }

    /// Whether the rules of capture are in it.
    pub fn is_captured(&self) -> bool {
        self.ip(&["rule", "show"]).contains("fwmark 0x601")
    }

    pub fn wait(&self, captured: bool, why: &str) {
        wait(why, || self.is_captured() == captured);
    }

    /// A process in it. It is in there when this returns.
    pub fn process(&self) -> Agent {
        let process = Agent(Command::new("ip").args(["netns", "exec", &self.name, "sleep", "600"]).spawn().unwrap());
        let (own, its) = (self.path(), format!("/proc/{}/ns/net", process.0.id()));
        let inode = |path: &str| fs::metadata(path).map(|file| file.ino()).ok();
        wait("a process in the namespace", || inode(&its).is_some_and(|found| Some(found) == inode(&own)));
        process
    }
}

impl Drop for PodNet {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

fn ip(arguments: &[&str]) -> String {
    let done = Command::new("ip").args(arguments).output().unwrap();
    assert!(done.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Where the cgroup v2 hierarchy is mounted.
fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
    Path::new(line.split(' ').nth(1).unwrap()).to_owned()
}

fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
