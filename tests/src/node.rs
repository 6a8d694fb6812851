//! One node: a network namespace joined to the fabric, its agent and its proxy.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::cgroup::Cgroup;
use crate::cluster::Shared;
use crate::component::Component;
use crate::links::{self, Via};
use crate::netns::NetNs;
use crate::{Error, http};

/// The pods' gateway, the same in every pod: an address of the node that answers on each pod's link.
pub const POD_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// A node of the cluster.
#[derive(Debug)]
pub struct Node {
    /// 1 for the first node.
    pub index: usize,
    /// `node1`, as in `spec.nodeName`.
    pub name: String,
    /// Its address on the fabric.
    pub address: Ipv4Addr,
    pub(crate) network: Arc<NetNs>,
    pub(crate) group: Cgroup,
    pub(crate) folder: PathBuf,
    pub(crate) next_address: AtomicU8,
    pub(crate) next_link: AtomicU8,
    pub(crate) mesh: std::sync::OnceLock<NodeMesh>,
}

/// The mesh's part of a node.
#[derive(Debug)]
pub struct NodeMesh {
    /// `ztunnel agent`.
    pub agent: Component,
    /// `ztunnel proxy`, in the network namespace of its own pod.
    pub proxy: Component,
    /// Address of the proxy's own pod.
    pub proxy_address: Ipv4Addr,
    /// Name of the proxy's own pod, in the namespace `culvert-system`.
    pub proxy_pod: String,
    pub(crate) proxy_network: Arc<NetNs>,
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
        Ok(&self.mesh()?.proxy)
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
        http::get_ok(&self.mesh()?.proxy_network, SocketAddr::from(([127, 0, 0, 1], port)), path)
    }

    /// The network namespace of the proxy's own pod.
    ///
    /// # Errors
    /// The cluster runs without the mesh.
    pub fn proxy_network(&self) -> Result<&NetNs, Error> {
        Ok(&self.mesh()?.proxy_network)
    }

    /// First and last address for pods.
    pub(crate) fn take_address(&self) -> Result<Ipv4Addr, Error> {
        let taken = self.next_address.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_add(1));
        let last = taken.map_err(|_full| Error::Absent(format!("{} has no pod address left", self.name)))?;
        Ok(Ipv4Addr::new(10, 244, self.octet(), last))
    }

    /// Makes a pod's link: `eth0` in `pod`, its other end here, captured from before it is up.
    pub(crate) fn attach(&self, shared: &Shared, pod: &NetNs, pod_name: &str, address: Ipv4Addr) -> Result<(), Error> {
        let link = format!("pod{}", self.next_link.fetch_add(1, Ordering::Relaxed));
        self.network.netlink(|handle| {
            let link = link.clone();
            async move { links::veth(&handle, &link, "eth0", pod).await }
        })?;
        shared.record(
            &self.network,
            &link,
            crate::capture::LinkKind::Pod { name: pod_name.to_owned(), node: self.index, address },
        )?;
        pod.netlink(|handle| async move {
            links::address(&handle, "eth0", address, 32).await?;
            links::up(&handle, "eth0").await
        })?;
        let own = self.address;
        self.network.netlink(|handle| async move {
            links::up(&handle, &link).await?;
            links::route(&handle, address, 32, Via::Link(&link), Some(own)).await
        })?;
        pod.netlink(|handle| async move {
            links::route(&handle, POD_GATEWAY, 32, Via::Link("eth0"), None).await?;
            links::route(&handle, Ipv4Addr::UNSPECIFIED, 0, Via::Gateway(POD_GATEWAY, "eth0"), None).await
        })
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
