//! What discovery has brought: an immutable snapshot that everybody reads without a lock, replaced once per response.

use std::sync::Arc;

use arc_swap::ArcSwap;
use mesh_model::{Change, Snapshot};
use mesh_xds::client::Sink;
use mesh_xds::{AUTHORIZATION_TYPE, Rejection, Update, WORKLOAD_TYPE};
use tokio::sync::watch;

/// The snapshot in force. Cheap to clone.
#[derive(Debug)]
pub struct State {
    snapshot: ArcSwap<Snapshot>,
    /// How often something changed that live connections were allowed by.
    rules: watch::Sender<u64>,
    /// Whether discovery has told all that there is, once.
    complete: watch::Sender<bool>,
}

impl State {
    /// Nothing known yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            snapshot: ArcSwap::from_pointee(Snapshot::new()),
            rules: watch::Sender::new(0),
            complete: watch::Sender::new(false),
        })
    }

    /// Discovery has told all that there is: the snapshot may be decided by from now on.
    pub fn set_complete(&self) {
        self.complete.send_replace(true);
    }

    /// Whether decisions may be made.
    pub fn is_complete(&self) -> bool {
        *self.complete.borrow()
    }

    /// Resolves once decisions may be made. Before that everything would look like something that the mesh does not know,
    /// and would be let out in plain.
    pub async fn complete(&self) {
        let mut complete = self.complete.subscribe();
        // The sender lives in `self`: this cannot fail.
        let _ = complete.wait_for(|complete| *complete).await;
    }

    /// The snapshot in force now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// How often live connections had to be judged again so far.
    pub fn rules_version(&self) -> u64 {
        *self.rules.borrow()
    }

    /// Changes whenever live connections must be judged again.
    pub fn rules(&self) -> watch::Receiver<u64> {
        self.rules.subscribe()
    }

    /// Where discovery puts what it receives, for the node of this name. Only one may be used at a time.
    pub fn sink(self: &Arc<Self>, node: &str) -> Discovery {
        Discovery { state: Arc::clone(self), node: node.to_owned() }
    }
}

/// Turns responses of discovery into snapshots.
pub struct Discovery {
    state: Arc<State>,
    node: String,
}

impl Discovery {
    /// Applies one response to a copy, which shares all that did not change.
    fn change(&self, snapshot: &mut Snapshot, update: Update) -> Outcome {
        let mut outcome = Outcome::default();
        match update.type_url.as_ref() {
            WORKLOAD_TYPE => {
                for name in &update.removed {
                    snapshot.remove_address(name);
                }
                for resource in update.set {
                    // What cannot be understood is refused here, and so is the traffic to it.
                    let (mut change, error) = Change::address(&resource.name, &resource.body);
                    if let Change::Workload(workload) = &mut change
                        && workload.uid == resource.name
                    {
                        // One copy, which the client of discovery holds anyway.
                        workload.uid = Arc::clone(&resource.name);
                    }
                    outcome.rules |= match &change {
                        Change::Workload(workload) => *workload.location.node == *self.node,
                        // It may be a pod of this node.
                        Change::Unusable(_) => true,
                        Change::Service(_)
                        | Change::Authorization(_)
                        | Change::RemoveAddress(_)
                        | Change::RemoveAuthorization(_) => false,
                    };
                    if let Some(error) = error {
                        outcome.reject(&resource.name, &error);
                    }
                    snapshot.apply(change);
                }
            }
            AUTHORIZATION_TYPE => {
                outcome.rules = true;
                for name in &update.removed {
                    snapshot.remove_authorization(name);
                }
                for resource in update.set {
                    // A policy that cannot be understood denies, and is refused.
                    let (change, error) = Change::authorization(&resource.name, &resource.body);
                    if let Some(error) = error {
                        outcome.reject(&resource.name, &error);
                    }
                    snapshot.apply(change);
                }
            }
            other => outcome.reject(other, &"a type that was not asked for"),
        }
        outcome
    }
}

impl Sink for Discovery {
    fn apply(&mut self, update: Update) -> Vec<Rejection> {
        let mut snapshot = Snapshot::clone(&self.state.snapshot.load());
        let outcome = self.change(&mut snapshot, update);
        self.state.snapshot.store(Arc::new(snapshot));
        if outcome.rules {
            self.state.rules.send_modify(|version| *version += 1);
        }
        outcome.rejected
    }
}

/// What came of one response.
#[derive(Default)]
struct Outcome {
    rejected: Vec<Rejection>,
    /// Live connections must be judged again.
    rules: bool,
}

impl Outcome {
    fn reject(&mut self, name: &str, reason: &dyn std::fmt::Display) {
        self.rejected.push(Rejection { name: name.to_owned(), reason: reason.to_string() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::SpiffeId;
    use mesh_proto::security;
    use mesh_proto::workload::{self as wire, address};
    use mesh_xds::Resource;
    use prost::Message;

    fn resource(name: &str, body: &impl Message) -> Resource {
        Resource { name: name.into(), aliases: Vec::new(), version: "1".into(), body: body.encode_to_vec().into() }
    }

    fn workload(uid: &str, node: &str) -> Resource {
        let workload = wire::Workload {
            uid: uid.into(),
            name: uid.into(),
            namespace: "shop".into(),
            node: node.into(),
            addresses: vec![vec![10, 0, 0, 1].into()],
            ..wire::Workload::default()
        };
        resource(uid, &wire::Address { r#type: Some(address::Type::Workload(workload)) })
    }

    fn update(type_url: &str, set: Vec<Resource>, removed: &[&str]) -> Update {
        Update { type_url: type_url.into(), set, removed: removed.iter().map(|name| (*name).to_owned()).collect() }
    }

    #[test]
    fn one_response_is_one_snapshot_and_bad_resources_are_named() {
        let state = State::new();
        let before = state.snapshot();
        let mut sink = state.sink("node-a");
        let bad = Resource { body: vec![0xff; 4].into(), ..workload("bad", "") };
        let rejected = sink.apply(update(WORKLOAD_TYPE, vec![workload("good", "node-b"), bad], &[]));
        assert_eq!(rejected.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["bad"]);
        assert!(state.snapshot().workload_by_uid("good").is_some());
        assert!(before.workload_by_uid("good").is_none(), "a snapshot never changes");
        sink.apply(update(WORKLOAD_TYPE, Vec::new(), &["good"]));
        assert!(state.snapshot().workload_by_uid("good").is_none());
    }

    #[test]
    fn a_policy_that_cannot_be_read_is_refused_and_denies() {
        let state = State::new();
        let mut sink = state.sink("node-a");
        sink.apply(update(WORKLOAD_TYPE, vec![workload("pod", "node-a")], &[]));
        let bad = Resource { body: vec![0xff; 4].into(), ..resource("shop/p", &security::Authorization::default()) };
        let rejected = sink.apply(update(AUTHORIZATION_TYPE, vec![bad], &[]));
        assert_eq!(rejected.len(), 1);
        let snapshot = state.snapshot();
        let identity = SpiffeId::new("cluster.local", "shop", "client").unwrap();
        let facts = mesh_model::ConnectionFacts {
            destination: snapshot.workload_by_uid("pod").unwrap(),
            identity: Some(&identity),
            source_ip: [10, 0, 0, 2].into(),
            destination_ip: [10, 0, 0, 1].into(),
            destination_port: 80,
        };
        assert!(snapshot.authorize(&facts).is_err());
    }

    #[test]
    fn an_address_that_cannot_be_read_takes_the_place_of_the_version_before() {
        let state = State::new();
        let mut sink = state.sink("node-a");
        let there = |state: &State| {
            let snapshot = state.snapshot();
            match snapshot.workload_destination("", [10, 0, 0, 1].into()) {
                mesh_model::Destination::Workload(_) => "workload",
                mesh_model::Destination::Unusable(_) => "unusable",
                mesh_model::Destination::Service(_) | mesh_model::Destination::Unknown => "-",
            }
        };
        assert_eq!(sink.apply(update(WORKLOAD_TYPE, vec![workload("pod", "node-b")], &[])).len(), 0);
        assert_eq!(there(&state), "workload");
        let bad = Resource { body: vec![0xff; 4].into(), ..workload("pod", "") };
        assert_eq!(sink.apply(update(WORKLOAD_TYPE, vec![bad], &[])).len(), 1);
        assert_eq!(there(&state), "unusable");
        sink.apply(update(WORKLOAD_TYPE, vec![workload("pod", "node-b")], &[]));
        assert_eq!(there(&state), "workload");
    }

    #[test]
    fn live_connections_are_judged_again_when_policies_or_local_pods_change() {
        let state = State::new();
        let rules = state.rules();
        let mut sink = state.sink("node-a");
        sink.apply(update(WORKLOAD_TYPE, vec![workload("far", "node-b")], &[]));
        assert_eq!(*rules.borrow(), 0);
        sink.apply(update(WORKLOAD_TYPE, vec![workload("near", "node-a")], &[]));
        assert_eq!(*rules.borrow(), 1);
        sink.apply(update(AUTHORIZATION_TYPE, Vec::new(), &["shop/p"]));
        assert_eq!(*rules.borrow(), 2);
    }
}
