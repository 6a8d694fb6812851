use std::time::SystemTime;

use mesh_xds::server::{Nack, TypeStatus};

use super::*;
use crate::api::validate_served;

/// What became of these objects, none of which has an earlier version.
pub(in crate::status) fn known(objects: &[Value]) -> All {
    let read = |object: &Value| {
        let text = |at: &str| object.pointer(at).and_then(Value::as_str).unwrap_or_default();
        let group = text("/apiVersion").split_once('/').map_or("", |(group, _)| group);
        let kind = Kind::find(group, text("/kind")).unwrap();
        let outcome = match validate_served(kind, object) {
            Ok(object) => Outcome::Valid(object),
            Err(problems) => Outcome::Refused { problems, keeps_last_good: false },
        };
        let verdict = Verdict {
            api_version: text("/apiVersion").into(),
            uid: "u".into(),
            version: text("/metadata/resourceVersion").into(),
            generation: object.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or_default(),
            belongs_to: ["/spec/gatewayClassName", "/spec/controllerName"].map(text).concat().into(),
            conditions: object.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default(),
            outcome,
        };
        let id = ObjectId { kind, namespace: text("/metadata/namespace").into(), name: text("/metadata/name").into() };
        (id, Arc::new(verdict))
    };
    objects.iter().map(read).collect()
}

#[expect(clippy::needless_pass_by_value, reason = "as json! gives it")]
pub(in crate::status) fn policy(kind: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": kind, "spec": spec,
        "metadata": {"name": "p", "namespace": "ns", "generation": 3, "resourceVersion": "7"},
    })
}

/// What the first object's status is to say, beside the others: type, status, reason and message.
fn says(objects: &[Value], nacks: &Nacks) -> Option<Vec<Said>> {
    says_with(objects, &Told { nacks: nacks.clone(), ..Told::default() })
}

pub(super) fn says_with(objects: &[Value], told: &Told) -> Option<Vec<Said>> {
    let all = known(objects);
    let (id, verdict) = known(&objects[..1]).pop_first().unwrap();
    let desired = desired(&id, &verdict, &all, told)?;
    assert!(desired.iter().all(|condition| condition.generation == verdict.generation));
    Some(desired.into_iter().map(|one| (one.kind, one.holds, one.reason, one.message)).collect())
}

fn one(object: Value) -> Said {
    let mut said = says(&[object], &Nacks::new()).unwrap();
    assert_eq!(said.len(), 1, "{said:?}");
    said.remove(0)
}

#[test]
fn policies_are_told_what_becomes_of_them() {
    let http = json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]});
    let attached = json!({"targetRefs": [{"kind": "Service", "name": "web"}], "rules": [{}]});
    let unknown = json!({"rules": [{}], "mood": "good"});
    for (kind, spec, expected, part) in [
        ("AuthorizationPolicy", json!({"rules": [{}]}), (ZTUNNEL_ACCEPTED, true, "Accepted"), "told"),
        ("AuthorizationPolicy", http, (ZTUNNEL_ACCEPTED, true, "UnsupportedValue"), "methods"),
        ("AuthorizationPolicy", attached, (WAYPOINT_ACCEPTED, false, "AncestorNotBound"), "not in force"),
        ("AuthorizationPolicy", unknown, (ZTUNNEL_ACCEPTED, false, "Invalid"), "spec.mood: is not a field"),
        ("AuthorizationPolicy", json!({"action": "X"}), (ZTUNNEL_ACCEPTED, false, "Invalid"), "is denied until"),
        ("PeerAuthentication", json!({"mtls": {"mode": "STRICT"}}), (ZTUNNEL_ACCEPTED, true, "Accepted"), "told"),
        ("PeerAuthentication", json!({"mtls": {"mode": "X"}}), (ZTUNNEL_ACCEPTED, false, "Invalid"), "no plaintext"),
    ] {
        let (of, holds, reason, message) = one(policy(kind, spec.clone()));
        assert_eq!((of, holds, reason), expected, "{spec}");
        assert!(message.contains(part), "{spec}: {message}");
    }
    let mut dry = policy("AuthorizationPolicy", json!({"rules": [{}]}));
    dry["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    assert!(one(dry).3.contains("only note"));
}

#[test]
fn what_proxies_refuse_is_told() {
    let nack = |resource: &str| Nack {
        resource: resource.to_owned(),
        reason: "too odd".to_owned(),
        at: SystemTime::UNIX_EPOCH,
    };
    let client = |pod: &str, type_url: &str| ClientStatus {
        id: 1,
        client: format!("service account system/ztunnel{pod}"),
        node_id: String::new(),
        address: None,
        connected_since: SystemTime::UNIX_EPOCH,
        nacks: 2,
        types: vec![TypeStatus {
            type_url: type_url.into(),
            wildcard: true,
            names: 0,
            sent: 1,
            acked: 0,
            considered: 1,
            in_flight: false,
            nacks: vec![nack("ns/p"), nack("ns/converted_peer_authentication_p")],
        }],
    };
    let policies = [
        policy("AuthorizationPolicy", json!({"rules": [{}]})),
        policy("PeerAuthentication", json!({"mtls": {"mode": "STRICT"}})),
    ];
    let accounts = ["system/ztunnel".parse().unwrap()];
    // Of other types a name means another thing; and who is no proxy of a node has no say.
    let others = [client(" (pod a)", mesh_xds::WORKLOAD_TYPE), client("-of-mine (pod a)", AUTHORIZATION_TYPE)];
    let other = nacks(&others, &accounts);
    assert!(!other.contains_key("ns/p"), "{other:?}");
    for object in policies {
        let by = |clients: &[ClientStatus]| {
            says(std::slice::from_ref(&object), &nacks(clients, &accounts)).unwrap().remove(0)
        };
        let (of, holds, reason, message) =
            by(&[client(" (pod b)", AUTHORIZATION_TYPE), client(" (pod a)", AUTHORIZATION_TYPE)]);
        assert_eq!((of, holds, reason), (ZTUNNEL_ACCEPTED, false, "RefusedByProxy"));
        assert!(message.contains("(pod a, pod b): too odd"), "{message}");
        let many: Vec<_> = (0..5).map(|at| client(&format!(" (pod n{at})"), AUTHORIZATION_TYPE)).collect();
        let (.., message) = by(&many);
        assert!(message.contains("(pod n0, pod n1, pod n2, 2 others)"), "{message}");
        assert!(says(std::slice::from_ref(&object), &other).unwrap()[0].1);
    }
}

#[test]
fn services_are_told_of_their_waypoint() {
    let service = |name: &str, labels: Value| {
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "ns", "labels": labels},
            "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]},
        })
    };
    let namespace =
        |labels: Value| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns", "labels": labels}});
    let gate = json!({"istio.io/use-waypoint": "gate"});
    let bound = |objects: &[Value]| {
        let said = says(objects, &Nacks::new())?;
        Some(said.first().map(|(of, holds, reason, _)| {
            assert_eq!(*of, WAYPOINT_BOUND);
            (*holds, *reason)
        }))
    };
    let (there, missing) = (Some((true, "WaypointAccepted")), Some((false, "WaypointIsNotReady")));
    let web = |labels: Value| service("web", labels);
    assert_eq!(bound(&[web(json!({}))]), Some(None));
    assert_eq!(bound(&[web(gate.clone())]), Some(missing));
    assert_eq!(bound(&[web(gate.clone()), service("gate", json!({}))]), Some(there));
    assert_eq!(bound(&[web(json!({})), namespace(gate.clone())]), Some(missing));
    assert_eq!(bound(&[web(json!({})), namespace(gate.clone()), service("gate", json!({}))]), Some(there));
    assert_eq!(bound(&[web(json!({"istio.io/use-waypoint": "none"})), namespace(gate.clone())]), Some(None));
    // A Gateway says more than the Service of its name.
    let gateway = |namespace: &str, of: &str, protocol: &str, allows: &str| {
        // A waypoint without such a listener is not valid.
        let class = if protocol == "HBONE" { "istio-waypoint" } else { "ingress" };
        let listener = json!({
            "name": "mesh", "port": 15008, "protocol": protocol, "allowedRoutes": {"namespaces": {"from": allows}},
        });
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"name": "gate", "namespace": namespace, "labels": {"istio.io/waypoint-for": of}},
            "spec": {"gatewayClassName": class, "listeners": [listener]},
        })
    };
    let far = json!({"istio.io/use-waypoint": "gate", "istio.io/use-waypoint-namespace": "far"});
    for (labels, gateway, expected) in [
        (gate.clone(), gateway("ns", "service", "HBONE", "Same"), there),
        (gate.clone(), gateway("ns", "all", "HBONE", "Same"), there),
        (gate.clone(), gateway("ns", "workload", "HBONE", "Same"), Some((false, "UnsupportedTrafficType"))),
        (gate.clone(), gateway("ns", "service", "HTTP", "Same"), missing),
        (far.clone(), gateway("far", "service", "HBONE", "Same"), Some((false, "AttachmentDenied"))),
        (far, gateway("far", "service", "HBONE", "All"), there),
    ] {
        assert_eq!(bound(&[web(labels), service("gate", json!({})), gateway.clone()]), Some(expected), "{gateway}");
    }
    // The waypoint's own; and what nobody can read.
    assert_eq!(bound(&[service("gate", json!({})), namespace(gate)]), Some(None));
    assert_eq!(bound(&[web(json!({})), namespace(json!({"istio.io/dataplane-mode": "sideways"}))]), None);
}

#[test]
fn only_what_differs_is_written_and_a_time_is_kept_until_the_condition_turns() {
    let condition = |holds, message: &str| {
        [Condition { kind: ZTUNNEL_ACCEPTED, holds, reason: "R", message: message.to_owned(), generation: 3 }]
    };
    let written = change(Kind::AuthorizationPolicy, &[], &condition(true, "a"), "now").unwrap();
    assert_eq!(
        written,
        [json!({
            "type": "ZtunnelAccepted", "status": "True", "reason": "R", "message": "a", "lastTransitionTime": "now",
            "observedGeneration": 3,
        })]
    );
    assert_eq!(change(Kind::AuthorizationPolicy, &written, &condition(true, "a"), "later"), None);
    let mut as_text = written.clone();
    as_text[0]["observedGeneration"] = json!("3");
    assert_eq!(change(Kind::AuthorizationPolicy, &as_text, &condition(true, "a"), "later"), None);
    let time = |desired: &[Condition]| {
        change(Kind::AuthorizationPolicy, &written, desired, "later").unwrap()[0]["lastTransitionTime"].clone()
    };
    assert_eq!(time(&condition(true, "b")), "now");
    assert_eq!(time(&condition(false, "a")), "later");
    // Others' conditions are none of ours; what is not to be there any more is taken away.
    let mut with_others = written.clone();
    with_others.push(json!({"type": "Ready", "status": "True"}));
    assert_eq!(change(Kind::AuthorizationPolicy, &with_others, &condition(true, "a"), "later"), None);
    assert_eq!(change(Kind::AuthorizationPolicy, &with_others, &[], "later"), Some(Vec::new()));
    assert_eq!(change(Kind::AuthorizationPolicy, &with_others[1..], &[], "later"), None);
    // Whatever is there already.
    assert!(
        change(Kind::AuthorizationPolicy, &[json!("odd"), json!({"type": 7})], &condition(true, "a"), "now").is_some()
    );
}

#[test]
fn long_texts_are_cut_between_characters() {
    assert_eq!(bounded("short".to_owned(), 10), "short");
    let cut = bounded("ä".repeat(100), 21);
    assert!(cut.len() <= 21 && cut.ends_with(" [...]"), "{cut}");
}
