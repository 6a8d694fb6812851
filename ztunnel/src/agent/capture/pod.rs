//! Capture in one pod's network namespace: its instance of the lookup program and the listeners that it steers to.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapData, SockMap};
use aya::programs::links::FdLink;
use aya::programs::{ProgramError, SkLookup};
use ztunnel_ebpf as abi;

use super::{CaptureError, NodeCapture, Raw, at, load, map_error, sys, take};

/// The proxy's listening sockets of one pod.
#[derive(Clone, Copy, Debug)]
pub struct Listeners<'a> {
    /// 15001, transparent.
    pub outbound: BorrowedFd<'a>,
    /// 15006, transparent.
    pub inbound_plaintext: BorrowedFd<'a>,
    /// 15008.
    pub inbound_hbone: BorrowedFd<'a>,
}

/// One pod's capture as it lies in the kernel. Dropping it changes nothing there.
#[derive(Debug)]
pub struct PodCapture {
    folder: PathBuf,
}

impl NodeCapture {
    /// Steers what arrives in a pod's namespace to these listeners, from now on and whatever becomes of this process.
    /// What an earlier, failed enrolment left is replaced.
    ///
    /// # Errors
    /// When the kernel refuses; nothing stays attached.
    pub fn attach_pod(
        &self,
        uid: &str,
        netns: BorrowedFd<'_>,
        entry: abi::PodEntry,
        listeners: Listeners<'_>,
    ) -> Result<PodCapture, CaptureError> {
        let capture = PodCapture { folder: self.pod_folder(uid) };
        capture.unpin()?;
        fs::create_dir(&capture.folder).map_err(at(&capture.folder))?;
        match self.attach(&capture, netns, entry, listeners) {
            Ok(()) => Ok(capture),
            Err(error) => {
                // The cause of the failure is worth more than that of the cleaning.
                let _ = capture.unpin();
                Err(error)
            }
        }
    }

    fn attach(
        &self,
        capture: &PodCapture,
        netns: BorrowedFd<'_>,
        entry: abi::PodEntry,
        listeners: Listeners<'_>,
    ) -> Result<(), CaptureError> {
        const NAME: &str = abi::PROGRAM_LOOKUP;
        let refused = |source: ProgramError| CaptureError::Program { program: NAME, source: Box::new(source) };
        let mut object = load(&self.root.join("node"), Some(&capture.folder), self.log)?;
        let mut pod: Array<MapData, [u8; abi::PodEntry::SIZE]> = take(&mut object, abi::MAP_POD)?;
        pod.set(0, entry.to_bytes(), 0).map_err(map_error(abi::MAP_POD))?;
        let mut sockets: SockMap<MapData> = take(&mut object, abi::MAP_SOCKETS)?;
        fill(&mut sockets, listeners)?;
        let program = object.program_mut(NAME).ok_or(CaptureError::Missing(NAME))?;
        let program: &mut SkLookup = program.try_into().map_err(refused)?;
        program.load().map_err(refused)?;
        let id = program.attach(netns).map_err(refused)?;
        let link: FdLink = program.take_link(id).map_err(refused)?.into();
        let pin = capture.folder.join("link");
        link.pin(&pin).map_err(|error| CaptureError::Pin { path: pin.clone(), why: error.to_string() })?;
        Ok(())
    }

    /// Detaches whatever is pinned for a pod. Nothing to do is no error.
    ///
    /// # Errors
    /// When bpffs refuses.
    pub fn unpin_pod(&self, uid: &str) -> Result<(), CaptureError> {
        remove(&self.pod_folder(uid))
    }

    /// The capture that an earlier agent pinned for a pod, if there is one.
    #[must_use]
    pub fn adopt_pod(&self, uid: &str) -> Option<PodCapture> {
        let folder = self.pod_folder(uid);
        folder.join("link").exists().then_some(PodCapture { folder })
    }
}

impl PodCapture {
    /// A capture by the name of its folder, whoever made it.
    #[must_use]
    pub fn named(node: &NodeCapture, folder: &str) -> Self {
        Self { folder: node.root.join("pods").join(folder) }
    }

    /// Puts other listeners in the place of those that are gone.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn replace_listeners(&self, listeners: Listeners<'_>) -> Result<(), CaptureError> {
        let pin = self.folder.join(abi::MAP_SOCKETS);
        let data = MapData::from_pin(&pin).map_err(map_error(abi::MAP_SOCKETS))?;
        let map = Map::from_map_data(data).map_err(map_error(abi::MAP_SOCKETS))?;
        let mut sockets = SockMap::try_from(map).map_err(map_error(abi::MAP_SOCKETS))?;
        fill(&mut sockets, listeners)
    }

    /// Asks the kernel whether the program is attached to this namespace and knows these addresses.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn verify(&self, netns: BorrowedFd<'_>, entry: abi::PodEntry) -> Result<(), CaptureError> {
        let pin = self.folder.join("link");
        let link = sys::open_pin(&pin).and_then(|link| sys::link_target(link.as_fd())).map_err(at(&pin))?;
        let wanted = inode(netns).map_err(at(&pin))?;
        if link.attach_type != sys::ATTACH_SK_LOOKUP || link.target != wanted {
            return Err(CaptureError::NotInForce(format!(
                "{} is attached to the network namespace {}, not {wanted}",
                pin.display(),
                link.target
            )));
        }
        let pin = self.folder.join(abi::MAP_POD);
        let data = MapData::from_pin(&pin).map_err(map_error(abi::MAP_POD))?;
        let map = Map::from_map_data(data).map_err(map_error(abi::MAP_POD))?;
        let pod: Array<MapData, [u8; abi::PodEntry::SIZE]> = Array::try_from(map).map_err(map_error(abi::MAP_POD))?;
        let found = abi::PodEntry::from_bytes(&pod.get(&0, 0).map_err(map_error(abi::MAP_POD))?);
        if found == entry {
            Ok(())
        } else {
            Err(CaptureError::NotInForce(format!("{} holds other addresses", pin.display())))
        }
    }

    /// Whether the namespace is gone: then nothing is captured and the pins are only litter.
    ///
    /// # Errors
    /// When the link cannot be asked.
    pub fn is_dead(&self) -> Result<bool, CaptureError> {
        let pin = self.folder.join("link");
        let link = sys::open_pin(&pin).and_then(|link| sys::link_target(link.as_fd())).map_err(at(&pin))?;
        Ok(link.target == 0)
    }

    /// Detaches the program and removes what is pinned. Nothing to do is no error.
    ///
    /// # Errors
    /// When bpffs refuses.
    pub fn unpin(&self) -> Result<(), CaptureError> {
        remove(&self.folder)
    }
}

fn fill(sockets: &mut SockMap<MapData>, listeners: Listeners<'_>) -> Result<(), CaptureError> {
    for (key, socket) in [
        (abi::SOCKET_OUTBOUND, listeners.outbound),
        (abi::SOCKET_INBOUND_PLAINTEXT, listeners.inbound_plaintext),
        (abi::SOCKET_INBOUND_HBONE, listeners.inbound_hbone),
    ] {
        sockets.set(key, &Raw(socket), 0).map_err(map_error(abi::MAP_SOCKETS))?;
    }
    Ok(())
}

fn remove(folder: &Path) -> Result<(), CaptureError> {
    let link = folder.join("link");
    match sys::open_pin(&link) {
        Ok(pinned) => sys::detach(pinned.as_fd()).map_err(at(&link))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(at(&link)(error)),
    }
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(folder)(error)),
        _ => Ok(()),
    }
}

/// The number by which the kernel names a namespace in a link.
fn inode(netns: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(std::fs::File::from(netns.try_clone_to_owned()?).metadata()?.ino())
}
