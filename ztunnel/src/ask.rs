//! What a probe or a person asks this node's agent: whether it is ready, and which pods are enrolled.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use mesh_proto::node::{self, pod_request};
use serde_json::{Value, json};

use crate::cni::client::{Client, ClientError};

/// Longest that the agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whom to ask, and how to print it.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The agent's folder.
    #[arg(long, env = "CULVERT_RUN_DIR", value_name = "DIR", default_value = "/run/culvert")]
    pub run_dir: PathBuf,

    /// How the answer is printed.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Output,
}

/// How an answer is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// A table.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// Whether the agent can enrol pods.
///
/// # Errors
/// When it is not there or does not answer.
pub fn ready(options: &Options) -> Result<(), ClientError> {
    ask(options, pod_request::Kind::Ping(node::Ping {})).map(drop)
}

/// Whether the agent answers at all, also that it cannot enrol pods yet.
///
/// # Errors
/// When it is not there or does not answer.
pub fn alive(options: &Options) -> Result<(), ClientError> {
    match ready(options) {
        Err(error @ (ClientError::Unreachable { .. } | ClientError::Unanswered { .. })) => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The pods that are enrolled, as text.
///
/// # Errors
/// When the agent is not there or does not answer.
pub fn pods(options: &Options) -> Result<String, ClientError> {
    let mut pods = connect(options)?.list()?;
    let key = |state: &node::PodState| state.pod.as_ref().map(|pod| (pod.namespace.clone(), pod.name.clone()));
    pods.sort_by_key(key);
    Ok(match options.output {
        Output::Json => format!("{}\n", Value::Array(pods.iter().map(object).collect())),
        Output::Text => table(&pods),
    })
}

fn ask(options: &Options, kind: pod_request::Kind) -> Result<node::PodResponse, ClientError> {
    connect(options)?.request(kind)
}

fn connect(options: &Options) -> Result<Client, ClientError> {
    Client::connect(&options.run_dir.join("cni.sock"), PATIENCE)
}

fn object(state: &node::PodState) -> Value {
    let pod = state.pod.clone().unwrap_or_default();
    json!({
        "namespace": pod.namespace,
        "name": pod.name,
        "uid": pod.uid,
        "serviceAccount": pod.service_account,
        "addresses": addresses(&pod),
        "enrolled": state.not_enrolled_reason.is_empty(),
        "reason": state.not_enrolled_reason,
        "weaker": state.weaker_reason,
    })
}

fn table(pods: &[node::PodState]) -> String {
    let row = |state: &node::PodState| {
        let pod = state.pod.clone().unwrap_or_default();
        let state = match state.not_enrolled_reason.as_str() {
            "" if state.weaker_reason.is_empty() => String::from("enrolled"),
            "" => format!("enrolled, held less firmly: {}", state.weaker_reason),
            reason => format!("not enrolled: {reason}"),
        };
        // Of one that is known by its capture alone there is no more.
        let name = if pod.name.is_empty() { pod.uid.clone() } else { pod.name.clone() };
        [pod.namespace.clone(), name, addresses(&pod).join(","), state]
    };
    let mut rows = vec![["NAMESPACE", "NAME", "ADDRESSES", "STATE"].map(str::to_owned)];
    rows.extend(pods.iter().map(row));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    let mut text = String::new();
    for [namespace, name, addresses, state] in &rows {
        let [a, b, c] = widths;
        // Writing to a string does not fail.
        let _ = writeln!(text, "{namespace:a$}  {name:b$}  {addresses:c$}  {state}");
    }
    text
}

fn addresses(pod: &node::Pod) -> Vec<String> {
    let address = |bytes: &Vec<u8>| {
        let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
        v4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from)).ok()
    };
    pod.addresses.iter().filter_map(address).map(|address| address.to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(name: &str, reason: &str) -> node::PodState {
        let pod = node::Pod {
            name: name.into(),
            namespace: "shop".into(),
            addresses: vec![vec![10, 1, 2, 3], vec![1]],
            ..node::Pod::default()
        };
        node::PodState { pod: Some(pod), not_enrolled_reason: reason.into(), ..node::PodState::default() }
    }

    #[test]
    fn pods_are_a_table_or_objects() {
        let pods = [state("web", ""), state("long-name", "no rule")];
        assert_eq!(
            table(&pods),
            "NAMESPACE  NAME       ADDRESSES  STATE\n\
             shop       web        10.1.2.3   enrolled\n\
             shop       long-name  10.1.2.3   not enrolled: no rule\n"
        );
        let weaker = node::PodState { weaker_reason: "no guard".into(), ..state("web", "") };
        assert!(table(std::slice::from_ref(&weaker)).ends_with("enrolled, held less firmly: no guard\n"));
        let pod = node::Pod { uid: "u-1".into(), ..node::Pod::default() };
        let unnamed =
            node::PodState { pod: Some(pod), not_enrolled_reason: "lost".into(), ..node::PodState::default() };
        assert!(table(&[unnamed]).contains("u-1"));
        assert_eq!(object(&weaker)["weaker"], "no guard");
        assert_eq!(object(&pods[0])["enrolled"], true);
        assert_eq!(object(&pods[1])["reason"], "no rule");
    }

    #[test]
    fn agent_that_is_not_there_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let options = Options { run_dir: folder.path().into(), output: Output::Text };
        assert!(matches!(ready(&options), Err(ClientError::Unreachable { .. })));
        assert!(matches!(alive(&options), Err(ClientError::Unreachable { .. })));
        assert!(matches!(pods(&options), Err(ClientError::Unreachable { .. })));
    }
}
