//! Kubernetes objects, read and validated: YAML text in, small typed objects or a list of mistakes out.
//!
//! There is one `validate()` per kind, used by the directory source and by `culvertd check` alike. It returns what the
//! mesh needs of the object, so nothing behind it has to handle an invalid one, and it reports every mistake it finds,
//! each with the field's path and the fix.
//!
//! Pure: no I/O, no clock.

mod authorization_policy;
mod check;
mod custom;
mod document;
mod endpoint_slice;
mod gateway;
mod labels;
mod name;
mod namespace;
mod node;
mod peer_authentication;
mod pod;
mod problem;
mod service;
mod service_entry;
mod stand_in;
mod strict;
mod workload_entry;
mod workload_kinds;

#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use authorization_policy::{AuthorizationPolicy, PolicyAction, PolicyTarget, TargetRef};
pub use document::{Document, Outcome, parse, read_served, validate_served};
pub use endpoint_slice::{Endpoint, EndpointSlice, PodReference, SlicePort};
pub use gateway::{Gateway, GatewayClass, GatewayPlace, HboneListener, WaypointFor};
pub use labels::{DataplaneMode, GATEWAY_NAME, Labels, WaypointBinding, WaypointRef};
pub use name::{Kind, Name, ObjectId};
pub use namespace::Namespace;
pub use node::{Locality, Node};
pub use peer_authentication::{MtlsMode, PeerAuthentication};
pub use pod::{ContainerPort, Owner, Phase, Pod};
pub use problem::{Problem, Problems};
pub use service::{AppProtocol, EntryPart, Families, Service, ServiceAddresses, ServicePort, TargetPort, Topology};
pub use service_entry::{Resolution, ServiceEntry};
pub use stand_in::{keep, of as stand_in};
pub use workload_entry::{EntryAddress, EntryEndpoint, WorkloadEntry};
pub use workload_kinds::{Deployment, ServiceAccount};

/// A valid object, reduced to what the mesh uses of it. Cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A namespace, with its enrolment.
    Namespace(Arc<Namespace>),
    /// A node, with its locality.
    Node(Arc<Node>),
    /// A service account.
    ServiceAccount(Arc<ServiceAccount>),
    /// A deployment; checked, and shown in the status, but pods are what traffic goes to.
    Deployment(Arc<Deployment>),
    /// A service.
    Service(Arc<Service>),
    /// A slice of a service's endpoints.
    EndpointSlice(Arc<EndpointSlice>),
    /// A pod.
    Pod(Arc<Pod>),
    /// Who may connect.
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
    /// Whether plaintext is taken.
    PeerAuthentication(Arc<PeerAuthentication>),
    /// Hosts that are no services of Kubernetes.
    ServiceEntry(Arc<ServiceEntry>),
    /// A workload that is no pod.
    WorkloadEntry(Arc<WorkloadEntry>),
    /// A gateway, which may be a waypoint.
    Gateway(Arc<Gateway>),
    /// A class of gateways.
    GatewayClass(Arc<GatewayClass>),
}

impl Object {
    /// The object's kind and name, which identify it.
    pub fn id(&self) -> ObjectId {
        match self {
            Self::Namespace(namespace) => ObjectId::cluster(Kind::Namespace, namespace.name.clone()),
            Self::Node(node) => ObjectId::cluster(Kind::Node, node.name.clone()),
            Self::ServiceAccount(account) => ObjectId::namespaced(Kind::ServiceAccount, &account.name),
            Self::Deployment(deployment) => ObjectId::namespaced(Kind::Deployment, &deployment.name),
            Self::Service(service) => ObjectId::namespaced(Kind::Service, &service.name),
            Self::EndpointSlice(slice) => ObjectId::namespaced(Kind::EndpointSlice, &slice.name),
            Self::Pod(pod) => ObjectId::namespaced(Kind::Pod, &pod.name),
            Self::AuthorizationPolicy(policy) => ObjectId::namespaced(Kind::AuthorizationPolicy, &policy.name),
            Self::PeerAuthentication(policy) => ObjectId::namespaced(Kind::PeerAuthentication, &policy.name),
            Self::ServiceEntry(entry) => ObjectId::namespaced(Kind::ServiceEntry, &entry.name),
            Self::WorkloadEntry(entry) => ObjectId::namespaced(Kind::WorkloadEntry, &entry.name),
            Self::Gateway(gateway) => ObjectId::namespaced(Kind::Gateway, &gateway.name),
            Self::GatewayClass(class) => ObjectId::cluster(Kind::GatewayClass, class.name.clone()),
        }
    }
}
