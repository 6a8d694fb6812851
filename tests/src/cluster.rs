//! The cluster: builder, composition, and the end of everything.

mod builder;
mod deploy;
mod mesh;
mod settle;
mod shared;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

pub(crate) use builder::router;
pub use builder::{Builder, Mesh, PROXY_UID, bin_dir};
pub(crate) use shared::{Shared, join};

use crate::announce::Agent;
use crate::capture::{Recorder, Report};
use crate::cni::Cni;
use crate::component::Component;
use crate::control::ControlPlane;
use crate::error::Context;
use crate::families::Families;
use crate::forward::Forward;
use crate::kube::Directory;
use crate::mounts::MountNs;
use crate::netns::NetNs;
use crate::node::Node;
use crate::pod::{Output, Pod, PodBuilder};
use crate::process::{Signal, Spec};
use crate::resolver::Resolver;
use crate::{Error, cleanup};

/// A running cluster. Dropping it ends every process and removes everything that was made; when a test panics, the
/// ends of all logs are printed first.
#[derive(Debug)]
pub struct Cluster {
    pub(crate) shared: Arc<Shared>,
    pods: Mutex<Vec<Arc<Pod>>>,
}

/// A host attached to the fabric, outside the nodes and the mesh.
#[derive(Debug, Clone)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its IPv6 address, in a cluster with IPv6.
    pub address_v6: Option<Ipv6Addr>,
    /// Its network namespace.
    pub network: Arc<NetNs>,
}

impl Cluster {
    /// A builder: two nodes, the mesh on, no capture.
    pub fn builder() -> Builder {
        Builder::new()
    }

    pub(crate) fn new(shared: Shared) -> Self {
        Self { shared: Arc::new(shared), pods: Mutex::default() }
    }

    /// The cluster's name: harness's process id, its start time, a number.
    pub fn id(&self) -> String {
        self.shared.id.to_string()
    }

    /// Its folder, `/run/culvert-test/<id>`, with `logs/`, `source/` and a folder per node.
    pub fn folder(&self) -> &Path {
        &self.shared.folder
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.shared.nodes
    }

    /// A node, 1 for the first.
    ///
    /// # Errors
    /// No such node.
    pub fn node(&self, index: usize) -> Result<&Node, Error> {
        self.shared.node(index)
    }

    /// The agent of a node as the container runtime reaches it.
    ///
    /// # Errors
    /// No such node, or no mesh.
    pub fn agent(&self, node: usize) -> Result<Agent, Error> {
        self.shared.agent(node)
    }

    /// Replaces a node's proxy as its DaemonSet does with `maxSurge: 1`: the new pod is started, and when it is ready the
    /// old process gets SIGTERM. Gives the old one, which may still carry connections.
    ///
    /// # Errors
    /// The new one does not become ready; the old one is then left alone.
    pub fn replace_proxy(&self, node: usize) -> Result<&Component, Error> {
        let (node, control) = (self.node(node)?, self.control()?);
        let mesh = node.mesh()?;
        let builder = &self.shared.builder;
        let next = mesh.spare(|| builder.proxy_pod(&self.shared, control, node))?;
        next.start()?;
        let old = mesh.take_over();
        old.signal(Signal::SIGTERM)?;
        Ok(old)
    }

    /// The CNI plugin of a node.
    ///
    /// # Errors
    /// No such node, or a cluster without [`Builder::cni`].
    pub fn cni(&self, node: usize) -> Result<Cni, Error> {
        self.shared.cni(node)?.ok_or_else(|| Error::Absent("the cluster has no CNI plugin".to_owned()))
    }

    /// Runs `culvert-app` on a node, in its network namespace, as the kubelet (in the control group that the agent takes
    /// for the kubelet's) or as any other process of the node. 60 s at most.
    ///
    /// # Errors
    /// It cannot be started or does not end.
    pub fn run_on_node(&self, node: usize, as_kubelet: bool, args: &[&str]) -> Result<Output, Error> {
        let node = self.node(node)?;
        let group = if as_kubelet { node.kubelet_group()? } else { node.group().child("host")? };
        let name = format!("{}-host-{}", node.name, crate::pod::new_uid()?);
        let mut spec = Spec::new(&name, self.shared.program("culvert-app")?, self.shared.log(&name));
        spec = spec.args(args.iter().copied()).env("CULVERT_MARKER", self.marker());
        let stdout = spec.log.with_extension("out");
        (spec.stdout, spec.network, spec.group) = (Some(stdout.clone()), Some(Arc::clone(&node.network)), Some(group));
        let process = spec.start()?;
        let status = process.wait(crate::pod::RUN)?;
        let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
        Ok(Output { status, stdout: read(&stdout), stderr: read(process.log()) })
    }

    /// culvertd.
    ///
    /// # Errors
    /// The cluster runs without the mesh.
    pub fn control(&self) -> Result<&ControlPlane, Error> {
        self.shared.control.get().ok_or_else(|| Error::Absent("the cluster runs no culvertd".to_owned()))
    }

    /// What the API server shows: the folder that culvertd reads.
    pub fn directory(&self) -> &Directory {
        &self.shared.directory
    }

    /// The mount namespace in which the nodes' BPF filesystems are seen.
    pub fn mounts(&self) -> &MountNs {
        &self.shared.mounts
    }

    /// The fabric's network namespace: the router between the nodes.
    pub fn fabric(&self) -> &NetNs {
        &self.shared.fabric
    }

    /// The marker that the applications put into what they send.
    pub fn marker(&self) -> &str {
        &self.shared.marker
    }

    /// Describes a pod to be started.
    pub fn pod(&self, name: &str) -> PodBuilder<'_> {
        PodBuilder::new(self, name)
    }

    /// All pods that were not deleted, those of Deployments included, without the mesh's own.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Deletes a pod: withdrawn from the agent, its object removed, its processes killed. Its network namespace goes
    /// with the last `Arc` of it.
    ///
    /// # Errors
    /// Any of that fails.
    pub fn delete(&self, pod: &Arc<Pod>) -> Result<(), Error> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).retain(|p| !Arc::ptr_eq(p, pod));
        pod.end()
    }

    /// As when a node loses its power: its agent, its proxy and its pods are killed, and what the kernel kept in memory is
    /// gone: BPF filesystem, run folder, and each pod's network namespace with the last `Arc` of the pod.
    ///
    /// # Errors
    /// No such node, or a part of it cannot be removed.
    pub fn power_off(&self, node: usize) -> Result<(), Error> {
        let node = self.node(node)?;
        node.agent()?.kill()?;
        node.proxy()?.kill()?;
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        for pod in pods.extract_if(.., |pod| pod.node() == node.index) {
            pod.lose()?;
        }
        let (pins, run) = (node.bpffs(), node.run_dir());
        self.shared.mounts.run(|| wipe(&pins))?.during(|| format!("emptying {}", pins.display()))?;
        wipe(&run).during(|| format!("emptying {}", run.display()))
    }

    pub(crate) fn keep(&self, pod: &Arc<Pod>) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(pod));
    }

    /// Applies objects under a file name, as `kubectl apply` does: see [`Directory::apply`]. Deployments are only
    /// stored; [`Cluster::deploy`] makes their pods.
    ///
    /// # Errors
    /// Not YAML, or the folder cannot be written.
    pub fn apply(&self, file: &str, yaml: &str) -> Result<Vec<Value>, Error> {
        self.shared.directory.apply(file, yaml)
    }

    /// Applies every `*.yaml` of a folder and starts the pods of its Deployments, spread over the nodes.
    ///
    /// # Errors
    /// A file cannot be read or played, or a pod does not start.
    pub fn deploy(&self, folder: &Path) -> Result<Vec<Arc<Pod>>, Error> {
        deploy::folder(self, folder)
    }

    /// Attaches a host to the fabric. It is not a pod: culvertd knows nothing of it.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn host(&self, name: &str) -> Result<Host, Error> {
        self.shared.attach_host(name)
    }

    /// Carries a port of the machine's loopback (0: any) to an address in the cluster, by way of a host on the fabric
    /// that the mesh does not know.
    ///
    /// # Errors
    /// The port cannot be had.
    pub fn forward(&self, port: u16, target: SocketAddr) -> Result<Forward, Error> {
        let gateway = self.shared.gateway()?;
        Forward::start(SocketAddr::from(([127, 0, 0, 1], port)), Arc::clone(&gateway.network), target)
    }

    /// The cluster's DNS: what it was asked, and what it knows beside the services.
    pub fn resolver(&self) -> &Resolver {
        &self.shared.resolver
    }

    /// The address families of the cluster.
    pub fn families(&self) -> Families {
        self.shared.families
    }

    /// The capture.
    ///
    /// # Errors
    /// The cluster was started without [`Builder::capture`].
    pub fn recorder(&self) -> Result<&Recorder, Error> {
        self.shared.recorder.as_ref().ok_or_else(|| Error::Absent("the cluster captures nothing".to_owned()))
    }

    /// Ends the capture and gives its report, which is complete or an error.
    ///
    /// # Errors
    /// There is no capture, or it missed something.
    pub fn finish_capture(&self) -> Result<Report, Error> {
        let report = self.recorder()?.finish();
        report.complete()?;
        Ok(report)
    }

    /// The ends of all logs.
    pub fn logs(&self, lines: usize) -> String {
        self.shared.logs(lines)
    }
}

/// Removes what is in a folder. The folder that proxies were given by a bind mount is emptied.
fn wipe(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true if entry.file_name() == "proxy" => wipe(&entry.path())?,
            true => std::fs::remove_dir_all(entry.path())?,
            // The kernel's own, in every BPF filesystem.
            false if ["maps.debug", "progs.debug"].iter().any(|own| entry.file_name() == *own) => {}
            false => std::fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

impl Drop for Cluster {
    #[expect(clippy::print_stderr, reason = "what a failed test needs, and what a failed clean-up must not hide")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.shared.logs(25));
        }
        if let Err(error) = cleanup::remove(&self.shared.hierarchy, &self.shared.id) {
            eprintln!("cleaning up cluster {}: {error}", self.shared.id);
        }
    }
}
