//! What became of objects, for whoever tells their authors: what the newest version of each says, and whether it is valid.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::watch;

use super::raw::Raw;
use crate::api::{Kind, Object, ObjectId, Problem};

/// What became of the newest version of an object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict {
    /// The API version in which it was read, `group/version`.
    pub(crate) api_version: Box<str>,
    /// Kubernetes' unique id of this very object.
    pub(crate) uid: Box<str>,
    /// The version that this is about; opaque.
    pub(crate) version: Box<str>,
    /// Number of the specification; 0 for kinds that do not count.
    pub(crate) generation: i64,
    /// Of a Gateway its class, of a class its controller, as far as that can be read; empty for other kinds.
    pub(crate) belongs_to: Box<str>,
    /// The conditions in its status, as they stand.
    pub(crate) conditions: Vec<Value>,
    /// What it is.
    pub(crate) outcome: Outcome,
}

/// Whether an object is valid.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// It is, and in force.
    Valid(Object),
    /// It is not.
    Refused {
        /// Every mistake found.
        problems: Vec<Problem>,
        /// An earlier version of it stays in force.
        keeps_last_good: bool,
    },
}

impl Verdict {
    /// About the version `raw`; none where nobody is told of it.
    pub(super) fn new(kind: Kind, raw: &Raw, outcome: Outcome) -> Option<Self> {
        if !is_told(kind) && matches!(outcome, Outcome::Valid(_)) {
            return None;
        }
        let conditions = raw.value.pointer("/status/conditions").and_then(Value::as_array).cloned();
        // Items of a list do not say it; those of kinds with several versions do.
        let api_version = raw.value.get("apiVersion").and_then(Value::as_str).unwrap_or(kind.api_version());
        Some(Self {
            api_version: api_version.into(),
            uid: raw.uid().into(),
            version: raw.version().into(),
            generation: raw.value.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or_default(),
            belongs_to: belongs_to(kind, raw).unwrap_or_default().into(),
            conditions: conditions.filter(|_| is_told(kind)).unwrap_or_default(),
            outcome,
        })
    }
}

fn belongs_to(kind: Kind, raw: &Raw) -> Option<&str> {
    let field = match kind {
        Kind::Gateway => "/spec/gatewayClassName",
        Kind::GatewayClass => "/spec/controllerName",
        _ => return None,
    };
    raw.value.pointer(field).and_then(Value::as_str)
}

/// Whether something is written about valid objects of the kind, or depends on them. Others are told of mistakes alone.
pub(super) fn is_told(kind: Kind) -> bool {
    match kind {
        Kind::Namespace
        | Kind::Service
        | Kind::AuthorizationPolicy
        | Kind::PeerAuthentication
        | Kind::ServiceEntry
        | Kind::WorkloadEntry
        | Kind::Gateway
        | Kind::GatewayClass => true,
        Kind::Node | Kind::ServiceAccount | Kind::Deployment | Kind::EndpointSlice | Kind::Pod => false,
    }
}

/// By object. Cheap to clone; clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Verdicts(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    all: Mutex<BTreeMap<ObjectId, Arc<Verdict>>>,
    changed: watch::Sender<()>,
}

impl Verdicts {
    /// Takes in what changed; none for objects of which there is nothing to tell any more.
    pub(super) fn update(&self, changes: Vec<(ObjectId, Option<Verdict>)>) {
        if changes.is_empty() {
            return;
        }
        let mut all = self.lock();
        for (id, verdict) in changes {
            match verdict {
                Some(verdict) => all.insert(id, Arc::new(verdict)),
                None => all.remove(&id),
            };
        }
        drop(all);
        self.0.changed.send_replace(());
    }

    /// All as they are now.
    pub(crate) fn all(&self) -> BTreeMap<ObjectId, Arc<Verdict>> {
        self.lock().clone()
    }

    /// Follows changes.
    pub(crate) fn changed(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ObjectId, Arc<Verdict>>> {
        self.0.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
