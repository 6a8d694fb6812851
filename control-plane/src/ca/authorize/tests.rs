use std::collections::HashMap;

use super::*;
use crate::ca::token::BoundPod;

/// Pods by namespace and name.
struct Pods {
    pods: HashMap<(String, String), PodRecord>,
    synced: bool,
}

impl Pods {
    fn new() -> Self {
        let mut pods = HashMap::new();
        for (namespace, name, account, node, is_over) in [
            ("culvert-system", "ztunnel-1", "ztunnel", "node-1", false),
            ("culvert-system", "ztunnel-2", "ztunnel", "node-2", false),
            ("culvert-system", "ztunnel-old", "ztunnel", "node-1", true),
            ("culvert-system", "ztunnel-pending", "ztunnel", "", false),
            ("culvert-system", "other", "default", "node-1", false),
            ("shop", "cart", "cart", "node-1", false),
            ("shop", "pay", "pay", "node-2", false),
            ("shop", "job", "job", "node-1", true),
        ] {
            let record = PodRecord {
                uid: format!("uid-{name}"),
                service_account: account.to_owned(),
                node: node.to_owned(),
                is_over,
            };
            pods.insert((namespace.to_owned(), name.to_owned()), record);
        }
        Self { pods, synced: true }
    }
}

impl Directory for Pods {
    fn is_synced(&self) -> bool {
        self.synced
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodRecord> {
        self.pods.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    fn identity_on_node(&self, node: &str, id: &SpiffeId) -> NodeIdentity {
        let mut known = NodeIdentity::UnknownYet;
        for ((namespace, _), pod) in &self.pods {
            if namespace == id.namespace() && pod.service_account == id.service_account() {
                if pod.node == node && !pod.is_over {
                    return NodeIdentity::Present;
                }
                known = NodeIdentity::Absent;
            }
        }
        known
    }
}

fn caller(namespace: &str, account: &str, pod: &str) -> Caller {
    Caller {
        namespace: namespace.to_owned(),
        service_account: account.to_owned(),
        pod: (!pod.is_empty()).then(|| BoundPod { name: pod.to_owned(), uid: Some(format!("uid-{pod}")) }),
        node: None,
    }
}

fn ztunnel(pod: &str) -> Caller {
    caller("culvert-system", "ztunnel", pod)
}

fn decide(caller: &Caller, asked: Option<&str>) -> Result<String, Denial> {
    authorize(&Policy::new("cluster.local"), &Pods::new(), caller, asked).map(|id| id.to_string())
}

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const PAY: &str = "spiffe://cluster.local/ns/shop/sa/pay";

#[test]
fn a_node_proxy_gets_the_identities_of_its_node() {
    assert_eq!(decide(&ztunnel("ztunnel-1"), Some(CART)).unwrap(), CART);
    assert_eq!(decide(&ztunnel("ztunnel-2"), Some(PAY)).unwrap(), PAY);
    let denial = decide(&ztunnel("ztunnel-1"), Some(PAY)).unwrap_err();
    assert!(matches!(&denial, Denial::NotOnNode { node, .. } if node == "node-1"), "{denial}");
    assert!(matches!(decide(&ztunnel("ztunnel-2"), Some(CART)), Err(Denial::NotOnNode { .. })));
    let job = "spiffe://cluster.local/ns/shop/sa/job";
    assert!(matches!(decide(&ztunnel("ztunnel-1"), Some(job)), Err(Denial::NotOnNode { .. })), "its pod has ended");
    let new = "spiffe://cluster.local/ns/shop/sa/new";
    let denial = decide(&ztunnel("ztunnel-1"), Some(new)).unwrap_err();
    assert!(matches!(denial, Denial::UnknownYet { .. }) && denial.to_string().contains("retry"));
}

#[test]
fn others_get_their_own_identity_and_no_other() {
    assert_eq!(decide(&caller("shop", "cart", "cart"), None).unwrap(), CART);
    assert_eq!(decide(&caller("shop", "gateway", ""), None).unwrap(), "spiffe://cluster.local/ns/shop/sa/gateway");
    for asked in [CART, PAY, "spiffe://cluster.local/ns/culvert-system/sa/ztunnel"] {
        for who in [caller("shop", "cart", "cart"), caller("shop", "ztunnel", "cart"), caller("shop", "cart", "")] {
            assert!(matches!(decide(&who, Some(asked)), Err(Denial::NotANodeProxy { .. })), "{who} {asked}");
        }
    }
    let other = caller("culvert-system", "default", "other");
    assert!(matches!(decide(&other, Some(CART)), Err(Denial::NotANodeProxy { .. })));
}

#[test]
fn the_pod_of_the_token_must_live() {
    for asked in [Some(CART), None] {
        let denied = |caller: Caller| decide(&caller, asked).unwrap_err();
        assert!(matches!(denied(ztunnel("ztunnel-gone")), Denial::NoSuchPod { .. }));
        assert!(matches!(denied(ztunnel("ztunnel-old")), Denial::PodIsOver { .. }));
        assert!(matches!(denied(ztunnel("other")), Denial::OtherAccount { actual, .. } if actual == "default"));
        let mut earlier = ztunnel("ztunnel-1");
        earlier.pod = Some(BoundPod { name: "ztunnel-1".to_owned(), uid: Some("uid-before".to_owned()) });
        assert!(matches!(denied(earlier), Denial::EarlierPod { .. }));
    }
    assert!(matches!(decide(&ztunnel(""), Some(CART)), Err(Denial::Unbound { .. })));
    let mut nameless = ztunnel("ztunnel-1");
    nameless.pod = Some(BoundPod { name: "ztunnel-1".to_owned(), uid: None });
    assert_eq!(decide(&nameless, Some(CART)).unwrap(), CART, "a uid is compared if the token has one");
}

#[test]
fn the_node_is_that_of_the_pod() {
    let on = |node: &str| Caller { node: Some(node.to_owned()), ..ztunnel("ztunnel-1") };
    assert_eq!(decide(&on("node-1"), Some(CART)).unwrap(), CART);
    for asked in [CART, PAY] {
        assert!(matches!(decide(&on("node-2"), Some(asked)), Err(Denial::OtherNode { .. })));
    }
    assert!(matches!(decide(&ztunnel("ztunnel-pending"), Some(CART)), Err(Denial::OtherNode { .. })));
}

#[test]
fn only_identities_of_the_own_trust_domain_are_signed() {
    let foreign = "spiffe://other.example/ns/shop/sa/cart";
    assert!(matches!(decide(&ztunnel("ztunnel-1"), Some(foreign)), Err(Denial::TrustDomain { .. })));
    for text in ["", "cart", "spiffe://cluster.local/ns/shop/sa/cart/", &"x".repeat(10_000)] {
        let denial = decide(&ztunnel("ztunnel-1"), Some(text)).unwrap_err();
        assert!(matches!(denial, Denial::NotAnIdentity { .. }) && denial.to_string().len() < 1000, "{denial}");
    }
    let odd = caller("shop", "cart/../pay", "");
    assert!(matches!(decide(&odd, None), Err(Denial::NoOwnIdentity { .. })));
}

#[test]
fn before_the_pods_are_known_everybody_is_told_to_retry() {
    let pods = Pods { pods: HashMap::new(), synced: false };
    for asked in [Some(CART), None] {
        let denial = authorize(&Policy::new("cluster.local"), &pods, &ztunnel("ztunnel-1"), asked).unwrap_err();
        assert_eq!(denial, Denial::NotSynced);
        assert_eq!(Status::from(&denial).code(), tonic::Code::Unavailable);
    }
}

#[test]
fn node_proxies_are_configured() {
    let mut policy = Policy::new("cluster.local");
    policy.node_proxies = vec!["shop/cart".parse().unwrap()];
    let decide = |caller: &Caller| authorize(&policy, &Pods::new(), caller, Some(CART));
    assert!(decide(&caller("shop", "cart", "cart")).is_ok());
    assert!(matches!(decide(&ztunnel("ztunnel-1")), Err(Denial::NotANodeProxy { .. })));
    for text in ["", "a", "a/", "/b", "a/b/c"] {
        assert!(text.parse::<ServiceAccount>().is_err(), "{text}");
    }
}

#[test]
fn a_pod_that_the_api_server_has_seen_is_one_that_is_not_known_yet() {
    let policy = Policy { pods_are_vouched_for: true, ..Policy::new("cluster.local") };
    let mut replaced = ztunnel("ztunnel-1");
    replaced.pod = Some(BoundPod { name: "ztunnel-1".to_owned(), uid: Some("uid-newer".to_owned()) });
    for caller in [ztunnel("ztunnel-new"), replaced] {
        let denial = authorize(&policy, &Pods::new(), &caller, Some(CART)).unwrap_err();
        assert_eq!(denial, Denial::PodUnknownYet { caller: caller.to_string() });
        assert_eq!(Status::from(&denial).code(), tonic::Code::Unavailable);
    }
    // Everything else is as strict as ever.
    assert!(matches!(
        authorize(&policy, &Pods::new(), &ztunnel("ztunnel-1"), Some(PAY)),
        Err(Denial::NotOnNode { .. })
    ));
    assert!(matches!(
        authorize(&policy, &Pods::new(), &ztunnel("ztunnel-old"), Some(CART)),
        Err(Denial::PodIsOver { .. })
    ));
}
