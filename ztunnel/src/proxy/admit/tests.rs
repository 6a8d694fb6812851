use super::*;
use crate::proxy::local::fixture::{at, id, ip, local, mesh, pod};
use mesh_proto::security::{self, string_match::MatchType};
use mesh_proto::workload as wire;
use prost::Message as _;

const POD: &str = "10.0.0.2";
const CLIENT: &str = "10.0.0.1";

/// The pods `web` and `client`, and a policy on `web`.
fn shop(policy: Option<security::Authorization>) -> Snapshot {
    let mut snapshot = mesh(&[pod("web", &[POD]), pod("client", &[CLIENT])], &[]);
    if let Some(policy) = policy {
        snapshot.upsert_authorization((&policy).try_into().unwrap());
    }
    snapshot
}

/// Allows the service account `client` on port 80.
fn only_client_on_80() -> security::Authorization {
    let principal = MatchType::Exact("cluster.local/ns/shop/sa/client".into());
    let one = security::Match {
        principals: vec![security::StringMatch { match_type: Some(principal) }],
        destination_ports: vec![80],
        ..Default::default()
    };
    security::Authorization {
        name: "only-client".into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace.into(),
        rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![one] }] }],
        ..Default::default()
    }
}

fn tunnel_from(snapshot: &Snapshot, peer: &str, authority: &str) -> Result<Admission, Denial> {
    let (identity, addresses) = (id("shop", "web"), [ip(POD)]);
    let connection = Connection { local: at("10.0.0.2:15008"), peer: at("10.0.0.1:40000") };
    let authority: Authority = authority.parse().unwrap();
    let connect = Connect { authority: &authority };
    admit(snapshot, &local("web", &identity, &addresses), &id("shop", peer), connection, &connect)
}

fn plain(snapshot: &Snapshot, name: &str, to: &str) -> Result<Admission, Denial> {
    let (identity, addresses) = (id("shop", name), [ip(POD)]);
    let connection = Connection { local: at(to), peer: at("10.0.0.1:40000") };
    admit_plaintext(snapshot, &local(name, &identity, &addresses), connection)
}

/// Status, label, and policy.
fn told(result: Result<Admission, Denial>) -> (u16, String, Option<String>) {
    match result {
        Ok(admission) => (200, admission.target.to_string(), admission.allowed.policy.map(|policy| policy.to_string())),
        Err(denial) => (denial.reply(), denial.reason().into(), denial.policy().map(|policy| policy.to_string())),
    }
}

#[test]
fn tunnels() {
    let policy = Some("shop/only-client".to_owned());
    let cases = [
        ("client", "10.0.0.2:80", 200, "10.0.0.2:80", policy.clone()),
        ("client", "[::ffff:10.0.0.2]:80", 200, "10.0.0.2:80", policy.clone()),
        ("client", "10.0.0.2:81", 401, "policy_denied", policy.clone()),
        ("other", "10.0.0.2:80", 401, "policy_denied", policy),
        ("client", "10.0.0.3:80", 400, "authority_mismatch", None),
        ("client", "[2001:db8::2]:80", 400, "authority_mismatch", None),
        ("client", "web.shop:80", 400, "authority_not_an_address", None),
        ("client", "10.0.0.2:15001", 503, "forbidden_port", None),
        ("client", "10.0.0.2:15006", 503, "forbidden_port", None),
        ("client", "10.0.0.2:15008", 503, "forbidden_port", None),
    ];
    let snapshot = shop(Some(only_client_on_80()));
    for (peer, authority, status, label, policy) in cases {
        let expected = (status, label.to_owned(), policy);
        assert_eq!(told(tunnel_from(&snapshot, peer, authority)), expected, "{peer} {authority}");
    }
}

#[test]
fn plaintext_has_no_identity() {
    let guarded = shop(Some(only_client_on_80()));
    let denied = (401, "policy_denied".to_owned(), Some("shop/only-client".to_owned()));
    assert_eq!(told(plain(&guarded, "web", "10.0.0.2:80")), denied);
    let open = shop(None);
    assert_eq!(told(plain(&open, "web", "10.0.0.2:80")), (200, "10.0.0.2:80".into(), None));
    assert_eq!(told(plain(&open, "web", "10.0.0.2:15006")), (503, "forbidden_port".into(), None));
    assert_eq!(told(plain(&open, "web", "10.0.0.2:15008")), (503, "forbidden_port".into(), None));
}

#[test]
fn what_the_record_needs_comes_along() {
    let open = shop(None);
    let admission = tunnel_from(&open, "client", "10.0.0.2:80").unwrap();
    assert_eq!(admission.source_ip, ip(CLIENT));
    assert_eq!(&*admission.destination.name, "web");
    assert_eq!(admission.source.map(|source| source.name.to_string()), Some("client".into()));
    // The address of one and the identity of another: the source is not known.
    assert!(tunnel_from(&open, "other", "10.0.0.2:80").unwrap().source.is_none());

    let denial = tunnel_from(&open, "client", "10.0.0.2:15008").unwrap_err();
    assert_eq!(denial.destination.map(|pod| pod.name.to_string()), Some("web".into()));
    assert_eq!(denial.source.map(|pod| pod.name.to_string()), Some("client".into()));
}

#[test]
fn a_pod_that_discovery_does_not_know_takes_nothing() {
    let unknown = (503, "unknown_destination".to_owned(), None);
    assert_eq!(told(tunnel_from(&Snapshot::new(), "client", "10.0.0.2:80")), unknown);
    assert_eq!(told(plain(&Snapshot::new(), "web", "10.0.0.2:80")), unknown);
    // The address belonged to `web`; discovery has not brought the pod that has it now, nor its policies.
    assert_eq!(told(plain(&shop(None), "newcomer", "10.0.0.2:80")), unknown);
}

#[test]
fn a_pod_whose_resource_cannot_be_taken_takes_nothing() {
    let mut snapshot = shop(None);
    assert!(plain(&snapshot, "web", "10.0.0.2:80").is_ok());
    let bad = wire::Workload { status: 9, ..pod("web", &[POD]) };
    let body = wire::Address { r#type: Some(wire::address::Type::Workload(bad)) }.encode_to_vec();
    snapshot.apply(mesh_model::Change::address("Kubernetes//Pod/shop/web", &body).0);
    let invalid = (503, "invalid_destination".to_owned(), None);
    assert_eq!(told(tunnel_from(&snapshot, "client", "10.0.0.2:80")), invalid);
    assert_eq!(told(plain(&snapshot, "web", "10.0.0.2:80")), invalid);
    let text = plain(&snapshot, "web", "10.0.0.2:80").unwrap_err().to_string();
    assert!(text.contains("Kubernetes//Pod/shop/web") && text.contains("status"), "{text}");
}

#[test]
fn a_policy_that_is_named_but_not_here_denies() {
    let web = wire::Workload { authorization_policies: vec!["shop/later".into()], ..pod("web", &[POD]) };
    let mut snapshot = mesh(&[web], &[]);
    let denied = (401, "policy_denied".to_owned(), Some("shop/later".to_owned()));
    assert_eq!(told(tunnel_from(&snapshot, "client", "10.0.0.2:80")), denied);
    assert_eq!(told(plain(&snapshot, "web", "10.0.0.2:80")), denied);
    snapshot.upsert_invalid_authorization("shop", "later", mesh_model::Scope::WorkloadSelector);
    assert_eq!(told(tunnel_from(&snapshot, "client", "10.0.0.2:80")), denied);
}

#[test]
fn proxy_protocol_is_not_passed_over() {
    let tunnel = wire::ApplicationTunnel { protocol: wire::application_tunnel::Protocol::Proxy.into(), port: 15088 };
    let snapshot = mesh(&[wire::Workload { application_tunnel: Some(tunnel), ..pod("web", &[POD]) }], &[]);
    let expected = (503, "application_tunnel".to_owned(), None);
    assert_eq!(told(tunnel_from(&snapshot, "client", "10.0.0.2:80")), expected);
}
