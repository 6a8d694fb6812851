//! Whom the kernel holds captured, as the pins alone tell: in every layout, whether anybody knows of the pod or not.

use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use super::error::{CaptureError, at};
use super::pod::LINK;
use super::{NodeCapture, folder_name, folders, former, guard, layout, sys};

/// A pod's folder in one of the layouts.
#[derive(Debug)]
pub struct Held {
    /// The pod's UID; `None` where the folder's name is none that an agent gives.
    pub uid: Option<String>,
    /// Where it is pinned.
    pub folder: PathBuf,
    /// Inode of the network namespace that the lookup program is attached to; `None`: to none, and the pins are only litter. An
    /// error where it cannot be told, as where the guard stands without it.
    pub netns_inode: Result<Option<u64>, CaptureError>,
}

/// Every pod that is pinned under `bpffs`, in whatever layout. One that is in several comes several times.
///
/// # Errors
/// When bpffs cannot be read.
pub fn held(bpffs: &Path) -> Result<Vec<Held>, CaptureError> {
    let mut held = Vec::new();
    for version in former::versions(bpffs)? {
        let pods = layout(bpffs, version).join("pods");
        let names = match folders(&pods) {
            Err(error) if error.is_absence() => continue,
            other => other?,
        };
        held.extend(names.into_iter().map(|name| {
            let folder = pods.join(&name);
            Held { uid: uid_of(&name), netns_inode: attached_to(&folder), folder }
        }));
    }
    Ok(held)
}

impl NodeCapture {
    /// As [`held`], on this node.
    ///
    /// # Errors
    /// As [`held`].
    pub fn held(&self) -> Result<Vec<Held>, CaptureError> {
        held(&self.bpffs)
    }

    /// Whether no layout captures a pod any more: its namespace is gone, or nothing is pinned. What cannot be found out counts
    /// as no.
    #[must_use]
    pub fn is_dead(&self, uid: &str) -> bool {
        let (bpffs, name) = (&self.bpffs, folder_name(uid));
        let is_dead = |version: u32| matches!(attached_to(&layout(bpffs, version).join("pods").join(&name)), Ok(None));
        former::versions(bpffs).is_ok_and(|versions| versions.into_iter().all(is_dead))
    }

    /// Removes what is pinned in a folder.
    ///
    /// # Errors
    /// When the kernel or bpffs refuses.
    pub fn unpin(&self, held: &Held) -> Result<(), CaptureError> {
        super::pod::remove(&held.folder)
    }
}

fn attached_to(folder: &Path) -> Result<Option<u64>, CaptureError> {
    let pin = folder.join(LINK);
    match sys::open_pin(&pin).and_then(|link| sys::link_target(link.as_fd())) {
        Ok(link) => Ok(Some(link.target).filter(|target| *target != 0)),
        Err(error) if error.kind() == io::ErrorKind::NotFound && guard::stands(folder)? => {
            Err(CaptureError::NotInForce(format!("{} is gone, and the pod's guard stands", pin.display())))
        }
        // An agent was ended before it attached anything, or the pod is gone.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at(&pin)(error)),
    }
}

/// The UID that gives a folder this name, as [`folder_name`] does.
#[must_use]
pub fn uid_of(folder: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(folder.len());
    let mut rest = folder.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let escaped = if *first == b'_' { Some(after.split_at_checked(2)?) } else { None };
        match escaped {
            Some((digits, after)) => {
                bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
                rest = after;
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).ok().filter(|uid| folder_name(uid) == folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uid_is_found_in_the_name_of_its_folder_and_in_no_other() {
        for uid in ["0a1b2c3d-1111-2222", "uid/a", "a.b_c", "ü"] {
            assert_eq!(uid_of(&folder_name(uid)).as_deref(), Some(uid));
        }
        for name in ["_", "_2", "_zz", "_+f", "a.b", "_61", "_2F", "_ff"] {
            assert_eq!(uid_of(name), None, "{name}");
        }
    }
}
