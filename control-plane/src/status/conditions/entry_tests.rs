//! Of ServiceEntries, WorkloadEntries, and of Gateways and their classes.

use std::time::SystemTime;

use mesh_xds::server::{Nack, TypeStatus};

use super::tests::says_with;
use super::*;

#[expect(clippy::needless_pass_by_value, reason = "as json! gives it")]
fn entry(kind: &str, labels: Value, spec: Value) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": kind, "spec": spec,
        "metadata": {"name": "e", "namespace": "ns", "generation": 4, "labels": labels},
    })
}

fn service_entry(resolution: &str, endpoint: &str) -> Value {
    let ports = json!([{"number": 80, "name": "http"}]);
    json!({"hosts": ["a.example.com"], "ports": ports, "resolution": resolution, "endpoints": [{"address": endpoint}]})
}

/// What the first object's status is to say, beside the others, in short.
fn says(objects: &[Value], told: &Told) -> Option<Vec<String>> {
    let said = says_with(objects, told)?;
    Some(said.into_iter().map(|(kind, holds, reason, _)| format!("{kind}={holds}: {reason}")).collect())
}

fn noted(object: &str, reason: &str) -> Told {
    Told::new(Nacks::new(), &[Note { object: object.to_owned(), reason: reason.to_owned() }])
}

#[test]
fn entries_are_told_what_becomes_of_them() {
    let none = Told::default();
    let on_service_entry = noted("ServiceEntry ns/e", "odd");
    let on_workload_entry = noted("WorkloadEntry ns/e", "odd");
    let bad = json!({"hosts": ["a.example.com"], "ports": [], "mood": "good"});
    let bound = json!({"istio.io/use-waypoint": "gate"});
    for (kind, labels, spec, told, expected) in [
        (
            "ServiceEntry",
            json!({}),
            service_entry("STATIC", "192.0.2.1"),
            &none,
            &["ZtunnelAccepted=true: Accepted"][..],
        ),
        ("ServiceEntry", json!({}), bad, &none, &["ZtunnelAccepted=false: Invalid"]),
        // Another one's notes are none of it.
        (
            "ServiceEntry",
            json!({}),
            service_entry("STATIC", "192.0.2.1"),
            &on_workload_entry,
            &["ZtunnelAccepted=true: Accepted"],
        ),
        (
            "ServiceEntry",
            json!({}),
            service_entry("DNS", "192.0.2.1"),
            &on_service_entry,
            &["ZtunnelAccepted=true: PartiallyInvalid"],
        ),
        (
            "ServiceEntry",
            json!({}),
            service_entry("DNS", "b.example.com"),
            &on_service_entry,
            &["ZtunnelAccepted=false: UnsupportedValue"],
        ),
        (
            "ServiceEntry",
            bound,
            service_entry("DNS", "b.example.com"),
            &none,
            &["ZtunnelAccepted=true: Accepted", "istio.io/WaypointBound=false: WaypointIsNotReady"],
        ),
        ("WorkloadEntry", json!({}), json!({"address": "192.0.2.1"}), &none, &["ZtunnelAccepted=true: Accepted"]),
        (
            "WorkloadEntry",
            json!({}),
            json!({"address": "a.example.com"}),
            &on_workload_entry,
            &["ZtunnelAccepted=false: UnsupportedValue"],
        ),
        (
            "WorkloadEntry",
            json!({}),
            json!({"address": "192.0.2.1", "weight": -1}),
            &none,
            &["ZtunnelAccepted=false: Invalid"],
        ),
    ] {
        let object = entry(kind, labels, spec);
        assert_eq!(says(std::slice::from_ref(&object), told).unwrap(), expected, "{object}");
    }
    let bad = entry("WorkloadEntry", json!({}), json!({"address": "192.0.2.1", "weight": -1}));
    let (.., message) = says_with(&[bad], &none).unwrap().remove(0);
    assert!(
        message.contains("spec.weight: is not a weight; use 0") && message.contains("are refused until"),
        "{message}"
    );
    // Whose namespace cannot be read may be bound to anything.
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns", "labels": {"istio.io/dataplane-mode": "x"}}});
    assert_eq!(says(&[entry("ServiceEntry", json!({}), service_entry("STATIC", "192.0.2.1")), namespace], &none), None);
}

#[test]
fn what_proxies_refuse_of_an_entry_is_told() {
    let (service, workload) =
        (entry("ServiceEntry", json!({}), service_entry("STATIC", "192.0.2.1")), json!({"address": "192.0.2.1"}));
    let workload = entry("WorkloadEntry", json!({}), workload);
    let refused = |type_url: &str, resource: &str| {
        let nack = Nack { resource: resource.to_owned(), reason: "too odd".to_owned(), at: SystemTime::UNIX_EPOCH };
        let client = ClientStatus {
            id: 1,
            client: "service account system/ztunnel (pod z-1)".to_owned(),
            node_id: String::new(),
            address: None,
            connected_since: SystemTime::UNIX_EPOCH,
            nacks: 1,
            types: vec![TypeStatus {
                type_url: type_url.into(),
                wildcard: true,
                names: 0,
                sent: 1,
                acked: 0,
                considered: 1,
                in_flight: false,
                nacks: vec![nack],
            }],
        };
        let accounts = ["system/ztunnel".parse().unwrap()];
        let told = Told { nacks: nacks(&[client], &accounts), ..Told::default() };
        [&service, &workload].map(|object| {
            let (_, holds, reason, message) = says_with(std::slice::from_ref(object), &told).unwrap().remove(0);
            assert_eq!(holds, message == ACCEPTED);
            assert!(
                holds || reason == "RefusedByProxy" && message.contains("z-1") && message.contains("too odd"),
                "{message}"
            );
            !holds
        })
    };
    let uid = |of: &str| format!("cluster/networking.istio.io/{of}");
    for (type_url, resource, expected) in [
        (WORKLOAD_TYPE, "ns/a.example.com".to_owned(), [true, false]),
        (WORKLOAD_TYPE, uid("ServiceEntry/ns/e/192.0.2.1"), [true, false]),
        (WORKLOAD_TYPE, uid("WorkloadEntry/ns/e"), [false, true]),
        // Others, and a policy of the name.
        (WORKLOAD_TYPE, "ns/b.example.com".to_owned(), [false, false]),
        (WORKLOAD_TYPE, uid("ServiceEntry/ns/e2/192.0.2.1"), [false, false]),
        (WORKLOAD_TYPE, uid("WorkloadEntry/ns/e2"), [false, false]),
        (WORKLOAD_TYPE, "cluster//Pod/ns/e".to_owned(), [false, false]),
        (AUTHORIZATION_TYPE, "ns/a.example.com".to_owned(), [false, false]),
    ] {
        assert_eq!(refused(type_url, &resource), expected, "{type_url} {resource}");
    }
}

#[expect(clippy::needless_pass_by_value, reason = "as json! gives it")]
fn gateway(class: &str, listener: &str, labels: Value) -> Value {
    let all = json!({"namespaces": {"from": "All"}});
    let listener = json!({"name": "mesh", "port": 15008, "protocol": listener, "allowedRoutes": all});
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": {"name": "gate", "namespace": "ns", "generation": 2, "labels": labels},
        "spec": {"gatewayClassName": class, "listeners": [listener]},
    })
}

fn class(name: &str, controller: &str) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass",
        "metadata": {"name": name, "generation": 1}, "spec": {"controllerName": controller},
    })
}

#[test]
fn gateways_of_the_mesh_are_told_what_becomes_of_them_and_no_others() {
    const OURS: &str = "culvert.dev/mesh-controller";
    let none = Told::default();
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "gate", "namespace": "ns"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 15008}]},
    });
    let mut placed = gateway("culvert-waypoint", "HBONE", json!({}));
    placed["status"] = json!({"addresses": [{"type": "IPAddress", "value": "10.96.0.1"}]});
    let odd = json!({"istio.io/waypoint-for": "anything"});
    let there: &[&str] = &["Accepted=true: Accepted", "Programmed=true: Programmed"];
    let not_made: &[&str] = &["Accepted=true: Accepted", "Programmed=false: AddressNotAssigned"];
    let invalid: &[&str] = &["Accepted=false: Invalid", "Programmed=false: Invalid"];
    let no_listener: &[&str] = &["Accepted=false: ListenersNotValid", "Programmed=false: Invalid"];
    for (objects, expected) in [
        (vec![gateway("culvert-waypoint", "HBONE", json!({}))], Some(not_made)),
        (vec![gateway("istio-waypoint", "HBONE", json!({})), service], Some(there)),
        (vec![placed], Some(there)),
        (vec![gateway("culvert-waypoint", "HTTP", json!({}))], Some(invalid)),
        (vec![gateway("culvert-waypoint", "HBONE", odd.clone())], Some(invalid)),
        (vec![gateway("mine", "HBONE", json!({})), class("mine", OURS)], Some(not_made)),
        (vec![gateway("mine", "HTTP", json!({})), class("mine", OURS)], Some(no_listener)),
        (vec![gateway("mine", "HBONE", odd.clone()), class("mine", OURS)], Some(invalid)),
        // Others', also of a name that is ours elsewhere, and what nobody can tell.
        (vec![gateway("mine", "HBONE", odd), class("mine", "example.com/other")], None),
        (vec![gateway("mine", "HBONE", json!({}))], None),
        (vec![gateway("culvert-waypoint", "HBONE", json!({})), class("culvert-waypoint", "example.com/other")], None),
        (vec![gateway("culvert-waypoint", "HBONE", json!({})), class("culvert-waypoint", "")], None),
        (vec![class("mine", OURS)], Some(&["Accepted=true: Accepted"])),
        (vec![class("mine", "istio.io/mesh-controller")], Some(&["Accepted=true: Accepted"])),
        (vec![class("mine", "example.com/other")], None),
        (vec![class("mine", "")], None),
        (vec![class("Mine", OURS)], Some(&["Accepted=false: Unsupported"])),
        (vec![class("Mine", "example.com/other")], None),
    ] {
        let said = says(&objects, &none);
        assert_eq!(
            said.as_deref(),
            expected.map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>()).as_deref(),
            "{objects:#?}"
        );
    }
}

#[test]
fn conditions_of_the_name_that_are_not_written_of_a_kind_are_left_to_others() {
    let others = [json!({"type": "Accepted", "status": "True"}), json!({"type": "Healthy", "status": "False"})];
    assert_eq!(change(Kind::WorkloadEntry, &others, &[], "now"), None);
    assert_eq!(change(Kind::Gateway, &others, &[], "now"), Some(Vec::new()));
}
