//! How the watches are doing, for metrics and people.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::api::Kind;

/// The watches of a source, one for each kind. Cheap to clone; empty for sources that watch nothing.
#[derive(Clone, Debug, Default)]
pub struct Watches(Arc<[Arc<KindStatus>]>);

impl Watches {
    pub(super) fn new(kinds: impl IntoIterator<Item = Kind>) -> Self {
        Self(kinds.into_iter().map(|kind| Arc::new(KindStatus::new(kind))).collect())
    }

    pub(super) fn of(&self, kind: Kind) -> Arc<KindStatus> {
        let found = self.0.iter().find(|status| status.kind == kind);
        found.cloned().unwrap_or_else(|| Arc::new(KindStatus::new(kind)))
    }

    /// What is to be said of each, now.
    pub fn reports(&self) -> Vec<(Kind, KindReport)> {
        self.0.iter().map(|status| (status.kind, status.lock().clone())).collect()
    }
}

/// One watch.
#[derive(Debug)]
pub(super) struct KindStatus {
    kind: Kind,
    report: Mutex<KindReport>,
}

/// How one watch is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindReport {
    /// How far it is.
    pub state: WatchState,
    /// Lists begun; the second and later ones are restarts.
    pub lists: u64,
    /// Errors, those of the connection included.
    pub failures: u64,
    /// When something was last heard.
    pub last_event: Option<SystemTime>,
    /// What is wrong now.
    pub trouble: Option<String>,
}

/// How far a watch is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WatchState {
    /// The first list is not complete.
    #[default]
    Pending,
    /// There was a complete list; from then on changes are followed, whatever errors come between.
    Synced,
    /// The cluster does not have the kind.
    Absent,
}

impl WatchState {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Synced => "synced",
            Self::Absent => "absent",
        }
    }
}

impl KindStatus {
    fn new(kind: Kind) -> Self {
        Self { kind, report: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, KindReport> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn list_began(&self) {
        self.lock().lists += 1;
    }

    /// The list is complete. Returns whether it was the first.
    pub(super) fn list_ended(&self) -> bool {
        let mut report = self.lock();
        let is_first = report.state != WatchState::Synced;
        report.state = WatchState::Synced;
        is_first
    }

    /// The kind does not exist. Returns whether that is news.
    pub(super) fn is_missing(&self) -> bool {
        let mut report = self.lock();
        let is_news = report.state != WatchState::Absent;
        report.state = WatchState::Absent;
        report.trouble = None;
        is_news
    }

    /// Something was heard. Returns whether there was trouble before.
    pub(super) fn heard(&self, now: SystemTime) -> bool {
        let mut report = self.lock();
        report.last_event = Some(now);
        report.trouble.take().is_some()
    }

    /// Something failed. Returns whether it is the first failure since something was heard.
    pub(super) fn failed(&self, trouble: &str) -> bool {
        let mut report = self.lock();
        report.failures += 1;
        report.trouble.replace(trouble.to_owned()).is_none()
    }
}
