//! Pods that started without the mesh: remembered, so that they can be enrolled when their labels change. Written by the
//! agent, and by the plugin where it let a pod pass without one.

use std::fs::{self, DirBuilder};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files::{self, FileError};

/// Version of the files' layout.
const VERSION: u32 = 1;
/// Largest file.
const MAX_FILE: u64 = 16 << 10;
/// Most files that are looked at: more than pods of a node.
const MAX_FILES: usize = 4096;
/// Longest id of a sandbox; runtimes use 64 digits.
const MAX_SANDBOX: usize = 200;

/// One sandbox's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passed {
    version: u32,
    /// The boot in which it started: names of namespaces are used again after the next.
    pub boot: String,
    /// The pod's UID.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account, where the runtime knew it; else empty.
    pub service_account: String,
    /// Its addresses, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// The runtime's id of the sandbox.
    pub sandbox: String,
    /// Where its network namespace is.
    pub netns_path: PathBuf,
    /// That namespace's inode.
    pub netns_inode: u64,
}

/// What is passed on of a pod to [`Passed::new`].
#[derive(Clone, Debug)]
pub struct PassedPod {
    /// The pod's UID.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account, or empty.
    pub service_account: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

impl Passed {
    /// A pod that passes now.
    #[must_use]
    pub fn new(pod: PassedPod, sandbox: &str, netns_path: &Path, netns_inode: u64) -> Self {
        Self {
            version: VERSION,
            boot: boot(),
            uid: pod.uid,
            name: pod.name,
            namespace: pod.namespace,
            service_account: pod.service_account,
            addresses: pod.addresses,
            sandbox: sandbox.to_owned(),
            netns_path: netns_path.to_owned(),
            netns_inode,
        }
    }
}

/// The folder of the files.
#[derive(Clone, Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// The folder in the agent's. It is made when it is first written to.
    #[must_use]
    pub fn new(run_dir: &Path) -> Self {
        Self(run_dir.join("passed"))
    }

    /// Remembers a pod.
    ///
    /// # Errors
    /// When its file cannot be written.
    pub fn save(&self, passed: &Passed) -> Result<(), FileError> {
        let path = self.path(&passed.sandbox)?;
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(FileError::Io { path: self.0.clone(), source });
            }
            Ok(()) | Err(_) => {}
        }
        files::write(&path, passed)
    }

    /// Forgets a sandbox. Nothing to do is no error.
    ///
    /// # Errors
    /// When its file cannot be removed.
    pub fn remove(&self, sandbox: &str) -> Result<(), FileError> {
        files::remove(&self.path(sandbox)?)
    }

    /// Those sandboxes that are `wanted` and passed since the machine was booted. What is not understood, or of another
    /// boot, is removed.
    ///
    /// # Errors
    /// When the folder cannot be read; that it is not there is no error.
    pub fn load(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<Passed>, FileError> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|source| FileError::Io { path: self.0.clone(), source })?,
        };
        let boot = boot();
        let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
        let paths = paths.filter(|path| path.extension().is_some_and(|ending| ending == "json"));
        let mut all = Vec::new();
        for path in paths.take(MAX_FILES) {
            if !path.file_stem().and_then(|stem| stem.to_str()).is_some_and(&wanted) {
                continue;
            }
            match files::read::<Passed>(&path, MAX_FILE, VERSION) {
                Ok(passed) if passed.boot == boot && self.path(&passed.sandbox).is_ok_and(|own| own == path) => {
                    all.push(passed);
                }
                Err(error) if error.is_absence() => {}
                Ok(_) | Err(_) => files::remove(&path)?,
            }
        }
        Ok(all)
    }

    /// Runtimes' ids are made of few characters; another one gets no file.
    fn path(&self, sandbox: &str) -> Result<PathBuf, FileError> {
        if is_sandbox_id(sandbox) {
            Ok(self.0.join(format!("{sandbox}.json")))
        } else {
            Err(FileError::Unsafe(self.0.join("?")))
        }
    }
}

/// Whether a text is what the specification allows as a sandbox's id, and short enough to be a file's name.
#[must_use]
pub fn is_sandbox_id(text: &str) -> bool {
    text.len() <= MAX_SANDBOX
        && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// What the kernel calls this boot; empty if it does not say.
#[must_use]
pub fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// Milliseconds since the machine booted, to a hundredth of a second; 0 if the kernel does not say.
#[must_use]
pub fn uptime_ms() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let first = text.split(' ').next().unwrap_or_default();
    let (seconds, fraction) = first.split_once('.').unwrap_or((first, "0"));
    let (seconds, fraction) = (seconds.parse::<u64>().unwrap_or(0), fraction.parse::<u64>().unwrap_or(0));
    seconds * 1000 + fraction * 10
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(sandbox: &str) -> Passed {
        let pod = PassedPod {
            uid: "u1".into(),
            name: "web-1".into(),
            namespace: "shop".into(),
            service_account: String::new(),
            addresses: vec!["10.244.1.5".parse().unwrap(), "fd00::5".parse().unwrap()],
        };
        Passed::new(pod, sandbox, Path::new("/run/netns/x"), 4711)
    }

    #[test]
    fn sandbox_is_remembered_until_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let all = Folder::new(folder.path());
        assert_eq!(all.load(|_| true).unwrap(), []);
        all.remove("box-1").unwrap();
        all.save(&passed("box-1")).unwrap();
        all.save(&passed("box-1")).unwrap();
        assert_eq!(all.load(|_| true).unwrap(), [passed("box-1")]);
        assert_eq!(all.load(|sandbox| sandbox != "box-1").unwrap(), []);
        all.remove("box-1").unwrap();
        assert_eq!(all.load(|_| true).unwrap(), []);
    }

    #[test]
    fn what_is_of_another_boot_or_not_understood_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let all = Folder::new(folder.path());
        all.save(&passed("box-1")).unwrap();
        all.save(&Passed { boot: "before".into(), ..passed("box-2") }).unwrap();
        fs::write(folder.path().join("passed/box-3.json"), "{").unwrap();
        fs::copy(folder.path().join("passed/box-1.json"), folder.path().join("passed/box-4.json")).unwrap();
        assert_eq!(all.load(|_| true).unwrap(), [passed("box-1")]);
        assert_eq!(fs::read_dir(folder.path().join("passed")).unwrap().count(), 1);
    }

    #[test]
    fn id_that_would_leave_the_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let all = Folder::new(folder.path());
        for id in ["", ".", "..", "../x", "a/b", "a b", "-a", "ä", &"a".repeat(201)] {
            assert!(!is_sandbox_id(id), "{id}");
            all.save(&passed(id)).unwrap_err();
            all.remove(id).unwrap_err();
        }
        assert!(is_sandbox_id("cri-o_1.x") && is_sandbox_id(&"a".repeat(200)));
    }

    #[test]
    fn kernel_says_which_boot_and_how_long() {
        assert_eq!(boot().len(), 36);
        assert!(uptime_ms() > 0);
    }
}
