//! Who a token belongs to, by the API server's word (TokenReview).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use jsonwebtoken::dangerous::insecure_decode_claims;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::Api;
use kube::api::PostParams;
use mesh_identity::Clock;
use serde::Deserialize;
use tokio::sync::Semaphore;

use super::reviewed::{Answer, Reviewed};
use crate::ca::limit::Limiter;
use crate::ca::token::{Audience, MAX_TOKEN_BYTES, SUBJECT_PREFIX, TokenError};
use crate::ca::{AuthenticationError, BoundPod, Caller};
use crate::ingest::Cluster;
use crate::ingest::kubernetes::describe;

/// Reviews at a time; others wait. With answers in milliseconds that is some thousand per second.
const MAX_REVIEWS: usize = 32;
/// Time for an answer, the wait for a turn included.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Reviews for one address: as many at once as could share a node's, or a gateway's, then five per second. Each asks again
/// once a minute at most for a token that is good.
const BURST: u32 = 100;
const INTERVAL: Duration = Duration::from_millis(200);
/// How long after its end the API server may still accept a token, for clocks that differ.
const LEEWAY: Duration = Duration::from_secs(60);
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Asks the API server about tokens. Cheap to clone; clones share what they were told.
#[derive(Clone)]
pub struct TokenReviewer(Arc<Inner>);

struct Inner {
    api: Api<TokenReview>,
    audiences: Vec<String>,
    reviewed: Reviewed,
    turns: Semaphore,
    limiter: Limiter<IpAddr>,
    clock: Clock,
}

impl std::fmt::Debug for TokenReviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenReviewer").field("audiences", &self.0.audiences).finish_non_exhaustive()
    }
}

impl TokenReviewer {
    /// Accepts tokens of service accounts of `cluster` for one of `audiences`.
    pub fn new(cluster: &Cluster, audiences: Vec<String>, clock: Clock) -> Self {
        Self::with(Api::all(cluster.client()), audiences, clock)
    }

    fn with(api: Api<TokenReview>, audiences: Vec<String>, clock: Clock) -> Self {
        Self(Arc::new(Inner {
            api,
            audiences,
            reviewed: Reviewed::default(),
            turns: Semaphore::new(MAX_REVIEWS),
            limiter: Limiter::new(INTERVAL, BURST),
            clock,
        }))
    }

    /// Says whose token this is, which came from `peer`.
    ///
    /// # Errors
    /// The API server does not accept it, or cannot be asked, or has been asked too often for this peer.
    pub async fn review(&self, token: &str, peer: Option<IpAddr>) -> Result<Caller, AuthenticationError> {
        let now = self.0.clock.now();
        let expires = glance(token, &self.0.audiences, now)?;
        let slot = self.0.reviewed.slot(token, now);
        let answer = slot.get_or_init(|| async {
            // Anybody may send tokens that nobody has signed: the API server must not pay for all of them.
            if !self.0.limiter.admit(network(peer), Instant::now()) {
                return Answer::failed(AuthenticationError::TooOften, now);
            }
            match self.0.ask(token).await {
                Ok(caller) => Answer::accepted(caller, now, expires),
                Err(error) => Answer::failed(error, now),
            }
        });
        answer.await.result.clone()
    }
}

impl Inner {
    async fn ask(&self, token: &str) -> Result<Caller, AuthenticationError> {
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), audiences: Some(self.audiences.clone()) },
            ..TokenReview::default()
        };
        let answer = tokio::time::timeout(TIMEOUT, async {
            // Never closed.
            let _turn = self.turns.acquire().await;
            self.api.create(&PostParams::default(), &review).await
        });
        let unavailable = |reason: String| {
            tracing::warn!(reason, "the API server cannot be asked about a token");
            // What exactly is wrong between it and us is none of the caller's business.
            AuthenticationError::Unavailable
        };
        let answer = answer.await.map_err(|_| unavailable(format!("no answer within {TIMEOUT:?}")))?;
        let status = answer.map_err(|error| unavailable(describe(&error)))?.status.unwrap_or_default();
        caller(&status, &self.audiences).map_err(|reason| AuthenticationError::NotAccepted { reason })
    }
}

/// Whose reviews are counted together: those of one IPv4 address, or of one IPv6 /64, which a host may use all of.
fn network(peer: Option<IpAddr>) -> IpAddr {
    match peer.map(|peer| peer.to_canonical()) {
        Some(IpAddr::V6(address)) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (!0 << 64))),
        Some(address @ IpAddr::V4(_)) => address,
        None => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    }
}

/// The claims that tell, before anybody is asked, that a token cannot be good.
#[derive(Deserialize)]
struct Claims {
    exp: u64,
    aud: Audience,
}

/// Looks at what the token says of itself, which nobody has vouched for: enough to refuse what is old or meant for
/// others without asking the API server. Returns when it ends.
fn glance(token: &str, audiences: &[String], now: SystemTime) -> Result<SystemTime, TokenError> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(TokenError::TooLong { length: token.len() });
    }
    // The library's own words may repeat the token.
    let malformed =
        |_| TokenError::Malformed("it is not a service-account token with an end and an audience".to_owned());
    let claims: Claims = insecure_decode_claims(token).map_err(malformed)?;
    if !claims.aud.names().iter().any(|audience| audiences.contains(audience)) {
        return Err(TokenError::Audience);
    }
    let ends = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(claims.exp));
    let ends = ends.ok_or_else(|| TokenError::Malformed("it never ends".to_owned()))?;
    if now.duration_since(ends).is_ok_and(|late| late >= LEEWAY) {
        return Err(TokenError::Expired);
    }
    Ok(ends)
}

/// Who the API server says that the token belongs to, or why it is not accepted.
fn caller(status: &TokenReviewStatus, audiences: &[String]) -> Result<Caller, String> {
    if status.authenticated != Some(true) {
        /// Longest reason that is passed on.
        const LONGEST: usize = 200;
        let reason = status.error.as_deref().filter(|reason| !reason.is_empty()).unwrap_or("it gives no reason");
        return Err(reason.chars().take(LONGEST).collect());
    }
    // An API server that does not know of audiences names none: then the token may be anybody's.
    let confirmed = status.audiences.as_deref().unwrap_or_default();
    if !confirmed.iter().any(|audience| audiences.contains(audience)) {
        return Err("it is not for this audience".to_owned());
    }
    let user = status.user.clone().unwrap_or_default();
    let name = user.username.unwrap_or_default();
    let account = name.strip_prefix(SUBJECT_PREFIX).and_then(|account| account.split_once(':'));
    let Some((namespace, service_account)) =
        account.filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty())
    else {
        return Err("it is not a service account's".to_owned());
    };
    let extra = user.extra.unwrap_or_default();
    // A token that names a pod without its uid could be one of an earlier pod: it counts as bound to none.
    let pod = one(&extra, POD_NAME).zip(one(&extra, POD_UID));
    Ok(Caller {
        namespace: namespace.to_owned(),
        service_account: service_account.to_owned(),
        pod: pod.map(|(name, uid)| BoundPod { name, uid: Some(uid) }),
        node: one(&extra, NODE_NAME),
    })
}

/// The one value of a key; none where there are several.
fn one(extra: &BTreeMap<String, Vec<String>>, key: &str) -> Option<String> {
    match extra.get(key).map(Vec::as_slice) {
        Some([value]) if !value.is_empty() => Some(value.clone()),
        Some(_) | None => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;
    use crate::ca::{AUDIENCE, TokenKey};

    fn audiences() -> Vec<String> {
        vec![AUDIENCE.to_owned()]
    }

    fn accepted(username: &str, extra: &[(&str, &[&str])]) -> TokenReviewStatus {
        let values = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect();
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(audiences()),
            user: Some(UserInfo {
                username: Some(username.to_owned()),
                extra: Some(extra.iter().map(|(key, list)| ((*key).to_owned(), values(list))).collect()),
                ..UserInfo::default()
            }),
            ..TokenReviewStatus::default()
        }
    }

    const ACCOUNT: &str = "system:serviceaccount:culvert-system:ztunnel";

    #[test]
    fn a_bound_token_names_pod_and_node() {
        let extra: [(&str, &[&str]); 3] = [(POD_NAME, &["ztunnel-1"]), (POD_UID, &["u1"]), (NODE_NAME, &["node-1"])];
        let caller = caller(&accepted(ACCOUNT, &extra), &audiences()).unwrap();
        assert_eq!((caller.namespace.as_str(), caller.service_account.as_str()), ("culvert-system", "ztunnel"));
        assert_eq!(caller.pod, Some(BoundPod { name: "ztunnel-1".to_owned(), uid: Some("u1".to_owned()) }));
        assert_eq!(caller.node.as_deref(), Some("node-1"));
    }

    #[test]
    fn half_of_a_binding_is_none() {
        let halves: [&[(&str, &[&str])]; 4] = [
            &[],
            &[(POD_NAME, &["ztunnel-1"])],
            &[(POD_NAME, &["ztunnel-1"]), (POD_UID, &["u1", "u2"])],
            &[(POD_NAME, &["ztunnel-1"]), (POD_UID, &[""])],
        ];
        for extra in halves {
            assert_eq!(caller(&accepted(ACCOUNT, extra), &audiences()).unwrap().pod, None, "{extra:?}");
        }
    }

    #[test]
    fn what_is_not_confirmed_is_refused() {
        let refused = |change: fn(&mut TokenReviewStatus)| {
            let mut status = accepted(ACCOUNT, &[]);
            change(&mut status);
            caller(&status, &audiences()).unwrap_err()
        };
        assert!(refused(|status| status.authenticated = None).contains("no reason"));
        let expired = refused(|status| {
            status.authenticated = Some(false);
            status.error = Some("service account token has expired".to_owned());
        });
        assert!(expired.contains("expired"));
        assert!(refused(|status| status.audiences = None).contains("audience"));
        assert!(refused(|status| status.audiences = Some(vec!["api".to_owned()])).contains("audience"));
        assert!(refused(|status| status.user = None).contains("service account"));
        for name in ["system:node:node-1", "system:serviceaccount:a", "system:serviceaccount::b", "jane"] {
            let status = accepted(name, &[]);
            assert!(caller(&status, &audiences()).unwrap_err().contains("service account"), "{name}");
        }
    }

    /// A reviewer with an API server that accepts no token, and how often that was asked.
    fn refusing() -> (TokenReviewer, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let service = Refusing(asked.clone());
        let api = Api::all(kube::Client::new(service, "default"));
        (TokenReviewer::with(api, audiences(), Clock::system()), asked)
    }

    #[derive(Clone)]
    struct Refusing(Arc<AtomicUsize>);

    impl tower_service::Service<http::Request<kube::client::Body>> for Refusing {
        type Response = http::Response<kube::client::Body>;
        type Error = std::convert::Infallible;
        type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

        fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
            std::task::Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Request<kube::client::Body>) -> Self::Future {
            self.0.fetch_add(1, Ordering::SeqCst);
            let review = TokenReview {
                status: Some(TokenReviewStatus { authenticated: Some(false), ..TokenReviewStatus::default() }),
                ..TokenReview::default()
            };
            let body = serde_json::to_vec(&review).unwrap();
            std::future::ready(Ok(http::Response::new(kube::client::Body::from(body))))
        }
    }

    fn token(account: &str) -> String {
        let (name, minute) = (account.to_owned(), Duration::from_secs(60));
        let caller = Caller { namespace: "a".to_owned(), service_account: name, pod: None, node: None };
        TokenKey::generate().unwrap().mint(&caller, AUDIENCE, minute, SystemTime::now()).unwrap()
    }

    #[tokio::test]
    async fn a_token_that_is_not_accepted_is_asked_about_once_in_a_while() {
        let (reviewer, asked) = refusing();
        let token = token("b");
        for _ in 0..5 {
            let error = reviewer.review(&token, None).await.unwrap_err();
            assert!(matches!(error, AuthenticationError::NotAccepted { .. }), "{error}");
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn an_address_cannot_have_the_api_server_asked_without_end() {
        let (reviewer, asked) = refusing();
        let (noisy, other) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let mut too_often = 0;
        for number in 0..3 * BURST {
            let error = reviewer.review(&token(&number.to_string()), Some(noisy)).await.unwrap_err();
            too_often += usize::from(error == AuthenticationError::TooOften);
        }
        assert!(too_often > 0);
        let before = asked.load(Ordering::SeqCst);
        assert_eq!(before + too_often, 3 * BURST as usize);
        let error = reviewer.review(&token("c"), Some(other)).await.unwrap_err();
        assert!(matches!(error, AuthenticationError::NotAccepted { .. }), "{error}");
        assert_eq!(asked.load(Ordering::SeqCst), before + 1);
    }

    #[test]
    fn a_network_of_ipv6_counts_as_one_peer() {
        let of = |text: &str| network(Some(text.parse().unwrap()));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:0:0:2"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }

    #[test]
    fn a_glance_refuses_what_cannot_be_good() {
        let now = SystemTime::now();
        let minute = Duration::from_secs(60);
        let key = TokenKey::generate().unwrap();
        let caller = Caller { namespace: "a".to_owned(), service_account: "b".to_owned(), pod: None, node: None };
        let token = key.mint(&caller, AUDIENCE, minute, now).unwrap();
        assert!(glance(&token, &audiences(), now).unwrap() <= now + minute);
        assert_eq!(glance(&token, &audiences(), now + minute + LEEWAY), Err(TokenError::Expired));
        assert_eq!(glance(&token, &["other".to_owned()], now), Err(TokenError::Audience));
        assert!(matches!(glance(&"x".repeat(9000), &audiences(), now), Err(TokenError::TooLong { .. })));
        // Ends that no clock reaches, with which anybody may come.
        let ends = |end: u64| {
            let claims = base64::Engine::encode(
                &base64::prelude::BASE64_URL_SAFE_NO_PAD,
                format!(r#"{{"exp":{end},"aud":"{AUDIENCE}"}}"#),
            );
            let (head, rest) = token.split_once('.').unwrap();
            let (_, signature) = rest.split_once('.').unwrap();
            format!("{head}.{claims}.{signature}")
        };
        let last = u64::try_from(i64::MAX).unwrap();
        for end in [last, last - 1, last - 60, u64::MAX] {
            let seen = glance(&ends(end), &audiences(), now);
            assert!(seen.is_ok() || matches!(seen, Err(TokenError::Malformed(_))), "{end}: {seen:?}");
        }
        for text in ["", "a.b.c", "not a token", "e30.e30.e30"] {
            assert!(matches!(glance(text, &audiences(), now), Err(TokenError::Malformed(_))), "{text}");
        }
    }
}
