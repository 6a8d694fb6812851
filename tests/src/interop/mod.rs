//! Peers written straight from the wire's description, with bare h2, rustls and tonic: an HBONE client and server, a delta
//! discovery client and a certificate client. They share no code with the mesh's own crates (the generated messages aside),
//! so what both sides agree on is the wire and not a common mistake.

pub mod ca_client;
pub mod hbone_client;
pub mod hbone_server;
pub mod xds_client;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustls::RootCertStore;
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::time::timeout;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Longest wait for one answer of a peer.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What can go wrong between a peer of this module and the mesh.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// TCP, or TLS (an alert arrives as this too).
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    /// A certificate, a key, or a TLS configuration.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// PEM that is none.
    #[error("PEM: {0}")]
    Pem(String),
    /// A message that does not decode.
    #[error("protobuf: {0}")]
    Decode(#[from] prost::DecodeError),
    /// HTTP/2.
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
    /// A request that HTTP cannot express.
    #[error("request: {0}")]
    Request(#[from] http::Error),
    /// gRPC.
    #[error("gRPC: {0}")]
    Grpc(#[from] tonic::Status),
    /// The gRPC channel.
    #[error("gRPC channel: {0}")]
    Channel(#[from] tonic::transport::Error),
    /// A certificate without exactly one SPIFFE URI, or not readable at all.
    #[error("no SPIFFE ID: {0}")]
    Spiffe(String),
    /// No answer in [`PATIENCE`], or in the time given.
    #[error("no answer in time: {0}")]
    Timeout(&'static str),
    /// The peer ended what was still needed.
    #[error("ended by the peer: {0}")]
    Ended(&'static str),
}

/// A certificate with its key, what is trusted, and the key exchanges offered.
#[derive(Clone)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
    roots: Arc<RootCertStore>,
    /// Key exchanges that are offered or taken. All three of the mesh's by default.
    pub key_exchanges: Vec<&'static dyn SupportedKxGroup>,
}

impl Identity {
    /// From PEM: the chain leaf first, its key, and one or more trusted roots.
    ///
    /// # Errors
    /// If a text holds no such PEM.
    pub fn from_pem(chain: &str, key: &str, roots: &str) -> Result<Self, Error> {
        let mut store = RootCertStore::empty();
        for root in certificates(roots)? {
            store.add(root)?;
        }
        Ok(Identity {
            chain: certificates(chain)?,
            key: Arc::new(PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| Error::Pem(e.to_string()))?),
            roots: Arc::new(store),
            key_exchanges: vec![
                aws_lc_rs::kx_group::X25519MLKEM768,
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::SECP256R1,
            ],
        })
    }

    /// From what the certificate authority answered: leaf, intermediates, and as last element the roots.
    ///
    /// # Errors
    /// If the answer is empty or holds no PEM.
    pub fn from_issued(issued: &ca_client::Issued) -> Result<Self, Error> {
        let (roots, chain) = issued.chain.split_last().ok_or_else(|| Error::Pem("empty chain".to_owned()))?;
        Identity::from_pem(&chain.join("\n"), &issued.key_pem, roots)
    }

    /// The SPIFFE ID of the own certificate.
    ///
    /// # Errors
    /// If it has none.
    pub fn spiffe(&self) -> Result<String, Error> {
        spiffe_of(self.chain.first())
    }

    fn provider(&self) -> Arc<CryptoProvider> {
        let suites =
            vec![aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384, aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256];
        Arc::new(CryptoProvider {
            cipher_suites: suites,
            kx_groups: self.key_exchanges.clone(),
            ..aws_lc_rs::default_provider()
        })
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("spiffe", &self.spiffe().ok()).finish_non_exhaustive()
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match found {
        Ok(found) if found.is_empty() => Err(Error::Pem("no certificate".to_owned())),
        Ok(found) => Ok(found),
        Err(error) => Err(Error::Pem(error.to_string())),
    }
}

/// The one URI of the certificate's subject alternative names.
fn spiffe_of(leaf: Option<&CertificateDer<'_>>) -> Result<String, Error> {
    let leaf = leaf.ok_or_else(|| Error::Spiffe("no certificate".to_owned()))?;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|e| Error::Spiffe(e.to_string()))?;
    let names = parsed.subject_alternative_name().map_err(|e| Error::Spiffe(e.to_string()))?;
    let uris: Vec<_> = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
        .collect();
    match uris[..] {
        [uri] if uri.starts_with("spiffe://") => Ok(uri.to_owned()),
        _ => Err(Error::Spiffe(format!("URIs {uris:?}"))),
    }
}

/// What the TLS handshake settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// `TLSv1_3`.
    pub version: String,
    /// The cipher suite's name.
    pub suite: String,
    /// The key exchange's name.
    pub key_exchange: String,
    /// `h2`.
    pub alpn: String,
    /// The peer's SPIFFE ID.
    pub peer: String,
}

impl Negotiated {
    fn read(tls: &rustls::CommonState) -> Result<Self, Error> {
        Ok(Negotiated {
            version: tls.protocol_version().map(|v| format!("{v:?}")).unwrap_or_default(),
            suite: tls.negotiated_cipher_suite().map(|s| format!("{:?}", s.suite())).unwrap_or_default(),
            key_exchange: tls.negotiated_key_exchange_group().map(|g| format!("{:?}", g.name())).unwrap_or_default(),
            alpn: tls.alpn_protocol().map(|p| String::from_utf8_lossy(p).into_owned()).unwrap_or_default(),
            peer: spiffe_of(tls.peer_certificates().and_then(<[_]>::first))?,
        })
    }
}

/// One CONNECT stream after its 200.
#[derive(Debug)]
pub struct Duplex {
    recv: h2::RecvStream,
    send: h2::SendStream<Bytes>,
}

impl Duplex {
    /// The next bytes; `None` after the peer's END_STREAM.
    ///
    /// # Errors
    /// If the stream was reset, or nothing comes in [`PATIENCE`].
    pub async fn read(&mut self) -> Result<Option<Bytes>, Error> {
        let next = timeout(PATIENCE, self.recv.data()).await.map_err(|_| Error::Timeout("data"))?;
        let Some(data) = next.transpose()? else { return Ok(None) };
        self.recv.flow_control().release_capacity(data.len())?;
        Ok(Some(data))
    }

    /// Bytes until there are `n`, or until the end.
    ///
    /// # Errors
    /// As [`Duplex::read`].
    pub async fn read_up_to(&mut self, n: usize) -> Result<Vec<u8>, Error> {
        let mut all = Vec::new();
        while all.len() < n {
            let Some(data) = self.read().await? else { break };
            all.extend_from_slice(&data);
        }
        Ok(all)
    }

    /// Everything to the end.
    ///
    /// # Errors
    /// As [`Duplex::read`].
    pub async fn read_to_end(&mut self) -> Result<Vec<u8>, Error> {
        self.read_up_to(usize::MAX).await
    }

    /// Sends all bytes, as fast as the peer's window allows.
    ///
    /// # Errors
    /// If the stream was reset, or the window stays shut for [`PATIENCE`].
    pub async fn write(&mut self, data: impl Into<Bytes>) -> Result<(), Error> {
        let mut data = data.into();
        while !data.is_empty() {
            self.send.reserve_capacity(data.len());
            let room = std::future::poll_fn(|cx| self.send.poll_capacity(cx));
            let room = timeout(PATIENCE, room).await.map_err(|_| Error::Timeout("window"))?;
            let room = room.ok_or(Error::Ended("stream is closed for writing"))??;
            self.send.send_data(data.split_to(room.min(data.len())), false)?;
        }
        Ok(())
    }

    /// END_STREAM; reading goes on.
    ///
    /// # Errors
    /// If the stream was reset.
    pub fn finish(&mut self) -> Result<(), Error> {
        Ok(self.send.send_data(Bytes::new(), true)?)
    }

    /// RST_STREAM with this HTTP/2 error code.
    pub fn reset(&mut self, code: u32) {
        self.send.send_reset(code.into());
    }

    /// Waits for the peer's RST_STREAM; its error code.
    ///
    /// # Errors
    /// If the connection ended, or nothing comes in [`PATIENCE`].
    pub async fn wait_reset(&mut self) -> Result<u32, Error> {
        let reset = std::future::poll_fn(|cx| self.send.poll_reset(cx));
        let reason = timeout(PATIENCE, reset).await.map_err(|_| Error::Timeout("RST_STREAM"))??;
        Ok(reason.into())
    }
}

fn header_list(headers: &http::HeaderMap) -> Vec<(String, String)> {
    headers
        .iter()
        .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect()
}

#[cfg(test)]
mod tests;
