use super::*;
use crate::fixture::{block, exact, ip, pod, policy, rule};
use crate::workload::Workload;
use wire::string_match::MatchType;

fn text(kind: MatchType) -> wire::StringMatch {
    wire::StringMatch { match_type: Some(kind) }
}

/// Whether a policy of these rules matches a connection of `identity` from 10.0.0.1 to 10.0.0.2:80.
fn matches(rules: Vec<wire::Rule>, identity: Option<&str>) -> bool {
    let destination = Workload::try_from(&pod("web", &["10.0.0.2"])).unwrap();
    let identity = identity.map(|id| id.parse().unwrap());
    let facts = ConnectionFacts {
        destination: &destination,
        identity: identity.as_ref(),
        source_ip: ip("10.0.0.1"),
        destination_ip: ip("10.0.0.2"),
        destination_port: 80,
    };
    let policy = Authorization::try_from(&policy("p", wire::Action::Allow, rules)).unwrap();
    match policy.judge(&facts) {
        Verdict::Rules { matched, .. } => matched,
        Verdict::Invalid => panic!("invalid"),
    }
}

const ALICE: Option<&str> = Some("spiffe://cluster.local/ns/shop/sa/alice");
const BOB: Option<&str> = Some("spiffe://cluster.local/ns/pub/sa/bob");

#[test]
fn what_is_empty() {
    let empty_clause = wire::Rule { clauses: vec![wire::Clause::default()] };
    assert!(!matches(vec![], ALICE), "a policy without rules never matches");
    assert!(matches(vec![wire::Rule::default()], None), "a rule without clauses always matches");
    assert!(matches(vec![empty_clause], None), "a clause without matches always holds");
    assert!(!matches(vec![rule(wire::Match::default())], ALICE), "a match without fields never holds");
}

#[test]
fn rules_or_clauses_and_matches_or() {
    let clause = |ports: &[u32]| wire::Clause {
        matches: ports
            .iter()
            .map(|port| wire::Match { destination_ports: vec![*port], ..Default::default() })
            .collect(),
    };
    let rule = |clauses: &[&[u32]]| wire::Rule { clauses: clauses.iter().map(|ports| clause(ports)).collect() };
    assert!(matches(vec![rule(&[&[81]]), rule(&[&[80]])], None));
    assert!(!matches(vec![rule(&[&[80], &[81]])], None));
    assert!(matches(vec![rule(&[&[80], &[81, 80]])], None));
}

#[test]
fn fields() {
    type Case = (&'static str, fn(&mut wire::Match), [bool; 3]);
    // For alice, for bob, for plaintext.
    let cases: [Case; 23] = [
        ("namespace", |m| m.namespaces = vec![exact("shop")], [true, false, false]),
        ("namespaces or", |m| m.namespaces = vec![exact("shop"), exact("pub")], [true, true, false]),
        ("not namespace", |m| m.not_namespaces = vec![exact("shop")], [false, true, true]),
        ("namespace prefix", |m| m.namespaces = vec![text(MatchType::Prefix("sh".into()))], [true, false, false]),
        ("namespace suffix", |m| m.namespaces = vec![text(MatchType::Suffix("ub".into()))], [false, true, false]),
        ("principal", |m| m.principals = vec![exact("cluster.local/ns/shop/sa/alice")], [true, false, false]),
        ("principal URI", |m| m.principals = vec![exact("spiffe://cluster.local/ns/pub/sa/bob")], [false, true, false]),
        (
            "principal prefix",
            |m| m.principals = vec![text(MatchType::Prefix("cluster.local/ns/".into()))],
            [true, true, false],
        ),
        (
            "principal URI prefix",
            |m| m.principals = vec![text(MatchType::Prefix("spiffe://cluster.local/ns/shop/".into()))],
            [true, false, false],
        ),
        ("principal suffix", |m| m.principals = vec![text(MatchType::Suffix("/sa/bob".into()))], [false, true, false]),
        ("principal present", |m| m.principals = vec![text(MatchType::Presence(()))], [true, true, false]),
        ("principal absent", |m| m.not_principals = vec![text(MatchType::Presence(()))], [false, false, true]),
        ("account", |m| m.service_accounts = vec![account("shop", "alice")], [true, false, false]),
        ("account elsewhere", |m| m.service_accounts = vec![account("pub", "alice")], [false, false, false]),
        ("not account", |m| m.not_service_accounts = vec![account("shop", "alice")], [false, true, true]),
        ("source", |m| m.source_ips = vec![block("10.0.0.0", 31)], [true; 3]),
        ("not source", |m| m.not_source_ips = vec![block("10.0.0.0", 31)], [false; 3]),
        ("destination", |m| m.destination_ips = vec![block("10.0.0.3", 32), block("10.0.0.2", 32)], [true; 3]),
        ("not destination", |m| m.not_destination_ips = vec![block("10.0.0.3", 32)], [true; 3]),
        ("other family", |m| m.source_ips = vec![block("::", 0)], [false; 3]),
        ("port", |m| m.destination_ports = vec![15008, 80], [true; 3]),
        ("not port", |m| m.not_destination_ports = vec![80], [false; 3]),
        (
            "fields and",
            |m| {
                m.destination_ports = vec![80];
                m.namespaces = vec![exact("pub")];
            },
            [false, true, false],
        ),
    ];
    for (name, change, expected) in cases {
        let mut one = wire::Match::default();
        change(&mut one);
        let got = [ALICE, BOB, None].map(|identity| matches(vec![rule(one.clone())], identity));
        assert_eq!(got, expected, "{name}");
    }
}

fn account(namespace: &str, name: &str) -> wire::ServiceAccountMatch {
    wire::ServiceAccountMatch { namespace: namespace.into(), service_account: name.into() }
}

#[test]
fn what_cannot_be_understood_is_refused() {
    let extension = mesh_proto::workload::Extension { name: "future".into(), config: None };
    let refused = |change: &dyn Fn(&mut wire::Match)| {
        let mut one = wire::Match { destination_ports: vec![80], ..Default::default() };
        change(&mut one);
        Authorization::try_from(&policy("p", wire::Action::Deny, vec![rule(one)])).unwrap_err()
    };
    assert_eq!(refused(&|m| m.destination_ports = vec![65536]), InvalidAuthorization::Port { port: 65536 });
    assert_eq!(refused(&|m| m.not_destination_ports = vec![65616]), InvalidAuthorization::Port { port: 65616 });
    assert!(matches!(refused(&|m| m.source_ips = vec![block("10.0.0.0", 33)]), InvalidAuthorization::Address(_)));
    let short = wire::Address { address: vec![10, 0].into(), length: 8 };
    assert!(matches!(refused(&|m| m.destination_ips = vec![short.clone()]), InvalidAuthorization::Address(_)));
    let blank = wire::StringMatch { match_type: None };
    assert_eq!(refused(&|m| m.principals = vec![blank.clone()]), InvalidAuthorization::EmptyMatch);
    assert_eq!(refused(&|m| m.service_accounts = vec![account("", "a")]), InvalidAuthorization::ServiceAccount);
    let unknown = InvalidAuthorization::Extension { name: "future".into() };
    assert_eq!(refused(&|m| m.extensions = vec![extension.clone()]), unknown);

    let whole = |change: &dyn Fn(&mut wire::Authorization)| {
        let mut wire = policy("p", wire::Action::Deny, vec![]);
        change(&mut wire);
        Authorization::try_from(&wire).unwrap_err()
    };
    assert_eq!(whole(&|p| p.extensions = vec![extension.clone()]), unknown);
    assert_eq!(whole(&|p| p.name.clear()), InvalidAuthorization::Unnamed);
    assert_eq!(whole(&|p| p.namespace.clear()), InvalidAuthorization::Unnamed);
    assert_eq!(whole(&|p| p.scope = 3), InvalidAuthorization::Unknown { field: "scope", value: 3 });
    assert_eq!(whole(&|p| p.action = 2), InvalidAuthorization::Unknown { field: "action", value: 2 });
}
