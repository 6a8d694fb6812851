//! PeerAuthentication: whether a workload takes plaintext.

use std::collections::BTreeMap;
use std::time::SystemTime;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::authorization_policy::readable_labels;
use super::check;
use super::custom::Selector;
use super::labels::Labels;
use super::name::{Kind, Name};
use super::problem::{Problem, Problems};

/// A policy.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerAuthentication {
    /// Its name.
    pub name: Name,
    /// The workloads of its namespace that it applies to; none for all of the namespace, or of the root namespace for the
    /// whole mesh.
    pub selector: Labels,
    /// What is taken; none to go by what the namespace or the mesh says.
    pub mode: Option<MtlsMode>,
    /// What is taken on single ports of the workloads.
    pub ports: BTreeMap<u16, MtlsMode>,
    /// When it was created: of two for the same workloads the older one counts. None when the object does not say.
    pub created: Option<SystemTime>,
    /// It stands for one that is not valid, and asks for mutual TLS whatever others say.
    pub is_stand_in: bool,
}

/// What is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MtlsMode {
    /// Plaintext as well as mutual TLS. `DISABLE` means the same here: a peer in the mesh uses the tunnel in any case.
    Permissive,
    /// Mutual TLS alone.
    Strict,
}

/// The spec as it is written.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec {
    selector: Option<Selector>,
    mtls: Option<Mtls>,
    port_level_mtls: Option<BTreeMap<String, Option<Mtls>>>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Mtls {
    mode: Option<String>,
}

/// Validates a PeerAuthentication.
///
/// # Errors
/// Every mistake found.
pub(super) fn validate(meta: &ObjectMeta, spec: &Spec) -> Result<PeerAuthentication, Vec<Problem>> {
    let mut problems = Problems::default();
    let (name, _) = check::namespaced(Kind::PeerAuthentication, meta, &mut problems);
    let selector = Selector::labels(spec.selector.as_ref(), "spec.selector", &mut problems);
    let mode = mode("spec.mtls", spec.mtls.as_ref(), &mut problems);
    let given = spec.port_level_mtls.iter().flatten();
    let mut ports = BTreeMap::new();
    for (key, mtls) in given {
        let field = format!("spec.portLevelMtls[{key}]");
        let mode = self::mode(&field, mtls.as_ref(), &mut problems);
        match key.parse::<u16>().ok().filter(|port| *port > 0) {
            Some(port) => ports.extend(mode.map(|mode| (port, mode))),
            None => problems.add(field, format!("{key:?} is not a port"), "use 1 to 65535"),
        }
    }
    if selector.is_empty() && spec.port_level_mtls.as_ref().is_some_and(|ports| !ports.is_empty()) {
        problems.add(
            "spec.portLevelMtls",
            "is only for workloads that a selector names",
            "add spec.selector.matchLabels, or remove the field",
        );
    }
    let created = meta.creation_timestamp.as_ref().and_then(|time| check::system_time(&time.0));
    problems.finish(PeerAuthentication { name, selector, mode, ports, created, is_stand_in: false })
}

fn mode(field: &str, mtls: Option<&Mtls>, problems: &mut Problems) -> Option<MtlsMode> {
    match mtls.and_then(|mtls| mtls.mode.as_deref()) {
        None | Some("" | "UNSET") => None,
        Some("DISABLE" | "PERMISSIVE") => Some(MtlsMode::Permissive),
        Some("STRICT") => Some(MtlsMode::Strict),
        Some(other) => {
            problems.add(
                format!("{field}.mode"),
                format!("{other:?} is not a mode"),
                "use STRICT, PERMISSIVE, DISABLE or UNSET",
            );
            None
        }
    }
}

/// The safest reading of a policy that is not valid: no plaintext, wherever it may have been meant for.
pub(super) fn stand_in(name: Name, value: &Value) -> PeerAuthentication {
    PeerAuthentication {
        name,
        selector: readable_labels(value.pointer("/spec/selector")),
        mode: Some(MtlsMode::Strict),
        ports: BTreeMap::new(),
        created: None,
        is_stand_in: true,
    }
}
