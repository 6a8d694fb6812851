//! The cluster's resolver: answers service names, and names that a test gives it, over UDP and TCP from addresses on the
//! fabric.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::Error;
use crate::dns::{self, Code, Question};
use crate::error::Context;
use crate::kube::Directory;
use crate::netns::NetNs;

/// Where it listens.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Where it listens in IPv6.
pub const ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0xa);

/// Questions that are remembered.
const REMEMBERED: usize = 4096;
const PAUSE: Duration = Duration::from_millis(100);

/// A question as the resolver saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Who asked.
    pub client: SocketAddr,
    /// The name, in lower case, without the last dot.
    pub name: String,
    /// Record type.
    pub kind: u16,
    /// Over TCP.
    pub tcp: bool,
}

/// What knows the services.
pub trait Names: std::fmt::Debug + Send + Sync {
    /// Addresses of `asked` (in lower case, without the last dot) for the client at that address; None if there is no
    /// such name.
    ///
    /// # Errors
    /// It cannot be known now.
    fn resolve(&self, client: IpAddr, asked: &str) -> Result<Option<Vec<IpAddr>>, Error>;
}

impl Names for Directory {
    fn resolve(&self, client: IpAddr, asked: &str) -> Result<Option<Vec<IpAddr>>, Error> {
        Ok(Self::resolve(self, client, asked))
    }
}

#[derive(Debug)]
struct State {
    stop: AtomicBool,
    services: Arc<dyn Names>,
    names: Mutex<BTreeMap<String, Vec<IpAddr>>>,
    asked: Mutex<Vec<Asked>>,
}

/// A running resolver; ends when dropped.
#[derive(Debug)]
pub struct Resolver {
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
}

impl Resolver {
    /// Starts it in a namespace that has the addresses, port 53 of each.
    ///
    /// # Errors
    /// A port cannot be had.
    pub fn start(network: &NetNs, addresses: &[IpAddr], services: Arc<impl Names + 'static>) -> Result<Self, Error> {
        let (names, asked) = (Mutex::default(), Mutex::default());
        let state = Arc::new(State { stop: AtomicBool::new(false), services, names, asked });
        let mut own = Self { state, threads: Vec::new() };
        for address in addresses {
            let at = SocketAddr::new(*address, 53);
            let what = || format!("resolver at {at}");
            let made = network.run(|| -> std::io::Result<_> { Ok((UdpSocket::bind(at)?, TcpListener::bind(at)?)) })?;
            let (udp, tcp) = made.during(what)?;
            udp.set_read_timeout(Some(PAUSE)).during(what)?;
            tcp.set_nonblocking(true).during(what)?;
            own.thread(move |state| serve(&udp, state))?;
            own.thread(move |state| serve_tcp(&tcp, state))?;
        }
        Ok(own)
    }

    fn thread(&mut self, mut work: impl FnMut(&State) + Send + 'static) -> Result<(), Error> {
        let state = Arc::clone(&self.state);
        let thread = std::thread::Builder::new().name("resolver".to_owned()).spawn(move || {
            while !state.stop.load(Ordering::Relaxed) {
                work(&state);
            }
        });
        self.threads.push(thread.during(|| "resolver".to_owned())?);
        Ok(())
    }

    /// Lets it know a name outside the cluster. No addresses: the name is there and has none.
    pub fn add(&self, name: &str, addresses: &[IpAddr]) {
        let mut names = self.state.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.insert(name.to_ascii_lowercase(), addresses.to_vec());
    }

    /// The questions since the start, the first 4096 of them.
    pub fn asked(&self) -> Vec<Asked> {
        self.state.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve(socket: &UdpSocket, state: &State) {
    let mut buffer = [0; dns::MAX];
    let Ok((length, client)) = socket.recv_from(&mut buffer) else { return };
    let Some(question) = dns::read_question(&buffer[..length]) else { return };
    let _ = socket.send_to(&state.reply(&question, client, false), client);
}

/// One connection at a time, one question each: it plays a resolver, it is none.
fn serve_tcp(listener: &TcpListener, state: &State) {
    let Ok((stream, client)) = listener.accept() else {
        std::thread::sleep(PAUSE / 10);
        return;
    };
    let _ = answer_tcp(stream, client, state);
}

fn answer_tcp(mut stream: TcpStream, client: SocketAddr, state: &State) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut message)?;
        let Some(question) = dns::read_question(&message) else { return Ok(()) };
        let answer = state.reply(&question, client, true);
        stream.write_all(&u16::try_from(answer.len()).unwrap_or(0).to_be_bytes())?;
        stream.write_all(&answer)?;
    }
}

impl State {
    fn reply(&self, question: &Question, client: SocketAddr, tcp: bool) -> Vec<u8> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.len() < REMEMBERED {
            asked.push(Asked { client, name: question.name.clone(), kind: question.kind, tcp });
        }
        drop(asked);
        let given = self.names.lock().unwrap_or_else(PoisonError::into_inner).get(&question.name).cloned();
        let found = given.map_or_else(|| self.services.resolve(client.ip(), &question.name), |given| Ok(Some(given)));
        match found {
            Ok(Some(addresses)) if tcp => dns::answer_tcp(question, Code::NoError, &addresses),
            Ok(Some(addresses)) => dns::answer(question, Code::NoError, &addresses),
            Ok(None) => dns::answer(question, Code::NxDomain, &[]),
            Err(_) => dns::answer(question, Code::ServFail, &[]),
        }
    }
}
