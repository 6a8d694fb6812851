//! DNS messages (RFC 1035), as much as address look-ups need: one question, A records.

use std::net::Ipv4Addr;

/// Longest UDP message (section 2.3.4).
pub const MAX: usize = 512;

/// Response codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Answered.
    NoError,
    /// Not a question that can be read.
    FormErr,
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
    /// Record type; 1 is A.
    pub kind: u16,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Message id.
    pub id: u16,
    /// How it went.
    pub code: Code,
    /// Addresses.
    pub addresses: Vec<Ipv4Addr>,
}

/// A question for the addresses of `name`. None if it is no domain name.
pub fn ask(id: u16, name: &str) -> Option<Vec<u8>> {
    let mut message = Vec::with_capacity(64);
    message.extend(id.to_be_bytes());
    // Recursion desired; one question.
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.trim_end_matches('.').split('.') {
        let length = u8::try_from(label.len()).ok().filter(|l| (1..64).contains(l))?;
        message.push(length);
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
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

/// Answers a question; addresses are for type A only.
pub fn answer(question: &Question, code: Code, addresses: &[Ipv4Addr]) -> Vec<u8> {
    let mut message = ask(question.id, &question.name).unwrap_or_default();
    if message.len() < 12 {
        return Vec::new();
    }
    // A response, authoritative, recursion available.
    message[2] = 0x85;
    message[3] = 0x80
        | match code {
            Code::NoError => 0,
            Code::FormErr => 1,
            Code::NxDomain => 3,
        };
    let end = message.len();
    message[end - 4..end - 2].copy_from_slice(&question.kind.to_be_bytes());
    let fitting = if question.kind == 1 { addresses.len().min((MAX - end) / 16) } else { 0 };
    message[7] = u8::try_from(fitting).unwrap_or(0);
    for address in &addresses[..fitting] {
        // The name of the question, A, IN, 1 s, 4 bytes.
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        message.extend(address.octets());
    }
    message
}

/// Reads an answer.
pub fn read_answer(message: &[u8]) -> Option<Answer> {
    let code = match message.get(3)? & 0x0f {
        0 => Code::NoError,
        3 => Code::NxDomain,
        _ => Code::FormErr,
    };
    if message.get(2)? & 0x80 == 0 || u16_at(message, 4)? != 1 {
        return None;
    }
    let (_, end) = read_name(message, 12)?;
    let mut at = end + 4;
    let mut addresses = Vec::new();
    for _ in 0..u16_at(message, 6)? {
        let (_, end) = read_name(message, at)?;
        let length = usize::from(u16_at(message, end + 8)?);
        let data = message.get(end + 10..end + 10 + length)?;
        if u16_at(message, end)? == 1 {
            addresses.push(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?));
        }
        at = end + 10 + length;
    }
    Some(Answer { id: u16_at(message, 0)?, code, addresses })
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
        let sent = ask(7, "Reviews.default.").expect("a name");
        let question = read_question(&sent).expect("a question");
        assert_eq!(question, Question { id: 7, name: "reviews.default".to_owned(), kind: 1 });
        let addresses = [Ipv4Addr::new(10, 96, 0, 20), Ipv4Addr::new(10, 96, 0, 21)];
        let got = read_answer(&answer(&question, Code::NoError, &addresses));
        assert_eq!(got, Some(Answer { id: 7, code: Code::NoError, addresses: addresses.to_vec() }));
        let got = read_answer(&answer(&question, Code::NxDomain, &[])).expect("an answer");
        assert_eq!((got.code, got.addresses.len()), (Code::NxDomain, 0));
        let many = answer(&question, Code::NoError, &[Ipv4Addr::LOCALHOST; 100]);
        assert!(many.len() <= MAX && read_answer(&many).is_some_and(|a| a.addresses.len() > 20));
    }

    #[test]
    fn hostile_messages() {
        assert_eq!(ask(1, &"a".repeat(64)), None);
        assert_eq!(ask(1, "a..b"), None);
        let whole = ask(1, "a.b").expect("a name");
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
