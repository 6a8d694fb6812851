//! Pins of maps, compared with the maps that programs really use. A program keeps its maps whatever becomes of their pins: a
//! pin that is gone, or is of another map, misleads whoever reads or loads by it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::maps::{MapData, MapInfo};

use super::error::{CaptureError, at, map_error};
use super::sys;

/// Maps by name: their ids.
pub type Ids = BTreeMap<&'static str, u32>;

/// The ids of maps that are pinned in a folder.
///
/// # Errors
/// When one is not there.
pub fn ids(folder: &Path, names: &[&'static str]) -> Result<Ids, CaptureError> {
    names.iter().map(|name| Ok((*name, id(&folder.join(name))?))).collect()
}

fn id(path: &Path) -> Result<u32, CaptureError> {
    sys::open_pin(path).and_then(|map| sys::map_id(map.as_fd())).map_err(at(path))
}

/// Asks whether a program uses exactly these maps, of those that have their names.
///
/// # Errors
/// [`CaptureError::NotInForce`] with the name of one that it does not use.
pub fn verify<'a>(
    program: u32,
    maps: impl IntoIterator<Item = (&'a &'static str, &'a u32)>,
) -> Result<(), CaptureError> {
    let used = used_by(program)?;
    match maps.into_iter().find(|(_, id)| !used.contains(id)) {
        None => Ok(()),
        Some((name, _)) => {
            Err(CaptureError::NotInForce(format!("program {program} does not use the map {name} that is pinned")))
        }
    }
}

/// Pins the maps of these names that a program uses in a folder, where they are not. Returns whether any was not.
///
/// # Errors
/// When the kernel or bpffs refuses.
pub fn mend(folder: &Path, names: &[&'static str], program: u32) -> Result<bool, CaptureError> {
    let mut mended = false;
    for id in used_by(program)? {
        let info = MapInfo::from_id(id).map_err(map_error("of a program"))?;
        let Some(name) = names.iter().find(|name| info.name_as_str() == Some(name)) else { continue };
        mended |= pin(folder, name, id)?;
    }
    Ok(mended)
}

/// Pins the map with this id in a folder if it is not, and returns whether it was not.
///
/// # Errors
/// When the kernel or bpffs refuses; when there is no such map any more.
pub fn pin(folder: &Path, name: &'static str, wanted: u32) -> Result<bool, CaptureError> {
    let path = folder.join(name);
    match id(&path) {
        Ok(found) if found == wanted => return Ok(false),
        // Of another map, or of something else.
        Ok(_) | Err(CaptureError::Path { .. }) => match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&path)(error)),
            _ => {}
        },
        Err(error) => return Err(error),
    }
    let map = MapData::from_id(wanted).map_err(map_error(name))?;
    match map.pin(&path) {
        Ok(()) => Ok(true),
        Err(error) => Err(CaptureError::Pin { path, why: error.to_string() }),
    }
}

fn used_by(program: u32) -> Result<Vec<u32>, CaptureError> {
    sys::program_maps(program).map_err(|source| CaptureError::Maps { program, source })
}
