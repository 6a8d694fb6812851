//! Private keys and the requests made with them.

use std::fmt;
use std::sync::Arc;

use mesh_model::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::SigningKey;
use thiserror::Error;

use crate::tls;

/// Why a key could not be made or used.
#[derive(Debug, Error)]
pub enum KeyError {
    /// The generator or the encoder of the request failed.
    #[error("cannot make a key or a certificate request: {0}")]
    Generate(#[from] rcgen::Error),
    /// The key cannot sign handshakes.
    #[error("the key cannot be used for TLS: {0}")]
    Unusable(#[from] rustls::Error),
}

/// A P-256 private key that was made in this process. It has no way out but into a TLS configuration.
pub struct PrivateKey(KeyPair);

impl PrivateKey {
    /// Makes a new key.
    ///
    /// # Errors
    /// When the system's source of randomness fails.
    pub fn generate() -> Result<Self, KeyError> {
        Ok(Self(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?))
    }

    /// A certificate signing request for `id`, in PEM: empty subject, the SPIFFE URI as its only name.
    ///
    /// # Errors
    /// When the request cannot be encoded or signed.
    pub fn csr_pem(&self, id: &SpiffeId) -> Result<String, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        Ok(params.serialize_request(&self.0)?.pem()?)
    }

    /// The key as rustls wants it.
    pub(crate) fn into_signing_key(self) -> Result<Arc<dyn SigningKey>, KeyError> {
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.serialize_der()));
        Ok(tls::provider().key_provider.load_private_key(der)?)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}
