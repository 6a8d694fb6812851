//! What `up` notes for the commands after it, in `/run/culvert-cluster/<name>`.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::cleanup::ClusterId;
use crate::error::Context;
use crate::kubernetes::Kubernetes;

const ROOT: &str = "/run/culvert-cluster";

/// A cluster that is up.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// The process that holds it.
    pub pid: u32,
    /// Folder of Kubernetes' programs.
    pub programs: PathBuf,
    /// Folder of all logs.
    pub logs: PathBuf,
    /// All long-running parts.
    pub parts: Vec<Part>,
    /// All nodes.
    pub nodes: Vec<Node>,
}

/// A long-running part.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Part {
    pub name: String,
    pub pid: Option<u32>,
    pub log: PathBuf,
}

/// A node.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Node {
    pub name: String,
    /// Process id of its containerd.
    pub containerd: u32,
}

/// Where a cluster of that name notes what it is.
#[derive(Debug)]
pub(super) struct Place {
    name: String,
    folder: PathBuf,
}

impl Place {
    pub fn of(name: &str) -> Self {
        Self { name: name.to_owned(), folder: Path::new(ROOT).join(name) }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the process that holds the cluster printed.
    pub fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubeconfig")
    }

    /// Makes the folder anew.
    pub fn make(&self) -> Result<(), Error> {
        self.remove()?;
        fs::create_dir_all(&self.folder).during(|| format!("making {}", self.folder.display()))
    }

    /// The calling process holds the cluster from now on.
    pub fn hold(&self) -> Result<(), Error> {
        let holder = self.folder.join("holder");
        fs::write(&holder, ClusterId::new()?.to_string()).during(|| format!("writing {}", holder.display()))
    }

    /// The process that holds the cluster, if it lives; it may not be up yet.
    pub fn holder(&self) -> Option<u32> {
        let text = fs::read_to_string(self.folder.join("holder")).ok()?;
        ClusterId::parse(&text).filter(ClusterId::alive).map(|id| id.pid())
    }

    /// Notes that the cluster is up.
    pub fn write(&self, cluster: &Kubernetes) -> Result<(), Error> {
        let what = || format!("writing to {}", self.folder.display());
        let parts = cluster.components().into_iter().map(|(name, component)| Part {
            name,
            pid: component.pid(),
            log: component.spec().log.clone(),
        });
        let nodes = cluster
            .nodes()
            .iter()
            .filter_map(|node| Some(Node { name: node.name.clone(), containerd: node.runtime.pid()? }));
        let state = State {
            pid: std::process::id(),
            programs: cluster.programs().folder().to_owned(),
            logs: cluster.folder().join("logs"),
            parts: parts.collect(),
            nodes: nodes.collect(),
        };
        fs::copy(cluster.kubeconfig(), self.kubeconfig()).during(what)?;
        let text = serde_json::to_vec_pretty(&state).map_err(std::io::Error::from).during(what)?;
        // By rename: whoever reads it reads it whole.
        let new = self.folder.join("state.new");
        fs::write(&new, text).during(what)?;
        fs::rename(&new, self.folder.join("state.json")).during(what)
    }

    /// The cluster that is up; None if there is none.
    pub fn read(&self) -> Result<Option<State>, Error> {
        let file = self.folder.join("state.json");
        if self.holder().is_none() || !file.exists() {
            return Ok(None);
        }
        let what = || format!("reading {}", file.display());
        let text = fs::read(&file).during(what)?;
        serde_json::from_slice(&text).map(Some).map_err(std::io::Error::from).during(what)
    }

    /// Removes all that was noted.
    pub fn remove(&self) -> Result<(), Error> {
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("removing {}", self.folder.display()), error))
            }
            _ => {
                // Not empty while there are other clusters.
                let _ = fs::remove_dir(ROOT);
                Ok(())
            }
        }
    }
}
