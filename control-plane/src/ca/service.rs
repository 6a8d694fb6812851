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
use super::bounded::Bounded;
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

/// What is signed, and for whom.
struct Order {
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
    pub fn into_server(self) -> Bounded<IstioCertificateServiceServer<impl IstioCertificateService>> {
        let signer = IstioCertificateServiceServer::new(Signer(self.clone()));
        Bounded::new(signer.max_decoding_message_size(MAX_REQUEST_BYTES), self)
    }

    /// Who sends a call with this metadata from the address `peer`, if it may send one now.
    pub(super) async fn admit(&self, metadata: &MetadataMap, peer: Option<IpAddr>) -> Result<Caller, Status> {
        let admitted = self.0.authenticator.authenticate(metadata, peer).await.map_err(Refused::from);
        admitted.and_then(|caller| self.0.in_turn(caller)).map_err(|refused| refused.into_logged())
    }
}

impl Refused {
    fn into_logged(self) -> Status {
        tracing::warn!(reason = %self, "certificate refused");
        self.into()
    }
}

impl Inner {
    fn in_turn(&self, caller: Caller) -> Result<Caller, Refused> {
        match self.limiter.admit(caller.to_string(), Instant::now()) {
            true => Ok(caller),
            false => Err(Refused::TooOften { caller: caller.to_string() }),
        }
    }

    /// No await in here: this takes a fraction of a millisecond of a worker, and no more of them run at a time than there are
    /// workers.
    fn order(&self, caller: &Caller, request: &IstioCertificateRequest) -> Result<Order, Refused> {
        let id = authorize(&self.policy, &*self.directory, caller, impersonated(request)?)?;
        let key = CsrPublicKey::from_pem(&request.csr)?;
        // Zero and less mean the default.
        let lifetime = Duration::from_secs(u64::try_from(request.validity_duration).unwrap_or(0));
        let authority = self.authorities.borrow().clone();
        let chain = authority.sign(&key, &id, lifetime, self.clock.now())?.to_wire();
        Ok(Order { id, chain })
    }
}

/// Answers callers that were let in. Only ever behind [`Bounded`].
struct Signer(CaService);

#[tonic::async_trait]
impl IstioCertificateService for Signer {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (_, extensions, message) = request.into_parts();
        let caller = extensions.get::<Caller>().ok_or(AuthenticationError::Missing)?;
        let Order { id, chain } = self.0.0.order(caller, &message).map_err(Refused::into_logged)?;
        tracing::info!(%id, %caller, "certificate issued");
        Ok(Response::new(IstioCertificateResponse { cert_chain: chain }))
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
