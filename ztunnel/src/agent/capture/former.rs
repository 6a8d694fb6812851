//! What agents of other versions pinned: it stays in force beside this version's programs until it is removed.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use aya::maps::{MapData, MapError, SkStorage};
use ztunnel_ebpf as abi;

use super::error::{CaptureError, at, map_error};
use super::loader::open_map;
use super::{Pods, Raw, entries, folders, layout, pins, remove_pod, sys};

/// The layout whose pods this version takes over.
const ADOPTED: u32 = abi::LAYOUT_VERSION - 1;
/// Maps of the node that are the same in both: the proxy's sockets, also those in its stock and those in use, and the
/// kubelet's connections.
const NODE_MAPS: [&str; 2] = [abi::MAP_EXEMPT, abi::MAP_PROBES];
/// Maps of a pod that are: its connections from before its enrolment. What it opened since is not older.
const POD_MAPS: [&str; 1] = [abi::MAP_OLDER];

/// Another layout: as long as its connect hooks run, they must know the proxy's sockets too.
pub struct Former {
    version: u32,
    exempt: Option<SkStorage<MapData, u32>>,
    pods: Option<Pods>,
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

    /// Whether it captures a namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn holds(&self, cookie: u64) -> Result<bool, CaptureError> {
        match self.pods.as_ref().map(|pods| pods.get(&cookie, 0)) {
            None | Some(Err(MapError::KeyNotFound)) => Ok(false),
            Some(Ok(_)) => Ok(true),
            Some(Err(error)) => Err(map_error(abi::MAP_PODS)(error)),
        }
    }

    /// What its programs know of all pods.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn entries(&self) -> Result<Vec<abi::PodEntry>, CaptureError> {
        self.pods.as_ref().map_or(Ok(Vec::new()), entries)
    }
}

/// Lets the node's maps of the layout before go on in this one, where it has none yet.
///
/// # Errors
/// When the kernel or bpffs refuses.
pub fn inherit_node(bpffs: &Path, node: &Path) -> Result<(), CaptureError> {
    inherit(&layout(bpffs, ADOPTED).join("node"), node, &NODE_MAPS).map(drop)
}

/// Lets the maps of a pod go on. Returns whether the layout before had it.
///
/// # Errors
/// When the kernel or bpffs refuses.
pub fn inherit_pod(bpffs: &Path, folder: &Path) -> Result<bool, CaptureError> {
    let Some(name) = folder.file_name() else { return Ok(false) };
    inherit(&layout(bpffs, ADOPTED).join("pods").join(name), folder, &POD_MAPS)
}

/// Whether all of these maps are the same in both folders afterwards.
fn inherit(from: &Path, to: &Path, names: &[&'static str]) -> Result<bool, CaptureError> {
    let mut all = true;
    for name in names {
        let former = match pins::ids(from, &[name]) {
            Ok(ids) => ids.get(name).copied(),
            Err(error) if error.is_absence() => None,
            Err(error) => return Err(error),
        };
        match (former, pins::ids(to, &[name])) {
            (Some(id), Err(error)) if error.is_absence() => drop(pins::pin(to, name, id)?),
            (Some(id), Ok(present)) if present.get(name) == Some(&id) => {}
            (_, Err(error)) if !error.is_absence() => return Err(error),
            (None | Some(_), _) => all = false,
        }
    }
    Ok(all)
}

/// Where other layouts have a pod.
pub fn pod_folders(bpffs: &Path, name: &str) -> Result<Vec<PathBuf>, CaptureError> {
    let others = versions(bpffs)?.into_iter().filter(|version| *version != abi::LAYOUT_VERSION);
    Ok(others.map(|version| layout(bpffs, version).join("pods").join(name)).collect())
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
            // Maps that are not there, or are of another shape (layout 1 had smaller entries), are none of this agent's;
            // their programs are detached with the rest.
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
