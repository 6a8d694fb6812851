//! Who calls: the bearer token of a gRPC request.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_identity::Clock;
use thiserror::Error;
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::kubernetes::TokenReviewer;
use super::token::{AUDIENCE, Caller, TokenError, TokenKey};

/// Why a caller is not known.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AuthenticationError {
    /// There is no `authorization` header.
    #[error("no bearer token")]
    Missing,
    /// There are several.
    #[error("more than one authorization header")]
    Several,
    /// It is not of the form `Bearer <token>`.
    #[error("the authorization header is not of the form: Bearer <token>")]
    Scheme,
    /// The token is not good.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The API server says that it is not good.
    #[error("the API server does not accept the token: {reason}")]
    NotAccepted {
        /// What it says.
        reason: String,
    },
    /// Too many tokens from one address that nobody knows yet.
    #[error("too many tokens to check from this address, retry later")]
    TooOften,
    /// Nobody can say now whether it is good.
    #[error("the token cannot be checked now, retry")]
    Unavailable,
}

impl From<AuthenticationError> for Status {
    fn from(error: AuthenticationError) -> Self {
        let message = error.to_string();
        match error {
            AuthenticationError::Missing
            | AuthenticationError::Several
            | AuthenticationError::Scheme
            | AuthenticationError::Token(_)
            | AuthenticationError::NotAccepted { .. } => Self::unauthenticated(message),
            AuthenticationError::TooOften => Self::resource_exhausted(message),
            AuthenticationError::Unavailable => Self::unavailable(message),
        }
    }
}

/// Reads and checks bearer tokens, for both discovery and certificates. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Authenticator(Judge);

/// Who says whether a token is good.
#[derive(Debug, Clone)]
enum Judge {
    /// The key that signed it, by this clock.
    Key(Arc<TokenKey>, Clock),
    /// The API server.
    Reviewer(TokenReviewer),
}

impl Authenticator {
    /// Accepts what `key` signed, by the time of `clock`.
    pub fn local(key: Arc<TokenKey>, clock: Clock) -> Self {
        Self(Judge::Key(key, clock))
    }

    /// Accepts what the API server accepts.
    pub fn kubernetes(reviewer: TokenReviewer) -> Self {
        Self(Judge::Reviewer(reviewer))
    }

    /// Says who sent a request with this metadata from the address `peer`, as far as that is known.
    ///
    /// # Errors
    /// When there is no token, it is not good, or nobody can say.
    pub async fn authenticate(
        &self,
        metadata: &MetadataMap,
        peer: Option<IpAddr>,
    ) -> Result<Caller, AuthenticationError> {
        let token = bearer(metadata)?;
        match &self.0 {
            Judge::Key(key, clock) => Ok(key.verify(token, AUDIENCE, clock.now())?),
            Judge::Reviewer(reviewer) => reviewer.review(token, peer).await,
        }
    }
}

/// The bearer token of a request.
fn bearer(metadata: &MetadataMap) -> Result<&str, AuthenticationError> {
    let mut headers = metadata.get_all("authorization").iter();
    let header = headers.next().ok_or(AuthenticationError::Missing)?;
    if headers.next().is_some() {
        return Err(AuthenticationError::Several);
    }
    let text = header.to_str().map_err(|_| AuthenticationError::Scheme)?;
    let (scheme, token) = text.split_once(' ').ok_or(AuthenticationError::Scheme)?;
    // RFC 9110 section 11.1: schemes are compared without case.
    if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() {
        return Err(AuthenticationError::Scheme);
    }
    Ok(token.trim())
}
