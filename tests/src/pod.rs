//! Pods: processes in a network namespace and control group of their own, announced as the kubelet would.

mod builder;

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use builder::PodBuilder;
use serde::de::DeserializeOwned;

use crate::cgroup::Cgroup;
use crate::cluster::Shared;
use crate::cni::Cni;
use crate::component::Component;
use crate::error::Context;
use crate::kube::{PodRecord, REDIRECTION};
use crate::links;
use crate::netns::NetNs;
use crate::process::{Process, Spec};
use crate::{Error, wait};

/// How long a command in a pod may take unless said otherwise.
pub const RUN: Duration = Duration::from_secs(60);

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

/// A pod. It lives until [`crate::cluster::Cluster::delete`] or the cluster's end.
#[derive(Debug)]
pub struct Pod {
    shared: Arc<Shared>,
    node: usize,
    record: Mutex<PodRecord>,
    network: Arc<NetNs>,
    host_link: String,
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

    /// First address.
    pub fn ip(&self) -> IpAddr {
        self.record().ip()
    }

    /// All addresses.
    pub fn ips(&self) -> Vec<IpAddr> {
        self.record().ips
    }

    /// A port of its IPv6 address.
    ///
    /// # Errors
    /// It has none.
    pub fn at_v6(&self, port: u16) -> Result<SocketAddr, Error> {
        let found = self.ips().into_iter().find(IpAddr::is_ipv6);
        found.map(|ip| (ip, port).into()).ok_or_else(|| Error::Absent(format!("{} has no IPv6 address", self.name())))
    }

    /// A port of its first address.
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

    /// Name of the node's end of its link.
    pub fn host_link(&self) -> &str {
        &self.host_link
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
        (spec.network, spec.group, spec.binds) = (own.network.clone(), own.group.clone(), own.binds.clone());
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

    /// Marks the Pod object as being deleted, as the API server does when a pod's grace period begins.
    ///
    /// # Errors
    /// The Pod object cannot be written.
    pub fn begin_to_end(&self) -> Result<(), Error> {
        self.update(|record| record.terminating = true)
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

    /// By way of the CNI plugin; whether the pod is captured is then the agent's decision.
    fn add(&self, cni: &Cni) -> Result<(), Error> {
        let record = self.record();
        cni.add(&record, &self.network)?;
        let enrolled = || Ok(self.shared.agent(self.node)?.knows(&record.uid)?.then_some(()));
        if self.wants_mesh() && wait::try_until("the agent's list", Duration::from_secs(10), enrolled).is_ok() {
            let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
            record.annotations.insert(REDIRECTION.to_owned(), "enabled".to_owned());
        }
        Ok(())
    }

    /// The end by a power failure: killed, and nobody is told but the API server.
    pub(crate) fn lose(&self) -> Result<(), Error> {
        let record = self.record();
        self.shared.directory.remove_pod(&record.namespace, &record.name)?;
        self.group()?.kill()?;
        self.group()?.remove()
    }

    /// The end, in the kubelet's order: killed, withdrawn (by way of the CNI plugin if there is one), its link, its object
    /// and its control group removed. The namespace goes with the last holder.
    pub(crate) fn end(&self) -> Result<(), Error> {
        let record = self.record();
        let group = self.group()?;
        group.kill()?;
        if let Some(cni) = self.shared.cni(self.node)? {
            cni.delete(&record, &self.network)?;
        } else if self.captured() {
            self.shared.agent(self.node)?.withdraw(&record)?;
        }
        let link = &self.host_link;
        self.shared.node(self.node)?.network.netlink(|handle| async move { links::remove(&handle, link).await })?;
        self.shared.directory.remove_pod(&record.namespace, &record.name)?;
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
    wait::try_until("the pod to leave the agent", Duration::from_secs(10), || Ok((!agent.knows(uid)?).then_some(())))
}
