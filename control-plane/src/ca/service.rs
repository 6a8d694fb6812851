//! `istio.v1.auth.IstioCertificateService`.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_identity::authority::{AuthorityError, InvalidCsr};
use mesh_identity::ca_client::IMPERSONATED_IDENTITY;
use mesh_identity::{Clock, CsrPublicKey};
use mesh_model::SpiffeId;
use mesh_proto::ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use mesh_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use prost_types::value::Kind;
use thiserror::Error;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::Authorities;
use super::authenticate::{AuthenticationError, Authenticator};
use super::authorize::{Denial, Policy, authorize};
use super::directory::Directory;
use super::limit::Limiter;
use super::token::Caller;

/// Largest request that is read, in bytes: a CSR of 16 KiB and its surroundings.
const MAX_REQUEST_BYTES: usize = 64 * 1024;
/// One caller's requests: as many at once as a node has pods and more, then 50 per second.
const BURST: u32 = 500;
const INTERVAL: Duration = Duration::from_millis(20);

/// Why a request was answered without a certificate.
#[derive(Debug, Error)]
enum Refused {
    #[error(transparent)]
    Authentication(#[from] AuthenticationError),
    #[error(transparent)]
    Denied(#[from] Denial),
    #[error("{IMPERSONATED_IDENTITY} is not a string")]
    Metadata,
    #[error(transparent)]
    Csr(#[from] InvalidCsr),
    #[error("{caller} asks too often, retry later")]
    TooOften { caller: String },
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let message = refused.to_string();
        match refused {
            Refused::Authentication(error) => error.into(),
            Refused::Denied(denial) => Self::from(&denial),
            Refused::Metadata | Refused::Csr(_) => Self::invalid_argument(message),
            Refused::TooOften { .. } => Self::resource_exhausted(message),
            // What exactly is wrong with the authority's key is for its own log.
            Refused::Authority(_) => Self::internal("the certificate authority cannot sign"),
        }
    }
}

/// Signs for callers that prove who they are.
#[derive(Debug, Clone)]
pub struct CaService(Arc<Inner>);

struct Inner {
    authorities: Authorities,
    authenticator: Authenticator,
    directory: Arc<dyn Directory>,
    policy: Policy,
    clock: Clock,
    limiter: Limiter<String>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CaService").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// What is signed, for whom, and who asked.
struct Order {
    caller: Caller,
    id: SpiffeId,
    chain: Vec<String>,
}

impl CaService {
    /// Signs with the newest of `authorities` what `policy` and `directory` allow.
    pub fn new(
        authorities: Authorities,
        authenticator: Authenticator,
        directory: Arc<dyn Directory>,
        policy: Policy,
        clock: Clock,
    ) -> Self {
        let limiter = Limiter::new(INTERVAL, BURST);
        Self(Arc::new(Inner { authorities, authenticator, directory, policy, clock, limiter }))
    }

    /// The gRPC service, with its bounds.
    pub fn into_server(self) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(self).max_decoding_message_size(MAX_REQUEST_BYTES)
    }
}

impl Inner {
    async fn order(
        &self,
        metadata: &MetadataMap,
        peer: Option<IpAddr>,
        request: &IstioCertificateRequest,
    ) -> Result<Order, Refused> {
        let caller = self.authenticator.authenticate(metadata, peer).await?;
        // No await below: this takes a fraction of a millisecond of a worker, and no more of them run at a time than
        // there are workers.
        if !self.limiter.admit(caller.to_string(), Instant::now()) {
            return Err(Refused::TooOften { caller: caller.to_string() });
        }
        let id = authorize(&self.policy, &*self.directory, &caller, impersonated(request)?)?;
        let key = CsrPublicKey::from_pem(&request.csr)?;
        // Zero and less mean the default.
        let lifetime = Duration::from_secs(u64::try_from(request.validity_duration).unwrap_or(0));
        let authority = self.authorities.borrow().clone();
        let chain = authority.sign(&key, &id, lifetime, self.clock.now())?.to_wire();
        Ok(Order { caller, id, chain })
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CaService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = request.remote_addr().map(|peer| peer.ip());
        let (metadata, _, message) = request.into_parts();
        match self.0.order(&metadata, peer, &message).await {
            Ok(Order { caller, id, chain }) => {
                tracing::info!(%id, %caller, "certificate issued");
                Ok(Response::new(IstioCertificateResponse { cert_chain: chain }))
            }
            Err(refused) => {
                tracing::warn!(reason = %refused, "certificate refused");
                Err(refused.into())
            }
        }
    }
}

/// The identity that a request names, if it names one.
fn impersonated(request: &IstioCertificateRequest) -> Result<Option<&str>, Refused> {
    let field = request.metadata.as_ref().and_then(|metadata| metadata.fields.get(IMPERSONATED_IDENTITY));
    match field.map(|value| &value.kind) {
        None => Ok(None),
        Some(Some(Kind::StringValue(id))) => Ok(Some(id)),
        Some(_) => Err(Refused::Metadata),
    }
}

#[cfg(test)]
mod tests;
