//! Where the programs of a real cluster are: etcd, Kubernetes' own, the container runtime, and what they call.

use std::path::{Path, PathBuf};

use crate::Error;

/// The variable that names the folder. `cargo xtask` sets it after it has built or fetched what is missing.
pub const VARIABLE: &str = "KUBERNETES_BIN_DIR";

/// What an API server needs.
pub const CONTROL: &[&str] = &["etcd", "kube-apiserver"];
/// What a whole cluster needs beside that. `nft` is kube-proxy's, the last three are CNI plugins.
pub const CLUSTER: &[&str] = &[
    "kube-controller-manager",
    "kube-scheduler",
    "kubectl",
    "kubelet",
    "kube-proxy",
    "nft",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "runc",
    "ptp",
    "host-local",
    "portmap",
];

/// A folder with the programs.
#[derive(Debug, Clone)]
pub struct Programs {
    folder: PathBuf,
}

impl Programs {
    /// The folder that `KUBERNETES_BIN_DIR` names.
    ///
    /// # Errors
    /// The variable is not set, or the folder lacks one of `needed`.
    pub fn from_env(needed: &[&[&str]]) -> Result<Self, Error> {
        let Some(folder) = std::env::var_os(VARIABLE) else {
            let why = format!("{VARIABLE} is not set; `cargo xtask cluster programs` makes the folder and prints it");
            return Err(Error::Absent(why));
        };
        Self::at(Path::new(&folder), needed)
    }

    /// The programs in `folder`.
    ///
    /// # Errors
    /// The folder lacks one of `needed`.
    pub fn at(folder: &Path, needed: &[&[&str]]) -> Result<Self, Error> {
        let folder = std::path::absolute(folder).unwrap_or_else(|_unusable| folder.to_owned());
        let missing: Vec<&str> =
            needed.iter().copied().flatten().copied().filter(|name| !folder.join(name).exists()).collect();
        if missing.is_empty() {
            return Ok(Self { folder });
        }
        Err(Error::Absent(format!("{} lacks {}", folder.display(), missing.join(", "))))
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// One of them.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}
