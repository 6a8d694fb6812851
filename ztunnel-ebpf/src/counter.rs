//! What the programs count.

/// What the programs count, per CPU, for the whole node. The value is the index in [`MAP_COUNTERS`](crate::MAP_COUNTERS).
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Connections of enrolled pods that were marked for the outbound listener.
    Captured = 0,
    /// Connections of enrolled pods that were refused because the socket could not be marked.
    Denied = 1,
    /// Packets from outside steered to a listener of the proxy.
    InboundSteered = 2,
    /// Packets of captured connections steered to the outbound listener.
    OutboundSteered = 3,
    /// Packets dropped because the proxy has no listener for them, or because they addressed one directly.
    Dropped = 4,
    /// DNS requests, and connections to resolvers, steered to the proxy.
    DnsSteered = 5,
    /// Connections of the kubelet left alone.
    ProbesPassed = 6,
    /// Packets that the guard dropped: TCP that did not come from the proxy.
    GuardDropped = 7,
    /// Packets of connections older than the enrolment that the guard let pass.
    OlderPassed = 8,
}

impl Counter {
    /// All of them, in the order of their index.
    pub const ALL: [Self; 9] = [
        Self::Captured,
        Self::Denied,
        Self::InboundSteered,
        Self::OutboundSteered,
        Self::Dropped,
        Self::DnsSteered,
        Self::ProbesPassed,
        Self::GuardDropped,
        Self::OlderPassed,
    ];

    /// Name for metrics and status.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::Denied => "denied",
            Self::InboundSteered => "inbound_steered",
            Self::OutboundSteered => "outbound_steered",
            Self::Dropped => "dropped",
            Self::DnsSteered => "dns_steered",
            Self::ProbesPassed => "probes_passed",
            Self::GuardDropped => "guard_dropped",
            Self::OlderPassed => "older_passed",
        }
    }

    /// One sentence for metrics.
    #[must_use]
    pub const fn help(self) -> &'static str {
        match self {
            Self::Captured => "Connections of enrolled pods that were marked for the proxy",
            Self::Denied => "Connections of enrolled pods that were refused because they could not be captured",
            Self::InboundSteered => "Connections from outside that were steered to the proxy",
            Self::OutboundSteered => "Captured connections that were steered to the proxy",
            Self::Dropped => "Packets dropped for want of a listener of the proxy, or addressed to one directly",
            Self::DnsSteered => "DNS requests and connections to resolvers that were steered to the proxy",
            Self::ProbesPassed => "Connections of the kubelet that were left alone",
            Self::GuardDropped => "Packets dropped at the edge of enrolled pods: TCP that did not come from the proxy",
            Self::OlderPassed => "Packets of connections older than the enrolment that were let pass",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_indexed_in_order() {
        for (index, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, index);
        }
    }
}
