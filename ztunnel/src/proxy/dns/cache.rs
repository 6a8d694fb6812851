//! What resolvers have said, for as long as they said it holds: of one pod, bounded.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

use super::message::{self, HEADER};

/// Answers of one pod that are kept.
const ENTRIES: usize = 512;

/// Bytes of answers and questions of one pod that are kept.
const BYTES: usize = 128 << 10;

/// Largest answer that is kept.
const LARGEST: usize = 1232;

/// Longest that anything is kept, and that nothing is.
const LONGEST: u32 = 300;
const LONGEST_NEGATIVE: u32 = 30;

/// Record types.
const OPT: u16 = 41;
const SOA: u16 = 6;

/// What makes two queries the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    resolver: IpAddr,
    question: Vec<u8>,
    /// Recursion desired, authentic data, checking disabled.
    flags: u8,
    /// With EDNS: whether DNSSEC records are wanted.
    dnssec: Option<bool>,
}

impl Key {
    /// The key of a query to `resolver`. None: it has something that makes its answer special.
    pub fn of(resolver: IpAddr, query: &[u8]) -> Option<Self> {
        let [_, _, kind, more, ..] = *query else { return None };
        // A query and nothing else: opcode 0, no answers, no authorities, at most an OPT record without options.
        if kind & !1 != 0 || message::u32_at(query, 6)? != 0 {
            return None;
        }
        let end = message::question(query)?.end;
        let dnssec = match (message::u16_at(query, 10)?, query.get(end..)?) {
            (0, []) => None,
            (1, [0, 0, 41, _, _, 0, 0, high, _, 0, 0]) => Some(high & 0x80 != 0),
            _ => return None,
        };
        let flags = (kind & 1) | (more & 0x30);
        Some(Self { resolver, question: message::question_key(query)?, flags, dnssec })
    }
}

struct Entry {
    answer: Vec<u8>,
    /// Where times to live stand.
    times: Vec<usize>,
    kept: Instant,
    until: Instant,
}

impl Entry {
    /// Bytes that are kept for it.
    fn size(&self, key: &Key) -> usize {
        self.answer.len() + key.question.len() + self.times.len() * size_of::<usize>()
    }
}

/// Answers by query.
#[derive(Default)]
pub struct Cache {
    entries: HashMap<Key, Entry>,
    /// Of all entries.
    bytes: usize,
}

impl Cache {
    /// What was said to the same query, with the id and the letters of this one and the time that is left.
    pub fn get(&mut self, key: &Key, query: &[u8], now: Instant) -> Option<Vec<u8>> {
        let entry = self.entries.get(key)?;
        if entry.until <= now {
            self.remove(key);
            return None;
        }
        let limit = match key.dnssec {
            None => 512,
            // The OPT record follows the question: root, type, size.
            Some(_) => usize::from(message::u16_at(query, message::question(query)?.end + 3)?).max(512),
        };
        let mut answer = entry.answer.clone();
        let question = message::question(query)?;
        answer.get_mut(question.clone())?.copy_from_slice(query.get(question)?);
        message::set_id(&mut answer, message::id(query)?);
        let age = u32::try_from(now.saturating_duration_since(entry.kept).as_secs()).ok()?;
        for at in &entry.times {
            let left = message::u32_at(&answer, *at)?.saturating_sub(age);
            answer.get_mut(*at..at + 4)?.copy_from_slice(&left.to_be_bytes());
        }
        (answer.len() <= limit).then_some(answer)
    }

    /// Keeps what was said, if it says for how long it holds.
    pub fn put(&mut self, key: Key, answer: &[u8], now: Instant) {
        let Some((times, seconds)) = lifetime(answer) else { return };
        let until = now + Duration::from_secs(u64::from(seconds));
        let entry = Entry { answer: answer.to_vec(), times, kept: now, until };
        let size = entry.size(&key);
        self.remove(&key);
        if self.is_full(size) {
            self.sweep(now);
        }
        while self.is_full(size)
            && let Some(any) = self.entries.keys().next().cloned()
        {
            self.remove(&any);
        }
        self.bytes += size;
        self.entries.insert(key, entry);
    }

    /// Forgets what does not hold any more.
    pub fn sweep(&mut self, now: Instant) {
        let Self { entries, bytes } = self;
        entries.retain(|key, entry| {
            let holds = entry.until > now;
            if !holds {
                *bytes -= entry.size(key);
            }
            holds
        });
    }

    fn is_full(&self, size: usize) -> bool {
        self.entries.len() >= ENTRIES || self.bytes + size > BYTES
    }

    fn remove(&mut self, key: &Key) {
        if let Some((key, entry)) = self.entries.remove_entry(key) {
            self.bytes -= entry.size(&key);
        }
    }
}

/// Where an answer's times to live stand, and for how many seconds it may be kept. None: not at all.
fn lifetime(answer: &[u8]) -> Option<(Vec<usize>, u32)> {
    let code = message::rcode(answer);
    if answer.len() > LARGEST || message::is_truncated(answer) || !matches!(code, 0 | 3) {
        return None;
    }
    let mut at = message::question(answer)?.end;
    let answers = usize::from(message::u16_at(answer, 6)?);
    let count = answers + usize::from(message::u16_at(answer, 8)?) + usize::from(message::u16_at(answer, 10)?);
    let negative = answers == 0 || code == 3;
    let (mut times, mut least, mut denied) = (Vec::new(), LONGEST, None);
    for _ in 0..count {
        let fixed = message::skip_name(answer, at)?;
        let of_type = message::u16_at(answer, fixed)?;
        let time = message::u32_at(answer, fixed + 4)?;
        let length = usize::from(message::u16_at(answer, fixed + 8)?);
        let end = fixed + 10 + length;
        let data = answer.get(fixed + 10..end)?;
        if of_type != OPT {
            times.push(fixed + 4);
            least = least.min(time);
        }
        if of_type == SOA {
            // The last of its numbers, which are at its end.
            let minimum = data.len().checked_sub(4).and_then(|last| message::u32_at(data, last))?;
            denied = Some(time.min(minimum));
        }
        at = end;
    }
    let seconds = if negative { denied?.min(least).min(LONGEST_NEGATIVE) } else { least };
    (at == answer.len() && at > HEADER && seconds > 0).then_some((times, seconds))
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
    use hickory_proto::rr::rdata::{A, SOA};
    use hickory_proto::rr::{Name, RData, Record, RecordType};
    use proptest::prelude::*;

    use super::*;

    fn query(id: u16, name: &str, edns: Option<u16>) -> Vec<u8> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.queries.push(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message.edns = edns.map(|size| {
            let mut edns = Edns::new();
            edns.set_max_payload(size);
            edns
        });
        message.to_vec().unwrap()
    }

    fn answer(query: &[u8], change: impl Fn(&mut Message)) -> Vec<u8> {
        let mut message = Message::from_vec(query).unwrap().into_response();
        change(&mut message);
        message.to_vec().unwrap()
    }

    fn a(name: &str, ttl: u32) -> Record {
        Record::from_rdata(Name::from_ascii(name).unwrap(), ttl, RData::A(A([192, 0, 2, 1].into())))
    }

    fn resolver() -> IpAddr {
        "10.96.0.10".parse().unwrap()
    }

    #[test]
    fn an_answer_is_kept_for_its_time_and_told_with_what_is_left() {
        let begin = Instant::now();
        let mut cache = Cache::default();
        let asked = query(1, "www.example.com.", Some(1232));
        let key = Key::of(resolver(), &asked).unwrap();
        let said =
            answer(&asked, |message| message.answers.extend([a("www.example.com.", 60), a("x.example.com.", 20)]));
        cache.put(key.clone(), &said, begin);
        let again = query(9, "WWW.Example.com.", Some(1232));
        assert_eq!(Key::of(resolver(), &again).as_ref(), Some(&key));
        let told = cache.get(&key, &again, begin + Duration::from_secs(15)).unwrap();
        assert!(message::answers(&again, &told));
        let told = Message::from_vec(&told).unwrap();
        assert_eq!(told.answers.iter().map(|record| record.ttl).collect::<Vec<_>>(), [45, 5]);
        assert!(told.queries[0].name.eq_case(&Name::from_ascii("WWW.Example.com.").unwrap()));
        assert_eq!(cache.get(&key, &again, begin + Duration::from_secs(20)), None);
        assert!(cache.entries.is_empty());
        assert_eq!(cache.bytes, 0);
    }

    #[test]
    fn what_says_no_time_or_is_cut_is_not_kept() {
        let asked = query(1, "www.example.com.", None);
        let soa = |minimum| {
            let name = || Name::from_ascii("example.com.").unwrap();
            Record::from_rdata(name(), 600, RData::SOA(SOA::new(name(), name(), 1, 1, 1, 1, minimum)))
        };
        type Change<'a> = &'a dyn Fn(&mut Message);
        let cases: [(Change<'_>, Option<u32>); 8] = [
            (&|message| message.answers.push(a("www.example.com.", 60)), Some(60)),
            (&|message| message.answers.push(a("www.example.com.", 86400)), Some(LONGEST)),
            (&|message| message.answers.push(a("www.example.com.", 0)), None),
            (&|message| message.authorities.push(soa(10)), Some(10)),
            (&|message| message.authorities.push(soa(900)), Some(LONGEST_NEGATIVE)),
            (&|_| {}, None),
            (&|message| (message.metadata.truncation, message.answers) = (true, vec![a("www.example.com.", 60)]), None),
            (&|message| message.metadata.response_code = ResponseCode::ServFail, None),
        ];
        for (index, (change, expected)) in cases.into_iter().enumerate() {
            assert_eq!(lifetime(&answer(&asked, change)).map(|(_, seconds)| seconds), expected, "case {index}");
        }
    }

    #[test]
    fn different_queries_have_different_keys() {
        let plain = query(1, "www.example.com.", None);
        let mut unlike = vec![query(1, "www.example.org.", None), query(1, "www.example.com.", Some(1232))];
        let mut checking_disabled = plain.clone();
        checking_disabled[3] |= 0x10;
        let mut dnssec = query(1, "www.example.com.", Some(1232));
        let at = dnssec.len() - 4;
        dnssec[at] |= 0x80;
        unlike.extend([checking_disabled, dnssec]);
        let mut keys: Vec<_> = unlike.iter().map(|one| Key::of(resolver(), one).unwrap()).collect();
        keys.push(Key::of(resolver(), &plain).unwrap());
        keys.push(Key::of("10.96.0.11".parse().unwrap(), &plain).unwrap());
        let distinct: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        // With an option, such as the client's subnet, or a size that the answer does not fit.
        let mut option = query(1, "www.example.com.", Some(1232));
        let at = option.len() - 1;
        option[at] = 4;
        option.extend([0, 8, 0, 0]);
        assert_eq!(Key::of(resolver(), &option), None);
    }

    #[test]
    fn an_answer_that_does_not_fit_is_not_told() {
        let mut cache = Cache::default();
        let (large, small) = (query(1, "www.example.com.", Some(1232)), query(1, "www.example.com.", Some(512)));
        let key = Key::of(resolver(), &large).unwrap();
        let said = answer(&large, |message| message.answers.extend((0..40).map(|_| a("www.example.com.", 60))));
        assert!((513..LARGEST).contains(&said.len()));
        let now = Instant::now();
        cache.put(key.clone(), &said, now);
        assert!(cache.get(&key, &large, now).is_some());
        assert!(cache.get(&key, &small, now).is_none());
    }

    #[test]
    fn no_more_is_kept_than_may_be() {
        let mut cache = Cache::default();
        for i in 0..ENTRIES + 50 {
            let asked = query(1, &format!("n{i}.example.com."), None);
            let said = answer(&asked, |message| message.answers.push(a("x.example.com.", 60)));
            cache.put(Key::of(resolver(), &asked).unwrap(), &said, Instant::now());
        }
        assert_eq!(cache.entries.len(), ENTRIES);
        cache.sweep(Instant::now() + Duration::from_secs(61));
        assert_eq!((cache.entries.len(), cache.bytes), (0, 0));
        for i in 0..ENTRIES {
            let asked = query(1, &format!("n{i}.example.com."), None);
            let said = answer(&asked, |message| message.answers.extend((0..40).map(|_| a("x.example.com.", 60))));
            cache.put(Key::of(resolver(), &asked).unwrap(), &said, Instant::now());
        }
        let kept: usize = cache.entries.iter().map(|(key, entry)| entry.size(key)).sum();
        assert_eq!(cache.bytes, kept);
        assert!((BYTES / 2..=BYTES).contains(&kept), "{kept}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_kept_and_told_without_harm(asked in proptest::collection::vec(any::<u8>(), 0..64), said in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut cache = Cache::default();
            if let Some(key) = Key::of(resolver(), &asked) {
                cache.put(key.clone(), &said, Instant::now());
                let _ = cache.get(&key, &asked, Instant::now());
            }
            let _ = lifetime(&said);
        }
    }
}
