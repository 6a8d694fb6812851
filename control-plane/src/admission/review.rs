//! AdmissionReview (`admission.k8s.io/v1`): the API server's question and the answer. Pure.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::api::{Outcome, Problem, read_served};

/// The group and version that is spoken.
const API_VERSION: &str = "admission.k8s.io/v1";
const KIND: &str = "AdmissionReview";

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotAReview {
    /// It cannot be read.
    #[error("the body is no AdmissionReview: {0}")]
    Malformed(#[from] serde_json::Error),
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
pub(super) fn answer(body: &[u8]) -> Result<Answer, NotAReview> {
    let review: Review = serde_json::from_slice(body)?;
    if review.api_version != API_VERSION || review.kind != KIND {
        return Err(NotAReview::Version(format!("{} {}", review.api_version, review.kind)));
    }
    let Request { uid, object } = review.request;
    let mut response = Response { uid, allowed: true, status: None, warnings: Vec::new() };
    // A deletion is always allowed.
    if !object.is_null() {
        match read_served(&object) {
            Outcome::Object(_) | Outcome::Ignored { .. } => {}
            Outcome::Unsupported { label, problem } => response.warnings.push(format!("{label}: {}", problem.message)),
            Outcome::Refused { label, problems, .. } => {
                response.allowed = false;
                response.status = Some(refusal(&label, &problems));
            }
        }
    }
    Ok(Answer { api_version: API_VERSION, kind: KIND, response })
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
        let review = json!({
            "apiVersion": API_VERSION, "kind": KIND,
            "request": {"uid": "u1", "operation": "UPDATE", "object": object, "oldObject": null, "dryRun": false},
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
            json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p"}});
        let answer = ask(&policy);
        assert_eq!(answer["response"]["allowed"], true);
        assert!(answer["response"]["warnings"][0].as_str().unwrap().contains("not in force"));
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
