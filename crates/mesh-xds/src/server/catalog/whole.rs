//! The whole state of one type, encoded in segments: what every client gets first. All of them share its bytes, and a
//! later state shares the segments in which nothing has changed.

use std::collections::BTreeSet;
use std::ops::{Bound, Range};
use std::sync::Arc;

use bytes::Bytes;

use super::kind::{Kind, Progress, Stored};
use super::part::Draft;

/// Resources that follow each other by name.
#[derive(Clone, Debug)]
pub(in crate::server) struct Segment {
    first: Arc<str>,
    bytes: Bytes,
    resources: usize,
}

impl Segment {
    /// Fields of a response.
    pub(in crate::server) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Resources in it.
    pub(in crate::server) fn resources(&self) -> usize {
        self.resources
    }
}

/// Every resource of a type at one version.
#[derive(Debug)]
pub(in crate::server) struct Whole {
    version: u64,
    /// Bytes that a segment has at least, but for the last of a range.
    size: usize,
    segments: Vec<Segment>,
}

impl Whole {
    /// The version of the type that this is.
    pub(in crate::server) fn version(&self) -> u64 {
        self.version
    }

    /// Bytes of a segment.
    pub(in crate::server) fn size(&self) -> usize {
        self.size
    }

    /// Those segments; none where there are none.
    pub(in crate::server) fn segments(&self, range: Range<usize>) -> &[Segment] {
        self.segments.get(range).unwrap_or_default()
    }

    /// How many segments there are.
    pub(in crate::server) fn len(&self) -> usize {
        self.segments.len()
    }

    /// Encodes everything.
    pub(super) fn new(kind: &Kind, type_url: &str, size: usize) -> Self {
        let mut segments = Vec::new();
        encode(kind.range((Bound::Unbounded, Bound::Unbounded)), type_url, size, &mut segments);
        Self { version: kind.version(), size, segments }
    }

    /// The state of now, which must not be older, from this one; none if that is not worth it.
    pub(super) fn refreshed(&self, kind: &Kind, type_url: &str) -> Option<Self> {
        let mut touched = BTreeSet::new();
        for (_, name) in kind.changed_since(self.version).ok()? {
            touched.insert(self.segments.partition_point(|segment| segment.first <= *name).saturating_sub(1));
        }
        // Much has changed, or segments have become many and small.
        let bytes: usize = self.segments.iter().map(|segment| segment.bytes.len()).sum();
        if touched.len() * 2 > self.segments.len() || self.segments.len() > 16 + 2 * bytes / self.size.max(1) {
            return None;
        }
        let mut segments = Vec::with_capacity(self.segments.len() + 1);
        for (at, segment) in self.segments.iter().enumerate() {
            if !touched.contains(&at) {
                segments.push(segment.clone());
                continue;
            }
            let from = if at == 0 { Bound::Unbounded } else { Bound::Included(&segment.first) };
            let to = self.segments.get(at + 1).map_or(Bound::Unbounded, |next| Bound::Excluded(&next.first));
            // It may grow for a while, rather than leave a small one behind.
            encode(kind.range((from, to)), type_url, 2 * self.size, &mut segments);
        }
        Some(Self { version: kind.version(), size: self.size, segments })
    }
}

fn encode<'k>(
    entries: impl Iterator<Item = (&'k Arc<str>, &'k Arc<Stored>)>,
    type_url: &'k str,
    size: usize,
    segments: &mut Vec<Segment>,
) {
    let mut draft = Draft::new(type_url);
    let mut first: Option<Arc<str>> = None;
    let mut end = |draft: Draft<'_>, first: Option<Arc<str>>| {
        if let Some(first) = first {
            let part = draft.finish(Progress::default());
            segments.push(Segment { first, bytes: part.bytes().clone(), resources: part.resources() });
        }
    };
    for (name, stored) in entries {
        first.get_or_insert_with(|| name.clone());
        draft.set(stored);
        if draft.size() >= size {
            end(std::mem::replace(&mut draft, Draft::new(type_url)), first.take());
        }
    }
    end(draft, first);
}
