//! The result of a bench as it is kept: the JSON described in [`super`].

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::stats::{self, Better, Summary};

/// Version of the JSON.
pub const SCHEMA: u32 = 1;

/// A whole bench.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Version of Culvert.
    pub version: String,
    /// `release` or `debug`; only the first is worth comparing.
    pub build: String,
    /// Where it ran.
    pub machine: Machine,
    /// How it ran.
    pub settings: Settings,
    /// What was measured.
    pub measurements: Vec<Measured>,
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Release of the kernel.
    pub kernel: String,
    /// Architecture.
    pub arch: String,
    /// Processors that the bench may use.
    pub cpus: usize,
    /// What the processors call themselves; empty if the kernel does not say.
    pub cpu_model: String,
    /// Bytes of memory.
    pub memory: u64,
}

/// How the bench ran.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Runs of each measurement.
    pub runs: usize,
    /// Seconds of each run of a load.
    pub seconds: f64,
    /// `culvert`, `peer` or `off`.
    pub mesh: String,
    /// The peer's command.
    pub peer: Option<String>,
}

/// One measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Its name.
    pub name: String,
    /// What it does.
    pub title: String,
    /// Its figures; none if it failed.
    pub figures: Vec<Figure>,
    /// Why it failed; empty if it did not.
    pub failures: Vec<String>,
}

/// One figure of a measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Its name.
    pub name: String,
    /// What its values are counted in.
    pub unit: Unit,
    /// Which way it is good.
    pub better: Better,
    /// Without the mesh; none where the figure is about the mesh's own programs.
    pub plain: Option<Summary>,
    /// With the mesh; none if only plain TCP was measured.
    pub mesh: Option<Summary>,
    /// `mesh.median / plain.median`.
    pub ratio: Option<f64>,
}

impl Figure {
    /// A figure with its ratio.
    pub fn new(name: &str, unit: Unit, better: Better, plain: Option<Summary>, mesh: Option<Summary>) -> Self {
        let ratio = stats::ratio(plain.as_ref(), mesh.as_ref());
        Self { name: name.to_owned(), unit, better, plain, mesh, ratio }
    }
}

/// What a figure is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Bytes per second.
    #[serde(rename = "bytes/s")]
    BytesPerSecond,
    /// Operations per second.
    #[serde(rename = "1/s")]
    PerSecond,
    /// Microseconds.
    #[serde(rename = "us")]
    Microseconds,
    /// Seconds.
    #[serde(rename = "s")]
    Seconds,
    /// Seconds of processor time for 10^9 bytes.
    #[serde(rename = "cpu-s/GB")]
    CpuPerGb,
    /// Seconds of processor time for 10,000 operations.
    #[serde(rename = "cpu-s/10000")]
    CpuPer10k,
    /// A number of things for each operation.
    #[serde(rename = "1/op")]
    PerOperation,
    /// A share of another figure.
    #[serde(rename = "share")]
    Share,
    /// Bytes.
    #[serde(rename = "bytes")]
    Bytes,
}

/// Why an earlier result cannot be used, or this one not be kept.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The file.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// What is in it.
    #[error("{}: not the result of a bench: {source}", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// The parser's words.
        source: serde_json::Error,
    },
    /// Another version of the JSON.
    #[error("{}: its schema is {found}, this bench reads {SCHEMA}; measure again", path.display())]
    Schema {
        /// Which file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
}

impl Report {
    /// Reads a result.
    ///
    /// # Errors
    /// No such file, or not a result of this schema.
    pub fn read(path: &Path) -> Result<Self, ReportError> {
        #[derive(Deserialize)]
        struct Versioned {
            schema: u32,
        }
        let format = |source| ReportError::Format { path: path.to_owned(), source };
        let text =
            std::fs::read_to_string(path).map_err(|source| ReportError::File { path: path.to_owned(), source })?;
        let Versioned { schema: found } = serde_json::from_str(&text).map_err(format)?;
        if found != SCHEMA {
            return Err(ReportError::Schema { path: path.to_owned(), found });
        }
        serde_json::from_str(&text).map_err(format)
    }

    /// Writes it, replacing the file as a whole.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), ReportError> {
        let text = serde_json::to_string_pretty(self);
        let text = text.map_err(|source| ReportError::Format { path: path.to_owned(), source })? + "\n";
        let file = |source| ReportError::File { path: path.to_owned(), source };
        // A name of its own beside it: the file is the old or the new one, also for those who read it meanwhile.
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let new = path.with_file_name(name);
        std::fs::write(&new, text).map_err(file)?;
        std::fs::rename(&new, path).map_err(file)
    }

    /// True if everything that was to be measured was.
    pub fn complete(&self) -> bool {
        self.measurements.iter().all(|m| m.failures.is_empty())
    }
}

impl Machine {
    /// This one.
    pub fn this() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let value = text.lines().find_map(|l| l.strip_prefix(name)?.trim_start().strip_prefix(':'));
            value.unwrap_or_default().trim().to_owned()
        };
        let kib = field(&read("/proc/meminfo"), "MemTotal");
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu_model: field(&read("/proc/cpuinfo"), "model name"),
            memory: kib.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or_default() * 1024,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_other_schemas_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bench.json");
        let settings = Settings { runs: 1, seconds: 1.0, mesh: "culvert".to_owned(), peer: None };
        let figure = Figure::new("x", Unit::CpuPerGb, Better::Lower, Summary::of(vec![2.0]), Summary::of(vec![3.0]));
        assert_eq!(figure.ratio, Some(1.5));
        let measured =
            Measured { name: "m".to_owned(), title: "t".to_owned(), figures: vec![figure], failures: Vec::new() };
        let mut report = Report {
            schema: SCHEMA,
            version: "0".to_owned(),
            build: "debug".to_owned(),
            machine: Machine::this(),
            settings,
            measurements: vec![measured],
        };
        assert!(report.machine.cpus > 0 && report.machine.memory > 0 && !report.machine.kernel.is_empty());
        report.write(&path).unwrap();
        assert_eq!(Report::read(&path).unwrap(), report);
        assert!(std::fs::read_to_string(&path).unwrap().contains("\"cpu-s/GB\""));

        report.schema = 999;
        report.write(&path).unwrap();
        assert!(matches!(Report::read(&path), Err(ReportError::Schema { found: 999, .. })));
        std::fs::write(&path, "{}").unwrap();
        assert!(matches!(Report::read(&path), Err(ReportError::Format { .. })));
        assert!(matches!(Report::read(&folder.path().join("none")), Err(ReportError::File { .. })));
    }
}
