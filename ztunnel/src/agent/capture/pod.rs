//! Capture in one pod's network namespace: its instance of the lookup program, the listeners that it steers to, and the
//! guard at its edge.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{Array, HashMap, MapData, MapError, SkStorage, SockMap};
use aya::programs::SkLookup;
use aya::programs::links::FdLink;
use ztunnel_ebpf as abi;

use super::error::{CaptureError, at, map_error, program_error};
use super::guard::{self, Guard};
use super::loader::{open_map, pin};
use super::{NodeCapture, Raw, former, sys};
use crate::agent::netns::Netns;
use crate::agent::sock_diag;

/// Room for connections that are opened between counting those that are there and taking note of them.
const LATECOMERS: u32 = 64;

/// The pinned link of the lookup program.
const LINK: &str = "link";

/// The map of one pod's addresses.
type PodMap = Array<MapData, [u8; abi::PodEntry::SIZE]>;

/// The proxy's listening sockets of one pod. Each serves both families where it is a dual-stack socket.
#[derive(Clone, Copy, Debug)]
pub struct Listeners<'a> {
    /// 15001, transparent.
    pub outbound: BorrowedFd<'a>,
    /// 15006, transparent.
    pub inbound_plaintext: BorrowedFd<'a>,
    /// 15008.
    pub inbound_hbone: BorrowedFd<'a>,
    /// 15053, UDP, transparent.
    pub dns_udp: Option<BorrowedFd<'a>>,
    /// 15053, TCP, transparent.
    pub dns_tcp: Option<BorrowedFd<'a>>,
}

/// What [`NodeCapture::attach_pod`] brings in force.
#[derive(Clone, Copy, Debug)]
pub struct Attachment<'a> {
    /// The pod's UID.
    pub uid: &'a str,
    /// Its network namespace.
    pub netns: &'a Netns,
    /// Its addresses and flags.
    pub entry: abi::PodEntry,
    /// The proxy's listeners.
    pub listeners: Listeners<'a>,
    /// Where the guard stands; `None` only where nothing can leave the pod.
    pub guard: Option<Guard>,
}

/// One pod's capture as it lies in the kernel. Dropping it changes nothing there.
#[derive(Debug)]
pub struct PodCapture {
    folder: PathBuf,
}

impl NodeCapture {
    /// Brings a pod's capture in force, whatever becomes of this process: what arrives in its namespace is steered to
    /// these listeners, its new connections are captured where [`NodeCapture::set_routes`] says so (call that before),
    /// and the guard stops what is not the proxy's. What is in force already stays so all the time, and is told these
    /// addresses and listeners.
    ///
    /// The calling thread must be in the network namespace of the node. Blocks shortly.
    ///
    /// # Errors
    /// When the kernel refuses; a pod of which nothing was in force before has nothing in force then.
    pub fn attach_pod(&self, attachment: Attachment<'_>) -> Result<PodCapture, CaptureError> {
        let capture = PodCapture { folder: self.pod_folder(attachment.uid) };
        let new = match fs::create_dir(&capture.folder) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(at(&capture.folder)(error)),
        };
        match self.attach(&capture, attachment) {
            Ok(()) => Ok(capture),
            Err(error) => {
                if new {
                    // The cause of the failure is worth more than that of the cleaning.
                    let _ = self.release(attachment.netns.cookie());
                    let _ = capture.unpin();
                }
                Err(error)
            }
        }
    }

    fn attach(&self, capture: &PodCapture, attachment: Attachment<'_>) -> Result<(), CaptureError> {
        let Attachment { netns, entry, listeners, guard, .. } = attachment;
        let folder = capture.folder.as_path();
        let first = self.enrolled(netns.cookie())?.is_none() || !folder.join(abi::MAP_OLDER).exists();
        let room = if first { connections(netns)?.len() } else { 0 };
        let room = u32::try_from(room).unwrap_or(u32::MAX).saturating_add(LATECOMERS);
        let room = room.min(u32::try_from(abi::OLDER_CAPACITY).unwrap_or(u32::MAX));
        let guard = guard.filter(|guard| guard::verify(folder, *guard, netns).is_err());
        if guard.is_some() {
            // Before the pod's entry is written: taking a guard away may write there too.
            guard::remove(folder)?;
        }
        let mut object = self.loader.pod(folder, room)?;
        let mut pod: PodMap = open_map(folder, abi::MAP_POD)?;
        pod.set(0, entry.to_bytes(), 0).map_err(map_error(abi::MAP_POD))?;
        capture.replace_listeners(listeners)?;
        if capture.verify_lookup(netns.as_fd()).is_err() {
            unlink(&folder.join(LINK))?;
            attach_lookup(&mut object, netns.as_fd(), &folder.join(LINK))?;
        }
        self.enrol(netns.cookie(), entry)?;
        if first {
            // Only now: a connection that is opened from here on is captured.
            remember(folder, &connections(netns)?, room)?;
        }
        if let Some(guard) = guard {
            guard::attach(&mut object, folder, guard, netns)?;
        }
        Ok(())
    }

    /// Detaches whatever is pinned for a pod. Nothing to do is no error.
    ///
    /// # Errors
    /// When bpffs refuses.
    pub fn unpin_pod(&self, uid: &str) -> Result<(), CaptureError> {
        remove(&self.pod_folder(uid))
    }

    /// The capture that an earlier agent pinned for a pod in this layout, if there is one.
    #[must_use]
    pub fn adopt_pod(&self, uid: &str) -> Option<PodCapture> {
        let folder = self.pod_folder(uid);
        folder.join(LINK).exists().then_some(PodCapture { folder })
    }
}

fn attach_lookup(object: &mut Ebpf, netns: BorrowedFd<'_>, path: &Path) -> Result<(), CaptureError> {
    const NAME: &str = abi::PROGRAM_LOOKUP;
    let refused = program_error(NAME);
    let program = object.program_mut(NAME).ok_or(CaptureError::Missing(NAME))?;
    let program: &mut SkLookup = program.try_into().map_err(&refused)?;
    program.load().map_err(&refused)?;
    let id = program.attach(netns).map_err(&refused)?;
    let link: FdLink = program.take_link(id).map_err(&refused)?.into();
    pin(link, path)
}

/// Cookies of the TCP sockets that are connected in a namespace.
fn connections(netns: &Netns) -> Result<Vec<u64>, CaptureError> {
    let found = sock_diag::connections(netns)
        .map_err(|error| CaptureError::Namespace { what: "list connections", source: io::Error::other(error) })?;
    Ok(found.iter().map(sock_diag::Connection::cookie).collect())
}

/// Writes down which connections are older than the enrolment. Those for which there is no room are cut.
fn remember(folder: &Path, cookies: &[u64], room: u32) -> Result<(), CaptureError> {
    let mut older: HashMap<MapData, u64, u32> = open_map(folder, abi::MAP_OLDER)?;
    for cookie in cookies.iter().take(usize::try_from(room).unwrap_or(usize::MAX)) {
        older.insert(cookie, 1, 0).map_err(map_error(abi::MAP_OLDER))?;
    }
    Ok(())
}

impl PodCapture {
    /// A capture by the name of its folder, whoever made it.
    #[must_use]
    pub fn named(node: &NodeCapture, folder: &str) -> Self {
        Self { folder: node.root.join("pods").join(folder) }
    }

    /// Puts other listeners in the place of those that are gone, and exempts them. Those for DNS that are not given are
    /// taken out.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn replace_listeners(&self, listeners: Listeners<'_>) -> Result<(), CaptureError> {
        let mut sockets: SockMap<MapData> = open_map(&self.folder, abi::MAP_SOCKETS)?;
        let mut exempt: SkStorage<MapData, u32> = open_map(&self.node_folder()?, abi::MAP_EXEMPT)?;
        for (key, socket) in [
            (abi::SOCKET_OUTBOUND, Some(listeners.outbound)),
            (abi::SOCKET_INBOUND_PLAINTEXT, Some(listeners.inbound_plaintext)),
            (abi::SOCKET_INBOUND_HBONE, Some(listeners.inbound_hbone)),
            (abi::SOCKET_DNS_UDP, listeners.dns_udp),
            (abi::SOCKET_DNS_TCP, listeners.dns_tcp),
        ] {
            let Some(socket) = socket else {
                match sockets.clear_index(&key) {
                    Ok(()) | Err(MapError::KeyNotFound) => {}
                    // There was none.
                    Err(MapError::SyscallError(error)) if is_absent(&error.io_error) => {}
                    Err(error) => return Err(map_error(abi::MAP_SOCKETS)(error)),
                }
                continue;
            };
            exempt.insert(&Raw(socket), 1, 0).map_err(map_error(abi::MAP_EXEMPT))?;
            sockets.set(key, &Raw(socket), 0).map_err(map_error(abi::MAP_SOCKETS))?;
        }
        Ok(())
    }

    /// Asks the kernel whether the programs are attached to this namespace and at this edge, and know these addresses.
    ///
    /// The calling thread must be in the network namespace of the node.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn verify(&self, netns: &Netns, entry: abi::PodEntry, guard: Option<Guard>) -> Result<(), CaptureError> {
        self.verify_lookup(netns.as_fd())?;
        let pod: PodMap = open_map(&self.folder, abi::MAP_POD)?;
        let found = abi::PodEntry::from_bytes(&pod.get(&0, 0).map_err(map_error(abi::MAP_POD))?);
        if found != entry {
            let pin = self.folder.join(abi::MAP_POD);
            return Err(CaptureError::NotInForce(format!("{} holds other addresses or flags", pin.display())));
        }
        self.verify_guard(netns, guard)
    }

    /// Asks the kernel whether the guard stands at this edge.
    ///
    /// The calling thread must be in the network namespace of the node.
    ///
    /// # Errors
    /// When it does not.
    pub fn verify_guard(&self, netns: &Netns, guard: Option<Guard>) -> Result<(), CaptureError> {
        guard.map_or(Ok(()), |guard| guard::verify(&self.folder, guard, netns))
    }

    fn verify_lookup(&self, netns: BorrowedFd<'_>) -> Result<(), CaptureError> {
        let pin = self.folder.join(LINK);
        let link = sys::open_pin(&pin).and_then(|link| sys::link_target(link.as_fd())).map_err(at(&pin))?;
        let wanted = inode(netns).map_err(at(&pin))?;
        if link.attach_type == sys::ATTACH_SK_LOOKUP && link.target == wanted {
            return Ok(());
        }
        Err(CaptureError::NotInForce(format!(
            "{} is attached to the network namespace {}, not {wanted}",
            pin.display(),
            link.target
        )))
    }

    /// Whether the namespace is gone: then nothing is captured and the pins are only litter.
    ///
    /// # Errors
    /// When the link cannot be asked.
    pub fn is_dead(&self) -> Result<bool, CaptureError> {
        let pin = self.folder.join(LINK);
        let link = sys::open_pin(&pin).and_then(|link| sys::link_target(link.as_fd())).map_err(at(&pin))?;
        Ok(link.target == 0)
    }

    /// Detaches the programs and removes what is pinned. Nothing to do is no error.
    ///
    /// # Errors
    /// When bpffs refuses.
    pub fn unpin(&self) -> Result<(), CaptureError> {
        remove(&self.folder)
    }

    /// Where the node's maps of the same layout are pinned.
    fn node_folder(&self) -> Result<PathBuf, CaptureError> {
        let root = self.folder.parent().and_then(Path::parent);
        let root = root.ok_or_else(|| CaptureError::NotInForce(String::from("the pod's folder is in no layout")))?;
        Ok(root.join("node"))
    }
}

/// Detaches the programs of a pod and removes what is pinned in its folder. Nothing to do is no error.
///
/// # Errors
/// When the kernel or bpffs refuses.
pub fn remove(folder: &Path) -> Result<(), CaptureError> {
    guard::remove(folder)?;
    former::detach(&folder.join(LINK))?;
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(folder)(error)),
        _ => Ok(()),
    }
}

/// Detaches the program of a pinned link and removes the pin. Nothing to do is no error.
fn unlink(pin: &Path) -> Result<(), CaptureError> {
    former::detach(pin)?;
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(pin)(error)),
        _ => Ok(()),
    }
}

/// What the kernel says of an index of a socket map that holds none.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT))
}

/// The number by which the kernel names a namespace in a link.
fn inode(netns: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(std::fs::File::from(netns.try_clone_to_owned()?).metadata()?.ino())
}
