//! What agents of other versions pinned: it stays in force beside this version's programs until it is removed.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use aya::maps::{MapData, SkStorage};
use ztunnel_ebpf as abi;

use super::error::{CaptureError, at, map_error};
use super::loader::open_map;
use super::{Pods, Raw, folders, layout, remove_pod, sys};

/// Bytes of a pod's entry in layout 1.
const POD_ENTRY_V1: usize = 24;

/// Another layout: as long as its connect hooks run, they must know the proxy's sockets too.
pub struct Former {
    version: u32,
    exempt: Option<SkStorage<MapData, u32>>,
    pods: Option<Pods<POD_ENTRY_V1>>,
}

impl Former {
    /// Its version.
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// Exempts a socket from its hooks.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn exempt(&mut self, socket: BorrowedFd<'_>) -> Result<(), CaptureError> {
        let Some(exempt) = &mut self.exempt else { return Ok(()) };
        exempt.insert(&Raw(socket), 1, 0).map_err(map_error(abi::MAP_EXEMPT))
    }

    /// Takes a namespace out of its map of pods.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn release(&mut self, cookie: u64) -> Result<(), CaptureError> {
        let Some(pods) = &mut self.pods else { return Ok(()) };
        remove_pod(pods, cookie)
    }
}

/// Other layouts that are pinned.
///
/// # Errors
/// When bpffs cannot be read.
pub fn find(bpffs: &Path) -> Result<Vec<Former>, CaptureError> {
    let versions = versions(bpffs)?.into_iter().filter(|version| *version != abi::LAYOUT_VERSION);
    Ok(versions
        .map(|version| {
            let node = layout(bpffs, version).join("node");
            // Maps that are not there, or are of another shape, are none of this agent's; their programs are detached
            // with the rest.
            Former { version, exempt: open_map(&node, abi::MAP_EXEMPT).ok(), pods: open_map(&node, abi::MAP_PODS).ok() }
        })
        .collect())
}

/// Versions of all layouts that are pinned.
///
/// # Errors
/// When bpffs cannot be read.
pub fn versions(bpffs: &Path) -> Result<Vec<u32>, CaptureError> {
    let names = match folders(bpffs) {
        Err(CaptureError::Path { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    Ok(names.iter().filter_map(|name| name.strip_prefix('v')?.parse().ok()).collect())
}

/// Detaches and unpins a layout: the connect hooks first, so that nothing is captured that is no longer steered.
///
/// # Errors
/// When the kernel or bpffs refuses.
pub fn remove(bpffs: &Path, version: u32) -> Result<(), CaptureError> {
    let root = layout(bpffs, version);
    let node = root.join("node");
    for program in [abi::PROGRAM_CONNECT4, abi::PROGRAM_CONNECT6, abi::PROGRAM_PROBES] {
        detach(&node.join(program))?;
    }
    for pod in folders(&root.join("pods")).unwrap_or_default() {
        super::pod::remove(&root.join("pods").join(pod))?;
    }
    match fs::remove_dir_all(&root) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&root)(error)),
        _ => Ok(()),
    }
}

/// Takes the program of a pinned link off its hook, at once. Nothing to do is no error.
///
/// # Errors
/// When the kernel refuses.
pub fn detach(pin: &Path) -> Result<(), CaptureError> {
    match sys::open_pin(pin) {
        Ok(link) => sys::detach(link.as_fd()).map_err(at(pin)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(at(pin)(error)),
    }
}
