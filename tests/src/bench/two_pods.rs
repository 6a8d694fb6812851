//! What a flood of one pod leaves to another one that shares its worker threads.

use super::plan::{FLOODS, Load, QUIET, Sample, share};
use super::report::{Figure, Unit};
use super::rig::{Rig, Setup, Side};
use super::runner::{Runner, WARM_UP};
use super::stats::{Better, Summary};
use super::{Failure, table};

/// What one side gave in one run beside one flood.
#[derive(Debug, Clone, Copy)]
struct Beside {
    quiet: Sample,
    /// Of the flood; none alone.
    flood: Option<Sample>,
    /// Of what the quiet pod did alone in the same run.
    share: Option<f64>,
}

/// A figure: its name, and its value of what one side gave.
struct FigureOf {
    name: &'static str,
    unit: Unit,
    better: Better,
    value: fn(&Beside) -> Option<f64>,
}

const FIGURES: [FigureOf; 3] = [
    FigureOf { name: "requests", unit: Unit::PerSecond, better: Better::Higher, value: |b| Some(rate(&b.quiet)) },
    FigureOf { name: "p99", unit: Unit::Microseconds, better: Better::Lower, value: |b| Some(b.quiet.p99) },
    FigureOf { name: "share", unit: Unit::Share, better: Better::Higher, value: |b| b.share },
];

fn rate(sample: &Sample) -> f64 {
    sample.operations / sample.seconds
}

/// What a flood got, as its own load counts it.
fn flood(load: Load) -> FigureOf {
    match load {
        Load::Bulk(_) => FigureOf {
            name: "flood",
            unit: Unit::BytesPerSecond,
            better: Better::Higher,
            value: |b| b.flood.map(|flood| flood.bytes / flood.seconds),
        },
        Load::Keepalive(_) | Load::Connections(_) | Load::Short(_) => FigureOf {
            name: "flood",
            unit: Unit::PerSecond,
            better: Better::Higher,
            value: |b| b.flood.as_ref().map(rate),
        },
    }
}

/// Takes the measurement in a cluster of its own.
///
/// # Errors
/// The cluster does not start, or an operation of either pod failed.
pub fn measure(runner: &Runner<'_>) -> Result<Vec<Figure>, Failure> {
    runner.say("  starting a cluster with one worker thread in each proxy");
    let rig = Rig::start(&Setup { workers: Some(1), ..runner.setup.clone() })?;
    let mesh = rig.mesh.as_ref().map(|(side, _)| ("mesh", side));
    let sides: Vec<(&str, &Side)> = std::iter::once(("plain", &rig.plain)).chain(mesh).collect();
    for (name, side) in &sides {
        side.run(QUIET, WARM_UP).map_err(|f| f.of(&format!("{name}, warming up")))?;
    }
    // By side, then by run, then by flood.
    let mut taken = vec![Vec::new(); sides.len()];
    for run in 0..runner.runs {
        for ((name, side), taken) in sides.iter().zip(&mut taken) {
            taken.push(one_run(runner, side, &format!("{name}, run {} of {}", run + 1, runner.runs))?);
        }
    }
    let of = |side: usize, beside: usize, value: fn(&Beside) -> Option<f64>| {
        let values = taken.get(side)?.iter().map(|run| value(run.get(beside)?)).collect::<Option<Vec<_>>>()?;
        Summary::of(values)
    };
    let figures = FLOODS.into_iter().enumerate().flat_map(|(beside, (name, load))| {
        FIGURES.into_iter().chain(load.map(flood)).filter_map(move |figure| {
            let (plain, mesh) = (of(0, beside, figure.value), of(1, beside, figure.value));
            let name = format!("{name}.{}", figure.name);
            (plain.is_some() || mesh.is_some()).then(|| Figure::new(&name, figure.unit, figure.better, plain, mesh))
        })
    });
    Ok(figures.collect())
}

fn one_run(runner: &Runner<'_>, side: &Side, at: &str) -> Result<Vec<Beside>, Failure> {
    let mut taken: Vec<Beside> = Vec::new();
    for (name, load) in FLOODS {
        if runner.stopped() {
            return Err(Failure::Interrupted);
        }
        let failed = |f: Failure| f.of(&format!("{at}, {name}"));
        let (quiet, flood) = match load {
            None => (side.run(QUIET, runner.seconds).map_err(failed)?, None),
            Some(load) => {
                let (quiet, flood) = side.beside(load, runner.seconds).map_err(failed)?;
                (quiet, Some(flood))
            }
        };
        let share = flood.and_then(|_| share(taken.first().map(|alone| &alone.quiet), &quiet));
        taken.push(Beside { quiet, flood, share });
        let show = |unit, value| table::show(unit, value);
        let (requests, p99) = (show(Unit::PerSecond, rate(&quiet)), show(Unit::Microseconds, quiet.p99));
        runner.say(&format!("  {at}, {name}: requests {requests}, p99 {p99}"));
    }
    Ok(taken)
}
