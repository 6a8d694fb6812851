//! Who calls: the bearer token of a gRPC request.

use std::sync::Arc;

use mesh_identity::Clock;
use thiserror::Error;
use tonic::Status;
use tonic::metadata::MetadataMap;

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
}

impl From<AuthenticationError> for Status {
    fn from(error: AuthenticationError) -> Self {
        Self::unauthenticated(error.to_string())
    }
}

/// Reads and checks bearer tokens, for both discovery and certificates.
#[derive(Debug, Clone)]
pub struct Authenticator {
    key: Arc<TokenKey>,
    clock: Clock,
}

impl Authenticator {
    /// Accepts what `key` signed, by the time of `clock`.
    pub fn new(key: Arc<TokenKey>, clock: Clock) -> Self {
        Self { key, clock }
    }

    /// Says who sent a request with this metadata.
    ///
    /// # Errors
    /// When there is no token, or it is not good.
    pub fn authenticate(&self, metadata: &MetadataMap) -> Result<Caller, AuthenticationError> {
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
        Ok(self.key.verify(token.trim(), AUDIENCE, self.clock.now())?)
    }
}
