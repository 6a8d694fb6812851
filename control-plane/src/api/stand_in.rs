//! What stands in for an object that is not valid and has no earlier version: that such an object is not there at all must
//! not let through what it was to keep out.

use std::sync::Arc;

use serde_json::Value;

use super::name::{Kind, ObjectId};
use super::{Object, authorization_policy, namespace, peer_authentication};

/// The safest reading of the object `id`, which is not valid. None where it is safest that there is no such object.
pub fn of(id: &ObjectId, value: &Value) -> Option<Object> {
    match id.kind {
        Kind::AuthorizationPolicy => authorization_policy::stand_in(id.to_name(), value)
            .map(|policy| Object::AuthorizationPolicy(Arc::new(policy))),
        Kind::PeerAuthentication => {
            Some(Object::PeerAuthentication(Arc::new(peer_authentication::stand_in(id.to_name(), value))))
        }
        Kind::Namespace => Some(Object::Namespace(Arc::new(namespace::stand_in(id.name.clone(), value)))),
        Kind::Node
        | Kind::ServiceAccount
        | Kind::Deployment
        | Kind::Service
        | Kind::EndpointSlice
        | Kind::Pod
        | Kind::ServiceEntry
        | Kind::WorkloadEntry
        | Kind::Gateway
        | Kind::GatewayClass => None,
    }
}
