//! Whether a connection may be: DENY before ALLOW, and no ALLOW policy means allowed.

use std::net::IpAddr;
use std::sync::Arc;

use thiserror::Error;

use crate::identity::SpiffeId;
use crate::policy::{Action, Authorization, Scope, Verdict};
use crate::snapshot::Snapshot;
use crate::workload::Workload;

/// What is known about a connection when it is decided upon.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionFacts<'a> {
    /// The workload that is connected to.
    pub destination: &'a Workload,
    /// The peer's identity as its certificate proved it. None: plaintext.
    pub identity: Option<&'a SpiffeId>,
    /// The peer's address.
    pub source_ip: IpAddr,
    /// The address connected to.
    pub destination_ip: IpAddr,
    /// The application's port, not the tunnel's.
    pub destination_port: u16,
}

/// The connection may be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Key of the ALLOW policy that matched. None: no ALLOW policy applies.
    pub policy: Option<Arc<str>>,
    /// What policies that are not enforced would have said.
    pub noted: Vec<Noted>,
}

/// The connection may not be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{reason}")]
pub struct Denied {
    /// Why.
    pub reason: DenyReason,
    /// What policies that are not enforced would have said.
    pub noted: Vec<Noted>,
}

/// Why a connection may not be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DenyReason {
    /// A DENY policy matched.
    #[error("policy {policy} denies")]
    DenyMatched {
        /// Key of the policy.
        policy: Arc<str>,
    },
    /// ALLOW policies apply, and none of them matched.
    #[error("no ALLOW policy matches; {policy} is the first of {count} that apply")]
    NoAllowMatched {
        /// Key of the first of them.
        policy: Arc<str>,
        /// How many apply.
        count: usize,
    },
    /// The workload names a policy that discovery has not brought.
    #[error("policy not received: {policy}")]
    NotReceived {
        /// Key of the policy.
        policy: Arc<str>,
    },
    /// A policy that applies could not be understood.
    #[error("policy {policy} is invalid, so it denies")]
    Invalid {
        /// Key of the policy.
        policy: Arc<str>,
    },
}

/// What a dry-run policy would have said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Noted {
    /// Key of the policy.
    pub policy: Arc<str>,
    /// Its action.
    pub action: Action,
    /// Whether it matched.
    pub matched: bool,
}

impl Denied {
    /// Key of the policy that decided.
    pub fn policy(&self) -> &Arc<str> {
        match &self.reason {
            DenyReason::DenyMatched { policy }
            | DenyReason::NoAllowMatched { policy, .. }
            | DenyReason::NotReceived { policy }
            | DenyReason::Invalid { policy } => policy,
        }
    }
}

impl Snapshot {
    /// Decides on a connection by the policies that apply to its destination: those of all workloads, those of the
    /// workload's namespace, and those that the workload names.
    ///
    /// # Errors
    /// When the connection may not be, with the policy that decided.
    pub fn authorize(&self, facts: &ConnectionFacts<'_>) -> Result<Allowed, Denied> {
        let mut noted = Vec::new();
        let mut matched_allow = None;
        let mut missed_allows = 0;
        let mut first_missed = None;
        let mut not_received = None;
        for named in self.policies_of(facts.destination) {
            let policy = match named {
                Ok(policy) => policy,
                Err(key) => {
                    // A policy that is here and denies is the better reason.
                    not_received.get_or_insert(key);
                    continue;
                }
            };
            let key = || Arc::clone(policy.key());
            match policy.judge(facts) {
                Verdict::Invalid if policy.dry_run => {}
                Verdict::Invalid => return denied(DenyReason::Invalid { policy: key() }, noted),
                Verdict::Rules { action, matched } if policy.dry_run => {
                    noted.push(Noted { policy: key(), action, matched });
                }
                Verdict::Rules { action: Action::Deny, matched: true } => {
                    return denied(DenyReason::DenyMatched { policy: key() }, noted);
                }
                Verdict::Rules { action: Action::Deny, matched: false } => {}
                Verdict::Rules { action: Action::Allow, matched: true } => {
                    matched_allow.get_or_insert_with(key);
                }
                Verdict::Rules { action: Action::Allow, matched: false } => {
                    first_missed.get_or_insert_with(key);
                    missed_allows += 1;
                }
            }
        }
        if let Some(key) = not_received {
            return denied(DenyReason::NotReceived { policy: Arc::clone(key) }, noted);
        }
        match (matched_allow, first_missed) {
            (None, Some(policy)) => denied(DenyReason::NoAllowMatched { policy, count: missed_allows }, noted),
            (policy, _) => Ok(Allowed { policy, noted }),
        }
    }

    /// The policies that apply to a workload, each once; the key alone where the workload names one that is not here.
    /// In the order global, namespace, named; by key within each.
    pub fn policies_of<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = Result<&'a Arc<Authorization>, &'a Arc<str>>> {
        let by_scope = self.global_policies().chain(self.namespace_policies(&workload.origin.namespace));
        let named = workload.authorization_policies.iter().filter_map(move |key| match self.authorization(key) {
            None => Some(Err(key)),
            Some(policy) => match policy.scope {
                Scope::Global => None,
                Scope::Namespace if policy.namespace == workload.origin.namespace => None,
                Scope::Namespace | Scope::WorkloadSelector => Some(Ok(policy)),
            },
        });
        by_scope.map(Ok).chain(named)
    }
}

fn denied(reason: DenyReason, noted: Vec<Noted>) -> Result<Allowed, Denied> {
    Err(Denied { reason, noted })
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
