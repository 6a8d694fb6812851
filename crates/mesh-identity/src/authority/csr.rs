//! The one thing that an authority takes from a certificate signing request: its public key.

use rcgen::{
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_RSA_SHA256, PublicKeyData, SignatureAlgorithm,
    SubjectPublicKeyInfo,
};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use thiserror::Error;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

/// Longest request that is looked at, in bytes.
pub const MAX_CSR_BYTES: usize = 16 * 1024;
/// An RSA public key of 4096 bits takes 526 bytes.
const MAX_PUBLIC_KEY_BYTES: usize = 600;

/// Why a certificate signing request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidCsr {
    /// Longer than [`MAX_CSR_BYTES`].
    #[error("the certificate request has {length} bytes, at most {MAX_CSR_BYTES} are accepted")]
    TooLong {
        /// Length in bytes.
        length: usize,
    },
    /// Not PEM with one section `CERTIFICATE REQUEST`.
    #[error("the certificate request is not PEM")]
    Pem,
    /// Not PKCS #10 (RFC 2986).
    #[error("the certificate request is not PKCS #10")]
    Malformed,
    /// The requester does not hold the private key.
    #[error("the certificate request is not signed by its own key")]
    Signature,
    /// A kind or size of key that is not signed here.
    #[error("the key of the certificate request is none of P-256, P-384, RSA with 2048 to 4096 bits")]
    Key,
}

/// A public key whose holder has proved to have the private one.
#[derive(Debug)]
pub struct CsrPublicKey(SubjectPublicKeyInfo);

impl CsrPublicKey {
    /// Takes the public key of a request in PEM. Subject, names and extensions of the request are not looked at.
    ///
    /// # Errors
    /// When it is too long, malformed, not signed by its own key, or its key is of a kind that is not signed here.
    pub fn from_pem(csr: &str) -> Result<Self, InvalidCsr> {
        if csr.len() > MAX_CSR_BYTES {
            return Err(InvalidCsr::TooLong { length: csr.len() });
        }
        let der = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes()).map_err(|_| InvalidCsr::Pem)?;
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|_| InvalidCsr::Malformed)?;
        if !rest.is_empty() {
            return Err(InvalidCsr::Malformed);
        }
        let key = SubjectPublicKeyInfo::from_der(request.certification_request_info.subject_pki.raw)
            .map_err(|_| InvalidCsr::Key)?;
        if !is_signed_here(key.algorithm()) || key.der_bytes().len() > MAX_PUBLIC_KEY_BYTES {
            return Err(InvalidCsr::Key);
        }
        // For RSA this accepts 2048 bits and more.
        request.verify_signature().map_err(|_| InvalidCsr::Signature)?;
        Ok(Self(key))
    }

    pub(super) fn key(&self) -> &SubjectPublicKeyInfo {
        &self.0
    }
}

fn is_signed_here(algorithm: &SignatureAlgorithm) -> bool {
    [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_RSA_SHA256].iter().any(|known| **known == *algorithm)
}
