//! A bare HBONE server: mTLS, CONNECT, and a record of what came.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::{Duplex, Error, Identity, Negotiated, PATIENCE, header_list};

/// One request that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The method; `CONNECT` from a correct peer.
    pub method: String,
    /// `:authority`.
    pub authority: String,
    /// Whether `:scheme` or `:path` was there; not from a correct peer.
    pub scheme_or_path: bool,
    /// Header fields.
    pub headers: Vec<(String, String)>,
    /// What TLS settled with the client, its SPIFFE ID included.
    pub negotiated: Negotiated,
    /// The client's end of the TCP connection.
    pub client: SocketAddr,
}

impl Record {
    /// The first header field of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// What runs on an accepted stream.
pub type Handler = Arc<dyn Fn(Record, Duplex) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// What the server does with a request.
#[derive(Clone)]
pub enum Behaviour {
    /// 200, and every byte goes back; the end too.
    Echo,
    /// 200, and this runs.
    Run(Handler),
    /// This status, and nothing else.
    Status(u16),
    /// RST_STREAM with this HTTP/2 error code instead of an answer.
    Reset(u32),
    /// No answer at all.
    Silence,
}

/// A running server. Dropping it closes the listener; open connections end with the runtime.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    records: Mutex<Vec<Record>>,
    /// Handshakes that failed, with the reason.
    failed: Mutex<Vec<String>>,
}

/// Serves HBONE on `listener` as `identity`. Takes every client whose certificate is signed by a trusted root.
///
/// # Errors
/// If the identity cannot be used for TLS.
pub fn serve(listener: TcpListener, identity: &Identity, behaviour: Behaviour) -> Result<Server, Error> {
    let provider = identity.provider();
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&identity.roots), Arc::clone(&provider))
        .build()
        .map_err(|e| Error::Pem(e.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let shared = Arc::new(Shared::default());
    let address = listener.local_addr()?;
    let accepting = tokio::spawn({
        let shared = Arc::clone(&shared);
        async move {
            while let Ok((tcp, client)) = listener.accept().await {
                let (acceptor, shared, behaviour) = (acceptor.clone(), Arc::clone(&shared), behaviour.clone());
                tokio::spawn(async move {
                    if let Err(error) = connection(tcp, client, acceptor, &shared, behaviour).await {
                        lock(&shared.failed).push(error.to_string());
                    }
                });
            }
        }
    });
    Ok(Server { address, shared, accepting })
}

impl Server {
    /// The requests so far.
    pub fn records(&self) -> Vec<Record> {
        lock(&self.shared.records).clone()
    }

    /// Connections that failed so far, with the reason (a refused handshake is here).
    pub fn failures(&self) -> Vec<String> {
        lock(&self.shared.failed).clone()
    }

    /// Waits until there are `n` requests.
    ///
    /// # Errors
    /// If there are fewer after [`PATIENCE`].
    pub async fn wait_records(&self, n: usize) -> Result<Vec<Record>, Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let records = self.records();
            if records.len() >= n {
                return Ok(records);
            }
            if Instant::now() > deadline {
                return Err(Error::Timeout("requests at the HBONE server"));
            }
            sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn connection(
    tcp: TcpStream,
    client: SocketAddr,
    acceptor: TlsAcceptor,
    shared: &Shared,
    behaviour: Behaviour,
) -> Result<(), Error> {
    tcp.set_nodelay(true)?;
    let tls = timeout(PATIENCE, acceptor.accept(tcp)).await.map_err(|_| Error::Timeout("TLS handshake"))??;
    let negotiated = Negotiated::read(tls.get_ref().1)?;
    let mut connection = h2::server::Builder::new()
        .initial_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(1 << 20)
        .max_concurrent_streams(200)
        .handshake(tls)
        .await?;
    while let Some(next) = connection.accept().await {
        let (request, respond) = next?;
        let record = Record {
            method: request.method().to_string(),
            authority: request.uri().authority().map(ToString::to_string).unwrap_or_default(),
            scheme_or_path: request.uri().scheme().is_some() || request.uri().path_and_query().is_some(),
            headers: header_list(request.headers()),
            negotiated: negotiated.clone(),
            client,
        };
        lock(&shared.records).push(record.clone());
        tokio::spawn(answer(record, request.into_body(), respond, behaviour.clone()));
    }
    Ok(())
}

async fn answer(
    record: Record,
    recv: h2::RecvStream,
    mut respond: h2::server::SendResponse<Bytes>,
    behaviour: Behaviour,
) {
    let mut accept = |status: u16, end: bool| {
        let response = http::Response::builder().status(status).body(()).ok()?;
        respond.send_response(response, end).ok()
    };
    match behaviour {
        Behaviour::Echo => {
            if let Some(send) = accept(200, false) {
                // How it ended shows at the client.
                let _ = echo(Duplex { recv, send }).await;
            }
        }
        Behaviour::Run(run) => {
            if let Some(send) = accept(200, false) {
                run(record, Duplex { recv, send }).await;
            }
        }
        Behaviour::Status(status) => {
            let _ = accept(status, true);
        }
        Behaviour::Reset(code) => respond.send_reset(code.into()),
        Behaviour::Silence => {
            let _ = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
        }
    }
}

async fn echo(mut stream: Duplex) -> Result<(), Error> {
    while let Some(data) = stream.read().await? {
        stream.write(data).await?;
    }
    stream.finish()
}
