//! The kernel side of capture: loads the programs, attaches and pins them, keeps their maps. The only user of aya.
//!
//! Everything is pinned, so that capture outlives the agent: `<bpffs>/v<layout>/node/` holds the links and maps of the
//! node, `<bpffs>/v<layout>/pods/<pod>/` those of one pod. What is found pinned is adopted, never replaced. What another
//! layout left stays in force beside it until it is removed.

mod cgroup;
mod clsact;
mod error;
mod former;
mod guard;
mod held;
mod loader;
mod logs;
mod pins;
mod pod;
pub mod probe;
mod routes;
mod sockets;
mod sys;

#[cfg(test)]
pub(super) mod tests;

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::maps::{HashMap, MapData, MapError, PerCpuArray, SkStorage};
use ztunnel_ebpf as abi;

use error::{at, map_error};
use former::Former;
use loader::{Loader, take};
use routes::Routes;

pub use cgroup::ForeignProgram;
pub use error::CaptureError;
pub use guard::Guard;
pub use held::{Held, held, uid_of};
pub use pod::{Attachment, Listeners, PodCapture};
pub use routes::Route;
pub use sys::netns_cookie;

/// The map of enrolled pods as user space sees it.
type Pods = HashMap<MapData, u64, [u8; abi::PodEntry::SIZE]>;

/// Capture on this node: the connect hooks and the map of enrolled pods. Dropping it changes nothing in the kernel.
pub struct NodeCapture {
    bpffs: PathBuf,
    root: PathBuf,
    cgroup_root: PathBuf,
    loader: Loader,
    /// The node's maps.
    maps: Arc<pins::Ids>,
    pods: Mutex<Pods>,
    exempt: Mutex<SkStorage<MapData, u32>>,
    routes: Mutex<Routes>,
    former: Mutex<Vec<Former>>,
    /// The id of the kubelet's cgroup, as it was followed last.
    kubelet: Mutex<Option<u64>>,
    counters: PerCpuArray<MapData, u64>,
}

impl NodeCapture {
    /// Attaches the connect hooks to `cgroup_root` and pins them under `bpffs`, or adopts what an earlier agent left
    /// there.
    ///
    /// `kubelet`: the cgroup whose connections to pods are left alone, if any; it may be missing yet. `log`: whether newly loaded programs make
    /// log records (programs that are adopted keep their setting).
    ///
    /// # Errors
    /// When the kernel refuses, or when what is pinned is attached to another cgroup.
    pub fn open(bpffs: &Path, cgroup_root: &Path, kubelet: Option<&Path>, log: bool) -> Result<Self, CaptureError> {
        let root = layout(bpffs, abi::LAYOUT_VERSION);
        let node = root.join("node");
        for folder in [&node, &root.join("pods")] {
            fs::create_dir_all(folder).map_err(at(folder))?;
        }
        former::inherit_node(bpffs, &node)?;
        cgroup::mend_pins(&node, &loader::NODE_MAPS)?;
        let loader = Loader::new(&node, log);
        let mut object = loader.node()?;
        cgroup::connect_hooks(&mut object, &node, cgroup_root)?;
        let capture = Self {
            pods: Mutex::new(take(&mut object, abi::MAP_PODS)?),
            exempt: Mutex::new(take(&mut object, abi::MAP_EXEMPT)?),
            routes: Mutex::new(Routes::new(take(&mut object, abi::MAP_ROUTES)?)?),
            counters: take(&mut object, abi::MAP_COUNTERS)?,
            maps: Arc::new(pins::ids(&node, &loader::NODE_MAPS)?),
            former: Mutex::new(former::find(bpffs)?),
            kubelet: Mutex::default(),
            bpffs: bpffs.to_owned(),
            cgroup_root: cgroup_root.to_owned(),
            root,
            loader,
        };
        // Hooks that an earlier agent left may use other maps than those that are pinned.
        capture.mend_node()?;
        match capture.follow_kubelet(kubelet) {
            // It may come later, and is looked for again; until then its probes are plaintext from outside.
            Err(error) if error.is_absence() => tracing::warn!(%error, "no such cgroup as the kubelet's"),
            followed => drop(followed?),
        }
        Ok(capture)
    }

    /// Exempts a socket from capture and from the guard, for its life. Only for the proxy's own sockets. What a listener
    /// accepts from now on inherits it.
    ///
    /// # Errors
    /// When the kernel refuses; the socket must then not be handed out.
    pub fn exempt(&self, socket: BorrowedFd<'_>) -> Result<(), CaptureError> {
        for former in lock(&self.former).iter_mut() {
            former.exempt(socket)?;
        }
        lock(&self.exempt).insert(&Raw(socket), 1, 0).map_err(map_error(abi::MAP_EXEMPT))
    }

    /// The map that has a value for each socket that is exempt, to ask the kernel for those of a namespace.
    ///
    /// # Errors
    /// When its pin is gone.
    pub fn exempt_sockets(&self) -> Result<OwnedFd, CaptureError> {
        let path = self.root.join("node").join(abi::MAP_EXEMPT);
        sys::open_pin(&path).map_err(at(&path))
    }

    /// From now on, new connections from the network namespace with this cookie are captured, where its routes say so.
    ///
    /// # Errors
    /// When the map is full or the kernel refuses.
    pub fn enrol(&self, cookie: u64, entry: abi::PodEntry) -> Result<(), CaptureError> {
        lock(&self.pods).insert(cookie, entry.to_bytes(), 0).map_err(map_error(abi::MAP_PODS))
    }

    /// From now on, new connections from this namespace are left alone; its routes are forgotten. Nothing to do is no
    /// error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn release(&self, cookie: u64) -> Result<(), CaptureError> {
        remove_pod(&mut lock(&self.pods), cookie)?;
        for former in lock(&self.former).iter_mut() {
            former.release(cookie)?;
        }
        lock(&self.routes).set(cookie, &[])
    }

    /// What the kernel holds for a namespace: `None` is not enrolled.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enrolled(&self, cookie: u64) -> Result<Option<abi::PodEntry>, CaptureError> {
        match lock(&self.pods).get(&cookie, 0) {
            Ok(bytes) => Ok(Some(abi::PodEntry::from_bytes(&bytes))),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(map_error(abi::MAP_PODS)(error)),
        }
    }

    /// Whether a namespace is captured, in this layout or in another.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn captures(&self, cookie: u64) -> Result<bool, CaptureError> {
        if self.enrolled(cookie)?.is_some() {
            return Ok(true);
        }
        lock(&self.former).iter().try_fold(false, |found, former| Ok(found || former.holds(cookie)?))
    }

    /// Cookies of all enrolled namespaces, as the kernel holds them.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn cookies(&self) -> Result<Vec<u64>, CaptureError> {
        lock(&self.pods).keys().collect::<Result<_, _>>().map_err(map_error(abi::MAP_PODS))
    }

    /// What the programs know of all enrolled pods, in this layout and in those of others.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn entries(&self) -> Result<Vec<abi::PodEntry>, CaptureError> {
        let mut all = entries(&lock(&self.pods))?;
        for former in lock(&self.former).iter() {
            all.extend(former.entries()?);
        }
        Ok(all)
    }

    /// Tells the connect hooks which destinations of a namespace are captured; what is told replaces what was told
    /// before. A destination for which nothing is told is left alone, and the guard stops it.
    ///
    /// # Errors
    /// When the map is full or the kernel refuses; then some of it may be in force.
    pub fn set_routes(&self, cookie: u64, routes: &[Route]) -> Result<(), CaptureError> {
        lock(&self.routes).set(cookie, routes)
    }

    /// What the kernel holds of [`Self::set_routes`] for a namespace, in no order. What another process put there is seen
    /// after some minutes only.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn routes(&self, cookie: u64) -> Result<Vec<Route>, CaptureError> {
        lock(&self.routes).of(cookie)
    }

    /// A counter, summed over all CPUs.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn counter(&self, counter: abi::Counter) -> Result<u64, CaptureError> {
        let values = self.counters.get(&(counter as u32), 0).map_err(map_error(abi::MAP_COUNTERS))?;
        Ok(values.iter().sum())
    }

    /// Versions of other layouts that are pinned and in force: what agents of other versions left.
    #[must_use]
    pub fn former_layouts(&self) -> Vec<u32> {
        lock(&self.former).iter().map(Former::version).collect()
    }

    /// Detaches and unpins everything of another layout. Only when every pod that it captured is in force in this one.
    ///
    /// # Errors
    /// When the kernel or bpffs refuses.
    pub fn remove_layout(&self, version: u32) -> Result<(), CaptureError> {
        if version == abi::LAYOUT_VERSION {
            return Ok(());
        }
        former::remove(&self.bpffs, version)?;
        lock(&self.former).retain(|former| former.version() != version);
        Ok(())
    }

    fn node_folder(&self) -> PathBuf {
        self.root.join("node")
    }

    fn pod_folder(&self, uid: &str) -> PathBuf {
        self.root.join("pods").join(folder_name(uid))
    }
}

/// Detaches and unpins everything that agents pinned under `bpffs`, in every layout. For the removal of the mesh from a
/// node.
///
/// # Errors
/// When bpffs cannot be changed.
pub fn purge(bpffs: &Path) -> Result<(), CaptureError> {
    for version in former::versions(bpffs)? {
        former::remove(bpffs, version)?;
    }
    Ok(())
}

/// A pod's UID as a file name: bpffs refuses dots, and a UID may hold slashes.
#[must_use]
pub fn folder_name(uid: &str) -> String {
    let mut name = String::with_capacity(uid.len());
    for byte in uid.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("_{byte:02x}"));
        }
    }
    name
}

/// Where a layout is pinned.
fn layout(bpffs: &Path, version: u32) -> PathBuf {
    bpffs.join(format!("v{version}"))
}

/// Names in a folder.
fn folders(folder: &Path) -> Result<Vec<String>, CaptureError> {
    let entries = fs::read_dir(folder).map_err(at(folder))?;
    Ok(entries.filter_map(Result::ok).filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// Removes a pod from the map of enrolled pods. Nothing to do is no error.
fn remove_pod(pods: &mut Pods, cookie: u64) -> Result<(), CaptureError> {
    match pods.remove(&cookie) {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(map_error(abi::MAP_PODS)(error)),
    }
}

/// All entries of a map of enrolled pods.
fn entries(pods: &Pods) -> Result<Vec<abi::PodEntry>, CaptureError> {
    let all: Result<Vec<_>, _> = pods.iter().collect();
    let all = all.map_err(map_error(abi::MAP_PODS))?;
    Ok(all.iter().map(|(_, bytes)| abi::PodEntry::from_bytes(bytes)).collect())
}

/// A poisoned lock is taken all the same: the maps live in the kernel and no update is half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for NodeCapture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeCapture").field("root", &self.root).finish_non_exhaustive()
    }
}

/// aya takes descriptors by `AsRawFd`.
struct Raw<'a>(BorrowedFd<'a>);

impl AsRawFd for Raw<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
