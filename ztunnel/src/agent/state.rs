//! What a restarted agent must know of the pods that are enrolled: one file per pod, written before the kernel is
//! changed and removed after.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::capture::{folder_name, uid_of};
use super::netns::{Folder, Netns, is_without_processes};
use super::pod::{PodInfo, Sandbox};
use super::pod_network::Before;

/// Version of the files' layout.
const VERSION: u32 = 1;

/// One pod's file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Saved {
    version: u32,
    /// The pod.
    pub pod: PodInfo,
    /// Where its namespace was found; may be empty.
    pub netns_path: PathBuf,
    /// The folder of that path, by which another agent knows whether it sees the same one. Not known of pods that a former
    /// version enrolled.
    #[serde(default)]
    pub netns_folder: Option<Folder>,
    /// The runtime's id of the sandbox; empty if it was not given.
    #[serde(default)]
    pub sandbox: String,
    /// The namespace's cookie; unique while the machine is up.
    pub netns_cookie: u64,
    /// The namespace's inode.
    pub netns_inode: u64,
    /// What to restore.
    pub before: Before,
    /// Whether it was withdrawn: what is left of it goes.
    #[serde(default)]
    pub leaving: bool,
}

impl Saved {
    /// What is to be known of a pod.
    #[must_use]
    pub fn new(pod: &PodInfo, netns: &Netns, sandbox: &Sandbox, before: Before) -> Self {
        Self {
            version: VERSION,
            pod: pod.clone(),
            netns_path: sandbox.path.clone(),
            netns_folder: Folder::of(&sandbox.path),
            sandbox: sandbox.id.clone(),
            netns_cookie: netns.cookie(),
            netns_inode: netns.inode(),
            before,
            leaving: false,
        }
    }

    /// Whether the namespace's path was removed where it was. One that this agent cannot see, or that is another's by now,
    /// says nothing.
    #[must_use]
    pub fn has_lost_its_path(&self) -> bool {
        self.netns_folder.is_some_and(|folder| folder.lacks(&self.netns_path))
    }

    /// Whether the pod's namespace is gone: its path was removed where it was, and no process is in it. Sockets may keep it
    /// alive, and so the programs that are attached to it. Blocks shortly.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.has_lost_its_path() && is_without_processes(self.netns_inode)
    }

    /// The same of a pod that is withdrawn.
    #[must_use]
    pub fn leaving(mut self) -> Self {
        self.leaving = true;
        self
    }
}

/// Why a file could not be written, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A system call failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// It is not such a file.
    #[error("{}: {source}", path.display())]
    Content {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A later agent wrote it.
    #[error("{}: layout version {version}, this agent knows {VERSION}", path.display())]
    Version {
        /// Where.
        path: PathBuf,
        /// The version found.
        version: u32,
    },
}

impl StateError {
    /// The UID of the pod whose file it is about.
    #[must_use]
    pub fn uid(&self) -> Option<String> {
        let (Self::Io { path, .. } | Self::Content { path, .. } | Self::Version { path, .. }) = self;
        uid_of(path.file_stem()?.to_str()?)
    }
}

/// The folder of the files.
#[derive(Clone, Debug)]
pub struct State(PathBuf);

impl State {
    /// The files in this folder, which exists.
    #[must_use]
    pub const fn new(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// Writes a pod's file, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, saved: &Saved) -> Result<(), StateError> {
        let path = self.path(&saved.pod.uid);
        let text = serde_json::to_vec(saved).map_err(|source| StateError::Content { path: path.clone(), source })?;
        let partial = path.with_extension("new");
        fs::write(&partial, text).map_err(at(&partial))?;
        fs::rename(&partial, &path).map_err(at(&path))
    }

    /// Removes a pod's file. Nothing to do is no error.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, uid: &str) -> Result<(), StateError> {
        let path = self.path(uid);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&path)(error)),
            _ => Ok(()),
        }
    }

    /// All files, each with what is wrong with it.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn load(&self) -> Result<Vec<Result<Saved, StateError>>, StateError> {
        let entries = fs::read_dir(&self.0).map_err(at(&self.0))?;
        let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
        Ok(paths
            .filter(|path| path.extension().is_some_and(|ending| ending == "json"))
            .map(|path| read(&path))
            .collect())
    }

    fn path(&self, uid: &str) -> PathBuf {
        self.0.join(folder_name(uid)).with_extension("json")
    }
}

fn read(path: &Path) -> Result<Saved, StateError> {
    let text = fs::read(path).map_err(at(path))?;
    let saved: Saved =
        serde_json::from_slice(&text).map_err(|source| StateError::Content { path: path.to_owned(), source })?;
    if saved.version == VERSION {
        Ok(saved)
    } else {
        Err(StateError::Version { path: path.to_owned(), version: saved.version })
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> StateError {
    move |source| StateError::Io { path: path.to_owned(), source }
}
