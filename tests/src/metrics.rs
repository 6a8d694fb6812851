//! Reads Prometheus text.

/// Adds up the samples called `name` whose labels include all of `labels`.
pub fn sum(text: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    samples(text, name).filter(|s| labels.iter().all(|(n, v)| s.label(n) == Some(v))).map(|s| s.value).sum()
}

/// One sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Label names and values.
    pub labels: Vec<(String, String)>,
    /// Value.
    pub value: f64,
}

impl Sample {
    /// The value of a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// The samples called exactly `name`.
pub fn samples(text: &str, name: &str) -> impl Iterator<Item = Sample> {
    text.lines().filter_map(move |line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = match rest.strip_prefix('{') {
            Some(rest) => parse_labels(rest)?,
            None => (Vec::new(), rest.strip_prefix(' ')?),
        };
        Some(Sample { labels, value: value.split_whitespace().next()?.parse().ok()? })
    })
}

fn parse_labels(mut text: &str) -> Option<(Vec<(String, String)>, &str)> {
    let mut labels = Vec::new();
    loop {
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, rest) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = rest.char_indices();
        let end = loop {
            match characters.next()? {
                (_, '\\') => match characters.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (at, '"') => break at,
                (_, other) => value.push(other),
            }
        };
        labels.push((name.to_owned(), value));
        text = &rest[end + 1..];
        text = text.strip_prefix(',').unwrap_or(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_by_label() {
        let text =
            "# TYPE a counter\na_total{x=\"1\",y=\"q\\\"}\"} 2\na_total{x=\"2\"} 3 1700000000\nab_total 9\na_total 1\n";
        assert_eq!(sum(text, "a_total", &[]), 6.0);
        assert_eq!(sum(text, "a_total", &[("x", "1")]), 2.0);
        assert_eq!(sum(text, "a_total", &[("y", "q\"}")]), 2.0);
        assert_eq!(sum(text, "a_total", &[("x", "3")]), 0.0);
    }
}
