//! The plugin against an agent that the test plays, and every wrong shape of what a runtime may give it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread::JoinHandle;

use mesh_proto::node::pod_request::Kind;
use mesh_runtime::seqpacket::Listener;
use prost::Message as _;

use super::decide::Mode;
use super::knowledge::{Knowledge, KnownPod};
use super::*;

const ARGS: &str =
    "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-1;K8S_POD_UID=8c1e;K8S_POD_INFRA_CONTAINER_ID=sandbox-1";
const NOWHERE: &str = "/nonexistent/cni.sock";

/// The environment of a runtime, with some variables replaced.
fn run_with(command: &str, changes: &[(&str, &str)], text: &[u8]) -> Result<Value, CniError> {
    let lookup = |name: &'static str| {
        if let Some((_, value)) = changes.iter().find(|(changed, _)| *changed == name) {
            return Ok(Some((*value).to_owned()));
        }
        let value = match name {
            "CNI_COMMAND" => command,
            "CNI_CONTAINERID" => "sandbox-1",
            "CNI_NETNS" => "/proc/self/ns/net",
            "CNI_IFNAME" => "eth0",
            "CNI_ARGS" => ARGS,
            _ => return Ok(None),
        };
        Ok(Some(value.to_owned()))
    };
    execute(&lookup, text, 1000)
}

fn run(command: &str, text: &Value) -> Result<Value, CniError> {
    run_with(command, &[], &serde_json::to_vec(text).unwrap())
}

fn configuration(socket: &Path) -> Value {
    json!({
        "cniVersion": "1.1.0", "name": "net", "type": "ztunnel",
        "culvert": { "agentSocket": socket, "serviceAccount": "web", "patienceSeconds": 1 },
        "prevResult": {
            "cniVersion": "1.1.0",
            "interfaces": [{ "name": "veth1" }, { "name": "eth0", "sandbox": "/run/netns/x" }],
            "ips": [
                { "address": "10.244.1.5/24", "interface": 1 },
                { "address": "10.244.1.1/24", "interface": 0 },
                { "address": "fd00::5/64", "interface": 1 },
            ],
            "dns": {}, "x-unknown": [1, "two"],
        },
    })
}

/// An agent that gives each connection one answer, in order, and returns what it was asked.
fn agent(socket: &Path, answers: Vec<node::PodResponse>) -> JoinHandle<Vec<(Kind, Vec<OwnedFd>)>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let listener = {
        let _guard = runtime.enter();
        Listener::bind(socket, 0o600).unwrap()
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            let mut asked = Vec::new();
            for answer in answers {
                let connection = listener.accept().await.unwrap();
                let (bytes, fds) = connection.recv(1 << 16).await.unwrap();
                asked.push((node::PodRequest::decode(bytes).unwrap().kind.unwrap(), fds));
                connection.send(&answer.encode_to_vec(), &[]).await.unwrap();
            }
            asked
        })
    })
}

fn answer(error: &str, try_again: bool) -> node::PodResponse {
    node::PodResponse { error: error.into(), try_again, version: 2, ..node::PodResponse::default() }
}

fn decided(decision: node::Decision) -> node::PodResponse {
    node::PodResponse { decision: decision.into(), reason: "so".into(), ..answer("", false) }
}

/// What the agent was asked, with the descriptors that came along.
type Asked = Vec<(Kind, Vec<OwnedFd>)>;

/// One command against an agent that gives these answers.
fn with_agent(command: &str, answers: Vec<node::PodResponse>) -> (Result<Value, CniError>, Asked) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("cni.sock");
    let asked = agent(&socket, answers);
    let mut configuration = configuration(&socket);
    configuration["cni.dev/valid-attachments"] = json!([{ "containerID": "a", "ifname": "eth0" }]);
    let result = run(command, &configuration);
    (result, asked.join().unwrap())
}

fn leave_word(run_dir: &Path, namespace: Mode, pod: Option<Mode>) {
    let known = pod.map(|mode| KnownPod { uids: vec!["8c1e".into()], mode, ..KnownPod::default() });
    let pods = known.map(|known| (String::from("shop"), [(String::from("web-1"), known)].into()));
    let knowledge =
        Knowledge { namespaces: [(String::from("shop"), namespace)].into(), pods: pods.into_iter().collect() };
    knowledge::save(&knowledge::path(run_dir), &knowledge).unwrap();
}

#[test]
fn versions_are_told_in_the_one_that_is_spoken() {
    for (text, version) in [("", "1.1.0"), (r#"{"cniVersion":"1.0.0"}"#, "1.0.0"), (r#"{"cniVersion":"7.0"}"#, "1.1.0")]
    {
        let result = run_with("VERSION", &[], text.as_bytes()).unwrap();
        assert_eq!(result, json!({ "cniVersion": version, "supportedVersions": VERSIONS }));
    }
    let error = CniError::Environment("X");
    assert_eq!(failure(&error, br#"{"cniVersion":"0.4.0"}"#)["cniVersion"], "0.4.0");
    assert_eq!(failure(&error, b"{")["cniVersion"], "1.1.0");
}

#[test]
fn add_asks_the_agent_and_passes_the_result_on_unchanged() {
    for version in VERSIONS {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("cni.sock");
        let asked = agent(&socket, vec![decided(node::Decision::Enrolled)]);
        let mut configuration = configuration(&socket);
        configuration["cniVersion"] = json!(version);
        configuration["prevResult"]["cniVersion"] = json!(version);
        assert_eq!(run("ADD", &configuration).unwrap(), configuration["prevResult"]);
        let (Kind::Admit(request), fds) = asked.join().unwrap().remove(0) else { panic!("admit") };
        assert_eq!(fds.len(), 1);
        assert_eq!(request.netns_path, "/proc/self/ns/net");
        assert_eq!((request.container_id.as_str(), request.asked_at_ms), ("sandbox-1", 1000));
        let pod = request.pod.unwrap();
        assert_eq!(
            (pod.uid.as_str(), pod.name.as_str(), pod.namespace.as_str(), pod.service_account.as_str()),
            ("8c1e", "web-1", "shop", "web")
        );
        assert_eq!(pod.addresses.len(), 2, "the host's end is not the pod's");
        assert_eq!(pod.addresses[0], [10, 244, 1, 5]);
        let log = fs::read_to_string(folder.path().join("cni.log")).unwrap();
        assert!(log.contains("ADD: shop/web-1 (sandbox-1): enrolled: so"), "{log}");
    }
}

#[test]
fn own_pods_and_excluded_namespaces_need_no_agent() {
    let mut configuration = configuration(Path::new(NOWHERE));
    let add = |configuration: &Value, namespace: &str, name: &str| {
        let args = format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID=1");
        let text = serde_json::to_vec(configuration).unwrap();
        run_with("ADD", &[("CNI_ARGS", &args)], &text).map_err(|error| error.code())
    };
    assert!(add(&configuration, "kube-system", "dns").is_ok());
    assert!(add(&configuration, "culvert-system", "culvertd").is_ok());
    configuration["culvert"]["excludedNamespaces"] = json!(["monitoring"]);
    assert!(add(&configuration, "monitoring", "p").is_ok());
    assert!(add(&configuration, "culvert-system", "ztunnel-x2v9k").is_ok());
    assert_eq!(add(&configuration, "culvert-system", "culvertd"), Err(11));
    assert_eq!(add(&configuration, "kube-system", "dns"), Err(11));
    configuration["culvert"]["enrolled"] = json!(false);
    assert!(add(&configuration, "kube-system", "dns").is_ok());
}

#[test]
fn without_the_agent_only_what_it_left_word_of_passes() {
    let folder = tempfile::tempdir().unwrap();
    let configuration = configuration(&folder.path().join("cni.sock"));
    let refused = || run("ADD", &configuration).unwrap_err();
    let error = refused();
    assert_eq!(error.code(), 11);
    let text = error.to_string();
    for part in ["shop/web-1", "not known", "after 1 s", "does not answer", "culvert-node", "dataplane-mode=none"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    leave_word(folder.path(), Mode::Ambient, Some(Mode::Unset));
    assert!(refused().to_string().contains("by its labels"));
    leave_word(folder.path(), Mode::Unset, None);
    assert_eq!(refused().code(), 11, "a pod that the agent did not know may have the label");
    leave_word(folder.path(), Mode::Unset, Some(Mode::Ambient));
    refused();
    fs::write(knowledge::path(folder.path()), "{").unwrap();
    refused();
    assert_eq!(Folder::new(folder.path()).load(|_| true).unwrap(), []);

    leave_word(folder.path(), Mode::Unset, Some(Mode::Unset));
    assert_eq!(run("ADD", &configuration).unwrap(), configuration["prevResult"]);
    let passed = Folder::new(folder.path()).load(|_| true).unwrap().remove(0);
    assert_eq!((passed.uid.as_str(), passed.sandbox.as_str()), ("8c1e", "sandbox-1"));
    assert_eq!(passed.addresses.len(), 2);
    assert_eq!(passed.netns_inode, fs::metadata("/proc/self/ns/net").unwrap().ino());
    run("CHECK", &configuration).unwrap();
    run("DEL", &configuration).unwrap();
    assert_eq!(Folder::new(folder.path()).load(|_| true).unwrap(), [], "forgotten with the sandbox");
}

#[test]
fn agent_that_is_slow_is_not_away() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("cni.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let listener = {
        let _guard = runtime.enter();
        Listener::bind(&socket, 0o600).unwrap()
    };
    leave_word(folder.path(), Mode::Unset, Some(Mode::Unset));
    // Connections are made, for the kernel accepts them; nobody reads what is asked.
    let error = run("ADD", &configuration(&socket)).unwrap_err();
    assert_eq!(error.code(), 11, "{error}");
    assert!(error.to_string().contains("gives no answer"), "{error}");
    assert_eq!(Folder::new(folder.path()).load(|_| true).unwrap(), []);
    // One that closes its connections is not away either.
    let connection = std::thread::scope(|scope| {
        let asking = scope.spawn(|| Client::connect(&socket, SHORT)?.request(Kind::Ping(node::Ping {})));
        // The first is that of ADD.
        runtime.block_on(async {
            drop(listener.accept().await.unwrap());
            drop(listener.accept().await.unwrap());
        });
        asking.join().unwrap()
    });
    assert!(matches!(connection, Err(ClientError::Unanswered { .. })), "{connection:?}");
    drop(listener);
    run("ADD", &configuration(&socket)).unwrap();
}

#[test]
fn agent_is_asked_again_until_it_admits_the_pod() {
    let later = || answer("the source does not know this pod (yet)", true);
    let (result, asked) = with_agent("ADD", vec![later(), later(), decided(node::Decision::Passed)]);
    result.unwrap();
    assert_eq!(asked.len(), 3);
    let older = node::PodResponse { version: 1, ..answer("a request of an unknown kind", false) };
    let (result, _) = with_agent("ADD", vec![older, decided(node::Decision::Enrolled)]);
    result.unwrap();
    let (result, asked) = with_agent("ADD", vec![answer("no such address", false)]);
    let error = result.unwrap_err();
    assert_eq!((error.code(), asked.len()), (100, 1));
    assert!(error.to_string().contains("shop/web-1") && error.to_string().contains("no such address"), "{error}");
}

#[test]
fn delete_never_fails() {
    let (result, asked) = with_agent("DEL", vec![answer("", false)]);
    assert_eq!(result.unwrap(), Value::Null);
    let Kind::Delete(request) = &asked[0].0 else { panic!("delete") };
    assert_eq!((request.pod_uid.as_str(), request.container_id.as_str()), ("8c1e", "sandbox-1"));
    assert_eq!(with_agent("DEL", vec![answer("a rule stays", false)]).0.unwrap(), Value::Null);
    let mut nowhere = configuration(Path::new(NOWHERE));
    run("DEL", &nowhere).unwrap();
    nowhere.as_object_mut().unwrap().remove("prevResult");
    let text = serde_json::to_vec(&nowhere).unwrap();
    assert_eq!(run_with("DEL", &[("CNI_NETNS", ""), ("CNI_ARGS", "")], &text).unwrap(), Value::Null);
}

#[test]
fn check_says_what_is_wrong() {
    let check = |reason: &str, sandbox: &str| {
        let pod = node::Pod { uid: String::from("8c1e"), ..node::Pod::default() };
        let state = node::PodState {
            pod: Some(pod),
            not_enrolled_reason: reason.into(),
            container_id: sandbox.into(),
            ..node::PodState::default()
        };
        let answer = node::PodResponse { pods: vec![state], ..decided(node::Decision::Enrolled) };
        with_agent("CHECK", vec![answer]).0.map_err(|error| error.code())
    };
    assert_eq!(check("", ""), Ok(Value::Null));
    assert_eq!(check("", "sandbox-1"), Ok(Value::Null));
    assert_eq!(check("no rule", "sandbox-1"), Err(101));
    assert_eq!(check("", "sandbox-2"), Err(101));
    let code = |answer| with_agent("CHECK", vec![answer]).0.map_err(|error| error.code());
    assert_eq!(code(decided(node::Decision::Passed)), Ok(Value::Null));
    assert_eq!(code(answer("", false)), Err(101), "the agent does not know it");
    let nowhere = configuration(Path::new(NOWHERE));
    assert_eq!(run("CHECK", &nowhere).unwrap_err().code(), 11);
}

#[test]
fn status_and_garbage_collection() {
    assert_eq!(with_agent("STATUS", vec![answer("", false)]).0.unwrap(), Value::Null);
    let (result, asked) = with_agent("GC", vec![answer("", false)]);
    assert_eq!(result.unwrap(), Value::Null);
    let Kind::Prune(request) = &asked[0].0 else { panic!("prune") };
    assert_eq!((request.container_ids.as_slice(), request.asked_at_ms), (&[String::from("a")][..], 1000));
    let mut nowhere = configuration(Path::new(NOWHERE));
    assert_eq!(run("STATUS", &nowhere).unwrap_err().code(), 50);
    assert_eq!(run("GC", &nowhere).unwrap_err().code(), 7, "no list is not an empty list");
    nowhere["cni.dev/valid-attachments"] = json!([]);
    assert_eq!(run("GC", &nowhere).unwrap_err().code(), 11);
    for wrong in [json!(null), json!({}), json!([1]), json!([{}]), json!([{ "containerID": 3 }])] {
        nowhere["cni.dev/valid-attachments"] = wrong;
        assert_eq!(run("GC", &nowhere).unwrap_err().code(), 7);
    }
    let mut earlier = configuration(Path::new(NOWHERE));
    earlier["cniVersion"] = json!("1.0.0");
    assert_eq!(run("STATUS", &earlier).unwrap_err().code(), 1, "the version has no such command");
    assert_eq!(run("GC", &earlier).unwrap_err().code(), 1);
}

#[test]
fn wrong_environment_is_an_error_of_the_specification() {
    let text = serde_json::to_vec(&configuration(Path::new(NOWHERE))).unwrap();
    let long = "a".repeat(300);
    for (variable, value) in [
        ("CNI_COMMAND", ""),
        ("CNI_COMMAND", "add"),
        ("CNI_CONTAINERID", ""),
        ("CNI_CONTAINERID", "../../etc/passwd"),
        ("CNI_CONTAINERID", &long),
        ("CNI_IFNAME", ""),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "much-too-long-for-it"),
        ("CNI_NETNS", ""),
        ("CNI_NETNS", "netns/x"),
        ("CNI_ARGS", ""),
        ("CNI_ARGS", "K8S_POD_NAME"),
        ("CNI_ARGS", "K8S_POD_NAME=a"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=a"),
        ("CNI_ARGS", "K8S_POD_NAME=a;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAMESPACE=shop"),
        ("CNI_ARGS", "K8S_POD_NAME=a;K8S_POD_NAMESPACE=b;K8S_POD_INFRA_CONTAINER_ID=other"),
        ("CNI_ARGS", &format!("K8S_POD_NAMESPACE=b;K8S_POD_NAME={long}")),
    ] {
        let error = run_with("ADD", &[(variable, value)], &text).unwrap_err();
        assert_eq!(error.code(), 4, "{variable}={value}: {error}");
    }
    let missing = run_with("ADD", &[("CNI_NETNS", "/nonexistent/netns")], &text).unwrap_err();
    assert_eq!(missing.code(), 11, "without an agent its namespace is not looked at");
}

#[test]
fn wrong_configuration_is_an_error_of_the_specification() {
    let code = |text: &str| run_with("ADD", &[], text.as_bytes()).unwrap_err().code();
    for text in ["", "{", "\u{0}", "[[[[", "nul", r#"{"a":1}}"#, &"[".repeat(100_000)] {
        assert_eq!(code(text), 6, "{text:.20}");
    }
    for text in ["null", "3", "[]", "{}", r#"{"cniVersion": 1}"#, r#"{"cniVersion": "1.0.0"}"#] {
        assert_eq!(code(text), 7, "{text}");
    }
    for version in ["", "0.1.0", "0.2.0", "9.9.9", "1.0.0 "] {
        assert_eq!(code(&json!({ "cniVersion": version, "name": "net" }).to_string()), 1);
    }
    assert_eq!(code(&" ".repeat(MAX_CONFIGURATION as usize + 1)), 7);
    let good = configuration(Path::new(NOWHERE));
    for (pointer, wrong) in [
        ("/name", json!("")),
        ("/name", json!("a/b")),
        ("/culvert", json!(null)),
        ("/culvert", json!([])),
        ("/culvert/enrolled", json!("yes")),
        ("/culvert/agentSocket", json!("cni.sock")),
        ("/culvert/agentSocket", json!(format!("/{}", "a".repeat(200)))),
        ("/culvert/patienceSeconds", json!(0)),
        ("/culvert/patienceSeconds", json!(-1)),
        ("/culvert/patienceSeconds", json!(1e9)),
        ("/culvert/serviceAccount", json!(1)),
        ("/prevResult", json!(null)),
        ("/prevResult", json!("text")),
        ("/prevResult/ips", json!({})),
        ("/prevResult/ips", json!([1])),
        ("/prevResult/ips/0/address", json!("10.0.0.256/24")),
        ("/prevResult/ips/0/interface", json!(7)),
        ("/prevResult/ips/0/interface", json!(-1)),
        ("/prevResult/interfaces", json!("eth0")),
    ] {
        let mut configuration = good.clone();
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        match configuration.pointer_mut(parent).unwrap() {
            Value::Array(items) => items[field.parse::<usize>().unwrap()] = wrong.clone(),
            object => object[field] = wrong.clone(),
        }
        let error = run("ADD", &configuration).unwrap_err();
        assert_eq!(error.code(), 7, "{pointer} {wrong}: {error}");
    }
    let mut typo = good;
    typo["culvert"]["excludedNamespace"] = json!(["shop"]);
    assert!(run("ADD", &typo).unwrap_err().to_string().contains("excludedNamespace"));
}
