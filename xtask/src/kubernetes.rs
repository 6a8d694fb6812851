//! The programs of a real Kubernetes cluster, for tests and for `cargo xtask cluster`: built once with Go from published
//! modules whose hashes are committed (`tests/kubernetes/go.sum`), and kept in the cache folder. Two that cannot be built
//! with Go alone come from Debian.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::kernel::debian::{Debian, KEYRING, clean, failed, output};
use crate::kernel::store::short;
use crate::{Failure, cache};

/// Names the folder, for the programs that use it; if the caller sets it nothing is built.
pub const VARIABLE: &str = "KUBERNETES_BIN_DIR";

/// Folders with a `go.mod` of their own.
const KUBERNETES: &str = "tests/kubernetes";
const NODE: &str = "tests/kubernetes/node";

/// Filesystems of containerd that need C libraries are left out.
const TAGS: &str = "no_btrfs no_devmapper no_zfs";

/// Built together: what they are called, and the package that each is built from.
struct Set {
    folder: &'static str,
    what: &'static str,
    flags: &'static str,
    packages: &'static [(&'static str, &'static str)],
}

const SETS: &[Set] = &[
    Set { folder: KUBERNETES, what: "etcd", flags: "-s -w", packages: &[("etcd", "go.etcd.io/etcd/server/v3")] },
    Set {
        folder: KUBERNETES,
        what: "Kubernetes 1.36.2",
        // What the nodes' objects and `kubectl version` say.
        flags: "-s -w -X k8s.io/component-base/version.gitVersion=v1.36.2 -X k8s.io/component-base/version.gitMajor=1 \
                -X k8s.io/component-base/version.gitMinor=36 -X k8s.io/component-base/version.gitTreeState=clean",
        packages: &[
            ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
            ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
            ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
            ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
            ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
            ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        ],
    },
    Set {
        folder: NODE,
        what: "containerd and CNI plugins",
        flags: "-s -w -X github.com/containerd/containerd/v2/version.Version=v2.4.2",
        packages: &[
            ("containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
            ("containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"),
            ("ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
            ("host-local", "github.com/containernetworking/plugins/plugins/ipam/host-local"),
            ("portmap", "github.com/containernetworking/plugins/plugins/meta/portmap"),
            ("ptp", "github.com/containernetworking/plugins/plugins/main/ptp"),
        ],
    },
];

/// runc is linked with libseccomp and nft with its own libraries: packages of the oldest suite, whose libc every machine has.
const SUITE: &str = "bookworm";
const PACKAGES: [&str; 2] = ["runc", "nftables"];

/// The folder of the programs: that of `KUBERNETES_BIN_DIR`, or one in the cache folder that is filled first (10 minutes on
/// two cores, once).
///
/// # Errors
/// No Go, no network, or a build that failed.
pub fn programs(root: &Path) -> Result<PathBuf, Failure> {
    let (folder, there) = place(root)?;
    if there {
        return Ok(folder);
    }
    go(root)?;
    println!("building the programs of a Kubernetes cluster into {} (once, some minutes)", folder.display());
    // Two tasks do not build the same.
    let scratch = cache().join("kubernetes.new");
    fs::create_dir_all(cache()).map_err(|error| failed(&cache(), &error))?;
    let lock = cache().join("kubernetes.lock");
    let lock = fs::File::create(&lock).map_err(|error| failed(&lock, &error))?;
    lock.lock().map_err(|error| failed(&scratch, &error))?;
    if folder.exists() {
        return Ok(folder);
    }
    clean(&scratch)?;
    for set in SETS {
        build(root, set, &scratch)?;
    }
    from_debian(&scratch)?;
    fs::rename(&scratch, &folder).map_err(|error| failed(&folder, &error))?;
    Ok(folder)
}

/// As [`programs`], if they are there: nothing is built.
///
/// # Errors
/// The checkout cannot be read.
pub fn existing(root: &Path) -> Result<Option<PathBuf>, Failure> {
    let (folder, there) = place(root)?;
    Ok(there.then_some(folder))
}

/// The folder of the programs, and whether it is there. That in the cache is named after all that goes into it.
fn place(root: &Path) -> Result<(PathBuf, bool), Failure> {
    if let Some(folder) = std::env::var_os(VARIABLE) {
        return Ok((folder.into(), true));
    }
    let mut recipe = format!("{TAGS}{SUITE}{PACKAGES:?}{}{}", std::env::consts::ARCH, nft_script("", ""));
    for file in
        [KUBERNETES, NODE].iter().flat_map(|folder| ["go.mod", "go.sum"].map(|file| root.join(folder).join(file)))
    {
        recipe += &fs::read_to_string(&file).map_err(|error| failed(&file, &error))?;
    }
    for set in SETS {
        recipe += &format!("{}{:?}", set.flags, set.packages);
    }
    let folder = cache().join(format!("kubernetes-{}", short(&recipe)));
    let there = folder.exists();
    Ok((folder, there))
}

/// Checks that Go is there, as new as the modules want it.
fn go(root: &Path) -> Result<(), Failure> {
    let mut wanted = (0, 0, 0);
    for folder in [KUBERNETES, NODE] {
        let file = root.join(folder).join("go.mod");
        let text = fs::read_to_string(&file).map_err(|error| failed(&file, &error))?;
        let version = wanted_go(&text).ok_or_else(|| Failure(format!("{}: no `go` line", file.display())))?;
        wanted = wanted.max(version);
    }
    let remedy = format!(
        "Go {}.{}.{} or newer builds a Kubernetes cluster's programs: get it from https://go.dev/dl/ (or `apt-get install \
         -t trixie-backports golang-go`, if that is as new), or name a folder that has them in {VARIABLE}",
        wanted.0, wanted.1, wanted.2
    );
    let said =
        output(Command::new("go").arg("version").env("GOTOOLCHAIN", "local")).map_err(|_| Failure(remedy.clone()))?;
    match go_version(&said) {
        Some(version) if version >= wanted => Ok(()),
        _ => Err(Failure(format!("{remedy}; this is {}", said.trim()))),
    }
}

/// What a `go.mod` asks for.
fn wanted_go(text: &str) -> Option<(u32, u32, u32)> {
    numbers(text.lines().find_map(|line| line.strip_prefix("go "))?)
}

/// Of `go version go1.26.8 linux/amd64`.
fn go_version(said: &str) -> Option<(u32, u32, u32)> {
    numbers(said.split(' ').nth(2)?.strip_prefix("go")?)
}

/// A candidate for a release, such as `1.27rc1`, counts as its first one.
fn numbers(version: &str) -> Option<(u32, u32, u32)> {
    let mut parts = version.trim().split('.').map(|part| {
        let digits = part.find(|c: char| !c.is_ascii_digit()).map_or(part, |end| &part[..end]);
        digits.parse().ok()
    });
    Some((parts.next()??, parts.next()??, parts.next().flatten().unwrap_or(0)))
}

fn build(root: &Path, set: &Set, into: &Path) -> Result<(), Failure> {
    let start = Instant::now();
    println!("· building {}", set.what);
    for (name, package) in set.packages {
        let mut command = Command::new("go");
        command.args(["build", "-buildvcs=false", "-trimpath", "-ldflags", set.flags]);
        command.args(["-tags", TAGS, "-o"]).arg(into.join(name)).arg(package);
        command.env("CGO_ENABLED", "0").env("GOTOOLCHAIN", "local").env_remove("GOFLAGS");
        crate::call(command.current_dir(root.join(set.folder)))?;
    }
    println!("  {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn from_debian(into: &Path) -> Result<(), Failure> {
    let Some((architecture, triple, loader)) = names(std::env::consts::ARCH).filter(|_| Path::new(KEYRING).exists())
    else {
        return from_system(into);
    };
    println!("· taking runc and nft from Debian's packages");
    let unpacked = into.join("debian");
    Debian::open(&cache().join("kernels"), architecture)?.unpack_set(SUITE, &PACKAGES, &unpacked)?;
    // It starts itself anew by /proc/self/exe, so that it must be started without a loader of its own.
    let runc = into.join("runc");
    fs::copy(unpacked.join("usr/sbin/runc"), &runc).map_err(|error| failed(&runc, &error))?;
    output(Command::new(&runc).arg("--version"))
        .map_err(|Failure(why)| Failure(format!("{why}; `apt-get install libseccomp2`")))?;
    let nft = into.join("nft");
    fs::write(&nft, nft_script(triple, loader)).map_err(|error| failed(&nft, &error))?;
    executable(&nft)?;
    output(Command::new(&nft).arg("--version")).map(drop)
}

/// What Debian calls an architecture, the folder of its libraries, and the loader in that folder.
fn names(architecture: &str) -> Option<(&'static str, &'static str, &'static str)> {
    match architecture {
        "x86_64" => Some(("amd64", "x86_64-linux-gnu", "ld-linux-x86-64.so.2")),
        "aarch64" => Some(("arm64", "aarch64-linux-gnu", "ld-linux-aarch64.so.1")),
        _ => None,
    }
}

/// Starts nft with the libraries that came with it.
fn nft_script(triple: &str, loader: &str) -> String {
    format!(
        "#!/bin/sh\nhere=$(dirname \"$0\")/debian\nlibraries=lib/{triple}\n\
         exec \"$here/$libraries/{loader}\" --library-path \"$here/$libraries:$here/usr/$libraries\" \
         \"$here/usr/sbin/nft\" \"$@\"\n"
    )
}

/// Where there are no packages of Debian's, those of the machine.
fn from_system(into: &Path) -> Result<(), Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    for name in ["runc", "nft"] {
        let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
        let found = found.ok_or_else(|| Failure(format!("there is no {name}: install runc and nftables")))?;
        std::os::unix::fs::symlink(&found, into.join(name)).map_err(|error| failed(&found, &error))?;
    }
    Ok(())
}

fn executable(file: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755)).map_err(|error| failed(file, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_go_are_read() {
        assert_eq!(go_version("go version go1.26.8 linux/amd64\n"), Some((1, 26, 8)));
        assert_eq!(go_version("go version go1.27rc1 linux/amd64\n"), Some((1, 27, 0)));
        assert_eq!(go_version("nothing"), None);
        assert_eq!(wanted_go("module m\n\ngo 1.26.8\n\ntool x\n"), Some((1, 26, 8)));
        assert_eq!(wanted_go("module m\n"), None);
        assert!(go_version("go version go1.26.7 linux/amd64") < wanted_go("go 1.26.8"));
    }

    #[test]
    fn the_modules_say_which_go_they_want() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for folder in [KUBERNETES, NODE] {
            let text = fs::read_to_string(root.join(folder).join("go.mod")).unwrap();
            assert!(wanted_go(&text) >= Some((1, 26, 0)), "{folder}");
        }
    }

    #[test]
    fn every_program_is_a_tool_of_its_module() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for set in SETS {
            let text = fs::read_to_string(root.join(set.folder).join("go.mod")).unwrap();
            for (_, package) in set.packages {
                assert!(text.lines().any(|line| line.trim() == *package), "{package} in {}", set.folder);
            }
        }
    }
}
