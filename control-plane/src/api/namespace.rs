//! Namespace: whether its pods are enrolled, and through which waypoint they are reached.

use std::sync::Arc;

use k8s_openapi::api::core::v1 as k8s;

use super::check;
use super::labels::{DataplaneMode, WaypointBinding};
use super::name::Kind;
use super::problem::{Problem, Problems};

/// A namespace.
#[derive(Clone, Debug, PartialEq)]
pub struct Namespace {
    /// Its name.
    pub name: Arc<str>,
    /// Whether its pods are enrolled unless they say otherwise.
    pub mode: DataplaneMode,
    /// The waypoint of its services and pods unless they say otherwise.
    pub waypoint: WaypointBinding,
}

/// Validates a Namespace.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate(object: &k8s::Namespace) -> Result<Namespace, Vec<Problem>> {
    let mut problems = Problems::default();
    let (name, labels) = check::cluster_scoped(Kind::Namespace, &object.metadata, &mut problems);
    let namespace = Namespace {
        name: name.into(),
        mode: DataplaneMode::read(&labels, &mut problems),
        waypoint: WaypointBinding::read(&labels),
    };
    problems.finish(namespace)
}
