//! A wildcard's first state, while it is sent: all that there is, or the differences to what the client has.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::{Limits, is_same};
use crate::server::catalog::{Draft, Kind, Whole};

/// Differences that are worth a list of their own, which each client has for itself: with more of them, and more than
/// half of what there is, all is sent, which clients share.
const MAX_DIFFERENCES: usize = 4_096;
/// Bytes of a segment of the whole state.
const SEGMENT: usize = 64 << 10;

#[derive(Debug, Default)]
pub(super) struct First {
    whole: Sending,
    /// Resources that the client does not have, or not like that.
    differences: VecDeque<Arc<str>>,
    /// What the client has, and is not there any more.
    gone: VecDeque<Arc<str>>,
}

/// The whole state.
#[derive(Debug, Default)]
enum Sending {
    /// Not any more, or not at all.
    #[default]
    Done,
    /// As it is when the response is made.
    Due,
    /// The segments from this one on.
    From(Arc<Whole>, usize),
}

impl First {
    /// For a client that has `known` in unknown versions, and `initial` in these. They are compared here and forgotten.
    pub(super) fn new(kind: &Kind, known: HashSet<Arc<str>>, mut initial: HashMap<String, String>) -> Self {
        let is_gone = |name: &str| kind.get(name).is_none();
        let mut gone: VecDeque<Arc<str>> = known.into_iter().filter(|name| is_gone(name)).collect();
        if initial.is_empty() {
            return Self { whole: Sending::Due, differences: VecDeque::new(), gone };
        }
        let mut differences = VecDeque::new();
        for (name, stored) in kind.all() {
            if !initial.remove(&**name).is_some_and(|has| is_same(&has, stored)) {
                differences.push_back(name.clone());
            }
        }
        gone.extend(initial.into_keys().map(Arc::from));
        if differences.len() > MAX_DIFFERENCES.max(kind.len() / 2) {
            return Self { whole: Sending::Due, differences: VecDeque::new(), gone };
        }
        Self { whole: Sending::Done, differences, gone }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.whole, Sending::Done) && self.differences.is_empty() && self.gone.is_empty()
    }

    /// The next part: segments of the whole state, and what goes into `draft`. `cursor` is where the log goes on.
    pub(super) fn take<'k>(
        &mut self,
        kind: &'k Kind,
        type_url: &str,
        limits: &Limits,
        cursor: &mut u64,
        draft: &mut Draft<'k>,
    ) -> Option<(Arc<Whole>, Range<usize>)> {
        let (whole, from) = match std::mem::take(&mut self.whole) {
            Sending::Done => {
                self.differ(kind, limits.max_response, *cursor, draft);
                self.remove(kind, limits.max_response, draft);
                return None;
            }
            Sending::Due => {
                let whole = kind.whole(type_url, SEGMENT.min(limits.max_first_response));
                *cursor = whole.version();
                if whole.version() == kind.version() {
                    self.remove(kind, limits.max_response, draft);
                }
                (whole, 0)
            }
            Sending::From(whole, from) => (whole, from),
        };
        let (mut to, mut size) = (from, 0);
        for segment in whole.segments(from..whole.len()) {
            if size > 0 && size + segment.bytes().len() > limits.max_first_response {
                break;
            }
            size += segment.bytes().len();
            to += 1;
        }
        if to < whole.len() {
            self.whole = Sending::From(whole.clone(), to);
        }
        Some((whole, from..to))
    }

    /// What has changed since is in the log.
    fn differ<'k>(&mut self, kind: &'k Kind, max: usize, cursor: u64, draft: &mut Draft<'k>) {
        let mut early: HashSet<&str> = HashSet::new();
        while draft.size() < max
            && let Some(name) = self.differences.pop_front()
        {
            if let Some(stored) = kind.get(&name).filter(|stored| stored.version <= cursor) {
                let differences = &mut self.differences;
                kind.tell(stored, draft, |next| {
                    let name = &next.entry.resource.name;
                    if next.version > cursor {
                        return early.insert(name);
                    }
                    // In the order of their names.
                    differences.binary_search(name).is_ok_and(|at| differences.remove(at).is_some())
                });
            }
        }
    }

    /// What has come back is in the log.
    fn remove(&mut self, kind: &Kind, max: usize, draft: &mut Draft<'_>) {
        while draft.size() < max
            && let Some(name) = self.gone.pop_front()
        {
            if kind.get(&name).is_none() {
                draft.remove(name);
            }
        }
    }
}
