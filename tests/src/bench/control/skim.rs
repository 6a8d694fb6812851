//! Delta discovery responses, looked at while they pass: a thousand clients must not keep what they are sent. Pure.

/// Responses up to this size are kept whole, to be searched.
const SMALL: usize = 64 << 10;
/// Longest text field that is kept.
const MAX_TEXT: usize = 4 << 10;
/// Fields of `DeltaDiscoveryResponse`.
const VERSION: u64 = 1;
const RESOURCES: u64 = 2;
const TYPE_URL: u64 = 4;
const NONCE: u64 = 5;
const REMOVED: u64 = 6;

/// What is known of one response.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Response {
    /// Type of its resources.
    pub type_url: String,
    /// To acknowledge it by.
    pub nonce: String,
    /// Version of the state, as the server says.
    pub version: String,
    /// Resources in it.
    pub resources: usize,
    /// Names removed by it.
    pub removed: usize,
    /// Its resources, if the response is a small one.
    pub small: Vec<u8>,
}

/// It is no stream of gRPC messages of that type.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream is no delta discovery")]
pub struct Malformed;

/// Reads a stream in pieces of any size.
#[derive(Debug, Default)]
pub struct Skimmer {
    at: At,
    /// The part of a prefix or of a field's head that has come.
    head: Vec<u8>,
    /// What is left of the message.
    left: usize,
    is_small: bool,
    response: Response,
    text: Vec<u8>,
}

#[derive(Debug, Default, Clone, Copy)]
enum At {
    /// The five bytes before a message.
    #[default]
    Prefix,
    /// Key and length of a field.
    Head,
    /// So many bytes of this field's content are missing.
    Content(u64, usize),
}

impl Skimmer {
    /// Takes the next piece; calls `each` for every response that is complete.
    ///
    /// # Errors
    /// It is not what it should be.
    pub fn feed(&mut self, mut piece: &[u8], mut each: impl FnMut(Response)) -> Result<(), Malformed> {
        while !piece.is_empty() {
            match self.at {
                At::Prefix => self.prefix(&mut piece)?,
                At::Head => self.head(&mut piece)?,
                At::Content(field, missing) => {
                    let (now, rest) = piece.split_at(missing.min(piece.len()));
                    self.content(field, now);
                    self.left = self.left.checked_sub(now.len()).ok_or(Malformed)?;
                    self.at = At::Content(field, missing - now.len());
                    piece = rest;
                }
            }
            if let At::Content(field, 0) = self.at {
                self.end_field(field);
                self.at = At::Head;
            }
            if matches!(self.at, At::Head) && self.left == 0 {
                self.at = At::Prefix;
                each(std::mem::take(&mut self.response));
            }
        }
        Ok(())
    }

    fn prefix(&mut self, piece: &mut &[u8]) -> Result<(), Malformed> {
        let (now, rest) = piece.split_at((5 - self.head.len()).min(piece.len()));
        self.head.extend_from_slice(now);
        *piece = rest;
        if let [compressed, length @ ..] = self.head.as_slice()
            && let Ok(length) = <[u8; 4]>::try_from(length)
        {
            if *compressed != 0 {
                return Err(Malformed);
            }
            self.left = usize::try_from(u32::from_be_bytes(length)).map_err(|_| Malformed)?;
            self.is_small = self.left <= SMALL;
            self.head.clear();
            self.at = At::Head;
        }
        Ok(())
    }

    fn head(&mut self, piece: &mut &[u8]) -> Result<(), Malformed> {
        while let Some((first, rest)) = piece.split_first() {
            self.head.push(*first);
            *piece = rest;
            let Some((key, length)) = key_and_length(&self.head) else {
                // Two numbers of ten bytes at most.
                if self.head.len() > 20 {
                    return Err(Malformed);
                }
                continue;
            };
            // Every field has a length.
            if key & 7 != 2 {
                return Err(Malformed);
            }
            self.left = self.left.checked_sub(self.head.len()).ok_or(Malformed)?;
            let length = usize::try_from(length).map_err(|_| Malformed)?;
            if length > self.left {
                return Err(Malformed);
            }
            self.head.clear();
            self.text.clear();
            self.at = At::Content(key >> 3, length);
            return Ok(());
        }
        Ok(())
    }

    fn content(&mut self, field: u64, bytes: &[u8]) {
        if field == RESOURCES {
            if self.is_small {
                self.response.small.extend_from_slice(bytes);
            }
        } else if self.text.len() + bytes.len() <= MAX_TEXT {
            self.text.extend_from_slice(bytes);
        }
    }

    fn end_field(&mut self, field: u64) {
        let text = || String::from_utf8_lossy(&self.text).into_owned();
        match field {
            VERSION => self.response.version = text(),
            RESOURCES => self.response.resources += 1,
            TYPE_URL => self.response.type_url = text(),
            NONCE => self.response.nonce = text(),
            REMOVED => self.response.removed += 1,
            _ => {}
        }
    }
}

/// Two numbers in protobuf's variable length; none before both are complete.
fn key_and_length(bytes: &[u8]) -> Option<(u64, u64)> {
    let (key, rest) = number(bytes)?;
    let (length, _) = number(rest)?;
    Some((key, length))
}

fn number(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let end = bytes.iter().take(10).position(|byte| byte & 0x80 == 0)?;
    let (own, rest) = bytes.split_at(end + 1);
    let value = own.iter().rev().fold(0_u64, |value, byte| (value << 7) | u64::from(byte & 0x7f));
    Some((value, rest))
}

#[cfg(test)]
mod tests {
    use mesh_proto::discovery::{DeltaDiscoveryResponse, Resource};
    use prost::Message;

    use super::*;

    fn framed(message: &DeltaDiscoveryResponse) -> Vec<u8> {
        let body = message.encode_to_vec();
        let mut framed = vec![0];
        framed.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
        framed.extend(body);
        framed
    }

    fn response(count: usize, size: usize) -> DeltaDiscoveryResponse {
        let resource =
            |number: usize| Resource { name: format!("{number}-{}", "x".repeat(size)), ..Resource::default() };
        DeltaDiscoveryResponse {
            system_version_info: "7+more".to_owned(),
            resources: (0..count).map(resource).collect(),
            type_url: "type".to_owned(),
            nonce: "12".to_owned(),
            removed_resources: vec!["gone".to_owned()],
        }
    }

    #[test]
    fn pieces_of_any_size_give_the_same() {
        let mut stream = framed(&response(3, 10));
        stream.extend(framed(&DeltaDiscoveryResponse::default()));
        stream.extend(framed(&response(1_000, 300)));
        for size in [1, 2, 7, 1_000, stream.len()] {
            let (mut skimmer, mut seen) = (Skimmer::default(), Vec::new());
            for piece in stream.chunks(size) {
                skimmer.feed(piece, |response| seen.push(response)).unwrap();
            }
            assert_eq!(seen.len(), 3, "{size}");
            assert_eq!((seen[0].resources, seen[0].removed, seen[0].nonce.as_str()), (3, 1, "12"));
            assert_eq!((seen[0].version.as_str(), seen[0].type_url.as_str()), ("7+more", "type"));
            assert!(memchr::memmem::find(&seen[0].small, b"2-xxxxxxxxxx").is_some());
            assert_eq!(seen[1], Response::default());
            assert_eq!((seen[2].resources, seen[2].small.len()), (1_000, 0), "a large one is not kept");
        }
    }

    #[test]
    fn what_is_something_else_is_refused() {
        for wrong in [&[1, 0, 0, 0, 1][..], &[0, 0, 0, 0, 2, 0x08, 1], &[0, 0, 0, 0, 3, 0x12, 9, 1]] {
            assert_eq!(Skimmer::default().feed(wrong, |_| ()), Err(Malformed), "{wrong:?}");
        }
    }
}
