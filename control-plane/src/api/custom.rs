//! Objects of kinds that are not Kubernetes' own: their common shape, and what several of them have in it.
//!
//! A field of a spec that is not known here is a mistake wherever the object comes from: it may be what narrows a policy,
//! and its author believes it in force.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::document::Unknown;
use super::labels::Labels;
use super::problem::{Problem, Problems};
use super::{check, strict};

/// An object with a spec of type `S`. Fields that are not given are written back as null, so that the known ones can be
/// told from the others.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Whole<S> {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    metadata: ObjectMeta,
    // `spec:` with nothing behind it is as good as none.
    spec: Option<S>,
    #[serde(default)]
    status: Value,
}

/// Gives `value` its type, notes what the type does not know, and validates it.
pub(super) fn typed<S, O>(
    value: &Value,
    unknown: Unknown,
    validate: fn(&ObjectMeta, &S) -> Result<O, Vec<Problem>>,
) -> Result<O, Vec<Problem>>
where
    S: Default + DeserializeOwned + Serialize,
{
    let object: Whole<S> = serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { String::new() } else { path };
        vec![Problem::new(field, error.into_inner().to_string(), "give the field a value of its type")]
    })?;
    let mut problems = Problems::default();
    if let Ok(understood) = serde_json::to_value(&object) {
        match unknown {
            Unknown::IsAMistake => strict::unknown_fields(value, &understood, "", &mut problems),
            Unknown::IsFine => {
                if let (Some(given), Some(understood)) = (value.get("spec"), understood.get("spec")) {
                    strict::unknown_fields(given, understood, "spec", &mut problems);
                }
            }
        }
    }
    let mut unknown = problems.into_list();
    match validate(&object.metadata, &object.spec.unwrap_or_default()) {
        Ok(valid) if unknown.is_empty() => Ok(valid),
        Ok(_) => Err(unknown),
        Err(found) => {
            unknown.extend(found);
            Err(unknown)
        }
    }
}

/// Which workloads are meant, by their labels.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Selector {
    pub(super) match_labels: Option<Labels>,
}

impl Selector {
    /// The labels that are asked for at `field`; none if the selector is missing or empty.
    pub(super) fn labels(selector: Option<&Self>, field: &str, problems: &mut Problems) -> Labels {
        let labels = selector.and_then(|selector| selector.match_labels.clone()).unwrap_or_default();
        check::labels(&format!("{field}.matchLabels"), &labels, problems);
        for key in labels.keys().filter(|key| key.contains('*')) {
            problems.add(format!("{field}.matchLabels[{key}]"), "holds a wildcard", "name the label in full");
        }
        labels
    }
}
