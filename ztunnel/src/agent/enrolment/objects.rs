//! YAML to the little that decides about enrolment. A file is cut at its document markers before anything is parsed, so
//! that one broken document does not hide its neighbours, and each is parsed under a budget of its own.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::cni::decide::{DATAPLANE_MODE, Mode};
use crate::cni::knowledge::KnownPod;

/// Longest name, namespace, UID or service account: what Kubernetes allows of any.
const MAX_NAME: usize = 253;
/// Annotation of a static pod's object: the UID that the kubelet, and so the runtime, knows it by.
const STATIC_UID: &str = "kubernetes.io/config.hash";

/// Which object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Id {
    /// A Namespace by name.
    Namespace(String),
    /// A Pod by namespace and name.
    Pod(String, String),
}

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A Namespace's label.
    Namespace(Mode),
    /// A Pod, and the node that it runs on; empty until it is scheduled.
    Pod(KnownPod, String),
}

/// One document, or one item of a list in it.
#[derive(Debug, PartialEq, Eq)]
pub enum Document {
    /// A Namespace or a Pod.
    Object(Id, Object),
    /// Not valid.
    Refused {
        /// What it calls itself, where that could be read.
        id: Option<Id>,
        /// What is wrong with it, with its line in the file.
        reason: String,
        /// What counts where no earlier version does: an object that may ask for the mesh does.
        stand_in: Option<Object>,
    },
    /// Of a kind that has nothing to do with enrolment.
    Ignored,
}

/// Reads every document of `text`.
pub fn parse(text: &str) -> Vec<Document> {
    let mut documents = Vec::new();
    for (line, part) in split(text) {
        match yaml(part) {
            Ok(Value::Null) => {}
            Ok(value) => items(&value).iter().for_each(|item| documents.push(read(item, line))),
            Err(error) => {
                let reason = format!("line {line}: not YAML: {error}");
                documents.push(Document::Refused { id: None, reason, stand_in: None });
            }
        }
    }
    documents
}

/// Cuts at lines that are document markers; yields the line number of each part's first line.
fn split(text: &str) -> Vec<(usize, &str)> {
    let mut parts = Vec::new();
    let mut rest = text;
    let (mut line, mut first) = (1, 1);
    let mut end = 0;
    for row in text.split_inclusive('\n') {
        let marks =
            row.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marks && end > 0 {
            let (part, behind) = rest.split_at(end);
            parts.push((first, part));
            (rest, first, end) = (behind, line, 0);
        }
        end += row.len();
        line += 1;
    }
    parts.push((first, rest));
    parts
}

fn yaml(text: &str) -> Result<Value, serde_saphyr::Error> {
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
    serde_saphyr::from_str_with_options(text, options)
}

fn items(value: &Value) -> &[Value] {
    if string(value, "apiVersion") == "v1" && string(value, "kind") == "List" {
        value.get("items").and_then(Value::as_array).map_or(&[], Vec::as_slice)
    } else {
        std::slice::from_ref(value)
    }
}

fn read(value: &Value, line: usize) -> Document {
    let (version, kind) = (string(value, "apiVersion"), string(value, "kind"));
    let refused = |id, what: &str| Document::Refused { id, reason: format!("line {line}: {what}"), stand_in: None };
    if version.is_empty() || kind.is_empty() {
        return refused(None, "apiVersion or kind is missing");
    }
    if version != "v1" || !matches!(kind, "Namespace" | "Pod") {
        return Document::Ignored;
    }
    let meta = value.get("metadata").unwrap_or(&Value::Null);
    let name = string(meta, "name").to_owned();
    let namespace = match string(meta, "namespace") {
        "" => "default",
        namespace => namespace,
    };
    if !(1..=MAX_NAME).contains(&name.len()) || namespace.len() > MAX_NAME {
        return refused(None, &format!("{kind}: metadata.name is missing, or it or the namespace is too long"));
    }
    let label = format!("{kind} {namespace}/{name}");
    let spec = value.get("spec").unwrap_or(&Value::Null);
    let (id, object) = if kind == "Namespace" {
        (Id::Namespace(name), mode(meta).map(Object::Namespace))
    } else {
        (Id::Pod(namespace.to_owned(), name), pod(meta, spec))
    };
    match object {
        Ok(object) => Document::Object(id, object),
        Err(reason) => {
            let stand_in = stand_in(&id, meta, spec);
            Document::Refused { id: Some(id), reason: format!("line {line}: {label}: {reason}"), stand_in }
        }
    }
}

/// The safest reading of an object that is not valid. None where its label can be read and does not ask for the mesh: it is
/// then as one that is not known.
fn stand_in(id: &Id, meta: &Value, spec: &Value) -> Option<Object> {
    if matches!(mode(meta), Ok(Mode::Unset | Mode::None)) {
        return None;
    }
    let readable = |value: &Value, field: &str| text(value, field).unwrap_or_default().to_owned();
    let pod = || KnownPod {
        uids: Some(readable(meta, "uid")).into_iter().filter(|uid| !uid.is_empty()).collect(),
        mode: Mode::Ambient,
        host_network: spec.get("hostNetwork").and_then(Value::as_bool).unwrap_or(false),
        service_account: match (readable(spec, "serviceAccountName"), readable(spec, "serviceAccount")) {
            (first, second) if first.is_empty() && second.is_empty() => String::from("default"),
            (first, second) if first.is_empty() => second,
            (first, _) => first,
        },
        runtime_class: readable(spec, "runtimeClassName"),
    };
    Some(match id {
        Id::Namespace(_) => Object::Namespace(Mode::Ambient),
        Id::Pod(..) => Object::Pod(pod(), readable(spec, "nodeName")),
    })
}

fn pod(meta: &Value, spec: &Value) -> Result<Object, String> {
    if !spec.is_object() {
        return Err(String::from("spec is missing"));
    }
    let annotations = strings(meta, "annotations")?;
    let uids = [Some(text(meta, "uid")?), annotations.get(STATIC_UID).copied()];
    let host_network = match spec.get("hostNetwork") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(host_network)) => *host_network,
        Some(_) => return Err(String::from("spec.hostNetwork is not a boolean")),
    };
    let accounts = [text(spec, "serviceAccountName")?, text(spec, "serviceAccount")?];
    let service_account = accounts.into_iter().find(|account| !account.is_empty()).unwrap_or("default");
    let known = KnownPod {
        uids: uids.into_iter().flatten().filter(|uid| !uid.is_empty()).map(str::to_owned).collect(),
        mode: mode(meta)?,
        host_network,
        service_account: service_account.to_owned(),
        runtime_class: text(spec, "runtimeClassName")?.to_owned(),
    };
    Ok(Object::Pod(known, text(spec, "nodeName")?.to_owned()))
}

fn mode(meta: &Value) -> Result<Mode, String> {
    Mode::read(strings(meta, "labels")?.get(DATAPLANE_MODE).copied()).map_err(|error| error.to_string())
}

/// A map of texts: labels or annotations.
fn strings<'a>(meta: &'a Value, field: &str) -> Result<BTreeMap<&'a str, &'a str>, String> {
    let map = match meta.get(field) {
        None | Some(Value::Null) => return Ok(BTreeMap::new()),
        Some(Value::Object(map)) => map,
        Some(_) => return Err(format!("metadata.{field} is not a map")),
    };
    map.iter()
        .map(|(key, value)| {
            let value = value.as_str().ok_or_else(|| format!("metadata.{field}[{key}] is not text"))?;
            Ok((key.as_str(), value))
        })
        .collect()
}

/// An optional text of bounded length.
fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str, String> {
    match value.get(field) {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(text)) if text.len() <= MAX_NAME => Ok(text),
        Some(_) => Err(format!("{field} is not text, or is too long")),
    }
}

fn string<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Document {
        let mut all = parse(text);
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    #[test]
    fn what_decides_is_read_and_the_rest_is_not() {
        let namespace = one(
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}\n",
        );
        assert_eq!(namespace, Document::Object(Id::Namespace("shop".into()), Object::Namespace(Mode::Ambient)));
        let pod = one("
apiVersion: v1
kind: Pod
metadata:
  name: web-1
  namespace: shop
  uid: u1
  labels: {app: web, istio.io/dataplane-mode: none}
  annotations: {kubernetes.io/config.hash: h1}
spec: {hostNetwork: true, nodeName: n1, serviceAccountName: web, runtimeClassName: kata, containers: 17}
status: whatever
");
        let known = KnownPod {
            uids: vec!["u1".into(), "h1".into()],
            mode: Mode::None,
            host_network: true,
            runtime_class: "kata".into(),
            service_account: "web".into(),
        };
        assert_eq!(pod, Document::Object(Id::Pod("shop".into(), "web-1".into()), Object::Pod(known, "n1".into())));
        let pod = one("{apiVersion: v1, kind: Pod, metadata: {name: a, labels: null}, spec: {containers: []}}");
        let known = KnownPod { service_account: "default".into(), ..KnownPod::default() };
        assert_eq!(pod, Document::Object(Id::Pod("default".into(), "a".into()), Object::Pod(known, String::new())));
        assert_eq!(one("{apiVersion: apps/v1, kind: Deployment, metadata: 3}"), Document::Ignored);
        assert_eq!(one("{apiVersion: example.com/v1, kind: Pod}"), Document::Ignored);
    }

    #[test]
    fn documents_and_lists_are_taken_apart() {
        let text = "# head\n---\napiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n\
                    - {apiVersion: v1, kind: Pod}\n---\n]\n--- # last\n{apiVersion: v1, kind: Namespace, metadata: {name: b}}";
        let all = parse(text);
        assert!(matches!(&all[0], Document::Object(Id::Namespace(name), _) if name == "a"));
        assert!(matches!(&all[1], Document::Refused { id: None, reason, .. } if reason.starts_with("line 2:")));
        assert!(
            matches!(&all[2], Document::Refused { id: None, reason, .. } if reason.starts_with("line 8:")),
            "{all:?}"
        );
        assert!(matches!(&all[3], Document::Object(Id::Namespace(name), _) if name == "b"));
        assert_eq!(all.len(), 4);
        assert_eq!(parse(""), []);
        assert_eq!(parse("---\n---\n"), []);
    }

    #[test]
    fn what_is_not_valid_asks_for_the_mesh_where_its_label_may() {
        let stand_in = |text: &str| match one(text) {
            Document::Refused { stand_in, .. } => stand_in,
            other => panic!("{other:?}"),
        };
        let namespace = |labels: &str| {
            stand_in(&format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: a, labels: {labels}}}}}"))
        };
        assert_eq!(namespace("{istio.io/dataplane-mode: sideways}"), Some(Object::Namespace(Mode::Ambient)));
        assert_eq!(namespace("[ambient]"), Some(Object::Namespace(Mode::Ambient)));
        let pod = |labels: &str, spec: &str| {
            let text =
                format!("{{apiVersion: v1, kind: Pod, metadata: {{name: a, uid: u, labels: {labels}}}, spec: {spec}}}");
            stand_in(&text)
        };
        let known = |host_network, account: &str| {
            let pod = KnownPod {
                uids: vec!["u".into()],
                mode: Mode::Ambient,
                host_network,
                service_account: account.into(),
                ..KnownPod::default()
            };
            Some(Object::Pod(pod, "n".into()))
        };
        let odd = "{istio.io/dataplane-mode: sideways}";
        assert_eq!(pod(odd, "{nodeName: n, serviceAccountName: web}"), known(false, "web"));
        assert_eq!(pod(odd, "{nodeName: n, hostNetwork: true}"), known(true, "default"));
        assert_eq!(pod("{istio.io/dataplane-mode: ambient}", "{nodeName: n, hostNetwork: 3}"), known(false, "default"));
        assert_eq!(pod("{istio.io/dataplane-mode: none}", "{nodeName: [n]}"), None);
        assert_eq!(pod("{}", "{nodeName: [n]}"), None);
    }

    #[test]
    fn wrong_shapes_are_refused_by_name() {
        let pod = |meta: &str, spec: &str| {
            one(&format!("{{apiVersion: v1, kind: Pod, metadata: {{name: a, namespace: n{meta}}}, spec: {spec}}}"))
        };
        assert!(matches!(pod("", "{}"), Document::Object(..)));
        for (meta, spec) in [
            ("", "null"),
            ("", "[]"),
            ("", "{hostNetwork: \"true\"}"),
            ("", "{nodeName: [n]}"),
            ("", "{serviceAccountName: 3}"),
            (", uid: 3", "{}"),
            (", labels: []", "{}"),
            (", labels: {istio.io/dataplane-mode: true}", "{}"),
            (", labels: {istio.io/dataplane-mode: sidecar}", "{}"),
            (", annotations: a", "{}"),
        ] {
            let Document::Refused { id, .. } = pod(meta, spec) else { panic!("{meta} {spec}") };
            assert_eq!(id, Some(Id::Pod("n".into(), "a".into())));
        }
        for text in ["3", "text", "[]", "{kind: Pod}", "{apiVersion: v1}"] {
            assert!(matches!(one(text), Document::Refused { id: None, .. }), "{text}");
        }
        let bomb =
            format!("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [{}]", "*b,".repeat(2000));
        assert!(matches!(one(&bomb), Document::Refused { id: None, .. }));
        assert!(matches!(one(&"[".repeat(100_000)), Document::Refused { id: None, .. }));
    }
}
