//! A peer that says anything: TLS with whatever certificate, then bytes that are HTTP/2 frames or not.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tests::netns::NetNs;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::forge::Forged;

/// Longest wait for the mesh to do something.
pub const BOUND: Duration = Duration::from_secs(20);

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// `:method: CONNECT`, a literal that is not indexed.
pub const METHOD_CONNECT: &[u8] = b"\x02\x07CONNECT";

/// Runs `work` on a runtime whose sockets lie in `network`.
pub fn inside<T: Send>(network: &NetNs, work: impl AsyncFnOnce() -> T + Send) -> T {
    let run = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work());
    network.run(run).unwrap()
}

/// One frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// `:authority`, a literal that is not indexed.
pub fn authority(value: &str) -> Vec<u8> {
    [&[1, u8::try_from(value.len()).unwrap()], value.as_bytes()].concat()
}

/// Any field, a literal that is not indexed; both texts shorter than 127 bytes.
pub fn field(name: &str, value: &str) -> Vec<u8> {
    let length = |text: &str| [u8::try_from(text.len()).unwrap()];
    [&[0], &length(name)[..], name.as_bytes(), &length(value)[..], value.as_bytes()].concat()
}

/// A CONNECT on a stream, left open.
pub fn connect(stream: u32, to: SocketAddr) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &[METHOD_CONNECT, &authority(&to.to_string())].concat())
}

/// How a stream was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// With this status.
    Status(u16),
    /// RST_STREAM.
    Reset,
    /// GOAWAY, or the end of the connection.
    Closed,
}

/// A tunnel, after TLS.
pub struct Peer(pub TlsStream<TcpStream>);

impl Peer {
    /// TLS alone.
    ///
    /// # Errors
    /// The server refuses.
    pub async fn tls(to: SocketAddr, certificate: Option<&Forged>) -> io::Result<Self> {
        let tcp = timeout(BOUND, TcpStream::connect(to)).await.expect("TCP connects in time")?;
        tcp.set_nodelay(true)?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Gullible(provider)));
        let mut config = match certificate {
            Some(Forged { chain, key }) => {
                let key = aws_lc_rs::default_provider().key_provider.load_private_key(key.clone_key()).unwrap();
                // Whatever it is: nothing looks at it on this side.
                let resolver = SingleCertAndKey::from(CertifiedKey::new(chain.clone(), key));
                builder.with_client_cert_resolver(Arc::new(resolver))
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.enable_sni = false;
        let name = ServerName::IpAddress(to.ip().into());
        let tls = timeout(BOUND, TlsConnector::from(Arc::new(config)).connect(name, tcp)).await;
        Ok(Self(tls.expect("TLS answers in time")?))
    }

    /// TLS, the preface and empty SETTINGS.
    ///
    /// # Errors
    /// As [`Peer::tls`].
    pub async fn http2(to: SocketAddr, certificate: &Forged) -> io::Result<Self> {
        let mut peer = Self::tls(to, Some(certificate)).await?;
        let _ = peer.send(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await;
        Ok(peer)
    }

    /// Sends; false if the connection is over.
    pub async fn send(&mut self, bytes: &[u8]) -> bool {
        self.0.write_all(bytes).await.is_ok() && self.0.flush().await.is_ok()
    }

    /// The next frame; None at the end.
    pub async fn frame(&mut self) -> Option<(u8, u32, Vec<u8>)> {
        let mut header = [0; 9];
        self.0.read_exact(&mut header).await.ok()?;
        let [a, b, c, kind, _, id @ ..] = header;
        let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap()];
        self.0.read_exact(&mut payload).await.ok()?;
        Some((kind, u32::from_be_bytes(id) & 0x7fff_ffff, payload))
    }

    /// How `stream` is answered.
    pub async fn answer(&mut self, stream: u32) -> Answer {
        let answered = async {
            loop {
                match self.frame().await {
                    Some((HEADERS, id, block)) if id == stream => return Answer::Status(status(&block)),
                    Some((RST_STREAM, id, _)) if id == stream => return Answer::Reset,
                    Some((GOAWAY, ..)) | None => return Answer::Closed,
                    Some(_) => {}
                }
            }
        };
        timeout(BOUND, answered).await.expect("a stream is answered in time")
    }

    /// Reads until the connection is closed; false if it is not in `bound`.
    pub async fn closed(&mut self, bound: Duration) -> bool {
        let mut bytes = vec![0; 64 << 10];
        timeout(bound, async { while self.0.read(&mut bytes).await.is_ok_and(|n| n > 0) {} }).await.is_ok()
    }
}

/// The status at the beginning of a header block: indexed, or three digits, plain or with Huffman's code.
fn status(block: &[u8]) -> u16 {
    match *block {
        [0x88, ..] => 200,
        [0x8c, ..] => 400,
        [0x8d, ..] => 404,
        [0x8e, ..] => 500,
        [0x08 | 0x18 | 0x48, 3, a, b, c, ..] => std::str::from_utf8(&[a, b, c]).unwrap().parse().unwrap(),
        // Huffman: digits 0 to 2 have five bits (0, 1, 2), the others six (0x19 for 3 and so on).
        [0x08 | 0x18 | 0x48, length, ref code @ ..] if length & 0x80 != 0 => {
            let mut bits = code.iter().flat_map(|byte| (0..8).rev().map(move |at| u16::from(byte >> at & 1)));
            let mut digit = || {
                let five = (0..5).fold(0, |code, _| code << 1 | bits.next().unwrap());
                if five < 3 { five } else { (five << 1 | bits.next().unwrap()) - 0x19 + 3 }
            };
            (0..3).fold(0, |status, _| status * 10 + digit())
        }
        _ => panic!("not a status: {block:x?}"),
    }
}

#[derive(Debug)]
struct Gullible(Arc<CryptoProvider>);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
