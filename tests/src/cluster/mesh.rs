//! The mesh's part of a cluster: culvertd, agents, proxies.

use std::ffi::OsString;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::sync::Arc;

use super::Shared;
use super::builder::{Builder, Mesh, PROXY_UID, make_folder};
use crate::component::Component;
use crate::control::{ControlPlane, PROXY_ACCOUNT, SYSTEM_NAMESPACE};
use crate::error::Context;
use crate::kube::PodRecord;
use crate::netns::NetNs;
use crate::node::{Node, NodeMesh, ProxyPod};
use crate::pod::new_uid;
use crate::process::Spec;
use crate::{Error, http};

impl Builder {
    /// culvertd first, then the agents, then the proxies.
    pub(super) fn start_mesh(&self, shared: &Shared) -> Result<(), Error> {
        shared.directory.ensure(SYSTEM_NAMESPACE, PROXY_ACCOUNT)?;
        let control = ControlPlane::new(shared, shared.attach_host("culvertd")?, &self.culvertd_args, &self.env)?;
        control.component.start()?;
        let control = shared.control.get_or_init(|| control);
        for node in &shared.nodes {
            let mesh = self.node_mesh(shared, control, node)?;
            node.mesh.get_or_init(|| mesh);
        }
        for node in &shared.nodes {
            node.agent()?.launch()?;
        }
        for node in &shared.nodes {
            node.agent()?.wait_ready()?;
            if self.mesh == Mesh::Culvert {
                node.proxy()?.launch()?;
            }
        }
        for node in shared.nodes.iter().filter(|_| self.mesh == Mesh::Culvert) {
            node.proxy()?.wait_ready()?;
        }
        Ok(())
    }

    fn node_mesh(&self, shared: &Shared, control: &ControlPlane, node: &Node) -> Result<NodeMesh, Error> {
        let proxy = self.proxy_pod(shared, control, node)?;
        let agent = self.agent(shared, control, node, &proxy.record)?;
        Ok(NodeMesh::new(agent, proxy))
    }

    /// A pod of the proxy with its token, as the DaemonSet makes it; not started.
    pub(super) fn proxy_pod(&self, shared: &Shared, control: &ControlPlane, node: &Node) -> Result<ProxyPod, Error> {
        let uid = new_uid()?;
        let pod = PodRecord {
            name: format!("ztunnel-{}", &uid[..5]),
            namespace: SYSTEM_NAMESPACE.to_owned(),
            uid,
            service_account: PROXY_ACCOUNT.to_owned(),
            labels: [("app".to_owned(), "ztunnel".to_owned())].into(),
            annotations: [].into(),
            owner: Some(("DaemonSet".to_owned(), "ztunnel".to_owned())),
            node: node.name.clone(),
            host_ip: node.host_ip(),
            ips: node.take_addresses(self.families)?,
            ports: Vec::new(),
            ready: true,
            terminating: false,
        };
        let network = Arc::new(NetNs::create_for(self.families, format!("proxy of {}", node.name))?);
        node.attach(shared, &network, &pod.name, &pod.ips, self.families)?;
        shared.directory.put_pod(&pod)?;
        let files = ProxyFiles::create(node, control, &pod)?;
        let component = self.proxy(shared, control, node, &pod, &files, &network)?;
        Ok(ProxyPod { component, record: pod, network })
    }

    fn agent(&self, shared: &Shared, control: &ControlPlane, node: &Node, pod: &PodRecord) -> Result<Component, Error> {
        let files = ProxyFiles::of(node, pod);
        let name = format!("{}-agent", node.name);
        let run = node.run_dir();
        let mut spec = match &self.mesh {
            Mesh::Peer(command) => Spec::new(&name, "/bin/sh", shared.log(&name))
                .args(["-c", command])
                .env("CULVERT_CNI_SOCKET", run.join("cni.sock"))
                .env("CULVERT_RUN_DIR", &run)
                .env("CULVERT_XDS_ADDRESS", format!("https://{}", control.xds()))
                .env("CULVERT_CA_ROOTS", &files.roots)
                .env("CULVERT_TOKEN", &files.token)
                .env("NODE_IP", node.host_ip().to_string()),
            Mesh::Culvert | Mesh::Off => Spec::new(&name, shared.program("ztunnel")?, shared.log(&name))
                .args(["agent".into(), "--run-dir".into(), run.into_os_string()])
                .args(["--cgroup-root".into(), node.group.path().as_os_str().to_owned()])
                .args(["--bpffs".into(), node.bpffs().into_os_string()])
                .args(["--proxy-uid".to_owned(), PROXY_UID.to_string()])
                .args(self.agent_options(shared, node)?)
                .args(self.agent_args.iter().cloned()),
        };
        spec.env.extend(shared.pod_env(pod));
        spec.env.extend(self.env.iter().map(|(n, v)| (n.into(), v.into())));
        spec.network = Some(Arc::clone(&node.network));
        spec.mounts = Some(Arc::clone(&shared.mounts));
        spec.group = Some(node.group.child("agent")?);
        let agent = shared.agent(node.index)?;
        Ok(Component::new(spec, move || Ok(agent.socket().exists() && agent.list().is_ok())))
    }

    fn agent_options(&self, shared: &Shared, node: &Node) -> Result<Vec<OsString>, Error> {
        let mut options: Vec<OsString> = Vec::new();
        if self.cni {
            options.extend(["--source-dir".into(), shared.directory.folder().as_os_str().to_owned()]);
        }
        if self.kubelet {
            options.extend(["--kubelet-cgroup".into(), node.kubelet_group()?.path().as_os_str().to_owned()]);
        }
        Ok(options)
    }

    fn proxy(
        &self,
        shared: &Shared,
        control: &ControlPlane,
        node: &Node,
        pod: &PodRecord,
        files: &ProxyFiles,
        network: &Arc<NetNs>,
    ) -> Result<Component, Error> {
        let name = format!("{}-proxy", node.name);
        let socket = files.socket.join("agent.sock");
        let any = if self.families.v6() { "[::]" } else { "0.0.0.0" };
        let mut spec = Spec::new(&name, shared.bins.join("ztunnel"), shared.log(&name))
            .args(["proxy".into(), "--agent-socket".into(), socket.into_os_string()])
            .args(["--xds-address".to_owned(), format!("https://{}", control.xds())])
            .args(["--ca-roots".into(), files.roots.clone().into_os_string()])
            .args(["--token".into(), files.token.clone().into_os_string()])
            .args(["--pod-name", &pod.name, "--instance-ip", &pod.ip().to_string()])
            .args(["--node", &node.name, "--cluster-id", "Kubernetes", "--trust-domain", "cluster.local"])
            .args([
                "--admin-addr",
                "127.0.0.1:15000",
                "--ready-addr",
                &format!("{any}:15021"),
                "--metrics-addr",
                &format!("{any}:15020"),
            ])
            .args(["--uid".to_owned(), PROXY_UID.to_string()])
            .args(self.proxy_args.iter().cloned());
        spec.env.extend(shared.pod_env(pod));
        spec.env.extend(self.env.iter().map(|(n, v)| (n.into(), v.into())));
        spec.network = Some(Arc::clone(network));
        spec.mounts = Some(Arc::clone(&shared.mounts));
        spec.group = Some(node.group.child("proxy")?);
        // The agent's folder is root's alone; the proxy sees its own part of it, and none of the BPF filesystems.
        spec.binds.push((node.run_dir().join("proxy"), files.socket.clone()));
        spec.hidden = shared.nodes.iter().map(Node::bpffs).collect();
        let asked = Arc::clone(network);
        Ok(Component::new(spec, move || {
            Ok(http::get(&asked, Node::ready_at(), "/healthz/ready").is_ok_and(|a| a.status == 200))
        }))
    }
}

/// What the kubelet mounts into the proxy's pod.
struct ProxyFiles {
    token: PathBuf,
    roots: PathBuf,
    /// Where the agent's inner folder appears.
    socket: PathBuf,
}

impl ProxyFiles {
    fn of(node: &Node, pod: &PodRecord) -> Self {
        let folder = node.folder.join(&pod.name);
        Self { token: folder.join("token"), roots: folder.join("root.pem"), socket: folder.join("agent") }
    }

    fn create(node: &Node, control: &ControlPlane, pod: &PodRecord) -> Result<Self, Error> {
        let files = Self::of(node, pod);
        make_folder(&files.socket, 0o755)?;
        let token = control.token_of(pod)?;
        std::fs::write(&files.token, token).during(|| "writing the proxy's token".to_owned())?;
        std::fs::copy(control.root_certificate(), &files.roots).during(|| "copying the root certificate".to_owned())?;
        for (file, mode) in [(&files.token, 0o400), (&files.roots, 0o444)] {
            let what = || format!("giving {} to the proxy", file.display());
            std::fs::set_permissions(file, std::fs::Permissions::from_mode(mode)).during(what)?;
            chown(file, Some(PROXY_UID), Some(PROXY_UID)).during(what)?;
        }
        Ok(files)
    }
}
