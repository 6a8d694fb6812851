//! The mesh's pods: what they may, where they run, and how it is known that they live. Only the agent may anything at all.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::{objects, text};

/// Capabilities that containers have, by name; the others have none.
const CAPABILITIES: [(&str, &[&str]); 3] = [
    // CHOWN and FOWNER: the folder that only the proxy's user can enter. The others are what capture takes.
    (
        "agent",
        &["BPF", "CHOWN", "DAC_OVERRIDE", "FOWNER", "NET_ADMIN", "NET_RAW", "PERFMON", "SYS_ADMIN", "SYS_PTRACE"],
    ),
    ("culvertd", &[]),
    ("proxy", &[]),
];

/// Paths of the host that containers see, by their pod; the others see none.
const HOST_PATHS: [(&str, &[&str]); 3] = [
    (
        "culvert-node",
        &["/etc/cni/net.d", "/opt/cni/bin", "/proc", "/run/culvert", "/run/netns", "/sys/fs/bpf", "/sys/fs/cgroup"],
    ),
    ("culvertd", &[]),
    ("ztunnel", &["/run/culvert/proxy"]),
];

/// Deployments and DaemonSets, by name.
fn workloads() -> BTreeMap<String, Value> {
    let found = objects("culvert").into_iter().filter(|object| object.pointer("/spec/template/spec").is_some());
    found.map(|object| (text(&object, "/metadata/name").to_owned(), object)).collect()
}

fn pod(workload: &Value) -> &Value {
    workload.pointer("/spec/template/spec").unwrap()
}

/// All containers of a pod, those that only start it too.
fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    ["containers", "initContainers"].into_iter().flat_map(|kind| pod[kind].as_array().into_iter().flatten())
}

/// A field of the security context of a container, or of its pod.
fn secured<'o>(pod: &'o Value, container: &'o Value, field: &str) -> &'o Value {
    let own = &container["securityContext"][field];
    if own.is_null() { &pod["securityContext"][field] } else { own }
}

fn strings(list: &Value) -> BTreeSet<&str> {
    list.as_array().into_iter().flatten().map(|one| one.as_str().unwrap()).collect()
}

#[test]
fn containers_may_what_they_need_and_nothing_else() {
    let mut seen = BTreeSet::new();
    for (name, workload) in workloads() {
        let pod = pod(&workload);
        let paths = pod["volumes"].as_array().into_iter().flatten().filter_map(|one| one["hostPath"]["path"].as_str());
        let expected = HOST_PATHS.iter().find(|(of, _)| *of == name).unwrap_or_else(|| panic!("{name} is new")).1;
        assert_eq!(paths.collect::<BTreeSet<_>>(), expected.iter().copied().collect(), "{name}");
        let is_on_host = ["hostNetwork", "hostPID"].map(|field| pod[field] == true);
        assert_eq!(is_on_host, [name == "culvert-node"; 2], "{name}");
        assert!(pod["hostIPC"].is_null(), "{name}");
        for container in containers(pod) {
            let own = text(container, "/name");
            seen.insert(own.to_owned());
            let known = CAPABILITIES.iter().find(|(of, _)| *of == own).unwrap_or_else(|| panic!("{own} is new"));
            let context = &container["securityContext"];
            assert_eq!(context["capabilities"]["drop"], json!(["ALL"]), "{own}");
            let added = strings(&context["capabilities"]["add"]);
            assert_eq!(added, known.1.iter().copied().collect(), "{own}");
            assert!(context["privileged"].is_null() || context["privileged"] == false, "{own}");
            assert_eq!(context["readOnlyRootFilesystem"], true, "{own}");
            assert_eq!(secured(pod, container, "seccompProfile"), &json!({"type": "RuntimeDefault"}), "{own}");
            if added.is_empty() {
                assert_eq!(context["allowPrivilegeEscalation"], false, "{own}");
                assert_eq!(secured(pod, container, "runAsNonRoot"), true, "{own}");
                assert!(secured(pod, container, "runAsUser").as_u64().is_some_and(|user| user > 0), "{own}");
                assert!(secured(pod, container, "appArmorProfile").is_null(), "{own}");
            }
        }
    }
    assert_eq!(seen, CAPABILITIES.iter().map(|(name, _)| (*name).to_owned()).collect());
    // What the agent may is what the strictest levels of pod security refuse, so its namespace says that it may.
    let namespace = objects("culvert").into_iter().find(|object| object["kind"] == "Namespace").unwrap();
    let labels = &namespace["metadata"]["labels"];
    assert_eq!(labels["pod-security.kubernetes.io/enforce"], "privileged");
    assert_eq!(labels["istio.io/dataplane-mode"], "none");
}

#[test]
fn containers_say_what_they_take_and_whether_they_live() {
    for (name, workload) in workloads() {
        for container in containers(pod(&workload)) {
            let own = format!("{name}/{}", text(container, "/name"));
            for resource in ["cpu", "memory"] {
                let requested = &container["resources"]["requests"][resource];
                assert!(requested.is_string(), "{own}: no request of {resource}");
            }
            // What the proxy's sockets hold counts as the agent's, which made them: a limit would end it under load.
            let limited = container["resources"]["limits"]["memory"].is_string();
            assert_eq!(limited, own != "culvert-node/agent", "{own}");
            // With a limit it would stand still amid its work.
            assert!(container["resources"]["limits"]["cpu"].is_null(), "{own}");
            for kind in ["startupProbe", "readinessProbe", "livenessProbe"] {
                let probe = &container[kind];
                let asks = [&probe["httpGet"], &probe["exec"]];
                assert_eq!(asks.iter().filter(|way| way.is_object()).count(), 1, "{own}: {kind}: {probe}");
                if let Some(port) = probe["httpGet"]["port"].as_str() {
                    let ports = container["ports"].as_array().unwrap();
                    assert!(ports.iter().any(|known| known["name"] == port), "{own}: {kind}: no port {port}");
                }
            }
            // Whether it serves is not whether it lives: what waits for others must not be killed for it.
            let (live, ready) = (&container["livenessProbe"], &container["readinessProbe"]);
            assert_ne!((&live["httpGet"]["path"], &live["exec"]), (&ready["httpGet"]["path"], &ready["exec"]), "{own}");
            let patience =
                |probe: &Value| probe["periodSeconds"].as_u64().unwrap() * probe["failureThreshold"].as_u64().unwrap();
            assert!(patience(live) >= 60 && patience(&container["startupProbe"]) >= 180, "{own}");
            assert!(live["timeoutSeconds"].as_u64() >= Some(5), "{own}");
        }
    }
}

#[test]
fn every_node_has_an_agent_and_a_proxy_before_anything_else() {
    let all = workloads();
    let sets: Vec<_> = all.iter().filter(|(_, workload)| workload["kind"] == "DaemonSet").collect();
    assert_eq!(sets.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["culvert-node", "ztunnel"]);
    for (name, set) in sets {
        let pod = pod(set);
        assert_eq!(pod["tolerations"], json!([{"operator": "Exists"}]), "{name}");
        assert_eq!(pod["priorityClassName"], "system-node-critical", "{name}");
        assert_eq!(pod["nodeSelector"], json!({"kubernetes.io/os": "linux"}), "{name}");
        assert!(pod["affinity"].is_null(), "{name}");
        assert_ne!(set["spec"]["updateStrategy"]["type"], "OnDelete", "{name}");
    }
    // The old proxy serves until the new one does; there is one agent at a time.
    let update = |name: &str| &all[name]["spec"]["updateStrategy"]["rollingUpdate"];
    assert_eq!(update("ztunnel"), &json!({"maxSurge": 1, "maxUnavailable": 0}));
    assert_eq!(update("culvert-node"), &json!({"maxUnavailable": 1}));
}

#[test]
fn replicas_of_the_control_plane_are_apart_and_never_all_away() {
    let all = workloads();
    let culvertd = &all["culvertd"];
    let pod = pod(culvertd);
    assert!(culvertd["spec"]["replicas"].as_u64() >= Some(2));
    assert_eq!(culvertd["spec"]["strategy"]["rollingUpdate"], json!({"maxSurge": 1, "maxUnavailable": 0}));
    assert_eq!(pod["priorityClassName"], "system-cluster-critical");
    let labels = &culvertd["spec"]["template"]["metadata"]["labels"];
    let selects = |selector: &Value| {
        let wanted = selector["matchLabels"].as_object().unwrap();
        !wanted.is_empty() && wanted.iter().all(|(key, value)| labels[key] == *value)
    };
    assert!(selects(&culvertd["spec"]["selector"]));
    // Preferred: a cluster of one node has both on it.
    let apart = &pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"];
    let [term] = apart.as_array().unwrap().as_slice() else { panic!("{apart}") };
    assert_eq!(term["podAffinityTerm"]["topologyKey"], "kubernetes.io/hostname");
    assert!(selects(&term["podAffinityTerm"]["labelSelector"]));
    // A node of its own gets it also while it waits for the mesh.
    let tolerates = json!({"key": "culvert.dev/agent-not-ready", "operator": "Exists"});
    assert!(pod["tolerations"].as_array().unwrap().contains(&tolerates));
    let objects = objects("culvert");
    let budgets: Vec<_> = objects.iter().filter(|object| object["kind"] == "PodDisruptionBudget").collect();
    let [budget] = budgets.as_slice() else { panic!("{budgets:?}") };
    assert_eq!(budget["metadata"]["namespace"], culvertd["metadata"]["namespace"]);
    assert!(budget["spec"]["minAvailable"] == 1 && selects(&budget["spec"]["selector"]), "{budget}");
    // Its service selects it, and by ports that it has.
    let service = objects.iter().find(|object| object["kind"] == "Service").unwrap();
    assert!(selects(&json!({"matchLabels": service["spec"]["selector"]})));
    let ports = pod["containers"][0]["ports"].as_array().unwrap();
    let has = |name: &Value| ports.iter().any(|port| port["name"] == *name);
    assert!(service["spec"]["ports"].as_array().unwrap().iter().all(|port| has(&port["targetPort"])));
}

#[test]
fn the_proxy_has_one_token_which_is_for_culvertd_alone() {
    let all = workloads();
    let pod = pod(&all["ztunnel"]);
    assert_eq!(pod["automountServiceAccountToken"], false);
    let sources = pod["volumes"].as_array().unwrap().iter().flat_map(|one| one["projected"]["sources"].as_array());
    let tokens: Vec<_> = sources.flatten().filter(|one| one["serviceAccountToken"].is_object()).collect();
    let [token] = tokens.as_slice() else { panic!("{tokens:?}") };
    assert_eq!(token["serviceAccountToken"]["audience"], "istio-ca");
    let account = objects("culvert")
        .into_iter()
        .find(|object| object["kind"] == "ServiceAccount" && object["metadata"]["name"] == "ztunnel");
    assert_eq!(account.unwrap()["automountServiceAccountToken"], false);
}
