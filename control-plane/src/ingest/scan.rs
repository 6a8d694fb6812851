//! Looking at a directory: which manifests are there, and whether they changed. Blocking I/O; callers run it off the
//! runtime's threads.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Bounds on what a directory may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Manifests, in all folders together.
    pub files: usize,
    /// Bytes of one manifest.
    pub file_bytes: u64,
    /// Folders inside folders.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { files: 250_000, file_bytes: 64 * 1024 * 1024, depth: 16 }
    }
}

/// Why a directory could not be looked through. Whatever was known of it before stays in force.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// A folder cannot be listed.
    #[error("cannot list {path}: {error}; make it readable for culvertd")]
    List {
        /// The folder.
        path: PathBuf,
        /// The system's answer.
        error: io::Error,
    },
    /// There are too many manifests.
    #[error("{path} holds more than {limit} manifests; put several objects into one file")]
    TooMany {
        /// The root.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
    /// Folders are nested too deeply.
    #[error("{path} is nested more than {limit} folders deep; flatten it")]
    TooDeep {
        /// The folder.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
}

/// What tells one version of a file from the next, without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// The manifests below `root`, by path relative to it. Hidden files and folders are skipped, links to folders are not
/// followed, and links to files only where they stay below `root` (which is how Kubernetes mounts a ConfigMap).
pub(super) fn scan(root: &Path, limits: &Limits) -> Result<BTreeMap<String, Stamp>, ScanError> {
    let mut found = BTreeMap::new();
    let mut folders = vec![(root.to_path_buf(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = folders.pop() {
        if depth > limits.depth {
            return Err(ScanError::TooDeep { path: folder, limit: limits.depth });
        }
        let listed = |error| ScanError::List { path: folder.clone(), error };
        for entry in fs::read_dir(&folder).map_err(listed)? {
            let entry = entry.map_err(listed)?;
            let file_name = entry.file_name();
            // A name that is not UTF-8 could not be reported faithfully.
            let Some(name) = file_name.to_str().filter(|name| !name.starts_with('.')) else { continue };
            let Ok(kind) = entry.file_type() else { continue };
            let relative = format!("{prefix}{name}");
            if kind.is_dir() {
                folders.push((entry.path(), format!("{relative}/"), depth + 1));
            } else if is_manifest(name)
                && let Some(stamp) = stamp(root, &entry.path(), kind.is_symlink())
            {
                found.insert(relative, stamp);
            }
        }
        if found.len() > limits.files {
            return Err(ScanError::TooMany { path: root.to_path_buf(), limit: limits.files });
        }
    }
    Ok(found)
}

fn is_manifest(name: &str) -> bool {
    [".yaml", ".yml"].iter().any(|extension| name.len() > extension.len() && name.ends_with(extension))
}

/// None for what is not a regular file, and for files that vanish while they are looked at.
fn stamp(root: &Path, path: &Path, is_link: bool) -> Option<Stamp> {
    if is_link {
        let target = path.canonicalize().ok()?;
        if !target.starts_with(root.canonicalize().ok()?) {
            return None;
        }
    }
    let metadata = fs::metadata(path).ok()?;
    metadata.is_file().then(|| Stamp::of(&metadata))
}

/// Reads a manifest whole. The error is written for the report.
pub(super) fn read(root: &Path, relative: &str, limits: &Limits) -> Result<String, Unreadable> {
    let mut text = Vec::new();
    let file = File::open(root.join(relative)).map_err(Unreadable::from)?;
    file.take(limits.file_bytes + 1).read_to_end(&mut text).map_err(Unreadable::from)?;
    if text.len() as u64 > limits.file_bytes {
        return Err(Unreadable::Refused(format!("is larger than {} bytes", limits.file_bytes)));
    }
    String::from_utf8(text).map_err(|_| Unreadable::Refused("is not UTF-8 text".to_owned()))
}

/// Why a manifest could not be read.
#[derive(Debug)]
pub(super) enum Unreadable {
    /// It is gone by now; the next look will find out.
    Gone,
    /// For this reason.
    Refused(String),
}

impl From<io::Error> for Unreadable {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::NotFound {
            Self::Gone
        } else {
            Self::Refused(format!("cannot be read: {error}"))
        }
    }
}
