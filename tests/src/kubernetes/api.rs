//! A client of the API server for what the harness itself asks: one request per connection, JSON in and out.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;

use super::pki::{Credential, Pki};
use crate::error::Context;
use crate::http::{self, Answer, BOUND};
use crate::netns::NetNs;
use crate::{Error, wait};

/// An API server and whom to be there. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Api {
    server: SocketAddr,
    network: Option<Arc<NetNs>>,
    tls: Arc<ClientConfig>,
    roots: Arc<RootCertStore>,
    /// Who is there, if not the certificate.
    token: Option<Arc<str>>,
}

impl Api {
    /// A client with that certificate. `network`: where to connect from; the harness's own namespace if none.
    ///
    /// # Errors
    /// The certificate or its key cannot be used.
    pub fn new(
        server: SocketAddr,
        network: Option<Arc<NetNs>>,
        pki: &Pki,
        credential: &Credential,
    ) -> Result<Self, Error> {
        let failed = |source: io::Error| Error::io("a client of the API server", source);
        let certificate = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).map_err(io::Error::other);
        let mut roots = RootCertStore::empty();
        roots.add(certificate(pki.root()).map_err(failed)?).map_err(|e| failed(io::Error::other(e)))?;
        let chain = vec![certificate(&credential.certificate).map_err(failed)?];
        let key = PrivateKeyDer::from_pem_slice(credential.key.as_bytes());
        let key = key.map_err(|e| failed(io::Error::other(e)))?;
        let roots = Arc::new(roots);
        let tls = builder()?.with_root_certificates(Arc::clone(&roots)).with_client_auth_cert(chain, key);
        let tls = tls.map_err(|e| failed(io::Error::other(e)))?;
        Ok(Self { server, network, tls: Arc::new(tls), roots, token: None })
    }

    /// The same API server for whoever has this token.
    ///
    /// # Errors
    /// As [`Api::new`].
    pub fn with_token(&self, token: &str) -> Result<Self, Error> {
        let tls = builder()?.with_root_certificates(Arc::clone(&self.roots)).with_no_client_auth();
        Ok(Self { tls: Arc::new(tls), token: Some(token.into()), ..self.clone() })
    }

    /// One request; any status.
    ///
    /// # Errors
    /// No connection, or no answer within 10 s.
    pub fn request(&self, method: &str, path: &str, body: Option<(&str, &Value)>) -> Result<Answer, Error> {
        let stream = match &self.network {
            Some(network) => network.connect(self.server, BOUND)?,
            None => TcpStream::connect_timeout(&self.server, BOUND)
                .during(|| format!("connecting to the API server at {}", self.server))?,
        };
        let what = || format!("{method} {path} of the API server");
        stream.set_read_timeout(Some(BOUND)).during(what)?;
        stream.set_write_timeout(Some(BOUND)).during(what)?;
        let name = ServerName::from(self.server.ip());
        let session = ClientConnection::new(Arc::clone(&self.tls), name).map_err(io::Error::other).during(what)?;
        let text = body.map(|(kind, value)| (kind, value.to_string()));
        let body = text.as_ref().map(|(kind, text)| (*kind, text.as_bytes()));
        let bearer = self.token.as_ref().map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
        http::talk(StreamOwned::new(session, stream), method, &self.server.to_string(), path, &bearer, body)
    }

    /// True when the API server says that it serves.
    pub fn ready(&self) -> bool {
        self.request("GET", "/readyz", None).is_ok_and(|answer| answer.status == 200)
    }

    /// An object or a list; None if there is none.
    ///
    /// # Errors
    /// As [`Api::request`], or a status other than 200 and 404.
    pub fn get(&self, path: &str) -> Result<Option<Value>, Error> {
        let answer = self.request("GET", path, None)?;
        if answer.status == 404 { Ok(None) } else { read("GET", path, &answer).map(Some) }
    }

    /// The items of a list.
    ///
    /// # Errors
    /// As [`Api::get`]; there is no such list.
    pub fn list(&self, path: &str) -> Result<Vec<Value>, Error> {
        let mut found = self.get(path)?.ok_or_else(|| Error::Absent(format!("the API server has no {path}")))?;
        Ok(found["items"].as_array_mut().map(std::mem::take).unwrap_or_default())
    }

    /// Makes an object below `path`, the collection. One that is there already is left as it is.
    ///
    /// # Errors
    /// As [`Api::request`], or it is refused.
    pub fn create(&self, path: &str, object: &Value) -> Result<(), Error> {
        let answer = self.request("POST", path, Some(("application/json", object)))?;
        if answer.status == 409 { Ok(()) } else { read("POST", path, &answer).map(drop) }
    }

    /// Applies an object at `path` (server-side apply, field manager `culvert-tests`).
    ///
    /// # Errors
    /// As [`Api::request`], or it is refused.
    pub fn apply(&self, path: &str, object: &Value) -> Result<Value, Error> {
        let path = format!("{path}?fieldManager=culvert-tests&force=true");
        let answer = self.request("PATCH", &path, Some(("application/apply-patch+yaml", object)))?;
        read("PATCH", &path, &answer)
    }

    /// Waits until `condition` gives a value of the object at `path`. While it gives none its answer is asked for again.
    ///
    /// # Errors
    /// [`Error::Timeout`] after `bound`, with the object as it last was.
    pub fn until<T>(
        &self,
        what: &str,
        path: &str,
        bound: std::time::Duration,
        condition: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, Error> {
        let mut last = String::new();
        let done = wait::until(what, bound, || match self.get(path) {
            Ok(Some(object)) => {
                last = object["status"].to_string();
                condition(&object)
            }
            Ok(None) => {
                "not there".clone_into(&mut last);
                None
            }
            Err(error) => {
                last = error.to_string();
                None
            }
        });
        done.map_err(|error| match error {
            Error::Timeout { what, waited, .. } => Error::Timeout { what, waited, log: format!("; {path}: {last}") },
            other => other,
        })
    }
}

fn builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    builder.map_err(|error| Error::io("a client of the API server", io::Error::other(error)))
}

fn read(method: &str, path: &str, answer: &Answer) -> Result<Value, Error> {
    let failed = |reason: String| Error::Output {
        what: format!("{method} {path} of the API server"),
        reason,
        output: answer.body.chars().take(600).collect(),
    };
    if !(200..300).contains(&answer.status) {
        return Err(failed(format!("status {}", answer.status)));
    }
    serde_json::from_str(&answer.body).map_err(|error| failed(error.to_string()))
}
