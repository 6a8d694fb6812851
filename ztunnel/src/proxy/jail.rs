//! The proxy gives up everything but its sockets before it reads the first byte from outside: no user that owns
//! anything, no capability, no new privileges, no core dump, and a system-call filter. What was done is then read back
//! from the kernel; a proxy that is not in its jail does not start.

use std::collections::BTreeMap;

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use super::sys;

mod calls;
mod probe;

pub use probe::probe;

/// Why the proxy is not jailed, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A step of giving up privilege was refused by the kernel.
    #[error("{step} failed: {errno}; start the proxy as root, or as an ordinary user with no capability at all")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What the kernel answered.
        errno: Errno,
    },
    /// The system-call filter could not be made.
    #[error("cannot build the system-call filter: {0}")]
    Filter(#[from] seccompiler::BackendError),
    /// The system-call filter was refused.
    #[error("cannot install the system-call filter: {0}; the kernel needs CONFIG_SECCOMP_FILTER")]
    Install(#[from] seccompiler::Error),
    /// `/proc/self/status` cannot be read, so nothing can be proven.
    #[error("cannot read /proc/self/status: {0}; mount /proc")]
    Status(#[from] std::io::Error),
    /// The kernel says that something is still there.
    #[error("the proxy is not jailed: {}", .0.join("; "))]
    NotJailed(Vec<String>),
}

/// Gives up all privilege for good. Must run while the process has one thread: threads made later inherit it all.
///
/// # Errors
/// The step that failed, or what `/proc/self/status` shows to be left. The caller must not go on then.
pub fn enter(uid: u32) -> Result<(), JailError> {
    let step = |step: &'static str| move |errno: Errno| JailError::Step { step, errno };
    if geteuid().is_root() {
        drop_bounding_set().map_err(step("dropping the capability bounding set"))?;
        setgroups(&[]).map_err(step("leaving all groups"))?;
        let group = Gid::from_raw(uid);
        setresgid(group, group, group).map_err(step("changing the group"))?;
        let user = Uid::from_raw(uid);
        setresuid(user, user, user).map_err(step("changing the user"))?;
    } else {
        // Works only with CAP_SETPCAP; a bounding set that stays is found, and refused, below.
        drop_bounding_set()
            .or_else(|errno| if errno == Errno::EPERM { Ok(()) } else { Err(errno) })
            .map_err(step("dropping the capability bounding set"))?;
    }
    sys::clear_ambient().map_err(step("clearing the ambient capabilities"))?;
    sys::clear_capabilities().map_err(step("clearing the capabilities"))?;
    // Private keys live in this memory: no core dump, no debugger of the same user.
    nix::sys::prctl::set_dumpable(false).map_err(step("forbidding core dumps"))?;
    nix::sys::prctl::set_no_new_privs().map_err(step("forbidding new privileges"))?;
    // Two filters, because one has one answer only: a plain EPERM to what would be an escape, and ENOSYS to what is never
    // needed, so that libraries use their fallback. The second lets the refused calls through to the first, or its answer
    // would count; installing a filter is itself among the calls that it does not allow, so it comes last.
    seccompiler::apply_filter(&refused_calls()?)?;
    seccompiler::apply_filter(&needed_calls()?)?;
    let left = what_is_left(&std::fs::read_to_string("/proc/self/status")?);
    if left.is_empty() { Ok(()) } else { Err(JailError::NotJailed(left)) }
}

fn drop_bounding_set() -> Result<(), Errno> {
    for capability in 0..64 {
        match sys::drop_bounding(capability) {
            Ok(()) => {}
            // One past the last that this kernel has.
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Everything in a `/proc/<pid>/status` that a jailed process would not have, with the remedy; empty when jailed.
fn what_is_left(status: &str) -> Vec<String> {
    let fields: BTreeMap<&str, &str> =
        status.lines().filter_map(|line| line.split_once(':')).map(|(name, value)| (name, value.trim())).collect();
    let mut left = Vec::new();
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"] {
        match fields.get(set) {
            Some(value) if value.bytes().all(|digit| digit == b'0') => {}
            Some(value) => left.push(format!(
                "{set} is {value}: start the proxy as root, or drop ALL capabilities in its container's securityContext"
            )),
            None => left.push(format!("{set} is missing in /proc/self/status")),
        }
    }
    for (field, wanted) in [("NoNewPrivs", "1"), ("Seccomp", "2")] {
        let value = fields.get(field).copied().unwrap_or("missing");
        if value != wanted {
            left.push(format!("{field} is {value} where {wanted} is needed: the kernel did not apply it"));
        }
    }
    let users = fields.get("Uid").copied().unwrap_or("0");
    if users.split_whitespace().any(|id| id == "0") {
        left.push(format!("Uid is {users}: the proxy must not be root"));
    }
    left
}

/// The filter that lets through what the proxy needs, and what the other filter refuses; ENOSYS to all else.
fn needed_calls() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        calls::ALLOWED.iter().chain(calls::REFUSED).map(|call| (*call, Vec::new())).collect();
    for (call, argument, values) in calls::ALLOWED_FOR {
        let rules_of_call = values.iter().map(|value| SeccompRule::new(vec![equals(*argument, *value)?]));
        rules.insert(*call, rules_of_call.collect::<Result<_, _>>()?);
    }
    let unknown = SeccompAction::Errno(Errno::ENOSYS as u32);
    SeccompFilter::new(rules, unknown, SeccompAction::Allow, std::env::consts::ARCH.try_into()?)?.try_into()
}

/// The filter that answers EPERM to every way out.
fn refused_calls() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = calls::REFUSED.iter().map(|call| (*call, Vec::new())).collect();

    let mut clone = vec![SeccompRule::new(vec![masked(0, libc::CLONE_THREAD as u64, 0)?])?];
    for flag in calls::NAMESPACE_FLAGS {
        clone.push(SeccompRule::new(vec![masked(0, *flag, *flag)?])?);
    }
    rules.insert(libc::SYS_clone, clone);

    let not_family =
        |family: libc::c_int| SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family as u64);
    let foreign_family = vec![not_family(libc::AF_UNIX)?, not_family(libc::AF_INET)?, not_family(libc::AF_INET6)?];
    let mut socket = vec![SeccompRule::new(foreign_family)?];
    // The low four bits are the type, above them are SOCK_NONBLOCK and SOCK_CLOEXEC.
    for kind in (0..=0xf).filter(|kind| !calls::SOCKET_TYPES.contains(kind)) {
        socket.push(SeccompRule::new(vec![masked(1, 0xf, kind as u64)?])?);
    }
    rules.insert(libc::SYS_socket, socket);

    let refused = SeccompAction::Errno(Errno::EPERM as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, refused, std::env::consts::ARCH.try_into()?)?.try_into()
}

fn equals(argument: u8, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const JAILED: &str = "Name:\tztunnel\nUid:\t1337\t1337\t1337\t1337\nCapInh:\t0000000000000000\n\
        CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nCapAmb:\t0000000000000000\n\
        NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t2\n";

    #[test]
    fn a_jailed_status_has_nothing_left() {
        assert_eq!(what_is_left(JAILED), Vec::<String>::new());
    }

    #[test]
    fn each_thing_left_is_named() {
        for (from, to, name) in [
            ("CapBnd:\t0000000000000000", "CapBnd:\t000001ffffffffff", "CapBnd is 000001ffffffffff"),
            ("CapEff:\t0000000000000000", "CapEff:\t0000000000000001", "CapEff is"),
            ("CapAmb:\t0000000000000000\n", "", "CapAmb is missing"),
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0", "NoNewPrivs is 0"),
            ("Seccomp:\t2", "Seccomp:\t0", "Seccomp is 0"),
            ("Uid:\t1337\t1337", "Uid:\t1337\t0", "Uid is"),
        ] {
            let left = what_is_left(&JAILED.replace(from, to));
            assert_eq!(left.len(), 1, "{left:?}");
            assert!(left[0].contains(name), "{left:?} does not say {name}");
        }
        assert_eq!(what_is_left("").len(), 8);
    }

    #[test]
    fn the_filters_compile_and_do_not_overlap() {
        assert!(!needed_calls().unwrap().is_empty());
        assert!(!refused_calls().unwrap().is_empty());
        for call in calls::REFUSED {
            assert!(!calls::ALLOWED.contains(call), "system call {call} is both allowed and refused");
        }
    }
}
