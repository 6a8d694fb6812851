//! SPIFFE identities in the one form that the mesh uses.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// The scheme that every SPIFFE ID starts with.
pub const SCHEME: &str = "spiffe://";

/// Longest SPIFFE ID that is accepted, in bytes (SPIFFE-ID section 2.3).
const MAX_LENGTH: usize = 2048;

/// Longest trust domain that is accepted, in bytes (SPIFFE-ID section 2.1).
const MAX_TRUST_DOMAIN: usize = 255;

/// The identity of a workload: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`, and no other form.
///
/// Cloning copies a pointer. Two identities are equal when their URIs are equal byte by byte.
#[derive(Clone)]
pub struct SpiffeId {
    uri: Arc<str>,
    /// End of the trust domain within `uri`.
    trust_domain_end: u16,
    /// End of the namespace within `uri`.
    namespace_end: u16,
}

impl SpiffeId {
    /// Makes an identity of its three parts.
    ///
    /// # Errors
    /// When a part is empty or holds a character that a SPIFFE ID cannot hold (SPIFFE-ID section 2).
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<Self, InvalidSpiffeId> {
        check_trust_domain(trust_domain)?;
        check_segment("namespace", namespace)?;
        check_segment("service account", service_account)?;
        let uri = format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}");
        if uri.len() > MAX_LENGTH {
            return Err(InvalidSpiffeId::TooLong { length: uri.len() });
        }
        let trust_domain_end = SCHEME.len() + trust_domain.len();
        let namespace_end = trust_domain_end + "/ns/".len() + namespace.len();
        Ok(Self {
            uri: uri.into(),
            // Both are at most MAX_LENGTH, which fits.
            trust_domain_end: u16::try_from(trust_domain_end).unwrap_or(u16::MAX),
            namespace_end: u16::try_from(namespace_end).unwrap_or(u16::MAX),
        })
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The URI without `spiffe://`, the form in which authorization policies name principals.
    pub fn principal(&self) -> &str {
        self.uri.get(SCHEME.len()..).unwrap_or_default()
    }

    /// The trust domain, such as `cluster.local`.
    pub fn trust_domain(&self) -> &str {
        self.uri.get(SCHEME.len()..self.trust_domain_end.into()).unwrap_or_default()
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        self.uri.get(usize::from(self.trust_domain_end) + "/ns/".len()..self.namespace_end.into()).unwrap_or_default()
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &str {
        self.uri.get(usize::from(self.namespace_end) + "/sa/".len()..).unwrap_or_default()
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        if uri.len() > MAX_LENGTH {
            return Err(InvalidSpiffeId::TooLong { length: uri.len() });
        }
        let rest = uri.strip_prefix(SCHEME).ok_or(InvalidSpiffeId::Scheme)?;
        let mut parts = rest.split('/');
        let mut next = || parts.next().ok_or(InvalidSpiffeId::Form);
        let (trust_domain, ns, namespace, sa, service_account) = (next()?, next()?, next()?, next()?, next()?);
        if ns != "ns" || sa != "sa" || next().is_ok() {
            return Err(InvalidSpiffeId::Form);
        }
        Self::new(trust_domain, namespace, service_account)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.uri == other.uri
    }
}

impl Eq for SpiffeId {}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.uri.cmp(&other.uri)
    }
}

impl Hash for SpiffeId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.uri.hash(state);
    }
}

/// Why a text is not an identity of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidSpiffeId {
    /// It does not start with `spiffe://`.
    #[error("does not start with {SCHEME}")]
    Scheme,
    /// The path is not `/ns/<namespace>/sa/<service account>`.
    #[error("is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Form,
    /// A part is missing or empty.
    #[error("the {part} is empty")]
    Empty {
        /// Which part.
        part: &'static str,
    },
    /// A part holds a character outside its alphabet, or is `.` or `..`.
    #[error("the {part} {value:?} holds what a SPIFFE ID cannot hold")]
    Characters {
        /// Which part.
        part: &'static str,
        /// The part as given.
        value: String,
    },
    /// Longer than a SPIFFE ID can be.
    #[error("{length} bytes is longer than a SPIFFE ID can be")]
    TooLong {
        /// Length in bytes.
        length: usize,
    },
}

/// SPIFFE-ID section 2.1: lower-case letters, digits, dots, dashes, underscores.
fn check_trust_domain(value: &str) -> Result<(), InvalidSpiffeId> {
    let part = "trust domain";
    if value.is_empty() {
        return Err(InvalidSpiffeId::Empty { part });
    }
    if value.len() > MAX_TRUST_DOMAIN {
        return Err(InvalidSpiffeId::TooLong { length: value.len() });
    }
    if value.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b)) {
        return Ok(());
    }
    Err(InvalidSpiffeId::Characters { part, value: value.to_owned() })
}

/// SPIFFE-ID section 2.2: letters, digits, dots, dashes, underscores, and no relative segment.
fn check_segment(part: &'static str, value: &str) -> Result<(), InvalidSpiffeId> {
    if value.is_empty() {
        return Err(InvalidSpiffeId::Empty { part });
    }
    if value != "." && value != ".." && value.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b)) {
        return Ok(());
    }
    Err(InvalidSpiffeId::Characters { part, value: value.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_come_back() {
        let id = SpiffeId::new("cluster.local", "bookinfo", "bookinfo-reviews").unwrap();
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/bookinfo/sa/bookinfo-reviews");
        assert_eq!(id.principal(), "cluster.local/ns/bookinfo/sa/bookinfo-reviews");
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("cluster.local", "bookinfo", "bookinfo-reviews")
        );
        assert_eq!(id.as_str().parse::<SpiffeId>().unwrap(), id);
    }

    #[test]
    fn only_the_strict_form_parses() {
        let cases: [(&str, InvalidSpiffeId); 15] = [
            ("", InvalidSpiffeId::Scheme),
            ("https://td/ns/a/sa/b", InvalidSpiffeId::Scheme),
            ("SPIFFE://td/ns/a/sa/b", InvalidSpiffeId::Scheme),
            ("spiffe://td", InvalidSpiffeId::Form),
            ("spiffe://td/ns/a/sa", InvalidSpiffeId::Form),
            ("spiffe://td/ns/a/sa/b/", InvalidSpiffeId::Form),
            ("spiffe://td/ns/a/sa/b/c", InvalidSpiffeId::Form),
            ("spiffe://td/sa/a/ns/b", InvalidSpiffeId::Form),
            ("spiffe:///ns/a/sa/b", InvalidSpiffeId::Empty { part: "trust domain" }),
            ("spiffe://td/ns//sa/b", InvalidSpiffeId::Empty { part: "namespace" }),
            ("spiffe://td/ns/a/sa/", InvalidSpiffeId::Empty { part: "service account" }),
            ("spiffe://TD/ns/a/sa/b", InvalidSpiffeId::Characters { part: "trust domain", value: "TD".into() }),
            ("spiffe://td:1/ns/a/sa/b", InvalidSpiffeId::Characters { part: "trust domain", value: "td:1".into() }),
            ("spiffe://td/ns/../sa/b", InvalidSpiffeId::Characters { part: "namespace", value: "..".into() }),
            ("spiffe://td/ns/a/sa/b%2f", InvalidSpiffeId::Characters { part: "service account", value: "b%2f".into() }),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse::<SpiffeId>(), Err(expected), "{text}");
        }
    }

    #[test]
    fn length_is_bounded() {
        let long = "a".repeat(MAX_LENGTH);
        assert!(matches!(SpiffeId::new("td", &long, "b"), Err(InvalidSpiffeId::TooLong { .. })));
        assert!(matches!(SpiffeId::new(&"a".repeat(256), "a", "b"), Err(InvalidSpiffeId::TooLong { length: 256 })));
        assert!(SpiffeId::new(&"a".repeat(255), "a", "b").is_ok());
    }
}
