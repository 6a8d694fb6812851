//! The end of the mesh on a node: every pod is released, and what agents left on the node is taken away.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::adopt::netns_of;
use super::capture;
use super::config::Config;
use super::netns::Netns;
use super::run_dir::RunDir;
use super::state::State;
use super::{Error, pod};

/// Takes the CNI plugin away, releases every pod and removes all pins, and what is in the run folder. Blocks.
///
/// # Errors
/// When the plugin, the pins or the folder cannot be removed; what is left can be tried again.
pub(super) fn uninstall(config: &Config, run_dir: &RunDir) -> Result<(), Error> {
    // First what would call an agent that is not there any more.
    if let Some(plugin) = config.plugin() {
        plugin.remove()?;
    }
    let state = State::new(run_dir.state());
    let saved = state.load()?;
    let known: BTreeSet<&str> = saved.iter().flatten().map(|saved| saved.pod.uid.as_str()).collect();
    let unknown = unknown(&config.bpffs, &known)?;
    // First the programs: from here on nothing is captured.
    capture::purge(&config.bpffs)?;
    for saved in saved {
        let saved = match saved {
            Ok(saved) => saved,
            Err(error) => {
                tracing::warn!(%error, "a pod is known by its pins alone, if there are any");
                continue;
            }
        };
        let uid = &saved.pod.uid;
        // A namespace that is gone needs nothing.
        if let Some(netns) = Netns::find(&saved.netns_path, saved.netns_inode, saved.netns_cookie)
            && let Err(error) = pod::restore(&netns, saved.before)
        {
            tracing::warn!(pod = uid, %error, "a pod's rules stay in its namespace");
        }
        state.remove(uid)?;
    }
    for (uid, netns) in unknown {
        if let Err(error) = pod::before_unknown(&netns).and_then(|before| pod::restore(&netns, before)) {
            tracing::warn!(pod = uid, %error, "a pod's rules stay in its namespace");
        }
    }
    // Kept if it holds what is not ours.
    drop(std::fs::remove_dir(&config.bpffs));
    run_dir.clear()?;
    tracing::info!("nothing of this agent is left on the node");
    Ok(())
}

/// The namespaces of pods that are pinned and of which no file tells.
fn unknown(bpffs: &Path, known: &BTreeSet<&str>) -> Result<BTreeMap<String, Netns>, Error> {
    let held = capture::held(bpffs)?.into_iter();
    let unknown = held.filter_map(|held| Some((held.uid?, held.netns_inode.ok()??)));
    let unknown = unknown.filter(|(uid, _)| !known.contains(uid.as_str()));
    Ok(unknown
        .filter_map(|(uid, inode)| {
            let found = netns_of(inode);
            if found.is_none() {
                tracing::warn!(pod = uid, inode, "its network namespace is not found; its rules stay there");
            }
            Some((uid, found?.0))
        })
        .collect())
}
