//! Names in the order in which they came, none twice.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Places of names that were taken back, beside as many as there are names, that are kept before they are cleared away.
const SPARE: usize = 32;

#[derive(Debug, Default)]
pub(super) struct Queue {
    /// Who came as which; those that were taken back meanwhile too.
    order: VecDeque<(u64, Arc<str>)>,
    /// As which each came last.
    members: HashMap<Arc<str>, u64>,
    next: u64,
}

impl Queue {
    pub(super) fn push(&mut self, name: Arc<str>) {
        if self.members.contains_key(&name) {
            return;
        }
        self.members.insert(name.clone(), self.next);
        self.order.push_back((self.next, name));
        self.next += 1;
    }

    pub(super) fn pop(&mut self) -> Option<Arc<str>> {
        while let Some((number, name)) = self.order.pop_front() {
            if self.members.get(&name) == Some(&number) {
                self.members.remove(&name);
                return Some(name);
            }
        }
        None
    }

    /// Returns whether it was there.
    pub(super) fn remove(&mut self, name: &str) -> bool {
        let was_there = self.members.remove(name).is_some();
        // Whoever asks for names and takes them back again and again does not make it grow.
        if self.order.len() > 2 * self.members.len() + SPARE {
            self.order.retain(|(number, name)| self.members.get(name) == Some(number));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_out_in_the_order_in_which_they_came_last() {
        let mut queue = Queue::default();
        for name in ["a", "b", "c", "a"] {
            queue.push(name.into());
        }
        assert!(queue.remove("a") && !queue.remove("a") && !queue.remove("z"));
        queue.push("a".into());
        let all: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(all, ["b".into(), "c".into(), "a".into()]);
        assert!(queue.is_empty());
    }

    #[test]
    fn what_is_taken_back_again_and_again_takes_no_room() {
        let mut queue = Queue::default();
        queue.push("stays".into());
        for number in 0..10_000 {
            for name in ["same".to_owned(), format!("other{number}")] {
                queue.push(name.as_str().into());
                assert!(queue.remove(&name));
            }
        }
        assert!(queue.order.len() <= 2 + SPARE, "{}", queue.order.len());
        assert_eq!(queue.pop(), Some("stays".into()));
    }
}
