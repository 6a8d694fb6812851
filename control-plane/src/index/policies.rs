//! Authorization policies, found by name and by the workloads that they select; and the resource that each becomes.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use mesh_proto::security as wire;

use super::multimap::MultiMap;
use super::pods::selects;
use super::resource::Changes;
use super::{Dirty, Index, Note, encode, names};
use crate::api::{AuthorizationPolicy, Kind, Labels, Name, ObjectId, PolicyAction, PolicyTarget};

/// The policies, with what finds them.
#[derive(Debug, Default)]
pub(super) struct Policies {
    all: HashMap<Name, Arc<AuthorizationPolicy>>,
    /// By namespace and the first label of their selector: a workload that is selected carries it.
    by_label: MultiMap<(Arc<str>, String, String), Name>,
    /// Those of which people are to be told something.
    noted: BTreeSet<Name>,
}

impl Policies {
    /// Returns what was there before.
    pub(super) fn insert(&mut self, policy: Arc<AuthorizationPolicy>) -> Option<Arc<AuthorizationPolicy>> {
        let old = self.remove(&policy.name);
        let name = &policy.name;
        if let Some((key, value)) = selector(&policy).first_key_value() {
            self.by_label.insert((name.namespace.clone(), key.clone(), value.clone()), name.clone());
        }
        if note(&policy).is_some() {
            self.noted.insert(name.clone());
        }
        self.all.insert(name.clone(), policy);
        old
    }

    /// Returns what was there.
    pub(super) fn remove(&mut self, name: &Name) -> Option<Arc<AuthorizationPolicy>> {
        let policy = self.all.remove(name)?;
        if let Some((key, value)) = selector(&policy).first_key_value() {
            self.by_label.remove(&(name.namespace.clone(), key.clone(), value.clone()), name);
        }
        self.noted.remove(name);
        Some(policy)
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// What to tell people, by name.
    pub(super) fn notes(&self) -> Vec<Note> {
        let told = |name: &Name| {
            let reason = note(self.all.get(name)?)?;
            Some(Note { object: ObjectId::namespaced(Kind::AuthorizationPolicy, name).to_string(), reason })
        };
        self.noted.iter().filter_map(told).collect()
    }

    /// The policies of `namespace` whose selector these labels satisfy, in no order.
    fn selecting<'a>(&'a self, namespace: &'a Arc<str>, labels: &'a Labels) -> impl Iterator<Item = &'a Name> {
        let candidates = labels.iter().flat_map(|(key, value)| {
            self.by_label.get(&(namespace.clone(), key.clone(), value.clone())).filter_map(|name| self.all.get(name))
        });
        candidates.filter(|policy| selects(selector(policy), labels)).map(|policy| &policy.name)
    }
}

/// The labels that the policy asks of workloads; empty if it does not select by labels.
fn selector(policy: &AuthorizationPolicy) -> &Labels {
    static NONE: Labels = Labels::new();
    match &policy.target {
        PolicyTarget::Workloads(labels) => labels,
        PolicyTarget::Objects(_) => &NONE,
    }
}

/// How the policy's effect differs from what its author may expect.
pub(crate) fn note(policy: &AuthorizationPolicy) -> Option<String> {
    let PolicyTarget::Workloads(labels) = &policy.target else {
        return policy.is_stand_in.then(|| "is not valid".to_owned());
    };
    if policy.is_stand_in {
        let whom = if labels.is_empty() { "every connection" } else { "every connection to what it selects" };
        return Some(format!("is not valid, and has no earlier version: {whom} is denied"));
    }
    if policy.beyond_l4.is_empty() {
        return None;
    }
    let effect = match policy.action {
        PolicyAction::Allow => "rules that ask for them allow nothing",
        PolicyAction::Deny | PolicyAction::Audit | PolicyAction::Custom => {
            "rules deny without regard to them, which is more than they ask for"
        }
    };
    let attributes = policy.beyond_l4.join(", ");
    Some(format!(
        "is not enforceable by the node proxy as far as it asks for {attributes}: {effect}; bind a waypoint, and name in \
         targetRefs what it is bound to"
    ))
}

impl Index {
    pub(super) fn touch_policy(&self, name: &Name, old: Option<&AuthorizationPolicy>, dirty: &mut Dirty) {
        let new = self.policies.all.get(name).map(Arc::as_ref);
        if old == new {
            return;
        }
        dirty.policies.insert(name.clone());
        if old.map(selector) == new.map(selector) {
            return;
        }
        for policy in old.into_iter().chain(new) {
            self.touch_selected(&name.namespace, selector(policy), dirty);
        }
    }

    /// The workloads that a policy of `namespace` with this selector is for: of the root namespace, those of the whole mesh.
    fn touch_selected(&self, namespace: &Arc<str>, selector: &Labels, dirty: &mut Dirty) {
        if *namespace == self.options.root_namespace {
            let namespaces = self.pods.namespaces().chain(self.workload_entries.namespaces());
            let namespaces: BTreeSet<&Arc<str>> = namespaces.chain(self.entries.namespaces()).collect();
            namespaces.into_iter().for_each(|namespace| self.touch_selected_in(namespace, selector, dirty));
        } else {
            self.touch_selected_in(namespace, selector, dirty);
        }
    }

    /// The workloads of `namespace` that carry every label of `selector`, and those that cannot be told by it.
    pub(super) fn touch_selected_in(&self, namespace: &Arc<str>, selector: &Labels, dirty: &mut Dirty) {
        dirty.pods.extend(self.pods.selected(namespace, selector));
        dirty.workload_entries.extend(self.workload_entries.selected(namespace, selector).cloned());
        dirty.entries.extend(self.entries.in_namespace(namespace).cloned());
    }

    pub(super) fn recompute_policy(&mut self, name: &Name, changes: &mut Changes) {
        let policy = self.policies.all.get(name).and_then(|policy| self.authorization(policy));
        match policy {
            Some(policy) => self.published_policies.publish_policy(encode::policy(&policy), changes),
            None => self.published_policies.withdraw_policy(&names::policy_key(name), changes),
        }
    }

    /// What the node's proxies are sent; none for a policy that is a waypoint's.
    fn authorization(&self, policy: &AuthorizationPolicy) -> Option<wire::Authorization> {
        let PolicyTarget::Workloads(labels) = &policy.target else { return None };
        let scope = if !labels.is_empty() {
            wire::Scope::WorkloadSelector
        } else if policy.name.namespace == self.options.root_namespace {
            wire::Scope::Global
        } else {
            wire::Scope::Namespace
        };
        let action = match policy.action {
            PolicyAction::Allow => wire::Action::Allow,
            PolicyAction::Deny | PolicyAction::Audit | PolicyAction::Custom => wire::Action::Deny,
        };
        Some(wire::Authorization {
            name: names::in_policy(&policy.name.name).into_owned(),
            namespace: names::in_policy(&policy.name.namespace).into_owned(),
            scope: scope.into(),
            action: action.into(),
            rules: policy.rules.clone(),
            dry_run: policy.dry_run,
            extensions: Vec::new(),
        })
    }

    /// The policies that a workload of `namespace` with these labels must name: those that select it by its labels, then
    /// those about plaintext.
    pub(super) fn policies_of(&self, namespace: &Arc<str>, labels: &Labels) -> Vec<String> {
        let root = &self.options.root_namespace;
        let mut found: BTreeSet<&Name> = self.policies.selecting(namespace, labels).collect();
        found.extend(self.policies.selecting(root, labels));
        let mut keys: Vec<String> = found.into_iter().map(names::policy_key).collect();
        keys.extend(self.authentications.keys_of(root, namespace, labels));
        keys
    }
}
