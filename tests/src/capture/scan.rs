//! Finds markers in a stream, also where one is split over packets.

use memchr::memmem::Finder;

#[derive(Debug)]
pub(super) struct Scanner {
    markers: Vec<(String, Finder<'static>)>,
    overlap: usize,
}

impl Scanner {
    pub(super) fn new(markers: &[String]) -> Self {
        let overlap = markers.iter().map(|m| m.len().saturating_sub(1)).max().unwrap_or(0);
        Self { markers: markers.iter().map(|m| (m.clone(), Finder::new(m.as_bytes()).into_owned())).collect(), overlap }
    }

    pub(super) fn name(&self, marker: usize) -> Option<&str> {
        self.markers.get(marker).map(|(name, _)| name.as_str())
    }

    /// Adds the markers found to `found`; `tail` is the end of what came before in this stream.
    pub(super) fn scan(&self, tail: &mut Vec<u8>, bytes: &[u8], found: &mut Vec<usize>) {
        if self.markers.is_empty() || bytes.is_empty() {
            return;
        }
        let seam = tail.len();
        tail.extend_from_slice(&bytes[..bytes.len().min(self.overlap)]);
        for (at, (_, finder)) in self.markers.iter().enumerate() {
            if found.contains(&at) {
                continue;
            }
            if (seam > 0 && finder.find(tail).is_some()) || finder.find(bytes).is_some() {
                found.push(at);
            }
        }
        if bytes.len() >= self.overlap {
            tail.clear();
            tail.extend_from_slice(&bytes[bytes.len() - self.overlap..]);
        } else {
            let excess = tail.len().saturating_sub(self.overlap);
            tail.drain(..excess);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_split_a_marker() {
        let scanner = Scanner::new(&["marker".to_owned(), "absent".to_owned()]);
        let stream = b"xxmarkeryy";
        for first in 0..stream.len() {
            for second in first..stream.len() {
                let (mut tail, mut found) = (Vec::new(), Vec::new());
                for part in [&stream[..first], &stream[first..second], &stream[second..]] {
                    scanner.scan(&mut tail, part, &mut found);
                }
                assert_eq!(found, [0], "split at {first} and {second}");
                assert!(tail.len() <= 5);
            }
        }
        let (mut tail, mut found) = (Vec::new(), Vec::new());
        scanner.scan(&mut tail, b"mark", &mut found);
        scanner.scan(&mut tail, b"-er", &mut found);
        assert_eq!(found, [0; 0]);
    }
}
