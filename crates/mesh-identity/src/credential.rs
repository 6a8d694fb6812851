//! One certificate with its key, checked, and ready for use.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_model::SpiffeId;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, TrustAnchor};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig};
use thiserror::Error;
use x509_parser::parse_x509_certificate;

use crate::clock::{Clock, unix_time};
use crate::issuer::IssuedCertificate;
use crate::key::{KeyError, PrivateKey};
use crate::peer::{self, Refusal, Use};
use crate::tls::{self, Anchors};

/// Why an issued certificate cannot be used.
#[derive(Debug, Error)]
pub enum CredentialError {
    /// It would be refused by peers, and so by us.
    #[error("the issued certificate is not acceptable: {0}")]
    Refused(#[from] Refusal),
    /// It is for somebody else.
    #[error("the issued certificate is for {issued}, asked for {asked}")]
    WrongIdentity {
        /// Whom it names.
        issued: SpiffeId,
        /// Whom it should name.
        asked: SpiffeId,
    },
    /// It is over another key than ours.
    #[error("the issued certificate is not for the key that asked: {0}")]
    WrongKey(rustls::Error),
    /// A root or the leaf cannot be parsed.
    #[error("the issued chain holds a malformed certificate")]
    Malformed,
    /// The key is not usable.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// rustls does not accept the configuration.
    #[error("cannot set up TLS: {0}")]
    Tls(rustls::Error),
}

/// A certificate of one identity, its key, and the roots that came with it.
pub struct Credential {
    id: SpiffeId,
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
    roots: Vec<CertificateDer<'static>>,
    anchors: Anchors,
    key: Arc<CertifiedKey>,
    server: Arc<ServerConfig>,
    /// Expects nobody; cloned with another verifier for each use.
    client: ClientConfig,
}

impl Credential {
    /// Checks `issued` as a peer would at this time of `clock`, and that it is for `id` and for `key`.
    ///
    /// # Errors
    /// When peers would refuse the certificate, or it is for another identity or key.
    pub fn new(
        id: &SpiffeId,
        key: PrivateKey,
        issued: IssuedCertificate,
        clock: &Clock,
    ) -> Result<Self, CredentialError> {
        let IssuedCertificate { leaf, intermediates, roots } = issued;
        let anchors = anchors_of(&roots)?;
        let now = unix_time(clock.now());
        for usage in [Use::Server, Use::Client] {
            let found = peer::verify(&leaf, &intermediates, &anchors, now, usage)?;
            if found != *id {
                return Err(CredentialError::WrongIdentity { issued: found, asked: id.clone() });
            }
        }
        let facts = Facts::of(&leaf)?;
        let chain = std::iter::once(leaf).chain(intermediates).collect();
        let key = CertifiedKey::new(chain, key.into_signing_key()?);
        key.keys_match().map_err(CredentialError::WrongKey)?;
        let key = Arc::new(key);
        let server =
            tls::server_config(key.clone(), anchors.clone(), id.trust_domain(), clock).map_err(CredentialError::Tls)?;
        let client = tls::client_config(key.clone(), anchors.clone(), &[], clock).map_err(CredentialError::Tls)?;
        let Facts { serial, not_before, not_after } = facts;
        Ok(Self {
            id: id.clone(),
            serial,
            not_before,
            not_after,
            roots,
            anchors,
            key,
            server: Arc::new(server),
            client,
        })
    }

    /// Whose it is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The serial number, hexadecimal with colons.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// When it begins to be valid.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// When it ends.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The chain as shown to peers, leaf first, without the root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// The roots trusted with it.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// To accept tunnels as this identity, from any identity of the same trust domain.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// To open tunnels as this identity to a server that is one of `expected`. An empty list refuses every server.
    ///
    /// rustls accepts a server that chooses no application protocol; [`handshake::connect`](crate::handshake::connect)
    /// does not.
    pub fn client_config(&self, expected: &[SpiffeId]) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        config.dangerous().set_certificate_verifier(self.server_verifier(expected));
        Arc::new(config)
    }

    fn server_verifier(&self, expected: &[SpiffeId]) -> Arc<dyn ServerCertVerifier> {
        tls::server_verifier(self.anchors.clone(), expected)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// The trust anchors of `roots`.
fn anchors_of(roots: &[CertificateDer<'static>]) -> Result<Anchors, CredentialError> {
    let anchor = |root| {
        webpki::anchor_from_trusted_cert(root)
            .map(|anchor: TrustAnchor<'_>| anchor.to_owned())
            .map_err(|_| CredentialError::Malformed)
    };
    roots.iter().map(anchor).collect()
}

/// What a leaf says of itself.
struct Facts {
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl Facts {
    fn of(leaf: &CertificateDer<'_>) -> Result<Self, CredentialError> {
        let (_, certificate) = parse_x509_certificate(leaf).map_err(|_| CredentialError::Malformed)?;
        let time = |time: x509_parser::time::ASN1Time| {
            u64::try_from(time.timestamp()).map_or(UNIX_EPOCH, |seconds| UNIX_EPOCH + Duration::from_secs(seconds))
        };
        Ok(Self {
            serial: certificate.raw_serial_as_string(),
            not_before: time(certificate.validity().not_before),
            not_after: time(certificate.validity().not_after),
        })
    }
}
