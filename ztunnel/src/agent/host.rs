//! What enrolling stands on: the node's capture, the agent's own namespace, and what was chosen for all pods.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use ztunnel_ebpf::{FLAG_DENY_OLDER, FLAG_DNS};

use super::capture::{CaptureError, NodeCapture};
use super::config::{Config, OlderConnections, Switch};
use super::drift::Counts;

/// What was chosen for all pods of the node.
#[derive(Clone, Debug, Default)]
pub struct Choices {
    /// Whether the pods' DNS queries go to the proxy.
    pub dns: Switch,
    /// What becomes of connections that are older than the enrolment.
    pub older: OlderConnections,
    /// Names of programs of others that may stand on the connect hooks.
    pub allowed_programs: Vec<String>,
    /// Where the kubelet's cgroup may be.
    pub kubelet: Vec<PathBuf>,
}

impl Choices {
    /// The kubelet's cgroup: the first of those that exist. None of them does: the first; none: the kubelet is not followed.
    pub fn kubelet(&self) -> Option<&Path> {
        let exists = |cgroup: &&PathBuf| cgroup.is_dir();
        self.kubelet.iter().find(exists).or_else(|| self.kubelet.first()).map(PathBuf::as_path)
    }
}

impl From<&Config> for Choices {
    fn from(config: &Config) -> Self {
        Self {
            dns: config.dns,
            older: config.older_connections,
            allowed_programs: config.allow_foreign_programs.clone(),
            kubelet: config.kubelet_cgroup.clone(),
        }
    }
}

/// The node, as enrolling sees it.
#[derive(Debug)]
pub struct Host {
    /// Programs and maps.
    pub capture: NodeCapture,
    /// What was found missing so far.
    pub drift: Counts,
    home: File,
    cgroup_root: PathBuf,
    choices: Choices,
    foreign: Mutex<Option<ForeignPrograms>>,
    /// Why the node's own programs could not be put back, as it was tried last.
    hooks: Mutex<Option<HooksMissing>>,
    dns_served: AtomicBool,
}

/// Programs of others on the connect hooks at the cgroup root.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "other eBPF programs on the node's connect hooks may rewrite addresses before the mesh sees them: {0}; for Cilium set \
     socketLB.hostNamespaceOnly=true; one that is known to leave addresses alone is allowed by --allow-foreign-programs"
)]
pub struct ForeignPrograms(String);

/// The node's own programs do not stand on the connect hooks: connections are not handed to the proxy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the mesh's programs on the node's connect hooks are gone and cannot be put back: {0}")]
pub struct HooksMissing(String);

impl Host {
    /// The node of which the calling thread's network namespace is the host's.
    ///
    /// # Errors
    /// When the namespace cannot be opened.
    pub fn new(capture: NodeCapture, cgroup_root: PathBuf, choices: Choices) -> io::Result<Self> {
        let home = File::open("/proc/thread-self/ns/net")?;
        // A proxy that an earlier agent had is still there, or comes back: until one connects, what is in force stays.
        let served = capture.entries().unwrap_or_default().iter().any(|entry| entry.has(FLAG_DNS));
        let (drift, foreign, hooks) = Default::default();
        Ok(Self { capture, drift, home, cgroup_root, choices, foreign, hooks, dns_served: AtomicBool::new(served) })
    }

    /// The agent's own network namespace.
    #[must_use]
    pub const fn home(&self) -> &File {
        &self.home
    }

    /// Whether the pods' DNS queries are to go to the proxy, as soon as there is one that answers them: pods have listeners
    /// for them.
    #[must_use]
    pub fn dns(&self) -> bool {
        self.choices.dns == Switch::On
    }

    /// Whether the pods' DNS queries go to the proxy now.
    #[must_use]
    pub fn captures_dns(&self) -> bool {
        self.dns() && self.dns_served.load(Ordering::Relaxed)
    }

    /// Takes note of whether the proxies answer DNS. Returns whether [`Self::captures_dns`] changed by it: then every pod is
    /// to be told.
    pub fn set_dns_served(&self, served: bool) -> bool {
        self.dns_served.swap(served, Ordering::Relaxed) != served && self.dns()
    }

    /// What the programs are told of every pod.
    #[must_use]
    pub fn flags(&self) -> u32 {
        let dns = if self.captures_dns() { FLAG_DNS } else { 0 };
        dns | match self.choices.older {
            OlderConnections::Allow => 0,
            OlderConnections::Deny => FLAG_DENY_OLDER,
        }
    }

    /// Attaches the node's own programs where somebody took them off, and follows a kubelet that was restarted. Returns
    /// whether something was missing.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn mend_hooks(&self) -> Result<bool, CaptureError> {
        let mended = self.capture.mend_node();
        self.remember_hooks(mended.as_ref().err());
        let mut missing = mended?;
        match self.capture.follow_kubelet(self.choices.kubelet()) {
            // Said at start; a node whose kubelet has another cgroup captures as well as any.
            Err(error) if error.is_absence() => {}
            followed => missing |= followed?,
        }
        Ok(missing)
    }

    fn remember_hooks(&self, error: Option<&CaptureError>) {
        let mut hooks = self.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        *hooks = error.map(|error| HooksMissing(error.to_string()));
    }

    /// Refuses while the node's own programs could not be put back, as it was tried last.
    ///
    /// # Errors
    /// With what was in the way.
    pub fn refuse_missing_hooks(&self) -> Result<(), HooksMissing> {
        let known = self.hooks.lock().unwrap_or_else(PoisonError::into_inner);
        known.clone().map_or(Ok(()), Err)
    }

    /// Asks the kernel for programs of others, and takes note of them.
    ///
    /// # Errors
    /// When the kernel refuses; what was known stays.
    pub fn look_for_foreign_programs(&self) -> Result<(), CaptureError> {
        let mut programs = self.capture.foreign_programs(&self.cgroup_root)?;
        programs.retain(|program| !self.choices.allowed_programs.contains(&program.name));
        let names: Vec<String> = programs.iter().map(ToString::to_string).collect();
        let found = (!names.is_empty()).then(|| ForeignPrograms(names.join(", ")));
        let mut known = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        if *known != found {
            match &found {
                Some(programs) => tracing::error!("no pod is enrolled: {programs}"),
                None => tracing::info!("no foreign programs on the connect hooks any more"),
            }
            *known = found;
        }
        Ok(())
    }

    /// Refuses while there are programs of others, as they were found last.
    ///
    /// # Errors
    /// With their names, and what to do.
    pub fn refuse_foreign_programs(&self) -> Result<(), ForeignPrograms> {
        let known = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        known.clone().map_or(Ok(()), Err)
    }
}
