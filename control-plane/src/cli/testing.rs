//! Facts for tests.

use super::facts::{AgentPod, Asked, Component, Culvertd, Discovery, Dump, Facts, Node, Part, Pod};

/// A pod of the mesh that runs.
pub fn part(component: Component, node: &str, pod: &str) -> Part {
    Part {
        component,
        pod: pod.to_owned(),
        node: node.to_owned(),
        image: "image:1".to_owned(),
        ready: true,
        not_running: None,
        ends: false,
    }
}

/// A mesh on the nodes `a` and `b` where all is well: one captured pod of the namespace `shop` on each.
pub fn healthy() -> Facts {
    let node = |name: &str| Node { name: name.into(), kernel: "6.12.1".into(), ready: true, linux: true };
    let pod = |name: &str, node: &str| Pod {
        namespace: "shop".into(),
        name: name.into(),
        uids: vec![format!("uid-{name}")],
        node: node.into(),
        phase: "Running".into(),
        has_address: true,
        annotated: true,
        ..Pod::default()
    };
    let agent = |node: &str, pod: &str| Asked {
        part: part(Component::Agent, node, &format!("agent-{node}")),
        answer: Ok(vec![AgentPod {
            namespace: "shop".into(),
            name: pod.into(),
            uid: format!("uid-{pod}"),
            enrolled: true,
            ..AgentPod::default()
        }]),
    };
    let proxy = |node: &str| {
        let connected_since = Some("2026-01-01T00:00:00Z".into());
        let discovery = Discovery { connected_since, synced: true, ..Discovery::default() };
        let dump = Dump { version: super::version::CLIENT.into(), discovery, ..Dump::default() };
        Asked { part: part(Component::Proxy, node, &format!("proxy-{node}")), answer: Ok(dump) }
    };
    let replica = Culvertd { version: super::version::CLIENT.into(), synced: true, ..Culvertd::default() };
    Facts {
        kubernetes: "v1.36.2".into(),
        system_namespace: "culvert-system".into(),
        desired: Component::ALL.into_iter().map(|component| (component, Some(2))).collect(),
        nodes: vec![node("a"), node("b")],
        namespaces: [("shop".to_owned(), Some("ambient".to_owned())), ("default".to_owned(), None)].into(),
        pods: vec![pod("web", "a"), pod("db", "b")],
        culvertd: vec![Asked { part: part(Component::Culvertd, "a", "culvertd-1"), answer: Ok(replica) }],
        agents: vec![agent("a", "web"), agent("b", "db")],
        proxies: vec![proxy("a"), proxy("b")],
        roots: Some(Ok(Vec::new())),
        ..Facts::default()
    }
}
