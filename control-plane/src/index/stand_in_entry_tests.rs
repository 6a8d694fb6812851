//! ServiceEntries and WorkloadEntries that are not valid, and were never: nobody takes them for strangers to the mesh.

use mesh_proto::workload as wire;

use super::entry_tests::{service_entry, workload_entry};
use super::policy_tests::unread;
use super::stand_in_tests::{at, snapshot};
use super::tests::{apply, delete, find, index, options, pod, service, services, time};
use super::{Event, Index};
use crate::api::{Kind, Object, ObjectId, stand_in};

const PORTS: &str = "ports: [{number: 5432, name: sql}]";
/// A field that no entry has.
const BAD: &str = "perhaps: true";

/// What a proxy's resolver finds for a host.
fn looked_up(index: &Index, host: &str) -> Option<Vec<String>> {
    let snapshot = snapshot(index);
    let service = snapshot.services_by_host(host).next()?;
    Some(service.addresses.iter().filter(|vip| vip.block.is_host()).map(|vip| vip.block.base().to_string()).collect())
}

#[test]
fn connections_to_the_addresses_of_a_service_entry_that_is_not_valid_are_refused_wherever_they_can_be_read() {
    const BLOCK: &str = "192.0.2.0/24";
    for (spec, refused) in [
        (
            format!("hosts: [db.example.com], addresses: [192.0.2.1, {BLOCK}], {PORTS}, {BAD}"),
            &["192.0.2.1", "192.0.2.9"][..],
        ),
        (format!("addresses: [{BLOCK}], {PORTS}"), &["192.0.2.9"]),
        (format!("hosts: [db], addresses: [192.0.2.9, bad], {PORTS}"), &["192.0.2.9"]),
        (format!("hosts: [db.example.com], addresses: 192.0.2.9, {PORTS}"), &["192.0.2.9"]),
        // Bits behind the length, and a length that is none.
        (format!("hosts: [db.example.com], addresses: [192.0.2.1/24], {PORTS}, {BAD}"), &["192.0.2.0", "192.0.2.255"]),
        (format!("hosts: [db.example.com], addresses: [192.0.2.1/240], {PORTS}"), &["192.0.2.1"]),
        (
            format!("hosts: [db.example.com], addresses: ['fd00::/64', '::ffff:192.0.2.0/120'], {PORTS}"),
            &["fd00::9", "192.0.2.9"],
        ),
        (
            format!(
                "hosts: [db.example.com], resolution: STATIC, endpoints: [{{address: 192.0.2.1}}, {{address: x_y}}], {PORTS}"
            ),
            &["192.0.2.1"],
        ),
        ("endpoints: [{address: '::ffff:192.0.2.1', weight: many}, 3]".to_owned(), &["192.0.2.1"]),
        // Where they will be once it is mended.
        (format!("hosts: [db.example.com], resolution: SOMEHOW, {PORTS}"), &["240.240.215.134"]),
        ("hosts: [db.example.com], resolution: DNS, ports: [{number: 0}]".to_owned(), &["240.240.215.134"]),
    ] {
        let mut index = index(&pod("a", "10.0.0.1", "app: web", ""));
        let text = service_entry("db", &spec);
        refused.iter().for_each(|address| assert_eq!(at(&index, address), "stranger", "{spec}"));
        index.apply(unread(&text), time(0));
        refused.iter().for_each(|address| assert_eq!(at(&index, address), "refused", "{address} {spec}"));
        for other in ["198.51.100.1", "10.0.0.1"] {
            assert_ne!(at(&index, other), "refused", "{spec}");
        }
        let notes = index.conflicts();
        assert!(notes.len() == 1 && notes[0].object == "ServiceEntry ns/db", "{notes:?}");
        assert!(notes[0].reason.starts_with("is not valid"), "{notes:?}");
        index.apply([delete(Kind::ServiceEntry, "ns", "db")], time(0));
        refused.iter().for_each(|address| assert_eq!(at(&index, address), "stranger", "{spec}"));
        assert_eq!((index.conflicts().len(), index.resources().count()), (0, 1));
    }
}

#[test]
fn nothing_is_taken_from_everybody_by_an_entry_that_is_not_valid() {
    for address in ["0.0.0.0/0", "'::/0'", "127.0.0.1", "224.0.0.1", "240.240.3.4", "240.240.0.0/16", "''", "a/8"] {
        let mut index = Index::new(options());
        index.apply(unread(&service_entry("db", &format!("addresses: [{address}], {PORTS}"))), time(0));
        assert_eq!(index.resources().count(), 0, "{address}");
    }
    // Who has the very address has it still; and a name of the namespace's own services is theirs.
    let web = "---\n{apiVersion: v1, kind: Service, metadata: {name: web, namespace: ns}, spec: {clusterIP: 10.96.0.7, ports: [{port: 80}]}}\n";
    let mut index = index(&(pod("a", "10.0.0.1", "app: web", "") + web));
    let spec = format!(
        "hosts: [web.ns.svc.cluster.local], addresses: [10.0.0.0/8], endpoints: [{{address: 10.0.0.1}}], {PORTS}, {BAD}"
    );
    index.apply(unread(&service_entry("thief", &spec)), time(0));
    assert_eq!((at(&index, "10.96.0.7").as_str(), at(&index, "10.0.0.1").as_str()), ("service web", "tunnel to sa"));
    assert_eq!(at(&index, "10.0.0.2"), "refused");
    assert_eq!(looked_up(&index, "web.ns.svc.cluster.local"), Some(vec!["10.96.0.7".to_owned()]));
    // No entry takes the name of another object.
    let value = serde_json::json!({"spec": {"address": "192.0.2.7", "addresses": ["192.0.2.7"]}});
    for (namespace, name) in [("n/s", "a"), ("n", "s/a")] {
        for kind in [Kind::ServiceEntry, Kind::WorkloadEntry] {
            let id = ObjectId { kind, namespace: namespace.into(), name: name.into() };
            assert_eq!(stand_in(&id, &value), None);
        }
    }
}

#[test]
fn a_host_of_an_entry_that_is_not_valid_is_found_by_name_and_does_not_lead_out_of_the_mesh() {
    let spec = format!("hosts: [DB.example.com, '*.example.org', 3, db], resolution: DNS, {PORTS}, {BAD}");
    let mut index = Index::new(options());
    index.apply(unread(&service_entry("db", &spec)), time(0));
    for host in ["db.example.com", "*.example.org"] {
        let found = looked_up(&index, host).unwrap();
        assert_eq!(found.len(), 1, "{host}");
        assert_eq!(at(&index, &found[0]), "refused", "{host}");
    }
    // Connections to its ports are refused for what it is.
    let known = snapshot(&index);
    let known = known.services_by_host("db.example.com").next().unwrap();
    assert!(known.port(5432).is_some() && !known.private);
    // Mended it is at the same address.
    let chosen = looked_up(&index, "db.example.com");
    let good = format!("hosts: [db.example.com], resolution: STATIC, endpoints: [{{address: 192.0.2.1}}], {PORTS}");
    index.apply(apply(&service_entry("db", &good)), time(0));
    assert_eq!(looked_up(&index, "db.example.com"), chosen);
    assert_eq!(
        (at(&index, &chosen.unwrap()[0]).as_str(), at(&index, "192.0.2.1").as_str()),
        ("service db", "plaintext")
    );
    assert_eq!(looked_up(&index, "*.example.org"), None);
    // What goes where it is addressed has no address of its own, mended or not.
    let mut index = Index::new(options());
    index.apply(
        unread(&service_entry("any", &format!("hosts: [a.example.com], exportTo: [ns], {PORTS}, {BAD}"))),
        time(0),
    );
    assert_eq!(looked_up(&index, "a.example.com"), Some(Vec::new()));
    assert!(snapshot(&index).services_by_host("a.example.com").next().unwrap().private);
}

#[test]
fn an_entry_that_is_not_valid_takes_no_host_from_one_that_is() {
    let dated = |name: &str, created: u8, spec: &str| {
        let created = format!("namespace: ns, creationTimestamp: '2026-01-0{created}T00:00:00Z'}}");
        service_entry(name, spec).replace("namespace: ns}", &created)
    };
    let good = format!("hosts: [db.example.com], resolution: STATIC, endpoints: [{{address: 192.0.2.1}}], {PORTS}");
    let bad =
        format!("hosts: [db.example.com], addresses: [192.0.2.9], endpoints: [{{address: 192.0.2.8}}], {PORTS}, {BAD}");
    let good = apply(&dated("young", 2, &good));
    let bad = unread(&dated("old", 1, &bad));
    for events in [[good.clone(), bad.clone()].concat(), [bad, good].concat()] {
        let mut index = Index::new(options());
        index.apply(events, time(0));
        let found = looked_up(&index, "db.example.com").unwrap();
        assert_eq!(at(&index, &found[0]), "service young");
        assert_eq!(
            ["192.0.2.1", "192.0.2.8", "192.0.2.9"].map(|one| at(&index, one)),
            ["plaintext", "refused", "refused"]
        );
        index.apply([delete(Kind::ServiceEntry, "ns", "young")], time(0));
        assert_eq!(at(&index, &looked_up(&index, "db.example.com").unwrap()[0]), "refused");
    }
}

#[test]
fn a_workload_entry_that_is_not_valid_is_refused_where_its_address_can_be_read() {
    const SERVICE: &str = "---\n{apiVersion: v1, kind: Service, metadata: {name: web, namespace: ns}, spec: {clusterIP: 10.96.0.7, selector: {app: vm}, ports: [{port: 80}]}}\n";
    for (spec, is_known) in [
        ("address: 192.0.2.7, weight: -1, labels: {app: vm}", true),
        ("address: 192.0.2.7, weight: many", true),
        ("address: 192.0.2.7, network: far, labels: {networking.istio.io/tunnel: http}", true),
        ("address: '::ffff:192.0.2.7'", true),
        ("address: 192.0.2.7, perhaps: true", true),
        ("address: 192.0.2.700", false),
        ("address: [192.0.2.7]", false),
        ("address: 'unix:///socket'", false),
    ] {
        let text = workload_entry("vm", spec);
        let mut index = index(SERVICE);
        index.apply(unread(&text), time(0));
        assert_eq!(at(&index, "192.0.2.7"), if is_known { "refused" } else { "stranger" }, "{spec}");
        assert_eq!(index.conflicts().len(), usize::from(is_known), "{:?}", index.conflicts());
        index.apply(apply(&workload_entry("vm", "address: 192.0.2.7, labels: {app: vm}")), time(0));
        assert_eq!((at(&index, "192.0.2.7").as_str(), index.conflicts().len()), ("plaintext", 0));
        index.apply(unread(&text), time(0));
        index.apply([delete(Kind::WorkloadEntry, "ns", "vm")], time(0));
        assert_eq!((at(&index, "192.0.2.7").as_str(), index.resources().count()), ("stranger", 1));
    }
    // Whoever does not know why it is refused does not get through it either, nor to it by a service.
    let mut index = index(SERVICE);
    index.apply(unread(&workload_entry("vm", "address: 192.0.2.7, weight: -1, labels: {app: vm}")), time(0));
    let uid = "Kubernetes/networking.istio.io/WorkloadEntry/ns/vm";
    let Some(wire::address::Type::Workload(told)) = find(&index, uid) else { panic!("no workload") };
    let Some(wire::gateway_address::Destination::Hostname(waypoint)) = told.waypoint.unwrap().destination else {
        panic!("an address")
    };
    assert!(waypoint.hostname.ends_with(".invalid") && told.services.is_empty(), "{waypoint:?}");
    // A pod of the address is the pod.
    index.apply(apply(&pod("a", "192.0.2.7", "app: vm", "")), time(0));
    assert_eq!((at(&index, "192.0.2.7").as_str(), services(&index, "a").len()), ("tunnel to sa", 1));
    assert_eq!(service(&index, "web").ports.len(), 1);
}

#[test]
fn the_last_good_version_stays_where_it_was_and_is_where_the_newest_says() {
    let keep = |last: &str, newest: &str| {
        let (last, newest) = (apply(last), unread(newest));
        let ([Event::Apply(last)], [Event::Apply(newest)]) = (&last[..], &newest[..]) else {
            panic!("one object each")
        };
        let kept = crate::api::keep(last, Some(newest)).unwrap();
        let mut index = Index::new(options());
        index.apply([Event::Apply(kept.clone())], time(0));
        (index, kept)
    };
    let tunnel = "labels: {networking.istio.io/tunnel: http}";
    let vm = |address: &str, rest: &str| workload_entry("vm", &format!("address: {address}, {tunnel}{rest}"));
    let (index, _) = keep(&vm("192.0.2.7", ""), &vm("192.0.2.8", ", weight: -1"));
    assert_eq!(["192.0.2.7", "192.0.2.8"].map(|one| at(&index, one)), ["tunnel to default", "tunnel to default"]);
    let (_, kept) = keep(&vm("192.0.2.7", ""), &vm("192.0.2.7", ", weight: -1"));
    assert!(matches!(kept, Object::WorkloadEntry(entry) if entry.also_at.is_none()));

    let db = |addresses: &str, rest: &str| {
        let endpoints = "resolution: STATIC, endpoints: [{address: 192.0.2.1}]";
        service_entry("db", &format!("hosts: [db.example.com], addresses: [{addresses}], {endpoints}, {PORTS}{rest}"))
    };
    let bad = format!(", {BAD}");
    let (index, _) = keep(&db("10.1.0.1", ""), &db("10.1.0.1, 10.2.0.0/16", &bad));
    assert_eq!(["10.1.0.1", "10.2.0.9"].map(|one| at(&index, one)), ["service db", "service db"]);
    // The address that was chosen stays.
    let (index, _) = keep(&db("", ""), &db("10.2.0.0/16", &bad));
    assert_eq!(["240.240.215.134", "10.2.0.9"].map(|one| at(&index, one)), ["service db", "service db"]);
}
