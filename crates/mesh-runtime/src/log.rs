//! Logs: one event per line on standard output, as text or JSON, with RFC 3339 times and levels that can be changed
//! while the process runs. The access log is the target [`ACCESS`].

mod format;
mod writer;

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, Registry, reload};

/// The target of the access log: one event per connection or request.
pub const ACCESS: &str = "access";

/// Most targets with a level of their own, so that the admin page cannot grow the filter without end.
const MAX_TARGETS: usize = 64;

/// How events are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `<RFC 3339 time> <level> <target> <message> key=value ...`
    #[default]
    Text,
    /// One JSON object per event.
    Json,
}

impl FromStr for Format {
    type Err = LogError;

    fn from_str(text: &str) -> Result<Self, LogError> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(LogError::Format(other.to_owned())),
        }
    }
}

/// Why logs could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Not `text` or `json`.
    #[error("unknown log format {0:?}: want text or json")]
    Format(String),
    /// Not a level, or not `target:level`.
    #[error("invalid log level {0:?}: want off, error, warn, info, debug or trace, or target:level")]
    Level(String),
    /// Too many targets have a level of their own.
    #[error("at most {MAX_TARGETS} targets can have a level of their own")]
    TooManyTargets,
    /// The process already has a subscriber.
    #[error("logs were already set up")]
    AlreadySet,
    /// The thread that writes could not be started.
    #[error("cannot start the thread that writes the log: {0}")]
    Thread(#[from] std::io::Error),
}

/// Sets up the process's logs. `level` is a level, or a comma-separated list of levels and `target=level`.
///
/// A thread of its own writes, so that a slow reader of standard output does not stop the process; when too much is
/// waiting, events are dropped, and the drop is counted in the log itself.
pub fn init(level: &str, format: Format) -> Result<LogHandle, LogError> {
    let targets = parse(level)?;
    let (filter, reload) = reload::Layer::new(targets.clone());
    let sink = writer::Sink::start(std::io::stdout())?;
    let layer = tracing_subscriber::fmt::layer().with_writer(sink.clone()).with_ansi(false);
    let layer = match format {
        Format::Text => layer.event_format(format::Text).fmt_fields(format::Fields).boxed(),
        Format::Json => layer.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(layer).try_init().map_err(|_| LogError::AlreadySet)?;
    Ok(LogHandle(Arc::new(Inner { targets: Mutex::new(targets), reload: Some(reload), sink: Some(sink) })))
}

/// The process's logs while it runs. Cheap to clone. When the last clone is dropped, what is waiting is written.
#[derive(Clone)]
pub struct LogHandle(Arc<Inner>);

struct Inner {
    targets: Mutex<Targets>,
    reload: Option<reload::Handle<Targets, Registry>>,
    sink: Option<writer::Sink>,
}

impl LogHandle {
    /// A handle that changes no log: for tests of what uses one.
    pub fn detached(level: &str) -> Result<Self, LogError> {
        Ok(Self(Arc::new(Inner { targets: Mutex::new(parse(level)?), reload: None, sink: None })))
    }

    /// The levels in force, in the form that [`init`] takes.
    pub fn directives(&self) -> String {
        self.0.targets.lock().unwrap_or_else(PoisonError::into_inner).to_string()
    }

    /// Sets the default level (`debug`) or one target's (`mesh_xds:debug`), or several, separated by commas: all or,
    /// if one is invalid, none.
    pub fn set(&self, levels: &str) -> Result<(), LogError> {
        let mut targets = self.0.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = targets.clone();
        for level in levels.split(',') {
            changed = apply(changed, level)?;
        }
        if let Some(reload) = &self.0.reload {
            // Fails only if the subscriber is gone, and then there is nothing to set.
            let _ = reload.reload(changed.clone());
        }
        *targets = changed;
        Ok(())
    }

    /// Waits until what is waiting is written, at most `timeout`. For the end of the process.
    pub fn flush(&self, timeout: Duration) {
        if let Some(sink) = &self.0.sink {
            sink.flush(timeout);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(sink) = &self.sink {
            sink.flush(Duration::from_secs(1));
        }
    }
}

impl fmt::Debug for LogHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LogHandle").field(&self.directives()).finish()
    }
}

fn parse(levels: &str) -> Result<Targets, LogError> {
    levels.split(',').try_fold(Targets::new().with_default(LevelFilter::INFO), apply)
}

fn apply(targets: Targets, level: &str) -> Result<Targets, LogError> {
    let invalid = || LogError::Level(level.to_owned());
    let Some((target, name)) = level.rsplit_once([':', '=']) else {
        return Ok(targets.with_default(parse_level(level).ok_or_else(invalid)?));
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | ':' | '.');
    if target.is_empty() || target.len() > 128 || !target.chars().all(allowed) {
        return Err(invalid());
    }
    let level = parse_level(name).ok_or_else(invalid)?;
    let targets = targets.with_target(target, level);
    if targets.iter().count() > MAX_TARGETS { Err(LogError::TooManyTargets) } else { Ok(targets) }
}

fn parse_level(name: &str) -> Option<LevelFilter> {
    // LevelFilter's own parser also takes numbers and the empty string.
    match name.to_ascii_lowercase().as_str() {
        "off" => Some(LevelFilter::OFF),
        "error" => Some(LevelFilter::ERROR),
        "warn" | "warning" => Some(LevelFilter::WARN),
        "info" => Some(LevelFilter::INFO),
        "debug" => Some(LevelFilter::DEBUG),
        "trace" => Some(LevelFilter::TRACE),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
