//! Drain as a token: work that must end before the process does holds a [`Watcher`]; the end waits until every clone
//! of it is dropped, and forces what is left once a deadline has passed.
//!
//! ```text
//! Trigger::drain(deadline)  ->  draining()  ->  (deadline)  ->  forced()  ->  (FORCE_GRACE)  ->  Drained::Abandoned
//! ```

use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

/// How long work that was told to stop at once may still take to drop its tokens.
pub const FORCE_GRACE: Duration = Duration::from_secs(1);

/// Makes the two ends of a drain.
pub fn channel() -> (Trigger, Watcher) {
    let (phase, phases) = watch::channel(Phase::Running);
    let (token, tokens) = mpsc::channel(1);
    (Trigger { phase, tokens }, Watcher { phases, _token: token })
}

/// Starts the drain and waits for its end. Dropping it without draining forces the end at once, so that no work can
/// outlive its owner by accident.
#[derive(Debug)]
pub struct Trigger {
    phase: watch::Sender<Phase>,
    tokens: mpsc::Receiver<Infallible>,
}

impl Trigger {
    /// Tells every watcher to finish, and waits until all are dropped. After `deadline` those left are told to stop at
    /// once, and get [`FORCE_GRACE`] to do so.
    pub async fn drain(mut self, deadline: Duration) -> Drained {
        self.phase.send_replace(Phase::Draining);
        // No message is ever sent: `recv` ends when the last token is dropped.
        if tokio::time::timeout(deadline, self.tokens.recv()).await.is_ok() {
            return Drained::Complete;
        }
        self.phase.send_replace(Phase::Forced);
        match tokio::time::timeout(FORCE_GRACE, self.tokens.recv()).await {
            Ok(_) => Drained::Forced,
            Err(_) => Drained::Abandoned,
        }
    }
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Everything finished by itself.
    Complete,
    /// Some work had to be told to stop at once, and did.
    Forced,
    /// Some work did not stop even then.
    Abandoned,
}

/// A token that keeps a drain from completing while it, or a clone of it, lives.
#[derive(Clone, Debug)]
pub struct Watcher {
    phases: watch::Receiver<Phase>,
    _token: mpsc::Sender<Infallible>,
}

impl Watcher {
    /// Resolves when the work should finish: take nothing new, complete what was begun.
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Resolves when the work must stop at once.
    pub async fn forced(&self) {
        self.reached(Phase::Forced).await;
    }

    /// Whether the work should finish.
    pub fn is_draining(&self) -> bool {
        self.phases.has_changed().is_err() || *self.phases.borrow() >= Phase::Draining
    }

    async fn reached(&self, phase: Phase) {
        let mut phases = self.phases.clone();
        // An error means that the trigger is gone, which counts as forced.
        let _ = phases.wait_for(|now| *now >= phase).await;
    }
}

/// Runs one accept loop with a drain of its own below `parent`, and returns when it and all that it spawned have ended.
///
/// `accept_loop` gets a [`Watcher`]: it returns when that is draining, and gives a clone to each connection. Once
/// `parent` drains, the connections have `deadline` to finish and are forced after it. If the loop ends by itself, the
/// same end follows.
pub async fn run_with_drain<F, Fut>(parent: Watcher, deadline: Duration, accept_loop: F) -> Drained
where
    F: FnOnce(Watcher) -> Fut,
    Fut: Future<Output = ()>,
{
    let (trigger, watcher) = channel();
    let ended = accept_loop(watcher);
    tokio::pin!(ended);
    tokio::select! {
        () = &mut ended => return trigger.drain(deadline).await,
        () = parent.draining() => {}
    }
    // The loop must be polled on while the drain waits for it: it holds a token.
    let accepting = async {
        ended.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        drained = trigger.drain(deadline) => drained,
        // Leaves the trigger, which forces everything below.
        () = parent.forced() => Drained::Forced,
        () = accepting => Drained::Complete,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Running,
    Draining,
    Forced,
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn completes_when_the_last_token_is_dropped() {
        let (trigger, watcher) = channel();
        let work = tokio::spawn(async move {
            let second = watcher.clone();
            watcher.draining().await;
            drop(watcher);
            tokio::time::sleep(Duration::from_secs(60)).await;
            assert!(second.is_draining());
        });
        let begun = tokio::time::Instant::now();
        assert_eq!(trigger.drain(LONG).await, Drained::Complete);
        assert_eq!(begun.elapsed(), Duration::from_secs(60));
        work.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn forces_after_the_deadline() {
        let (trigger, watcher) = channel();
        tokio::spawn(async move { watcher.forced().await });
        let begun = tokio::time::Instant::now();
        assert_eq!(trigger.drain(Duration::from_secs(5)).await, Drained::Forced);
        assert_eq!(begun.elapsed(), Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn gives_up_on_work_that_ignores_force() {
        let (trigger, _watcher) = channel();
        assert_eq!(trigger.drain(Duration::from_secs(5)).await, Drained::Abandoned);
    }

    #[tokio::test]
    async fn losing_the_trigger_forces() {
        let (trigger, watcher) = channel();
        assert!(!watcher.is_draining());
        drop(trigger);
        watcher.draining().await;
        watcher.forced().await;
        assert!(watcher.is_draining());
    }

    #[tokio::test(start_paused = true)]
    async fn accept_loop_ends_gracefully_then_by_force() {
        let (trigger, parent) = channel();
        let ran = tokio::spawn(run_with_drain(parent, Duration::from_secs(5), |watcher| async move {
            let connection = watcher.clone();
            tokio::spawn(async move { connection.forced().await });
            watcher.draining().await;
        }));
        tokio::task::yield_now().await;
        assert_eq!(trigger.drain(LONG).await, Drained::Complete);
        assert_eq!(ran.await.unwrap(), Drained::Forced);
    }

    #[tokio::test(start_paused = true)]
    async fn the_parents_force_reaches_the_connections() {
        let (trigger, parent) = channel();
        let (ended, end) = tokio::sync::oneshot::channel();
        let ran = tokio::spawn(run_with_drain(parent, LONG, |watcher| async move {
            let connection = watcher.clone();
            tokio::spawn(async move {
                connection.forced().await;
                ended.send(()).unwrap();
            });
            watcher.draining().await;
        }));
        tokio::task::yield_now().await;
        assert_eq!(trigger.drain(Duration::from_secs(5)).await, Drained::Forced);
        assert_eq!(ran.await.unwrap(), Drained::Forced);
        end.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn accept_loop_is_polled_while_it_drains() {
        let (trigger, parent) = channel();
        let ran = tokio::spawn(run_with_drain(parent, LONG, |watcher| async move {
            watcher.draining().await;
            tokio::time::sleep(Duration::from_secs(3)).await;
        }));
        tokio::task::yield_now().await;
        assert_eq!(trigger.drain(LONG).await, Drained::Complete);
        assert_eq!(ran.await.unwrap(), Drained::Complete);
    }
}
