//! The authority's side of a cluster: tokens that the API server reviews, a root that all replicas share as a Secret.

mod review;
mod reviewed;
mod root;
mod secret;

pub use review::TokenReviewer;
pub use root::{Root, RootError};
