//! The election: one of the replicas holds the Lease `culvertd-leader` of the system namespace, and only that one writes.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::lease::{Candidate, PAUSE, RENEWAL, Record, Step, TERM};
use crate::ingest::Cluster;
use crate::ingest::kubernetes::describe;

/// The lease.
const LEASE: &str = "culvertd-leader";
/// Time for one request.
const TIMEOUT: Duration = Duration::from_secs(4);
/// Time to give the lease back when the process ends.
const RELEASE: Duration = Duration::from_secs(2);

/// Who leads, as far as this replica knows.
#[derive(Clone, Debug, Default)]
pub struct Leadership {
    /// This replica's name in the election.
    pub me: Arc<str>,
    /// Who holds the lease; none while that is not known, or nobody does.
    pub holder: Option<String>,
    /// Until when this replica leads, unless it renews the lease before.
    until: Option<Instant>,
}

impl Leadership {
    /// Whether this replica leads now.
    pub fn leads(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() < until)
    }
}

/// Follows whether this replica leads. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Leading(watch::Receiver<Leadership>);

impl Leading {
    /// What is known now.
    pub fn now(&self) -> Leadership {
        self.0.borrow().clone()
    }

    /// Whether this replica leads, to be asked before each write: also of a process that stood still since.
    pub fn leads(&self) -> bool {
        self.0.borrow().leads()
    }

    /// Waits until this replica leads.
    async fn begun(&mut self) {
        if self.0.wait_for(Leadership::leads).await.is_err() {
            // There is no election any more.
            std::future::pending::<()>().await;
        }
    }

    /// Waits until this replica does not lead any more.
    async fn ended(&mut self) {
        loop {
            let known = self.0.borrow_and_update().clone();
            let Some(until) = known.until.filter(|_| known.leads()) else { return };
            tokio::select! {
                changed = self.0.changed() => if changed.is_err() { return },
                () = sleep_until(until) => {}
            }
        }
    }

    /// Runs what `work` makes whenever this replica leads, and drops it in the middle when it does not any more. For ever.
    pub(super) async fn whenever<F: Future<Output = ()>>(mut self, work: impl Fn(Self) -> F) {
        loop {
            self.begun().await;
            let mut end = self.clone();
            tokio::select! {
                biased;
                () = end.ended() => {}
                // It never ends by itself; if it did, it would be begun anew.
                () = work(self.clone()) => sleep(PAUSE).await,
            }
        }
    }
}

/// One replica's part in the election.
#[derive(Debug)]
pub(super) struct Election {
    leases: Api<Lease>,
    candidate: Candidate,
    leadership: watch::Sender<Leadership>,
    /// What is wrong now, so that it is said once.
    trouble: Option<String>,
}

impl Election {
    /// An election among the replicas in `namespace`. `name` is this replica's, for people; a random part makes it unique.
    pub(super) fn new(cluster: &Cluster, namespace: &str, name: &str) -> (Self, Leading) {
        let me = format!("{name}_{:016x}", fastrand::u64(..));
        let (leadership, leading) = watch::channel(Leadership { me: me.as_str().into(), ..Leadership::default() });
        let leases = Api::namespaced(cluster.client(), namespace);
        (Self { leases, candidate: Candidate::new(me), leadership, trouble: None }, Leading(leading))
    }

    /// Takes part, for ever.
    pub(super) async fn run(&mut self) {
        loop {
            // The term counts from before it was asked for: when the answer comes, part of it may have passed.
            let begun = Instant::now();
            let held = match timeout(TIMEOUT, self.look(begun)).await {
                Ok(Ok(held)) => {
                    self.trouble = None;
                    Some(held)
                }
                Ok(Err(error)) => {
                    self.complain(describe(&error));
                    None
                }
                Err(_) => {
                    self.complain(format!("no answer within {TIMEOUT:?}"));
                    None
                }
            };
            self.conclude(held, begun);
            sleep(PAUSE.mul_f64(1.0 - 0.2 * fastrand::f64())).await;
        }
    }

    /// One look at the lease, and what follows from it. Returns who holds it then; none for nobody.
    async fn look(&mut self, now: Instant) -> kube::Result<Option<String>> {
        let found = self.leases.get_opt(LEASE).await?;
        let record = found.as_ref().map(read);
        let step = self.candidate.decide(record.as_ref(), now);
        let written = match (step, found) {
            (Step::Create, _) | (_, None) => {
                let metadata = ObjectMeta { name: Some(LEASE.to_owned()), ..ObjectMeta::default() };
                let lease = self.claim(Lease { metadata, ..Lease::default() }, step);
                self.leases.create(&PostParams::default(), &lease).await
            }
            (Step::Wait, Some(_)) => return Ok(record.map(|record| record.holder)),
            // With the version that was read: if another was faster, the API server refuses this.
            (Step::Renew | Step::Take, Some(lease)) => {
                self.leases.replace(LEASE, &PostParams::default(), &self.claim(lease, step)).await
            }
        };
        match written {
            Ok(_) => Ok(Some(self.candidate.name().to_owned())),
            // Whoever was faster is seen at the next look.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn claim(&self, mut lease: Lease, step: Step) -> Lease {
        let now = MicroTime(Timestamp::now());
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if step != Step::Renew {
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(-1).saturating_add(1));
            spec.acquire_time = Some(now.clone());
        }
        spec.holder_identity = Some(self.candidate.name().to_owned());
        spec.lease_duration_seconds = i32::try_from(TERM.as_secs()).ok();
        spec.renew_time = Some(now);
        lease
    }

    /// Notes the outcome of a look that began at `begun`; none if there was no answer.
    fn conclude(&self, held: Option<Option<String>>, begun: Instant) {
        let before = self.leadership.borrow().clone();
        let mut after = before.clone();
        if let Some(holder) = held {
            after.until = (holder.as_deref() == Some(self.candidate.name())).then(|| begun + RENEWAL);
            after.holder = holder;
        } else if !after.leads() {
            (after.until, after.holder) = (None, None);
        }
        match (before.until.is_some(), after.leads()) {
            (false, true) => tracing::info!(me = %after.me, "this replica leads"),
            (true, false) => {
                tracing::warn!(me = %after.me, holder = after.holder, "this replica does not lead any more");
            }
            (true, true) | (false, false) => {}
        }
        self.leadership.send_replace(after);
    }

    fn complain(&mut self, error: String) {
        if self.trouble.is_none() {
            tracing::warn!(lease = LEASE, error, "cannot take part in the election; trying again");
        }
        self.trouble = Some(error);
    }

    /// Gives the lease back, so that another replica leads at once. To be called when nothing is written any more.
    pub(super) async fn release(self) {
        let was_leading = self.leadership.borrow().until.is_some();
        self.leadership.send_modify(|known| known.until = None);
        if !was_leading {
            return;
        }
        let released = timeout(RELEASE, async {
            // Twice: a renewal may have been on its way.
            for _ in 0..2 {
                let Some(mut lease) = self.leases.get_opt(LEASE).await? else { return Ok(()) };
                if read(&lease).holder != self.candidate.name() {
                    return Ok(());
                }
                if let Some(spec) = &mut lease.spec {
                    spec.holder_identity = Some(String::new());
                    spec.renew_time = Some(MicroTime(Timestamp::now()));
                }
                match self.leases.replace(LEASE, &PostParams::default(), &lease).await {
                    Err(kube::Error::Api(status)) if status.code == 409 => {}
                    result => return result.map(|_| ()),
                }
            }
            Ok(())
        });
        match released.await {
            Ok(Ok(())) => tracing::info!("the lease is given back"),
            Ok(Err(error)) => {
                tracing::warn!(error = describe(&error), "the lease is not given back, and runs out");
            }
            Err(_) => tracing::warn!("the lease is not given back, and runs out: no answer within {RELEASE:?}"),
        }
    }
}

fn read(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or_default();
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        term: Duration::from_secs(seconds),
        renewed: spec.renew_time.map(|at| at.0.to_string()),
    }
}

#[cfg(test)]
pub(super) fn leading_for(time: Duration) -> (watch::Sender<Leadership>, Leading) {
    let until = Some(Instant::now() + time);
    let (sender, receiver) = watch::channel(Leadership { me: "me".into(), holder: Some("me".into()), until });
    (sender, Leading(receiver))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts for how long it is not dropped.
    struct Alive(watch::Sender<bool>);

    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.send_replace(false);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn work_ends_with_the_lease_also_without_a_word() {
        let (alive, mut is_alive) = watch::channel(false);
        let (leadership, leading) = leading_for(RENEWAL);
        let asked = leading.clone();
        let work = tokio::spawn(leading.whenever(move |_| {
            let alive = alive.clone();
            async move {
                alive.send_replace(true);
                let _alive = Alive(alive);
                std::future::pending::<()>().await;
            }
        }));
        is_alive.wait_for(|alive| *alive).await.unwrap();
        // Nobody says that it is over; time does.
        is_alive.wait_for(|alive| !*alive).await.unwrap();
        assert!(!asked.leads());
        // Leads again, and is told that it does not.
        leadership.send_modify(|known| known.until = Some(Instant::now() + RENEWAL));
        is_alive.wait_for(|alive| *alive).await.unwrap();
        leadership.send_modify(|known| known.until = None);
        is_alive.wait_for(|alive| !*alive).await.unwrap();
        work.abort();
    }
}
