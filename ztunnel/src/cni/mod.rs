//! The CNI plugin: chained behind the one that makes the pod's network, it has the agent enrol the pod before any of
//! its containers starts. Parameters and results as the CNI specification 1.0 and 1.1 has them.
//!
//! Configuration, beside the usual fields:
//!
//! ```json
//! { "type": "ztunnel", "culvert": { "agentSocket": "/run/culvert/cni.sock", "enrolled": true } }
//! ```
//!
//! `enrolled` (default true) says whether pods of this network are enrolled; `serviceAccount` there, or
//! `K8S_SERVICE_ACCOUNT` in CNI_ARGS, is the pod's service account (default `default`). Deciding by labels comes with
//! the Kubernetes source.

pub mod client;

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use mesh_proto::node;
use serde_json::{Value, json};

use client::{Client, ClientError};

/// Versions of the specification that the plugin follows.
const VERSIONS: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];
/// Largest configuration, with the result of the plugins before this one.
const MAX_CONFIGURATION: u64 = 1 << 20;
/// Where the agent listens unless the configuration says otherwise.
const DEFAULT_SOCKET: &str = "/run/culvert/cni.sock";

/// What goes to the runtime: code and text. Codes from 100 on are this plugin's own.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// The runtime asks for another version.
    #[error("CNI version {0:?} is not supported")]
    Version(String),
    /// A variable of the environment is missing or invalid.
    #[error("{0} is missing or invalid in the environment")]
    Environment(&'static str),
    /// Standard input could not be read.
    #[error("cannot read the configuration: {0}")]
    Read(#[from] io::Error),
    /// The configuration is not JSON.
    #[error("cannot decode the configuration: {0}")]
    Decode(#[from] serde_json::Error),
    /// The configuration lacks something.
    #[error("invalid configuration: {0}")]
    Configuration(&'static str),
    /// The agent is not there (yet).
    #[error("{0}")]
    TryLater(#[source] ClientError),
    /// The agent refused.
    #[error("{0}")]
    Refused(#[source] ClientError),
    /// CHECK: the pod is not enrolled.
    #[error("not enrolled: {0}")]
    NotEnrolled(String),
}

impl CniError {
    /// Codes 1 to 11 are the specification's.
    const fn code(&self) -> u32 {
        match self {
            Self::Version(_) => 1,
            Self::Environment(_) => 4,
            Self::Read(_) => 5,
            Self::Decode(_) => 6,
            Self::Configuration(_) => 7,
            Self::TryLater(_) => 11,
            Self::Refused(_) => 100,
            Self::NotEnrolled(_) => 101,
        }
    }
}

impl From<ClientError> for CniError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Unreachable { .. } => Self::TryLater(error),
            ClientError::Netns { .. } | ClientError::Answer(_) | ClientError::Refused(_) => Self::Refused(error),
        }
    }
}

/// Runs the plugin: environment and standard input in, result on standard output, exit code.
#[must_use]
pub fn run() -> ExitCode {
    let mut text = Vec::new();
    let read = io::stdin().take(MAX_CONFIGURATION).read_to_end(&mut text).map_err(CniError::from);
    let environment = |name: &str| std::env::var(name).ok();
    let (result, code) = match read.and_then(|_| execute(&environment, &text)) {
        Ok(result) => (result, ExitCode::SUCCESS),
        Err(error) => {
            (json!({ "cniVersion": "1.1.0", "code": error.code(), "msg": error.to_string() }), ExitCode::FAILURE)
        }
    };
    if !result.is_null() {
        // A runtime that closed its end has no use for a complaint.
        let _ = writeln!(io::stdout(), "{result}");
    }
    code
}

/// One command. `Null`: nothing is to be printed.
fn execute(environment: &dyn Fn(&str) -> Option<String>, text: &[u8]) -> Result<Value, CniError> {
    let command = environment("CNI_COMMAND").ok_or(CniError::Environment("CNI_COMMAND"))?;
    if command == "VERSION" {
        return Ok(json!({ "cniVersion": "1.1.0", "supportedVersions": VERSIONS }));
    }
    let configuration = Configuration::parse(text)?;
    match command.as_str() {
        "ADD" => add(environment, configuration),
        "DEL" => delete(environment, &configuration),
        "CHECK" => check(environment, &configuration),
        // STATUS: ready if the agent answers. GC: the agent finds dead namespaces by itself, and a list of attachments
        // that are valid cannot make it give up a pod that lives.
        "STATUS" => {
            Client::connect(&configuration.socket)?.list()?;
            Ok(Value::Null)
        }
        "GC" => Ok(Value::Null),
        _ => Err(CniError::Environment("CNI_COMMAND")),
    }
}

fn add(environment: &dyn Fn(&str) -> Option<String>, configuration: Configuration) -> Result<Value, CniError> {
    let previous = configuration.previous.clone().ok_or(CniError::Configuration(
        "there is no prevResult: the plugin must be chained behind one that gives the pod its address",
    ))?;
    if configuration.enrolled {
        let pod = pod(environment, &configuration, &previous)?;
        let netns = environment("CNI_NETNS").filter(|path| !path.is_empty());
        let netns = PathBuf::from(netns.ok_or(CniError::Environment("CNI_NETNS"))?);
        Client::connect(&configuration.socket)?.enrol(pod, &netns, &sandbox(environment))?;
    }
    // What the plugins before this one did is the result; this one adds no interface.
    let mut result = previous;
    if let Some(fields) = result.as_object_mut() {
        fields.insert(String::from("cniVersion"), Value::String(configuration.version));
    }
    Ok(result)
}

/// Must succeed when there is nothing to do, and when it is asked twice: also for a sandbox in whose place the pod has
/// another by now, which stays enrolled.
fn delete(environment: &dyn Fn(&str) -> Option<String>, configuration: &Configuration) -> Result<Value, CniError> {
    if configuration.enrolled
        && let Ok(uid) = uid(environment)
    {
        Client::connect(&configuration.socket)?.withdraw(&uid, &sandbox(environment))?;
    }
    Ok(Value::Null)
}

fn check(environment: &dyn Fn(&str) -> Option<String>, configuration: &Configuration) -> Result<Value, CniError> {
    if !configuration.enrolled {
        return Ok(Value::Null);
    }
    let uid = uid(environment)?;
    let pods = Client::connect(&configuration.socket)?.list()?;
    let state = pods.into_iter().find(|state| state.pod.as_ref().is_some_and(|pod| pod.uid == uid));
    let sandbox = sandbox(environment);
    if let Some(other) = state.as_ref().map(|state| &state.container_id)
        && !other.is_empty()
        && !sandbox.is_empty()
        && *other != sandbox
    {
        return Err(CniError::NotEnrolled(format!("the agent serves the pod in another sandbox, {other}")));
    }
    match state.map(|state| state.not_enrolled_reason) {
        None => Err(CniError::NotEnrolled(String::from("the agent does not know the pod"))),
        Some(reason) if !reason.is_empty() => Err(CniError::NotEnrolled(reason)),
        Some(_) => Ok(Value::Null),
    }
}

/// What the plugin takes from its configuration.
struct Configuration {
    version: String,
    socket: PathBuf,
    enrolled: bool,
    service_account: Option<String>,
    previous: Option<Value>,
}

impl Configuration {
    fn parse(text: &[u8]) -> Result<Self, CniError> {
        let all: Value = serde_json::from_slice(text)?;
        let version = all.get("cniVersion").and_then(Value::as_str).unwrap_or("1.0.0").to_owned();
        if !VERSIONS.contains(&version.as_str()) {
            return Err(CniError::Version(version));
        }
        let own = all.get("culvert").unwrap_or(&Value::Null);
        let text_of = |name: &str| own.get(name).and_then(Value::as_str).map(str::to_owned);
        let enrolled = match own.get("enrolled") {
            None => true,
            Some(Value::Bool(enrolled)) => *enrolled,
            Some(_) => return Err(CniError::Configuration("culvert.enrolled is not a boolean")),
        };
        Ok(Self {
            version,
            socket: text_of("agentSocket").unwrap_or_else(|| String::from(DEFAULT_SOCKET)).into(),
            enrolled,
            service_account: text_of("serviceAccount"),
            previous: all.get("prevResult").filter(|result| result.is_object()).cloned(),
        })
    }
}

fn pod(
    environment: &dyn Fn(&str) -> Option<String>,
    configuration: &Configuration,
    previous: &Value,
) -> Result<node::Pod, CniError> {
    let arguments = arguments(environment);
    let argument = |name: &'static str| arguments.get(name).cloned().ok_or(CniError::Environment(name));
    let service_account = arguments
        .get("K8S_SERVICE_ACCOUNT")
        .or(configuration.service_account.as_ref())
        .cloned()
        .unwrap_or_else(|| String::from("default"));
    let addresses = addresses(previous);
    if addresses.is_empty() {
        return Err(CniError::Configuration("prevResult gives the pod no address"));
    }
    Ok(node::Pod {
        uid: uid(environment)?,
        name: argument("K8S_POD_NAME")?,
        namespace: argument("K8S_POD_NAMESPACE")?,
        service_account,
        addresses,
    })
}

/// Kubernetes' UID of the pod; a runtime that gives none is asked by its sandbox.
fn uid(environment: &dyn Fn(&str) -> Option<String>) -> Result<String, CniError> {
    let uid = arguments(environment).get("K8S_POD_UID").cloned();
    uid.or_else(|| environment("CNI_CONTAINERID"))
        .filter(|uid| !uid.is_empty())
        .ok_or(CniError::Environment("K8S_POD_UID in CNI_ARGS, or CNI_CONTAINERID,"))
}

/// The runtime's id of the sandbox; empty if it gives none.
fn sandbox(environment: &dyn Fn(&str) -> Option<String>) -> String {
    environment("CNI_CONTAINERID").unwrap_or_default()
}

/// `CNI_ARGS`: `KEY=value;KEY=value`.
fn arguments(environment: &dyn Fn(&str) -> Option<String>) -> HashMap<String, String> {
    let text = environment("CNI_ARGS").unwrap_or_default();
    let pairs = text.split(';').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())).collect()
}

/// The addresses of the pod's own interfaces: `ips` whose interface has a sandbox, or that name no interface.
fn addresses(previous: &Value) -> Vec<Vec<u8>> {
    let interfaces = previous.get("interfaces").and_then(Value::as_array);
    let in_pod = |ip: &Value| {
        let index = ip.get("interface").and_then(Value::as_u64).and_then(|index| usize::try_from(index).ok());
        let interface = index.and_then(|index| interfaces?.get(index));
        interface.is_none_or(|found| found.get("sandbox").and_then(Value::as_str).is_some_and(|path| !path.is_empty()))
    };
    let ips = previous.get("ips").and_then(Value::as_array).into_iter().flatten();
    ips.filter(|ip| in_pod(ip))
        .filter_map(|ip| ip.get("address")?.as_str()?.split('/').next()?.parse::<IpAddr>().ok())
        .map(|address| match address {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        })
        .collect()
}

#[cfg(test)]
mod tests;
