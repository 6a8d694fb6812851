//! Byte-level interoperation: peers written from the protocol's facts with bare h2, rustls and protobuf, on the other
//! end of the shipped ztunnel and culvertd, in each direction.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::workload::{Address, TunnelProtocol, address};
use tests::Error;
use tests::cluster::Cluster;
use tests::interop::hbone_server::Behaviour;
use tests::interop::xds_client::{AUTHORIZATION_TYPE, Collected, NodeInfo, Session, WORKLOAD_TYPE, decode};
use tests::interop::{Identity, ca_client, hbone_client, hbone_server};
use tests::netns::NetNs;
use tests::pod::Pod;
use tonic::Code;

const ECHO: u16 = 7000;

/// Runs `work` on a runtime whose sockets lie in `network`.
fn inside<T: Send>(network: &NetNs, work: impl AsyncFnOnce() -> T + Send) -> T {
    network
        .run(|| tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work()))
        .unwrap()
}

/// A pod outside the mesh with a certificate of its own from culvertd, as a peer's proxy would get it.
struct Bare {
    pod: Arc<Pod>,
    identity: Identity,
}

fn bare(cluster: &Cluster, name: &str, label: Option<(&str, &str)>) -> Bare {
    let builder = cluster.pod(name).node(1).service_account(name).enrolled(false);
    let builder = match label {
        Some((label, value)) => builder.label(label, value),
        None => builder,
    };
    let pod = builder.start().unwrap();
    let control = cluster.control().unwrap();
    let root = std::fs::read_to_string(control.root_certificate()).unwrap();
    let node = cluster.node(1).unwrap().name.clone();
    let token = control.token("default", name, name, &node).unwrap();
    let xds = control.xds();
    let issued = inside(pod.network(), async || {
        // The authority learns of the pod from its directory; until then it says "unavailable, retry".
        for _ in 0..100 {
            match ca_client::request(xds, &root, &token, &pod.identity(), None).await {
                Err(status) if status.code() == Code::Unavailable => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                other => return other,
            }
        }
        Err(tonic::Status::deadline_exceeded("no certificate in ten seconds"))
    });
    let identity = Identity::from_issued(&issued.unwrap()).unwrap();
    Bare { pod, identity }
}

fn echo_server(cluster: &Cluster) -> Arc<Pod> {
    let listen = format!("0.0.0.0:{ECHO}");
    cluster
        .pod("server")
        .node(2)
        .service_account("server")
        .enrolled(true)
        .command(["echo", "--listen", &listen])
        .start()
        .unwrap()
}

async fn tunnel(peer: &Bare, server: &Pod) -> hbone_client::Client {
    let tcp = tokio::net::TcpStream::connect(server.at(15008)).await.unwrap();
    hbone_client::connect(tcp, &peer.identity, &server.identity()).await.unwrap()
}

#[test]
fn a_bare_client_is_served_by_ztunnel() {
    let cluster = Cluster::builder().start().unwrap();
    let (server, peer) = (echo_server(&cluster), bare(&cluster, "peer", None));
    inside(peer.pod.network(), async || {
        let client = tunnel(&peer, &server).await;
        assert_eq!(client.negotiated.alpn, "h2");
        assert!(client.negotiated.version.contains("1_3"), "{:?}", client.negotiated);
        assert_eq!(client.negotiated.peer, server.identity());

        let answer =
            client.connect(&server.at(ECHO).to_string(), &[("baggage", "k8s.namespace.name=default")]).await.unwrap();
        assert_eq!(answer.status, 200);
        let mut stream = answer.stream().unwrap();
        stream.write("over the wire").await.unwrap();
        stream.finish().unwrap();
        let back = stream.read_to_end().await.unwrap();
        assert!(String::from_utf8_lossy(&back).contains("over the wire"), "{back:?}");

        // Another stream of the same tunnel.
        assert_eq!(client.connect(&server.at(ECHO).to_string(), &[]).await.unwrap().status, 200);
    });
}

#[test]
fn ztunnel_refuses_a_bare_client_as_the_protocol_says() {
    let cluster = Cluster::builder().start().unwrap();
    let (server, peer) = (echo_server(&cluster), bare(&cluster, "peer", None));
    let other = cluster.pod("other").node(2).enrolled(true).start().unwrap();
    inside(peer.pod.network(), async || {
        let client = tunnel(&peer, &server).await;
        let status = async |authority: String| client.connect(&authority, &[]).await.unwrap().status;
        assert_eq!(status(other.at(ECHO).to_string()).await, 400, "another pod's address");
        assert_eq!(status("server.default.svc.cluster.local:80".to_owned()).await, 400, "a name");
        assert_eq!(status(server.at(1).to_string()).await, 503, "nothing listens there");
        for forbidden in [15001, 15006, 15008] {
            assert_eq!(status(server.at(forbidden).to_string()).await, 503, "{forbidden}");
        }
        let get = http::Request::get(format!("http://{}/", server.at(ECHO))).body(()).unwrap();
        let answer = client.request(get).await.unwrap();
        assert!([400, 404].contains(&answer.status), "GET was answered {}", answer.status);
        assert_eq!(status(server.at(ECHO).to_string()).await, 200, "the tunnel is still good");
    });
}

#[test]
fn ztunnel_refuses_certificates_that_are_not_the_meshs() {
    let cluster = Cluster::builder().start().unwrap();
    let (server, peer) = (echo_server(&cluster), bare(&cluster, "peer", None));
    let root = std::fs::read_to_string(cluster.control().unwrap().root_certificate()).unwrap();
    inside(peer.pod.network(), async || {
        let tcp = tokio::net::TcpStream::connect(server.at(15008)).await.unwrap();
        let wrong = hbone_client::connect(tcp, &peer.identity, "spiffe://cluster.local/ns/default/sa/somebody").await;
        assert!(wrong.is_err(), "the client's own check");

        let foreign = foreign_identity(&peer.pod.identity(), &root);
        let tcp = tokio::net::TcpStream::connect(server.at(15008)).await.unwrap();
        let refused = match hbone_client::connect(tcp, &foreign, &server.identity()).await {
            Err(_) => true,
            // TLS 1.3 lets the client finish before the server has seen its certificate.
            Ok(client) => client.connect(&server.at(ECHO).to_string(), &[]).await.is_err(),
        };
        assert!(refused, "a certificate of another root");
    });
}

/// A certificate for the same SPIFFE ID, signed by nobody the mesh knows; the mesh's roots are trusted by its holder.
fn foreign_identity(spiffe: &str, roots: &str) -> Identity {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(spiffe.try_into().unwrap())];
    let certificate = params.self_signed(&key).unwrap();
    Identity::from_pem(&certificate.pem(), &key.serialize_pem(), roots).unwrap()
}

#[test]
fn ztunnel_is_served_by_a_bare_server() {
    let cluster = Cluster::builder().start().unwrap();
    let peer = bare(&cluster, "peer", Some(("networking.istio.io/tunnel", "http")));
    let client = cluster.pod("client").node(2).service_account("client").enrolled(true).start().unwrap();
    let hosted = peer.pod.network().listen(SocketAddr::from(([0, 0, 0, 0], 15008))).unwrap();
    hosted.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _inside = runtime.enter();
    let listener = tokio::net::TcpListener::from_std(hosted).unwrap();
    let server = hbone_server::serve(listener, &peer.identity, Behaviour::Echo).unwrap();

    let target = peer.pod.at(ECHO).to_string();
    let done = client.run(["connect", "--to", &target, "--send", "hello from the mesh", "--read", "19"]).unwrap();
    assert!(done.status.success(), "{done:?}");
    assert!(done.stdout.contains("hello from the mesh"), "{done:?}");

    let records = server.records();
    let record = records.first().expect("the tunnel was used");
    assert_eq!((record.method.as_str(), record.authority.as_str()), ("CONNECT", target.as_str()));
    assert!(!record.scheme_or_path, "a CONNECT has neither :scheme nor :path");
    assert_eq!(record.negotiated.peer, client.identity());
    assert_eq!(record.negotiated.alpn, "h2");
    assert_eq!(record.client.ip(), client.ip(), "the tunnel comes from the pod's own address");
    let forwarded = record.header("forwarded").expect("forwarded");
    assert!(forwarded.contains(&client.ip().to_string()), "{forwarded}");
    assert!(record.header("baggage").is_some_and(|b| b.contains("k8s.namespace.name=default")), "{record:?}");
    assert!(record.header("traceparent").is_some_and(|t| t.starts_with("00-") && t.len() == 55), "{record:?}");
}

#[test]
fn ztunnel_refuses_a_bare_server_with_another_identity() {
    let cluster = Cluster::builder().start().unwrap();
    let peer = bare(&cluster, "peer", Some(("networking.istio.io/tunnel", "http")));
    let impostor = bare(&cluster, "impostor", None);
    let client = cluster.pod("client").node(2).enrolled(true).start().unwrap();
    let hosted = peer.pod.network().listen(SocketAddr::from(([0, 0, 0, 0], 15008))).unwrap();
    hosted.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _inside = runtime.enter();
    let listener = tokio::net::TcpListener::from_std(hosted).unwrap();
    let server = hbone_server::serve(listener, &impostor.identity, Behaviour::Echo).unwrap();

    let done =
        client.run(["connect", "--to", &peer.pod.at(ECHO).to_string(), "--send", "secret", "--read", "6"]).unwrap();
    assert!(!done.stdout.contains("secret"), "{done:?}");
    assert!(server.records().is_empty(), "no CONNECT reaches somebody else: {:?}", server.records());
}

#[test]
fn a_bare_discovery_client_is_served_by_culvertd() -> Result<(), Error> {
    let cluster = Cluster::builder().nodes(1).start()?;
    let peer = cluster.pod("peer").node(1).service_account("peer").enrolled(false).start()?;
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: default}\n\
                   spec: {clusterIP: 10.96.7.7, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}\n";
    cluster.apply("web.yaml", service)?;
    let control = cluster.control()?;
    let (xds, root) = (control.xds(), std::fs::read_to_string(control.root_certificate()).unwrap());
    let token = control.token("default", "peer", "peer", &cluster.node(1)?.name)?;
    let info = NodeInfo { ip: peer.ip(), pod: "peer".into(), namespace: "default".into(), node: "node1".into() };
    let has_web = |c: &Collected| c.resources.contains_key("default/web.default.svc.cluster.local");

    inside(peer.network(), async || {
        let refused = match Session::open(xds, &root, "not-a-token", &info).await {
            Err(_) => true,
            Ok(mut session) => {
                session.subscribe_wildcard(WORKLOAD_TYPE, &[]).await.is_err() || session.next().await.is_err()
            }
        };
        assert!(refused, "a stream without a good token");

        let mut session = Session::open(xds, &root, &token, &info).await.unwrap();
        session.subscribe_wildcard(WORKLOAD_TYPE, &[]).await.unwrap();
        session.subscribe_wildcard(AUTHORIZATION_TYPE, &[]).await.unwrap();
        let uid = "Kubernetes//Pod/default/peer";
        let all = session.collect_until(WORKLOAD_TYPE, |c| has_web(c) && c.resources.contains_key(uid)).await.unwrap();
        session.collect_until(AUTHORIZATION_TYPE, |c| c.responses > 0).await.unwrap();
        let address: Address = decode(&all.resources[uid], WORKLOAD_TYPE).unwrap();
        let Some(address::Type::Workload(workload)) = address.r#type else { panic!("{address:?}") };
        assert_eq!(workload.service_account, "peer");
        assert_eq!(workload.tunnel_protocol, i32::from(TunnelProtocol::None));

        // What is known already is not sent again.
        let versions: BTreeMap<_, _> = all.resources.iter().map(|(n, r)| (n.clone(), r.version.clone())).collect();
        let known: Vec<_> = versions.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        let mut resumed = Session::open(xds, &root, &token, &info).await.unwrap();
        resumed.subscribe_wildcard(WORKLOAD_TYPE, &known).await.unwrap();
        while let Ok(response) = resumed.next_within(Duration::from_millis(700)).await {
            assert!(response.resources.is_empty(), "sent again: {response:?}");
        }

        // On demand: by address, under the primary name with the asked one as alias; an unknown name is "removed".
        let mut demand = Session::open(xds, &root, &token, &info).await.unwrap();
        demand.start_on_demand(WORKLOAD_TYPE).await.unwrap();
        demand.change(WORKLOAD_TYPE, &["/10.96.7.7", "/192.0.2.1"], &[]).await.unwrap();
        let found =
            demand.collect_until(WORKLOAD_TYPE, |c| has_web(c) && c.removed.contains("/192.0.2.1")).await.unwrap();
        let web = &found.resources["default/web.default.svc.cluster.local"];
        assert!(web.aliases.iter().any(|a| a == "/10.96.7.7"), "{:?}", web.aliases);
    });
    // A NACK keeps the session, and is shown as long as the client refuses the resource.
    let nacked = || tests::metrics::sum(&control.metrics().unwrap(), "culvert_xds_nacked_resources", &[]);
    assert!(nacked() < 0.5, "before the NACK");
    inside(peer.network(), async || {
        let mut session = Session::open(xds, &root, &token, &info).await.unwrap();
        session.subscribe_wildcard(WORKLOAD_TYPE, &[]).await.unwrap();
        let response = session.next().await.unwrap();
        session.nack(&response, "default/web.default.svc.cluster.local: not liked").await.unwrap();
        cluster.apply("more.yaml", &service.replace("web", "more").replace("7.7", "7.8")).unwrap();
        let more = "default/more.default.svc.cluster.local";
        session.collect_until(WORKLOAD_TYPE, |c| c.resources.contains_key(more)).await.unwrap();
        assert!(nacked() > 0.5, "the NACK is shown");
    });

    // Removal reaches a subscriber.
    inside(peer.network(), async || {
        let mut session = Session::open(xds, &root, &token, &info).await.unwrap();
        session.subscribe_wildcard(WORKLOAD_TYPE, &[]).await.unwrap();
        session.collect_until(WORKLOAD_TYPE, has_web).await.unwrap();
        cluster.directory().remove("web.yaml").unwrap();
        session.collect_until(WORKLOAD_TYPE, |c| !has_web(c)).await.unwrap();
    });
    Ok(())
}

#[test]
fn a_bare_certificate_client_is_served_by_culvertd() -> Result<(), Error> {
    let cluster = Cluster::builder().start()?;
    let (server, peer) = (echo_server(&cluster), bare(&cluster, "peer", None));
    let control = cluster.control()?;
    let (xds, root) = (control.xds(), std::fs::read_to_string(control.root_certificate()).unwrap());
    let node2 = cluster.node(2)?;
    let ordinary = control.token("default", "peer", "peer", &cluster.node(1)?.name)?;
    let proxy = control.token("culvert-system", "ztunnel", &node2.mesh()?.proxy().record.name, &node2.name)?;
    assert_eq!(peer.identity.spiffe().unwrap(), peer.pod.identity(), "its own, whatever the CSR says");

    inside(peer.pod.network(), async || {
        let ask = async |token: &str, impersonate: Option<&str>| {
            ca_client::request(xds, &root, token, "spiffe://cluster.local/ns/x/sa/forged", impersonate).await
        };
        let own = ask(&ordinary, None).await.unwrap();
        assert_eq!(Identity::from_issued(&own).unwrap().spiffe().unwrap(), peer.pod.identity());
        let refused = ask(&ordinary, Some(&server.identity())).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "an ordinary pod impersonates: {refused}");

        let given = ask(&proxy, Some(&server.identity())).await.unwrap();
        assert_eq!(Identity::from_issued(&given).unwrap().spiffe().unwrap(), server.identity());
        let elsewhere = ask(&proxy, Some(&peer.pod.identity())).await.unwrap_err();
        assert!(
            [Code::PermissionDenied, Code::Unavailable].contains(&elsewhere.code()),
            "an identity of another node: {elsewhere}"
        );
        let forged = ask("eyJhbGciOiJub25lIn0.e30.", Some(&server.identity())).await.unwrap_err();
        assert_eq!(forged.code(), Code::Unauthenticated, "{forged}");
    });
    Ok(())
}
