//! Real handshakes over an in-memory stream: who is taken and who is refused, on both sides.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::SystemTime;

use mesh_model::SpiffeId;
use rcgen::ExtendedKeyUsagePurpose;
use rustls::crypto::aws_lc_rs::{cipher_suite, kx_group};
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, ClientConfig, ServerConfig, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::handshake::{HandshakeError, accept, connect};
use crate::testing::{Bare, Forged, HOUR, authority, credential, id, issue, provider, uri};
use crate::{Authority, Clock, Credential, PeerIdError, Refusal};

const TLS12: &[&SupportedProtocolVersion] = &[&rustls::version::TLS12];
const TLS13: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

/// What our server makes of a client, and what the client hears of it.
async fn serve(server: &Credential, client: Arc<ClientConfig>) -> (Result<SpiffeId, HandshakeError>, HandshakeError) {
    let (near, far) = duplex(64 * 1024);
    let name = ServerName::IpAddress(ADDRESS.into());
    let client = async {
        let mut stream = TlsConnector::from(client).connect(name, far).await?;
        let mut byte = [0; 1];
        stream.read_exact(&mut byte).await?;
        Ok::<_, std::io::Error>(())
    };
    let server = async { accept(near, server).await.map(|(_, peer)| peer) };
    let (server, client) = tokio::join!(server, client);
    (server, HandshakeError::from(client.unwrap_err()))
}

/// What our client makes of a server.
async fn dial(
    client: &Credential,
    expected: &[SpiffeId],
    server: Arc<ServerConfig>,
) -> (Result<SpiffeId, HandshakeError>, Result<(), HandshakeError>) {
    let (near, far) = duplex(64 * 1024);
    let server = async {
        let stream = TlsAcceptor::from(server).accept(far).await?;
        assert_eq!(stream.get_ref().1.server_name(), None, "no SNI is sent");
        Ok::<_, std::io::Error>(())
    };
    let client = async { connect(near, client, ADDRESS, expected).await.map(|(_, peer)| peer) };
    let (client, server) = tokio::join!(client, server);
    (client, server.map_err(HandshakeError::from))
}

fn refusal<T: std::fmt::Debug>(result: Result<T, HandshakeError>) -> Refusal {
    match result {
        Err(HandshakeError::Refused(refusal)) => refusal,
        other => panic!("expected a refusal of the certificate, got {other:?}"),
    }
}

#[tokio::test]
async fn two_credentials_of_one_root_make_a_tunnel() {
    let root = authority();
    let (a, b) = (credential(&root, &id("a")), credential(&root, &id("b")));
    let (near, far) = duplex(64 * 1024);
    let expected = [id("c"), id("b")];
    let (client, server) = tokio::join!(connect(near, &a, ADDRESS, &expected), accept(far, &b));
    let ((mut client, server_id), (mut server, client_id)) = (client.unwrap(), server.unwrap());
    assert_eq!((client_id, server_id), (id("a"), id("b")));
    let connection = client.get_ref().1;
    assert_eq!(connection.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(connection.negotiated_cipher_suite(), Some(cipher_suite::TLS13_AES_256_GCM_SHA384));
    assert_eq!(connection.negotiated_key_exchange_group().unwrap().name(), rustls::NamedGroup::X25519);
    client.write_all(b"ping").await.unwrap();
    client.flush().await.unwrap();
    let mut text = [0; 4];
    server.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"ping");
    assert_eq!(client.get_ref().1.tls13_tickets_received(), 0);
}

#[tokio::test]
async fn a_chain_with_an_intermediate_is_taken() {
    let root = authority();
    let intermediate = root.intermediate("cluster.local", SystemTime::now()).unwrap();
    let (a, b) = (credential(&intermediate, &id("a")), credential(&root, &id("b")));
    assert_eq!(a.chain().len(), 2);
    for (client, server) in [(&a, &b), (&b, &a)] {
        let (near, far) = duplex(64 * 1024);
        let expected = [server.id().clone()];
        let (opened, accepted) = tokio::join!(connect(near, client, ADDRESS, &expected), accept(far, server));
        assert_eq!(opened.unwrap().1, *server.id());
        assert_eq!(accepted.unwrap().1, *client.id());
    }
}

/// Certificates that no side takes, and why.
fn bad_certificates(root: &Authority) -> Vec<(&'static str, Arc<CertifiedKey>, Refusal)> {
    let good = "spiffe://cluster.local/ns/ns/sa/a";
    let now = SystemTime::now();
    let dns = || rcgen::SanType::DnsName("a.example".try_into().unwrap());
    let not_an_identity =
        |text: &str| Refusal::Identity(PeerIdError::NotAnIdentity(text.parse::<SpiffeId>().unwrap_err()));
    let malformed = "spiffe://cluster.local/ns/ns/sa/a/more";
    vec![
        ("foreign root", Forged::new(vec![uri(good)]).sign(&authority()), Refusal::UnknownIssuer),
        ("expired", Forged { not_after: now - HOUR / 2, ..Forged::new(vec![uri(good)]) }.sign(root), Refusal::Expired),
        (
            "not yet valid",
            Forged { not_before: now + HOUR / 2, ..Forged::new(vec![uri(good)]) }.sign(root),
            Refusal::NotYetValid,
        ),
        ("no name", Forged::new(vec![]).sign(root), Refusal::Identity(PeerIdError::NoUri)),
        ("DNS name only", Forged::new(vec![dns()]).sign(root), Refusal::Identity(PeerIdError::NoUri)),
        (
            "two URIs",
            Forged::new(vec![uri(good), uri("spiffe://cluster.local/ns/ns/sa/b")]).sign(root),
            Refusal::Identity(PeerIdError::SeveralUris { count: 2 }),
        ),
        (
            "the same URI twice",
            Forged::new(vec![uri(good), uri(good)]).sign(root),
            Refusal::Identity(PeerIdError::SeveralUris { count: 2 }),
        ),
        ("malformed SPIFFE ID", Forged::new(vec![uri(malformed)]).sign(root), not_an_identity(malformed)),
        (
            "another scheme",
            Forged::new(vec![uri("https://cluster.local/ns/ns/sa/a")]).sign(root),
            not_an_identity("https://cluster.local/ns/ns/sa/a"),
        ),
    ]
}

#[tokio::test]
async fn a_server_refuses_bad_clients_in_the_handshake() {
    let root = authority();
    let server = credential(&root, &id("server"));
    for (name, key, expected) in bad_certificates(&root) {
        let (result, heard) = serve(&server, Bare::new(key).client()).await;
        assert_eq!(refusal(result), expected, "{name}");
        assert!(matches!(heard, HandshakeError::RefusedByPeer(_)), "{name}: {heard:?}");
    }
}

#[tokio::test]
async fn a_client_refuses_bad_servers_in_the_handshake() {
    let root = authority();
    let client = credential(&root, &id("client"));
    for (name, key, expected) in bad_certificates(&root) {
        let (result, heard) = dial(&client, &[id("a")], Bare::new(key).server()).await;
        assert_eq!(refusal(result), expected, "{name}");
        assert!(matches!(heard, Err(HandshakeError::RefusedByPeer(_))), "{name}: {heard:?}");
    }
}

#[tokio::test]
async fn certificates_are_for_one_side_if_they_say_so() {
    let root = authority();
    let ours = credential(&root, &id("ours"));
    let only = |usage| {
        let forged = Forged { uses: vec![usage], ..Forged::new(vec![uri(id("a").as_str())]) };
        Bare::new(forged.sign(&root))
    };
    let (result, _) = serve(&ours, only(ExtendedKeyUsagePurpose::ServerAuth).client()).await;
    assert_eq!(refusal(result), Refusal::WrongUse);
    let (result, _) = serve(&ours, only(ExtendedKeyUsagePurpose::ClientAuth).client()).await;
    assert_eq!(result.unwrap(), id("a"));
    let (result, _) = dial(&ours, &[id("a")], only(ExtendedKeyUsagePurpose::ClientAuth).server()).await;
    assert_eq!(refusal(result), Refusal::WrongUse);
    let (result, _) = dial(&ours, &[id("a")], only(ExtendedKeyUsagePurpose::ServerAuth).server()).await;
    assert_eq!(result.unwrap(), id("a"));
}

#[tokio::test]
async fn another_trust_domain_is_refused_by_the_server() {
    let root = authority();
    let other: SpiffeId = "spiffe://other.example/ns/ns/sa/a".parse().unwrap();
    let (ours, theirs) = (credential(&root, &id("ours")), credential(&root, &other));
    let (near, far) = duplex(64 * 1024);
    let expected = [id("ours")];
    let (_, accepted) = tokio::join!(connect(near, &theirs, ADDRESS, &expected), accept(far, &ours));
    assert_eq!(refusal(accepted), Refusal::TrustDomain { peer: other, ours: "cluster.local".to_owned() });
}

#[tokio::test]
async fn a_client_takes_only_the_servers_that_it_expects() {
    let root = authority();
    let (a, b) = (credential(&root, &id("a")), credential(&root, &id("b")));
    for expected in [vec![], vec![id("c")], vec!["spiffe://other.example/ns/ns/sa/b".parse().unwrap()]] {
        let (near, far) = duplex(64 * 1024);
        let (opened, accepted) = tokio::join!(connect(near, &a, ADDRESS, &expected), accept(far, &b));
        assert_eq!(refusal(opened), Refusal::UnexpectedIdentity { peer: id("b"), expected });
        let alert = AlertDescription::CertificateUnknown;
        assert!(matches!(accepted, Err(HandshakeError::RefusedByPeer(got)) if got == alert), "{accepted:?}");
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let root = authority();
    let server = credential(&root, &id("server"));
    let nobody = Bare { key: None, ..Bare::new(Forged::new(vec![]).sign(&root)) };
    let (result, _) = serve(&server, nobody.client()).await;
    assert_eq!(refusal(result), Refusal::Identity(PeerIdError::NoCertificate));
}

#[tokio::test]
async fn a_certificate_is_worth_nothing_without_its_key() {
    let root = authority();
    let ours = credential(&root, &id("ours"));
    let stolen = Forged::new(vec![uri(id("a").as_str())]).sign(&root);
    let own = Forged::new(vec![]).sign(&root);
    let thief = Bare::new(Arc::new(CertifiedKey::new(stolen.cert.clone(), own.key.clone())));
    let (result, _) = serve(&ours, thief.clone().client()).await;
    assert_eq!(refusal(result), Refusal::BadSignature);
    let (result, _) = dial(&ours, &[id("a")], thief.server()).await;
    assert_eq!(refusal(result), Refusal::BadSignature);
}

#[tokio::test]
async fn http2_is_required_of_both_sides() {
    let root = authority();
    let ours = credential(&root, &id("ours"));
    let peer = Bare::new(Forged::new(vec![uri(id("a").as_str())]).sign(&root));
    for alpn in [vec![], vec![b"http/1.1".to_vec()]] {
        let peer = Bare { alpn: alpn.clone(), ..peer.clone() };
        let (result, heard) = serve(&ours, peer.clone().client()).await;
        assert!(matches!(result, Err(HandshakeError::NoHttp2 | HandshakeError::Tls(_))), "{alpn:?}: {result:?}");
        assert!(matches!(heard, HandshakeError::RefusedByPeer(_)), "{alpn:?}: {heard:?}");
        let (result, _) = dial(&ours, &[id("a")], peer.server()).await;
        assert!(
            matches!(result, Err(HandshakeError::NoHttp2 | HandshakeError::RefusedByPeer(_))),
            "{alpn:?}: {result:?}"
        );
    }
    let both = Bare { alpn: vec![b"http/1.1".to_vec(), b"h2".to_vec()], ..peer };
    let (result, _) = serve(&ours, both.clone().client()).await;
    assert_eq!(result.unwrap(), id("a"));
    let (result, _) = dial(&ours, &[id("a")], both.server()).await;
    assert_eq!(result.unwrap(), id("a"));
}

#[tokio::test]
async fn tls_1_2_is_refused_by_both_sides() {
    let root = authority();
    let ours = credential(&root, &id("ours"));
    let peer = Bare::new(Forged::new(vec![uri(id("a").as_str())]).sign(&root));
    let old = Bare { versions: TLS12, ..peer };
    let (result, heard) = serve(&ours, old.clone().client()).await;
    assert!(matches!(result, Err(HandshakeError::Tls(_))), "{result:?}");
    assert!(matches!(heard, HandshakeError::RefusedByPeer(AlertDescription::ProtocolVersion)), "{heard:?}");
    let (result, _) = dial(&ours, &[id("a")], old.server()).await;
    assert!(matches!(result, Err(HandshakeError::RefusedByPeer(AlertDescription::ProtocolVersion))), "{result:?}");
}

#[tokio::test]
async fn every_group_and_suite_of_the_peers_works_and_no_other() {
    let root = authority();
    let ours = credential(&root, &id("ours"));
    let peer = Bare::new(Forged::new(vec![uri(id("a").as_str())]).sign(&root));
    let groups = [
        (kx_group::X25519MLKEM768, true),
        (kx_group::X25519, true),
        (kx_group::SECP256R1, true),
        (kx_group::SECP384R1, false),
    ];
    let suites = [
        (cipher_suite::TLS13_AES_256_GCM_SHA384, true),
        (cipher_suite::TLS13_AES_128_GCM_SHA256, true),
        (cipher_suite::TLS13_CHACHA20_POLY1305_SHA256, false),
    ];
    let choices = groups
        .map(|(group, works)| (rustls::crypto::CryptoProvider { kx_groups: vec![group], ..provider() }, works))
        .into_iter()
        .chain(suites.map(|(suite, works)| {
            (rustls::crypto::CryptoProvider { cipher_suites: vec![suite], ..provider() }, works)
        }));
    for (provider, works) in choices {
        let name = format!("{:?} {:?}", provider.kx_groups, provider.cipher_suites);
        let peer = Bare { provider, versions: TLS13, ..peer.clone() };
        let (served, _) = serve(&ours, peer.clone().client()).await;
        let (dialled, _) = dial(&ours, &[id("a")], peer.server()).await;
        assert_eq!((served.is_ok(), dialled.is_ok()), (works, works), "{name}: {served:?} {dialled:?}");
    }
}

#[tokio::test]
async fn the_root_can_be_replaced_without_a_failed_handshake() {
    let (old, new) = (authority(), authority());
    let during = |signer: &Authority, trusted: &Authority, name: &str| {
        let (key, mut issued) = issue(signer, &id(name));
        issued.roots.extend(issue(trusted, &id(name)).1.roots);
        Credential::new(&id(name), key, issued, &Clock::system()).unwrap()
    };
    let before = credential(&old, &id("before"));
    let early = during(&old, &new, "early");
    let late = during(&new, &old, "late");
    let after = credential(&new, &id("after"));
    for (client, server, works) in [
        (&before, &early, true),
        (&early, &before, true),
        (&early, &late, true),
        (&late, &early, true),
        (&late, &after, true),
        (&after, &late, true),
        (&before, &after, false),
        (&after, &before, false),
    ] {
        let (near, far) = duplex(64 * 1024);
        let expected = [server.id().clone()];
        let (opened, accepted) = tokio::join!(connect(near, client, ADDRESS, &expected), accept(far, server));
        assert_eq!((opened.is_ok(), accepted.is_ok()), (works, works), "{client:?} {server:?}");
    }
}

#[tokio::test]
async fn the_credentials_clock_decides() {
    let root = authority();
    let ours = id("ours");
    let (key, issued) = issue(&root, &ours);
    let time = Arc::new(std::sync::Mutex::new(SystemTime::now()));
    let clock = Clock::from_fn({
        let time = time.clone();
        move || *time.lock().unwrap()
    });
    let server = Credential::new(&ours, key, issued, &clock).unwrap();
    let client = Bare::new(Forged::new(vec![uri(id("a").as_str())]).sign(&root));
    let (result, _) = serve(&server, client.clone().client()).await;
    assert_eq!(result.unwrap(), id("a"));
    *time.lock().unwrap() += 2 * HOUR;
    let (result, _) = serve(&server, client.client()).await;
    assert_eq!(refusal(result), Refusal::Expired);
}

#[test]
fn an_issued_certificate_is_checked_before_use() {
    let root = authority();
    let clock = Clock::system();
    let (key, issued) = issue(&root, &id("a"));
    let error = Credential::new(&id("b"), key, issued.clone(), &clock).unwrap_err();
    assert!(matches!(error, crate::CredentialError::WrongIdentity { .. }), "{error}");

    let (other_key, _) = issue(&root, &id("a"));
    let error = Credential::new(&id("a"), other_key, issued, &clock).unwrap_err();
    assert!(matches!(error, crate::CredentialError::WrongKey(_)), "{error}");

    let (key, mut foreign) = issue(&root, &id("a"));
    foreign.roots = issue(&authority(), &id("a")).1.roots;
    let error = Credential::new(&id("a"), key, foreign, &clock).unwrap_err();
    assert!(matches!(error, crate::CredentialError::Refused(Refusal::UnknownIssuer)), "{error}");

    let (key, issued) = issue(&root, &id("a"));
    let late = Clock::from_fn(|| SystemTime::now() + 25 * HOUR);
    let error = Credential::new(&id("a"), key, issued, &late).unwrap_err();
    assert!(matches!(error, crate::CredentialError::Refused(Refusal::Expired)), "{error}");
}

#[test]
fn no_key_is_printed() {
    let root = authority();
    let key = crate::key::PrivateKey::generate().unwrap();
    assert_eq!(format!("{key:?}"), "PrivateKey(redacted)");
    let credential = credential(&root, &id("a"));
    let text = format!("{credential:?} {root:?} {:?}", root.key_pem());
    assert!(!text.contains("key:") && !text.contains("PRIVATE"), "{text}");
}
