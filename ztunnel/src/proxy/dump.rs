//! What `/config_dump` shows: everything that decisions are made by, and everything that lives; no key, no token.
//! `?include=workloads,pods` asks for these parts alone, of a mesh whose dump is long.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use mesh_identity::store::IdentityStatus;
use mesh_model::{Authorization, Health, Service, Unusable, Workload};
use mesh_xds::client::{Handle, Status};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::live::Connection;
use super::pods::{Pod, Pods};
use super::record::{Facts, Side};
use super::sockets::{NodeCap, SocketKind};
use super::tunnels::TunnelFacts;
use super::worker::Shared;

/// Connections that one dump lists; the rest is counted.
const MAX_CONNECTIONS: usize = 10_000;

/// The parts of a dump that were asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Included(Option<Vec<String>>);

impl Included {
    /// Reads the parameter `include`, a list of names with commas between them; all parts without one.
    pub fn read(parameter: Option<&str>) -> Self {
        Self(parameter.map(|names| names.split(',').map(str::to_owned).collect()))
    }

    fn has(&self, name: &str) -> bool {
        self.0.as_ref().is_none_or(|names| names.iter().any(|one| one == name))
    }
}

/// Where a dump comes from.
pub struct Dump {
    /// What the threads share.
    pub shared: Arc<Shared>,
    /// The pods.
    pub pods: Arc<Pods>,
    /// All stocks together.
    pub cap: Arc<NodeCap>,
    /// Discovery's state.
    pub discovery: Handle,
}

impl Dump {
    /// What there is now, of the parts that were asked for; the version and the node always.
    pub fn json(&self, included: &Included) -> Value {
        let snapshot = self.shared.state.snapshot();
        let mut dump = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "node": { "name": self.shared.node, "network": self.shared.network, "cluster": self.shared.cluster_id },
        });
        let mut add = |name: &str, value: &dyn Fn() -> Value| {
            if included.has(name) {
                dump[name] = value();
            }
        };
        add("discovery", &|| discovery(&self.discovery.status().borrow()));
        add("workloads", &|| snapshot.workloads().map(|one| workload(one)).collect());
        add("services", &|| snapshot.services().map(|one| service(one)).collect());
        add("invalidAddresses", &|| snapshot.all_unusable().map(|one| unusable(one)).collect());
        add("policies", &|| snapshot.authorizations().map(|one| policy(one)).collect());
        add("certificates", &|| self.shared.certificates.status().iter().map(certificate).collect());
        add("pods", &|| {
            let mut room = MAX_CONNECTIONS;
            self.pods.pods().iter().map(|one| self.pod(one, &mut room)).collect()
        });
        add("tunnels", &|| self.shared.tunnels.all().iter().map(|one| tunnel(one)).collect());
        add("stockedSockets", &|| json!(self.cap.idle()));
        add("dns", &|| self.shared.dns.metrics.json());
        dump
    }

    /// `room` is how many connections may still be listed.
    fn pod(&self, pod: &Pod, room: &mut usize) -> Value {
        let open = pod.live.connections();
        let listed = open.len().min(*room);
        *room -= listed;
        let stock = self.pods.stock(&pod.uid);
        let idle = |kind| stock.as_ref().map_or(0, |stock| stock.idle(kind));
        let stock = SocketKind::ALL.iter().map(|kind| (String::from(kind.as_str()), json!(idle(*kind))));
        let stock: serde_json::Map<_, _> = stock.collect();
        json!({
            "uid": pod.uid.as_ref(),
            "name": pod.name.as_ref(),
            "namespace": pod.namespace.as_ref(),
            "identity": pod.identity.as_str(),
            "addresses": pod.addresses,
            "knownToDiscovery": self.shared.local(pod).workload(&self.shared.state.snapshot()).is_some(),
            "stock": stock,
            "connections": open.iter().take(listed).map(|one| connection(one)).collect::<Vec<_>>(),
            "connectionsOmitted": open.len() - listed,
        })
    }
}

fn connection(connection: &Connection<Facts>) -> Value {
    let facts = &connection.facts;
    json!({
        "direction": facts.direction.as_str(),
        "source": side(&facts.src),
        "destination": side(facts.destination()),
        "hboneAddress": facts.authority().map(|authority| authority.as_str()),
        "service": facts.asked_service().map(|service| service.hostname.as_ref()),
        "mtls": facts.is_mtls(),
        "policy": facts.policy.as_deref(),
        "ageMs": u64::try_from(facts.accepted.elapsed().as_millis()).unwrap_or(u64::MAX),
        "requestBytes": facts.request_bytes(),
        "responseBytes": facts.response_bytes(),
    })
}

fn side(side: &Side) -> Value {
    json!({
        "address": side.addr,
        "workload": side.workload.as_ref().map(|workload| workload.name.as_ref()),
        "namespace": side.workload.as_ref().map(|workload| workload.origin.namespace.as_ref()),
        "identity": side.identity.as_ref().map(|identity| identity.as_str()),
    })
}

fn tunnel(tunnel: &TunnelFacts) -> Value {
    let negotiated = tunnel.negotiated.get();
    json!({
        "direction": tunnel.direction.as_str(),
        "pod": tunnel.pod,
        "local": tunnel.local,
        "peer": tunnel.peer,
        "identity": tunnel.identity.as_str(),
        "peerIdentity": negotiated.map(|negotiated| negotiated.peer.as_str()),
        "tlsVersion": negotiated.map(|negotiated| negotiated.version.as_str()),
        "cipherSuite": negotiated.map(|negotiated| negotiated.suite.as_str()),
        "keyExchange": negotiated.map(|negotiated| negotiated.group.as_str()),
        "alpn": negotiated.map(|negotiated| negotiated.alpn.as_str()),
        "since": rfc3339(tunnel.since),
        "streams": tunnel.streams.load(Ordering::Relaxed),
        "streamsServed": tunnel.served.load(Ordering::Relaxed),
        "bytesRead": tunnel.read.load(Ordering::Relaxed),
        "bytesWritten": tunnel.written.load(Ordering::Relaxed),
    })
}

fn workload(workload: &Workload) -> Value {
    json!({
        "uid": workload.uid.as_ref(),
        "name": workload.name.as_ref(),
        "namespace": workload.origin.namespace.as_ref(),
        "identity": workload.spiffe_id().as_str(),
        "addresses": workload.addresses,
        "network": workload.location.network.as_ref(),
        "node": workload.location.node.as_ref(),
        "cluster": workload.location.cluster_id.as_ref(),
        "protocol": format!("{:?}", workload.tunnel_protocol),
        "healthy": workload.health == Health::Healthy,
        "draining": workload.health == Health::Draining,
        "hostNetwork": workload.host_network,
        "waypoint": workload.waypoint().map(|waypoint| format!("{waypoint:?}")),
        "canonicalName": workload.origin.canonical_name.as_ref(),
        "canonicalRevision": workload.origin.canonical_revision.as_ref(),
        "workloadName": workload.origin.workload_name.as_ref(),
        "workloadType": format!("{:?}", workload.origin.workload_type),
        "services": workload.services.iter().map(|member| member.service.as_ref()).collect::<Vec<_>>(),
        "policies": workload.authorization_policies.iter().map(AsRef::as_ref).collect::<Vec<&str>>(),
    })
}

fn service(service: &Service) -> Value {
    let ports = service.ports.iter();
    json!({
        "name": service.name.as_ref(),
        "namespace": service.namespace.as_ref(),
        "hostname": service.hostname.as_ref(),
        "addresses": service.addresses.iter().map(|vip| vip.block.to_string()).collect::<Vec<_>>(),
        "ports": ports.map(|port| json!([port.service_port, port.target_port])).collect::<Vec<_>>(),
        "subjectAltNames": service.subject_alt_names.iter().map(|id| id.as_str()).collect::<Vec<_>>(),
        "waypoint": service.waypoint.as_ref().map(|waypoint| format!("{waypoint:?}")),
    })
}

fn unusable(unusable: &Unusable) -> Value {
    json!({ "name": unusable.name.as_ref(), "reason": unusable.reason.as_ref() })
}

fn policy(policy: &Authorization) -> Value {
    json!({
        "name": policy.name.as_ref(),
        "namespace": policy.namespace.as_ref(),
        "scope": format!("{:?}", policy.scope),
        "action": policy.action().map(|action| format!("{action:?}")),
        "dryRun": policy.dry_run,
        "invalid": policy.is_invalid(),
    })
}

fn certificate(status: &IdentityStatus) -> Value {
    let credential = status.credential.as_deref();
    json!({
        "identity": status.id.as_str(),
        "state": format!("{:?}", status.state),
        "serial": credential.map(|credential| credential.serial()),
        "validFrom": credential.map(|credential| rfc3339(credential.not_before())),
        "expires": credential.map(|credential| rfc3339(credential.not_after())),
        "nextAttempt": rfc3339(status.next_attempt),
        "lastError": status.last_error.as_ref().map(|last| &last.error),
        "roots": credential.map(|credential| credential.roots().iter().map(|root| fingerprint(root)).collect::<Vec<_>>()),
    })
}

/// SHA-256, hexadecimal.
fn fingerprint(certificate: &[u8]) -> String {
    Sha256::digest(certificate).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn discovery(status: &Status) -> Value {
    let types = status.types.iter().map(|(type_url, status)| {
        let rejected = status.rejected.iter();
        let shown = json!({
            "answered": status.answered,
            "resources": status.resources,
            "responses": status.responses,
            "bytes": status.bytes,
            "rejected": rejected.map(|(name, nack)| json!({ "name": name, "reason": nack.reason })).collect::<Vec<_>>(),
        });
        (type_url.as_ref().to_owned(), shown)
    });
    json!({
        "connectedSince": status.connected_since.map(rfc3339),
        "disconnectedSince": status.disconnected_since.map(rfc3339),
        "synced": status.synced,
        "lastError": status.last_error,
        "types": types.collect::<serde_json::Map<_, _>>(),
    })
}

fn rfc3339(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_included_by_name() {
        assert!(Included::read(None).has("workloads"));
        let two = Included::read(Some("pods,workloads"));
        assert!(two.has("pods") && two.has("workloads") && !two.has("services"));
        assert!(!Included::read(Some("")).has("pods"));
    }

    #[test]
    fn fingerprint_is_sha_256() {
        assert_eq!(fingerprint(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
