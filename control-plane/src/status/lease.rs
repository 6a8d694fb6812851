//! Who leads, decided from what a Lease says. Pure: the lease and a monotonic clock in, the next step out.
//!
//! Whether another holder is alive is judged by how long *this* process has seen its lease unchanged, as client-go does:
//! the times that others write are compared with each other, never with a clock of this machine.

use std::time::Duration;

use tokio::time::Instant;

/// How long a holder that does not renew stays the holder. The three times are client-go's defaults.
pub(super) const TERM: Duration = Duration::from_secs(15);
/// How long a holder goes on that cannot renew: less than the term, so that it has stopped before another begins.
pub(super) const RENEWAL: Duration = Duration::from_secs(10);
/// Pause between two looks at the lease.
pub(super) const PAUSE: Duration = Duration::from_secs(2);
/// Bounds of the term that another holder may claim: a mistake in the object must not keep everybody from leading.
const TERMS: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(60);

/// What a lease says, as far as it decides who leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// Who holds it; empty when it was given back.
    pub(super) holder: String,
    /// How long the holder claims it after each renewal.
    pub(super) term: Duration,
    /// When it was renewed, by the holder's clock: only whether it changes counts.
    pub(super) renewed: Option<String>,
}

/// What to do about a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There is none: make it.
    Create,
    /// It is ours: write a newer time.
    Renew,
    /// It was given back, or its holder is silent: take it.
    Take,
    /// It is another's.
    Wait,
}

/// One replica's view of the lease.
#[derive(Debug)]
pub(super) struct Candidate {
    me: String,
    /// The newest record of another holder, and when it was first seen like that.
    seen: Option<(Record, Instant)>,
}

impl Candidate {
    /// A replica that has not looked yet. `me` must be nobody else's name.
    pub(super) fn new(me: String) -> Self {
        Self { me, seen: None }
    }

    /// The name by which it holds the lease.
    pub(super) fn name(&self) -> &str {
        &self.me
    }

    /// Takes in what the lease says `now`; none if there is no lease.
    pub(super) fn decide(&mut self, lease: Option<&Record>, now: Instant) -> Step {
        let Some(record) = lease else { return Step::Create };
        if record.holder == self.me {
            return Step::Renew;
        }
        if record.holder.is_empty() {
            return Step::Take;
        }
        let since = match &self.seen {
            Some((seen, since)) if seen == record => *since,
            Some(_) | None => {
                self.seen = Some((record.clone(), now));
                now
            }
        };
        let term = record.term.clamp(*TERMS.start(), *TERMS.end());
        if now.saturating_duration_since(since) >= term { Step::Take } else { Step::Wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn held(holder: &str, term: u64, renewed: &str) -> Record {
        Record { holder: holder.into(), term: SECOND * u32::try_from(term).unwrap(), renewed: Some(renewed.into()) }
    }

    #[test]
    fn lease_is_made_renewed_taken_or_left_alone() {
        let now = Instant::now();
        let table = [
            (None, Step::Create),
            (Some(held("me", 15, "1")), Step::Renew),
            (Some(held("", 1, "1")), Step::Take),
            (Some(held("other", 15, "1")), Step::Wait),
            // What was never renewed is held all the same: its holder may just have made it.
            (Some(Record { renewed: None, ..held("other", 15, "") }), Step::Wait),
        ];
        for (lease, step) in table {
            assert_eq!(Candidate::new("me".into()).decide(lease.as_ref(), now), step, "{lease:?}");
        }
    }

    #[test]
    fn another_holder_is_given_up_after_its_term_without_a_change() {
        let begun = Instant::now();
        let mut candidate = Candidate::new("me".into());
        // Its clock is years behind, or ahead: no matter.
        for (after, renewed, step) in [
            (0, "1971-01-01", Step::Wait),
            (14, "1971-01-01", Step::Wait),
            (14, "2999-01-01", Step::Wait),
            (28, "2999-01-01", Step::Wait),
            (29, "2999-01-01", Step::Take),
            // It was not taken, for another was faster; that one's term begins anew.
            (30, "2026-01-01", Step::Wait),
        ] {
            assert_eq!(candidate.decide(Some(&held("other", 15, renewed)), begun + SECOND * after), step, "{after}");
        }
        assert_eq!(candidate.decide(Some(&held("third", 15, "2026-01-01")), begun + SECOND * 45), Step::Wait);
    }

    #[test]
    fn terms_out_of_all_reason_are_bounded() {
        let begun = Instant::now();
        for (term, waits, takes) in [(0, 0, 1), (100_000, 59, 60)] {
            let mut candidate = Candidate::new("me".into());
            let lease = held("other", term, "1");
            candidate.decide(Some(&lease), begun);
            assert_eq!(candidate.decide(Some(&lease), begun + SECOND * waits), Step::Wait);
            assert_eq!(candidate.decide(Some(&lease), begun + SECOND * takes), Step::Take);
        }
    }

    #[test]
    fn a_holder_stops_before_another_can_begin() {
        // The longest that may pass between its last success and the next look of the other one.
        assert!(RENEWAL + PAUSE < TERM);
    }
}
