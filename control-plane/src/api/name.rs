//! What an object is called.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

/// The kinds that the control plane reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Kind {
    /// `v1` Namespace.
    Namespace,
    /// `v1` Node.
    Node,
    /// `v1` ServiceAccount.
    ServiceAccount,
    /// `apps/v1` Deployment.
    Deployment,
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `v1` Pod.
    Pod,
}

impl Kind {
    /// Every kind, in the order in which they are listed to people.
    pub const ALL: [Self; 7] = [
        Self::Namespace,
        Self::Node,
        Self::ServiceAccount,
        Self::Deployment,
        Self::Service,
        Self::EndpointSlice,
        Self::Pod,
    ];

    /// The kind's name as manifests write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::ServiceAccount => "ServiceAccount",
            Self::Deployment => "Deployment",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Pod => "Pod",
        }
    }

    /// The one API version in which the kind is read.
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Namespace | Self::Node | Self::ServiceAccount | Self::Service | Self::Pod => "v1",
            Self::Deployment => "apps/v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
        }
    }

    /// Whether objects of the kind live outside any namespace.
    pub fn is_cluster_scoped(self) -> bool {
        matches!(self, Self::Namespace | Self::Node)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A namespaced name. Cheap to clone; written `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The name inside the namespace.
    pub name: Arc<str>,
}

impl Name {
    /// A name from its two parts.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Kind and name of an object; no two objects share one. Written `Kind namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// The kind.
    pub kind: Kind,
    /// The namespace; empty for kinds outside namespaces.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl ObjectId {
    /// The id of an object in a namespace.
    pub fn namespaced(kind: Kind, name: &Name) -> Self {
        Self { kind, namespace: name.namespace.clone(), name: name.name.clone() }
    }

    /// The id of an object outside namespaces.
    pub fn cluster(kind: Kind, name: Arc<str>) -> Self {
        Self { kind, namespace: Arc::default(), name }
    }

    /// The namespaced name.
    pub fn to_name(&self) -> Name {
        Name { namespace: self.namespace.clone(), name: self.name.clone() }
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_ref() {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}
