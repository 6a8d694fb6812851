//! What lies at which address, and in which block of addresses.

use std::cmp::Ordering;
use std::hash::Hash;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use imbl::{HashMap, OrdMap};

use crate::address::Cidr;

/// A list that is never empty and mostly of one item, which then takes no memory of its own.
#[derive(Debug)]
pub(crate) enum Few<T> {
    One(Arc<T>),
    Many(Arc<[Arc<T>]>),
}

impl<T> Clone for Few<T> {
    fn clone(&self) -> Self {
        match self {
            Self::One(item) => Self::One(Arc::clone(item)),
            Self::Many(items) => Self::Many(Arc::clone(items)),
        }
    }
}

impl<T> Few<T> {
    /// None of an empty list.
    fn new(items: Vec<Arc<T>>) -> Option<Self> {
        match <[Arc<T>; 1]>::try_from(items) {
            Ok([item]) => Some(Self::One(item)),
            Err(items) if items.is_empty() => None,
            Err(items) => Some(Self::Many(items.into())),
        }
    }
}

impl<T> Deref for Few<T> {
    type Target = [Arc<T>];

    fn deref(&self) -> &[Arc<T>] {
        match self {
            Self::One(item) => std::slice::from_ref(item),
            Self::Many(items) => items,
        }
    }
}

/// Short lists of items by block, to be found by an address in it.
#[derive(Debug, Clone)]
pub(crate) struct Blocks<T> {
    lists: HashMap<Cidr, Few<T>>,
    /// How many blocks there are of each prefix length, IPv4 and IPv6 together.
    lengths: OrdMap<u8, usize>,
}

impl<T> Default for Blocks<T> {
    fn default() -> Self {
        Self { lists: HashMap::new(), lengths: OrdMap::new() }
    }
}

impl<T> Blocks<T> {
    /// Adds to the block's list, which is kept in `order`, in which no two different items are equal.
    pub(crate) fn insert(&mut self, block: Cidr, item: &Arc<T>, order: impl Fn(&T, &T) -> Ordering) {
        if !self.lists.contains_key(&block) {
            *self.lengths.entry(block.length()).or_default() += 1;
        }
        add_to(&mut self.lists, block, item, order);
    }

    /// Takes the items that `is_it` tells out of the block's list.
    pub(crate) fn remove(&mut self, block: &Cidr, is_it: impl Fn(&T) -> bool) {
        if !remove_from(&mut self.lists, block, is_it) {
            return;
        }
        let length = block.length();
        if let Some(count) = self.lengths.get_mut(&length) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&length);
            }
        }
    }

    /// The prefix lengths that blocks have.
    #[cfg(test)]
    pub(crate) fn lengths(&self) -> Vec<u8> {
        self.lengths.keys().copied().collect()
    }

    /// Every block that holds `ip`, the narrowest first, with its list.
    pub(crate) fn around(&self, ip: IpAddr) -> impl Iterator<Item = (Cidr, &Few<T>)> {
        self.lengths.keys().rev().filter_map(move |length| {
            let block = Cidr::new(ip.to_canonical(), u32::from(*length)).ok()?;
            self.lists.get(&block).map(|list| (block, list))
        })
    }
}

/// Adds to a short list that is kept in `order`, in which no two different items are equal.
pub(crate) fn add_to<K, T>(lists: &mut HashMap<K, Few<T>>, key: K, item: &Arc<T>, order: impl Fn(&T, &T) -> Ordering)
where
    K: Hash + Eq + Clone,
{
    let mut list: Vec<Arc<T>> = lists.get(&key).map_or_else(Vec::new, |list| list.to_vec());
    match list.binary_search_by(|other| order(other, item)) {
        Ok(at) => list[at] = Arc::clone(item),
        Err(at) => list.insert(at, Arc::clone(item)),
    }
    if let Some(list) = Few::new(list) {
        lists.insert(key, list);
    }
}

/// Takes the items that `is_it` tells out of a list; true when nothing is left of it.
pub(crate) fn remove_from<K, T>(lists: &mut HashMap<K, Few<T>>, key: &K, is_it: impl Fn(&T) -> bool) -> bool
where
    K: Hash + Eq + Clone,
{
    let Some(list) = lists.get(key) else { return false };
    match Few::new(list.iter().filter(|item| !is_it(item)).cloned().collect()) {
        None => {
            lists.remove(key);
            true
        }
        Some(left) => {
            lists.insert(key.clone(), left);
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_one_take_no_memory_of_their_own() {
        assert_eq!(size_of::<Few<u64>>(), size_of::<Arc<[u64]>>());
        let mut lists: HashMap<u8, Few<u64>> = HashMap::new();
        for number in [3, 1, 2, 1] {
            add_to(&mut lists, 7, &Arc::new(number), Ord::cmp);
        }
        let of =
            |lists: &HashMap<u8, Few<u64>>| lists.get(&7).map(|list| list.iter().map(|one| **one).collect::<Vec<_>>());
        assert_eq!(of(&lists), Some(vec![1, 2, 3]));
        assert!(!remove_from(&mut lists, &7, |one| *one != 2));
        assert!(matches!(lists.get(&7), Some(Few::One(one)) if **one == 2));
        assert!(!remove_from(&mut lists, &7, |one| *one == 9));
        assert!(remove_from(&mut lists, &7, |one| *one == 2));
        assert_eq!(of(&lists), None);
    }
}
