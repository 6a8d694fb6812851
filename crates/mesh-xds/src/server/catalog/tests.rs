//! The catalog alone.

use bytes::Bytes;

use super::*;

const TYPE: &str = "type.example/Thing";

fn thing(name: &str, aliases: &[&str], body: &str) -> Resource {
    Resource {
        name: name.into(),
        aliases: aliases.iter().map(|alias| Arc::from(*alias)).collect(),
        version: format!("{body}/{aliases:?}").into(),
        body: Bytes::copy_from_slice(body.as_bytes()),
    }
}

fn names(snapshot: &Snapshot, name: &str) -> Vec<String> {
    snapshot.lookup(TYPE, name).iter().map(|resource| resource.name.to_string()).collect()
}

fn none() -> [&'static str; 0] {
    []
}

#[test]
fn names_and_aliases_are_found_while_they_hold() {
    let catalog = Catalog::new();
    assert_eq!(catalog.update(TYPE, [thing("a", &["vip", "ip"], "1"), thing("b", &["vip"], "1")], none()), 2);
    let snapshot = catalog.snapshot();
    assert_eq!(names(&snapshot, "a"), ["a"]);
    assert_eq!(names(&snapshot, "ip"), ["a"]);
    assert_eq!(names(&snapshot, "vip"), ["a", "b"]);
    assert_eq!(names(&snapshot, "c"), [""; 0]);
    assert_eq!(catalog.update(TYPE, [thing("a", &["ip"], "1")], ["b"]), 2);
    let later = catalog.snapshot();
    assert_eq!(names(&later, "vip"), [""; 0]);
    assert_eq!(names(&later, "ip"), ["a"]);
    assert_eq!(names(&snapshot, "vip"), ["a", "b"], "a snapshot does not change");
    assert_eq!(later.len(TYPE), 1);
    assert_eq!(later.resources(TYPE).map(|resource| &*resource.name).collect::<Vec<_>>(), ["a"]);
}

#[test]
fn what_is_no_change_wakes_nobody() {
    let catalog = Catalog::new();
    let mut changes = catalog.changes();
    catalog.update(TYPE, [thing("a", &[], "1")], none());
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    assert_eq!(catalog.update(TYPE, [thing("a", &[], "1")], ["b"]), 0);
    assert!(!changes.has_changed().unwrap());
}

#[test]
fn a_name_set_and_removed_is_set() {
    let catalog = Catalog::new();
    catalog.update(TYPE, [thing("a", &[], "1")], none());
    assert_eq!(catalog.update(TYPE, [thing("a", &[], "2")], ["a"]), 1);
    assert_eq!(&catalog.snapshot().lookup(TYPE, "a")[0].body[..], b"2");
}

#[test]
fn the_log_has_each_name_once_and_forgets_removals() {
    let catalog = Catalog::remembering(4);
    let changed = |since: u64| -> Result<Vec<(u64, String)>, ()> {
        let snapshot = catalog.snapshot();
        let changed = snapshot.kind(TYPE).unwrap().changed_since(since).map_err(|_| ())?;
        Ok(changed.map(|(version, name)| (*version, name.to_string())).collect())
    };
    for n in 0..100 {
        catalog.update(TYPE, [thing("a", &[], &n.to_string())], none());
    }
    assert_eq!(changed(0), Ok(vec![(100, "a".to_owned())]));
    assert_eq!(changed(100), Ok(vec![]));
    // Gone and back: only the last of it counts.
    for n in 0..10 {
        catalog.update(TYPE, [thing("b", &[], &n.to_string())], none());
        catalog.update(TYPE, [] as [Resource; 0], ["b"]);
    }
    assert_eq!(changed(0), Ok(vec![(100, "a".to_owned()), (120, "b".to_owned())]));
    for n in 0..4 {
        catalog.update(TYPE, [thing(&n.to_string(), &[], "1")], none());
        catalog.update(TYPE, [] as [Resource; 0], [n.to_string()]);
    }
    assert_eq!(changed(119), Err(()), "the removal of b is forgotten");
    assert_eq!(changed(120).unwrap().len(), 4, "the others are not");
}

/// The number of resources must not matter for the cost of a change: a hundred times as many may cost a few levels of a
/// tree more, not a hundred times as much.
#[test]
fn a_change_does_not_cost_more_with_more_resources() {
    let cost = |count: usize| {
        let catalog = Catalog::new();
        catalog.update(TYPE, (0..count).map(|n| thing(&format!("thing-{n}"), &[&format!("ip-{n}")], "1")), none());
        let reader = catalog.snapshot();
        let best = (0..20)
            .map(|round| {
                let begun = std::time::Instant::now();
                for n in 0..50 {
                    catalog.update(TYPE, [thing(&format!("thing-{n}"), &["x"], &round.to_string())], none());
                }
                begun.elapsed()
            })
            .min();
        assert_eq!(reader.len(TYPE), count);
        best.unwrap()
    };
    let (few, many) = (cost(500), cost(50_000));
    assert!(many < few * 20, "50 changes: {few:?} among 500, {many:?} among 50,000");
}
