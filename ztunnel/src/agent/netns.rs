//! Network namespaces: entering one on a thread of its own, and naming it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::fstatat;

use super::capture::netns_cookie;
use super::netlink::{self, Changes, Netlink};

/// A network namespace kept open, with the names that the kernel knows it by.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    cookie: u64,
    inode: u64,
    route: Arc<Mutex<Netlink>>,
}

/// Why a namespace could not be used.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The descriptor is not a network namespace, or may not be entered.
    #[error("cannot enter the network namespace: {0}")]
    Enter(#[source] io::Error),
    /// The cookie could not be read.
    #[error("cannot read the cookie of the network namespace (SO_NETNS_COOKIE, Linux 5.14): {0}")]
    Cookie(#[source] io::Error),
    /// No netlink socket.
    #[error("cannot open a netlink socket in the network namespace: {0}")]
    Netlink(#[source] io::Error),
    /// It is the agent's own: capturing there would capture the node.
    #[error("this is the node's own network namespace (a host-network pod is never enrolled)")]
    Host,
    /// No thread could be started, or it died.
    #[error("no thread to work in the network namespace: {0}")]
    Thread(String),
}

impl Netns {
    /// Takes a namespace from its descriptor.
    ///
    /// # Errors
    /// When it is no network namespace, or this process's own.
    pub fn new(fd: OwnedFd) -> Result<Self, NetnsError> {
        let inode = inode_of(&fd).map_err(NetnsError::Enter)?;
        let own = fs::metadata("/proc/thread-self/ns/net").map_err(NetnsError::Enter)?.ino();
        if inode == own {
            return Err(NetnsError::Host);
        }
        let (cookie, route) = within(fd.as_fd(), || {
            let socket = || socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None);
            let cookie = socket().and_then(|socket| netns_cookie(socket.as_fd())).map_err(NetnsError::Cookie)?;
            let route = Netlink::open(netlink::ROUTE).map_err(NetnsError::Netlink)?;
            Ok::<_, NetnsError>((cookie, route))
        })??;
        Ok(Self { fd, cookie, inode, route: Arc::new(Mutex::new(route)) })
    }

    /// The namespace at a path, if it is the one with this cookie; else the one of a process, if there is one.
    #[must_use]
    pub fn find(path: &Path, inode: u64, cookie: u64) -> Option<Self> {
        let open = |path: &Path| {
            let namespace = Self::new(File::open(path).ok()?.into()).ok()?;
            (namespace.cookie == cookie).then_some(namespace)
        };
        let by_path = || if path.as_os_str().is_empty() { None } else { open(path) };
        let by_process = || processes().ok()?.filter(|path| inode_at(path) == Some(inode)).find_map(|path| open(&path));
        by_path().or_else(by_process)
    }

    /// Never reused while the machine is up.
    #[must_use]
    pub const fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Unique among the namespaces that exist.
    #[must_use]
    pub const fn inode(&self) -> u64 {
        self.inode
    }

    /// The same namespace once more.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn try_clone(&self) -> Result<Self, NetnsError> {
        let fd = self.fd.try_clone().map_err(NetnsError::Enter)?;
        Ok(Self { fd, cookie: self.cookie, inode: self.inode, route: Arc::clone(&self.route) })
    }

    /// The socket for links, addresses, routes and rules of the namespace. Usable from any thread.
    pub fn route(&self) -> MutexGuard<'_, Netlink> {
        self.route.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears of changes of links, addresses, routes and rules in the namespace from now on. Blocks shortly.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or there is no socket.
    pub fn changes(&self) -> Result<Changes, NetnsError> {
        self.run(Changes::open)?.map_err(NetnsError::Netlink)
    }

    /// Runs a closure inside, on a thread that ends with it. Blocks; not for a runtime's thread.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        within(self.fd.as_fd(), work)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The inode of what lies at a path, if anything does.
#[must_use]
pub fn inode_at(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|found| found.ino())
}

/// Whether a namespace has left its path and no process is in it. What cannot be found out counts as no. For a path that
/// this process has seen the namespace at, or an empty one. Blocks shortly.
#[must_use]
pub fn is_gone(path: &Path, inode: u64) -> bool {
    let left = match fs::metadata(path) {
        Ok(found) => found.ino() != inode,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    left && is_without_processes(inode)
}

/// Whether no process is in a namespace. What cannot be found out counts as no. Blocks shortly.
#[must_use]
pub fn is_without_processes(inode: u64) -> bool {
    processes().is_ok_and(|mut all| !all.any(|path| inode_at(&path) == Some(inode)))
}

/// A folder in which namespaces have names, as every process knows it that sees it, under whatever path. It exists as long
/// as the machine is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Folder {
    device: u64,
    inode: u64,
}

impl Folder {
    /// The one that this path's name stands in; `None` if it is not to be seen, or there is no path.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        Self::identify(&fs::metadata(path.parent()?).ok()?)
    }

    fn identify(found: &fs::Metadata) -> Option<Self> {
        found.is_dir().then(|| Self { device: found.dev(), inode: found.ino() })
    }

    /// Whether what another process has seen at a path in this folder has lost that name. What cannot be found out counts
    /// as no.
    #[must_use]
    pub fn lacks(self, path: &Path) -> bool {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return false };
        let Ok(folder) = File::open(parent) else { return false };
        // Asked of the folder that was opened: another may be mounted there meanwhile.
        let is_same = folder.metadata().is_ok_and(|found| Self::identify(&found) == Some(self));
        is_same && fstatat(&folder, name, AtFlags::empty()) == Err(Errno::ENOENT)
    }
}

/// The path of each process's network namespace.
fn processes() -> io::Result<impl Iterator<Item = PathBuf>> {
    Ok(fs::read_dir("/proc")?.filter_map(Result::ok).filter_map(|entry| {
        entry.file_name().to_str()?.parse::<u32>().ok()?;
        Some(entry.path().join("ns/net"))
    }))
}

/// The inode number of a namespace's descriptor.
fn inode_of(fd: &OwnedFd) -> io::Result<u64> {
    Ok(File::from(fd.try_clone()?).metadata()?.ino())
}

fn within<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(String::from("netns")).spawn_scoped(scope, || {
            setns(netns, CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Enter(errno.into()))?;
            Ok(work())
        });
        let thread = thread.map_err(|error| NetnsError::Thread(error.to_string()))?;
        thread.join().unwrap_or_else(|_| Err(NetnsError::Thread(String::from("it panicked"))))
    })
}
