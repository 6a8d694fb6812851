//! `culvert`: what the mesh does on a cluster, and why it refused what it refused.
//!
//! Facts are gathered at the edge (`cluster`, `gather`), reports are made of them by pure functions (`status`, `check`,
//! `sync`, `version`, `ztunnel`), and each report has a form for people and one for programs. The fields of the JSON forms
//! are those of the structs that they are made of, and stay what they are; new ones may come.

mod args;
mod capture;
mod check;
mod cluster;
mod error;
mod facts;
mod gather;
mod read;
mod status;
mod surroundings;
mod sync;
#[cfg(test)]
mod testing;
mod text;
mod version;
mod ztunnel;

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::SystemTime;

use clap::{CommandFactory as _, Parser as _};

use args::{CheckArgs, Command, CommandLine, Global, Output, ZtunnelArgs};
use check::Check;
use cluster::Cluster;
use error::CliError;
use gather::Progress;
use status::Status;
use sync::ProxyStatus;
use text::Style;
use version::{CLIENT, Version, Versions};
use ztunnel::{Shown, Target};

/// Exit code: all is well.
const GOOD: u8 = 0;
/// Exit code: something is wrong, and was named.
const WRONG: u8 = 1;
/// Exit code: wrong usage, or the cluster cannot be reached.
const UNUSABLE: u8 = 2;
/// Exit code after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

/// What a command has to say.
struct Answer {
    text: String,
    code: u8,
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let line = CommandLine::parse();
    let done = answer(&line).and_then(|answer| {
        let written = io::stdout().lock().write_all(answer.text.as_bytes());
        match written {
            // Whoever read it has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(answer.code),
            Err(error) => Err(CliError::Write(error)),
            Ok(()) => Ok(answer.code),
        }
    });
    match done {
        Ok(code) => code.into(),
        Err(CliError::Interrupted) => INTERRUPTED.into(),
        Err(error) => {
            // Nobody is left to tell if this fails.
            let _ = writeln!(io::stderr(), "culvert: {}", text::clean_line(&error.to_string()));
            UNUSABLE.into()
        }
    }
}

fn answer(line: &CommandLine) -> Result<Answer, CliError> {
    if let Command::Completion { shell } = &line.command {
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut CommandLine::command(), "culvert", &mut script);
        return Ok(Answer { text: String::from_utf8_lossy(&script).into_owned(), code: GOOD });
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(CliError::Runtime)?;
    let done = runtime.block_on(async {
        tokio::select! {
            done = command(line) => done,
            interrupted = tokio::signal::ctrl_c() => Err(interrupted.map_or_else(CliError::Runtime, |()| CliError::Interrupted)),
        }
    });
    // A name that is being looked up holds nothing up.
    runtime.shutdown_background();
    done
}

async fn command(line: &CommandLine) -> Result<Answer, CliError> {
    let global = &line.global;
    match &line.command {
        Command::Version => version(global).await,
        Command::Status => {
            let (cluster, kubernetes) = Cluster::connect(global).await?;
            let facts = Box::pin(gather::everything(&cluster, &global.namespace, kubernetes)).await?;
            let status = Status::new(&facts, SystemTime::now());
            shown(global, &status, status.healthy, Status::text)
        }
        Command::ProxyStatus => {
            let (cluster, _) = Cluster::connect(global).await?;
            let parts = gather::parts(&cluster, &global.namespace).await?;
            let (culvertd, _, proxies) = gather::split(parts);
            let progress = Progress::new(culvertd.len());
            let asked = progress.shown(gather::statuses(&cluster, &global.namespace, culvertd, &progress)).await;
            let status = ProxyStatus::new(&asked, &proxies);
            shown(global, &status, status.healthy, ProxyStatus::text)
        }
        Command::Check(args) => Box::pin(check(global, *args)).await,
        Command::Ztunnel(args) => proxies(global, args).await,
        Command::Completion { .. } => Ok(Answer { text: String::new(), code: GOOD }),
    }
}

async fn check(global: &Global, args: CheckArgs) -> Result<Answer, CliError> {
    let (cluster, kubernetes) = Cluster::connect(global).await?;
    let (facts, around) = tokio::join!(
        gather::everything(&cluster, &global.namespace, kubernetes),
        surroundings::find(&cluster, &global.namespace),
    );
    let facts = facts?;
    let is_installed = facts.desired.values().any(Option::is_some);
    let check = Check::new(&facts, &around, is_installed && !args.pre);
    shown(global, &check, check.healthy, Check::text)
}

async fn proxies(global: &Global, args: &ZtunnelArgs) -> Result<Answer, CliError> {
    let mut target = Target { node: args.node.clone(), ..Target::default() };
    target.pod = args.pod.as_deref().map(ztunnel::pod_name).transpose()?;
    let (cluster, _) = Cluster::connect(global).await?;
    if let Some((namespace, name)) = &target.pod {
        let (node, account) = gather::home(&cluster, namespace, name).await?;
        target.node = Some(node);
        target.identity = Some(format!("/ns/{namespace}/sa/{account}"));
    }
    let (_, _, proxies) = gather::split(gather::parts(&cluster, &global.namespace).await?);
    let proxies = ztunnel::choose(proxies, &target, &global.namespace)?;
    let progress = Progress::new(proxies.len());
    let asked = gather::dumps(&cluster, &global.namespace, proxies, args.what.page(), &progress);
    let shown_of = Shown::new(args.what, progress.shown(asked).await, &target);
    shown(global, &shown_of, shown_of.is_complete(), Shown::text)
}

/// This program's own version is known without a cluster.
async fn version(global: &Global) -> Result<Answer, CliError> {
    let asked = async {
        let (cluster, kubernetes) = Cluster::connect(global).await?;
        let parts = gather::parts(&cluster, &global.namespace).await?;
        let progress = Progress::new(parts.len());
        let versions = progress.shown(gather::versions(&cluster, &global.namespace, parts, &progress)).await;
        Ok::<_, CliError>((kubernetes, versions))
    };
    let (versions, is_reached) = match asked.await {
        Ok((kubernetes, components)) => {
            let components: Vec<_> = components.into_iter().map(Version::of).collect();
            (Versions { client: CLIENT, kubernetes: Some(kubernetes), components, error: None }, true)
        }
        Err(error) => {
            let error = Some(error.to_string());
            (Versions { client: CLIENT, kubernetes: None, components: Vec::new(), error }, false)
        }
    };
    let answer = shown(global, &versions, true, Versions::text)?;
    Ok(Answer { code: if is_reached { GOOD } else { UNUSABLE }, ..answer })
}

fn shown<T: serde::Serialize>(
    global: &Global,
    report: &T,
    healthy: bool,
    text: fn(&T, Style) -> String,
) -> Result<Answer, CliError> {
    let text = match global.output {
        Output::Table => text(report, Style::of_stdout()),
        Output::Json => text::json(report).map_err(CliError::Json)?,
    };
    Ok(Answer { text, code: if healthy { GOOD } else { WRONG } })
}
