use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::fixture::pod;

fn member(number: u16, capacity: u32) -> Arc<Workload> {
    let wire = mesh_proto::workload::Workload { capacity: Some(capacity), ..pod(&format!("w{number}"), &[]) };
    Arc::new(Workload::try_from(&wire).unwrap())
}

/// Checks order, heap, and counts; gives the depth.
fn check(tree: &Tree) -> usize {
    let Some(node) = tree else { return 0 };
    for child in [&node.left, &node.right].into_iter().flatten() {
        assert!(node.above(child));
    }
    assert!(node.left.as_ref().is_none_or(|left| left.workload.uid < node.workload.uid));
    assert!(node.right.as_ref().is_none_or(|right| right.workload.uid > node.workload.uid));
    assert_eq!(node.capacity, u64::from(node.workload.capacity) + capacity(&node.left) + capacity(&node.right));
    1 + check(&node.left).max(check(&node.right))
}

#[test]
fn each_is_picked_in_proportion() {
    let mut set = WeightedSet::default();
    let capacities = [1, 0, 2, 3, 4];
    for (number, capacity) in (0..).zip(capacities) {
        set.insert(member(number, capacity));
    }
    let (mut random, mut counts) = (fastrand::Rng::with_seed(11), BTreeMap::new());
    for _ in 0..10_000 {
        *counts.entry(set.pick(&mut random).unwrap().name.to_string()).or_insert(0_u32) += 1;
    }
    for (number, capacity) in (0..).zip(capacities) {
        let count = counts.get(&format!("w{number}")).copied().unwrap_or(0);
        assert!(count.abs_diff(capacity * 1000) < 150, "w{number}: {count}");
    }
    assert_eq!(counts.get("w1"), None, "no capacity, no traffic");
}

#[test]
fn of_those_that_may_be_each_is_picked_in_proportion() {
    // With so many others that those that may be are met by chance often, sometimes, hardly ever.
    for others in [0, 4, 1000] {
        let mut set = WeightedSet::default();
        for (number, capacity) in (0..).zip([1, 0, 3]) {
            set.insert(member(number, capacity));
        }
        (10..10 + others).for_each(|number| set.insert(member(number, 2)));
        let (mut random, mut counts) = (fastrand::Rng::with_seed(5), BTreeMap::new());
        let few: Vec<_> = (0..3).map(|number| member(number, 1).uid.clone()).collect();
        for _ in 0..2000 {
            let picked = set.pick_if(&mut random, |workload| few.contains(&workload.uid)).unwrap();
            *counts.entry(picked.capacity).or_insert(0_u32) += 1;
        }
        let heavy = counts.get(&3).copied().unwrap_or(0);
        assert!((1420..=1580).contains(&heavy) && counts.get(&1) == Some(&(2000 - heavy)), "{others}: {counts:?}");
        assert!(set.pick_if(&mut random, |_| false).is_none());
        assert!(set.pick_if(&mut random, |workload| workload.capacity == 0).is_none());
    }
}

#[test]
fn nothing_in_it_gives_nothing() {
    let mut set = WeightedSet::default();
    let mut random = fastrand::Rng::with_seed(1);
    assert!(set.is_empty() && set.pick(&mut random).is_none());
    set.insert(member(1, 0));
    assert!(!set.is_empty() && set.pick(&mut random).is_none());
}

#[test]
fn the_depth_is_logarithmic() {
    let mut set = WeightedSet::default();
    (0..10_000).for_each(|number| set.insert(member(number, 1)));
    let depth = check(&set.root);
    assert!(depth < 45, "{depth}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn a_set_is_what_a_map_is(edits in prop::collection::vec((0_u16..30, prop::option::of(0_u32..5)), 0..200)) {
        let (mut set, mut map, mut clones) = (WeightedSet::default(), BTreeMap::new(), Vec::new());
        for (number, capacity) in edits {
            let uid = member(number, 1).uid.to_string();
            match capacity {
                Some(capacity) => {
                    set.insert(member(number, capacity));
                    map.insert(uid, capacity);
                }
                None => {
                    set.remove(&uid);
                    map.remove(&uid);
                }
            }
            check(&set.root);
            if number % 5 == 0 {
                clones.push((set.clone(), map.clone()));
            }
        }
        clones.push((set, map));
        for (set, map) in clones {
            let listed: Vec<_> = set.iter().map(|workload| (workload.uid.to_string(), workload.capacity)).collect();
            prop_assert_eq!(listed, map.into_iter().collect::<Vec<_>>());
        }
    }
}
