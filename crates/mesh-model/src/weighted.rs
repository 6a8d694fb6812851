//! A persistent set of workloads that gives a random one in proportion to its capacity.
//!
//! A treap ordered by uid whose heap priority is a hash of the uid: its shape depends on what is in it and not on the
//! order of arrival. Insert, remove and pick take O(log n) on average; a clone is a pointer, and a change copies only
//! the path that a clone still shares.

use std::cmp::Ordering;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::workload::Workload;

/// The set. Members are told apart by uid.
#[derive(Debug, Clone, Default)]
pub(crate) struct WeightedSet {
    root: Tree,
}

/// Picks that may be in vain before every member is looked at.
const DRAWS: usize = 8;

type Tree = Option<Arc<Node>>;

#[derive(Debug, Clone)]
struct Node {
    workload: Arc<Workload>,
    priority: u64,
    /// Capacity of the whole subtree.
    capacity: u64,
    left: Tree,
    right: Tree,
}

impl WeightedSet {
    /// Adds a workload, or replaces the one of the same uid.
    pub(crate) fn insert(&mut self, workload: Arc<Workload>) {
        let mut hasher = DefaultHasher::new();
        workload.uid.hash(&mut hasher);
        insert(&mut self.root, workload, hasher.finish());
    }

    /// Takes the workload of that uid out, if it is there.
    pub(crate) fn remove(&mut self, uid: &str) {
        if self.contains(uid) {
            remove(&mut self.root, uid);
        }
    }

    /// Whether a workload of that uid is in the set.
    pub(crate) fn contains(&self, uid: &str) -> bool {
        let mut at = &self.root;
        while let Some(node) = at {
            at = match uid.cmp(&node.workload.uid) {
                Ordering::Less => &node.left,
                Ordering::Greater => &node.right,
                Ordering::Equal => return true,
            };
        }
        false
    }

    /// A random member, each in proportion to its capacity. None: nothing in it has any.
    pub(crate) fn pick(&self, random: &mut fastrand::Rng) -> Option<&Arc<Workload>> {
        let total = capacity(&self.root);
        if total == 0 {
            return None;
        }
        let mut left_over = random.u64(0..total);
        let mut at = &self.root;
        while let Some(node) = at {
            let left = capacity(&node.left);
            let own = u64::from(node.workload.capacity);
            if left_over < left {
                at = &node.left;
            } else if left_over - left < own {
                return Some(&node.workload);
            } else {
                left_over -= left + own;
                at = &node.right;
            }
        }
        None
    }

    /// As [`Self::pick`], of those members alone that `may` lets be. Takes O(log n) while they are not few; else it looks at
    /// every member.
    pub(crate) fn pick_if(
        &self,
        random: &mut fastrand::Rng,
        may: impl Fn(&Workload) -> bool,
    ) -> Option<&Arc<Workload>> {
        for _ in 0..DRAWS {
            let picked = self.pick(random)?;
            if may(picked) {
                return Some(picked);
            }
        }
        // Each takes the place of the one before with the probability that is its share of all so far.
        let (mut chosen, mut total) = (None, 0);
        for workload in self.iter().filter(|workload| workload.capacity > 0 && may(workload)) {
            total += u64::from(workload.capacity);
            if random.u64(0..total) < u64::from(workload.capacity) {
                chosen = Some(workload);
            }
        }
        chosen
    }

    /// Whether nothing is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.root.is_none()
    }

    /// All members, by uid.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        let mut path = Vec::new();
        descend(&self.root, &mut path);
        std::iter::from_fn(move || {
            let node: &Node = path.pop()?;
            descend(&node.right, &mut path);
            Some(&node.workload)
        })
    }
}

fn descend<'a>(mut tree: &'a Tree, path: &mut Vec<&'a Node>) {
    while let Some(node) = tree {
        path.push(node);
        tree = &node.left;
    }
}

fn capacity(tree: &Tree) -> u64 {
    tree.as_ref().map_or(0, |node| node.capacity)
}

impl Node {
    fn recount(&mut self) {
        self.capacity = u64::from(self.workload.capacity)
            .saturating_add(capacity(&self.left))
            .saturating_add(capacity(&self.right));
    }

    /// Ties are broken by uid, so that the shape stays a function of the content.
    fn above(&self, other: &Node) -> bool {
        (self.priority, &self.workload.uid) > (other.priority, &other.workload.uid)
    }
}

fn insert(tree: &mut Tree, workload: Arc<Workload>, priority: u64) {
    let Some(shared) = tree else {
        let capacity = u64::from(workload.capacity);
        *tree = Some(Arc::new(Node { workload, priority, capacity, left: None, right: None }));
        return;
    };
    let node = Arc::make_mut(shared);
    match workload.uid.cmp(&node.workload.uid) {
        Ordering::Equal => node.workload = workload,
        Ordering::Less => insert(&mut node.left, workload, priority),
        Ordering::Greater => insert(&mut node.right, workload, priority),
    }
    node.recount();
    let left_above = node.left.as_ref().is_some_and(|left| left.above(node));
    let right_above = node.right.as_ref().is_some_and(|right| right.above(node));
    if left_above {
        rotate(tree, |node| &mut node.left, |node| &mut node.right);
    } else if right_above {
        rotate(tree, |node| &mut node.right, |node| &mut node.left);
    }
}

/// Lifts the child on the `near` side above its parent.
fn rotate(tree: &mut Tree, near: fn(&mut Node) -> &mut Tree, far: fn(&mut Node) -> &mut Tree) {
    let Some(mut parent) = tree.take() else { return };
    let lower = Arc::make_mut(&mut parent);
    let Some(mut child) = near(lower).take() else {
        *tree = Some(parent);
        return;
    };
    let upper = Arc::make_mut(&mut child);
    *near(lower) = far(upper).take();
    lower.recount();
    *far(upper) = Some(parent);
    upper.recount();
    *tree = Some(child);
}

fn remove(tree: &mut Tree, uid: &str) {
    let Some(shared) = tree else { return };
    let node = Arc::make_mut(shared);
    match uid.cmp(&node.workload.uid) {
        Ordering::Equal => {
            let (left, right) = (node.left.take(), node.right.take());
            *tree = merge(left, right);
            return;
        }
        Ordering::Less => remove(&mut node.left, uid),
        Ordering::Greater => remove(&mut node.right, uid),
    }
    node.recount();
}

/// Joins two trees of which every uid of the first is less than every uid of the second.
fn merge(left: Tree, right: Tree) -> Tree {
    let (mut left, mut right) = match (left, right) {
        (None, tree) | (tree, None) => return tree,
        (Some(left), Some(right)) => (left, right),
    };
    if left.above(&right) {
        let node = Arc::make_mut(&mut left);
        node.right = merge(node.right.take(), Some(right));
        node.recount();
        Some(left)
    } else {
        let node = Arc::make_mut(&mut right);
        node.left = merge(Some(left), node.left.take());
        node.recount();
        Some(right)
    }
}

#[cfg(test)]
mod tests;
