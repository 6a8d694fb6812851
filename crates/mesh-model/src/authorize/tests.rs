use super::*;
use crate::fixture::{exact, ip, pod, policy, rule, snapshot};
use mesh_proto::security as wire;
use prost::Message as _;
use wire::Action::{Allow, Deny};

use crate::snapshot::Change;

fn on_port(port: u32) -> Vec<wire::Rule> {
    vec![rule(wire::Match { destination_ports: vec![port], ..Default::default() })]
}

/// Decides on a connection of `alice` to port 80 of a workload that names `selected`.
fn decide(policies: &[wire::Authorization], selected: &[&str]) -> Result<Allowed, Denied> {
    let mut snapshot = snapshot(&[], &[]);
    policies.iter().for_each(|policy| snapshot.upsert_authorization(policy.try_into().unwrap()));
    decide_in(&snapshot, selected)
}

fn decide_in(snapshot: &Snapshot, selected: &[&str]) -> Result<Allowed, Denied> {
    let mut web = pod("web", &["10.0.0.2"]);
    web.authorization_policies = selected.iter().map(|key| (*key).into()).collect();
    let identity = SpiffeId::new("cluster.local", "shop", "alice").unwrap();
    snapshot.authorize(&ConnectionFacts {
        destination: &Workload::try_from(&web).unwrap(),
        identity: Some(&identity),
        source_ip: ip("10.0.0.1"),
        destination_ip: ip("10.0.0.2"),
        destination_port: 80,
    })
}

fn allowed_by(decision: Result<Allowed, Denied>) -> Option<String> {
    decision.unwrap().policy.map(|policy| policy.to_string())
}

#[test]
fn deny_goes_before_allow_and_nothing_means_allowed() {
    assert_eq!(allowed_by(decide(&[], &[])), None);
    assert_eq!(allowed_by(decide(&[policy("a", Allow, on_port(80))], &[])), Some("shop/a".into()));
    // A DENY that does not match says nothing, and is no ALLOW.
    assert_eq!(allowed_by(decide(&[policy("d", Deny, on_port(81))], &[])), None);
    let both = [policy("a", Allow, on_port(80)), policy("d", Deny, on_port(80))];
    let denied = decide(&both, &[]).unwrap_err();
    assert_eq!(denied.reason, DenyReason::DenyMatched { policy: "shop/d".into() });
    let missed = [policy("a", Allow, on_port(81)), policy("b", Allow, vec![])];
    let denied = decide(&missed, &[]).unwrap_err();
    assert_eq!(denied.reason, DenyReason::NoAllowMatched { policy: "shop/a".into(), count: 2 });
    // One ALLOW that matches is enough.
    let one = [policy("a", Allow, on_port(81)), policy("b", Allow, on_port(80))];
    assert_eq!(allowed_by(decide(&one, &[])), Some("shop/b".into()));
}

#[test]
fn strict_peer_authentication_denies_plaintext() {
    let presence = wire::StringMatch { match_type: Some(wire::string_match::MatchType::Presence(())) };
    let strict = rule(wire::Match { not_principals: vec![presence], ..Default::default() });
    let mut snapshot = Snapshot::new();
    snapshot.upsert_authorization((&policy("istio_converted_static_strict", Deny, vec![strict])).try_into().unwrap());
    assert_eq!(allowed_by(decide_in(&snapshot, &[])), None);
    let destination = Workload::try_from(&pod("web", &["10.0.0.2"])).unwrap();
    let plaintext = ConnectionFacts {
        destination: &destination,
        identity: None,
        source_ip: ip("10.0.0.1"),
        destination_ip: ip("10.0.0.2"),
        destination_port: 80,
    };
    assert_eq!(&**snapshot.authorize(&plaintext).unwrap_err().policy(), "shop/istio_converted_static_strict");
}

#[test]
fn scopes() {
    let scoped = |scope: wire::Scope, namespace: &str| wire::Authorization {
        scope: scope.into(),
        namespace: namespace.into(),
        ..policy("d", Deny, on_port(80))
    };
    use wire::Scope::{Global, Namespace, WorkloadSelector};
    let cases = [
        (Global, "root", &[][..], true),
        (Namespace, "shop", &[], true),
        (Namespace, "root", &[], false),
        // Named is named, whatever the scope.
        (Namespace, "root", &["root/d"], true),
        (WorkloadSelector, "shop", &[], false),
        (WorkloadSelector, "shop", &["shop/d"], true),
        (WorkloadSelector, "root", &["root/d"], true),
    ];
    for (scope, namespace, selected, denies) in cases {
        let decision = decide(&[scoped(scope, namespace)], selected);
        assert_eq!(decision.is_err(), denies, "{scope:?} {namespace} {selected:?}");
    }
}

#[test]
fn each_policy_counts_once() {
    let global = wire::Authorization { scope: wire::Scope::Global.into(), ..policy("g", Allow, on_port(81)) };
    let denied = decide(&[global, policy("n", Allow, on_port(81))], &["shop/g", "shop/n"]).unwrap_err();
    assert_eq!(denied.reason, DenyReason::NoAllowMatched { policy: "shop/g".into(), count: 2 });
}

#[test]
fn what_was_not_received_or_not_understood_denies() {
    let allow = policy("a", Allow, on_port(80));
    let denied = decide(std::slice::from_ref(&allow), &["shop/later"]).unwrap_err();
    assert_eq!(denied.reason, DenyReason::NotReceived { policy: "shop/later".into() });
    assert_eq!(denied.to_string(), "policy not received: shop/later");

    let mut snapshot = Snapshot::new();
    snapshot.upsert_authorization((&allow).try_into().unwrap());
    snapshot.upsert_invalid_authorization("shop", "broken", Scope::WorkloadSelector);
    assert!(decide_in(&snapshot, &[]).is_ok());
    let denied = decide_in(&snapshot, &["shop/broken"]).unwrap_err();
    assert_eq!(denied.reason, DenyReason::Invalid { policy: "shop/broken".into() });
    snapshot.upsert_invalid_authorization("shop", "broken", Scope::Namespace);
    assert!(decide_in(&snapshot, &[]).is_err());
    snapshot.upsert_invalid_authorization("elsewhere", "broken", Scope::Namespace);
    snapshot.upsert_authorization((&policy("broken", Allow, on_port(80))).try_into().unwrap());
    assert!(decide_in(&snapshot, &[]).is_ok(), "a good version ends it");
    snapshot.upsert_invalid_authorization("root", "broken", Scope::Global);
    assert!(decide_in(&snapshot, &[]).is_err());
    snapshot.remove_authorization("root/broken");
    assert!(decide_in(&snapshot, &[]).is_ok());
}

#[test]
fn dry_run_is_noted_only() {
    let dry = |policy| wire::Authorization { dry_run: true, ..policy };
    let policies = [dry(policy("d", Deny, on_port(80))), dry(policy("e", Allow, on_port(81)))];
    let allowed = decide(&policies, &[]).unwrap();
    assert_eq!(allowed.policy, None);
    let noted = |policy: &str, action, matched| Noted { policy: policy.into(), action, matched };
    assert_eq!(allowed.noted, [noted("shop/d", Action::Deny, true), noted("shop/e", Action::Allow, false)]);
}

#[test]
fn bodies_that_cannot_be_taken_deny_where_they_apply() {
    let applied = |name: &str, body: &[u8]| {
        let mut snapshot = Snapshot::new();
        let (change, error) = Change::authorization(name, body);
        snapshot.apply(change);
        (decide_in(&snapshot, &[]), error)
    };
    let port = |port, change: fn(&mut wire::Authorization)| {
        let mut wire = policy("p", Allow, on_port(port));
        change(&mut wire);
        wire.encode_to_vec()
    };
    let (decision, error) = applied("shop/p", &port(80, |_| {}));
    assert!(decision.is_ok() && error.is_none());
    let (decision, error) = applied("shop/p", &port(65616, |_| {}));
    assert!(decision.is_err() && error.is_some(), "port 65616 is not port 80");
    let (decision, error) = applied("shop/p", &port(80, |p| p.scope = 9));
    assert!(decision.is_err() && error.is_some(), "a scope of the future may be wider");
    let (decision, error) = applied("elsewhere/p", &port(65616, |_| {}));
    assert!(decision.is_ok() && error.is_some(), "denies in its own namespace only");
    let (decision, error) = applied("shop/p", &port(65616, |p| p.dry_run = true));
    assert!(decision.is_ok() && error.is_some(), "is not enforced anyway");
    let mut snapshot = Snapshot::new();
    snapshot.apply(Change::authorization("shop/p", &port(65616, |p| p.dry_run = true)).0);
    assert!(decide_in(&snapshot, &["shop/p"]).is_ok(), "nor for a workload that names it");
    let (decision, error) = applied("shop/p", b"\xff\xff\xff");
    assert!(decision.is_err() && error.is_some());
    let (decision, error) = applied("nonsense", b"\xff\xff\xff");
    assert!(decision.is_err() && error.is_some());
}

#[test]
fn a_policy_that_denies_is_told_before_one_that_is_not_here() {
    let policies = [wire::Authorization { scope: 2, ..policy("z", Deny, on_port(80)) }];
    let denied = decide(&policies, &["shop/absent", "shop/z"]).unwrap_err();
    assert_eq!(denied.reason, DenyReason::DenyMatched { policy: "shop/z".into() });
    let denied = decide(&policies, &["shop/absent"]).unwrap_err();
    assert_eq!(denied.reason, DenyReason::NotReceived { policy: "shop/absent".into() });
}

#[test]
fn names_of_identities_are_compared_whole() {
    let principals = vec![exact("cluster.local/ns/shop/sa/alic")];
    let rules = vec![rule(wire::Match { principals, ..Default::default() })];
    assert!(decide(&[policy("a", Allow, rules)], &[]).is_err());
}
