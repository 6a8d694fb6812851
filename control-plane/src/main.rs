//! `culvertd`, the control plane.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use control_plane::app::App;
use control_plane::commands;
use control_plane::config::{Command, CommandLine, Config, ServeArgs};
use mesh_runtime::{log, signal};

/// Exit codes besides 0: what was checked is not valid, or the command failed; the command line is wrong.
const FAILED: u8 = 1;
const MISUSED: u8 = 2;

fn main() -> ExitCode {
    let line = CommandLine::parse();
    let result = match &line.command {
        None => serve(&line.serve),
        Some(Command::Serve(args)) => serve(args),
        Some(Command::Token(args)) => {
            commands::token(args, &mut io::stdout()).map(|()| ExitCode::SUCCESS).map_err(|error| error.to_string())
        }
        Some(Command::Check(args)) => commands::check(args, &mut io::stdout())
            .map(|valid| if valid { ExitCode::SUCCESS } else { FAILED.into() })
            .map_err(|error| error.to_string()),
    };
    result.unwrap_or_else(|error| {
        complain(&error);
        FAILED.into()
    })
}

fn serve(args: &ServeArgs) -> Result<ExitCode, String> {
    let config = match Config::new(args) {
        Ok(config) => config,
        Err(errors) => {
            for error in errors {
                complain(&error.to_string());
            }
            return Ok(MISUSED.into());
        }
    };
    let format = args.log_format.parse().map_err(|error| format!("--log-format: {error}"))?;
    // Every error of a request is logged by whoever made it, with what it was for and once.
    let level = format!("{},kube_client::client::builder=off", args.log_level);
    let log = log::init(&level, format).map_err(|error| format!("--log-level: {error}"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    let result = runtime.block_on(async {
        let mut shutdown = signal::Shutdown::new().map_err(|error| format!("cannot handle signals: {error}"))?;
        let app = App::new(config, &log, shutdown.requester()).await.map_err(|error| error.to_string())?;
        let stop = async {
            let reason = shutdown.wait().await;
            tracing::info!(?reason, "shutting down");
        };
        app.run(stop).await.map_err(|error| error.to_string())
    });
    // A blocking thread may be in the middle of a large file; nothing that it does needs to be completed.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if let Err(error) = &result {
        tracing::error!("{error}");
    }
    log.flush(Duration::from_secs(1));
    result.map(|()| ExitCode::SUCCESS)
}

fn complain(error: &str) {
    // Nobody is left to tell if this fails.
    let _ = writeln!(io::stderr(), "culvertd: {error}");
}
