//! What goes to the runtime when something is wrong: a code and a text.

use std::io;

use super::client::ClientError;

/// Codes 1 to 99 are the specification's, those from 100 on this plugin's own.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// The runtime asks for another version, or for something that the version does not have.
    #[error("CNI version {0:?} is not supported, or not for this command")]
    Version(String),
    /// A variable of the environment is missing or invalid.
    #[error("{0} is missing or invalid in the environment")]
    Environment(&'static str),
    /// Standard input could not be read.
    #[error("cannot read the configuration: {0}")]
    Read(#[from] io::Error),
    /// The configuration is not JSON.
    #[error("cannot decode the configuration: {0}")]
    Decode(#[from] serde_json::Error),
    /// The configuration lacks something.
    #[error("invalid configuration: {0}")]
    Configuration(String),
    /// The pod may not start yet.
    #[error(
        "pod {pod} is not started: {why}, and after {seconds} s {source}; {}",
        if matches!(source, ClientError::Unreachable { .. }) {
            "see that a pod of DaemonSet culvert-node runs on this node, or label the pod istio.io/dataplane-mode=none"
        } else {
            "see the log of this node's culvert-node pod, or label the pod istio.io/dataplane-mode=none"
        }
    )]
    NotYet {
        /// Namespace and name.
        pod: String,
        /// Why it would have to be enrolled.
        why: &'static str,
        /// For how long the agent was asked.
        seconds: u64,
        /// What it said last.
        #[source]
        source: ClientError,
    },
    /// The pod may not start, and asking again does not help.
    #[error("pod {pod} is not started: {source}")]
    Refused {
        /// Namespace and name.
        pod: String,
        /// What the agent said.
        #[source]
        source: ClientError,
    },
    /// CHECK or GC: the agent is not there.
    #[error("{0}")]
    TryLater(#[source] ClientError),
    /// CHECK: the pod is not as it was admitted.
    #[error("pod {pod} is not enrolled: {reason}")]
    NotEnrolled {
        /// Namespace and name.
        pod: String,
        /// Why.
        reason: String,
    },
    /// STATUS: pods that are to be enrolled could not start now.
    #[error("no pod can be enrolled: {0}")]
    NotAvailable(#[source] ClientError),
}

impl CniError {
    /// The code.
    #[must_use]
    pub const fn code(&self) -> u32 {
        match self {
            Self::Version(_) => 1,
            Self::Environment(_) => 4,
            Self::Read(_) => 5,
            Self::Decode(_) => 6,
            Self::Configuration(_) => 7,
            Self::NotYet { .. } | Self::TryLater(_) => 11,
            Self::NotAvailable(_) => 50,
            Self::Refused { .. } => 100,
            Self::NotEnrolled { .. } => 101,
        }
    }
}
