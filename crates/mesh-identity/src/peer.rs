//! What a peer's certificate proves, and why it is refused.

use std::sync::Arc;

use mesh_model::{InvalidSpiffeId, SpiffeId};
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use rustls::{CertificateError, OtherError};
use thiserror::Error;
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;

use crate::tls;

/// Why a certificate has no identity of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PeerIdError {
    /// The peer showed no certificate.
    #[error("no certificate")]
    NoCertificate,
    /// It is not an X.509 certificate, or its names are malformed.
    #[error("the certificate cannot be parsed")]
    Malformed,
    /// It has no URI among its names.
    #[error("the certificate has no URI name")]
    NoUri,
    /// It has several URIs, where an SVID has exactly one (X.509-SVID section 2).
    #[error("the certificate has {count} URI names, expected one")]
    SeveralUris {
        /// How many.
        count: usize,
    },
    /// Its URI is not an identity of the mesh.
    #[error("the certificate's URI name {0}")]
    NotAnIdentity(InvalidSpiffeId),
}

/// The identity in the first certificate of `chain`: exactly one URI name, of the strict SPIFFE form. Names of other
/// types are ignored (X.509-SVID section 2 allows them). Only as good as the chain: check that first.
///
/// # Errors
/// When there is no such identity.
pub fn peer_id(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerIdError> {
    let leaf = chain.first().ok_or(PeerIdError::NoCertificate)?;
    let (rest, certificate) = parse_x509_certificate(leaf).map_err(|_| PeerIdError::Malformed)?;
    if !rest.is_empty() {
        return Err(PeerIdError::Malformed);
    }
    let names =
        certificate.subject_alternative_name().map_err(|_| PeerIdError::Malformed)?.ok_or(PeerIdError::NoUri)?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.count()) {
        (None, _) => Err(PeerIdError::NoUri),
        (Some(uri), 0) => uri.parse().map_err(PeerIdError::NotAnIdentity),
        (Some(_), more) => Err(PeerIdError::SeveralUris { count: more + 1 }),
    }
}

/// Why we refused a peer's certificate.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Its time is over.
    #[error("the certificate has expired")]
    Expired,
    /// Its time has not come. One of the two clocks is wrong.
    #[error("the certificate is not valid yet")]
    NotYetValid,
    /// No root that we trust stands behind it.
    #[error("the certificate was not issued under a root that is trusted here")]
    UnknownIssuer,
    /// The peer does not hold the key of its certificate.
    #[error("the handshake is not signed by the certificate's key")]
    BadSignature,
    /// It was issued for another use.
    #[error("the certificate is not for this use")]
    WrongUse,
    /// The chain cannot be verified for another reason.
    #[error("the certificate chain is not acceptable: {0}")]
    Chain(String),
    /// It names no identity of the mesh.
    #[error(transparent)]
    Identity(#[from] PeerIdError),
    /// It belongs to another trust domain than our own.
    #[error("{peer} is not of the trust domain {ours}")]
    TrustDomain {
        /// The peer's identity.
        peer: SpiffeId,
        /// Our own trust domain.
        ours: String,
    },
    /// It is not one of the identities that discovery gives for the destination.
    #[error("the server is {peer}, expected {}", list(expected))]
    UnexpectedIdentity {
        /// The peer's identity.
        peer: SpiffeId,
        /// What it could have been; with an empty list nobody is right.
        expected: Vec<SpiffeId>,
    },
}

impl Refusal {
    /// The refusal behind an error of a handshake, if it was we who refused the peer's certificate.
    pub fn of(error: &rustls::Error) -> Option<Self> {
        match error {
            rustls::Error::InvalidCertificate(error) => Some(Self::of_certificate(error)),
            rustls::Error::NoCertificatesPresented => Some(Self::Identity(PeerIdError::NoCertificate)),
            _ => None,
        }
    }

    fn of_certificate(error: &CertificateError) -> Self {
        match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotYetValid,
            CertificateError::UnknownIssuer => Self::UnknownIssuer,
            CertificateError::BadSignature => Self::BadSignature,
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => Self::WrongUse,
            CertificateError::BadEncoding => Self::Identity(PeerIdError::Malformed),
            CertificateError::Other(OtherError(source)) => {
                source.downcast_ref::<Self>().cloned().unwrap_or_else(|| Self::Chain(source.to_string()))
            }
            // The enum is open, and its text is what there is to say.
            other => Self::Chain(other.to_string()),
        }
    }

    /// As rustls wants it. What rustls has a name for keeps it, so that the peer gets the fitting alert.
    pub(crate) fn into_rustls(self) -> rustls::Error {
        let error = match self {
            Self::Expired => CertificateError::Expired,
            Self::NotYetValid => CertificateError::NotValidYet,
            Self::UnknownIssuer => CertificateError::UnknownIssuer,
            Self::BadSignature => CertificateError::BadSignature,
            Self::WrongUse => CertificateError::InvalidPurpose,
            Self::Identity(PeerIdError::Malformed) => CertificateError::BadEncoding,
            refusal @ (Self::Chain(_)
            | Self::Identity(_)
            | Self::TrustDomain { .. }
            | Self::UnexpectedIdentity { .. }) => CertificateError::Other(OtherError(Arc::new(refusal))),
        };
        rustls::Error::InvalidCertificate(error)
    }

    fn of_webpki(error: &webpki::Error) -> Self {
        match error {
            webpki::Error::CertExpired { .. } => Self::Expired,
            webpki::Error::CertNotValidYet { .. } => Self::NotYetValid,
            // A foreign root may have the name of ours: then it is the signature that does not fit.
            webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => Self::UnknownIssuer,
            webpki::Error::RequiredEkuNotFoundContext(_) | webpki::Error::EmptyEkuExtension => Self::WrongUse,
            webpki::Error::BadDer | webpki::Error::BadDerTime => Self::Identity(PeerIdError::Malformed),
            // The enum is open; the text names the fault.
            other => Self::Chain(other.to_string()),
        }
    }
}

/// Which end of a connection a certificate speaks for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Use {
    Server,
    Client,
}

/// Checks that `leaf` is valid at `now` for `usage` and chains to one of `anchors`, and says whose it is.
pub(crate) fn verify(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    anchors: &[TrustAnchor<'_>],
    now: UnixTime,
    usage: Use,
) -> Result<SpiffeId, Refusal> {
    let usage = match usage {
        Use::Server => KeyUsage::server_auth(),
        Use::Client => KeyUsage::client_auth(),
    };
    let algorithms = tls::provider().signature_verification_algorithms.all;
    EndEntityCert::try_from(leaf)
        .and_then(|cert| cert.verify_for_usage(algorithms, anchors, intermediates, now, usage, None, None).map(|_| ()))
        .map_err(|error| Refusal::of_webpki(&error))?;
    Ok(peer_id(std::slice::from_ref(leaf))?)
}

fn list(ids: &[SpiffeId]) -> String {
    if ids.is_empty() {
        return "nobody (no identity is known for the destination)".to_owned();
    }
    ids.iter().map(SpiffeId::as_str).collect::<Vec<_>>().join(" or ")
}
