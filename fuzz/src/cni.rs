//! What a container runtime gives the CNI plugin: configuration, and variables.

use std::time::Duration;

use ztunnel::cni::config::{Attachment, Configuration, VERSIONS, addresses};
use ztunnel::cni::error::CniError;

use crate::cursor::Cursor;

/// Reads the input as four variables, each with a length of two bytes, and the configuration.
pub fn run(input: &[u8]) {
    let mut cursor = Cursor::new(input);
    let [sandbox, interface, netns, arguments] = [(); 4].map(|()| cursor.bytes());
    configuration(cursor.rest());
    let lookup = |name: &'static str| {
        let value = match name {
            "CNI_CONTAINERID" => sandbox,
            "CNI_IFNAME" => interface,
            "CNI_NETNS" => netns,
            "CNI_ARGS" => arguments,
            other => panic!("{other} is not asked for"),
        };
        let value = std::str::from_utf8(value).map_err(|_| CniError::Environment(name))?;
        Ok(Some(value.to_owned()).filter(|value| !value.is_empty()))
    };
    match Attachment::read(&lookup) {
        Err(error) => refused(&error),
        Ok(attachment) => {
            assert!(!attachment.sandbox.contains('/') && !attachment.sandbox.is_empty());
            assert!(!attachment.uid_or_sandbox().is_empty());
            for text in [&attachment.uid, &attachment.name, &attachment.namespace, &attachment.service_account] {
                assert!(text.len() <= 253);
            }
            if attachment.require_pod().is_ok() {
                assert!(!attachment.pod().name.is_empty() && !attachment.pod().namespace.is_empty());
            }
            assert_eq!(attachment.require_netns().is_ok(), attachment.netns.is_absolute());
        }
    }
}

fn configuration(text: &[u8]) {
    let read = match Configuration::parse(text) {
        Ok(read) => read,
        Err(error) => return refused(&error),
    };
    assert!(VERSIONS.contains(&read.version.as_str()));
    assert!(VERSIONS.iter().any(|version| read.at_least(version).is_ok()));
    assert!(read.own.run_dir().is_absolute());
    assert!((Duration::from_secs(1)..=Duration::from_secs(600)).contains(&read.own.patience()));
    let _ = read.own.exclusions();
    if let Some(previous) = &read.previous
        && let Ok(found) = addresses(previous)
    {
        assert!((1..found.len()).all(|at| !found[..at].contains(&found[at])), "each once");
    }
}

/// The runtime is told why.
fn refused(error: &CniError) {
    assert!(error.code() > 0 && !error.to_string().is_empty());
}
