//! The culvertd that is measured: a process of its own.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Error;
use crate::error::Context;
use crate::process::{Process, Spec};

/// Clock ticks per second in `/proc`: the same on every Linux that Rust runs on.
const TICKS: f64 = 100.0;

/// A running culvertd.
#[derive(Debug)]
pub struct Server {
    process: Process,
    /// Where discovery is.
    pub xds: SocketAddr,
    /// Where it says that it is ready.
    pub ready: SocketAddr,
}

/// What the process has used.
#[derive(Debug, Clone, Copy, Default)]
pub struct Used {
    /// Processor seconds since its start.
    pub cpu: f64,
    /// Resident bytes now.
    pub resident: u64,
    /// Resident bytes at most so far.
    pub peak: u64,
}

impl Server {
    /// Starts `program` against the API server at `api`, with its files in `folder`, and waits until it listens.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(program: &Path, api: SocketAddr, folder: &Path) -> Result<Self, Error> {
        let kubeconfig = folder.join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "bench",
            "clusters": [{"name": "bench", "cluster": {"server": format!("http://{api}")}}],
            "users": [{"name": "bench", "user": {"token": "bench"}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        });
        std::fs::write(&kubeconfig, config.to_string()).during(|| format!("writing {}", kubeconfig.display()))?;
        let log = folder.join("culvertd.log");
        let any = "127.0.0.1:0";
        let spec = Spec::new("culvertd", program, &log)
            .args(["--kubeconfig".into(), kubeconfig.into_os_string()])
            .args(["--xds-addr", any, "--ready-addr", any, "--metrics-addr", any, "--admin-addr", any])
            .args(["--webhook-addr", any, "--log-format", "json", "--log-level", "warn,control_plane::app=info"]);
        let process = spec.start()?;
        let mut addresses = None;
        process.wait_ready(crate::wait::READY, || {
            addresses = listening(&std::fs::read_to_string(&log).unwrap_or_default());
            Ok(addresses.is_some())
        })?;
        let (xds, ready) = addresses.ok_or_else(|| Error::Absent("culvertd listens nowhere".to_owned()))?;
        Ok(Self { process, xds, ready })
    }

    /// What it has used.
    ///
    /// # Errors
    /// It has ended.
    pub fn used(&self) -> Result<Used, Error> {
        let read = |file: &str| {
            let path = format!("/proc/{}/{file}", self.process.pid());
            std::fs::read_to_string(&path).during(|| format!("reading {path}"))
        };
        let ended = || Error::Absent("culvertd has ended".to_owned());
        let (stat, status) = (read("stat")?, read("status")?);
        // The name of the program, in parentheses, may hold blanks. What follows begins with field 3.
        let fields: Vec<&str> = stat.rsplit_once(')').ok_or_else(ended)?.1.split_whitespace().collect();
        let ticks = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<u32>().ok()).ok_or_else(ended);
        let kilobytes = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).ok_or_else(ended)?;
            line.trim().trim_end_matches(" kB").parse::<u64>().map_err(|_| ended())
        };
        Ok(Used {
            cpu: (f64::from(ticks(14)?) + f64::from(ticks(15)?)) / TICKS,
            resident: kilobytes("VmRSS:")? * 1024,
            peak: kilobytes("VmHWM:")? * 1024,
        })
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        self.process.log_tail(10)
    }

    /// Asks it to end, and waits.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(&self) -> Result<(), Error> {
        self.process.terminate(Duration::from_secs(30)).map(|_| ())
    }
}

/// The addresses that it says it listens on.
fn listening(log: &str) -> Option<(SocketAddr, SocketAddr)> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut lines = lines.map(|line| if line["fields"].is_object() { line["fields"].clone() } else { line });
    let line = lines.find(|line| line["message"] == "listening")?;
    let address = |key: &str| line[key].as_str()?.parse().ok();
    Some((address("xds")?, address("ready")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_tells_the_ports() {
        let line = r#"{"level":"INFO","fields":{"message":"listening","xds":"127.0.0.1:4","ready":"127.0.0.1:5"}}"#;
        let found = listening(&format!("{{\"x\":1}}\n{line}\n"));
        assert_eq!(found, Some(("127.0.0.1:4".parse().unwrap(), "127.0.0.1:5".parse().unwrap())));
        assert_eq!(listening("no\n"), None);
    }
}
