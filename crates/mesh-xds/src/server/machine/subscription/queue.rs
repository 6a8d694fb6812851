//! Names in the order in which they came, none twice.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

#[derive(Debug, Default)]
pub(super) struct Queue {
    order: VecDeque<Arc<str>>,
    members: HashSet<Arc<str>>,
}

impl Queue {
    pub(super) fn push(&mut self, name: Arc<str>) {
        if self.members.insert(name.clone()) {
            self.order.push_back(name);
        }
    }

    pub(super) fn pop(&mut self) -> Option<Arc<str>> {
        // Names that were removed are still in the order.
        while let Some(name) = self.order.pop_front() {
            if self.members.remove(&name) {
                return Some(name);
            }
        }
        None
    }

    /// Returns whether it was there.
    pub(super) fn remove(&mut self, name: &str) -> bool {
        let was_there = self.members.remove(name);
        // Whoever asks for names and takes them back again and again must not make it grow.
        if self.members.is_empty() {
            self.order.clear();
        }
        was_there
    }

    pub(super) fn clear(&mut self) {
        self.order.clear();
        self.members.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
}
