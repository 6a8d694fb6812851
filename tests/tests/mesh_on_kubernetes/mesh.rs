//! A cluster with the mesh on it.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::capture::{LinkKind, Recorder};
use tests::cluster::bin_dir;
use tests::families::Families;
use tests::kubernetes::Kubernetes;
use tests::kubernetes::image::Recipe;
use tests::metrics::{self, Sample};
use tests::netns::NetNs;
use tests::picture::{Picture, differences};
use tests::{Error, http, wait};

pub const BOUND: Duration = Duration::from_secs(120);
/// Namespace of the mesh's own pods.
pub const SYSTEM: &str = "culvert-system";
/// What a node has until its agent is ready.
const TAINT: &str = "culvert.dev/agent-not-ready";
/// What says that a pod is captured.
pub const REDIRECTION: &str = "/metadata/annotations/ambient.istio.io~1redirection";

/// The mesh, installed as a user installs it.
pub struct Mesh {
    pub cluster: Kubernetes,
    /// Everything between the nodes.
    pub wire: Recorder,
    _turn: MutexGuard<'static, ()>,
}

/// One cluster at a time: each wants the machine for itself.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mesh {
    /// Starts a cluster whose wire is watched for the markers, and applies the manifests.
    pub fn install(markers: &[&str]) -> Self {
        let mesh = Self::without(markers, Families::V4);
        mesh.put_in_place();
        mesh
    }

    /// A cluster whose wire is watched for the markers. The mesh is not there yet.
    pub fn without(markers: &[&str], families: Families) -> Self {
        let turn = alone();
        let begun = Instant::now();
        let images = Recipe::mesh(&bin_dir().unwrap());
        let cluster = Kubernetes::builder().families(families).images(images).start().unwrap();
        let markers: Vec<String> = markers.iter().map(|marker| (*marker).to_owned()).collect();
        let wire = Recorder::start(&markers).unwrap();
        for (index, node) in cluster.nodes().iter().enumerate() {
            wire.add(node.network(), "eth0", LinkKind::Node { node: index + 1 }).unwrap();
        }
        eprintln!("cluster after {:.1?}", begun.elapsed());
        Self { cluster, wire, _turn: turn }
    }

    /// Applies the manifests, and waits until the mesh is ready everywhere.
    pub fn put_in_place(&self) {
        let begun = Instant::now();
        // As nodes that register with it: no ordinary pod starts there before the mesh is ready for it.
        self.kubectl(&["taint", "nodes", "--all", &format!("{TAINT}=:NoSchedule")]).unwrap();
        self.apply_manifests();
        self.rolled_out();
        wait::until("nodes without the startup taint", BOUND, || {
            let nodes = self.cluster.api().list("/api/v1/nodes").unwrap();
            nodes.iter().all(|node| !node["spec"]["taints"].to_string().contains(TAINT)).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", self.state()));
        eprintln!("mesh after {:.1?} more", begun.elapsed());
    }

    /// The shipped manifests; only the kubelet's cgroup is another one here than where systemd starts it.
    fn apply_manifests(&self) {
        let kubelet = "/host/cgroup/system.slice/kubelet.service";
        for path in ["crds", "culvert"].into_iter().flat_map(manifests) {
            let text = fs::read_to_string(&path).unwrap();
            let here = format!("/host/cgroup/{}/$(NODE_NAME)/kubelet", self.kubelets());
            let name = path.file_name().unwrap().to_str().unwrap();
            self.cluster.apply(name, &text.replace(kubelet, &here)).unwrap();
        }
    }

    /// The group that those of all nodes are in, below the mount of the cgroups.
    fn kubelets(&self) -> String {
        let kubelet = self.cluster.nodes()[0].kubelet.pid().unwrap();
        let groups = fs::read_to_string(format!("/proc/{kubelet}/cgroup")).unwrap();
        let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).expect("cgroup v2");
        let top = own.strip_suffix("/node1/kubelet").unwrap_or_else(|| panic!("{own}"));
        let beside = Path::new("/sys/fs/cgroup/unified").is_dir();
        if beside { format!("unified/{top}") } else { top.to_owned() }
    }

    /// Waits until every part of the mesh runs everywhere in its newest version.
    pub fn rolled_out(&self) {
        for part in ["deployment/culvertd", "daemonset/culvert-node", "daemonset/ztunnel"] {
            let wait = ["rollout", "status", part, "--namespace", SYSTEM, "--timeout=120s"];
            self.kubectl(&wait).unwrap_or_else(|error| panic!("{error}\n{}", self.state()));
        }
    }

    /// Waits until no proxy but one is left on each node: one that drains goes on with who is with it, and what it logged of
    /// them goes with it.
    pub fn one_proxy_on_each_node(&self) {
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods?labelSelector=app.kubernetes.io%2Fname%3Dztunnel");
        let settled = || {
            let pods = self.cluster.api().list(&path).unwrap();
            let nodes: BTreeSet<String> = pods.iter().map(|pod| text(pod, "/spec/nodeName")).collect();
            (pods.len() == nodes.len() && pods.iter().all(is_ready)).then_some(())
        };
        wait::until("one proxy on each node", BOUND, settled)
            .unwrap_or_else(|error| panic!("{error}\n{}", self.state()));
    }

    pub fn kubectl(&self, args: &[&str]) -> Result<String, Error> {
        self.cluster.kubectl(args)
    }

    /// Pods of a namespace.
    pub fn pods(&self, namespace: &str) -> Vec<Value> {
        self.cluster.api().list(&format!("/api/v1/namespaces/{namespace}/pods")).unwrap()
    }

    /// Waits until all pods of a namespace are Ready, and said to be captured or not.
    pub fn until_pods(&self, namespace: &str, captured: bool) {
        let what = format!("pods of {namespace} Ready, and captured: {captured}");
        let settled = wait::until(&what, BOUND, || {
            let pods = self.pods(namespace);
            let good = |pod: &Value| {
                let is_captured = pod.pointer(REDIRECTION).is_some_and(|value| value == "enabled");
                is_ready(pod) && is_captured == captured && pod.pointer("/metadata/deletionTimestamp").is_none()
            };
            (!pods.is_empty() && pods.iter().all(good)).then_some(())
        });
        settled.unwrap_or_else(|error| panic!("{error}\n{}", self.state()));
    }

    /// The network of each pod of a namespace, by the label `app`.
    pub fn networks(&self, namespace: &str) -> Vec<(String, NetNs)> {
        let network = |pod: &Value| {
            let (app, uid) = (text(pod, "/metadata/labels/app"), text(pod, "/metadata/uid"));
            let process = processes_of(&uid).first().copied().unwrap_or_else(|| panic!("no process of {app} ({uid})"));
            (app.clone(), NetNs::of_process(process.cast_unsigned(), app).unwrap())
        };
        self.pods(namespace).iter().map(network).collect()
    }

    /// The name of the one pod of a namespace with that label `app`.
    pub fn pod_of(&self, namespace: &str, app: &str) -> Value {
        let path = format!("/api/v1/namespaces/{namespace}/pods?labelSelector=app%3D{app}");
        self.cluster.api().list(&path).unwrap().into_iter().next().unwrap_or_else(|| panic!("no pod {app}"))
    }

    /// What `culvert-app` prints in a pod, also where it fails.
    pub fn run(&self, namespace: &str, app: &str, args: &[&str]) -> Value {
        let pod = text(&self.pod_of(namespace, app), "/metadata/name");
        let command = ["exec", "--namespace", namespace, pod.as_str(), "--", "culvert-app"];
        let done = self.cluster.kubectl_output([&command[..], args].concat()).unwrap();
        let said = String::from_utf8_lossy(&done.stdout);
        let line = said.lines().rfind(|line| line.starts_with('{')).unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{args:?}: {error}: {done:?}"))
    }

    /// The pod of a DaemonSet of the mesh on a node.
    pub fn part_on(&self, name: &str, node: &str) -> String {
        let path = format!(
            "/api/v1/namespaces/{SYSTEM}/pods?labelSelector=app.kubernetes.io%2Fname%3D{name}&\
             fieldSelector=spec.nodeName%3D{node}"
        );
        let pods = self.cluster.api().list(&path).unwrap();
        let pod = pods.iter().find(|pod| is_ready(pod)).unwrap_or_else(|| panic!("no {name} on {node}"));
        text(pod, "/metadata/name")
    }

    /// Sends a signal to what runs in a pod of the mesh, but for what holds its namespaces.
    pub fn signal(&self, pod: &Value, signal: Signal) {
        let is_container = |pid: &i32| {
            let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            program.file_name().is_some_and(|name| name == "ztunnel" || name == "culvertd")
        };
        let of_pod = processes_of(&text(pod, "/metadata/uid")).into_iter().filter(is_container);
        let told = of_pod.filter(|pid| kill(Pid::from_raw(*pid), signal).is_ok());
        assert!(told.count() > 0, "no process of {pod}");
    }

    /// Kills what runs in a pod of the mesh, and waits until the kubelet has started it again and it is ready.
    pub fn crash(&self, pod: &str) {
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{pod}");
        let restarts = |pod: &Value| pod.pointer("/status/containerStatuses/0/restartCount").and_then(Value::as_u64);
        let found = self.cluster.api().get(&path).unwrap().expect("the pod");
        // Without a word.
        self.signal(&found, Signal::SIGKILL);
        let again = |now: &Value| (restarts(now) > restarts(&found) && is_ready(now)).then_some(());
        let back = self.cluster.api().until(&format!("{pod} runs again"), &path, BOUND, again);
        back.unwrap_or_else(|error| panic!("{error}\n{}", self.state()));
    }

    /// Kills what runs in a pod of the mesh, and has its controller make another pod in its place: the kubelet would wait
    /// longer each time before it starts the same one again.
    pub fn kill(&self, pod: &str) {
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{pod}");
        self.signal(&self.cluster.api().get(&path).unwrap().expect("the pod"), Signal::SIGKILL);
        self.kubectl(&["delete", "pod", pod, "--namespace", SYSTEM, "--grace-period=0", "--force"]).unwrap();
    }

    /// What the proxies of both nodes have taken in for pods of a namespace from peers that proved no identity, as samples of
    /// their metrics: bytes, so that a peer that was cut off before it had proved anything does not count.
    pub fn unproven(&self, namespace: &str) -> Vec<Sample> {
        let of_node = |node: &str| {
            let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{}", self.part_on("ztunnel", node));
            let proxy = text(&self.cluster.api().get(&path).unwrap().expect("the proxy"), "/status/podIP");
            let address = (proxy.parse::<IpAddr>().unwrap(), 15020).into();
            let told = http::get(self.cluster.fabric(), address, "/metrics").unwrap().body;
            let carried = ["istio_tcp_received_bytes_total", "istio_tcp_sent_bytes_total"]
                .into_iter()
                .flat_map(|name| metrics::samples(&told, name))
                .filter(|sample| {
                    let is = |label, value| sample.label(label) == Some(value);
                    is("reporter", "destination")
                        && is("destination_workload_namespace", namespace)
                        && !is("connection_security_policy", "mutual_tls")
                        && sample.value > 0.0
                });
            carried.collect::<Vec<_>>()
        };
        [of_node("node1"), of_node("node2")].concat()
    }

    /// Puts a DaemonSet of the mesh onto one node alone, or onto all again.
    pub fn place(&self, part: &str, on: Option<&str>) {
        let selector = json!({"kubernetes.io/hostname": on});
        let patch = json!({"spec": {"template": {"spec": {"nodeSelector": selector}}}}).to_string();
        self.kubectl(&["patch", "daemonset", part, "--namespace", SYSTEM, "--patch", &patch]).unwrap();
    }

    /// The pods that a node's agent has in force, as it answers `ztunnel pods`; none while it is too busy to answer.
    pub fn enrolled_on(&self, node: &str) -> Option<Vec<Value>> {
        let agent = self.part_on("culvert-node", node);
        let ask = ["exec", "--namespace", SYSTEM, agent.as_str(), "--", "ztunnel", "pods", "--output", "json"];
        let said = self.kubectl(&ask).ok()?;
        Some(serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}")))
    }

    /// For a test that fails: what there is, and what the mesh said last.
    pub fn state(&self) -> String {
        let mut said = self.kubectl(&["get", "pods", "--all-namespaces", "--output", "wide"]).unwrap_or_default();
        for part in ["deployment/culvertd", "daemonset/culvert-node", "daemonset/ztunnel"] {
            let log = ["logs", part, "--namespace", SYSTEM, "--all-pods", "--tail=20"];
            said += &self.kubectl(&log).unwrap_or_else(|error| error.to_string());
        }
        said + &self.kubectl(&["get", "events", "--all-namespaces"]).unwrap_or_default()
    }
}

/// A picture that stays as it is: links that are new get addresses and routes for a while.
pub fn lasting(look: impl Fn() -> Picture) -> Picture {
    let still = || {
        let one = look();
        thread::sleep(Duration::from_secs(3));
        let two = look();
        differences(&one, &two).is_empty().then_some(two)
    };
    wait::until("a state that stays", BOUND, still).unwrap()
}

/// The processes of a pod, found by their cgroup.
pub fn processes_of(uid: &str) -> Vec<i32> {
    let group = format!("pod{uid}");
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        // One that has ended meanwhile is none of it.
        fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?.contains(&group).then_some(pid)
    });
    processes.collect()
}

/// The files of a folder of manifests, in the order in which they are applied.
pub fn manifests(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests").join(folder);
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

pub fn text(object: &Value, at: &str) -> String {
    object.pointer(at).and_then(Value::as_str).unwrap_or_else(|| panic!("no {at} in {object}")).to_owned()
}

pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    conditions.is_some_and(|all| all.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"))
}
