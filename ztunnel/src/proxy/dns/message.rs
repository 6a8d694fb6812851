//! The few bytes of a DNS message that forwarding needs. What is forwarded is not decoded: what this proxy does not know
//! passes as it is.

use std::ops::Range;

/// Bytes of the header.
pub const HEADER: usize = 12;

/// Longest name, on the wire.
const MAX_NAME: usize = 255;

/// Bit of the third byte: it is an answer.
const QR: u8 = 0x80;

/// Bits of the third byte: what is asked for.
const OPCODE: u8 = 0x78;

/// Bit of the third byte: the answer was cut.
const TC: u8 = 0x02;

/// Bits of the fourth byte: what became of the query.
const RCODE: u8 = 0x0f;

/// SERVFAIL.
const SERVFAIL: u8 = 2;

/// The id of a message.
pub fn id(message: &[u8]) -> Option<u16> {
    u16_at(message, 0)
}

/// Writes the id of a message.
pub fn set_id(message: &mut [u8], id: u16) {
    if let Some(bytes) = message.get_mut(..2) {
        bytes.copy_from_slice(&id.to_be_bytes());
    }
}

/// Two bytes in network order.
pub fn u16_at(message: &[u8], at: usize) -> Option<u16> {
    let bytes = message.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

/// Four bytes in network order.
pub fn u32_at(message: &[u8], at: usize) -> Option<u32> {
    let bytes = message.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// Whether it has a header, and that of a query.
pub fn is_query(message: &[u8]) -> bool {
    message.len() >= HEADER && message.get(2).is_some_and(|flags| flags & QR == 0)
}

/// Whether an answer was cut.
pub fn is_truncated(message: &[u8]) -> bool {
    message.get(2).is_some_and(|flags| flags & TC != 0)
}

/// The response code of an answer, as far as the header has it.
pub fn rcode(message: &[u8]) -> u8 {
    message.get(3).map_or(0, |flags| flags & RCODE)
}

/// Where the one question stands: its name, its type and class. None where there is not exactly one that can be read.
pub fn question(message: &[u8]) -> Option<Range<usize>> {
    if u16_at(message, 4)? != 1 {
        return None;
    }
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        // Pointers have nothing to point to yet.
        if length > 63 || at - HEADER + length + 1 > MAX_NAME {
            return None;
        }
        at += length + 1;
        if length == 0 {
            break;
        }
    }
    let end = at + 4;
    (message.len() >= end).then_some(HEADER..end)
}

/// The bytes of the one question, to compare with: letters of the name in lower case.
pub fn question_key(message: &[u8]) -> Option<Vec<u8>> {
    let mut key = message.get(question(message)?)?.to_vec();
    let name = key.len().saturating_sub(4);
    // Lengths of labels are below 64, and so no letters.
    key.get_mut(..name)?.make_ascii_lowercase();
    Some(key)
}

/// Whether `answer` is one to `query`: same id, same kind, same question. A resolver that could not read the query may
/// leave the question out.
pub fn answers(query: &[u8], answer: &[u8]) -> bool {
    let head = |message: &[u8]| Some((id(message)?, message.get(2)? & OPCODE));
    if answer.len() < HEADER || is_query(answer) || head(query) != head(answer) {
        return false;
    }
    match (question_key(query), question_key(answer)) {
        (Some(asked), Some(answered)) => asked == answered,
        (_, None) => u16_at(answer, 4) == Some(0) && rcode(answer) != 0,
        (None, Some(_)) => false,
    }
}

/// The header and the question of `message` as an answer without records, with this response code and perhaps cut.
fn bare(message: &[u8], rcode: u8, truncated: bool) -> Option<Vec<u8>> {
    let question = question(message);
    let end = question.as_ref().map_or(HEADER, |question| question.end);
    let mut answer = message.get(..end)?.to_vec();
    let questions = u16::from(question.is_some()).to_be_bytes();
    let counts = [questions[0], questions[1], 0, 0, 0, 0, 0, 0];
    answer.get_mut(4..HEADER)?.copy_from_slice(&counts);
    let [_, _, flags, more, ..] = answer.as_mut_slice() else { return None };
    *flags = (*flags & !TC) | QR | if truncated { TC } else { 0 };
    // Recursion is available; nothing was checked.
    *more = (*more & 0x10) | 0x80 | (rcode & RCODE);
    Some(answer)
}

/// The answer to a query that no resolver answers: whoever asks goes on with the next one.
pub fn failure(query: &[u8]) -> Option<Vec<u8>> {
    bare(query, SERVFAIL, false)
}

/// The same answer without its records: to be asked for again over TCP.
pub fn truncate(answer: &[u8]) -> Option<Vec<u8>> {
    bare(answer, rcode(answer), true)
}

/// The end of a name that begins at `at`, which may end in a pointer.
pub fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length if length & 0xc0 == 0xc0 => return Some(at + 2),
            length if length < 64 => at += usize::from(length) + 1,
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A query for the name with these labels, of type A.
    pub fn query(id: u16, labels: &[&str]) -> Vec<u8> {
        let mut bytes = id.to_be_bytes().to_vec();
        bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        for label in labels {
            bytes.push(label.len() as u8);
            bytes.extend(label.as_bytes());
        }
        bytes.extend([0, 0, 1, 0, 1]);
        bytes
    }

    fn answer(id: u16, labels: &[&str]) -> Vec<u8> {
        let mut bytes = query(id, labels);
        bytes[2] |= QR;
        bytes
    }

    #[test]
    fn answers_are_told_from_what_is_none() {
        let asked = query(7, &["Www", "example", "com"]);
        assert!(answers(&asked, &answer(7, &["wwW", "example", "com"])));
        assert!(!answers(&asked, &answer(8, &["www", "example", "com"])), "another id");
        assert!(!answers(&asked, &answer(7, &["www", "example", "org"])), "another name");
        assert!(!answers(&asked, &asked), "a query");
        let mut other_type = answer(7, &["www", "example", "com"]);
        let at = other_type.len() - 3;
        other_type[at] = 28;
        assert!(!answers(&asked, &other_type));
        let mut silent = answer(7, &[])[..HEADER].to_vec();
        silent[5] = 0;
        assert!(!answers(&asked, &silent), "no question and no error");
        silent[3] |= 1;
        assert!(answers(&asked, &silent), "FORMERR");
    }

    #[test]
    fn failures_and_cut_answers_keep_the_question() {
        let mut asked = query(7, &["a", "b"]);
        asked.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        asked[11] = 1;
        let failed = failure(&asked).unwrap();
        assert!(answers(&asked, &failed) && rcode(&failed) == SERVFAIL && !is_truncated(&failed));
        let cut = truncate(&answer(7, &["a", "b"])).unwrap();
        assert!(answers(&asked, &cut) && is_truncated(&cut));
        assert_eq!(u16_at(&cut, 10), Some(0));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..80), other in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = (id(&bytes), question_key(&bytes), answers(&bytes, &other), failure(&bytes), truncate(&bytes));
            let _ = skip_name(&bytes, usize::from(bytes.first().copied().unwrap_or(0)));
            if let Some(failed) = failure(&bytes) {
                prop_assert!(!is_query(&failed));
                prop_assert_eq!(question_key(&failed), question_key(&bytes));
            }
        }
    }
}
