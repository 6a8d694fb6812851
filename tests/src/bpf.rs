//! What the kernel has of eBPF in the cluster, and a foreign program on its connect hook, by the bpf system call.
#![expect(unsafe_code, reason = "the bpf system call has no safe form")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use crate::Error;
use crate::error::Context;

/// Commands of `enum bpf_cmd` in `linux/bpf.h`.
const PROG_LOAD: libc::c_long = 5;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
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
    let mut id = 0_u32;
    loop {
        let mut next = [id, 0, 0];
        match call(LINK_GET_NEXT_ID, &mut next) {
            Ok(_) => id = next[1],
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
            Err(error) => return Err(Error::io("listing eBPF links", error)),
        }
        // It may be gone by now.
        let Ok(fd) = call(LINK_GET_FD_BY_ID, &mut [id, 0, 0]) else { continue };
        // SAFETY: the kernel has just given this descriptor to us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
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
