//! The result as text for a terminal. Pure.

use super::compare::{Basis, Comparison};
use super::plan::{ALL, Measurement};
use super::report::{Figure, Measured, Report, Unit};
use super::stats::Summary;

/// Writes a value as a person reads it.
pub fn show(unit: Unit, value: f64) -> String {
    match unit {
        Unit::BytesPerSecond => scaled(value, 1000.0, &["B/s", "kB/s", "MB/s", "GB/s"]),
        Unit::Bytes => scaled(value, 1024.0, &["B", "KiB", "MiB", "GiB"]),
        Unit::PerSecond => format!("{}/s", thousands(value)),
        Unit::Microseconds if value.abs() >= 1000.0 => format!("{:.2} ms", value / 1000.0),
        Unit::Microseconds => format!("{value:.0} us"),
        Unit::Seconds if value.abs() < 1.0 => format!("{:.0} ms", value * 1000.0),
        Unit::Seconds => format!("{value:.2} s"),
        Unit::CpuPerGb => format!("{value:.3} s/GB"),
        Unit::CpuPer10k => format!("{value:.3} s/10k"),
        Unit::Share => format!("{value:.3}"),
        Unit::PerOperation => format!("{value:.2}/op"),
    }
}

/// With the largest unit that leaves at least 1.
fn scaled(value: f64, step: f64, units: &[&str]) -> String {
    let (mut value, mut units) = (value, units.iter());
    let mut unit = units.next();
    for larger in units {
        if value.abs() < step {
            break;
        }
        value /= step;
        unit = Some(larger);
    }
    let unit = unit.copied().unwrap_or_default();
    let digits = if value.abs() >= 100.0 || unit == "B" { 0 } else { 2 };
    format!("{value:.digits$} {unit}")
}

fn thousands(value: f64) -> String {
    let text = format!("{value:.0}");
    let (sign, digits) = text.strip_prefix('-').map_or(("", text.as_str()), |digits| ("-", digits));
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    format!("{sign}{out}")
}

/// Median, and the spread where there is one.
fn cell(unit: Unit, summary: Option<&Summary>) -> String {
    let Some(summary) = summary else { return "-".to_owned() };
    if summary.runs.len() == 1 {
        return show(unit, summary.median);
    }
    let (median, min, max) = (show(unit, summary.median), show(unit, summary.min), show(unit, summary.max));
    // The unit once, if it is the same.
    let parts = |text: &str| text.find(|c: char| !"0123456789.,-".contains(c)).unwrap_or(text.len());
    let [own, least, most] = [&median, &min, &max].map(|text| text.split_at(parts(text)));
    if own.1 == least.1 && own.1 == most.1 {
        return format!("{median} ({} .. {})", least.0, most.0);
    }
    format!("{median} ({min} .. {max})")
}

/// The whole result.
pub fn report(report: &Report) -> String {
    let (machine, settings) = (&report.machine, &report.settings);
    let mut out = format!(
        "Culvert {} ({}), Linux {}, {} x {}\n{} of {} s each, {}; median (smallest .. largest)\n",
        report.version,
        report.build,
        machine.kernel,
        machine.cpus,
        if machine.cpu_model.is_empty() { &machine.arch } else { &machine.cpu_model },
        if settings.runs == 1 { "1 run".to_owned() } else { format!("{} runs", settings.runs) },
        settings.seconds,
        settings.peer.as_deref().map_or_else(|| format!("mesh: {}", settings.mesh), |peer| format!("peer: {peer}")),
    );
    for measured in &report.measurements {
        out.push_str(&format!("\n{}: {}\n", measured.name, measured.title));
        for failure in &measured.failures {
            out.push_str(&format!("  FAILED: {failure}\n"));
        }
        out.push_str(&figures(measured));
    }
    out
}

fn figures(measured: &Measured) -> String {
    // Memory has no plain side: parts are rows and states columns, by the names `part.kind.state`.
    let (stated, rest): (Vec<&Figure>, Vec<&Figure>) = measured.figures.iter().partition(|f| {
        f.plain.is_none() && f.unit == Unit::Bytes && f.name.rsplit_once('.').is_some_and(|(row, _)| row.contains('.'))
    });
    let mut out = if stated.is_empty() { String::new() } else { columns(&states(&stated)) };
    if !rest.is_empty() {
        let heads = ["", "plain", "mesh", "ratio"].map(str::to_owned).to_vec();
        let row = |f: &&Figure| {
            let ratio = f.ratio.map_or_else(|| "-".to_owned(), |r| format!("{r:.3}"));
            vec![f.name.clone(), cell(f.unit, f.plain.as_ref()), cell(f.unit, f.mesh.as_ref()), ratio]
        };
        out.push_str(&columns(&std::iter::once(heads).chain(rest.iter().map(row)).collect::<Vec<_>>()));
    }
    out
}

/// Rows of figures called `<row>.<column>`.
fn states(figures: &[&Figure]) -> Vec<Vec<String>> {
    let parts = |figure: &Figure| {
        let (row, column) = figure.name.rsplit_once('.').unwrap_or((&figure.name, ""));
        (row.to_owned(), column.to_owned())
    };
    let (mut rows, mut heads): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    for (row, column) in figures.iter().map(|f| parts(f)) {
        if !rows.contains(&row) {
            rows.push(row);
        }
        if !heads.contains(&column) {
            heads.push(column);
        }
    }
    let value = |row: &str, column: &str| {
        let found = figures.iter().find(|f| parts(f) == (row.to_owned(), column.to_owned()));
        found.map_or_else(|| "-".to_owned(), |f| cell(f.unit, f.mesh.as_ref()))
    };
    let body = rows.iter().map(|row| {
        let cells = heads.iter().map(|column| value(row, column));
        std::iter::once(row.clone()).chain(cells).collect()
    });
    let head: Vec<String> = std::iter::once(String::new()).chain(heads.iter().cloned()).collect();
    std::iter::once(head).chain(body).collect()
}

/// Aligns: the first column to the left, the others to the right.
fn columns(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows.first().map_or(0, Vec::len)).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let padded = if at == 0 { format!("  {cell:<width$}") } else { format!("  {cell:>width$}") };
            line.push_str(&padded);
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// A comparison.
pub fn comparison(comparison: &Comparison, tolerance: f64) -> String {
    let heads = ["", "what", "earlier", "now", "change", ""].map(str::to_owned).to_vec();
    let row = |change: &super::compare::Change| {
        let (what, digits) = match change.basis {
            Basis::Ratio => ("ratio", 3),
            Basis::Absolute => ("mesh", 3),
        };
        let share = change.change.map_or_else(|| "new".to_owned(), |c| format!("{:+.1} %", c * 100.0));
        vec![
            format!("{} {}", change.measurement, change.figure),
            what.to_owned(),
            format!("{:.digits$}", change.earlier),
            format!("{:.digits$}", change.now),
            if change.change == Some(0.0) { "none".to_owned() } else { share },
            if change.worse { "WORSE".to_owned() } else { String::new() },
        ]
    };
    let mut out = columns(&std::iter::once(heads).chain(comparison.changes.iter().map(row)).collect::<Vec<_>>());
    for note in &comparison.notes {
        out.push_str(&format!("  note: {note}\n"));
    }
    let worse = comparison.changes.iter().filter(|c| c.worse).count();
    let percent = tolerance * 100.0;
    out.push_str(&match worse {
        0 => format!("No ratio got worse by more than {percent} %.\n"),
        1 => format!("1 ratio got worse by more than {percent} %.\n"),
        more => format!("{more} ratios got worse by more than {percent} %.\n"),
    });
    out
}

/// What `--list` prints.
pub fn list() -> String {
    let row = |m: &Measurement| vec![m.name.to_owned(), m.title.to_owned()];
    let width = ALL.iter().map(|m| m.name.len()).max().unwrap_or(0);
    ALL.iter().map(row).map(|r| format!("{:<width$}  {}\n", r[0], r[1])).collect()
}

#[cfg(test)]
mod tests {
    use super::super::stats::Better;
    use super::*;

    #[test]
    fn values_as_people_read_them() {
        assert_eq!(show(Unit::BytesPerSecond, 1.234e9), "1.23 GB/s");
        assert_eq!(show(Unit::BytesPerSecond, 820e6), "820 MB/s");
        assert_eq!(show(Unit::Bytes, 0.0), "0 B");
        assert_eq!(show(Unit::Bytes, -2048.0), "-2.00 KiB");
        assert_eq!(show(Unit::PerSecond, 1_234_567.4), "1,234,567/s");
        assert_eq!(show(Unit::PerSecond, 999.0), "999/s");
        assert_eq!(show(Unit::Microseconds, 87.4), "87 us");
        assert_eq!(show(Unit::Microseconds, 1870.0), "1.87 ms");
        assert_eq!(show(Unit::Seconds, 0.25), "250 ms");
    }

    #[test]
    fn a_spread_names_its_unit_once_unless_it_changes() {
        let of = |values: &[f64]| cell(Unit::Microseconds, Summary::of(values.to_vec()).as_ref());
        assert_eq!(of(&[5.0]), "5 us");
        assert_eq!(of(&[5.0, 7.0, 6.0]), "6 us (5 .. 7)");
        assert_eq!(of(&[5.0, 1500.0, 6.0]), "6 us (5 us .. 1.50 ms)");
    }

    #[test]
    fn memory_is_a_matrix_and_the_rest_a_list() {
        let of = |values: &[f64]| Summary::of(values.to_vec());
        let memory = |name: &str, value| Figure::new(name, Unit::Bytes, Better::Lower, None, of(&[value]));
        let measured = Measured {
            name: "m".to_owned(),
            title: "t".to_owned(),
            figures: vec![
                memory("proxy.rss.idle", 1024.0),
                memory("proxy.rss.open", 4096.0),
                memory("agents.rss.idle", 2048.0),
                Figure::new("rate", Unit::PerSecond, Better::Higher, of(&[10.0, 20.0, 30.0]), of(&[5.0])),
            ],
            failures: Vec::new(),
        };
        let text = figures(&measured);
        let words: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(words[0], ["idle", "open"]);
        assert_eq!(words[1], ["proxy.rss", "1.00", "KiB", "4.00", "KiB"]);
        assert_eq!(words[2], ["agents.rss", "2.00", "KiB", "-"]);
        assert_eq!(words[4].join(" "), "rate 20/s (10 .. 30) 5/s 0.250");
    }
}
