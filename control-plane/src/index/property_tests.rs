//! After any sequence of edits, the index is what a fresh one makes of the surviving objects; and what it told along the
//! way adds up to that.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mesh_model::{Change, Service, Workload};
use mesh_proto::workload as wire;
use proptest::prelude::*;
use prost::Message;

use super::policy_tests::{authentication, policy};
use super::tests::{delete, options, time};
use super::{Event, Index, Resource};
use crate::api::{Kind, Object, ObjectId, Outcome, parse};

/// One edit. Names and values come from small sets, so that edits meet.
#[derive(Clone, Debug)]
enum Edit {
    Namespace { name: u8, labels: &'static str },
    Node { name: u8, zone: u8 },
    Pod { namespace: u8, name: u8, address: u8, app: u8, node: u8, shape: u8 },
    Service { namespace: u8, name: u8, app: u8, address: u8, port: &'static str },
    Slice { namespace: u8, name: u8, service: u8, addresses: Vec<u8> },
    Policy { namespace: u8, name: u8, spec: &'static str },
    Authentication { namespace: u8, name: u8, spec: &'static str },
    ServiceEntry { namespace: u8, name: u8, created: u8, spec: &'static str },
    WorkloadEntry { namespace: u8, name: u8, app: u8, spec: &'static str },
    Gateway { namespace: u8, labels: &'static str, class: u8, spec: &'static str },
    GatewayClass { name: u8, controller: &'static str },
    Delete { kind: Kind, namespace: u8, name: u8 },
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let small = 0..3u8;
    let labels = prop_oneof![
        Just(""),
        Just("istio.io/dataplane-mode: ambient"),
        Just("istio.io/dataplane-mode: none"),
        Just("istio.io/use-waypoint: gate"),
    ];
    let port = prop_oneof![Just("web"), Just("8080"), Just("other")];
    let kind = prop_oneof![
        Just(Kind::Namespace),
        Just(Kind::Node),
        Just(Kind::Pod),
        Just(Kind::Service),
        Just(Kind::EndpointSlice),
        Just(Kind::AuthorizationPolicy),
        Just(Kind::PeerAuthentication),
        Just(Kind::ServiceEntry),
        Just(Kind::WorkloadEntry),
        Just(Kind::Gateway),
        Just(Kind::GatewayClass),
    ];
    let edit = prop_oneof![
        1 => (0..2u8, labels).prop_map(|(name, labels)| Edit::Namespace { name, labels }),
        1 => (small.clone(), small.clone()).prop_map(|(name, zone)| Edit::Node { name, zone }),
        4 => (0..2u8, 0..5u8, 0..6u8, small.clone(), small.clone(), 0..10u8).prop_map(
            |(namespace, name, address, app, node, shape)| Edit::Pod { namespace, name, address, app, node, shape }
        ),
        4 => (0..2u8, 0..4u8, 0..4u8, 0..9u8, port).prop_map(
            |(namespace, name, app, address, port)| Edit::Service { namespace, name, app, address, port }
        ),
        2 => (0..2u8, small, 0..4u8, prop::collection::vec(0..6u8, 0..4)).prop_map(
            |(namespace, name, service, addresses)| Edit::Slice { namespace, name, service, addresses }
        ),
        2 => (0..3u8, 0..3u8, prop::sample::select(POLICIES.to_vec())).prop_map(
            |(namespace, name, spec)| Edit::Policy { namespace, name, spec }
        ),
        2 => (0..3u8, 0..3u8, prop::sample::select(AUTHENTICATIONS.to_vec())).prop_map(
            |(namespace, name, spec)| Edit::Authentication { namespace, name, spec }
        ),
        2 => (0..2u8, 0..3u8, 0..3u8, prop::sample::select(SERVICE_ENTRIES.to_vec())).prop_map(
            |(namespace, name, created, spec)| Edit::ServiceEntry { namespace, name, created, spec }
        ),
        2 => (0..2u8, 0..3u8, 0..3u8, prop::sample::select(WORKLOAD_ENTRIES.to_vec())).prop_map(
            |(namespace, name, app, spec)| Edit::WorkloadEntry { namespace, name, app, spec }
        ),
        2 => (0..2u8, prop::sample::select(GATEWAY_LABELS.to_vec()), 0..3u8, prop::sample::select(LISTENERS.to_vec())).prop_map(
            |(namespace, labels, class, spec)| Edit::Gateway { namespace, labels, class, spec }
        ),
        1 => (0..2u8, prop::sample::select(vec!["istio.io/mesh-controller", "example.com/other"])).prop_map(
            |(name, controller)| Edit::GatewayClass { name, controller }
        ),
        2 => (kind, 0..3u8, 0..5u8).prop_map(|(kind, namespace, name)| Edit::Delete { kind, namespace, name }),
    ];
    prop::collection::vec(edit, 1..60)
}

const POLICIES: [&str; 8] = [
    "",
    "rules: [{}]",
    "action: DENY, rules: [{from: [{source: {notPrincipals: ['*']}}]}]",
    "selector: {matchLabels: {app: a0}}, rules: [{to: [{operation: {ports: ['80']}}]}]",
    "selector: {matchLabels: {app: a0, n: x1}}, action: DENY, rules: [{}]",
    "selector: {matchLabels: {app: a1}}, rules: [{to: [{operation: {methods: [GET]}}]}]",
    "targetRefs: [{kind: Service, name: x0}]",
    // Not valid.
    "selector: {matchLabels: {app: a1}}, action: PERHAPS",
];
const AUTHENTICATIONS: [&str; 8] = [
    "",
    "mtls: {mode: STRICT}",
    "mtls: {mode: PERMISSIVE}",
    "selector: {matchLabels: {app: a0}}, mtls: {mode: STRICT}",
    "selector: {matchLabels: {app: a1}}, portLevelMtls: {80: {mode: STRICT}}",
    "selector: {matchLabels: {app: a1}}, mtls: {mode: STRICT}, portLevelMtls: {80: {mode: DISABLE}}",
    // Not valid.
    "selector: {matchLabels: {app: a0}}, mtls: {mode: STRIKT}",
    "mtls: {mode: STRIKT}",
];

const GATEWAY_LABELS: [&str; 3] = ["", "istio.io/waypoint-for: all", "istio.io/waypoint-for: workload"];
const LISTENERS: [&str; 3] = [
    "port: 15008, protocol: HBONE",
    "port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: All}}",
    "port: 80, protocol: HTTP",
];
const SERVICE_ENTRIES: [&str; 12] = [
    "hosts: [a.example.com], resolution: STATIC, endpoints: [{address: 10.0.0.1}, {address: 10.0.0.7, labels: {app: a0}}]",
    "hosts: [a.example.com, b.example.com], resolution: STATIC, workloadSelector: {labels: {app: a0}}",
    "hosts: [b.example.com, '*.example.com'], resolution: STATIC, addresses: [10.1.0.0/16], workloadSelector: {labels: {app: a1}}",
    "hosts: [a.example.com], resolution: DNS",
    "hosts: [b.example.com], resolution: DNS, endpoints: [{address: b.example.org}, {address: 10.0.0.8, ports: {p: 99}}]",
    "hosts: [a.example.com], exportTo: ['.']",
    "hosts: [x0.ns0.svc.cluster.local], resolution: STATIC, endpoints: [{address: 10.0.0.1}]",
    "hosts: [x0.ns1.svc.cluster.local], addresses: [10.96.0.1], resolution: STATIC, endpoints: [{address: 10.0.0.9}]",
    // Not valid.
    "hosts: [a.example.com, b.example.com], resolution: SOMEHOW, endpoints: [{address: 10.0.0.8}, {address: 10.0.0.7}]",
    "hosts: [a.example.com, B, x0.ns0.svc.cluster.local], addresses: [10.1.0.0/16, 10.96.0.1], location: NOWHERE",
    "addresses: [10.1.0.0/16], exportTo: ['.'], resolution: STATIC, workloadSelector: {labels: {app: a0}}",
    "hosts: ['*.example.com'], resolution: DNS, endpoints: [{address: 10.0.0.1}], exportTo: [a, b]",
];
const WORKLOAD_ENTRIES: [&str; 6] = [
    "address: 10.0.0.1",
    "address: 10.0.0.8, ports: {web: 8, p: 9}, serviceAccount: sa",
    "address: 10.0.0.8, labels: {networking.istio.io/tunnel: http}, weight: 2",
    "address: vm.example.com",
    // Not valid.
    "address: 10.0.0.8, weight: -1, labels: {app: a0}",
    "address: 10.0.0.9, network: other",
];

/// The third one is the root namespace.
fn namespace_of(number: u8) -> String {
    if number == 2 { "root".to_owned() } else { format!("ns{number}") }
}

fn event(edit: &Edit) -> Event {
    let text = match edit {
        Edit::Namespace { name, labels } => {
            format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: ns{name}, labels: {{{labels}}}}}}}")
        }
        Edit::Node { name, zone } => format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: node{name}, labels: {{topology.kubernetes.io/zone: z{zone}}}}},
               status: {{addresses: [{{type: InternalIP, address: 192.0.2.{zone}}}]}}}}"
        ),
        Edit::Pod { namespace, name, address, app, node, shape } => {
            let host = if *shape == 1 { "hostNetwork: true," } else { "" };
            let phase = if *shape == 2 { "Succeeded" } else { "Running" };
            let annotation = if *shape < 4 || *shape == 7 { "enabled" } else { "pending" };
            let ends = if *shape > 5 { "deletionTimestamp: 2026-01-01T00:00:00Z," } else { "" };
            let address = if *shape == 3 { String::new() } else { format!("podIP: 10.0.0.{address},") };
            // Not valid.
            let mode = if *shape > 7 { "istio.io/dataplane-mode: sideways," } else { "" };
            format!(
                "{{apiVersion: v1, kind: Pod, metadata: {{{ends} name: x{name}, namespace: ns{namespace}, labels: {{{mode} app: a{app}, n: x{name}}},
                   annotations: {{ambient.istio.io/redirection: {annotation}}}}},
                  spec: {{{host} nodeName: node{node}, containers: [{{name: c, ports: [{{name: web, containerPort: 80}}]}}]}},
                  status: {{{address} phase: {phase}, conditions: [{{type: Ready, status: 'True'}}]}}}}"
            )
        }
        Edit::Service { namespace, name, app, address, port } => {
            let selector = match app {
                3 => String::new(),
                app => format!("selector: {{app: a{app}}},"),
            };
            let address = match address {
                0 => "clusterIP: None,".to_owned(),
                1..=3 => format!("clusterIP: 10.96.0.{address},"),
                // What x0 in ns0 would choose for itself, so that it is displaced and comes back.
                4 => format!("clusterIP: {CHOSEN_BY_X0},"),
                // Not valid.
                7 => "clusterIP: 10.96.0.1, ipFamilies: [IPv5],".to_owned(),
                8 => "internalTrafficPolicy: Far,".to_owned(),
                _ => String::new(),
            };
            format!(
                "{{apiVersion: v1, kind: Service, metadata: {{name: x{name}, namespace: ns{namespace}, labels: {{{}}}}},
                  spec: {{{address} {selector} ports: [{{name: p, port: 80, targetPort: {port}}}]}},
                  status: {{loadBalancer: {{ingress: [{{ip: 192.0.2.{app}}}]}}}}}}",
                if *name == 3 { "istio.io/use-waypoint: x0, istio.io/use-waypoint-namespace: ns0" } else { "" }
            )
        }
        Edit::Slice { namespace, name, service, addresses } => {
            let endpoints: Vec<String> = addresses
                .iter()
                .map(|address| {
                    let conditions = CONDITIONS[usize::from(address % 3)];
                    format!(
                        "{{addresses: [10.0.0.{address}], {conditions} targetRef: {{kind: Pod, namespace: ns0, name: x{address}}}, nodeName: node{}}}",
                        address % 3
                    )
                })
                .collect();
            format!(
                "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, ports: [{{name: p, port: 81}}],
                  metadata: {{name: x{name}, namespace: ns{namespace}, labels: {{kubernetes.io/service-name: x{service}}}}},
                  endpoints: [{}]}}",
                endpoints.join(", ")
            )
        }
        Edit::Policy { namespace, name, spec } => policy(&namespace_of(*namespace), &format!("x{name}"), spec),
        Edit::Authentication { namespace, name, spec } => {
            authentication(&namespace_of(*namespace), &format!("x{name}"), spec)
        }
        Edit::ServiceEntry { namespace, name, created, spec } => format!(
            "{{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {{name: x{name}, namespace: ns{namespace},
               creationTimestamp: 2026-01-0{}T00:00:00Z}}, spec: {{ports: [{{number: 80, name: p}}], {spec}}}}}",
            created + 1
        ),
        Edit::WorkloadEntry { namespace, name, app, spec } => format!(
            "{{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {{name: x{name}, namespace: ns{namespace},
               labels: {{app: a{app}}}}}, spec: {{{spec}}}}}"
        ),
        // Namespaces are bound to `gate`; services and pods may be to `x0`.
        Edit::Gateway { namespace, labels, class, spec } => format!(
            "{{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {{name: {}, namespace: ns{namespace}, labels: {{{labels}}}}},
               spec: {{gatewayClassName: x{class}, listeners: [{{name: l, {spec}}}]}}}}",
            if *class == 2 { "x0" } else { "gate" }
        ),
        Edit::GatewayClass { name, controller } => format!(
            "{{apiVersion: gateway.networking.k8s.io/v1, kind: GatewayClass, metadata: {{name: x{name}}}, spec: {{controllerName: {controller}}}}}"
        ),
        Edit::Delete { kind: kind @ Kind::Gateway, namespace, name } => {
            return delete(*kind, &namespace_of(*namespace), if *name < 3 { "gate" } else { "x0" });
        }
        Edit::Delete { kind: kind @ Kind::GatewayClass, name, .. } => return delete(*kind, "", &format!("x{name}")),
        Edit::Delete { kind: kind @ Kind::Namespace, name, .. } => return delete(*kind, "", &format!("ns{name}")),
        Edit::Delete { kind: kind @ Kind::Node, name, .. } => return delete(*kind, "", &format!("node{name}")),
        Edit::Delete { kind, namespace, name } => {
            return delete(*kind, &namespace_of(*namespace), &format!("x{name}"));
        }
    };
    match parse(&text).remove(0).outcome {
        Outcome::Object(object) => Event::Apply(object),
        Outcome::Refused { stand_in: Some(object), .. } => Event::Apply(object),
        other => panic!("not accepted: {other:?}"),
    }
}

const CONDITIONS: [&str; 3] =
    ["", "conditions: {ready: false},", "conditions: {ready: false, serving: true, terminating: true},"];

const CHOSEN_BY_X0: &str = "10.96.40.128";

type Resources = BTreeMap<Arc<str>, Arc<Resource>>;

fn resources(index: &Index) -> Resources {
    index.resources().map(|resource| (resource.name.clone(), resource.clone())).collect()
}

fn policies(index: &Index) -> Resources {
    index.policies().map(|resource| (resource.name.clone(), resource.clone())).collect()
}

/// Every workload names policies that are there.
fn named(index: &Index) -> Result<(), String> {
    let policies = policies(index);
    for resource in index.resources() {
        let message = wire::Address::decode(resource.body.clone()).map_err(|error| error.to_string())?;
        let Some(wire::address::Type::Workload(workload)) = message.r#type else { continue };
        if let Some(missing) = workload.authorization_policies.iter().find(|key| !policies.contains_key(key.as_str())) {
            return Err(format!("{} names {missing}, which is not there", resource.name));
        }
    }
    Ok(())
}

/// Every resource is one that our own data plane accepts.
fn understood(resource: &Resource) -> Result<(), String> {
    match wire::Address::decode(resource.body.clone()).map_err(|error| error.to_string())?.r#type {
        Some(wire::address::Type::Workload(body)) => {
            Workload::try_from(&body).map(drop).map_err(|error| error.to_string())
        }
        Some(wire::address::Type::Service(body)) => {
            Service::try_from(&body).map(drop).map_err(|error| error.to_string())
        }
        None => Err("it is empty".to_owned()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn incremental_equals_rebuilt(edits in edits(), cuts in prop::collection::vec(any::<bool>(), 60)) {
        let mut index = Index::new(options());
        let mut objects: HashMap<ObjectId, Object> = HashMap::new();
        let mut followed = Resources::new();
        let mut followed_policies = Resources::new();
        let mut batch = Vec::new();
        for (position, edit) in edits.iter().enumerate() {
            let event = event(edit);
            match &event {
                Event::Apply(object) => drop(objects.insert(object.id(), object.clone())),
                Event::Delete(id) => drop(objects.remove(id)),
            }
            batch.push(event);
            if !cuts[position] && position + 1 < edits.len() {
                continue;
            }
            let changes = index.apply(batch.drain(..), time(0));
            for name in changes.removed() {
                prop_assert!(followed.remove(name).is_some(), "{name} was removed, but was not there");
            }
            for resource in changes.changed() {
                let before = followed.insert(resource.name.clone(), resource.clone());
                prop_assert!(before.as_ref() != Some(resource), "{} was sent unchanged", resource.name);
            }
            for (name, policy) in changes.policies().iter().chain(changes.late_policies()) {
                let before = match policy {
                    Some(policy) => followed_policies.insert(name.clone(), policy.clone()),
                    None => followed_policies.remove(name),
                };
                prop_assert!(before.as_ref() != policy.as_ref(), "{} was sent unchanged", name);
            }
        }
        prop_assert_eq!(&followed, &resources(&index));
        prop_assert_eq!(&followed_policies, &policies(&index));
        prop_assert_eq!(named(&index), Ok(()));
        for policy in followed_policies.values() {
            let error = Change::authorization(&policy.name, &policy.body).1;
            prop_assert!(error.is_none(), "{} is not valid: {error:?}", policy.name);
        }
        for resource in followed.values() {
            if let Err(error) = understood(resource) {
                prop_assert!(false, "{} is not valid: {error}", resource.name);
            }
        }
        let mut fresh = Index::new(options());
        fresh.waiting.take_starts_of(&index.waiting);
        fresh.apply(objects.into_values().map(Event::Apply), time(0));
        prop_assert_eq!(resources(&fresh), followed);
        prop_assert_eq!(policies(&fresh), followed_policies);
        prop_assert_eq!(fresh.notes(), index.notes());
        prop_assert_eq!(fresh.counts(), index.counts());
        prop_assert_eq!(fresh.next_deadline(), index.next_deadline());
    }
}

#[test]
fn the_address_in_the_edits_is_the_one_that_is_chosen() {
    let mut index = Index::new(options());
    let edit = Edit::Service { namespace: 0, name: 0, app: 0, address: 6, port: "web" };
    index.apply([event(&edit)], time(0));
    let aliases: Vec<_> = index.resources().flat_map(|resource| resource.aliases.clone()).collect();
    assert_eq!(aliases, [format!("/{CHOSEN_BY_X0}").into()]);
}
