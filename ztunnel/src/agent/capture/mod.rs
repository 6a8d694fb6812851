//! The kernel side of capture: loads the programs, attaches and pins them, keeps their maps. The only user of aya.
//!
//! Everything is pinned, so that capture outlives the agent: `<bpffs>/v<layout>/node/` holds the links and maps of the
//! node,
//! `<bpffs>/v<layout>/pods/<pod>/` those of one pod. What is found pinned is adopted, never replaced.

mod pod;
pub mod probe;
mod sys;

#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, SkStorage};
use aya::programs::links::{FdLink, LinkError};
use aya::programs::{CgroupAttachMode, CgroupSockAddr, ProgramError};
use aya::{Ebpf, EbpfError, EbpfLoader};
use ztunnel_ebpf as abi;

pub use pod::{Listeners, PodCapture};
pub use sys::netns_cookie;

/// The programs, built by `cargo xtask ebpf`; `build.rs` chooses the file.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("CULVERT_EBPF_OBJECT"));

/// Why capture could not be set up, changed or checked.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The kernel refused the object.
    #[error("cannot load the eBPF programs: {}", with_causes(.0))]
    Load(#[source] Box<EbpfError>),
    /// The kernel refused one program or its attachment.
    #[error("eBPF program {program}: {}", with_causes(.source))]
    Program {
        /// Its name in the object.
        program: &'static str,
        /// What the kernel said, with the verifier's log.
        #[source]
        source: Box<ProgramError>,
    },
    /// The object lacks something that the ABI names: it was built from other sources.
    #[error("the embedded eBPF object has no {0}; rebuild it with `cargo xtask ebpf`")]
    Missing(&'static str),
    /// A map could not be read or written.
    #[error("eBPF map {map}: {}", with_causes(.source))]
    Map {
        /// Its name.
        map: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<MapError>,
    },
    /// A link is not what it should be.
    #[error("eBPF link: {}", with_causes(.0))]
    Link(#[source] LinkError),
    /// Something in bpffs or in the cgroup file system.
    #[error("{}: {source}", path.display())]
    Path {
        /// Where.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// A pin could not be made.
    #[error("cannot pin at {}: {why}", path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        why: String,
    },
    /// What the kernel holds is not what was asked for.
    #[error("capture is not in force: {0}")]
    NotInForce(String),
}

impl CaptureError {
    /// Whether the kernel answered, and what was asked for is not there.
    #[must_use]
    pub fn is_absence(&self) -> bool {
        match self {
            Self::NotInForce(_) => true,
            Self::Path { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::Load(_)
            | Self::Program { .. }
            | Self::Missing(_)
            | Self::Map { .. }
            | Self::Link(_)
            | Self::Pin { .. } => false,
        }
    }
}

/// Capture on this node: the connect hooks and the map of enrolled pods. Dropping it changes nothing in the kernel.
pub struct NodeCapture {
    root: PathBuf,
    log: bool,
    pods: Mutex<HashMap<MapData, u64, [u8; abi::PodEntry::SIZE]>>,
    exempt: Mutex<SkStorage<MapData, u32>>,
    counters: PerCpuArray<MapData, u64>,
}

/// Maps of the node that pods' instances of the programs share.
const NODE_MAPS: [&str; 4] = [abi::MAP_PODS, abi::MAP_EXEMPT, abi::MAP_COUNTERS, abi::MAP_LOGS];

impl NodeCapture {
    /// Attaches the connect hooks to `cgroup_root` and pins them under `bpffs`, or adopts what an earlier agent left
    /// there.
    ///
    /// `log`: whether newly loaded programs make log records (programs that are adopted keep their setting).
    ///
    /// # Errors
    /// When the kernel refuses, or when what is pinned is attached to another cgroup.
    pub fn open(bpffs: &Path, cgroup_root: &Path, log: bool) -> Result<Self, CaptureError> {
        let root = versioned(bpffs);
        let node = root.join("node");
        for folder in [&node, &root.join("pods")] {
            fs::create_dir_all(folder).map_err(at(folder))?;
        }
        let cgroup = File::open(cgroup_root).map_err(at(cgroup_root))?;
        let mut object = load(&node, None, log)?;
        for (program, attach_type) in
            [(abi::PROGRAM_CONNECT4, sys::ATTACH_CONNECT4), (abi::PROGRAM_CONNECT6, sys::ATTACH_CONNECT6)]
        {
            let pin = node.join(program);
            match sys::open_pin(&pin) {
                Ok(link) => adopt(&link, &pin, &cgroup, cgroup_root, attach_type)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    attach(&mut object, program, &cgroup, &pin)?;
                    let link = sys::open_pin(&pin).map_err(at(&pin))?;
                    adopt(&link, &pin, &cgroup, cgroup_root, attach_type)?;
                }
                Err(source) => return Err(CaptureError::Path { path: pin, source }),
            }
        }
        Ok(Self {
            pods: Mutex::new(take(&mut object, abi::MAP_PODS)?),
            exempt: Mutex::new(take(&mut object, abi::MAP_EXEMPT)?),
            counters: take(&mut object, abi::MAP_COUNTERS)?,
            root,
            log,
        })
    }

    /// Exempts a socket from capture, for its life. Only for the proxy's own sockets.
    ///
    /// # Errors
    /// When the kernel refuses; the socket must then not be handed out.
    pub fn exempt(&self, socket: BorrowedFd<'_>) -> Result<(), CaptureError> {
        lock(&self.exempt).insert(&Raw(socket), 1, 0).map_err(map_error(abi::MAP_EXEMPT))
    }

    /// From now on, new connections from the network namespace with this cookie are captured.
    ///
    /// # Errors
    /// When the map is full or the kernel refuses.
    pub fn enrol(&self, cookie: u64, entry: abi::PodEntry) -> Result<(), CaptureError> {
        lock(&self.pods).insert(cookie, entry.to_bytes(), 0).map_err(map_error(abi::MAP_PODS))
    }

    /// From now on, new connections from this namespace are left alone. Nothing to do is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn release(&self, cookie: u64) -> Result<(), CaptureError> {
        match lock(&self.pods).remove(&cookie) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(map_error(abi::MAP_PODS)(error)),
        }
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

    /// Cookies of all enrolled namespaces, as the kernel holds them.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn cookies(&self) -> Result<Vec<u64>, CaptureError> {
        lock(&self.pods).keys().collect::<Result<_, _>>().map_err(map_error(abi::MAP_PODS))
    }

    /// A counter, summed over all CPUs.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn counter(&self, counter: abi::Counter) -> Result<u64, CaptureError> {
        let values = self.counters.get(&(counter as u32), 0).map_err(map_error(abi::MAP_COUNTERS))?;
        Ok(values.iter().sum())
    }

    /// Ids of programs on the connect hooks of a cgroup that are not this node's: they may rewrite addresses before or
    /// after.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn foreign_programs(&self, cgroup_root: &Path) -> Result<Vec<u32>, CaptureError> {
        let cgroup = File::open(cgroup_root).map_err(at(cgroup_root))?;
        let mut foreign = Vec::new();
        for (program, attach_type) in
            [(abi::PROGRAM_CONNECT4, sys::ATTACH_CONNECT4), (abi::PROGRAM_CONNECT6, sys::ATTACH_CONNECT6)]
        {
            let pin = self.root.join("node").join(program);
            let own = sys::open_pin(&pin).and_then(|link| sys::link_target(link.as_fd())).map_err(at(&pin))?;
            let attached = sys::attached_programs(cgroup.as_fd(), attach_type).map_err(at(cgroup_root))?;
            foreign.extend(attached.into_iter().filter(|id| *id != own.program_id));
        }
        Ok(foreign)
    }

    /// Names of the folders of pods that are pinned.
    ///
    /// # Errors
    /// When bpffs cannot be read.
    pub fn pinned(&self) -> Result<Vec<String>, CaptureError> {
        let folder = self.root.join("pods");
        let entries = fs::read_dir(&folder).map_err(at(&folder))?;
        Ok(entries.filter_map(Result::ok).filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }

    /// Shows the log records of the programs, if they were loaded with logging, at level debug. Ends only with an
    /// error.
    ///
    /// # Errors
    /// When there is no ring buffer, or it cannot be watched.
    pub async fn forward_logs(&self) -> Result<std::convert::Infallible, CaptureError> {
        let pin = self.root.join("node").join(abi::PROGRAM_CONNECT4);
        let link = sys::open_pin(&pin).and_then(|link| sys::link_target(link.as_fd())).map_err(at(&pin))?;
        let logger = aya_log::EbpfLogger::init_from_id_with_logger(link.program_id, Forward)
            .map_err(|error| CaptureError::NotInForce(error.to_string()))?;
        let mut logger = sys::watch(logger).map_err(at(&pin))?;
        loop {
            let mut ready = logger.readable_mut().await.map_err(at(&pin))?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }

    fn pod_folder(&self, uid: &str) -> PathBuf {
        self.root.join("pods").join(folder_name(uid))
    }
}

/// Detaches and unpins everything that agents pinned under `bpffs`. For the removal of the mesh from a node.
///
/// # Errors
/// When bpffs cannot be changed.
pub fn purge(bpffs: &Path) -> Result<(), CaptureError> {
    let root = versioned(bpffs);
    match fs::remove_dir_all(&root) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&root)(error)),
        _ => Ok(()),
    }
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

fn versioned(bpffs: &Path) -> PathBuf {
    bpffs.join(format!("v{}", abi::LAYOUT_VERSION))
}

/// Loads the object with the node's maps at their pins, and a pod's at theirs where `pod` is given.
fn load(node: &Path, pod: Option<&Path>, log: bool) -> Result<Ebpf, CaptureError> {
    let level = if log { aya_log::Level::Debug as u8 } else { 0 };
    let mut loader = EbpfLoader::new();
    // No program reads the kernel's structures, so its type information need not be parsed.
    loader.btf(None).override_global(abi::GLOBAL_LOG_LEVEL, &level, true);
    for map in NODE_MAPS {
        loader.map_pin_path(map, node.join(map));
    }
    if let Some(pod) = pod {
        for map in [abi::MAP_SOCKETS, abi::MAP_POD] {
            loader.map_pin_path(map, pod.join(map));
        }
    }
    let loaded = loader.load(OBJECT).map_err(|error| CaptureError::Load(Box::new(error)));
    // The loader reads the kernel's type information whether it is wanted or not: 20 MiB, free again by now.
    drop(loader);
    sys::return_free_memory();
    loaded
}

fn attach(object: &mut Ebpf, name: &'static str, cgroup: &File, pin: &Path) -> Result<(), CaptureError> {
    let refused = |source: ProgramError| CaptureError::Program { program: name, source: Box::new(source) };
    let program = object.program_mut(name).ok_or(CaptureError::Missing(name))?;
    let program: &mut CgroupSockAddr = program.try_into().map_err(refused)?;
    program.load().map_err(refused)?;
    // Links on cgroups always stand beside each other; a mode that says so is refused with EINVAL.
    let id = program.attach(cgroup, CgroupAttachMode::Single).map_err(refused)?;
    let link: FdLink = program.take_link(id).map_err(refused)?.try_into().map_err(CaptureError::Link)?;
    link.pin(pin).map_err(|error| CaptureError::Pin { path: pin.to_owned(), why: error.to_string() })?;
    Ok(())
}

/// Checks that a pinned link is on the hook and the cgroup that are wanted.
fn adopt(link: &OwnedFd, pin: &Path, cgroup: &File, cgroup_root: &Path, attach_type: u32) -> Result<(), CaptureError> {
    use std::os::unix::fs::MetadataExt as _;
    let found = sys::link_target(link.as_fd()).map_err(at(pin))?;
    // The inode number of a cgroup's folder is its id.
    let wanted = cgroup.metadata().map_err(at(cgroup_root))?.ino();
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

fn take<M: TryFrom<Map, Error = MapError>>(object: &mut Ebpf, name: &'static str) -> Result<M, CaptureError> {
    let map = object.take_map(name).ok_or(CaptureError::Missing(name))?;
    M::try_from(map).map_err(map_error(name))
}

fn map_error(map: &'static str) -> impl Fn(MapError) -> CaptureError {
    move |source| CaptureError::Map { map, source: Box::new(source) }
}

fn at(path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> CaptureError {
    move |source| CaptureError::Path { path: path.as_ref().to_owned(), source }
}

/// A poisoned lock is taken all the same: the maps live in the kernel and no update is half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error with the causes that aya keeps below it (the verifier's log is one).
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// Takes the programs' records, which come by the `log` crate.
struct Forward;

impl log::Log for Forward {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        tracing::enabled!(target: "ebpf", tracing::Level::DEBUG)
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::debug!(target: "ebpf", "{}", record.args());
    }

    fn flush(&self) {}
}

impl std::fmt::Debug for NodeCapture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeCapture").field("root", &self.root).field("log", &self.log).finish_non_exhaustive()
    }
}

/// aya takes descriptors by `AsRawFd`.
struct Raw<'a>(BorrowedFd<'a>);

impl AsRawFd for Raw<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
