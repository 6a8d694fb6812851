//! A port of the machine's loopback carried into the cluster, so that a browser on the machine can look in.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::Error;
use crate::error::Context;
use crate::netns::NetNs;

/// Connections carried at once; more wait.
const MAX: usize = 256;

/// A running port-forward; ends when dropped.
#[derive(Debug)]
pub struct Forward {
    local: SocketAddr,
    stop: watch::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Forward {
    /// Listens at `local` on the machine itself (port 0: any) and connects to `target` from inside `network`.
    ///
    /// # Errors
    /// The port cannot be had.
    pub fn start(local: SocketAddr, network: Arc<NetNs>, target: SocketAddr) -> Result<Self, Error> {
        let what = || format!("forwarding {local} to {target}");
        let listener = std::net::TcpListener::bind(local).during(what)?;
        listener.set_nonblocking(true).during(what)?;
        let local = listener.local_addr().during(what)?;
        let (stop, stopped) = watch::channel(());
        let thread = std::thread::Builder::new().name("forward".to_owned()).spawn(move || {
            // The listener was made outside; every socket made from here on is inside.
            let _ = network.run(|| serve(listener, target, stopped));
        });
        Ok(Self { local, stop, thread: Some(thread.during(what)?) })
    }

    /// Where it listens.
    pub fn local(&self) -> SocketAddr {
        self.local
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listener: std::net::TcpListener, target: SocketAddr, mut stopped: watch::Receiver<()>) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    runtime.block_on(async {
        let Ok(listener) = TcpListener::from_std(listener) else { return };
        let slots = Arc::new(tokio::sync::Semaphore::new(MAX));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            let client = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = stopped.changed() => return,
            };
            let Ok((client, _)) = client else { continue };
            tokio::spawn(async move {
                carry(client, target).await;
                drop(slot);
            });
        }
    });
}

async fn carry(mut client: TcpStream, target: SocketAddr) {
    if let Ok(mut server) = TcpStream::connect(target).await {
        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
    }
}
