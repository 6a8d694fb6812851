//! What the mesh's accounts may do: a table, which is what the manifests give, and by the API server's own word neither less
//! nor more.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tests::kubernetes::ApiServer;

use crate::{objects, text};

const SYSTEM: &str = "culvert-system";
const READ: &[&str] = &["list", "watch"];

/// Where a right holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Scope {
    Cluster,
    /// In the mesh's own namespace.
    Own,
}

/// What an account may do, and which part of the program does it.
struct Right {
    account: &'static str,
    scope: Scope,
    group: &'static str,
    resources: &'static [&'static str],
    /// Objects by name; none: all.
    names: &'static [&'static str],
    verbs: &'static [&'static str],
    user: &'static str,
}

const fn right(
    account: &'static str,
    scope: Scope,
    group: &'static str,
    resources: &'static [&'static str],
    names: &'static [&'static str],
    verbs: &'static [&'static str],
    user: &'static str,
) -> Right {
    Right { account, scope, group, resources, names, verbs, user }
}

const SECURITY: &str = "security.istio.io";
const WEBHOOKS: &str = "admissionregistration.k8s.io";
const INGEST: &str = "control-plane/src/ingest/kubernetes/watch.rs";
const ROOT: &str = "control-plane/src/ca/kubernetes/root.rs";
const LEADER: &str = "control-plane/src/status/leader.rs";
const REFUSALS: &str = "control-plane/src/status/refusals.rs";
const STATUS: &str = "control-plane/src/status/objects.rs";
const AGENT: &str = "ztunnel/src/agent/enrolment/kubernetes.rs";
const REPORT: &str = "ztunnel/src/agent/enrolment/kubernetes/report.rs";

/// All of them. `ztunnel` has none.
const TABLE: &[Right] = &[
    right(
        "culvertd",
        Scope::Cluster,
        "",
        &["namespaces", "nodes", "pods", "services", "serviceaccounts"],
        &[],
        READ,
        INGEST,
    ),
    right("culvertd", Scope::Cluster, "discovery.k8s.io", &["endpointslices"], &[], READ, INGEST),
    right("culvertd", Scope::Cluster, SECURITY, &["authorizationpolicies", "peerauthentications"], &[], READ, INGEST),
    right("culvertd", Scope::Cluster, "networking.istio.io", &["serviceentries", "workloadentries"], &[], READ, INGEST),
    right("culvertd", Scope::Cluster, "gateway.networking.k8s.io", &["gateways", "gatewayclasses"], &[], READ, INGEST),
    right(
        "culvertd",
        Scope::Cluster,
        SECURITY,
        &["authorizationpolicies/status", "peerauthentications/status"],
        &[],
        &["patch"],
        STATUS,
    ),
    right(
        "culvertd",
        Scope::Cluster,
        "networking.istio.io",
        &["serviceentries/status", "workloadentries/status"],
        &[],
        &["patch"],
        STATUS,
    ),
    right(
        "culvertd",
        Scope::Cluster,
        "gateway.networking.k8s.io",
        &["gateways/status", "gatewayclasses/status"],
        &[],
        &["patch"],
        STATUS,
    ),
    right("culvertd", Scope::Cluster, "", &["services/status"], &[], &["patch"], STATUS),
    right("culvertd", Scope::Cluster, "events.k8s.io", &["events"], &[], &["create"], STATUS),
    right("culvertd", Scope::Cluster, "", &["nodes"], &[], &["patch"], "control-plane/src/status/taint.rs"),
    right(
        "culvertd",
        Scope::Cluster,
        "authentication.k8s.io",
        &["tokenreviews"],
        &[],
        &["create"],
        "control-plane/src/ca/kubernetes/review.rs",
    ),
    right(
        "culvertd",
        Scope::Cluster,
        WEBHOOKS,
        &["validatingwebhookconfigurations"],
        &["culvertd", "culvertd-custom-kinds"],
        &["get", "patch"],
        "control-plane/src/admission/bundle.rs",
    ),
    right("culvertd", Scope::Own, "", &["secrets"], &["culvert-ca-root", "cacerts"], &["get"], ROOT),
    // Who makes something has no name to be held to; what is there already is not touched by it.
    right("culvertd", Scope::Own, "", &["secrets", "configmaps"], &[], &["create"], ROOT),
    right("culvertd", Scope::Own, "", &["configmaps"], &["culvert-ca-root-cert"], &["get", "patch"], ROOT),
    right("culvertd", Scope::Own, "", &["configmaps"], &["culvertd-refusals"], &["get", "patch"], REFUSALS),
    right("culvertd", Scope::Own, "coordination.k8s.io", &["leases"], &["culvertd-leader"], &["get", "update"], LEADER),
    right("culvertd", Scope::Own, "coordination.k8s.io", &["leases"], &[], &["create"], LEADER),
    right("culvert-node", Scope::Cluster, "", &["pods"], &[], READ, AGENT),
    right("culvert-node", Scope::Cluster, "", &["namespaces"], &[], READ, AGENT),
    right("culvert-node", Scope::Cluster, "", &["namespaces"], &[], &["get"], "ztunnel/src/agent/enrolment/fresh.rs"),
    right("culvert-node", Scope::Cluster, "", &["pods/status"], &[], &["patch"], REPORT),
    // An event that is repeated is counted: it is patched.
    right("culvert-node", Scope::Cluster, "events.k8s.io", &["events"], &[], &["create", "patch"], REPORT),
];

/// What they must not do, among all that the table does not have.
const REFUSED: &[(&str, &[&str])] = &[
    // Keys, and ways to them.
    ("culvertd", &["get", "secrets/another", "--namespace=culvert-system"]),
    ("culvertd", &["list", "secrets", "--namespace=culvert-system"]),
    ("culvertd", &["get", "secrets/culvert-ca-root", "--namespace=default"]),
    ("culvertd", &["update", "secrets/culvert-ca-root", "--namespace=culvert-system"]),
    ("culvertd", &["delete", "secrets/culvert-ca-root", "--namespace=culvert-system"]),
    ("culvertd", &["create", "secrets", "--namespace=default"]),
    ("culvertd", &["create", "serviceaccounts/token", "--namespace=culvert-system"]),
    ("culvertd", &["impersonate", "users"]),
    // Running something.
    ("culvertd", &["create", "pods", "--namespace=culvert-system"]),
    ("culvertd", &["create", "pods/exec", "--namespace=culvert-system"]),
    ("culvertd", &["patch", "pods", "--namespace=default"]),
    ("culvertd", &["patch", "deployments.apps", "--namespace=culvert-system"]),
    ("culvertd", &["patch", "daemonsets.apps", "--namespace=culvert-system"]),
    // What it reads and judges.
    ("culvertd", &["patch", "services", "--namespace=default"]),
    ("culvertd", &["patch", "authorizationpolicies.security.istio.io", "--namespace=default"]),
    ("culvertd", &["update", "authorizationpolicies.security.istio.io", "--subresource=status"]),
    ("culvertd", &["delete", "peerauthentications.security.istio.io", "--namespace=default"]),
    ("culvertd", &["patch", "serviceentries.networking.istio.io", "--namespace=default"]),
    ("culvertd", &["patch", "workloadentries.networking.istio.io", "--namespace=default"]),
    ("culvertd", &["update", "serviceentries.networking.istio.io", "--subresource=status"]),
    ("culvertd", &["patch", "namespaces/default"]),
    ("culvertd", &["update", "nodes"]),
    ("culvertd", &["delete", "nodes"]),
    ("culvertd", &["patch", "nodes", "--subresource=status"]),
    ("culvertd", &["list", "customresourcedefinitions.apiextensions.k8s.io"]),
    ("culvertd", &["patch", "validatingwebhookconfigurations/another"]),
    ("culvertd", &["create", "validatingwebhookconfigurations"]),
    ("culvertd", &["update", "leases.coordination.k8s.io/another", "--namespace=culvert-system"]),
    ("culvertd", &["update", "leases.coordination.k8s.io/culvertd-leader", "--namespace=default"]),
    ("culvertd", &["escalate", "clusterroles.rbac.authorization.k8s.io"]),
    ("culvertd", &["patch", "events.events.k8s.io", "--namespace=default"]),
    ("culvert-node", &["get", "secrets", "--namespace=culvert-system"]),
    ("culvert-node", &["list", "secrets", "--all-namespaces"]),
    ("culvert-node", &["list", "configmaps", "--namespace=culvert-system"]),
    ("culvert-node", &["create", "pods", "--namespace=default"]),
    ("culvert-node", &["patch", "pods", "--namespace=default"]),
    ("culvert-node", &["update", "pods", "--subresource=status", "--namespace=default"]),
    ("culvert-node", &["delete", "pods", "--namespace=default"]),
    ("culvert-node", &["create", "pods/exec", "--namespace=default"]),
    ("culvert-node", &["create", "pods/ephemeralcontainers", "--namespace=default"]),
    ("culvert-node", &["patch", "namespaces/default"]),
    ("culvert-node", &["get", "nodes"]),
    ("culvert-node", &["patch", "nodes"]),
    ("culvert-node", &["create", "serviceaccounts/token", "--namespace=culvert-system"]),
    ("culvert-node", &["delete", "events.events.k8s.io", "--namespace=default"]),
    ("ztunnel", &["get", "pods", "--namespace=culvert-system"]),
    ("ztunnel", &["list", "namespaces"]),
    ("ztunnel", &["get", "secrets", "--namespace=culvert-system"]),
    ("ztunnel", &["get", "configmaps", "--namespace=culvert-system"]),
    ("ztunnel", &["create", "tokenreviews.authentication.k8s.io"]),
];

/// One right: account, scope, group, resource, name of the object or nothing, verb.
type One = (String, Scope, String, String, String, String);

fn each(account: &str, scope: Scope, group: &str, resources: &[&str], names: &[&str], verbs: &[&str]) -> BTreeSet<One> {
    let names = if names.is_empty() { &[""][..] } else { names };
    let mut all = BTreeSet::new();
    for resource in resources {
        for name in names {
            for verb in verbs {
                let owned = |text: &str| text.to_owned();
                all.insert((owned(account), scope, owned(group), owned(resource), owned(name), owned(verb)));
            }
        }
    }
    all
}

fn table() -> BTreeSet<One> {
    let rows = TABLE.iter().map(|row| each(row.account, row.scope, row.group, row.resources, row.names, row.verbs));
    rows.flatten().collect()
}

fn strings(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().map(|one| one.as_str().unwrap()).collect()
}

/// What a role's rules give.
fn given(account: &str, scope: Scope, rules: &Value) -> BTreeSet<One> {
    let mut all = BTreeSet::new();
    for rule in rules.as_array().into_iter().flatten() {
        assert!(rule["nonResourceURLs"].is_null(), "{rule}");
        let (resources, names, verbs) =
            (strings(&rule["resources"]), strings(&rule["resourceNames"]), strings(&rule["verbs"]));
        for group in strings(&rule["apiGroups"]) {
            all.extend(each(account, scope, group, &resources, &names, &verbs));
        }
    }
    all
}

#[test]
fn the_table_is_what_the_manifests_give() {
    let objects: Vec<Value> = ["crds", "culvert"].into_iter().flat_map(objects).collect();
    let of = |kind: &str| objects.iter().filter(|object| object["kind"] == kind).collect::<Vec<_>>();
    let mut all = BTreeSet::new();
    for (role, binding, scope) in
        [("ClusterRole", "ClusterRoleBinding", Scope::Cluster), ("Role", "RoleBinding", Scope::Own)]
    {
        let bindings = of(binding);
        assert_eq!(bindings.len(), of(role).len(), "{role}");
        for bound in bindings {
            let subjects = bound["subjects"].as_array().unwrap();
            let [subject] = subjects.as_slice() else { panic!("{bound}") };
            let account = text(subject, "/name");
            assert_eq!((&subject["kind"], &subject["namespace"]), (&json!("ServiceAccount"), &json!(SYSTEM)));
            let to = &bound["roleRef"];
            assert_eq!(to["kind"], role);
            let given_by = of(role).into_iter().find(|object| object["metadata"]["name"] == to["name"]).unwrap();
            let own = if scope == Scope::Own { json!(SYSTEM) } else { Value::Null };
            assert_eq!((&given_by["metadata"]["namespace"], &bound["metadata"]["namespace"]), (&own, &own));
            all.extend(given(account, scope, &given_by["rules"]));
        }
    }
    let table = table();
    assert!(all.iter().all(|one| one.5 != "*" && one.3 != "*" && one.2 != "*"), "{all:#?}");
    let (unlisted, ungiven) = (all.difference(&table).collect::<Vec<_>>(), table.difference(&all).collect::<Vec<_>>());
    assert!(unlisted.is_empty() && ungiven.is_empty(), "not in the table: {unlisted:#?}; not given: {ungiven:#?}");
    // And each is used by somebody.
    for row in TABLE {
        assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(row.user).is_file(), "{}", row.user);
    }
}

struct Kubectl<'s> {
    program: PathBuf,
    server: &'s ApiServer,
}

impl<'s> Kubectl<'s> {
    fn new(server: &'s ApiServer) -> Self {
        Self { program: Path::new(&std::env::var_os("KUBERNETES_BIN_DIR").unwrap()).join("kubectl"), server }
    }

    fn run(&self, args: &[&str]) -> String {
        let home = self.server.kubeconfig().parent().unwrap();
        let mut command = Command::new(&self.program);
        let done = command.args(args).env("KUBECONFIG", self.server.kubeconfig()).env("HOME", home).output().unwrap();
        format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr))
    }

    fn may(&self, account: &str, what: &[&str]) -> bool {
        let said = self.run(&[&["auth", "can-i", &user(account)][..], what].concat());
        match said.lines().find(|line| matches!(*line, "yes" | "no")) {
            Some(answer) => answer == "yes",
            None => panic!("{account}: {what:?}: {said}"),
        }
    }

    /// All that the API server lets an account do in a namespace, and everywhere: group, resource, name, verb.
    fn rules(&self, account: &str, namespace: &str) -> BTreeSet<[String; 4]> {
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": namespace},
        });
        let file = self.server.kubeconfig().with_extension("review.json");
        std::fs::write(&file, review.to_string()).unwrap();
        let path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews";
        let said = self.run(&["create", "--raw", path, "--filename", file.to_str().unwrap(), &user(account)]);
        let answer: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
        assert_eq!(answer["status"]["incomplete"], false, "{answer}");
        let given = given(account, Scope::Cluster, &answer["status"]["resourceRules"]);
        given.into_iter().map(|(_, _, group, resource, name, verb)| [group, resource, name, verb]).collect()
    }
}

fn user(account: &str) -> String {
    format!("--as=system:serviceaccount:{SYSTEM}:{account}")
}

#[test]
fn the_api_server_gives_what_is_in_the_table_and_no_more() {
    let server = ApiServer::start().unwrap();
    let kubectl = Kubectl::new(&server);
    for folder in ["crds", "culvert"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests").join(folder);
        kubectl.run(&["apply", "--server-side", "--filename", folder.to_str().unwrap()]);
    }
    let table = table();
    for account in ["culvertd", "culvert-node", "ztunnel"] {
        for namespace in [SYSTEM, "default"] {
            // But for what everybody may who is known at all.
            let everybody = kubectl.rules("nobody-in-particular", namespace);
            let own = kubectl.rules(account, namespace).difference(&everybody).cloned().collect::<BTreeSet<_>>();
            let holds = |scope: Scope| scope == Scope::Cluster || namespace == SYSTEM;
            let wanted = table.iter().filter(|(of, scope, ..)| of == account && holds(*scope));
            let wanted = wanted.cloned().map(|(_, _, group, resource, name, verb)| [group, resource, name, verb]);
            assert_eq!(own, wanted.collect(), "{account} in {namespace}");
        }
    }
    for (account, what) in REFUSED {
        assert!(!kubectl.may(account, what), "{account} may {what:?}");
    }
    // The rows as people ask for them.
    let mut asked = BTreeSet::new();
    for (account, scope, group, resource, name, verb) in &table {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        // kubectl does not ask for kinds that are not there and whose group has so many parts.
        if group == "gateway.networking.k8s.io" {
            continue;
        }
        let dot = if group.is_empty() { "" } else { "." };
        let slash = if name.is_empty() { "" } else { "/" };
        let what = format!("{resource}{dot}{group}{slash}{name}");
        let subresource = format!("--subresource={subresource}");
        let place = if *scope == Scope::Own { "--namespace=culvert-system" } else { "--all-namespaces" };
        // One verb of each: the rest was told above.
        if !asked.insert((account, what.clone(), subresource.clone())) {
            continue;
        }
        let mut args = vec![verb.as_str(), what.as_str(), subresource.as_str()];
        args.extend(Some(place).filter(|_| name.is_empty() || *scope == Scope::Own));
        assert!(kubectl.may(account, &args), "{account} may not {args:?}");
    }
}
