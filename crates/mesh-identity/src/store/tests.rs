//! The store under paused time: the wall clock follows tokio's.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures_util::future::{BoxFuture, join_all};
use mesh_model::SpiffeId;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

use super::{CertificateError, Options, State, Store};
use crate::issuer::certificates_from_pem;
use crate::testing::{HOUR, authority, id};
use crate::{Authority, Clock, CsrPublicKey, IssueError, IssuedCertificate, Issuer};

const LIFE: Duration = Duration::from_secs(24 * 60 * 60);

/// How the authority of a test behaves.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Well,
    Away,
    Refusing,
    Silent,
    Panicking,
}

struct FakeIssuer {
    authority: Mutex<Arc<Authority>>,
    clock: Clock,
    mode: Mutex<Mode>,
    /// When each request arrived.
    calls: Mutex<Vec<Instant>>,
    keys: Mutex<HashSet<String>>,
    /// One permit lets one request pass.
    gate: Semaphore,
    running: AtomicUsize,
    most_running: AtomicUsize,
}

impl FakeIssuer {
    fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }

    fn calls(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    async fn answer(&self, id: &SpiffeId, csr: String) -> Result<IssuedCertificate, IssueError> {
        self.gate.acquire().await.unwrap().forget();
        self.gate.add_permits(1);
        let mode = *self.mode.lock().unwrap();
        match mode {
            Mode::Well => {
                self.keys.lock().unwrap().insert(csr.clone());
                let authority = self.authority.lock().unwrap().clone();
                let key = CsrPublicKey::from_pem(&csr).unwrap();
                Ok(authority.sign(&key, id, LIFE, self.clock.now()).unwrap())
            }
            Mode::Away => Err(IssueError::Unavailable { reason: "away".to_owned() }),
            Mode::Refusing => Err(IssueError::Refused { reason: "not yours".to_owned() }),
            Mode::Silent => std::future::pending().await,
            Mode::Panicking => panic!("the issuer is broken"),
        }
    }
}

impl Issuer for FakeIssuer {
    fn issue<'a>(&'a self, id: &'a SpiffeId, csr: String) -> BoxFuture<'a, Result<IssuedCertificate, IssueError>> {
        Box::pin(async move {
            self.calls.lock().unwrap().push(Instant::now());
            let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_running.fetch_max(running, Ordering::SeqCst);
            let answer = self.answer(id, csr).await;
            self.running.fetch_sub(1, Ordering::SeqCst);
            answer
        })
    }
}

/// A store over an authority that behaves well, and the authority.
fn store() -> (Store, Arc<FakeIssuer>) {
    let (began, base) = (Instant::now(), SystemTime::now());
    let clock = Clock::from_fn(move || base + began.elapsed());
    let issuer = Arc::new(FakeIssuer {
        authority: Mutex::new(Arc::new(authority())),
        clock: clock.clone(),
        mode: Mutex::new(Mode::Well),
        calls: Mutex::default(),
        keys: Mutex::default(),
        gate: Semaphore::new(1),
        running: AtomicUsize::new(0),
        most_running: AtomicUsize::new(0),
    });
    (Store::new(issuer.clone(), Options { clock, ..Options::default() }), issuer)
}

#[tokio::test(start_paused = true)]
async fn one_request_serves_everybody_who_waits() {
    let (store, issuer) = store();
    let ids = [id("a"), id("b")];
    let all = join_all((0..100).map(|n| store.certificate(&ids[n % 2]))).await;
    let serials: HashSet<String> = all.into_iter().map(|c| c.unwrap().serial().to_owned()).collect();
    assert_eq!((serials.len(), issuer.calls()), (2, 2));
    store.certificate(&ids[0]).await.unwrap();
    assert_eq!(issuer.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn renewed_at_about_half_of_life_with_a_new_key() {
    let (store, issuer) = store();
    let held = store.retain(&id("a"));
    let first = held.certificate().await.unwrap();
    sleep(LIFE.mul_f64(0.39)).await;
    assert_eq!(issuer.calls(), 1);
    sleep(LIFE.mul_f64(0.22)).await;
    assert_eq!(issuer.calls(), 2);
    let second = held.certificate().await.unwrap();
    assert_ne!(first.serial(), second.serial());
    assert!(second.not_after() > first.not_after() + LIFE.mul_f64(0.39));
    assert_eq!(issuer.keys.lock().unwrap().len(), 2);
    // And so it goes on.
    sleep(LIFE * 10).await;
    assert!((16..=27).contains(&issuer.calls()), "{}", issuer.calls());
    assert!(held.current().is_some());
}

#[tokio::test(start_paused = true)]
async fn renewals_are_spread() {
    let (store, issuer) = store();
    let held: Vec<_> = (0..50).map(|n| store.retain(&id(&format!("sa{n}")))).collect();
    for one in &held {
        one.certificate().await.unwrap();
    }
    issuer.calls.lock().unwrap().clear();
    sleep(LIFE.mul_f64(0.61)).await;
    let calls = issuer.calls.lock().unwrap().clone();
    assert_eq!(calls.len(), 50);
    assert!(calls[49] - calls[0] > HOUR, "{:?}", calls[49] - calls[0]);
}

#[tokio::test(start_paused = true)]
async fn the_certificate_at_hand_is_kept_while_the_authority_is_away() {
    let (store, issuer) = store();
    let held = store.retain(&id("a"));
    let first = held.certificate().await.unwrap();
    issuer.set(Mode::Away);
    sleep(LIFE.mul_f64(0.95)).await;
    let before = Instant::now();
    assert_eq!(held.certificate().await.unwrap().serial(), first.serial());
    assert_eq!(store.certificate(&id("a")).await.unwrap().serial(), first.serial());
    assert_eq!(before.elapsed(), Duration::ZERO);
    let status = &store.status()[0];
    assert_eq!(status.state, State::Valid);
    let failure = status.last_error.as_ref().unwrap();
    assert!(failure.error.contains("away") && failure.attempts > 10, "{failure:?}");

    issuer.set(Mode::Well);
    sleep(Duration::from_secs(61)).await;
    assert_ne!(held.certificate().await.unwrap().serial(), first.serial());
    assert!(store.status()[0].last_error.is_none());
}

#[tokio::test(start_paused = true)]
async fn an_expired_certificate_is_an_error_until_the_authority_is_back() {
    let (store, issuer) = store();
    let held = store.retain(&id("a"));
    held.certificate().await.unwrap();
    issuer.set(Mode::Away);
    sleep(LIFE + Duration::from_secs(1)).await;
    assert!(held.current().is_none());
    assert_eq!(store.status()[0].state, State::Expired);
    let before = Instant::now();
    match held.certificate().await {
        Err(CertificateError::Expired { id: who, last_error: Some(error) }) => {
            assert_eq!(who, id("a"));
            assert!(error.contains("away"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(before.elapsed(), Duration::from_secs(5));
    issuer.set(Mode::Well);
    held.certificate().await.unwrap();
    assert_eq!(store.status()[0].state, State::Valid);
}

#[tokio::test(start_paused = true)]
async fn attempts_back_off_exponentially_up_to_a_limit() {
    let (store, issuer) = store();
    issuer.set(Mode::Away);
    let _held = store.retain(&id("a"));
    sleep(Duration::from_secs(300)).await;
    let calls = issuer.calls.lock().unwrap().clone();
    let pauses: Vec<f64> = calls.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    for (n, pause) in pauses.iter().enumerate() {
        let full = (0.1 * 2_f64.powi(i32::try_from(n).unwrap())).min(5.0);
        assert!((full * 0.5 - 0.002..=full + 0.002).contains(pause), "pause {n}: {pause}, of {full}");
    }
    assert!((60..=130).contains(&calls.len()), "{}", calls.len());
}

#[tokio::test(start_paused = true)]
async fn an_identity_that_is_known_a_little_later_is_waited_for() {
    let (store, issuer) = store();
    issuer.set(Mode::Away);
    let waiting = tokio::spawn({
        let store = store.clone();
        async move { store.certificate(&id("a")).await }
    });
    sleep(Duration::from_secs(2)).await;
    assert!(!waiting.is_finished());
    issuer.set(Mode::Well);
    let before = Instant::now();
    waiting.await.unwrap().unwrap();
    assert!(before.elapsed() < Duration::from_secs(3));
}

#[tokio::test(start_paused = true)]
async fn a_first_certificate_is_waited_for_five_seconds() {
    let (store, issuer) = store();
    issuer.set(Mode::Silent);
    let before = Instant::now();
    let error = store.certificate(&id("a")).await.unwrap_err();
    let waited = Duration::from_secs(5);
    assert_eq!(error, CertificateError::Unavailable { id: id("a"), waited, last_error: None });
    assert_eq!(before.elapsed(), waited);
}

#[tokio::test(start_paused = true)]
async fn a_silent_authority_is_given_up_and_asked_again() {
    let (store, issuer) = store();
    issuer.set(Mode::Silent);
    let held = store.retain(&id("a"));
    sleep(Duration::from_secs(16)).await;
    assert!(store.status()[0].last_error.as_ref().unwrap().error.contains("no answer"));
    issuer.set(Mode::Well);
    sleep(Duration::from_secs(16)).await;
    assert!(held.current().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_broken_issuer_does_not_stop_the_store() {
    let (store, issuer) = store();
    issuer.set(Mode::Panicking);
    let held = store.retain(&id("a"));
    sleep(Duration::from_secs(1)).await;
    assert!(store.status()[0].last_error.as_ref().unwrap().error.contains("aborted"));
    issuer.set(Mode::Well);
    held.certificate().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_believed_when_repeated_and_tried_again_later() {
    let (store, issuer) = store();
    issuer.set(Mode::Refusing);
    let held = store.retain(&id("a"));
    let before = Instant::now();
    let error = held.certificate().await.unwrap_err();
    assert!(matches!(&error, CertificateError::Refused { reason, .. } if reason.contains("not yours")), "{error}");
    assert!(before.elapsed() < Duration::from_secs(1));
    assert_eq!(issuer.calls(), 4);
    issuer.set(Mode::Well);
    sleep(Duration::from_secs(5)).await;
    held.certificate().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_has_not_heard_of_the_pod_yet_fails_no_connection() {
    let (store, issuer) = store();
    issuer.set(Mode::Refusing);
    let held = store.retain(&id("a"));
    let waiting = tokio::spawn(async move { held.certificate().await });
    sleep(Duration::from_millis(50)).await;
    assert!(issuer.calls() >= 1, "it was refused once");
    issuer.set(Mode::Well);
    waiting.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_nobody_holds_is_dropped_with_its_key() {
    let (store, issuer) = store();
    let (first, second) = (store.retain(&id("a")), store.retain(&id("a")));
    let key = Arc::downgrade(&first.certificate().await.unwrap());
    drop(first);
    sleep(HOUR).await;
    assert!(key.upgrade().is_some());
    let third = second.clone();
    drop(second);
    sleep(HOUR).await;
    assert_eq!(store.status()[0].holders, 1);
    drop(third);
    sleep(Duration::from_secs(9)).await;
    assert!(key.upgrade().is_some(), "kept for a moment, for who comes back");
    sleep(Duration::from_secs(2)).await;
    assert!(key.upgrade().is_none());
    assert!(store.status().is_empty());
    assert_eq!(issuer.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_in_time_finds_the_certificate() {
    let (store, issuer) = store();
    for _ in 0..10 {
        store.certificate(&id("a")).await.unwrap();
        drop(store.retain(&id("a")));
        sleep(Duration::from_secs(8)).await;
    }
    assert_eq!(issuer.calls(), 1);
    sleep(Duration::from_secs(20)).await;
    assert!(store.status().is_empty());
    store.certificate(&id("a")).await.unwrap();
    assert_eq!(issuer.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_answer_for_an_identity_that_was_dropped_meanwhile_is_thrown_away() {
    let (store, issuer) = store();
    issuer.gate.acquire().await.unwrap().forget();
    drop(store.retain(&id("a")));
    sleep(Duration::from_secs(11)).await;
    assert!(store.status().is_empty());
    assert_eq!(issuer.calls(), 1);
    let held = store.retain(&id("a"));
    issuer.gate.add_permits(1);
    held.certificate().await.unwrap();
    assert_eq!(issuer.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn few_requests_run_at_one_time() {
    let (store, issuer) = store();
    issuer.gate.acquire().await.unwrap().forget();
    let held: Vec<_> = (0..50).map(|n| store.retain(&id(&format!("sa{n}")))).collect();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(issuer.calls(), 8);
    issuer.gate.add_permits(1);
    for one in &held {
        one.certificate().await.unwrap();
    }
    assert_eq!((issuer.calls(), issuer.most_running.load(Ordering::SeqCst)), (50, 8));
}

#[tokio::test(start_paused = true)]
async fn a_first_certificate_goes_before_renewals() {
    let (store, issuer) = store();
    let held: Vec<_> = (0..50).map(|n| store.retain(&id(&format!("sa{n}")))).collect();
    for one in &held {
        one.certificate().await.unwrap();
    }
    issuer.set(Mode::Silent);
    sleep(LIFE.mul_f64(0.7)).await;
    // Every place is taken by a renewal that hangs, and 42 more are due.
    issuer.set(Mode::Well);
    let before = Instant::now();
    let fresh = store.retain(&id("fresh"));
    while fresh.current().is_none() {
        sleep(Duration::from_millis(10)).await;
    }
    assert!(before.elapsed() < Duration::from_secs(16), "{:?}", before.elapsed());
}

#[tokio::test(start_paused = true)]
async fn new_roots_come_with_the_renewal() {
    let (store, issuer) = store();
    let held = store.retain(&id("a"));
    let before = held.certificate().await.unwrap();
    let both = {
        let new = Authority::generate("cluster.local", issuer.clock.now()).unwrap();
        let old_roots = issuer.authority.lock().unwrap().roots_pem();
        new.with_more_roots(&old_roots).unwrap()
    };
    *issuer.authority.lock().unwrap() = Arc::new(both);
    sleep(LIFE.mul_f64(0.61)).await;
    let after = held.certificate().await.unwrap();
    assert_eq!((before.roots().len(), after.roots().len()), (1, 2));
    assert!(after.roots().contains(&before.roots()[0]));
}

#[tokio::test(start_paused = true)]
async fn roots_that_change_in_their_file_renew_everything_until_it_fits() {
    let (store, issuer) = store();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    std::fs::write(&file, issuer.authority.lock().unwrap().roots_pem()).unwrap();
    let connector = Arc::new(crate::connector::Connector::new("https://localhost:1", &file).unwrap());
    let follows = tokio::spawn(crate::roots::follow(connector, store.clone()));
    let held: Vec<_> = (0..3).map(|n| store.retain(&id(&format!("sa{n}")))).collect();
    for one in &held {
        one.certificate().await.unwrap();
    }
    sleep(Duration::from_secs(60)).await;
    assert_eq!(issuer.calls(), 3);
    // Gone for a while, and back as it was.
    let text = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    sleep(Duration::from_secs(60)).await;
    std::fs::write(&file, text).unwrap();
    sleep(Duration::from_secs(60)).await;
    assert_eq!(issuer.calls(), 3);

    // The replica that is asked knows it a little later.
    let next = Arc::new(authority());
    std::fs::write(&file, next.roots_pem()).unwrap();
    sleep(Duration::from_secs(13)).await;
    assert_eq!(issuer.calls(), 6);
    *issuer.authority.lock().unwrap() = next.clone();
    sleep(Duration::from_secs(60)).await;
    assert_eq!(issuer.calls(), 9, "once more, and then they fit");
    let roots = certificates_from_pem(&next.roots_pem()).unwrap();
    for one in &held {
        assert_eq!(one.certificate().await.unwrap().roots(), roots);
    }

    // An authority that tells of others than the file has is not asked for ever.
    std::fs::write(&file, authority().roots_pem()).unwrap();
    sleep(HOUR).await;
    let asked = issuer.calls();
    assert!((12..=3 * 8).contains(&asked), "{asked}");
    sleep(HOUR).await;
    assert_eq!(issuer.calls(), asked);
    follows.abort();
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_its_last_holder() {
    let (store, issuer) = store();
    let held = store.retain(&id("a"));
    held.certificate().await.unwrap();
    drop(store);
    sleep(LIFE).await;
    assert!(held.current().is_some(), "a guard keeps the store going");
    drop(held);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(Arc::strong_count(&issuer), 1);
}
