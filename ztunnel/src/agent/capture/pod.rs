//! Capture in one pod's network namespace: its instance of the lookup program, the listeners that it steers to, and the
//! guard at its edge.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::Ebpf;
use aya::maps::{Array, HashMap, MapData, MapError, SkStorage};
use aya::programs::SkLookup;
use aya::programs::links::FdLink;
use ztunnel_ebpf as abi;

use super::error::{CaptureError, at, map_error, program_error};
use super::guard::{self, Guard};
use super::loader::{open_map, pin};
use super::pins::{self, Ids};
use super::sockets::{SocketMap, keyed};
use super::{NodeCapture, Raw, folder_name, former, sys};
use crate::agent::netns::Netns;
use crate::agent::sock_diag;

/// Room for connections that are opened between counting those that are there and taking note of them.
const LATECOMERS: u32 = 64;

/// The pinned link of the lookup program.
pub(super) const LINK: &str = "link";
/// Maps of the pod that the lookup program uses.
const MAPS: [&str; 2] = [abi::MAP_POD, abi::MAP_SOCKETS];
/// Maps of the node that it uses.
const NODE_MAPS: [&str; 2] = [abi::MAP_PROBES, abi::MAP_COUNTERS];

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
    /// Those for IPv6 alone, in the order above.
    pub v6: [Option<BorrowedFd<'a>>; 5],
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
    node: PathBuf,
    node_maps: Arc<Ids>,
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
        // By this layout, or by another one that stands beside it.
        let was_captured = self.captures(attachment.netns.cookie())?;
        let capture = PodCapture::named(self, &folder_name(attachment.uid));
        let new = match fs::create_dir(&capture.folder) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(at(&capture.folder)(error)),
        };
        match self.attach(&capture, attachment) {
            Ok(()) => Ok(capture),
            Err(error) => {
                // The cause of the failure is worth more than that of the cleaning.
                if new && !was_captured {
                    let _ = self.release(attachment.netns.cookie());
                }
                if new {
                    let _ = capture.unpin();
                }
                Err(error)
            }
        }
    }

    fn attach(&self, capture: &PodCapture, attachment: Attachment<'_>) -> Result<(), CaptureError> {
        let Attachment { netns, entry, listeners, guard, .. } = attachment;
        let folder = capture.folder.as_path();
        capture.mend_pins()?;
        let inherited = former::inherit_pod(&self.bpffs, folder)?;
        let first = !inherited && (self.enrolled(netns.cookie())?.is_none() || !folder.join(abi::MAP_OLDER).exists());
        let room = if first { connections(netns)?.len() } else { 0 };
        let room = u32::try_from(room).unwrap_or(u32::MAX).saturating_add(LATECOMERS);
        let room = room.min(u32::try_from(abi::OLDER_CAPACITY).unwrap_or(u32::MAX));
        let guard = match guard {
            // One that cannot be asked for now may stand: it is neither taken away nor made anew.
            Some(guard) if is_missing(capture.verify_guard(netns, Some(guard)))? => Some(guard),
            Some(_) | None => None,
        };
        if guard.is_some() {
            // Before the pod's entry is written: taking a guard away may write there too.
            guard::remove(folder)?;
        }
        let mut object = self.loader.pod(folder, room)?;
        capture.tell(entry)?;
        capture.replace_listeners(listeners)?;
        if is_missing(capture.verify_lookup(netns))? {
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

    /// Detaches whatever is pinned for a pod, in every layout. Nothing to do is no error.
    ///
    /// # Errors
    /// When bpffs refuses.
    pub fn unpin_pod(&self, uid: &str) -> Result<(), CaptureError> {
        for folder in former::pod_folders(&self.bpffs, &folder_name(uid))? {
            remove(&folder)?;
        }
        remove(&self.pod_folder(uid))
    }

    /// The capture that an earlier agent pinned for a pod in this layout, if there is one.
    #[must_use]
    pub fn adopt_pod(&self, uid: &str) -> Option<PodCapture> {
        let capture = PodCapture::named(self, &folder_name(uid));
        capture.folder.join(LINK).exists().then_some(capture)
    }
}

/// Whether the kernel answered that something is not there. That it could not be asked is an error, and says nothing.
fn is_missing(asked: Result<(), CaptureError>) -> Result<bool, CaptureError> {
    match asked {
        Ok(()) => Ok(false),
        Err(error) if error.is_absence() => Ok(true),
        Err(error) => Err(error),
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
        Self {
            folder: node.root.join("pods").join(folder),
            node: node.node_folder(),
            node_maps: Arc::clone(&node.maps),
        }
    }

    /// Puts other listeners in the place of those that are gone, and exempts them. Those for DNS that are not given are
    /// taken out.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn replace_listeners(&self, listeners: Listeners<'_>) -> Result<(), CaptureError> {
        let sockets = SocketMap::open(&self.folder)?;
        let mut exempt = self.exempt()?;
        for (key, socket) in keyed(listeners) {
            let Some(socket) = socket else {
                sockets.clear(key)?;
                continue;
            };
            exempt.insert(&Raw(socket), 1, 0).map_err(map_error(abi::MAP_EXEMPT))?;
            sockets.set(key, socket)?;
        }
        Ok(())
    }

    /// Asks the kernel whether the programs steer to these listeners, and leave what they accept alone.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn verify_listeners(&self, listeners: Listeners<'_>) -> Result<(), CaptureError> {
        SocketMap::open(&self.folder)?.verify(listeners)?;
        let exempt = self.exempt()?;
        for (_, socket) in keyed(listeners) {
            match socket.map(|socket| exempt.get(&Raw(socket), 0)) {
                None | Some(Ok(1..)) => {}
                Some(Ok(0) | Err(MapError::KeyNotFound)) => {
                    return Err(CaptureError::NotInForce(String::from("a listener is not exempt from capture")));
                }
                Some(Err(error)) => return Err(map_error(abi::MAP_EXEMPT)(error)),
            }
        }
        Ok(())
    }

    /// Tells the lookup program and the guard these addresses and flags.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn tell(&self, entry: abi::PodEntry) -> Result<(), CaptureError> {
        let mut pod: PodMap = open_map(&self.folder, abi::MAP_POD)?;
        pod.set(0, entry.to_bytes(), 0).map_err(map_error(abi::MAP_POD))
    }

    /// Asks the kernel whether the programs are attached to this namespace and at this edge, use the maps that are pinned,
    /// and know these addresses.
    ///
    /// The calling thread must be in the network namespace of the node.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn verify(&self, netns: &Netns, entry: abi::PodEntry, guard: Option<Guard>) -> Result<(), CaptureError> {
        self.verify_programs(netns, guard)?;
        self.verify_entry(entry)
    }

    /// The same without the addresses.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn verify_programs(&self, netns: &Netns, guard: Option<Guard>) -> Result<(), CaptureError> {
        self.verify_lookup(netns)?;
        self.verify_guard(netns, guard)
    }

    /// Asks whether the lookup program and the guard know these addresses and flags.
    ///
    /// # Errors
    /// [`CaptureError::NotInForce`] when they do not; when the map cannot be read.
    pub fn verify_entry(&self, entry: abi::PodEntry) -> Result<(), CaptureError> {
        let pod: PodMap = open_map(&self.folder, abi::MAP_POD)?;
        let found = abi::PodEntry::from_bytes(&pod.get(&0, 0).map_err(map_error(abi::MAP_POD))?);
        if found == entry {
            return Ok(());
        }
        let pin = self.folder.join(abi::MAP_POD);
        Err(CaptureError::NotInForce(format!("{} holds other addresses or flags", pin.display())))
    }

    /// Asks the kernel whether the guard stands at this edge.
    ///
    /// The calling thread must be in the network namespace of the node.
    ///
    /// # Errors
    /// When it does not.
    pub fn verify_guard(&self, netns: &Netns, guard: Option<Guard>) -> Result<(), CaptureError> {
        guard.map_or(Ok(()), |guard| guard::verify(&self.folder, guard, netns, &self.node_maps))
    }

    /// Asks the kernel whether the lookup program is attached to this namespace and uses the maps that are pinned.
    ///
    /// # Errors
    /// When it is not.
    pub fn verify_lookup(&self, netns: &Netns) -> Result<(), CaptureError> {
        let pin = self.folder.join(LINK);
        let link = sys::open_pin(&pin).and_then(|link| sys::link_target(link.as_fd())).map_err(at(&pin))?;
        let wanted = inode(netns.as_fd()).map_err(at(&pin))?;
        if link.attach_type != sys::ATTACH_SK_LOOKUP || link.target != wanted {
            return Err(CaptureError::NotInForce(format!(
                "{} is attached to the network namespace {}, not {wanted}",
                pin.display(),
                link.target
            )));
        }
        pins::verify(link.program_id, &pins::ids(&self.folder, &MAPS)?)?;
        pins::verify(link.program_id, self.node_maps.iter().filter(|(name, _)| NODE_MAPS.contains(name)))
    }

    /// Pins the maps again that the programs of the pod use and that are not pinned (any more). Of programs that use
    /// different ones the lookup program is followed, and the guard is seen not to be in force. Returns whether any was not.
    ///
    /// # Errors
    /// When the kernel or bpffs refuses.
    pub fn mend_pins(&self) -> Result<bool, CaptureError> {
        let mut mended = false;
        if let Some(program) = guard::program(&self.folder)? {
            mended |= pins::mend(&self.folder, &guard::MAPS, program)?;
        }
        let pin = self.folder.join(LINK);
        match sys::open_pin(&pin).and_then(|link| sys::link_target(link.as_fd())) {
            Ok(link) => Ok(mended | pins::mend(&self.folder, &MAPS, link.program_id)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(mended),
            Err(error) => Err(at(&pin)(error)),
        }
    }

    /// Detaches the programs and removes what is pinned. Nothing to do is no error.
    ///
    /// # Errors
    /// When bpffs refuses.
    pub fn unpin(&self) -> Result<(), CaptureError> {
        remove(&self.folder)
    }

    /// The proxy's own sockets.
    fn exempt(&self) -> Result<SkStorage<MapData, u32>, CaptureError> {
        open_map(&self.node, abi::MAP_EXEMPT)
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

/// The number by which the kernel names a namespace in a link.
fn inode(netns: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(std::fs::File::from(netns.try_clone_to_owned()?).metadata()?.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_kernel_says_is_not_there_counts_as_missing() {
        let path = |errno| at("guard")(io::Error::from_raw_os_error(errno));
        assert!(!is_missing(Ok(())).unwrap());
        assert!(is_missing(Err(CaptureError::NotInForce(String::from("elsewhere")))).unwrap());
        assert!(is_missing(Err(path(libc::ENOENT))).unwrap());
        for errno in [libc::EMFILE, libc::ENOMEM, libc::EINTR, libc::EPERM] {
            is_missing(Err(path(errno))).unwrap_err();
        }
        let source = io::Error::from_raw_os_error(libc::ENOMEM);
        is_missing(Err(CaptureError::Namespace { what: "ask", source })).unwrap_err();
    }
}
