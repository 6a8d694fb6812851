//! What becomes of one query: a pure decision over a snapshot.

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query};
use hickory_proto::rr::rdata::{CNAME, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use mesh_model::Snapshot;

use super::message;
use super::metrics::Outcome;
use super::resolve::{Found, FoundService, resolve, resolve_service};
use crate::proxy::local::LocalPod;

/// Seconds that what we say may be kept, also that there is nothing.
const TTL: u32 = 30;

/// Largest answer over UDP: what the client takes, within this.
const MAX_UDP: u16 = 4096;

/// Largest answer without EDNS.
const PLAIN_UDP: u16 = 512;

/// Where the header counts answers.
const ANSWER_COUNT: usize = 6;

/// Where the header counts additional records.
const ADDITIONAL_COUNT: usize = 10;

/// What we tell that we take over UDP (the size that is never fragmented, as resolvers agree).
const OUR_UDP: u16 = 1232;

/// Tries to make an answer fit by leaving out records.
const CUTS: usize = 4;

/// Types of records that are answered.
const TYPES: [RecordType; 3] = [RecordType::A, RecordType::AAAA, RecordType::SRV];

/// Rank of all SRV records: there is no second choice.
const PRIORITY: u16 = 0;

/// How the query came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// In a stream.
    Tcp,
}

/// What becomes of a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// This is the answer.
    Answer(Vec<u8>, Outcome),
    /// The resolver that was asked knows.
    Forward,
    /// It is no query.
    Drop,
}

/// Decides on one query of the pod `client`. Without a snapshot nothing is known yet. `random` orders addresses, so that
/// clients that take the first one spread.
pub fn decide(
    snapshot: Option<&Snapshot>,
    client: &LocalPod<'_>,
    domain: &str,
    query: &[u8],
    transport: Transport,
    random: &mut fastrand::Rng,
) -> Decision {
    if !message::is_query(query) {
        return Decision::Drop;
    }
    let Some(snapshot) = snapshot else { return Decision::Forward };
    // Most queries are told apart here, before anything is decoded.
    let Some(asked) = message::question(query) else { return Decision::Forward };
    let of_type = message::u16_at(query, asked.end - 4);
    if !TYPES.map(|known| Some(u16::from(known))).contains(&of_type) {
        return Decision::Forward;
    }
    let Ok(decoded) = Message::from_vec(query) else { return Decision::Forward };
    let Some(question) = plain_question(&decoded) else { return Decision::Forward };
    let Some(name) = host_name(&question.name) else { return Decision::Forward };
    let content = if question.query_type == RecordType::SRV {
        resolve_service(snapshot, client, domain, &name).and_then(|found| Content::of_service(found, random))
    } else {
        resolve(snapshot, client, domain, &name).map(|found| Content::of_host(found, question.query_type, random))
    };
    let Some(content) = content else { return Decision::Forward };
    match respond(&decoded, question, &name, domain, content, transport) {
        Some((answer, outcome)) => Decision::Answer(answer, outcome),
        None => Decision::Forward,
    }
}

/// The question, if nothing else of the query needs a resolver.
fn plain_question(query: &Message) -> Option<&Query> {
    let [question] = query.queries.as_slice() else { return None };
    let plain = query.metadata.message_type == MessageType::Query
        && query.metadata.op_code == OpCode::Query
        && question.query_class == DNSClass::IN
        && query.answers.is_empty()
        && query.authorities.is_empty()
        // Signatures among others.
        && query.additionals.is_empty()
        && query.signature().is_none()
        && query.edns.as_ref().is_none_or(|edns| edns.version() == 0);
    plain.then_some(question)
}

/// The name in lower case, without a dot at its end. None: it is no host's.
fn host_name(name: &Name) -> Option<String> {
    let mut text = String::with_capacity(name.len());
    for label in name.iter() {
        let usual = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if !label.iter().all(usual) {
            return None;
        }
        if !text.is_empty() {
            text.push('.');
        }
        text.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
    }
    Some(text).filter(|text| !text.is_empty())
}

/// What an answer says.
struct Content {
    /// The name that is meant, where it is not the one that was asked for.
    alias_of: Option<String>,
    data: Vec<RData>,
    /// What the client would ask for next.
    additional: Vec<Record>,
}

impl Content {
    fn of_host(mut found: Found, of_type: RecordType, random: &mut fastrand::Rng) -> Self {
        random.shuffle(&mut found.addresses);
        let data = found.addresses.into_iter().map(RData::from).filter(|data| data.record_type() == of_type).collect();
        Self { alias_of: found.alias_of, data, additional: Vec::new() }
    }

    /// None: one of the names is too long.
    fn of_service(mut found: FoundService, random: &mut fastrand::Rng) -> Option<Self> {
        random.shuffle(&mut found.targets);
        let (mut data, mut additional) = (Vec::with_capacity(found.targets.len()), Vec::new());
        for target in found.targets {
            let name = Name::from_ascii(format!("{}.", target.name)).ok()?;
            let addresses = target.addresses.into_iter().map(RData::from);
            additional.extend(addresses.map(|data| Record::from_rdata(name.clone(), TTL, data)));
            data.push(RData::SRV(SRV::new(PRIORITY, target.weight, target.port, name)));
        }
        Some(Self { alias_of: found.alias_of, data, additional })
    }
}

fn respond(
    query: &Message,
    question: &Query,
    name: &str,
    domain: &str,
    content: Content,
    transport: Transport,
) -> Option<(Vec<u8>, Outcome)> {
    let mut response = Message::response(query.metadata.id, OpCode::Query);
    response.metadata = Metadata::response_from_request(&query.metadata);
    response.metadata.authoritative = true;
    response.metadata.recursion_available = true;
    response.queries.push(question.clone());
    // Where the records stand: behind an alias if a search domain was appended.
    let mut owner = question.name.clone();
    if let Some(alias_of) = &content.alias_of {
        let meant = Name::from_ascii(format!("{alias_of}.")).ok()?;
        response.answers.push(Record::from_rdata(owner, TTL, RData::CNAME(CNAME(meant.clone()))));
        owner = meant;
    }
    let outcome = if content.data.is_empty() { Outcome::NoData } else { Outcome::Answered };
    response.answers.extend(content.data.into_iter().map(|data| Record::from_rdata(owner.clone(), TTL, data)));
    response.additionals = content.additional;
    if outcome == Outcome::NoData {
        let meant = content.alias_of.as_deref().unwrap_or(name);
        response.authorities.push(authority(meant, domain)?);
    }
    let limit = match (transport, &query.edns) {
        (Transport::Tcp, _) => u16::MAX,
        (Transport::Udp, None) => PLAIN_UDP,
        (Transport::Udp, Some(edns)) => edns.max_payload().clamp(PLAIN_UDP, MAX_UDP),
    };
    if let Some(asked) = &query.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(OUR_UDP).set_dnssec_ok(asked.flags().dnssec_ok);
        response.edns = Some(edns);
    }
    Some((encode(response, usize::from(limit))?, outcome))
}

/// Says for how long there is nothing: the start of authority of the cluster's domain, or of the name itself.
fn authority(name: &str, domain: &str) -> Option<Record> {
    let in_cluster = name.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    let zone = Name::from_ascii(format!("{}.", if in_cluster { domain } else { name })).ok()?;
    let mname = zone.prepend_label("dns").unwrap_or_else(|_| zone.clone());
    let rname = zone.prepend_label("hostmaster").unwrap_or_else(|_| zone.clone());
    let soa = SOA::new(mname, rname, 1, 7200, 1800, 86400, TTL);
    Some(Record::from_rdata(zone, TTL, RData::SOA(soa)))
}

/// The bytes of an answer of at most `limit`. Where it would be longer, without additional records (RFC 2181, section 9),
/// and if that is not enough with fewer answers, and marked as cut.
fn encode(mut response: Message, limit: usize) -> Option<Vec<u8>> {
    if !response.additionals.is_empty() {
        if (response.answers.len() + response.additionals.len()) * 16 <= limit
            && let Some(bytes) = response.to_vec().ok().filter(|bytes| fits(bytes, &response, limit))
        {
            return Some(bytes);
        }
        response.additionals.clear();
    }
    // An address takes 16 bytes at least.
    let most = limit / 16;
    if response.answers.len() > most {
        response.metadata.truncation = true;
        response.answers.truncate(most);
    }
    for _ in 0..CUTS {
        let bytes = response.to_vec().ok()?;
        if fits(&bytes, &response, limit) {
            return Some(bytes);
        }
        response.metadata.truncation = true;
        let written = message::u16_at(&bytes, ANSWER_COUNT).map_or(0, usize::from);
        let over = bytes.len().saturating_sub(limit).max(1);
        let too_many = (over * written).div_ceil(bytes.len().max(1));
        response.answers.truncate(written.saturating_sub(too_many));
    }
    response.answers.clear();
    response.authorities.clear();
    response.to_vec().ok().filter(|bytes| bytes.len() <= limit)
}

/// Whether `bytes` are all of `response` and no more than `limit`. What would be longer than any message can be, the encoder
/// leaves out, its options as well.
fn fits(bytes: &[u8], response: &Message, limit: usize) -> bool {
    let written = |at| message::u16_at(bytes, at).map(usize::from);
    let additional = response.additionals.len() + usize::from(response.edns.is_some());
    bytes.len() <= limit
        && written(ANSWER_COUNT) == Some(response.answers.len())
        && written(ADDITIONAL_COUNT) == Some(additional)
}

#[cfg(test)]
mod tests;
