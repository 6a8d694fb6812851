//! Certificates that prove nothing, or too much.

use std::net::IpAddr;
use std::slice;
use std::time::SystemTime;

use rcgen::{ExtendedKeyUsagePurpose, SanType};

use crate::forge::{Forged, HOUR, Wish, names, uri};
use crate::scene::{ECHO, Scene};
use crate::wire::{Answer, Peer, connect, inside};

#[test]
fn only_one_identity_of_the_mesh_that_is_valid_now_is_let_in() {
    let scene = Scene::start();
    let own = uri(&scene.peer.identity());
    let sign = |wish: Wish| wish.signed(&scene.cluster);
    let dns = SanType::DnsName("target.default.svc".try_into().unwrap());
    let now = SystemTime::now();
    let two = names(&[own.clone(), uri(&scene.victim.identity())]);
    let expired = Wish { not_before: now - 2 * HOUR, not_after: now - HOUR, ..names(slice::from_ref(&own)) };
    let future = Wish { not_before: now + HOUR, not_after: now + 2 * HOUR, ..names(slice::from_ref(&own)) };
    let servers = Wish { uses: vec![ExtendedKeyUsagePurpose::ServerAuth], ..names(slice::from_ref(&own)) };
    let elsewhere = names(&[uri("spiffe://elsewhere/ns/default/sa/peer")]);
    let broken =
        Forged { chain: vec![vec![0x30, 0x03, 0x02, 0x01, 0x01].into()], ..sign(names(slice::from_ref(&own))) };
    let refused: Vec<(&str, Option<Forged>)> = vec![
        ("no certificate", None),
        ("two identities", Some(sign(two))),
        ("no name", Some(sign(names(&[])))),
        ("a host's name alone", Some(sign(names(slice::from_ref(&dns))))),
        ("another form", Some(sign(names(&[uri("spiffe://cluster.local/default/peer")])))),
        ("another scheme", Some(sign(names(&[uri("https://cluster.local/ns/default/sa/peer")])))),
        ("another trust domain", Some(sign(elsewhere))),
        ("expired", Some(sign(expired))),
        ("not valid yet", Some(sign(future))),
        ("for servers alone", Some(sign(servers))),
        ("self-signed", Some(names(slice::from_ref(&own)).self_signed())),
        ("not a certificate", Some(broken)),
    ];
    let (target, to) = (scene.target.at(15008), scene.target.at(ECHO));
    inside(scene.peer.network(), async || {
        for (name, certificate) in &refused {
            let answer = match Peer::tls(target, certificate.as_ref()).await {
                Err(_) => Answer::Closed,
                Ok(mut peer) => {
                    peer.send(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0", &connect(1, to)[..]].concat())
                        .await;
                    peer.answer(1).await
                }
            };
            assert_eq!(answer, Answer::Closed, "{name}");
        }
        // Names of other kinds beside the identity are no business of the mesh (X.509-SVID section 2).
        let beside = sign(names(&[own, dns, SanType::IpAddress(IpAddr::from([10, 0, 0, 1]))]));
        for good in [scene.certificate(), beside] {
            let mut peer = Peer::http2(target, &good).await.unwrap();
            peer.send(&connect(1, to)).await;
            assert_eq!(peer.answer(1).await, Answer::Status(200));
        }
    });
    scene.victim_is_well("bad certificates");
    scene.ends_as_it_was(32 << 10);
}
