//! Takes measurements: one loop for all of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use super::memory::Known;
use super::mesh_usage::Parts;
use super::plan::{FigureOf, Kind, Load, Measurement, Sample};
use super::report::{Figure, Measured, Unit};
use super::rig::{Rig, Setup, Side};
use super::stats::{Better, Summary};
use super::{Failure, memory, table, two_pods};
use crate::cluster::Mesh;

/// Slices of a minute, and the seconds of each.
const SLICES: usize = 6;
const SLICE: f64 = 10.0;

/// Seconds of the load before the first run: tunnels, certificates and caches are there by then.
pub const WARM_UP: f64 = 0.3;

/// How to measure.
#[derive(Debug)]
pub struct Runner<'a> {
    /// The cluster to be made.
    pub setup: &'a Setup,
    /// Runs of each measurement.
    pub runs: usize,
    /// Seconds of each run of a load.
    pub seconds: f64,
    /// Set when the user wants it to end.
    pub stop: &'a AtomicBool,
    /// Told what is being done.
    pub progress: fn(&str),
}

/// Values of each figure of one side, in the order of the figures, and within it of the runs.
type Values = Vec<Vec<Option<f64>>>;

impl Runner<'_> {
    /// Takes all of these. What fails is in the result, and the next is taken.
    pub fn all(&self, measurements: &[&'static Measurement]) -> Vec<Measured> {
        let mut rig = None;
        let measured = measurements.iter().filter(|_| !self.stopped()).map(|measurement| {
            self.say(&format!("{}: {}", measurement.name, measurement.title));
            let done = match measurement.kind {
                Kind::Load(load) => self.load(load, &mut rig),
                Kind::Minute(load) => self.minute(load, &mut rig),
                Kind::TwoPods => {
                    rig = None;
                    two_pods::measure(self)
                }
                Kind::OpenConnections(count) => {
                    rig = None;
                    self.memory(|| memory::open_connections(self.setup, count))
                }
                Kind::Workloads(count) => {
                    rig = None;
                    self.memory(|| memory::workloads(self.setup, count, Known::Everything))
                }
                Kind::OnDemand(count) => {
                    rig = None;
                    self.memory(|| memory::workloads(self.setup, count, Known::Used))
                }
            };
            let (figures, failures) = match done {
                Ok(figures) => (figures, Vec::new()),
                Err(failure) => {
                    self.say(&format!("  FAILED: {failure}"));
                    // What a failed load left behind must not disturb the next.
                    rig = None;
                    (Vec::new(), vec![failure.to_string()])
                }
            };
            Measured { name: measurement.name.to_owned(), title: measurement.title.to_owned(), figures, failures }
        });
        measured.collect()
    }

    /// Tells the user.
    pub fn say(&self, text: &str) {
        (self.progress)(text);
    }

    /// Whether the user wants it to end.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn load(&self, load: Load, rig: &mut Option<Rig>) -> Result<Vec<Figure>, Failure> {
        let rig = match rig {
            Some(rig) => rig,
            None => {
                self.say("  starting a cluster");
                rig.insert(Rig::start(self.setup)?)
            }
        };
        let figures = load.figures();
        let (mut plain, mut mesh): (Values, Values) =
            (vec![Vec::new(); figures.len()], vec![Vec::new(); figures.len()]);
        rig.plain.run(load, WARM_UP).map_err(|f| f.of("plain, warming up"))?;
        if let Some((side, _)) = &rig.mesh {
            side.run(load, WARM_UP).map_err(|f| f.of("mesh, warming up"))?;
        }
        for run in 0..self.runs {
            // In turn, and who is first changes, so that a machine that slows down slows both.
            for plain_now in [run % 2 == 0, run % 2 != 0] {
                if self.stopped() {
                    return Err(Failure::Interrupted);
                }
                let at = |side: &str| format!("{side}, run {} of {}", run + 1, self.runs);
                if plain_now {
                    let sample = rig.plain.run(load, self.seconds).map_err(|f| f.of(&at("plain")))?;
                    self.note(&at("plain"), figures, &sample, &mut plain);
                } else if let Some((side, parts)) = &rig.mesh {
                    let sample = costed(side, parts, load, self.seconds).map_err(|f| f.of(&at("mesh")))?;
                    self.note(&at("mesh"), figures, &sample, &mut mesh);
                }
            }
        }
        Ok(summaries(figures, plain, mesh))
    }

    /// A minute of the load on either side, once: the rate of each slice.
    fn minute(&self, load: Load, rig: &mut Option<Rig>) -> Result<Vec<Figure>, Failure> {
        let rig = match rig {
            Some(rig) => rig,
            None => {
                self.say("  starting a cluster");
                rig.insert(Rig::start(self.setup)?)
            }
        };
        let mesh = rig.mesh.as_ref().map(|(side, _)| ("mesh", side));
        let mut rates: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for (name, side) in std::iter::once(("plain", &rig.plain)).chain(mesh) {
            for slice in 1..=SLICES {
                if self.stopped() {
                    return Err(Failure::Interrupted);
                }
                let at = format!("{name}, slice {slice} of {SLICES}");
                let sample = side.run(load, SLICE).map_err(|f| f.of(&at))?;
                let rate = sample.operations / sample.seconds;
                self.say(&format!("  {at}: connections {}", table::show(Unit::PerSecond, rate)));
                rates.entry(name).or_default().push(rate);
            }
        }
        let of = |name: &str, slice: usize| Summary::of(vec![*rates.get(name)?.get(slice)?]);
        let slices = (0..SLICES).map(|slice| {
            let (plain, mesh) = (of("plain", slice), of("mesh", slice));
            Figure::new(&format!("slice-{}", slice + 1), Unit::PerSecond, Better::Higher, plain, mesh)
        });
        Ok(slices.collect())
    }

    fn note(&self, at: &str, figures: &[FigureOf], sample: &Sample, values: &mut Values) {
        for (figure, values) in figures.iter().zip(values.iter_mut()) {
            values.push((figure.value)(sample));
        }
        let shown =
            figures.iter().filter_map(|f| Some(format!("{} {}", f.name, table::show(f.unit, (f.value)(sample)?))));
        self.say(&format!("  {at}: {}", shown.collect::<Vec<_>>().join(", ")));
    }

    fn memory(&self, take: impl Fn() -> Result<Vec<memory::Taken>, Failure>) -> Result<Vec<Figure>, Failure> {
        if self.setup.mesh == Mesh::Off {
            return Err(Failure::NoMesh);
        }
        let mut names = Vec::new();
        let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for run in 0..self.runs {
            if self.stopped() {
                return Err(Failure::Interrupted);
            }
            let at = format!("run {} of {}", run + 1, self.runs);
            let taken = take().map_err(|f| f.of(&at))?;
            let resident = taken.iter().filter(|v| v.name.contains(".rss."));
            let shown: Vec<_> = resident
                .map(|v| format!("{} {}", v.name.replace(".rss.", " "), table::show(v.unit, v.value)))
                .collect();
            self.say(&format!("  {at}: resident: {}", shown.join(", ")));
            for value in taken {
                let of = values.entry(value.name.clone()).or_default();
                if of.is_empty() {
                    names.push((value.name, value.unit));
                }
                of.push(value.value);
            }
        }
        let figure = |(name, unit): (String, _)| {
            // A figure that is missing from one run, because a file could not be read, has no median.
            let of = values.remove(&name).filter(|of| of.len() == self.runs).and_then(Summary::of)?;
            Some(Figure::new(&name, unit, Better::Lower, None, Some(of)))
        };
        Ok(names.into_iter().filter_map(figure).collect())
    }
}

/// A run with what it cost the mesh.
fn costed(side: &Side, parts: &Parts, load: Load, seconds: f64) -> Result<Sample, Failure> {
    let before = parts.used();
    let sample = side.run(load, seconds)?;
    Ok(Sample { cost: Some(parts.used().since(before)), ..sample })
}

/// A figure per definition; one that no side has a value of is left out.
fn summaries(figures: &[FigureOf], plain: Values, mesh: Values) -> Vec<Figure> {
    // One run without a value leaves nothing to take the median of.
    let summary = |values: Vec<Option<f64>>| values.into_iter().collect::<Option<Vec<_>>>().and_then(Summary::of);
    let all = figures.iter().zip(plain.into_iter().zip(mesh));
    let figure = |(of, (plain, mesh)): (&FigureOf, (_, _))| {
        let (plain, mesh) = (summary(plain), summary(mesh));
        (plain.is_some() || mesh.is_some()).then(|| Figure::new(of.name, of.unit, of.better, plain, mesh))
    };
    all.filter_map(figure).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_without_a_value_on_any_side_are_left_out() {
        let figures = Load::Bulk(1).figures();
        let plain = vec![vec![Some(10.0), Some(20.0)], vec![None, None], vec![None, None]];
        let mesh = vec![vec![Some(5.0), Some(5.0)], vec![Some(1.0), Some(3.0)], vec![None, Some(1.0)]];
        let found = summaries(figures, plain, mesh);
        assert_eq!(found.len(), 2, "no median of the agents: one run lacks it");
        assert_eq!((found[0].name.as_str(), found[0].ratio), ("throughput", Some(5.0 / 15.0)));
        assert_eq!((found[1].plain.is_none(), found[1].mesh.as_ref().map(|m| m.median)), (true, Some(2.0)));
    }
}
