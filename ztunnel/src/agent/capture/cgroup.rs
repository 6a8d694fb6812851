//! Programs on cgroups: the connect hooks, those of others beside them, and the one that notes the kubelet's connections.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, SockOps};
use ztunnel_ebpf as abi;

use super::error::{CaptureError, at, program_error};
use super::former::{self, detach};
use super::loader::{open_cgroup, pin};
use super::{NodeCapture, layout, lock, pins, sys};

/// The connect hooks: program and attach type.
const HOOKS: [(&str, u32); 2] =
    [(abi::PROGRAM_CONNECT4, sys::ATTACH_CONNECT4), (abi::PROGRAM_CONNECT6, sys::ATTACH_CONNECT6)];
/// Maps that the connect hooks use.
const MAPS: [&str; 4] = [abi::MAP_PODS, abi::MAP_ROUTES, abi::MAP_EXEMPT, abi::MAP_COUNTERS];

/// A program of somebody else on a connect hook: it may rewrite addresses before or after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignProgram {
    /// The kernel's number of it.
    pub id: u32,
    /// Its name, cut by the kernel to 15 bytes; empty if it has none.
    pub name: String,
    /// Where it is attached: `connect4` or `connect6`.
    pub attach: &'static str,
}

impl fmt::Display for ForeignProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {} (id {})", self.name, self.attach, self.id)
    }
}

/// Pins the maps again that the node's attached programs use and that are not pinned (any more), before anything is loaded by
/// those pins. The connect hooks are followed.
///
/// # Errors
/// When the kernel or bpffs refuses.
pub fn mend_pins(node: &Path, names: &[&'static str]) -> Result<(), CaptureError> {
    for program in [abi::PROGRAM_PROBES, abi::PROGRAM_CONNECT6, abi::PROGRAM_CONNECT4] {
        let path = node.join(program);
        match sys::open_pin(&path).and_then(|link| sys::link_target(link.as_fd())) {
            Ok(link) => pins::mend(node, names, link.program_id).map(drop)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(at(&path)(error)),
        }
    }
    Ok(())
}

/// Attaches and pins the connect hooks, or checks those that are pinned.
///
/// # Errors
/// When the kernel refuses, or they are attached elsewhere.
pub fn connect_hooks(object: &mut Ebpf, node: &Path, cgroup_root: &Path) -> Result<(), CaptureError> {
    let cgroup = open_cgroup(cgroup_root)?;
    for (program, attach_type) in HOOKS {
        let path = node.join(program);
        match sys::open_pin(&path) {
            Ok(link) => adopt(&link, &path, &cgroup, cgroup_root, attach_type)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                attach_connect(object, program, &cgroup, &path)?;
                let link = sys::open_pin(&path).map_err(at(&path))?;
                adopt(&link, &path, &cgroup, cgroup_root, attach_type)?;
            }
            Err(source) => return Err(CaptureError::Path { path, source }),
        }
    }
    Ok(())
}

fn attach_connect(object: &mut Ebpf, name: &'static str, cgroup: &File, path: &Path) -> Result<(), CaptureError> {
    let refused = program_error(name);
    let program = object.program_mut(name).ok_or(CaptureError::Missing(name))?;
    let program: &mut CgroupSockAddr = program.try_into().map_err(&refused)?;
    program.load().map_err(&refused)?;
    // Links on cgroups always stand beside each other; a mode that says so is refused with EINVAL.
    let id = program.attach(cgroup, CgroupAttachMode::Single).map_err(&refused)?;
    let link: FdLink = program.take_link(id).map_err(&refused)?.try_into().map_err(CaptureError::Link)?;
    pin(link, path)
}

/// Checks that a pinned link is on the hook and the cgroup that are wanted.
fn adopt(link: &OwnedFd, pin: &Path, cgroup: &File, cgroup_root: &Path, attach_type: u32) -> Result<(), CaptureError> {
    let found = sys::link_target(link.as_fd()).map_err(at(pin))?;
    let wanted = id(cgroup, cgroup_root)?;
    if found.attach_type != attach_type || found.target != wanted {
        return Err(CaptureError::NotInForce(format!(
            "the program pinned at {} is attached to the cgroup with id {}, not to {} (id {wanted}); remove it with \
             `ztunnel agent --uninstall`",
            pin.display(),
            found.target,
            cgroup_root.display(),
        )));
    }
    Ok(())
}

/// The inode number of a cgroup's folder is its id.
fn id(cgroup: &File, path: &Path) -> Result<u64, CaptureError> {
    Ok(cgroup.metadata().map_err(at(path))?.ino())
}

impl NodeCapture {
    /// Attaches connect hooks that were detached or unpinned behind the agent's back, and pins the node's maps that are not
    /// pinned any more. Returns whether any was missing.
    ///
    /// # Errors
    /// When the kernel refuses, or a hook is attached elsewhere.
    pub fn mend_node(&self) -> Result<bool, CaptureError> {
        let node = self.node_folder();
        let mut mended = false;
        for (name, id) in self.maps.iter() {
            mended |= pins::pin(&node, name, *id)?;
        }
        let mut missing = false;
        for (program, _) in HOOKS {
            let path = node.join(program);
            match sys::open_pin(&path).and_then(|link| sys::link_target(link.as_fd())) {
                Ok(found) if found.target != 0 && self.uses_maps(found.program_id, &MAPS)? => {}
                Ok(_) => {
                    // Detached, it does nothing any more; with other maps it does not do what it is told.
                    detach(&path)?;
                    fs::remove_file(&path).map_err(at(&path))?;
                    missing = true;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => missing = true,
                Err(error) => return Err(at(&path)(error)),
            }
        }
        if missing {
            connect_hooks(&mut self.loader.node()?, &node, &self.cgroup_root)?;
        }
        Ok(mended || missing)
    }

    /// Whether a program uses those of the node's maps that have these names.
    fn uses_maps(&self, program: u32, names: &[&str]) -> Result<bool, CaptureError> {
        match pins::verify(program, self.maps.iter().filter(|(name, _)| names.contains(name))) {
            Ok(()) => Ok(true),
            Err(CaptureError::NotInForce(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sees to it that the connections of this cgroup, and of no other, are left alone; of none, if there is none. To be
    /// called again from time to time: a kubelet that is restarted gets a new cgroup at the same path. Returns whether the
    /// program was taken away meanwhile from the cgroup that is followed.
    ///
    /// # Errors
    /// When there is no such cgroup, or the kernel refuses.
    pub fn follow_kubelet(&self, cgroup: Option<&Path>) -> Result<bool, CaptureError> {
        const NAME: &str = abi::PROGRAM_PROBES;
        let path = self.node_folder().join(NAME);
        let wanted =
            cgroup.map(|cgroup| open_cgroup(cgroup).and_then(|file| Ok((id(&file, cgroup)?, file)))).transpose()?;
        match sys::open_pin(&path).and_then(|link| sys::link_target(link.as_fd())) {
            Ok(found)
                if wanted.as_ref().is_some_and(|(id, _)| found.target == *id)
                    && self.uses_maps(found.program_id, &[abi::MAP_PROBES])? =>
            {
                *lock(&self.kubelet) = wanted.map(|(id, _)| id);
                return Ok(false);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Attached elsewhere, or to a cgroup that is gone, or with another map.
            Ok(_) | Err(_) => {
                detach(&path)?;
                fs::remove_file(&path).map_err(at(&path))?;
            }
        }
        let Some((followed, cgroup)) = wanted else {
            *lock(&self.kubelet) = None;
            return Ok(false);
        };
        let mut object = self.loader.node()?;
        let refused = program_error(NAME);
        let program = object.program_mut(NAME).ok_or(CaptureError::Missing(NAME))?;
        let program: &mut SockOps = program.try_into().map_err(&refused)?;
        program.load().map_err(&refused)?;
        let id = program.attach(&cgroup, CgroupAttachMode::Single).map_err(&refused)?;
        let link: FdLink = program.take_link(id).map_err(&refused)?.try_into().map_err(CaptureError::Link)?;
        pin(link, &path)?;
        Ok(lock(&self.kubelet).replace(followed) == Some(followed))
    }

    /// Programs on the connect hooks of a cgroup that are not this node's: they may rewrite addresses before or after.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn foreign_programs(&self, cgroup_root: &Path) -> Result<Vec<ForeignProgram>, CaptureError> {
        let cgroup = open_cgroup(cgroup_root)?;
        let mut foreign = Vec::new();
        for (attach, attach_type) in HOOKS {
            let own = self.own_programs(attach)?;
            let tag = |id: &u32| sys::program_name(*id).ok().flatten().map(|(tag, _)| tag);
            let tags: Vec<[u8; 8]> = own.iter().filter_map(tag).collect();
            for id in sys::attached_programs(cgroup.as_fd(), attach_type).map_err(at(cgroup_root))? {
                if own.contains(&id) {
                    continue;
                }
                // One that was removed meanwhile stands in nobody's way.
                let Some((tag, name)) = sys::program_name(id).map_err(at(cgroup_root))? else { continue };
                // Another agent's instance of the same program rewrites nothing.
                if !tags.contains(&tag) {
                    foreign.push(ForeignProgram { id, name, attach });
                }
            }
        }
        Ok(foreign)
    }

    /// Ids of this node's programs on a hook, of every layout.
    fn own_programs(&self, hook: &str) -> Result<Vec<u32>, CaptureError> {
        let mut own = Vec::new();
        for version in former::versions(&self.bpffs)? {
            let path: PathBuf = layout(&self.bpffs, version).join("node").join(hook);
            match sys::open_pin(&path).and_then(|link| sys::link_target(link.as_fd())) {
                Ok(link) => own.push(link.program_id),
                Err(error) if error.kind() == io::ErrorKind::NotFound && version != abi::LAYOUT_VERSION => {}
                Err(error) => return Err(at(&path)(error)),
            }
        }
        Ok(own)
    }
}
