//! culvertd in the cluster: a host attached to the fabric.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::cluster::{Host, Shared};
use crate::component::Component;
use crate::error::Context;
use crate::kube::PodRecord;
use crate::netns::NetNs;
use crate::process::Spec;
use crate::{Error, http};

/// Namespace of the mesh's own pods.
pub const SYSTEM_NAMESPACE: &str = "culvert-system";
/// Service account of the node proxy.
pub const PROXY_ACCOUNT: &str = "ztunnel";
/// Port of discovery and CA.
pub const XDS_PORT: u16 = 15012;

/// culvertd.
#[derive(Debug)]
pub struct ControlPlane {
    /// Its process.
    pub component: Component,
    host: Host,
    address: IpAddr,
    state: PathBuf,
    program: PathBuf,
}

impl ControlPlane {
    pub(crate) fn new(shared: &Shared, host: Host, extra: &[String], env: &[(String, String)]) -> Result<Self, Error> {
        let state = shared.folder.join("culvertd");
        std::fs::create_dir_all(&state).during(|| format!("making {}", state.display()))?;
        let program = shared.program("culvertd")?;
        let address = match host.address_v6 {
            Some(v6) if !shared.families.v4() => IpAddr::from(v6),
            _ => host.address.into(),
        };
        let any = if shared.families.v6() { "[::]" } else { "0.0.0.0" };
        let mut spec = Spec::new("culvertd", &program, shared.log("culvertd"))
            .args(["--source-dir".into(), shared.directory.folder().as_os_str().to_owned()])
            .args(["--state-dir".into(), state.as_os_str().to_owned()])
            .args(["--xds-addr", &format!("{any}:15012"), "--ready-addr", &format!("{any}:15021")])
            .args(["--metrics-addr", "127.0.0.1:15014"])
            .args(["--cluster-id", "Kubernetes", "--trust-domain", "cluster.local"])
            .args(["--system-namespace", SYSTEM_NAMESPACE]);
        for san in [address.to_string().as_str(), "culvertd.culvert-system.svc", "localhost", "127.0.0.1"] {
            spec = spec.args(["--xds-san", san]);
        }
        spec = spec.args(extra.iter().cloned());
        spec.env.extend(env.iter().map(|(n, v)| (n.into(), v.into())));
        spec.network = Some(Arc::clone(&host.network));
        spec.group = Some(shared.group.child("culvertd")?);
        let (network, root) = (Arc::clone(&host.network), state.join("root.pem"));
        let component = Component::new(spec, move || {
            let at = SocketAddr::from(([127, 0, 0, 1], 15021));
            Ok(root.exists() && http::get(&network, at, "/healthz/ready").is_ok_and(|a| a.status == 200))
        });
        Ok(Self { component, host, address, state, program })
    }

    /// Its address on the fabric.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Where discovery and the CA listen.
    pub fn xds(&self) -> SocketAddr {
        (self.address, XDS_PORT).into()
    }

    /// Its network namespace.
    pub fn network(&self) -> &NetNs {
        &self.host.network
    }

    /// Its state folder, with the root's key.
    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    /// The root certificate, PEM.
    pub fn root_certificate(&self) -> PathBuf {
        self.state.join("root.pem")
    }

    /// Its `/metrics`.
    ///
    /// # Errors
    /// It does not answer.
    pub fn metrics(&self) -> Result<String, Error> {
        http::get_ok(&self.host.network, SocketAddr::from(([127, 0, 0, 1], 15014)), "/metrics")
    }

    /// A service-account token bound to a pod, as the API server would give it to that pod, by `culvertd token`.
    ///
    /// # Errors
    /// The command fails.
    pub fn token_of(&self, pod: &PodRecord) -> Result<String, Error> {
        self.make_token(&pod.namespace, &pod.service_account, &pod.name, &pod.node, &["--pod-uid", &pod.uid])
    }

    /// As [`ControlPlane::token_of`] for any names, without the pod's UID.
    ///
    /// # Errors
    /// The command fails.
    pub fn token(&self, namespace: &str, service_account: &str, pod: &str, node: &str) -> Result<String, Error> {
        self.make_token(namespace, service_account, pod, node, &[])
    }

    fn make_token(
        &self,
        namespace: &str,
        account: &str,
        pod: &str,
        node: &str,
        more: &[&str],
    ) -> Result<String, Error> {
        let mut command = Command::new(&self.program);
        command.arg("token").arg("--state-dir").arg(&self.state).args(["--namespace", namespace]);
        command.args(["--service-account", account, "--pod", pod, "--node-name", node]).args(more);
        let output = command.output().during(|| "running culvertd token".to_owned())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() {
            return Ok(text(&output.stdout));
        }
        let log = format!(": {}", text(&output.stderr));
        Err(Error::Exited { name: "culvertd token".to_owned(), status: output.status, log })
    }
}
