//! What is printed: tables and marks. What pods say may be hostile, so nothing of it reaches a terminal that could steer it.

use std::fmt::Write as _;
use std::io::IsTerminal as _;

/// Longest cell or message, in characters.
const MAX_CELL: usize = 400;

/// Text that cannot steer a terminal and is not endless: control characters and those that turn the direction of writing
/// around become one replacement character each.
pub fn clean(text: &str) -> String {
    let mut clean: String =
        text.chars().take(MAX_CELL).map(|c| if is_harmful(c) { char::REPLACEMENT_CHARACTER } else { c }).collect();
    if text.chars().nth(MAX_CELL).is_some() {
        clean.push('\u{2026}');
    }
    clean
}

/// [`clean`] for a message of this program: as long as it is.
pub fn clean_line(text: &str) -> String {
    text.chars().map(|c| if is_harmful(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

fn is_harmful(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// JSON for a terminal: what [`clean`] replaces and JSON does not escape by itself is escaped.
///
/// # Errors
/// The value has no JSON form.
pub fn json(value: &impl serde::Serialize) -> serde_json::Result<String> {
    let text = serde_json::to_string_pretty(value)?;
    let mut escaped = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        if c != '\n' && is_harmful(c) {
            // Such a character is always inside a string, and is one UTF-16 unit. Writing to a string does not fail.
            let _ = write!(escaped, "\\u{:04x}", u32::from(c));
        } else {
            escaped.push(c);
        }
    }
    escaped.push('\n');
    Ok(escaped)
}

/// Whether to use colours.
#[derive(Clone, Copy, Debug, Default)]
pub struct Style {
    /// Colours are understood and wanted.
    pub colour: bool,
}

/// How something stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// May be wrong, or could not be found out.
    Doubtful,
    /// Wrong.
    Failed,
}

impl Style {
    /// Colours on a terminal, unless `NO_COLOR` is set to anything.
    pub fn of_stdout() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colour: !refused && std::io::stdout().is_terminal() }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    /// The mark of a verdict.
    pub fn mark(self, verdict: Verdict) -> String {
        match verdict {
            Verdict::Good => self.paint("32", "\u{2713}"),
            Verdict::Doubtful => self.paint("33", "!"),
            Verdict::Failed => self.paint("31", "\u{2717}"),
        }
    }

    /// A heading.
    pub fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }
}

/// A table: columns as wide as their widest cell, the last one open.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|&cell| cell.to_owned()).collect()] }
    }

    /// Adds a row. What is empty is shown as `-`.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells = cells.into_iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { clean(&cell) });
        self.rows.push(cells.collect());
    }

    /// Whether there is no row but the head.
    pub fn is_empty(&self) -> bool {
        self.rows.len() <= 1
    }

    /// As lines of text.
    pub fn render(&self, style: Style) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for (index, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                // Writing to a string does not fail.
                let _ = write!(line, "{cell:width$}  ");
            }
            let line = line.trim_end();
            text += &if index == 0 { style.bold(line) } else { line.to_owned() };
            text.push('\n');
        }
        text
    }
}

/// `1 pod`, `2 pods`.
pub fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pods_say_cannot_steer_a_terminal() {
        assert_eq!(clean("a\u{1b}[2Jb\r\n\u{9b}31m\u{202e}"), "a\u{fffd}[2Jb\u{fffd}\u{fffd}\u{fffd}31m\u{fffd}");
        assert_eq!(clean(&"x".repeat(1000)).chars().count(), MAX_CELL + 1);
        let hostile = "\u{7f}\u{9b}\u{1b}\u{202e}\u{7}";
        let said = json(&serde_json::json!({ "a": hostile })).unwrap();
        assert!(said.chars().all(|c| c == '\n' || !is_harmful(c)), "{said:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&said).unwrap()["a"], hostile, "nothing is lost");
    }

    #[test]
    fn table_is_aligned() {
        let mut table = Table::new(&["NAME", "STATE"]);
        assert!(table.is_empty());
        table.row(["a-long-name".into(), "good".into()]);
        table.row(["\u{e4}".into(), String::new()]);
        let text = table.render(Style::default());
        assert_eq!(text, "NAME         STATE\na-long-name  good\n\u{e4}            -\n");
        assert!(table.render(Style { colour: true }).starts_with("\u{1b}[1mNAME         STATE\u{1b}[0m\n"));
    }
}
