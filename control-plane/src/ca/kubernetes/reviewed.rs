//! Answers of the API server about tokens, kept for a short while. A node proxy that starts asks for the certificates of
//! all its pods at once, with one token: that is one review.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;

use crate::ca::{AuthenticationError, Caller};

/// How long a token that was accepted is accepted without asking again, unless it expires before.
pub(super) const KEPT: Duration = Duration::from_secs(60);
/// How long a token that was not accepted is refused without asking again. Short: a service account may just have come.
const REFUSED: Duration = Duration::from_secs(10);
/// Most tokens that are remembered; a cluster has as many as it has nodes, waypoints and gateways.
const MAX_TOKENS: usize = 16 * 1024;

/// An answer, and until when it counts for those who ask later.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) result: Result<Caller, AuthenticationError>,
    until: SystemTime,
}

impl Answer {
    /// The token is `caller`'s, as told at `now`; it ends at `expires`.
    pub(super) fn accepted(caller: Caller, now: SystemTime, expires: SystemTime) -> Self {
        Self { result: Ok(caller), until: (now + KEPT).min(expires) }
    }

    /// What went wrong at `now`. That a token is not accepted counts for a short while; any other failure is shared only by
    /// those who wait already, and who asks later gets an answer of its own.
    pub(super) fn failed(error: AuthenticationError, now: SystemTime) -> Self {
        let is_refusal = matches!(error, AuthenticationError::NotAccepted { .. });
        let until = if is_refusal { now + REFUSED } else { SystemTime::UNIX_EPOCH };
        Self { result: Err(error), until }
    }
}

/// Where those who ask about one token meet: the first asks, the others wait for the answer.
pub(super) type Slot = Arc<OnceCell<Answer>>;

/// The tokens asked about, by their hash: the token itself is not kept.
#[derive(Debug, Default)]
pub(super) struct Reviewed(Mutex<HashMap<[u8; 32], Slot>>);

impl Reviewed {
    /// The slot of a token: with an answer that counts at `now`, or with none yet.
    pub(super) fn slot(&self, token: &str, now: SystemTime) -> Slot {
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let counts = |slot: &Slot| slot.get().is_none_or(|answer| now < answer.until);
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get(&hash)
            && counts(slot)
        {
            return slot.clone();
        }
        let slot = Slot::default();
        if slots.len() >= MAX_TOKENS {
            // Refusals go first: whoever makes tokens up must not push out those that are good.
            slots.retain(|_, slot| slot.get().is_some_and(|answer| answer.result.is_ok() && now < answer.until));
        }
        // Too many that are all good, or all being asked about: this one is asked about each time.
        if slots.len() < MAX_TOKENS || slots.contains_key(&hash) {
            slots.insert(hash, slot.clone());
        }
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller() -> Caller {
        Caller { namespace: "a".to_owned(), service_account: "b".to_owned(), pod: None, node: None }
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    #[test]
    fn an_acceptance_counts_for_a_minute_at_most_and_not_longer_than_the_token() {
        let reviewed = Reviewed::default();
        reviewed.slot("long", at(0)).set(Answer::accepted(caller(), at(0), at(3600))).unwrap();
        reviewed.slot("short", at(0)).set(Answer::accepted(caller(), at(0), at(5))).unwrap();
        assert!(reviewed.slot("long", at(59)).get().is_some());
        assert!(reviewed.slot("long", at(60)).get().is_none());
        assert!(reviewed.slot("short", at(4)).get().is_some());
        assert!(reviewed.slot("short", at(5)).get().is_none());
        assert!(reviewed.slot("another", at(0)).get().is_none());
    }

    #[test]
    fn a_failure_is_shared_only_by_those_who_wait() {
        let reviewed = Reviewed::default();
        for error in [AuthenticationError::Unavailable, AuthenticationError::TooOften] {
            let (first, second) = (reviewed.slot("bad", at(0)), reviewed.slot("bad", at(0)));
            first.set(Answer::failed(error, at(0))).unwrap();
            assert!(second.get().unwrap().result.is_err());
            assert!(reviewed.slot("bad", at(0)).get().is_none());
        }
    }

    fn refused() -> Answer {
        Answer::failed(AuthenticationError::NotAccepted { reason: String::new() }, at(0))
    }

    #[test]
    fn a_refusal_counts_for_some_seconds() {
        let reviewed = Reviewed::default();
        reviewed.slot("bad", at(0)).set(refused()).unwrap();
        assert!(reviewed.slot("bad", at(9)).get().unwrap().result.is_err());
        assert!(reviewed.slot("bad", at(10)).get().is_none());
    }

    #[test]
    fn refusals_do_not_push_out_what_is_good() {
        let reviewed = Reviewed::default();
        reviewed.slot("good", at(0)).set(Answer::accepted(caller(), at(0), at(3600))).unwrap();
        for number in 0..2 * MAX_TOKENS {
            let _ = reviewed.slot(&number.to_string(), at(0)).set(refused());
            assert!(reviewed.0.lock().unwrap().len() <= MAX_TOKENS);
        }
        assert!(reviewed.slot("good", at(1)).get().is_some());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let reviewed = Reviewed::default();
        for number in 0..MAX_TOKENS + 10 {
            let _ = reviewed.slot(&number.to_string(), at(0)).set(Answer::accepted(caller(), at(0), at(3600)));
        }
        let len = || reviewed.0.lock().unwrap().len();
        assert_eq!(len(), MAX_TOKENS);
        // Once they are old, new ones take their place.
        reviewed.slot("new", at(100)).set(Answer::accepted(caller(), at(100), at(3600))).unwrap();
        assert!(reviewed.slot("new", at(101)).get().is_some() && len() == 1);
    }
}
