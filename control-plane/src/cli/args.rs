//! The command line of `culvert`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::config::parse_time;

const EXAMPLES: &str = "\
Examples:
  culvert check                    is everything there that the mesh needs, and does it hold?
  culvert status                   what the mesh does, and what it refused and why
  culvert ztunnel workloads        what the proxies know
  culvert proxy-status             who follows the control plane, and how far

Exit codes: 0 all is well; 1 something is wrong, and was named; 2 wrong usage, or the cluster cannot be reached.

Rights: list on nodes, namespaces, pods and events; get and create on pods/portforward (proxies, culvertd) and pods/exec \
(agents) in the system namespace; get on its configmaps, daemonsets and deployments, and on the pod that --pod names. \
`check` also lists daemonsets, deployments and webhooks of the whole cluster, and gets that namespace and the mesh's \
webhook. What may not be asked is said, and the rest is shown.";

const STATUS: &str = "\
Examples:
  culvert status
  culvert status -o json | jq '.pods[] | select(.state == \"not captured\")'
  culvert status --context staging && echo all is well

What is wrong comes first, each with what to do about it; the exit code is 1 if there is anything.";

const VERSION: &str = "\
Examples:
  culvert version
  culvert version -o json | jq -r .client";

const ZTUNNEL: &str = "\
Examples:
  culvert ztunnel workloads                          of every node's proxy, what is not the same everywhere is told apart
  culvert ztunnel certificates --node worker-1
  culvert ztunnel connections --pod shop/web-7d4f    of the proxy of that pod's node, that pod's alone
  culvert ztunnel services -o json | jq '.proxies[0].items[].hostname'";

const PROXY_STATUS: &str = "\
Examples:
  culvert proxy-status
  culvert proxy-status -o json | jq '.proxies[] | select(.nacks != [])'";

const CHECK: &str = "\
Examples:
  culvert check --pre     before the mesh is installed: kernels, rights, what is in the way
  culvert check           after: every enrolled pod truly captured, as its node's kernel says
  culvert check -o json | jq '.lines[] | select(.verdict == \"failed\")'

Each line is \u{2713} (good), ! (may be wrong) or \u{2717} (wrong, exit code 1), with what to do about it.";

const COMPLETION: &str = "\
Examples:
  source <(culvert completion bash)
  culvert completion zsh > \"${fpath[1]}/_culvert\"
  culvert completion fish > ~/.config/fish/completions/culvert.fish";

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "culvert", version, about = "What the mesh does on a cluster, and why it refuses what it refuses")]
#[command(after_help = EXAMPLES)]
pub struct CommandLine {
    /// What every command takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Credentials for the cluster [default: $KUBECONFIG, then ~/.kube/config, then those of the pod it runs in]
    #[arg(long, value_name = "FILE", global = true)]
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig [default: its current one]
    #[arg(long, value_name = "NAME", global = true)]
    pub context: Option<String>,
    /// The namespace of the mesh's own pods
    #[arg(
        long,
        short,
        value_name = "NAME",
        global = true,
        default_value = "culvert-system",
        env = "CULVERT_SYSTEM_NAMESPACE"
    )]
    pub namespace: String,
    /// How to print
    #[arg(long, short, global = true, value_enum, default_value_t)]
    pub output: Output,
    /// How long the API server, and each pod, may take to answer, such as 500ms, 10s, 1m
    #[arg(long, value_name = "TIME", global = true, default_value = "10s", value_parser = parse_time)]
    pub timeout: Duration,
}

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs; the fields stay what they are.
    Json,
}

/// What `culvert` can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// What the mesh does, and what it refused and why
    #[command(after_help = STATUS)]
    Status,
    /// Whether a cluster is fit for the mesh, and whether the mesh holds what it promises
    #[command(after_help = CHECK)]
    Check(CheckArgs),
    /// What the nodes' proxies know and carry
    #[command(after_help = ZTUNNEL)]
    Ztunnel(ZtunnelArgs),
    /// Which proxies follow the control plane, how far, and what they refused
    #[command(after_help = PROXY_STATUS)]
    ProxyStatus,
    /// The version of this program and of every part of the mesh
    #[command(after_help = VERSION)]
    Version,
    /// A script that lets a shell complete this command line
    #[command(after_help = COMPLETION)]
    Completion {
        /// Which shell
        shell: Shell,
    },
}

/// Options of `culvert check`.
#[derive(Clone, Copy, Debug, Args)]
pub struct CheckArgs {
    /// Check only what must hold before the mesh is installed [default: if it is not]
    #[arg(long)]
    pub pre: bool,
}

/// Options of `culvert ztunnel`.
#[derive(Clone, Debug, Args)]
pub struct ZtunnelArgs {
    /// What of it
    #[command(subcommand)]
    pub what: Section,
    /// Of the proxy of this node alone
    #[arg(long, value_name = "NAME", global = true, conflicts_with = "pod")]
    pub node: Option<String>,
    /// Of the proxy of this pod's node; of connections and certificates, this pod's alone
    #[arg(long, value_name = "NAMESPACE/NAME", global = true)]
    pub pod: Option<String>,
}

/// A part of a proxy's dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum Section {
    /// Pods and other endpoints that it knows
    Workloads,
    /// Services that it knows
    Services,
    /// Authorization policies in force
    Policies,
    /// Certificates, without their keys
    Certificates,
    /// Connections that are open now
    Connections,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn options_stand_before_and_behind_the_command() {
        CommandLine::command().debug_assert();
        for words in [
            &["culvert", "-n", "mesh", "ztunnel", "workloads", "--node", "a", "-o", "json", "--timeout", "1s"][..],
            &["culvert", "ztunnel", "--node", "a", "workloads", "-n", "mesh", "--output=json", "--timeout=1s"],
        ] {
            let line = CommandLine::try_parse_from(words).unwrap();
            assert_eq!((line.global.namespace.as_str(), line.global.output), ("mesh", Output::Json));
            assert_eq!(line.global.timeout, Duration::from_secs(1));
            let Command::Ztunnel(args) = line.command else { panic!("{words:?}") };
            assert_eq!((args.node.as_deref(), args.what), (Some("a"), Section::Workloads));
        }
        for wrong in [
            &["culvert"][..],
            &["culvert", "ztunnel", "workloads", "--node", "a", "--pod", "b/c"],
            &["culvert", "status", "--timeout", "soon"],
        ] {
            assert_eq!(CommandLine::try_parse_from(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }
}
