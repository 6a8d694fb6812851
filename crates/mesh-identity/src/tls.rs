//! The TLS that tunnels speak: version, suites, groups, and the verifiers of both sides.
//!
//! TLS 1.3 alone, ALPN `h2`, certificates on both sides, no resumption, no tickets, no early data, no SNI.
//!
//! Order of preference. Suites: AES-256-GCM, then AES-128-GCM; with AES in hardware the difference is small beside what
//! the kernel costs. Groups: a server takes the client's first choice that it knows, so the client's order decides. The
//! client prefers X25519, for which it sends a share: one round trip at the least cost. It offers the hybrid
//! X25519MLKEM768 second: a peer whose policy accepts nothing else asks for it (HelloRetryRequest) and gets it, at the
//! price of one more round trip. As a server all three are accepted, the hybrid included. P-256 is for peers that have
//! no X25519.

use std::sync::{Arc, LazyLock};

use mesh_model::SpiffeId;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, ServerConfig, SignatureScheme,
};

use crate::clock::Clock;
use crate::peer::{self, Refusal, Use};

/// The one application protocol of a tunnel.
pub const ALPN: &[u8] = b"h2";

/// The cryptography that handshakes use: two suites, three groups, aws-lc.
pub fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ],
            kx_groups: vec![
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::X25519MLKEM768,
                aws_lc_rs::kx_group::SECP256R1,
            ],
            ..aws_lc_rs::default_provider()
        })
    });
    &PROVIDER
}

/// The roots to which a peer's chain must lead.
pub(crate) type Anchors = Arc<[TrustAnchor<'static>]>;

/// Serves `key` to any client of `trust_domain`.
pub(crate) fn server_config(
    key: Arc<CertifiedKey>,
    anchors: Anchors,
    trust_domain: &str,
    clock: &Clock,
) -> Result<ServerConfig, Error> {
    let verifier = ClientVerifier { anchors, trust_domain: trust_domain.to_owned() };
    let mut config = ServerConfig::builder_with_details(provider().clone(), Arc::new(clock.clone()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(OnlyH2(key)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(config)
}

/// Shows `key` to a server, which must be one of `expected`.
pub(crate) fn client_config(
    key: Arc<CertifiedKey>,
    anchors: Anchors,
    expected: &[SpiffeId],
    clock: &Clock,
) -> Result<ClientConfig, Error> {
    let mut config = ClientConfig::builder_with_details(provider().clone(), Arc::new(clock.clone()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(server_verifier(anchors, expected))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.enable_early_data = false;
    Ok(config)
}

/// Accepts a server that is one of `expected`; with an empty list, none.
pub(crate) fn server_verifier(anchors: Anchors, expected: &[SpiffeId]) -> Arc<dyn ServerCertVerifier> {
    Arc::new(ServerVerifier { anchors, expected: expected.to_vec() })
}

/// Gives the certificate to clients that offer `h2`; rustls alone would also serve those that offer no protocol at all.
#[derive(Debug)]
struct OnlyH2(Arc<CertifiedKey>);

impl ResolvesServerCert for OnlyH2 {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        hello.alpn()?.any(|protocol| protocol == ALPN).then(|| self.0.clone())
    }
}

#[derive(Debug)]
struct ClientVerifier {
    anchors: Anchors,
    trust_domain: String,
}

impl ClientVerifier {
    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Refusal> {
        let peer = peer::verify(leaf, intermediates, &self.anchors, now, Use::Client)?;
        if peer.trust_domain() == self.trust_domain {
            return Ok(());
        }
        Err(Refusal::TrustDomain { peer, ours: self.trust_domain.clone() })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity, intermediates, now).map_err(Refusal::into_rustls)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct ServerVerifier {
    anchors: Anchors,
    expected: Vec<SpiffeId>,
}

impl ServerVerifier {
    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Refusal> {
        let peer = peer::verify(leaf, intermediates, &self.anchors, now, Use::Server)?;
        if self.expected.contains(&peer) {
            return Ok(());
        }
        Err(Refusal::UnexpectedIdentity { peer, expected: self.expected.clone() })
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity, intermediates, now).map_err(Refusal::into_rustls)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
