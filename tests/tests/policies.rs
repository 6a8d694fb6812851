//! Who may connect, as real connections find out: by identity, namespace, address and port, from either node and from
//! outside of the mesh; what a change does to connections that are open; and what a policy does that is not valid.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{connect, echo};
use tests::Error;
use tests::cluster::Cluster;
use tests::pod::Pod;

const BOUND: Duration = Duration::from_secs(30);
/// The namespace whose policies are for the whole mesh.
const ROOT: &str = "culvert-system";
/// The file that holds the policies.
const FILE: &str = "policies.yaml";

/// One server in the namespace `shop`, with two ports, and its clients.
struct Shop {
    cluster: Cluster,
    server: Arc<Pod>,
    _second_port: tests::pod::Running,
    /// Of the same namespace, on the other node.
    friend: Arc<Pod>,
    /// Of the same namespace, on the same node.
    neighbour: Arc<Pod>,
    /// Of another namespace.
    stranger: Arc<Pod>,
    /// Outside of the mesh.
    outsider: Arc<Pod>,
}

/// Which clients reach one port: friend, neighbour, stranger, outsider.
type Who = [bool; 4];
const ALL: Who = [true; 4];
const NOBODY: Who = [false; 4];
const MESH: Who = [true, true, true, false];
const SHOP: Who = [true, true, false, false];

impl Shop {
    fn open() -> Result<Self, Error> {
        let cluster = Cluster::builder().start()?;
        let server = echo(&cluster, "server", 2).namespace("shop").enrolled(true).start()?;
        let second_port = server.spawn(["echo", "--listen", "0.0.0.0:7001"])?;
        let client = |name: &str, node: usize, namespace: &str, enrolled: bool| {
            cluster.pod(name).node(node).namespace(namespace).service_account(name).enrolled(enrolled).start()
        };
        let friend = client("friend", 1, "shop", true)?;
        let neighbour = client("neighbour", 2, "shop", true)?;
        let stranger = client("stranger", 1, "far", true)?;
        let outsider = client("outsider", 1, "far", false)?;
        Ok(Self { cluster, server, _second_port: second_port, friend, neighbour, stranger, outsider })
    }

    /// Who reaches a port of the server, by an exchange over a new connection.
    fn who(&self, port: u16) -> Who {
        let to = self.server.at(port).to_string();
        let ask = ["--send", "hello", "--read", "5", "--timeout", "3000"];
        let to = to.as_str();
        thread::scope(|scope| {
            [&self.friend, &self.neighbour, &self.stranger, &self.outsider]
                .map(|client| scope.spawn(move || connect(client, to, &ask).ok))
                .map(|asked| asked.join().expect("no panic"))
        })
    }

    /// Waits until those, and no others, reach the two ports.
    fn until(&self, what: &str, expected: [Who; 2]) {
        let mut seen = [NOBODY; 2];
        tests::wait::until(what, BOUND, || {
            seen = [self.who(7000), self.who(7001)];
            (seen == expected).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error}: {seen:?} and not {expected:?}\n{}", self.cluster.logs(30)));
    }

    /// Applies policies in place of those before; then those, and no others, reach the two ports.
    fn with(&self, policies: &str, expected: [Who; 2]) {
        self.cluster.apply(FILE, policies).unwrap();
        self.until(policies, expected);
    }

    fn without_policies(&self) {
        self.cluster.directory().remove(FILE).unwrap();
        self.until("nothing is refused without policies", [ALL; 2]);
    }
}

fn object(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\n{{apiVersion: security.istio.io/v1, kind: {kind}, metadata: {{name: {name}, namespace: {namespace}}}, \
         spec: {{{spec}}}}}\n"
    )
}

/// A policy of the server's namespace.
fn policy(spec: &str) -> String {
    object("AuthorizationPolicy", "shop", "p", spec)
}

fn from(action: &str, source: &str) -> String {
    policy(&format!("action: {action}, rules: [{{from: [{{source: {{{source}}}}}]}}]"))
}

fn authentication(namespace: &str, name: &str, spec: &str) -> String {
    object("PeerAuthentication", namespace, name, spec)
}

#[test]
fn connections_are_let_in_as_policies_say() -> Result<(), Error> {
    let shop = Shop::open()?;
    shop.until("nothing is refused without policies", [ALL; 2]);
    let (friend, stranger, outsider) = (shop.friend.ip(), shop.stranger.ip(), shop.outsider.ip());

    let only_friend = [true, false, false, false];
    shop.with(&from("ALLOW", "principals: [cluster.local/ns/shop/sa/friend]"), [only_friend; 2]);
    shop.with(&from("DENY", "principals: ['*/sa/friend']"), [[false, true, true, true]; 2]);
    shop.with(&from("ALLOW", "namespaces: [shop]"), [SHOP; 2]);
    shop.with(&from("ALLOW", "serviceAccounts: [neighbour, far/stranger]"), [[false, true, true, false]; 2]);
    shop.with(&from("ALLOW", "principals: ['*']"), [MESH; 2]);
    shop.with(&from("ALLOW", "notPrincipals: ['*']"), [[false, false, false, true]; 2]);
    // Who has no identity is of no namespace either.
    shop.with(&from("DENY", "notNamespaces: [shop]"), [SHOP; 2]);
    shop.with(&from("DENY", &format!("ipBlocks: [{friend}, {outsider}/32]")), [[false, true, true, false]; 2]);
    shop.with(&from("ALLOW", &format!("notIpBlocks: [{stranger}]")), [[true, true, false, true]; 2]);

    let ports =
        |action: &str, ports: &str| policy(&format!("action: {action}, rules: [{{to: [{{operation: {{{ports}}}}}]}}]"));
    shop.with(&ports("DENY", "ports: ['7001']"), [ALL, NOBODY]);
    shop.with(&ports("ALLOW", "notPorts: ['7000']"), [NOBODY, ALL]);
    let both = "from: [{source: {namespaces: [far]}}], to: [{operation: {ports: ['7000']}}]";
    shop.with(&policy(&format!("rules: [{{{both}}}]")), [[false, false, true, false], NOBODY]);
    // One that denies counts before one that allows; one that allows is not enough for two.
    let mut two = from("ALLOW", "principals: ['*']");
    two += &object("AuthorizationPolicy", "shop", "q", &format!("action: DENY, rules: [{{{both}}}]"));
    shop.with(&two, [SHOP, MESH]);
    let mut two = from("ALLOW", "serviceAccounts: [friend]");
    two += &object("AuthorizationPolicy", ROOT, "q", "rules: [{from: [{source: {serviceAccounts: [far/stranger]}}]}]");
    shop.with(&two, [[true, false, true, false]; 2]);

    // For other workloads, or another namespace.
    let mut others = policy("selector: {matchLabels: {app: other}}, action: DENY, rules: [{}]");
    others += &object("AuthorizationPolicy", "far", "q", "action: DENY, rules: [{}]");
    shop.with(&others, [ALL; 2]);
    shop.with(&policy("selector: {matchLabels: {app: server}}, action: DENY, rules: [{}]"), [NOBODY; 2]);
    shop.without_policies();
    Ok(())
}

#[test]
fn plaintext_is_taken_as_authentications_say() -> Result<(), Error> {
    let shop = Shop::open()?;
    shop.until("nothing is refused without policies", [ALL; 2]);
    let (strict, permissive) = ("mtls: {mode: STRICT}", "mtls: {mode: PERMISSIVE}");
    shop.with(&authentication("shop", "a", strict), [MESH; 2]);
    shop.with(&authentication("shop", "a", permissive), [ALL; 2]);
    shop.with(&authentication(ROOT, "a", strict), [MESH; 2]);
    let nearer = authentication(ROOT, "a", strict) + &authentication("shop", "a", permissive);
    shop.with(&nearer, [ALL; 2]);
    let server = "selector: {matchLabels: {app: server}}";
    let port = |mode: &str, port: &str| format!("{server}, {mode}, portLevelMtls: {{7001: {{mode: {port}}}}}");
    shop.with(&authentication("shop", "a", &port(strict, "PERMISSIVE")), [MESH, ALL]);
    shop.with(&authentication("shop", "a", &port(permissive, "STRICT")), [ALL, MESH]);
    // Taken by its authentication, and refused by a policy.
    let policies = authentication("shop", "a", &port(strict, "DISABLE")) + &from("DENY", "namespaces: [shop]");
    shop.with(&policies, [[false, false, true, false], [false, false, true, true]]);
    shop.without_policies();
    Ok(())
}

#[test]
fn what_is_open_is_closed_when_it_is_not_allowed_any_more() -> Result<(), Error> {
    let shop = Shop::open()?;
    shop.until("nothing is refused without policies", [ALL; 2]);
    let to = shop.server.at(7000).to_string();
    let hold = |pod: &Pod| {
        let held = pod.spawn(["hold", "--to", &to, "--for", "600000"])?;
        held.wait_for("\"event\":\"alive\"", BOUND)?;
        Ok::<_, Error>(held)
    };
    let (friend, stranger, outsider) = (hold(&shop.friend)?, hold(&shop.stranger)?, hold(&shop.outsider)?);
    let ended = |what: &str, held: &tests::pod::Running| {
        let text = held.wait_for("\"event\":\"end\"", BOUND).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(text.contains("\"ok\":false"), "{what}: {text}");
    };
    let goes_on = |what: &str, held: &tests::pod::Running| {
        let exchanges = || held.stdout().matches("\"event\":\"alive\"").count();
        let before = exchanges();
        tests::wait::until(what, BOUND, || (exchanges() >= before + 3).then_some(())).unwrap();
        assert!(!held.stdout().contains("\"event\":\"end\""), "{what}: {}", held.stdout());
    };
    shop.cluster.apply(FILE, &from("DENY", "namespaces: [far]"))?;
    ended("an identity that is denied", &stranger);
    for (what, held) in [("an identity that is not denied", &friend), ("plaintext", &outsider)] {
        goes_on(what, held);
    }
    shop.cluster.apply(FILE, &authentication("shop", "a", "mtls: {mode: STRICT}"))?;
    ended("plaintext that is not taken any more", &outsider);
    goes_on("mutual TLS", &friend);
    // A new one finds out at once, and one that was refused is let in when it is allowed again.
    shop.until("mutual TLS alone", [MESH; 2]);
    shop.cluster.apply(FILE, &from("ALLOW", "serviceAccounts: [far/stranger]"))?;
    ended("an identity that is not allowed", &friend);
    Ok(())
}

#[test]
fn a_policy_that_is_not_valid_denies_or_keeps_its_last_good_version() -> Result<(), Error> {
    let shop = Shop::open()?;
    let raw = |policies: &str| shop.cluster.directory().write_raw(FILE, policies).unwrap();
    let refused = |parts: &[&str]| {
        tests::wait::until(&format!("culvertd says {parts:?}"), BOUND, || {
            let log = shop.cluster.control().ok()?.component.log_tail(400);
            log.lines()
                .any(|line| line.contains("refused") && parts.iter().all(|part| line.contains(part)))
                .then_some(())
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", shop.cluster.logs(40)));
    };
    // There is no earlier version: whatever it was to keep out is kept out.
    raw(&policy("action: ALOW, rules: [{}]"));
    shop.until("a policy that is not valid denies", [NOBODY; 2]);
    refused(&["AuthorizationPolicy shop/p", "spec.action"]);
    shop.with(&from("DENY", "namespaces: [far]"), [[true, true, false, true]; 2]);
    // There is one.
    raw(&from("DENY", "namespaces: [far], moods: [good]"));
    refused(&["AuthorizationPolicy shop/p", "moods"]);
    shop.until("the last good version stays", [[true, true, false, true]; 2]);
    // It is no last good version for whoever did not see it.
    shop.cluster.control()?.component.restart()?;
    shop.until("a policy that is not valid denies after a restart", [NOBODY; 2]);

    shop.cluster.directory().remove(FILE)?;
    shop.until("nothing is refused without policies", [ALL; 2]);
    raw(&authentication("shop", "a", "mtls: {mode: STRIKT}"));
    shop.until("plaintext is not taken", [MESH; 2]);
    refused(&["PeerAuthentication shop/a", "spec.mtls.mode"]);
    // A name that no object can have, which is that of the policy that denies plaintext.
    let mut named = authentication("shop", "a", "mtls: {mode: STRICT}");
    named += &object("AuthorizationPolicy", ROOT, "istio_converted_static_strict", "action: DENY");
    raw(&named);
    refused(&["istio_converted_static_strict", "metadata.name"]);
    shop.until("it denies everything, as what is not valid does", [NOBODY; 2]);
    raw(&authentication("shop", "a", "mtls: {mode: STRICT}"));
    shop.until("plaintext is still not taken", [MESH; 2]);
    Ok(())
}
