//! What the authority needs to know of the cluster's pods.

use mesh_model::SpiffeId;

/// One pod, as far as the authority cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRecord {
    /// Kubernetes' unique id of this very pod; empty when the object has none.
    pub uid: String,
    /// The service account it runs as.
    pub service_account: String,
    /// The node it runs on; empty until it is scheduled.
    pub node: String,
    /// All its containers have ended (phase `Failed` or `Succeeded`): it gets no certificate any more.
    pub is_over: bool,
}

/// Whether an identity runs on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeIdentity {
    /// A pod of this identity that is not over is on this node.
    Present,
    /// Pods of this identity are known, but none on this node that is not over.
    Absent,
    /// No pod of this identity is known at all. It may have been created a moment ago: the caller is told to try again.
    UnknownYet,
}

/// The pods of the cluster, as of now. Calls must not block.
pub trait Directory: Send + Sync {
    /// False until the source has been read once; until then nobody is refused for being unknown, but told to retry.
    fn is_synced(&self) -> bool {
        true
    }

    /// The pod of this name.
    fn pod(&self, namespace: &str, name: &str) -> Option<PodRecord>;

    /// Whether a pod of identity `id` runs on `node`. Only the namespace and the service account of `id` are compared:
    /// the caller has checked the trust domain.
    fn identity_on_node(&self, node: &str, id: &SpiffeId) -> NodeIdentity;
}
