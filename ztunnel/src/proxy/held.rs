//! Gives up some of what is held for receivers that do not take it, once it is more than fits: of the pod that holds more
//! than its share, what has waited longest. Other pods' connections are not touched. What is held is counted where it waits
//! ([`mesh_hbone::memory`]); what may be held is `--max-held-memory`.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use mesh_hbone::Memory;
use mesh_hbone::memory::{Hold, Limits};
use tokio::time::{MissedTickBehavior, interval};

use super::live::CloseReason;
use super::metrics::Metrics;
use super::pods::{Pod, Pods};
use super::tunnels::Tunnels;

/// Time that connections which are told to end have for it before it is looked whether that was enough.
const STEP: Duration = Duration::from_millis(50);

/// Time between two looks when nobody says that it is too much: for the metric, and for memory to be given back.
const LOOK: Duration = Duration::from_secs(1);

/// Bytes that were held at a time from which on freed memory is given back when they are gone.
const MUCH: usize = 32 << 20;

/// Keeps what is held within the limits, for ever.
pub async fn run(memory: Memory, pods: Arc<Pods>, tunnels: Tunnels, metrics: Metrics) {
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut most = 0;
    loop {
        tokio::select! {
            () = memory.exceeded() => {}
            _ = looks.tick() => {}
        }
        most = memory.held().max(most);
        while relieve(&memory, &pods.pods(), &tunnels, &metrics) {
            tokio::time::sleep(STEP).await;
        }
        let held = memory.held();
        metrics.held.set(i64::try_from(held).unwrap_or(i64::MAX));
        if most > MUCH && held < most / 4 {
            most = held;
            mesh_runtime::memory::return_freed();
        }
    }
}

/// Tells connections and tunnels to end, if too much is held. Whether it was too much.
fn relieve(memory: &Memory, pods: &[Arc<Pod>], tunnels: &Tunnels, metrics: &Metrics) -> bool {
    let held: Vec<_> = pods.iter().map(|pod| pod.memory.held()).collect();
    let excess = excess(&held, memory.limits());
    for ((pod, held), excess) in pods.iter().zip(held).zip(&excess) {
        if *excess > 0 {
            let ended = relieve_one(pod, *excess, tunnels);
            metrics.held_resets.inc_by(ended as u64);
            if ended > 0 {
                tracing::warn!(?pod, held, ended, "a pod's receivers take too little: what waited longest is given up");
            }
        }
    }
    excess.iter().any(|excess| *excess > 0)
}

/// Tells connections and tunnels of one pod to end that hold so much together. How many.
fn relieve_one(pod: &Pod, excess: usize, tunnels: &Tunnels) -> usize {
    let connections = pod.live.connections();
    let mut tunnels = tunnels.all();
    tunnels.retain(|tunnel| tunnel.backlog.hold().share().is_some_and(|share| share.is(&pod.memory)));
    let candidate = |hold: &Hold, is_told| Candidate { bytes: hold.bytes(), since: hold.since(), is_told };
    let of_connections = connections.iter().map(|one| candidate(&one.facts.counters.hold, one.is_told()));
    let of_tunnels = tunnels.iter().map(|one| candidate(one.backlog.hold(), one.is_told()));
    let candidates: Vec<_> = of_connections.chain(of_tunnels).collect();
    let chosen = choose(&candidates, excess);
    for index in &chosen {
        match connections.get(*index) {
            Some(connection) => connection.close(CloseReason::TooMuchHeld),
            None => {
                if let Some(tunnel) = tunnels.get(index - connections.len()) {
                    tunnel.close();
                }
            }
        }
    }
    chosen.len()
}

/// How much each of those that hold so much must give up: first what is over the limit of one, then, where all together
/// still hold too much, those that hold most, down to what leaves them alike. An eighth less than the limit remains, so that
/// it is not reached again at once.
fn excess(held: &[usize], limits: &Limits) -> Vec<usize> {
    let eased = |limit: usize| limit - limit / 8;
    let mut left: Vec<_> =
        held.iter().map(|held| if *held > limits.hard { eased(limits.hard) } else { *held }).collect();
    if left.iter().sum::<usize>() > limits.total {
        let level = level(&left, eased(limits.total));
        left.iter_mut().for_each(|left| *left = (*left).min(level));
    }
    held.iter().zip(left).map(|(held, left)| held - left).collect()
}

/// The most that each may have so that all have `total` together, where nobody needs more than this.
fn level(needs: &[usize], total: usize) -> usize {
    let mut needs = needs.to_vec();
    needs.sort_unstable();
    let (mut room, mut count) = (total, needs.len());
    for need in needs {
        if need > room / count {
            return room / count;
        }
        room -= need;
        count -= 1;
    }
    usize::MAX
}

/// What may be given up.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    bytes: usize,
    /// See [`Hold::since`].
    since: u64,
    /// Whether it is ending already.
    is_told: bool,
}

/// Which of them to give up so that so much becomes free: those that have waited longest, but those that hold less than
/// half of what others do on average only when the rest is not enough.
fn choose(candidates: &[Candidate], excess: usize) -> Vec<usize> {
    let ending: usize = candidates.iter().filter(|one| one.is_told).map(|one| one.bytes).sum();
    let mut excess = excess.saturating_sub(ending);
    let mut waiting: Vec<_> = candidates.iter().enumerate().filter(|(_, one)| !one.is_told && one.bytes > 0).collect();
    let average = waiting.iter().map(|(_, one)| one.bytes).sum::<usize>() / waiting.len().max(1);
    waiting.sort_by_key(|(_, one)| (one.bytes < average / 2, one.since, Reverse(one.bytes)));
    let mut chosen = Vec::new();
    for (index, one) in waiting {
        if excess == 0 {
            break;
        }
        excess = excess.saturating_sub(one.bytes);
        chosen.push(index);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { total: 800, soft: 100, hard: 400 };

    #[test]
    fn who_has_more_than_its_share_gives_up_what_is_too_much_and_others_nothing() {
        let cases: &[(&[usize], &[usize])] = &[
            (&[], &[]),
            (&[400, 400], &[0, 0]),
            (&[401, 10], &[51, 0]),
            (&[1000, 10, 390], &[650, 0, 0]),
            // All together too much: the three that hold most have 700 less the others' 50 and 100 between them.
            (&[300, 50, 250, 200, 100], &[117, 0, 67, 17, 0]),
            // Over both limits.
            (&[9000, 400, 399], &[9000 - 233, 400 - 233, 399 - 233]),
        ];
        for (held, expected) in cases {
            assert_eq!(excess(held, &LIMITS), *expected, "{held:?}");
        }
    }

    #[test]
    fn what_has_waited_longest_goes_first_and_no_more_than_needed() {
        let one = |bytes, since| Candidate { bytes, since, is_told: false };
        let candidates = [one(100, 9), one(100, 3), one(0, 0), one(200, 3), one(10, 1), one(100, 5)];
        assert_eq!(choose(&candidates, 0), []);
        assert_eq!(choose(&candidates, 1), [3]);
        assert_eq!(choose(&candidates, 201), [3, 1]);
        assert_eq!(choose(&candidates, 400), [3, 1, 5]);
        assert_eq!(choose(&candidates, 9999), [3, 1, 5, 0, 4], "what holds little only when the rest is not enough");
    }

    #[test]
    fn what_is_ending_already_counts() {
        let one = |bytes, is_told| Candidate { bytes, since: 1, is_told };
        let candidates = [one(100, true), one(50, false), one(60, false)];
        assert_eq!(choose(&candidates, 100), []);
        assert_eq!(choose(&candidates, 110), [2]);
    }
}
