//! The container runtime's part of CNI: calls the plugin behind one that has already made the pod's network.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::error::Context;
use crate::kube::PodRecord;
use crate::netns::NetNs;
use crate::node::{Node, width};
use crate::{Error, wait};

/// "Try again later" of the CNI specification.
const LATER: u64 = 11;
/// How often a runtime tries: for as long as a test waits for a pod.
const PATIENCE: Duration = Duration::from_secs(40);

/// The plugin on one node.
#[derive(Debug, Clone)]
pub struct Cni {
    program: PathBuf,
    socket: PathBuf,
    node: usize,
}

/// What became of a call.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The exit code was 0.
    pub ok: bool,
    /// What it printed; null if nothing.
    pub output: Value,
}

impl Cni {
    pub(crate) fn new(program: PathBuf, node: &Node) -> Self {
        Self { program, socket: node.run_dir().join("cni.sock"), node: node.index }
    }

    /// One call, for the one sandbox that the pod ever has.
    ///
    /// # Errors
    /// The plugin cannot be run, or prints something else than JSON.
    pub fn call(&self, command: &str, pod: &PodRecord, network: &NetNs) -> Result<Answer, Error> {
        let path = network.path();
        let sandbox = format!("sandbox-{}", pod.uid);
        let ips: Vec<Value> =
            pod.ips.iter().map(|ip| json!({"address": format!("{ip}/{}", width(ip)), "interface": 0})).collect();
        let configuration = json!({
            "cniVersion": "1.0.0", "name": "cluster", "type": "ztunnel",
            "culvert": {"agentSocket": self.socket, "patienceSeconds": 5},
            "prevResult": {
                "cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": path}], "ips": ips,
            },
        });
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_UID={};K8S_POD_INFRA_CONTAINER_ID={sandbox}",
            pod.namespace, pod.name, pod.uid
        );
        let mut child = Command::new(&self.program);
        child.arg("cni").env("CNI_COMMAND", command).env("CNI_CONTAINERID", &sandbox).env("CNI_NETNS", &path);
        child.env("CNI_IFNAME", "eth0").env("CNI_ARGS", args).env("CNI_PATH", "/opt/cni/bin");
        child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let what = || format!("calling the CNI plugin ({command})");
        let mut child = child.spawn().during(what)?;
        if let Some(mut input) = child.stdin.take() {
            // A plugin that does not read its input says so by its exit.
            let _ = input.write_all(configuration.to_string().as_bytes());
        }
        let done = child.wait_with_output().during(what)?;
        let text = String::from_utf8_lossy(&done.stdout).into_owned();
        let output = if text.trim().is_empty() { Ok(Value::Null) } else { serde_json::from_str(text.trim()) };
        let output = output.map_err(|e| Error::Output {
            what: what(),
            reason: e.to_string(),
            output: format!("{text}{}", String::from_utf8_lossy(&done.stderr)),
        })?;
        Ok(Answer { ok: done.status.success(), output })
    }

    /// ADD, again and again while the plugin says that it may succeed later, as the kubelet has it.
    ///
    /// # Errors
    /// It is refused for good, or for 40 s.
    pub fn add(&self, pod: &PodRecord, network: &NetNs) -> Result<(), Error> {
        let mut last = Value::Null;
        let done = wait::try_until(&format!("CNI ADD of {}", pod.name), PATIENCE, || {
            let answer = self.call("ADD", pod, network)?;
            last = answer.output.clone();
            match answer.output["code"].as_u64() {
                _ if answer.ok => Ok(Some(())),
                Some(LATER) => Ok(None),
                _ => Err(self.refused(pod, &answer)),
            }
        });
        done.map_err(|error| match error {
            Error::Timeout { what, waited, .. } => Error::Timeout { what, waited, log: format!(": {last}") },
            other => other,
        })
    }

    /// DEL.
    ///
    /// # Errors
    /// It fails, which it never may.
    pub fn delete(&self, pod: &PodRecord, network: &NetNs) -> Result<(), Error> {
        let answer = self.call("DEL", pod, network)?;
        if answer.ok { Ok(()) } else { Err(self.refused(pod, &answer)) }
    }

    fn refused(&self, pod: &PodRecord, answer: &Answer) -> Error {
        Error::Announce { node: self.node, pod: pod.name.clone(), reason: answer.output.to_string() }
    }
}
