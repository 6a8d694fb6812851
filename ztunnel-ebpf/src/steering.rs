//! What becomes of a packet that arrives in a pod's namespace and has no socket of its own yet.
//!
//! The device by which it arrived tells most of it. What the pod sends to itself is looped by the kernel and carries the
//! index of the device that has the address, not of `lo`; what is captured on its way out carries that of `lo`.
//!
//! | arrived by | to | from | becomes |
//! |---|---|---|---|
//! | `lo` | elsewhere | any | captured: to the outbound listener |
//! | `lo` | loopback, the pod's own address, its source | any | left alone |
//! | the pod's own interface | any | loopback, the pod's own address, its destination | left alone: it is looped |
//! | the pod's own interface | any | elsewhere | from outside: to the proxy, also for addresses that are not the pod's own |
//! | another interface | the pod's own address | elsewhere | from outside: the address is the mesh's, wherever it is asked for |
//! | another interface | any other address | any | left alone |
//!
//! What is left alone never reaches the proxy's listeners, which would be found by their ports.

use crate::tuple::is_loopback;
use crate::{
    FLAG_DNS, FourTuple, PORT_DNS, PORT_INBOUND_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND, PORT_RESOLVER, PodEntry,
};

/// Index of `lo` in every namespace.
pub const LOOPBACK: u32 = 1;

/// A protocol that is steered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP, of which only queries matter.
    Udp,
}

/// A packet that has no socket of its own yet.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Its protocol.
    pub protocol: Protocol,
    /// Index of the device by which it arrived, as the lookup program is told.
    pub device: u32,
    /// Its addresses and ports.
    pub tuple: FourTuple,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steering {
    /// The kernel looks for a listener as usual.
    LeaveAlone,
    /// Nobody gets it.
    Drop,
    /// To the outbound listener.
    Outbound,
    /// To the listener for DNS of its protocol; TCP to the outbound one where there is none.
    Dns,
    /// From outside to the pod: to the listener for HBONE or for plaintext, unless it is the kubelet's.
    Inbound,
}

/// Where a packet comes from.
enum Origin {
    /// The pod itself.
    Inside,
    /// Whoever can reach the pod by its own interface, or its own address by any.
    Outside,
    /// A network of the pod that is not the mesh's.
    Beside,
}

/// Decides what becomes of a packet that arrives in this pod's namespace.
#[inline(always)]
#[must_use]
pub fn steer(pod: &PodEntry, arrival: &Arrival) -> Steering {
    match arrival.protocol {
        Protocol::Tcp => steer_tcp(pod, arrival),
        Protocol::Udp => steer_udp(pod, arrival),
    }
}

#[inline(always)]
fn steer_tcp(pod: &PodEntry, arrival: &Arrival) -> Steering {
    let port = arrival.tuple.destination_port;
    // The transparent listeners are found by address too; what was not steered must not reach them.
    let reserved = matches!(port, PORT_OUTBOUND | PORT_INBOUND_PLAINTEXT | PORT_DNS);
    match origin(pod, arrival) {
        Origin::Inside if is_captured(pod, arrival) && port == PORT_RESOLVER && pod.has(FLAG_DNS) => Steering::Dns,
        Origin::Inside if is_captured(pod, arrival) => Steering::Outbound,
        // A proxy connects to its own pod by HBONE too.
        Origin::Inside if reserved => Steering::Drop,
        Origin::Beside if reserved || port == PORT_INBOUND_HBONE => Steering::Drop,
        Origin::Inside | Origin::Beside => Steering::LeaveAlone,
        Origin::Outside => Steering::Inbound,
    }
}

#[inline(always)]
fn steer_udp(pod: &PodEntry, arrival: &Arrival) -> Steering {
    if !pod.has(FLAG_DNS) {
        return Steering::LeaveAlone;
    }
    match arrival.tuple.destination_port {
        PORT_DNS => Steering::Drop,
        PORT_RESOLVER if is_captured(pod, arrival) => Steering::Dns,
        _ => Steering::LeaveAlone,
    }
}

#[inline(always)]
fn origin(pod: &PodEntry, arrival: &Arrival) -> Origin {
    let (local, remote) = (&arrival.tuple.destination, &arrival.tuple.source);
    let own = pod.interface == 0 || arrival.device == pod.interface;
    if arrival.device == LOOPBACK {
        Origin::Inside
    } else if !own && !pod.owns(local) {
        Origin::Beside
    } else if pod.owns(remote) || is_loopback(remote) || same(local, remote) {
        // Whoever forges such a source never sees an answer: answers stay in the pod.
        Origin::Inside
    } else {
        Origin::Outside
    }
}

/// Whether the pod sent it to somebody else, and the mesh's routing table brought it here. An address of the pod that the
/// mesh does not know is its own source: the kernel chooses it, and never for what is captured.
#[inline(always)]
fn is_captured(pod: &PodEntry, arrival: &Arrival) -> bool {
    let (local, remote) = (&arrival.tuple.destination, &arrival.tuple.source);
    arrival.device == LOOPBACK && !pod.owns(local) && !is_loopback(local) && !same(local, remote)
}

/// Word by word: a comparison of arrays becomes a call, which costs more than it does.
#[inline(always)]
const fn same(a: &[u32; 4], b: &[u32; 4]) -> bool {
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}

#[cfg(test)]
mod tests;
