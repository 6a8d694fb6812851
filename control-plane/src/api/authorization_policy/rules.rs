//! The rules of a policy, as they are written and as a node's proxy is sent them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use bytes::Bytes;
use mesh_model::Cidr;
use mesh_proto::security as wire;
use serde::{Deserialize, Serialize};
use wire::string_match::MatchType;

use super::PolicyAction;
use crate::api::check;
use crate::api::problem::Problems;

type List = Option<Vec<String>>;

#[derive(Debug, Deserialize, Serialize)]
pub(in crate::api) struct RuleSpec {
    from: Option<Vec<From>>,
    to: Option<Vec<To>>,
    when: Option<Vec<Condition>>,
}

#[derive(Debug, Deserialize, Serialize)]
struct From {
    source: Option<Source>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Source {
    principals: List,
    not_principals: List,
    request_principals: List,
    not_request_principals: List,
    namespaces: List,
    not_namespaces: List,
    service_accounts: List,
    not_service_accounts: List,
    trust_domains: List,
    not_trust_domains: List,
    ip_blocks: List,
    not_ip_blocks: List,
    remote_ip_blocks: List,
    not_remote_ip_blocks: List,
}

#[derive(Debug, Deserialize, Serialize)]
struct To {
    operation: Option<Operation>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Operation {
    hosts: List,
    not_hosts: List,
    ports: List,
    not_ports: List,
    methods: List,
    not_methods: List,
    paths: List,
    not_paths: List,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    key: String,
    values: List,
    not_values: List,
}

/// Keys of conditions that only a waypoint can see; those that end in `[` or `.` go on.
const BEYOND_L4: [&str; 9] = [
    "request.headers[",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[",
    "remote.ip",
    "connection.sni",
    "source.trustDomain",
    "experimental.envoy.filters.",
];

/// What is wrong with a value, and what makes it right.
type Wrong = (String, &'static str);

/// Translates the rules of a policy of `namespace`. Adds to `beyond_l4` the attributes that a node's proxy cannot see.
pub(super) fn read(
    namespace: &str,
    action: PolicyAction,
    specs: Option<&[RuleSpec]>,
    beyond_l4: &mut BTreeSet<String>,
    problems: &mut Problems,
) -> Vec<wire::Rule> {
    let mut rules = Vec::new();
    for (index, spec) in specs.unwrap_or_default().iter().enumerate() {
        let mut reader = Reader { namespace, beyond_l4: BTreeSet::new(), problems };
        let clauses = reader.clauses(&format!("spec.rules[{index}]"), spec);
        // What asks for more than can be seen does not let anything through.
        if action != PolicyAction::Allow || reader.beyond_l4.is_empty() {
            rules.push(wire::Rule { clauses });
        }
        beyond_l4.append(&mut reader.beyond_l4);
    }
    rules
}

struct Reader<'a> {
    namespace: &'a str,
    beyond_l4: BTreeSet<String>,
    problems: &'a mut Problems,
}

impl Reader<'_> {
    /// All must hold.
    fn clauses(&mut self, field: &str, spec: &RuleSpec) -> Vec<wire::Clause> {
        let mut clauses = Vec::new();
        for (name, is_empty) in [
            ("from", spec.from.as_ref().is_some_and(Vec::is_empty)),
            ("to", spec.to.as_ref().is_some_and(Vec::is_empty)),
        ] {
            if is_empty {
                self.problems.add(format!("{field}.{name}"), "is empty", "leave the field out if all are meant");
            }
        }
        let sources = spec.from.iter().flatten().enumerate();
        clauses.extend(clause(
            sources.map(|(at, from)| self.source(&format!("{field}.from[{at}].source"), from)).collect(),
        ));
        let operations = spec.to.iter().flatten().enumerate();
        clauses.extend(clause(
            operations.map(|(at, to)| self.operation(&format!("{field}.to[{at}].operation"), to)).collect(),
        ));
        for (at, condition) in spec.when.iter().flatten().enumerate() {
            clauses.extend(clause(vec![self.condition(&format!("{field}.when[{at}]"), condition)]));
        }
        clauses
    }

    fn source(&mut self, field: &str, from: &From) -> wire::Match {
        let Some(source) = &from.source else {
            self.problems.add(field, "is missing", "say who is meant");
            return wire::Match::default();
        };
        let all = [
            ("principals", &source.principals, &source.not_principals),
            ("namespaces", &source.namespaces, &source.not_namespaces),
            ("serviceAccounts", &source.service_accounts, &source.not_service_accounts),
            ("ipBlocks", &source.ip_blocks, &source.not_ip_blocks),
            ("requestPrincipals", &source.request_principals, &source.not_request_principals),
            ("remoteIpBlocks", &source.remote_ip_blocks, &source.not_remote_ip_blocks),
            ("trustDomains", &source.trust_domains, &source.not_trust_domains),
        ];
        self.check_lists(field, &all);
        self.note_beyond_l4(&all[4..]);
        if has(&source.service_accounts) && (has(&source.principals) || has(&source.namespaces)) {
            self.problems.add(
                format!("{field}.serviceAccounts"),
                "stands beside principals or namespaces, which say the same less exactly",
                "keep serviceAccounts alone, or leave it out",
            );
        }
        let namespace = self.namespace;
        let account = |text: &str| account(namespace, text);
        wire::Match {
            principals: self.each(field, "principals", &source.principals, principal),
            not_principals: self.each(field, "notPrincipals", &source.not_principals, principal),
            namespaces: self.each(field, "namespaces", &source.namespaces, text),
            not_namespaces: self.each(field, "notNamespaces", &source.not_namespaces, text),
            service_accounts: self.each(field, "serviceAccounts", &source.service_accounts, account),
            not_service_accounts: self.each(field, "notServiceAccounts", &source.not_service_accounts, account),
            source_ips: self.each(field, "ipBlocks", &source.ip_blocks, block),
            not_source_ips: self.each(field, "notIpBlocks", &source.not_ip_blocks, block),
            ..Default::default()
        }
    }

    fn operation(&mut self, field: &str, to: &To) -> wire::Match {
        let Some(operation) = &to.operation else {
            self.problems.add(field, "is missing", "say what is meant");
            return wire::Match::default();
        };
        let all = [
            ("ports", &operation.ports, &operation.not_ports),
            ("hosts", &operation.hosts, &operation.not_hosts),
            ("methods", &operation.methods, &operation.not_methods),
            ("paths", &operation.paths, &operation.not_paths),
        ];
        self.check_lists(field, &all);
        self.note_beyond_l4(&all[1..]);
        wire::Match {
            destination_ports: self.each(field, "ports", &operation.ports, port),
            not_destination_ports: self.each(field, "notPorts", &operation.not_ports, port),
            ..Default::default()
        }
    }

    fn condition(&mut self, field: &str, condition: &Condition) -> wire::Match {
        let (any, none) = (&condition.values, &condition.not_values);
        if !has(any) && !has(none) {
            self.problems.add(field, "has neither values nor notValues", "add what is meant");
        }
        self.check_lists(field, &[("values", any, none)]);
        let namespace = self.namespace;
        let account = |text: &str| account(namespace, text);
        let (any_name, none_name) = ("values", "notValues");
        let mut found = wire::Match::default();
        match condition.key.as_str() {
            "source.principal" => {
                found.principals = self.each(field, any_name, any, principal);
                found.not_principals = self.each(field, none_name, none, principal);
            }
            "source.namespace" => {
                found.namespaces = self.each(field, any_name, any, text);
                found.not_namespaces = self.each(field, none_name, none, text);
            }
            "source.serviceAccount" => {
                found.service_accounts = self.each(field, any_name, any, account);
                found.not_service_accounts = self.each(field, none_name, none, account);
            }
            "source.ip" => {
                found.source_ips = self.each(field, any_name, any, block);
                found.not_source_ips = self.each(field, none_name, none, block);
            }
            "destination.ip" => {
                found.destination_ips = self.each(field, any_name, any, block);
                found.not_destination_ips = self.each(field, none_name, none, block);
            }
            "destination.port" => {
                found.destination_ports = self.each(field, any_name, any, port);
                found.not_destination_ports = self.each(field, none_name, none, port);
            }
            key if is_beyond_l4(key) => {
                self.beyond_l4.insert(key.to_owned());
            }
            key => self.problems.add(
                format!("{field}.key"),
                format!("{key:?} is not an attribute"),
                "use source.ip, source.namespace, source.principal, source.serviceAccount, destination.ip or \
                 destination.port",
            ),
        }
        found
    }

    /// Notes the attributes that are asked for in any of `lists`.
    fn note_beyond_l4(&mut self, lists: &[(&str, &List, &List)]) {
        for (name, any, none) in lists {
            if has(any) {
                self.beyond_l4.insert((*name).to_owned());
            }
            if has(none) {
                self.beyond_l4.insert(negated(name));
            }
        }
    }

    /// At least one list must say something, and none may be empty that names what is meant: it would mean all, or nothing.
    fn check_lists(&mut self, field: &str, lists: &[(&str, &List, &List)]) {
        if !lists.iter().any(|(_, any, none)| has(any) || has(none)) {
            self.problems.add(field, "says nothing", "leave it out if all are meant");
        }
        for (name, any, _) in lists {
            if any.as_ref().is_some_and(Vec::is_empty) {
                self.problems.add(format!("{field}.{name}"), "is empty", "leave the field out if all are meant");
            }
        }
        for (name, any, none) in lists {
            for (name, list) in [((*name).to_owned(), any), (negated(name), none)] {
                if list.iter().flatten().any(String::is_empty) {
                    self.problems.add(format!("{field}.{name}"), "holds an empty text", "remove it");
                }
            }
        }
    }

    fn each<T>(&mut self, field: &str, name: &str, list: &List, read: impl Fn(&str) -> Result<T, Wrong>) -> Vec<T> {
        let mut found = Vec::new();
        for (at, text) in list.iter().flatten().enumerate() {
            match read(text) {
                Ok(item) => found.push(item),
                Err((message, fix)) => self.problems.add(format!("{field}.{name}[{at}]"), message, fix),
            }
        }
        found
    }
}

fn has(list: &List) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
}

/// `ports` to `notPorts`.
fn negated(name: &str) -> String {
    if name == "values" {
        return "notValues".to_owned();
    }
    let mut letters = name.chars();
    let first = letters.next().map(|first| first.to_ascii_uppercase());
    ["not".to_owned(), first.into_iter().chain(letters).collect()].concat()
}

fn is_beyond_l4(key: &str) -> bool {
    BEYOND_L4.iter().any(|known| if known.ends_with(['[', '.']) { key.starts_with(known) } else { key == *known })
}

/// One of `matches` must hold. None where one of them always does, because nothing is left of it that can be seen here.
fn clause(matches: Vec<wire::Match>) -> Option<wire::Clause> {
    let always = matches.is_empty() || matches.contains(&wire::Match::default());
    (!always).then_some(wire::Clause { matches })
}

/// `*` for whatever is there, `x*` and `*x` for beginnings and ends, else the text itself.
fn text(text: &str) -> Result<wire::StringMatch, Wrong> {
    let kind = match (text, text.strip_prefix('*'), text.strip_suffix('*')) {
        ("*", ..) => MatchType::Presence(()),
        (_, Some(end), _) => MatchType::Suffix(end.to_owned()),
        (_, _, Some(beginning)) => MatchType::Prefix(beginning.to_owned()),
        (whole, None, None) => MatchType::Exact(whole.to_owned()),
    };
    let left = match &kind {
        MatchType::Presence(()) => "",
        MatchType::Exact(left) | MatchType::Prefix(left) | MatchType::Suffix(left) => left,
    };
    if left.contains('*') {
        return Err((format!("{text:?} has a * in the middle"), "put one * at the beginning or at the end"));
    }
    Ok(wire::StringMatch { match_type: Some(kind) })
}

/// Identities are compared without their scheme.
fn principal(given: &str) -> Result<wire::StringMatch, Wrong> {
    text(given.strip_prefix("spiffe://").unwrap_or(given))
}

/// `namespace/name`, or a name in the policy's own namespace.
fn account(own: &str, text: &str) -> Result<wire::ServiceAccountMatch, Wrong> {
    let (namespace, name) = text.split_once('/').unwrap_or((own, text));
    if !check::is_dns_label(namespace) || !check::is_dns_subdomain(name) {
        return Err((format!("{text:?} is not a service account"), "write it like namespace/name, without wildcards"));
    }
    Ok(wire::ServiceAccountMatch { namespace: namespace.to_owned(), service_account: name.to_owned() })
}

/// An address, or a block of them.
fn block(text: &str) -> Result<wire::Address, Wrong> {
    let wrong = || (format!("{text:?} is not a block of addresses"), "write it like 10.0.0.0/8, 10.1.2.3 or fd00::/8");
    let block = match text.split_once('/') {
        None => Cidr::host(text.parse::<IpAddr>().map_err(|_| wrong())?),
        Some((address, length)) => {
            // As digits alone: a parser of numbers takes a sign as well.
            let is_number = !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit());
            let length: u32 = length.parse().ok().filter(|_| is_number).ok_or_else(wrong)?;
            Cidr::new(address.parse::<IpAddr>().map_err(|_| wrong())?, length).map_err(|_| wrong())?
        }
    };
    let address = match block.base() {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    };
    Ok(wire::Address { address, length: block.length().into() })
}

fn port(text: &str) -> Result<u32, Wrong> {
    let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let port = text.parse::<u16>().ok().filter(|port| is_number && *port > 0);
    port.map(u32::from).ok_or_else(|| (format!("{text:?} is not a port"), "use 1 to 65535"))
}
