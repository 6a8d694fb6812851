//! What the mesh's accounts may do, and what they may not, by the API server's own word.

use std::path::{Path, PathBuf};
use std::process::Command;

use tests::kubernetes::ApiServer;

use crate::mesh::manifests;

struct Kubectl<'s> {
    program: PathBuf,
    server: &'s ApiServer,
}

impl Kubectl<'_> {
    fn run(&self, args: &[&str]) -> String {
        let home = self.server.kubeconfig().parent().unwrap();
        let mut command = Command::new(&self.program);
        let done = command.args(args).env("KUBECONFIG", self.server.kubeconfig()).env("HOME", home).output().unwrap();
        format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr))
    }

    /// Whether an account of the mesh may do it.
    fn may(&self, account: &str, what: &[&str]) -> bool {
        let account = format!("--as=system:serviceaccount:culvert-system:{account}");
        let said = self.run(&[&["auth", "can-i", account.as_str()][..], what].concat());
        match said.lines().find(|line| matches!(*line, "yes" | "no")) {
            Some(answer) => answer == "yes",
            None => panic!("{what:?}: {said}"),
        }
    }
}

#[test]
fn rights_are_those_of_the_table_and_no_more() {
    let server = ApiServer::start().unwrap();
    let program = Path::new(&std::env::var_os("KUBERNETES_BIN_DIR").unwrap()).join("kubectl");
    let kubectl = Kubectl { program, server: &server };
    for path in ["crds", "culvert"].into_iter().flat_map(manifests) {
        kubectl.run(&["apply", "--server-side", "--filename", path.to_str().unwrap()]);
    }
    let own = "--namespace=culvert-system";
    let table: &[(&str, &[&str], bool)] = &[
        ("culvertd", &["watch", "pods", "--all-namespaces"], true),
        ("culvertd", &["list", "endpointslices.discovery.k8s.io", "--all-namespaces"], true),
        ("culvertd", &["create", "tokenreviews.authentication.k8s.io"], true),
        ("culvertd", &["get", "secrets/culvert-ca-root", own], true),
        ("culvertd", &["get", "secrets/cacerts", own], true),
        ("culvertd", &["create", "secrets", own], true),
        ("culvertd", &["patch", "configmaps/culvert-ca-root-cert", own], true),
        ("culvertd", &["get", "secrets/another", own], false),
        ("culvertd", &["list", "secrets", own], false),
        ("culvertd", &["get", "secrets/culvert-ca-root", "--namespace=default"], false),
        ("culvertd", &["create", "secrets", "--namespace=default"], false),
        ("culvertd", &["patch", "pods", "--namespace=default"], false),
        ("culvertd", &["create", "pods", own], false),
        ("culvertd", &["watch", "authorizationpolicies.security.istio.io", "--all-namespaces"], true),
        ("culvertd", &["list", "peerauthentications.security.istio.io", "--all-namespaces"], true),
        ("culvertd", &["patch", "authorizationpolicies.security.istio.io", "--subresource=status"], true),
        ("culvertd", &["patch", "peerauthentications.security.istio.io", "--subresource=status"], true),
        ("culvertd", &["update", "authorizationpolicies.security.istio.io", "--subresource=status"], false),
        ("culvertd", &["patch", "services", "--subresource=status", "--namespace=default"], true),
        ("culvertd", &["patch", "services", "--namespace=default"], false),
        ("culvertd", &["create", "events.events.k8s.io", "--namespace=default"], true),
        ("culvertd", &["patch", "authorizationpolicies.security.istio.io", "--namespace=default"], false),
        ("culvertd", &["delete", "peerauthentications.security.istio.io", "--namespace=default"], false),
        ("culvertd", &["watch", "serviceentries.networking.istio.io", "--all-namespaces"], true),
        ("culvertd", &["list", "workloadentries.networking.istio.io", "--all-namespaces"], true),
        ("culvertd", &["patch", "serviceentries.networking.istio.io", "--namespace=default"], false),
        ("culvertd", &["list", "customresourcedefinitions.apiextensions.k8s.io"], false),
        ("culvertd", &["patch", "validatingwebhookconfigurations/culvertd"], true),
        ("culvertd", &["patch", "validatingwebhookconfigurations/culvertd-custom-kinds"], true),
        ("culvertd", &["patch", "validatingwebhookconfigurations/another"], false),
        ("culvertd", &["create", "serviceaccounts/token", own], false),
        ("culvertd", &["update", "leases.coordination.k8s.io/culvertd-leader", own], true),
        ("culvertd", &["create", "leases.coordination.k8s.io", own], true),
        ("culvertd", &["update", "leases.coordination.k8s.io/another", own], false),
        ("culvertd", &["update", "leases.coordination.k8s.io/culvertd-leader", "--namespace=default"], false),
        ("culvertd", &["patch", "nodes"], true),
        ("culvertd", &["update", "nodes"], false),
        ("culvertd", &["delete", "nodes"], false),
        ("culvertd", &["patch", "nodes", "--subresource=status"], false),
        ("culvert-node", &["watch", "pods", "--all-namespaces"], true),
        ("culvert-node", &["patch", "pods", "--subresource=status", "--namespace=default"], true),
        ("culvert-node", &["patch", "pods", "--namespace=default"], false),
        ("culvert-node", &["watch", "namespaces"], true),
        ("culvert-node", &["get", "namespaces"], true),
        ("culvert-node", &["create", "events.events.k8s.io", "--namespace=default"], true),
        ("culvert-node", &["get", "secrets", own], false),
        ("culvert-node", &["list", "secrets", "--all-namespaces"], false),
        ("culvert-node", &["create", "pods", "--namespace=default"], false),
        ("culvert-node", &["delete", "pods", "--namespace=default"], false),
        ("culvert-node", &["create", "pods/exec", "--namespace=default"], false),
        ("culvert-node", &["patch", "namespaces/default"], false),
        ("culvert-node", &["patch", "nodes"], false),
        ("culvert-node", &["create", "serviceaccounts/token", own], false),
        ("ztunnel", &["get", "pods", own], false),
        ("ztunnel", &["list", "namespaces"], false),
        ("ztunnel", &["get", "secrets", own], false),
        ("ztunnel", &["get", "configmaps", own], false),
    ];
    let wrong: Vec<_> = table.iter().filter(|(who, what, may)| kubectl.may(who, what) != *may).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
