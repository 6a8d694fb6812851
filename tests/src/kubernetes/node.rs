//! A node: containerd, kubelet and kube-proxy in a network and a mount namespace of their own.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::image::Images;
use super::pki::Pki;
use super::programs::Programs;
use super::{cgroups, files, root};
use crate::capture::LinkKind;
use crate::cgroup::Cgroup;
use crate::cleanup::ClusterId;
use crate::cluster::{join, router};
use crate::component::Component;
use crate::error::Context;
use crate::families::{Families, fabric_v4, fabric_v6, pod_networks};
use crate::mounts::MountNs;
use crate::netns::NetNs;
use crate::process::Spec;
use crate::{Error, http};

/// How long a part of a node may take to be ready: a machine that also builds has little time for it.
const READY: Duration = Duration::from_secs(120);
/// Where containerd listens, on every node.
pub(super) const SOCKET: &str = "/run/containerd/containerd.sock";
/// Where kubelet and kube-proxy say that they are well.
pub(super) const KUBELET_HEALTH: u16 = 10248;
pub(super) const PROXY_HEALTH: u16 = 10256;

/// What all nodes of a cluster share.
pub(super) struct Surroundings<'c> {
    pub id: ClusterId,
    pub families: Families,
    pub folder: &'c Path,
    pub group: &'c Cgroup,
    pub fabric: &'c NetNs,
    pub programs: &'c Programs,
    pub pki: &'c Pki,
    pub server: &'c str,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    /// `node1` for the first.
    pub name: String,
    /// Its address, as in its object's status.
    pub address: Ipv4Addr,
    /// kubelet. It restarts what its pods lose, so that it ends first.
    pub kubelet: Component,
    /// kube-proxy.
    pub proxy: Component,
    /// containerd.
    pub runtime: Component,
    network: Arc<NetNs>,
    mounts: Arc<MountNs>,
    programs: Programs,
    octet: u8,
    families: Families,
    /// Name of the cluster's control group.
    cluster: String,
}

impl Node {
    /// Makes the node's namespaces, control groups and files. Nothing runs in it yet.
    pub(super) fn create(index: u8, around: &Surroundings<'_>) -> Result<Self, Error> {
        let name = format!("node{index}");
        let families = around.families;
        let network = Arc::new(NetNs::create_for(families, &name)?);
        router(&network, families, &[])?;
        let kind = LinkKind::Node { node: usize::from(index) };
        join(None, around.fabric, &network, index, kind, families)?;
        let group = around.group.child(&name)?;
        let cgroup_root = cgroups::create(&around.id.group(), &name)?;
        let disk = around.id.disk().join(&name);
        fs::create_dir_all(&disk).during(|| format!("making {}", disk.display()))?;
        let mounts = Arc::new(root::create(&disk, &network)?);
        let address = fabric_v4(index).1;
        let files = files::of_node(index, &name, &cgroup_root, around)?;
        let programs = around.programs;
        mounts.run(|| -> Result<(), Error> {
            for (at, text) in &files {
                fs::write(at, text).during(|| format!("writing {at} of {name}"))?;
            }
            for plugin in ["ptp", "host-local", "portmap"] {
                let to = Path::new("/opt/cni/bin").join(plugin);
                fs::copy(programs.path(plugin), &to).during(|| format!("copying {plugin} to {}", to.display()))?;
            }
            Ok(())
        })??;
        let spec = |part: &str| -> Result<Spec, Error> {
            let log = around.folder.join("logs").join(format!("{name}-{part}.log"));
            let mut spec = Spec::new(format!("{part} of {name}"), around.programs.path(part), log);
            (spec.network, spec.mounts) = (Some(Arc::clone(&network)), Some(Arc::clone(&mounts)));
            spec.group = Some(group.child(part)?);
            Ok(spec.env("PATH", path(around.programs)))
        };
        let healthy = |port: u16| {
            let network = Arc::clone(&network);
            move || {
                let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                Ok(http::get(&network, at, "/healthz").is_ok_and(|answer| answer.status == 200))
            }
        };
        let runtime = spec("containerd")?.args(["--config", "/etc/containerd/config.toml"]);
        let kubelet = spec("kubelet")?.args([
            "--config=/etc/kubernetes/kubelet.yaml",
            "--kubeconfig=/etc/kubernetes/kubelet.conf",
            "--root-dir=/var/lib/kubelet",
            "--cert-dir=/var/lib/kubelet/pki",
            &format!("--hostname-override={name}"),
            &format!("--node-ip={}", list(families.pick(address, fabric_v6(index).1))),
        ]);
        let proxy = spec("kube-proxy")?.args(["--config=/etc/kubernetes/kube-proxy.yaml"]);
        let within = Arc::clone(&mounts);
        let serves = move || within.run(|| UnixStream::connect(SOCKET).is_ok());
        Ok(Self {
            kubelet: Component::new(kubelet, healthy(KUBELET_HEALTH)).ready_within(READY),
            proxy: Component::new(proxy, healthy(PROXY_HEALTH)).ready_within(READY),
            runtime: Component::new(runtime, serves).ready_within(READY),
            name,
            address,
            network,
            mounts,
            programs: around.programs.clone(),
            octet: index,
            families,
            cluster: around.id.group(),
        })
    }

    /// Its object, for the API server: the kubelet completes it.
    pub(super) fn object(&self) -> Value {
        let pods = ranges(self.octet, self.families);
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": self.name},
            "spec": {"podCIDR": pods.first(), "podCIDRs": pods},
        })
    }

    /// Its pods' network.
    pub fn pod_network(&self) -> String {
        format!("{}/24", pod_networks(self.octet).0)
    }

    /// Its network namespace.
    pub fn network(&self) -> &Arc<NetNs> {
        &self.network
    }

    /// What its processes see of the files.
    pub fn mounts(&self) -> &Arc<MountNs> {
        &self.mounts
    }

    /// As if the power went: every process of the node dies at once, its pods' too; what it holds in memory is lost (`/run`,
    /// what is pinned, mounts of volumes, rules of the packet filter), and what is on its disk stays.
    ///
    /// # Errors
    /// A process does not die, or the kernel refuses to take a mount away.
    pub fn power_off(&self) -> Result<(), Error> {
        // First who would start something anew.
        for part in [&self.kubelet, &self.proxy, &self.runtime] {
            part.kill()?;
        }
        cgroups::empty(&self.cluster, &self.name)?;
        self.mounts.run(root::forget)??;
        let nft = self.programs.path("nft");
        let flushed = self.network.run(|| Command::new(nft).args(["flush", "ruleset"]).output())?;
        let flushed = flushed.during(|| "running nft".to_owned())?;
        if flushed.status.success() {
            return Ok(());
        }
        let log = format!(": {}", String::from_utf8_lossy(&flushed.stderr).trim());
        Err(Error::Exited { name: "nft flush ruleset".to_owned(), status: flushed.status, log })
    }

    /// Starts it again, as its service manager would. The API server need not be there.
    ///
    /// # Errors
    /// A part cannot be started, or containerd does not become ready.
    pub fn power_on(&self) -> Result<(), Error> {
        self.runtime.start()?;
        self.keep_up()
    }

    /// Starts those of its parts that have ended, as its service manager would.
    ///
    /// # Errors
    /// One cannot be started.
    pub fn keep_up(&self) -> Result<(), Error> {
        let mut ended = [&self.runtime, &self.kubelet, &self.proxy].into_iter().filter(|part| part.pid().is_none());
        ended.try_for_each(Component::launch)
    }

    /// Gives containerd images.
    ///
    /// # Errors
    /// containerd does not run, or refuses them.
    pub fn load(&self, images: &Images) -> Result<(), Error> {
        let pid = self.runtime.pid().ok_or_else(|| Error::Absent(format!("{}: containerd does not run", self.name)))?;
        load(&self.programs, pid, images)
    }
}

/// Gives images to the containerd with that process id.
///
/// # Errors
/// It refuses them.
pub(super) fn load(programs: &Programs, containerd: u32, images: &Images) -> Result<(), Error> {
    let what = || "importing images".to_owned();
    let socket = format!("/proc/{containerd}/root{SOCKET}");
    let mut command = Command::new(programs.path("ctr"));
    command.args(["--address", &socket, "--namespace", "k8s.io", "images", "import", "-"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().during(what)?;
    // A refusal is in what ctr says, not in a broken pipe.
    let written = child.stdin.take().map_or(Ok(()), |input| images.write(input));
    let done = child.wait_with_output().during(what)?;
    if done.status.success() {
        return written.during(what);
    }
    let log = format!(": {}", String::from_utf8_lossy(&done.stderr).trim());
    Err(Error::Exited { name: "ctr images import".to_owned(), status: done.status, log })
}

/// The networks of a node's pods, one of each family.
pub(super) fn ranges(octet: u8, families: Families) -> Vec<String> {
    let (v4, v6) = pod_networks(octet);
    let width = |network: &IpAddr| if network.is_ipv4() { 24 } else { 64 };
    families.pick(v4, v6).iter().map(|network| format!("{network}/{}", width(network))).collect()
}

/// As programs take several addresses.
pub(super) fn list<T: ToString>(all: impl IntoIterator<Item = T>) -> String {
    all.into_iter().map(|one| one.to_string()).collect::<Vec<_>>().join(",")
}

/// Where a node's processes find others.
fn path(programs: &Programs) -> String {
    format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", programs.folder().display())
}
