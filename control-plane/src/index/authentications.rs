//! Peer authentications: which workloads take no plaintext. They reach a node's proxy as policies that deny where there is
//! no identity, which the workloads that they are for name.
//!
//! The nearest says what is taken: one that selects the workload, then its namespace's, then the mesh's, which is that of the
//! root namespace; of several as near, the oldest. What it leaves unsaid the next one says.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mesh_proto::security as wire;
use wire::string_match::MatchType;

use super::pods::selects;
use super::resource::Changes;
use super::{Dirty, Index, Note, encode};
use crate::api::{Kind, Labels, MtlsMode, Name, ObjectId, PeerAuthentication};

/// The policy that denies plaintext on every port, in the root namespace. An underscore is in the name of no policy that is
/// an object ([`super::names::in_policy`]).
const STATIC_STRICT: &str = "istio_converted_static_strict";
/// Begins the name of a policy that denies it on some ports.
const CONVERTED: &str = "converted_peer_authentication_";

/// The policies by namespace and name.
#[derive(Debug, Default)]
pub(super) struct Authentications(HashMap<Arc<str>, BTreeMap<Arc<str>, Arc<PeerAuthentication>>>);

/// What a policy makes of the workloads that it is the nearest one of.
#[derive(Debug, PartialEq)]
enum Outcome {
    /// They take plaintext.
    Open,
    /// They do not.
    Strict,
    /// On some ports they do not, as this rule says.
    ByPort(wire::Rule),
}

impl Authentications {
    fn get(&self, name: &Name) -> Option<&Arc<PeerAuthentication>> {
        self.0.get(&name.namespace)?.get(&name.name)
    }

    /// Returns what was there before.
    pub(super) fn insert(&mut self, policy: Arc<PeerAuthentication>) -> Option<Arc<PeerAuthentication>> {
        let Name { namespace, name } = policy.name.clone();
        self.0.entry(namespace).or_default().insert(name, policy)
    }

    /// Returns what was there.
    pub(super) fn remove(&mut self, name: &Name) -> Option<Arc<PeerAuthentication>> {
        let policies = self.0.get_mut(&name.namespace)?;
        let old = policies.remove(&name.name);
        if policies.is_empty() {
            self.0.remove(&name.namespace);
        }
        old
    }

    pub(super) fn len(&self) -> usize {
        self.0.values().map(BTreeMap::len).sum()
    }

    fn of(&self, namespace: &str) -> impl Iterator<Item = &Arc<PeerAuthentication>> {
        self.0.get(namespace).into_iter().flat_map(BTreeMap::values)
    }

    /// What to tell people, by name.
    pub(super) fn notes(&self) -> Vec<Note> {
        let stand_ins = self.0.values().flat_map(BTreeMap::values).filter(|policy| policy.is_stand_in);
        let note = |policy: &Arc<PeerAuthentication>| Note {
            object: ObjectId::namespaced(Kind::PeerAuthentication, &policy.name).to_string(),
            reason: "is not valid, and has no earlier version: what it may be for takes no plaintext".to_owned(),
        };
        let mut notes: Vec<Note> = stand_ins.map(note).collect();
        notes.sort_by(|a, b| a.object.cmp(&b.object));
        notes
    }

    /// What workloads of `namespace` take that no policy selects by their labels.
    fn base(&self, root: &str, namespace: &str) -> MtlsMode {
        let wide = |namespace| oldest(self.of(namespace).filter(|policy| policy.selector.is_empty()));
        let mode = |namespace| wide(namespace).and_then(|policy| policy.mode);
        mode(namespace).or_else(|| mode(root)).unwrap_or(MtlsMode::Permissive)
    }

    /// The policies about plaintext that a workload of `namespace` with these labels must name.
    pub(super) fn keys_of(&self, root: &Arc<str>, namespace: &Arc<str>, labels: &Labels) -> Vec<String> {
        if self.0.is_empty() {
            return Vec::new();
        }
        let is_for = |policy: &&Arc<PeerAuthentication>| selects(&policy.selector, labels);
        let base = self.base(root, namespace);
        let nearest = oldest(self.of(namespace).filter(is_for));
        let outcome = match nearest {
            Some(policy) => outcome(policy, base),
            None if base == MtlsMode::Strict => Outcome::Strict,
            None => Outcome::Open,
        };
        let stand_ins = |namespace| self.of(namespace).filter(|policy| policy.is_stand_in);
        let is_forced = stand_ins(namespace).any(|policy| policy.selector.is_empty() || is_for(&policy))
            || stand_ins(root).any(|policy| policy.selector.is_empty());
        match (outcome, nearest) {
            (Outcome::Strict, _) => vec![static_strict(root)],
            _ if is_forced => vec![static_strict(root)],
            (Outcome::ByPort(_), Some(policy)) => vec![key(&policy.name)],
            (Outcome::ByPort(_) | Outcome::Open, _) => Vec::new(),
        }
    }
}

/// Of policies for the same workloads, the one that counts. What is not valid is never it: it holds beside the others.
fn oldest<'a>(policies: impl Iterator<Item = &'a Arc<PeerAuthentication>>) -> Option<&'a Arc<PeerAuthentication>> {
    policies.filter(|policy| !policy.is_stand_in).min_by_key(|policy| (policy.created, policy.name.name.clone()))
}

/// The primary name of the policy that a peer authentication becomes, where it says something of single ports.
pub(crate) fn key(policy: &Name) -> String {
    format!("{}/{CONVERTED}{}", policy.namespace, policy.name)
}

fn static_strict(root: &str) -> String {
    format!("{root}/{STATIC_STRICT}")
}

/// What a policy that selects workloads makes of them, where otherwise `base` would hold.
fn outcome(policy: &PeerAuthentication, base: MtlsMode) -> Outcome {
    let mode = policy.mode.unwrap_or(base);
    let others = policy.ports.iter().filter(|(_, port)| **port != mode).map(|(port, _)| u32::from(*port));
    let others: Vec<u32> = others.collect();
    match (mode, others.is_empty()) {
        (MtlsMode::Permissive, true) => Outcome::Open,
        (MtlsMode::Strict, true) => Outcome::Strict,
        (MtlsMode::Permissive, false) => {
            Outcome::ByPort(plaintext(wire::Match { destination_ports: others, ..Default::default() }))
        }
        (MtlsMode::Strict, false) => {
            Outcome::ByPort(plaintext(wire::Match { not_destination_ports: others, ..Default::default() }))
        }
    }
}

/// A rule that matches plaintext, as far as `more` does.
fn plaintext(more: wire::Match) -> wire::Rule {
    let anybody = wire::StringMatch { match_type: Some(MatchType::Presence(())) };
    let matches = vec![wire::Match { not_principals: vec![anybody], ..more }];
    wire::Rule { clauses: vec![wire::Clause { matches }] }
}

fn denial(namespace: &str, name: String, rule: wire::Rule) -> wire::Authorization {
    wire::Authorization {
        name,
        namespace: namespace.to_owned(),
        scope: wire::Scope::WorkloadSelector.into(),
        action: wire::Action::Deny.into(),
        rules: vec![rule],
        ..Default::default()
    }
}

impl Index {
    pub(super) fn touch_authentication(&self, name: &Name, old: Option<&PeerAuthentication>, dirty: &mut Dirty) {
        let new = self.authentications.get(name).map(Arc::as_ref);
        if old == new {
            return;
        }
        dirty.authentications.insert(name.clone());
        for policy in old.into_iter().chain(new) {
            if !policy.selector.is_empty() {
                self.touch_selected_in(&name.namespace, &policy.selector, dirty);
                continue;
            }
            // What it says, the policies of single workloads leave unsaid.
            let everywhere = name.namespace == self.options.root_namespace;
            let mut touch = |namespace: &Arc<str>| {
                dirty.pods.extend(self.pods.in_namespace(namespace).cloned());
                dirty.workload_entries.extend(self.workload_entries.in_namespace(namespace).cloned());
                dirty.entries.extend(self.entries.in_namespace(namespace).cloned());
                dirty.authentications.extend(self.authentications.of(namespace).map(|policy| policy.name.clone()));
            };
            if everywhere {
                let known = self.pods.namespaces().chain(self.workload_entries.namespaces());
                known.chain(self.entries.namespaces()).chain(self.authentications.0.keys()).for_each(touch);
            } else {
                touch(&name.namespace);
            }
        }
    }

    pub(super) fn recompute_authentication(&mut self, name: &Name, changes: &mut Changes) {
        let base = self.authentications.base(&self.options.root_namespace, &name.namespace);
        let policy = self.authentications.get(name).filter(|policy| !policy.selector.is_empty() && !policy.is_stand_in);
        let converted = format!("{CONVERTED}{}", name.name);
        match policy.map(|policy| outcome(policy, base)) {
            Some(Outcome::ByPort(rule)) => {
                let policy = denial(&name.namespace, converted, rule);
                self.published_policies.publish_policy(encode::policy(&policy), changes);
            }
            Some(Outcome::Open | Outcome::Strict) | None => {
                self.published_policies.withdraw_policy(&key(name), changes);
            }
        }
    }

    /// The policy that denies plaintext on every port is there as long as any workload may name it.
    pub(super) fn recompute_static_strict(&mut self, changes: &mut Changes) {
        let root = &self.options.root_namespace;
        if self.authentications.0.is_empty() {
            let key = static_strict(root);
            self.published_policies.withdraw_policy(&key, changes);
        } else {
            let policy = denial(root, STATIC_STRICT.to_owned(), plaintext(wire::Match::default()));
            self.published_policies.publish_policy(encode::policy(&policy), changes);
        }
    }
}
