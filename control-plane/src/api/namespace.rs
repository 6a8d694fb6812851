//! Namespace: whether its pods are enrolled, and through which waypoint they are reached.

use std::sync::Arc;

use k8s_openapi::api::core::v1 as k8s;
use serde_json::Value;

use super::check;
use super::labels::{self, DataplaneMode, WaypointBinding};
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
    /// It stands for one that is not valid: whether its pods are to be enrolled is not known.
    pub is_stand_in: bool,
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
        is_stand_in: false,
    };
    problems.finish(namespace)
}

/// The safest reading of a namespace that is not valid: its pods are enrolled, and behind the waypoint that it names.
pub(super) fn stand_in(name: Arc<str>, value: &Value) -> Namespace {
    let waypoint = WaypointBinding::read_safely(labels::unread(value).as_ref());
    Namespace { name, mode: DataplaneMode::Ambient, waypoint, is_stand_in: true }
}
