//! Describing a pod, and starting it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};

use super::{Pod, new_uid};
use crate::Error;
use crate::cluster::Cluster;
use crate::component::Component;
use crate::error::Context;
use crate::families::Families;
use crate::kube::{DATAPLANE_MODE, PodRecord};
use crate::netns::NetNs;
use crate::process::Spec;

/// Work on the namespace of a pod that is being made.
struct Prepare<'c>(Box<Work<'c>>);

type Work<'c> = dyn FnOnce(&NetNs) -> Result<(), Error> + Send + 'c;

impl std::fmt::Debug for Prepare<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Prepare")
    }
}

/// A pod to be started. Made by [`Cluster::pod`].
#[derive(Debug)]
#[must_use]
pub struct PodBuilder<'c> {
    cluster: &'c Cluster,
    node: Option<usize>,
    command: Vec<OsString>,
    program: Option<PathBuf>,
    env: Vec<(OsString, OsString)>,
    enrolled: Option<bool>,
    announce: bool,
    settle: bool,
    families: Option<Families>,
    routed: Families,
    prepare: Option<Prepare<'c>>,
    resolver: Option<IpAddr>,
    record: PodRecord,
}

impl<'c> PodBuilder<'c> {
    pub(crate) fn new(cluster: &'c Cluster, name: &str) -> Self {
        let record = PodRecord {
            name: name.to_owned(),
            namespace: "default".to_owned(),
            uid: String::new(),
            service_account: "default".to_owned(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            owner: None,
            node: String::new(),
            host_ip: Ipv4Addr::UNSPECIFIED.into(),
            ips: Vec::new(),
            ports: Vec::new(),
            ready: false,
            terminating: false,
        };
        let (command, env) = (Vec::new(), Vec::new());
        Self {
            cluster,
            node: None,
            command,
            program: None,
            env,
            enrolled: None,
            announce: true,
            settle: true,
            families: None,
            routed: Families::Dual,
            prepare: None,
            resolver: None,
            record,
        }
    }

    /// Its node, 1 for the first. By default nodes take turns.
    pub fn node(mut self, index: usize) -> Self {
        self.node = Some(index);
        self
    }

    /// Its namespace, made if it does not exist. Default: `default`.
    pub fn namespace(mut self, name: &str) -> Self {
        name.clone_into(&mut self.record.namespace);
        self
    }

    /// Its service account, made if it does not exist. Default: `default`.
    pub fn service_account(mut self, name: &str) -> Self {
        name.clone_into(&mut self.record.service_account);
        self
    }

    /// Adds a label.
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.record.labels.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Adds an annotation.
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.record.annotations.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Says whether the mesh carries its traffic, by a label on the pod. By default the namespace's label decides,
    /// as it does in a cluster; a namespace that the harness made by itself has none.
    pub fn enrolled(mut self, enrolled: bool) -> Self {
        self.enrolled = Some(enrolled);
        self
    }

    /// Leaves out the announcement to the agent, so that an enrolled pod stays unconfirmed until [`Pod::enrol`].
    pub fn unannounced(mut self) -> Self {
        self.announce = false;
        self
    }

    /// Does not wait until every proxy has learnt of the pod, as a cluster would not.
    pub fn unsettled(mut self) -> Self {
        self.settle = false;
        self
    }

    /// Its address families. Default: the cluster's.
    pub fn families(mut self, families: Families) -> Self {
        self.families = Some(families);
        self
    }

    /// Has these addresses, which nobody else may have, instead of fresh ones.
    pub fn addresses(mut self, addresses: &[IpAddr]) -> Self {
        addresses.clone_into(&mut self.record.ips);
        self
    }

    /// Leaves out the default route of this family, whatever addresses it has.
    pub fn without_route(mut self, family: Families) -> Self {
        self.routed = match family {
            Families::V4 => Families::V6,
            Families::V6 | Families::Dual => Families::V4,
        };
        self
    }

    /// Its programs find an `/etc/resolv.conf` as the kubelet writes it, naming this resolver, so that programs that know
    /// nothing of the harness can look names up.
    pub fn resolver(mut self, address: IpAddr) -> Self {
        self.resolver = Some(address);
        self
    }

    /// Does something to its network namespace after its link was made and before the agent is told of it: a second
    /// interface, a sysctl.
    pub fn prepare(mut self, work: impl FnOnce(&NetNs) -> Result<(), Error> + Send + 'c) -> Self {
        self.prepare = Some(Prepare(Box::new(work)));
        self
    }

    /// Its owner, such as ("ReplicaSet", "reviews-v1-5b8d").
    pub fn owner(mut self, kind: &str, name: &str) -> Self {
        self.record.owner = Some((kind.to_owned(), name.to_owned()));
        self
    }

    /// Adds a named container port. The pod becomes ready when something listens on all of its ports.
    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.record.ports.push((name.to_owned(), port));
        self
    }

    /// Runs `culvert-app` with these arguments as the pod's application. Ports given to `--listen` and `--port` are
    /// container ports too. Without a command the pod only holds its namespace.
    pub fn command<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command = args.into_iter().map(Into::into).collect();
        self
    }

    /// Runs this program instead of `culvert-app`.
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.program = Some(program.into());
        self
    }

    /// Adds to the application's environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Starts it: namespace and link, the Pod object, the announcement to the agent, the application, and at last
    /// the Ready condition and the annotation that says it is captured. Then waits until every running proxy knows of
    /// it, so that what follows does not race with discovery.
    ///
    /// # Errors
    /// Any of that fails.
    pub fn start(mut self) -> Result<Arc<Pod>, Error> {
        let cluster = self.cluster;
        let shared = &cluster.shared;
        let node = shared.node(self.node.unwrap_or_else(|| shared.next_node()))?;
        if let Some(enrolled) = self.enrolled {
            let mode = if enrolled { "ambient" } else { "none" };
            self.record.labels.insert(DATAPLANE_MODE.to_owned(), mode.to_owned());
        }
        for port in ports_of(&self.command) {
            if !self.record.ports.iter().any(|(_, p)| *p == port) {
                self.record.ports.push((format!("port-{port}"), port));
            }
        }
        self.record.node.clone_from(&node.name);
        self.record.host_ip = node.host_ip();
        self.record.uid = new_uid()?;
        shared.directory.ensure(&self.record.namespace, &self.record.service_account)?;
        let families = self.families.unwrap_or(shared.families);
        if self.record.ips.is_empty() {
            self.record.ips = node.take_addresses(families)?;
        }
        let name = format!("{}.{}", self.record.name, self.record.namespace);
        // A pod without IPv6 addresses in a cluster with IPv6 has the family all the same, as a rule.
        let network = Arc::new(NetNs::create_for(shared.families, format!("pod {name}"))?);
        let host_link = node.attach(shared, &network, &self.record.name, &self.record.ips, self.routed)?;
        if let Some(Prepare(work)) = self.prepare {
            work(&network)?;
        }
        shared.directory.put_pod(&self.record)?;

        let starts = self.program.is_some() || !self.command.is_empty();
        let group = node.group.child("pods")?.child(&name)?;
        let log = shared.log(&format!("pod-{name}"));
        let mut spec = Spec::new(&name, self.program.unwrap_or_else(|| shared.bins.join("culvert-app")), log);
        spec.args = self.command;
        spec.env = shared.pod_env(&self.record);
        spec.env.extend(self.env);
        (spec.network, spec.group) = (Some(Arc::clone(&network)), Some(group));
        if let Some(address) = self.resolver {
            let file = shared.folder.join(format!("resolv-{}.conf", self.record.uid));
            let namespace = &self.record.namespace;
            let search = format!("search {namespace}.svc.cluster.local svc.cluster.local cluster.local");
            let text = format!("nameserver {address}\n{search}\noptions ndots:5\n");
            std::fs::write(&file, text).during(|| format!("writing {}", file.display()))?;
            spec.binds.push((file, PathBuf::from("/etc/resolv.conf")));
        }
        let (listening, ports) = (Arc::clone(&network), self.record.ports.clone());
        let component = Component::new(spec, move || listens(&listening, &ports));
        let pod = Arc::new(Pod {
            shared: Arc::clone(shared),
            node: node.index,
            record: Mutex::new(self.record),
            network,
            host_link,
            application: component,
            runs: AtomicU32::new(0),
        });
        match shared.cni(node.index)? {
            Some(cni) if self.announce => pod.add(&cni)?,
            None if self.announce && pod.wants_mesh() => pod.announce()?,
            _ => {}
        }
        if starts {
            pod.application.start()?;
        }
        pod.update(|record| record.ready = true)?;
        cluster.keep(&pod);
        if self.settle {
            pod.wait_known()?;
        }
        Ok(pod)
    }
}

/// Ports in `--port 80`, `--listen 0.0.0.0:80`, and the same with `=`.
fn ports_of(command: &[OsString]) -> Vec<u16> {
    let mut ports = Vec::new();
    let words: Vec<_> = command.iter().filter_map(|w| w.to_str()).flat_map(|w| w.splitn(2, '=')).collect();
    for pair in words.windows(2) {
        if matches!(pair[0], "--port" | "--listen") {
            ports.extend(pair[1].rsplit(':').next().and_then(|p| p.parse::<u16>().ok()));
        }
    }
    ports
}

/// True when something listens on every port, read from /proc so that the application notices nothing.
fn listens(network: &NetNs, ports: &[(String, u16)]) -> Result<bool, Error> {
    let tables = network.run(|| {
        let table = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
        table("tcp") + &table("tcp6")
    })?;
    let listening: Vec<u16> = tables.lines().filter_map(listening_port).collect();
    Ok(ports.iter().all(|(_, port)| listening.contains(port)))
}

/// `sl local_address rem_address st ...`, state 0A is LISTEN.
fn listening_port(line: &str) -> Option<u16> {
    let mut fields = line.split_whitespace().skip(1);
    let (local, _, state) = (fields.next()?, fields.next()?, fields.next()?);
    (state == "0A").then(|| u16::from_str_radix(local.rsplit(':').next()?, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_from_arguments_and_from_proc() {
        let command: Vec<OsString> =
            ["echo", "--listen", "0.0.0.0:7000", "--port=80", "--to", "x:9"].map(Into::into).to_vec();
        assert_eq!(ports_of(&command), [7000, 80]);
        assert_eq!(listening_port("   0: 00000000:1F90 00000000:0000 0A 0000"), Some(8080));
        assert_eq!(listening_port("   0: 00000000:1F90 00000000:0000 01 0000"), None);
        assert_eq!(listening_port("  sl  local_address rem_address   st tx_queue"), None);
    }
}
