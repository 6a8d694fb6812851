//! A response as it goes out: a piece of its own, and pieces that it may share with those of other clients.

use std::ops::Range;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use mesh_proto::discovery::DeltaDiscoveryResponse;
use prost::Message;

use super::catalog::{Part, Whole};

/// Responses up to this size are one piece: a copy is cheaper than a second frame.
const ONE_PIECE: usize = 16 << 10;
/// Largest piece that is handed to the connection.
const MAX_PIECE: usize = 64 << 10;
/// Bytes in front of a gRPC message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// One response to one client. A clone shares the bytes.
#[derive(Clone, Debug)]
pub struct Response {
    /// The type of the resources.
    pub type_url: Arc<str>,
    /// By which the client acknowledges it.
    pub nonce: String,
    /// Resources in it.
    pub resources: usize,
    /// Another one follows, even if it comes to nothing.
    pub more: bool,
    pub(super) head: Bytes,
    pub(super) content: Content,
}

/// What a response tells.
#[derive(Clone, Debug)]
pub(super) enum Content {
    /// Some changes.
    Part(Arc<Part>),
    /// These segments of a type's whole state, and what is not there any more.
    Whole(Arc<Whole>, Range<usize>, Arc<Part>),
}

impl Content {
    fn pieces(&self) -> impl Iterator<Item = &Bytes> {
        let (segments, part) = match self {
            Self::Part(part) => (&[][..], part),
            Self::Whole(whole, range, part) => (whole.segments(range.clone()), part),
        };
        std::iter::once(part.bytes()).chain(segments.iter().map(|segment| segment.bytes()))
    }
}

impl Response {
    /// Bytes of the message.
    pub fn encoded_len(&self) -> usize {
        self.head.len() + self.content.pieces().map(Bytes::len).sum::<usize>()
    }

    /// The message, read back from its bytes: for those who want to look into it.
    pub fn to_message(&self) -> DeltaDiscoveryResponse {
        let pieces = std::iter::once(&self.head).chain(self.content.pieces());
        let bytes = pieces.fold(BytesMut::with_capacity(self.encoded_len()), |mut all, piece| {
            all.put_slice(piece);
            all
        });
        // What is encoded here by hand is checked against the library's encoding by a test.
        DeltaDiscoveryResponse::decode(bytes.freeze()).unwrap_or_default()
    }

    /// As a gRPC message that is not compressed, in pieces.
    pub(super) fn into_pieces(self) -> Pieces {
        let length = self.encoded_len();
        let is_small = length <= ONE_PIECE;
        let mut first = BytesMut::with_capacity(PREFIX + if is_small { length } else { self.head.len() });
        first.put_u8(0);
        // Limits keep it far below.
        first.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        first.put_slice(&self.head);
        let content = if is_small {
            self.content.pieces().for_each(|piece| first.put_slice(piece));
            None
        } else {
            Some(self.content)
        };
        Pieces { rest: first.freeze(), content, next: 0 }
    }
}

/// The pieces of a response that are still to be sent.
#[derive(Debug)]
pub(super) struct Pieces {
    /// Of the piece that is being handed out.
    rest: Bytes,
    content: Option<Content>,
    next: usize,
}

impl Pieces {
    fn shared(&mut self) -> Option<Bytes> {
        let piece = match self.content.as_ref()? {
            Content::Part(part) | Content::Whole(_, _, part) if self.next == 0 => Some(part.bytes()),
            Content::Part(_) => None,
            Content::Whole(whole, range, _) => {
                whole.segments(range.clone()).get(self.next - 1).map(|segment| segment.bytes())
            }
        };
        self.next += 1;
        piece.cloned()
    }
}

impl Iterator for Pieces {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        while self.rest.is_empty() {
            self.rest = self.shared()?;
        }
        // What the connection has taken is out of reach, and looks as if the client had read it.
        Some(self.rest.split_to(MAX_PIECE.min(self.rest.len())))
    }
}
