//! YAML text to objects, one document at a time.
//!
//! A file is cut at its document markers before anything is parsed, so one broken document does not hide its
//! neighbours. Every document is parsed under a budget of its own: nodes, depth and aliases are bounded.

use std::sync::Arc;

use k8s_openapi::Resource;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::name::{Kind, ObjectId};
use super::problem::{Problem, Problems};
use super::{
    Object, authorization_policy, custom, endpoint_slice, gateway, namespace, node, peer_authentication, pod, service,
    service_entry, stand_in, strict, workload_entry, workload_kinds,
};

/// One document of a file, or one item of a `List` in it.
#[derive(Clone, Debug)]
pub struct Document {
    /// The line of the file on which it begins, from 1.
    pub line: usize,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of a document.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// A valid object.
    Object(Object),
    /// Not valid.
    Refused {
        /// What it calls itself, where that could be read.
        id: Option<ObjectId>,
        /// The same for people: `Kind namespace/name`, or as much of it as could be read.
        label: String,
        /// Every mistake found.
        problems: Vec<Problem>,
        /// What stands in for it where no earlier version does: it would be less safe to do without.
        stand_in: Option<Object>,
    },
    /// An object that would configure the mesh, of a kind that this version does not read.
    Unsupported {
        /// The same for people.
        label: String,
        /// Why that matters.
        problem: Problem,
    },
    /// An object of a kind that has nothing to do with the mesh.
    Ignored {
        /// The same for people.
        label: String,
    },
}

/// API groups whose objects configure a mesh. One that is not read would silently not be in force, so it is refused.
const MESH_GROUPS: [&str; 5] =
    ["security.istio.io", "networking.istio.io", "gateway.networking.k8s.io", "telemetry.istio.io", "culvert.dev"];

/// Reads every document of `text`.
pub fn parse(text: &str) -> Vec<Document> {
    let mut documents = Vec::new();
    for (line, chunk) in split(text) {
        match parse_yaml(chunk) {
            Ok(Value::Null) => {}
            Ok(value) => read_value(&value, line, &mut documents),
            Err(problem) => documents.push(Document {
                line,
                outcome: Outcome::Refused {
                    id: None,
                    label: format!("document at line {line}"),
                    problems: vec![problem],
                    stand_in: None,
                },
            }),
        }
    }
    documents
}

/// Cuts at lines that are document markers; yields the line number of each part's first line.
fn split(text: &str) -> Vec<(usize, &str)> {
    let mut parts = Vec::new();
    let (mut start, mut start_line, mut position) = (0, 1, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let is_marker =
            line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if is_marker && position > start {
            parts.push((start_line, &text[start..position]));
        }
        if is_marker {
            start = position;
            start_line = index + 1;
        }
        position += line.len();
    }
    parts.push((start_line, &text[start..]));
    parts
}

fn parse_yaml(text: &str) -> Result<Value, Problem> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_anchors: 100,
            max_aliases: 1000,
            max_depth: 64,
            max_nodes: 500_000,
        },
        with_snippet: false,
        // YAML 1.2: `y`, `on` and the like are text, not truth.
        strict_booleans: true,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        Problem::new("", format!("is not YAML: {error}"), "correct the syntax; lines count from the document's first")
    })
}

/// Reads one object, or each item of a list.
fn read_value(value: &Value, line: usize, documents: &mut Vec<Document>) {
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    let items = match (text("apiVersion"), text("kind")) {
        (Some("v1"), Some("List")) => value.get("items").and_then(Value::as_array).map_or(&[][..], Vec::as_slice),
        _ => std::slice::from_ref(value),
    };
    documents.extend(items.iter().map(|item| Document { line, outcome: read_object(item, Unknown::IsAMistake) }));
}

fn read_object(value: &Value, unknown: Unknown) -> Outcome {
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
    let meta =
        |key: &str| value.get("metadata").and_then(|meta| meta.get(key)).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind_name) = (text("apiVersion"), text("kind"));
    let (namespace, name) = (meta("namespace"), meta("name"));
    let slash = if namespace.is_empty() { "" } else { "/" };
    let label = format!("{} {namespace}{slash}{name}", if kind_name.is_empty() { "object" } else { kind_name });
    let refused = |id: Option<ObjectId>, problem| Outcome::Refused {
        stand_in: id.as_ref().and_then(|id| stand_in::of(id, value)),
        id,
        label: label.clone(),
        problems: vec![problem],
    };
    if api_version.is_empty() || kind_name.is_empty() {
        let field = if api_version.is_empty() { "apiVersion" } else { "kind" };
        return refused(None, Problem::new(field, "is missing", "say which kind of object this is"));
    }
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let Some(kind) = Kind::find(group, kind_name) else {
        if MESH_GROUPS.contains(&group) {
            let message = format!("{group} {kind_name} is not supported by this version, so it is not in force");
            return Outcome::Unsupported { label, problem: Problem::new("kind", message, "do not rely on it") };
        }
        // Another group's kind of the same name, such as Knative's Service, is none of ours.
        return Outcome::Ignored { label };
    };
    if name.is_empty() {
        return refused(None, Problem::new("metadata.name", "is missing", "name the object"));
    }
    let id = ObjectId {
        kind,
        namespace: match (kind.is_cluster_scoped(), namespace) {
            (true, _) => Arc::default(),
            (false, "") => "default".into(),
            (false, namespace) => namespace.into(),
        },
        name: name.into(),
    };
    if !kind.reads_version(version) {
        let fix = format!("use {}", kind.api_version());
        return refused(Some(id), Problem::new("apiVersion", format!("{api_version:?} is not read for {kind}"), fix));
    }
    match validate(kind, value, unknown) {
        Ok(object) => Outcome::Object(object),
        Err(problems) => {
            Outcome::Refused { label: id.to_string(), stand_in: stand_in::of(&id, value), id: Some(id), problems }
        }
    }
}

/// What a field is that this version does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unknown {
    /// Misspelt, as far as anybody can tell.
    IsAMistake,
    /// Known to the API server, which has checked it and may be newer than this program.
    IsFine,
}

/// Validates an object of `kind` as an API server sends it, which has checked its fields already. Whether the object
/// repeats its kind does not matter: the items of a list do not.
///
/// # Errors
/// Every mistake found.
pub fn validate_served(kind: Kind, value: &Value) -> Result<Object, Vec<Problem>> {
    validate(kind, value, Unknown::IsFine)
}

/// Reads an object of whatever kind it says, as an API server sends it.
pub fn read_served(value: &Value) -> Outcome {
    read_object(value, Unknown::IsFine)
}

fn validate(kind: Kind, value: &Value, unknown: Unknown) -> Result<Object, Vec<Problem>> {
    match kind {
        Kind::Namespace => typed(value, unknown, namespace::validate).map(|valid| Object::Namespace(Arc::new(valid))),
        Kind::Node => typed(value, unknown, node::validate).map(|valid| Object::Node(Arc::new(valid))),
        Kind::ServiceAccount => typed(value, unknown, workload_kinds::validate_service_account)
            .map(|valid| Object::ServiceAccount(Arc::new(valid))),
        Kind::Deployment => {
            typed(value, unknown, workload_kinds::validate_deployment).map(|valid| Object::Deployment(Arc::new(valid)))
        }
        Kind::Service => typed(value, unknown, service::validate).map(|valid| Object::Service(Arc::new(valid))),
        Kind::EndpointSlice => {
            typed(value, unknown, endpoint_slice::validate).map(|valid| Object::EndpointSlice(Arc::new(valid)))
        }
        Kind::Pod => typed(value, unknown, pod::validate).map(|valid| Object::Pod(Arc::new(valid))),
        Kind::AuthorizationPolicy => custom::typed(value, unknown, authorization_policy::validate)
            .map(|valid| Object::AuthorizationPolicy(Arc::new(valid))),
        Kind::PeerAuthentication => custom::typed(value, unknown, peer_authentication::validate)
            .map(|valid| Object::PeerAuthentication(Arc::new(valid))),
        Kind::ServiceEntry => {
            custom::typed(value, unknown, service_entry::validate).map(|valid| Object::ServiceEntry(Arc::new(valid)))
        }
        Kind::WorkloadEntry => custom::typed(value, unknown, workload_entry::validate)
            .map(|valid| Object::WorkloadEntry(Arc::new(valid.with_status(value)))),
        Kind::Gateway => custom::typed(value, unknown, gateway::validate)
            .map(|valid| Object::Gateway(Arc::new(valid.with_status(value)))),
        Kind::GatewayClass => {
            custom::typed(value, unknown, gateway::validate_class).map(|valid| Object::GatewayClass(Arc::new(valid)))
        }
    }
}

/// Gives `value` its Kubernetes type, notes what the type does not know where that matters, and validates it.
fn typed<T, O>(value: &Value, unknown: Unknown, validate: fn(&T) -> Result<O, Vec<Problem>>) -> Result<O, Vec<Problem>>
where
    T: Resource + DeserializeOwned + Serialize,
{
    let object: T = serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { String::new() } else { path };
        vec![Problem::new(field, error.into_inner().to_string(), "give the field a value of its type")]
    })?;
    let mut problems = Problems::default();
    if unknown == Unknown::IsAMistake
        && let Ok(understood) = serde_json::to_value(&object)
    {
        strict::unknown_fields(value, &understood, "", &mut problems);
    }
    let mut unknown = problems.into_list();
    match validate(&object) {
        Ok(valid) if unknown.is_empty() => Ok(valid),
        Ok(_) => Err(unknown),
        Err(found) => {
            unknown.extend(found);
            Err(unknown)
        }
    }
}
