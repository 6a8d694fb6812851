//! What `culvertd` does besides serving: print a token, check manifests.

use std::io::{self, Write};
use std::time::SystemTime;

use serde::Serialize;

use crate::ca::state::open_token_key;
use crate::ca::{BoundPod, Caller, StateError, TokenError};
use crate::config::{CheckArgs, Output, TokenArgs, parse_time};
use crate::index::{Index, Note, Options};
use crate::ingest::{Directory, DirectoryError, Limits, Refusal, Timing};

/// Why a command could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The state directory is not usable.
    #[error(transparent)]
    State(#[from] StateError),
    /// The token could not be signed.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// An option is wrong.
    #[error("--{option}: {message}")]
    Option {
        /// Which one.
        option: &'static str,
        /// How.
        message: String,
    },
    /// The manifests cannot be read.
    #[error(transparent)]
    Source(#[from] DirectoryError),
    /// The result cannot be written.
    #[error("cannot write the result: {0}")]
    Write(#[from] io::Error),
}

/// Writes a token for a pod's service account to `out`.
///
/// # Errors
/// The state is not usable, an option is wrong, or `out` does not take it.
pub fn token(args: &TokenArgs, out: &mut dyn Write) -> Result<(), CommandError> {
    let lifetime =
        parse_time(&args.lifetime).map_err(|message| CommandError::Option { option: "lifetime", message })?;
    for (option, value) in [("namespace", &args.namespace), ("service-account", &args.service_account)] {
        if value.is_empty() || value.contains([':', '/']) {
            return Err(CommandError::Option { option, message: format!("{value:?} is not a Kubernetes name") });
        }
    }
    let caller = Caller {
        namespace: args.namespace.clone(),
        service_account: args.service_account.clone(),
        pod: args.pod.clone().map(|name| BoundPod { name, uid: args.pod_uid.clone() }),
        node: args.node_name.clone(),
    };
    let token = open_token_key(&args.state_dir)?.mint(&caller, &args.audience, lifetime, SystemTime::now())?;
    writeln!(out, "{token}")?;
    Ok(())
}

/// What `culvertd check --output json` prints.
#[derive(Debug, Serialize)]
struct Checked<'a> {
    valid: bool,
    files: usize,
    objects: usize,
    ignored: usize,
    problems: &'a [Refusal],
    notes: &'a [Note],
}

/// Checks a directory of manifests, and writes every problem to `out`. Returns whether there was none.
///
/// # Errors
/// The directory cannot be read, or `out` does not take the result.
pub fn check(args: &CheckArgs, out: &mut dyn Write) -> Result<bool, CommandError> {
    let batch = Directory::new(&args.source_dir, Limits::default(), Timing::default()).read_once()?;
    let report = &batch.report;
    // Some things only show when all objects are seen together.
    let mut index = Index::new(Options {
        cluster_id: "Kubernetes".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        trust_domain: "cluster.local".to_owned(),
        root_namespace: "culvert-system".into(),
        confirmation: std::time::Duration::ZERO,
    });
    index.apply(batch.events, SystemTime::now());
    let notes: Vec<Note> = index.conflicts();
    let valid = report.refused.is_empty() && notes.is_empty();
    match args.output {
        Output::Json => {
            let checked = Checked {
                valid,
                files: report.files,
                objects: report.accepted,
                ignored: report.ignored,
                problems: &report.refused,
                notes: &notes,
            };
            let text = serde_json::to_string_pretty(&checked).map_err(io::Error::from)?;
            writeln!(out, "{text}")?;
        }
        Output::Text => {
            for refusal in report.refused.iter() {
                writeln!(out, "{refusal}")?;
            }
            for note in &notes {
                writeln!(out, "{}: {}", note.object, note.reason)?;
            }
            let verdict = if valid { "all valid" } else { "not all valid" };
            let ignored = match report.ignored {
                0 => String::new(),
                count => format!(", {count} of kinds that the mesh does not read"),
            };
            writeln!(out, "{} objects in {} files{ignored}: {verdict}", report.accepted, report.files)?;
        }
    }
    Ok(valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(text: &str, output: Output) -> (bool, String) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.yaml"), text).unwrap();
        let mut out = Vec::new();
        let args = CheckArgs { source_dir: folder.path().to_owned(), output };
        let valid = check(&args, &mut out).unwrap();
        (valid, String::from_utf8(out).unwrap())
    }

    #[test]
    fn check_names_file_object_field_and_fix() {
        let (valid, text) = run(
            "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {ports: [{port: 80, targetPort: 99999}]}\n",
            Output::Text,
        );
        assert!(!valid);
        assert_eq!(
            text,
            "a.yaml:1: Service shop/web: spec.ports[0].targetPort: 99999 is not a port; use 1 to 65535\n\
             Service shop/web: is not valid, and has no earlier version: connections to those of its addresses that can be \
             read are refused\n\
             0 objects in 1 files: not all valid\n"
        );
    }

    #[test]
    fn check_sees_what_only_shows_together() {
        let service = |name| {
            format!(
                "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{clusterIP: 10.96.0.5, ports: [{{port: 1}}]}}}}\n"
            )
        };
        let (valid, text) = run(&(service("a") + &service("b")), Output::Json);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(!valid && json["valid"] == false, "{text}");
        assert_eq!(json["notes"][0]["object"], "Service default/b");
        assert!(run(&service("a"), Output::Json).0);
    }

    #[test]
    fn the_samples_are_valid() {
        let samples = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/samples/bookinfo");
        let mut out = Vec::new();
        let valid = check(&CheckArgs { source_dir: samples.into(), output: Output::Text }, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(valid, "{text}");
        assert_eq!(text, "15 objects in 5 files: all valid\n");
    }

    #[test]
    fn tokens_are_for_the_pod_that_was_named() {
        let state = tempfile::tempdir().unwrap();
        let args = TokenArgs {
            state_dir: state.path().to_owned(),
            namespace: "culvert-system".to_owned(),
            service_account: "ztunnel".to_owned(),
            pod: Some("ztunnel-1".to_owned()),
            pod_uid: None,
            node_name: Some("node-1".to_owned()),
            audience: crate::ca::AUDIENCE.to_owned(),
            lifetime: "1h".to_owned(),
        };
        let mut out = Vec::new();
        token(&args, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let key = open_token_key(state.path()).unwrap();
        let caller = key.verify(text.trim(), crate::ca::AUDIENCE, SystemTime::now()).unwrap();
        assert_eq!(caller.pod.unwrap().name, "ztunnel-1");
        let wrong = TokenArgs { lifetime: "soon".to_owned(), ..args };
        assert!(token(&wrong, &mut Vec::new()).is_err());
    }
}
