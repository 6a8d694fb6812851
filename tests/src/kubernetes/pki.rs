//! Certificates of a Kubernetes cluster: one authority, which lives as long as the cluster, signs for the API server, for
//! the nodes and for whoever calls; and the kubeconfig files that hold them.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType,
};
use serde_json::json;

use crate::Error;
use crate::error::Context;

/// The group whose members may do everything (RBAC, "User-facing roles").
pub const MASTERS: &str = "system:masters";

/// A certificate with its key, both PEM.
#[derive(Debug, Clone)]
pub struct Credential {
    /// The certificate.
    pub certificate: String,
    /// Its key (PKCS #8).
    pub key: String,
}

/// The cluster's authority, and the folder in which the files lie.
#[derive(Debug)]
pub struct Pki {
    folder: PathBuf,
    root: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    /// Makes an authority, with the files that the API server and the controller manager read: `ca.crt`, `ca.key`, and
    /// `service-account.key`, `service-account.pub` for the tokens of service accounts.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn create(folder: &Path) -> Result<Self, Error> {
        fs::create_dir_all(folder).during(|| format!("making {}", folder.display()))?;
        let key = generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "kubernetes");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key).map_err(failed)?.pem();
        let tokens = generate()?;
        let own = Self { folder: folder.to_owned(), root, issuer: Issuer::new(params, key) };
        own.write("ca.crt", &own.root)?;
        own.write("ca.key", &own.issuer.key().serialize_pem())?;
        own.write("service-account.key", &tokens.serialize_pem())?;
        own.write("service-account.pub", &tokens.public_key_pem())?;
        Ok(own)
    }

    /// The authority's certificate, PEM.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// The path of one of the files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A certificate for both ends of TLS: `user` in `group` as Kubernetes reads it (CN and O), and the names and
    /// addresses under which it serves.
    ///
    /// # Errors
    /// A name that no certificate can hold.
    pub fn issue(&self, user: &str, group: Option<&str>, names: &[&str], ips: &[IpAddr]) -> Result<Credential, Error> {
        let key = generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        for name in names {
            params.subject_alt_names.push(SanType::DnsName((*name).try_into().map_err(failed)?));
        }
        params.subject_alt_names.extend(ips.iter().map(|ip| SanType::IpAddress(*ip)));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?.pem();
        Ok(Credential { certificate, key: key.serialize_pem() })
    }

    /// As [`Pki::issue`], written to `<file>.crt` and `<file>.key`.
    ///
    /// # Errors
    /// As [`Pki::issue`], or the folder cannot be written.
    pub fn issue_files(
        &self,
        file: &str,
        user: &str,
        group: Option<&str>,
        names: &[&str],
        ips: &[IpAddr],
    ) -> Result<(PathBuf, PathBuf), Error> {
        let issued = self.issue(user, group, names, ips)?;
        Ok((self.write(&format!("{file}.crt"), &issued.certificate)?, self.write(&format!("{file}.key"), &issued.key)?))
    }

    /// The text of a kubeconfig file: `user` in `group`, against the API server at `server` (a URL).
    ///
    /// # Errors
    /// As [`Pki::issue`].
    pub fn kubeconfig_text(&self, server: &str, user: &str, group: Option<&str>) -> Result<String, Error> {
        let issued = self.issue(user, group, &[], &[])?;
        let encode = |text: &str| BASE64.encode(text);
        // JSON is YAML.
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "culvert",
            "clusters": [{"name": "culvert", "cluster": {
                "server": server, "certificate-authority-data": encode(&self.root),
            }}],
            "users": [{"name": user, "user": {
                "client-certificate-data": encode(&issued.certificate), "client-key-data": encode(&issued.key),
            }}],
            "contexts": [{"name": "culvert", "context": {"cluster": "culvert", "user": user}}],
        });
        Ok(format!("{config:#}\n"))
    }

    /// Writes `<file>.kubeconfig`, as [`Pki::kubeconfig_text`] has it.
    ///
    /// # Errors
    /// As [`Pki::issue`], or the folder cannot be written.
    pub fn kubeconfig(&self, file: &str, server: &str, user: &str, group: Option<&str>) -> Result<PathBuf, Error> {
        self.write(&format!("{file}.kubeconfig"), &self.kubeconfig_text(server, user, group)?)
    }

    /// Only root reads what may hold a key.
    fn write(&self, name: &str, text: &str) -> Result<PathBuf, Error> {
        let path = self.path(name);
        fs::write(&path, text).during(|| format!("writing {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
            .during(|| format!("writing {}", path.display()))?;
        Ok(path)
    }
}

fn generate() -> Result<KeyPair, Error> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)
}

fn failed(error: rcgen::Error) -> Error {
    Error::Io { what: "making a certificate".to_owned(), source: std::io::Error::other(error) }
}
