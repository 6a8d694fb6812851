//! What the mesh knows of a name: a pure look-up in a snapshot, from where the pod is.
//!
//! Names are tried in the order in which a pod's own resolver would come to them: as they are, then as what is meant by a
//! short one (`reviews`, `reviews.shop`, `reviews.shop.svc`), then as a full one that a search domain was appended to
//! (`api.example.com.shop.svc.cluster.local`), which saves the pod a walk through its search domains.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::service::LoadBalancingMode;
use mesh_model::{Service, Snapshot, Viewpoint, Workload};

use crate::proxy::local::LocalPod;

/// Endpoints of a headless service that are looked at.
const ENDPOINTS: usize = 1000;

/// Labels of a name that may be short for one with search domains: with more, resolvers do not search.
const SHORT: usize = 4;

/// What is known of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Addresses of both families, each once; never empty.
    pub addresses: Vec<IpAddr>,
    /// The name that is meant, where a search domain was appended to it.
    pub alias_of: Option<String>,
}

/// What the mesh knows of `name`, in lower case and without a dot at its end, for the pod `client` of the cluster whose
/// names end in `domain`. None: not known, or not fully.
pub fn resolve(snapshot: &Snapshot, client: &LocalPod<'_>, domain: &str, name: &str) -> Option<Found> {
    let workload = client.workload(snapshot);
    let from = client.viewpoint(workload);
    let resolver = Resolver { snapshot, from, domain };
    // The search domains that Kubernetes gives a pod.
    let searched = [format!("{}.svc.{domain}", client.namespace), format!("svc.{domain}"), domain.to_owned()];
    if let Some((addresses, _)) = resolver.as_typed(name, &searched) {
        return Some(Found { addresses, alias_of: None });
    }
    for search in &searched {
        let Some(meant) = name.strip_suffix(search.as_str()).and_then(|rest| rest.strip_suffix('.')) else { continue };
        // One label is a service of the cluster or nothing.
        if meant.contains('.')
            && let Some((addresses, full)) = resolver.as_typed(meant, &searched)
        {
            return Some(Found { addresses, alias_of: Some(full) });
        }
    }
    None
}

struct Resolver<'a> {
    snapshot: &'a Snapshot,
    from: Viewpoint<'a>,
    domain: &'a str,
}

impl<'a> Resolver<'a> {
    /// Addresses of a name that may be short, with the full name.
    fn as_typed(&self, name: &str, searched: &[String]) -> Option<(Vec<IpAddr>, String)> {
        if let Some(addresses) = self.exactly(name) {
            return Some((addresses, name.to_owned()));
        }
        if name.split('.').count() > SHORT {
            return None;
        }
        searched.iter().find_map(|search| {
            let full = format!("{name}.{search}");
            self.in_cluster(&full).map(|addresses| (addresses, full))
        })
    }

    /// Addresses of a full name.
    fn exactly(&self, name: &str) -> Option<Vec<IpAddr>> {
        self.in_cluster(name).or_else(|| {
            // The longest wildcard wins. The name itself is no wildcard.
            let mut rest = name;
            while let Some((_, parent)) = rest.split_once('.') {
                if let Some(addresses) = self.service(&format!("*.{parent}")) {
                    return Some(addresses);
                }
                rest = parent;
            }
            None
        })
    }

    /// The same without wildcards.
    fn in_cluster(&self, name: &str) -> Option<Vec<IpAddr>> {
        if name.starts_with('*') {
            return None;
        }
        self.service(name).or_else(|| self.endpoint(name))
    }

    fn service(&self, host: &str) -> Option<Vec<IpAddr>> {
        let service = self.seen(host)?;
        let addresses = self.virtual_addresses(service);
        if addresses.is_empty() {
            return self.endpoints(service);
        }
        // Connections to such a service go where they are addressed: its own address is not one that anybody listens on.
        (service.load_balancing.mode != LoadBalancingMode::Passthrough).then_some(addresses)
    }

    /// The service that the client means: its own namespace's first.
    fn seen(&self, host: &str) -> Option<&'a Arc<Service>> {
        let visible = || self.snapshot.services_by_host(host).filter(|one| one.visible_from(self.from.namespace));
        visible().find(|service| *service.namespace == *self.from.namespace).or_else(|| visible().next())
    }

    fn virtual_addresses(&self, service: &Service) -> Vec<IpAddr> {
        let here = service.addresses.iter().filter(|vip| *vip.network == *self.from.network && vip.block.is_host());
        let addresses = here.map(|vip| vip.block.base()).filter(|ip| !ip.is_unspecified());
        each_once(addresses)
    }

    /// Addresses of all ready endpoints of a service that has none of its own.
    fn endpoints(&self, service: &Service) -> Option<Vec<IpAddr>> {
        let ready = self.snapshot.some_ready_endpoints(service.key(), ENDPOINTS);
        let here = ready.into_iter().filter(|workload| self.is_here(workload));
        Some(each_once(here.flat_map(|workload| workload.addresses.iter().copied()))).filter(|all| !all.is_empty())
    }

    /// One endpoint of a headless service of the cluster, by its name as a pod of a StatefulSet
    /// (`web-0.web.shop.svc.cluster.local`) or by its address (`10-1-2-3.web.shop.svc.cluster.local`).
    fn endpoint(&self, name: &str) -> Option<Vec<IpAddr>> {
        let (label, host) = name.split_once('.')?;
        let rest = host.strip_suffix(self.domain)?.strip_suffix(".svc.")?;
        let (_, namespace) = rest.split_once('.')?;
        let service = self.seen(host).filter(|service| self.virtual_addresses(service).is_empty())?;
        let Viewpoint { cluster_id, network, .. } = self.from;
        let by_name = || self.snapshot.workload_by_uid(&format!("{cluster_id}//Pod/{namespace}/{label}"));
        let by_address = || self.snapshot.workload_by_ip(network, dashed(label)?);
        let workload = by_name().filter(|workload| is_ordinal(workload)).or_else(by_address)?;
        let ready = workload.healthy || service.load_balancing.allow_unhealthy;
        let addresses = workload.addresses.to_vec();
        let known = ready && self.is_here(workload) && workload.in_service(service.key()) && !addresses.is_empty();
        known.then_some(addresses)
    }

    fn is_here(&self, workload: &Workload) -> bool {
        *workload.network == *self.from.network
    }
}

/// Whether the pod's name is one that a StatefulSet gives: only those have names in DNS.
fn is_ordinal(workload: &Workload) -> bool {
    let Some((set, ordinal)) = workload.name.rsplit_once('-') else { return false };
    let owned =
        workload.workload_name.is_empty() || *workload.workload_name == *set || workload.workload_name == workload.name;
    owned && !ordinal.is_empty() && ordinal.bytes().all(|byte| byte.is_ascii_digit())
}

/// An address as labels have it, with dashes.
fn dashed(label: &str) -> Option<IpAddr> {
    let v4 = label.replace('-', ".").parse().ok();
    v4.or_else(|| label.replace('-', ":").parse().ok())
}

fn each_once(addresses: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut seen = std::collections::HashSet::new();
    addresses.filter(|ip| seen.insert(*ip)).collect()
}

#[cfg(test)]
mod tests;
