//! Tries every way out and says what the kernel answered: what the tests run inside the live filter, and once without
//! it to see that the attempts themselves would work.

#![expect(unsafe_code, reason = "the attempts are bare system calls, as an attacker would make them")]

use std::ffi::CStr;
use std::fmt::Write as _;
use std::io;
use std::ptr;

use nix::errno::Errno;

/// A user that owns nothing, when the probe is started as root.
const PROBE_UID: u32 = 1337;

/// One way out: its name and the call.
type Attempt = (&'static str, fn() -> Result<(), Errno>);

const ATTEMPTS: &[Attempt] = &[
    ("setns", setns),
    ("unshare", unshare),
    ("bpf", bpf),
    ("ptrace", ptrace),
    ("execve", execve),
    ("mount", mount),
    ("af_packet", || socket(libc::AF_PACKET, libc::SOCK_RAW)),
    ("af_netlink", || socket(libc::AF_NETLINK, libc::SOCK_RAW)),
    ("raw_socket", || socket(libc::AF_INET, libc::SOCK_RAW)),
    ("fork", || Ok(())),
    ("io_uring", io_uring),
];

/// Enters the jail unless `unjailed`, makes every attempt, and returns JSON: `{"jailed":true,"attempts":{"setns":"EPERM",..}}`
/// with `ok` for what worked. A jail that could not be entered is `{"jailed":false,"error":".."}`.
///
/// With `after_stdin` the attempts wait for the end of standard input: meanwhile the filter can be read from outside.
///
/// Must be called while the process has one thread.
pub fn probe(unjailed: bool, after_stdin: bool) -> String {
    if !unjailed && let Err(error) = super::enter(PROBE_UID) {
        return serde_json::json!({ "jailed": false, "error": error.to_string() }).to_string();
    }
    if after_stdin {
        // An unreadable standard input has ended as well.
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
    }
    let mut answers = String::new();
    for (name, attempt) in ATTEMPTS {
        let answer = match in_child(*name == "fork", *attempt) {
            Ok(()) => "ok".to_owned(),
            Err(errno) => format!("{errno:?}"),
        };
        let comma = if answers.is_empty() { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(answers, "{comma}\"{name}\":\"{answer}\"");
    }
    format!("{{\"jailed\":{},\"attempts\":{{{answers}}}}}", !unjailed)
}

/// Runs the attempt in a child process, so that one that works changes nothing here. Where no child can be made (in the
/// jail), it is made right here, unless the child itself was the attempt.
fn in_child(child_only: bool, attempt: fn() -> Result<(), Errno>) -> Result<(), Errno> {
    // SAFETY: the process has one thread, so the child may do anything.
    let child = match Errno::result(unsafe { libc::fork() }) {
        Ok(child) => child,
        Err(errno) if child_only => return Err(errno),
        Err(_) => return attempt(),
    };
    if child == 0 {
        let code = attempt().err().map_or(0, |errno| errno as i32);
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: `status` is a live integer, `child` is our child.
    Errno::result(unsafe { libc::waitpid(child, &raw mut status, 0) })?;
    match libc::WEXITSTATUS(status) {
        0 => Ok(()),
        code => Err(Errno::from_raw(code)),
    }
}

fn setns() -> Result<(), Errno> {
    // SAFETY: a constant path; the descriptor lives until the process ends.
    let namespace = Errno::result(unsafe { libc::open(c"/proc/self/ns/net".as_ptr(), libc::O_RDONLY) }).unwrap_or(-1);
    // SAFETY: takes integers; setns(2) with a bad descriptor is refused by the filter before it is looked at.
    Errno::result(unsafe { libc::setns(namespace, libc::CLONE_NEWNET) }).map(drop)
}

fn unshare() -> Result<(), Errno> {
    // SAFETY: takes an integer.
    Errno::result(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map(drop)
}

fn bpf() -> Result<(), Errno> {
    // BPF_MAP_CREATE of an array with one entry: type 2, key 4, value 4, entries 1.
    let attributes: [u32; 16] = [2, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: the attributes are live and their size is stated.
    let done = unsafe { libc::syscall(libc::SYS_bpf, 0, attributes.as_ptr(), size_of_val(&attributes)) };
    Errno::result(done).map(drop)
}

fn ptrace() -> Result<(), Errno> {
    let none = ptr::null_mut::<libc::c_void>();
    // SAFETY: PTRACE_TRACEME reads no argument.
    Errno::result(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, none, none) }).map(drop)
}

fn execve() -> Result<(), Errno> {
    let path: &CStr = c"/proc/self/exe";
    let arguments = [c"ztunnel".as_ptr(), c"version".as_ptr(), ptr::null()];
    let environment = [ptr::null()];
    // The replaced program must not write into the answer.
    // SAFETY: a constant path, integers.
    unsafe {
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY);
        let kept = libc::dup(1);
        libc::dup3(null, 1, 0);
        libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr());
        let errno = Errno::last();
        libc::dup3(kept, 1, 0);
        Err(errno)
    }
}

fn mount() -> Result<(), Errno> {
    // In a mount namespace of the child's own, so that the machine's mounts stay as they are.
    // SAFETY: an integer; constant strings.
    unsafe {
        libc::unshare(libc::CLONE_NEWNS);
        let flags = libc::MS_REC | libc::MS_PRIVATE;
        Errno::result(libc::mount(c"none".as_ptr(), c"/".as_ptr(), ptr::null(), flags, ptr::null())).map(drop)
    }
}

fn socket(family: libc::c_int, kind: libc::c_int) -> Result<(), Errno> {
    let protocol = if family == libc::AF_INET { libc::IPPROTO_ICMP } else { 0 };
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::socket(family, kind, protocol) }).map(drop)
}

fn io_uring() -> Result<(), Errno> {
    // `struct io_uring_params` is 120 bytes, all zero here.
    let mut parameters = [0_u64; 15];
    // SAFETY: the parameters are live and of the size that the call writes.
    Errno::result(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) }).map(drop)
}
