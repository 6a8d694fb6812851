//! How resources are named on the wire.

use std::borrow::Cow;
use std::fmt::Write;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;

use super::Options;
use crate::api::Name;

/// The network that all addresses are in. Several networks come with several clusters.
const NETWORK: &str = "";

impl Options {
    /// The fully qualified host name of a service. A host of a ServiceEntry is one by itself: it has a dot, which the name of
    /// a Service cannot have.
    pub(super) fn hostname(&self, service: &Name) -> String {
        if service.name.contains('.') {
            return service.name.to_string();
        }
        self.cluster_hostname(service)
    }

    /// The fully qualified host name of a Service.
    pub(super) fn cluster_hostname(&self, service: &Name) -> String {
        format!("{}.{}.svc.{}", service.name, service.namespace, self.cluster_domain)
    }

    /// The primary name of a service, which is also its key in a workload: `namespace/hostname`.
    pub(super) fn service_key(&self, service: &Name) -> String {
        format!("{}/{}", service.namespace, self.hostname(service))
    }

    /// The uid of a pod's workload.
    pub(super) fn pod_uid(&self, pod: &Name) -> String {
        format!("{}//Pod/{}/{}", self.cluster_id, pod.namespace, pod.name)
    }

    /// The uid of a WorkloadEntry's workload.
    pub(super) fn workload_entry_uid(&self, entry: &Name) -> String {
        format!("{}/networking.istio.io/WorkloadEntry/{}/{}", self.cluster_id, entry.namespace, entry.name)
    }

    /// The uid of the workload of an endpoint that a ServiceEntry lists.
    pub(super) fn inline_uid(&self, entry: &Name, address: IpAddr) -> String {
        format!("{}/networking.istio.io/ServiceEntry/{}/{}/{address}", self.cluster_id, entry.namespace, entry.name)
    }

    /// The uid of the workload of an endpoint that is no pod.
    pub(super) fn endpoint_uid(&self, slice: &Name, address: IpAddr) -> String {
        format!("{}/discovery.k8s.io/EndpointSlice/{}/{}/{address}", self.cluster_id, slice.namespace, slice.name)
    }
}

/// A name or namespace of an object, as it stands in a policy and its key: of another form than every name that is given to
/// policies that are no objects, which have an underscore, and without a slash. A valid one stays as it is. One that is not
/// is that of a file's object that is stood in for.
pub(super) fn in_policy(text: &str) -> Cow<'_, str> {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    if text.bytes().all(is_plain) {
        return text.into();
    }
    let mut escaped = String::with_capacity(text.len() * 3);
    for byte in text.bytes() {
        if is_plain(byte) {
            escaped.push(byte.into());
        } else {
            // Writing to a string cannot fail.
            let _ = write!(escaped, "%{byte:02x}");
        }
    }
    escaped.into()
}

/// The primary name of the policy that an object of this name becomes.
pub(crate) fn policy_key(policy: &Name) -> String {
    format!("{}/{}", in_policy(&policy.namespace), in_policy(&policy.name))
}

/// The name under which what is at `address` may be asked for: `network/address`.
pub(super) fn alias(address: IpAddr) -> Arc<str> {
    format!("{NETWORK}/{address}").into()
}

/// An address as it goes on the wire: 4 or 16 bytes.
pub(super) fn address_bytes(address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    }
}
