//! The source of labels that the configuration asks for.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use tokio::sync::watch;

use super::{Ask, Directory, DirectoryError, Known, Kubernetes, Removal, Source};
use crate::agent::config::Config;

/// Silence after which a connection to the API server counts as dead; longer than one watch lasts. Without a bound a list
/// whose path was cut without a word would be waited for ever.
const SILENCE: Duration = Duration::from_secs(60);

/// Why there is no source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The file that says where the API is.
    #[error("{} (--kubeconfig): {source}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<KubeconfigError>,
    },
    /// This is no pod of a cluster.
    #[error("--kubernetes: no service account is found here ({0}); run as a pod, or give --kubeconfig")]
    InCluster(#[from] kube::config::InClusterError),
    /// The client cannot be made.
    #[error("--kubernetes: {0}")]
    Client(#[source] Box<kube::Error>),
}

/// One of the sources.
#[derive(Debug)]
pub enum AnySource {
    /// A directory of YAML.
    Directory(Directory),
    /// The Kubernetes API.
    Kubernetes(Kubernetes),
}

impl AnySource {
    /// The source that the configuration asks for, if any. An API server that is away is no error: it is waited for.
    /// `removal` is told when the mesh is taken off the cluster.
    ///
    /// # Errors
    /// When it cannot be one.
    pub async fn open(config: &Config, removal: &Removal) -> Result<Option<Self>, SourceError> {
        if let Some(dir) = &config.source_dir {
            return Ok(Some(Self::Directory(Directory::open(dir.clone(), config.node_name.clone())?)));
        }
        let Some(node) = config.node_name.clone().filter(|_| config.kubernetes) else { return Ok(None) };
        let client = client(config.kubeconfig.as_deref(), SILENCE).await?;
        Ok(Some(Self::Kubernetes(Kubernetes::new(client, node, config.exclusions(), removal.clone()))))
    }

    /// The Kubernetes API, if that is the source.
    #[must_use]
    pub const fn kubernetes(&self) -> Option<&Kubernetes> {
        match self {
            Self::Directory(_) => None,
            Self::Kubernetes(source) => Some(source),
        }
    }
}

/// A client of the API server that the file names, or that of the cluster that this runs in.
pub(super) async fn client(kubeconfig: Option<&Path>, silence: Duration) -> Result<kube::Client, SourceError> {
    let mut settings = match kubeconfig {
        Some(path) => {
            let wrong = |source| SourceError::Kubeconfig { path: path.to_owned(), source: Box::new(source) };
            let file = Kubeconfig::read_from(path).map_err(wrong)?;
            let options = KubeConfigOptions::default();
            kube::Config::from_custom_kubeconfig(file, &options).await.map_err(wrong)?
        }
        None => kube::Config::incluster()?,
    };
    settings.read_timeout = Some(silence);
    settings.reset_reader_on_write = true;
    kube::Client::try_from(settings).map_err(|error| SourceError::Client(Box::new(error)))
}

impl Source for AnySource {
    fn ask(&self) -> Option<Ask> {
        match self {
            Self::Directory(source) => source.ask(),
            Self::Kubernetes(source) => source.ask(),
        }
    }

    async fn run(self, knowledge: watch::Sender<Arc<Known>>) {
        match self {
            Self::Directory(source) => source.run(knowledge).await,
            Self::Kubernetes(source) => source.run(knowledge).await,
        }
    }
}
