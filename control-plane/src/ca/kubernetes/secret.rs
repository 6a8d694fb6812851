//! What the Secrets of an authority hold, and what becomes of it. Pure.
//!
//! ```text
//! culvert-ca-root   made here, once      cacerts   made elsewhere, comes before the other
//!   ca-cert.pem     the signing certificate; for culvert-ca-root a root, for cacerts a root or an intermediate
//!   ca-key.pem      its key
//!   root-cert.pem   every root to trust, one or more
//!   cert-chain.pem  optional: what is between the signing certificate and its root
//! ```
//!
//! A root is replaced in three edits: the new root is appended to `root-cert.pem`; `ca-cert.pem` and `ca-key.pem` become the new
//! one's; the old root is taken out. After each the proxies renew their certificates as soon as their kubelets have brought them the
//! ConfigMap, of which the first root is the one that signs. The next edit is for when `culvert ztunnel certificates` shows that
//! all of them have.

use std::collections::BTreeMap;
use std::time::SystemTime;

use k8s_openapi::ByteString;
use mesh_identity::authority::{Authority, AuthorityPem};

use super::root::RootError;

/// The Secret with a root that was made here.
pub(super) const OWN: &str = "culvert-ca-root";
/// The Secret with an authority that was made elsewhere; the name is Istio's.
pub(super) const PLUGGED: &str = "cacerts";
/// Its type, which tells people what it is for.
pub(super) const TYPE: &str = "culvert.dev/ca-root";

const CERTIFICATE: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const CHAIN: &str = "cert-chain.pem";
/// The key under which roots are found, in the Secrets and in the ConfigMap.
pub(super) const ROOTS: &str = "root-cert.pem";
/// Longest text that is read, in bytes.
const MAX_BYTES: usize = 256 * 1024;

/// The data of a Secret.
pub(super) type Data = BTreeMap<String, ByteString>;

/// The authority that `data` of the Secret `name` describes, tried at `now`.
pub(super) fn read(name: &'static str, data: &Data, now: SystemTime) -> Result<Authority, RootError> {
    let text = |key: &'static str| match data.get(key) {
        Some(ByteString(bytes)) if bytes.len() > MAX_BYTES => Err(RootError::NotPem { name, key }),
        Some(ByteString(bytes)) => std::str::from_utf8(bytes).map(Some).map_err(|_| RootError::NotPem { name, key }),
        None => Ok(None),
    };
    let required = |key| text(key)?.ok_or(RootError::Missing { name, key });
    let texts = AuthorityPem {
        certificate: required(CERTIFICATE)?,
        key: required(KEY)?,
        chain: text(CHAIN)?.unwrap_or_default(),
        roots: required(ROOTS)?,
    };
    Authority::from_pem(texts, now).map_err(|error| RootError::Authority { name, error })
}

/// The data that [`read`] makes this authority of.
pub(super) fn write(authority: &Authority) -> Data {
    let bytes = |text: String| ByteString(text.into_bytes());
    let mut data = Data::from([
        (CERTIFICATE.to_owned(), bytes(authority.certificate_pem())),
        (KEY.to_owned(), bytes(authority.key_pem().expose().to_owned())),
        (ROOTS.to_owned(), bytes(authority.roots_pem())),
    ]);
    let chain = authority.chain_pem();
    if !chain.is_empty() {
        data.insert(CHAIN.to_owned(), bytes(chain));
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authority() -> Authority {
        Authority::generate("cluster.local", SystemTime::now()).unwrap()
    }

    fn set(data: &mut Data, key: &str, text: &str) {
        data.insert(key.to_owned(), ByteString(text.as_bytes().to_vec()));
    }

    #[test]
    fn what_was_written_is_read() {
        let root = authority();
        let read_back = read(OWN, &write(&root), SystemTime::now()).unwrap();
        assert_eq!(read_back.certificate_pem(), root.certificate_pem());
        assert_eq!(read_back.roots_pem(), root.roots_pem());
        let intermediate = root.intermediate("x", SystemTime::now()).unwrap();
        let read_back = read(PLUGGED, &write(&intermediate), SystemTime::now()).unwrap();
        assert_eq!(read_back.chain_pem(), intermediate.chain_pem());
        assert_eq!(read_back.roots_pem(), root.roots_pem());
    }

    #[test]
    fn two_roots_are_trusted_while_one_replaces_the_other() {
        let (old, new) = (authority(), authority());
        let both = old.roots_pem() + &new.roots_pem();
        let mut data = write(&old);
        set(&mut data, ROOTS, &both);
        let first = read(OWN, &data, SystemTime::now()).unwrap();
        assert_eq!((first.roots_pem(), first.certificate_pem()), (both.clone(), old.certificate_pem()));
        let mut data = write(&new);
        set(&mut data, ROOTS, &both);
        let second = read(OWN, &data, SystemTime::now()).unwrap();
        let new_first = new.roots_pem() + &old.roots_pem();
        assert_eq!((second.roots_pem(), second.certificate_pem()), (new_first, new.certificate_pem()));
        // Not signing with one that nobody trusts.
        set(&mut data, ROOTS, &old.roots_pem());
        assert!(matches!(read(OWN, &data, SystemTime::now()), Err(RootError::Authority { .. })));
    }

    #[test]
    fn what_is_missing_or_no_text_is_named() {
        for key in [CERTIFICATE, KEY, ROOTS] {
            let mut data = write(&authority());
            data.remove(key);
            let error = read(PLUGGED, &data, SystemTime::now()).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(PLUGGED), "{error}");
            data.insert(key.to_owned(), ByteString(vec![0xff]));
            assert!(matches!(read(OWN, &data, SystemTime::now()), Err(RootError::NotPem { .. })), "{key}");
        }
    }
}
