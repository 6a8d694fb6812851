//! One client's stream: a task and a [`Machine`].

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use futures_util::FutureExt as _;
use mesh_proto::discovery::DeltaDiscoveryRequest;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};
use tonic::{Code, Status};

use super::body::{self, Transfer};
use super::intake::Intake;
use super::service::{Inner, Options, Place, lock};
use super::{ClientStatus, Machine};

/// Requests taken at once.
const MAX_BATCH: usize = 16;

pub(super) struct Stream {
    service: Arc<Inner>,
    id: u64,
    machine: Machine,
    status: Arc<Mutex<ClientStatus>>,
    transfer: Arc<Transfer>,
    wait: Option<Wait>,
    _place: Arc<Place>,
}

/// For an ACK.
#[derive(Clone, Copy, Debug)]
struct Wait {
    until: Instant,
    /// However much of the response is taken meanwhile.
    latest: Instant,
    /// What was taken when `until` was set.
    taken: u64,
}

impl Stream {
    pub(super) fn new(
        service: Arc<Inner>,
        id: u64,
        status: Arc<Mutex<ClientStatus>>,
        transfer: Arc<Transfer>,
        place: Arc<Place>,
    ) -> Self {
        let machine = Machine::new(Arc::clone(&service.limits));
        Self { service, id, machine, status, transfer, wait: None, _place: place }
    }

    pub(super) async fn run(mut self, requests: Intake) {
        let transfer = Arc::clone(&self.transfer);
        let end = tokio::select! {
            end = self.exchange(requests) => end,
            () = transfer.closed() => Ok(()),
        };
        match end {
            Ok(()) => tracing::info!(id = self.id, "discovery client left"),
            Err(status) => {
                let code = status.code();
                tracing::info!(id = self.id, ?code, reason = status.message(), "discovery stream ended");
                // One that has been waited for is not waited for again.
                transfer.end(status, code != Code::DeadlineExceeded && code != Code::ResourceExhausted);
            }
        }
    }

    async fn exchange(&mut self, mut requests: Intake) -> Result<(), Status> {
        let Options { patience, max_age, .. } = self.service.options;
        let mut changes = self.service.catalog.changes();
        let mut closing = self.service.closing.subscribe();
        let end_of_life = tokio::time::sleep(max_age.mul_f64(1.0 - 0.1 * fastrand::f64()));
        tokio::pin!(end_of_life);

        if !self.begin(&mut requests).await? {
            return Ok(());
        }
        let mut permit = None;
        if self.machine.is_syncing() {
            let syncing = tokio::time::timeout(patience, Arc::clone(&self.service.syncing).acquire_owned());
            tokio::pin!(syncing);
            let mut is_over = false;
            loop {
                tokio::select! {
                    // Without one it goes on as well: it has waited long enough.
                    acquired = &mut syncing => {
                        permit = acquired.ok().and_then(Result::ok);
                        break;
                    }
                    // What has begun to come may hold a turn that others wait for.
                    request = requests.message(), if !is_over => match request? {
                        Some(request) => self.take(request, &mut requests)?,
                        None => is_over = true,
                    },
                    () = closed(&mut closing) => break,
                }
            }
        }
        loop {
            self.respond()?;
            permit.take_if(|_| !self.machine.is_syncing());
            self.publish();
            tokio::select! {
                request = requests.message() => match request? {
                    Some(request) => self.take(request, &mut requests)?,
                    None => return self.finish(&mut closing, end_of_life.as_mut()).await,
                },
                changed = changes.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                }
                () = closed(&mut closing) => return Err(Status::unavailable("shutting down: reconnect")),
                () = &mut end_of_life => return Err(Status::unavailable("the stream is old: reconnect")),
                () = until(self.wait) => self.look()?,
            }
        }
    }

    /// The client asks for nothing more, but may read what is on its way.
    async fn finish(
        &mut self,
        closing: &mut watch::Receiver<bool>,
        mut end_of_life: Pin<&mut Sleep>,
    ) -> Result<(), Status> {
        let transfer = Arc::clone(&self.transfer);
        loop {
            tokio::select! {
                () = transfer.drained() => return Ok(()),
                () = closed(closing) => return Err(Status::unavailable("shutting down: reconnect")),
                () = &mut end_of_life => return Err(Status::unavailable("the stream is old: reconnect")),
                () = until(self.wait) => self.look()?,
            }
        }
    }

    /// Takes the first request; false if there is none.
    async fn begin(&mut self, requests: &mut Intake) -> Result<bool, Status> {
        let Options { patience, reading, .. } = self.service.options;
        // What reads it has bounds of its own, for its beginning and if it is large; here is all of that together. The versions
        // in it are compared at once, and then forgotten.
        let first = tokio::time::timeout(patience * 3 + reading, requests.message());
        match first.await.map_err(|_| Status::deadline_exceeded("the first request did not come in time"))?? {
            Some(first) => self.take(first, requests)?,
            None => return Ok(false),
        }
        Ok(true)
    }

    /// Takes a request, and others that are there already: so that of several types asked for at once none is answered
    /// before its turn.
    fn take(&mut self, request: DeltaDiscoveryRequest, requests: &mut Intake) -> Result<(), Status> {
        let catalog = self.service.catalog.snapshot();
        let now = SystemTime::now();
        self.note_nack(&request);
        self.machine.request(&catalog, request, now)?;
        for _ in 0..MAX_BATCH {
            match requests.message().now_or_never() {
                Some(Ok(Some(request))) => {
                    self.note_nack(&request);
                    self.machine.request(&catalog, request, now)?;
                }
                Some(Err(status)) => return Err(status),
                // The end of the stream shows again at the next read.
                Some(Ok(None)) | None => break,
            }
        }
        self.wait = None;
        Ok(())
    }

    fn note_nack(&self, request: &DeltaDiscoveryRequest) {
        if let Some(error) = &request.error_detail {
            self.service.note_nack();
            lock(&self.status).nacks += 1;
            let (r#type, reason) = (&request.type_url, &error.message);
            tracing::warn!(id = self.id, r#type, reason, "discovery client refused a response");
        }
    }

    /// Sends all that need not wait for an ACK. Never waits itself.
    fn respond(&mut self) -> Result<(), Status> {
        let catalog = self.service.catalog.snapshot();
        while let Some(response) = self.machine.respond(&catalog)? {
            let is_known = catalog.kind(&response.type_url).is_some();
            self.service.note_sent(&response.type_url, is_known, response.resources);
            // There is room for as many as can be in flight.
            self.transfer
                .send(response)
                .map_err(|body::Full| Status::resource_exhausted("responses are acknowledged, but not read"))?;
        }
        if !self.machine.is_in_flight() {
            self.wait = None;
        } else if self.wait.is_none() {
            let Options { patience, max_transfer, .. } = self.service.options;
            let now = Instant::now();
            let taken = self.transfer.taken();
            self.wait = Some(Wait { until: now + patience, latest: now + max_transfer, taken });
        }
        Ok(())
    }

    /// The time for an ACK is over: more is given to a client that is still taking the response.
    fn look(&mut self) -> Result<(), Status> {
        let (now, taken) = (Instant::now(), self.transfer.taken());
        match &mut self.wait {
            Some(wait) if taken > wait.taken && now < wait.latest => {
                wait.taken = taken;
                wait.until = (now + self.service.options.patience).min(wait.latest);
                Ok(())
            }
            _ => Err(Status::deadline_exceeded("no ACK came")),
        }
    }

    fn publish(&self) {
        let mut status = lock(&self.status);
        self.machine.node_id().clone_into(&mut status.node_id);
        self.machine.write_status(&mut status.types);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.service.forget(self.id);
        // Where nothing else has ended it.
        self.transfer.end(Status::ok(""), false);
    }
}

/// Resolves once the server ends. What the channel lends must not be held any longer.
async fn closed(closing: &mut watch::Receiver<bool>) {
    // An error says that there is no server any more.
    let _ = closing.wait_for(|closing| *closing).await;
}

async fn until(wait: Option<Wait>) {
    match wait {
        Some(wait) => tokio::time::sleep_until(wait.until).await,
        None => std::future::pending().await,
    }
}
