//! The node: `ztunnel agent`, `ztunnel proxy`, `ztunnel cni`.

#![expect(clippy::print_stderr, clippy::print_stdout, reason = "a command's own output")]

use std::process::ExitCode;

use clap::Parser;
use ztunnel::{agent, ask, cni, proxy};

/// The mesh on one node: captures the traffic of its pods and carries it through mutual TLS.
#[derive(clap::Parser)]
#[command(name = "ztunnel", version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Prepare pods and hand their sockets to the proxy (privileged)
    Agent(Box<agent::Config>),
    /// Carry connections (no privilege)
    Proxy(Box<proxy::Config>),
    /// The CNI plugin: environment and standard input as the CNI specification has it
    Cni,
    /// Ask this node's agent whether pods can be enrolled: exit code 0 if so
    Ready(ask::Options),
    /// Ask this node's agent whether it answers: exit code 0 also if pods cannot be enrolled yet
    Alive(ask::Options),
    /// Ask this node's agent which pods are enrolled, each checked in the kernel now
    Pods(ask::Options),
    /// Print the version
    Version,
    /// Try every way out of the proxy's jail, from inside it (for tests)
    #[command(hide = true)]
    JailProbe {
        /// From outside, to see that the attempts themselves work
        #[arg(long)]
        unjailed: bool,
        /// Wait for the end of standard input first, so that the filter can be looked at meanwhile
        #[arg(long)]
        after_stdin: bool,
    },
}

fn main() -> ExitCode {
    // The runtime calls the plugin by its file and without arguments; CNI_COMMAND says that it is meant.
    let as_plugin = std::env::args_os().len() == 1 && std::env::var_os("CNI_COMMAND").is_some();
    let command = if as_plugin { Command::Cni } else { Arguments::parse().command };
    // No thread is started before this: the proxy gives up its privileges while it has only one.
    let result: Result<(), Box<dyn std::error::Error>> = match command {
        Command::Agent(config) => agent::run(&config).map_err(Into::into),
        Command::Proxy(config) => proxy::run(*config).map_err(Into::into),
        Command::Cni => return cni::run(),
        Command::Ready(options) => ask::ready(&options).map_err(Into::into),
        Command::Alive(options) => ask::alive(&options).map_err(Into::into),
        Command::Pods(options) => ask::pods(&options).map(|text| print!("{text}")).map_err(Into::into),
        Command::Version => {
            println!("{}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Command::JailProbe { unjailed, after_stdin } => {
            println!("{}", proxy::jail::probe(unjailed, after_stdin));
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ztunnel: {error}");
            ExitCode::FAILURE
        }
    }
}
