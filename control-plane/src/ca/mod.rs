//! The certificate authority: who asks, what they may have, and the signature.
//!
//! [`State`] keeps the root key and the key that signs tokens. [`Authenticator`] turns a bearer token into a
//! [`Caller`]; [`authorize`](authorize::authorize) decides, from the caller and the [`Directory`] of pods alone, which
//! identity the caller gets; [`CaService`] serves both as `istio.v1.auth.IstioCertificateService`.

pub mod authenticate;
pub mod authorize;
pub mod directory;
mod limit;
pub mod service;
pub mod serving;
pub mod state;
pub mod token;

pub use authenticate::{AuthenticationError, Authenticator};
pub use authorize::{Denial, Policy, ServiceAccount};
pub use directory::{Directory, NodeIdentity, PodRecord};
pub use service::CaService;
pub use serving::serving_config;
pub use state::{State, StateError};
pub use token::{AUDIENCE, BoundPod, Caller, TokenError, TokenKey};
