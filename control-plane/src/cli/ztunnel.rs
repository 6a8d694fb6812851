//! `culvert ztunnel`: a part of each proxy's dump, as a table. Pure.

use serde::Serialize;
use serde_json::Value;

use super::args::Section;
use super::error::CliError;
use super::facts::{Asked, Dump, Part};
use super::text::{Style, Table, Verdict, clean, count};

/// Rows of one proxy that are shown to people; JSON has all.
const SHOWN: usize = 1000;

/// What `culvert ztunnel ... -o json` prints.
#[derive(Debug, Serialize)]
pub struct Shown {
    /// `workloads`, `services`, `policies`, `certificates` or `connections`.
    pub section: &'static str,
    /// The proxies that were asked, by node.
    pub proxies: Vec<OfProxy>,
}

/// What one proxy has of it.
#[derive(Debug, Serialize)]
pub struct OfProxy {
    /// Its node.
    pub node: String,
    /// Its pod.
    pub proxy: String,
    /// The items, as the proxy's `/config_dump` has them; of a connection also the pod that it belongs to (`pod`, as
    /// `namespace/name`).
    pub items: Vec<Value>,
    /// Connections that the proxy left out of its dump.
    pub omitted: u64,
    /// Why it does not answer; none if it does.
    pub error: Option<String>,
}

/// Which proxies to ask, and of which pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Of this node alone.
    pub node: Option<String>,
    /// Of this pod (namespace, name) alone.
    pub pod: Option<(String, String)>,
    /// The path of that pod's identity, behind the trust domain.
    pub identity: Option<String>,
}

impl Section {
    /// Its name in a dump and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Workloads => "workloads",
            Self::Services => "services",
            Self::Policies => "policies",
            Self::Certificates => "certificates",
            Self::Connections => "connections",
        }
    }

    /// The page that has it. Connections are listed by pod.
    pub fn page(self) -> &'static str {
        match self {
            Self::Workloads => "/config_dump?include=workloads",
            Self::Services => "/config_dump?include=services",
            Self::Policies => "/config_dump?include=policies",
            Self::Certificates => "/config_dump?include=certificates,pods",
            Self::Connections => "/config_dump?include=pods",
        }
    }
}

/// The namespace and name of `namespace/name`.
///
/// # Errors
/// It is none.
pub fn pod_name(text: &str) -> Result<(String, String), CliError> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err(CliError::NotFound(format!("--pod {text:?} is no pod; write it as namespace/name"))),
    }
}

/// The proxies to ask.
///
/// # Errors
/// There is none, or none on that node.
pub fn choose(proxies: Vec<Part>, target: &Target, namespace: &str) -> Result<Vec<Part>, CliError> {
    let all = proxies.len();
    let chosen: Vec<Part> =
        proxies.into_iter().filter(|part| target.node.as_ref().is_none_or(|node| part.node == *node)).collect();
    match (chosen.is_empty(), &target.node) {
        (false, _) => Ok(chosen),
        (true, Some(node)) if all > 0 => {
            Err(CliError::NotFound(format!("no proxy runs on node {node}; `culvert status` lists the nodes")))
        }
        (true, _) => Err(CliError::NotFound(format!(
            "no proxy runs in the namespace {namespace}; --namespace names another, `culvert status` says what is installed"
        ))),
    }
}

impl Shown {
    /// Of the answers.
    pub fn new(section: Section, asked: Vec<Asked<Dump>>, target: &Target) -> Self {
        let proxies = asked.into_iter().map(|Asked { part, answer }| {
            let (items, omitted, error) = match answer {
                Ok(dump) => {
                    let (items, omitted) = items(section, &dump, target);
                    (items, omitted, None)
                }
                Err(error) => (Vec::new(), 0, Some(error.to_string())),
            };
            OfProxy { node: part.node, proxy: part.pod, items, omitted, error }
        });
        Self { section: section.name(), proxies: proxies.collect() }
    }

    /// Whether every proxy answered.
    pub fn is_complete(&self) -> bool {
        self.proxies.iter().all(|one| one.error.is_none())
    }

    /// For people.
    pub fn text(&self, style: Style) -> String {
        let mut text = String::new();
        for one in &self.proxies {
            let head = format!("node {}, proxy {}", clean(&one.node), clean(&one.proxy));
            if let Some(error) = &one.error {
                text += &format!("{} {head}: {}\n\n", style.mark(Verdict::Failed), clean(error));
                continue;
            }
            let items = count(one.items.len(), self.section.strip_suffix('s').unwrap_or(self.section));
            text += &format!("{}: {}\n", style.bold(&head), items.replace("policys", "policies"));
            let mut table = Table::new(heads(self.section));
            for item in one.items.iter().take(SHOWN) {
                table.row(cells(self.section, item));
            }
            if !table.is_empty() {
                text += &table.render(style);
            }
            if let Some(more) = one.items.len().checked_sub(SHOWN).filter(|more| *more > 0) {
                text += &format!("  and {more} more; -o json has all\n");
            }
            if one.omitted > 0 {
                text += &format!("  and {} more that the proxy does not list\n", one.omitted);
            }
            text.push('\n');
        }
        text
    }
}

fn items(section: Section, dump: &Dump, target: &Target) -> (Vec<Value>, u64) {
    match section {
        Section::Connections => connections(dump, target),
        Section::Certificates => {
            let whose = target.identity.as_ref();
            let wanted =
                dump.certificates.iter().filter(|one| whose.is_none_or(|path| one.identity.ends_with(path.as_str())));
            (wanted.filter_map(|one| serde_json::to_value(one).ok()).collect(), 0)
        }
        Section::Workloads | Section::Services | Section::Policies => {
            let mut items = dump.rest.get(section.name()).and_then(Value::as_array).cloned().unwrap_or_default();
            items.sort_by_key(|item| (text(item, "namespace"), text(item, "name")));
            (items, 0)
        }
    }
}

fn connections(dump: &Dump, target: &Target) -> (Vec<Value>, u64) {
    let mut found = Vec::new();
    let mut omitted = 0;
    for pod in dump.rest.get("pods").and_then(Value::as_array).into_iter().flatten() {
        let (namespace, name) = (text(pod, "namespace"), text(pod, "name"));
        if target.pod.as_ref().is_some_and(|wanted| (&wanted.0, &wanted.1) != (&namespace, &name)) {
            continue;
        }
        omitted += pod.get("connectionsOmitted").and_then(Value::as_u64).unwrap_or(0);
        for connection in pod.get("connections").and_then(Value::as_array).into_iter().flatten() {
            let mut connection = connection.clone();
            if let Value::Object(fields) = &mut connection {
                fields.insert("pod".to_owned(), format!("{namespace}/{name}").into());
            }
            found.push(connection);
        }
    }
    // The oldest first.
    found.sort_by_key(|one| std::cmp::Reverse(one.get("ageMs").and_then(Value::as_u64)));
    (found, omitted)
}

fn heads(section: &str) -> &'static [&'static str] {
    match section {
        "workloads" => &["NAMESPACE", "NAME", "ADDRESSES", "NODE", "PROTOCOL", "HEALTHY", "IDENTITY", "WAYPOINT"],
        "services" => &["NAMESPACE", "NAME", "HOSTNAME", "ADDRESSES", "PORTS", "WAYPOINT"],
        "policies" => &["NAMESPACE", "NAME", "SCOPE", "ACTION", "DRY RUN", "VALID"],
        "certificates" => &["IDENTITY", "STATE", "EXPIRES", "SERIAL", "LAST ERROR"],
        _ => &["DIRECTION", "POD", "SOURCE", "DESTINATION", "SERVICE", "MTLS", "POLICY", "SENT", "RECEIVED", "AGE"],
    }
}

fn cells(section: &str, item: &Value) -> Vec<String> {
    let field = |name: &str| text(item, name);
    match section {
        "workloads" => {
            ["namespace", "name", "addresses", "node", "protocol", "healthy", "identity", "waypoint"].map(field).into()
        }
        "services" => {
            let ports = item.get("ports").and_then(Value::as_array).into_iter().flatten();
            let ports = ports.map(|port| match port.as_array().map(Vec::as_slice) {
                Some([from, to]) if from == to => show(from),
                Some([from, to]) => format!("{}->{}", show(from), show(to)),
                _ => show(port),
            });
            let ports = ports.collect::<Vec<_>>().join(",");
            vec![field("namespace"), field("name"), field("hostname"), field("addresses"), ports, field("waypoint")]
        }
        "policies" => {
            let valid = item.get("invalid").and_then(Value::as_bool).map(|invalid| if invalid { "no" } else { "yes" });
            let valid = valid.unwrap_or_default().to_owned();
            vec![field("namespace"), field("name"), field("scope"), field("action"), field("dryRun"), valid]
        }
        "certificates" => ["identity", "state", "expires", "serial", "lastError"].map(field).into(),
        _ => {
            let age = item.get("ageMs").and_then(Value::as_u64).unwrap_or(0);
            vec![
                field("direction"),
                field("pod"),
                side(item.get("source")),
                side(item.get("destination")),
                field("service"),
                field("mtls"),
                field("policy"),
                field("requestBytes"),
                field("responseBytes"),
                format!("{}.{}s", age / 1000, age % 1000 / 100),
            ]
        }
    }
}

/// `namespace/workload (address) identity`, as far as it is known.
fn side(side: Option<&Value>) -> String {
    let Some(side) = side else { return String::new() };
    let (namespace, workload, address) = (text(side, "namespace"), text(side, "workload"), text(side, "address"));
    let who = if workload.is_empty() { address } else { format!("{namespace}/{workload} ({address})") };
    match text(side, "identity") {
        identity if identity.is_empty() => who,
        identity => format!("{who} {identity}"),
    }
}

fn text(item: &Value, field: &str) -> String {
    item.get(field).map(show).unwrap_or_default()
}

/// A value on one line.
fn show(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_owned(),
        Value::Array(items) => items.iter().map(show).collect::<Vec<_>>().join(","),
        Value::Number(_) | Value::Object(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::error::AskError;
    use crate::cli::facts::Component;
    use crate::cli::testing::part;

    fn shown(section: Section, dump: Value, target: &Target) -> Shown {
        let answer = Ok(serde_json::from_value(dump).unwrap());
        Shown::new(section, vec![Asked { part: part(Component::Proxy, "a", "proxy-a"), answer }], target)
    }

    #[test]
    fn workloads_services_and_policies_are_rows() {
        let dump = json!({
            "workloads": [{"namespace": "shop", "name": "web", "addresses": ["10.0.0.1", "fd00::1"], "node": "a",
                           "protocol": "Hbone", "healthy": true, "identity": "spiffe://x", "waypoint": null}],
            "services": [{"namespace": "shop", "name": "db", "hostname": "db.shop", "addresses": ["/10.1.1.1"],
                          "ports": [[80, 80], [81, 8081]]}],
            "policies": [{"namespace": "shop", "name": "p", "scope": "Namespace", "action": "Deny", "invalid": true}],
        });
        let text = |section| shown(section, dump.clone(), &Target::default()).text(Style::default());
        let workloads = text(Section::Workloads);
        assert!(workloads.starts_with("node a, proxy proxy-a: 1 workload\n"), "{workloads}");
        assert!(
            workloads.contains("shop       web   10.0.0.1,fd00::1  a     Hbone     yes      spiffe://x  -"),
            "{workloads}"
        );
        let services = text(Section::Services);
        assert!(services.contains("80,81->8081"), "{services}");
        let policies = text(Section::Policies);
        assert!(policies.contains("Deny    -        no"), "{policies}");
        assert!(text(Section::Connections).starts_with("node a, proxy proxy-a: 0 connections\n"));
    }

    #[test]
    fn connections_are_of_all_pods_or_of_one() {
        let connection = |age: u64| {
            json!({"direction": "outbound", "source": {"address": "10.0.0.1:1", "workload": "web", "namespace": "shop",
                   "identity": "spiffe://a"}, "destination": {"address": "10.0.0.2:2"}, "ageMs": age, "requestBytes": 7})
        };
        let dump = json!({"pods": [
            {"namespace": "shop", "name": "web", "connections": [connection(1500)], "connectionsOmitted": 3},
            {"namespace": "shop", "name": "db", "connections": [connection(2600)]},
        ]});
        let all = shown(Section::Connections, dump.clone(), &Target::default());
        assert_eq!(all.proxies[0].items[0]["pod"], "shop/db", "the oldest first");
        let text = all.text(Style::default());
        assert!(text.contains("shop/web (10.0.0.1:1) spiffe://a") && text.contains("1.5s"), "{text}");
        assert!(text.contains("and 3 more that the proxy does not list"), "{text}");
        let target = Target { pod: Some(("shop".into(), "db".into())), ..Target::default() };
        let one = shown(Section::Connections, dump, &target);
        assert_eq!((one.proxies[0].items.len(), one.proxies[0].omitted), (1, 0));
    }

    #[test]
    fn certificates_are_of_all_or_of_one_identity_and_silence_is_said() {
        let dump = json!({"certificates": [{"identity": "spiffe://x/ns/shop/sa/a", "state": "Valid"}, {"identity": "spiffe://x/ns/shop/sa/b"}]});
        let target = Target { identity: Some("/ns/shop/sa/b".into()), ..Target::default() };
        assert_eq!(
            shown(Section::Certificates, dump, &target).proxies[0].items[0]["identity"],
            "spiffe://x/ns/shop/sa/b"
        );
        let silent = Asked { part: part(Component::Proxy, "a", "p"), answer: Err(AskError::NotRunning("gone".into())) };
        let silent = Shown::new(Section::Workloads, vec![silent], &Target::default());
        assert!(!silent.is_complete() && silent.text(Style::default()).contains("it does not run: gone"));
    }

    #[test]
    fn what_is_not_there_is_named() {
        let proxies = || vec![part(Component::Proxy, "a", "p")];
        let target = |node: &str| Target { node: Some(node.into()), ..Target::default() };
        assert_eq!(choose(proxies(), &target("a"), "mesh").unwrap(), proxies());
        assert!(choose(proxies(), &target("b"), "mesh").unwrap_err().to_string().contains("node b"));
        assert!(choose(Vec::new(), &target("b"), "mesh").unwrap_err().to_string().contains("--namespace"));
        assert_eq!(pod_name("shop/web").unwrap(), ("shop".into(), "web".into()));
        for wrong in ["web", "/web", "shop/", "a/b/c", ""] {
            assert!(pod_name(wrong).is_err(), "{wrong}");
        }
    }
}
