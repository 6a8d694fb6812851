//! A cluster's API without nodes behind it, and culvertd beside it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tests::interop::xds_client::{NodeInfo, Session};
use tests::interop::{self, Identity, ca_client};
use tests::kubernetes::ApiServer;
use tests::process::{Process, Spec};
use tests::{http, wait};
use tonic::Code;

use super::LONG;

/// Who signs tokens, and for whom they are if nobody else is named.
pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// Where kinds are defined.
pub const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

pub struct Scene {
    folder: tempfile::TempDir,
    server: ApiServer,
}

impl Scene {
    /// An API server with the namespace `culvert-system` in it.
    pub fn new() -> Self {
        let scene = Self { folder: tempfile::tempdir().unwrap(), server: ApiServer::start().unwrap() };
        scene.namespace("culvert-system", &json!({}));
        scene
    }

    pub fn server(&self) -> &ApiServer {
        &self.server
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Gives culvertd the rights that it is installed with.
    pub fn allow(&self) {
        self.allow_all_but("");
    }

    pub fn allow_all_but(&self, missing: &str) {
        let group = "/apis/rbac.authorization.k8s.io/v1";
        for mut role in
            manifest("culvert/10-rbac.yaml").into_iter().filter(|object| object["metadata"]["name"] == "culvertd")
        {
            let kind = role["kind"].as_str().unwrap().to_owned();
            if !["ClusterRole", "Role"].contains(&kind.as_str()) {
                continue;
            }
            for rule in role["rules"].as_array_mut().unwrap() {
                rule["resources"].as_array_mut().unwrap().retain(|resource| resource != missing);
            }
            role["rules"].as_array_mut().unwrap().retain(|rule| rule["resources"] != json!([]));
            let base = match role["metadata"]["namespace"].as_str() {
                Some(namespace) => format!("{group}/namespaces/{namespace}"),
                None => group.to_owned(),
            };
            let plural = kind.to_ascii_lowercase();
            self.apply(&format!("{base}/{plural}s/culvertd"), &role);
            self.apply(
                &format!("{base}/{plural}bindings/culvertd"),
                &json!({
                    "apiVersion": role["apiVersion"], "kind": format!("{kind}Binding"), "metadata": role["metadata"],
                    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": "culvertd"},
                    "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "culvertd"}],
                }),
            );
        }
    }

    /// Applies an object without a namespace, as it is shipped.
    pub fn install(&self, object: &Value) {
        let (version, kind) = (object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
        let plural = format!("{}s", kind.to_ascii_lowercase()).replace("policys", "policies");
        let name = object["metadata"]["name"].as_str().unwrap();
        if object["metadata"]["namespace"].is_null() {
            self.apply(&format!("/apis/{version}/{plural}/{name}"), object);
        }
    }

    /// Installs the kinds that a file of `manifests/crds` defines.
    pub fn define(&self, file: &str) {
        manifest(&format!("crds/{file}")).iter().for_each(|definition| self.define_one(definition));
    }

    pub fn define_one(&self, definition: &Value) {
        let path = format!("{DEFINITIONS}/{}", definition["metadata"]["name"].as_str().unwrap());
        self.apply(&path, definition);
        let established = |definition: &Value| {
            let conditions = definition["status"]["conditions"].as_array()?;
            conditions.iter().any(|one| one["type"] == "Established" && one["status"] == "True").then_some(())
        };
        self.server.api().until("the kind", &path, LONG, established).unwrap();
    }

    pub fn get(&self, path: &str) -> Value {
        self.find(path).unwrap_or_else(|| panic!("there is no {path}"))
    }

    pub fn find(&self, path: &str) -> Option<Value> {
        self.server.api().get(path).unwrap()
    }

    pub fn create(&self, path: &str, object: &Value) {
        self.server.api().create(path, object).unwrap();
    }

    pub fn apply(&self, path: &str, object: &Value) -> Value {
        self.server.api().apply(path, object).unwrap()
    }

    pub fn patch(&self, path: &str, patch: &Value) {
        let answer = self.server.api().request("PATCH", path, Some(("application/merge-patch+json", patch))).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
    }

    pub fn delete(&self, path: &str) {
        let options = json!({"gracePeriodSeconds": 0});
        let answer = self.server.api().request("DELETE", path, Some(("application/json", &options))).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
    }

    pub fn namespace(&self, name: &str, labels: &Value) {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        self.create("/api/v1/namespaces", &object);
    }

    pub fn node(&self, name: &str) {
        let labels = json!({"topology.kubernetes.io/zone": "zone-a"});
        let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}});
        self.create("/api/v1/nodes", &object);
    }

    pub fn service(&self, namespace: &str, name: &str, spec: &Value) {
        let metadata = json!({"name": name, "namespace": namespace});
        let object = json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec});
        self.create(&format!("/api/v1/namespaces/{namespace}/services"), &object);
    }

    /// Makes a pod, with its service account, and shows it as running. Returns it.
    pub fn pod(&self, pod: &Value, status: &Value) -> Value {
        let (namespace, name) =
            (pod["metadata"]["namespace"].as_str().unwrap(), pod["metadata"]["name"].as_str().unwrap());
        let account = json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": pod["spec"]["serviceAccountName"], "namespace": namespace},
        });
        let base = format!("/api/v1/namespaces/{namespace}");
        self.create(&format!("{base}/serviceaccounts"), &account);
        self.create(&format!("{base}/pods"), pod);
        self.patch(&format!("{base}/pods/{name}/status"), &json!({"status": status}));
        self.get(&format!("{base}/pods/{name}"))
    }

    pub fn label(&self, namespace: &str, pod: &str, labels: &Value) {
        self.patch(&format!("/api/v1/namespaces/{namespace}/pods/{pod}"), &json!({"metadata": {"labels": labels}}));
    }

    /// What the node's agent writes.
    pub fn annotate(&self, namespace: &str, pod: &str, redirection: &str) {
        let annotations = json!({"ambient.istio.io/redirection": redirection});
        self.patch(
            &format!("/api/v1/namespaces/{namespace}/pods/{pod}"),
            &json!({"metadata": {"annotations": annotations}}),
        );
    }

    /// A token for culvertd, bound to a pod if one is given.
    pub fn token(&self, namespace: &str, account: &str, pod: Option<&Value>) -> String {
        self.token_for(namespace, account, pod, &["istio-ca"])
    }

    pub fn token_for(&self, namespace: &str, account: &str, pod: Option<&Value>, audiences: &[&str]) -> String {
        let bound = pod.map(|pod| {
            json!({"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]})
        });
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"audiences": audiences, "expirationSeconds": 3600, "boundObjectRef": bound},
        });
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let answer = self.server.api().request("POST", &path, Some(("application/json", &request))).unwrap();
        let answer: Value = serde_json::from_str(&answer.body).unwrap();
        answer["status"]["token"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
    }

    /// The roots that culvertd has published.
    pub fn root(&self) -> String {
        let path = "/api/v1/namespaces/culvert-system/configmaps/culvert-ca-root-cert";
        let map = wait::until("the roots", LONG, || self.find(path)).unwrap();
        map["data"]["root-cert.pem"].as_str().unwrap().to_owned()
    }

    /// Starts a culvertd. Returns it with its log.
    pub fn launch(&self) -> (Process, PathBuf) {
        let kubeconfig = self.server.kubeconfig_for("culvertd", "culvertd", None).unwrap();
        let name = format!("culvertd-{}", fresh());
        let log = self.folder().join(format!("{name}.log"));
        let program = tests::cluster::bin_dir().unwrap().join("culvertd");
        let mut spec = Spec::new(name, program, &log).args(["--source=kubernetes", "--confirmation-timeout=1h"]);
        spec = spec.args([std::ffi::OsStr::new("--kubeconfig"), kubeconfig.as_os_str()]);
        for page in ["xds", "metrics", "ready", "admin", "webhook"] {
            spec = spec.args([format!("--{page}-addr=127.0.0.1:0")]);
        }
        (spec.start().unwrap(), log)
    }

    /// Starts a culvertd, and waits until its pages are there.
    pub fn culvertd(&self) -> Culvertd {
        let (process, log) = self.launch();
        let bound = || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            assert!(process.running(), "culvertd ended:\n{text}");
            let line = text.lines().find(|line| line.contains("listening"))?.to_owned();
            let at = |key: &str| {
                let (_, rest) = line.split_once(&format!(" {key}="))?;
                rest.split_whitespace().next()?.parse::<SocketAddr>().ok()
            };
            Some((at("xds")?, at("admin")?, at("metrics")?, at("ready")?, at("webhook")?))
        };
        let (xds, admin, metrics, ready, webhook) = wait::until("culvertd's addresses", LONG, bound).unwrap();
        Culvertd { process, xds, admin, metrics, ready, webhook, log }
    }

    /// Starts a culvertd, and waits until it serves.
    pub fn ready_culvertd(&self) -> Culvertd {
        let culvertd = self.culvertd();
        wait::until("readiness", LONG, || culvertd.is_ready().then_some(())).unwrap();
        culvertd
    }
}

pub struct Culvertd {
    pub process: Process,
    xds: SocketAddr,
    admin: SocketAddr,
    metrics: SocketAddr,
    ready: SocketAddr,
    pub webhook: SocketAddr,
    log: PathBuf,
}

impl Culvertd {
    /// Where discovery and certificates are.
    pub fn address(&self) -> SocketAddr {
        self.xds
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    pub fn is_ready(&self) -> bool {
        page(self.ready, "/healthz/ready").is_ok_and(|answer| answer.status == 200)
    }

    pub fn metrics(&self) -> String {
        page(self.metrics, "/metrics").unwrap().body
    }

    pub fn status(&self) -> Value {
        serde_json::from_str(&page(self.admin, "/status").unwrap().body).unwrap()
    }

    pub fn status_until(&self, what: &str, done: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        wait::until(what, LONG, || {
            last = self.status();
            done(&last).then(|| last.clone())
        })
        .unwrap_or_else(|error| panic!("{error}: {last:#}\n{}", std::fs::read_to_string(&self.log).unwrap()))
    }

    pub async fn eventually(&self, what: &str, mut done: impl AsyncFnMut() -> bool) {
        let deadline = tokio::time::Instant::now() + LONG;
        while !done().await {
            let log = || std::fs::read_to_string(&self.log).unwrap();
            assert!(tokio::time::Instant::now() < deadline, "not in time: {what}\n{}", log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// A discovery stream.
    pub async fn session(&self, root: &str, token: &str) -> Result<Session, interop::Error> {
        let node = NodeInfo {
            ip: [10, 244, 0, 2].into(),
            pod: "ztunnel-1".to_owned(),
            namespace: "culvert-system".to_owned(),
            node: "node-1".to_owned(),
        };
        let mut session = Session::open(self.xds, root, token, &node).await?;
        session.subscribe_wildcard(tests::interop::xds_client::AUTHORIZATION_TYPE, &[]).await?;
        Ok(session)
    }

    /// The identity in the certificate that is given for `identity`, asked for by name if `impersonate`.
    pub async fn certificate(
        &self,
        root: &str,
        token: &str,
        identity: &str,
        impersonate: bool,
    ) -> Result<String, Code> {
        let asked = impersonate.then_some(identity);
        let issued =
            ca_client::request(self.xds, root, token, identity, asked).await.map_err(|status| status.code())?;
        Ok(Identity::from_issued(&issued).unwrap().spiffe().unwrap())
    }

    /// The chain of the caller's own certificate.
    pub async fn chain(&self, root: &str, token: &str) -> Result<Vec<String>, Code> {
        let issued = ca_client::request(self.xds, root, token, "spiffe://cluster.local/ns/x/sa/x", None).await;
        issued.map(|issued| issued.chain).map_err(|status| status.code())
    }
}

pub fn pod(namespace: &str, name: &str, account: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": account}},
        "spec": {
            "serviceAccountName": account, "nodeName": node,
            "containers": [{"name": "main", "image": "none", "ports": [{"containerPort": 8080}]}],
        },
    })
}

pub fn pod_status(address: &str) -> Value {
    json!({
        "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True"}],
    })
}

/// An endpoint of a service that is no pod.
pub fn slice(service: &str, address: &str) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("{service}-by-hand"), "labels": {"kubernetes.io/service-name": service}},
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}], "ports": [{"port": 8080}],
    })
}

/// The first object of a file, as it is shipped.
pub fn shipped(file: &str) -> Value {
    manifest(file).remove(0)
}

/// All objects of a file.
pub fn all(file: &str) -> Vec<Value> {
    manifest(file)
}

/// A registration of the webhook as it is installed, without the roots that culvertd adds; but at this address.
pub fn registration(file: &str, at: SocketAddr) -> Value {
    let mut registration = manifest(file).remove(0);
    let path = registration["webhooks"][0]["clientConfig"]["service"]["path"].as_str().unwrap().to_owned();
    registration["webhooks"][0]["clientConfig"] = json!({"url": format!("https://localhost:{}{path}", at.port())});
    registration
}

/// What culvertd may do: verb, group and resource.
pub fn rights() -> BTreeSet<(String, String, String)> {
    let roles = manifest("culvert/10-rbac.yaml");
    let roles = roles.iter().filter(|role| role["metadata"]["name"] == "culvertd");
    let rules = roles.filter_map(|role| role["rules"].as_array()).flatten();
    let all = |rule: &Value, key: &str| {
        let list = rule[key].as_array().cloned().unwrap_or_default();
        list.into_iter().map(|one| one.as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let mut found = BTreeSet::new();
    for rule in rules {
        for (verb, group) in all(rule, "verbs")
            .iter()
            .flat_map(|verb| all(rule, "apiGroups").into_iter().map(move |group| (verb.clone(), group)))
        {
            found.extend(all(rule, "resources").into_iter().map(|resource| (verb.clone(), group.clone(), resource)));
        }
    }
    found
}

/// The objects of one of the mesh's own manifests.
fn manifest(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests").join(name);
    tests::kube::parse(name, &std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A value of a Secret.
pub fn text(value: &Value) -> String {
    String::from_utf8(BASE64.decode(value.as_str().unwrap()).unwrap()).unwrap()
}

fn page(at: SocketAddr, path: &str) -> Result<http::Answer, tests::Error> {
    let stream = std::net::TcpStream::connect_timeout(&at, Duration::from_secs(10))
        .map_err(|error| tests::Error::io("culvertd", error))?;
    http::exchange(stream, "GET", &at.to_string(), path)
}

fn fresh() -> u32 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}
