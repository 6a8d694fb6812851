//! `culvert check`: whether a cluster is fit for the mesh, and whether the mesh holds what it promises. Pure.

mod service;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::capture;
use super::error::AskError;
use super::facts::{Asked, Component, Dump, Facts};
use super::text::{Style, Verdict, clean, count};
use super::version::CLIENT;

/// The oldest kernel that capture works with.
const KERNEL: (u32, u32) = (6, 1);
/// The oldest Kubernetes whose API the mesh is tested against, by its minor version.
const KUBERNETES: (u32, u32) = (1, 36);
/// Names that a line carries at most.
const NAMED: usize = 5;

/// What `culvert check -o json` prints.
#[derive(Debug, Serialize)]
pub struct Check {
    /// No line failed.
    pub healthy: bool,
    /// `before` the mesh is installed, or `after`.
    pub stage: &'static str,
    /// The lines.
    pub lines: Vec<Line>,
}

/// One thing that was checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// `good`, `doubtful` or `failed`.
    pub verdict: Verdict,
    /// What was checked, and what was found.
    pub what: String,
    /// What to do about it; none if it is good.
    pub remedy: Option<String>,
}

/// What only `check` asks of the API server.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Whether this user may do what installing takes, by what it is; or why that is not known.
    pub rights: BTreeMap<String, Result<bool, String>>,
    /// Whether this user may give rights that it does not have itself, as installing does, by what it takes.
    pub grants: BTreeMap<String, Result<bool, String>>,
    /// DaemonSets and Deployments of other meshes and of CNIs, as `namespace/name`.
    pub workloads: Vec<String>,
    /// DaemonSets, apart from the mesh's own, that load eBPF programs by the look of what they mount and may.
    pub programs: Vec<String>,
    /// Names of webhooks on pods or namespaces of other meshes.
    pub webhooks: Vec<String>,
    /// `pod-security.kubernetes.io/enforce` of the system namespace; none if there is no such namespace.
    pub pod_security: Option<Option<String>>,
    /// The registrations of the mesh's own validation webhook that are there, and whether each has its roots.
    pub own_webhooks: BTreeMap<&'static str, bool>,
    /// What could not be asked, and why. What is among it is neither there nor missing.
    pub unknown: BTreeMap<&'static str, String>,
}

/// DaemonSets of all namespaces, in [`Surroundings::unknown`].
pub const DAEMONSETS: &str = "daemonsets";
/// Deployments of all namespaces.
pub const DEPLOYMENTS: &str = "deployments";
/// Webhooks of other meshes.
pub const WEBHOOKS: &str = "webhooks";
/// The mesh's own webhook.
pub const OWN_WEBHOOK: &str = "the validation webhook";
/// Its registrations, what each is for, and where it is made.
pub const REGISTRATIONS: [(&str, &str, &str); 2] = [
    ("culvertd", "labels of pods and namespaces", "manifests/culvert/25-webhook.yaml"),
    ("culvertd-custom-kinds", "policies, entries and gateways", "manifests/crds/webhook.yaml"),
];
/// The mesh's own namespace.
pub const OWN_NAMESPACE: &str = "the system namespace";

impl Surroundings {
    fn knows(&self, what: &str) -> bool {
        !self.unknown.contains_key(what)
    }
}

fn good(what: impl Into<String>) -> Line {
    Line { verdict: Verdict::Good, what: what.into(), remedy: None }
}

fn doubtful(what: impl Into<String>, remedy: impl Into<String>) -> Line {
    Line { verdict: Verdict::Doubtful, what: what.into(), remedy: Some(remedy.into()) }
}

fn failed(what: impl Into<String>, remedy: impl Into<String>) -> Line {
    Line { verdict: Verdict::Failed, what: what.into(), remedy: Some(remedy.into()) }
}

impl Check {
    /// What must hold before the mesh is installed; with `after`, also what must hold then.
    pub fn new(facts: &Facts, around: &Surroundings, after: bool) -> Self {
        let mut lines = vec![kubernetes(&facts.kubernetes)];
        lines.extend(kernels(facts));
        lines.extend(network(facts, around));
        lines.extend(others(around));
        if after {
            lines.extend(around.knows(OWN_NAMESPACE).then(|| pod_security(facts, around)));
            lines.extend(installed(facts));
            if around.knows(OWN_WEBHOOK) {
                lines.extend(webhooks(around));
            }
            lines.extend(roots(facts));
            lines.extend(versions(facts));
            lines.extend(service::lines(facts));
            lines.extend(captured(facts));
        } else {
            if around.pod_security.is_some() {
                lines.push(pod_security(facts, around));
            }
            lines.extend(rights(around));
        }
        let unknown = facts.unknown.iter().map(|(what, why)| (what.as_str(), why));
        for (what, why) in unknown.chain(around.unknown.iter().map(|(what, why)| (*what, why))) {
            lines.push(doubtful(
                format!("{what} could not be asked for: {why}"),
                "if a right is missing: `culvert --help` names those that are needed",
            ));
        }
        let healthy = lines.iter().all(|line| line.verdict != Verdict::Failed);
        Self { healthy, stage: if after { "after" } else { "before" }, lines }
    }

    /// For people.
    pub fn text(&self, style: Style) -> String {
        let mut text = String::new();
        for Line { verdict, what, remedy } in &self.lines {
            text += &format!("{} {}\n", style.mark(*verdict), clean(what));
            if let Some(remedy) = remedy {
                text += &format!("    {}\n", clean(remedy));
            }
        }
        let failed = self.lines.iter().filter(|line| line.verdict == Verdict::Failed).count();
        let doubtful = self.lines.iter().filter(|line| line.verdict == Verdict::Doubtful).count();
        text += &match (failed, doubtful, self.stage) {
            (0, 0, "before") => "The mesh can be installed.\n".to_owned(),
            (0, 0, _) => "All is well.\n".to_owned(),
            (failed, doubtful, _) => format!("{failed} failed, {doubtful} may be wrong.\n"),
        };
        text
    }
}

/// The first two numbers of a version such as `v1.36.2` or `6.12.43-cloud`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim_start_matches('v').split(['.', '-', '+']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kubernetes(found: &str) -> Line {
    let what = format!("Kubernetes {found}");
    match version(found) {
        Some(version) if version >= KUBERNETES => good(what),
        Some(_) => doubtful(what, format!("the mesh is tested on {}.{} and newer", KUBERNETES.0, KUBERNETES.1)),
        None => doubtful(what, "its version is not understood; the mesh may work all the same"),
    }
}

/// A few names, and how many more.
fn names<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    let all: Vec<&str> = names.into_iter().collect();
    let more = all.len().saturating_sub(NAMED);
    let some = all.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
    if more == 0 { some } else { format!("{some} and {more} more") }
}

fn kernels(facts: &Facts) -> Vec<Line> {
    let mut lines = Vec::new();
    let linux: Vec<_> = facts.nodes.iter().filter(|node| node.linux).collect();
    if linux.is_empty() {
        return vec![failed("no node runs Linux", "the mesh is for Linux nodes")];
    }
    let old = linux.iter().filter(|node| version(&node.kernel).is_none_or(|version| version < KERNEL));
    let old: Vec<String> = old.map(|node| format!("{} ({})", node.name, node.kernel)).collect();
    let wanted = format!("Linux {}.{} or newer", KERNEL.0, KERNEL.1);
    if old.is_empty() {
        lines.push(good(format!("{wanted} on {}", count(linux.len(), "node"))));
    } else {
        let which = names(old.iter().map(String::as_str));
        lines.push(failed(
            format!("{wanted} is needed, and not on {which}"),
            "renew the node's system, or keep enrolled pods off it",
        ));
    }
    let away: Vec<_> = linux.iter().filter(|node| !node.ready).map(|node| node.name.as_str()).collect();
    if !away.is_empty() {
        lines.push(failed(
            format!("not ready: {}", names(away)),
            "kubectl describe node says why; a missing CNI is a common cause",
        ));
    }
    lines
}

/// CNIs by the names of their DaemonSets.
const CNIS: [(&str, &str); 7] = [
    ("cilium", "Cilium"),
    ("calico-node", "Calico"),
    ("kube-flannel-ds", "Flannel"),
    ("kindnet", "kindnet"),
    ("aws-node", "the Amazon VPC CNI"),
    ("weave-net", "Weave"),
    ("kube-router", "kube-router"),
];

/// Other meshes by the names of their DaemonSets and Deployments.
const MESHES: [&str; 6] =
    ["istio-cni-node", "istiod", "linkerd-destination", "linkerd-cni", "consul-connect-injector", "kuma-control-plane"];

fn has<'a>(around: &'a Surroundings, name: &str) -> Option<&'a String> {
    around.workloads.iter().find(|workload| workload.rsplit('/').next() == Some(name))
}

fn network(facts: &Facts, around: &Surroundings) -> Vec<Line> {
    let found: Vec<_> = CNIS.iter().filter(|(name, _)| has(around, name).is_some()).map(|(_, what)| *what).collect();
    let ready = facts.nodes.iter().any(|node| node.ready);
    let mut lines = vec![match (found.is_empty(), ready) {
        (false, _) => good(format!("CNI: {}", found.join(", "))),
        (true, true) if !around.knows(DAEMONSETS) => good("CNI: the nodes are ready, so there is one"),
        (true, true) => good("CNI: none that is known by name; the nodes are ready, so there is one"),
        (true, false) => failed("no CNI: no node is ready", "install a CNI first; the mesh chains its plugin to it"),
    }];
    let others = around.programs.iter().filter(|name| name.rsplit('/').next() != Some("cilium"));
    let others: Vec<&str> = others.map(String::as_str).collect();
    if !others.is_empty() {
        lines.push(doubtful(
            format!("eBPF programs of others may be attached where the mesh attaches its own: by {}", names(others)),
            "each agent asks its node's kernel, and refuses pods whose connections they could turn; `culvert status` says so",
        ));
    }
    if has(around, "cilium").is_some() {
        lines.push(doubtful(
            "Cilium's programs may turn services into pods before the mesh sees them",
            "install Cilium with socketLB.hostNamespaceOnly=true, or pods are refused, and `culvert status` says so; and with \
             cni.exclusive=false, or it takes the mesh's CNI configuration away again and again",
        ));
    }
    lines
}

fn others(around: &Surroundings) -> Vec<Line> {
    let meshes = MESHES.iter().filter_map(|name| has(around, name));
    let found: Vec<&str> = meshes.chain(&around.webhooks).map(String::as_str).collect();
    if found.is_empty() {
        let asked = [DAEMONSETS, DEPLOYMENTS, WEBHOOKS].iter().all(|what| around.knows(what));
        return if asked { vec![good("no other mesh")] } else { Vec::new() };
    }
    let what = format!("another mesh is here: {}", names(found));
    vec![doubtful(what, "a pod is in one mesh only: do not label namespaces for both")]
}

fn pod_security(facts: &Facts, around: &Surroundings) -> Line {
    let namespace = &facts.system_namespace;
    match &around.pod_security {
        Some(Some(level)) if level == "privileged" => {
            good(format!("pods of {namespace} may have what the agent needs"))
        }
        Some(level) => {
            let level = level.as_deref().unwrap_or("not set");
            let what = format!("pod security of the namespace {namespace} is {level}");
            let remedy = format!("kubectl label namespace {namespace} pod-security.kubernetes.io/enforce=privileged");
            // Without a label the cluster's default counts, which may be any.
            if level == "not set" { doubtful(what, remedy) } else { failed(what, remedy) }
        }
        None => {
            failed(format!("there is no namespace {namespace}"), "kubectl apply --server-side -f manifests/culvert/")
        }
    }
}

fn rights(around: &Surroundings) -> Vec<Line> {
    let mut lines = Vec::new();
    let missing: Vec<&str> =
        around.rights.iter().filter(|(_, may)| matches!(may, Ok(false))).map(|(what, _)| what.as_str()).collect();
    if missing.is_empty() && around.rights.values().any(Result::is_ok) {
        lines.push(good("this user may install the mesh"));
    } else if !missing.is_empty() {
        lines.push(failed(format!("this user may not {}", names(missing)), "install as a cluster administrator"));
    }
    let missing: Vec<&str> =
        around.grants.iter().filter(|(_, may)| matches!(may, Ok(false))).map(|(what, _)| what.as_str()).collect();
    if !missing.is_empty() {
        lines.push(doubtful(
            format!("this user may not {}: it can give the mesh only rights that it has itself", names(missing)),
            "install as a cluster administrator",
        ));
    }
    let asked = around.rights.iter().chain(&around.grants);
    for (what, why) in asked.filter_map(|(what, may)| Some((what, may.as_ref().err()?))) {
        lines
            .push(doubtful(format!("whether this user may {what} is not known: {why}"), "ask a cluster administrator"));
    }
    lines
}

fn installed(facts: &Facts) -> Vec<Line> {
    Component::ALL.into_iter().map(|component| of_component(facts, component)).collect()
}

fn of_component(facts: &Facts, component: Component) -> Line {
    fn well<T>(asked: &[Asked<T>], good: impl Fn(&T) -> bool) -> (usize, Vec<(String, Option<AskError>)>) {
        let bad = asked.iter().filter(|one| !one.part.ready || !one.answer.as_ref().is_ok_and(&good));
        // That it is not ready is known of one, even if it may not be asked.
        let may_not = |one: &Asked<T>, error: &AskError| !one.part.ready && matches!(error, AskError::Forbidden { .. });
        let why = |one: &Asked<T>| one.answer.as_ref().err().filter(|error| !may_not(one, error)).cloned();
        let bad: Vec<_> = bad.map(|one| (one.part.pod.clone(), why(one))).collect();
        (asked.len() - bad.len(), bad)
    }
    let (ready, bad) = match component {
        Component::Culvertd => well(&facts.culvertd, |status| status.synced),
        Component::Agent => well(&facts.agents, |_| true),
        Component::Proxy => well(&facts.proxies, |dump| dump.discovery.synced),
    };
    let name = component.workload();
    let desired = match facts.desired.get(&component) {
        Some(Some(desired)) => usize::try_from(*desired).unwrap_or(0),
        Some(None) => {
            return failed(format!("{name} is not installed"), "kubectl apply --server-side -f manifests/culvert/");
        }
        // It may not be asked how many there should be.
        None => ready + bad.len(),
    };
    let what = format!("{name}: {ready} of {desired} ready");
    let why = bad.iter().map(|(pod, error)| match error {
        Some(error) => format!("{pod}: {error}"),
        None => format!("{pod} is not ready"),
    });
    let why: Vec<String> = why.collect();
    if ready >= desired && bad.is_empty() && ready > 0 {
        return good(what);
    }
    let may_not = |(_, error): &(String, Option<AskError>)| matches!(error, Some(AskError::Forbidden { .. }));
    if ready + bad.len() >= desired && bad.iter().all(may_not) && !bad.is_empty() {
        let what = format!("{name}: {} may not be asked by this user", count(bad.len(), "pod"));
        return doubtful(what, names(why.iter().map(String::as_str)));
    }
    let remedy = if why.is_empty() {
        format!("kubectl -n {} describe pods", facts.system_namespace)
    } else {
        names(why.iter().map(String::as_str))
    };
    failed(what, remedy)
}

fn webhooks(around: &Surroundings) -> Vec<Line> {
    let of_one = |(name, what, file): (&str, &str, &str)| match around.own_webhooks.get(name) {
        Some(true) => good(format!("the validation webhook for {what} is registered, with its roots")),
        Some(false) => failed(
            format!("the validation webhook for {what} has no roots, so nobody can ask it"),
            "look at culvertd's log; it writes them",
        ),
        None => doubtful(
            format!(
                "the validation webhook for {what} is not registered: mistakes are told of only after they are stored"
            ),
            format!(
                "kubectl apply --server-side -f {file}; where Istio has installed these kinds, its own webhook checks them"
            ),
        ),
    };
    REGISTRATIONS.into_iter().map(of_one).collect()
}

/// None where nothing can be said, which another line says.
fn roots(facts: &Facts) -> Option<Line> {
    let published = match facts.roots.as_ref()? {
        Ok(roots) => roots,
        Err(why) => {
            let what = format!("the mesh's roots are not published: {why}");
            return Some(failed(what, "look at culvertd's log; it writes them"));
        }
    };
    if facts.proxies.iter().all(|one| one.answer.is_err()) {
        return None;
    }
    let is_known = |print: &String| published.iter().any(|root| root.fingerprint == *print);
    let holds = |one: &&Asked<Dump>| {
        let certificates = one.answer.iter().flat_map(|dump| &dump.certificates);
        certificates.filter_map(|one| one.roots.as_ref()).any(|roots| !roots.iter().any(is_known))
    };
    let strange: Vec<&str> = facts.proxies.iter().filter(holds).map(|one| one.part.node.as_str()).collect();
    if strange.is_empty() {
        return Some(good(format!("every proxy trusts a root that is published ({})", published.len())));
    }
    Some(failed(
        format!("certificates under other roots than those published, on {}", names(strange)),
        "is there a second authority? Compare the Secrets culvert-ca-root and cacerts with the ConfigMap culvert-ca-root-cert",
    ))
}

/// None where nobody says its version.
fn versions(facts: &Facts) -> Option<Line> {
    let proxies = facts.proxies.iter().filter_map(|one| Some((&one.part, &one.answer.as_ref().ok()?.version)));
    let replicas = facts.culvertd.iter().filter_map(|one| Some((&one.part, &one.answer.as_ref().ok()?.version)));
    let mut by_version: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (part, version) in proxies.chain(replicas) {
        let version = if version.is_empty() { "unknown" } else { version };
        by_version.entry(version).or_default().push(&part.pod);
    }
    if by_version.is_empty() {
        return None;
    }
    if by_version.keys().all(|version| *version == CLIENT) {
        return Some(good(format!("one version of culvertd and the proxies: {CLIENT}")));
    }
    let found: Vec<String> =
        by_version.iter().map(|(version, pods)| format!("{version}: {}", names(pods.iter().copied()))).collect();
    Some(doubtful(
        format!("several versions; this program's is {CLIENT}; {}", found.join("; ")),
        "finish the upgrade; `culvert version` names all",
    ))
}

/// Nodes whose agent this user may not ask.
fn closed_nodes(facts: &Facts) -> BTreeSet<&str> {
    let agents = || facts.agents.iter().map(|one| (one.part.node.as_str(), &one.answer));
    let open: BTreeSet<&str> = agents().filter(|(_, answer)| answer.is_ok()).map(|(node, _)| node).collect();
    let may_not = agents().filter(|(_, answer)| matches!(answer, Err(AskError::Forbidden { .. })));
    may_not.map(|(node, _)| node).filter(|node| !open.contains(node)).collect()
}

fn captured(facts: &Facts) -> Vec<Line> {
    let pods = capture::enrolled(facts);
    if pods.is_empty() {
        return vec![good(
            "no pod is enrolled; kubectl label namespace ... istio.io/dataplane-mode=ambient enrols those of a namespace",
        )];
    }
    let closed = closed_nodes(facts);
    let (mut lines, mut unasked) = (Vec::new(), 0);
    for pod in &pods {
        let name = format!("{}/{}", pod.namespace, pod.name);
        if let Some(why) = &pod.weaker {
            lines.push(doubtful(
                format!("pod {name} is captured, but held less firmly than others: {why}"),
                "a CNI whose pods have an end of their interface on the node, as a veth pair has, lets it be held there",
            ));
        }
        match (pod.state, &pod.reason) {
            ("captured", _) if !pod.annotated => lines.push(doubtful(
                format!("pod {name} is captured, and its annotation does not say so: peers may send it plaintext"),
                "the agent writes it within seconds; if it does not, look at its log and its right to patch pods/status",
            )),
            ("captured" | "starting", _) => {}
            ("unknown", _) if closed.contains(pod.node.as_str()) => unasked += 1,
            (state, why) => {
                let why = why.as_deref().unwrap_or_default();
                let annotated = if pod.annotated { ", although its annotation says so" } else { "" };
                lines.push(failed(format!("pod {name}: {state}{annotated}: {why}"), "culvert status"));
            }
        }
    }
    if unasked > 0 {
        let what = format!("whether {} captured is not known: this user may not ask the agents", subject(unasked));
        lines.push(doubtful(what, "the right to create pods/exec in the system namespace is needed"));
    }
    let well = pods.iter().filter(|pod| pod.state == "captured").count();
    let starting = pods.iter().filter(|pod| pod.state == "starting").count();
    let what = format!(
        "{well} of {} captured, as the kernel of each node says; {starting} start",
        count(pods.len(), "enrolled pod")
    );
    if well + starting == pods.len() {
        lines.insert(0, good(what));
    } else if well + starting + unasked < pods.len() {
        lines.insert(0, failed(what, "each is named below"));
    }
    lines
}

fn subject(pods: usize) -> String {
    if pods == 1 { "1 pod is".to_owned() } else { format!("{pods} pods are") }
}

#[cfg(test)]
mod tests;
