//! `culvert status`: facts to one report. What is wrong comes first, each with what to do about it. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::capture::{self, Enrolled};
use super::facts::{Asked, Certificate, Component, Facts, Node, Note, Part, Refused, Root};
use super::sync::{self, Follower, Replica};
use super::text::{Style, Table, Verdict, clean, count};

/// Life left of a root below which it is said.
const ROOT_ENDS_SOON: Duration = Duration::from_secs(30 * 24 * 3600);
/// Lines of one kind that are shown to people; JSON has all.
const SHOWN: usize = 30;

/// What `culvert status -o json` prints.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Nothing is wrong.
    pub healthy: bool,
    /// One sentence.
    pub summary: String,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// What is worth knowing, and not wrong.
    pub notes: Vec<Note>,
    /// The nodes.
    pub nodes: Vec<NodeRow>,
    /// Every pod that its labels put into the mesh.
    pub pods: Vec<Enrolled>,
    /// Certificates.
    pub certificates: Certificates,
    /// The replicas of culvertd.
    pub control_plane: Vec<Replica>,
    /// The proxies, and how far they follow.
    pub proxies: Vec<Follower>,
    /// Objects that culvertd refused.
    pub refused: Vec<Refused>,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What it is about: an object, a node, a part of the mesh.
    pub subject: String,
    /// What is wrong with it.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodeRow {
    /// Its name.
    pub name: String,
    /// Its kernel.
    pub kernel: String,
    /// `ready`, or why its agent is not.
    pub agent: String,
    /// `ready`, or why its proxy is not.
    pub proxy: String,
    /// Pods of it that are captured.
    pub captured: usize,
    /// Pods of it that are to be.
    pub enrolled: usize,
}

/// What is known of certificates.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Certificates {
    /// How many the proxies hold.
    pub count: usize,
    /// The one that ends first; none if there is none.
    pub soonest: Option<Ends>,
    /// The roots that the cluster publishes.
    pub roots: Vec<Root>,
}

/// A certificate, and when it ends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Ends {
    /// When, RFC 3339.
    pub expires: String,
    /// For whom it is.
    pub identity: String,
    /// The node whose proxy holds it.
    pub node: String,
}

const READY: &str = "ready";

impl Status {
    /// Judges what was found out, at `now`.
    pub fn new(facts: &Facts, now: SystemTime) -> Self {
        let pods = capture::enrolled(facts);
        let nodes: Vec<NodeRow> =
            facts.nodes.iter().filter(|node| node.linux).map(|node| node_row(facts, node, &pods)).collect();
        let replicas = sync::replicas(&facts.culvertd);
        let (proxies, _) = sync::followers(&facts.culvertd, facts.proxies.iter().map(|asked| &asked.part));
        let refused: BTreeSet<Refused> =
            facts.culvertd.iter().flat_map(|one| &one.answer).flat_map(|one| one.source.refused.clone()).collect();
        let refused: Vec<Refused> = refused.into_iter().collect();
        let mut problems = not_installed(facts);
        if problems.len() < Component::ALL.len() {
            problems.extend(of_control_plane(facts, &replicas));
            problems.extend(nodes.iter().flat_map(|node| of_node(facts, node)));
            problems.extend(of_certificates(facts));
            problems.extend(proxies.iter().flat_map(|one| of_follower(facts, one)));
        }
        problems.extend(refused.iter().flat_map(of_refused));
        problems.extend(pods.iter().filter_map(of_pod));
        let captured = pods.iter().filter(|pod| pod.state == "captured").count();
        let healthy = problems.is_empty();
        let wrong = if healthy { "nothing is wrong".to_owned() } else { count(problems.len(), "thing") + " wrong" };
        let ready = |part: fn(&NodeRow) -> &String| nodes.iter().filter(|node| part(node) == READY).count();
        let summary = format!(
            "{wrong}: {captured} of {} captured, agents ready on {} and proxies on {} of {}",
            count(pods.len(), "enrolled pod"),
            ready(|node| &node.agent),
            ready(|node| &node.proxy),
            count(nodes.len(), "node"),
        );
        let certificates = certificates(facts);
        let notes = notes(facts, &certificates, now);
        Self { healthy, summary, problems, notes, nodes, pods, certificates, control_plane: replicas, proxies, refused }
    }

    /// For people.
    pub fn text(&self, style: Style) -> String {
        let verdict = if self.healthy { Verdict::Good } else { Verdict::Failed };
        let mut text = format!("{} {}\n", style.mark(verdict), clean(&self.summary));
        for Problem { subject, problem, remedy } in self.problems.iter().take(SHOWN) {
            let (subject, problem, remedy) = (clean(subject), clean(problem), clean(remedy));
            text += &format!("{} {subject}: {problem}\n    {remedy}\n", style.mark(Verdict::Failed));
        }
        text += &more(self.problems.len());
        for Note { object, reason } in self.notes.iter().take(SHOWN) {
            text += &format!("{} {}: {}\n", style.mark(Verdict::Doubtful), clean(object), clean(reason));
        }
        text += &more(self.notes.len());
        let mut part = |name: &str, table: &Table| {
            if !table.is_empty() {
                text += &format!("\n{}\n{}", style.bold(name), table.render(style));
            }
        };
        part("Nodes", &self.node_table());
        part("Pods", &self.pod_table());
        part("Control plane", &self.replica_table());
        part("Proxies", &sync::table(&self.proxies));
        part("Certificates", &self.certificate_table());
        text
    }

    fn node_table(&self) -> Table {
        let mut table = Table::new(&["NAME", "KERNEL", "PODS", "AGENT", "PROXY"]);
        for node in &self.nodes {
            let pods = format!("{}/{}", node.captured, node.enrolled);
            table.row([node.name.clone(), node.kernel.clone(), pods, node.agent.clone(), node.proxy.clone()]);
        }
        table
    }

    fn pod_table(&self) -> Table {
        let mut namespaces: BTreeMap<&str, [usize; 3]> = BTreeMap::new();
        for pod in &self.pods {
            let [captured, starting, other] = namespaces.entry(&pod.namespace).or_default();
            *match pod.state {
                "captured" => captured,
                "starting" => starting,
                _ => other,
            } += 1;
        }
        let mut table = Table::new(&["NAMESPACE", "CAPTURED", "STARTING", "NOT CAPTURED"]);
        for (namespace, counts) in namespaces {
            table.row(std::iter::once(namespace.to_owned()).chain(counts.map(|count| count.to_string())));
        }
        table
    }

    fn replica_table(&self) -> Table {
        let mut table = Table::new(&["REPLICA", "NODE", "READY", "SYNCED", "CLIENTS", "RESOURCES"]);
        let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        for one in &self.control_plane {
            let resources: Vec<_> = one.resources.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
            table.row([
                one.pod.clone(),
                one.node.clone(),
                yes(one.ready),
                one.synced.map_or_else(|| "unknown".to_owned(), yes),
                one.clients.map(|count| count.to_string()).unwrap_or_default(),
                resources.join(", "),
            ]);
        }
        table
    }

    fn certificate_table(&self) -> Table {
        let mut table = Table::new(&["", "WHOSE", "EXPIRES"]);
        let all = count(self.certificates.count, "certificate");
        if let Some(ends) = &self.certificates.soonest {
            let whose = format!("{} on {}", ends.identity, ends.node);
            table.row([format!("first of {all}"), whose, ends.expires.clone()]);
        }
        for root in &self.certificates.roots {
            let whose = format!("{} {}", root.subject, root.fingerprint.get(..16).unwrap_or_default());
            table.row(["root".to_owned(), whose, root.expires.clone()]);
        }
        table
    }
}

fn more(all: usize) -> String {
    match all.checked_sub(SHOWN) {
        Some(0) | None => String::new(),
        Some(more) => format!("  and {more} more; -o json has all\n"),
    }
}

fn problem(subject: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) -> Problem {
    Problem { subject: subject.into(), problem: problem.into(), remedy: remedy.into() }
}

fn not_installed(facts: &Facts) -> Vec<Problem> {
    let missing = facts.desired.iter().filter(|(_, desired)| desired.is_none());
    let problems = missing.map(|(component, _)| {
        let namespace = &facts.system_namespace;
        let remedy = "kubectl apply --server-side -f manifests/culvert/; --namespace names another namespace";
        problem(component.workload(), format!("is not installed in the namespace {namespace}"), remedy)
    });
    problems.collect()
}

fn of_control_plane(facts: &Facts, replicas: &[Replica]) -> Vec<Problem> {
    let namespace = &facts.system_namespace;
    let mut problems = Vec::new();
    let is_installed = facts.desired.get(&Component::Culvertd) != Some(&None);
    if replicas.is_empty() && is_installed {
        let remedy = format!("kubectl -n {namespace} describe deployment culvertd");
        problems.push(problem("culvertd", "has no replica; the proxies go on with what they know", remedy));
    }
    for one in replicas {
        let wrong = match (&one.error, one.synced) {
            (Some(error), _) => Some(error.clone()),
            (None, Some(false)) => Some("has not read everything from the API server yet".to_owned()),
            _ if !one.ready => Some("is not ready".to_owned()),
            _ => None,
        };
        let remedy = format!("kubectl -n {namespace} logs {}", one.pod);
        problems.extend(wrong.map(|wrong| problem(format!("culvertd {}", one.pod), wrong, remedy)));
    }
    let answered = facts.culvertd.iter().filter_map(|one| Some((&one.part, one.answer.as_ref().ok()?)));
    for (part, status) in answered {
        for (kind, watch) in &status.watches {
            if let Some(trouble) = &watch.trouble {
                let subject = format!("culvertd {}", part.pod);
                let remedy = "look at the rights of its service account, and at the API server";
                problems.push(problem(subject, format!("cannot follow {kind}: {trouble}"), remedy));
            }
        }
    }
    problems
}

fn node_row(facts: &Facts, node: &Node, pods: &[Enrolled]) -> NodeRow {
    let of_node = |pod: &&Enrolled| pod.node == node.name;
    NodeRow {
        name: node.name.clone(),
        kernel: node.kernel.clone(),
        agent: state(&facts.agents, &node.name),
        proxy: state(&facts.proxies, &node.name),
        captured: pods.iter().filter(of_node).filter(|pod| pod.state == "captured").count(),
        enrolled: pods.iter().filter(of_node).count(),
    }
}

/// `ready`, or why not; of the best of the pods of this node, while one replaces another.
fn state<T>(asked: &[Asked<T>], node: &str) -> String {
    let here = asked.iter().filter(|one| one.part.node == node);
    let state = |one: &Asked<T>| match (&one.answer, one.part.ready) {
        (Ok(_), true) => READY.to_owned(),
        (Ok(_), false) => "answers, and is not ready".to_owned(),
        (Err(error), _) => error.to_string(),
    };
    let states: Vec<String> = here.map(state).collect();
    let best = states.iter().find(|state| *state == READY).or(states.first());
    best.cloned().unwrap_or_else(|| "no pod".to_owned())
}

fn of_node(facts: &Facts, node: &NodeRow) -> Vec<Problem> {
    let namespace = &facts.system_namespace;
    let ready = facts.nodes.iter().any(|one| one.name == node.name && one.ready);
    let mut problems = Vec::new();
    if !ready {
        problems.push(problem(
            format!("node {}", node.name),
            "is not ready",
            format!("kubectl describe node {}", node.name),
        ));
    }
    for (component, state) in [(Component::Agent, &node.agent), (Component::Proxy, &node.proxy)] {
        if state == READY || facts.desired.get(&component) == Some(&None) {
            continue;
        }
        let (name, workload) = (component.as_str(), component.workload());
        let remedy = match part_on(facts, component, &node.name) {
            Some(part) => format!("kubectl -n {namespace} describe pod {0}; kubectl -n {namespace} logs {0}", part.pod),
            None => format!("kubectl -n {namespace} describe daemonset {workload}"),
        };
        problems.push(problem(format!("{name} of node {}", node.name), state.clone(), remedy));
    }
    problems
}

fn part_on<'f>(facts: &'f Facts, component: Component, node: &str) -> Option<&'f Part> {
    let agents = facts.agents.iter().map(|one| &one.part);
    let mut all = agents.chain(facts.proxies.iter().map(|one| &one.part));
    all.find(|part| part.component == component && part.node == node)
}

fn held(facts: &Facts) -> impl Iterator<Item = (&Part, &Certificate)> {
    let answered = facts.proxies.iter().filter_map(|one| Some((&one.part, one.answer.as_ref().ok()?)));
    answered.flat_map(|(part, dump)| dump.certificates.iter().map(move |certificate| (part, certificate)))
}

fn of_certificates(facts: &Facts) -> Vec<Problem> {
    let wrong = held(facts).filter(|(_, one)| one.state != "Valid" || one.last_error.is_some());
    let problems = wrong.map(|(part, one)| {
        let why = one.last_error.clone().unwrap_or_else(|| format!("is {}", one.state.to_lowercase()));
        let subject = format!("certificate of {} on {}", one.identity, part.node);
        let what = if one.state == "Valid" { format!("cannot be renewed: {why}") } else { format!("not there: {why}") };
        problem(
            subject,
            what,
            format!("culvert ztunnel certificates --node {}; culvertd's log says what it refused", part.node),
        )
    });
    let mut problems: Vec<Problem> = problems.collect();
    if let Some(Err(error)) = &facts.roots {
        let remedy = "culvertd writes it; look at its log and at its rights";
        problems.push(problem("roots of the mesh", error.clone(), remedy));
    }
    problems
}

fn of_follower(facts: &Facts, follower: &Follower) -> Vec<Problem> {
    let subject = format!("proxy {} of node {}", follower.proxy, follower.node);
    if follower.replica.is_none() {
        let remedy = "culvert proxy-status; its log says why it cannot connect";
        let what = format!("follows no replica of culvertd that answers{}", own_words(facts, &follower.proxy));
        return vec![problem(subject, what, remedy)];
    }
    let refused = follower.nacks.iter().map(|one| {
        let resource = if one.nack.resource.is_empty() { &one.r#type } else { &one.nack.resource };
        let remedy = "the version before stays in force on that node; correct the object that it is made from";
        problem(subject.clone(), format!("refused {resource}: {}", one.nack.reason), remedy)
    });
    refused.collect()
}

/// What a proxy itself says of its way to the control plane, behind a comma; empty where it says that it has one, or nothing.
fn own_words(facts: &Facts, proxy: &str) -> String {
    let asked = facts.proxies.iter().find(|one| one.part.pod == proxy);
    let Some(discovery) = asked.and_then(|one| one.answer.as_ref().ok()).map(|dump| &dump.discovery) else {
        return String::new();
    };
    match (&discovery.connected_since, &discovery.disconnected_since) {
        (None, Some(since)) => {
            let goes_on =
                if discovery.synced { "it goes on with what it knows" } else { "it carries no connection yet" };
            let why = discovery.last_error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
            format!(", by its own words since {since}; {goes_on}{why}")
        }
        _ => String::new(),
    }
}

fn of_refused(refused: &Refused) -> Vec<Problem> {
    let kept = if refused.keeps_last_good { "; its last good version stays in force" } else { "" };
    let mistakes = refused.problems.iter().map(|one| {
        let what = if one.field.is_empty() { one.message.clone() } else { format!("{}: {}", one.field, one.message) };
        problem(refused.object.clone(), format!("refused: {what}{kept}"), one.fix.clone())
    });
    mistakes.collect()
}

fn of_pod(pod: &Enrolled) -> Option<Problem> {
    let why = pod.reason.as_ref()?;
    let subject = format!("pod {}/{}", pod.namespace, pod.name);
    let remedy = match pod.state {
        "unknown" => format!("bring the agent of node {} back", pod.node),
        _ => format!(
            "kubectl -n {} describe pod {}; or take it out with the label istio.io/dataplane-mode=none",
            pod.namespace, pod.name
        ),
    };
    Some(problem(subject, format!("{}: {why}", pod.state), remedy))
}

fn certificates(facts: &Facts) -> Certificates {
    let ends = held(facts).filter_map(|(part, one)| {
        Some(Ends { expires: one.expires.clone()?, identity: one.identity.clone(), node: part.node.clone() })
    });
    let roots = facts.roots.as_ref().and_then(|roots| roots.as_ref().ok()).cloned().unwrap_or_default();
    Certificates { count: held(facts).count(), soonest: ends.min(), roots }
}

fn notes(facts: &Facts, certificates: &Certificates, now: SystemTime) -> Vec<Note> {
    let said: BTreeSet<Note> =
        facts.culvertd.iter().flat_map(|one| &one.answer).flat_map(|one| one.notes.clone()).collect();
    let mut notes: Vec<Note> = said.into_iter().collect();
    for root in &certificates.roots {
        let left = OffsetDateTime::parse(&root.expires, &Rfc3339).map(|end| end - OffsetDateTime::from(now));
        if left.is_ok_and(|left| left < ROOT_ENDS_SOON) {
            let reason = format!("ends at {}; replace it before", root.expires);
            notes.push(Note { object: format!("root {}", root.subject), reason });
        }
    }
    for (what, why) in &facts.unknown {
        notes.push(Note { object: what.clone(), reason: format!("could not be asked for: {why}") });
    }
    notes
}

#[cfg(test)]
mod tests;
