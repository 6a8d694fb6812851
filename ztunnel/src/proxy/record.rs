//! One record per connection: it carries the metrics and the access log, is finished once, and reports even when it is
//! dropped unfinished.

use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use mesh_hbone::Authority;
use mesh_hbone::copy::Counters;
use mesh_model::{Service, SpiffeId, Workload};

use super::error::ConnectionError;
use super::live::{Full, Guard, Live};
use super::metrics::{Handles, Labels, Metrics};

#[cfg(test)]
mod tests;

/// Which way a connection goes, seen from the pod that this proxy serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The pod opened it.
    Outbound,
    /// The pod takes it.
    Inbound,
}

impl Direction {
    /// As the label `reporter`.
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Outbound => "source",
            Self::Inbound => "destination",
        }
    }

    /// As the access log says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// One end of a connection.
#[derive(Clone, Debug)]
pub struct Side {
    /// Its address, as far as this proxy talks to it.
    pub addr: SocketAddr,
    /// The workload, if discovery knows it.
    pub workload: Option<Arc<Workload>>,
    /// Its identity, where a certificate proved it.
    pub identity: Option<SpiffeId>,
}

impl Side {
    /// An end of which only the address is known.
    pub fn at(addr: SocketAddr) -> Self {
        Self { addr, workload: None, identity: None }
    }
}

/// Where a connection goes.
#[derive(Clone, Debug)]
pub struct Reached {
    /// Who takes it; for a tunnel, the tunnel's far end.
    pub dst: Side,
    /// Inside a tunnel: the CONNECT's authority.
    pub hbone_addr: Option<Authority>,
    /// The service that was asked for.
    pub service: Option<Arc<Service>>,
    /// Whether it is carried by mutual TLS.
    pub mtls: bool,
}

/// Everything that is known of a connection when it is opened, and what it has carried since.
#[derive(Debug)]
pub struct Facts {
    /// Which way it goes.
    pub direction: Direction,
    /// When it was accepted.
    pub accepted: Instant,
    /// Who opened it.
    pub src: Side,
    /// Who takes it; for a tunnel, the tunnel's far end.
    pub dst: Side,
    /// Inside a tunnel: the CONNECT's authority.
    pub hbone_addr: Option<Authority>,
    /// The service that was asked for.
    pub service: Option<Arc<Service>>,
    /// Whether it is carried by mutual TLS.
    pub mtls: bool,
    /// The policy that decided.
    pub policy: Option<Arc<str>>,
    /// What it has carried. Left is the side of the tunnel, or of the network; right is the pod's application.
    pub counters: Counters,
    reported_sent: AtomicU64,
    reported_received: AtomicU64,
    /// Where it went in the end, of a connection that was begun before that was known; it replaces what is said above.
    reached: OnceLock<Reached>,
    handles: OnceLock<Handles>,
}

impl Facts {
    /// A connection of which only the addresses are known.
    pub fn new(direction: Direction, src: SocketAddr, dst: SocketAddr) -> Self {
        Self {
            direction,
            accepted: Instant::now(),
            src: Side::at(src),
            dst: Side::at(dst),
            hbone_addr: None,
            service: None,
            mtls: false,
            policy: None,
            counters: Counters::default(),
            reported_sent: AtomicU64::new(0),
            reported_received: AtomicU64::new(0),
            reached: OnceLock::new(),
            handles: OnceLock::new(),
        }
    }

    /// Says where it goes, as far as is known.
    pub fn set_destination(&mut self, to: Reached) {
        let Reached { dst, hbone_addr, service, mtls } = to;
        (self.dst, self.hbone_addr, self.service, self.mtls) = (dst, hbone_addr, service, mtls);
    }

    /// Who takes it; for a tunnel, the tunnel's far end.
    pub fn destination(&self) -> &Side {
        self.reached.get().map_or(&self.dst, |reached| &reached.dst)
    }

    /// Inside a tunnel: the CONNECT's authority.
    pub fn authority(&self) -> Option<&Authority> {
        self.reached.get().map_or(&self.hbone_addr, |reached| &reached.hbone_addr).as_ref()
    }

    /// The service that was asked for.
    pub fn asked_service(&self) -> Option<&Arc<Service>> {
        self.reached.get().map_or(&self.service, |reached| &reached.service).as_ref()
    }

    /// Whether it is carried by mutual TLS.
    pub fn is_mtls(&self) -> bool {
        self.reached.get().map_or(self.mtls, |reached| reached.mtls)
    }

    /// Bytes from the client to the server.
    pub fn request_bytes(&self) -> u64 {
        match self.direction {
            Direction::Outbound => self.counters.right_to_left.load(Ordering::Relaxed),
            Direction::Inbound => self.counters.left_to_right.load(Ordering::Relaxed),
        }
    }

    /// Bytes from the server to the client.
    pub fn response_bytes(&self) -> u64 {
        match self.direction {
            Direction::Outbound => self.counters.left_to_right.load(Ordering::Relaxed),
            Direction::Inbound => self.counters.right_to_left.load(Ordering::Relaxed),
        }
    }

    /// Brings the metrics up to what has been carried by now. For connections that live long.
    pub fn publish_bytes(&self) {
        let Some(handles) = self.handles.get() else { return };
        // The metrics' "sent" is what the client got, whoever reports it.
        let (sent, received) = (self.response_bytes(), self.request_bytes());
        handles.sent.inc_by(sent.saturating_sub(self.reported_sent.fetch_max(sent, Ordering::Relaxed)));
        handles.received.inc_by(received.saturating_sub(self.reported_received.fetch_max(received, Ordering::Relaxed)));
    }
}

/// A connection that was opened. [`Record::finish`] ends it; dropping it reports that it was cut off.
pub struct Record {
    guard: Guard<Facts>,
    metrics: Metrics,
    /// Set once it is counted as opened.
    labels: OnceLock<Labels>,
    finished: bool,
}

impl Record {
    /// Opens a connection of which everything is known: counts and lists it.
    ///
    /// # Errors
    /// When the pod has too many, or is gone; that has been reported then.
    pub fn open(metrics: &Metrics, live: &Arc<Live<Facts>>, facts: Facts) -> Result<Self, ConnectionError> {
        let record = Self::begin(metrics, live, facts)?;
        record.count();
        Ok(record)
    }

    /// Lists a connection of which it is not sure yet where it goes. It is counted by [`Record::reached`], or at its end:
    /// the labels of "opened" and "closed" must be the same.
    ///
    /// # Errors
    /// When the pod has too many, or is gone; that has been reported then.
    pub fn begin(metrics: &Metrics, live: &Arc<Live<Facts>>, facts: Facts) -> Result<Self, ConnectionError> {
        match live.open(facts) {
            Ok(guard) => Ok(Self { guard, metrics: metrics.clone(), labels: OnceLock::new(), finished: false }),
            Err((full, facts)) => {
                let error = match full {
                    Full::TooMany => ConnectionError::TooManyConnections,
                    Full::PodGone => ConnectionError::PodGone,
                };
                Self::refused(metrics, &facts, &error);
                Err(error)
            }
        }
    }

    /// Says where the connection goes, or where it was tried last, and counts it as opened. Once.
    pub fn reached(&self, to: Reached) {
        // A second one changes nothing.
        let _ = self.guard.facts.reached.set(to);
        self.count();
    }

    fn count(&self) -> &Labels {
        self.labels.get_or_init(|| {
            let labels = Labels::of(&self.guard.facts);
            // Set here only.
            let _ = self.guard.facts.handles.set(self.metrics.open(self.guard.facts.direction, &labels));
            labels
        })
    }

    /// Reports a connection that never came to be.
    pub fn refused(metrics: &Metrics, facts: &Facts, error: &ConnectionError) {
        let labels = Labels::of(facts);
        let _ = facts.handles.set(metrics.open(facts.direction, &labels));
        report(metrics, &labels, facts, Some(error));
    }

    /// Reports the connection's end.
    pub fn finish(mut self, result: Result<(), ConnectionError>) {
        self.finished = true;
        report(&self.metrics, self.count(), &self.guard.facts, result.err().as_ref());
    }
}

impl Deref for Record {
    type Target = Guard<Facts>;

    fn deref(&self) -> &Guard<Facts> {
        &self.guard
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.finished {
            report(&self.metrics, self.count(), &self.guard.facts, Some(&ConnectionError::Dropped));
        }
    }
}

fn report(metrics: &Metrics, labels: &Labels, facts: &Facts, error: Option<&ConnectionError>) {
    facts.publish_bytes();
    if let Some(handles) = facts.handles.get() {
        match error {
            Some(error) => {
                let labels = labels.clone().failed(error.flags());
                if error.is_failure_to_connect() {
                    metrics.fail(facts.direction, &labels, error.reason());
                }
                metrics.close(Some(&labels), handles);
            }
            None => metrics.close(None, handles),
        }
    }
    log(facts, error);
}

/// Writes the access log. Names, order and meaning of the fields are what log pipelines read.
fn log(facts: &Facts, error: Option<&ConnectionError>) {
    // In the log, "sent" is what the reporting side's own pod sent.
    let (sent, received) = match facts.direction {
        Direction::Outbound => (facts.request_bytes(), facts.response_bytes()),
        Direction::Inbound => (facts.response_bytes(), facts.request_bytes()),
    };
    let duration = format!("{}ms", facts.accepted.elapsed().as_millis());
    let (src, dst) = (Named::of(&facts.src), Named::of(facts.destination()));
    // The level of an event is part of its place in the code, hence a macro.
    macro_rules! complete {
        ($level:ident, $($error:tt)*) => {
            tracing::event!(
                target: "access",
                tracing::Level::$level,
                src.addr = %facts.src.addr,
                src.workload = src.workload,
                src.namespace = src.namespace,
                src.identity = src.identity,
                src.cluster = src.cluster,
                dst.addr = %facts.destination().addr,
                dst.hbone_addr = facts.authority().map(tracing::field::display),
                dst.service = facts.asked_service().map(|service| service.hostname.as_ref()),
                dst.workload = dst.workload,
                dst.namespace = dst.namespace,
                dst.identity = dst.identity,
                dst.cluster = dst.cluster,
                direction = facts.direction.as_str(),
                bytes_sent = sent,
                bytes_recv = received,
                duration = duration.as_str(),
                policy = facts.policy.as_deref(),
                $($error)*
                "connection complete"
            )
        };
    }
    match error {
        None => complete!(INFO,),
        Some(error) => {
            let text = error.to_string();
            complete!(ERROR, reason = error.reason(), error = text.as_str(),);
        }
    }
}

/// What the access log says of one end.
struct Named<'a> {
    workload: Option<&'a str>,
    namespace: Option<&'a str>,
    identity: Option<&'a str>,
    cluster: Option<&'a str>,
}

impl<'a> Named<'a> {
    fn of(side: &'a Side) -> Self {
        let workload = side.workload.as_deref();
        Self {
            workload: workload.map(|workload| workload.name.as_ref()),
            namespace: workload.map(|workload| workload.origin.namespace.as_ref()),
            identity: side.identity.as_ref().map(SpiffeId::as_str),
            cluster: workload.map(|workload| workload.location.cluster_id.as_ref()),
        }
    }
}
