//! The certificate authority's gRPC service, counted.

use mesh_proto::ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use mesh_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use tonic::{Request, Response, Status};

use super::metrics::Metrics;
use crate::ca::CaService;

/// The certificate authority, with its answers counted.
pub(super) struct MeteredAuthority {
    inner: CaService,
    metrics: Metrics,
}

impl MeteredAuthority {
    pub(super) fn new(inner: CaService, metrics: &Metrics) -> Self {
        Self { inner, metrics: metrics.clone() }
    }

    pub(super) fn into_server(self) -> IstioCertificateServiceServer<Self> {
        /// A CSR of 16 KiB and its surroundings.
        const MAX_REQUEST: usize = 64 * 1024;
        IstioCertificateServiceServer::new(self).max_decoding_message_size(MAX_REQUEST)
    }
}

#[tonic::async_trait]
impl IstioCertificateService for MeteredAuthority {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let result = self.inner.create_certificate(request).await;
        match &result {
            Ok(_) => drop(self.metrics.certificates_issued.inc()),
            Err(status) => self.metrics.certificate_refused(status.code()),
        }
        result
    }
}
