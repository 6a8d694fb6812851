//! The startup taint `culvert.dev/agent-not-ready`: a node that registers with it gets no ordinary pods before its agent
//! is ready. The leader takes it away then, and never puts it on.
//!
//! Whose pod an agent's is, is the word of the API server: the namespace, and the service account, which only whoever may
//! make pods in the mesh's own namespace can use there.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use futures_util::future::Either;
use futures_util::stream::{StreamExt, select};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::Api;
use kube::api::ApiResource;
use kube::core::{NotUsed, Object};
use kube::runtime::watcher::{Config, Event};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until, timeout};

use super::follow::follow;
use super::leader::Leading;
use super::pace::Pace;
use crate::ingest::Cluster;
use crate::ingest::kubernetes::describe;

/// The taint, whatever its value and effect.
const TAINT: &str = "culvert.dev/agent-not-ready";
/// Label and service account of the agents' pods, as the manifests have them.
const AGENTS: &str = "app.kubernetes.io/name=culvert-node";
const ACCOUNT: &str = "culvert-node";
/// A pod that is older than its node by more than this was another node's of the same name, and is about to be deleted.
/// Both times are API servers', of which there may be several with clocks of their own.
const SLACK: SignedDuration = SignedDuration::from_secs(60);
/// Nodes written to at once, and then one in each interval.
const BURST: u32 = 50;
const INTERVAL: Duration = Duration::from_millis(50);
/// Pause after a node that could not be written to.
const RETRY: Duration = Duration::from_secs(1);
/// Time for one request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What is read of a node.
type NodeObject = Object<NodeSpec, NotUsed>;

/// What is read of a node's specification.
#[derive(Clone, Debug, Default, Deserialize)]
struct NodeSpec {
    /// As they are: what is written must be tested against all of it.
    #[serde(default)]
    taints: Vec<Value>,
}

/// A node, as far as it matters here.
#[derive(Clone, Debug, PartialEq)]
struct Node {
    uid: String,
    created: Option<Timestamp>,
    taints: Vec<Value>,
}

/// A pod of an agent that is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Agent {
    node: String,
    created: Option<Timestamp>,
}

/// Takes the taint from nodes whose agent is ready, while this replica leads. `namespace` is the mesh's own. Never ends.
pub(super) async fn run(cluster: &Cluster, namespace: &str, leading: &Leading) {
    let resource = ApiResource::erase::<k8s_openapi::api::core::v1::Node>(&());
    let nodes = follow("nodes", Api::<NodeObject>::all_with(cluster.client(), &resource), Config::default());
    let pods: Api<Pod> = Api::namespaced(cluster.client(), namespace);
    let pods = follow("pods of agents", pods, Config::default().labels(AGENTS));
    let events = select(nodes.map(Either::Left), pods.map(Either::Right));
    let mut events = std::pin::pin!(events);
    let mut known = Known::default();
    let mut pace = Pace::new(INTERVAL, BURST, Instant::now());
    loop {
        let due = known.due();
        tokio::select! {
            // What is known matters more than what is to be done about it.
            biased;
            event = events.next() => match event {
                Some(Either::Left(event)) => known.node(event),
                Some(Either::Right(event)) => known.pod(event),
                None => return,
            },
            () = until(due.as_ref().map(|(_, at)| *at)) => {
                let Some((name, _)) = due else { continue };
                let Some(patch) = known.nodes.get(&name).and_then(without_taint) else { continue };
                sleep_until(pace.take(Instant::now())).await;
                if !leading.leads() {
                    return;
                }
                known.written(&name, write(cluster, &name, &patch).await, Instant::now());
            }
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Whether the API server took it.
async fn write(cluster: &Cluster, node: &str, patch: &Value) -> bool {
    let request = http::Request::patch(format!("/api/v1/nodes/{node}?fieldManager=culvertd"))
        .header(http::header::CONTENT_TYPE, "application/json-patch+json")
        .body(patch.to_string().into_bytes());
    // A name that the API server knows is part of a path as it is.
    let Ok(request) = request else { return false };
    match timeout(TIMEOUT, cluster.client().request_text(request)).await {
        Ok(Ok(_)) => {
            tracing::info!(node, "its agent is ready: the startup taint is taken away");
            true
        }
        // Gone, or changed meanwhile: what it is now is about to be told.
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409 | 422) => false,
        Ok(Err(error)) => {
            tracing::warn!(node, error = describe(&error), "the startup taint is not taken away; trying again");
            false
        }
        Err(_) => {
            tracing::warn!(node, "the startup taint is not taken away: no answer within {TIMEOUT:?}; trying again");
            false
        }
    }
}

/// What is known of nodes that have the taint, and of agents.
#[derive(Debug, Default)]
struct Known {
    /// Nodes that have the taint.
    nodes: HashMap<String, Node>,
    /// Agents that are ready, by their pod.
    agents: HashMap<String, Agent>,
    /// Nodes whose taint is to be taken away, and when to try that.
    due: BTreeMap<String, Instant>,
    /// The same while a list is read.
    listed_nodes: HashMap<String, Node>,
    listed_agents: HashMap<String, Agent>,
}

impl Known {
    fn node(&mut self, event: Event<NodeObject>) {
        let read = |object: NodeObject| {
            let (name, uid, created) = identity(object.metadata);
            (name, Node { uid, created, taints: object.spec.taints })
        };
        match event {
            Event::Init => self.listed_nodes.clear(),
            Event::InitApply(object) => {
                let (name, node) = read(object);
                if without_taint(&node).is_some() {
                    self.listed_nodes.insert(name, node);
                }
                return;
            }
            Event::InitDone => self.nodes = std::mem::take(&mut self.listed_nodes),
            Event::Apply(object) => {
                let (name, node) = read(object);
                match without_taint(&node) {
                    Some(_) => self.nodes.insert(name, node),
                    None => self.nodes.remove(&name),
                };
            }
            Event::Delete(object) => {
                self.nodes.remove(&identity(object.metadata).0);
            }
        }
        self.look();
    }

    fn pod(&mut self, event: Event<Pod>) {
        match event {
            Event::Init => self.listed_agents.clear(),
            Event::InitApply(pod) => {
                if let Some(agent) = ready_agent(&pod) {
                    self.listed_agents.insert(identity(pod.metadata).0, agent);
                }
                return;
            }
            Event::InitDone => self.agents = std::mem::take(&mut self.listed_agents),
            Event::Apply(pod) => {
                let agent = ready_agent(&pod);
                let name = identity(pod.metadata).0;
                match agent {
                    Some(agent) => self.agents.insert(name, agent),
                    None => self.agents.remove(&name),
                };
            }
            Event::Delete(pod) => {
                self.agents.remove(&identity(pod.metadata).0);
            }
        }
        self.look();
    }

    /// Finds what is due by now. What was due stays so at its time.
    fn look(&mut self) {
        let now = Instant::now();
        let mut ready: HashMap<&str, Vec<&Agent>> = HashMap::new();
        for agent in self.agents.values().filter(|agent| self.nodes.contains_key(&agent.node)) {
            ready.entry(&agent.node).or_default().push(agent);
        }
        let is_due = |(name, node): &(&String, &Node)| {
            ready.get(name.as_str()).is_some_and(|agents| agents.iter().any(|agent| belongs(agent, node)))
        };
        let due: BTreeSet<String> = self.nodes.iter().filter(is_due).map(|(name, _)| name.clone()).collect();
        self.due.retain(|name, _| due.contains(name));
        for name in due {
            self.due.entry(name).or_insert(now);
        }
    }

    /// The node to be written to first, and when.
    fn due(&self) -> Option<(String, Instant)> {
        self.due.iter().min_by_key(|(_, at)| **at).map(|(name, at)| (name.clone(), *at))
    }

    fn written(&mut self, name: &str, is_done: bool, now: Instant) {
        if is_done {
            // The watch is about to say so as well; if another puts it on again, that says it.
            self.nodes.remove(name);
            self.due.remove(name);
        } else if let Some(at) = self.due.get_mut(name) {
            *at = now + RETRY;
        }
    }
}

fn identity(metadata: ObjectMeta) -> (String, String, Option<Timestamp>) {
    let created = metadata.creation_timestamp.map(|at| at.0);
    (metadata.name.unwrap_or_default(), metadata.uid.unwrap_or_default(), created)
}

/// The change that takes the taint from a node, which fails if the node is another by then or the taint not where it was;
/// none if the node does not have it.
fn without_taint(node: &Node) -> Option<Value> {
    let is_ours = |taint: &&Value| taint.get("key").and_then(Value::as_str) == Some(TAINT);
    // The last one first: what stands before it keeps its place.
    let ours = node.taints.iter().enumerate().rev().filter(|(_, taint)| is_ours(taint));
    let mut steps = vec![json!({"op": "test", "path": "/metadata/uid", "value": node.uid})];
    for (at, taint) in ours {
        let path = format!("/spec/taints/{at}");
        steps.push(json!({"op": "test", "path": path, "value": taint}));
        steps.push(json!({"op": "remove", "path": path}));
    }
    (steps.len() > 1).then_some(Value::Array(steps))
}

/// The agent that a pod is, if it is ready.
fn ready_agent(pod: &Pod) -> Option<Agent> {
    let (spec, status) = (pod.spec.as_ref()?, pod.status.as_ref()?);
    let is_ready = status.conditions.iter().flatten().any(|one| one.type_ == "Ready" && one.status == "True");
    let is_agent = spec.service_account_name.as_deref() == Some(ACCOUNT);
    let is_going = pod.metadata.deletion_timestamp.is_some();
    let node = spec.node_name.clone().filter(|_| is_agent && is_ready && !is_going)?;
    Some(Agent { node, created: pod.metadata.creation_timestamp.as_ref().map(|at| at.0) })
}

/// Whether the agent runs on this very node, and not on a former one of its name.
fn belongs(agent: &Agent, node: &Node) -> bool {
    let Some((agent, node)) = agent.created.zip(node.created) else { return false };
    node.duration_since(agent) <= SLACK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::needless_pass_by_value, reason = "as json! gives it")]
    fn node(created: &str, taints: Value) -> NodeObject {
        let metadata = json!({"name": "n", "uid": "u", "creationTimestamp": created});
        serde_json::from_value(json!({"metadata": metadata, "spec": {"taints": taints}, "status": {"images": [1]}}))
            .unwrap()
    }

    fn agent(created: &str, change: impl Fn(&mut Value)) -> Pod {
        let mut pod = json!({
            "metadata": {"name": "p", "namespace": "culvert-system", "creationTimestamp": created},
            "spec": {"serviceAccountName": "culvert-node", "nodeName": "n", "containers": []},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        });
        change(&mut pod);
        serde_json::from_value(pod).unwrap()
    }

    fn ours(effect: &str) -> Value {
        json!({"key": TAINT, "effect": effect})
    }

    fn due(node: NodeObject, agent: Pod) -> bool {
        let mut known = Known::default();
        known.node(Event::Apply(node));
        known.pod(Event::Apply(agent));
        known.due().is_some()
    }

    #[test]
    fn taint_goes_when_the_agent_of_this_very_node_is_ready() {
        let tainted = || node("2026-01-02T10:00:00Z", json!([ours("NoSchedule")]));
        let at = "2026-01-02T10:00:05Z";
        assert!(due(tainted(), agent(at, |_| {})));
        let reasons_not_to: [fn(&mut Value); 5] = [
            |pod| pod["status"]["conditions"][0]["status"] = json!("False"),
            |pod| pod["status"] = json!({}),
            |pod| pod["spec"]["serviceAccountName"] = json!("default"),
            |pod| pod["spec"]["nodeName"] = json!("another"),
            |pod| pod["metadata"]["deletionTimestamp"] = json!("2026-01-02T10:00:06Z"),
        ];
        for (number, change) in reasons_not_to.into_iter().enumerate() {
            assert!(!due(tainted(), agent(at, change)), "{number}");
        }
        // Of the node that had this name before; and by another API server's clock.
        assert!(!due(tainted(), agent("2026-01-02T09:58:00Z", |_| {})));
        assert!(due(tainted(), agent("2026-01-02T09:59:30Z", |_| {})));
        assert!(!due(
            node("2026-01-02T10:00:00Z", json!([{"key": "another", "effect": "NoSchedule"}])),
            agent(at, |_| {})
        ));
    }

    #[test]
    fn what_is_taken_away_is_tested_for_and_nothing_else_is_touched() {
        let other = json!({"key": "another", "effect": "NoExecute"});
        let (uid, created) = ("u".to_owned(), None);
        let taints = vec![ours("NoSchedule"), other.clone(), ours("NoExecute")];
        let patch = without_taint(&Node { uid: uid.clone(), created, taints }).unwrap();
        assert_eq!(
            patch,
            json!([
                {"op": "test", "path": "/metadata/uid", "value": "u"},
                {"op": "test", "path": "/spec/taints/2", "value": ours("NoExecute")},
                {"op": "remove", "path": "/spec/taints/2"},
                {"op": "test", "path": "/spec/taints/0", "value": ours("NoSchedule")},
                {"op": "remove", "path": "/spec/taints/0"},
            ])
        );
        assert_eq!(without_taint(&Node { uid, created, taints: vec![other] }), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_cannot_be_written_to_is_tried_again_and_holds_up_no_other() {
        let mut known = Known::default();
        let created = "2026-01-02T10:00:00Z";
        for name in ["a", "b"] {
            let mut node = node(created, json!([ours("NoSchedule")]));
            node.metadata.name = Some(name.to_owned());
            known.node(Event::Apply(node));
            known.pod(Event::Apply(agent(created, |pod| {
                pod["metadata"]["name"] = json!(name);
                pod["spec"]["nodeName"] = json!(name);
            })));
        }
        let (first, _) = known.due().unwrap();
        known.written(&first, false, Instant::now());
        let (second, at) = known.due().unwrap();
        assert!(first != second && at <= Instant::now());
        known.written(&second, true, Instant::now());
        let (again, at) = known.due().unwrap();
        assert_eq!((again, at), (first.clone(), Instant::now() + RETRY));
        // A list without it, as after a node was deleted.
        for event in [Event::Init, Event::InitDone] {
            known.node(event);
        }
        assert_eq!(known.due(), None);
        // It joins again: its agent of before is not asked.
        let mut again = node("2026-01-02T11:00:00Z", json!([ours("NoSchedule")]));
        again.metadata.name = Some(first);
        known.node(Event::Apply(again));
        assert_eq!(known.due(), None);
    }
}
