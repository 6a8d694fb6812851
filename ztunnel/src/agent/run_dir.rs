//! The agent's folder: its lock, its sockets, its state, and who may reach which.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown, lchown,
};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

/// How often a successor looks whether the agent before it has ended.
const PAUSE: Duration = Duration::from_millis(20);

/// The file that is locked.
const LOCK: &str = "agent.lock";

/// The folder, locked: one agent at a time.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: Flock<File>,
}

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Another agent runs.
    #[error("another agent holds {}; one agent per node", .0.display())]
    Locked(PathBuf),
    /// Somebody else could have put things there.
    #[error("{} must belong to root and be writable for nobody else", .0.display())]
    Unsafe(PathBuf),
    /// A system call failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
}

impl RunDir {
    /// Makes what is missing and takes the lock.
    ///
    /// The folder itself can be searched by everybody, so that the proxy reaches its own folder in it; nothing in it
    /// can be read by anybody but its owner.
    ///
    /// # Errors
    /// When another agent runs, or the folder is not safe.
    pub fn open(path: &Path, proxy_uid: u32) -> Result<Self, RunDirError> {
        make(path, 0o711, 0)?;
        let lock_path = path.join(LOCK);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(at(&lock_path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => RunDirError::Locked(lock_path.clone()),
            errno => RunDirError::Io { path: lock_path.clone(), source: errno.into() },
        })?;
        let dir = Self { path: path.to_owned(), _lock: lock };
        make(&dir.state(), 0o700, 0)?;
        make(&dir.path.join("proxy"), 0o700, proxy_uid)?;
        Ok(dir)
    }

    /// As [`Self::open`], but waits until the agent that runs has ended: a successor starts before its predecessor ends, and
    /// the node is never long without one.
    ///
    /// # Errors
    /// When the folder is not safe.
    pub fn open_when_free(path: &Path, proxy_uid: u32) -> Result<Self, RunDirError> {
        let mut told = false;
        loop {
            match Self::open(path, proxy_uid) {
                Err(RunDirError::Locked(lock)) => {
                    if !told {
                        tracing::info!(lock = %lock.display(), "another agent runs; waiting until it ends");
                        told = true;
                    }
                    thread::sleep(PAUSE);
                }
                other => return other,
            }
        }
    }

    /// The folder itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the proxy connects: `proxy/agent.sock`, in a folder of the proxy's own.
    #[must_use]
    pub fn proxy_socket(&self) -> PathBuf {
        self.path.join("proxy/agent.sock")
    }

    /// Where the CNI plugin connects: `cni.sock`, for root.
    #[must_use]
    pub fn cni_socket(&self) -> PathBuf {
        self.path.join("cni.sock")
    }

    /// The folder with one file per enrolled pod.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.path.join("pods")
    }

    /// Removes everything in it, also what the CNI plugin wrote: this agent is the last one.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn clear(&self) -> Result<(), RunDirError> {
        for entry in fs::read_dir(&self.path).map_err(at(&self.path))? {
            let entry = entry.map_err(at(&self.path))?;
            let path = entry.path();
            // A link is removed and not followed.
            let is_folder = entry.file_type().map_err(at(&path))?.is_dir();
            let removed = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            missing_is_fine(removed).map_err(at(&path))?;
        }
        Ok(())
    }

    /// Lets the proxy connect to its socket.
    ///
    /// # Errors
    /// When the owner cannot be changed.
    pub fn give(&self, socket: &Path, uid: u32) -> Result<(), RunDirError> {
        // The folder is the proxy's: what lies there now may be a link to somewhere else.
        lchown(socket, Some(uid), None).map_err(at(socket))
    }
}

/// Makes a folder with an owner and a mode, or checks that it has a safe owner and gives it the mode.
fn make(path: &Path, mode: u32, owner: u32) -> Result<(), RunDirError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(at(parent))?;
    }
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(at(path)(error)),
        Ok(()) | Err(_) => {}
    }
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let folder = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(folder) => folder,
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP)) => {
            return Err(RunDirError::Unsafe(path.to_owned()));
        }
        Err(error) => return Err(at(path)(error)),
    };
    // All by its descriptor: it stays the one that was looked at.
    let found = folder.metadata().map_err(at(path))?;
    if found.uid() != owner && found.uid() != 0 {
        return Err(RunDirError::Unsafe(path.to_owned()));
    }
    folder.set_permissions(Permissions::from_mode(mode)).map_err(at(path))?;
    fchown(&folder, Some(owner), None).map_err(at(path))
}

fn missing_is_fine(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    move |source| RunDirError::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    #[test]
    fn one_agent_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let first = RunDir::open(&path, 1337).unwrap();
        assert!(matches!(RunDir::open(&path, 1337), Err(RunDirError::Locked(_))));
        drop(first);
        RunDir::open(&path, 1337).unwrap();
    }

    #[test]
    fn successor_waits_for_the_end_of_its_predecessor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let first = RunDir::open(&path, 1337).unwrap();
        let waiting = std::thread::spawn(move || RunDir::open_when_free(&path, 1337).map(drop));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!waiting.is_finished());
        drop(first);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn folders_have_owners_and_modes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let dir = RunDir::open(&path, 1337).unwrap();
        let mode_and_owner = |path: &Path| {
            let found = fs::metadata(path).unwrap();
            (found.mode() & 0o777, found.uid())
        };
        assert_eq!(mode_and_owner(&path), (0o711, 0));
        assert_eq!(mode_and_owner(dir.proxy_socket().parent().unwrap()), (0o700, 1337));
        assert_eq!(mode_and_owner(&dir.state()), (0o700, 0));
        assert_eq!(mode_and_owner(&path.join("agent.lock")), (0o600, 0));
    }

    #[test]
    fn links_are_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let dir = RunDir::open(&path, 1337).unwrap();
        let victim = folder.path().join("victim");
        fs::create_dir(&victim).unwrap();
        symlink(&victim, dir.proxy_socket()).unwrap();
        dir.give(&dir.proxy_socket(), 1337).unwrap();
        assert_eq!(fs::metadata(&victim).unwrap().uid(), 0);
        assert_eq!(fs::symlink_metadata(dir.proxy_socket()).unwrap().uid(), 1337);
        drop(dir);
        fs::remove_dir_all(path.join("proxy")).unwrap();
        symlink(&victim, path.join("proxy")).unwrap();
        assert!(matches!(RunDir::open(&path, 1337), Err(RunDirError::Unsafe(_))));
        assert_eq!(fs::metadata(&victim).unwrap().uid(), 0);
    }

    #[test]
    fn folder_of_somebody_else_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        fs::create_dir(&path).unwrap();
        chown(&path, Some(4242), None).unwrap();
        assert!(matches!(RunDir::open(&path, 1337), Err(RunDirError::Unsafe(_))));
    }
}
