//! The two gRPC services, counted.

use std::pin::Pin;

use mesh_proto::ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use mesh_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use mesh_proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use mesh_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_xds::server;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::metrics::{Metrics, TypeLabel};
use crate::ca::CaService;

/// Discovery, with its responses counted.
pub(super) struct MeteredDiscovery {
    inner: server::Service,
    metrics: Metrics,
}

impl MeteredDiscovery {
    pub(super) fn new(inner: server::Service, metrics: &Metrics) -> Self {
        Self { inner, metrics: metrics.clone() }
    }

    /// The gRPC service; requests of more than `limit` bytes are refused.
    pub(super) fn into_server(self, limit: usize) -> AggregatedDiscoveryServiceServer<Self> {
        AggregatedDiscoveryServiceServer::new(self).max_decoding_message_size(limit)
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for MeteredDiscovery {
    type DeltaAggregatedResourcesStream = Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let response = self.inner.delta_aggregated_resources(request).await.inspect_err(|status| {
            self.metrics.clients_refused.inc();
            tracing::warn!(code = ?status.code(), reason = status.message(), "discovery client refused");
        })?;
        let metrics = self.metrics.clone();
        Ok(response.map(|stream| -> Self::DeltaAggregatedResourcesStream {
            Box::pin(stream.map(move |response| {
                if let Ok(response) = &response {
                    let label = TypeLabel::of(&response.type_url);
                    metrics.pushes.get_or_create(&label).inc();
                    metrics.pushed_resources.get_or_create(&label).inc_by(response.resources.len() as u64);
                }
                response
            }))
        }))
    }
}

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
