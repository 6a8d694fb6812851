//! What the status of Gateways and their classes is to say, as Gateway API has it: of those alone that are the mesh's.

use super::{All, Said, class, valid};
use crate::api::{Gateway, GatewayClass, Kind, ObjectId};

/// Whether the mesh takes it for its own.
pub(super) const ACCEPTED: &str = "Accepted";
/// Whether traffic goes through it.
pub(super) const PROGRAMMED: &str = "Programmed";

/// Of a class; none if it is not the mesh's.
pub(super) fn of_class(class: &GatewayClass) -> Option<Said> {
    let message = "its Gateways with a listener for HBONE are waypoints";
    class.is_of_mesh().then(|| (ACCEPTED, true, "Accepted", message.to_owned()))
}

/// Of a class of this controller that is not valid, for these reasons; none if it is not the mesh's.
pub(super) fn of_bad_class(controller: &str, mistakes: String) -> Option<Said> {
    GatewayClass::is_controller_of_mesh(controller).then_some((ACCEPTED, false, "Unsupported", mistakes))
}

/// Of a gateway; none if it is not the mesh's, or nobody can tell.
pub(super) fn of_gateway(gateway: &Gateway, all: &All) -> Option<Vec<Said>> {
    if !is_of_mesh(&gateway.class, all)? {
        return None;
    }
    let Some(listener) = &gateway.hbone else {
        let message = "has no listener for HBONE: connections to what is bound to it are refused; \
                       add {name: mesh, port: 15008, protocol: HBONE}";
        return Some(both((false, "ListenersNotValid"), (false, "Invalid"), message, message));
    };
    let accepted = if listener.is_narrowed {
        "its listener for HBONE chooses namespaces in a way that is not supported: only objects of its own namespace can be \
         bound to it; use from: Same or All"
    } else {
        "what is bound to it is reached through it, or not at all"
    };
    let name = &gateway.name;
    let is_there = gateway.address.is_some() || valid(&ObjectId::namespaced(Kind::Service, name), all).is_some();
    Some(if is_there {
        both((true, "Accepted"), (true, "Programmed"), accepted, "proxies are told where it is")
    } else {
        let message = format!(
            "nobody has made it: it has no address, and there is no Service {name}; connections to what is bound to it are \
             refused; this version makes no waypoints: run one, behind a Service of that name"
        );
        both((true, "Accepted"), (false, "AddressNotAssigned"), accepted, &message)
    })
}

/// Of a gateway of this class that is not valid, for these reasons; none if it is not the mesh's, or nobody can tell.
pub(super) fn of_bad_gateway(class: &str, mistakes: &str, all: &All) -> Option<Vec<Said>> {
    is_of_mesh(class, all)?.then(|| both((false, "Invalid"), (false, "Invalid"), mistakes, mistakes))
}

fn both(accepted: (bool, &'static str), programmed: (bool, &'static str), why: &str, where_to: &str) -> Vec<Said> {
    vec![
        (ACCEPTED, accepted.0, accepted.1, why.to_owned()),
        (PROGRAMMED, programmed.0, programmed.1, where_to.to_owned()),
    ]
}

/// Whether a class is the mesh's; none where nobody can tell.
fn is_of_mesh(name: &str, all: &All) -> Option<bool> {
    let id = ObjectId::cluster(Kind::GatewayClass, name.into());
    let class = class(name, all);
    if class.is_none() && all.contains_key(&id) {
        return None;
    }
    Some(Gateway::is_class_of_mesh(name, class))
}
