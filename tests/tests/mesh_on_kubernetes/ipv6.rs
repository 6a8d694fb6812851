//! Pods with addresses of both families talk through the mesh in each.

use std::net::SocketAddr;

use serde_json::Value;
use tests::wait;

use crate::cases::{inbound_at, peer_of};
use crate::mesh::{BOUND, Mesh, text};

/// By the pod's own addresses and by its service's, from another node and from outside of the mesh.
pub fn both(mesh: &Mesh) {
    mesh.cluster.apply("ipv6.yaml", include_str!("ipv6.yaml")).unwrap();
    mesh.until_pods("both", true);
    let server = mesh.pod_of("both", "server");
    let service = mesh.cluster.api().get("/api/v1/namespaces/both/services/server").unwrap().expect("the service");
    let second = |object: &Value, list: &str| format!("[{}]:7000", text(object, &format!("{list}/1")));
    let at_pod = format!("[{}]:7000", text(&server, "/status/podIPs/1/ip"));
    let by_service = second(&service, "/spec/clusterIPs");
    let identity = "src.identity=\"spiffe://cluster.local/ns/both/sa/default\"";
    let address: SocketAddr = at_pod.parse().expect("an IPv6 address");
    assert!(address.is_ipv6(), "{server}");

    let client = text(&mesh.pod_of("both", "client"), "/status/podIPs/1/ip");
    let proven = || {
        let records = inbound_at(mesh, &server, address.ip());
        let from = format!("src.addr=[{client}]:");
        records.iter().filter(|line| line.contains(identity) && line.contains(&from)).count()
    };
    for to in [&at_pod, &by_service] {
        let before = proven();
        let mut last = Value::Null;
        let peer = wait::until(&format!("{to} is reached"), BOUND, || {
            last = mesh.run("both", "client", &["connect", "--to", to, "--read-line"]);
            let banner: Value = serde_json::from_str(last["received"].as_str()?).ok()?;
            banner["peer"].as_str()?.parse::<SocketAddr>().ok()
        });
        let peer = peer.unwrap_or_else(|error| panic!("{error}: {last}\n{}", mesh.state()));
        assert_eq!(peer.ip().to_string(), client, "the client's own address");
        wait::until("a record with the client's identity", BOUND, || (proven() > before).then_some(()))
            .unwrap_or_else(|error| panic!("{error}: {:#?}", inbound_at(mesh, &server, address.ip())));
    }

    let peer = peer_of(mesh.cluster.fabric(), address).expect("reached from outside");
    let from = format!("src.addr=[{}]:", peer.ip());
    let record = wait::until("the record of who is outside", BOUND, || {
        inbound_at(mesh, &server, address.ip()).into_iter().find(|line| line.contains(&from))
    });
    let record = record.unwrap_or_else(|error| panic!("{error}\n{}", mesh.state()));
    assert!(!record.contains("src.identity="), "{record}");
}
