//! Debian's packages without Debian's state: lists and downloads of our own in the cache folder, so that nothing of the
//! system's is read or changed but where its packages come from (proxies, the clock that is not to be trusted).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::Failure;

/// The suites that are used, oldest first.
const SUITES: &str = "bookworm trixie trixie-backports sid";
/// What Debian signs its lists with.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// How old the lists may be before they are asked for again.
const FRESH: Duration = Duration::from_hours(24);

/// Access to Debian's packages.
pub struct Debian {
    folder: PathBuf,
    /// Held while the value lives: two tasks do not write the same lists.
    _lock: fs::File,
}

/// A kernel that can be had.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Name of its package.
    pub package: String,
    /// Version of its package, e.g. `6.12.107-1`.
    pub version: String,
    /// Suite that has it.
    pub suite: String,
}

impl Kernel {
    /// What `uname -r` says in it.
    pub fn release(&self) -> &str {
        self.package.strip_prefix("linux-image-").unwrap_or(&self.package)
    }

    /// The numbers in its version, for sorting.
    fn numbers(&self) -> Vec<u64> {
        self.version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    }

    /// Whether `asked` is this version or a beginning of it: `6.1` is `6.1.176-1`, not `6.12.94-1`.
    pub fn is(&self, asked: &str) -> bool {
        self.version.strip_prefix(asked).is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
    }
}

impl Debian {
    /// Packages of an architecture (as Debian calls it). Brings the lists up to date where they are older than a day.
    /// Without a network old lists will do.
    ///
    /// # Errors
    /// This is not a machine with apt and Debian's keys, or there are no lists.
    pub fn open(cache: &Path, architecture: &str) -> Result<Self, Failure> {
        if !Path::new(KEYRING).exists() {
            return Err(Failure(format!("there is no {KEYRING}: `apt-get install debian-archive-keyring`")));
        }
        let folder = cache.join(format!("apt-{architecture}"));
        for part in ["state/lists/partial", "cache/archives/partial", "none"] {
            fs::create_dir_all(folder.join(part)).map_err(|error| failed(&folder, &error))?;
        }
        let lock = fs::File::create(folder.join("lock")).map_err(|error| failed(&folder, &error))?;
        lock.lock().map_err(|error| failed(&folder, &error))?;
        let debian = Self { folder, _lock: lock };
        debian.configure(architecture)?;
        debian.update()?;
        Ok(debian)
    }

    fn configure(&self, architecture: &str) -> Result<(), Failure> {
        let write = |name: &str, text: String| {
            fs::write(self.folder.join(name), text).map_err(|error| failed(&self.folder.join(name), &error))
        };
        let sources = format!(
            "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: {SUITES}\nComponents: main\nArchitectures: {architecture}\n\
             Signed-By: {KEYRING}\n"
        );
        write("debian.sources", sources)?;
        write("status", String::new())?;
        let at = |name: &str| self.folder.join(name).display().to_string();
        let mut config = String::new();
        for (name, value) in [
            ("Dir::State", at("state")),
            ("Dir::State::status", at("status")),
            ("Dir::Cache", at("cache")),
            ("Dir::Etc::main", at("none/main")),
            ("Dir::Etc::parts", at("none")),
            ("Dir::Etc::preferences", at("none/preferences")),
            ("Dir::Etc::preferencesparts", at("none")),
            ("Dir::Etc::sourcelist", at("debian.sources")),
            ("Dir::Etc::sourceparts", at("none")),
            ("Dir::Cache::srcpkgcache", String::new()),
            ("Acquire::GzipIndexes", "true".to_owned()),
            ("Acquire::Languages", "none".to_owned()),
            ("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false".to_owned()),
            ("APT::Architecture", architecture.to_owned()),
            ("APT::Sandbox::User", "root".to_owned()),
        ] {
            config += &format!("{name} \"{value}\";\n");
        }
        // How this machine reaches a mirror is its own affair.
        let system = output(Command::new("apt-config").args(["dump", "Acquire"]))?;
        let kept = ["Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries"];
        for line in system.lines().filter(|line| kept.iter().any(|start| line.starts_with(start))) {
            config += line;
            config.push('\n');
        }
        write("apt.conf", config)
    }

    fn update(&self) -> Result<(), Failure> {
        let stamp = self.folder.join(format!("updated-{}", SUITES.replace(' ', "-")));
        let changed = fs::metadata(&stamp).and_then(|found| found.modified()).ok();
        let age = changed.and_then(|changed| SystemTime::now().duration_since(changed).ok());
        if age.is_some_and(|age| age < FRESH) {
            return Ok(());
        }
        println!("reading Debian's lists of packages");
        match output(self.command("apt-get").args(["-q", "-o", "APT::Update::Error-Mode=any", "update"])) {
            Ok(_) => fs::write(&stamp, "").map_err(|error| failed(&stamp, &error)),
            Err(Failure(why)) if age.is_some() => {
                println!("the lists stay as they are: {why}");
                Ok(())
            }
            Err(why) => Err(why),
        }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.folder.join("apt.conf")).env("LC_ALL", "C");
        command
    }

    /// The kernels for virtual machines that can be had, oldest first.
    ///
    /// # Errors
    /// apt fails.
    pub fn kernels(&self) -> Result<Vec<Kernel>, Failure> {
        let pattern = "^linux-image-[0-9].*-cloud-amd64$";
        let found = output(self.command("apt-cache").args(["search", "--names-only", pattern]))?;
        let names = found.lines().filter_map(|line| line.split(' ').next());
        let listed = output(self.command("apt-cache").arg("madison").args(names))?;
        let mut kernels: Vec<Kernel> = listed.lines().filter_map(kernel).collect();
        kernels.sort_by_key(Kernel::numbers);
        Ok(kernels)
    }

    /// The packages that make up a kernel, each with its version, and the hash of what is in them.
    ///
    /// # Errors
    /// apt fails.
    pub fn parts(&self, kernel: &Kernel) -> Result<(Vec<String>, String), Failure> {
        let image = format!("{}={}", kernel.package, kernel.version);
        let shown = output(self.command("apt-cache").args(["show", &image]))?;
        // From 6.19 on the image is a package of its own, the modules another.
        let needed = field(&shown, "Depends").unwrap_or_default().split([',', '|']);
        let needed = needed.filter_map(|part| part.split_whitespace().next());
        let kinds = ["linux-binary-", "linux-modules-", "linux-base-"];
        let mut parts = vec![image];
        parts.extend(
            needed
                .filter(|name| kinds.iter().any(|kind| name.starts_with(kind)))
                .map(|name| format!("{name}={}", kernel.version)),
        );
        let shown = output(self.command("apt-cache").arg("show").args(&parts))?;
        let hashes: Vec<&str> = shown.lines().filter_map(|line| line.strip_prefix("SHA256: ")).collect();
        if hashes.len() != parts.len() {
            return Err(Failure(format!("apt knows {} of {parts:?}", hashes.len())));
        }
        Ok((parts, hashes.concat()))
    }

    /// Downloads packages and unpacks them into `into`. apt compares them with the signed lists.
    ///
    /// # Errors
    /// A package cannot be had or unpacked.
    pub fn unpack(&self, packages: &[String], into: &Path) -> Result<(), Failure> {
        let scratch = self.folder.join("download");
        clean(&scratch)?;
        output(self.command("apt-get").args(["-q", "download"]).args(packages).current_dir(&scratch))?;
        unpack_all(&scratch, into)?;
        clean(&scratch)
    }

    /// Packages of one suite with all that they need, named exactly.
    ///
    /// # Errors
    /// apt fails.
    pub fn set(&self, suite: &str, packages: &[&str]) -> Result<String, Failure> {
        let planned = output(self.install(suite).arg("--simulate").args(packages))?;
        Ok(planned.lines().filter(|line| line.starts_with("Inst ")).collect::<Vec<_>>().join("\n"))
    }

    /// Downloads packages of one suite with all that they need, libc included, and unpacks them.
    ///
    /// # Errors
    /// A package cannot be had or unpacked.
    pub fn unpack_set(&self, suite: &str, packages: &[&str], into: &Path) -> Result<(), Failure> {
        let scratch = self.folder.join("cache/archives");
        clean(&scratch.join("partial"))?;
        output(self.install(suite).arg("--download-only").args(packages))?;
        unpack_all(&scratch, into)?;
        clean(&scratch)
    }

    fn install(&self, suite: &str) -> Command {
        let mut command = self.command("apt-get");
        command.args(["install", "-q", "--yes", "--no-install-recommends", "--target-release", suite]);
        command
    }
}

/// A line of `apt-cache madison`: package, version, where it is.
fn kernel(line: &str) -> Option<Kernel> {
    let mut columns = line.split('|').map(str::trim);
    let (package, version, place) = (columns.next()?, columns.next()?, columns.next()?);
    let suite = place.split_whitespace().nth(1)?.split('/').next()?;
    Some(Kernel { package: package.to_owned(), version: version.to_owned(), suite: suite.to_owned() })
}

fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

fn unpack_all(folder: &Path, into: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(folder).map_err(|error| failed(folder, &error))? {
        let package = entry.map_err(|error| failed(folder, &error))?.path();
        if package.extension().is_some_and(|end| end == "deb") {
            output(Command::new("dpkg-deb").arg("-x").arg(&package).arg(into))?;
        }
    }
    Ok(())
}

/// An empty folder.
pub fn clean(folder: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed(folder, &error)),
        _ => fs::create_dir_all(folder).map_err(|error| failed(folder, &error)),
    }
}

/// The standard output of a command, if it succeeds.
pub fn output(command: &mut Command) -> Result<String, Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command.output().map_err(|error| Failure(format!("{program}: {error}")))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let why = String::from_utf8_lossy(&done.stderr);
    Err(Failure(format!("{program}: {}: {}", done.status, why.trim())))
}

/// What failed at a path.
pub fn failed(path: &Path, error: &std::io::Error) -> Failure {
    Failure(format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_sorted_and_matched() {
        let line = "linux-image-6.12.107+deb13-cloud-amd64 | 6.12.107-1 | http://deb.debian.org/debian trixie/main amd64 Packages";
        let found = kernel(line).unwrap();
        assert_eq!((found.release(), found.suite.as_str()), ("6.12.107+deb13-cloud-amd64", "trixie"));
        assert!(found.is("6.12") && found.is("6.12.107") && found.is("6"));
        assert!(!found.is("6.1") && !found.is("6.12.10"));
        let older = Kernel { version: "6.12.94-1".to_owned(), ..found.clone() };
        assert!(older.numbers() < found.numbers());
        assert!(kernel("N: Unable to locate package").is_none());
    }
}
