//! A pod's socket map as user space sees it: listeners go in by their descriptor and are known by their cookie.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use socket2::SockRef;
use ztunnel_ebpf as abi;

use super::error::{CaptureError, at};
use super::pod::Listeners;
use super::sys;

/// The map. The library's own kind writes four bytes, and cannot be read.
pub struct SocketMap(OwnedFd);

impl SocketMap {
    /// Opens the one that is pinned in a pod's folder.
    ///
    /// # Errors
    /// When it is not there.
    pub fn open(folder: &Path) -> Result<Self, CaptureError> {
        let path = folder.join(abi::MAP_SOCKETS);
        Ok(Self(sys::open_pin(&path).map_err(at(&path))?))
    }

    /// Puts a socket under a key, in the place of the one that is there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set(&self, key: u32, socket: BorrowedFd<'_>) -> Result<(), CaptureError> {
        let number = u64::try_from(socket.as_raw_fd()).unwrap_or(u64::MAX);
        sys::map_write(self.0.as_fd(), key, number).map_err(failed("put a listener into"))
    }

    /// Takes out what is under a key. Nothing to do is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn clear(&self, key: u32) -> Result<(), CaptureError> {
        match sys::map_delete(self.0.as_fd(), key) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(()),
            other => other.map_err(failed("take a listener out of")),
        }
    }

    /// The cookie of the socket under a key.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn cookie(&self, key: u32) -> Result<Option<u64>, CaptureError> {
        match sys::map_read(self.0.as_fd(), key) {
            Ok(cookie) => Ok(Some(cookie)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read")(error)),
        }
    }

    /// Asks whether the map holds these listeners and no others.
    ///
    /// # Errors
    /// [`CaptureError::NotInForce`] when it does not; when the kernel refuses.
    pub fn verify(&self, listeners: Listeners<'_>) -> Result<(), CaptureError> {
        for (key, socket) in keyed(listeners) {
            let wanted = socket.map(cookie).transpose()?;
            if self.cookie(key)? != wanted {
                return Err(CaptureError::NotInForce(format!(
                    "the socket map holds another listener under {key}, or none"
                )));
            }
        }
        Ok(())
    }
}

/// A pod's listeners by their keys.
pub fn keyed(listeners: Listeners<'_>) -> impl Iterator<Item = (u32, Option<BorrowedFd<'_>>)> {
    let both = [
        (abi::SOCKET_OUTBOUND, Some(listeners.outbound)),
        (abi::SOCKET_INBOUND_PLAINTEXT, Some(listeners.inbound_plaintext)),
        (abi::SOCKET_INBOUND_HBONE, Some(listeners.inbound_hbone)),
        (abi::SOCKET_DNS_UDP, listeners.dns_udp),
        (abi::SOCKET_DNS_TCP, listeners.dns_tcp),
    ];
    let v6 = both.map(|(key, _)| key + abi::SOCKET_V6).into_iter().zip(listeners.v6);
    both.into_iter().chain(v6)
}

/// The number of a socket, never used twice while the machine is up.
fn cookie(socket: BorrowedFd<'_>) -> Result<u64, CaptureError> {
    SockRef::from(&socket).cookie().map_err(failed("ask for the cookie of a listener for"))
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> CaptureError {
    move |source| CaptureError::Sockets { what, source }
}
