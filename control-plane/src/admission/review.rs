//! AdmissionReview (`admission.k8s.io/v1`): the API server's question and the answer. Pure.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::api::{Outcome, Problem, read_served};

/// The group and version that is spoken.
const API_VERSION: &str = "admission.k8s.io/v1";
const KIND: &str = "AdmissionReview";
/// Most maps in a body. The smallest map takes a hundred times the memory of its text; real objects have some thousands.
const MAX_MAPS: usize = 64 * 1024;
/// Mistakes that a warning tells of, at most; API servers cut long ones.
const MAX_WARNINGS: usize = 5;

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotAReview {
    /// It cannot be read.
    #[error("the body is no AdmissionReview: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Its parts are too many.
    #[error("the body has more than {MAX_MAPS} maps")]
    TooManyMaps,
    /// It is of another version.
    #[error("{0:?} is not read here; send {API_VERSION} {KIND}")]
    Version(String),
}

#[derive(Deserialize)]
struct Review {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
    request: Request,
}

#[derive(Deserialize)]
struct Request {
    uid: String,
    /// The object as it would be stored; null for a deletion.
    #[serde(default)]
    object: Value,
    /// The object as it is stored; null for a creation.
    #[serde(default, rename = "oldObject")]
    old_object: Value,
}

/// The answer, as it goes back.
#[derive(Debug, Serialize)]
pub(super) struct Answer {
    #[serde(rename = "apiVersion")]
    api_version: &'static str,
    kind: &'static str,
    response: Response,
}

#[derive(Debug, Serialize)]
struct Response {
    uid: String,
    allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
    /// Shown to whoever applies the object.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// `meta/v1` Status.
#[derive(Debug, Serialize)]
struct Status {
    status: &'static str,
    code: u16,
    reason: &'static str,
    message: String,
    details: Details,
}

#[derive(Debug, Serialize)]
struct Details {
    causes: Vec<Cause>,
}

#[derive(Debug, Serialize)]
struct Cause {
    reason: &'static str,
    field: String,
    message: String,
}

impl Answer {
    /// Whether the object may be stored.
    pub(super) fn is_allowed(&self) -> bool {
        self.response.allowed
    }
}

/// Answers a question.
///
/// What is stored already, from before this was installed or while it was away, must not be stuck: an update is refused
/// for the mistakes that it adds, and none of an object that is being deleted, whose finalizers must come off.
pub(super) fn answer(body: &[u8]) -> Result<Answer, NotAReview> {
    // Of strings as well: it is a bound, not a count.
    if body.iter().filter(|byte| **byte == b'{').count() > MAX_MAPS {
        return Err(NotAReview::TooManyMaps);
    }
    let review: Review = serde_json::from_slice(body)?;
    if review.api_version != API_VERSION || review.kind != KIND {
        return Err(NotAReview::Version(format!("{} {}", review.api_version, review.kind)));
    }
    let Request { uid, object, old_object } = review.request;
    let mut response = Response { uid, allowed: true, status: None, warnings: Vec::new() };
    // A deletion is always allowed.
    if !object.is_null() {
        match read_served(&object) {
            Outcome::Object(_) | Outcome::Ignored { .. } => {}
            Outcome::Unsupported { label, problem } => response.warnings.push(format!("{label}: {}", problem.message)),
            Outcome::Refused { label, problems, .. } => {
                let (old, new) = divide(problems, &object, &old_object);
                let warnings = old.iter().map(|problem| format!("{label} does not take effect: {problem}"));
                response.warnings.extend(warnings.take(MAX_WARNINGS));
                if !new.is_empty() {
                    response.allowed = false;
                    response.status = Some(refusal(&label, &new));
                }
            }
        }
    }
    Ok(Answer { api_version: API_VERSION, kind: KIND, response })
}

/// Divides the mistakes of an object into those that are let pass and those that are refused.
fn divide(problems: Vec<Problem>, object: &Value, old_object: &Value) -> (Vec<Problem>, Vec<Problem>) {
    let is_being_deleted = object.pointer("/metadata/deletionTimestamp").is_some_and(|time| !time.is_null());
    if is_being_deleted {
        return (problems, Vec::new());
    }
    let known = match read_served(old_object) {
        Outcome::Refused { problems, .. } => problems,
        Outcome::Object(_) | Outcome::Ignored { .. } | Outcome::Unsupported { .. } => Vec::new(),
    };
    problems.into_iter().partition(|problem| known.contains(problem))
}

fn refusal(label: &str, problems: &[Problem]) -> Status {
    let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
    let cause = |problem: &Problem| Cause {
        reason: "FieldValueInvalid",
        field: problem.field.clone(),
        message: format!("{}; {}", problem.message, problem.fix),
    };
    Status {
        status: "Failure",
        code: 422,
        reason: "Invalid",
        message: format!("{label}: {}", lines.join("\n")),
        details: Details { causes: problems.iter().map(cause).collect() },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::Kind;

    fn ask(object: &Value) -> Value {
        ask_update(&Value::Null, object)
    }

    fn ask_update(old_object: &Value, object: &Value) -> Value {
        let review = json!({
            "apiVersion": API_VERSION, "kind": KIND,
            "request": {"uid": "u1", "operation": "UPDATE", "object": object, "oldObject": old_object, "dryRun": false},
        });
        serde_json::to_value(answer(review.to_string().as_bytes()).unwrap()).unwrap()
    }

    fn labelled(kind: Kind, mode: &str) -> Value {
        let spec = match kind {
            Kind::Pod => json!({"containers": [{"name": "a"}]}),
            Kind::Namespace => json!({}),
            _ => json!({"ports": [{"port": 80}], "clusterIP": "10.0.0.1"}),
        };
        json!({
            "apiVersion": kind.api_version(), "kind": kind.as_str(), "spec": spec,
            "metadata": {"name": "a", "labels": {"istio.io/dataplane-mode": mode}, "aFieldOfTheFuture": true},
        })
    }

    #[test]
    fn what_is_valid_is_allowed_and_what_is_not_names_field_and_fix() {
        for kind in [Kind::Namespace, Kind::Pod, Kind::Service] {
            assert_eq!(ask(&labelled(kind, "ambient"))["response"], json!({"uid": "u1", "allowed": true}), "{kind}");
        }
        let refused = ask(&labelled(Kind::Namespace, "sideways"));
        assert_eq!(refused["response"]["allowed"], false);
        let status = &refused["response"]["status"];
        assert_eq!(status["code"], 422);
        assert_eq!(status["details"]["causes"][0]["field"], "metadata.labels[istio.io/dataplane-mode]");
        let message = status["message"].as_str().unwrap();
        assert!(message.starts_with("Namespace a: metadata.labels[istio.io/dataplane-mode]: "), "{message}");
        assert!(message.contains("; "), "{message}");
    }

    #[test]
    fn deletions_and_what_is_none_of_ours_are_allowed() {
        for object in [Value::Null, json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}})] {
            assert_eq!(ask(&object)["response"], json!({"uid": "u1", "allowed": true}));
        }
        let policy =
            json!({"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": "p"}});
        let answer = ask(&policy);
        assert_eq!(answer["response"]["allowed"], true);
        assert!(answer["response"]["warnings"][0].as_str().unwrap().contains("not in force"));
    }

    #[test]
    fn what_is_stored_with_a_mistake_can_be_changed_and_deleted() {
        let bad = labelled(Kind::Namespace, "sideways");
        let mut changed = bad.clone();
        changed["metadata"]["annotations"] = json!({"a": "b"});
        let answer = ask_update(&bad, &changed);
        assert_eq!(answer["response"]["allowed"], true);
        let warning = answer["response"]["warnings"][0].as_str().unwrap();
        assert!(warning.contains("istio.io/dataplane-mode"), "{warning}");
        // Another mistake is a new one, also beside the old one; so is the first.
        changed["metadata"]["labels"]["a key"] = json!("b");
        let causes = ask_update(&bad, &changed)["response"]["status"]["details"]["causes"].clone();
        assert_eq!(causes.as_array().unwrap().len(), 1, "{causes}");
        for old in [labelled(Kind::Namespace, "upside-down"), labelled(Kind::Namespace, "ambient")] {
            assert_eq!(ask_update(&old, &bad)["response"]["allowed"], false);
        }
        // Its finalizers must come off, whatever else it says.
        let mut deleted = bad;
        deleted["metadata"]["deletionTimestamp"] = json!("2026-01-02T03:04:05Z");
        let answer = ask_update(&labelled(Kind::Namespace, "ambient"), &deleted);
        assert_eq!(answer["response"]["allowed"], true);
        assert_eq!(answer["response"]["warnings"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn a_body_of_nothing_but_maps_is_not_read() {
        let body = format!("[{}{{}}]", "{},".repeat(MAX_MAPS));
        assert!(matches!(answer(body.as_bytes()), Err(NotAReview::TooManyMaps)));
    }

    #[test]
    fn other_bodies_are_refused() {
        for body in [
            "",
            "{}",
            "[]",
            r#"{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview","request":{"uid":"u"}}"#,
        ] {
            assert!(answer(body.as_bytes()).is_err(), "{body}");
        }
    }
}
