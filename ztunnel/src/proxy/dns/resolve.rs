//! What the mesh knows of a name: a pure look-up in a snapshot, from where the pod is.
//!
//! Names are tried in the order in which a pod's own resolver would come to them: as they are, then as what is meant by a
//! short one (`reviews`, `reviews.shop`, `reviews.shop.svc`), then as a full one that a search domain was appended to
//! (`api.example.com.shop.svc.cluster.local`), which saves the pod a walk through its search domains.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::service::LoadBalancingMode;
use mesh_model::{Health, Service, Snapshot, Viewpoint, Workload};

use crate::proxy::local::LocalPod;

/// Endpoints of a headless service that are looked at.
const ENDPOINTS: usize = 1000;

/// Labels of a name that may be short for one with search domains: with more, resolvers do not search.
const SHORT: usize = 4;

/// Weight of a record that is the only one.
const WHOLE: u16 = 100;

/// What is known of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Addresses of both families, each once; never empty.
    pub addresses: Vec<IpAddr>,
    /// The name that is meant, where a search domain was appended to it.
    pub alias_of: Option<String>,
}

/// Where a service is to be found, as SRV records say it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundService {
    /// Each once; never empty.
    pub targets: Vec<Target>,
    /// As in [`Found`].
    pub alias_of: Option<String>,
}

/// One SRV record, with the addresses of what it names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Full name, without a dot at its end.
    pub name: String,
    /// Port to connect to.
    pub port: u16,
    /// Share in proportion to the other targets.
    pub weight: u16,
    /// Addresses of both families.
    pub addresses: Vec<IpAddr>,
}

/// What the mesh knows of `name`, in lower case and without a dot at its end, for the pod `client` of the cluster whose
/// names end in `domain`. None: not known, or not fully.
pub fn resolve(snapshot: &Snapshot, client: &LocalPod<'_>, domain: &str, name: &str) -> Option<Found> {
    let resolver = Resolver::new(snapshot, client, domain);
    let (addresses, alias_of) =
        resolver.search(name, |name| resolver.exactly(name), |name| resolver.in_cluster(name))?;
    Some(Found { addresses, alias_of })
}

/// As [`resolve`], for a name `_<port>._<protocol>.<service>` (Kubernetes DNS specification 1.1, sections 2.3.2 and 2.4.2).
/// None also for what is not told to the mesh: ports of other protocols than TCP, and the names of a control plane that does
/// not tell them.
pub fn resolve_service(snapshot: &Snapshot, client: &LocalPod<'_>, domain: &str, name: &str) -> Option<FoundService> {
    let (port, rest) = name.strip_prefix('_')?.split_once('.')?;
    let host = rest.strip_prefix("_tcp.")?;
    let resolver = Resolver::new(snapshot, client, domain);
    let look_up = |host: &str| resolver.targets(host, port);
    let (targets, alias_of) = resolver.search(host, look_up, look_up)?;
    Some(FoundService { targets, alias_of: alias_of.map(|full| format!("_{port}._tcp.{full}")) })
}

struct Resolver<'a> {
    snapshot: &'a Snapshot,
    from: Viewpoint<'a>,
    domain: &'a str,
    /// The search domains that Kubernetes gives the pod.
    searched: [String; 3],
}

impl<'a> Resolver<'a> {
    fn new(snapshot: &'a Snapshot, client: &'a LocalPod<'_>, domain: &'a str) -> Self {
        let from = client.viewpoint(client.workload(snapshot));
        let searched = [format!("{}.svc.{domain}", client.namespace), format!("svc.{domain}"), domain.to_owned()];
        Self { snapshot, from, domain, searched }
    }

    /// What is known of a name, with the full name that is meant where a search domain was appended to it. `exactly` knows
    /// full names, `in_cluster` those that a search domain was put behind.
    fn search<T>(
        &self,
        name: &str,
        exactly: impl Fn(&str) -> Option<T>,
        in_cluster: impl Fn(&str) -> Option<T>,
    ) -> Option<(T, Option<String>)> {
        // Of a name that may be short, with the full name.
        let as_typed = |name: &str| {
            if let Some(found) = exactly(name) {
                return Some((found, name.to_owned()));
            }
            if name.split('.').count() > SHORT {
                return None;
            }
            self.searched.iter().find_map(|search| {
                let full = format!("{name}.{search}");
                in_cluster(&full).map(|found| (found, full))
            })
        };
        if let Some((found, _)) = as_typed(name) {
            return Some((found, None));
        }
        self.searched.iter().find_map(|search| {
            let meant = name.strip_suffix(search.as_str())?.strip_suffix('.')?;
            // One label is a service of the cluster or nothing.
            let (found, full) = meant.contains('.').then(|| as_typed(meant))??;
            Some((found, Some(full)))
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
        let ready = workload.health == Health::Healthy || service.load_balancing.allow_unhealthy;
        let addresses = workload.addresses.to_vec();
        let known = ready && self.is_here(workload) && workload.in_service(service.key()) && !addresses.is_empty();
        known.then_some(addresses)
    }

    /// Where the port of that name of a service is to be found.
    fn targets(&self, host: &str, port: &str) -> Option<Vec<Target>> {
        let service = self.seen(host).filter(|_| !host.starts_with('*'))?;
        let port = service.port_names.port(port)?;
        let addresses = self.virtual_addresses(service);
        if addresses.is_empty() {
            return self.endpoint_targets(service, host, port);
        }
        // As of its addresses.
        (service.load_balancing.mode != LoadBalancingMode::Passthrough)
            .then(|| vec![Target { name: host.to_owned(), port, weight: WHOLE, addresses }])
    }

    /// The ready endpoints of a headless service of the cluster, with the ports that they themselves listen on.
    fn endpoint_targets(&self, service: &Service, host: &str, port: u16) -> Option<Vec<Target>> {
        // Of others, endpoints have no names.
        host.strip_suffix(self.domain)?.strip_suffix(".svc.")?;
        let ready = self.snapshot.some_ready_endpoints(service.key(), ENDPOINTS);
        let here = ready.into_iter().filter(|workload| self.is_here(workload));
        let target = |workload: &Arc<Workload>| {
            Some(Target {
                name: format!("{}.{host}", self.label(workload)?),
                port: workload.target_port(service, port)?,
                weight: u16::try_from(workload.capacity).unwrap_or(u16::MAX),
                addresses: workload.addresses.to_vec(),
            })
        };
        Some(here.filter_map(target).collect::<Vec<_>>()).filter(|all| !all.is_empty())
    }

    /// What [`Self::endpoint`] knows an endpoint as.
    fn label(&self, workload: &Workload) -> Option<String> {
        let by_name = format!("{}//Pod/{}/{}", self.from.cluster_id, workload.origin.namespace, workload.name);
        if is_ordinal(workload) && *workload.uid == *by_name {
            return Some(workload.name.to_string());
        }
        workload.addresses.first().map(|ip| with_dashes(*ip))
    }

    fn is_here(&self, workload: &Workload) -> bool {
        *workload.location.network == *self.from.network
    }
}

/// Whether the pod's name is one that a StatefulSet gives: only those have names in DNS.
fn is_ordinal(workload: &Workload) -> bool {
    let Some((set, ordinal)) = workload.name.rsplit_once('-') else { return false };
    let owned = workload.origin.workload_name.is_empty()
        || *workload.origin.workload_name == *set
        || workload.origin.workload_name == workload.name;
    owned && !ordinal.is_empty() && ordinal.bytes().all(|byte| byte.is_ascii_digit())
}

/// An address as labels have it, with dashes.
fn dashed(label: &str) -> Option<IpAddr> {
    let v4 = label.replace('-', ".").parse().ok();
    v4.or_else(|| label.replace('-', ":").parse().ok())
}

/// The label of an address, as [`dashed`] reads it: labels do not begin or end with a dash.
fn with_dashes(ip: IpAddr) -> String {
    let text = ip.to_string().replace(['.', ':'], "-");
    let zero = |at_end: bool| if at_end { "0" } else { "" };
    format!("{}{text}{}", zero(text.starts_with('-')), zero(text.ends_with('-')))
}

fn each_once(addresses: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut seen = std::collections::HashSet::new();
    addresses.filter(|ip| seen.insert(*ip)).collect()
}

#[cfg(test)]
mod tests;
