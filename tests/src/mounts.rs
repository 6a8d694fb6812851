//! One private mount namespace per cluster, where the nodes' BPF filesystems are mounted: the machine's own mount
//! table never changes, and the kernel takes the mounts away with their last user.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::Error;
use crate::error::Context;
use crate::netns::on_thread;

/// A mount namespace, held as a file descriptor.
#[derive(Debug)]
pub struct MountNs {
    fd: OwnedFd,
}

impl MountNs {
    /// Makes a copy of the machine's mounts with an empty BPF filesystem on each of `bpffs` (existing folders).
    /// Mounts made outside later are seen inside, never the other way round.
    ///
    /// # Errors
    /// The kernel refuses a namespace or a mount.
    pub fn create(bpffs: &[PathBuf]) -> Result<Self, Error> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNS).during(|| "making a mount namespace".to_owned())?;
            let none: Option<&Path> = None;
            mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
                .during(|| "separating the mount namespace".to_owned())?;
            for folder in bpffs {
                let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
                mount(Some("bpf"), folder, Some("bpf"), flags, Some("mode=0700"))
                    .during(|| format!("mounting a BPF filesystem on {}", folder.display()))?;
            }
            Self::of_thread()
        })?
    }

    /// That of the calling thread.
    pub(crate) fn of_thread() -> Result<Self, Error> {
        let file = File::open("/proc/thread-self/ns/mnt").during(|| "opening the mount namespace".to_owned())?;
        Ok(Self { fd: file.into() })
    }

    /// Runs `work` on a thread that sees these mounts, to look at pinned objects for example.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
        on_thread(|| {
            // A thread shares its root and working folder with its process until it says otherwise.
            unshare(CloneFlags::CLONE_FS).during(|| "unsharing the working folder".to_owned())?;
            setns(&self.fd, CloneFlags::CLONE_NEWNS).during(|| "entering the mount namespace".to_owned())?;
            Ok(work())
        })?
    }
}

impl AsFd for MountNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
