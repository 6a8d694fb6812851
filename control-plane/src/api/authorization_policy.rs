//! AuthorizationPolicy: who may connect to what. What a node's proxy can see of a connection is translated into the rules
//! that it is sent; what it cannot see (HTTP) narrows nothing here that would let more through.

mod rules;

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_proto::security as wire;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::check;
use super::custom::Selector;
use super::labels::Labels;
use super::name::{Kind, Name};
use super::problem::{Problem, Problems};

/// A policy.
#[derive(Clone, Debug, PartialEq)]
pub struct AuthorizationPolicy {
    /// Its name.
    pub name: Name,
    /// What it applies to.
    pub target: PolicyTarget,
    /// What it does to connections that it matches.
    pub action: PolicyAction,
    /// It is only noted what it would do (`istio.io/dry-run`).
    pub dry_run: bool,
    /// Which connections it matches: any rule does. A rule of an ALLOW policy that asks for more than a node's proxy can see
    /// is left out; in a DENY policy what it asks beyond that is left out, so that it denies more.
    pub rules: Vec<wire::Rule>,
    /// The attributes that rules ask for and that only a waypoint can see, sorted.
    pub beyond_l4: Vec<String>,
    /// It stands for one that is not valid.
    pub is_stand_in: bool,
}

/// What a policy applies to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyTarget {
    /// Workloads of its namespace with these labels, all of them if there are none. Of the root namespace: workloads of the
    /// whole mesh.
    Workloads(Labels),
    /// Objects whose waypoint enforces it; never a node's proxy.
    Objects(Vec<TargetRef>),
}

/// An object that a policy is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetRef {
    /// Its API group; empty for the core group.
    pub group: String,
    /// Its kind.
    pub kind: String,
    /// Its name, in the policy's namespace.
    pub name: String,
}

/// What a policy does to a connection that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyAction {
    /// It may be.
    Allow,
    /// It may not be.
    Deny,
    /// It is noted; of waypoints only.
    Audit,
    /// Somebody else is asked; of waypoints only.
    Custom,
}

/// The spec as it is written.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec {
    selector: Option<Selector>,
    target_ref: Option<TargetRefSpec>,
    target_refs: Option<Vec<TargetRefSpec>>,
    action: Option<String>,
    /// Who is asked, of CUSTOM. Opaque here.
    #[serde(default)]
    provider: Value,
    rules: Option<Vec<rules::RuleSpec>>,
}

#[derive(Debug, Deserialize, Serialize)]
struct TargetRefSpec {
    group: Option<String>,
    kind: String,
    name: String,
    namespace: Option<String>,
}

const DRY_RUN: &str = "istio.io/dry-run";
/// What may be a target, by group and kind.
const TARGETS: [(&str, &str); 5] = [
    ("", "Service"),
    ("core", "Service"),
    ("gateway.networking.k8s.io", "Gateway"),
    ("gateway.networking.k8s.io", "GatewayClass"),
    ("networking.istio.io", "ServiceEntry"),
];

/// Validates an AuthorizationPolicy.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate(meta: &ObjectMeta, spec: &Spec) -> Result<AuthorizationPolicy, Vec<Problem>> {
    let mut problems = Problems::default();
    let (name, _) = check::namespaced(Kind::AuthorizationPolicy, meta, &mut problems);
    let dry_run = match meta.annotations.as_ref().and_then(|all| all.get(DRY_RUN)) {
        None => false,
        Some(text) => truth(text).unwrap_or_else(|| {
            let field = format!("metadata.annotations[{DRY_RUN}]");
            problems.add(field, format!("{text:?} is neither true nor false"), "use \"true\" or \"false\"");
            false
        }),
    };
    let target = target(&name, spec, &mut problems);
    let action = action(spec, &target, &mut problems);
    let mut beyond_l4 = BTreeSet::new();
    let rules = rules::read(&name.namespace, action, spec.rules.as_deref(), &mut beyond_l4, &mut problems);
    problems.finish(AuthorizationPolicy {
        name,
        target,
        action,
        dry_run,
        rules,
        beyond_l4: beyond_l4.into_iter().collect(),
        is_stand_in: false,
    })
}

/// Truth as Go's parser takes it, which reads this annotation elsewhere.
fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" | "" => Some(false),
        _ => None,
    }
}

fn target(name: &Name, spec: &Spec, problems: &mut Problems) -> PolicyTarget {
    let labels = Selector::labels(spec.selector.as_ref(), "spec.selector", problems);
    let listed = spec.target_refs.iter().flatten().enumerate();
    let listed = listed.map(|(index, target)| (format!("spec.targetRefs[{index}]"), target));
    let single = spec.target_ref.iter().map(|target| ("spec.targetRef".to_owned(), target));
    let mut targets = Vec::new();
    for (field, target) in single.chain(listed) {
        let group = target.group.clone().unwrap_or_default();
        if !TARGETS.contains(&(group.as_str(), target.kind.as_str())) {
            problems.add(
                field.clone(),
                format!("a {} of the group {group:?} cannot be a target", target.kind),
                "name a Service, a Gateway, a GatewayClass or a ServiceEntry, with its group",
            );
        }
        if !check::is_dns_subdomain(&target.name) {
            problems.add(format!("{field}.name"), format!("{:?} is not a name", target.name), check::DNS_SUBDOMAIN_FIX);
        }
        if target.namespace.as_deref().is_some_and(|namespace| !namespace.is_empty() && *namespace != *name.namespace) {
            problems.add(
                format!("{field}.namespace"),
                "a policy applies to objects of its own namespace",
                "put the policy into the namespace of its target",
            );
        }
        targets.push(TargetRef { group, kind: target.kind.clone(), name: target.name.clone() });
    }
    if targets.is_empty() {
        return PolicyTarget::Workloads(labels);
    }
    if spec.selector.is_some() {
        problems.add("spec.selector", "stands beside targetRefs", "keep one of the two");
    }
    PolicyTarget::Objects(targets)
}

fn action(spec: &Spec, target: &PolicyTarget, problems: &mut Problems) -> PolicyAction {
    let action = match spec.action.as_deref() {
        None | Some("" | "ALLOW") => return PolicyAction::Allow,
        Some("DENY") => return PolicyAction::Deny,
        Some("AUDIT") => PolicyAction::Audit,
        Some("CUSTOM") => PolicyAction::Custom,
        Some(other) => {
            problems.add("spec.action", format!("{other:?} is not an action"), "use ALLOW or DENY");
            return PolicyAction::Deny;
        }
    };
    if let PolicyTarget::Workloads(_) = target {
        problems.add(
            "spec.action",
            format!("{} cannot be enforced by a node's proxy", spec.action.as_deref().unwrap_or_default()),
            "use ALLOW or DENY, or name in targetRefs what has a waypoint",
        );
    }
    action
}

/// The safest reading of a policy that is not valid: it denies whatever it may have been meant for. None where nothing that
/// it could have said would have denied anything here.
pub(super) fn stand_in(name: Name, value: &Value) -> Option<AuthorizationPolicy> {
    let at = |path: &str| value.pointer(path).filter(|found| !found.is_null());
    let dry_run = at("/metadata/annotations/istio.io~1dry-run").and_then(Value::as_str).and_then(truth);
    if at("/spec/action").and_then(Value::as_str) == Some("AUDIT") {
        return None;
    }
    let target = if let Some(targets) = at("/spec/targetRef").or_else(|| at("/spec/targetRefs")) {
        // The waypoint's, as far as that can be read.
        let list = targets.as_array().map_or(std::slice::from_ref(targets), Vec::as_slice);
        let text = |target: &Value, key: &str| target.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let read =
            |target| TargetRef { group: text(target, "group"), kind: text(target, "kind"), name: text(target, "name") };
        match at("/spec/selector") {
            None => PolicyTarget::Objects(list.iter().map(read).collect()),
            Some(_) => PolicyTarget::Workloads(Labels::new()),
        }
    } else {
        PolicyTarget::Workloads(readable_labels(at("/spec/selector")))
    };
    Some(AuthorizationPolicy {
        name,
        target,
        action: PolicyAction::Deny,
        dry_run: dry_run.unwrap_or_default(),
        rules: vec![wire::Rule::default()],
        beyond_l4: Vec::new(),
        is_stand_in: true,
    })
}

/// The labels of a selector if it can be read and is valid; else none, which selects everything.
pub(super) fn readable_labels(selector: Option<&Value>) -> Labels {
    let read = selector.and_then(|selector| serde_json::from_value::<Selector>(selector.clone()).ok());
    let mut problems = Problems::default();
    let labels = Selector::labels(read.as_ref(), "", &mut problems);
    problems.finish(labels).unwrap_or_default()
}
