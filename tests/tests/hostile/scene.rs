//! Who is there: a pod that is attacked, a pod beside it whose traffic must go on, and somebody outside of the mesh with a
//! good certificate.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tests::cluster::Cluster;
use tests::families::Families;
use tests::metrics;
use tests::pod::{Pod, Running};
use tests::wait;

use crate::common::echo_any;
use crate::forge::{Forged, names, uri};

/// Longest wait for anything.
pub const BOUND: Duration = Duration::from_secs(20);
/// Port of the applications.
pub const ECHO: u16 = 7000;
/// Streams that are held through every attack.
const HELD: &str = "4";
/// New connections that are made and used at once.
const NEW: &str = "20";
/// Descriptors that the proxy may have more than before: sockets made in stock, connections to the control plane.
const SPARE_FILES: usize = 200;

/// A cluster under attack.
pub struct Scene {
    pub cluster: Cluster,
    /// On node 2, enrolled: what is attacked.
    pub target: Arc<Pod>,
    /// On node 2, enrolled: must notice nothing.
    pub victim: Arc<Pod>,
    /// On node 1, enrolled: the victim's client.
    pub friend: Arc<Pod>,
    /// On node 1, not enrolled: who attacks.
    pub peer: Arc<Pod>,
    held: Running,
    before: Gauges,
}

/// What must be as it was when an attack is over.
#[derive(Debug, Clone)]
struct Gauges {
    sockets_open: f64,
    files: usize,
    resident: usize,
}

impl Scene {
    /// Starts it all, in IPv4, with the victim's traffic.
    pub fn start() -> Self {
        Self::of(Families::V4, &[])
    }

    /// As [`Scene::start`], and what is attacked has IPv6 as well.
    pub fn dual() -> Self {
        Self::of(Families::Dual, &[])
    }

    /// As [`Scene::start`], with proxies that may hold so many MiB for receivers.
    pub fn holding(mebibytes: usize) -> Self {
        Self::of(Families::V4, &["--max-held-memory", &mebibytes.to_string()])
    }

    fn of(families: Families, proxy_args: &[&str]) -> Self {
        let cluster = Cluster::builder().families(families).proxy_args(proxy_args).start().unwrap();
        let target = echo_any(&cluster, "target", 2).enrolled(true).start().unwrap();
        let victim = echo_any(&cluster, "victim", 2).enrolled(true).start().unwrap();
        let friend = cluster.pod("friend").node(1).service_account("friend").enrolled(true).start().unwrap();
        let peer = cluster.pod("peer").node(1).service_account("peer").enrolled(false).start().unwrap();
        // What is measured from here on has been used once.
        for pod in [&target, &victim] {
            for ip in pod.ips() {
                crate::common::until_connected(&friend, &SocketAddr::new(ip, ECHO).to_string());
                crate::common::until_connected(&peer, &SocketAddr::new(ip, ECHO).to_string());
            }
        }
        let before = Gauges::read(&cluster);
        let held = friend.spawn(["hold", "--to", &victim.at(ECHO).to_string(), "--connections", HELD]).unwrap();
        held.wait_for("\"event\":\"open\"", BOUND).unwrap();
        Self { cluster, target, victim, friend, peer, held, before }
    }

    /// A port of the target, in every family that it has.
    pub fn target_at(&self, port: u16) -> Vec<SocketAddr> {
        self.target.ips().into_iter().map(|ip| (ip, port).into()).collect()
    }

    /// A good certificate for the peer's own identity.
    pub fn certificate(&self) -> Forged {
        names(&[uri(&self.peer.identity())]).signed(&self.cluster)
    }

    /// The victim's held streams go on, and new connections to it are made and used, while `what` goes on.
    pub fn victim_is_well(&self, what: &str) {
        let then = self.exchanges();
        let to = self.victim.at(ECHO).to_string();
        let args = ["parallel", "--to", &to, "--connections", NEW, "--timeout", "10000"];
        let report: Value = self.friend.run_json(args).unwrap();
        assert_eq!(report["succeeded"].to_string(), NEW, "{what}: new connections: {report}");
        wait::until(&format!("{what}: the held streams go on"), BOUND, || (self.exchanges() > then).then_some(()))
            .unwrap();
        assert!(self.held.process.running(), "{what}: {}", self.held.stdout());
    }

    /// Exchanges on the held streams so far, in tens.
    fn exchanges(&self) -> usize {
        let text = self.held.stdout();
        assert!(!text.contains("\"event\":\"end\""), "a held stream broke: {text}");
        text.matches("\"event\":\"alive\"").count()
    }

    /// Process id of the proxy that is attacked.
    pub fn proxy(&self) -> u32 {
        proxy(&self.cluster)
    }

    /// Connections that the attacked proxy carries.
    pub fn carried(&self) -> usize {
        // A count of connections is a whole number.
        Gauges::read(&self.cluster).sockets_open.max(0.0) as usize
    }

    /// Resident memory of the attacked proxy, in KiB.
    pub fn resident(&self) -> usize {
        resident(self.proxy())
    }

    /// What was counted is as it was before the attacks, and memory grew by `growth` KiB at most.
    pub fn ends_as_it_was(self, growth: usize) {
        let Self { cluster, before, held, .. } = self;
        held.process.terminate(BOUND).unwrap();
        let same = || {
            let now = Gauges::read(&cluster);
            (now.sockets_open <= before.sockets_open && now.files <= before.files + SPARE_FILES).then_some(now)
        };
        let now = wait::until("the gauges return to what they were", BOUND, same)
            .unwrap_or_else(|error| panic!("{error}: {before:?}, {:?}", Gauges::read(&cluster)));
        println!("before {before:?}, after {now:?}, highest {} KiB", highest(proxy(&cluster)));
        assert!(now.resident <= before.resident + growth, "{before:?}, then {now:?}");
    }
}

impl Gauges {
    fn read(cluster: &Cluster) -> Self {
        let text = cluster.node(2).unwrap().metrics().unwrap();
        let pid = proxy(cluster);
        Self {
            sockets_open: metrics::sum(&text, "istio_tcp_sockets_open", &[]),
            files: std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
            resident: resident(pid),
        }
    }
}

fn proxy(cluster: &Cluster) -> u32 {
    cluster.node(2).unwrap().proxy().unwrap().pid().expect("the proxy runs")
}

/// Resident memory of a process, in KiB.
pub fn resident(pid: u32) -> usize {
    status(pid, "VmRSS:")
}

/// The most memory that a process ever had, in KiB.
pub fn highest(pid: u32) -> usize {
    status(pid, "VmHWM:")
}

fn status(pid: u32, name: &str) -> usize {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
