//! A real Kubernetes on one machine: etcd, the control plane, and nodes with kubelet, kube-proxy and containerd, each in
//! network and mount namespaces of its own. What the rest of this crate plays is real here.
//!
//! ```no_run
//! # fn main() -> Result<(), tests::Error> {
//! let cluster = tests::kubernetes::Kubernetes::builder().start()?;
//! let nodes = cluster.kubectl(["get", "nodes", "--output", "wide"])?;
//! println!("{nodes}");
//! # Ok(())
//! # }
//! ```
//!
//! # Addresses
//! As in the played cluster: every cluster lives in namespaces of its own. The control plane and the resolver are
//! `172.31.0.1`, node k is `172.31.k.2`, its pods are in `10.244.k.0/24`, ClusterIPs in `10.96.0.0/16`, DNS is
//! `10.96.0.10`; with IPv6 nodes also `fd31:0:0:k::2`, their pods in `fd10:244:0:k::/64`, ClusterIPs in `fd96::/112`. The API server is reached from the machine through a port of the loopback, which the kubeconfig names.
//!
//! # What is left on the machine
//! Nothing, also if the harness is killed: processes die with it or are found by their control groups
//! ([`crate::cleanup`]), mounts and links go with their namespaces. The kubelet's settings of the whole machine
//! (`vm.overcommit_memory` and others) are kept from it.

pub mod api;
mod api_server;
pub(crate) mod cgroups;
pub mod cli;
mod files;
pub mod image;
mod names;
mod node;
pub mod pki;
pub mod programs;
mod root;

use std::ffi::OsStr;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use api::Api;
use image::{Images, Recipe};
use names::Services;
use node::Surroundings;
use pki::{MASTERS, Pki};
use programs::{CLUSTER, CONTROL, Programs};

pub use api_server::{ApiServer, Place};
pub use node::Node;

use crate::Error;
use crate::cgroup::{Cgroup, Hierarchy};
use crate::cleanup::{self, ClusterId};
use crate::cluster::{bin_dir, router};
use crate::component::Component;
use crate::error::Context;
use crate::families::Families;
use crate::forward::Forward;
use crate::netns::NetNs;
use crate::process::Spec;
use crate::resolver::Resolver;

/// Address of the control plane and of the resolver.
pub const FABRIC_IP: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 1);
/// All pods' addresses.
pub const POD_NETWORKS: &str = "10.244.0.0/16";
/// All pods' IPv6 addresses, where there are any.
pub const POD_NETWORKS_V6: &str = "fd10:244::/48";
/// ClusterIP of the cluster's DNS.
pub const DNS_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// How long something may take that all parts together bring about.
const SETTLED: Duration = Duration::from_secs(120);

/// Called with each step that is done, and how long it took.
type Progress = Arc<dyn Fn(&str, Duration) + Send + Sync>;

/// A cluster to be started.
#[must_use]
pub struct Builder {
    nodes: u8,
    families: Families,
    programs: Option<PathBuf>,
    bins: Option<PathBuf>,
    images: Vec<Recipe>,
    progress: Progress,
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder").field("nodes", &self.nodes).field("images", &self.images).finish_non_exhaustive()
    }
}

impl Builder {
    /// How many nodes, 1 to 99. Default: 2.
    pub fn nodes(mut self, nodes: u8) -> Self {
        self.nodes = nodes.clamp(1, 99);
        self
    }

    /// Address families of nodes and pods: IPv4, which is the default, or both.
    pub fn families(mut self, families: Families) -> Self {
        self.families = families;
        self
    }

    /// Folder of Kubernetes' programs. Default: `KUBERNETES_BIN_DIR`.
    pub fn programs(mut self, folder: impl Into<PathBuf>) -> Self {
        self.programs = Some(folder.into());
        self
    }

    /// Folder of our own programs, of which images are made. Default: [`bin_dir`].
    pub fn bin_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.bins = Some(folder.into());
        self
    }

    /// More images for every node, beside `culvert/app:dev`.
    pub fn images(mut self, recipes: impl IntoIterator<Item = Recipe>) -> Self {
        self.images.extend(recipes);
        self
    }

    /// Is told of each step that is done.
    pub fn progress(mut self, told: impl Fn(&str, Duration) + Send + Sync + 'static) -> Self {
        self.progress = Arc::new(told);
        self
    }

    /// Starts it: when this returns all nodes are Ready.
    ///
    /// # Errors
    /// A program is missing, or a part does not become ready in time; the text names it and has the tail of its log.
    pub fn start(self) -> Result<Kubernetes, Error> {
        let needed = [CONTROL, CLUSTER];
        let programs = match &self.programs {
            Some(folder) => Programs::at(folder, &needed)?,
            None => Programs::from_env(&needed)?,
        };
        let bins = self.bins.clone().map_or_else(bin_dir, Ok)?;
        cleanup::sweep()?;
        let id = ClusterId::new()?;
        let hierarchy = Hierarchy::detect()?;
        let unfinished = Remains { hierarchy, id };
        let folder = id.folder();
        fs::create_dir_all(&folder).during(|| format!("making {}", folder.display()))?;
        cleanup::note(&unfinished.hierarchy, &id)?;
        let group = Cgroup::create(&unfinished.hierarchy, &id.group())?;
        let started = Started { builder: self, programs, bins, id, folder, group };
        started.start(unfinished)
    }

    fn step<T>(&self, what: &str, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let start = Instant::now();
        let done = work()?;
        (self.progress)(what, start.elapsed());
        Ok(done)
    }
}

/// A cluster that is being started.
struct Started {
    builder: Builder,
    programs: Programs,
    bins: PathBuf,
    id: ClusterId,
    folder: PathBuf,
    group: Cgroup,
}

impl Started {
    fn start(self, remains: Remains) -> Result<Kubernetes, Error> {
        let families = self.builder.families;
        let fabric = Arc::new(NetNs::create_for(families, "fabric")?);
        router(&fabric, families, &[FABRIC_IP.into()])?;
        let pki = Arc::new(Pki::create(&self.folder.join("pki"))?);
        let control = self.group.child("control")?;
        let place = Place::Network(Arc::clone(&fabric), FABRIC_IP);
        // Nodes have their runtime and their images when the API server is there.
        let (server, nodes) = std::thread::scope(|scope| {
            let nodes = scope.spawn(|| self.nodes(&fabric, &pki));
            let server = self.builder.step("etcd and kube-apiserver", || {
                ApiServer::start_in(&self.programs, &self.folder, &place, Arc::clone(&pki), Some(&control))
            });
            let nodes = nodes.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (server, nodes)
        });
        let (server, nodes) = (server?, nodes?);
        let secure = SocketAddr::from((FABRIC_IP, 6443));
        let forward = Forward::start((Ipv4Addr::LOCALHOST, 0).into(), Arc::clone(&fabric), secure)?;
        let kubeconfig =
            pki.kubeconfig("host", &format!("https://{}", forward.local()), "culvert-admin", Some(MASTERS))?;
        let resolver = Resolver::start(&fabric, &[FABRIC_IP.into()], Arc::new(Services(server.api().clone())))?;
        let (controllers, scheduler) = self.controllers(&server, &fabric, &control)?;
        let cluster = Kubernetes {
            nodes,
            controllers,
            scheduler,
            server,
            forward,
            resolver,
            kubeconfig,
            fabric,
            programs: self.programs,
            bins: self.bins,
            folder: self.folder,
            _remains: remains,
        };
        self.builder.step("all nodes Ready", || cluster.bring_up())?;
        Ok(cluster)
    }

    fn nodes(&self, fabric: &NetNs, pki: &Pki) -> Result<Vec<Node>, Error> {
        let url = format!("https://{}", SocketAddr::from((FABRIC_IP, 6443)));
        let around = Surroundings {
            id: self.id,
            families: self.builder.families,
            folder: &self.folder,
            group: &self.group,
            fabric,
            programs: &self.programs,
            pki,
            server: &url,
        };
        let logs = self.folder.join("logs");
        fs::create_dir_all(&logs).during(|| format!("making {}", logs.display()))?;
        let nodes = self.builder.step("nodes with containerd", || {
            let nodes = (1..=self.builder.nodes).map(|index| Node::create(index, &around));
            let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
            nodes.iter().try_for_each(|node| node.runtime.launch())?;
            nodes.iter().try_for_each(|node| node.runtime.wait_ready())?;
            Ok(nodes)
        })?;
        self.builder.step("images", || {
            let recipes: Vec<Recipe> =
                Recipe::basic(&self.bins).into_iter().chain(self.builder.images.clone()).collect();
            load(&nodes, &Images::build(&recipes)?)
        })?;
        Ok(nodes)
    }

    fn controllers(
        &self,
        server: &ApiServer,
        fabric: &Arc<NetNs>,
        group: &Cgroup,
    ) -> Result<(Component, Component), Error> {
        let path = |name: &str| server.pki().path(name).display().to_string();
        let start = |name: &str, more: &[String]| -> Result<Component, Error> {
            let kubeconfig = server.kubeconfig_for(name, &format!("system:{name}"), Some(MASTERS))?;
            let log = self.folder.join("logs").join(format!("{name}.log"));
            let mut spec = Spec::new(name, self.programs.path(name), log).args(more.iter().cloned()).args([
                format!("--kubeconfig={}", kubeconfig.display()),
                "--leader-elect=false".to_owned(),
                "--bind-address=127.0.0.1".to_owned(),
                "--kube-api-qps=500".to_owned(),
                "--kube-api-burst=1000".to_owned(),
            ]);
            (spec.network, spec.group) = (Some(Arc::clone(fabric)), Some(group.clone()));
            // What waits for them waits for what they do.
            let component = Component::new(spec, || Ok(true));
            component.start()?;
            Ok(component)
        };
        let controllers = start(
            "kube-controller-manager",
            &[
                format!("--service-account-private-key-file={}", path("service-account.key")),
                format!("--root-ca-file={}", path("ca.crt")),
                format!("--cluster-signing-cert-file={}", path("ca.crt")),
                format!("--cluster-signing-key-file={}", path("ca.key")),
            ],
        )?;
        Ok((controllers, start("kube-scheduler", &[])?))
    }
}

/// A running cluster. Dropping it ends every process and removes everything that was made.
#[derive(Debug)]
pub struct Kubernetes {
    // Ends in this order.
    nodes: Vec<Node>,
    /// kube-controller-manager.
    pub controllers: Component,
    /// kube-scheduler.
    pub scheduler: Component,
    forward: Forward,
    resolver: Resolver,
    server: ApiServer,
    kubeconfig: PathBuf,
    fabric: Arc<NetNs>,
    programs: Programs,
    bins: PathBuf,
    folder: PathBuf,
    /// Last.
    _remains: Remains,
}

impl Kubernetes {
    /// A builder: two nodes, the programs of `KUBERNETES_BIN_DIR`.
    pub fn builder() -> Builder {
        Builder {
            nodes: 2,
            families: Families::V4,
            programs: None,
            bins: None,
            images: Vec::new(),
            progress: Arc::new(|_, _| ()),
        }
    }

    fn bring_up(&self) -> Result<(), Error> {
        let api = self.api();
        for node in &self.nodes {
            api.create("/api/v1/nodes", &node.object())?;
            node.kubelet.launch()?;
            node.proxy.launch()?;
        }
        self.announce_dns()?;
        for node in &self.nodes {
            node.kubelet.wait_ready()?;
            node.proxy.wait_ready()?;
            let path = format!("/api/v1/nodes/{}", node.name);
            let ready = api.until(&format!("{} Ready", node.name), &path, SETTLED, |object| {
                let conditions = object["status"]["conditions"].as_array()?;
                conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True").then_some(())
            });
            ready.map_err(|error| with_log(error, &node.kubelet))?;
        }
        // Pods of the default namespace are refused before it has its service account.
        let path = "/api/v1/namespaces/default/serviceaccounts/default";
        let there = api.until("the default service account", path, SETTLED, |_| Some(()));
        there.map_err(|error| with_log(error, &self.controllers))
    }

    /// The cluster's DNS as a service, as every cluster has it; behind it is the harness's resolver.
    fn announce_dns(&self) -> Result<(), Error> {
        let metadata = json!({"name": "kube-dns", "namespace": "kube-system"});
        let ports = |key: &str| json!([{"name": "dns", "protocol": "UDP", key: 53}, {"name": "dns-tcp", "protocol": "TCP", key: 53}]);
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata,
            "spec": {"clusterIP": DNS_IP, "ports": ports("port")},
        });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": "kube-dns", "namespace": "kube-system", "labels": {"kubernetes.io/service-name": "kube-dns"},
            },
            "addressType": "IPv4", "endpoints": [{"addresses": [FABRIC_IP]}], "ports": ports("port"),
        });
        // The namespace comes a moment after the API server is ready.
        let api = self.api();
        api.until("the namespace kube-system", "/api/v1/namespaces/kube-system", SETTLED, |_| Some(()))?;
        api.create("/api/v1/namespaces/kube-system/services", &service)?;
        api.create("/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices", &slice)
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// etcd and the API server.
    pub fn server(&self) -> &ApiServer {
        &self.server
    }

    /// A client of the API server with every right.
    pub fn api(&self) -> &Api {
        self.server.api()
    }

    /// The kubeconfig file for programs on the machine, with every right.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The cluster's folder, with `logs/` and `pki/`.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Kubernetes' programs.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// The network of the control plane, which joins the nodes.
    pub fn fabric(&self) -> &Arc<NetNs> {
        &self.fabric
    }

    /// The cluster's DNS.
    pub fn resolver(&self) -> &Resolver {
        &self.resolver
    }

    /// The machine's port of the API server.
    pub fn address(&self) -> SocketAddr {
        self.forward.local()
    }

    /// Runs `kubectl` and gives what it printed.
    ///
    /// # Errors
    /// It fails; what it said is in the error.
    pub fn kubectl<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<String, Error> {
        let done = self.kubectl_output(args)?;
        if done.status.success() {
            return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
        }
        let log = format!(": {}", String::from_utf8_lossy(&done.stderr).trim());
        Err(Error::Exited { name: "kubectl".to_owned(), status: done.status, log })
    }

    /// Runs `kubectl`, however it ends.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn kubectl_output<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<Output, Error> {
        let mut command = Command::new(self.programs.path("kubectl"));
        // Its cache of what the API server has goes to the cluster's folder.
        command.args(args).env("KUBECONFIG", &self.kubeconfig).env("HOME", &self.folder);
        command.output().during(|| "running kubectl".to_owned())
    }

    /// Applies objects, as `kubectl apply --server-side` does. `name` names the text in the cluster's folder.
    ///
    /// # Errors
    /// As [`Kubernetes::kubectl`].
    pub fn apply(&self, name: &str, yaml: &str) -> Result<String, Error> {
        let file = self.folder.join(name);
        fs::write(&file, yaml).during(|| format!("writing {}", file.display()))?;
        self.kubectl([OsStr::new("apply"), "--server-side".as_ref(), "--filename".as_ref(), file.as_os_str()])
    }

    /// Builds images and gives them to all nodes.
    ///
    /// # Errors
    /// As [`Images::build`] and [`Node::load`].
    pub fn load_images(&self, recipes: &[Recipe]) -> Result<(), Error> {
        load(&self.nodes, &Images::build(recipes)?)
    }

    /// Loads `culvert/ztunnel:dev` and `culvert/culvertd:dev` onto all nodes.
    ///
    /// # Errors
    /// As [`Kubernetes::load_images`].
    pub fn load_mesh_images(&self) -> Result<(), Error> {
        self.load_images(&Recipe::mesh(&self.bins))
    }

    /// All long-running parts with their names.
    pub fn components(&self) -> Vec<(String, &Component)> {
        let control = [
            ("etcd", &self.server.store),
            ("kube-apiserver", &self.server.component),
            ("kube-controller-manager", &self.controllers),
            ("kube-scheduler", &self.scheduler),
        ];
        let control = control.into_iter().map(|(name, component)| (name.to_owned(), component));
        let nodes = self.nodes.iter().flat_map(|node| {
            let parts = [("containerd", &node.runtime), ("kubelet", &node.kubelet), ("kube-proxy", &node.proxy)];
            parts.map(|(part, component)| (format!("{}/{part}", node.name), component))
        });
        control.chain(nodes).collect()
    }
}

/// What a cluster leaves if nobody removes it; removes it when dropped.
#[derive(Debug)]
struct Remains {
    hierarchy: Hierarchy,
    id: ClusterId,
}

impl Drop for Remains {
    #[expect(clippy::print_stderr, reason = "what a failed clean-up must not hide")]
    fn drop(&mut self) {
        if let Err(error) = cleanup::remove(&self.hierarchy, &self.id) {
            eprintln!("cleaning up cluster {}: {error}", self.id);
        }
    }
}

/// Gives images to several nodes at once.
fn load(nodes: &[Node], images: &Images) -> Result<(), Error> {
    std::thread::scope(|scope| {
        let running: Vec<_> = nodes.iter().map(|node| scope.spawn(|| node.load(images))).collect();
        running.into_iter().try_for_each(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn with_log(error: Error, component: &Component) -> Error {
    match error {
        Error::Timeout { what, waited, log } => {
            let tail = component.log_tail(15);
            Error::Timeout { what, waited, log: format!("{log}; the log of {} ends:\n{tail}", component.spec().name) }
        }
        other => other,
    }
}
