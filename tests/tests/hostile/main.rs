//! What pods, peers and strangers can do to the mesh, tried against the shipped programs: each attempt is answered as the
//! protocol says or closed, memory stays bounded, a pod beside the attacked one notices nothing, and nothing is left.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "figures of a test run")]

#[path = "../common/mod.rs"]
mod common;

mod certificates;
mod floods;
mod forge;
mod idle;
mod local;
mod ports;
mod requests;
mod scan;
mod scene;
mod stalled;
mod wire;
