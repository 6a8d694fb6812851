//! Container images made of programs of this machine: the program, and the shared libraries that it is linked with, as an
//! OCI image that `ctr images import` reads. Nothing is pulled from anywhere.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::Error;
use crate::error::Context;

/// Tag of every image made here.
pub const TAG: &str = "dev";
/// The image of the container that holds a pod's namespaces.
pub const PAUSE: &str = "culvert/pause:dev";

/// The images that the samples of the manifests name. Each is the program of the test applications.
const SAMPLES: [&str; 6] = [
    "culvert.dev/samples/bookinfo-details:v1",
    "culvert.dev/samples/bookinfo-productpage:v1",
    "culvert.dev/samples/bookinfo-ratings:v1",
    "culvert.dev/samples/bookinfo-reviews:v1",
    "culvert.dev/samples/bookinfo-reviews:v2",
    "culvert.dev/samples/bookinfo-reviews:v3",
];
/// Where a container finds its program.
const BIN: &str = "usr/local/bin";

/// What an image is to be.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Its name with tag, such as `culvert/app:dev`.
    pub name: String,
    /// Programs of this machine; they lie in `/usr/local/bin` of the image.
    pub programs: Vec<PathBuf>,
    /// What a container runs if its pod says nothing else.
    pub entrypoint: Vec<String>,
}

impl Recipe {
    /// The image `culvert/<name>:dev` of one program, which it runs.
    pub fn program(name: &str, program: impl Into<PathBuf>) -> Self {
        let program = program.into();
        let file = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let entrypoint = vec![format!("/{BIN}/{file}")];
        Self { name: format!("culvert/{name}:{TAG}"), programs: vec![program], entrypoint }
    }

    /// The images that every node has: the program of the test applications, and the same as the pause image.
    pub fn basic(bins: &Path) -> Vec<Self> {
        let app = Self::program("app", bins.join("culvert-app"));
        let mut pause = Self { name: PAUSE.to_owned(), ..app.clone() };
        pause.entrypoint.push("pause".to_owned());
        vec![app, pause]
    }

    /// The images that the samples name.
    pub fn samples(bins: &Path) -> Vec<Self> {
        let app = Self::program("app", bins.join("culvert-app"));
        SAMPLES.map(|name| Self { name: name.to_owned(), ..app.clone() }).into()
    }

    /// The images of the mesh's own programs.
    pub fn mesh(bins: &Path) -> Vec<Self> {
        ["ztunnel", "culvertd"].map(|name| Self::program(name, bins.join(name))).into()
    }
}

/// The name by which containerd knows an image: one without a host is one of its default registry.
fn full_name(name: &str) -> String {
    let has_host = name.split_once('/').is_some_and(|(host, _)| host.contains(['.', ':']));
    if has_host { name.to_owned() } else { format!("docker.io/{name}") }
}

/// A blob: in memory, or a file.
#[derive(Debug)]
struct Blob {
    digest: String,
    size: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Bytes(Vec<u8>),
    File(File),
}

/// Images with what they share held once. Their layers lie in unnamed files.
#[derive(Debug)]
pub struct Images {
    blobs: Vec<Blob>,
    index: Value,
}

impl Images {
    /// Builds images.
    ///
    /// # Errors
    /// A program is missing, `ldd` fails, or there is no room in the temporary folder.
    pub fn build(recipes: &[Recipe]) -> Result<Self, Error> {
        let mut own = Self { blobs: Vec::new(), index: Value::Null };
        let mut manifests = Vec::new();
        for recipe in recipes {
            let manifest = own.add_image(recipe)?;
            let mut entry = own.add(serde_json::to_vec(&manifest).unwrap_or_default(), MANIFEST);
            // containerd calls the image by this name.
            entry["annotations"] = json!({"io.containerd.image.name": full_name(&recipe.name)});
            manifests.push(entry);
        }
        own.index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        Ok(own)
    }

    fn add_image(&mut self, recipe: &Recipe) -> Result<Value, Error> {
        let mut libraries = BTreeSet::new();
        for program in &recipe.programs {
            if !program.exists() {
                return Err(Error::MissingProgram(program.clone()));
            }
            libraries.extend(libraries_of(program)?);
        }
        let libraries: Vec<_> = libraries.into_iter().map(|path| (path.clone(), path)).collect();
        let programs = recipe.programs.iter().map(|path| {
            let name = path.file_name().unwrap_or_default();
            (path.clone(), Path::new("/").join(BIN).join(name))
        });
        let layers = [self.add_layer(&libraries)?, self.add_layer(&programs.collect::<Vec<_>>())?];
        let config = json!({
            "architecture": architecture(), "os": "linux",
            "config": {
                "Entrypoint": recipe.entrypoint, "WorkingDir": "/",
                "Env": [format!("PATH=/{BIN}:/usr/bin:/bin")],
            },
            // Layers are not compressed, so that both digests are the same.
            "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|layer| &layer["digest"]).collect::<Vec<_>>()},
        });
        let config = self.add(serde_json::to_vec(&config).unwrap_or_default(), CONFIG);
        Ok(json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}))
    }

    /// A layer of files: (on this machine, in the image).
    fn add_layer(&mut self, files: &[(PathBuf, PathBuf)]) -> Result<Value, Error> {
        let what = || "making a layer of an image".to_owned();
        let mut archive = tar::Builder::new(Hashing { inner: tempfile::tempfile().during(what)?, hash: Sha256::new() });
        for (from, to) in files {
            let what = || format!("putting {} into an image", from.display());
            let file = File::open(from).during(what)?;
            let size = file.metadata().during(what)?.len();
            let mut header = header(size, 0o755);
            let inside = to.strip_prefix("/").unwrap_or(to);
            archive.append_data(&mut header, inside, file.take(size)).during(what)?;
        }
        let done = archive.into_inner().during(what)?;
        let size = done.inner.metadata().during(what)?.len();
        let digest = hex(&done.hash.finalize());
        Ok(self.keep(Blob { digest, size, content: Content::File(done.inner) }, LAYER))
    }

    fn add(&mut self, bytes: Vec<u8>, kind: &str) -> Value {
        let size = bytes.len() as u64;
        self.keep(Blob { digest: hex(&Sha256::digest(&bytes)), size, content: Content::Bytes(bytes) }, kind)
    }

    /// Keeps a blob unless there is one like it; gives its descriptor.
    fn keep(&mut self, blob: Blob, kind: &str) -> Value {
        let descriptor = json!({"mediaType": kind, "digest": format!("sha256:{}", blob.digest), "size": blob.size});
        if !self.blobs.iter().any(|other| other.digest == blob.digest) {
            self.blobs.push(blob);
        }
        descriptor
    }

    /// Writes them as an archive of the OCI image layout.
    ///
    /// # Errors
    /// The other side has gone, or a layer cannot be read.
    pub fn write(&self, to: impl Write) -> io::Result<()> {
        let mut archive = tar::Builder::new(to);
        let mut text =
            |name: &str, bytes: &[u8]| archive.append_data(&mut header(bytes.len() as u64, 0o644), name, bytes);
        text("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        text("index.json", self.index.to_string().as_bytes())?;
        for blob in &self.blobs {
            let (name, mut header) = (format!("blobs/sha256/{}", blob.digest), header(blob.size, 0o644));
            match &blob.content {
                Content::Bytes(bytes) => archive.append_data(&mut header, name, bytes.as_slice())?,
                Content::File(file) => archive.append_data(&mut header, name, Whole { file, at: 0 })?,
            }
        }
        archive.into_inner()?.flush()
    }
}

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A file from its beginning, whoever else reads it.
struct Whole<'f> {
    file: &'f File,
    at: u64,
}

impl Read for Whole<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = std::os::unix::fs::FileExt::read_at(self.file, buffer, self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}

struct Hashing {
    inner: File,
    hash: Sha256,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Owned by root, of no date: the same files make the same image.
fn header(size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// As Go, and therefore OCI, calls it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The shared libraries of a program with its loader, as `ldd` finds them on this machine. None for a static one.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>, Error> {
    let what = || format!("running ldd on {}", program.display());
    let done = Command::new("ldd").arg(program).env("LC_ALL", "C").output().during(what)?;
    let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    if said.contains("not a dynamic executable") || said.contains("statically linked") {
        return Ok(Vec::new());
    }
    let found = parse_ldd(&said).filter(|_| done.status.success());
    found.ok_or_else(|| Error::Output { what: what(), reason: "a library is missing".to_owned(), output: said })
}

/// None if a library was not found.
fn parse_ldd(text: &str) -> Option<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        // `name => /path (0x..)`, `/path (0x..)`, or `linux-vdso.so.1 (0x..)`, which is the kernel's.
        let path = line.split_once("=> ").map_or(line, |(_, path)| path);
        if path.starts_with("not found") {
            return None;
        }
        if path.starts_with('/') {
            found.push(PathBuf::from(path.split(" (").next()?));
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom};

    use super::*;

    #[test]
    fn libraries_are_read_from_what_ldd_says() {
        let text = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibgcc_s.so.1 => /lib/x86_64-linux-gnu/libgcc_s.so.1 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found = parse_ldd(text).expect("all there");
        assert_eq!(found, ["/lib/x86_64-linux-gnu/libgcc_s.so.1", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from));
        assert_eq!(parse_ldd("\tlibnone.so => not found\n"), None);
    }

    #[test]
    fn every_image_of_the_samples_is_made() {
        let mut named = BTreeSet::new();
        let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/samples");
        for folder in std::fs::read_dir(samples).expect("samples") {
            for file in std::fs::read_dir(folder.expect("a folder").path()).expect("files") {
                let text = std::fs::read_to_string(file.expect("a file").path()).expect("its text");
                named.extend(text.lines().filter_map(|line| Some(line.trim().strip_prefix("image: ")?.to_owned())));
            }
        }
        let made = Recipe::samples(Path::new("/")).into_iter().map(|recipe| recipe.name).collect();
        assert_eq!(named, made);
    }

    #[test]
    fn an_image_names_what_it_holds() {
        let own = std::env::current_exe().expect("own path");
        let images = Images::build(&[Recipe::program("a", &own), Recipe::program("b", &own)]).expect("images");
        let mut bytes = Vec::new();
        images.write(&mut bytes).expect("written");
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut names = BTreeSet::new();
        for entry in archive.entries().expect("entries") {
            let mut entry = entry.expect("entry");
            let name = entry.path().expect("name").to_string_lossy().into_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).expect("content");
            if let Some(digest) = name.strip_prefix("blobs/sha256/") {
                assert_eq!(hex(&Sha256::digest(&content)), digest);
            }
            assert!(names.insert(name), "each once");
        }
        // Two layers that both share, and a manifest and a configuration; they differ by name alone.
        assert_eq!(names.len(), 2 + 2 + 2, "{names:?}");
        let manifests = images.index["manifests"].as_array().expect("manifests");
        assert_eq!(manifests[1]["annotations"]["io.containerd.image.name"], "docker.io/culvert/b:dev");
        let file = images.blobs.iter().find_map(|blob| match &blob.content {
            Content::File(file) => Some(file),
            Content::Bytes(_) => None,
        });
        let mut file = file.expect("a layer");
        file.seek(SeekFrom::Start(0)).expect("seek");
        let layer = tar::Archive::new(file).entries().expect("a layer").count();
        assert!(layer > 1, "the loader and the C library");
    }
}
