//! A cluster of network namespaces: nodes, pods, services and the programs of the mesh, on one machine and without
//! touching its own network. The demo, the bench and the end-to-end tests are written on it.
//!
//! ```no_run
//! # fn main() -> Result<(), tests::Error> {
//! use tests::cluster::Cluster;
//! let cluster = Cluster::builder().nodes(2).capture("marker-in-clear").start()?;
//! let server = cluster.pod("server").node(2).label("app", "server").command(["echo", "--listen", "0.0.0.0:7000"]).start()?;
//! let client = cluster.pod("client").node(1).start()?;
//! let done = client.run(["connect", "--to", &format!("{}:7000", server.ip())])?;
//! assert!(done.status.success());
//! # Ok(())
//! # }
//! ```
//!
//! # What is real and what is played
//! The programs (`ztunnel agent`, `ztunnel proxy`, `culvertd`) are the shipped ones. The harness plays what a cluster
//! gives them: the kubelet and the scheduler (pods from Deployments, their status, the announcement to the agent), the
//! API server's allocation of ClusterIPs, the CNI (addresses and routes) and the cluster's DNS.
//!
//! # Addresses
//! Fixed, since every cluster lives in namespaces of its own: the fabric's end of node k is `172.31.k.1`, the node is
//! `172.31.k.2`, its pods `10.244.k.10` and up; hosts attached to the fabric (culvertd, the gateway) are
//! `172.31.100.2` and up; ClusterIPs `10.96.0.0/16`; the resolver `10.96.0.10:53`. With IPv6
//! ([`cluster::Builder::families`]) the same in `fd31:0:0:k::`, `fd10:244:0:k::`, `fd96::` and `fd96::a`.
//!
//! # Services
//! No kernel rule translates ClusterIPs: the mesh does. The resolver answers a service's name with its ClusterIP for
//! an enrolled pod, and with the addresses of its ready pods for everybody else (as for a headless service). A client
//! outside the mesh that wants one pod uses that pod's address.

pub mod announce;
pub mod app;
pub mod bench;
pub mod bpf;
pub mod capture;
pub mod cgroup;
pub mod cleanup;
pub mod cluster;
pub mod cni;
pub mod component;
pub mod control;
pub mod demo;
pub mod dns;
mod error;
pub mod families;
pub mod forward;
pub mod http;
pub mod interop;
pub mod kube;
pub mod kubernetes;
pub mod links;
pub mod metrics;
pub mod mounts;
pub mod netns;
pub mod node;
pub mod picture;
pub mod pod;
pub mod prerequisites;
pub mod process;
pub mod resolver;
pub mod seccomp;
mod spawn;
pub mod wait;

pub use error::Error;
