//! Packet capture on the links of the cluster, read online: markers, flows, TLS framing. Nothing is stored but what
//! the report says, so memory is bounded whatever the traffic.

mod flow;
mod packet;
mod scan;
mod socket;

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::Error;
use crate::error::Context;
use crate::netns::NetNs;

use flow::Key;
pub use flow::{Flow, Tls};
use scan::Scanner;
use socket::Tap;

/// Most flows kept per link; more are counted, and make the report unusable.
pub const MAX_FLOWS: usize = 1 << 16;

/// Which link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// The node's end of a pod's link.
    Pod {
        /// Name of the pod.
        name: String,
        /// Index of its node.
        node: usize,
        /// Its addresses.
        addresses: Vec<IpAddr>,
    },
    /// The node's end of its link to the fabric: everything between nodes passes here.
    Node {
        /// Index of the node.
        node: usize,
    },
    /// The fabric's end of a link to a host outside the nodes (culvertd, the gateway).
    Host {
        /// Its name.
        name: String,
    },
}

/// What was seen on one link.
#[derive(Debug, Clone)]
pub struct LinkReport {
    /// Which link.
    pub kind: LinkKind,
    /// Packets seen.
    pub packets: u64,
    /// Bytes of frames seen.
    pub bytes: u64,
    /// Packets that the kernel could not queue for the capture.
    pub dropped: u64,
    /// Flows beyond [`MAX_FLOWS`], not kept.
    pub untracked: u64,
    /// Flows, one per direction.
    pub flows: Vec<Flow>,
}

/// What was seen on all links.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// One per link, in the order in which the links were made.
    pub links: Vec<LinkReport>,
}

impl Report {
    /// Every flow with the link that it was seen on.
    pub fn flows(&self) -> impl Iterator<Item = (&LinkReport, &Flow)> {
        self.links.iter().flat_map(|link| link.flows.iter().map(move |flow| (link, flow)))
    }

    /// Flows in which a marker was seen in clear.
    pub fn marked<'a>(&'a self, marker: &'a str) -> impl Iterator<Item = (&'a LinkReport, &'a Flow)> {
        self.flows().filter(move |(_, flow)| flow.markers.iter().any(|m| m == marker))
    }

    /// Flows between two sets of addresses, in either direction.
    pub fn between<'a>(
        &'a self,
        one: &'a [IpAddr],
        other: &'a [IpAddr],
    ) -> impl Iterator<Item = (&'a LinkReport, &'a Flow)> {
        self.flows().filter(move |(_, flow)| {
            let (from, to) = (flow.source.ip(), flow.destination.ip());
            (one.contains(&from) && other.contains(&to)) || (other.contains(&from) && one.contains(&to))
        })
    }

    /// Flows on the links between nodes.
    pub fn fabric(&self) -> impl Iterator<Item = (&LinkReport, &Flow)> {
        self.flows().filter(|(link, _)| matches!(link.kind, LinkKind::Node { .. }))
    }

    /// Fails unless every packet was seen and every flow kept.
    ///
    /// # Errors
    /// [`Error::Capture`] naming the first link with a gap.
    pub fn complete(&self) -> Result<(), Error> {
        match self.links.iter().find(|l| l.dropped > 0 || l.untracked > 0) {
            None => Ok(()),
            Some(l) => Err(Error::Capture(format!(
                "{:?}: {} packets dropped, {} flows not kept, of {} packets",
                l.kind, l.dropped, l.untracked, l.packets
            ))),
        }
    }
}

/// A capture in progress. Links are added while it runs; it ends with [`Recorder::finish`] or when dropped.
#[derive(Debug)]
pub struct Recorder {
    shared: Arc<Shared>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    epoll: Epoll,
    scanner: Scanner,
    links: Mutex<Vec<Arc<Link>>>,
    stop: AtomicBool,
}

#[derive(Debug)]
struct Link {
    kind: LinkKind,
    tap: Tap,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    flows: HashMap<Key, flow::State>,
    packets: u64,
    bytes: u64,
    dropped: u64,
    untracked: u64,
}

impl Recorder {
    /// Starts a capture without links, looking for `markers`.
    ///
    /// # Errors
    /// No epoll descriptor or no thread to be had.
    pub fn start(markers: &[String]) -> Result<Self, Error> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).during(|| "starting a capture".to_owned())?;
        let scanner = Scanner::new(markers);
        let shared = Arc::new(Shared { epoll, scanner, links: Mutex::default(), stop: AtomicBool::new(false) });
        let working = Arc::clone(&shared);
        let worker = std::thread::Builder::new().name("capture".to_owned()).spawn(move || work(&working));
        let worker = Mutex::new(Some(worker.during(|| "starting a capture".to_owned())?));
        Ok(Self { shared, worker })
    }

    /// Adds the link `name` of `network`. The link may still be down: everything is seen from the moment it is up.
    ///
    /// # Errors
    /// No such link, or no packet socket to be had.
    pub fn add(&self, network: &NetNs, name: &str, kind: LinkKind) -> Result<(), Error> {
        let tap = network.run(|| Tap::open(name))?.during(|| format!("capturing on {name} of {}", network.label()))?;
        let link = Arc::new(Link { kind, tap, seen: Mutex::default() });
        let mut links = lock(&self.shared.links);
        let event = EpollEvent::new(EpollFlags::EPOLLIN, links.len() as u64);
        self.shared.epoll.add(link.tap.as_fd(), event).during(|| format!("capturing on {name}"))?;
        links.push(link);
        Ok(())
    }

    /// What was seen so far. Packets still in the kernel's queue are not in it.
    pub fn report(&self) -> Report {
        let links: Vec<_> = lock(&self.shared.links).clone();
        Report { links: links.iter().map(|link| link.report(&self.shared.scanner)).collect() }
    }

    /// Reads what is queued, ends the capture and gives everything that was seen, packets or flows missed included.
    /// Once it has ended, later calls give the same.
    pub fn finish(&self) -> Report {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(worker) = lock(&self.worker).take() {
            let _ = worker.join();
        }
        self.report()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(worker) = lock(&self.worker).take() {
            let _ = worker.join();
        }
    }
}

impl Link {
    /// Reads what is queued, a bounded number of packets at a time so that no link starves another. False when the
    /// queue was empty.
    fn read(&self, scanner: &Scanner, buffer: &mut [u8], batch: usize) -> bool {
        let mut seen = lock(&self.seen);
        for _ in 0..batch {
            match self.tap.receive(buffer) {
                Ok(length) => seen.take(&buffer[..length.min(buffer.len())], scanner),
                // The link is not up yet, or gone: reported once, then silence.
                Err(Errno::ENETDOWN | Errno::EINTR) => {}
                Err(_empty) => return false,
            }
        }
        true
    }

    fn report(&self, scanner: &Scanner) -> LinkReport {
        let mut seen = lock(&self.seen);
        seen.dropped += self.tap.dropped();
        let flows = seen.flows.iter().map(|(key, state)| state.report(key, scanner)).collect();
        let Seen { packets, bytes, dropped, untracked, .. } = *seen;
        LinkReport { kind: self.kind.clone(), packets, bytes, dropped, untracked, flows }
    }
}

impl Seen {
    fn take(&mut self, frame: &[u8], scanner: &Scanner) {
        self.packets += 1;
        self.bytes += frame.len() as u64;
        let Some(packet) = packet::parse(frame) else { return };
        let key = Key::of(&packet);
        if !self.flows.contains_key(&key) && self.flows.len() >= MAX_FLOWS {
            self.untracked += 1;
            return;
        }
        self.flows.entry(key).or_default().take(&packet, scanner);
    }
}

fn work(shared: &Shared) {
    // The longest frame that segmentation offload makes, with room to spare.
    let mut buffer = vec![0_u8; 256 << 10];
    let mut events = vec![EpollEvent::empty(); 64];
    loop {
        let stop = shared.stop.load(Ordering::Acquire);
        let ready = shared.epoll.wait(&mut events, EpollTimeout::from(50_u16)).unwrap_or(0);
        for event in &events[..ready] {
            let link = usize::try_from(event.data()).ok().and_then(|at| lock(&shared.links).get(at).cloned());
            if let Some(link) = link {
                link.read(&shared.scanner, &mut buffer, 256);
            }
        }
        if stop {
            // Asked before the wait above, so what was sent before the request is queued by now: read it all.
            let links: Vec<_> = lock(&shared.links).clone();
            for link in links {
                while link.read(&shared.scanner, &mut buffer, 256) {}
            }
            return;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
