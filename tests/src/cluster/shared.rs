//! What the parts of one cluster share.

use std::ffi::OsString;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::{Builder, Host, Mesh};
use crate::Error;
use crate::announce::Agent;
use crate::capture::{LinkKind, Recorder};
use crate::cgroup::{Cgroup, Hierarchy};
use crate::cleanup::ClusterId;
use crate::cni::Cni;
use crate::control::ControlPlane;
use crate::families::{Families, fabric_v4, fabric_v6, pod_networks};
use crate::kube::{Directory, PodRecord};
use crate::links::{self, Via};
use crate::mounts::MountNs;
use crate::netns::NetNs;
use crate::node::Node;
use crate::process;
use crate::resolver::{self, Resolver};

#[derive(Debug)]
pub(crate) struct Shared {
    pub id: ClusterId,
    pub folder: PathBuf,
    pub bins: PathBuf,
    pub hierarchy: Hierarchy,
    pub group: Cgroup,
    pub mounts: Arc<MountNs>,
    pub fabric: Arc<NetNs>,
    pub nodes: Vec<Node>,
    pub directory: Arc<Directory>,
    pub recorder: Option<Recorder>,
    pub control: OnceLock<ControlPlane>,
    pub mesh: Mesh,
    pub families: Families,
    pub(super) builder: Builder,
    pub marker: String,
    pub(super) turn: AtomicUsize,
    pub(super) next_host: AtomicU8,
    pub(super) gateway: Mutex<Option<Host>>,
    pub resolver: Resolver,
}

impl Shared {
    pub fn node(&self, index: usize) -> Result<&Node, Error> {
        let found = index.checked_sub(1).and_then(|at| self.nodes.get(at));
        found.ok_or_else(|| Error::Absent(format!("no node {index} in a cluster of {}", self.nodes.len())))
    }

    /// Nodes take turns.
    pub fn next_node(&self) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed) % self.nodes.len() + 1
    }

    pub fn has_mesh(&self) -> bool {
        !matches!(self.mesh, Mesh::Off)
    }

    pub fn agent(&self, node: usize) -> Result<Agent, Error> {
        let node = self.node(node)?;
        if !self.has_mesh() {
            return Err(Error::Absent(format!("{} runs no mesh", node.name)));
        }
        Ok(Agent::new(node.run_dir().join("cni.sock"), node.index))
    }

    /// The CNI plugin of a node, in a cluster that has it.
    pub fn cni(&self, node: usize) -> Result<Option<Cni>, Error> {
        let wanted = self.builder.cni && self.has_mesh();
        wanted.then(|| Ok(Cni::new(self.program("ztunnel")?, self.node(node)?))).transpose()
    }

    pub fn program(&self, name: &str) -> Result<PathBuf, Error> {
        let path = self.bins.join(name);
        if path.exists() { Ok(path) } else { Err(Error::MissingProgram(path)) }
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.folder.join("logs").join(format!("{name}.log"))
    }

    pub fn record(&self, network: &NetNs, link: &str, kind: LinkKind) -> Result<(), Error> {
        self.recorder.as_ref().map_or(Ok(()), |recorder| recorder.add(network, link, kind))
    }

    /// What every process of a pod finds in its environment.
    pub fn pod_env(&self, pod: &PodRecord) -> Vec<(OsString, OsString)> {
        let pairs = [
            ("CULVERT_RESOLVER", self.resolver_for(pod).to_string()),
            ("CULVERT_MARKER", self.marker.clone()),
            ("POD_NAME", pod.name.clone()),
            ("POD_NAMESPACE", pod.namespace.clone()),
            ("POD_IP", pod.ip().to_string()),
            ("NODE_NAME", pod.node.clone()),
        ];
        pairs.into_iter().map(|(n, v)| (n.into(), v.into())).collect()
    }

    /// The resolver's address that a pod is told.
    pub fn resolver_for(&self, pod: &PodRecord) -> SocketAddr {
        let address = if pod.ip().is_ipv6() { resolver::ADDRESS_V6.into() } else { resolver::ADDRESS.into() };
        SocketAddr::new(address, 53)
    }

    /// Makes a host on the fabric: `172.31.<n>.2` behind the fabric's `172.31.<n>.1`, n from 100.
    pub fn attach_host(&self, name: &str) -> Result<Host, Error> {
        let taken = self.next_host.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_add(1));
        let octet = taken.map_err(|_full| Error::Absent("the fabric has no place left".to_owned()))?;
        let network = Arc::new(NetNs::create_for(self.families, format!("host {name}"))?);
        let kind = LinkKind::Host { name: name.to_owned() };
        join(self.recorder.as_ref(), &self.fabric, &network, octet, kind, self.families)?;
        let address_v6 = self.families.v6().then(|| fabric_v6(octet).1);
        Ok(Host { name: name.to_owned(), address: fabric_v4(octet).1, address_v6, network })
    }

    pub fn gateway(&self) -> Result<Host, Error> {
        let mut gateway = self.gateway.lock().unwrap_or_else(PoisonError::into_inner);
        if gateway.is_none() {
            *gateway = Some(self.attach_host("gateway")?);
        }
        gateway.clone().ok_or_else(|| Error::Absent("no gateway".to_owned()))
    }

    pub fn logs(&self, lines: usize) -> String {
        let mut files: Vec<PathBuf> = std::fs::read_dir(self.folder.join("logs"))
            .map(|entries| {
                entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "log")).collect()
            })
            .unwrap_or_default();
        files.sort();
        let mut text = String::new();
        for file in files {
            let tail = process::tail(&file, lines);
            if !tail.is_empty() {
                let name = file.file_stem().unwrap_or_default().to_string_lossy();
                text.push_str(&format!("---- {name}\n{tail}\n"));
            }
        }
        text
    }
}

/// Joins `other` to the fabric: the fabric's end is `172.31.<octet>.1`, the other's `eth0` `172.31.<octet>.2` with the
/// default route, and the same in IPv6 where the cluster has it. A node's end is captured on the node's side, before it
/// is up; a host's on the fabric's. A node's pods are reached through it.
pub(crate) fn join(
    recorder: Option<&Recorder>,
    fabric: &NetNs,
    other: &NetNs,
    octet: u8,
    kind: LinkKind,
    families: Families,
) -> Result<(), Error> {
    let link = format!("to{octet}");
    let (near, far) = fabric_v4(octet);
    let (near_v6, far_v6) = fabric_v6(octet);
    let with_pods = matches!(kind, LinkKind::Node { .. });
    let (pods, pods_v6) = pod_networks(octet);
    fabric.netlink(|handle| {
        let link = link.clone();
        async move { links::veth(&handle, &link, "eth0", other).await }
    })?;
    if let Some(recorder) = recorder {
        let at_node = matches!(kind, LinkKind::Node { .. });
        let (network, name) = if at_node { (other, "eth0") } else { (fabric, link.as_str()) };
        recorder.add(network, name, kind)?;
    }
    other.netlink(|handle| async move {
        links::address(&handle, "eth0", far.into(), 24).await?;
        if families.v6() {
            links::address(&handle, "eth0", far_v6.into(), 64).await?;
        }
        links::up(&handle, "eth0").await
    })?;
    fabric.netlink(|handle| async move {
        links::address(&handle, &link, near.into(), 24).await?;
        if families.v6() {
            links::address(&handle, &link, near_v6.into(), 64).await?;
        }
        links::up(&handle, &link).await?;
        if with_pods {
            links::route(&handle, pods.into(), 24, Via::Gateway(far.into(), &link), None).await?;
        }
        if with_pods && families.v6() {
            links::route(&handle, pods_v6.into(), 64, Via::Gateway(far_v6.into(), &link), None).await?;
        }
        Ok(())
    })?;
    other.netlink(|handle| async move {
        let everywhere = Ipv4Addr::UNSPECIFIED.into();
        links::route(&handle, everywhere, 0, Via::Gateway(near.into(), "eth0"), None).await?;
        if families.v6() {
            let everywhere = Ipv6Addr::UNSPECIFIED.into();
            links::route(&handle, everywhere, 0, Via::Gateway(near_v6.into(), "eth0"), None).await?;
        }
        Ok(())
    })
}
