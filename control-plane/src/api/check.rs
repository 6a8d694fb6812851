//! Checks that several kinds share: names, labels, ports, addresses. The rules are those of the Kubernetes API server,
//! so that what passes here can be applied to a cluster.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::labels::Labels;
use super::name::{Kind, Name};
use super::problem::Problems;

/// RFC 1123 label: at most 63 of a-z, 0-9 and `-`, with a letter or digit at both ends.
pub(super) fn is_dns_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let alphanumeric = |byte: Option<&u8>| byte.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    bytes.len() <= 63
        && alphanumeric(bytes.first())
        && alphanumeric(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

/// RFC 1123 subdomain: labels joined by dots, at most 253 bytes.
pub(super) fn is_dns_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_dns_label)
}

/// Name of a port that a container declares and a target port may use (RFC 6335 service name).
pub(super) fn is_port_name(text: &str) -> bool {
    text.len() <= 15 && is_dns_label(text) && text.bytes().any(|b| b.is_ascii_lowercase()) && !text.contains("--")
}

fn is_label_value(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = |byte: Option<&u8>| byte.is_none_or(u8::is_ascii_alphanumeric);
    bytes.len() <= 63
        && ends(bytes.first())
        && ends(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

fn is_label_key(text: &str) -> bool {
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    prefix.is_none_or(is_dns_subdomain) && !name.is_empty() && is_label_value(name)
}

/// Checks keys and values of labels or of a selector at `field`.
pub(super) fn labels(field: &str, labels: &Labels, problems: &mut Problems) {
    for (key, value) in labels {
        if !is_label_key(key) {
            problems.add(
                format!("{field}[{key}]"),
                "the key is not a label key",
                "use at most 63 of letters, digits, '-', '_', '.', optionally behind a DNS name and '/'",
            );
        }
        if !is_label_value(value) {
            problems.add(
                format!("{field}[{key}]"),
                format!("{value:?} is not a label value"),
                "use at most 63 of letters, digits, '-', '_', '.', with a letter or digit at both ends",
            );
        }
    }
}

/// Checks name and labels of an object in a namespace; the namespace is `default` when it names none, as with kubectl.
pub(super) fn namespaced(kind: Kind, meta: &ObjectMeta, problems: &mut Problems) -> (Name, Labels) {
    let namespace = meta.namespace.as_deref().filter(|namespace| !namespace.is_empty()).unwrap_or("default");
    if !is_dns_label(namespace) {
        problems.add("metadata.namespace", format!("{namespace:?} is not a namespace name"), DNS_LABEL_FIX);
    }
    let name = meta.name.as_deref().unwrap_or_default();
    // A service's may begin with a digit from Kubernetes 1.36 on (KEP-5311).
    let valid = if kind == Kind::Service { is_dns_label(name) } else { is_dns_subdomain(name) };
    if !valid {
        let fix = if kind == Kind::Service { DNS_LABEL_FIX } else { DNS_SUBDOMAIN_FIX };
        problems.add("metadata.name", format!("{name:?} is not a name for a {kind}"), fix);
    }
    (Name::new(namespace, name), object_labels(meta, problems))
}

/// Checks name and labels of an object outside namespaces.
pub(super) fn cluster_scoped(kind: Kind, meta: &ObjectMeta, problems: &mut Problems) -> (String, Labels) {
    let name = meta.name.clone().unwrap_or_default();
    let (valid, fix) = if kind == Kind::Namespace {
        (is_dns_label(&name), DNS_LABEL_FIX)
    } else {
        (is_dns_subdomain(&name), DNS_SUBDOMAIN_FIX)
    };
    if !valid {
        problems.add("metadata.name", format!("{name:?} is not a name for a {kind}"), fix);
    }
    if meta.namespace.as_deref().is_some_and(|namespace| !namespace.is_empty()) {
        problems.add("metadata.namespace", format!("a {kind} lives outside namespaces"), "remove the field");
    }
    (name, object_labels(meta, problems))
}

fn object_labels(meta: &ObjectMeta, problems: &mut Problems) -> Labels {
    let own = meta.labels.clone().unwrap_or_default();
    labels("metadata.labels", &own, problems);
    own
}

/// A port number, or a note that it is none.
pub(super) fn port(field: &str, value: i32, problems: &mut Problems) -> Option<u16> {
    match u16::try_from(value) {
        Ok(port) if port > 0 => Some(port),
        Ok(_) | Err(_) => {
            problems.add(field, format!("{value} is not a port"), "use 1 to 65535");
            None
        }
    }
}

/// An IP address that a pod, a service or an endpoint can have.
pub(super) fn address(field: &str, text: &str, problems: &mut Problems) -> Option<IpAddr> {
    let Ok(address) = text.parse::<IpAddr>() else {
        problems.add(field, format!("{text:?} is not an IP address"), "write it like 10.0.0.1 or fd00::1");
        return None;
    };
    let v4_mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    if !is_reachable(address) || v4_mapped {
        problems.add(
            field,
            format!("{address} cannot be reached from another node"),
            "use a unicast address that is not loopback, link-local or IPv4-mapped",
        );
        return None;
    }
    Some(address)
}

/// Whether it is an address that cannot be reached from another node, such as load balancers for one machine give services.
pub(super) fn is_near(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok_and(|address| !is_reachable(address))
}

/// Whether the address may be reached from another node.
fn is_reachable(address: IpAddr) -> bool {
    !address.is_unspecified() && !address.is_loopback() && !address.is_multicast() && !is_link_local(address)
}

/// Addresses without repetition, in the order in which they were given.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    in_order: Vec<IpAddr>,
    seen: HashSet<IpAddr>,
}

impl Addresses {
    /// Adds the address written at `field`, or notes what is wrong with it.
    pub(super) fn add(&mut self, field: &str, text: &str, problems: &mut Problems) {
        if let Some(address) = address(field, text, problems) {
            self.push(address);
        }
    }

    /// Adds the address of an object that is not valid, if it is one in whatever form.
    pub(super) fn add_unread(&mut self, text: &str) {
        let address = text.parse::<IpAddr>().ok().map(|address| address.to_canonical());
        if let Some(address) = address.filter(|address| is_reachable(*address)) {
            self.push(address);
        }
    }

    fn push(&mut self, address: IpAddr) {
        if self.seen.insert(address) {
            self.in_order.push(address);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.in_order.is_empty()
    }

    pub(super) fn into_vec(self) -> Vec<IpAddr> {
        self.in_order
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// A time as objects write it.
pub(super) fn system_time(timestamp: &k8s_openapi::jiff::Timestamp) -> Option<SystemTime> {
    let milliseconds = u64::try_from(timestamp.as_millisecond()).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(milliseconds))
}

pub(super) const DNS_LABEL_FIX: &str = "use at most 63 of a-z, 0-9 and '-', with a letter or digit at both ends";
pub(super) const DNS_SUBDOMAIN_FIX: &str =
    "use at most 253 of a-z, 0-9, '-' and '.', with a letter or digit at both ends of each part";
