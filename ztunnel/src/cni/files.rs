//! Files that plugin and agent share in the agent's folder: read with bounds and only if nobody but root can have written
//! them, written whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// A system call failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// It is no regular file, or somebody else could have written it.
    #[error("{} must be a regular file that belongs to root and is writable for nobody else", .0.display())]
    Unsafe(PathBuf),
    /// It is larger than such a file can be.
    #[error("{} is larger than {limit} bytes", path.display())]
    TooLarge {
        /// Where.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
    /// It does not hold what it should.
    #[error("{}: {source}", path.display())]
    Content {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// Another version of the program wrote it.
    #[error("{}: layout version {version} is not known", path.display())]
    Version {
        /// Where.
        path: PathBuf,
        /// The version found.
        version: u32,
    },
}

impl FileError {
    /// There is no such file.
    #[must_use]
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Every file says which layout it has.
#[derive(serde::Deserialize)]
struct Layout {
    version: u32,
}

/// Reads a file of at most `limit` bytes with this layout version.
///
/// # Errors
/// When it is not there, not safe, too large, of another version or not understood.
pub fn read<T: DeserializeOwned>(path: &Path, limit: u64, version: u32) -> Result<T, FileError> {
    // Without O_NONBLOCK a pipe in its place would hold the caller up.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(at(path))?;
    let found = file.metadata().map_err(at(path))?;
    if !found.is_file() || found.uid() != 0 || found.mode() & 0o022 != 0 {
        return Err(FileError::Unsafe(path.to_owned()));
    }
    let mut text = Vec::new();
    file.take(limit + 1).read_to_end(&mut text).map_err(at(path))?;
    if text.len() as u64 > limit {
        return Err(FileError::TooLarge { path: path.to_owned(), limit });
    }
    let content = |source| FileError::Content { path: path.to_owned(), source };
    // The version first: what another version wrote may not even have the same fields.
    let layout: Layout = serde_json::from_slice(&text).map_err(content)?;
    if layout.version != version {
        return Err(FileError::Version { path: path.to_owned(), version: layout.version });
    }
    serde_json::from_slice(&text).map_err(content)
}

/// Writes a file that only root can read. Whoever reads it sees all of it or what was there before.
///
/// # Errors
/// When it cannot be written.
pub fn write<T: Serialize>(path: &Path, content: &T) -> Result<(), FileError> {
    let text = serde_json::to_vec(content).map_err(|source| FileError::Content { path: path.to_owned(), source })?;
    // Agent and plugin may write at the same time.
    let partial = path.with_extension(format!("{}.new", std::process::id()));
    let written = create(&partial).and_then(|mut file| file.write_all(&text)).and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // The first error is the one that matters.
        let _ = fs::remove_file(&partial);
    }
    written.map_err(at(path))
}

/// Removes a file. Nothing to do is no error.
///
/// # Errors
/// When it cannot be removed.
pub fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path)
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> FileError {
    move |source| FileError::Io { path: path.to_owned(), source }
}
