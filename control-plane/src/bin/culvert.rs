//! `culvert`, the mesh's command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    control_plane::cli::run()
}
