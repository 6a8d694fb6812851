//! A bare certificate client: key, CSR, one call.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use mesh_proto::ca::IstioCertificateRequest;
use mesh_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};

use super::PATIENCE;

/// Lifetime asked for.
const LIFETIME_SECONDS: i64 = 24 * 3600;

/// What the certificate authority issued.
#[derive(Debug, Clone)]
pub struct Issued {
    /// PEM: leaf, intermediates, and as last element a bundle of trusted roots.
    pub chain: Vec<String>,
    /// The key's PEM.
    pub key_pem: String,
}

/// Asks the authority at `address` (its certificate is for `localhost`) for a certificate of `identity`, with the bearer
/// token of a service account; `impersonate` is the identity named in the metadata, if any.
///
/// # Errors
/// The authority's status; `unavailable` if it cannot be reached, `internal` if the request cannot be made.
pub async fn request(
    address: SocketAddr,
    root_pem: &str,
    token: &str,
    identity: &str,
    impersonate: Option<&str>,
) -> Result<Issued, Status> {
    let internal = |e: &dyn std::fmt::Display| Status::internal(e.to_string());
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| internal(&e))?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.try_into().map_err(|e| internal(&e))?)];
    let csr = params.serialize_request(&key).and_then(|csr| csr.pem()).map_err(|e| internal(&e))?;
    let chain = sign(address, root_pem, token, csr, impersonate).await?;
    Ok(Issued { chain, key_pem: key.serialize_pem() })
}

/// Sends any text as CSR; the chain that comes back.
///
/// # Errors
/// As [`request`].
pub async fn sign(
    address: SocketAddr,
    root_pem: &str,
    token: &str,
    csr: String,
    impersonate: Option<&str>,
) -> Result<Vec<String>, Status> {
    let channel = channel(address, root_pem).await.map_err(|e| Status::unavailable(e.to_string()))?;
    let metadata = impersonate.map(|identity| {
        let value = Value { kind: Some(Kind::StringValue(identity.to_owned())) };
        Struct { fields: BTreeMap::from([("ImpersonatedIdentity".to_owned(), value)]) }
    });
    let request = IstioCertificateRequest { csr, validity_duration: LIFETIME_SECONDS, metadata };
    let request = authenticated(request, token)?;
    let answer = IstioCertificateServiceClient::new(channel).create_certificate(request).await?;
    Ok(answer.into_inner().cert_chain)
}

/// A channel to the control plane, whose certificate must be for `localhost`.
pub(super) async fn channel(address: SocketAddr, root_pem: &str) -> Result<Channel, tonic::transport::Error> {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root_pem)).domain_name("localhost");
    Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls)?.connect_timeout(PATIENCE).connect().await
}

/// A request with the bearer token and the cluster's name.
pub(super) fn authenticated<T>(message: T, token: &str) -> Result<Request<T>, Status> {
    let mut request = Request::new(message);
    let bearer = format!("Bearer {token}").parse().map_err(|_| Status::internal("token is not ASCII"))?;
    request.metadata_mut().insert("authorization", bearer);
    request.metadata_mut().insert("clusterid", tonic::metadata::MetadataValue::from_static("Kubernetes"));
    Ok(request)
}
