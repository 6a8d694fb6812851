//! One node: a network namespace joined to the fabric, its agent and its proxy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crate::cgroup::Cgroup;
use crate::cluster::Shared;
use crate::component::Component;
use crate::families::{self, Families, POD_GATEWAY, POD_GATEWAY_V6};
use crate::kube::PodRecord;
use crate::links::{self, Via};
use crate::netns::NetNs;
use crate::{Error, http};

/// A node of the cluster.
#[derive(Debug)]
pub struct Node {
    /// 1 for the first node.
    pub index: usize,
    /// `node1`, as in `spec.nodeName`.
    pub name: String,
    /// Its address on the fabric.
    pub address: Ipv4Addr,
    /// Its IPv6 address there, in a cluster with IPv6.
    pub address_v6: Option<Ipv6Addr>,
    pub(crate) families: Families,
    pub(crate) network: Arc<NetNs>,
    pub(crate) group: Cgroup,
    pub(crate) folder: PathBuf,
    pub(crate) next_address: AtomicU8,
    pub(crate) next_link: AtomicU8,
    pub(crate) mesh: OnceLock<NodeMesh>,
}

/// The mesh's part of a node.
#[derive(Debug)]
pub struct NodeMesh {
    /// `ztunnel agent`.
    pub agent: Component,
    /// The pod of the proxy, and beside it that of its successor.
    first: ProxyPod,
    second: OnceLock<ProxyPod>,
    current: AtomicUsize,
}

/// A pod of the proxy.
#[derive(Debug)]
pub struct ProxyPod {
    /// `ztunnel proxy`, in the network namespace of its pod.
    pub component: Component,
    /// The pod, in the namespace `culvert-system`.
    pub record: PodRecord,
    /// Its network namespace.
    pub network: Arc<NetNs>,
}

impl NodeMesh {
    pub(crate) fn new(agent: Component, proxy: ProxyPod) -> Self {
        Self { agent, first: proxy, second: OnceLock::new(), current: AtomicUsize::new(0) }
    }

    /// The pod of the proxy.
    pub fn proxy(&self) -> &ProxyPod {
        match self.current.load(Ordering::Acquire) {
            0 => &self.first,
            _ => self.second.get().unwrap_or(&self.first),
        }
    }

    /// The pod that does not serve, made at first use.
    pub(crate) fn spare(&self, make: impl FnOnce() -> Result<ProxyPod, Error>) -> Result<&Component, Error> {
        if self.current.load(Ordering::Acquire) != 0 {
            return Ok(&self.first.component);
        }
        let made = if self.second.get().is_none() { Some(make()?) } else { None };
        let second = made.map_or_else(|| self.second.get(), |made| Some(self.second.get_or_init(|| made)));
        second.map(|pod| &pod.component).ok_or_else(|| Error::Absent("no second proxy".to_owned()))
    }

    /// The spare one serves from now on; gives the old one.
    pub(crate) fn take_over(&self) -> &Component {
        let old = self.proxy();
        self.current.fetch_xor(1, Ordering::AcqRel);
        &old.component
    }
}

impl Node {
    /// Its network namespace.
    pub fn network(&self) -> &NetNs {
        &self.network
    }

    /// Its control group; those of the agent, the proxy and the pods are below: `agent`, `proxy`, `pods/<name>`.
    pub fn group(&self) -> &Cgroup {
        &self.group
    }

    /// The control group that stands for the kubelet's.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn kubelet_group(&self) -> Result<Cgroup, Error> {
        self.group.child("kubelet")
    }

    /// The agent's run folder, with `cni.sock`.
    pub fn run_dir(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// Where the node's BPF filesystem is mounted, as the cluster's processes see it
    /// ([`crate::cluster::Cluster::mounts`]).
    pub fn bpffs(&self) -> PathBuf {
        self.folder.join("bpf")
    }

    /// The node's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Agent and proxy.
    ///
    /// # Errors
    /// The cluster runs without the mesh.
    pub fn mesh(&self) -> Result<&NodeMesh, Error> {
        self.mesh.get().ok_or_else(|| Error::Absent(format!("{} runs no mesh", self.name)))
    }

    /// `ztunnel agent`.
    ///
    /// # Errors
    /// The cluster runs without the mesh.
    pub fn agent(&self) -> Result<&Component, Error> {
        Ok(&self.mesh()?.agent)
    }

    /// `ztunnel proxy`.
    ///
    /// # Errors
    /// The cluster runs without the mesh.
    pub fn proxy(&self) -> Result<&Component, Error> {
        Ok(&self.mesh()?.proxy().component)
    }

    /// The proxy's `/config_dump` (port 15000 on its loopback).
    ///
    /// # Errors
    /// The proxy does not answer with JSON.
    pub fn config_dump(&self) -> Result<serde_json::Value, Error> {
        let text = self.proxy_get(15000, "/config_dump")?;
        serde_json::from_str(&text).map_err(|e| Error::Output {
            what: format!("config dump of {}", self.name),
            reason: e.to_string(),
            output: text.chars().take(400).collect(),
        })
    }

    /// The proxy's `/metrics` (port 15020), as text; see [`crate::metrics`].
    ///
    /// # Errors
    /// The proxy does not answer.
    pub fn metrics(&self) -> Result<String, Error> {
        self.proxy_get(15020, "/metrics")
    }

    /// `GET` on a port of the proxy's own namespace (loopback). The answer must be 200.
    ///
    /// # Errors
    /// No answer, or another status.
    pub fn proxy_get(&self, port: u16, path: &str) -> Result<String, Error> {
        http::get_ok(&self.mesh()?.proxy().network, SocketAddr::from(([127, 0, 0, 1], port)), path)
    }

    /// The network namespace of the proxy's own pod.
    ///
    /// # Errors
    /// The cluster runs without the mesh.
    pub fn proxy_network(&self) -> Result<&NetNs, Error> {
        Ok(&self.mesh()?.proxy().network)
    }

    /// What `status.hostIP` says: the address of the cluster's first family.
    pub fn host_ip(&self) -> IpAddr {
        match self.address_v6 {
            Some(v6) if !self.families.v4() => v6.into(),
            _ => self.address.into(),
        }
    }

    /// Addresses for a new pod, one per family.
    pub(crate) fn take_addresses(&self, families: Families) -> Result<Vec<IpAddr>, Error> {
        let taken = self.next_address.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_add(1));
        let last = taken.map_err(|_full| Error::Absent(format!("{} has no pod address left", self.name)))?;
        let (v4, v6) = families::pod_addresses(self.octet(), last);
        Ok(families.pick(v4, v6))
    }

    /// Makes a pod's link: `eth0` in `pod`, its other end here, captured from before it is up. The pod has a default
    /// route of each family of `routed` that it has an address of. Gives the name of the end here.
    pub(crate) fn attach(
        &self,
        shared: &Shared,
        pod: &NetNs,
        pod_name: &str,
        addresses: &[IpAddr],
        routed: Families,
    ) -> Result<String, Error> {
        let link = format!("pod{}", self.next_link.fetch_add(1, Ordering::Relaxed));
        self.network.netlink(|handle| {
            let link = link.clone();
            async move { links::veth(&handle, &link, "eth0", pod).await }
        })?;
        shared.record(
            &self.network,
            &link,
            crate::capture::LinkKind::Pod {
                name: pod_name.to_owned(),
                node: self.index,
                addresses: addresses.to_vec(),
            },
        )?;
        pod.netlink(|handle| async move {
            for address in addresses {
                links::address(&handle, "eth0", *address, width(address)).await?;
            }
            links::up(&handle, "eth0").await
        })?;
        let (v6, ends) = (self.families.v6(), [Some(IpAddr::from(self.address)), self.address_v6.map(IpAddr::from)]);
        self.network.netlink(|handle| {
            let link = link.clone();
            async move {
                links::up(&handle, &link).await?;
                if v6 {
                    links::address(&handle, &link, POD_GATEWAY_V6.into(), 64).await?;
                }
                for address in addresses {
                    let own = ends.into_iter().flatten().find(|end| end.is_ipv4() == address.is_ipv4());
                    links::route(&handle, *address, width(address), Via::Link(&link), own).await?;
                }
                Ok(())
            }
        })?;
        let (has_v4, has_v6) = (addresses.iter().any(IpAddr::is_ipv4), addresses.iter().any(IpAddr::is_ipv6));
        pod.netlink(|handle| async move {
            if has_v4 && routed.v4() {
                links::route(&handle, POD_GATEWAY.into(), 32, Via::Link("eth0"), None).await?;
                let via = Via::Gateway(POD_GATEWAY.into(), "eth0");
                links::route(&handle, Ipv4Addr::UNSPECIFIED.into(), 0, via, None).await?;
            }
            if has_v6 && routed.v6() {
                let via = Via::Gateway(POD_GATEWAY_V6.into(), "eth0");
                links::route(&handle, Ipv6Addr::UNSPECIFIED.into(), 0, via, None).await?;
            }
            Ok(())
        })?;
        Ok(link)
    }

    pub(crate) fn octet(&self) -> u8 {
        // At most 99 nodes: checked when the cluster is made.
        u8::try_from(self.index).unwrap_or(u8::MAX)
    }

    /// Where the proxy's readiness is asked.
    pub(crate) fn ready_at() -> SocketAddr {
        SocketAddrV4::new(Ipv4Addr::LOCALHOST, 15021).into()
    }
}

/// The prefix length of a single address.
pub(crate) fn width(address: &IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}
