//! An authority that was made elsewhere: an intermediate in the Secret `cacerts`, below a root whose key nobody here has.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256,
};
use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, UnixTime};
use serde_json::json;
use tests::interop::Identity;
use tests::interop::ca_client::{self, Issued};
use tests::wait;

use super::LONG;
use super::scene::{Scene, pod, pod_status};

const SECRETS: &str = "/api/v1/namespaces/culvert-system/secrets";

/// A certificate that signs, below `by`, or of its own.
struct Signer {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Signer {
    fn new(name: &str, by: Option<&Self>) -> Self {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = match by {
            Some(by) => params.signed_by(&key, &by.issuer).unwrap(),
            None => params.self_signed(&key).unwrap(),
        };
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    fn pem(&self) -> String {
        self.certificate.pem()
    }

    fn key(&self) -> String {
        self.issuer.key().serialize_pem()
    }
}

/// Whether a client that trusts only `root` takes the certificate with those that came with it, up to `links` of them.
fn verifies(issued: &Issued, root: &Signer, links: usize) -> bool {
    let mut roots = RootCertStore::empty();
    roots.add(root.certificate.der().clone()).unwrap();
    let (_, own) = issued.chain.split_last().unwrap();
    let own: Vec<CertificateDer<'_>> =
        own.iter().map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).collect();
    let (leaf, between) = own.split_first().unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    verifier.verify_client_cert(leaf, &between[..links.min(between.len())], UnixTime::now()).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_intermediate_that_is_plugged_in_signs() {
    let root = Signer::new("a company's root", None);
    let middle = Signer::new("its mesh", Some(&root));
    let signer = Signer::new("this cluster", Some(&middle));
    let scene = Scene::new();
    scene.allow();
    // As Istio's tools write it: the signing certificate stands in its chain again, and the root with it.
    let chain = format!("{}{}{}", signer.pem(), middle.pem(), root.pem());
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cacerts"},
        "stringData": {
            "ca-cert.pem": signer.pem(), "ca-key.pem": signer.key(), "root-cert.pem": root.pem(), "cert-chain.pem": chain,
        },
    });
    scene.create(SECRETS, &secret);
    let ztunnel = scene.pod(&pod("culvert-system", "ztunnel-1", "ztunnel", "node-1"), &pod_status("10.244.0.2"));
    scene.namespace("shop", &json!({}));
    scene.pod(&pod("shop", "web-1", "web", "node-1"), &pod_status("10.244.0.5"));
    let culvertd = scene.ready_culvertd();
    // The root is what everybody is told to trust, and none was made here.
    assert_eq!(scene.root(), root.pem());
    assert_eq!(scene.find(&format!("{SECRETS}/culvert-ca-root")), None);

    // culvertd itself is known by that root.
    let token = scene.token("culvert-system", "ztunnel", Some(&ztunnel));
    let web = "spiffe://cluster.local/ns/shop/sa/web";
    let issued = ca_client::request(culvertd.address(), &root.pem(), &token, web, Some(web)).await.unwrap();
    assert_eq!(Identity::from_issued(&issued).unwrap().spiffe().unwrap(), web);
    assert_eq!(issued.chain.len(), 4, "leaf, two intermediates, and the roots");
    assert_eq!(issued.chain.last(), Some(&root.pem()));
    assert!(verifies(&issued, &root, 2));
    // It takes those that are between: the root's holder did not sign it.
    assert!(!verifies(&issued, &root, 1));
    assert!(!verifies(&issued, &Signer::new("a company's root", None), 2));

    // That the Secret is gone is no wish to have another authority.
    scene.delete(&format!("{SECRETS}/cacerts"));
    let said = || std::fs::read_to_string(culvertd.log()).unwrap_or_default().contains("the Secret cacerts is gone");
    wait::until("the complaint", LONG, || said().then_some(())).unwrap();
    let issued = ca_client::request(culvertd.address(), &root.pem(), &token, web, Some(web)).await.unwrap();
    assert!(verifies(&issued, &root, 2));
    assert_eq!(scene.find(&format!("{SECRETS}/culvert-ca-root")), None);
    assert_eq!(scene.root(), root.pem());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_starts_while_the_authority_is_away_takes_no_other() {
    let root = Signer::new("a company's root", None);
    let scene = Scene::new();
    scene.allow();
    // The mesh had a root of its own first.
    drop(scene.ready_culvertd());
    assert!(scene.find(&format!("{SECRETS}/culvert-ca-root")).is_some());
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cacerts"},
        "stringData": {"ca-cert.pem": root.pem(), "ca-key.pem": root.key(), "root-cert.pem": root.pem()},
    });
    scene.create(SECRETS, &secret);
    let culvertd = scene.ready_culvertd();
    wait::until("the roots that are plugged in", LONG, || (scene.root() == root.pem()).then_some(())).unwrap();
    drop(culvertd);

    scene.delete(&format!("{SECRETS}/cacerts"));
    let (process, log) = scene.launch();
    let text = || std::fs::read_to_string(&log).unwrap_or_default();
    wait::until("the complaint", LONG, || text().contains("the Secret cacerts is gone").then_some(())).unwrap();
    assert_eq!(scene.root(), root.pem(), "everybody trusts what they trusted");
    // It waits for it to be put back.
    scene.create(SECRETS, &secret);
    wait::until("a replica that serves", LONG, || {
        assert!(process.running(), "{}", text());
        text().contains("serving").then_some(())
    })
    .unwrap();
    assert_eq!(scene.root(), root.pem());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_intermediate_that_no_root_stands_behind_is_refused() {
    let (root, other) = (Signer::new("root", None), Signer::new("another root", None));
    let signer = Signer::new("this cluster", Some(&root));
    let scene = Scene::new();
    scene.allow();
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cacerts"},
        "stringData": {"ca-cert.pem": signer.pem(), "ca-key.pem": signer.key(), "root-cert.pem": other.pem()},
    });
    scene.create(SECRETS, &secret);
    let (process, log) = scene.launch();
    let said = || std::fs::read_to_string(&log).unwrap_or_default().contains("the Secret cacerts: ");
    wait::until("the complaint", LONG, || (said() && !process.running()).then_some(())).unwrap();
    // Nothing else is trusted instead.
    assert_eq!(scene.find(&format!("{SECRETS}/culvert-ca-root")), None);
    let published = "/api/v1/namespaces/culvert-system/configmaps/culvert-ca-root-cert";
    assert_eq!(scene.find(published), None);
}
