//! Pods: processes in a network namespace and control group of their own, announced as the kubelet would.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::cgroup::Cgroup;
use crate::cluster::{Cluster, Shared};
use crate::component::Component;
use crate::error::Context;
use crate::kube::{DATAPLANE_MODE, PodRecord, REDIRECTION};
use crate::netns::NetNs;
use crate::process::{Process, Spec};
use crate::{Error, wait};

/// How long a command in a pod may take unless said otherwise.
pub const RUN: Duration = Duration::from_secs(60);

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
            host_ip: Ipv4Addr::UNSPECIFIED,
            ip: Ipv4Addr::UNSPECIFIED,
            ports: Vec::new(),
            ready: false,
        };
        let (command, env) = (Vec::new(), Vec::new());
        Self { cluster, node: None, command, program: None, env, enrolled: None, announce: true, settle: true, record }
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
        self.record.host_ip = node.address;
        self.record.uid = new_uid()?;
        shared.directory.ensure(&self.record.namespace, &self.record.service_account)?;
        self.record.ip = node.take_address()?;
        let name = format!("{}.{}", self.record.name, self.record.namespace);
        let network = Arc::new(NetNs::create(format!("pod {name}"))?);
        node.attach(shared, &network, &self.record.name, self.record.ip)?;
        shared.directory.put_pod(&self.record)?;

        let starts = self.program.is_some() || !self.command.is_empty();
        let group = node.group.child("pods")?.child(&name)?;
        let log = shared.log(&format!("pod-{name}"));
        let mut spec = Spec::new(&name, self.program.unwrap_or_else(|| shared.bins.join("culvert-app")), log);
        spec.args = self.command;
        spec.env = shared.pod_env(&self.record);
        spec.env.extend(self.env);
        (spec.network, spec.group) = (Some(Arc::clone(&network)), Some(group));
        let (listening, ports) = (Arc::clone(&network), self.record.ports.clone());
        let component = Component::new(spec, move || listens(&listening, &ports));
        let pod = Arc::new(Pod {
            shared: Arc::clone(shared),
            node: node.index,
            record: Mutex::new(self.record),
            network,
            application: component,
            runs: AtomicU32::new(0),
        });
        if self.announce && pod.wants_mesh() {
            pod.announce()?;
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

/// Output of a command that ended.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Standard output read as JSON (its last line, if there are several).
    ///
    /// # Errors
    /// It is not that JSON; the message holds both outputs.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Error> {
        let line = self.stdout.trim_end().lines().next_back().unwrap_or_default();
        serde_json::from_str(line).map_err(|e| Error::Output {
            what: format!("a command that ended with {}", self.status),
            reason: e.to_string(),
            output: format!("{}{}", self.stdout, self.stderr),
        })
    }
}

/// A pod. It lives until [`Cluster::delete`] or the cluster's end.
#[derive(Debug)]
pub struct Pod {
    shared: Arc<Shared>,
    node: usize,
    record: Mutex<PodRecord>,
    network: Arc<NetNs>,
    application: Component,
    runs: AtomicU32,
}

impl Pod {
    /// The Pod object as it is now.
    pub fn record(&self) -> PodRecord {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Name.
    pub fn name(&self) -> String {
        self.record().name
    }

    /// Namespace.
    pub fn namespace(&self) -> String {
        self.record().namespace
    }

    /// Kubernetes UID.
    pub fn uid(&self) -> String {
        self.record().uid
    }

    /// Address.
    pub fn ip(&self) -> Ipv4Addr {
        self.record().ip
    }

    /// A port of it.
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.ip(), port).into()
    }

    /// Index of its node.
    pub fn node(&self) -> usize {
        self.node
    }

    /// Its SPIFFE ID.
    pub fn identity(&self) -> String {
        let PodRecord { namespace, service_account, .. } = self.record();
        format!("spiffe://cluster.local/ns/{namespace}/sa/{service_account}")
    }

    /// True if the agent confirmed that the kernel captures its traffic.
    pub fn captured(&self) -> bool {
        self.record().captured()
    }

    /// Its network namespace.
    pub fn network(&self) -> &NetNs {
        &self.network
    }

    /// Its control group.
    ///
    /// # Errors
    /// None in a pod that was started.
    pub fn group(&self) -> Result<&Cgroup, Error> {
        let group = self.application.spec().group.as_ref();
        group.ok_or_else(|| Error::Absent(format!("{} has no control group", self.application.spec().name)))
    }

    /// Its application, if it was started with a command.
    pub fn application(&self) -> &Component {
        &self.application
    }

    /// Runs `work` on a thread inside the pod's network namespace, but not in its control group: see [`NetNs::run`].
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn in_netns<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
        self.network.run(work)
    }

    /// Runs `culvert-app` in the pod and waits for its end (60 s at most).
    ///
    /// # Errors
    /// It cannot be started or does not end. A bad exit status is not an error.
    pub fn run<A: Into<OsString>>(&self, args: impl IntoIterator<Item = A>) -> Result<Output, Error> {
        self.run_for(RUN, args)
    }

    /// As [`Pod::run`], with a bound of its own.
    ///
    /// # Errors
    /// As [`Pod::run`].
    pub fn run_for<A: Into<OsString>>(
        &self,
        bound: Duration,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Output, Error> {
        self.exec(self.shared.bins.join("culvert-app"), bound, args)
    }

    /// As [`Pod::run`], and reads the last line of its standard output as JSON.
    ///
    /// # Errors
    /// As [`Pod::run`] and [`Output::json`].
    pub fn run_json<T: DeserializeOwned, A: Into<OsString>>(
        &self,
        args: impl IntoIterator<Item = A>,
    ) -> Result<T, Error> {
        self.run(args)?.json()
    }

    /// Runs any program in the pod and waits for its end.
    ///
    /// # Errors
    /// As [`Pod::run`].
    pub fn exec<A: Into<OsString>>(
        &self,
        program: impl Into<PathBuf>,
        bound: Duration,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Output, Error> {
        let running = self.spawn_program(program, args)?;
        let status = running.process.wait(bound)?;
        let read = |path: &PathBuf| std::fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned());
        let stdout = read(&running.stdout).during(|| "reading a command's output".to_owned())?;
        let stderr = read(&running.process.log().to_path_buf()).during(|| "reading a command's output".to_owned())?;
        for used in [running.stdout.as_path(), running.process.log()] {
            // A leftover goes with the cluster's folder.
            let _ = std::fs::remove_file(used);
        }
        Ok(Output { status, stdout, stderr })
    }

    /// Starts `culvert-app` in the pod without waiting. It is killed when the result is dropped.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn<A: Into<OsString>>(&self, args: impl IntoIterator<Item = A>) -> Result<Running, Error> {
        self.spawn_program(self.shared.bins.join("culvert-app"), args)
    }

    /// Starts any program in the pod without waiting.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn_program<A: Into<OsString>>(
        &self,
        program: impl Into<PathBuf>,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Running, Error> {
        let own = self.application.spec();
        let name = format!("{}-run{}", own.name, self.runs.fetch_add(1, Ordering::Relaxed));
        let mut spec = Spec::new(&name, program, self.shared.log(&format!("pod-{name}"))).args(args);
        let stdout = spec.log.with_extension("out");
        spec.stdout = Some(stdout.clone());
        spec.env = self.shared.pod_env(&self.record());
        (spec.network, spec.group) = (own.network.clone(), own.group.clone());
        Ok(Running { process: spec.start()?, stdout })
    }

    /// Announces the pod to the agent (again), and marks the Pod object as captured.
    ///
    /// # Errors
    /// The agent refuses, or there is none.
    pub fn enrol(&self) -> Result<(), Error> {
        self.announce()?;
        self.update(|_annotated| ())
    }

    /// Withdraws the pod from the agent, and takes the mark from the Pod object.
    ///
    /// # Errors
    /// The agent refuses, or there is none.
    pub fn withdraw(&self) -> Result<(), Error> {
        self.shared.agent(self.node)?.withdraw(&self.record())?;
        self.update(|record| drop(record.annotations.remove(REDIRECTION)))
    }

    /// Waits until every running proxy knows the pod as it is now (20 s at most); at once without the mesh.
    ///
    /// # Errors
    /// A proxy does not learn of it.
    pub fn wait_known(&self) -> Result<(), Error> {
        self.shared.wait_known(&self.record())
    }

    /// Sets the Ready condition.
    ///
    /// # Errors
    /// The Pod object cannot be written.
    pub fn set_ready(&self, ready: bool) -> Result<(), Error> {
        self.update(|record| record.ready = ready)
    }

    /// Changes the Pod object.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn update(&self, change: impl FnOnce(&mut PodRecord)) -> Result<(), Error> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut record);
        self.shared.directory.put_pod(&record)
    }

    fn wants_mesh(&self) -> bool {
        let record = self.record();
        self.shared.has_mesh() && self.shared.directory.wants_mesh(&record.namespace, &record.labels)
    }

    /// Without writing the object: the application starts between the two.
    fn announce(&self) -> Result<(), Error> {
        self.shared.agent(self.node)?.enrol(&self.record(), self.network.as_ref())?;
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.annotations.insert(REDIRECTION.to_owned(), "enabled".to_owned());
        Ok(())
    }

    /// The end: withdrawn, killed, its object and control group removed. The namespace goes with the last holder.
    pub(crate) fn end(&self) -> Result<(), Error> {
        if self.captured() {
            self.shared.agent(self.node)?.withdraw(&self.record())?;
        }
        let record = self.record();
        self.shared.directory.remove_pod(&record.namespace, &record.name)?;
        let group = self.group()?;
        group.kill()?;
        group.remove()
    }
}

/// A command that runs in a pod; killed when dropped.
#[derive(Debug)]
pub struct Running {
    /// The process; its log is standard error.
    pub process: Process,
    stdout: PathBuf,
}

impl Running {
    /// What it wrote to standard output so far.
    pub fn stdout(&self) -> String {
        std::fs::read(&self.stdout).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    /// Waits until standard output holds `text`, and gives all of it.
    ///
    /// # Errors
    /// It ends before that, or not within `bound`.
    pub fn wait_for(&self, text: &str, bound: Duration) -> Result<String, Error> {
        self.process.wait_ready(bound, || Ok(self.stdout().contains(text)))?;
        Ok(self.stdout())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Not within `bound`.
    pub fn finish(self, bound: Duration) -> Result<Output, Error> {
        let status = self.process.wait(bound)?;
        let stderr = std::fs::read(self.process.log()).map(|b| String::from_utf8_lossy(&b).into_owned());
        Ok(Output { status, stdout: self.stdout(), stderr: stderr.unwrap_or_default() })
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

/// A fresh UUID.
pub(crate) fn new_uid() -> Result<String, Error> {
    let uid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").during(|| "making a UID".to_owned())?;
    Ok(uid.trim().to_owned())
}

/// Waits until a pod's object is gone from the agent's list.
///
/// # Errors
/// The agent does not answer, or it is still listed after 10 s.
pub fn wait_unlisted(agent: &crate::announce::Agent, uid: &str) -> Result<(), Error> {
    wait::try_until("the pod to leave the agent", Duration::from_secs(10), || {
        let listed = agent.list()?.iter().any(|p| p.pod.as_ref().is_some_and(|p| p.uid == uid));
        Ok((!listed).then_some(()))
    })
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
