//! What the demo prints.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

use super::Format;
use super::checks::Summary;
use super::talkers::Talk;
use crate::prerequisites::Missing;

/// Says what is going on: on standard output, or on standard error if that is for JSON.
pub(super) struct Progress {
    format: Format,
}

impl Progress {
    pub(super) fn new(format: Format) -> Self {
        Self { format }
    }

    pub(super) fn step(&self, text: &str) {
        match self.format {
            Format::Table => println!("· {text}"),
            Format::Json => eprintln!("· {text}"),
        }
    }

    pub(super) fn error(&self, text: &str) {
        eprintln!("error: {text}");
        if self.format == Format::Json {
            println!("{}", serde_json::json!({"ok": false, "error": text}));
        }
    }

    pub(super) fn missing(&self, missing: &[Missing]) {
        eprintln!("The demo needs more than this machine has:");
        for one in missing {
            eprintln!("  {}\n      {}", one.what, one.remedy);
        }
        if self.format == Format::Json {
            println!("{}", serde_json::json!({"ok": false, "missing": missing}));
        }
    }
}

pub(super) fn json(summary: &Summary) {
    match serde_json::to_string_pretty(summary) {
        Ok(text) => println!("{text}"),
        Err(error) => eprintln!("error: {error}"),
    }
}

pub(super) fn summary(summary: &Summary) {
    println!("\nWho talked to whom");
    talks(&summary.talks);
    println!("\n{} page requests in {:.1} s", summary.requests, summary.seconds);
    for check in &summary.checks {
        println!("  {}  {} ({})", if check.ok { "ok    " } else { "FAILED" }, check.what, check.detail);
    }
    println!("\n{}", if summary.ok { "All good." } else { "Not all is as it should be; the ends of the logs follow." });
}

pub(super) fn talks(talks: &[Talk]) {
    let rows: Vec<[String; 5]> = talks
        .iter()
        .map(|t| {
            let identity = |id: &str| if id == "unknown" { "-".to_owned() } else { id.to_owned() };
            [
                format!("{} → {}", t.source, t.destination),
                identity(&t.source_identity),
                identity(&t.destination_identity),
                if t.mutual_tls { "mutual TLS".to_owned() } else { "plaintext".to_owned() },
                format!(
                    "{} connection{}, {}",
                    t.connections,
                    if t.connections == 1.0 { "" } else { "s" },
                    amount(t.bytes)
                ),
            ]
        })
        .collect();
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        println!("  {}", cells.join("  ").trim_end());
    }
}

fn amount(bytes: f64) -> String {
    match bytes {
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b if b >= 1e3 => format!("{:.1} kB", b / 1e3),
        b => format!("{b} B"),
    }
}

pub(super) fn line(text: &str) {
    println!("{text}");
}

pub(super) fn logs(text: &str) {
    eprintln!("{text}");
}
