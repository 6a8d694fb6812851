//! The guard at a pod's edge: where it stands, attaching it and asking for it.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use ztunnel_ebpf as abi;

use super::error::{CaptureError, at, program_error};
use super::loader::pin;
use super::pins::{self, Ids};
use super::{clsact, former, sys};
use crate::agent::netns::Netns;

const NAME: &str = abi::PROGRAM_GUARD;
/// The pinned link of the guard.
const LINK: &str = "guard";
/// Maps of the pod that the guard uses.
pub const MAPS: [&str; 2] = [abi::MAP_POD, abi::MAP_OLDER];
/// Maps of the node that it uses.
const NODE_MAPS: [&str; 3] = [abi::MAP_EXEMPT, abi::MAP_PROBES, abi::MAP_COUNTERS];

/// Where the guard of a pod stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// At the other end of the pod's interface, in the node's network namespace: what it receives. Nothing in the pod
    /// gets past it.
    HostEnd {
        /// Index of the device in the node's namespace.
        index: u32,
    },
    /// At the pod's own interface: what it sends. It holds processes without privileges: one that may change the pod's
    /// network can remove it, and one that may open packet sockets gets past it (`PACKET_QDISC_BYPASS`, or a VLAN tag
    /// under another protocol's name).
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

    const fn side(self) -> TcAttachType {
        match self {
            Self::HostEnd { .. } => TcAttachType::Ingress,
            Self::PodEnd { .. } => TcAttachType::Egress,
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

/// How the guard is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// By a link, which can be pinned; Linux 6.6.
    Link,
    /// As a filter of the clsact qdisc.
    Filter,
}

/// Attaches and pins the guard, by the best means that the kernel has.
///
/// # Errors
/// When the kernel refuses.
pub fn attach(object: &mut Ebpf, folder: &Path, guard: Guard, netns: &Netns) -> Result<(), CaptureError> {
    let program = load(object)?;
    match attach_by(Means::Link, program, folder, guard, netns) {
        Err(CaptureError::Program { source, .. }) if is_unknown(&source) => {
            attach_by(Means::Filter, program, folder, guard, netns)
        }
        other => other,
    }
}

/// The guard out of the object, ready to be attached.
///
/// # Errors
/// When the kernel refuses.
pub fn load(object: &mut Ebpf) -> Result<&mut SchedClassifier, CaptureError> {
    let refused = program_error(NAME);
    let program = object.program_mut(NAME).ok_or(CaptureError::Missing(NAME))?;
    let program: &mut SchedClassifier = program.try_into().map_err(&refused)?;
    program.load().map_err(&refused)?;
    Ok(program)
}

/// Attaches and pins the guard by this means.
///
/// # Errors
/// When the kernel refuses.
pub fn attach_by(
    means: Means,
    program: &mut SchedClassifier,
    folder: &Path,
    guard: Guard,
    netns: &Netns,
) -> Result<(), CaptureError> {
    let refused = program_error(NAME);
    guard.run(netns, || {
        let interface = sys::interface_name(guard.index())
            .map_err(|source| CaptureError::Namespace { what: "find the pod's interface", source })?;
        match means {
            Means::Link => {
                // Before any other: one that accepts a packet ends the row.
                let options = TcAttachOptions::TcxOrder(LinkOrder::first());
                let id = program.attach_with_options(&interface, guard.side(), options).map_err(&refused)?;
                let link = program.take_link(id).map_err(&refused)?;
                let link: FdLink = link.try_into().map_err(CaptureError::Link)?;
                pin(link, &folder.join(LINK))
            }
            Means::Filter => clsact::attach(program, folder, &interface, guard.index(), guard.side()),
        }
    })?
}

/// Whether the kernel knows nothing of such links.
fn is_unknown(error: &ProgramError) -> bool {
    match error {
        ProgramError::SyscallError(error) => {
            matches!(error.io_error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
        }
        _ => false,
    }
}

/// Asks the kernel whether the guard stands where it should and uses the maps that are pinned.
///
/// # Errors
/// When it does not.
pub fn verify(folder: &Path, guard: Guard, netns: &Netns, node_maps: &Ids) -> Result<(), CaptureError> {
    let path = folder.join(LINK);
    let elsewhere = |place: String| {
        let path = folder.display();
        Err(CaptureError::NotInForce(format!("the guard of {path} is attached to {place}, not to {guard:?}")))
    };
    let program = match sys::open_pin(&path).and_then(|link| sys::link_target(link.as_fd())) {
        Ok(link) if link.attach_type == guard.attach_type() && link.target == u64::from(guard.index()) => {
            Some(link.program_id)
        }
        Ok(link) => return elsewhere(format!("the device with index {}", link.target)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            guard.run(netns, || clsact::attached(folder, guard.index(), guard.side()))??
        }
        Err(error) => return Err(at(&path)(error)),
    };
    let Some(program) = program else { return elsewhere(String::from("another device or none")) };
    pins::verify(program, &pins::ids(folder, &MAPS)?)?;
    pins::verify(program, node_maps.iter().filter(|(name, _)| NODE_MAPS.contains(name)))
}

/// The id of the guard's program, wherever it stands; `None` if none is pinned.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn program(folder: &Path) -> Result<Option<u32>, CaptureError> {
    let path = folder.join(LINK);
    match sys::open_pin(&path).and_then(|link| sys::link_target(link.as_fd())) {
        Ok(link) => Ok(Some(link.program_id)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => clsact::program(folder),
        Err(error) => Err(at(&path)(error)),
    }
}

/// Whether a guard is attached to a device that is there. One that stands by a filter counts as long as it is pinned.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn stands(folder: &Path) -> Result<bool, CaptureError> {
    let path = folder.join(LINK);
    match sys::open_pin(&path).and_then(|link| sys::link_target(link.as_fd())) {
        Ok(link) => Ok(link.target != 0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(clsact::program(folder)?.is_some()),
        Err(error) => Err(at(&path)(error)),
    }
}

/// Takes the guard away. Nothing to do is no error.
///
/// # Errors
/// When the kernel or bpffs refuses.
pub fn remove(folder: &Path) -> Result<(), CaptureError> {
    let path = folder.join(LINK);
    former::detach(&path)?;
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&path)(error)),
        _ => {}
    }
    clsact::remove(folder)
}
