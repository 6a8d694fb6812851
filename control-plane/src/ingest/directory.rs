//! A directory of YAML as a source of objects, followed by inotify, and by looking again every few seconds for what
//! inotify does not tell (network file systems, folders that are replaced, a full event queue).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{info, warn};

use super::files::{Files, Refusal, Report};
use super::scan::{Limits, ScanError, Stamp, Unreadable, read, scan};
use super::{Batch, log_refusals};
use crate::api;
use crate::index::Event;

/// How soon a change is seen.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// A change is read once nothing more has happened for this long.
    pub quiet: Duration,
    /// But no later than this after it, however much more happens.
    pub patience: Duration,
    /// The directory is looked through this often, told or not.
    pub poll: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self { quiet: Duration::from_millis(25), patience: Duration::from_millis(250), poll: Duration::from_secs(5) }
    }
}

/// Why a directory cannot be a source at all.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// It cannot be looked through.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// It is not a directory.
    #[error("{0} is not a directory; name the directory that holds the manifests")]
    NotADirectory(PathBuf),
    /// The thread that reads it died.
    #[error("reading {0} was interrupted")]
    Interrupted(PathBuf),
}

/// The source.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    limits: Limits,
    timing: Timing,
}

/// What is known of the directory. Moves to a blocking thread and back for each look.
#[derive(Debug, Default)]
struct Known {
    files: Files,
    stamps: BTreeMap<String, Stamp>,
}

impl Directory {
    /// A source that reads the manifests below `root`.
    pub fn new(root: impl Into<PathBuf>, limits: Limits, timing: Timing) -> Self {
        Self { root: root.into(), limits, timing }
    }

    /// Reads the directory once, for whoever only wants to check it.
    ///
    /// # Errors
    /// It cannot be looked through. Files that are not valid are no error: they are in the report.
    pub fn read_once(&self) -> Result<Batch, DirectoryError> {
        if !self.root.is_dir() {
            return Err(DirectoryError::NotADirectory(self.root.clone()));
        }
        let mut known = Known::default();
        let events = known.look(&self.root, &self.limits)?;
        Ok(Batch { events, report: Arc::new(known.files.report()) })
    }

    /// Sends everything found, then every change, until the receiver is gone.
    ///
    /// # Errors
    /// The directory cannot be read at start. Later trouble is logged and tried again; what was read stays in force.
    pub async fn run(self, batches: mpsc::Sender<Batch>) -> Result<(), DirectoryError> {
        if !self.root.is_dir() {
            return Err(DirectoryError::NotADirectory(self.root));
        }
        // Watch first, look second: nothing that happens between the two is missed.
        let changed = Arc::new(Notify::new());
        let _watcher = watch(&self.root, changed.clone());
        let mut known = Known::default();
        let mut last: Option<Arc<Report>> = None;
        loop {
            let (back, result) = self.look(known).await?;
            known = back;
            let (events, trouble) = match result {
                Ok(events) => (events, None),
                Err(error) if last.is_none() => return Err(error.into()),
                Err(error) => (Vec::new(), Some(error)),
            };
            let report = Arc::new(report(&known.files, trouble.as_ref()));
            let is_news = last.as_ref() != Some(&report);
            if is_news {
                log_news(last.as_deref(), &report);
            }
            if is_news || !events.is_empty() {
                last = Some(report.clone());
                if batches.send(Batch { events, report }).await.is_err() {
                    return Ok(());
                }
            }
            tokio::select! {
                () = self.next(&changed) => {}
                () = batches.closed() => return Ok(()),
            }
        }
    }

    /// Waits until the directory should be looked at again.
    async fn next(&self, changed: &Notify) {
        let poll = Instant::now() + self.timing.poll;
        if timeout_at(poll, changed.notified()).await.is_err() {
            return;
        }
        // A file is being written, perhaps with several calls, perhaps with its neighbours.
        let latest = Instant::now() + self.timing.patience;
        loop {
            let quiet = (Instant::now() + self.timing.quiet).min(latest);
            tokio::select! {
                () = changed.notified() => {}
                () = sleep_until(quiet) => return,
            }
        }
    }

    async fn look(&self, mut known: Known) -> Result<(Known, Result<Vec<Event>, ScanError>), DirectoryError> {
        let (root, limits) = (self.root.clone(), self.limits);
        let look = tokio::task::spawn_blocking(move || {
            let result = known.look(&root, &limits);
            (known, result)
        });
        look.await.map_err(|_| DirectoryError::Interrupted(self.root.clone()))
    }
}

impl Known {
    /// Reads what is new or different since the last look.
    fn look(&mut self, root: &Path, limits: &Limits) -> Result<Vec<Event>, ScanError> {
        let stamps = scan(root, limits)?;
        let mut events = Vec::new();
        let gone: Vec<Arc<str>> =
            self.files.paths().filter(|path| !stamps.contains_key(path.as_ref())).cloned().collect();
        // What is new comes before what is gone: an object that moves from one file to another is never missing.
        for (path, stamp) in &stamps {
            if self.stamps.get(path) == Some(stamp) {
                continue;
            }
            match read(root, path, limits) {
                Ok(text) => events.extend(self.files.update(path, api::parse(&text))),
                Err(Unreadable::Gone) => {}
                Err(Unreadable::Refused(reason)) => self.files.unreadable(path, reason),
            }
        }
        for path in gone {
            events.extend(self.files.remove(&path));
        }
        self.stamps = stamps;
        Ok(events)
    }
}

/// Starts inotify. Without it changes are still found, only later.
fn watch(root: &Path, changed: Arc<Notify>) -> Option<RecommendedWatcher> {
    let told = move |event: notify::Result<notify::Event>| {
        // Reading is not a change; and our own reading would wake us for ever.
        let is_read = matches!(&event, Ok(event) if event.kind.is_access() && !closes_writing(event.kind));
        if !is_read {
            changed.notify_one();
        }
    };
    let watcher = notify::recommended_watcher(told).and_then(|mut watcher| {
        watcher.watch(root, RecursiveMode::Recursive)?;
        Ok(watcher)
    });
    watcher
        .inspect_err(|error| {
            warn!(root = %root.display(), %error, "cannot watch the directory; looking through it every few seconds instead");
        })
        .ok()
}

fn closes_writing(kind: notify::EventKind) -> bool {
    use notify::event::{AccessKind, AccessMode};
    matches!(kind, notify::EventKind::Access(AccessKind::Close(AccessMode::Write)))
}

fn report(files: &Files, trouble: Option<&ScanError>) -> Report {
    let mut report = files.report();
    if let Some(error) = trouble {
        Arc::make_mut(&mut report.refused).push(Refusal {
            file: ".".to_owned(),
            line: 0,
            object: String::new(),
            problems: vec![api::Problem::new("", error.to_string(), "")],
            keeps_last_good: true,
        });
    }
    report
}

fn log_news(before: Option<&Report>, now: &Report) {
    log_refusals(before, now);
    info!(
        files = now.files,
        accepted = now.accepted,
        ignored = now.ignored,
        refused = now.refused.len(),
        "source read"
    );
}
