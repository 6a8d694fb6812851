//! The certificate authority: who asks, what they may have, and the signature.
//!
//! The root is kept in a directory, with the key that signs tokens ([`State`]), or in a cluster, whose API server knows
//! the tokens ([`kubernetes`]). [`Authenticator`] turns a bearer token into a [`Caller`]; [`authorize`](authorize::authorize) decides, from the caller and the [`Directory`] of pods alone, which
//! identity the caller gets; [`CaService`] serves both as `istio.v1.auth.IstioCertificateService`,
//! to callers that are known before their request is read ([`Bounded`]).

pub mod authenticate;
pub mod authorize;
mod bounded;
pub mod directory;
pub mod kubernetes;
mod limit;
pub mod service;
pub mod serving;
pub mod state;
pub mod token;

use std::sync::Arc;

use mesh_identity::authority::Authority;
use tokio::sync::watch;

pub use authenticate::{AuthenticationError, Authenticator};
pub use authorize::{Denial, Policy, ServiceAccount};
pub use bounded::Bounded;
pub use directory::{Directory, NodeIdentity, PodRecord};
pub use service::CaService;
pub use serving::serving_config;
pub use state::{State, StateError};
pub use token::{AUDIENCE, BoundPod, Caller, TokenError, TokenKey};

/// The authority in force; another one takes its place while a root is being replaced.
pub type Authorities = watch::Receiver<Arc<Authority>>;

/// One authority for ever.
pub fn always(authority: Arc<Authority>) -> Authorities {
    watch::channel(authority).1
}
