//! DNS messages (RFC 1035), as much as address look-ups need: one question, A and AAAA records.

use std::net::{IpAddr, Ipv4Addr};

/// Longest UDP message (section 2.3.4).
pub const MAX: usize = 512;

/// Record type of an IPv4 address.
pub const A: u16 = 1;
/// Record type of an IPv6 address (RFC 3596).
pub const AAAA: u16 = 28;

/// Record type of where a service is (RFC 2782).
pub const SRV: u16 = 33;

/// Response codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Answered.
    NoError,
    /// Not a question that can be read.
    FormErr,
    /// The server cannot know now.
    ServFail,
    /// No such name.
    NxDomain,
}

/// A question for an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Message id.
    pub id: u16,
    /// Name without the last dot, in lower case.
    pub name: String,
    /// Record type.
    pub kind: u16,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Message id.
    pub id: u16,
    /// How it went.
    pub code: Code,
    /// Not all fitted (TC).
    pub truncated: bool,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Where a service is: `name:port`.
    pub targets: Vec<String>,
}

/// A question for records of `name`. None if it is no domain name.
pub fn ask(id: u16, name: &str, kind: u16) -> Option<Vec<u8>> {
    let mut message = Vec::with_capacity(64);
    message.extend(id.to_be_bytes());
    // Recursion desired; one question.
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.trim_end_matches('.').split('.') {
        let length = u8::try_from(label.len()).ok().filter(|l| (1..64).contains(l))?;
        message.push(length);
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend(kind.to_be_bytes());
    message.extend([0, 1]);
    (message.len() <= MAX).then_some(message)
}

/// Reads a question.
pub fn read_question(message: &[u8]) -> Option<Question> {
    let id = u16_at(message, 0)?;
    let query = message.get(2)? & 0xf8 == 0;
    if !query || u16_at(message, 4)? != 1 {
        return None;
    }
    let (name, end) = read_name(message, 12)?;
    Some(Question { id, name, kind: u16_at(message, end)? })
}

/// Answers a question with those of the addresses that are of its type, as far as a UDP message holds them.
pub fn answer(question: &Question, code: Code, addresses: &[IpAddr]) -> Vec<u8> {
    answer_within(question, code, addresses, MAX)
}

/// As [`answer`], with as many addresses as a message over TCP holds.
pub fn answer_tcp(question: &Question, code: Code, addresses: &[IpAddr]) -> Vec<u8> {
    answer_within(question, code, addresses, usize::from(u16::MAX))
}

fn answer_within(question: &Question, code: Code, addresses: &[IpAddr], limit: usize) -> Vec<u8> {
    let mut message = ask(question.id, &question.name, question.kind).unwrap_or_default();
    if message.len() < 12 {
        return Vec::new();
    }
    // A response, authoritative, recursion available.
    message[2] = 0x85;
    message[3] = 0x80
        | match code {
            Code::NoError => 0,
            Code::FormErr => 1,
            Code::ServFail => 2,
            Code::NxDomain => 3,
        };
    let mut count = 0_u16;
    for address in addresses {
        let bytes = match (address, question.kind) {
            (IpAddr::V4(address), A) => address.octets().to_vec(),
            (IpAddr::V6(address), AAAA) => address.octets().to_vec(),
            _ => continue,
        };
        if message.len() + 12 + bytes.len() > limit {
            // TC.
            message[2] |= 2;
            break;
        }
        // The name of the question, its type, IN, 1 s, the length.
        message.extend([0xc0, 12]);
        message.extend(question.kind.to_be_bytes());
        message.extend([0, 1, 0, 0, 0, 1, 0, u8::try_from(bytes.len()).unwrap_or(0)]);
        message.extend(bytes);
        count += 1;
    }
    message[6..8].copy_from_slice(&count.to_be_bytes());
    message
}

/// Reads an answer.
pub fn read_answer(message: &[u8]) -> Option<Answer> {
    let code = match message.get(3)? & 0x0f {
        0 => Code::NoError,
        2 => Code::ServFail,
        3 => Code::NxDomain,
        _ => Code::FormErr,
    };
    if message.get(2)? & 0x80 == 0 || u16_at(message, 4)? != 1 {
        return None;
    }
    let (_, end) = read_name(message, 12)?;
    let mut at = end + 4;
    let (mut addresses, mut targets) = (Vec::new(), Vec::new());
    for _ in 0..u16_at(message, 6)? {
        let (_, end) = read_name(message, at)?;
        let length = usize::from(u16_at(message, end + 8)?);
        let data = message.get(end + 10..end + 10 + length)?;
        match u16_at(message, end)? {
            A => addresses.push(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?).into()),
            AAAA => addresses.push(IpAddr::from(<[u8; 16]>::try_from(data).ok()?)),
            SRV => targets.push(format!("{}:{}", read_name(message, end + 16)?.0, u16_at(message, end + 14)?)),
            _ => {}
        }
        at = end + 10 + length;
    }
    Some(Answer { id: u16_at(message, 0)?, code, truncated: message.get(2)? & 2 != 0, addresses, targets })
}

/// The name at `at` and where it ends. Pointers (section 4.1.4) must lead backwards, so there is no loop.
fn read_name(message: &[u8], at: usize) -> Option<(String, usize)> {
    let mut name = String::new();
    let (mut at, mut end, mut limit) = (at, None, at + 1);
    loop {
        let length = usize::from(*message.get(at)?);
        match length {
            0 => return Some((name, end.unwrap_or(at + 1))),
            1..64 => {
                let label = std::str::from_utf8(message.get(at + 1..at + 1 + length)?).ok()?;
                if !name.is_empty() {
                    name.push('.');
                }
                name.push_str(&label.to_ascii_lowercase());
                at += 1 + length;
            }
            192.. => {
                let to = usize::from(u16_at(message, at)? & 0x3fff);
                end.get_or_insert(at + 2);
                if to >= limit.min(at) {
                    return None;
                }
                (at, limit) = (to, to);
            }
            _ => return None,
        }
        if name.len() > 253 {
            return None;
        }
    }
}

fn u16_at(message: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn question_and_answer() {
        let sent = ask(7, "Reviews.default.", A).expect("a name");
        let question = read_question(&sent).expect("a question");
        assert_eq!(question, Question { id: 7, name: "reviews.default".to_owned(), kind: 1 });
        let v4: [IpAddr; 2] = [[10, 96, 0, 20].into(), [10, 96, 0, 21].into()];
        let v6: IpAddr = [0xfd96, 0, 0, 0, 0, 0, 0, 20].into();
        let all = [v4[0], v6, v4[1]];
        let got = read_answer(&answer(&question, Code::NoError, &all));
        let expected = Answer { id: 7, code: Code::NoError, truncated: false, addresses: v4.to_vec(), targets: vec![] };
        assert_eq!(got, Some(expected.clone()));
        let question6 = Question { kind: AAAA, ..question.clone() };
        let got = read_answer(&answer(&question6, Code::NoError, &all));
        assert_eq!(got, Some(Answer { addresses: vec![v6], ..expected }));
        let got = read_answer(&answer(&question, Code::NxDomain, &[])).expect("an answer");
        assert_eq!((got.code, got.addresses.len()), (Code::NxDomain, 0));
        let many = [Ipv4Addr::LOCALHOST.into(); 100];
        let cut = answer(&question, Code::NoError, &many);
        assert!(cut.len() <= MAX && read_answer(&cut).is_some_and(|a| a.addresses.len() > 20 && a.truncated));
        let whole = read_answer(&answer_tcp(&question, Code::NoError, &many)).expect("an answer");
        assert!(whole.addresses.len() == 100 && !whole.truncated);
    }

    #[test]
    fn hostile_messages() {
        assert_eq!(ask(1, &"a".repeat(64), A), None);
        assert_eq!(ask(1, "a..b", A), None);
        let whole = ask(1, "a.b", A).expect("a name");
        for length in 0..whole.len() - 2 {
            assert_eq!(read_question(&whole[..length]), None, "{length}");
        }
        // A pointer to itself, and one forwards.
        for to in [12, 14] {
            let mut message = whole[..12].to_vec();
            message.extend([0xc0, to, 0, 1, 0, 1, 0, 0]);
            assert_eq!(read_question(&message), None);
        }
    }
}
