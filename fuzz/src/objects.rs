//! The objects that culvertd reads: YAML to validated objects to resources for the proxies, which must accept them.

use std::time::{Duration, UNIX_EPOCH};

use control_plane::api::{Outcome, parse};
use control_plane::index::{Event, Index, Options};
use mesh_model::Change;

/// Reads the input as a file of objects.
pub fn run(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let mut index = Index::new(Options {
        cluster_id: "Kubernetes".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        trust_domain: "cluster.local".to_owned(),
        root_namespace: "culvert-system".into(),
        confirmation: Duration::from_secs(60),
    });
    let mut events = Vec::new();
    for document in parse(&text) {
        match document.outcome {
            Outcome::Object(object) => events.push(Event::Apply(object)),
            Outcome::Refused { problems, stand_in, .. } => {
                assert!(!problems.is_empty(), "a refusal says why");
                events.extend(stand_in.map(Event::Apply));
            }
            Outcome::Unsupported { .. } | Outcome::Ignored { .. } => {}
        }
    }
    let deletions: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::Apply(object) => Some(Event::Delete(object.id())),
            Event::Delete(_) => None,
        })
        .collect();
    index.apply(events, UNIX_EPOCH);
    for resource in index.resources() {
        let (_, invalid) = Change::address(&resource.name, &resource.body);
        assert!(invalid.is_none(), "{}: {invalid:?}", resource.name);
    }
    for policy in index.policies() {
        let (_, invalid) = Change::authorization(&policy.name, &policy.body);
        assert!(invalid.is_none(), "{}: {invalid:?}", policy.name);
    }
    index.apply(deletions, UNIX_EPOCH);
    assert_eq!(index.resources().chain(index.policies()).count(), 0, "nothing outlives its objects");
}
