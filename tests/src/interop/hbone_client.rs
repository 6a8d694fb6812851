//! A bare HBONE client: TLS 1.3 with a client certificate, ALPN `h2`, CONNECT streams.

use std::sync::Arc;

use bytes::Bytes;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::{Duplex, Error, Identity, Negotiated, PATIENCE, header_list, spiffe_of};

/// One mTLS connection to an HBONE server. Dropping it closes it.
#[derive(Debug)]
pub struct Client {
    /// What TLS settled.
    pub negotiated: Negotiated,
    requests: h2::client::SendRequest<Bytes>,
    connection: JoinHandle<()>,
}

/// The answer to one request.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The answer's header fields.
    pub headers: Vec<(String, String)>,
    /// The stream, if the status is 200.
    pub stream: Option<Duplex>,
}

impl Answer {
    /// The stream of a 200.
    ///
    /// # Errors
    /// If the status is another.
    pub fn stream(self) -> Result<Duplex, Error> {
        self.stream.ok_or(Error::Ended("the CONNECT was refused"))
    }
}

/// Connects with `identity` over a TCP connection to port 15008, and expects the server to be `expected` (a SPIFFE ID).
///
/// # Errors
/// If the handshake fails, on either side, or the server is somebody else.
pub async fn connect(tcp: TcpStream, identity: &Identity, expected: &str) -> Result<Client, Error> {
    tcp.set_nodelay(true)?;
    let provider = identity.provider();
    let verifier = ExpectPeer {
        roots: Arc::clone(&identity.roots),
        provider: Arc::clone(&provider),
        expected: expected.to_owned(),
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    let name = ServerName::IpAddress(tcp.peer_addr()?.ip().into());
    let tls = timeout(PATIENCE, TlsConnector::from(Arc::new(config)).connect(name, tcp));
    let tls = tls.await.map_err(|_| Error::Timeout("TLS handshake"))??;
    let negotiated = Negotiated::read(tls.get_ref().1)?;
    let handshake = h2::client::Builder::new()
        .initial_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(1 << 20)
        .enable_push(false)
        .handshake(tls);
    let (requests, connection) =
        timeout(PATIENCE, handshake).await.map_err(|_| Error::Timeout("HTTP/2 handshake"))??;
    let connection = tokio::spawn(async move {
        // How it ended shows on the streams.
        let _ = connection.await;
    });
    Ok(Client { negotiated, requests, connection })
}

impl Client {
    /// CONNECT to `authority`.
    ///
    /// # Errors
    /// If there is no answer: the stream was reset, the connection ended, or [`PATIENCE`].
    pub async fn connect(&self, authority: &str, headers: &[(&str, &str)]) -> Result<Answer, Error> {
        let mut request = http::Request::builder().method(http::Method::CONNECT).uri(authority);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.request(request.body(())?).await
    }

    /// Any request, for those that must be refused. Its body stays open.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn request(&self, request: http::Request<()>) -> Result<Answer, Error> {
        let mut requests =
            timeout(PATIENCE, self.requests.clone().ready()).await.map_err(|_| Error::Timeout("stream"))??;
        let (response, send) = requests.send_request(request, false)?;
        let response = timeout(PATIENCE, response).await.map_err(|_| Error::Timeout("response"))??;
        let (parts, recv) = response.into_parts();
        let stream = (parts.status == http::StatusCode::OK).then_some(Duplex { recv, send });
        Ok(Answer { status: parts.status.as_u16(), headers: header_list(&parts.headers), stream })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Chain, time and one exact SPIFFE ID; no name.
#[derive(Debug)]
struct ExpectPeer {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    expected: String,
}

impl ServerCertVerifier for ExpectPeer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        let found = spiffe_of(Some(leaf)).map_err(|e| rustls::Error::General(e.to_string()))?;
        if found != self.expected {
            return Err(rustls::Error::General(format!("server is {found}, expected {}", self.expected)));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
