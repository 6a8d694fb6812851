//! What the control plane writes into a cluster: one replica leads, and only that one writes: the startup taint of nodes,
//! the status of objects, and events about those that are not valid.

mod conditions;
mod follow;
mod leader;
mod lease;
mod objects;
mod pace;
mod refusals;
mod taint;

use mesh_runtime::drain;

use crate::ingest::Cluster;
use leader::Election;
use refusals::Board;

pub use leader::{Leadership, Leading};
pub use objects::Facts;

/// The leader's work, if this replica comes to lead.
#[derive(Debug)]
pub struct Status {
    cluster: Cluster,
    namespace: String,
    election: Election,
    leading: Leading,
}

impl Status {
    /// For `cluster`, with the mesh's own parts in `namespace`. `name` is this replica's, for people.
    pub fn new(cluster: &Cluster, namespace: &str, name: &str) -> Self {
        let (election, leading) = Election::new(cluster, namespace, name);
        Self { cluster: cluster.clone(), namespace: namespace.to_owned(), election, leading }
    }

    /// Whether this replica leads.
    pub fn leading(&self) -> Leading {
        self.leading.clone()
    }

    /// Takes part in the election, and does the leader's work when it falls to this replica, until the drain begins; then
    /// lets another one lead.
    pub async fn run(mut self, facts: Facts, watcher: drain::Watcher) {
        let (cluster, namespace) = (&self.cluster, self.namespace.as_str());
        let taints = self.leading.clone().whenever(|leading| async move {
            taint::run(cluster, namespace, &leading).await;
        });
        let facts = &facts;
        let me = self.leading.now().me;
        let board = || Board::new(cluster, namespace, &me);
        let mut published = board();
        let board = &board;
        let objects = self.leading.clone().whenever(|leading| async move {
            objects::run(cluster, &leading, facts, board()).await;
        });
        tokio::select! {
            biased;
            () = watcher.draining() => {}
            () = self.election.run() => {}
            () = taints => {}
            () = objects => {}
            () = published.publish(facts) => {}
        }
        published.withdraw().await;
        // From here on nothing is written: what was doing that is dropped.
        self.election.release().await;
    }
}
