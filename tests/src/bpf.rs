//! What the kernel has of eBPF in the cluster, and a foreign program on its connect hook, by the bpf system call.
#![expect(unsafe_code, reason = "the bpf system call has no safe form")]

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::Error;
use crate::error::Context;

/// Commands of `enum bpf_cmd` in `linux/bpf.h`.
const PROG_LOAD: libc::c_long = 5;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const OBJ_GET: libc::c_long = 7;
const PROG_GET_NEXT_ID: libc::c_long = 11;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const LINK_CREATE: libc::c_long = 28;
const LINK_GET_FD_BY_ID: libc::c_long = 30;
const LINK_GET_NEXT_ID: libc::c_long = 31;
/// BPF_PROG_TYPE_CGROUP_SOCK_ADDR and BPF_CGROUP_INET4_CONNECT.
const SOCK_ADDR: u32 = 18;
const INET4_CONNECT: u32 = 10;
/// BPF_LINK_TYPE_CGROUP and BPF_LINK_TYPE_NETNS.
const CGROUP: u32 = 3;
const NETNS: u32 = 5;

/// One link of a program to a control group or a network namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Link {
    /// To the control group with this id.
    Cgroup {
        /// Inode of its folder.
        id: u64,
        /// `enum bpf_attach_type`.
        attach: u32,
    },
    /// To the network namespace with this inode.
    Netns {
        /// Inode.
        inode: u32,
        /// `enum bpf_attach_type`.
        attach: u32,
    },
}

/// All links of these kinds on the machine, other clusters' among them.
///
/// # Errors
/// The kernel refuses (no CAP_SYS_ADMIN).
pub fn links() -> Result<Vec<Link>, Error> {
    let mut found = Vec::new();
    for id in ids(LINK_GET_NEXT_ID)? {
        // It may be gone by now.
        let Ok(fd) = open(LINK_GET_FD_BY_ID, id) else { continue };
        // type, id, prog_id, padding, then what depends on the type.
        let mut info = [0_u32; 32];
        let address = info.as_mut_ptr() as u64;
        let mut ask = [fd.as_raw_fd().cast_unsigned(), 128, low(address), high(address)];
        call(OBJ_GET_INFO_BY_FD, &mut ask).during(|| "asking for an eBPF link".to_owned())?;
        match info[0] {
            CGROUP => found.push(Link::Cgroup { id: u64::from(info[5]) << 32 | u64::from(info[4]), attach: info[6] }),
            NETNS => found.push(Link::Netns { inode: info[4], attach: info[5] }),
            _ => {}
        }
    }
    Ok(found)
}

/// A program, a map or a link: its kind as the kernel's `fdinfo` names it, and its number.
pub type Object = (&'static str, u32);

const KINDS: [&str; 3] = ["prog_id", "map_id", "link_id"];

/// The objects of one agent, wherever in the machine they are: what is pinned below `pins`, what the process `agent` holds by
/// descriptors, every program that uses one of these maps, the other maps of those programs and the links to them. An object
/// that none of this holds is freed by the kernel; what other agents have is none of it, since each has maps of its own.
///
/// # Errors
/// The kernel refuses (no CAP_SYS_ADMIN), or the folder cannot be read.
pub fn objects_of(pins: &Path, agent: u32) -> Result<BTreeSet<Object>, Error> {
    let mut found = BTreeSet::new();
    let mut folders = vec![pins.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).during(|| format!("reading {}", folder.display()))?.flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                // A symbolic link is a note of the agent's. A pin may be gone by now.
                Ok(kind) if kind.is_file() => found.extend(pinned(&entry.path()).unwrap_or_default()),
                Ok(_) | Err(_) => {}
            }
        }
    }
    for entry in fs::read_dir(format!("/proc/{agent}/fdinfo")).during(|| format!("reading /proc/{agent}"))?.flatten() {
        found.extend(fs::read_to_string(entry.path()).map(|text| described(&text)).unwrap_or_default());
    }
    for program in ids(PROG_GET_NEXT_ID)? {
        let maps = maps_of(program)?;
        if maps.iter().any(|map| found.contains(map)) {
            found.insert(("prog_id", program));
            found.extend(maps);
        }
    }
    for link in ids(LINK_GET_NEXT_ID)? {
        // It may be gone by now.
        let Ok(fd) = open(LINK_GET_FD_BY_ID, link) else { continue };
        if described_fd(&fd).during(|| format!("reading link {link}"))?.iter().any(|object| found.contains(object)) {
            found.insert(("link_id", link));
        }
    }
    Ok(found)
}

fn pinned(path: &Path) -> io::Result<Vec<Object>> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let address = path.as_ptr() as u64;
    let fd = call(OBJ_GET, &mut [low(address), high(address), 0, 0])?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    described_fd(&unsafe { OwnedFd::from_raw_fd(fd) })
}

fn described_fd(fd: &OwnedFd) -> io::Result<Vec<Object>> {
    Ok(described(&fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?))
}

/// The objects that the kernel's description of a descriptor names.
fn described(text: &str) -> Vec<Object> {
    let number =
        |kind: &str| text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(':')?.trim().parse().ok());
    KINDS.into_iter().filter_map(|kind| Some((kind, number(kind)?))).collect()
}

/// The numbers of all objects of a kind.
fn ids(command: libc::c_long) -> Result<Vec<u32>, Error> {
    let mut found = Vec::new();
    let mut next = [0_u32; 3];
    loop {
        match call(command, &mut next) {
            Ok(_) => found.push(next[1]),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
            Err(error) => return Err(Error::io("listing eBPF objects", error)),
        }
        next = [next[1], 0, 0];
    }
}

fn open(command: libc::c_long, id: u32) -> io::Result<OwnedFd> {
    let fd = call(command, &mut [id, 0, 0])?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The maps that a program uses; none if it is gone by now.
fn maps_of(program: u32) -> Result<Vec<Object>, Error> {
    let Ok(fd) = open(PROG_GET_FD_BY_ID, program) else { return Ok(Vec::new()) };
    let mut maps = [0_u32; 64];
    // `struct bpf_prog_info`: the count of maps is its 14th word, their address the two behind it.
    let mut info = [0_u32; 32];
    let address = maps.as_mut_ptr() as u64;
    (info[13], info[14], info[15]) = (64, low(address), high(address));
    let address = info.as_mut_ptr() as u64;
    let mut ask = [fd.as_raw_fd().cast_unsigned(), 128, low(address), high(address)];
    call(OBJ_GET_INFO_BY_FD, &mut ask).during(|| "asking for an eBPF program".to_owned())?;
    let count = usize::try_from(info[13]).unwrap_or(0);
    Ok(maps.into_iter().take(count).map(|map| ("map_id", map)).collect())
}

/// A program of somebody else on a connect hook; detached when dropped.
#[derive(Debug)]
pub struct Foreign {
    _link: OwnedFd,
}

impl Foreign {
    /// Attaches a program to connections to IPv4 addresses from the control group `group` and below, which sends those to
    /// `from` to `to` instead, as load balancers in the kernel do.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn attach(group: &Path, from: std::net::Ipv4Addr, to: std::net::Ipv4Addr) -> Result<Self, Error> {
        let folder = File::open(group).during(|| format!("opening {}", group.display()))?;
        let (from, to) = (u32::from_ne_bytes(from.octets()), u32::from_ne_bytes(to.octets()));
        // bpf_sock_addr.user_ip4 is at 4, in network order.
        let program: [u64; 6] = [
            instruction(0x61, 3, 1, 4, 0),
            instruction(0x56, 3, 0, 2, from),
            instruction(0xb4, 2, 0, 0, to),
            instruction(0x63, 1, 2, 4, 0),
            instruction(0xb7, 0, 0, 0, 1),
            instruction(0x95, 0, 0, 0, 0),
        ];
        let license = c"GPL";
        let (code, license) = (program.as_ptr() as u64, license.as_ptr() as u64);
        let mut load = [0_u32; 32];
        (load[0], load[1]) = (SOCK_ADDR, 6);
        (load[2], load[3], load[4], load[5]) = (low(code), high(code), low(license), high(license));
        // After the log's fields, the kernel's version and the flags: the name, at byte 48.
        load[12..14].copy_from_slice(&[u32::from_le_bytes(*b"fore"), u32::from_le_bytes(*b"ign\0")]);
        load[17] = INET4_CONNECT;
        let loaded = call(PROG_LOAD, &mut load).during(|| "loading a foreign program".to_owned())?;
        // SAFETY: the kernel has just given this descriptor to us alone.
        let loaded = unsafe { OwnedFd::from_raw_fd(loaded) };
        let descriptors = [loaded.as_raw_fd(), folder.as_raw_fd()].map(i32::cast_unsigned);
        let mut create = [descriptors[0], descriptors[1], INET4_CONNECT, 0, 0, 0, 0, 0];
        let link = call(LINK_CREATE, &mut create).during(|| "attaching a foreign program".to_owned())?;
        // SAFETY: as above.
        Ok(Self { _link: unsafe { OwnedFd::from_raw_fd(link) } })
    }
}

/// `struct bpf_insn`: code, the registers, offset, immediate.
fn instruction(code: u8, to: u8, from: u8, offset: u16, immediate: u32) -> u64 {
    u64::from(code) | u64::from(from << 4 | to) << 8 | u64::from(offset) << 16 | u64::from(immediate) << 32
}

fn low(address: u64) -> u32 {
    u32::try_from(address & 0xffff_ffff).unwrap_or(0)
}

fn high(address: u64) -> u32 {
    u32::try_from(address >> 32).unwrap_or(0)
}

/// The system call with `attributes` as `union bpf_attr`; gives a descriptor or 0.
fn call(command: libc::c_long, attributes: &mut [u32]) -> io::Result<i32> {
    let size = size_of_val(attributes);
    // SAFETY: the kernel reads and writes at most `size` bytes of `attributes`, and what they point to is as long as the
    // command and the lengths beside say.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(done).unwrap_or(0)) }
}
