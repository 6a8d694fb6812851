//! A Kubernetes API server for tests, over plain HTTP on the loopback interface: it lists, page by page or as a stream, and
//! watches the objects that it was given, and has the faults of real ones when it is told to. It answers reads alone.
//!
//! Every path is a collection, which is empty until something is put into it. Versions are numbers that count all changes, as
//! those of etcd do.

mod http;
mod state;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

use http::{Connection, Reply, status};
use state::{Followed, Held, Moment, State, Verdict};

/// Longest that something is waited for.
const LONG: Duration = Duration::from_secs(60);

/// The server. Cheap to clone; ends with the runtime that it was started in.
#[derive(Clone, Debug)]
pub struct Api {
    shared: Arc<Shared>,
    address: SocketAddr,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Told after every change of the state.
    changed: watch::Sender<()>,
}

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The collection.
    pub path: String,
    /// What stood behind the question mark.
    pub query: String,
    /// Whose token it was; none if it had none.
    pub token: Option<String>,
    /// When.
    pub at: Instant,
}

impl Asked {
    /// Whether it says `key=value`.
    pub fn says(&self, pair: &str) -> bool {
        self.query.split('&').any(|found| found == pair)
    }
}

/// Where an answer is held up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before its first byte.
    Start,
    /// In the middle of what a list shows, and of an object if there is an odd number of them.
    Middle,
}

/// The objects, while they change without anybody being told.
#[derive(Debug)]
pub struct World<'a>(&'a mut State);

impl World<'_> {
    /// The object is there from now on.
    pub fn put(&mut self, path: &str, object: Value) {
        self.0.put(path, object);
    }

    /// It is gone.
    pub fn delete(&mut self, path: &str, namespace: &str, name: &str) {
        self.0.delete(path, namespace, name);
    }
}

impl Api {
    /// Serves on a port of the loopback interface.
    ///
    /// # Errors
    /// There is no port.
    pub async fn serve() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let api = Self {
            shared: Arc::new(Shared { state: Mutex::new(State::default()), changed: watch::Sender::new(()) }),
            address,
        };
        let accepting = api.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let api = accepting.clone();
                // That a client leaves is no error of ours.
                tokio::spawn(async move { api.answer(stream).await.ok() });
            }
        });
        Ok(api)
    }

    /// Where it listens: `http://<address>:<port>`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A kubeconfig of a user who shows the token in the file `token`; with none, who shows nothing.
    pub fn kubeconfig(&self, token: Option<&Path>) -> String {
        let user = token.map_or_else(|| json!({}), |file| json!({"tokenFile": file}));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": self.url()}}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        });
        config.to_string()
    }

    /// The object is in the collection from now on, and watches are told.
    pub fn put(&self, path: &str, object: Value) {
        self.change(|state| state.put(path, object));
    }

    /// It is gone, and watches are told.
    pub fn delete(&self, path: &str, namespace: &str, name: &str) {
        self.change(|state| state.delete(path, namespace, name));
    }

    /// Changes objects, and forgets that and everything that has happened before: watches that run are told in their stream
    /// that they are too old (410), and so is who asks to go on from before, or for the next page of an earlier list.
    pub fn forget(&self, change: impl FnOnce(&mut World<'_>)) {
        self.change(|state| {
            change(&mut World(state));
            state.forget();
        });
    }

    /// Who is too old when a watch starts is told so by the answer's code, and not in a stream.
    pub fn refuse_old_at_start(&self) {
        self.change(|state| state.refuses_old_at_start = true);
    }

    /// Does not know of streamed lists, as servers before 1.34 (422).
    pub fn list_by_pages(&self) {
        self.change(|state| state.streams_lists = false);
    }

    /// Objects of one page at most, however many are asked for.
    pub fn pages_of(&self, count: usize) {
        self.change(|state| state.page = count);
    }

    /// Whoever has another token than this is refused (401), and those that run are ended.
    pub fn trust(&self, token: &str) {
        self.change(|state| state.token = Some(token.to_owned()));
        self.cut();
    }

    /// Refuses the next `times` questions for the collection whose query contains `query`, with this code and these headers.
    pub fn refuse(&self, path: &str, query: &str, times: usize, code: u16, headers: &[(&str, &str)]) {
        let headers = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        self.change(|state| state.refusals.push(state::Refusal::new(path, query, times, code, headers)));
    }

    /// Holds up the answers to the next `times` questions for the collection whose query contains `query`, until
    /// [`Api::release`].
    pub fn hold(&self, path: &str, query: &str, times: usize, place: Place) {
        self.change(|state| state.holds.push(Held::new(path, query, times, place)));
    }

    /// Goes on with what is held up.
    pub fn release(&self) {
        self.change(State::release);
    }

    /// Breaks every connection, in the middle of whatever it says.
    pub fn cut(&self) {
        self.change(|state| state.now.cuts += 1);
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.state().asked.clone()
    }

    /// Waits until something was asked since the first `after` questions. Returns it.
    ///
    /// # Panics
    /// It is not asked within a minute.
    pub async fn until_asked(&self, what: &str, after: usize, is_it: impl Fn(&Asked) -> bool) -> Asked {
        let mut changed = self.shared.changed.subscribe();
        let asked = async {
            loop {
                if let Some(found) = self.state().asked.iter().skip(after).find(|asked| is_it(asked)) {
                    return found.clone();
                }
                // The sender is our own.
                let _ = changed.changed().await;
            }
        };
        match tokio::time::timeout(LONG, asked).await {
            Ok(found) => found,
            #[expect(clippy::panic, reason = "a test fails by panicking")]
            Err(_) => panic!("never asked: {what}; only {:#?}", self.asked()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.shared.changed.send_replace(());
    }

    async fn answer(&self, stream: TcpStream) -> io::Result<()> {
        let mut connection = Connection::new(stream);
        let Some(asked) = connection.read().await? else { return Ok(()) };
        // What becomes of it is decided the moment it is known to have been asked.
        let (verdict, moment) = self.state().judge(&asked);
        self.shared.changed.send_replace(());
        let held = match verdict {
            Verdict::Refuse(code, headers) => return connection.reply(&Reply::refusal(code, &headers)).await,
            Verdict::Answer(held) => held,
        };
        if held == Some(Place::Start) && !self.released(moment).await {
            return Ok(());
        }
        let held = held.filter(|place| *place == Place::Middle).map(|_| moment);
        if asked.says("watch=true") {
            return self.watch(&mut connection, &asked, moment, held).await;
        }
        let page = self.state().list(&asked);
        match page {
            Ok(list) => {
                connection.begin().await?;
                if self.say(&mut connection, &list.to_string(), held).await? { connection.end().await } else { Ok(()) }
            }
            Err(code) => connection.reply(&Reply::refusal(code, "")).await,
        }
    }

    /// Says it, held up in its middle where it is to be. Returns whether the connection is still there.
    async fn say(&self, connection: &mut Connection, text: &str, held: Option<Moment>) -> io::Result<bool> {
        let Some(moment) = held else {
            connection.part(text).await?;
            return Ok(true);
        };
        let (first, rest) = text.split_at(text.floor_char_boundary(text.len() / 2));
        connection.part(first).await?;
        if !self.released(moment).await {
            return Ok(false);
        }
        connection.part(rest).await?;
        Ok(true)
    }

    async fn watch(
        &self,
        connection: &mut Connection,
        asked: &Asked,
        moment: Moment,
        held: Option<Moment>,
    ) -> io::Result<()> {
        let started = self.state().start(asked);
        let (mut from, initial) = match started {
            Ok(started) => started,
            Err(code) => return connection.reply(&Reply::refusal(code, "")).await,
        };
        connection.begin().await?;
        if !self.say(connection, &initial, held).await? {
            return Ok(());
        }
        let mut changed = self.shared.changed.subscribe();
        loop {
            let followed = self.state().follow(&asked.path, from, moment);
            match followed {
                Followed::Cut => return Ok(()),
                Followed::TooOld => {
                    let error = json!({"type": "ERROR", "object": status(410)});
                    connection.part(&format!("{error}\n")).await?;
                    return connection.end().await;
                }
                Followed::Events(text, until) => {
                    connection.part(&text).await?;
                    from = until;
                }
            }
            // The sender is our own.
            let _ = changed.changed().await;
        }
    }

    /// Waits until what is held up since `moment` is to go on. Returns false where the connection is to break instead.
    async fn released(&self, moment: Moment) -> bool {
        let mut changed = self.shared.changed.subscribe();
        loop {
            let now = self.state().moment();
            if now != moment {
                return now.cuts == moment.cuts;
            }
            // The sender is our own.
            let _ = changed.changed().await;
        }
    }
}

/// The objects of a collection by namespace and name.
type Objects = BTreeMap<(String, String), Value>;
