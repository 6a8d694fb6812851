//! What a label says now. Pods and namespaces are told by watches of their own, and one may lag behind the other: a pod
//! that was made after its namespace's label was set may be known before the label is. So before a pod passes for want
//! of a label, the API server is asked for the namespace as it is now.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::Api;
use tokio::sync::watch;

use super::kubernetes::mode;
use super::{Known, NOBODY};
use crate::cni::decide::{Decision, Mode, Pass};
use crate::cni::knowledge::PodName;

/// How long the API server may take. Without it, what the watches told decides: nobody can have set a label meanwhile.
const ASK_PATIENCE: Duration = Duration::from_secs(1);

/// A way to ask for a namespace.
#[derive(Clone)]
pub struct Ask(kube::Client);

impl std::fmt::Debug for Ask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ask")
    }
}

impl Ask {
    pub(super) const fn new(client: kube::Client) -> Self {
        Self(client)
    }

    /// The label of a namespace, read from the store and not from a cache. `None` if the API server does not say, or says
    /// what means nothing: the last good label stays in force then.
    pub(super) async fn namespace(&self, name: &str) -> Option<Mode> {
        let api: Api<Namespace> = Api::all(self.0.clone());
        match tokio::time::timeout(ASK_PATIENCE, api.get_metadata(name)).await {
            Ok(Ok(object)) => mode(&object.metadata).ok(),
            Ok(Err(error)) => {
                tracing::debug!(namespace = name, %error, "cannot be asked for; what is known of it decides");
                None
            }
            Err(_) => {
                tracing::debug!(namespace = name, "is not told in time; what is known of it decides");
                None
            }
        }
    }
}

/// The watch has not told yet what the API server says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Behind;

/// Returns once it is certain by which label of its namespace a pod is decided about: at once, unless it would pass for
/// want of one; then when `now` has the same answer, or the watch has caught up with it.
pub(super) async fn settle(
    known: &watch::Receiver<Arc<Known>>,
    pod: PodName<'_>,
    now: impl Future<Output = Option<Mode>>,
    patience: Duration,
) -> Result<(), Behind> {
    let passes = |known: &Arc<Known>| {
        let decision = known.knowledge.decide(pod, &NOBODY);
        matches!(decision, Decision::Pass(Pass::NotLabelled | Pass::NamespaceOptedOut))
    };
    if !passes(&known.borrow()) || now.await != Some(Mode::Ambient) {
        return Ok(());
    }
    let mut known = known.clone();
    let caught_up = known.wait_for(|known| !passes(known));
    match tokio::time::timeout(patience, caught_up).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Behind),
    }
}
