use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn caller() -> Caller {
    Caller {
        namespace: "culvert-system".to_owned(),
        service_account: "ztunnel".to_owned(),
        pod: Some(BoundPod { name: "ztunnel-x".to_owned(), uid: Some("u-1".to_owned()) }),
        node: Some("node-1".to_owned()),
    }
}

fn part(value: &Value) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(value.to_string())
}

fn claims_of(token: &str) -> Value {
    let body = token.split('.').nth(1).unwrap();
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(body).unwrap()).unwrap()
}

/// A token of `key` with the claims of a good one, changed by `change`.
fn changed(key: &TokenKey, change: impl FnOnce(&mut Value)) -> String {
    let mut claims = claims_of(&key.mint(&caller(), AUDIENCE, HOUR, SystemTime::now()).unwrap());
    change(&mut claims);
    encode(&Header::new(Algorithm::ES256), &claims, &key.sign).unwrap()
}

#[test]
fn a_token_says_who_it_is_for() {
    let key = TokenKey::generate().unwrap();
    let now = SystemTime::now();
    let token = key.mint(&caller(), AUDIENCE, HOUR, now).unwrap();
    assert_eq!(key.verify(&token, AUDIENCE, now).unwrap(), caller());
    let again = TokenKey::from_pem(key.expose_pem()).unwrap();
    assert_eq!(again.verify(&token, AUDIENCE, now).unwrap(), caller());

    let unbound = Caller { pod: None, node: None, ..caller() };
    let token = key.mint(&unbound, AUDIENCE, HOUR, now).unwrap();
    assert_eq!(key.verify(&token, AUDIENCE, now).unwrap(), unbound);
}

#[test]
fn a_token_has_the_shape_of_kubernetes() {
    let key = TokenKey::generate().unwrap();
    let now = SystemTime::now();
    let claims = claims_of(&key.mint(&caller(), AUDIENCE, HOUR, now).unwrap());
    let iat = seconds(now);
    let expected = json!({
        "iss": ISSUER,
        "sub": "system:serviceaccount:culvert-system:ztunnel",
        "aud": ["istio-ca"],
        "exp": iat + 3600,
        "nbf": iat,
        "iat": iat,
        "kubernetes.io": {
            "namespace": "culvert-system",
            "pod": {"name": "ztunnel-x", "uid": "u-1"},
            "serviceaccount": {"name": "ztunnel"},
            "node": {"name": "node-1"},
        },
    });
    assert_eq!(claims, expected);
}

#[test]
fn an_audience_may_be_one_string_and_claims_may_be_more() {
    let key = TokenKey::generate().unwrap();
    let token = changed(&key, |claims| {
        claims["aud"] = json!("istio-ca");
        claims["jti"] = json!("7");
        claims["kubernetes.io"]["serviceaccount"]["uid"] = json!("u-2");
        claims["kubernetes.io"]["warnafter"] = json!(1);
        claims["kubernetes.io"]["node"]["uid"] = json!("u-3");
    });
    assert_eq!(key.verify(&token, AUDIENCE, SystemTime::now()).unwrap(), caller());
}

#[test]
fn time_is_checked() {
    let key = TokenKey::generate().unwrap();
    let now = SystemTime::now();
    let token = key.mint(&caller(), AUDIENCE, HOUR, now).unwrap();
    let at = |time| key.verify(&token, AUDIENCE, time);
    assert!(at(now + HOUR - Duration::from_secs(2)).is_ok());
    assert_eq!(at(now + HOUR), Err(TokenError::Expired));
    assert_eq!(at(now + 100 * HOUR), Err(TokenError::Expired));
    assert!(at(now - Duration::from_secs(30)).is_ok(), "clocks differ a little");
    assert_eq!(at(now - Duration::from_secs(90)), Err(TokenError::NotYetValid));
}

#[test]
fn tokens_of_others_are_refused() {
    let key = TokenKey::generate().unwrap();
    let now = SystemTime::now();
    let refused = |token: &str| key.verify(token, AUDIENCE, now).unwrap_err();
    let other = TokenKey::generate().unwrap();
    assert_eq!(refused(&other.mint(&caller(), AUDIENCE, HOUR, now).unwrap()), TokenError::Signature);
    assert_eq!(refused(&key.mint(&caller(), "vault", HOUR, now).unwrap()), TokenError::Audience);
    assert_eq!(refused(&changed(&key, |claims| claims["iss"] = json!("https://kubernetes"))), TokenError::Issuer);
    assert_eq!(
        refused(&changed(&key, |claims| claims["sub"] = json!("system:serviceaccount:a:b"))),
        TokenError::Subject
    );
}

#[test]
fn another_algorithm_is_refused() {
    let key = TokenKey::generate().unwrap();
    let now = SystemTime::now();
    let good = key.mint(&caller(), AUDIENCE, HOUR, now).unwrap();
    let claims = claims_of(&good);
    let refused = |token: &str| key.verify(token, AUDIENCE, now).unwrap_err();

    for alg in ["none", "None", "NONE", "HS256", "RS256", "ES384"] {
        let header = part(&json!({"alg": alg, "typ": "JWT"}));
        for signature in ["", good.rsplit('.').next().unwrap()] {
            let error = refused(&format!("{header}.{}.{signature}", part(&claims)));
            assert!(matches!(error, TokenError::Algorithm | TokenError::Malformed(_)), "{alg}: {error}");
        }
    }
    // The public key taken for a shared secret.
    let public = KeyPair::from_pem(key.expose_pem()).unwrap().public_key_raw().to_vec();
    let confused = encode(&Header::new(Algorithm::HS256), &claims, &EncodingKey::from_secret(&public)).unwrap();
    assert_eq!(refused(&confused), TokenError::Algorithm);
}

#[test]
fn what_was_changed_or_is_malformed_is_refused() {
    let key = TokenKey::generate().unwrap();
    let now = SystemTime::now();
    let good = key.mint(&caller(), AUDIENCE, HOUR, now).unwrap();
    let refused = |token: &str| key.verify(token, AUDIENCE, now).unwrap_err();

    let parts: Vec<&str> = good.split('.').collect();
    let mut claims = claims_of(&good);
    claims["kubernetes.io"]["namespace"] = json!("kube-system");
    claims["sub"] = json!("system:serviceaccount:kube-system:ztunnel");
    assert_eq!(refused(&format!("{}.{}.{}", parts[0], part(&claims), parts[2])), TokenError::Signature);
    for text in ["", "a", "a.b", "a.b.c", "....", &good[..good.len() / 2], &format!("{good}.x")] {
        let error = refused(text);
        assert!(!text.contains('a') || !error.to_string().contains(&good), "{error}");
    }
    assert_eq!(refused(&"a".repeat(100_000)), TokenError::TooLong { length: 100_000 });
    for claim in ["exp", "aud", "iss", "sub", "kubernetes.io"] {
        let token = changed(&key, |claims| drop(claims.as_object_mut().unwrap().remove(claim)));
        assert!(matches!(refused(&token), TokenError::Malformed(_)), "{claim}");
    }
    let token = changed(&key, |claims| claims["exp"] = json!("tomorrow"));
    assert!(matches!(refused(&token), TokenError::Malformed(_)));
}

#[test]
fn only_a_p256_key_will_do_and_it_is_not_printed() {
    let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap().serialize_pem();
    for text in ["", "x", p384.as_str()] {
        assert_eq!(TokenKey::from_pem(text).unwrap_err(), TokenError::Key);
    }
    assert_eq!(format!("{:?}", TokenKey::generate().unwrap()), "TokenKey(redacted)");
}
