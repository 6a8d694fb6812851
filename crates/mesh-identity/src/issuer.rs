//! Where certificates come from: the trait, its errors, and the form of an answer.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::future::BoxFuture;
use mesh_model::SpiffeId;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::{self, PemObject};
use thiserror::Error;

use crate::token::TokenError;

/// Most elements of an answer: leaf, intermediates, roots.
const MAX_ELEMENTS: usize = 16;
/// Most bytes of one element.
const MAX_ELEMENT_BYTES: usize = 64 * 1024;
/// Most certificates of an answer, bundles counted out.
const MAX_CERTIFICATES: usize = 64;

/// Signs certificate requests for identities.
pub trait Issuer: Send + Sync {
    /// Asks for a certificate for `id` over the public key of `csr_pem`. One call is one attempt: the caller retries.
    fn issue<'a>(&'a self, id: &'a SpiffeId, csr_pem: String) -> BoxFuture<'a, Result<IssuedCertificate, IssueError>>;
}

/// Why no certificate was issued.
#[derive(Debug, Error)]
pub enum IssueError {
    /// The authority could not be reached, is busy, or does not know the identity yet. Worth another try soon.
    #[error("certificate authority unavailable: {reason}")]
    Unavailable {
        /// What the transport or the authority said.
        reason: String,
    },
    /// The authority answered, and said no.
    #[error("certificate authority refused: {reason}")]
    Refused {
        /// What the authority said.
        reason: String,
    },
    /// There is no token to prove who asks.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The answer makes no sense.
    #[error("certificate authority sent a malformed answer: {0}")]
    Answer(#[from] InvalidAnswer),
}

impl IssueError {
    /// True if the authority has decided against the request, so that waiting for the next attempt is no use.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Refused { .. } => true,
            Self::Unavailable { .. } | Self::Token(_) | Self::Answer(_) => false,
        }
    }
}

/// Why an answer of a certificate authority was not taken.
#[derive(Debug, Error)]
pub enum InvalidAnswer {
    /// Fewer than two elements: no leaf, or no roots.
    #[error("{0} elements, expected at least a leaf and the roots")]
    TooFew(usize),
    /// More or longer elements than any sensible chain has.
    #[error(
        "longer than accepted ({MAX_ELEMENTS} elements of {MAX_ELEMENT_BYTES} bytes, {MAX_CERTIFICATES} certificates)"
    )]
    TooLong,
    /// An element holds no certificate.
    #[error("element {index} holds no certificate")]
    Empty {
        /// Position of the element, from 0.
        index: usize,
    },
    /// An element is not PEM.
    #[error("element {index} is not PEM: {error}")]
    Pem {
        /// Position of the element, from 0.
        index: usize,
        /// What is wrong with it.
        error: pem::Error,
    },
}

/// A certificate as an authority issued it, not checked yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCertificate {
    /// The certificate asked for.
    pub leaf: CertificateDer<'static>,
    /// From the leaf's issuer upwards, without the root.
    pub intermediates: Vec<CertificateDer<'static>>,
    /// All roots to trust, one or more; several while the root is being replaced.
    pub roots: Vec<CertificateDer<'static>>,
}

impl IssuedCertificate {
    /// Reads `cert_chain` of `istio.v1.auth.IstioCertificateResponse`: the leaf, the intermediates one per element,
    /// and as last element a bundle of roots. Intermediates that share an element are taken as well.
    ///
    /// # Errors
    /// When the answer has not that form or exceeds the bounds.
    pub fn from_wire(chain: &[String]) -> Result<Self, InvalidAnswer> {
        if chain.len() > MAX_ELEMENTS || chain.iter().any(|element| element.len() > MAX_ELEMENT_BYTES) {
            return Err(InvalidAnswer::TooLong);
        }
        let (Some((bundle, path)), true) = (chain.split_last(), chain.len() >= 2) else {
            return Err(InvalidAnswer::TooFew(chain.len()));
        };
        let mut certificates = Vec::new();
        for (index, element) in path.iter().enumerate() {
            certificates.extend(certificates_of(index, element)?);
        }
        let roots = certificates_of(path.len(), bundle)?;
        if certificates.len() + roots.len() > MAX_CERTIFICATES {
            return Err(InvalidAnswer::TooLong);
        }
        let mut certificates = certificates.into_iter();
        let leaf = certificates.next().ok_or(InvalidAnswer::Empty { index: 0 })?;
        Ok(Self { leaf, intermediates: certificates.collect(), roots })
    }

    /// The answer as [`from_wire`](Self::from_wire) reads it.
    pub fn to_wire(&self) -> Vec<String> {
        let path = std::iter::once(&self.leaf).chain(&self.intermediates).map(certificate_pem);
        path.chain(std::iter::once(self.roots.iter().map(certificate_pem).collect())).collect()
    }
}

/// One certificate in PEM.
pub fn certificate_pem(certificate: &CertificateDer<'_>) -> String {
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut body = BASE64_STANDARD.encode(certificate);
    while !body.is_empty() {
        // RFC 7468 section 2: lines of 64 characters.
        let rest = body.split_off(body.len().min(64));
        text.push_str(&body);
        text.push('\n');
        body = rest;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

/// All certificates of a PEM text, other sections skipped.
///
/// # Errors
/// When a section is malformed.
pub fn certificates_from_pem(text: &str) -> Result<Vec<CertificateDer<'static>>, pem::Error> {
    CertificateDer::pem_slice_iter(text.as_bytes()).collect()
}

fn certificates_of(index: usize, element: &str) -> Result<Vec<CertificateDer<'static>>, InvalidAnswer> {
    let certificates = certificates_from_pem(element).map_err(|error| InvalidAnswer::Pem { index, error })?;
    if certificates.is_empty() {
        return Err(InvalidAnswer::Empty { index });
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{authority, id, issue};

    #[test]
    fn answers_survive_the_wire() {
        let root = authority();
        let intermediate = root.intermediate("cluster.local", std::time::SystemTime::now()).unwrap();
        for authority in [root, intermediate] {
            let more = authority.with_more_roots(&crate::testing::authority().roots_pem()).unwrap();
            let issued = issue(&more, &id("a")).1;
            let wire = issued.to_wire();
            assert_eq!(wire.len(), 2 + issued.intermediates.len());
            assert_eq!(wire.last().unwrap().matches("BEGIN").count(), 2);
            assert!(wire.iter().flat_map(|element| element.lines()).all(|line| line.len() <= 64));
            assert_eq!(IssuedCertificate::from_wire(&wire).unwrap(), issued);
        }
    }

    #[test]
    fn malformed_answers_are_named() {
        let wire = issue(&authority(), &id("a")).1.to_wire();
        let (leaf, roots) = (wire[0].clone(), wire[1].clone());
        let refused = |chain: &[String]| IssuedCertificate::from_wire(chain).unwrap_err().to_string();
        assert!(refused(&[]).starts_with("0 elements"));
        assert!(refused(std::slice::from_ref(&leaf)).starts_with("1 elements"));
        assert_eq!(refused(&[leaf.clone(), String::new()]), "element 1 holds no certificate");
        assert_eq!(refused(&["x".to_owned(), roots.clone()]), "element 0 holds no certificate");
        assert!(refused(&["-----BEGIN CERTIFICATE-----".to_owned(), roots.clone()]).contains("element 0 is not PEM"));
        let long = vec![leaf.clone(); MAX_ELEMENTS + 1];
        assert!(refused(&long).starts_with("longer than accepted"));
        assert!(refused(&[leaf.repeat(500), roots.clone()]).starts_with("longer than accepted"));
        assert!(refused(&[leaf, roots.repeat(MAX_CERTIFICATES)]).starts_with("longer than accepted"));
    }
}
