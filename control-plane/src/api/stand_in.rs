//! What stands in for an object that is not valid and has no earlier version: that such an object is not there at all must
//! not let through what it was to keep out.

use std::sync::Arc;

use serde_json::Value;

use super::name::{Kind, ObjectId};
use super::{
    Object, authorization_policy, namespace, peer_authentication, pod, service, service_entry, workload_entry,
};

/// The safest reading of the object `id`, which is not valid. None where it is safest that there is no such object, and for
/// names under which it would be taken for another one; those are in no cluster.
pub fn of(id: &ObjectId, value: &Value) -> Option<Object> {
    let is_in_name = |mark: char| id.name.contains(mark) || id.namespace.contains(mark);
    match id.kind {
        Kind::AuthorizationPolicy => authorization_policy::stand_in(id.to_name(), value)
            .map(|policy| Object::AuthorizationPolicy(Arc::new(policy))),
        Kind::PeerAuthentication => {
            Some(Object::PeerAuthentication(Arc::new(peer_authentication::stand_in(id.to_name(), value))))
        }
        Kind::Namespace => Some(Object::Namespace(Arc::new(namespace::stand_in(id.name.clone(), value)))),
        // A name with a dot is a host of a ServiceEntry.
        Kind::Service => (!is_in_name('/') && !id.name.contains('.'))
            .then(|| Object::Service(Arc::new(service::stand_in(id.to_name(), value)))),
        Kind::Pod => (!is_in_name('/')).then(|| Object::Pod(Arc::new(pod::stand_in(id.to_name(), value)))),
        Kind::ServiceEntry if !is_in_name('/') => {
            service_entry::stand_in(id.to_name(), value).map(|entry| Object::ServiceEntry(Arc::new(entry)))
        }
        Kind::WorkloadEntry if !is_in_name('/') => {
            workload_entry::stand_in(id.to_name(), value).map(|entry| Object::WorkloadEntry(Arc::new(entry)))
        }
        Kind::Node
        | Kind::ServiceAccount
        | Kind::Deployment
        | Kind::EndpointSlice
        | Kind::ServiceEntry
        | Kind::WorkloadEntry
        | Kind::Gateway
        | Kind::GatewayClass => None,
    }
}

/// What of the last good version of an object stays in force beside its newest one, which is not valid and stood in for by
/// `newest`. None: nothing does, since it is not the same object any more.
pub fn keep(last: &Object, newest: Option<&Object>) -> Option<Object> {
    match (last, newest) {
        (Object::Pod(last), Some(Object::Pod(newest))) => pod::keep(last, newest).map(|pod| Object::Pod(Arc::new(pod))),
        (Object::Service(last), Some(Object::Service(newest))) => {
            Some(Object::Service(Arc::new(service::keep(last, newest))))
        }
        (Object::ServiceEntry(last), Some(Object::ServiceEntry(newest))) => {
            Some(Object::ServiceEntry(Arc::new(service_entry::keep(last, newest))))
        }
        (Object::WorkloadEntry(last), Some(Object::WorkloadEntry(newest))) => {
            Some(Object::WorkloadEntry(Arc::new(workload_entry::keep(last, newest))))
        }
        _ => Some(last.clone()),
    }
}
