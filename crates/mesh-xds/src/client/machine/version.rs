//! Versions, one for each known resource: the commonest kind takes no memory of its own.

use std::fmt;
use std::sync::Arc;

/// A version as the server wrote it. Sixteen hexadecimal digits, as culvertd writes them, are held as the number that they
/// are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Version {
    Digest(u64),
    Text(Arc<str>),
}

/// Digits of [`Version::Digest`].
const DIGITS: usize = 16;

impl From<Arc<str>> for Version {
    fn from(text: Arc<str>) -> Self {
        // Lower case, and no sign: it must come back as it was.
        let plain = text.len() == DIGITS && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match u64::from_str_radix(&text, 16) {
            Ok(digest) if plain => Self::Digest(digest),
            Ok(_) | Err(_) => Self::Text(text),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest(digest) => write!(f, "{digest:0DIGITS$x}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_comes_back_as_it_was() {
        let digests = ["0000000000000000", "00f5c3a1b2d4e697", "ffffffffffffffff"];
        let texts =
            ["", "1", "+0f5c3a1b2d4e697", "00F5C3A1B2D4E697", "00f5c3a1b2d4e69", "00f5c3a1b2d4e6970", "äääääääz"];
        for text in digests.iter().chain(&texts) {
            assert_eq!(Version::from(Arc::from(*text)).to_string(), *text);
        }
        for text in digests {
            assert!(matches!(Version::from(Arc::from(text)), Version::Digest(_)), "{text}");
        }
        assert!(size_of::<Version>() <= size_of::<Arc<str>>());
    }
}
