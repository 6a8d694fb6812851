//! Tokens signed by the local authority, in the shape of Kubernetes' bound service-account tokens.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::authorize::ServiceAccount;

/// The audience of tokens for the control plane.
pub const AUDIENCE: &str = "istio-ca";
/// Who signs them.
pub const ISSUER: &str = "https://culvertd.culvert-system.svc";

/// Longest token that is looked at, in bytes. Kubernetes' own have about 1 KiB.
pub(super) const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// How far in the future a token may begin, for clocks that differ.
const LEEWAY: Duration = Duration::from_secs(60);
/// Before the namespace of a service account, in a token's subject and in its user's name.
pub(super) const SUBJECT_PREFIX: &str = "system:serviceaccount:";

/// Why a token was not taken or not made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TokenError {
    /// Longer than any real one.
    #[error("the token has {length} bytes, at most {MAX_TOKEN_BYTES} are accepted")]
    TooLong {
        /// Length in bytes.
        length: usize,
    },
    /// It is not a JWT, or lacks claims that every service-account token has.
    #[error("the token is malformed: {0}")]
    Malformed(String),
    /// Another algorithm than the one that is signed with here.
    #[error("the token is not signed with ES256")]
    Algorithm,
    /// Not signed by this authority.
    #[error("the token's signature is not of this authority")]
    Signature,
    /// Not signed under this authority's name.
    #[error("the token was not issued by {ISSUER}")]
    Issuer,
    /// Meant for somebody else.
    #[error("the token is for another audience")]
    Audience,
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
    /// Its time has not come.
    #[error("the token is not valid yet")]
    NotYetValid,
    /// Its claims contradict each other.
    #[error("the token's subject is not the service account that it names")]
    Subject,
    /// The key cannot sign.
    #[error("cannot sign a token: {0}")]
    Sign(String),
    /// The text of the key is not one. It is not repeated.
    #[error("the token key is not a P-256 private key in PEM")]
    Key,
}

/// Who presents a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The namespace of the service account.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// The pod that the token is bound to, if it is bound to one.
    pub pod: Option<BoundPod>,
    /// The node that the token names; not to be trusted over the directory.
    pub node: Option<String>,
}

/// The pod that a token is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoundPod {
    /// Its name; the namespace is the service account's.
    pub name: String,
    /// Its unique id, if the token names it.
    pub uid: Option<String>,
}

impl Caller {
    /// What follows `account` in a caller's text, such as the pod; none if the text is of a caller with another account.
    pub fn beside<'t>(text: &'t str, account: &ServiceAccount) -> Option<&'t str> {
        let rest = text.strip_prefix("service account ")?.strip_prefix(&account.to_string())?;
        (rest.is_empty() || rest.starts_with(' ')).then(|| rest.trim_matches([' ', '(', ')']))
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "service account {}/{}", self.namespace, self.service_account)?;
        match &self.pod {
            Some(pod) => write!(f, " (pod {})", pod.name),
            None => Ok(()),
        }
    }
}

/// Signs tokens and checks them: an ES256 key.
pub struct TokenKey {
    pem: String,
    sign: EncodingKey,
    verify: DecodingKey,
}

impl TokenKey {
    /// Makes a new key.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub fn generate() -> Result<Self, TokenError> {
        let key =
            KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|error| TokenError::Sign(error.to_string()))?;
        Self::from_pem(&key.serialize_pem())
    }

    /// Takes a P-256 private key in PKCS #8 PEM.
    ///
    /// # Errors
    /// When it is not one.
    pub fn from_pem(pem: &str) -> Result<Self, TokenError> {
        let key = KeyPair::from_pem(pem).map_err(|_| TokenError::Key)?;
        if !key.is_compatible(&PKCS_ECDSA_P256_SHA256) {
            return Err(TokenError::Key);
        }
        let sign = EncodingKey::from_ec_pem(pem.as_bytes()).map_err(|_| TokenError::Key)?;
        let verify = DecodingKey::from_ec_der(key.public_key_raw());
        Ok(Self { pem: pem.to_owned(), sign, verify })
    }

    /// The key, for its owner to store. Keep it out of logs.
    pub fn expose_pem(&self) -> &str {
        &self.pem
    }

    /// Signs a token for `caller`, valid from `now` for `lifetime`.
    ///
    /// # Errors
    /// When signing fails.
    pub fn mint(
        &self,
        caller: &Caller,
        audience: &str,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<String, TokenError> {
        let iat = seconds(now);
        let claims = Claims {
            iss: ISSUER.to_owned(),
            sub: subject(&caller.namespace, &caller.service_account),
            aud: Audience::Several(vec![audience.to_owned()]),
            exp: iat.saturating_add(lifetime.as_secs()),
            nbf: Some(iat),
            iat: Some(iat),
            kubernetes: Kubernetes {
                namespace: caller.namespace.clone(),
                serviceaccount: Reference { name: caller.service_account.clone(), uid: None },
                pod: caller.pod.as_ref().map(|pod| Reference { name: pod.name.clone(), uid: pod.uid.clone() }),
                node: caller.node.as_ref().map(|node| Reference { name: node.clone(), uid: None }),
            },
        };
        encode(&Header::new(Algorithm::ES256), &claims, &self.sign).map_err(|error| TokenError::Sign(error.to_string()))
    }

    /// Checks signature, issuer, audience and time of a token, and says who it is for.
    ///
    /// # Errors
    /// When any of that is wrong.
    pub fn verify(&self, token: &str, audience: &str, now: SystemTime) -> Result<Caller, TokenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::TooLong { length: token.len() });
        }
        let mut rules = Validation::new(Algorithm::ES256);
        rules.set_audience(&[audience]);
        rules.set_issuer(&[ISSUER]);
        rules.set_required_spec_claims(&["exp", "aud", "iss", "sub"]);
        // Checked below, against the given time.
        rules.validate_exp = false;
        rules.validate_nbf = false;
        let claims = decode::<Claims>(token, &self.verify, &rules).map_err(|error| refusal(error.kind()))?.claims;
        if claims.exp <= seconds(now) {
            return Err(TokenError::Expired);
        }
        if claims.nbf.is_some_and(|nbf| nbf > seconds(now + LEEWAY)) {
            return Err(TokenError::NotYetValid);
        }
        claims.into_caller()
    }
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenKey(redacted)")
    }
}

/// The claims of a bound service-account token, as Kubernetes makes them.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    aud: Audience,
    exp: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nbf: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    iat: Option<u64>,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Kubernetes,
}

/// RFC 7519 section 4.1.3: one string or several.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Audience {
    One(String),
    Several(Vec<String>),
}

impl Audience {
    /// All of them.
    pub(super) fn names(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Several(names) => names,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Kubernetes {
    namespace: String,
    serviceaccount: Reference,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pod: Option<Reference>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node: Option<Reference>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Reference {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uid: Option<String>,
}

impl Claims {
    fn into_caller(self) -> Result<Caller, TokenError> {
        let Kubernetes { namespace, serviceaccount, pod, node } = self.kubernetes;
        if self.sub != subject(&namespace, &serviceaccount.name) {
            return Err(TokenError::Subject);
        }
        Ok(Caller {
            namespace,
            service_account: serviceaccount.name,
            pod: pod.map(|Reference { name, uid }| BoundPod { name, uid: uid.filter(|uid| !uid.is_empty()) }),
            node: node.map(|node| node.name),
        })
    }
}

fn subject(namespace: &str, service_account: &str) -> String {
    format!("{SUBJECT_PREFIX}{namespace}:{service_account}")
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn refusal(kind: &ErrorKind) -> TokenError {
    match kind {
        ErrorKind::InvalidSignature => TokenError::Signature,
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName | ErrorKind::UnsupportedAlgorithm => {
            TokenError::Algorithm
        }
        ErrorKind::InvalidIssuer => TokenError::Issuer,
        ErrorKind::InvalidAudience => TokenError::Audience,
        ErrorKind::MissingRequiredClaim(claim) => TokenError::Malformed(format!("it has no claim {claim}")),
        // The texts of the others may repeat the token.
        _ => TokenError::Malformed("it is not a service-account token".to_owned()),
    }
}

#[cfg(test)]
mod tests;
