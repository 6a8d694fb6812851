//! This result against an earlier one. Pure.

use super::report::{Figure, Measured, Report, Settings};
use super::stats;

/// How one figure changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Its measurement.
    pub measurement: String,
    /// Its name.
    pub figure: String,
    /// What was compared, and so what is judged.
    pub basis: Basis,
    /// Then.
    pub earlier: f64,
    /// Now.
    pub now: f64,
    /// The difference as a share of `earlier`; none where that is 0.
    pub change: Option<f64>,
    /// True if it is a ratio that got worse by more than the tolerance.
    pub worse: bool,
}

/// What of a figure is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Basis {
    /// The ratio to plain TCP, which means the same on another day: it is judged.
    Ratio,
    /// The mesh's own median, which depends on the machine: it is shown.
    Absolute,
}

/// All changes, and what cannot be compared.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Comparison {
    /// Figure by figure, in the order of this result.
    pub changes: Vec<Change>,
    /// What makes the two results differ besides the mesh, and figures that only one of them has.
    pub notes: Vec<String>,
}

impl Comparison {
    /// True if no judged figure got worse.
    pub fn holds(&self) -> bool {
        !self.changes.iter().any(|change| change.worse)
    }
}

/// Compares `now` with `earlier`; `tolerance` is a share, 0.1 for a tenth.
pub fn compare(earlier: &Report, now: &Report, tolerance: f64) -> Comparison {
    let mut comparison = Comparison { notes: differences(earlier, now), ..Comparison::default() };
    for measured in &now.measurements {
        match earlier.measurements.iter().find(|e| e.name == measured.name) {
            Some(then) => compare_measured(then, measured, tolerance, &mut comparison),
            None => comparison.notes.push(format!("{}: not in the earlier result", measured.name)),
        }
    }
    comparison
}

fn compare_measured(then: &Measured, now: &Measured, tolerance: f64, comparison: &mut Comparison) {
    for (side, which) in [(then, "the earlier result"), (now, "this one")] {
        if !side.failures.is_empty() {
            comparison.notes.push(format!("{}: failed in {which}", now.name));
        }
    }
    for figure in &now.figures {
        match then.figures.iter().find(|f| f.name == figure.name) {
            Some(earlier) => comparison.changes.extend(change(&now.name, earlier, figure, tolerance)),
            // The failure is noted already.
            None if !then.failures.is_empty() => {}
            None => comparison.notes.push(format!("{} {}: not in the earlier result", now.name, figure.name)),
        }
    }
}

fn change(measurement: &str, earlier: &Figure, now: &Figure, tolerance: f64) -> Option<Change> {
    let medians = || Some((earlier.mesh.as_ref()?.median, now.mesh.as_ref()?.median));
    let (basis, then, new) = match (earlier.ratio, now.ratio) {
        (Some(then), Some(new)) => (Basis::Ratio, then, new),
        _ => medians().map(|(then, new)| (Basis::Absolute, then, new))?,
    };
    Some(Change {
        measurement: measurement.to_owned(),
        figure: now.name.clone(),
        basis,
        earlier: then,
        now: new,
        change: stats::change(then, new),
        worse: basis == Basis::Ratio && stats::worse(now.better, then, new, tolerance),
    })
}

/// What else is not as it was.
fn differences(earlier: &Report, now: &Report) -> Vec<String> {
    let mut notes = Vec::new();
    let mut differ = |what: &str, then: String, new: String| {
        if then != new {
            notes.push(format!("{what}: then {then}, now {new}"));
        }
    };
    differ("build", earlier.build.clone(), now.build.clone());
    differ("kernel", earlier.machine.kernel.clone(), now.machine.kernel.clone());
    differ("processors", earlier.machine.cpus.to_string(), now.machine.cpus.to_string());
    differ("processor", earlier.machine.cpu_model.clone(), now.machine.cpu_model.clone());
    let mesh = |settings: &Settings| settings.peer.clone().unwrap_or_else(|| settings.mesh.clone());
    differ("mesh", mesh(&earlier.settings), mesh(&now.settings));
    differ("runs", earlier.settings.runs.to_string(), now.settings.runs.to_string());
    differ("seconds", earlier.settings.seconds.to_string(), now.settings.seconds.to_string());
    notes
}

#[cfg(test)]
mod tests {
    use super::super::report::{Machine, SCHEMA, Unit};
    use super::super::stats::{Better, Summary};
    use super::*;

    fn figure(name: &str, better: Better, plain: Option<f64>, mesh: f64) -> Figure {
        let of = |value| Summary::of(vec![value]);
        Figure::new(name, Unit::PerSecond, better, plain.and_then(of), of(mesh))
    }

    fn report(figures: Vec<Figure>) -> Report {
        let title = "t".to_owned();
        Report {
            schema: SCHEMA,
            version: "0".to_owned(),
            build: "debug".to_owned(),
            machine: Machine::this(),
            settings: Settings { runs: 1, seconds: 1.0, mesh: "culvert".to_owned(), peer: None },
            measurements: vec![Measured { name: "m".to_owned(), title, figures, failures: Vec::new() }],
        }
    }

    #[test]
    fn nothing_changes_against_itself() {
        let one = report(vec![
            figure("rate", Better::Higher, Some(10.0), 4.0),
            figure("p50", Better::Lower, Some(10.0), 40.0),
            figure("cpu", Better::Lower, None, 3.0),
        ]);
        let comparison = compare(&one, &one, 0.0);
        assert_eq!(comparison.changes.len(), 3);
        assert!(comparison.changes.iter().all(|c| c.change == Some(0.0) && !c.worse), "{comparison:?}");
        assert!(comparison.holds() && comparison.notes.is_empty());
    }

    #[test]
    fn ratios_are_judged_and_absolute_figures_only_shown() {
        let earlier = report(vec![
            figure("rate", Better::Higher, Some(10.0), 5.0),
            figure("p50", Better::Lower, Some(10.0), 20.0),
            figure("cpu", Better::Lower, None, 3.0),
        ]);
        // The machine is twice as slow: no ratio changes.
        let slower = report(vec![
            figure("rate", Better::Higher, Some(5.0), 2.5),
            figure("p50", Better::Lower, Some(20.0), 40.0),
            figure("cpu", Better::Lower, None, 6.0),
        ]);
        assert!(compare(&earlier, &slower, 0.1).holds());
        let worse = report(vec![
            figure("rate", Better::Higher, Some(10.0), 4.0),
            figure("p50", Better::Lower, Some(10.0), 30.0),
            figure("cpu", Better::Lower, None, 30.0),
        ]);
        let comparison = compare(&earlier, &worse, 0.1);
        let found: Vec<_> = comparison.changes.iter().map(|c| (c.figure.as_str(), c.basis, c.worse)).collect();
        assert_eq!(found, [("rate", Basis::Ratio, true), ("p50", Basis::Ratio, true), ("cpu", Basis::Absolute, false)]);
        assert!(!comparison.holds());
        assert!(compare(&earlier, &worse, 0.6).holds(), "within the tolerance");
        assert!(compare(&worse, &earlier, 0.0).holds(), "better is not worse");
    }

    #[test]
    fn what_cannot_be_compared_is_named() {
        let earlier = report(vec![figure("rate", Better::Higher, Some(10.0), 5.0)]);
        let mut now = report(vec![figure("new", Better::Higher, Some(10.0), 5.0)]);
        now.settings.runs = 5;
        now.measurements.push(Measured {
            name: "other".to_owned(),
            title: String::new(),
            figures: Vec::new(),
            failures: Vec::new(),
        });
        let notes = compare(&earlier, &now, 0.1).notes;
        assert_eq!(
            notes,
            ["runs: then 1, now 5", "m new: not in the earlier result", "other: not in the earlier result"]
        );

        let mut failed = report(Vec::new());
        failed.measurements[0].failures.push("12 timeouts".to_owned());
        assert_eq!(compare(&earlier, &failed, 0.1).notes, ["m: failed in this one"]);
        assert_eq!(compare(&failed, &earlier, 0.1).notes, ["m: failed in the earlier result"]);
    }
}
