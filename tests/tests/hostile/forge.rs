//! Certificates that the mesh would not issue, signed with the key of the mesh's own root all the same.

use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tests::cluster::Cluster;

/// An hour.
pub const HOUR: Duration = Duration::from_secs(3600);

/// A certificate with its key.
pub struct Forged {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

/// What is to stand in a certificate.
pub struct Wish {
    pub names: Vec<SanType>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub uses: Vec<ExtendedKeyUsagePurpose>,
}

/// A URI among the names.
pub fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// As good as an issued one, with these names.
pub fn names(names: &[SanType]) -> Wish {
    Wish {
        names: names.to_vec(),
        not_before: SystemTime::now() - HOUR,
        not_after: SystemTime::now() + HOUR,
        uses: vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth],
    }
}

impl Wish {
    fn params(self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = self.names;
        params.not_before = self.not_before.into();
        params.not_after = self.not_after.into();
        params.extended_key_usages = self.uses;
        params
    }

    /// Signed with the key of the cluster's own root.
    pub fn signed(self, cluster: &Cluster) -> Forged {
        let state = cluster.control().unwrap().state_dir().join("ca.pem");
        let text = std::fs::read_to_string(state).unwrap();
        let root = &text[text.find("-----BEGIN CERTIFICATE").unwrap()..];
        let issuer = Issuer::from_ca_cert_pem(root, KeyPair::from_pem(&text).unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = self.params().signed_by(&key, &issuer).unwrap();
        Forged { chain: vec![certificate.into()], key: PrivateKeyDer::try_from(key.serialize_der()).unwrap() }
    }

    /// Signed by nobody.
    pub fn self_signed(self) -> Forged {
        let key = KeyPair::generate().unwrap();
        let certificate = self.params().self_signed(&key).unwrap();
        Forged { chain: vec![certificate.into()], key: PrivateKeyDer::try_from(key.serialize_der()).unwrap() }
    }
}
