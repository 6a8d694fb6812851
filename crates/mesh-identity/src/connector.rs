//! The way to the control plane: a gRPC channel over TLS whose roots may be replaced while the process runs.

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

/// Longest file of roots that is read, in bytes.
const MAX_ROOTS_BYTES: u64 = 1024 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no channel.
#[derive(Debug, Error)]
pub enum ConnectorError {
    /// The address is not `https://<host>:<port>`. Tokens are never sent in clear.
    #[error("the address {address:?} is not of the form https://<host>:<port>")]
    Address {
        /// The address as given.
        address: String,
    },
    /// The file of roots cannot be read.
    #[error("cannot read the roots {}: {error}", path.display())]
    Roots {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The file of roots holds none, or is too large.
    #[error("{} holds no usable certificate", path.display())]
    NoRoots {
        /// The file.
        path: PathBuf,
    },
    /// The TLS configuration was refused.
    #[error("cannot set up TLS to {address}: {error}")]
    Tls {
        /// The address.
        address: String,
        /// What is wrong.
        error: tonic::transport::Error,
    },
}

/// Makes channels to one address, checking the server against the roots in a file. The file is read at every call, and a
/// channel made with other roots than it holds now is replaced, so that the control plane's root can be rotated.
#[derive(Debug)]
pub struct Connector {
    address: String,
    roots: PathBuf,
    cached: Mutex<Option<Cached>>,
}

#[derive(Debug)]
struct Cached {
    roots: Vec<u8>,
    channel: Channel,
}

impl Connector {
    /// To `address`, an `https` URI without a path, trusting the PEM certificates in the file `roots`.
    ///
    /// # Errors
    /// When the address is malformed or not `https`.
    pub fn new(address: &str, roots: impl Into<PathBuf>) -> Result<Self, ConnectorError> {
        let uri = address.parse::<tonic::transport::Uri>();
        if !uri.is_ok_and(|uri| uri.scheme_str() == Some("https") && uri.host().is_some()) {
            return Err(ConnectorError::Address { address: address.to_owned() });
        }
        Ok(Self { address: address.to_owned(), roots: roots.into(), cached: Mutex::default() })
    }

    /// The channel to use now. It connects when first used and again after a failure.
    ///
    /// # Errors
    /// When the roots cannot be read or hold nothing usable.
    pub async fn channel(&self) -> Result<Channel, ConnectorError> {
        let roots = self.roots().await?;
        if let Some(channel) = self.cached(&roots) {
            return Ok(channel);
        }
        let channel = self.build(&roots)?;
        *self.cached.lock().unwrap_or_else(PoisonError::into_inner) = Some(Cached { roots, channel: channel.clone() });
        Ok(channel)
    }

    fn cached(&self, roots: &[u8]) -> Option<Channel> {
        let cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        cached.as_ref().filter(|cached| cached.roots == roots).map(|cached| cached.channel.clone())
    }

    /// What is in the file of roots now.
    ///
    /// # Errors
    /// When it cannot be read or is too long.
    pub async fn roots(&self) -> Result<Vec<u8>, ConnectorError> {
        use tokio::io::AsyncReadExt;
        let failed = |error| ConnectorError::Roots { path: self.roots.clone(), error };
        let file = tokio::fs::File::open(&self.roots).await.map_err(failed)?;
        let mut roots = Vec::new();
        file.take(MAX_ROOTS_BYTES + 1).read_to_end(&mut roots).await.map_err(failed)?;
        if u64::try_from(roots.len()).is_ok_and(|length| length > MAX_ROOTS_BYTES) {
            return Err(ConnectorError::NoRoots { path: self.roots.clone() });
        }
        Ok(roots)
    }

    fn build(&self, roots: &[u8]) -> Result<Channel, ConnectorError> {
        let text = String::from_utf8_lossy(roots);
        if !crate::issuer::certificates_from_pem(&text).is_ok_and(|certificates| !certificates.is_empty()) {
            return Err(ConnectorError::NoRoots { path: self.roots.clone() });
        }
        let endpoint = Endpoint::from_shared(self.address.clone())
            .map_err(|_| ConnectorError::Address { address: self.address.clone() })?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots));
        let endpoint =
            endpoint.tls_config(tls).map_err(|error| ConnectorError::Tls { address: self.address.clone(), error })?;
        Ok(endpoint.connect_lazy())
    }
}
