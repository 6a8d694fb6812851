//! What lies at which address, and in which block of addresses.

use std::cmp::Ordering;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::{HashMap, OrdMap};

use crate::address::Cidr;

/// Short lists of items by block, to be found by an address in it.
#[derive(Debug, Clone)]
pub(crate) struct Blocks<T> {
    lists: HashMap<Cidr, Arc<[Arc<T>]>>,
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
    pub(crate) fn around(&self, ip: IpAddr) -> impl Iterator<Item = (Cidr, &Arc<[Arc<T>]>)> {
        self.lengths.keys().rev().filter_map(move |length| {
            let block = Cidr::new(ip.to_canonical(), u32::from(*length)).ok()?;
            self.lists.get(&block).map(|list| (block, list))
        })
    }
}

/// Adds to a short list that is kept in `order`, in which no two different items are equal.
pub(crate) fn add_to<K, T>(
    lists: &mut HashMap<K, Arc<[Arc<T>]>>,
    key: K,
    item: &Arc<T>,
    order: impl Fn(&T, &T) -> Ordering,
) where
    K: Hash + Eq + Clone,
{
    let mut list: Vec<Arc<T>> = lists.get(&key).map_or_else(Vec::new, |list| list.to_vec());
    match list.binary_search_by(|other| order(other, item)) {
        Ok(at) => list[at] = Arc::clone(item),
        Err(at) => list.insert(at, Arc::clone(item)),
    }
    lists.insert(key, list.into());
}

/// Takes the items that `is_it` tells out of a list; true when nothing is left of it.
pub(crate) fn remove_from<K, T>(lists: &mut HashMap<K, Arc<[Arc<T>]>>, key: &K, is_it: impl Fn(&T) -> bool) -> bool
where
    K: Hash + Eq + Clone,
{
    let Some(list) = lists.get(key) else { return false };
    let left: Arc<[Arc<T>]> = list.iter().filter(|item| !is_it(item)).cloned().collect();
    if left.is_empty() {
        lists.remove(key);
        return true;
    }
    lists.insert(key.clone(), left);
    false
}
