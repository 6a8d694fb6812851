//! What the tests of this crate share: authorities, forged certificates, and peers that check nothing.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_model::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, KeyPair, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName as RustlsName, Error, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
};

use crate::key::PrivateKey;
use crate::{Authority, Clock, Credential, CsrPublicKey, IssuedCertificate};

pub(crate) const HOUR: Duration = Duration::from_secs(60 * 60);

pub(crate) fn id(service_account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "ns", service_account).unwrap()
}

pub(crate) fn authority() -> Authority {
    Authority::generate("cluster.local", SystemTime::now()).unwrap()
}

/// Signs for `id` over a fresh key.
pub(crate) fn issue(authority: &Authority, id: &SpiffeId) -> (PrivateKey, IssuedCertificate) {
    let key = PrivateKey::generate().unwrap();
    let csr = CsrPublicKey::from_pem(&key.csr_pem(id).unwrap()).unwrap();
    let issued = authority.sign(&csr, id, 24 * HOUR, SystemTime::now()).unwrap();
    (key, issued)
}

pub(crate) fn credential(authority: &Authority, id: &SpiffeId) -> Credential {
    let (key, issued) = issue(authority, id);
    Credential::new(id, key, issued, &Clock::system()).unwrap()
}

pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// A certificate with whatever names, times and uses a test wants.
pub(crate) struct Forged {
    pub(crate) names: Vec<SanType>,
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
    pub(crate) uses: Vec<ExtendedKeyUsagePurpose>,
}

impl Forged {
    pub(crate) fn new(names: Vec<SanType>) -> Self {
        Self {
            names,
            not_before: SystemTime::now() - HOUR,
            not_after: SystemTime::now() + HOUR,
            uses: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        }
    }

    pub(crate) fn sign(self, authority: &Authority) -> Arc<CertifiedKey> {
        let issuer_key = KeyPair::from_pem(authority.key_pem().expose()).unwrap();
        let issuer = rcgen::Issuer::from_ca_cert_pem(&authority.certificate_pem(), issuer_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = self.names;
        params.not_before = self.not_before.into();
        params.not_after = self.not_after.into();
        params.extended_key_usages = self.uses;
        let leaf: CertificateDer<'static> = params.signed_by(&key, &issuer).unwrap().into();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Arc::new(CertifiedKey::from_der(vec![leaf], key, &provider()).unwrap())
    }
}

pub(crate) fn provider() -> CryptoProvider {
    rustls::crypto::aws_lc_rs::default_provider()
}

/// A peer that accepts everybody, with its own choice of cryptography, versions and protocols.
#[derive(Clone)]
pub(crate) struct Bare {
    pub(crate) key: Option<Arc<CertifiedKey>>,
    pub(crate) provider: CryptoProvider,
    pub(crate) versions: &'static [&'static SupportedProtocolVersion],
    pub(crate) alpn: Vec<Vec<u8>>,
}

impl Bare {
    pub(crate) fn new(key: Arc<CertifiedKey>) -> Self {
        Self { key: Some(key), provider: provider(), versions: rustls::ALL_VERSIONS, alpn: vec![b"h2".to_vec()] }
    }

    pub(crate) fn client(self) -> Arc<ClientConfig> {
        let builder = ClientConfig::builder_with_provider(Arc::new(self.provider))
            .with_protocol_versions(self.versions)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Gullible));
        let mut config = match self.key {
            Some(key) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key))),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = self.alpn;
        Arc::new(config)
    }

    pub(crate) fn server(self) -> Arc<ServerConfig> {
        let mut config = ServerConfig::builder_with_provider(Arc::new(self.provider))
            .with_protocol_versions(self.versions)
            .unwrap()
            .with_client_cert_verifier(Arc::new(Gullible))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(self.key.unwrap())));
        config.alpn_protocols = self.alpn;
        Arc::new(config)
    }
}

#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Gullible {
    fn root_hint_subjects(&self) -> &[RustlsName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
