use std::net::IpAddr;
use std::sync::Arc;

use rcgen::{PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256, RsaKeySize};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{ServerName, UnixTime};
use rustls::{CertificateError, RootCertStore};

use super::*;
use crate::key::PrivateKey;
use crate::testing::{HOUR, authority, id, issue, uri};
use crate::{Clock, Credential, peer_id};

/// A request over `key` that asks for all that it should not get.
fn greedy_request(key: &KeyPair) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "root of all");
    params.subject_alt_names =
        vec![uri("spiffe://cluster.local/ns/kube-system/sa/admin"), SanType::DnsName("a.example".try_into().unwrap())];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.serialize_request(key).unwrap().pem().unwrap()
}

#[test]
fn of_a_request_only_the_key_is_used() {
    let root = authority();
    let key = KeyPair::generate().unwrap();
    let csr = CsrPublicKey::from_pem(&greedy_request(&key)).unwrap();
    let now = SystemTime::now();
    let issued = root.sign(&csr, &id("a"), Duration::ZERO, now).unwrap();
    assert_eq!(peer_id(std::slice::from_ref(&issued.leaf)).unwrap(), id("a"));
    let (_, leaf) = parse_x509_certificate(&issued.leaf).unwrap();
    assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
    assert!(!leaf.is_ca());
    assert_eq!(leaf.subject().iter().count(), 0);
    assert_eq!(leaf.subject_alternative_name().unwrap().unwrap().value.general_names.len(), 1);
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any);
    let begins: SystemTime = leaf.validity().not_before.to_datetime().into();
    let ends: SystemTime = leaf.validity().not_after.to_datetime().into();
    assert!(now.duration_since(begins).unwrap().as_secs().abs_diff(120) <= 1);
    assert!(ends.duration_since(now).unwrap().as_secs().abs_diff(24 * 60 * 60) <= 1);
}

#[test]
fn the_usual_kinds_of_key_are_signed_and_no_other() {
    let kinds = [
        (KeyPair::generate().unwrap(), Ok(())),
        (KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap(), Ok(())),
        (KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap(), Ok(())),
        (KeyPair::generate_for(&PKCS_ED25519).unwrap(), Err(InvalidCsr::Key)),
    ];
    for (key, expected) in kinds {
        let csr = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
        assert_eq!(CsrPublicKey::from_pem(&csr).map(|_| ()), expected, "{:?}", key.algorithm());
    }
}

#[test]
fn hostile_requests_are_refused() {
    let own = PrivateKey::generate().unwrap().csr_pem(&id("a")).unwrap();
    let refused = |csr: &str| CsrPublicKey::from_pem(csr).unwrap_err();
    assert_eq!(refused(""), InvalidCsr::Pem);
    assert_eq!(refused("x"), InvalidCsr::Pem);
    assert_eq!(refused(&own.repeat(100)), InvalidCsr::TooLong { length: own.len() * 100 });
    assert_eq!(refused(&authority().certificate_pem()), InvalidCsr::Pem);
    let disguised = authority().certificate_pem().replace("CERTIFICATE", "CERTIFICATE REQUEST");
    assert_eq!(refused(&disguised), InvalidCsr::Malformed);

    // The request of one key with the public key of another.
    let (one, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let der = CertificateParams::default().serialize_request(&one).unwrap().der().to_vec();
    let at = der.windows(65).position(|part| part == one.public_key_raw()).unwrap();
    let mut forged = der;
    forged[at..at + 65].copy_from_slice(other.public_key_raw());
    let body = crate::issuer::certificate_pem(&CertificateDer::from(forged));
    assert_eq!(refused(&body.replace("CERTIFICATE", "CERTIFICATE REQUEST")), InvalidCsr::Signature);
}

#[test]
fn lifetimes_are_bounded_by_the_limit_and_by_the_authority() {
    let root = authority();
    let key = CsrPublicKey::from_pem(&PrivateKey::generate().unwrap().csr_pem(&id("a")).unwrap()).unwrap();
    let now = SystemTime::now();
    let life = |root: &Authority, asked: Duration, now: SystemTime| {
        let leaf = root.sign(&key, &id("a"), asked, now).unwrap().leaf;
        let (_, leaf) = parse_x509_certificate(&leaf).unwrap();
        let end: SystemTime = leaf.validity().not_after.to_datetime().into();
        (end.duration_since(now).unwrap().as_secs_f64() / 3600.0).round()
    };
    assert!((life(&root, HOUR, now) - 1.0).abs() < f64::EPSILON);
    assert!((life(&root, Duration::ZERO, now) - 24.0).abs() < f64::EPSILON);
    assert!((life(&root, Duration::from_secs(u64::MAX), now) - 24.0).abs() < f64::EPSILON);
    let root = root.with_max_lifetime(48 * HOUR);
    assert!((life(&root, 1000 * HOUR, now) - 48.0).abs() < f64::EPSILON);
    assert!((life(&root, Duration::ZERO, now) - 24.0).abs() < f64::EPSILON);
    let late = root.not_after() - 2 * HOUR;
    assert!((life(&root, 24 * HOUR, late) - 2.0).abs() < f64::EPSILON);
    let error = root.sign(&key, &id("a"), HOUR, root.not_after()).unwrap_err();
    assert!(matches!(error, AuthorityError::Expired), "{error}");
}

#[test]
fn serial_numbers_do_not_repeat() {
    let root = authority();
    let key = CsrPublicKey::from_pem(&PrivateKey::generate().unwrap().csr_pem(&id("a")).unwrap()).unwrap();
    let serials: std::collections::HashSet<String> = (0..100)
        .map(|_| {
            let leaf = root.sign(&key, &id("a"), HOUR, SystemTime::now()).unwrap().leaf;
            parse_x509_certificate(&leaf).unwrap().1.raw_serial_as_string()
        })
        .collect();
    assert_eq!(serials.len(), 100);
}

#[test]
fn an_authority_survives_its_files() {
    let now = SystemTime::now();
    let root = authority();
    let intermediate = root.intermediate("cluster.local", now).unwrap();
    for made in [&root, &intermediate] {
        let (certificate, key, chain, roots) =
            (made.certificate_pem(), made.key_pem(), made.chain_pem(), made.roots_pem());
        // As tools write it: the chain may hold the certificate itself and the root.
        for chain in [chain.clone(), format!("{chain}{certificate}{roots}"), String::new()] {
            let texts = AuthorityPem { certificate: &certificate, key: key.expose(), chain: &chain, roots: &roots };
            let read = Authority::from_pem(texts, now).unwrap();
            assert_eq!(read.chain_pem(), made.chain_pem());
            let (key, issued) = issue(&read, &id("a"));
            Credential::new(&id("a"), key, issued, &Clock::system()).unwrap();
        }
    }
}

#[test]
fn root_that_signs_is_told_of_first() {
    let now = SystemTime::now();
    // All three have the same name.
    let (old, new, other) = (authority(), authority(), authority());
    let below = new.intermediate("cluster.local", now).unwrap();
    let roots = [&old, &other, &new].map(Authority::roots_pem).concat();
    let told = [&new, &old, &other].map(Authority::roots_pem).concat();
    for signs in [&new, &below] {
        let (certificate, key) = (signs.certificate_pem(), signs.key_pem());
        let texts = AuthorityPem { certificate: &certificate, key: key.expose(), chain: "", roots: &roots };
        assert_eq!(Authority::from_pem(texts, now).unwrap().roots_pem(), told);
    }
}

#[test]
fn unusable_authorities_are_named() {
    let now = SystemTime::now();
    let (root, other) = (authority(), authority());
    let intermediate = root.intermediate("cluster.local", now).unwrap();
    let (key, leaf) = issue(&root, &id("a"));
    drop(key);
    let (certificate, key, roots) = (root.certificate_pem(), root.key_pem(), root.roots_pem());
    let good = AuthorityPem { certificate: &certificate, key: key.expose(), chain: "", roots: &roots };
    let fails = |texts: AuthorityPem<'_>| Authority::from_pem(texts, now).unwrap_err().to_string();

    let other_key = other.key_pem();
    assert!(fails(AuthorityPem { key: other_key.expose(), ..good }).contains("does not belong to its key"));
    assert!(fails(AuthorityPem { key: "no key", ..good }).contains("not a private key"));
    assert!(fails(AuthorityPem { certificate: "", ..good }).contains("the authority's certificate holds no"));
    assert!(fails(AuthorityPem { roots: "", ..good }).contains("the roots holds no"));
    let leaf = certificate_pem(&leaf.leaf);
    assert!(fails(AuthorityPem { certificate: &leaf, ..good }).contains("basicConstraints"));

    let (certificate, key, roots) = (intermediate.certificate_pem(), intermediate.key_pem(), other.roots_pem());
    let foreign = AuthorityPem { certificate: &certificate, key: key.expose(), chain: "", roots: &roots };
    assert!(fails(foreign).contains("do not verify under its roots"));
}

#[test]
fn a_server_is_known_by_its_names() {
    let root = authority();
    let names = ["culvertd.culvert-system.svc".to_owned(), "127.0.0.1".to_owned()];
    let server = root.sign_server(&names, HOUR, SystemTime::now()).unwrap();
    let chain = certificates_from_pem(&server.chain_pem).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificates_from_pem(&root.roots_pem()).unwrap().remove(0)).unwrap();
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), tls::provider().clone()).build().unwrap();
    let check = |name: ServerName<'_>| verifier.verify_server_cert(&chain[0], &[], &name, &[], UnixTime::now());
    check(ServerName::try_from("culvertd.culvert-system.svc").unwrap()).unwrap();
    check(ServerName::IpAddress(IpAddr::from([127, 0, 0, 1]).into())).unwrap();
    let error = check(ServerName::try_from("elsewhere").unwrap()).unwrap_err();
    let expected = matches!(error, rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext { .. }));
    assert!(expected, "{error}");
    assert!(!format!("{server:?}").contains("PRIVATE"));
}
