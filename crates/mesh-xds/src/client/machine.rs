//! The client's side of the protocol, without I/O: events in, requests out.

mod subscription;
mod version;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_proto::core::Node;
use mesh_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_proto::rpc;

use self::subscription::Subscription;
use super::{Mode, Sink, TypeStatus};
use crate::Rejection;

/// Longest text of a NACK, in bytes.
const MAX_NACK: usize = 8 << 10;
/// `google.rpc.Code.INVALID_ARGUMENT`.
const INVALID_ARGUMENT: i32 = 3;

/// The state of all subscriptions, over any number of streams, one at a time.
///
/// The order of calls: [`connected`](Self::connected), then [`request`](Self::request) until it returns nothing after
/// each event, [`received`](Self::received) for each response, [`disconnected`](Self::disconnected).
#[derive(Debug)]
pub struct Machine {
    node: Node,
    max_names: usize,
    connected: bool,
    subscriptions: Vec<Subscription>,
    outgoing: VecDeque<DeltaDiscoveryRequest>,
}

impl Machine {
    /// `node` goes with the first request of each type. `types` are asked for in the given order; give the types that
    /// others refer to first. `max_names` bounds the names subscribed to, per type.
    pub fn new(node: Node, types: impl IntoIterator<Item = (Arc<str>, Mode)>, max_names: usize) -> Self {
        let subscriptions = types.into_iter().map(|(type_url, mode)| Subscription::new(type_url, mode)).collect();
        Self { node, max_names, connected: false, subscriptions, outgoing: VecDeque::new() }
    }

    /// A new stream is open: queues the first requests.
    pub fn connected(&mut self) {
        self.connected = true;
        self.outgoing.clear();
        for subscription in &mut self.subscriptions {
            // What was refused is not known to the server as known: it is sent, and refused, again.
            subscription.status.rejected.clear();
            let mut first = subscription.first_request();
            first.node = Some(self.node.clone());
            self.outgoing.push_back(first);
        }
        for subscription in &self.subscriptions {
            self.outgoing.extend(subscription.second_request());
        }
    }

    /// The stream has ended. What is known stays known.
    pub fn disconnected(&mut self) {
        self.connected = false;
        self.outgoing.clear();
    }

    /// The next request to send.
    pub fn request(&mut self) -> Option<DeltaDiscoveryRequest> {
        self.outgoing.pop_front()
    }

    /// Takes a response: gives its resources to `sink` and queues the ACK, or the NACK that names what was refused.
    pub fn received(
        &mut self,
        response: DeltaDiscoveryResponse,
        now: SystemTime,
        sink: &mut (impl Sink + ?Sized),
    ) -> Received {
        let type_url = response.type_url.clone();
        let mut request = DeltaDiscoveryRequest {
            type_url: type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        let found = self.subscriptions.iter_mut().find(|subscription| *subscription.type_url == *type_url);
        let received = match found {
            Some(subscription) => subscription.received(response, now, sink),
            None => {
                let reason = "a type that was not asked for".to_owned();
                Received { rejections: vec![Rejection { name: type_url, reason }], ..Received::default() }
            }
        };
        if !received.rejections.is_empty() {
            let message = nack_text(&received.rejections);
            request.error_detail = Some(rpc::Status { code: INVALID_ARGUMENT, message, details: Vec::new() });
        }
        self.outgoing.push_back(request);
        received
    }

    /// Subscribes to a name of an on-demand type, if that was not done before. At the limit of names, the one that has
    /// been known as absent for the longest gives way.
    pub fn subscribe(&mut self, type_url: &str, name: &str) -> Result<Subscribed, SubscribeError> {
        let subscription = self
            .subscriptions
            .iter_mut()
            .find(|subscription| *subscription.type_url == *type_url)
            .ok_or(SubscribeError::UnknownType)?;
        if name.is_empty() || name == "*" {
            return Err(SubscribeError::InvalidName);
        }
        if let Some(subscribed) = subscription.state(name) {
            return Ok(subscribed);
        }
        let evicted = subscription.make_room(self.max_names)?;
        subscription.want(name.into());
        if self.connected {
            self.queue_names(type_url, name, evicted);
        }
        Ok(Subscribed::Pending)
    }

    /// Whether every type has had its first complete answer, on this stream or an earlier one.
    pub fn is_synced(&self) -> bool {
        self.subscriptions.iter().all(|subscription| subscription.status.answered)
    }

    /// Names asked for that have no answer yet, of all types.
    pub fn pending(&self) -> usize {
        self.subscriptions.iter().map(Subscription::pending).sum()
    }

    /// The state of each type.
    pub fn status(&self) -> impl Iterator<Item = (&Arc<str>, &TypeStatus)> {
        self.subscriptions.iter().map(|subscription| (&subscription.type_url, &subscription.status))
    }

    /// Puts a subscription into the request that waits last, if that is one of the same kind; but not where the name was given
    /// up before: within one request there is no order.
    fn queue_names(&mut self, type_url: &str, name: &str, evicted: Option<Arc<str>>) {
        let fits = |last: &&mut DeltaDiscoveryRequest| {
            last.type_url == type_url
                && last.response_nonce.is_empty()
                && last.node.is_none()
                && !last.resource_names_unsubscribe.iter().any(|given_up| given_up == name)
        };
        let request = match self.outgoing.back_mut().filter(fits) {
            Some(last) => last,
            None => {
                let request = DeltaDiscoveryRequest { type_url: type_url.into(), ..DeltaDiscoveryRequest::default() };
                self.outgoing.push_back_mut(request)
            }
        };
        request.resource_names_subscribe.push(name.into());
        request.resource_names_unsubscribe.extend(evicted.map(|name| name.to_string()));
    }
}

/// What became of a response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Names asked for that have their (first) answer now.
    pub resolved: Vec<(Arc<str>, Answer)>,
    /// What was refused, and reported to the server.
    pub rejections: Vec<Rejection>,
}

/// The server's answer about a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// There is such a resource, and the sink has it.
    Present,
    /// There is none.
    Absent,
    /// There is one, and the sink refused it.
    Rejected,
}

/// What [`Machine::subscribe`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subscribed {
    /// Asked for; the answer will be in [`Received::resolved`].
    Pending,
    /// Answered already, and kept up to date since.
    Answered(Answer),
}

/// Why a name cannot be subscribed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubscribeError {
    /// The machine was not made for this type.
    #[error("this type is not subscribed to")]
    UnknownType,
    /// Empty or `*`.
    #[error("not a resource name")]
    InvalidName,
    /// The limit of names is reached, and all of them are in use.
    #[error("too many names are subscribed to")]
    TooManyNames,
}

/// One line per resource: `name: reason`.
fn nack_text(rejections: &[Rejection]) -> String {
    let mut text = String::new();
    for (done, Rejection { name, reason }) in rejections.iter().enumerate() {
        let line = format!("{name}: {}\n", reason.replace('\n', " "));
        if text.len() + line.len() > MAX_NACK {
            text.push_str(&format!("and {} more\n", rejections.len() - done));
            break;
        }
        text.push_str(&line);
    }
    text.truncate(text.trim_end().len());
    text
}

#[cfg(test)]
mod tests;
