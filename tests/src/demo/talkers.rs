//! Who talks to whom, with which identity: read from the metrics of all proxies.

use serde::Serialize;

use crate::Error;
use crate::cluster::Cluster;
use crate::metrics;

/// Connections of one workload to another, as the proxy that opened or took them reports.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Talk {
    pub source: String,
    pub source_identity: String,
    pub destination: String,
    pub destination_identity: String,
    /// Carried by mutual TLS.
    pub mutual_tls: bool,
    pub connections: f64,
    /// Bytes in both directions.
    pub bytes: f64,
}

/// From the side that opened the connections; those from outside the mesh, which no proxy opened, from the side that
/// took them.
pub(super) fn all(cluster: &Cluster) -> Result<Vec<Talk>, Error> {
    let mut texts = Vec::new();
    for node in cluster.nodes() {
        texts.push(node.metrics()?);
    }
    Ok(from_metrics(&texts))
}

fn from_metrics(texts: &[String]) -> Vec<Talk> {
    let mut talks: Vec<Talk> = Vec::new();
    for text in texts {
        for (name, is_bytes) in [
            ("istio_tcp_connections_opened_total", false),
            ("istio_tcp_sent_bytes_total", true),
            ("istio_tcp_received_bytes_total", true),
        ] {
            for sample in metrics::samples(text, name) {
                let mutual_tls = sample.label("connection_security_policy") == Some("mutual_tls");
                // What the mesh carries is reported by both sides: count it once.
                if sample.label("reporter") != Some(if mutual_tls { "source" } else { "destination" }) {
                    continue;
                }
                let mut talk = describe(&sample, mutual_tls);
                if is_bytes {
                    talk.bytes = sample.value;
                } else {
                    talk.connections = sample.value;
                }
                match talks.iter_mut().find(|t| t.key() == talk.key()) {
                    Some(known) => {
                        known.bytes += talk.bytes;
                        known.connections += talk.connections;
                    }
                    None => talks.push(talk),
                }
            }
        }
    }
    talks.retain(|talk| talk.connections > 0.0);
    talks.sort_by(|a, b| a.key().cmp(&b.key()));
    talks
}

fn describe(sample: &metrics::Sample, mutual_tls: bool) -> Talk {
    let label = |name: &str, otherwise: &str| match sample.label(name) {
        None | Some("unknown") => otherwise.to_owned(),
        Some(value) => value.to_owned(),
    };
    Talk {
        source: label("source_workload", "(outside the mesh)"),
        source_identity: label("source_principal", "unknown"),
        destination: label("destination_workload", "(outside the mesh)"),
        destination_identity: label("destination_principal", "unknown"),
        mutual_tls,
        connections: 0.0,
        bytes: 0.0,
    }
}

impl Talk {
    fn key(&self) -> (&str, &str, &str, &str, bool) {
        (&self.source, &self.destination, &self.source_identity, &self.destination_identity, self.mutual_tls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, reporter: &str, source: &str, policy: &str, value: u32) -> String {
        format!(
            "{name}{{reporter=\"{reporter}\",source_workload=\"{source}\",source_principal=\"spiffe://t/ns/n/sa/{source}\",\
             destination_workload=\"b\",destination_principal=\"spiffe://t/ns/n/sa/b\",connection_security_policy=\"{policy}\"}} {value}\n"
        )
    }

    #[test]
    fn both_reports_of_a_connection_are_one() {
        let opened = "istio_tcp_connections_opened_total";
        let one = line(opened, "source", "a", "mutual_tls", 3)
            + &line("istio_tcp_sent_bytes_total", "source", "a", "mutual_tls", 100);
        let other =
            line(opened, "destination", "a", "mutual_tls", 3) + &line(opened, "destination", "unknown", "unknown", 2);
        let talks = from_metrics(&[one, other]);
        assert_eq!(talks.len(), 2, "{talks:?}");
        let outside = talks.iter().find(|t| !t.mutual_tls).expect("from outside");
        assert_eq!((outside.source.as_str(), outside.connections), ("(outside the mesh)", 2.0));
        let inside = talks.iter().find(|t| t.mutual_tls).expect("inside");
        assert_eq!((inside.connections, inside.bytes), (3.0, 100.0));
        assert_eq!(inside.source_identity, "spiffe://t/ns/n/sa/a");
    }
}
