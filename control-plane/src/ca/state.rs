//! What the authority keeps on disk: its key and the key that signs tokens.
//!
//! ```text
//! <dir>/ca.pem         the root's key and certificate, made here, mode 0600; unused when cacerts/ is there
//! <dir>/cacerts/       an authority made elsewhere: ca-cert.pem ca-key.pem root-cert.pem, optionally cert-chain.pem
//! <dir>/more-roots.pem optional: further roots to trust, while the root is being replaced
//! <dir>/token-key.pem  signs tokens, made here, mode 0600
//! <dir>/root.pem       written at each start: the roots that clients need to trust, mode 0644
//! ```

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use mesh_identity::authority::{Authority, AuthorityError, AuthorityPem};
use thiserror::Error;

use super::token::{TokenError, TokenKey};

/// Longest file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// Tells the temporary files of one process apart.
static TEMPORARY: AtomicU64 = AtomicU64::new(0);

/// Why the state cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// The system refused.
    #[error("cannot {action} {}: {error}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A key is open to other users.
    #[error("{} may be read by other users (mode {mode:o}); run: chmod 600 {}", path.display(), path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A file of a plugged-in authority is not there. Falling back to another root would change who is trusted.
    #[error("{} is missing; a plugged-in authority needs ca-cert.pem, ca-key.pem and root-cert.pem", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file is too large, or not text.
    #[error("{} is not a PEM file", path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
    },
    /// The authority is not usable.
    #[error("{}: {error}", path.display())]
    Authority {
        /// The file or folder it came from.
        path: PathBuf,
        /// What is wrong.
        error: AuthorityError,
    },
    /// The token key is not usable.
    #[error("{}: {error}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: TokenError,
    },
}

/// The authority and the token key of one control plane.
#[derive(Debug)]
pub struct State {
    /// Signs certificates.
    pub authority: Arc<Authority>,
    /// Signs tokens.
    pub token_key: Arc<TokenKey>,
}

impl State {
    /// Reads the state in `dir`, makes what is not there yet (a root named after `trust_domain`), and writes
    /// `root.pem`. Several processes may do so at the same time: they end up with the same keys. Blocks on the disk.
    ///
    /// # Errors
    /// When a file cannot be read or written, is malformed, or is open to other users.
    pub fn open(dir: &Path, trust_domain: &str, now: SystemTime) -> Result<Self, StateError> {
        fs::create_dir_all(dir).map_err(|error| failed("create", dir, error))?;
        let token_key = Arc::new(open_token_key(dir)?);
        let authority = Arc::new(open_authority(dir, trust_domain, now)?);
        replace(&dir.join("root.pem"), &authority.roots_pem(), 0o644)?;
        Ok(Self { authority, token_key })
    }
}

/// The token key in `dir`, made if it is not there yet. Blocks on the disk.
///
/// # Errors
/// As [`State::open`].
pub fn open_token_key(dir: &Path) -> Result<TokenKey, StateError> {
    let path = dir.join("token-key.pem");
    let token = |error| StateError::Token { path: path.clone(), error };
    let text = match read_secret(&path)? {
        Some(text) => text,
        None => create(&path, TokenKey::generate().map_err(token)?.expose_pem())?,
    };
    TokenKey::from_pem(&text).map_err(token)
}

fn open_authority(dir: &Path, trust_domain: &str, now: SystemTime) -> Result<Authority, StateError> {
    let plugged = dir.join("cacerts");
    let authority = if plugged.is_dir() { open_plugged(&plugged, now)? } else { open_own(dir, trust_domain, now)? };
    let more = dir.join("more-roots.pem");
    match read(&more)? {
        Some(text) => authority.with_more_roots(&text).map_err(|error| StateError::Authority { path: more, error }),
        None => Ok(authority),
    }
}

fn open_own(dir: &Path, trust_domain: &str, now: SystemTime) -> Result<Authority, StateError> {
    let path = dir.join("ca.pem");
    let broken = |error| StateError::Authority { path: path.clone(), error };
    let text = match read_secret(&path)? {
        Some(text) => text,
        None => {
            let made = Authority::generate(trust_domain, now).map_err(broken)?;
            create(&path, &format!("{}{}", made.key_pem().expose(), made.certificate_pem()))?
        }
    };
    // One file holds both, so that they can only exist together.
    Authority::from_pem(AuthorityPem { certificate: &text, key: &text, chain: "", roots: &text }, now).map_err(broken)
}

fn open_plugged(dir: &Path, now: SystemTime) -> Result<Authority, StateError> {
    let required = |name: &str| {
        let path = dir.join(name);
        read(&path)?.ok_or(StateError::Missing { path })
    };
    let (certificate, key, roots) = (required("ca-cert.pem")?, required("ca-key.pem")?, required("root-cert.pem")?);
    let chain = read(&dir.join("cert-chain.pem"))?.unwrap_or_default();
    let texts = AuthorityPem { certificate: &certificate, key: &key, chain: &chain, roots: &roots };
    Authority::from_pem(texts, now).map_err(|error| StateError::Authority { path: dir.to_owned(), error })
}

fn failed(action: &'static str, path: &Path, error: io::Error) -> StateError {
    StateError::Io { action, path: path.to_owned(), error }
}

/// The text of a file; none if it does not exist.
fn read(path: &Path) -> Result<Option<String>, StateError> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("read", path, error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(|error| failed("read", path, error))?;
    String::from_utf8(bytes).map(Some).map_err(|_| StateError::NotPem { path: path.to_owned() })
}

/// As [`read`], for files that nobody else may read.
fn read_secret(path: &Path) -> Result<Option<String>, StateError> {
    if let Ok(metadata) = fs::metadata(path) {
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(StateError::Exposed { path: path.to_owned(), mode });
        }
    }
    read(path)
}

/// Writes a secret that is not there yet, whole or not at all. If another process was faster, its text is returned.
fn create(path: &Path, text: &str) -> Result<String, StateError> {
    let temporary = write_beside(path, text, 0o600)?;
    // Unlike a rename, a link fails if the name is taken.
    let linked = fs::hard_link(&temporary, path);
    fs::remove_file(&temporary).map_err(|error| failed("remove", &temporary, error))?;
    match linked {
        Ok(()) => sync_parent(path)?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed("create", path, error)),
    }
    read_secret(path)?.ok_or_else(|| failed("read", path, io::ErrorKind::NotFound.into()))
}

/// Writes a file anew, whole or not at all.
fn replace(path: &Path, text: &str, mode: u32) -> Result<(), StateError> {
    let temporary = write_beside(path, text, mode)?;
    fs::rename(&temporary, path).map_err(|error| failed("replace", path, error))?;
    sync_parent(path)
}

fn write_beside(path: &Path, text: &str, mode: u32) -> Result<PathBuf, StateError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let number = TEMPORARY.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_file_name(format!(".{name}.{}.{number}", std::process::id()));
    let write = || {
        // What a crashed process of the same id left behind.
        let _ = fs::remove_file(&temporary);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        // The umask may have taken bits away.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()
    };
    write().map_err(|error: io::Error| failed("write", &temporary, error))?;
    Ok(temporary)
}

fn sync_parent(path: &Path) -> Result<(), StateError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    let synced = fs::File::open(parent).and_then(|dir| dir.sync_all());
    synced.map_err(|error| failed("sync", parent, error))
}

#[cfg(test)]
mod tests;
