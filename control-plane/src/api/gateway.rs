//! Gateway and GatewayClass, as far as a gateway is a waypoint: one with a listener for HBONE.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check;
use super::labels::Labels;
use super::name::{Kind, Name};
use super::problem::{Problem, Problems};

/// A gateway.
#[derive(Clone, Debug, PartialEq)]
pub struct Gateway {
    /// Its name.
    pub name: Name,
    /// The class that says who makes it.
    pub class: String,
    /// Where it takes HBONE; none if it does not, and so is no waypoint.
    pub hbone: Option<HboneListener>,
    /// What may be bound to it.
    pub waypoint_for: WaypointFor,
    /// Where its status says it is; none if it does not say.
    pub address: Option<GatewayPlace>,
}

/// A listener for HBONE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HboneListener {
    /// Its port.
    pub port: u16,
    /// Objects of every namespace may be bound to it, not only those of its own.
    pub allows_all: bool,
    /// The choice of namespaces is one that is not supported: it is taken for its own alone.
    pub is_narrowed: bool,
}

/// What traffic a waypoint is for (label `istio.io/waypoint-for`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WaypointFor {
    /// What is addressed to services.
    #[default]
    Service,
    /// What is addressed to workloads themselves.
    Workload,
    /// Both.
    All,
    /// Neither.
    Nothing,
}

/// Where a gateway is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatewayPlace {
    /// At this address.
    Ip(IpAddr),
    /// What has this name.
    Host(String),
}

/// A class of gateways.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayClass {
    /// Its name.
    pub name: Arc<str>,
    /// Who makes its gateways.
    pub controller: String,
}

/// Classes of waypoints that need no GatewayClass object.
const WAYPOINT_CLASSES: [&str; 2] = ["istio-waypoint", "culvert-waypoint"];
/// Controllers that make waypoints.
const WAYPOINT_CONTROLLERS: [&str; 2] = ["istio.io/mesh-controller", "culvert.dev/mesh-controller"];
const WAYPOINT_FOR: &str = "istio.io/waypoint-for";

/// The spec of a Gateway as it is written, as far as it is read. Newer fields are none of ours.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec {
    gateway_class_name: Option<String>,
    listeners: Option<Vec<Listener>>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listener {
    port: Option<i32>,
    protocol: Option<String>,
    allowed_routes: Option<AllowedRoutes>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

#[derive(Debug, Deserialize, Serialize)]
struct AllowedRoutes {
    namespaces: Option<Namespaces>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Namespaces {
    from: Option<String>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// The spec of a GatewayClass as it is written.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ClassSpec {
    controller_name: Option<String>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Validates a Gateway, apart from its status.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate(meta: &ObjectMeta, spec: &Spec) -> Result<Gateway, Vec<Problem>> {
    let mut problems = Problems::default();
    let (name, labels) = check::namespaced(Kind::Gateway, meta, &mut problems);
    let class = spec.gateway_class_name.clone().unwrap_or_default();
    if class.is_empty() {
        problems.add("spec.gatewayClassName", "is missing", "name the class of the gateway, like culvert-waypoint");
    }
    let hbone = hbone(spec.listeners.as_deref().unwrap_or_default(), &mut problems);
    if hbone.is_none() && WAYPOINT_CLASSES.contains(&class.as_str()) {
        problems.add(
            "spec.listeners",
            "has no listener for HBONE, as a waypoint must",
            "add {name: mesh, port: 15008, protocol: HBONE}",
        );
    }
    let waypoint_for = waypoint_for(&labels, &mut problems);
    problems.finish(Gateway { name, class, hbone, waypoint_for, address: None })
}

impl Gateway {
    /// The same where its status says that it is.
    pub(super) fn with_status(self, object: &Value) -> Self {
        let addresses = object.pointer("/status/addresses").and_then(Value::as_array);
        let place = |address: &Value| {
            let value = address["value"].as_str()?;
            match address["type"].as_str().unwrap_or("IPAddress") {
                "IPAddress" => value.parse().ok().map(GatewayPlace::Ip),
                "Hostname" => check::is_dns_subdomain(value).then(|| GatewayPlace::Host(value.to_owned())),
                _ => None,
            }
        };
        Self { address: addresses.into_iter().flatten().find_map(place), ..self }
    }

    /// Whether it is a waypoint, if its class is this one.
    pub fn is_waypoint(&self, class: Option<&GatewayClass>) -> bool {
        self.hbone.is_some() && Self::is_class_of_mesh(&self.class, class)
    }

    /// Whether gateways of the class of that name are the mesh's, if it is this one. Some need none.
    pub fn is_class_of_mesh(name: &str, class: Option<&GatewayClass>) -> bool {
        class.map_or_else(|| WAYPOINT_CLASSES.contains(&name), GatewayClass::is_of_mesh)
    }
}

impl GatewayClass {
    /// Whether its gateways are the mesh's.
    pub fn is_of_mesh(&self) -> bool {
        Self::is_controller_of_mesh(&self.controller)
    }

    /// Whether this controller is the mesh.
    pub fn is_controller_of_mesh(controller: &str) -> bool {
        WAYPOINT_CONTROLLERS.contains(&controller)
    }
}

/// Validates a GatewayClass.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate_class(meta: &ObjectMeta, spec: &ClassSpec) -> Result<GatewayClass, Vec<Problem>> {
    let mut problems = Problems::default();
    let (name, _) = check::cluster_scoped(Kind::GatewayClass, meta, &mut problems);
    let controller = spec.controller_name.clone().unwrap_or_default();
    if controller.is_empty() {
        problems.add("spec.controllerName", "is missing", "name who makes gateways of the class");
    }
    problems.finish(GatewayClass { name: name.into(), controller })
}

fn hbone(listeners: &[Listener], problems: &mut Problems) -> Option<HboneListener> {
    let is_hbone = |listener: &&Listener| listener.protocol.as_deref() == Some("HBONE");
    let at = listeners.iter().position(|listener| is_hbone(&listener))?;
    let listener = listeners.get(at)?;
    let port = check::port(&format!("spec.listeners[{at}].port"), listener.port.unwrap_or(0), problems)?;
    let namespaces = listener.allowed_routes.as_ref().and_then(|routes| routes.namespaces.as_ref());
    let (allows_all, is_narrowed) = match namespaces.and_then(|namespaces| namespaces.from.as_deref()) {
        None | Some("Same") => (false, false),
        Some("All") => (true, false),
        Some(_) => (false, true),
    };
    Some(HboneListener { port, allows_all, is_narrowed })
}

fn waypoint_for(labels: &Labels, problems: &mut Problems) -> WaypointFor {
    match labels.get(WAYPOINT_FOR).map(String::as_str) {
        None | Some("service") => WaypointFor::Service,
        Some("workload") => WaypointFor::Workload,
        Some("all") => WaypointFor::All,
        Some("none") => WaypointFor::Nothing,
        Some(other) => {
            problems.add(
                format!("metadata.labels[{WAYPOINT_FOR}]"),
                format!("{other:?} is nothing that a waypoint is for"),
                "use service, workload, all or none",
            );
            WaypointFor::Service
        }
    }
}
