//! Whether traffic goes through the waypoint that something is bound to.

use std::sync::Arc;

use super::{All, class, valid};
use crate::api::{Kind, Name, Object, ObjectId, WaypointBinding, WaypointFor};
use crate::ingest::kubernetes::Outcome;

/// The waypoint that something of the namespace is bound to, by its own label or the namespace's. The outer none: its namespace
/// decides, and cannot be read.
pub(super) fn waypoint(namespace: &Arc<str>, own: &WaypointBinding, all: &All) -> Option<Option<Name>> {
    let binding = match own {
        WaypointBinding::Unset => match all.get(&ObjectId::cluster(Kind::Namespace, namespace.clone())) {
            None => WaypointBinding::Unset,
            Some(verdict) => match &verdict.outcome {
                Outcome::Valid(Object::Namespace(namespace)) => namespace.waypoint.clone(),
                Outcome::Valid(_) | Outcome::Refused { .. } => return None,
            },
        },
        own => own.clone(),
    };
    Some(match binding {
        WaypointBinding::Unset | WaypointBinding::Off => None,
        WaypointBinding::Waypoint(waypoint) => {
            Some(Name::new(waypoint.namespace.as_deref().unwrap_or(namespace), waypoint.name))
        }
    })
}

/// What becomes of traffic to a service of the namespace that is bound to that waypoint; none where nobody can tell.
pub(super) fn binding(namespace: &str, waypoint: &Name, all: &All) -> Option<(bool, &'static str, String)> {
    let valid = |id: &ObjectId| valid(id, all);
    let id = ObjectId::namespaced(Kind::Gateway, waypoint);
    let Some(Object::Gateway(gateway)) = valid(&id) else {
        if all.contains_key(&id) {
            return None;
        }
        return Some(if valid(&ObjectId::namespaced(Kind::Service, waypoint)).is_some() {
            (true, "WaypointAccepted", format!("bound to the waypoint {waypoint}"))
        } else {
            let fix = "make it, or take away the label istio.io/use-waypoint";
            (false, "WaypointIsNotReady", format!("there is no waypoint {waypoint}: connections are refused; {fix}"))
        });
    };
    let class = class(&gateway.class, all);
    let Some(listener) = gateway.hbone.as_ref().filter(|_| gateway.is_waypoint(class)) else {
        let fix = "give it a listener for HBONE and a class of waypoints";
        let message = format!("the Gateway {waypoint} is no waypoint: connections are refused; {fix}");
        return Some((false, "WaypointIsNotReady", message));
    };
    if !listener.allows_all && *waypoint.namespace != *namespace {
        let fix = "set allowedRoutes.namespaces.from to All at its listener for HBONE";
        let message = format!("the waypoint {waypoint} is for its own namespace: connections are refused; {fix}");
        return Some((false, "AttachmentDenied", message));
    }
    Some(match gateway.waypoint_for {
        WaypointFor::Service | WaypointFor::All => {
            (true, "WaypointAccepted", format!("bound to the waypoint {waypoint}"))
        }
        WaypointFor::Workload | WaypointFor::Nothing => {
            let fix = "label it istio.io/waypoint-for: service or all";
            let message = format!("the waypoint {waypoint} is not for services: connections pass it by; {fix}");
            (false, "UnsupportedTrafficType", message)
        }
    })
}
