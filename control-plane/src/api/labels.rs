//! Labels, and the ones that say how an object takes part in the mesh.

use std::collections::BTreeMap;

use serde_json::Value;

use super::problem::Problems;

/// Labels or a selector: key to value.
pub type Labels = BTreeMap<String, String>;

const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Carried by what a gateway or waypoint is made of, which must not be sent through itself.
pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
const USE_WAYPOINT: &str = "istio.io/use-waypoint";
const USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";

/// The labels of an object that is not valid; none where they cannot be read.
pub(super) fn unread(object: &Value) -> Option<Labels> {
    match object.pointer("/metadata/labels") {
        None | Some(Value::Null) => Some(Labels::new()),
        Some(labels) => serde_json::from_value(labels.clone()).ok(),
    }
}

/// What the label `istio.io/dataplane-mode` of a namespace or a pod asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DataplaneMode {
    /// No label: the namespace's wish counts for a pod; a namespace without one is not enrolled.
    #[default]
    Unset,
    /// `ambient`: enrolled.
    Ambient,
    /// `none`: opted out.
    Off,
}

impl DataplaneMode {
    /// Reads the label. An unknown value is a mistake: what its author wanted cannot be guessed.
    pub(super) fn read(labels: &Labels, problems: &mut Problems) -> Self {
        match labels.get(DATAPLANE_MODE).map(String::as_str) {
            None => Self::Unset,
            Some("ambient") => Self::Ambient,
            Some("none") => Self::Off,
            Some(other) => {
                problems.add(
                    format!("metadata.labels[{DATAPLANE_MODE}]"),
                    format!("{other:?} is not a mode"),
                    "use \"ambient\" to enrol or \"none\" to opt out",
                );
                Self::Unset
            }
        }
    }

    /// The safest reading of labels of an object that is not valid, none where they cannot be read: what is not said is
    /// that it is to be enrolled.
    pub(super) fn read_safely(labels: Option<&Labels>) -> Self {
        let mut problems = Problems::default();
        let mode = labels.map(|labels| Self::read(labels, &mut problems));
        mode.filter(|_| problems.is_empty()).unwrap_or(Self::Ambient)
    }
}

/// A waypoint by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaypointRef {
    /// Its namespace; none means the namespace of the object that carries the label.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

/// What the label `istio.io/use-waypoint` of a namespace, service or pod asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum WaypointBinding {
    /// No label: the namespace's binding counts.
    #[default]
    Unset,
    /// `none`: no waypoint, whatever the namespace says.
    Off,
    /// Traffic to the object goes through this waypoint, or not at all.
    Waypoint(WaypointRef),
}

impl WaypointBinding {
    pub(super) fn read(labels: &Labels) -> Self {
        match labels.get(USE_WAYPOINT).map(String::as_str) {
            None | Some("") => Self::Unset,
            Some("none") => Self::Off,
            Some(name) => Self::Waypoint(WaypointRef {
                namespace: labels.get(USE_WAYPOINT_NAMESPACE).filter(|namespace| !namespace.is_empty()).cloned(),
                name: name.to_owned(),
            }),
        }
    }

    /// The safest reading of labels of an object that is not valid, none where they cannot be read: they may name a waypoint,
    /// so nobody gets past one that no object can be.
    pub(super) fn read_safely(labels: Option<&Labels>) -> Self {
        let nowhere = || Self::Waypoint(WaypointRef { namespace: None, name: "_".to_owned() });
        labels.map_or_else(nowhere, Self::read)
    }
}
