//! The certificate that culvertd itself shows on its port, always fresh.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use mesh_identity::authority::{Authority, AuthorityError, DEFAULT_LIFETIME};
use mesh_identity::{Clock, tls};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use thiserror::Error;

use super::Authorities;

/// Why there is no certificate to serve with.
#[derive(Debug, Error)]
pub enum ServingError {
    /// The authority did not sign it; a name may be malformed.
    #[error("cannot issue culvertd's own certificate: {0}")]
    Authority(#[from] AuthorityError),
    /// rustls does not take it.
    #[error("cannot serve with culvertd's own certificate: {0}")]
    Tls(#[from] rustls::Error),
    /// It cannot be read back.
    #[error("culvertd's own certificate cannot be read back")]
    Malformed,
}

/// TLS for culvertd's port: TLS 1.3, HTTP/2, a certificate for `names` (host names and IP addresses) that the newest of
/// `authorities` signs, renewed at half of its life and with each new authority. Clients prove themselves by tokens.
///
/// # Errors
/// When a name is malformed or the authority cannot sign.
pub fn serving_config(
    authorities: Authorities,
    names: Vec<String>,
    clock: Clock,
) -> Result<Arc<ServerConfig>, ServingError> {
    let current = issue(authorities.borrow().clone(), &names, clock.now())?;
    let resolver = Resolver { authorities, names, clock: clock.clone(), current: Mutex::new(current) };
    let mut config = ServerConfig::builder_with_details(tls::provider().clone(), Arc::new(clock))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct Current {
    key: Arc<CertifiedKey>,
    authority: Arc<Authority>,
    renew_at: SystemTime,
}

#[derive(Debug)]
struct Resolver {
    authorities: Authorities,
    names: Vec<String>,
    clock: Clock,
    current: Mutex<Current>,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.fresh())
    }
}

impl Resolver {
    fn fresh(&self) -> Arc<CertifiedKey> {
        let now = self.clock.now();
        let authority = self.authorities.borrow().clone();
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.renew_at <= now || !Arc::ptr_eq(&current.authority, &authority) {
            match issue(authority, &self.names, now) {
                Ok(fresh) => *current = fresh,
                // The one at hand is good for as long again; the next client brings the next attempt.
                Err(error) => tracing::error!(%error, "cannot renew culvertd's own certificate"),
            }
        }
        current.key.clone()
    }
}

fn issue(authority: Arc<Authority>, names: &[String], now: SystemTime) -> Result<Current, ServingError> {
    let identity = authority.sign_server(names, DEFAULT_LIFETIME, now)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(identity.chain_pem.as_bytes()).collect();
    let chain = chain.map_err(|_| ServingError::Malformed)?;
    let key =
        PrivateKeyDer::from_pem_slice(identity.key_pem.expose().as_bytes()).map_err(|_| ServingError::Malformed)?;
    let key = CertifiedKey::from_der(chain, key, tls::provider())?;
    let life = authority.not_after().duration_since(now).unwrap_or(Duration::ZERO).min(DEFAULT_LIFETIME);
    Ok(Current { key: Arc::new(key), authority, renew_at: now + life / 2 })
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;
    use crate::ca::always;

    #[test]
    fn the_certificate_is_renewed_at_half_of_its_life() {
        let base = SystemTime::now();
        let time = Arc::new(Mutex::new(base));
        let clock = Clock::from_fn({
            let time = time.clone();
            move || *time.lock().unwrap()
        });
        let authority = Arc::new(Authority::generate("cluster.local", base).unwrap());
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let current = Mutex::new(issue(authority.clone(), &names, base).unwrap());
        let (sender, authorities) = watch::channel(authority);
        let resolver = Resolver { authorities, names, clock, current };
        let first = resolver.fresh();
        *time.lock().unwrap() = base + DEFAULT_LIFETIME / 2 - Duration::from_secs(1);
        assert!(Arc::ptr_eq(&resolver.fresh(), &first));
        *time.lock().unwrap() = base + DEFAULT_LIFETIME / 2;
        let second = resolver.fresh();
        assert!(!Arc::ptr_eq(&second, &first) && second.cert[0] != first.cert[0]);
        assert!(Arc::ptr_eq(&resolver.fresh(), &second));
        // And at once when another authority has taken over.
        sender.send_replace(Arc::new(Authority::generate("cluster.local", base).unwrap()));
        let third = resolver.fresh();
        assert!(third.cert[0] != second.cert[0] && Arc::ptr_eq(&resolver.fresh(), &third));
    }

    #[test]
    fn malformed_names_are_errors() {
        let authority = Arc::new(Authority::generate("cluster.local", SystemTime::now()).unwrap());
        let error = serving_config(always(authority), vec!["näme".to_owned()], Clock::system()).unwrap_err();
        assert!(matches!(error, ServingError::Authority(_)), "{error}");
    }
}
