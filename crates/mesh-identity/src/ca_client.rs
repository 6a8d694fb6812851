//! Client of `istio.v1.auth.IstioCertificateService`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use mesh_model::SpiffeId;
use mesh_proto::ca::IstioCertificateRequest;
use mesh_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::connector::Connector;
use crate::issuer::{IssueError, IssuedCertificate, Issuer};
use crate::token::TokenSource;

/// The field of a request's metadata that names the identity wanted.
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
/// The metadata key that names the cluster of the caller.
pub const CLUSTER_ID: &str = "clusterid";

/// Largest answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// Longest piece of a server's text that is kept in an error, in characters.
const MAX_REASON_CHARS: usize = 512;

/// What the client says about itself, and how long it waits.
#[derive(Debug, Clone)]
pub struct CaOptions {
    /// Sent as `clusterid`.
    pub cluster_id: String,
    /// Lifetime asked for; the authority decides.
    pub lifetime: Duration,
    /// Longest that one attempt may take, connecting included.
    pub deadline: Duration,
    /// Whether to name the identity wanted. A node proxy does; everybody else gets its own identity.
    pub impersonate: bool,
}

impl Default for CaOptions {
    fn default() -> Self {
        Self {
            cluster_id: "Kubernetes".to_owned(),
            lifetime: Duration::from_secs(24 * 60 * 60),
            deadline: Duration::from_secs(10),
            impersonate: true,
        }
    }
}

/// Asks a certificate authority over gRPC.
pub struct CaClient {
    route: Route,
    tokens: Arc<dyn TokenSource>,
    options: CaOptions,
}

enum Route {
    Channel(Channel),
    Connector(Arc<Connector>),
}

impl CaClient {
    /// Over a channel that exists already.
    pub fn new(channel: Channel, tokens: Arc<dyn TokenSource>, options: CaOptions) -> Self {
        Self { route: Route::Channel(channel), tokens, options }
    }

    /// Over the channel that `connector` gives at each call.
    pub fn with_connector(connector: Arc<Connector>, tokens: Arc<dyn TokenSource>, options: CaOptions) -> Self {
        Self { route: Route::Connector(connector), tokens, options }
    }

    async fn attempt(&self, id: &SpiffeId, csr_pem: String) -> Result<IssuedCertificate, IssueError> {
        let request = self.request(id, csr_pem).await?;
        let channel = match &self.route {
            Route::Channel(channel) => channel.clone(),
            Route::Connector(connector) => connector.channel().await.map_err(unavailable)?,
        };
        let mut client = IstioCertificateServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
        let answer = client.create_certificate(request).await.map_err(|status| error_of(&status))?;
        Ok(IssuedCertificate::from_wire(&answer.into_inner().cert_chain)?)
    }

    async fn request(&self, id: &SpiffeId, csr: String) -> Result<Request<IstioCertificateRequest>, IssueError> {
        let token = self.tokens.token().await?;
        let metadata = self.options.impersonate.then(|| Struct {
            fields: BTreeMap::from([(
                IMPERSONATED_IDENTITY.to_owned(),
                Value { kind: Some(Kind::StringValue(id.to_string())) },
            )]),
        });
        let validity_duration = i64::try_from(self.options.lifetime.as_secs()).unwrap_or(i64::MAX);
        let mut request = Request::new(IstioCertificateRequest { csr, validity_duration, metadata });
        let mut authorization: MetadataValue<Ascii> = token.header().parse().map_err(unavailable)?;
        authorization.set_sensitive(true);
        request.metadata_mut().insert("authorization", authorization);
        request.metadata_mut().insert(CLUSTER_ID, self.options.cluster_id.parse().map_err(unavailable)?);
        request.set_timeout(self.options.deadline);
        Ok(request)
    }
}

impl Issuer for CaClient {
    fn issue<'a>(&'a self, id: &'a SpiffeId, csr_pem: String) -> BoxFuture<'a, Result<IssuedCertificate, IssueError>> {
        Box::pin(async move {
            match tokio::time::timeout(self.options.deadline, self.attempt(id, csr_pem)).await {
                Ok(result) => result,
                Err(_) => {
                    Err(IssueError::Unavailable { reason: format!("no answer within {:?}", self.options.deadline) })
                }
            }
        })
    }
}

fn unavailable(error: impl std::error::Error) -> IssueError {
    IssueError::Unavailable { reason: chain_of(&error) }
}

/// Sorts a status into "try again" and "no".
fn error_of(status: &Status) -> IssueError {
    let message: String = status.message().chars().take(MAX_REASON_CHARS).collect();
    let mut reason = format!("{}: {message}", status.code().description());
    if let Some(source) = std::error::Error::source(status) {
        reason = format!("{reason}: {}", chain_of(source));
    }
    match status.code() {
        Code::Unavailable
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Cancelled
        | Code::Internal
        | Code::Unknown
        | Code::DataLoss => IssueError::Unavailable { reason },
        Code::PermissionDenied
        | Code::Unauthenticated
        | Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::NotFound
        | Code::AlreadyExists
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Ok => IssueError::Refused { reason },
    }
}

/// The error with what caused it: gRPC transports say "transport error" and keep the rest to themselves.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text.chars().take(MAX_REASON_CHARS).collect()
}

#[cfg(test)]
mod tests;
