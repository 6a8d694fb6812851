//! Resources and removals of one type, encoded for a response.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::kind::{Progress, Stored};
use crate::server::encode;

/// Some changes, encoded.
#[derive(Debug, Default)]
pub(in crate::server) struct Part {
    bytes: Bytes,
    names: Vec<Arc<str>>,
    resources: usize,
    upto: Progress,
}

impl Part {
    /// Fields of a response.
    pub(in crate::server) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Every name in it, set or removed.
    pub(in crate::server) fn names(&self) -> &[Arc<str>] {
        &self.names
    }

    /// Resources in it.
    pub(in crate::server) fn resources(&self) -> usize {
        self.resources
    }

    /// How far whoever was told it is, if it tells of changes.
    pub(in crate::server) fn upto(&self) -> Progress {
        self.upto
    }

    pub(in crate::server) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }
}

/// Gathers what goes into a [`Part`] before anything is encoded: so that it has the size that it needs.
#[derive(Debug)]
pub(in crate::server) struct Draft<'k> {
    type_url: &'k str,
    set: Vec<&'k Arc<Stored>>,
    removed: Vec<Arc<str>>,
    size: usize,
}

impl<'k> Draft<'k> {
    /// Nothing yet.
    pub(in crate::server) fn new(type_url: &'k str) -> Self {
        Self { type_url, set: Vec::new(), removed: Vec::new(), size: 0 }
    }

    /// Bytes so far.
    pub(in crate::server) fn size(&self) -> usize {
        self.size
    }

    pub(in crate::server) fn set(&mut self, stored: &'k Arc<Stored>) {
        self.size += encode::resource_len(self.type_url, &stored.entry.resource);
        self.set.push(stored);
    }

    pub(in crate::server) fn remove(&mut self, name: Arc<str>) {
        self.size += encode::removed_len(&name);
        self.removed.push(name);
    }

    /// Encodes it; `upto` is how far whoever was told it is.
    pub(in crate::server) fn finish(self, upto: Progress) -> Part {
        let mut bytes = BytesMut::with_capacity(self.size);
        for stored in &self.set {
            encode::resource(self.type_url, &stored.entry.resource, &mut bytes);
        }
        for name in &self.removed {
            encode::removed(name, &mut bytes);
        }
        let resources = self.set.len();
        let mut names = Vec::with_capacity(resources + self.removed.len());
        names.extend(self.set.iter().map(|stored| stored.entry.resource.name.clone()));
        names.extend(self.removed);
        Part { bytes: bytes.freeze(), names, resources, upto }
    }
}
