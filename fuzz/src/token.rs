//! Tokens that callers of the control plane present.

use std::sync::LazyLock;
use std::time::UNIX_EPOCH;

use control_plane::ca::token::{AUDIENCE, TokenKey};

static KEY: LazyLock<TokenKey> = LazyLock::new(|| TokenKey::generate().unwrap());

/// Reads the input as a token. The key is new in each process, so none is good.
pub fn run(input: &[u8]) {
    let token = String::from_utf8_lossy(input);
    assert!(KEY.verify(&token, AUDIENCE, UNIX_EPOCH).is_err());
}
