//! The step between fork and exec of a child: its control groups, namespaces and mounts.
#![expect(unsafe_code, reason = "pre_exec has no safe form")]

use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

use crate::mounts::MountNs;
use crate::netns::NetNs;

/// What a child enters before it becomes its program.
#[derive(Default)]
pub(crate) struct Surroundings {
    /// `cgroup.procs` files, open for writing.
    pub groups: Vec<File>,
    pub mounts: Option<Arc<MountNs>>,
    pub network: Option<Arc<NetNs>>,
    /// Bind mounts (from, to), in a mount namespace of the child's own.
    pub binds: Vec<(CString, CString)>,
    /// Mount points to hide from the child, in the same.
    pub hidden: Vec<CString>,
}

/// A path for use after fork.
pub(crate) fn c_path(path: &Path) -> std::io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_encoded_bytes())?)
}

/// Arranges for the child to enter its surroundings, and to be killed when the thread that starts it ends.
pub(crate) fn prepare(command: &mut Command, surroundings: Surroundings) {
    let parent = Pid::this();
    // SAFETY: between fork and exec the closure makes system calls only: it neither allocates nor takes locks
    // (descriptors are open, paths are C strings made before the fork).
    unsafe {
        command.pre_exec(move || enter(&surroundings, parent));
    }
}

fn enter(surroundings: &Surroundings, parent: Pid) -> std::io::Result<()> {
    for mut group in &surroundings.groups {
        group.write_all(b"0")?;
    }
    if let Some(mounts) = &surroundings.mounts {
        setns(mounts.as_ref(), CloneFlags::CLONE_NEWNS)?;
    }
    if !surroundings.binds.is_empty() || !surroundings.hidden.is_empty() {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none: Option<&Path> = None;
        mount(none, c"/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?;
        for (from, to) in &surroundings.binds {
            mount(Some(from.as_c_str()), to.as_c_str(), none, MsFlags::MS_BIND, none)?;
        }
        for at in &surroundings.hidden {
            umount2(at.as_c_str(), MntFlags::MNT_DETACH)?;
        }
    }
    if let Some(network) = &surroundings.network {
        setns(network.as_ref(), CloneFlags::CLONE_NEWNET)?;
    }
    set_pdeathsig(Signal::SIGKILL)?;
    // The parent may have died before the line above.
    if getppid() != parent {
        return Err(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
    }
    Ok(())
}
