//! The object with the programs, and loading it.

use std::fs::File;
use std::path::Path;
use std::sync::Mutex;

use aya::maps::{Map, MapData, MapError};
use aya::programs::links::FdLink;
use aya::{Ebpf, EbpfLoader};
use ztunnel_ebpf as abi;

use super::error::{CaptureError, map_error};
use super::lock;

/// The programs, built by `cargo xtask ebpf`; `build.rs` chooses the file.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("CULVERT_EBPF_OBJECT"));

/// Maps of the node that pods' instances of the programs share.
pub const NODE_MAPS: [&str; 6] =
    [abi::MAP_PODS, abi::MAP_ROUTES, abi::MAP_EXEMPT, abi::MAP_PROBES, abi::MAP_COUNTERS, abi::MAP_LOGS];

/// Maps of one pod.
const POD_MAPS: [&str; 3] = [abi::MAP_SOCKETS, abi::MAP_POD, abi::MAP_OLDER];

/// Loads the object as often as it is needed. What loads is kept, since making it reads the kernel's type information
/// (20 MiB for a moment) whether it is wanted or not.
pub struct Loader {
    node: Mutex<EbpfLoader<'static>>,
    /// Another one: where maps are pinned can be changed in a loader, and not taken back.
    pod: Mutex<EbpfLoader<'static>>,
}

impl Loader {
    /// `node`: where the node's maps are pinned. `log`: whether the programs make log records.
    pub fn new(node: &Path, log: bool) -> Self {
        let both = Self { node: Mutex::new(make(node, log)), pod: Mutex::new(make(node, log)) };
        mesh_runtime::memory::return_freed();
        both
    }

    /// Loads it for the programs of the node.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn node(&self) -> Result<Ebpf, CaptureError> {
        let mut loader = lock(&self.node);
        // The maps of a pod are made all the same, and go with the object.
        loader.map_max_entries(abi::MAP_OLDER, 1);
        loader.load(OBJECT).map_err(|error| CaptureError::Load(Box::new(error)))
    }

    /// Loads it for the programs of one pod, whose maps are, or will be, pinned in a folder.
    ///
    /// `older`: how many connections that are older than the enrolment there is room for.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn pod(&self, folder: &Path, older: u32) -> Result<Ebpf, CaptureError> {
        let mut loader = lock(&self.pod);
        loader.map_max_entries(abi::MAP_OLDER, older);
        for map in POD_MAPS {
            loader.map_pin_path(map, folder.join(map));
        }
        loader.load(OBJECT).map_err(|error| CaptureError::Load(Box::new(error)))
    }
}

fn make(node: &Path, log: bool) -> EbpfLoader<'static> {
    const DEBUG: &u8 = &(aya_log::Level::Debug as u8);
    let level = if log { DEBUG } else { &0 };
    let mut loader = EbpfLoader::new();
    // No program reads the kernel's structures.
    loader.btf(None).override_global(abi::GLOBAL_LOG_LEVEL, level, true);
    for map in NODE_MAPS {
        loader.map_pin_path(map, node.join(map));
    }
    loader
}

/// Takes a map out of a loaded object.
///
/// # Errors
/// When the object has none of this name and kind.
pub fn take<M: TryFrom<Map, Error = MapError>>(object: &mut Ebpf, name: &'static str) -> Result<M, CaptureError> {
    let map = object.take_map(name).ok_or(CaptureError::Missing(name))?;
    M::try_from(map).map_err(map_error(name))
}

/// Opens a map by its pin in a folder.
///
/// # Errors
/// When it is not there, or of another kind.
pub fn open_map<M: TryFrom<Map, Error = MapError>>(folder: &Path, name: &'static str) -> Result<M, CaptureError> {
    let data = MapData::from_pin(folder.join(name)).map_err(map_error(name))?;
    Map::from_map_data(data).and_then(M::try_from).map_err(map_error(name))
}

/// Pins a link.
///
/// # Errors
/// When bpffs refuses.
pub fn pin(link: FdLink, path: &Path) -> Result<(), CaptureError> {
    match link.pin(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(CaptureError::Pin { path: path.to_owned(), why: error.to_string() }),
    }
}

/// The descriptor of a cgroup's folder.
///
/// # Errors
/// When there is none.
pub fn open_cgroup(path: &Path) -> Result<File, CaptureError> {
    File::open(path).map_err(super::error::at(path))
}
