//! Fields that nobody reads. A misspelt field would be ignored by serde, and its author would believe it in force; so the
//! typed object is written back and compared with what was read.

use serde_json::{Map, Value};

use super::problem::Problems;

/// Notes every field of `given`, which is found at `path`, that is missing in `understood`, the same after a round trip
/// through its type.
pub(super) fn unknown_fields(given: &Value, understood: &Value, path: &str, problems: &mut Problems) {
    compare(given, understood, path, problems);
}

fn compare(given: &Value, understood: &Value, path: &str, problems: &mut Problems) {
    match (given, understood) {
        (Value::Object(given), Value::Object(understood)) => {
            for (key, value) in given {
                let field = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match understood.get(key) {
                    Some(kept) => compare(value, kept, &field, problems),
                    // The type leaves out what is empty.
                    None if is_empty(value) => {}
                    None => problems.add(field, "is not a field of this kind", suggestion(key, understood)),
                }
            }
        }
        (Value::Array(given), Value::Array(understood)) => {
            for (index, (value, kept)) in given.iter().zip(understood).enumerate() {
                compare(value, kept, &format!("{path}[{index}]"), problems);
            }
        }
        // Scalars may be written differently (times, quantities) without being unknown.
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(is_empty),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

/// Of Kubernetes' own kinds only the fields that the object uses are known here, so the suggestion is limited to well-known
/// ones; of others all are.
fn suggestion(key: &str, siblings: &Map<String, Value>) -> String {
    const KNOWN: [&str; 32] = [
        "addresses",
        "addressType",
        "annotations",
        "apiVersion",
        "appProtocol",
        "clusterIP",
        "clusterIPs",
        "conditions",
        "containerPort",
        "containers",
        "endpoints",
        "externalName",
        "hostNetwork",
        "image",
        "ipFamilies",
        "labels",
        "matchLabels",
        "metadata",
        "name",
        "namespace",
        "nodeName",
        "phase",
        "podIP",
        "podIPs",
        "ports",
        "protocol",
        "publishNotReadyAddresses",
        "replicas",
        "selector",
        "serviceAccountName",
        "targetPort",
        "template",
    ];
    let near = |known: &&str| distance(&key.to_ascii_lowercase(), &known.to_ascii_lowercase()) <= 2;
    let unused = siblings.iter().filter(|(_, value)| value.is_null()).map(|(name, _)| name.as_str());
    let well_known = KNOWN.iter().copied().filter(|known| !siblings.contains_key(*known));
    match unused.chain(well_known).find(near) {
        Some(known) => format!("did you mean {known}?"),
        None => "remove it, or correct its name or its indentation".to_owned(),
    }
}

/// Edit distance; keys are short, so the quadratic algorithm on bytes does.
fn distance(a: &str, b: &str) -> usize {
    const LONGEST: usize = 64;
    if a.len().abs_diff(b.len()) > 2 || a.len() > LONGEST {
        return usize::MAX;
    }
    let mut previous: Vec<usize> = (0..=b.len()).collect();
    for (row, left) in a.bytes().enumerate() {
        let mut current = vec![row + 1];
        for (column, right) in b.bytes().enumerate() {
            let substituted = previous[column] + usize::from(left != right);
            current.push(substituted.min(previous[column + 1] + 1).min(current[column] + 1));
        }
        previous = current;
    }
    previous.last().copied().unwrap_or(usize::MAX)
}
