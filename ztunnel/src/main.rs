//! The node: `ztunnel agent`, `ztunnel proxy`, `ztunnel cni`.

fn main() {}
