//! Why capture could not be set up, changed or checked.

use std::io;
use std::path::{Path, PathBuf};

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use aya::programs::links::LinkError;

/// Why capture could not be set up, changed or checked.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The kernel refused the object.
    #[error("cannot load the eBPF programs: {}", with_causes(.0))]
    Load(#[source] Box<EbpfError>),
    /// The kernel refused one program or its attachment.
    #[error("eBPF program {program}: {}", with_causes(.source))]
    Program {
        /// Its name in the object.
        program: &'static str,
        /// What the kernel said, with the verifier's log.
        #[source]
        source: Box<ProgramError>,
    },
    /// The object lacks something that the ABI names: it was built from other sources.
    #[error("the embedded eBPF object has no {0}; rebuild it with `cargo xtask ebpf`")]
    Missing(&'static str),
    /// A map could not be read or written.
    #[error("eBPF map {map}: {}", with_causes(.source))]
    Map {
        /// Its name.
        map: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<MapError>,
    },
    /// A pod's socket map could not be read or written.
    #[error("cannot {what} the pod's socket map: {source}")]
    Sockets {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A program could not be asked for its maps.
    #[error("cannot ask for the maps of the eBPF program {program}: {source}")]
    Maps {
        /// Its id.
        program: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A link is not what it should be.
    #[error("eBPF link: {}", with_causes(.0))]
    Link(#[source] LinkError),
    /// Something in bpffs or in the cgroup file system.
    #[error("{}: {source}", path.display())]
    Path {
        /// Where.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// A pin could not be made.
    #[error("cannot pin at {}: {why}", path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        why: String,
    },
    /// Something was asked of a pod's network namespace, and not given.
    #[error("in the pod's network namespace: cannot {what}: {source}")]
    Namespace {
        /// What.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What the kernel holds is not what was asked for.
    #[error("capture is not in force: {0}")]
    NotInForce(String),
}

impl CaptureError {
    /// Whether the kernel answered, and what was asked for is not there.
    #[must_use]
    pub fn is_absence(&self) -> bool {
        match self {
            Self::NotInForce(_) => true,
            Self::Path { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::Load(_)
            | Self::Program { .. }
            | Self::Missing(_)
            | Self::Map { .. }
            | Self::Sockets { .. }
            | Self::Maps { .. }
            | Self::Link(_)
            | Self::Namespace { .. }
            | Self::Pin { .. } => false,
        }
    }
}

pub fn map_error(map: &'static str) -> impl Fn(MapError) -> CaptureError {
    move |source| CaptureError::Map { map, source: Box::new(source) }
}

pub fn program_error(program: &'static str) -> impl Fn(ProgramError) -> CaptureError {
    move |source| CaptureError::Program { program, source: Box::new(source) }
}

pub fn at(path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> CaptureError {
    move |source| CaptureError::Path { path: path.as_ref().to_owned(), source }
}

/// An error with the causes that aya keeps below it (the verifier's log is one).
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
