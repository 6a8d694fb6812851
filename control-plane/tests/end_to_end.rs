//! The whole control plane on loopback: manifests in a directory, a client over TLS, changes seen as they are made.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking, their helpers too"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use clap::Parser;
use control_plane::app::{Addresses, App};
use control_plane::commands;
use control_plane::config::{Command, CommandLine, Config};
use mesh_identity::authority::CsrPublicKey;
use mesh_proto::ca::IstioCertificateRequest;
use mesh_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_proto::workload as wire;
use mesh_runtime::log::LogHandle;
use mesh_runtime::signal::Requester;
use mesh_xds::{AUTHORIZATION_TYPE, WORKLOAD_TYPE};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Streaming};

const LONG: Duration = Duration::from_secs(20);

/// A running control plane with its two directories.
struct Running {
    source: tempfile::TempDir,
    state: tempfile::TempDir,
    addresses: Addresses,
    stop: Requester,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    async fn start(manifests: &[(&str, &str)]) -> Self {
        let (source, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, text) in manifests {
            write(source.path(), name, text);
        }
        let line = CommandLine::parse_from([
            "culvertd",
            "--source-dir",
            source.path().to_str().unwrap(),
            "--state-dir",
            state.path().to_str().unwrap(),
            "--xds-addr=127.0.0.1:0",
            "--metrics-addr=127.0.0.1:0",
            "--ready-addr=127.0.0.1:0",
            "--admin-addr=127.0.0.1:0",
        ]);
        let config = Config::new(&line.serve).unwrap();
        let stop = Requester::default();
        let app = App::new(config, &LogHandle::detached("info").unwrap(), stop.clone()).await.unwrap();
        let addresses = app.addresses();
        let asked = stop.clone();
        let readiness = app.readiness();
        let task = tokio::spawn(async move { app.run(async move { asked.requested().await }).await.unwrap() });
        let running = Self { source, state, addresses, stop, task };
        running
            .eventually("readiness", async || running.get(addresses.ready, "/healthz/ready").await.starts_with("ready"))
            .await;
        assert!(readiness.is_ready());
        running
    }

    fn write(&self, name: &str, text: &str) {
        write(self.source.path(), name, text);
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.source.path().join(name)).unwrap();
    }

    async fn eventually(&self, what: &str, check: impl AsyncFn() -> bool) {
        let deadline = tokio::time::Instant::now() + LONG;
        while !check().await {
            assert!(tokio::time::Instant::now() < deadline, "{what} did not happen in time");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The body of an HTTP answer.
    async fn get(&self, address: std::net::SocketAddr, path: &str) -> String {
        let Ok(mut stream) = tokio::net::TcpStream::connect(address).await else { return String::new() };
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()
    }

    async fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.get(self.addresses.admin, "/status").await).unwrap()
    }

    fn token(&self, namespace: &str, account: &str, pod: &str) -> String {
        let line = CommandLine::parse_from([
            "culvertd",
            "token",
            "--state-dir",
            self.state.path().to_str().unwrap(),
            "--namespace",
            namespace,
            "--service-account",
            account,
            "--pod",
            pod,
        ]);
        let Some(Command::Token(args)) = line.command else { panic!("not the token command") };
        let mut out = Vec::new();
        commands::token(&args, &mut out).unwrap();
        String::from_utf8(out).unwrap().trim().to_owned()
    }

    async fn channel(&self) -> Channel {
        let root = fs::read(self.state.path().join("root.pem")).unwrap();
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root)).domain_name("localhost");
        let endpoint = Endpoint::from_shared(format!("https://{}", self.addresses.xds)).unwrap();
        endpoint.tls_config(tls).unwrap().connect().await.unwrap()
    }

    async fn client(&self, token: &str) -> Client {
        let (requests, receiver) = mpsc::channel(16);
        requests.send(request(WORKLOAD_TYPE)).await.unwrap();
        requests.send(request(AUTHORIZATION_TYPE)).await.unwrap();
        let mut call = Request::new(ReceiverStream::new(receiver));
        call.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        let mut stub = AggregatedDiscoveryServiceClient::new(self.channel().await);
        let responses = stub.delta_aggregated_resources(call).await.unwrap().into_inner();
        Client { requests, responses, resources: BTreeMap::new(), types: BTreeSet::new() }
    }
}

/// A discovery client that follows everything.
struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    resources: BTreeMap<String, wire::address::Type>,
    types: BTreeSet<String>,
}

impl Client {
    /// Takes in and acknowledges responses until `done` holds.
    async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let next = tokio::time::timeout(LONG, self.responses.message()).await;
            let response = next.unwrap_or_else(|_| panic!("{what} did not come")).unwrap().expect("a response");
            for name in &response.removed_resources {
                self.resources.remove(name);
            }
            for resource in response.resources {
                let body = resource.resource.unwrap().value;
                if response.type_url == WORKLOAD_TYPE {
                    self.resources.insert(resource.name, wire::Address::decode(&*body).unwrap().r#type.unwrap());
                }
            }
            self.types.insert(response.type_url.clone());
            let ack = DeltaDiscoveryRequest {
                type_url: response.type_url,
                response_nonce: response.nonce,
                ..Default::default()
            };
            self.requests.send(ack).await.unwrap();
        }
    }

    fn workload(&self, uid: &str) -> Option<&wire::Workload> {
        match self.resources.get(uid)? {
            wire::address::Type::Workload(workload) => Some(workload),
            wire::address::Type::Service(_) => None,
        }
    }

    fn ports(&self, uid: &str, service: &str) -> Option<Vec<(u32, u32)>> {
        let list = self.workload(uid)?.services.get(service)?;
        Some(list.ports.iter().map(|port| (port.service_port, port.target_port)).collect())
    }
}

fn request(type_url: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        resource_names_subscribe: vec!["*".to_owned()],
        ..Default::default()
    }
}

fn write(folder: &Path, name: &str, text: &str) {
    let temporary = folder.join(format!(".{name}.tmp"));
    fs::write(&temporary, text).unwrap();
    fs::rename(temporary, folder.join(name)).unwrap();
}

fn pod(namespace: &str, name: &str, account: &str, address: &str, annotation: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {namespace}
  labels: {{app: web}}
  annotations: {{ambient.istio.io/redirection: {annotation}}}
spec:
  serviceAccountName: {account}
  nodeName: node-1
  containers: [{{name: main, ports: [{{name: http, containerPort: 8080}}]}}]
status: {{phase: Running, podIP: {address}, conditions: [{{type: Ready, status: 'True'}}]}}
"
    )
}

const NAMESPACE: &str =
    "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}";
const SERVICE: &str = "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop},
    spec: {clusterIP: 10.96.0.7, selector: {app: web}, ports: [{port: 80, targetPort: http}]}}";
const UID: &str = "Kubernetes//Pod/shop/web-1";
const WEB: &str = "shop/web.shop.svc.cluster.local";

#[tokio::test(flavor = "multi_thread")]
async fn a_client_sees_what_the_directory_says() {
    let running = Running::start(&[
        ("namespace.yaml", NAMESPACE),
        ("service.yaml", SERVICE),
        ("web-1.yaml", &pod("shop", "web-1", "web", "10.244.0.5", "pending")),
        ("ztunnel.yaml", &pod("culvert-system", "ztunnel-1", "ztunnel", "10.244.0.2", "disabled")),
    ])
    .await;
    let token = running.token("culvert-system", "ztunnel", "ztunnel-1");
    let mut client = running.client(&token).await;
    client.until("the state at start", |client| client.resources.len() == 3 && client.types.len() == 2).await;
    let workload = client.workload(UID).unwrap();
    assert_eq!(
        (workload.tunnel_protocol(), workload.status()),
        (wire::TunnelProtocol::None, wire::WorkloadStatus::Unhealthy)
    );
    let status = running.status().await;
    assert_eq!(status["notes"][0]["object"], "Pod shop/web-1", "{status:#}");

    // The agent confirms the capture.
    running.write("web-1.yaml", &pod("shop", "web-1", "web", "10.244.0.5", "enabled"));
    let is_hbone = |client: &Client| {
        let workload = client.workload(UID).unwrap();
        workload.tunnel_protocol() == wire::TunnelProtocol::Hbone && workload.status() == wire::WorkloadStatus::Healthy
    };
    client.until("the confirmation", is_hbone).await;
    assert_eq!(client.ports(UID, WEB), Some(vec![(80, 8080)]));

    // An invalid file changes nothing, and is reported everywhere.
    running.write("service.yaml", &SERVICE.replace("port: 80", "port: 80000"));
    running
        .eventually("the refusal", async || running.status().await["source"]["refused"][0]["keeps_last_good"] == true)
        .await;
    let refused = running.status().await["source"]["refused"][0].clone();
    assert_eq!(refused["object"], "Service shop/web");
    assert_eq!(refused["problems"][0]["field"], "spec.ports[0].port");
    let metrics = running.get(running.addresses.metrics, "/metrics").await;
    assert!(metrics.contains("culvert_objects_refused 1\n"), "{metrics}");
    assert!(metrics.contains("culvert_xds_clients 1\n"), "{metrics}");
    let dump = running.get(running.addresses.admin, "/config_dump").await;
    let dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
    assert_eq!(dump["services"][0]["addresses"][0], "10.96.0.7");

    // The next good version counts; a second pod is a second endpoint; a removed file removes its objects.
    running.write("service.yaml", &SERVICE.replace("port: 80", "port: 81"));
    client.until("the new port", |client| client.ports(UID, WEB) == Some(vec![(81, 8080)])).await;
    running.write("web-2.yaml", &pod("shop", "web-2", "web", "10.244.0.6", "enabled"));
    client.until("the second pod", |client| client.workload("Kubernetes//Pod/shop/web-2").is_some()).await;
    running.remove("web-1.yaml");
    client.until("the removal", |client| client.workload(UID).is_none()).await;
    running.write("service.yaml", &SERVICE.replace("name: web", "name: store"));
    client.until("the renaming", |client| !client.resources.contains_key(WEB)).await;
    assert!(client.resources.contains_key("shop/store.shop.svc.cluster.local"));

    running.stop.request();
    let end = tokio::time::timeout(LONG, client.responses.message()).await.expect("the stream ends in time");
    assert_eq!(end.unwrap_err().code(), Code::Unavailable);
    tokio::time::timeout(LONG, running.task).await.expect("the end in time").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_by_a_client_is_shown() {
    let running = Running::start(&[
        ("service.yaml", SERVICE),
        ("ztunnel.yaml", &pod("culvert-system", "ztunnel-1", "ztunnel", "10.244.0.2", "disabled")),
    ])
    .await;
    let mut client = running.client(&running.token("culvert-system", "ztunnel", "ztunnel-1")).await;
    let response = loop {
        let response = client.responses.message().await.unwrap().unwrap();
        if response.type_url == WORKLOAD_TYPE {
            break response;
        }
    };
    let error = mesh_proto::rpc::Status { code: 3, message: format!("{WEB}: too odd"), ..Default::default() };
    let nack = DeltaDiscoveryRequest {
        type_url: response.type_url,
        response_nonce: response.nonce,
        error_detail: Some(error),
        ..Default::default()
    };
    client.requests.send(nack).await.unwrap();
    running
        .eventually("the refusal", async || {
            let status = running.status().await;
            let types = status["clients"][0]["types"].as_array().cloned().unwrap_or_default();
            types.iter().any(|kind| kind["nacks"][0]["resource"] == WEB && kind["nacks"][0]["reason"] == "too odd")
        })
        .await;
    let metrics = running.get(running.addresses.metrics, "/metrics").await;
    assert!(metrics.contains("culvert_xds_nacks_total 1\n"), "{metrics}");
    assert!(metrics.contains("culvert_xds_nacked_resources 1\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_in_without_a_token() {
    let running = Running::start(&[("namespace.yaml", NAMESPACE)]).await;
    let mut stub = AggregatedDiscoveryServiceClient::new(running.channel().await);
    let (_requests, receiver) = mpsc::channel(1);
    let refused = stub.delta_aggregated_resources(ReceiverStream::new(receiver)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let metrics = running.get(running.addresses.metrics, "/metrics").await;
    assert!(metrics.contains("culvert_xds_clients_refused_total 1\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_proxy_gets_certificates_of_pods_on_its_node() {
    let running = Running::start(&[
        ("web-1.yaml", &pod("shop", "web-1", "web", "10.244.0.5", "enabled")),
        ("ztunnel.yaml", &pod("culvert-system", "ztunnel-1", "ztunnel", "10.244.0.2", "disabled")),
    ])
    .await;
    let token = running.token("culvert-system", "ztunnel", "ztunnel-1");
    let mut stub = IstioCertificateServiceClient::new(running.channel().await);
    let id = "spiffe://cluster.local/ns/shop/sa/web";
    let mut ask = async |id: &str| {
        let value = prost_types::value::Kind::StringValue(id.to_owned());
        let field = ("ImpersonatedIdentity".to_owned(), prost_types::Value { kind: Some(value) });
        let mut call = Request::new(IstioCertificateRequest {
            csr: csr(),
            validity_duration: 0,
            metadata: Some(prost_types::Struct { fields: [field].into() }),
        });
        call.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        stub.create_certificate(call).await
    };
    let chain = ask(id).await.unwrap().into_inner().cert_chain;
    assert!(chain.len() >= 2, "{chain:?}");
    // Not known yet: to be tried again. Once its pod appears, it is signed for.
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    assert_eq!(ask(other).await.unwrap_err().code(), Code::Unavailable);
    running.write("other.yaml", &pod("shop", "other-1", "other", "10.244.0.9", "enabled"));
    let deadline = tokio::time::Instant::now() + LONG;
    while ask(other).await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "no certificate for a pod that is known by now");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let metrics = running.get(running.addresses.metrics, "/metrics").await;
    assert!(metrics.contains("culvert_ca_certificates_issued_total 2\n"), "{metrics}");
    assert!(metrics.contains("culvert_ca_requests_refused_total{code=\"UNAVAILABLE\"}"), "{metrics}");
}

fn csr() -> String {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    CsrPublicKey::from_pem(&csr).unwrap();
    csr
}

#[tokio::test]
async fn mistakes_in_the_set_up_are_errors_at_start() {
    let (source, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let start = async |source: &Path, xds: &str| {
        let line = CommandLine::parse_from([
            "culvertd",
            "--source-dir",
            source.to_str().unwrap(),
            "--state-dir",
            state.path().to_str().unwrap(),
            "--xds-addr",
            xds,
            "--metrics-addr=127.0.0.1:0",
            "--ready-addr=127.0.0.1:0",
            "--admin-addr=127.0.0.1:0",
        ]);
        let config = Config::new(&line.serve).unwrap();
        let app = App::new(config, &LogHandle::detached("info").unwrap(), Requester::default()).await?;
        app.run(std::future::pending()).await
    };
    let error = start(source.path(), &taken.local_addr().unwrap().to_string()).await.unwrap_err().to_string();
    assert!(error.contains("--xds-addr"), "{error}");
    let error = start(&source.path().join("missing"), "127.0.0.1:0").await.unwrap_err().to_string();
    assert!(error.contains("is not a directory"), "{error}");
}
