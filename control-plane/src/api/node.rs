//! Node: where it stands.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as k8s;

use super::check;
use super::name::Kind;
use super::problem::{Problem, Problems};

/// Where a node stands; empty where its labels do not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locality {
    /// `topology.kubernetes.io/region`.
    pub region: String,
    /// `topology.kubernetes.io/zone`.
    pub zone: String,
    /// `topology.istio.io/subzone`.
    pub subzone: String,
}

/// A node.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Its name.
    pub name: Arc<str>,
    /// Where it stands.
    pub locality: Locality,
    /// Its own addresses, inner and outer.
    pub addresses: Vec<IpAddr>,
}

/// Validates a Node.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate(object: &k8s::Node) -> Result<Node, Vec<Problem>> {
    let mut problems = Problems::default();
    let (name, mut labels) = check::cluster_scoped(Kind::Node, &object.metadata, &mut problems);
    let mut label = |key: &str| labels.remove(key).unwrap_or_default();
    let locality = Locality {
        region: label("topology.kubernetes.io/region"),
        zone: label("topology.kubernetes.io/zone"),
        subzone: label("topology.istio.io/subzone"),
    };
    let said = object.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    // Names among them are nothing that could be a service's.
    let addresses = said.iter().filter_map(|one| one.address.parse().ok()).collect();
    problems.finish(Node { name: name.into(), locality, addresses })
}
