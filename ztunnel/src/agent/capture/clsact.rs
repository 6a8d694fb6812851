//! The guard on kernels without links for traffic classifiers (before Linux 6.6): a filter of the clsact qdisc.
//!
//! A filter lives as long as its device, whether this process does or not, so the pin only says which program it is: the
//! filter is found by that. A link in the pod's folder says at which device. What cannot be found any more is made to let
//! everything pass, by the pod's map.

use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::os::unix::fs::symlink;
use std::path::Path;

use aya::maps::{Array, MapData};
use aya::programs::links::Link as _;
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{ProgramInfo, SchedClassifier, TcAttachType};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};
use ztunnel_ebpf as abi;

use super::error::{CaptureError, at, map_error, program_error};
use super::loader::open_map;
use super::sys;
use crate::agent::netlink::{self, Netlink};

/// The pinned program.
const PROGRAM: &str = "guard-filter";
/// A symbolic link to nowhere, named after the device: `ingress-<index>` or `egress-<index>`.
const PLACE: &str = "guard-device";
/// Before any other filter of its kind.
const PRIORITY: u16 = 1;

/// Attaches the loaded program to a device of the calling thread's namespace.
///
/// # Errors
/// When the kernel refuses.
pub fn attach(
    program: &mut SchedClassifier,
    folder: &Path,
    interface: &str,
    index: u32,
    side: TcAttachType,
) -> Result<(), CaptureError> {
    let refused = program_error(abi::PROGRAM_GUARD);
    match tc::qdisc_add_clsact(interface) {
        Ok(()) | Err(TcError::AlreadyAttached) => {}
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
        Err(error) => return Err(refused(error.into())),
    }
    // Known by its pin before it is there: whatever happens, it is found again.
    let path = folder.join(PROGRAM);
    program.pin(&path).map_err(|error| CaptureError::Pin { path, why: error.to_string() })?;
    let place = folder.join(PLACE);
    symlink(format!("{}-{index}", name(side)), &place).map_err(at(&place))?;
    let options = NlOptions { priority: PRIORITY, ..NlOptions::default() };
    let id = program.attach_with_options(interface, side, TcAttachOptions::Netlink(options)).map_err(&refused)?;
    // Dropped, it would be detached.
    let _ = ManuallyDrop::new(program.take_link(id).map_err(&refused)?);
    Ok(())
}

/// The id of the pinned program, if it is a filter of a device of the calling thread's namespace.
///
/// # Errors
/// `NotFound` when nothing is pinned; when the kernel refuses.
pub fn attached(folder: &Path, index: u32, side: TcAttachType) -> Result<Option<u32>, CaptureError> {
    let filters = filters(folder, index, side)?;
    if filters.is_empty() { Ok(None) } else { program(folder) }
}

/// The id of the pinned program; `None` if none is pinned.
///
/// # Errors
/// When the kernel refuses.
pub fn program(folder: &Path) -> Result<Option<u32>, CaptureError> {
    let path = folder.join(PROGRAM);
    if !path.exists() {
        return Ok(None);
    }
    Ok(Some(ProgramInfo::from_pin(&path).map_err(program_error(abi::PROGRAM_GUARD))?.id()))
}

/// Takes the filter away, if its device is in the calling thread's namespace; elsewhere it is made to let everything pass.
/// Nothing to do is no error.
///
/// # Errors
/// When the kernel or bpffs refuses.
pub fn remove(folder: &Path) -> Result<(), CaptureError> {
    let path = folder.join(PROGRAM);
    if !path.exists() {
        return Ok(());
    }
    let place = folder.join(PLACE);
    let mut found = false;
    if let Some((index, side)) = fs::read_link(&place).ok().as_deref().and_then(Path::to_str).and_then(parse)
        && let Ok(interface) = sys::interface_name(index)
    {
        let refused = program_error(abi::PROGRAM_GUARD);
        for handle in filters(folder, index, side)? {
            let link = SchedClassifierLink::attached(&interface, side, PRIORITY, handle, None).map_err(at(&place))?;
            link.detach().map_err(&refused)?;
            found = true;
        }
    }
    if !found {
        disarm(folder)?;
    }
    for path in [path, place] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&path)(error)),
            _ => {}
        }
    }
    Ok(())
}

/// Handles of the pinned program's filters at a device.
fn filters(folder: &Path, index: u32, side: TcAttachType) -> Result<Vec<TcHandle>, CaptureError> {
    let path = folder.join(PROGRAM);
    let program = program(folder)?.ok_or_else(|| at(&path)(io::ErrorKind::NotFound.into()))?;
    let mut request = TcMessage::default();
    request.header.index = i32::try_from(index).unwrap_or_default();
    // Ingress and egress of clsact.
    request.header.parent = match side {
        TcAttachType::Ingress => 0xffff_fff2,
        TcAttachType::Egress | TcAttachType::Custom(_) => 0xffff_fff3,
    }
    .into();
    let answers = Netlink::open(netlink::ROUTE)
        .map_err(netlink::NetlinkError::from)
        .and_then(|mut netlink| netlink.list(&RouteNetlinkMessage::GetTrafficFilter(request)))
        .map_err(|error| at(&path)(io::Error::other(error)))?;
    Ok(answers.iter().filter_map(|answer| handle(answer, program)).collect())
}

/// The handle of a filter, if it is this program's.
fn handle(answer: &RouteNetlinkMessage, program: u32) -> Option<TcHandle> {
    let RouteNetlinkMessage::NewTrafficFilter(filter) = answer else { return None };
    let ours = filter.attributes.iter().any(|attribute| match attribute {
        TcAttribute::Options(options) => options.contains(&TcOption::Bpf(TcFilterBpfOption::ProgId(program))),
        _ => false,
    });
    ours.then(|| TcHandle::new(filter.header.handle.major, filter.header.handle.minor))
}

/// Makes the guard let everything pass.
fn disarm(folder: &Path) -> Result<(), CaptureError> {
    if !folder.join(abi::MAP_POD).exists() {
        return Ok(());
    }
    let mut pod: Array<MapData, [u8; abi::PodEntry::SIZE]> = open_map(folder, abi::MAP_POD)?;
    let mut entry = abi::PodEntry::from_bytes(&pod.get(&0, 0).map_err(map_error(abi::MAP_POD))?);
    entry.flags |= abi::FLAG_DISARMED;
    pod.set(0, entry.to_bytes(), 0).map_err(map_error(abi::MAP_POD))
}

const fn name(side: TcAttachType) -> &'static str {
    match side {
        TcAttachType::Ingress => "ingress",
        TcAttachType::Egress | TcAttachType::Custom(_) => "egress",
    }
}

fn parse(place: &str) -> Option<(u32, TcAttachType)> {
    let (side, index) = place.split_once('-')?;
    let side = if side == "ingress" { TcAttachType::Ingress } else { TcAttachType::Egress };
    Some((index.parse().ok()?, side))
}
