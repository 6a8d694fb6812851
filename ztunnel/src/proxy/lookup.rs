//! Discovery on demand: what a decision needs and the snapshot does not have is asked for before the decision is made, so
//! that the proxy knows what its pods use and not all that there is. Without an answer nothing is decided: an address
//! that is not known would look like one outside the mesh.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::gateway::{GatewayAddress, GatewayDestination};
use mesh_model::service::{BLOCKS, LoadBalancingMode};
use mesh_model::{Destination, Snapshot};
use mesh_xds::WORKLOAD_TYPE;
use mesh_xds::client::{Demand, DemandError};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::local::LocalPod;
use super::state::State;

/// Longest that one connection waits for an answer.
const WAIT: Duration = Duration::from_secs(5);

/// Connections of one pod that wait for answers at a time.
const WAITING: usize = 512;

/// Questions that one decision may raise: the pod, the destination, and the waypoints of a service, one after the other.
const STEPS: usize = 32;

/// How many connections of a pod wait for answers.
#[derive(Debug)]
pub struct Bound(Semaphore);

impl Default for Bound {
    fn default() -> Self {
        Self(Semaphore::new(WAITING))
    }
}

/// Why a decision could not be prepared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// No answer came in time.
    #[error("the control plane did not say in time what {0} is; without that nothing is let out (see --discovery)")]
    Timeout(String),
    /// The pod asks about too much at a time.
    #[error("{WAITING} connections of the pod wait for the control plane already")]
    Waiting,
    /// The question could not be asked.
    #[error("cannot ask the control plane what {name} is: {error}")]
    Demand {
        /// What was to be asked.
        name: String,
        /// Why not.
        error: DemandError,
    },
    /// Answers raise ever new questions.
    #[error("more than {STEPS} names had to be asked for")]
    Endless,
}

impl LookupError {
    /// A label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Timeout(_) => "discovery_timeout",
            Self::Waiting => "discovery_busy",
            Self::Demand { .. } => "discovery_failed",
            Self::Endless => "discovery_endless",
        }
    }
}

/// Asks discovery, or does nothing where discovery tells everything unasked.
#[derive(Clone, Debug, Default)]
pub struct Lookup(Option<Demand>);

impl Lookup {
    /// Everything is told unasked.
    pub fn unneeded() -> Self {
        Self(None)
    }

    /// Only what is asked for is told. Services that cannot be found by an address alone are asked for from now on.
    pub fn on_demand(demand: Demand) -> Self {
        let blocks = demand.clone();
        // Once is enough: the client of discovery keeps what it is subscribed to, over all connections.
        tokio::spawn(async move {
            if let Err(error) = blocks.resolve(WORKLOAD_TYPE, BLOCKS).await {
                tracing::error!(%error, "services with blocks of addresses are not known");
            }
        });
        Self(Some(demand))
    }

    /// Returns once the snapshot has all that deciding on a connection of `source` to `dst` needs.
    ///
    /// # Errors
    /// What was not answered; the connection must not be carried.
    pub async fn outbound(
        &self,
        state: &State,
        source: &LocalPod<'_>,
        dst: IpAddr,
        bound: &Bound,
    ) -> Result<(), LookupError> {
        self.all(bound, |answered| outbound_needs(&state.snapshot(), source, dst, answered)).await
    }

    /// Returns once the snapshot has the pod, by which what comes in is decided.
    ///
    /// # Errors
    /// What was not answered.
    pub async fn inbound(&self, state: &State, pod: &LocalPod<'_>, bound: &Bound) -> Result<(), LookupError> {
        self.all(bound, |answered| pod_needs(&state.snapshot(), pod, answered)).await
    }

    async fn all(&self, bound: &Bound, needs: impl Fn(&[Arc<str>]) -> Option<Arc<str>>) -> Result<(), LookupError> {
        let Some(demand) = &self.0 else { return Ok(()) };
        let mut answered: Vec<Arc<str>> = Vec::new();
        let Some(mut name) = needs(&answered) else { return Ok(()) };
        let _permit = bound.0.try_acquire().map_err(|_| LookupError::Waiting)?;
        while answered.len() < STEPS {
            match timeout(WAIT, demand.resolve(WORKLOAD_TYPE, &name)).await {
                // Absent and refused are answers too: the decision sees what the snapshot has.
                Ok(Ok(_)) => answered.push(name),
                Ok(Err(error)) => return Err(LookupError::Demand { name: name.to_string(), error }),
                Err(_) => return Err(LookupError::Timeout(name.to_string())),
            }
            let Some(next) = needs(&answered) else { return Ok(()) };
            name = next;
        }
        Err(LookupError::Endless)
    }
}

/// The next name to ask for before a connection of `source` to `dst` can be decided on; `answered` were asked for.
fn outbound_needs(snapshot: &Snapshot, source: &LocalPod<'_>, dst: IpAddr, answered: &[Arc<str>]) -> Option<Arc<str>> {
    let ask = |name: Arc<str>| Some(name).filter(|name| !answered.contains(name));
    if let Some(name) = pod_needs(snapshot, source, answered) {
        return Some(name);
    }
    let workload = source.workload(snapshot);
    let from = source.viewpoint(workload);
    let dst = dst.to_canonical();
    if !snapshot.knows_address(from.network, dst)
        && let Some(name) = ask(address_name(from.network, dst))
    {
        return Some(name);
    }
    let needs_gateway = |gateway: &GatewayAddress| match &gateway.destination {
        GatewayDestination::Service(key) if snapshot.service_by_name(key).is_none() => ask(Arc::clone(key)),
        GatewayDestination::Address(at) if !snapshot.knows_address(&at.network, at.ip) => {
            ask(address_name(&at.network, at.ip))
        }
        GatewayDestination::Service(_) | GatewayDestination::Address(_) => None,
    };
    let of_workload = |destination| match destination {
        Destination::Workload(workload) => workload.waypoint().and_then(needs_gateway),
        Destination::Service(_) | Destination::Unusable(_) | Destination::Unknown => None,
    };
    match snapshot.destination(&from, dst) {
        Destination::Service(service) => {
            let weighted = service.weighted_waypoints.iter().map(|(waypoint, _)| waypoint);
            weighted.chain(&service.waypoint).find_map(needs_gateway).or_else(|| {
                // Such a service leaves the way to the address.
                let is_passed = service.load_balancing.mode == LoadBalancingMode::Passthrough;
                is_passed.then(|| of_workload(snapshot.workload_destination(from.network, dst))).flatten()
            })
        }
        other @ (Destination::Workload(_) | Destination::Unusable(_) | Destination::Unknown) => of_workload(other),
    }
}

/// The next name to ask for before anything about a pod of this node can be decided.
fn pod_needs(snapshot: &Snapshot, pod: &LocalPod<'_>, answered: &[Arc<str>]) -> Option<Arc<str>> {
    if pod.workload(snapshot).is_some() {
        return None;
    }
    let names = pod.addresses.iter().map(|ip| address_name(pod.network, ip.to_canonical()));
    names.into_iter().find(|name| !answered.contains(name))
}

/// What discovery calls an address, as its second name.
fn address_name(network: &str, ip: IpAddr) -> Arc<str> {
    format!("{network}/{ip}").into()
}

#[cfg(test)]
mod tests {
    use super::super::local::fixture::{id, in_service, ip, local, mesh, pod, service, waypoint};
    use super::*;

    #[test]
    fn the_pod_then_the_destination_then_its_waypoints() {
        let (identity, addresses) = (id("shop", "web"), [ip("10.0.0.1")]);
        let source = local("web", &identity, &addresses);
        let needs = |snapshot: &Snapshot, dst: &str, answered: &[&str]| {
            let answered: Vec<Arc<str>> = answered.iter().map(|name| Arc::from(*name)).collect();
            outbound_needs(snapshot, &source, ip(dst), &answered).map(|name| name.to_string())
        };
        let none = Snapshot::new();
        assert_eq!(needs(&none, "10.1.0.1", &[]).as_deref(), Some("/10.0.0.1"));
        assert_eq!(needs(&none, "10.1.0.1", &["/10.0.0.1"]).as_deref(), Some("/10.1.0.1"));
        assert_eq!(needs(&none, "::ffff:10.1.0.1", &["/10.0.0.1"]).as_deref(), Some("/10.1.0.1"));
        assert_eq!(needs(&none, "10.1.0.1", &["/10.0.0.1", "/10.1.0.1"]), None, "it is absent");

        let mut bound = service("reviews", "10.1.0.1", &[(80, 8080)]);
        bound.waypoint = Some(waypoint("way"));
        let web = pod("web", &["10.0.0.1"]);
        let snapshot = mesh(std::slice::from_ref(&web), std::slice::from_ref(&bound));
        let key = "shop/way.shop.svc.cluster.local";
        assert_eq!(needs(&snapshot, "10.1.0.1", &[]).as_deref(), Some(key));
        assert_eq!(needs(&snapshot, "10.1.0.1", &[key]), None, "the decision then refuses");
        let way = service("way", "10.1.0.2", &[(15008, 15008)]);
        let instance = in_service(pod("way", &["10.0.0.9"]), "way", &[(15008, 15008)]);
        let snapshot = mesh(&[web.clone(), instance], &[bound, way]);
        assert_eq!(needs(&snapshot, "10.1.0.1", &[]), None);
        assert_eq!(needs(&snapshot, "10.0.0.9", &[]), None, "known as an endpoint");

        let mut far = pod("far", &["10.0.0.2"]);
        far.waypoint = Some(waypoint("way"));
        assert_eq!(needs(&mesh(&[web, far], &[]), "10.0.0.2", &[]).as_deref(), Some(key));
    }

    #[test]
    fn an_address_within_a_block_is_asked_for_all_the_same() {
        let (identity, addresses) = (id("shop", "web"), [ip("10.0.0.1")]);
        let source = local("web", &identity, &addresses);
        let mut block = service("block", "10.2.0.0", &[(80, 80)]);
        block.addresses[0].length = Some(16);
        let snapshot = mesh(&[pod("web", &["10.0.0.1"])], &[block]);
        let name = outbound_needs(&snapshot, &source, ip("10.2.3.4"), &[]);
        assert_eq!(name.as_deref(), Some("/10.2.3.4"), "something narrower may be there");
    }

    #[test]
    fn another_pod_at_the_address_is_not_the_pod() {
        let (identity, addresses) = (id("shop", "web"), [ip("10.0.0.1")]);
        let source = local("web", &identity, &addresses);
        let snapshot = mesh(&[pod("before", &["10.0.0.1"])], &[]);
        assert_eq!(pod_needs(&snapshot, &source, &[]).as_deref(), Some("/10.0.0.1"));
        assert_eq!(pod_needs(&snapshot, &source, &["/10.0.0.1".into()]), None);
    }
}
