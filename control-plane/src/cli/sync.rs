//! Who follows the control plane, and how far: what the replicas of culvertd say of their clients, joined with the proxies'
//! pods. Also `culvert proxy-status`. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::facts::{Asked, Client, Culvertd, Nack, Part};
use super::text::{Style, Table, Verdict, clean, count};

/// What `culvert proxy-status -o json` prints.
#[derive(Debug, Serialize)]
pub struct ProxyStatus {
    /// Every proxy follows, and none refused anything.
    pub healthy: bool,
    /// The replicas of culvertd.
    pub replicas: Vec<Replica>,
    /// The proxies, by node.
    pub proxies: Vec<Follower>,
    /// Clients of culvertd that are no proxy of this mesh.
    pub others: Vec<Follower>,
}

/// A replica of culvertd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Replica {
    /// Its pod.
    pub pod: String,
    /// Its node.
    pub node: String,
    /// Kubernetes counts it as ready.
    pub ready: bool,
    /// It has read everything; none if it does not answer.
    pub synced: Option<bool>,
    /// Its clients; none if it does not answer.
    pub clients: Option<usize>,
    /// Resources that it serves, by type.
    pub resources: BTreeMap<String, u64>,
    /// Why it does not answer; none if it does.
    pub error: Option<String>,
}

/// A client of the control plane.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Follower {
    /// Its pod, or what it calls itself.
    pub proxy: String,
    /// Its node; empty if it is no proxy of this mesh.
    pub node: String,
    /// The replica of culvertd that it follows; none if it follows none that answers.
    pub replica: Option<String>,
    /// Since when, RFC 3339.
    pub connected_since: Option<String>,
    /// How far it is, by type.
    pub types: Vec<TypeSync>,
    /// What it refused: the proxy keeps the rest.
    pub nacks: Vec<Refusal>,
}

/// How far a client is with one type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TypeSync {
    /// The type, without its domain.
    pub r#type: String,
    /// Version of the catalog of the last response.
    pub sent: u64,
    /// Version of the last response that it accepted.
    pub acked: u64,
    /// A response waits for its acknowledgement.
    pub in_flight: bool,
}

/// What a client refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The type, without its domain.
    pub r#type: String,
    /// The resource, why, and when.
    #[serde(flatten)]
    pub nack: Nack,
}

/// The replicas.
pub fn replicas(asked: &[Asked<Culvertd>]) -> Vec<Replica> {
    let replica = |Asked { part, answer }: &Asked<Culvertd>| {
        let status = answer.as_ref().ok();
        let resources = status.iter().flat_map(|status| &status.resources);
        Replica {
            pod: part.pod.clone(),
            node: part.node.clone(),
            ready: part.ready,
            synced: status.map(|status| status.synced),
            clients: status.map(|status| status.clients.len()),
            resources: resources.map(|served| (short(&served.r#type), served.resources)).collect(),
            error: answer.as_ref().err().map(ToString::to_string),
        }
    };
    asked.iter().map(replica).collect()
}

/// The proxies of the mesh, then whoever else follows.
pub fn followers<'p>(
    replicas: &[Asked<Culvertd>],
    proxies: impl IntoIterator<Item = &'p Part>,
) -> (Vec<Follower>, Vec<Follower>) {
    let mut clients: Vec<(&str, &Client)> = Vec::new();
    for Asked { part, answer } in replicas {
        let all = answer.iter().flat_map(|status| &status.clients);
        clients.extend(all.map(|client| (part.pod.as_str(), client)));
    }
    let mut known = BTreeSet::new();
    let mut own: Vec<Follower> = Vec::new();
    for proxy in proxies {
        // One that has changed the replica may still be in the list of the one before; the latest connection counts.
        let of_it = clients.iter().filter(|(_, client)| pod_of(&client.node_id) == Some(&proxy.pod));
        let latest = of_it.max_by(|a, b| a.1.connected_since.cmp(&b.1.connected_since));
        known.insert(proxy.pod.as_str());
        let mut follower = latest.map(|(replica, client)| follower(replica, client)).unwrap_or_default();
        (follower.proxy, follower.node) = (proxy.pod.clone(), proxy.node.clone());
        own.push(follower);
    }
    own.sort_by(|a, b| (&a.node, &a.proxy).cmp(&(&b.node, &b.proxy)));
    let strange = clients.iter().filter(|(_, client)| !pod_of(&client.node_id).is_some_and(|pod| known.contains(pod)));
    let others = strange.map(|(replica, client)| follower(replica, client)).collect();
    (own, others)
}

fn follower(replica: &str, client: &Client) -> Follower {
    let types = client.types.iter().map(|one| TypeSync {
        r#type: short(&one.r#type),
        sent: one.sent,
        acked: one.acked,
        in_flight: one.in_flight,
    });
    let refused = |one: &super::facts::ClientType| {
        let kind = short(&one.r#type);
        one.nacks.iter().map(move |nack| Refusal { r#type: kind.clone(), nack: nack.clone() }).collect::<Vec<_>>()
    };
    Follower {
        proxy: client.node_id.clone(),
        node: String::new(),
        replica: Some(replica.to_owned()),
        connected_since: Some(client.connected_since.clone()),
        types: types.collect(),
        nacks: client.types.iter().flat_map(refused).collect(),
    }
}

/// The pod in `ztunnel~IP~pod.namespace~domain`.
fn pod_of(node_id: &str) -> Option<&str> {
    let (name, _) = node_id.split('~').nth(2)?.rsplit_once('.')?;
    Some(name)
}

/// A type's URL without its domain.
fn short(url: &str) -> String {
    url.rsplit('/').next().unwrap_or(url).to_owned()
}

impl Follower {
    /// How it stands, in a word.
    pub fn state(&self) -> &'static str {
        if self.replica.is_none() {
            "not connected"
        } else if !self.nacks.is_empty() {
            "refused some"
        } else if self.types.iter().any(|one| one.in_flight) {
            "in flight"
        } else {
            "synced"
        }
    }

    /// Whether nothing is wrong; a response that is on its way is nothing wrong.
    pub fn is_well(&self) -> bool {
        self.replica.is_some() && self.nacks.is_empty()
    }
}

/// The followers as a table.
pub fn table<'f>(followers: impl IntoIterator<Item = &'f Follower>) -> Table {
    let mut table = Table::new(&["NODE", "PROXY", "CULVERTD", "STATE", "ACKED/SENT", "REFUSED"]);
    for one in followers {
        let versions = one.types.iter().map(|one| {
            let name = one.r#type.rsplit('.').next().unwrap_or(&one.r#type);
            format!("{name} {}/{}{}", one.acked, one.sent, if one.in_flight { " (in flight)" } else { "" })
        });
        let versions = versions.collect::<Vec<_>>().join(", ");
        let replica = one.replica.clone().unwrap_or_default();
        let state = one.state().to_owned();
        table.row([one.node.clone(), one.proxy.clone(), replica, state, versions, one.nacks.len().to_string()]);
    }
    table
}

impl ProxyStatus {
    /// Of what replicas said.
    pub fn new(replicas_asked: &[Asked<Culvertd>], proxies: &[Part]) -> Self {
        let replicas = replicas(replicas_asked);
        let (proxies, others) = followers(replicas_asked, proxies);
        let answered = !replicas.is_empty() && replicas.iter().all(|one| one.error.is_none());
        let healthy = answered && proxies.iter().all(Follower::is_well);
        Self { healthy, replicas, proxies, others }
    }

    /// For people.
    pub fn text(&self, style: Style) -> String {
        let verdict = if self.healthy { Verdict::Good } else { Verdict::Failed };
        let well = self.proxies.iter().filter(|one| one.is_well()).count();
        let mut text = format!(
            "{} {well} of {} follow the control plane and refuse nothing\n",
            style.mark(verdict),
            count(self.proxies.len(), "proxy").replace("proxys", "proxies")
        );
        if self.replicas.is_empty() {
            let mark = style.mark(Verdict::Failed);
            text += &format!("{mark} no replica of culvertd runs; `culvert status` says what is installed\n");
        }
        for replica in &self.replicas {
            if let Some(error) = &replica.error {
                let (pod, error) = (clean(&replica.pod), clean(error));
                text += &format!("{} culvertd {pod}: {error}\n", style.mark(Verdict::Failed));
            }
        }
        for (follower, refusal) in
            self.proxies.iter().chain(&self.others).flat_map(|one| one.nacks.iter().map(move |nack| (one, nack)))
        {
            let name = if refusal.nack.resource.is_empty() { &refusal.r#type } else { &refusal.nack.resource };
            let (proxy, name, reason) = (clean(&follower.proxy), clean(name), clean(&refusal.nack.reason));
            text += &format!("{} {proxy} refused {name}: {reason}\n", style.mark(Verdict::Failed));
        }
        text + "\n" + &table(self.proxies.iter().chain(&self.others)).render(style)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::error::AskError;
    use crate::cli::facts::{ClientType, Component};
    use crate::cli::testing::part;

    fn client(node_id: &str, since: &str, nacks: Vec<Nack>) -> Client {
        let url = "type.googleapis.com/istio.workload.Address".to_owned();
        let kind = ClientType { r#type: url, wildcard: true, sent: 9, acked: 8, in_flight: true, nacks };
        Client { node_id: node_id.into(), connected_since: since.into(), types: vec![kind] }
    }

    fn replica(pod: &str, clients: Vec<Client>) -> Asked<Culvertd> {
        let answer = Ok(Culvertd { synced: true, clients, ..Culvertd::default() });
        Asked { part: part(Component::Culvertd, "n", pod), answer }
    }

    #[test]
    fn a_proxy_is_found_at_the_replica_that_it_came_to_last() {
        let id = "ztunnel~10.0.0.1~proxy-a.culvert-system~culvert-system.svc.cluster.local";
        let asked = [
            replica("one", vec![client(id, "2026-01-01T00:00:00Z", Vec::new()), client("curl", "2026", Vec::new())]),
            replica("two", vec![client(id, "2026-01-02T00:00:00Z", Vec::new())]),
        ];
        let proxies = [part(Component::Proxy, "a", "proxy-a"), part(Component::Proxy, "b", "proxy-b")];
        let status = ProxyStatus::new(&asked, &proxies);
        assert_eq!(status.proxies[0].replica.as_deref(), Some("two"));
        assert_eq!(status.proxies[0].types[0].r#type, "istio.workload.Address");
        assert_eq!((status.proxies[0].state(), status.proxies[1].state()), ("in flight", "not connected"));
        assert!(!status.healthy, "one follows nobody");
        assert_eq!(status.others.len(), 1);
        assert!(ProxyStatus::new(&asked, &proxies[..1]).healthy, "a response on its way is nothing wrong");
        let text = status.text(Style::default());
        assert!(text.contains("1 of 2 proxies") && text.contains("Address 8/9 (in flight)"), "{text}");
    }

    #[test]
    fn refusals_and_replicas_that_do_not_answer_are_said() {
        let id = "ztunnel~10.0.0.1~proxy-a.culvert-system~x";
        let nack = Nack { resource: "shop/db".into(), reason: "no \u{1b}address".into(), at: String::new() };
        let mut asked = vec![replica("one", vec![client(id, "2026", vec![nack])])];
        let proxies = [part(Component::Proxy, "a", "proxy-a")];
        let status = ProxyStatus::new(&asked, &proxies);
        assert!(!status.healthy);
        assert!(status.text(Style::default()).contains("proxy-a refused shop/db: no \u{fffd}address"));
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["proxies"][0]["nacks"][0]["resource"], "shop/db");
        asked[0].answer = Err(AskError::NotRunning("gone".into()));
        let status = ProxyStatus::new(&asked, &proxies);
        assert!(!status.healthy && status.text(Style::default()).contains("culvertd one: it does not run: gone"));
        let nothing = ProxyStatus::new(&[], &[]);
        assert!(!nothing.healthy && nothing.text(Style::default()).contains("no replica of culvertd runs"));
    }
}
