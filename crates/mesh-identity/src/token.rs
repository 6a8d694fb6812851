//! Bearer tokens: proof of who asks the control plane.

use std::fmt;
use std::io;
use std::path::PathBuf;

use futures_util::future::BoxFuture;
use thiserror::Error;
use tokio::io::AsyncReadExt;

/// Longest token that is sent, in bytes. Kubernetes tokens have about 1 KiB.
const MAX_TOKEN_BYTES: u64 = 16 * 1024;

/// A bearer token. Never printed.
#[derive(Clone)]
pub struct BearerToken(String);

impl BearerToken {
    /// Takes a token as it stands in a file: white space around it is dropped.
    ///
    /// # Errors
    /// When nothing is left, or it holds what an HTTP header cannot hold.
    pub fn new(text: &str) -> Result<Self, TokenError> {
        let token = text.trim();
        if token.is_empty() {
            return Err(TokenError::Empty);
        }
        if !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(TokenError::Malformed);
        }
        Ok(Self(token.to_owned()))
    }

    /// The value of an `authorization` header.
    pub fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BearerToken(redacted)")
    }
}

/// Why there is no token.
#[derive(Debug, Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read the token {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The file is larger than any token.
    #[error("the token {} is larger than {MAX_TOKEN_BYTES} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// There is nothing in it.
    #[error("the token is empty")]
    Empty,
    /// It holds characters that no token has.
    #[error("the token holds characters that a bearer token cannot hold")]
    Malformed,
}

/// Gives the token to send, anew for each call, because tokens are replaced while a process runs.
pub trait TokenSource: Send + Sync {
    /// The token to use now.
    fn token(&self) -> BoxFuture<'_, Result<BearerToken, TokenError>>;
}

/// A token in a file that somebody else keeps fresh, such as a projected service-account token.
#[derive(Debug, Clone)]
pub struct FileToken(PathBuf);

impl FileToken {
    /// Reads from `path`, each time anew.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    async fn read(&self) -> Result<BearerToken, TokenError> {
        let failed = |error| TokenError::Read { path: self.0.clone(), error };
        let file = tokio::fs::File::open(&self.0).await.map_err(failed)?;
        let mut text = String::new();
        file.take(MAX_TOKEN_BYTES + 1).read_to_string(&mut text).await.map_err(failed)?;
        if u64::try_from(text.len()).is_ok_and(|length| length > MAX_TOKEN_BYTES) {
            return Err(TokenError::TooLarge { path: self.0.clone() });
        }
        BearerToken::new(&text)
    }
}

impl TokenSource for FileToken {
    fn token(&self) -> BoxFuture<'_, Result<BearerToken, TokenError>> {
        Box::pin(self.read())
    }
}

impl TokenSource for BearerToken {
    fn token(&self) -> BoxFuture<'_, Result<BearerToken, TokenError>> {
        Box::pin(std::future::ready(Ok(self.clone())))
    }
}
