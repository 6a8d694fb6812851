//! The switches of a pod's namespace that capture needs. They act on the namespace of the thread that writes them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::PodNetworkError;

/// Where the switches are written. In a container /proc/sys can only be read.
static PROC: OnceLock<PathBuf> = OnceLock::new();

/// Makes replies to a marked SYN carry its mark, so that they go back to the proxy. For both families.
const ACCEPT: &str = "sys/net/ipv4/tcp_fwmark_accept";
/// The same for answers that no socket gives: without it the reset for a port on which nobody listens would be sent out
/// of the pod to the real client, and the proxy would wait for its connection in vain.
const REFLECT_V4: &str = "sys/net/ipv4/fwmark_reflect";
/// The same for IPv6.
const REFLECT_V6: &str = "sys/net/ipv6/fwmark_reflect";

/// From now on the switches are found below this mount of proc. Only the first call counts.
pub fn use_proc(path: &Path) {
    // A second one is that of another test in the same process.
    let _ = PROC.set(path.to_owned());
}

/// What was there before, to be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Before {
    /// Value of `net.ipv4.tcp_fwmark_accept`.
    pub fwmark_accept: bool,
    /// Value of `net.ipv4.fwmark_reflect`.
    pub fwmark_reflect: bool,
    /// Value of `net.ipv6.fwmark_reflect`; `None`: it was not touched.
    #[serde(default)]
    pub fwmark_reflect_v6: Option<bool>,
}

/// Reads all of them, that of IPv6 only if it is going to be changed.
pub fn read(v6: bool) -> Result<Before, PodNetworkError> {
    Ok(Before {
        fwmark_accept: get(ACCEPT)?,
        fwmark_reflect: get(REFLECT_V4)?,
        fwmark_reflect_v6: if v6 { Some(get(REFLECT_V6)?) } else { None },
    })
}

/// Those that are off. The names are those of sysctl(8).
pub fn off(v6: bool) -> Result<Vec<&'static str>, PodNetworkError> {
    let found = read(v6)?;
    let all = [
        (found.fwmark_accept, "net.ipv4.tcp_fwmark_accept=1"),
        (found.fwmark_reflect, "net.ipv4.fwmark_reflect=1"),
        (found.fwmark_reflect_v6.unwrap_or(true), "net.ipv6.fwmark_reflect=1"),
    ];
    Ok(all.into_iter().filter(|(on, _)| !on).map(|(_, name)| name).collect())
}

/// Sets all of them.
pub fn switch_on(v6: bool) -> Result<(), PodNetworkError> {
    write(Before { fwmark_accept: true, fwmark_reflect: true, fwmark_reflect_v6: v6.then_some(true) })
}

/// Sets each, also when one fails.
pub fn write(to: Before) -> Result<(), PodNetworkError> {
    let accept = set(ACCEPT, to.fwmark_accept);
    let v4 = set(REFLECT_V4, to.fwmark_reflect);
    let v6 = to.fwmark_reflect_v6.map_or(Ok(()), |on| set(REFLECT_V6, on));
    accept.and(v4).and(v6)
}

fn get(path: &'static str) -> Result<bool, PodNetworkError> {
    let text = fs::read_to_string(below_proc(path)).map_err(at(path))?;
    Ok(text.trim() != "0")
}

fn set(path: &'static str, on: bool) -> Result<(), PodNetworkError> {
    fs::write(below_proc(path), if on { "1" } else { "0" }).map_err(at(path))
}

fn below_proc(path: &'static str) -> PathBuf {
    PROC.get().map_or(Path::new("/proc"), PathBuf::as_path).join(path)
}

fn at(path: &'static str) -> impl FnOnce(io::Error) -> PodNetworkError {
    move |source| PodNetworkError::Sysctl { path, source }
}
