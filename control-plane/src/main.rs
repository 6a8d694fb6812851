//! `culvertd`, the control plane.

fn main() {}
