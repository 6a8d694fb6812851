//! The test applications: subcommands of `culvert-app`. Servers run until they are killed; clients print one line of
//! JSON to standard output and end with 0 if everything was as asked.
//!
//! They need nothing of the machine but `CULVERT_RESOLVER` (address of the cluster's resolver; without it, what
//! `/etc/resolv.conf` says) and `CULVERT_MARKER` (a string put into what they send), which the harness sets.

pub mod bookinfo;
pub mod clients;
pub mod echo;
pub mod health;
pub mod http;
pub mod load;
pub mod net;
pub mod numbered;
mod page;
pub mod storm;
pub mod transfer;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "culvert-app", about = "Servers and clients that run in the pods of the test cluster")]
pub struct Cli {
    /// Threads that serve connections.
    #[arg(long, default_value_t = 1, global = true)]
    threads: usize,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A service of the Bookinfo sample.
    Bookinfo(bookinfo::Options),
    /// A TCP server: echo, banner, sink, transfer and ill-mannered modes.
    Echo(echo::Options),
    /// An HTTP/1.1 server with keepalive and a body of fixed size.
    Http(http::Options),
    /// A server of gRPC's health protocol.
    Health(health::Options),
    /// One connection: what it saw, as JSON.
    Connect(clients::connect::Options),
    /// A connection that is kept and used until it breaks or its time is over.
    Hold(clients::hold::Options),
    /// Half-close in both directions against an echo server.
    HalfClose(clients::half_close::Options),
    /// One connection, made in one of the ways in which applications make them.
    Dial(clients::dial::Options),
    /// TCP segments without a TCP socket.
    Raw(clients::raw::Options),
    /// Connections one after the other: which endpoints took them.
    Spread(clients::spread::Options),
    /// Connects in a loop from the first instruction on, with a marker.
    Restless(clients::restless::Options),
    /// Tries every port of an address.
    Scan(clients::scan::Options),
    /// Many connections at once, each with one exchange.
    Parallel(clients::parallel::Options),
    /// Bulk data with checksums, against `echo --mode transfer`.
    Transfer(transfer::Options),
    /// Load: keepalive requests or new connections, with percentiles.
    Load(load::Options),
    /// A server of numbered requests and streams that counts what arrives.
    Numbered(numbered::Options),
    /// New connections at a steady pace and long-lived streams, counted one by one, against `numbered`.
    Storm(storm::Options),
    /// Looks a name up at the cluster's resolver.
    Resolve(net::ResolveOptions),
    /// Does nothing until it is told to end: holds a pod's namespaces.
    Pause,
}

/// Runs the command; the exit code is 0 if all went as asked, 1 if not, 2 for wrong usage.
pub fn run(cli: Cli) -> ExitCode {
    let mut builder = match cli.threads {
        0 | 1 => tokio::runtime::Builder::new_current_thread(),
        threads => {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            builder.worker_threads(threads);
            builder
        }
    };
    let done = match builder.enable_all().build() {
        Ok(runtime) => runtime.block_on(until_told(dispatch(cli.command))),
        Err(error) => Err(error),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            net::emit(&serde_json::json!({"ok": false, "error": net::kind(&error), "message": error.to_string()}));
            ExitCode::FAILURE
        }
    }
}

/// The kernel ignores a request to end for the first process of a container, unless that process listens for it.
async fn until_told(work: impl Future<Output = std::io::Result<bool>>) -> std::io::Result<bool> {
    if std::process::id() != 1 {
        return work.await;
    }
    let mut told = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        done = work => done,
        _ = told.recv() => Ok(true),
    }
}

async fn dispatch(command: Command) -> std::io::Result<bool> {
    match command {
        Command::Bookinfo(options) => bookinfo::run(options).await,
        Command::Echo(options) => echo::run(options).await,
        Command::Http(options) => http::run(options).await,
        Command::Health(options) => health::run(options).await,
        Command::Connect(options) => clients::connect::run(options).await,
        Command::Hold(options) => clients::hold::run(options).await,
        Command::HalfClose(options) => clients::half_close::run(options).await,
        Command::Dial(options) => clients::dial::run(&options),
        Command::Raw(options) => clients::raw::run(&options),
        Command::Spread(options) => clients::spread::run(options).await,
        Command::Restless(options) => clients::restless::run(&options),
        Command::Scan(options) => clients::scan::run(options).await,
        Command::Parallel(options) => clients::parallel::run(options).await,
        Command::Transfer(options) => transfer::run(options).await,
        Command::Load(options) => load::run(options).await,
        Command::Numbered(options) => numbered::run(options).await,
        Command::Storm(options) => storm::run(options).await,
        Command::Resolve(options) => net::resolve_command(options).await,
        Command::Pause => std::future::pending().await,
    }
}
