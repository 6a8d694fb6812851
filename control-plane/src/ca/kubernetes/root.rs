//! The authority of a cluster: kept in a Secret that all replicas share, published as a ConfigMap for whoever must trust
//! the control plane.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use mesh_identity::Clock;
use mesh_identity::authority::{Authority, AuthorityError};
use serde_json::json;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;

use super::secret::{self, OWN, PLUGGED, ROOTS};
use crate::ca::Authorities;
use crate::ingest::Cluster;
use crate::ingest::kubernetes::describe;

/// The ConfigMap with the roots to trust, which pods of the system namespace mount.
const PUBLISHED: &str = "culvert-ca-root-cert";
/// Its annotation: the Secret of the authority that has these roots.
const ORIGIN: &str = "culvert.dev/authority";
/// Whose fields those are that are written here.
const MANAGER: &str = "culvertd";
/// How often Secret and ConfigMap are looked at again.
const LOOK: Duration = Duration::from_secs(15);
/// Pause between attempts at start, and how long to try: the API server may be starting as well.
const PAUSE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(120);
/// Time for one request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no authority.
#[derive(Debug, Error)]
pub enum RootError {
    /// The API server did not do its part.
    #[error("cannot {action}: {reason}")]
    Api {
        /// What it was asked.
        action: String,
        /// What it said.
        reason: String,
    },
    /// A part of an authority is not there. Falling back to another root would change who is trusted.
    #[error("the Secret {name} has no {key}; an authority needs ca-cert.pem, ca-key.pem and root-cert.pem")]
    Missing {
        /// The Secret.
        name: &'static str,
        /// Its key.
        key: &'static str,
    },
    /// A part of an authority is too large, or not text.
    #[error("{key} of the Secret {name} is not a PEM file")]
    NotPem {
        /// The Secret.
        name: &'static str,
        /// Its key.
        key: &'static str,
    },
    /// The authority is not usable.
    #[error("the Secret {name}: {error}")]
    Authority {
        /// The Secret.
        name: &'static str,
        /// What is wrong.
        error: AuthorityError,
    },
    /// The authority that was made elsewhere is not there any more. Neither is its key copied, nor another root trusted.
    #[error(
        "the Secret {PLUGGED} is gone, whose roots this mesh trusts; put it back, or delete the ConfigMap {PUBLISHED} and start \
         culvertd anew to use {OWN}"
    )]
    Vanished,
    /// The mesh has an authority, which is not stored any more. With another root half of the mesh would not trust the other.
    #[error(
        "the ConfigMap {PUBLISHED} has the roots of this mesh, but neither of the Secrets {PLUGGED} and {OWN} is there; put it \
         back, or delete the ConfigMap to begin with a new root"
    )]
    Lost,
    /// A root cannot be made.
    #[error("cannot make a root: {0}")]
    Generate(AuthorityError),
}

/// Where the authority is kept.
#[derive(Debug)]
pub struct Root {
    store: Store,
    authority: watch::Sender<Arc<Authority>>,
    /// The Secret that the authority came from.
    origin: &'static str,
    /// What is wrong now, so that it is said once.
    trouble: Option<String>,
}

impl Root {
    /// Reads the authority from the namespace `namespace` of `cluster`: what was plugged in there, else what a replica
    /// has made, else, in a mesh that has no roots yet, a root for `trust_domain` that is made now. Waits for the API server for a while.
    ///
    /// # Errors
    /// The authority is not usable, or the API server does not give or take it.
    pub async fn open(
        cluster: &Cluster,
        namespace: &str,
        trust_domain: &str,
        clock: Clock,
    ) -> Result<(Self, Authorities), RootError> {
        let store = Store {
            secrets: Api::namespaced(cluster.client(), namespace),
            config_maps: Api::namespaced(cluster.client(), namespace),
            trust_domain: trust_domain.to_owned(),
            clock,
        };
        let deadline = Instant::now() + PATIENCE;
        let (origin, authority) = loop {
            match store.open().await {
                // A replica that runs puts back what was lost.
                Err(error @ (RootError::Api { .. } | RootError::Lost | RootError::Vanished))
                    if Instant::now() < deadline =>
                {
                    tracing::warn!(%error, "no authority yet; trying again");
                    tokio::time::sleep(PAUSE).await;
                }
                result => break result?,
            }
        };
        let (authority, authorities) = watch::channel(Arc::new(authority));
        Ok((Self { store, authority, origin, trouble: None }, authorities))
    }

    /// Keeps the ConfigMap as it should be, and takes over what is edited in the Secret, for ever. What is not usable
    /// changes nothing and is logged.
    pub async fn run(mut self) {
        loop {
            let result = self.look().await;
            self.tell(result.err());
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn look(&mut self) -> Result<(), RootError> {
        let current = self.authority.borrow().clone();
        match next(self.origin, self.store.stored().await?)? {
            Next::Follow(origin, stored) => {
                self.origin = origin;
                if !is_same(&stored, &current) {
                    tracing::info!(secret = origin, "the authority was replaced");
                    self.authority.send_replace(stored);
                }
            }
            // Another replica that starts now would make another root, and each half of the mesh trust only its own.
            Next::PutBack => {
                tracing::warn!(secret = OWN, "the root's Secret is gone; putting it back");
                self.store.create(&current).await?;
            }
        }
        let roots = self.authority.borrow().roots_pem();
        self.store.publish(&Published { roots, origin: Some(self.origin.to_owned()) }).await
    }

    fn tell(&mut self, error: Option<RootError>) {
        let trouble = error.map(|error| error.to_string());
        if let Some(trouble) = trouble.as_ref().filter(|trouble| self.trouble.as_ref() != Some(*trouble)) {
            tracing::error!(error = trouble, "the authority stays as it is");
        }
        self.trouble = trouble;
    }
}

/// What to do about what is stored.
#[derive(Debug)]
enum Next {
    /// This is the authority, from the Secret of this name.
    Follow(&'static str, Arc<Authority>),
    /// Store the authority in force.
    PutBack,
}

/// Decides about what is `stored`, with its Secret, while an authority from the Secret `origin` is in force. One that is
/// plugged in takes over; that it vanished is no wish to have another.
fn next(origin: &'static str, stored: Option<(&'static str, Authority)>) -> Result<Next, RootError> {
    match stored {
        Some((found, authority)) if found == PLUGGED || origin != PLUGGED => {
            Ok(Next::Follow(found, Arc::new(authority)))
        }
        None if origin != PLUGGED => Ok(Next::PutBack),
        Some(_) | None => Err(RootError::Vanished),
    }
}

/// Decides at start about what is `stored`, with its Secret, in a mesh that was told of the roots `published`. None: a root is
/// to be made.
fn first(
    stored: Option<(&'static str, Authority)>,
    published: Option<&Published>,
) -> Result<Option<(&'static str, Authority)>, RootError> {
    let told = published.and_then(|published| published.origin.as_deref());
    match (stored, published) {
        // As for one that runs, see [`next`].
        (Some((OWN, _)), Some(_)) if told == Some(PLUGGED) => Err(RootError::Vanished),
        (None, Some(_)) => Err(RootError::Lost),
        (stored, _) => Ok(stored),
    }
}

fn is_same(a: &Authority, b: &Authority) -> bool {
    secret::write(a) == secret::write(b)
}

/// The roots that pods trust, and the Secret that they are of. Before there were annotations nothing tells the latter.
#[derive(Debug, PartialEq, Eq)]
struct Published {
    roots: String,
    origin: Option<String>,
}

#[derive(Debug)]
struct Store {
    secrets: Api<Secret>,
    config_maps: Api<ConfigMap>,
    trust_domain: String,
    clock: Clock,
}

impl Store {
    /// What is stored and in which Secret, made first if there is nothing.
    async fn open(&self) -> Result<(&'static str, Authority), RootError> {
        // In this order: a replica that runs publishes the roots of what is stored, and not the other way around.
        let published = self.published().await?;
        if let Some(found) = first(self.stored().await?, published.as_ref())? {
            return Ok(found);
        }
        let made = Authority::generate(&self.trust_domain, self.clock.now()).map_err(RootError::Generate)?;
        self.create(&made).await?;
        // Whether it was made here or another replica was faster: what is stored counts.
        let missing =
            RootError::Api { action: format!("read the Secret {OWN}"), reason: "it is gone again".to_owned() };
        self.stored().await?.ok_or(missing)
    }

    async fn stored(&self) -> Result<Option<(&'static str, Authority)>, RootError> {
        for name in [PLUGGED, OWN] {
            let found = request(format!("read the Secret {name}"), self.secrets.get_opt(name)).await?;
            if let Some(found) = found {
                let authority = secret::read(name, &found.data.unwrap_or_default(), self.clock.now())?;
                return Ok(Some((name, authority)));
            }
        }
        Ok(None)
    }

    /// Stores `authority` if nothing is stored yet.
    async fn create(&self, authority: &Authority) -> Result<(), RootError> {
        let secret = Secret {
            metadata: ObjectMeta { name: Some(OWN.to_owned()), ..ObjectMeta::default() },
            type_: Some(secret::TYPE.to_owned()),
            data: Some(secret::write(authority)),
            ..Secret::default()
        };
        let (parameters, action) = (PostParams::default(), format!("create the Secret {OWN}"));
        let created = async {
            match self.secrets.create(&parameters, &secret).await {
                Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
                result => result.map(|_| true),
            }
        };
        if request(action, created).await? {
            tracing::info!(secret = OWN, "the root is stored");
        }
        Ok(())
    }

    /// What the ConfigMap tells.
    async fn published(&self) -> Result<Option<Published>, RootError> {
        let found = request(format!("read the ConfigMap {PUBLISHED}"), self.config_maps.get_opt(PUBLISHED)).await?;
        Ok(found.and_then(|found| {
            let origin = found.metadata.annotations.and_then(|mut annotations| annotations.remove(ORIGIN));
            Some(Published { roots: found.data?.remove(ROOTS)?, origin })
        }))
    }

    async fn publish(&self, what: &Published) -> Result<(), RootError> {
        if self.published().await?.as_ref() == Some(what) {
            return Ok(());
        }
        let patch = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": {(ROOTS): what.roots},
            "metadata": {"name": PUBLISHED, "annotations": {(ORIGIN): what.origin}},
        });
        let parameters = PatchParams::apply(MANAGER).force();
        let patched = async { self.config_maps.patch(PUBLISHED, &parameters, &Patch::Apply(&patch)).await };
        request(format!("write the ConfigMap {PUBLISHED}"), patched).await?;
        tracing::info!(config_map = PUBLISHED, "the roots are published");
        Ok(())
    }
}

async fn request<T>(action: String, asked: impl Future<Output = kube::Result<T>>) -> Result<T, RootError> {
    match tokio::time::timeout(TIMEOUT, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(RootError::Api { action, reason: describe(&error) }),
        Err(_) => Err(RootError::Api { action, reason: format!("no answer within {TIMEOUT:?}") }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn authority() -> Authority {
        Authority::generate("cluster.local", SystemTime::now()).unwrap()
    }

    #[test]
    fn a_plugged_in_authority_that_vanishes_is_neither_copied_nor_replaced() {
        assert!(matches!(next(PLUGGED, None), Err(RootError::Vanished)));
        assert!(matches!(next(PLUGGED, Some((OWN, authority()))), Err(RootError::Vanished)));
        assert!(matches!(next(PLUGGED, Some((PLUGGED, authority()))), Ok(Next::Follow(PLUGGED, _))));
    }

    #[test]
    fn a_replica_that_starts_takes_no_authority_that_the_mesh_does_not_trust() {
        let told =
            |origin: Option<&str>| Published { roots: authority().roots_pem(), origin: origin.map(str::to_owned) };
        let own = || Some((OWN, authority()));
        assert!(matches!(first(own(), Some(&told(Some(PLUGGED)))), Err(RootError::Vanished)));
        assert!(matches!(first(None, Some(&told(Some(PLUGGED)))), Err(RootError::Lost)));
        assert!(matches!(first(None, Some(&told(None))), Err(RootError::Lost)));
        assert!(matches!(first(None, None), Ok(None)), "a new mesh");
        for published in [None, Some(told(None)), Some(told(Some(OWN)))] {
            assert!(matches!(first(own(), published.as_ref()), Ok(Some((OWN, _)))), "{published:?}");
        }
        let plugged = Some((PLUGGED, authority()));
        assert!(matches!(first(plugged, Some(&told(Some(OWN)))), Ok(Some((PLUGGED, _)))), "it takes over");
    }

    #[test]
    fn a_root_of_its_own_is_put_back_and_gives_way_to_one_that_is_plugged_in() {
        assert!(matches!(next(OWN, None), Ok(Next::PutBack)));
        assert!(matches!(next(OWN, Some((OWN, authority()))), Ok(Next::Follow(OWN, _))));
        assert!(matches!(next(OWN, Some((PLUGGED, authority()))), Ok(Next::Follow(PLUGGED, _))));
    }
}
