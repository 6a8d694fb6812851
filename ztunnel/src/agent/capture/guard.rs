//! The guard at a pod's edge: where it stands, attaching it and asking for it.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use ztunnel_ebpf as abi;

use super::error::{CaptureError, at, program_error};
use super::loader::pin;
use super::{former, sys};
use crate::agent::netns::Netns;

/// The pinned link of the guard.
const LINK: &str = "guard";

/// Where the guard of a pod stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// At the other end of the pod's interface, in the node's network namespace: what it receives. Nothing in the pod
    /// gets past it.
    HostEnd {
        /// Index of the device in the node's namespace.
        index: u32,
    },
    /// At the pod's own interface: what it sends. A process in the pod that may change its network can remove it.
    PodEnd {
        /// Index of the device in the pod's namespace.
        index: u32,
    },
}

impl Guard {
    const fn index(self) -> u32 {
        match self {
            Self::HostEnd { index } | Self::PodEnd { index } => index,
        }
    }

    const fn attach_type(self) -> u32 {
        match self {
            Self::HostEnd { .. } => sys::ATTACH_TCX_INGRESS,
            Self::PodEnd { .. } => sys::ATTACH_TCX_EGRESS,
        }
    }

    /// Runs something in the network namespace of the device.
    fn run<T: Send>(self, netns: &Netns, work: impl FnOnce() -> T + Send) -> Result<T, CaptureError> {
        match self {
            Self::HostEnd { .. } => Ok(work()),
            Self::PodEnd { .. } => netns
                .run(work)
                .map_err(|error| CaptureError::Namespace { what: "attach the guard", source: io::Error::other(error) }),
        }
    }
}

/// Attaches and pins the guard.
///
/// # Errors
/// When the kernel refuses.
pub fn attach(object: &mut Ebpf, folder: &Path, guard: Guard, netns: &Netns) -> Result<(), CaptureError> {
    const NAME: &str = abi::PROGRAM_GUARD;
    let refused = program_error(NAME);
    let program = object.program_mut(NAME).ok_or(CaptureError::Missing(NAME))?;
    let program: &mut SchedClassifier = program.try_into().map_err(&refused)?;
    program.load().map_err(&refused)?;
    let id = guard.run(netns, || {
        let interface = sys::interface_name(guard.index())
            .map_err(|source| CaptureError::Namespace { what: "find the pod's interface", source })?;
        let side = match guard {
            Guard::HostEnd { .. } => TcAttachType::Ingress,
            Guard::PodEnd { .. } => TcAttachType::Egress,
        };
        // Before any other: one that accepts a packet ends the row.
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        program.attach_with_options(&interface, side, options).map_err(&refused)
    })??;
    let link = program.take_link(id).map_err(&refused)?;
    let link: FdLink = link.try_into().map_err(CaptureError::Link)?;
    pin(link, &folder.join(LINK))
}

/// Asks the kernel whether the guard stands where it should.
///
/// # Errors
/// When it does not.
pub fn verify(folder: &Path, guard: Guard, _netns: &Netns) -> Result<(), CaptureError> {
    let path = folder.join(LINK);
    let link = sys::open_pin(&path).and_then(|link| sys::link_target(link.as_fd())).map_err(at(&path))?;
    if link.attach_type == guard.attach_type() && link.target == u64::from(guard.index()) {
        return Ok(());
    }
    Err(CaptureError::NotInForce(format!(
        "{} is attached to the device with index {}, not to {guard:?}",
        path.display(),
        link.target
    )))
}

/// Takes the guard away. Nothing to do is no error.
///
/// # Errors
/// When the kernel or bpffs refuses.
pub fn remove(folder: &Path) -> Result<(), CaptureError> {
    let path = folder.join(LINK);
    former::detach(&path)?;
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&path)(error)),
        _ => Ok(()),
    }
}
