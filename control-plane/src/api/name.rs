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
    /// `security.istio.io/v1` AuthorizationPolicy.
    AuthorizationPolicy,
    /// `security.istio.io/v1` PeerAuthentication.
    PeerAuthentication,
    /// `networking.istio.io/v1` ServiceEntry.
    ServiceEntry,
    /// `networking.istio.io/v1` WorkloadEntry.
    WorkloadEntry,
    /// `gateway.networking.k8s.io/v1` Gateway.
    Gateway,
    /// `gateway.networking.k8s.io/v1` GatewayClass.
    GatewayClass,
}

impl Kind {
    /// Every kind, in the order in which they are listed to people.
    pub const ALL: [Self; 13] = [
        Self::Namespace,
        Self::Node,
        Self::ServiceAccount,
        Self::Deployment,
        Self::Service,
        Self::EndpointSlice,
        Self::Pod,
        Self::AuthorizationPolicy,
        Self::PeerAuthentication,
        Self::ServiceEntry,
        Self::WorkloadEntry,
        Self::Gateway,
        Self::GatewayClass,
    ];

    /// The kind that manifests call `kind` in the API group `group`, which is empty for the core group.
    pub fn find(group: &str, kind: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.as_str() == kind && known.group() == group)
    }

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
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::ServiceEntry => "ServiceEntry",
            Self::WorkloadEntry => "WorkloadEntry",
            Self::Gateway => "Gateway",
            Self::GatewayClass => "GatewayClass",
        }
    }

    /// The kind's name in the paths of the API.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Namespace => "namespaces",
            Self::Node => "nodes",
            Self::ServiceAccount => "serviceaccounts",
            Self::Deployment => "deployments",
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::Pod => "pods",
            Self::AuthorizationPolicy => "authorizationpolicies",
            Self::PeerAuthentication => "peerauthentications",
            Self::ServiceEntry => "serviceentries",
            Self::WorkloadEntry => "workloadentries",
            Self::Gateway => "gateways",
            Self::GatewayClass => "gatewayclasses",
        }
    }

    /// The API version in which the kind is asked for, `group/version`.
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Namespace | Self::Node | Self::ServiceAccount | Self::Service | Self::Pod => "v1",
            Self::Deployment => "apps/v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::AuthorizationPolicy | Self::PeerAuthentication => "security.istio.io/v1",
            Self::ServiceEntry | Self::WorkloadEntry => "networking.istio.io/v1",
            Self::Gateway | Self::GatewayClass => "gateway.networking.k8s.io/v1",
        }
    }

    /// The versions of its group in which the kind is read, the one that it is asked for in first. Their fields are the same.
    pub fn versions(self) -> &'static [&'static str] {
        match self {
            Self::AuthorizationPolicy | Self::PeerAuthentication | Self::Gateway | Self::GatewayClass => {
                &["v1", "v1beta1"]
            }
            Self::ServiceEntry | Self::WorkloadEntry => &["v1", "v1beta1", "v1alpha3"],
            Self::Namespace
            | Self::Node
            | Self::ServiceAccount
            | Self::Deployment
            | Self::Service
            | Self::EndpointSlice
            | Self::Pod => &["v1"],
        }
    }

    /// Whether objects that are written in this version of the kind's group are read.
    pub fn reads_version(self, version: &str) -> bool {
        self.versions().contains(&version)
    }

    /// The API group; empty for the core group.
    pub fn group(self) -> &'static str {
        self.api_version().split_once('/').map_or("", |(group, _)| group)
    }

    /// The version of its group in which the kind is asked for.
    pub fn version(self) -> &'static str {
        let api_version = self.api_version();
        api_version.split_once('/').map_or(api_version, |(_, version)| version)
    }

    /// Whether every cluster has the kind. Others come with a CustomResourceDefinition, which may be missing, or come or
    /// go later.
    pub fn is_built_in(self) -> bool {
        match self {
            Self::Namespace
            | Self::Node
            | Self::ServiceAccount
            | Self::Deployment
            | Self::Service
            | Self::EndpointSlice
            | Self::Pod => true,
            Self::AuthorizationPolicy
            | Self::PeerAuthentication
            | Self::ServiceEntry
            | Self::WorkloadEntry
            | Self::Gateway
            | Self::GatewayClass => false,
        }
    }

    /// Whether objects of the kind live outside any namespace.
    pub fn is_cluster_scoped(self) -> bool {
        matches!(self, Self::Namespace | Self::Node | Self::GatewayClass)
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
