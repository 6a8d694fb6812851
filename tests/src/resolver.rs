//! The cluster's resolver: answers service names over UDP from an address on the fabric.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::Error;
use crate::dns::{self, Code};
use crate::error::Context;
use crate::kube::Directory;
use crate::netns::NetNs;

/// Where it listens.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// A running resolver; ends when dropped.
#[derive(Debug)]
pub struct Resolver {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Resolver {
    /// Starts it in a namespace that has `address`, port 53.
    ///
    /// # Errors
    /// The port cannot be had.
    pub fn start(network: &NetNs, address: Ipv4Addr, directory: Arc<Directory>) -> Result<Self, Error> {
        let socket = network.run(|| UdpSocket::bind((address, 53)))?.during(|| format!("resolver at {address}"))?;
        socket.set_read_timeout(Some(Duration::from_millis(100))).during(|| "resolver".to_owned())?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("resolver".to_owned()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                serve(&socket, &directory);
            }
        });
        Ok(Self { stop, thread: Some(thread.during(|| "resolver".to_owned())?) })
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(socket: &UdpSocket, directory: &Directory) {
    let mut buffer = [0; dns::MAX];
    let Ok((length, client)) = socket.recv_from(&mut buffer) else { return };
    let Some(question) = dns::read_question(&buffer[..length]) else { return };
    let _ = socket.send_to(&reply(&question, client, directory), client);
}

fn reply(question: &dns::Question, client: SocketAddr, directory: &Directory) -> Vec<u8> {
    let found = match client.ip() {
        IpAddr::V4(client) => directory.resolve(client, &question.name),
        IpAddr::V6(_) => None,
    };
    match found {
        Some(addresses) => dns::answer(question, Code::NoError, &addresses),
        None => dns::answer(question, Code::NxDomain, &[]),
    }
}
