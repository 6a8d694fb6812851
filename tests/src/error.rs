//! What can go wrong in the harness.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// Why the cluster, or something asked of it, could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call or a file.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A link, address or route.
    #[error("{what}: {source}")]
    Netlink {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
    /// A condition that did not come true in time.
    #[error("{what}: not within {waited:?}{log}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
        /// Tail of the log of whoever was waited for; empty where there is none.
        log: String,
    },
    /// A process that ended when it should not, or badly.
    #[error("{name} ended with {status}{log}")]
    Exited {
        /// Which process.
        name: String,
        /// How it ended.
        status: ExitStatus,
        /// Tail of its log.
        log: String,
    },
    /// The agent refused a pod.
    #[error("agent of node {node}: pod {pod}: {reason}")]
    Announce {
        /// The agent's node.
        node: usize,
        /// Name of the pod.
        pod: String,
        /// The agent's words, or what broke the conversation.
        reason: String,
    },
    /// A program that was not built.
    #[error("{0} is missing; build it with: cargo build --workspace --bins")]
    MissingProgram(PathBuf),
    /// A manifest that the harness cannot play.
    #[error("{file}: {reason}")]
    Manifest {
        /// The file, or the name given to the text.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Output of a program that was to be JSON.
    #[error("output of {what} is not the JSON expected: {reason}: {output}")]
    Output {
        /// The command.
        what: String,
        /// The parser's words.
        reason: String,
        /// What was printed.
        output: String,
    },
    /// A capture that cannot be trusted.
    #[error("capture: {0}")]
    Capture(String),
    /// Something asked for that this cluster does not have, such as a node or a part that was switched off.
    #[error("{0}")]
    Absent(String),
}

impl Error {
    /// An [`Error::Io`] for `what`.
    pub fn io(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Io { what: what.into(), source: source.into() }
    }

    pub(crate) fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let what = what.into();
        move |source| Self::Netlink { what, source }
    }
}

/// Names what was tried where an I/O result fails.
pub(crate) trait Context<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<std::io::Error>> Context<T> for Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::io(what(), source))
    }
}
