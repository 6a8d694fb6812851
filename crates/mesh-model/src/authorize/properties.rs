//! Whatever the policies are, the decision is that of a reference that reads the wire's messages word by word.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use wire::string_match::MatchType;

use super::*;
use crate::fixture::{block, ip, pod};
use mesh_proto::security as wire;

const NAMESPACES: [&str; 2] = ["shop", "pub"];
const NAMES: [&str; 5] = ["p0", "p1", "p2", "p3", "p4"];

fn text() -> impl Strategy<Value = wire::StringMatch> {
    let word = prop::sample::select(vec!["", "shop", "pub", "sh", "op", "td/ns/shop/sa/a", "td/ns/", "/sa/b", "a"]);
    (0..4, word).prop_map(|(kind, word)| {
        let word = word.to_owned();
        wire::StringMatch {
            match_type: Some(match kind {
                0 => MatchType::Exact(word),
                1 => MatchType::Prefix(word),
                2 => MatchType::Suffix(word),
                _ => MatchType::Presence(()),
            }),
        }
    })
}

fn account() -> impl Strategy<Value = wire::ServiceAccountMatch> {
    (prop::sample::select(&NAMESPACES[..]), prop::sample::select(vec!["a", "b"])).prop_map(|(namespace, account)| {
        wire::ServiceAccountMatch { namespace: namespace.into(), service_account: account.into() }
    })
}

fn address() -> impl Strategy<Value = wire::Address> {
    prop::sample::select(vec![("10.0.0.1", 32), ("10.0.0.2", 32), ("10.0.0.0", 8), ("0.0.0.0", 0), ("::", 0)])
        .prop_map(|(base, length)| block(base, length))
}

/// Most lists are empty, as in life, or everything would fail on some field.
fn few<T: std::fmt::Debug>(item: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
    prop::option::weighted(0.15, vec(item, 1..3)).prop_map(Option::unwrap_or_default)
}

fn one_match() -> impl Strategy<Value = wire::Match> {
    let port = || prop::sample::select(vec![80_u32, 81]);
    (
        (few(text()), few(text()), few(account()), few(account()), few(text()), few(text())),
        (few(address()), few(address()), few(address()), few(address()), few(port()), few(port())),
    )
        .prop_map(|(who, place)| wire::Match {
            namespaces: who.0,
            not_namespaces: who.1,
            service_accounts: who.2,
            not_service_accounts: who.3,
            principals: who.4,
            not_principals: who.5,
            source_ips: place.0,
            not_source_ips: place.1,
            destination_ips: place.2,
            not_destination_ips: place.3,
            destination_ports: place.4,
            not_destination_ports: place.5,
            extensions: vec![],
        })
}

fn policy() -> impl Strategy<Value = wire::Authorization> {
    let clause = vec(one_match(), 0..3).prop_map(|matches| wire::Clause { matches });
    let rule = vec(clause, 0..3).prop_map(|clauses| wire::Rule { clauses });
    let name = (prop::sample::select(&NAMES[..]), prop::sample::select(&NAMESPACES[..]));
    (name, 0..3_i32, 0..2_i32, vec(rule, 0..3), prop::bool::weighted(0.2)).prop_map(
        |((name, namespace), scope, action, rules, dry_run)| wire::Authorization {
            name: name.into(),
            namespace: namespace.into(),
            scope,
            action,
            rules,
            dry_run,
            extensions: vec![],
        },
    )
}

/// A connection to port 80 of a workload of namespace `shop` that names some policies.
#[derive(Debug)]
struct Reference<'a> {
    policies: &'a BTreeMap<String, wire::Authorization>,
    named: &'a [String],
    identity: Option<(&'a str, &'a str)>,
}

impl Reference<'_> {
    fn allows(&self) -> bool {
        let applies = |key: &&String| {
            let policy = &self.policies[*key];
            policy.scope == 0 || (policy.scope == 1 && policy.namespace == "shop") || self.named.contains(key)
        };
        let enforced = self.policies.keys().filter(applies).map(|key| &self.policies[key]).filter(|p| !p.dry_run);
        let (denies, allows): (Vec<_>, Vec<_>) = enforced.partition(|policy| policy.action == 1);
        self.named.iter().all(|key| self.policies.contains_key(key))
            && !denies.iter().any(|policy| self.matches(policy))
            && (allows.is_empty() || allows.iter().any(|policy| self.matches(policy)))
    }

    fn matches(&self, policy: &wire::Authorization) -> bool {
        policy.rules.iter().any(|rule| {
            rule.clauses.iter().all(|clause| clause.matches.is_empty() || clause.matches.iter().any(|m| self.fields(m)))
        })
    }

    fn fields(&self, m: &wire::Match) -> bool {
        if *m == wire::Match::default() {
            return false;
        }
        let text = |value: Option<String>| {
            move |one: &wire::StringMatch| match (&value, one.match_type.as_ref().unwrap()) {
                (None, _) => false,
                (Some(value), MatchType::Exact(text)) => value == text,
                (Some(value), MatchType::Prefix(text)) => value.starts_with(text.as_str()),
                (Some(value), MatchType::Suffix(text)) => value.ends_with(text.as_str()),
                (Some(_), MatchType::Presence(())) => true,
            }
        };
        let namespace = text(self.identity.map(|(namespace, _)| namespace.to_owned()));
        let principal = text(self.identity.map(|(namespace, account)| format!("td/ns/{namespace}/sa/{account}")));
        let account = |one: &wire::ServiceAccountMatch| {
            self.identity.is_some_and(|id| id == (one.namespace.as_str(), one.service_account.as_str()))
        };
        let inside = |last: u8| {
            move |one: &wire::Address| match (&one.address[..], one.length) {
                ([_, _, _, _], 0 | 8) => true,
                ([.., end], 32) => *end == last,
                _ => false,
            }
        };
        let port = |one: &u32| *one == 80;
        both(&m.namespaces, &m.not_namespaces, namespace)
            && both(&m.service_accounts, &m.not_service_accounts, account)
            && both(&m.principals, &m.not_principals, principal)
            && both(&m.source_ips, &m.not_source_ips, inside(1))
            && both(&m.destination_ips, &m.not_destination_ips, inside(2))
            && both(&m.destination_ports, &m.not_destination_ports, port)
    }
}

fn both<T>(any: &[T], none: &[T], matches: impl Fn(&T) -> bool) -> bool {
    (any.is_empty() || any.iter().any(&matches)) && none.iter().all(|one| !matches(one))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn decisions_are_those_of_the_reference(
        policies in vec(policy(), 0..5),
        named in vec((prop::sample::select(&NAMES[..]), prop::sample::select(&NAMESPACES[..])), 0..2),
        who in prop::sample::select(vec![None, Some(("shop", "a")), Some(("pub", "b"))]),
    ) {
        let mut snapshot = Snapshot::new();
        let mut by_key = BTreeMap::new();
        for policy in policies {
            snapshot.upsert_authorization((&policy).try_into().unwrap());
            by_key.insert(format!("{}/{}", policy.namespace, policy.name), policy);
        }
        let named: Vec<String> = named.iter().map(|(name, namespace)| format!("{namespace}/{name}")).collect();
        let mut web = pod("web", &["10.0.0.2"]);
        web.authorization_policies = named.clone();
        let identity = who.map(|(namespace, account)| SpiffeId::new("td", namespace, account).unwrap());
        let decision = snapshot.authorize(&ConnectionFacts {
            destination: &Workload::try_from(&web).unwrap(),
            identity: identity.as_ref(),
            source_ip: ip("10.0.0.1"),
            destination_ip: ip("10.0.0.2"),
            destination_port: 80,
        });
        let reference = Reference { policies: &by_key, named: &named, identity: who };
        prop_assert_eq!(decision.is_ok(), reference.allows(), "{:?}", decision);
        // The policy that decided is one that applies and really says so.
        match decision.map(|allowed| allowed.policy).map_err(|denied| denied.reason) {
            Ok(None) => {}
            Ok(Some(key)) => prop_assert!(by_key[&*key].action == 0 && reference.matches(&by_key[&*key])),
            Err(DenyReason::DenyMatched { policy: key }) => {
                prop_assert!(by_key[&*key].action == 1 && reference.matches(&by_key[&*key]));
            }
            Err(DenyReason::NoAllowMatched { policy: key, .. }) => {
                prop_assert!(by_key[&*key].action == 0 && !reference.matches(&by_key[&*key]));
            }
            Err(DenyReason::NotReceived { policy }) => prop_assert!(!by_key.contains_key(&*policy)),
            Err(DenyReason::Invalid { policy }) => prop_assert!(false, "{policy} is valid"),
        }
    }
}
