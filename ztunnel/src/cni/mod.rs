//! The CNI plugin: chained behind the one that makes the pod's network, it has the agent decide about the pod, and enrol
//! it, before any of its containers starts. Parameters and results as the CNI specification 1.0 and 1.1 has them.
//!
//! Configuration, beside the usual fields, with the defaults:
//!
//! ```json
//! { "type": "ztunnel", "culvert": {
//!   "agentSocket": "/run/culvert/cni.sock", "systemNamespace": "culvert-system",
//!   "excludedNamespaces": ["kube-system", "culvert-system"], "patienceSeconds": 30, "maxAgeSeconds": 86400,
//!   "logFile": "/run/culvert/cni.log", "enrolled": true, "serviceAccount": "" } }
//! ```
//!
//! The order of decisions is [`decide`]'s. Labels come from the agent; while it is away, from what it left on disk
//! ([`knowledge`]), which can only let a pod pass, and only if it is known for certain. Everybody else waits for the
//! agent, up to `patienceSeconds`, and is then refused with the code for "try again later".

pub mod chain;
pub mod client;
pub mod config;
pub mod decide;
pub mod error;
pub mod files;
pub mod knowledge;
mod log;
pub mod passed;

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use mesh_proto::node::{self, pod_request};
use serde_json::{Value, json};

use client::{Client, ClientError};
use config::{Attachment, Configuration, Lookup, NEWEST, Own, VERSIONS, addresses};
use decide::{Decision, Pass};
use error::CniError;
use log::Log;
use passed::{Folder, Passed, PassedPod, uptime_ms};

/// Largest configuration, with the result of the plugins before this one.
const MAX_CONFIGURATION: u64 = 1 << 20;
/// Wait before the agent is asked again.
const PAUSE: Duration = Duration::from_millis(200);
/// Longest wait for the answer to one request of ADD; a new agent may be there by then.
const ANSWER: Duration = Duration::from_secs(15);
/// Shortest: the agent itself waits for its source for some of it, and its reason is worth more than that it was slow.
const LEAST: Duration = Duration::from_secs(4);
/// For how long the other commands ask the agent.
const SHORT: Duration = Duration::from_secs(10);

/// Runs the plugin: environment and standard input in, result on standard output, exit code.
#[must_use]
pub fn run() -> ExitCode {
    let asked_at_ms = uptime_ms();
    let lookup = |name: &'static str| match std::env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => Err(CniError::Environment(name)),
    };
    let mut text = Vec::new();
    let read = io::stdin().take(MAX_CONFIGURATION + 1).read_to_end(&mut text);
    let done = read.map_err(CniError::from).and_then(|_| execute(&lookup, &text, asked_at_ms));
    let (result, code) = match done {
        Ok(result) => (result, ExitCode::SUCCESS),
        Err(error) => (failure(&error, &text), ExitCode::FAILURE),
    };
    if !result.is_null() {
        // A runtime that closed its end has no use for a complaint.
        let _ = writeln!(io::stdout(), "{result}");
    }
    code
}

/// An error as the runtime wants it, in the version that it speaks.
fn failure(error: &CniError, text: &[u8]) -> Value {
    json!({ "cniVersion": version(text), "code": error.code(), "msg": error.to_string() })
}

/// The version that the runtime speaks, if the plugin does too; else the newest.
fn version(text: &[u8]) -> String {
    let all = serde_json::from_slice::<Value>(text).unwrap_or_default();
    let asked = all.get("cniVersion").and_then(Value::as_str);
    asked.filter(|asked| VERSIONS.contains(asked)).unwrap_or(NEWEST).to_owned()
}

/// One command. `Null`: nothing is to be printed.
fn execute(lookup: Lookup<'_>, text: &[u8], asked_at_ms: u64) -> Result<Value, CniError> {
    let command = lookup("CNI_COMMAND")?.ok_or(CniError::Environment("CNI_COMMAND"))?;
    if command == "VERSION" {
        return Ok(json!({ "cniVersion": version(text), "supportedVersions": VERSIONS }));
    }
    if !matches!(command.as_str(), "ADD" | "DEL" | "CHECK" | "GC" | "STATUS") {
        return Err(CniError::Environment("CNI_COMMAND"));
    }
    if text.len() as u64 > MAX_CONFIGURATION {
        return Err(CniError::Configuration(format!("it is longer than {MAX_CONFIGURATION} bytes")));
    }
    let configuration = Configuration::parse(text)?;
    let own = &configuration.own;
    let path = own.log_file.clone().unwrap_or_else(|| own.run_dir().join("cni.log"));
    let plugin = Plugin { log: Log::new(path), configuration, asked_at_ms };
    let done = match command.as_str() {
        "ADD" => Attachment::read(lookup).and_then(|attachment| plugin.add(&attachment)),
        "DEL" => Attachment::read(lookup).map(|attachment| plugin.delete(&attachment)),
        "CHECK" => Attachment::read(lookup).and_then(|attachment| plugin.check(&attachment)),
        "GC" => plugin.prune(),
        _ => plugin.status(),
    };
    if let Err(error) = &done {
        plugin.log.write(&format!("{command}: {error}"));
    }
    done
}

/// One call of the plugin.
struct Plugin {
    configuration: Configuration,
    log: Log,
    /// When it was called, in milliseconds since the machine booted.
    asked_at_ms: u64,
}

impl Plugin {
    const fn own(&self) -> &Own {
        &self.configuration.own
    }

    /// What the plugins before this one did is the result; this one adds no interface.
    fn add(&self, attachment: &Attachment) -> Result<Value, CniError> {
        let Some(previous) = &self.configuration.previous else {
            return Err(CniError::Configuration(String::from(
                "there is no prevResult: the plugin must be chained behind one that gives the pod its address",
            )));
        };
        attachment.require_netns()?;
        attachment.require_pod()?;
        let addresses = addresses(previous)?;
        let decided = if self.own().enrolled {
            self.admit(attachment, addresses)?
        } else {
            String::from("passes: this network's pods are not enrolled")
        };
        self.log.write(&format!("ADD: {} ({}): {decided}", attachment.label(), attachment.sandbox));
        let mut result = previous.clone();
        if let Some(fields) = result.as_object_mut() {
            fields.entry("cniVersion").or_insert_with(|| Value::String(self.configuration.version.clone()));
        }
        Ok(result)
    }

    /// Returns what was decided, for the log.
    fn admit(&self, attachment: &Attachment, addresses: Vec<IpAddr>) -> Result<String, CniError> {
        let nothing = knowledge::Knowledge::default();
        if let Decision::Pass(pass) = nothing.decide(attachment.pod(), &self.own().exclusions()) {
            return Ok(format!("passes: {pass}"));
        }
        let deadline = Instant::now() + self.own().patience();
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).clamp(LEAST, ANSWER);
            let error = match self.ask_to_admit(attachment, &addresses, left) {
                Ok(answer) if answer.decision() == node::Decision::Passed => {
                    return Ok(format!("passes: {}", answer.reason));
                }
                Ok(answer) => return Ok(format!("enrolled: {}", answer.reason)),
                Err(error) => error,
            };
            if !error.may_pass() {
                return Err(CniError::Refused { pod: attachment.label(), source: error });
            }
            let known = self.known(attachment);
            if let (ClientError::Unreachable { .. }, Decision::Pass(pass)) = (&error, known) {
                self.remember(attachment, addresses);
                return Ok(format!("passes: {pass}, as the agent left word; {error}"));
            }
            if Instant::now() + PAUSE >= deadline {
                let why = match known {
                    Decision::Enrol(why) if why.is_certain() => "by its labels it is to be enrolled",
                    Decision::Enrol(_) | Decision::Pass(_) => "it is not known whether it is to be enrolled",
                };
                let seconds = self.own().patience_seconds;
                return Err(CniError::NotYet { pod: attachment.label(), why, seconds, source: error });
            }
            thread::sleep(PAUSE);
        }
    }

    fn ask_to_admit(
        &self,
        attachment: &Attachment,
        addresses: &[IpAddr],
        patience: Duration,
    ) -> Result<node::PodResponse, ClientError> {
        let own_account = &self.own().service_account;
        let account = if attachment.service_account.is_empty() { own_account } else { &attachment.service_account };
        let pod = node::Pod {
            uid: attachment.uid_or_sandbox().to_owned(),
            name: attachment.name.clone(),
            namespace: attachment.namespace.clone(),
            service_account: account.clone(),
            addresses: addresses.iter().copied().map(octets).collect(),
        };
        Client::connect(&self.own().agent_socket, patience)?.admit(node::AdmitPod {
            pod: Some(pod),
            netns_path: attachment.netns.display().to_string(),
            container_id: attachment.sandbox.clone(),
            asked_at_ms: self.asked_at_ms,
        })
    }

    /// What the agent left word of.
    fn known(&self, attachment: &Attachment) -> Decision {
        let path = knowledge::path(self.own().run_dir());
        let max_age = Duration::from_secs(self.own().max_age_seconds);
        let known = match knowledge::load(&path, max_age) {
            Ok(known) => known.unwrap_or_default(),
            Err(error) => {
                if !error.is_absence() {
                    self.log.write(&format!("what the agent left cannot be used: {error}"));
                }
                knowledge::Knowledge::default()
            }
        };
        known.decide(attachment.pod(), &self.own().exclusions())
    }

    /// So that the next agent can enrol the pod when it gets the label. What fails is only logged: it passes all the same.
    fn remember(&self, attachment: &Attachment, addresses: Vec<IpAddr>) {
        let pod = PassedPod {
            uid: attachment.uid_or_sandbox().to_owned(),
            name: attachment.name.clone(),
            namespace: attachment.namespace.clone(),
            service_account: attachment.service_account.clone(),
            addresses,
        };
        let inode = fs::metadata(&attachment.netns).map_or(0, |found| found.ino());
        let passed = Passed::new(pod, &attachment.sandbox, &attachment.netns, inode);
        if let Err(error) = Folder::new(self.own().run_dir()).save(&passed) {
            self.log.write(&format!("{}: cannot be remembered for the agent: {error}", attachment.label()));
        }
    }

    /// Succeeds when there is nothing to do, when it is asked twice, also for a sandbox in whose place the pod has another
    /// by now, and when the agent is away: the next one finds that the namespace is gone.
    fn delete(&self, attachment: &Attachment) -> Value {
        let request = node::DeletePod {
            pod_uid: attachment.uid_or_sandbox().to_owned(),
            container_id: attachment.sandbox.clone(),
            asked_at_ms: self.asked_at_ms,
        };
        let what = format!("DEL: {} ({})", attachment.label(), attachment.sandbox);
        match self.ask(pod_request::Kind::Delete(request)) {
            Ok(_) => self.log.write(&format!("{what}: done")),
            Err(error) => {
                self.log.write(&format!("{what}: left to the agent: {error}"));
                if let Err(error) = Folder::new(self.own().run_dir()).remove(&attachment.sandbox) {
                    self.log.write(&format!("{what}: cannot be forgotten: {error}"));
                }
            }
        }
        Value::Null
    }

    fn check(&self, attachment: &Attachment) -> Result<Value, CniError> {
        self.configuration.at_least("0.4.0")?;
        if self.configuration.previous.is_none() {
            return Err(CniError::Configuration(String::from("there is no prevResult")));
        }
        attachment.require_netns()?;
        attachment.require_pod()?;
        let known = self.known(attachment);
        if !self.own().enrolled || matches!(known, Decision::Pass(Pass::Own | Pass::ExcludedNamespace)) {
            return Ok(Value::Null);
        }
        let request = node::CheckPod {
            pod_uid: attachment.uid_or_sandbox().to_owned(),
            container_id: attachment.sandbox.clone(),
        };
        let answer = match (self.ask(pod_request::Kind::Check(request)), known) {
            (Err(ClientError::Unreachable { .. }), Decision::Pass(_)) => return Ok(Value::Null),
            (answer, _) => answer.map_err(CniError::TryLater)?,
        };
        let wrong = |reason: String| Err(CniError::NotEnrolled { pod: attachment.label(), reason });
        if answer.decision() == node::Decision::Passed {
            return Ok(Value::Null);
        }
        match answer.pods.into_iter().next() {
            None => wrong(String::from("the agent does not know it")),
            Some(state) if !state.container_id.is_empty() && state.container_id != attachment.sandbox => {
                wrong(format!("the agent serves it in another sandbox, {}", state.container_id))
            }
            Some(state) if !state.not_enrolled_reason.is_empty() => wrong(state.not_enrolled_reason),
            Some(_) => Ok(Value::Null),
        }
    }

    fn prune(&self) -> Result<Value, CniError> {
        self.configuration.at_least("1.1.0")?;
        let Some(valid) = self.configuration.valid.clone() else {
            // Without a list nothing can be said to have ended.
            return Err(CniError::Configuration(String::from("cni.dev/valid-attachments is missing")));
        };
        let request = node::PrunePods { container_ids: valid, asked_at_ms: self.asked_at_ms };
        self.ask(pod_request::Kind::Prune(request)).map_err(CniError::TryLater)?;
        Ok(Value::Null)
    }

    fn status(&self) -> Result<Value, CniError> {
        self.configuration.at_least("1.1.0")?;
        self.ask(pod_request::Kind::Ping(node::Ping {})).map_err(CniError::NotAvailable)?;
        Ok(Value::Null)
    }

    fn ask(&self, kind: pod_request::Kind) -> Result<node::PodResponse, ClientError> {
        Client::connect(&self.own().agent_socket, SHORT)?.request(kind)
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests;
