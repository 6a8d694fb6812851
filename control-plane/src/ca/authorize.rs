//! Who gets which identity: a function of the caller, the request and the directory of pods.
//!
//! A node proxy gets the identities of the pods on its own node; everybody else gets its own identity and no other.
//! What counts is the directory: a token of a pod that is gone, or was replaced by another of the same name, is worth
//! nothing, and the node is that of the pod, whatever the token says.

use std::fmt;
use std::str::FromStr;

use mesh_model::{InvalidSpiffeId, SpiffeId};
use thiserror::Error;
use tonic::Status;

use super::directory::{Directory, NodeIdentity, PodRecord};
use super::token::Caller;

/// A service account: `<namespace>/<name>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Text that is no service account.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not of the form <namespace>/<service account>")]
pub struct InvalidServiceAccount(String);

impl FromStr for ServiceAccount {
    type Err = InvalidServiceAccount;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            Some(_) | None => Err(InvalidServiceAccount(text.to_owned())),
        }
    }
}

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What the operator has decided.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The one trust domain that is signed for.
    pub trust_domain: String,
    /// Who may ask for identities of other pods on its node.
    pub node_proxies: Vec<ServiceAccount>,
    /// Whoever accepted a token has seen the pod that it is bound to, as the API server does: a pod that the directory
    /// does not know is then one that it does not know yet.
    pub pods_are_vouched_for: bool,
}

impl Policy {
    /// For `trust_domain`, with the mesh's own node proxy `culvert-system/ztunnel`.
    pub fn new(trust_domain: impl Into<String>) -> Self {
        let ztunnel = ServiceAccount { namespace: "culvert-system".to_owned(), name: "ztunnel".to_owned() };
        Self { trust_domain: trust_domain.into(), node_proxies: vec![ztunnel], pods_are_vouched_for: false }
    }

    fn is_node_proxy(&self, caller: &Caller) -> bool {
        self.node_proxies
            .iter()
            .any(|account| account.namespace == caller.namespace && account.name == caller.service_account)
    }
}

/// Why a caller does not get the identity that it asked for.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Denial {
    /// What it asked for is no identity.
    #[error("the impersonated identity {asked:?} {error}")]
    NotAnIdentity {
        /// What it asked for, shortened.
        asked: String,
        /// What is wrong with it.
        error: InvalidSpiffeId,
    },
    /// Its own name makes no identity.
    #[error("{caller} has no identity: it {error}")]
    NoOwnIdentity {
        /// The caller.
        caller: String,
        /// What is wrong with it.
        error: InvalidSpiffeId,
    },
    /// Not signed for here.
    #[error("{asked} is not of the trust domain {ours}")]
    TrustDomain {
        /// What it asked for.
        asked: SpiffeId,
        /// The trust domain of this authority.
        ours: String,
    },
    /// Only node proxies get identities other than their own.
    #[error("{caller} is not a node proxy and may not ask for {asked}")]
    NotANodeProxy {
        /// The caller.
        caller: String,
        /// What it asked for.
        asked: SpiffeId,
    },
    /// A node proxy's token must be bound to its pod.
    #[error("the token of {caller} is not bound to a pod")]
    Unbound {
        /// The caller.
        caller: String,
    },
    /// The pod of the token is gone.
    #[error("the pod of {caller} does not exist")]
    NoSuchPod {
        /// The caller.
        caller: String,
    },
    /// The pod of the token is gone and another of the same name has taken its place.
    #[error("the token of {caller} is bound to an earlier pod of that name")]
    EarlierPod {
        /// The caller.
        caller: String,
    },
    /// The pod of the token runs as somebody else.
    #[error("the pod of {caller} runs as service account {actual}")]
    OtherAccount {
        /// The caller.
        caller: String,
        /// As whom it runs.
        actual: String,
    },
    /// The pod of the token has ended.
    #[error("the pod of {caller} has ended")]
    PodIsOver {
        /// The caller.
        caller: String,
    },
    /// The pod of the token is on no node, or on another than the token says.
    #[error("the pod of {caller} is not on the node that its token names")]
    OtherNode {
        /// The caller.
        caller: String,
    },
    /// No pod of that identity is on the caller's node.
    #[error("no running pod of {asked} is on node {node} of {caller}")]
    NotOnNode {
        /// The caller.
        caller: String,
        /// What it asked for.
        asked: SpiffeId,
        /// The node of the caller.
        node: String,
    },
    /// The pod of the token is not known yet.
    #[error("the pod of {caller} is not known yet, retry")]
    PodUnknownYet {
        /// The caller.
        caller: String,
    },
    /// No pod of that identity is known yet.
    #[error("no pod of {asked} is known yet, retry")]
    UnknownYet {
        /// What it asked for.
        asked: SpiffeId,
    },
    /// The pods are not known yet.
    #[error("the cluster's pods are not known yet, retry")]
    NotSynced,
}

impl From<&Denial> for Status {
    fn from(denial: &Denial) -> Self {
        let message = denial.to_string();
        match denial {
            Denial::NotAnIdentity { .. } => Self::invalid_argument(message),
            Denial::NoOwnIdentity { .. }
            | Denial::TrustDomain { .. }
            | Denial::NotANodeProxy { .. }
            | Denial::Unbound { .. }
            | Denial::NoSuchPod { .. }
            | Denial::EarlierPod { .. }
            | Denial::OtherAccount { .. }
            | Denial::PodIsOver { .. }
            | Denial::OtherNode { .. }
            | Denial::NotOnNode { .. } => Self::permission_denied(message),
            Denial::PodUnknownYet { .. } | Denial::UnknownYet { .. } | Denial::NotSynced => Self::unavailable(message),
        }
    }
}

/// The identity that `caller` gets: its own, or the one named by `impersonated` if it may have that.
///
/// # Errors
/// When it may not, or not yet.
pub fn authorize(
    policy: &Policy,
    directory: &dyn Directory,
    caller: &Caller,
    impersonated: Option<&str>,
) -> Result<SpiffeId, Denial> {
    match impersonated {
        None => own(policy, directory, caller),
        Some(asked) => another(policy, directory, caller, asked),
    }
}

fn own(policy: &Policy, directory: &dyn Directory, caller: &Caller) -> Result<SpiffeId, Denial> {
    if caller.pod.is_some() {
        live_pod(policy, directory, caller)?;
    }
    SpiffeId::new(&policy.trust_domain, &caller.namespace, &caller.service_account)
        .map_err(|error| Denial::NoOwnIdentity { caller: caller.to_string(), error })
}

fn another(policy: &Policy, directory: &dyn Directory, caller: &Caller, asked: &str) -> Result<SpiffeId, Denial> {
    let asked: SpiffeId =
        asked.parse().map_err(|error| Denial::NotAnIdentity { asked: asked.chars().take(256).collect(), error })?;
    if !policy.is_node_proxy(caller) {
        return Err(Denial::NotANodeProxy { caller: caller.to_string(), asked });
    }
    if asked.trust_domain() != policy.trust_domain {
        return Err(Denial::TrustDomain { asked, ours: policy.trust_domain.clone() });
    }
    let pod = live_pod(policy, directory, caller)?;
    if pod.node.is_empty() || caller.node.as_ref().is_some_and(|node| *node != pod.node) {
        return Err(Denial::OtherNode { caller: caller.to_string() });
    }
    match directory.identity_on_node(&pod.node, &asked) {
        NodeIdentity::Present => Ok(asked),
        NodeIdentity::Absent => Err(Denial::NotOnNode { caller: caller.to_string(), asked, node: pod.node }),
        NodeIdentity::UnknownYet => Err(Denial::UnknownYet { asked }),
    }
}

/// The pod that the caller's token is bound to, if that very pod lives.
fn live_pod(policy: &Policy, directory: &dyn Directory, caller: &Caller) -> Result<PodRecord, Denial> {
    let name = || caller.to_string();
    let bound = caller.pod.as_ref().ok_or_else(|| Denial::Unbound { caller: name() })?;
    if !directory.is_synced() {
        return Err(Denial::NotSynced);
    }
    let pod = directory.pod(&caller.namespace, &bound.name);
    let is_other = |pod: &PodRecord| bound.uid.as_ref().is_some_and(|uid| *uid != pod.uid);
    let pod = match pod {
        Some(pod) if !is_other(&pod) => pod,
        Some(_) | None if policy.pods_are_vouched_for => return Err(Denial::PodUnknownYet { caller: name() }),
        Some(_) => return Err(Denial::EarlierPod { caller: name() }),
        None => return Err(Denial::NoSuchPod { caller: name() }),
    };
    if pod.service_account != caller.service_account {
        return Err(Denial::OtherAccount { caller: name(), actual: pod.service_account });
    }
    if pod.is_over {
        return Err(Denial::PodIsOver { caller: name() });
    }
    Ok(pod)
}

#[cfg(test)]
mod tests;
