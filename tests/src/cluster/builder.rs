//! Makes a cluster, part by part.

use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicUsize};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use super::shared::join;
use super::{Cluster, Shared};
use crate::capture::{LinkKind, Recorder};
use crate::cgroup::{Cgroup, Hierarchy};
use crate::cleanup::{self, ClusterId};
use crate::error::Context;
use crate::families::{Families, POD_GATEWAY, fabric_v4, fabric_v6};
use crate::kube::Directory;
use crate::links;
use crate::mounts::MountNs;
use crate::netns::NetNs;
use crate::node::{Node, width};
use crate::resolver::{self, Resolver};
use crate::{Error, wait};

/// The user that the proxy becomes.
pub const PROXY_UID: u32 = 1337;

/// What carries the pods' traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mesh {
    /// Nothing: plain TCP between the pods, no culvertd.
    Off,
    /// Culvert: culvertd, and an agent and a proxy per node.
    Culvert,
    /// culvertd, and per node this shell command in the place of agent and proxy. It runs in the node's network
    /// namespace and control group and must serve the announcements of pods (`culvert.node.v1.PodRequest`) at
    /// `$CULVERT_CNI_SOCKET`. It finds `$NODE_NAME`, `$NODE_IP`, `$CULVERT_XDS_ADDRESS`, `$CULVERT_CA_ROOTS`,
    /// `$CULVERT_TOKEN`, `$CULVERT_RUN_DIR`, and `$POD_NAME`, `$POD_NAMESPACE` and `$POD_IP` of the proxy's pod.
    Peer(String),
}

/// A cluster to be started.
#[derive(Debug, Clone)]
#[must_use]
pub struct Builder {
    pub(super) nodes: usize,
    pub(super) mesh: Mesh,
    pub(super) families: Families,
    pub(super) capture: bool,
    pub(super) marker: String,
    pub(super) more_markers: Vec<String>,
    pub(super) bins: Option<PathBuf>,
    pub(super) agent_args: Vec<String>,
    pub(super) proxy_args: Vec<String>,
    pub(super) culvertd_args: Vec<String>,
    pub(super) env: Vec<(String, String)>,
    pub(super) cni: bool,
    pub(super) kubelet: bool,
}

impl Builder {
    pub(super) fn new() -> Self {
        Self {
            nodes: 2,
            mesh: Mesh::Culvert,
            families: Families::V4,
            capture: false,
            marker: "culvert-marker-in-clear".to_owned(),
            more_markers: Vec::new(),
            bins: None,
            agent_args: Vec::new(),
            proxy_args: Vec::new(),
            culvertd_args: Vec::new(),
            env: Vec::new(),
            cni: false,
            kubelet: false,
        }
    }

    /// How many nodes, 1 to 99. Default: 2.
    pub fn nodes(mut self, count: usize) -> Self {
        self.nodes = count;
        self
    }

    /// What carries the traffic. Default: Culvert.
    pub fn mesh(mut self, mesh: Mesh) -> Self {
        self.mesh = mesh;
        self
    }

    /// Address families of nodes, pods and services. Default: IPv4. Nodes and hosts have IPv4 addresses in any case, as
    /// a machine may; in a cluster of IPv6 nothing uses them.
    pub fn families(mut self, families: Families) -> Self {
        self.families = families;
        self
    }

    /// Pods are started through the CNI plugin, and the agents read the labels of pods and namespaces, instead of being
    /// told of each enrolled pod by the harness.
    pub fn cni(mut self) -> Self {
        self.cni = true;
        self
    }

    /// Each node has a control group that its agent takes for the kubelet's: see [`Cluster::run_on_node`].
    pub fn kubelet(mut self) -> Self {
        self.kubelet = true;
        self
    }

    /// Captures on every link from before it is up, looking for `marker`, which the applications also put into what
    /// they send.
    pub fn capture(mut self, marker: &str) -> Self {
        self.capture = true;
        marker.clone_into(&mut self.marker);
        self
    }

    /// Another marker that the capture looks for.
    pub fn also_look_for(mut self, marker: &str) -> Self {
        self.more_markers.push(marker.to_owned());
        self
    }

    /// Folder of the programs. Default: `$CULVERT_BIN_DIR`, or where the running program lies.
    pub fn bin_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.bins = Some(folder.into());
        self
    }

    /// More arguments for every agent.
    pub fn agent_args(mut self, args: &[&str]) -> Self {
        self.agent_args.extend(args.iter().map(ToString::to_string));
        self
    }

    /// More arguments for every proxy.
    pub fn proxy_args(mut self, args: &[&str]) -> Self {
        self.proxy_args.extend(args.iter().map(ToString::to_string));
        self
    }

    /// More arguments for culvertd.
    pub fn culvertd_args(mut self, args: &[&str]) -> Self {
        self.culvertd_args.extend(args.iter().map(ToString::to_string));
        self
    }

    /// A variable in the environment of agents, proxies and culvertd.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Removes what dead clusters left, then makes this one and waits until every part is ready.
    ///
    /// # Errors
    /// A missing program or privilege, or a part that does not become ready; everything made so far is removed.
    pub fn start(self) -> Result<Cluster, Error> {
        cleanup::sweep()?;
        if !(1..100).contains(&self.nodes) {
            return Err(Error::Absent(format!("a cluster has 1 to 99 nodes, not {}", self.nodes)));
        }
        let hierarchy = Hierarchy::detect()?;
        let id = ClusterId::new()?;
        // From here on the cluster's Drop cleans up; before it exists, this does.
        let mut unfinished = Unfinished(Some((hierarchy.clone(), id)));
        let shared = self.network(hierarchy, id)?;
        unfinished.0 = None;
        let cluster = Cluster::new(shared);
        if self.mesh != Mesh::Off {
            self.start_mesh(&cluster.shared)?;
        }
        Ok(cluster)
    }

    fn families_of_resolver(&self) -> Vec<IpAddr> {
        self.families.pick(resolver::ADDRESS, resolver::ADDRESS_V6)
    }

    /// Folders, groups, namespaces and the fabric: all but the mesh.
    fn network(&self, hierarchy: Hierarchy, id: ClusterId) -> Result<Shared, Error> {
        let folder = id.folder();
        // Another harness may remove the folder of all clusters while it is empty.
        wait::until("the cluster's folder", Duration::from_secs(1), || make_folder(&folder.join("logs"), 0o755).ok())
            .or_else(|_again| make_folder(&folder.join("logs"), 0o755))?;
        cleanup::note(&hierarchy, &id)?;
        let group = Cgroup::create(&hierarchy, &id.group())?;
        let recorder = match self.capture {
            true => Some(Recorder::start(&[std::slice::from_ref(&self.marker), &self.more_markers].concat())?),
            false => None,
        };
        let fabric = Arc::new(NetNs::create_for(self.families, "fabric")?);
        router(&fabric, self.families, &self.families_of_resolver())?;
        let nodes =
            (1..=self.nodes).map(|index| node(index, self.families, &folder, &group, &fabric, recorder.as_ref()));
        let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
        let mounts = MountNs::create(&nodes.iter().map(Node::bpffs).collect::<Vec<_>>())?;
        let directory = Arc::new(Directory::create(folder.join("source"), self.families)?);
        let resolver = Resolver::start(&fabric, &self.families_of_resolver(), Arc::clone(&directory))?;
        Ok(Shared {
            // A process that enters other mounts loses its working folder.
            bins: std::path::absolute(self.bins.clone().map_or_else(bin_dir, Ok)?)
                .during(|| "the folder of the programs".to_owned())?,
            id,
            folder,
            hierarchy,
            group,
            mounts: Arc::new(mounts),
            fabric,
            nodes,
            directory,
            recorder,
            control: OnceLock::new(),
            mesh: self.mesh.clone(),
            marker: self.marker.clone(),
            turn: AtomicUsize::new(0),
            next_host: AtomicU8::new(100),
            gateway: Mutex::new(None),
            families: self.families,
            builder: self.clone(),
            resolver,
        })
    }
}

/// Removes what was made when a cluster does not come to be.
struct Unfinished(Option<(Hierarchy, ClusterId)>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some((hierarchy, id)) = self.0.take() {
            // The error that led here is the one to report.
            let _ = cleanup::remove(&hierarchy, &id);
        }
    }
}

/// Makes a namespace forward packets, and gives its loopback addresses that it answers for.
pub(crate) fn router(network: &NetNs, families: Families, addresses: &[IpAddr]) -> Result<(), Error> {
    // A new namespace takes over some of the machine's settings; these must not depend on it.
    for (name, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
        ("net/ipv4/conf/all/arp_ignore", "0"),
        ("net/ipv4/conf/default/arp_ignore", "0"),
        ("net/ipv4/conf/all/send_redirects", "0"),
        ("net/ipv4/conf/default/send_redirects", "0"),
    ] {
        network.sysctl(name, value)?;
    }
    if families.v6() {
        network.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    }
    network.netlink(|handle| async move {
        for address in addresses {
            links::address(&handle, "lo", *address, width(address)).await?;
        }
        Ok(())
    })
}

fn node(
    index: usize,
    families: Families,
    folder: &Path,
    group: &Cgroup,
    fabric: &NetNs,
    recorder: Option<&Recorder>,
) -> Result<Node, Error> {
    let name = format!("node{index}");
    let octet = u8::try_from(index).map_err(|_large| Error::Absent(format!("no room for {name}")))?;
    let network = Arc::new(NetNs::create_for(families, &name)?);
    router(&network, families, &[POD_GATEWAY.into()])?;
    join(recorder, fabric, &network, octet, LinkKind::Node { node: index }, families)?;
    let node = Node {
        index,
        group: group.child(&name)?,
        folder: folder.join(&name),
        name,
        address: fabric_v4(octet).1,
        address_v6: families.v6().then(|| fabric_v6(octet).1),
        families,
        network,
        next_address: AtomicU8::new(10),
        next_link: AtomicU8::new(0),
        mesh: OnceLock::new(),
    };
    make_folder(&node.folder, 0o755)?;
    make_folder(&node.run_dir(), 0o700)?;
    make_folder(&node.bpffs(), 0o700)?;
    Ok(node)
}

pub(super) fn make_folder(folder: &Path, mode: u32) -> Result<(), Error> {
    std::fs::create_dir_all(folder).during(|| format!("making {}", folder.display()))?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode))
        .during(|| format!("making {}", folder.display()))
}

/// `$CULVERT_BIN_DIR`, or the folder of the running program (for a test: the one above `deps`).
///
/// # Errors
/// The running program's path cannot be had.
pub fn bin_dir() -> Result<PathBuf, Error> {
    if let Some(folder) = std::env::var_os("CULVERT_BIN_DIR") {
        return Ok(folder.into());
    }
    let own = std::env::current_exe().during(|| "finding the running program".to_owned())?;
    let folder = own.parent().unwrap_or(Path::new("/"));
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    Ok(folder.to_owned())
}
