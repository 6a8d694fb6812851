//! Authorization policies at L4: what they say about a connection.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_proto::security as wire;
use thiserror::Error;

use crate::address::{Cidr, InvalidAddress};
use crate::authorize::ConnectionFacts;
use crate::identity::{SCHEME, SpiffeId};

/// An authorization policy, validated, or the fact that one could not be understood.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Authorization {
    key: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Which workloads it applies to.
    pub scope: Scope,
    /// Whether it is only noted, not enforced.
    pub dry_run: bool,
    body: Body,
}

/// Which workloads a policy applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All.
    Global,
    /// Those of the policy's namespace.
    Namespace,
    /// Those that name it.
    WorkloadSelector,
}

/// What happens to a connection that a policy matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It may be.
    Allow,
    /// It may not be.
    Deny,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Body {
    Rules { action: Action, rules: Box<[Rule]> },
    Invalid,
}

/// What one policy says about one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It cannot be understood.
    Invalid,
    /// It is of this action, and matches or not.
    Rules { action: Action, matched: bool },
}

impl Authorization {
    /// The value that stands for a policy that cannot be understood: it denies wherever it applies.
    pub fn invalid(namespace: &str, name: &str, scope: Scope) -> Self {
        Self {
            key: policy_key(namespace, name),
            name: name.into(),
            namespace: namespace.into(),
            scope,
            dry_run: false,
            body: Body::Invalid,
        }
    }

    /// `<namespace>/<name>`, the primary name in discovery.
    pub fn key(&self) -> &Arc<str> {
        &self.key
    }

    /// What it does to connections that it matches. None: it could not be understood.
    pub fn action(&self) -> Option<Action> {
        match &self.body {
            Body::Rules { action, .. } => Some(*action),
            Body::Invalid => None,
        }
    }

    /// Whether it could not be understood, and so denies unless it is in dry run.
    pub fn is_invalid(&self) -> bool {
        self.body == Body::Invalid
    }

    /// Rules are alternatives: without any, nothing matches.
    pub(crate) fn judge(&self, facts: &ConnectionFacts<'_>) -> Verdict {
        match &self.body {
            Body::Invalid => Verdict::Invalid,
            Body::Rules { action, rules } => {
                Verdict::Rules { action: *action, matched: rules.iter().any(|rule| rule.matches(facts)) }
            }
        }
    }
}

/// Clauses, which must all hold. Without any the rule always matches: that is how an empty rule arrives.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    clauses: Box<[Clause]>,
}

/// Matches, of which one must hold. Without any the clause always holds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Clause {
    matches: Box<[Match]>,
}

/// Fields, which must all hold. Without any it never holds: that is how a match on L7 alone arrives.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Match {
    namespaces: Field<TextMatch>,
    service_accounts: Field<ServiceAccount>,
    principals: Field<TextMatch>,
    source_ips: Field<Cidr>,
    destination_ips: Field<Cidr>,
    destination_ports: Field<u16>,
}

/// A list of which one must match, and a list of which none may. An empty list asks nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Field<T> {
    any: Box<[T]>,
    none: Box<[T]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum TextMatch {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    Presence,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct ServiceAccount {
    namespace: Box<str>,
    name: Box<str>,
}

impl Rule {
    fn matches(&self, facts: &ConnectionFacts<'_>) -> bool {
        self.clauses.iter().all(|clause| clause.matches(facts))
    }
}

impl Clause {
    fn matches(&self, facts: &ConnectionFacts<'_>) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|one| one.matches(facts))
    }
}

impl Match {
    fn matches(&self, facts: &ConnectionFacts<'_>) -> bool {
        let in_block = |ip: IpAddr| move |block: &Cidr| block.contains(ip);
        !self.is_empty()
            && self.namespaces.holds(facts.identity, |id, text| text.matches(id.namespace()))
            && self.service_accounts.holds(facts.identity, |id, account| account.matches(id))
            && self.principals.holds(facts.identity, |id, text| text.matches(id.principal()))
            && self.source_ips.holds_for(in_block(facts.source_ip))
            && self.destination_ips.holds_for(in_block(facts.destination_ip))
            && self.destination_ports.holds_for(|port| *port == facts.destination_port)
    }

    fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
            && self.service_accounts.is_empty()
            && self.principals.is_empty()
            && self.source_ips.is_empty()
            && self.destination_ips.is_empty()
            && self.destination_ports.is_empty()
    }
}

impl<T> Field<T> {
    fn is_empty(&self) -> bool {
        self.any.is_empty() && self.none.is_empty()
    }

    fn holds_for(&self, matches: impl Fn(&T) -> bool) -> bool {
        (self.any.is_empty() || self.any.iter().any(&matches)) && !self.none.iter().any(&matches)
    }

    /// An absent identity matches nothing: what is asked fails, what is excluded holds.
    fn holds(&self, identity: Option<&SpiffeId>, matches: impl Fn(&SpiffeId, &T) -> bool) -> bool {
        self.holds_for(|item| identity.is_some_and(|id| matches(id, item)))
    }
}

impl TextMatch {
    fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(text) => value == &**text,
            Self::Prefix(text) => value.starts_with(&**text),
            Self::Suffix(text) => value.ends_with(&**text),
            Self::Presence => !value.is_empty(),
        }
    }
}

impl ServiceAccount {
    fn matches(&self, id: &SpiffeId) -> bool {
        id.namespace() == &*self.namespace && id.service_account() == &*self.name
    }
}

impl TryFrom<&wire::Authorization> for Authorization {
    type Error = InvalidAuthorization;

    fn try_from(wire: &wire::Authorization) -> Result<Self, Self::Error> {
        if wire.name.is_empty() || wire.namespace.is_empty() {
            return Err(InvalidAuthorization::Unnamed);
        }
        no_extensions(&wire.extensions)?;
        let action = match wire::Action::try_from(wire.action) {
            Ok(wire::Action::Allow) => Action::Allow,
            Ok(wire::Action::Deny) => Action::Deny,
            Err(_) => return Err(InvalidAuthorization::Unknown { field: "action", value: wire.action }),
        };
        Ok(Self {
            key: policy_key(&wire.namespace, &wire.name),
            name: wire.name.as_str().into(),
            namespace: wire.namespace.as_str().into(),
            scope: Scope::try_from(wire.scope)?,
            dry_run: wire.dry_run,
            body: Body::Rules { action, rules: each(&wire.rules, Rule::try_from)? },
        })
    }
}

impl TryFrom<i32> for Scope {
    type Error = InvalidAuthorization;

    fn try_from(wire: i32) -> Result<Self, Self::Error> {
        match wire::Scope::try_from(wire) {
            Ok(wire::Scope::Global) => Ok(Self::Global),
            Ok(wire::Scope::Namespace) => Ok(Self::Namespace),
            Ok(wire::Scope::WorkloadSelector) => Ok(Self::WorkloadSelector),
            Err(_) => Err(InvalidAuthorization::Unknown { field: "scope", value: wire }),
        }
    }
}

impl TryFrom<&wire::Rule> for Rule {
    type Error = InvalidAuthorization;

    fn try_from(wire: &wire::Rule) -> Result<Self, Self::Error> {
        let clause = |clause: &wire::Clause| Ok(Clause { matches: each(&clause.matches, Match::try_from)? });
        Ok(Self { clauses: each(&wire.clauses, clause)? })
    }
}

impl TryFrom<&wire::Match> for Match {
    type Error = InvalidAuthorization;

    fn try_from(wire: &wire::Match) -> Result<Self, Self::Error> {
        no_extensions(&wire.extensions)?;
        let block = |address: &wire::Address| Ok(Cidr::from_bytes(&address.address, address.length)?);
        Ok(Self {
            namespaces: field(&wire.namespaces, &wire.not_namespaces, text)?,
            service_accounts: field(&wire.service_accounts, &wire.not_service_accounts, service_account)?,
            principals: field(&wire.principals, &wire.not_principals, principal)?,
            source_ips: field(&wire.source_ips, &wire.not_source_ips, block)?,
            destination_ips: field(&wire.destination_ips, &wire.not_destination_ips, block)?,
            destination_ports: field(&wire.destination_ports, &wire.not_destination_ports, port)?,
        })
    }
}

/// Why a policy cannot be taken. Where it applies it denies.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidAuthorization {
    /// No name or no namespace.
    #[error("the policy has no name or no namespace")]
    Unnamed,
    /// A condition of a kind that this version does not know.
    #[error("the policy asks for {name:?}, which is not known")]
    Extension {
        /// Name of the extension.
        name: String,
    },
    /// A block of addresses.
    #[error("address block: {0}")]
    Address(#[from] InvalidAddress),
    /// A port.
    #[error("port {port} is more than 65535")]
    Port {
        /// The port as given.
        port: u32,
    },
    /// A text to match that says nothing.
    #[error("a match of a name is empty")]
    EmptyMatch,
    /// A service account without name or namespace.
    #[error("a service account to match has no name or no namespace")]
    ServiceAccount,
    /// An enumeration value that this version does not know.
    #[error("{field} has the unknown value {value}")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// The number on the wire.
        value: i32,
    },
}

/// The key of a policy, `<namespace>/<name>`.
pub(crate) fn policy_key(namespace: &str, name: &str) -> Arc<str> {
    format!("{namespace}/{name}").into()
}

fn each<'a, W, T>(
    wire: &'a [W],
    convert: impl Fn(&'a W) -> Result<T, InvalidAuthorization>,
) -> Result<Box<[T]>, InvalidAuthorization> {
    wire.iter().map(convert).collect()
}

fn field<'a, W, T>(
    any: &'a [W],
    none: &'a [W],
    convert: impl Fn(&'a W) -> Result<T, InvalidAuthorization>,
) -> Result<Field<T>, InvalidAuthorization> {
    Ok(Field { any: each(any, &convert)?, none: each(none, &convert)? })
}

fn no_extensions(extensions: &[mesh_proto::workload::Extension]) -> Result<(), InvalidAuthorization> {
    let unknown = |extension: &mesh_proto::workload::Extension| {
        Err(InvalidAuthorization::Extension { name: extension.name.clone() })
    };
    extensions.first().map_or(Ok(()), unknown)
}

fn text(wire: &wire::StringMatch) -> Result<TextMatch, InvalidAuthorization> {
    use wire::string_match::MatchType;
    match &wire.match_type {
        None => Err(InvalidAuthorization::EmptyMatch),
        Some(MatchType::Exact(text)) => Ok(TextMatch::Exact(text.as_str().into())),
        Some(MatchType::Prefix(text)) => Ok(TextMatch::Prefix(text.as_str().into())),
        Some(MatchType::Suffix(text)) => Ok(TextMatch::Suffix(text.as_str().into())),
        Some(MatchType::Presence(())) => Ok(TextMatch::Presence),
    }
}

/// Principals are compared without the scheme, on both sides.
fn principal(wire: &wire::StringMatch) -> Result<TextMatch, InvalidAuthorization> {
    let bare = |text: Box<str>| text.strip_prefix(SCHEME).map_or_else(|| text.clone(), Box::from);
    Ok(match text(wire)? {
        TextMatch::Exact(text) => TextMatch::Exact(bare(text)),
        TextMatch::Prefix(text) => TextMatch::Prefix(bare(text)),
        TextMatch::Suffix(text) => TextMatch::Suffix(text),
        TextMatch::Presence => TextMatch::Presence,
    })
}

fn service_account(wire: &wire::ServiceAccountMatch) -> Result<ServiceAccount, InvalidAuthorization> {
    if wire.namespace.is_empty() || wire.service_account.is_empty() {
        return Err(InvalidAuthorization::ServiceAccount);
    }
    Ok(ServiceAccount { namespace: wire.namespace.as_str().into(), name: wire.service_account.as_str().into() })
}

fn port(port: &u32) -> Result<u16, InvalidAuthorization> {
    u16::try_from(*port).map_err(|_| InvalidAuthorization::Port { port: *port })
}

#[cfg(test)]
mod tests;
