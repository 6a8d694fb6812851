//! Why a command cannot answer. Each says what to do about it; the exit code is 2.

use std::io;
use std::time::Duration;

/// Why a command cannot answer at all. What single nodes or pods do not answer is part of the answer instead.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// There are no usable credentials.
    #[error("cannot use the kubeconfig {origin}: {reason}; correct it, or name another with --kubeconfig or --context")]
    Kubeconfig {
        /// The file.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The API server does not answer.
    #[error(
        "the API server {url} cannot be reached: {reason}; is it the right one? It is that of the kubeconfig {origin}, \
         --kubeconfig and --context name another"
    )]
    Unreachable {
        /// Where.
        url: String,
        /// The kubeconfig that names it.
        origin: String,
        /// What was tried.
        reason: String,
    },
    /// It does not let this user in at all.
    #[error("the API server {url} does not know this user: {reason}; renew the credentials in the kubeconfig {origin}")]
    Unknown {
        /// Where.
        url: String,
        /// The kubeconfig that names it.
        origin: String,
        /// What it says.
        reason: String,
    },
    /// This user may not ask that.
    #[error("not allowed to list {what}: {reason}; `culvert --help` names the rights that are needed")]
    Forbidden {
        /// Which objects.
        what: String,
        /// What the API server says.
        reason: String,
    },
    /// The API server answers with an error.
    #[error("cannot get {what}: {reason}")]
    Api {
        /// Which objects.
        what: String,
        /// What it says.
        reason: String,
    },
    /// What was named is not there.
    #[error("{0}")]
    NotFound(String),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// No runtime, no signals.
    #[error("cannot start: {0}")]
    Runtime(#[source] io::Error),
    /// The answer cannot be written.
    #[error("cannot write the answer: {0}")]
    Write(#[source] io::Error),
    /// The answer has no JSON form.
    #[error("cannot write the answer as JSON: {0}")]
    Json(#[source] serde_json::Error),
}

/// Why one pod of the mesh does not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// It does not run.
    #[error("it does not run: {0}")]
    NotRunning(String),
    /// No answer in time.
    #[error("no answer within {0:?}; try --timeout, or look at its log")]
    Timeout(Duration),
    /// This user may not.
    #[error("not allowed ({reason}); get and create on {resource} are needed")]
    Forbidden {
        /// The subresource.
        resource: &'static str,
        /// What the API server says.
        reason: String,
    },
    /// The API server, the kubelet or the pod broke the connection.
    #[error("the connection failed: {0}")]
    Connection(String),
    /// It answers with an error.
    #[error("it answers {0}")]
    Status(String),
    /// It answers more than is read.
    #[error("its answer is longer than {} MiB", .0 >> 20)]
    TooLong(usize),
    /// It answers something else.
    #[error("its answer is not understood: {0}")]
    Malformed(String),
}
