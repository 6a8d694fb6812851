//! The signing end: a root of its own, or an intermediate that somebody plugged in.
//!
//! Of a request only the public key is used; names, use and lifetime are the authority's decision.

use std::fmt;
use std::time::{Duration, SystemTime};

use mesh_model::SpiffeId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, pem};
use thiserror::Error;
use x509_parser::parse_x509_certificate;

mod csr;

pub use csr::{CsrPublicKey, InvalidCsr, MAX_CSR_BYTES};

use crate::clock::unix_time;
use crate::issuer::{IssuedCertificate, certificate_pem, certificates_from_pem};
use crate::peer::{self, Refusal, Use};
use crate::tls;

/// Lifetime of a certificate where the request does not name one, and the longest that is given unless told otherwise.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// Lifetime of a root that was made here.
pub const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// How far certificates reach back, for peers whose clocks are behind.
pub const BACKDATE: Duration = Duration::from_secs(120);

/// Why an authority could not be made or could not sign.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// Encoding or signing failed.
    #[error("cannot make a certificate: {0}")]
    Encode(#[from] rcgen::Error),
    /// A certificate is not PEM.
    #[error("{what} is not PEM: {error}")]
    Pem {
        /// Which of the inputs.
        what: &'static str,
        /// What is wrong with it.
        error: pem::Error,
    },
    /// An input holds no certificate.
    #[error("{what} holds no certificate")]
    Empty {
        /// Which of the inputs.
        what: &'static str,
    },
    /// The key cannot be parsed. Its text is not repeated.
    #[error("the authority's key is not a private key in PEM")]
    Key,
    /// The certificate is not one of an authority, or malformed.
    #[error("the authority's certificate {0}")]
    NotAnAuthority(&'static str),
    /// What it signs does not lead to its roots.
    #[error("certificates signed with the authority's key do not verify under its roots: {0}")]
    Chain(Refusal),
    /// Its time is over.
    #[error("the authority's own certificate has expired")]
    Expired,
    /// The system has no randomness.
    #[error("no randomness from the system")]
    Random,
}

/// A private key in PEM, for its owner to store. Printed redacted.
pub struct SecretPem(String);

impl SecretPem {
    /// The text. Keep it out of logs.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretPem(redacted)")
    }
}

/// The certificate of a server that is known by host names, and its key.
#[derive(Debug)]
pub struct ServerIdentity {
    /// Leaf and intermediates, PEM.
    pub chain_pem: String,
    /// The key, PEM.
    pub key_pem: SecretPem,
}

/// The texts of an authority that was made elsewhere, all PEM.
#[derive(Clone, Copy)]
pub struct AuthorityPem<'a> {
    /// The signing certificate.
    pub certificate: &'a str,
    /// Its private key.
    pub key: &'a str,
    /// Certificates between it and the root; itself and roots among them are ignored. May be empty.
    pub chain: &'a str,
    /// The roots to trust, one or more, in any order.
    pub roots: &'a str,
}

/// A key that signs certificates of the mesh, with its own certificate and the way up to the roots.
pub struct Authority {
    issuer: rcgen::Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    /// What goes with each leaf: empty when the signing certificate is itself a root.
    intermediates: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
    max_lifetime: Duration,
}

impl Authority {
    /// Makes a self-signed root named after `trust_domain`, valid from `now` for [`ROOT_LIFETIME`].
    ///
    /// # Errors
    /// When the system has no randomness.
    pub fn generate(trust_domain: &str, now: SystemTime) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        // Room for one intermediate below it.
        let params = authority_params(trust_domain, "Culvert root", BasicConstraints::Constrained(1), now)?;
        let certificate: CertificateDer<'static> = params.self_signed(&key)?.into();
        Self::assemble(certificate.clone(), key, Vec::new(), vec![certificate])
    }

    /// Makes an intermediate below this one, with a key of its own.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub fn intermediate(&self, name: &str, now: SystemTime) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = authority_params(name, "Culvert intermediate", BasicConstraints::Constrained(0), now)?;
        params.not_after = params.not_after.min(self.not_after.into());
        params.use_authority_key_identifier_extension = true;
        let certificate: CertificateDer<'static> = params.signed_by(&key, &self.issuer)?.into();
        let chain = std::iter::once(certificate.clone()).chain(self.intermediates.iter().cloned()).collect();
        Self::assemble(certificate, key, chain, self.roots.clone())
    }

    /// Takes an authority from its files, and proves by a trial that what it signs verifies under its roots at `now`.
    ///
    /// # Errors
    /// When a text is malformed, the key does not belong to the certificate, or the trial fails.
    pub fn from_pem(texts: AuthorityPem<'_>, now: SystemTime) -> Result<Self, AuthorityError> {
        let certificate = first("the authority's certificate", texts.certificate)?;
        let roots = several("the roots", texts.roots)?;
        let key = KeyPair::from_pem(texts.key).map_err(|_| AuthorityError::Key)?;
        let mut chain = if roots.contains(&certificate) { Vec::new() } else { vec![certificate.clone()] };
        for link in certificates_from_pem(texts.chain)
            .map_err(|error| AuthorityError::Pem { what: "the certificate chain", error })?
        {
            if !roots.contains(&link) && !chain.contains(&link) && link != certificate {
                chain.push(link);
            }
        }
        let mut authority = Self::assemble(certificate, key, chain, roots)?;
        let trial = authority.trial(now)?;
        authority.prove(&trial, &authority.roots, now)?;
        // Several may have the same name, so that only a proof tells which one it is.
        let own =
            authority.roots.iter().position(|root| authority.prove(&trial, std::slice::from_ref(root), now).is_ok());
        if let Some(own) = own {
            authority.roots[..=own].rotate_right(1);
        }
        Ok(authority)
    }

    /// Also hands out the roots in `pem`, so that peers trust them before or after this authority's own are used.
    ///
    /// # Errors
    /// When the text holds no certificate.
    pub fn with_more_roots(mut self, pem: &str) -> Result<Self, AuthorityError> {
        for root in several("the additional roots", pem)? {
            if !self.roots.contains(&root) {
                self.roots.push(root);
            }
        }
        Ok(self)
    }

    /// Gives certificates of up to `lifetime` where they are asked for.
    #[must_use]
    pub fn with_max_lifetime(mut self, lifetime: Duration) -> Self {
        self.max_lifetime = lifetime;
        self
    }

    /// Signs a certificate for `id` over `key`, for `lifetime` (zero: the default), cut to the longest that is given
    /// and to this authority's own end.
    ///
    /// # Errors
    /// When the authority has expired or encoding fails.
    pub fn sign(
        &self,
        key: &CsrPublicKey,
        id: &SpiffeId,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<IssuedCertificate, AuthorityError> {
        let uri = SanType::URI(id.as_str().try_into()?);
        let leaf = self.leaf(key.key(), DistinguishedName::new(), vec![uri], lifetime, now)?;
        Ok(IssuedCertificate { leaf, intermediates: self.intermediates.clone(), roots: self.roots.clone() })
    }

    /// Makes a key and a certificate for a server known by `names`: host names and IP addresses.
    ///
    /// # Errors
    /// When a name is not one, the authority has expired, or the system has no randomness.
    pub fn sign_server(
        &self,
        names: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<ServerIdentity, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut subject = DistinguishedName::new();
        if let Some(name) = names.first() {
            subject.push(DnType::CommonName, name.as_str());
        }
        let sans = CertificateParams::new(names)?.subject_alt_names;
        let leaf = self.leaf(&key, subject, sans, lifetime, now)?;
        let chain_pem = std::iter::once(&leaf).chain(&self.intermediates).map(certificate_pem).collect();
        Ok(ServerIdentity { chain_pem, key_pem: SecretPem(key.serialize_pem()) })
    }

    /// The signing certificate, PEM.
    pub fn certificate_pem(&self) -> String {
        certificate_pem(&self.certificate)
    }

    /// All roots to trust, PEM. The first is the one that what this authority signs leads to, so that the text changes whenever
    /// another key signs.
    pub fn roots_pem(&self) -> String {
        self.roots.iter().map(certificate_pem).collect()
    }

    /// What goes between a leaf and the root, PEM; empty for a root.
    pub fn chain_pem(&self) -> String {
        self.intermediates.iter().map(certificate_pem).collect()
    }

    /// The signing key, for its owner to store.
    pub fn key_pem(&self) -> SecretPem {
        SecretPem(self.issuer.key().serialize_pem())
    }

    /// When the signing certificate ends.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    fn assemble(
        certificate: CertificateDer<'static>,
        key: KeyPair,
        intermediates: Vec<CertificateDer<'static>>,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, AuthorityError> {
        let not_after = check_authority(&certificate, &key)?;
        let issuer = rcgen::Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self { issuer, certificate, intermediates, roots, not_after, max_lifetime: DEFAULT_LIFETIME })
    }

    fn leaf(
        &self,
        key: &impl PublicKeyData,
        subject: DistinguishedName,
        names: Vec<SanType>,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let lifetime = if lifetime.is_zero() { DEFAULT_LIFETIME } else { lifetime }.min(self.max_lifetime);
        let not_after = (now + lifetime).min(self.not_after);
        if not_after <= now {
            return Err(AuthorityError::Expired);
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = subject;
        params.subject_alt_names = names;
        params.not_before = (now - BACKDATE).into();
        params.not_after = not_after.into();
        params.serial_number = Some(random_serial()?);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(key, &self.issuer)?.into())
    }

    /// Signs a throw-away certificate.
    fn trial(&self, now: SystemTime) -> Result<CertificateDer<'static>, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let uri = SanType::URI("spiffe://trial/ns/trial/sa/trial".try_into()?);
        self.leaf(&key, DistinguishedName::new(), vec![uri], DEFAULT_LIFETIME, now)
    }

    /// Verifies a throw-away certificate as a peer would that trusts these roots.
    fn prove(
        &self,
        trial: &CertificateDer<'_>,
        roots: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<(), AuthorityError> {
        let anchors = roots.iter().map(webpki::anchor_from_trusted_cert).collect::<Result<Vec<_>, _>>();
        let anchors = anchors.map_err(|_| AuthorityError::NotAnAuthority("or one of its roots is malformed"))?;
        peer::verify(trial, &self.intermediates, &anchors, unix_time(now), Use::Server)
            .map(|_| ())
            .map_err(AuthorityError::Chain)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

fn authority_params(
    organization: &str,
    name: &str,
    constraints: BasicConstraints,
    now: SystemTime,
) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, organization);
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + ROOT_LIFETIME).into();
    params.serial_number = Some(random_serial()?);
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// Checks that `certificate` may sign and belongs to `key`; says when it ends.
fn check_authority(certificate: &CertificateDer<'_>, key: &KeyPair) -> Result<SystemTime, AuthorityError> {
    let (_, parsed) =
        parse_x509_certificate(certificate).map_err(|_| AuthorityError::NotAnAuthority("is malformed"))?;
    if !parsed.is_ca() {
        return Err(AuthorityError::NotAnAuthority("is not marked as one of an authority (basicConstraints CA)"));
    }
    if parsed.public_key().raw != key.subject_public_key_info() {
        return Err(AuthorityError::NotAnAuthority("does not belong to its key"));
    }
    Ok(parsed.validity().not_after.to_datetime().into())
}

/// 127 random bits: positive, and far too many to collide (RFC 5280 section 4.1.2.2).
fn random_serial() -> Result<SerialNumber, AuthorityError> {
    let mut bytes = [0; 16];
    tls::provider().secure_random.fill(&mut bytes).map_err(|_| AuthorityError::Random)?;
    bytes[0] &= 0x7f;
    Ok(SerialNumber::from_slice(&bytes))
}

fn several(what: &'static str, text: &str) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    let certificates = certificates_from_pem(text).map_err(|error| AuthorityError::Pem { what, error })?;
    if certificates.is_empty() {
        return Err(AuthorityError::Empty { what });
    }
    Ok(certificates)
}

fn first(what: &'static str, text: &str) -> Result<CertificateDer<'static>, AuthorityError> {
    several(what, text)?.into_iter().next().ok_or(AuthorityError::Empty { what })
}

#[cfg(test)]
mod tests;
