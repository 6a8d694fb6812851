//! Shares of a worker thread. The tasks of all pods run on the same threads, one after the other; what a task does in one
//! go is bounded, but a pod that floods may have thousands of tasks ready. So each pod's tasks together get [`SHARE`] in a
//! row; then they wait until every other task that is ready has run.
//!
//! A pod that is alone loses nothing by it: its tasks go on as soon as the sockets have been looked at. Where a pod that takes
//! little shares the thread with others that keep it busy ([`load`]), shares and polls are short: it waits for
//! them several times on the way of a request.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use mesh_hbone::pace;
use pin_project_lite::pin_project;

use load::{Load, Used};

mod load;

/// Time that the tasks of one pod get in a row: a few polls of a connection that carries bulk data. A request of another
/// pod waits for it several times on its way, so it is not a millisecond; below this, looking at the sockets costs too much.
const SHARE: Duration = Duration::from_micros(200);

/// The same while a pod that takes little shares the thread.
const SHORT_SHARE: Duration = Duration::from_micros(50);

/// Tasks of one pod that are woken for a turn. More would only find that the turn is over.
const WOKEN: usize = 64;

/// One thread's turns.
#[derive(Debug, Default)]
pub struct Turns {
    pods: Mutex<HashMap<Arc<str>, Weak<Turn>>>,
    rounds: Arc<Rounds>,
}

/// The turns of one pod on one thread.
#[derive(Debug)]
pub struct Turn {
    /// Nanoseconds used of this turn.
    used: AtomicU64,
    /// What it uses of the thread.
    load: Used,
    waiting: Mutex<Waiting>,
    rounds: Arc<Rounds>,
}

/// Tasks that wait for their pod's next turn.
#[derive(Debug, Default)]
struct Waiting {
    tasks: VecDeque<Waker>,
    /// Tasks that were ever woken. The first of the queue has this ticket.
    woken: u64,
}

/// Ends the turns.
#[derive(Debug, Default)]
struct Rounds {
    /// Whose turn is over, while a task is under way that begins the next.
    over: Mutex<Vec<Arc<Turn>>>,
    /// How busy the thread is.
    load: Load,
}

impl Turns {
    /// The turns of the pod of this uid.
    pub fn of(&self, pod: &Arc<str>) -> Arc<Turn> {
        let mut pods = lock(&self.pods);
        if let Some(turn) = pods.get(pod).and_then(Weak::upgrade) {
            return turn;
        }
        pods.retain(|_, turn| turn.strong_count() > 0);
        let (used, load, waiting) = Default::default();
        let turn = Arc::new(Turn { used, load, waiting, rounds: Arc::clone(&self.rounds) });
        pods.insert(Arc::clone(pod), Arc::downgrade(&turn));
        turn
    }
}

impl Turn {
    /// The task, as one of this pod's.
    pub fn run<F: Future>(self: &Arc<Self>, task: F) -> InTurn<F> {
        InTurn { task, turn: Arc::clone(self), ticket: None }
    }

    fn is_over(&self) -> bool {
        let share = if self.rounds.load.is_shared() { SHORT_SHARE } else { SHARE };
        u128::from(self.used.load(Ordering::Relaxed)) >= share.as_nanos()
    }

    /// Waits for the next turn.
    fn wait(self: &Arc<Self>, ticket: &mut Option<u64>, waker: &Waker) {
        let mut waiting = lock(&self.waiting);
        if ticket.is_some_and(|ticket| ticket >= waiting.woken) {
            // It waits already, and something else has woken it.
            return;
        }
        let first = waiting.tasks.is_empty();
        *ticket = Some(waiting.woken + waiting.tasks.len() as u64);
        waiting.tasks.push_back(waker.clone());
        drop(waiting);
        if first {
            self.rounds.end(self);
        }
    }

    /// Begins the next turn. Whether tasks are left that wait for another one.
    fn begin(&self) -> bool {
        let mut waiting = lock(&self.waiting);
        let count = waiting.tasks.len().min(WOKEN);
        let woken: Vec<_> = waiting.tasks.drain(..count).collect();
        waiting.woken += woken.len() as u64;
        let more = !waiting.tasks.is_empty();
        drop(waiting);
        self.used.store(0, Ordering::Relaxed);
        woken.into_iter().for_each(Waker::wake);
        more
    }
}

impl Rounds {
    /// The turn is over: another begins after everything that is ready.
    fn end(self: &Arc<Self>, turn: &Arc<Turn>) {
        let mut over = lock(&self.over);
        over.push(Arc::clone(turn));
        if over.len() > 1 {
            return;
        }
        drop(over);
        let rounds = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                // Comes back after the sockets have been looked at, and those woken that they have something for.
                tokio::task::yield_now().await;
                let turns = lock(&rounds.over).clone();
                let more: Vec<_> = turns.iter().map(|turn| turn.begin()).collect();
                let mut over = lock(&rounds.over);
                let mut more = more.into_iter();
                // Those that came meanwhile are behind these.
                over.retain(|_| more.next().unwrap_or(true));
                if over.is_empty() {
                    return;
                }
            }
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half done under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pin_project! {
    /// A task of one pod; see [`Turn::run`].
    pub struct InTurn<F> {
        #[pin]
        task: F,
        turn: Arc<Turn>,
        ticket: Option<u64>,
    }
}

impl<F: Future> Future for InTurn<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        if this.turn.is_over() {
            this.turn.wait(this.ticket, cx.waker());
            return Poll::Pending;
        }
        let begun = Instant::now();
        let polled = this.task.poll(cx);
        let ended = Instant::now();
        let used = u64::try_from((ended - begun).as_nanos()).unwrap_or(u64::MAX);
        this.turn.used.fetch_add(used, Ordering::Relaxed);
        if let Some(shared) = this.turn.rounds.load.note(&this.turn.load, ended, used) {
            pace::set_short(shared);
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Keeps its thread busy.
    fn work(time: Duration) {
        let begun = Instant::now();
        while begun.elapsed() < time {
            std::hint::spin_loop();
        }
    }

    #[tokio::test]
    async fn a_pod_with_many_tasks_gets_no_more_than_its_share() {
        let turns = Turns::default();
        let (noisy, quiet) = (turns.of(&"noisy".into()), turns.of(&"quiet".into()));
        let polls = Arc::new(AtomicUsize::new(0));
        let tasks: Vec<_> = (0..500)
            .map(|_| {
                let polls = Arc::clone(&polls);
                tokio::spawn(noisy.run(async move {
                    loop {
                        polls.fetch_add(1, Ordering::Relaxed);
                        work(Duration::from_micros(50));
                        tokio::task::yield_now().await;
                    }
                }))
            })
            .collect();
        let counted = Arc::clone(&polls);
        let quiet = tokio::spawn(quiet.run(async move {
            let mut between = Vec::new();
            for _ in 0..20 {
                let before = counted.load(Ordering::Relaxed);
                tokio::task::yield_now().await;
                between.push(counted.load(Ordering::Relaxed) - before);
            }
            between
        }));
        let between = quiet.await.unwrap();
        // Four fit into a turn, and a round may fall between two looks at the sockets; without turns it would be 500.
        assert!(between.iter().all(|polls| *polls <= 20), "{between:?}");
        for task in &tasks {
            task.abort();
        }
    }

    #[tokio::test]
    async fn every_task_of_a_pod_gets_its_turn() {
        let turns = Turns::default();
        let pod = turns.of(&"pod".into());
        assert!(Arc::ptr_eq(&pod, &turns.of(&"pod".into())));
        let tasks: Vec<_> = (0..300)
            .map(|_| {
                tokio::spawn(pod.run(async {
                    for _ in 0..3 {
                        work(Duration::from_micros(100));
                        tokio::task::yield_now().await;
                    }
                }))
            })
            .collect();
        for task in tasks {
            tokio::time::timeout(Duration::from_secs(20), task).await.unwrap().unwrap();
        }
        assert!(lock(&pod.rounds.over).is_empty(), "nobody waits any more");
    }

    #[tokio::test]
    async fn a_task_that_ends_while_it_waits_keeps_nobody() {
        let turns = Turns::default();
        let pod = turns.of(&"pod".into());
        pod.used.store(u64::MAX, Ordering::Relaxed);
        let waits = tokio::spawn(pod.run(async {}));
        tokio::task::yield_now().await;
        waits.abort();
        tokio::time::timeout(Duration::from_secs(20), pod.run(async {})).await.unwrap();
    }
}
