//! One client's stream, without I/O: requests in, responses out.
//!
//! - One response per type is in flight; changes meanwhile are not queued but found again in the catalog's log, each name
//!   once, so a slow client costs no memory.
//! - A type waits while one before it in [`Limits::order`] has something to send: policies come before the workloads
//!   that they apply to.
//! - Of one type too, nothing is sent before what it refers to, and what is gone comes last, whatever changed first.
//! - A type that the catalog does not have is answered like one without resources, so that a client which knows more
//!   types than this server still becomes ready.

mod subscription;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_proto::discovery::DeltaDiscoveryRequest;

use self::subscription::{Names, Subscription};
use super::catalog::{Kind, Snapshot};
use super::encode;
use super::response::Response;
use super::status::{Nack, TypeStatus};
use crate::{AUTHORIZATION_TYPE, MORE, WORKLOAD_TYPE};

/// Longest name, type or node id that a client may send, in bytes.
const MAX_NAME: usize = 1024;
/// NACKed resources remembered per client.
const MAX_NACKS: usize = 256;
/// Longest reason remembered, in bytes.
const MAX_REASON: usize = 1024;

/// What a client may ask for.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Types of one stream.
    pub max_types: usize,
    /// Names subscribed to, per type.
    pub max_names: usize,
    /// Versions that a client may bring, per type.
    pub max_known: usize,
    /// Encoded resources in one response, in bytes, of which the last one may be beyond. Clients that are equally far
    /// share them; each of the others has its own, until it has taken them.
    pub max_response: usize,
    /// The same for a response of the first state, in full if it fits: a client that does not know how a response says that
    /// more follow takes the first one for all that there is. With what surrounds the resources it must stay below what
    /// clients take: our own 64 MiB.
    pub max_first_response: usize,
    /// Responses in a row that a client may be told changes out of their order, because it does not get all of them in one:
    /// one for which they come faster than it takes them must come back.
    pub max_uneven: usize,
    /// Types in the order in which they are sent; others come after them.
    pub order: Vec<Arc<str>>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_types: 16,
            max_names: 131_072,
            max_known: 2_000_000,
            max_response: 256 << 10,
            max_first_response: 48 << 20,
            // Several times all that there may be.
            max_uneven: 1 << 10,
            order: vec![AUTHORIZATION_TYPE.into(), WORKLOAD_TYPE.into()],
        }
    }
}

/// The client broke the protocol or a limit, or fell too far behind; its stream must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// More types than [`Limits::max_types`].
    #[error("too many types on one stream")]
    TooManyTypes,
    /// More names than [`Limits::max_names`].
    #[error("too many names")]
    TooManyNames,
    /// More versions than [`Limits::max_known`].
    #[error("too many initial resource versions")]
    TooManyVersions,
    /// A name or type is empty, or one of them or the node id is too long.
    #[error("a name or type is empty, or it or the node id is longer than {MAX_NAME} bytes")]
    InvalidName,
    /// The changes that the client needs are no longer in the log. It must reconnect, and say what it has.
    #[error("too far behind: reconnect")]
    TooFarBehind,
}

impl From<Violation> for tonic::Status {
    fn from(violation: Violation) -> Self {
        let message = violation.to_string();
        match violation {
            Violation::TooManyTypes | Violation::TooManyNames | Violation::TooManyVersions => {
                Self::resource_exhausted(message)
            }
            Violation::InvalidName => Self::invalid_argument(message),
            Violation::TooFarBehind => Self::aborted(message),
        }
    }
}

/// The state of one stream.
#[derive(Debug)]
pub struct Machine {
    limits: Arc<Limits>,
    node_id: String,
    nonces: u64,
    /// In the order of [`Limits::order`], then of arrival.
    subscriptions: Vec<Subscription>,
    nacks: BTreeMap<(Arc<str>, String), Nack>,
}

impl Machine {
    /// A stream on which nothing was said yet.
    pub fn new(limits: Arc<Limits>) -> Self {
        Self { limits, node_id: String::new(), nonces: 0, subscriptions: Vec::new(), nacks: BTreeMap::new() }
    }

    /// Takes a request. `catalog` must not be older than the one of an earlier call.
    pub fn request(
        &mut self,
        catalog: &Snapshot,
        request: DeltaDiscoveryRequest,
        now: SystemTime,
    ) -> Result<(), Violation> {
        if let Some(node) = &request.node {
            if node.id.len() > MAX_NAME {
                return Err(Violation::InvalidName);
            }
            self.node_id.clone_from(&node.id);
        }
        check(&request.type_url)?;
        let names = request.resource_names_subscribe.iter().chain(&request.resource_names_unsubscribe);
        names.chain(request.initial_resource_versions.keys()).try_for_each(|name| check(name))?;
        if request.initial_resource_versions.len() > self.limits.max_known {
            return Err(Violation::TooManyVersions);
        }

        let empty = Kind::default();
        let kind = catalog.kind(&request.type_url).unwrap_or(&empty);
        let limits = Arc::clone(&self.limits);
        let at = self.position(&request.type_url, kind)?;
        let Some(subscription) = self.subscriptions.get_mut(at) else { return Ok(()) };
        if let Some(done) = subscription.acknowledge(&request.response_nonce, request.error_detail.is_none()) {
            let type_url = subscription.type_url.clone();
            self.nacks.retain(|(of, name), _| *of != type_url || !(name.is_empty() || done.contain(name, kind)));
            if let Some(error) = &request.error_detail {
                for (resource, reason) in read_nack(&error.message, &done, kind) {
                    self.remember(type_url.clone(), resource, reason, now);
                }
            }
        }
        let Some(subscription) = self.subscriptions.get_mut(at) else { return Ok(()) };
        subscription.subscribe(kind, request);
        if subscription.names() > limits.max_names {
            return Err(Violation::TooManyNames);
        }
        Ok(())
    }

    /// The next response, if there is something to send that need not wait for an ACK. `catalog` must not be older than
    /// the one of an earlier call.
    pub fn respond(&mut self, catalog: &Snapshot) -> Result<Option<Response>, Violation> {
        let empty = Kind::default();
        for subscription in &mut self.subscriptions {
            let kind = catalog.kind(&subscription.type_url).unwrap_or(&empty);
            subscription.collect(kind).map_err(|_| Violation::TooFarBehind)?;
            if !subscription.has_more(kind) {
                continue;
            }
            if subscription.is_in_flight() {
                // The types behind it wait: they may refer to what it has to send.
                return Ok(None);
            }
            let nonce = (self.nonces + 1).to_string();
            let chunk = subscription.chunk(kind, &self.limits, &nonce).map_err(|_| Violation::TooFarBehind)?;
            let Some(chunk) = chunk else { continue };
            self.nonces += 1;
            let more = if chunk.more { MORE } else { "" };
            let head = encode::head(&subscription.type_url, &nonce, &format!("{}{more}", kind.version()));
            return Ok(Some(Response {
                type_url: subscription.type_url.clone(),
                nonce,
                resources: chunk.resources,
                more: chunk.more,
                head,
                content: chunk.content,
            }));
        }
        Ok(None)
    }

    /// Whether a response waits for its ACK.
    pub fn is_in_flight(&self) -> bool {
        self.subscriptions.iter().any(Subscription::is_in_flight)
    }

    /// Whether some type's initial state is not sent and acknowledged yet.
    pub fn is_syncing(&self) -> bool {
        self.subscriptions.iter().any(Subscription::is_syncing)
    }

    /// The node id of the client's last request that had one.
    pub fn node_id(&self) -> &str {
        &self.node_id
    }

    /// The state of each type.
    pub fn status(&self) -> Vec<TypeStatus> {
        let mut types = Vec::new();
        self.write_status(&mut types);
        types
    }

    /// Writes the state of each type over an older one, of which nothing is left: this is done for every client at every
    /// change.
    pub fn write_status(&self, types: &mut Vec<TypeStatus>) {
        types.truncate(self.subscriptions.len());
        for (at, subscription) in self.subscriptions.iter().enumerate() {
            let mut status = subscription.status();
            if !self.nacks.is_empty() {
                let of_type = self.nacks.iter().filter(|((type_url, _), _)| *type_url == subscription.type_url);
                status.nacks = of_type.map(|(_, nack)| nack.clone()).collect();
            }
            match types.get_mut(at) {
                Some(older) => *older = status,
                None => types.push(status),
            }
        }
    }

    /// Where the type's subscription is, made if there was none.
    fn position(&mut self, type_url: &str, kind: &Kind) -> Result<usize, Violation> {
        if let Some(at) = self.subscriptions.iter().position(|known| *known.type_url == *type_url) {
            return Ok(at);
        }
        if self.subscriptions.len() >= self.limits.max_types {
            return Err(Violation::TooManyTypes);
        }
        let order = &self.limits.order;
        let rank = |name: &str| order.iter().position(|known| **known == *name).unwrap_or(order.len());
        let at = self.subscriptions.partition_point(|known| rank(&known.type_url) <= rank(type_url));
        self.subscriptions.insert(at, Subscription::new(type_url.into(), kind.version()));
        Ok(at)
    }

    fn remember(&mut self, type_url: Arc<str>, resource: String, reason: String, at: SystemTime) {
        let key = (type_url, resource.clone());
        if self.nacks.len() < MAX_NACKS || self.nacks.contains_key(&key) {
            self.nacks.insert(key, Nack { resource, reason, at });
        }
    }
}

fn check(name: &str) -> Result<(), Violation> {
    if name.is_empty() || name.len() > MAX_NAME { Err(Violation::InvalidName) } else { Ok(()) }
}

/// The resources and reasons that a NACK names: lines of `name: reason`, as our own client writes them. Anything else is
/// one reason for an unnamed resource.
fn read_nack(message: &str, sent: &Names, kind: &Kind) -> Vec<(String, String)> {
    let named: Vec<(String, String)> = message
        .lines()
        // What is remembered is bounded; what is looked through is as well.
        .take(4 * MAX_NACKS)
        .filter_map(|line| line.split_once(": "))
        .filter(|(name, _)| sent.contain(name, kind))
        .map(|(name, reason)| (name.to_owned(), cut(reason)))
        .collect();
    if named.is_empty() { vec![(String::new(), cut(message))] } else { named }
}

fn cut(reason: &str) -> String {
    reason.char_indices().take_while(|(at, _)| *at < MAX_REASON).map(|(_, c)| c).collect()
}

#[cfg(test)]
mod move_tests;
#[cfg(test)]
mod tests;
