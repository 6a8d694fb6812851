use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread::JoinHandle;

use mesh_proto::node::pod_request::Kind;
use mesh_runtime::seqpacket::Listener;
use prost::Message as _;

use super::*;

const ARGS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-1;K8S_POD_UID=8c1e";

fn environment(command: &'static str) -> impl Fn(&str) -> Option<String> {
    move |name| match name {
        "CNI_COMMAND" => Some(command.to_owned()),
        "CNI_CONTAINERID" => Some(String::from("sandbox-1")),
        "CNI_NETNS" => Some(String::from("/proc/self/ns/net")),
        "CNI_IFNAME" => Some(String::from("eth0")),
        "CNI_ARGS" => Some(ARGS.to_owned()),
        _ => None,
    }
}

fn configuration(socket: &Path, enrolled: bool) -> Vec<u8> {
    let configuration = json!({
        "cniVersion": "1.0.0", "name": "net", "type": "ztunnel",
        "culvert": { "agentSocket": socket, "enrolled": enrolled, "serviceAccount": "web" },
        "prevResult": {
            "cniVersion": "1.0.0",
            "interfaces": [{ "name": "veth1" }, { "name": "eth0", "sandbox": "/run/netns/x" }],
            "ips": [
                { "address": "10.244.1.5/24", "interface": 1 },
                { "address": "10.244.1.1/24", "interface": 0 },
                { "address": "fd00::5/64", "interface": 1 },
            ],
        },
    });
    serde_json::to_vec(&configuration).unwrap()
}

/// An agent that answers one connection's requests with these errors, in order, and returns what it was asked.
fn agent(socket: &Path, answers: Vec<node::PodResponse>) -> JoinHandle<Vec<(Kind, Vec<OwnedFd>)>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let listener = {
        let _guard = runtime.enter();
        Listener::bind(socket, 0o600).unwrap()
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            let connection = listener.accept().await.unwrap();
            let mut asked = Vec::new();
            for answer in answers {
                let (bytes, fds) = connection.recv(1 << 16).await.unwrap();
                asked.push((node::PodRequest::decode(bytes).unwrap().kind.unwrap(), fds));
                connection.send(&answer.encode_to_vec(), &[]).await.unwrap();
            }
            asked
        })
    })
}

fn answer(error: &str) -> node::PodResponse {
    node::PodResponse { error: error.into(), pods: Vec::new(), version: 1 }
}

#[test]
fn version_is_told_without_a_configuration() {
    let result = execute(&environment("VERSION"), b"").unwrap();
    assert_eq!(result["supportedVersions"], json!(VERSIONS));
}

#[test]
fn add_enrols_the_pod_and_passes_the_result_on() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("cni.sock");
    let asked = agent(&socket, vec![answer("")]);
    let result = execute(&environment("ADD"), &configuration(&socket, true)).unwrap();
    assert_eq!(result["cniVersion"], "1.0.0");
    assert_eq!(result["ips"][0]["address"], "10.244.1.5/24");
    let (Kind::Enrol(request), fds) = asked.join().unwrap().remove(0) else { panic!("enrol") };
    assert_eq!(fds.len(), 1);
    assert_eq!(request.netns_path, "/proc/self/ns/net");
    assert_eq!(request.container_id, "sandbox-1");
    let pod = request.pod.unwrap();
    assert_eq!(
        (pod.uid.as_str(), pod.name.as_str(), pod.namespace.as_str(), pod.service_account.as_str()),
        ("8c1e", "web-1", "shop", "web")
    );
    assert_eq!(pod.addresses.len(), 2, "the host's end is not the pod's");
    assert_eq!(pod.addresses[0], [10, 244, 1, 5]);
}

#[test]
fn pod_that_is_not_enrolled_needs_no_agent() {
    let nowhere = Path::new("/nonexistent/cni.sock");
    execute(&environment("ADD"), &configuration(nowhere, false)).unwrap();
    execute(&environment("DEL"), &configuration(nowhere, false)).unwrap();
}

#[test]
fn without_the_agent_an_enrolled_pod_is_refused_for_now() {
    let error = execute(&environment("ADD"), &configuration(Path::new("/nonexistent/cni.sock"), true)).unwrap_err();
    assert_eq!(error.code(), 11, "{error}");
}

#[test]
fn refusal_of_the_agent_is_passed_on() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("cni.sock");
    let asked = agent(&socket, vec![answer("port 15006 is in use in the pod")]);
    let error = execute(&environment("ADD"), &configuration(&socket, true)).unwrap_err();
    assert!(error.to_string().contains("15006"), "{error}");
    assert_eq!(error.code(), 100);
    asked.join().unwrap();
}

#[test]
fn delete_withdraws() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("cni.sock");
    let asked = agent(&socket, vec![answer("")]);
    assert_eq!(execute(&environment("DEL"), &configuration(&socket, true)).unwrap(), Value::Null);
    let (Kind::Withdraw(request), _) = asked.join().unwrap().remove(0) else { panic!("withdraw") };
    assert_eq!((request.pod_uid.as_str(), request.container_id.as_str()), ("8c1e", "sandbox-1"));
}

#[test]
fn check_says_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("cni.sock");
    let check = |reason: &str, sandbox: &str| {
        let pod = node::Pod { uid: String::from("8c1e"), ..node::Pod::default() };
        let state = node::PodState { pod: Some(pod), not_enrolled_reason: reason.into(), container_id: sandbox.into() };
        let answer = node::PodResponse { pods: vec![state], ..answer("") };
        let asked = agent(&socket, vec![answer]);
        let result = execute(&environment("CHECK"), &configuration(&socket, true));
        asked.join().unwrap();
        result
    };
    check("", "").unwrap();
    check("", "sandbox-1").unwrap();
    assert_eq!(check("no rule", "sandbox-1").unwrap_err().code(), 101);
    assert_eq!(check("", "sandbox-2").unwrap_err().code(), 101);
}

#[test]
fn what_cannot_be_understood_is_an_error_of_the_specification() {
    let code = |command, text: &str| execute(&environment(command), text.as_bytes()).unwrap_err().code();
    assert_eq!(code("ADD", "{"), 6);
    assert_eq!(code("ADD", r#"{"cniVersion": "9.9.9"}"#), 1);
    assert_eq!(code("ADD", r#"{"cniVersion": "1.0.0"}"#), 7);
    assert_eq!(code("ADD", r#"{"cniVersion": "1.0.0", "culvert": {"enrolled": "yes"}}"#), 7);
    assert_eq!(code("JUMP", "{}"), 4);
}
