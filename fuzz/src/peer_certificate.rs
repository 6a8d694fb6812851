//! The certificate that a peer shows.

use mesh_identity::peer_id;
use rustls_pki_types::CertificateDer;

/// Reads the input as a peer's leaf certificate in DER.
pub fn run(input: &[u8]) {
    let chain = [CertificateDer::from(input)];
    if let Ok(id) = peer_id(&chain) {
        assert!(find(input, id.as_str().as_bytes()), "the identity stands in the certificate as it is");
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}
