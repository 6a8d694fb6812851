//! The configuration files of a node.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use super::image::PAUSE;
use super::names::DOMAIN;
use super::node::{KUBELET_HEALTH, PROXY_HEALTH, SOCKET, Surroundings, ranges};
use super::{DNS_IP, FABRIC_IP, POD_NETWORKS, POD_NETWORKS_V6};
use crate::Error;
use crate::families::{Families, fabric_v4};

/// (path on the node, content)
pub(super) fn of_node(
    octet: u8,
    name: &str,
    cgroup_root: &str,
    around: &Surroundings<'_>,
) -> Result<Vec<(&'static str, String)>, Error> {
    let address = fabric_v4(octet).1;
    let user = format!("system:node:{name}");
    let serving = around.pki.issue(&user, Some("system:nodes"), &[name], &[address.into()])?;
    let kubeconfig = |user: &str, group| around.pki.kubeconfig_text(around.server, user, group);
    Ok(vec![
        ("/etc/containerd/config.toml", containerd(&around.programs.path("runc").display().to_string())),
        ("/etc/cni/net.d/10-ptp.conflist", text(&cni(octet, around.families))),
        ("/etc/kubernetes/ca.crt", around.pki.root().to_owned()),
        ("/etc/kubernetes/kubelet.crt", serving.certificate),
        ("/etc/kubernetes/kubelet.key", serving.key),
        ("/etc/kubernetes/kubelet.conf", kubeconfig(&user, Some("system:nodes"))?),
        ("/etc/kubernetes/kubelet.yaml", text(&kubelet(cgroup_root))),
        ("/etc/kubernetes/kube-proxy.conf", kubeconfig("system:kube-proxy", None)?),
        ("/etc/kubernetes/kube-proxy.yaml", text(&kube_proxy(name, around.families))),
        // For pods with `dnsPolicy: Default` and those on the node's network.
        ("/etc/resolv.conf", format!("nameserver {FABRIC_IP}\n")),
    ])
}

fn containerd(runc: &str) -> String {
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "{SOCKET}"

# Thrown away with the node.
[plugins."io.containerd.metadata.v1.bolt"]
no_sync = true

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE}"

[plugins."io.containerd.cri.v1.runtime"]
# Without CAP_SYS_RESOURCE runc could not set what a pod's class asks for.
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/opt/cni/bin"]
conf_dir = "/etc/cni/net.d"
use_internal_loopback = true

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{runc}"
SystemdCgroup = false
"#
    )
}

fn cni(octet: u8, families: Families) -> Value {
    let ranges: Vec<Value> = ranges(octet, families).iter().map(|range| json!([{"subnet": range}])).collect();
    let routes: Vec<Value> = everywhere(families).iter().map(|all| json!({"dst": all})).collect();
    json!({
        "cniVersion": "1.0.0", "name": "pods",
        "plugins": [{
            "type": "ptp",
            "ipam": {"type": "host-local", "ranges": ranges, "routes": routes},
        }, {
            // For `hostPort`.
            "type": "portmap", "capabilities": {"portMappings": true}, "backend": "nftables",
        }],
    })
}

fn everywhere(families: Families) -> Vec<String> {
    families.pick(Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED).iter().map(|address| format!("{address}/0")).collect()
}

fn kubelet(cgroup_root: &str) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false}, "webhook": {"enabled": true},
            "x509": {"clientCAFile": "/etc/kubernetes/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": "/etc/kubernetes/kubelet.crt", "tlsPrivateKeyFile": "/etc/kubernetes/kubelet.key",
        "healthzBindAddress": "127.0.0.1", "healthzPort": KUBELET_HEALTH,
        "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
        "clusterDNS": [DNS_IP], "clusterDomain": DOMAIN, "resolvConf": "/etc/resolv.conf",
        "cgroupDriver": "cgroupfs", "cgroupRoot": cgroup_root, "failCgroupV1": false,
        // The machine's memory and disk are not the node's to judge.
        "localStorageCapacityIsolation": false, "failSwapOn": false, "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%",
            "imagefs.inodesFree": "0%", "pid.available": "0%",
        },
        "makeIPTablesUtilChains": false, "oomScoreAdj": 0,
        // Statuses are what tests wait for, and files that follow their ConfigMap.
        "nodeStatusUpdateFrequency": "2s", "syncFrequency": "10s", "registryPullQPS": 0, "eventRecordQPS": 0,
        "kubeAPIQPS": 200, "kubeAPIBurst": 400, "containerLogMaxSize": "10Mi",
    })
}

fn kube_proxy(name: &str, families: Families) -> Value {
    let pods = if families.v6() { format!("{POD_NETWORKS},{POD_NETWORKS_V6}") } else { POD_NETWORKS.to_owned() };
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": "/etc/kubernetes/kube-proxy.conf"},
        "hostnameOverride": name, "mode": "nftables", "clusterCIDR": pods,
        "nftables": {"minSyncPeriod": "0s", "syncPeriod": "30s"},
        "healthzBindAddress": format!("127.0.0.1:{PROXY_HEALTH}"), "metricsBindAddress": "127.0.0.1:10249",
        "oomScoreAdj": 0,
        // These settings are the machine's.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}

/// JSON is YAML.
fn text(value: &Value) -> String {
    format!("{value:#}\n")
}
