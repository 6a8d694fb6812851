//! What policies decide, asked of the data plane's own decision over the resources that the index makes.

use std::time::Duration;

use mesh_model::{Change, ConnectionFacts, DenyReason, Snapshot, SpiffeId};
use mesh_proto::security as wire;
use prost::Message;

use super::tests::{apply, delete, options, pod, time};
use super::{Event, Index};
use crate::api::{Kind, Outcome, parse, stand_in};

/// A pod `ns/server` with address 10.0.0.1 and the label `app: server`, and whatever else.
pub(super) fn index(text: &str) -> Index {
    let mut index = Index::new(options());
    index.apply(apply(&(pod("server", "10.0.0.1", "app: server", "") + text)), time(0));
    index
}

fn snapshot(index: &Index) -> Snapshot {
    let mut snapshot = Snapshot::new();
    for resource in index.resources() {
        let (change, error) = Change::address(&resource.name, &resource.body);
        assert!(error.is_none(), "{}: {error:?}", resource.name);
        snapshot.apply(change);
    }
    for resource in index.policies() {
        let (change, error) = Change::authorization(&resource.name, &resource.body);
        assert!(error.is_none(), "{}: {error:?}", resource.name);
        snapshot.apply(change);
    }
    snapshot
}

/// Who connects: an identity `namespace/account`, or nobody for plaintext; from which address, to which port.
type Client = (Option<&'static str>, &'static str, u16);

pub(super) fn reason(index: &Index, pod: &str, (who, from, port): Client) -> Option<DenyReason> {
    let snapshot = snapshot(index);
    let identity = who.map(|who| {
        let (namespace, account) = who.split_once('/').unwrap();
        format!("spiffe://cluster.local/ns/{namespace}/sa/{account}").parse::<SpiffeId>().unwrap()
    });
    let workload = snapshot.workload_by_uid(&format!("Kubernetes//Pod/ns/{pod}")).unwrap();
    let facts = ConnectionFacts {
        destination: workload,
        identity: identity.as_ref(),
        source_ip: from.parse().unwrap(),
        destination_ip: workload.addresses[0],
        destination_port: port,
    };
    snapshot.authorize(&facts).err().map(|denied| denied.reason)
}

pub(super) fn may(index: &Index, client: Client) -> bool {
    reason(index, "server", client).is_none()
}

pub(super) fn policy(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\n{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, \
         metadata: {{name: {name}, namespace: {namespace}}}, spec: {{{spec}}}}}\n"
    )
}

pub(super) fn authentication(namespace: &str, name: &str, spec: &str) -> String {
    policy(namespace, name, spec).replace("AuthorizationPolicy", "PeerAuthentication")
}

const FRIEND: Client = (Some("ns/friend"), "10.0.0.2", 80);
const STRANGER: Client = (Some("far/stranger"), "10.9.0.2", 80);
const PLAIN: Client = (None, "10.0.0.2", 80);

/// Whether friend, stranger and plaintext may connect to port 80.
fn who(index: &Index) -> [bool; 3] {
    [FRIEND, STRANGER, PLAIN].map(|client| may(index, client))
}

#[test]
fn what_is_allowed_and_what_is_denied() {
    let by = |spec: &str| who(&index(&policy("ns", "p", spec)));
    // No rules: nothing is allowed, or denied. An empty rule: everything.
    assert_eq!(by(""), [false; 3]);
    assert_eq!(by("action: DENY"), [true; 3]);
    assert_eq!(by("rules: [{}]"), [true; 3]);
    assert_eq!(by("action: DENY, rules: [{}]"), [false; 3]);
    let from = |source: &str| by(&format!("rules: [{{from: [{{source: {{{source}}}}}]}}]"));
    for friend in [
        "principals: [cluster.local/ns/ns/sa/friend]",
        "principals: ['spiffe://cluster.local/ns/ns/sa/friend']",
        "principals: ['*/sa/friend']",
        "principals: ['cluster.local/ns/ns/*']",
        "namespaces: [ns]",
        "namespaces: ['n*']",
        "serviceAccounts: [friend]",
        "serviceAccounts: [ns/friend]",
    ] {
        assert_eq!(from(friend), [true, false, false], "{friend}");
    }
    assert_eq!(from("principals: ['*']"), [true, true, false]);
    assert_eq!(from("serviceAccounts: [stranger]"), [false; 3]);
    assert_eq!(from("notServiceAccounts: [far/stranger]"), [true, false, true]);
    assert_eq!(from("notNamespaces: [far]"), [true, false, true]);
    assert_eq!(from("notPrincipals: ['*']"), [false, false, true]);
    assert_eq!(from("ipBlocks: [10.0.0.0/16]"), [true, false, true]);
    assert_eq!(from("ipBlocks: [10.9.0.2], notIpBlocks: ['10.9.0.0/24', 'fd00::/8']"), [false; 3]);
    assert_eq!(from("notIpBlocks: [10.0.0.0/16]"), [false, true, false]);
    // All of a rule must hold, any of the rules.
    let both = "from: [{source: {namespaces: [ns, far]}}], to: [{operation: {ports: ['80']}}]";
    assert_eq!(
        by(&format!("rules: [{{{both}, when: [{{key: source.ip, values: [10.9.0.0/16]}}]}}]")),
        [false, true, false]
    );
    assert_eq!(by(&format!("rules: [{{{both}}}, {{from: [{{source: {{notPrincipals: ['*']}}}}]}}]")), [true; 3]);
}

#[test]
fn ports_and_conditions() {
    let to = |spec: &str, port| may(&index(&policy("ns", "p", spec)), (FRIEND.0, FRIEND.1, port));
    let operation = "rules: [{to: [{operation: {ports: ['80', '81']}}]}]";
    assert_eq!([to(operation, 80), to(operation, 81), to(operation, 82)], [true, true, false]);
    let operation = "action: DENY, rules: [{to: [{operation: {notPorts: ['80']}}]}]";
    assert_eq!([to(operation, 80), to(operation, 81)], [true, false]);
    let when = |condition: &str| to(&format!("rules: [{{when: [{{{condition}}}]}}]"), 80);
    for (condition, holds) in [
        ("key: destination.port, values: ['80']", true),
        ("key: destination.port, notValues: ['80']", false),
        ("key: destination.ip, values: [10.0.0.0/24]", true),
        ("key: destination.ip, notValues: [10.0.0.1]", false),
        ("key: source.ip, values: [10.0.0.2/32]", true),
        ("key: source.namespace, values: [ns]", true),
        ("key: source.namespace, notValues: [ns]", false),
        ("key: source.principal, values: ['*/friend']", true),
        ("key: source.principal, values: ['*'], notValues: ['*/friend']", false),
        ("key: source.serviceAccount, values: [friend]", true),
        ("key: source.serviceAccount, notValues: [ns/friend]", false),
    ] {
        assert_eq!(when(condition), holds, "{condition}");
    }
}

#[test]
fn what_a_node_proxy_cannot_see_lets_nothing_through() {
    let by = |spec: &str| {
        let index = index(&policy("ns", "p", spec));
        let notes = index.conflicts();
        assert!(notes[0].reason.contains("is not enforceable by the node proxy"), "{notes:?}");
        who(&index)
    };
    let seen = "from: [{source: {principals: ['*/friend']}}]";
    for unseen in [
        "to: [{operation: {methods: [GET]}}]",
        "to: [{operation: {hosts: [a.example], notPaths: [/x], ports: ['80']}}]",
        "when: [{key: 'request.headers[x]', values: [a]}]",
        "when: [{key: request.auth.principal, notValues: [a]}]",
    ] {
        assert_eq!(by(&format!("rules: [{{{seen}, {unseen}}}]")), [false; 3], "{unseen}");
        assert_eq!(by(&format!("action: DENY, rules: [{{{seen}, {unseen}}}]")), [false, true, true], "{unseen}");
    }
    // With nothing left that can be seen, a denial is of everything.
    for unseen in ["to: [{operation: {methods: [GET]}}]", "from: [{source: {requestPrincipals: ['*']}}]"] {
        assert_eq!(by(&format!("action: DENY, rules: [{{{unseen}}}]")), [false; 3]);
    }
    assert_eq!(
        by("action: DENY, rules: [{from: [{source: {remoteIpBlocks: [1.2.3.4], namespaces: [far]}}]}]"),
        [true, false, true]
    );
    // Another rule of the same policy is not touched.
    assert_eq!(by(&format!("rules: [{{{seen}}}, {{to: [{{operation: {{paths: [/]}}}}]}}]")), [true, false, false]);
}

#[test]
fn whom_a_policy_is_for() {
    let nobody = "action: DENY, rules: [{}]";
    let selected = |app: &str| format!("selector: {{matchLabels: {{app: {app}}}}}, {nobody}");
    for (namespace, spec, denies) in [
        ("ns", nobody.to_owned(), true),
        ("ns", format!("selector: {{}}, {nobody}"), true),
        ("other", nobody.to_owned(), false),
        ("root", nobody.to_owned(), true),
        ("ns", selected("server"), true),
        ("ns", selected("other"), false),
        ("other", selected("server"), false),
        ("root", selected("server"), true),
        ("root", selected("other"), false),
    ] {
        let index = index(&policy(namespace, "p", &spec));
        assert_eq!(!may(&index, FRIEND), denies, "{namespace}: {spec}");
    }
    let names = |text: &str| {
        let index = index(text);
        let snapshot = snapshot(&index);
        let workload = snapshot.workload_by_uid("Kubernetes//Pod/ns/server").unwrap();
        workload.authorization_policies.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let all =
        policy("ns", "z", &selected("server")) + &policy("root", "a", &selected("server")) + &policy("ns", "b", nobody);
    assert_eq!(names(&all), ["ns/z", "root/a"]);
}

#[test]
fn a_policy_of_a_waypoint_is_not_the_nodes() {
    let target = "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: gate}]";
    for spec in ["action: DENY, rules: [{}]", "", "action: CUSTOM, provider: {name: ext}, rules: [{}]"] {
        let index = index(&policy("ns", "p", &format!("{target}, {spec}")));
        assert_eq!((who(&index), index.policies().count()), ([true; 3], 0));
        assert_eq!(index.counts()[&Kind::AuthorizationPolicy], 1);
    }
}

#[test]
fn a_dry_run_denies_nothing() {
    let text =
        policy("ns", "p", "").replace("namespace: ns}", "namespace: ns, annotations: {istio.io/dry-run: 'true'}}");
    let index = index(&text);
    assert_eq!((who(&index), index.policies().count()), ([true; 3], 1));
}

/// The events of a manifest in which nothing is valid, with no earlier version.
pub(super) fn unread(text: &str) -> Vec<Event> {
    let event = |outcome| match outcome {
        Outcome::Refused { stand_in, .. } => stand_in.map(Event::Apply),
        other => panic!("accepted: {other:?}"),
    };
    parse(text).into_iter().filter_map(|document| event(document.outcome)).collect()
}

#[test]
fn a_policy_that_cannot_be_read_denies_what_it_may_be_for() {
    let rules = "rules: [{from: [{source: {principal: ['*']}}]}]";
    for (namespace, spec, denies) in [
        ("ns", rules.to_owned(), true),
        ("ns", format!("selector: {{matchLabels: {{app: server}}}}, {rules}"), true),
        ("ns", format!("selector: {{matchLabels: {{app: other}}}}, {rules}"), false),
        ("ns", format!("selector: {{matchLabels: {{app: [other]}}}}, {rules}"), true),
        ("ns", format!("selector: {{matchlabels: {{app: other}}}}, {rules}"), true),
        ("other", rules.to_owned(), false),
        ("root", rules.to_owned(), true),
        ("ns", "action: ALOW".to_owned(), true),
        ("ns", "action: CUSTOM, provider: {name: x}".to_owned(), true),
        ("ns", "rules: many".to_owned(), true),
        // What never denies anything.
        ("ns", "action: AUDIT, rules: [{}]".to_owned(), false),
        ("ns", format!("targetRefs: [{{kind: Gateway, name: gate}}], {rules}"), false),
    ] {
        let mut index = index("");
        index.apply(unread(&policy(namespace, "p", &spec)), time(0));
        assert_eq!(who(&index), [!denies; 3], "{namespace}: {spec}");
        assert!(!denies || index.conflicts()[0].reason.starts_with("is not valid"), "{spec}");
        index.apply(apply(&policy(namespace, "p", "rules: [{}]")), time(0));
        assert_eq!((who(&index), index.conflicts().len()), ([true; 3], 0));
    }
    let bare = serde_json::json!({"spec": "text", "metadata": []});
    for kind in Kind::ALL {
        let id = crate::api::ObjectId { kind, namespace: "ns".into(), name: "a".into() };
        let is_guarded = matches!(
            kind,
            Kind::Namespace | Kind::Service | Kind::Pod | Kind::AuthorizationPolicy | Kind::PeerAuthentication
        );
        assert_eq!(stand_in(&id, &bare).is_some(), is_guarded, "{kind}");
    }
}

#[test]
fn what_no_object_can_be_called_takes_the_name_of_no_other_policy() {
    let spec = "selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}, portLevelMtls: {81: {mode: DISABLE}}";
    let (ports, all) = (authentication("ns", "mine", spec), authentication("ns", "all", "mtls: {mode: STRICT}"));
    for (namespace, name) in [
        ("root", "istio_converted_static_strict"),
        ("ns", "converted_peer_authentication_mine"),
        ("'ns/converted_peer_authentication_mine'", "a"),
        ("ns", "'a/converted_peer_authentication_mine'"),
        ("ns", "Ünlike%5f"),
    ] {
        let mut index = index(&(ports.clone() + &all));
        let mut before: Vec<_> = index.policies().cloned().collect();
        // A dry run of it would open what is closed.
        let events = unread(
            &policy(namespace, name, "rules: [{}]").replace("name:", "annotations: {istio.io/dry-run: 'true'}, name:"),
        );
        let Some(Event::Apply(object)) = events.first() else { panic!("{name} is not stood in for") };
        let id = object.id();
        index.apply(events, time(0));
        assert_eq!(index.policies().count(), before.len() + 1, "{namespace}/{name}");
        assert!(before.iter().all(|policy| index.policies().any(|now| now == policy)), "{namespace}/{name}");
        assert!(!may(&index, PLAIN));
        index.apply([Event::Delete(id)], time(0));
        let mut after: Vec<_> = index.policies().cloned().collect();
        for policies in [&mut before, &mut after] {
            policies.sort_by(|a, b| a.name.cmp(&b.name));
        }
        assert_eq!(before, after, "{namespace}/{name}");
    }
    // Two names are two policies.
    let mut index = index("");
    let texts = [("ns", "'b/c'"), ("'ns/b'", "c"), ("ns", "b_c"), ("ns", "b%5fc")];
    for (namespace, name) in texts {
        index.apply(unread(&policy(namespace, name, "rules: many")), time(0));
    }
    assert_eq!(index.policies().count(), texts.len());
}

#[test]
fn plaintext_is_taken_or_not() {
    const STRICT: &str = "mtls: {mode: STRICT}";
    const PERMISSIVE: &str = "mtls: {mode: PERMISSIVE}";
    const MINE: &str = "selector: {matchLabels: {app: server}}";
    let mine = |rest: &str| format!("{MINE}, {rest}");
    let ports = |text: &str| {
        let index = index(text);
        assert_eq!(who(&index)[..2], [true; 2], "an identity is enough: {text}");
        [80, 81].map(|port| may(&index, (None, "10.0.0.2", port)))
    };
    let (open, strict) = ([true; 2], [false; 2]);
    for (policies, expected) in [
        (vec![("ns", "")], open),
        (vec![("ns", STRICT)], strict),
        (vec![("ns", "mtls: {mode: DISABLE}")], open),
        (vec![("other", STRICT)], open),
        (vec![("root", STRICT)], strict),
        // The nearer one counts, if it says something.
        (vec![("root", STRICT), ("ns", PERMISSIVE)], open),
        (vec![("root", STRICT), ("ns", "mtls: {mode: UNSET}")], strict),
        (vec![("root", PERMISSIVE), ("ns", STRICT)], strict),
        (vec![("ns", STRICT), ("ns", &mine(PERMISSIVE))], open),
        (vec![("ns", STRICT), ("ns", &mine("mtls: {}"))], strict),
        (vec![("ns", PERMISSIVE), ("ns", &mine(STRICT))], strict),
        (vec![("root", &mine(STRICT))], open),
        // Of two as near, the first by name where no time tells.
        (vec![("ns", STRICT), ("ns", PERMISSIVE)], strict),
        (vec![("ns", PERMISSIVE), ("ns", STRICT)], open),
        (vec![("ns", &mine(STRICT)), ("ns", &mine(PERMISSIVE))], strict),
        // Single ports.
        (vec![("ns", &mine("mtls: {mode: STRICT}, portLevelMtls: {'81': {mode: DISABLE}}"))], [false, true]),
        (vec![("ns", &mine("mtls: {mode: STRICT}, portLevelMtls: {81: {mode: STRICT}}"))], strict),
        (vec![("ns", &mine("portLevelMtls: {81: {mode: STRICT}}"))], [true, false]),
        (vec![("root", STRICT), ("ns", &mine("portLevelMtls: {81: {mode: PERMISSIVE}}"))], [false, true]),
        (
            vec![("root", STRICT), ("ns", PERMISSIVE), ("ns", &mine("portLevelMtls: {81: {mode: STRICT}}"))],
            [true, false],
        ),
        (
            vec![("ns", &mine("mtls: {mode: PERMISSIVE}, portLevelMtls: {81: {mode: UNSET}, 80: {mode: STRICT}}"))],
            [false, true],
        ),
    ] {
        let text: String = policies
            .iter()
            .enumerate()
            .map(|(at, (namespace, spec))| authentication(namespace, &format!("p{at}"), spec))
            .collect();
        assert_eq!(ports(&text), expected, "{policies:?}");
    }
}

#[test]
fn the_older_one_counts() {
    let at = |name: &str, second: u8, mode: &str| {
        authentication("ns", name, &format!("mtls: {{mode: {mode}}}"))
            .replace("namespace: ns}", &format!("namespace: ns, creationTimestamp: '2026-01-02T03:04:0{second}Z'}}"))
    };
    assert!(!may(&index(&(at("a", 5, "PERMISSIVE") + &at("b", 4, "STRICT"))), PLAIN));
    assert!(may(&index(&(at("a", 5, "STRICT") + &at("b", 4, "PERMISSIVE"))), PLAIN));
}

#[test]
fn converted_policies_have_the_names_that_other_meshes_give_them() {
    let spec = "selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}, portLevelMtls: {81: {mode: DISABLE}}";
    let mut index = index(&authentication("ns", "mine", spec));
    let keys = |index: &Index| {
        let mut keys: Vec<_> = index.policies().map(|policy| policy.name.to_string()).collect();
        keys.sort();
        keys
    };
    assert_eq!(keys(&index), ["ns/converted_peer_authentication_mine", "root/istio_converted_static_strict"]);
    let strict = index.policies().find(|policy| policy.name.ends_with("static_strict")).unwrap();
    let strict = wire::Authorization::decode(strict.body.clone()).unwrap();
    assert_eq!(
        (strict.namespace.as_str(), strict.action(), strict.scope()),
        ("root", wire::Action::Deny, wire::Scope::WorkloadSelector)
    );
    assert_eq!(
        reason(&index, "server", PLAIN).unwrap().to_string(),
        "policy ns/converted_peer_authentication_mine denies"
    );
    // Strict on every port: the one for all.
    index.apply(apply(&authentication("ns", "mine", "mtls: {mode: STRICT}")), time(0));
    assert_eq!(keys(&index), ["root/istio_converted_static_strict"]);
    assert_eq!(
        reason(&index, "server", PLAIN).unwrap().to_string(),
        "policy root/istio_converted_static_strict denies"
    );
    index.apply([delete(Kind::PeerAuthentication, "ns", "mine")], time(0));
    assert!(keys(&index).is_empty() && may(&index, PLAIN));
}

#[test]
fn an_authentication_that_cannot_be_read_takes_no_plaintext() {
    let open = authentication("ns", "a", "mtls: {mode: PERMISSIVE}");
    for (namespace, spec, denies) in [
        ("ns", "mtls: {mode: STRIKT}", true),
        ("ns", "mtls: STRICT", true),
        ("root", "mtls: {mode: 1}", true),
        ("other", "mtls: {mode: STRIKT}", false),
        ("ns", "selector: {matchLabels: {app: other}}, mtls: {mode: x}", false),
        ("ns", "selector: {matchLabels: {app: server}}, mtls: {mode: x}", true),
    ] {
        let mut index = index(&open);
        index.apply(unread(&authentication(namespace, "b", spec)), time(0));
        assert_eq!(who(&index), [true, true, !denies], "{namespace}: {spec}");
        assert_eq!(index.conflicts().len(), 1);
    }
}

#[test]
fn what_workloads_name_outlives_their_naming_it() {
    let selected = "selector: {matchLabels: {app: server}}, action: DENY, rules: [{}]";
    let mut index = index(&policy("ns", "p", "action: DENY, rules: [{}]"));
    let told = |index: &mut Index, events| {
        let changes = index.apply(events, time(0) + Duration::from_secs(1));
        let names = |policies: &std::collections::BTreeMap<_, Option<_>>| {
            policies.values().map(Option::is_some).collect::<Vec<_>>()
        };
        (changes.changed().count(), names(changes.policies()), names(changes.late_policies()))
    };
    // From all to some: only once those know it. From some to all: at once.
    assert_eq!(told(&mut index, apply(&policy("ns", "p", selected))), (1, vec![], vec![true]));
    assert_eq!(told(&mut index, apply(&policy("ns", "p", "rules: [{}]"))), (1, vec![true], vec![]));
    assert_eq!(told(&mut index, apply(&policy("ns", "p", "action: DENY"))), (0, vec![true], vec![]));
    assert_eq!(told(&mut index, vec![delete(Kind::AuthorizationPolicy, "ns", "p")]), (0, vec![false], vec![]));
    assert_eq!(told(&mut index, apply(&policy("ns", "p", selected))), (1, vec![true], vec![]));
    assert_eq!(told(&mut index, vec![delete(Kind::AuthorizationPolicy, "ns", "p")]), (1, vec![], vec![false]));
}
