//! The parts of a `DeltaDiscoveryResponse`, encoded apart: so that what is the same for many clients is encoded once. The
//! fields of a message may come in any order, and messages that are written one behind the other are one.

use bytes::{BufMut, Bytes, BytesMut};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use crate::Resource;

/// Fields of `DeltaDiscoveryResponse`.
const VERSION: u32 = 1;
const RESOURCES: u32 = 2;
const TYPE_URL: u32 = 4;
const NONCE: u32 = 5;
const REMOVED: u32 = 6;
/// Fields of `Resource`.
const RESOURCE_VERSION: u32 = 1;
const RESOURCE_BODY: u32 = 2;
const RESOURCE_NAME: u32 = 3;
const RESOURCE_ALIAS: u32 = 4;
/// Fields of `google.protobuf.Any`.
const ANY_TYPE_URL: u32 = 1;
const ANY_VALUE: u32 = 2;

/// Bytes of a response's field for this resource.
pub(super) fn resource_len(type_url: &str, resource: &Resource) -> usize {
    field_len(RESOURCES, content_len(type_url, resource))
}

/// Appends a response's field for this resource.
pub(super) fn resource(type_url: &str, resource: &Resource, out: &mut BytesMut) {
    encode_key(RESOURCES, WireType::LengthDelimited, out);
    encode_varint(content_len(type_url, resource) as u64, out);
    if !resource.version.is_empty() {
        field(RESOURCE_VERSION, resource.version.as_bytes(), out);
    }
    encode_key(RESOURCE_BODY, WireType::LengthDelimited, out);
    encode_varint(any_len(type_url, resource) as u64, out);
    field(ANY_TYPE_URL, type_url.as_bytes(), out);
    field(ANY_VALUE, &resource.body, out);
    field(RESOURCE_NAME, resource.name.as_bytes(), out);
    for alias in &resource.aliases {
        field(RESOURCE_ALIAS, alias.as_bytes(), out);
    }
}

/// Bytes of a response's field for a name that is gone.
pub(super) fn removed_len(name: &str) -> usize {
    field_len(REMOVED, name.len())
}

/// Appends a response's field for a name that is gone.
pub(super) fn removed(name: &str, out: &mut BytesMut) {
    field(REMOVED, name.as_bytes(), out);
}

/// What a response says beside its resources.
pub(super) fn head(type_url: &str, nonce: &str, version: &str) -> Bytes {
    let fields = [(VERSION, version), (TYPE_URL, type_url), (NONCE, nonce)];
    let mut out = BytesMut::with_capacity(fields.iter().map(|(tag, text)| field_len(*tag, text.len())).sum());
    for (tag, text) in fields {
        field(tag, text.as_bytes(), &mut out);
    }
    out.freeze()
}

fn content_len(type_url: &str, resource: &Resource) -> usize {
    let version = if resource.version.is_empty() { 0 } else { field_len(RESOURCE_VERSION, resource.version.len()) };
    let aliases: usize = resource.aliases.iter().map(|alias| field_len(RESOURCE_ALIAS, alias.len())).sum();
    version
        + field_len(RESOURCE_BODY, any_len(type_url, resource))
        + field_len(RESOURCE_NAME, resource.name.len())
        + aliases
}

fn any_len(type_url: &str, resource: &Resource) -> usize {
    field_len(ANY_TYPE_URL, type_url.len()) + field_len(ANY_VALUE, resource.body.len())
}

fn field_len(tag: u32, content: usize) -> usize {
    key_len(tag) + encoded_len_varint(content as u64) + content
}

fn field(tag: u32, content: &[u8], out: &mut BytesMut) {
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(content.len() as u64, out);
    out.put_slice(content);
}

#[cfg(test)]
mod tests {
    use mesh_proto::discovery::{self, DeltaDiscoveryResponse};
    use prost::Message;

    use super::*;

    #[test]
    fn parts_behind_each_other_are_the_message() {
        let thing = |version: &str, aliases: &[&str]| Resource {
            name: "namespace/name".into(),
            aliases: aliases.iter().map(|alias| (*alias).into()).collect(),
            version: version.into(),
            body: Bytes::from(vec![7; 300]),
        };
        let things = [thing("1", &["a", "b"]), thing("", &[])];
        let mut out = BytesMut::from(&head("type", "12", "34+more")[..]);
        for thing in &things {
            let before = out.len();
            resource("type", thing, &mut out);
            assert_eq!(out.len() - before, resource_len("type", thing));
        }
        removed("gone", &mut out);
        assert_eq!(removed_len("gone"), 6);
        let expected = DeltaDiscoveryResponse {
            system_version_info: "34+more".to_owned(),
            resources: things
                .iter()
                .map(|thing| discovery::Resource {
                    version: thing.version.to_string(),
                    resource: Some(prost_types::Any { type_url: "type".to_owned(), value: thing.body.to_vec() }),
                    name: thing.name.to_string(),
                    aliases: thing.aliases.iter().map(ToString::to_string).collect(),
                })
                .collect(),
            type_url: "type".to_owned(),
            nonce: "12".to_owned(),
            removed_resources: vec!["gone".to_owned()],
        };
        assert_eq!(DeltaDiscoveryResponse::decode(out.freeze()).unwrap(), expected);
    }
}
