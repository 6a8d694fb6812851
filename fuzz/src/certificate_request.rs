//! What the certificate authority is sent, and what it answers.

use mesh_identity::issuer::{IssuedCertificate, certificates_from_pem};
use mesh_identity::{BearerToken, CsrPublicKey};

/// Reads the input as a request, as an answer whose elements are parted by zero bytes, and as a bearer token.
pub fn run(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    // Only one that is signed by its own key is taken; the seed is.
    let _ = CsrPublicKey::from_pem(&text);
    let elements: Vec<String> = text.split('\0').map(str::to_owned).collect();
    if let Ok(issued) = IssuedCertificate::from_wire(&elements) {
        assert!(!issued.roots.is_empty());
        assert_eq!(IssuedCertificate::from_wire(&issued.to_wire()).unwrap(), issued);
    }
    let _ = certificates_from_pem(&text);
    if let Ok(token) = BearerToken::new(&text) {
        assert!(token.header().bytes().all(|b| (0x20..0x7f).contains(&b)));
        assert!(!format!("{token:?}").contains(text.trim()) || "BearerToken(redacted)".contains(text.trim()));
    }
}
