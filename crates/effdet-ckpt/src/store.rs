//! A directory of checkpoints: save, list, load, prune.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use effdet_model::network::VariableTable;
use effdet_model::weights::Weights;

use crate::error::CkptError;
use crate::filesystem::{Disk, Filesystem, checked_size, read_limited, write_synced};
use crate::hash::sha256_hex;
use crate::manifest::{CheckpointState, FileRecord, MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest};
use crate::tensors::{MAX_TENSOR_FILE_BYTES, decode_slots, decode_weights, encode_slots, encode_weights};

const WEIGHTS_FILE: &str = "weights.safetensors";
const EMA_FILE: &str = "ema.safetensors";
const SLOTS_FILE: &str = "momentum.safetensors";

/// What is saved.
#[derive(Debug, Clone, Copy)]
pub struct Snapshot<'a> {
    /// Step, position, configuration.
    pub state: &'a CheckpointState,
    /// Names and shapes of the variables.
    pub table: &'a VariableTable,
    /// Values of the variables.
    pub weights: &'a Weights,
    /// Their moving averages.
    pub ema: Option<&'a Weights>,
    /// Optimiser slots by name, each as long as the trainable buffer: `momentum` for SGD, two for Adam.
    pub slots: &'a [(&'a str, &'a [f32])],
}

/// What is loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Directory that it comes from.
    pub path: PathBuf,
    /// Step, position, configuration.
    pub state: CheckpointState,
    /// Values of the variables.
    pub weights: Weights,
    /// Their moving averages, when they were saved.
    pub ema: Option<Weights>,
    /// Optimiser slots by name.
    pub slots: BTreeMap<String, Vec<f32>>,
}

/// A checkpoint with an intact manifest and files of the recorded sizes, whose values are read on demand.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckpointReader {
    path: PathBuf,
    manifest: Manifest,
}

impl CheckpointReader {
    /// Reads the manifest of one checkpoint directory and checks the sizes of its files.
    ///
    /// # Errors
    /// Those of data: [`CkptError::NotACheckpoint`], [`CkptError::BadManifest`], [`CkptError::UnsupportedVersion`],
    /// [`CkptError::MissingFile`], [`CkptError::WrongSize`]; and [`CkptError::Io`].
    pub fn open(path: &Path) -> Result<Self, CkptError> {
        let not_a_checkpoint = |reason| CkptError::NotACheckpoint {
            path: path.to_owned(),
            reason,
        };
        let metadata = fs::metadata(path).map_err(CkptError::io("open", path))?;
        if !metadata.is_dir() {
            return Err(not_a_checkpoint("it is not a directory"));
        }
        let manifest_path = path.join(MANIFEST_FILE);
        let bytes = read_limited(&manifest_path, MAX_MANIFEST_BYTES).map_err(|error| match error {
            CkptError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                not_a_checkpoint("it has no manifest.json")
            }
            other => other,
        })?;
        let manifest = Manifest::decode(&manifest_path, &bytes)?;

        // Names that are not ours could point out of the directory.
        let is_ours = |name: &str| [WEIGHTS_FILE, EMA_FILE, SLOTS_FILE].contains(&name);
        if let Some(name) = manifest.files.keys().find(|name| !is_ours(name)) {
            return Err(CkptError::BadManifest {
                path: manifest_path,
                offset: 0,
                reason: format!("it names the file {name:?}, which checkpoints do not have"),
            });
        }
        if !manifest.files.contains_key(WEIGHTS_FILE) {
            return Err(CkptError::BadManifest {
                path: manifest_path,
                offset: 0,
                reason: format!("it does not name {WEIGHTS_FILE}"),
            });
        }
        let reader = Self {
            path: path.to_owned(),
            manifest,
        };
        for (name, record) in &reader.manifest.files {
            reader.check_size(name, record)?;
        }
        Ok(reader)
    }

    /// Directory of the checkpoint.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Step, position, configuration.
    pub fn state(&self) -> &CheckpointState {
        &self.manifest.state
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Verifies the checksum of every file.
    ///
    /// # Errors
    /// [`CkptError::WrongSize`], [`CkptError::WrongChecksum`], [`CkptError::Io`].
    pub fn verify(&self) -> Result<(), CkptError> {
        self.manifest
            .files
            .keys()
            .try_for_each(|name| self.read(name).map(drop))
    }

    /// The weights.
    ///
    /// # Errors
    /// Those of [`CheckpointReader::verify`]; [`CkptError::MissingTensor`], [`CkptError::UnexpectedTensor`], [`CkptError::WrongShape`]
    /// when `table` is of another network.
    pub fn weights(&self, table: &VariableTable) -> Result<Weights, CkptError> {
        decode_weights(&self.path.join(WEIGHTS_FILE), &self.read(WEIGHTS_FILE)?, table)
    }

    /// The moving averages of the weights, when they were saved.
    ///
    /// # Errors
    /// Those of [`CheckpointReader::weights`].
    pub fn ema(&self, table: &VariableTable) -> Result<Option<Weights>, CkptError> {
        if !self.manifest.files.contains_key(EMA_FILE) {
            return Ok(None);
        }
        decode_weights(&self.path.join(EMA_FILE), &self.read(EMA_FILE)?, table).map(Some)
    }

    /// The optimiser slots by name; empty when none were saved.
    ///
    /// # Errors
    /// Those of [`CheckpointReader::weights`].
    pub fn slots(&self, table: &VariableTable) -> Result<BTreeMap<String, Vec<f32>>, CkptError> {
        if !self.manifest.files.contains_key(SLOTS_FILE) {
            return Ok(BTreeMap::new());
        }
        decode_slots(&self.path.join(SLOTS_FILE), &self.read(SLOTS_FILE)?, table)
    }

    /// Everything.
    ///
    /// # Errors
    /// Those of [`CheckpointReader::weights`].
    pub fn load(&self, table: &VariableTable) -> Result<Checkpoint, CkptError> {
        Ok(Checkpoint {
            path: self.path.clone(),
            state: self.manifest.state.clone(),
            weights: self.weights(table)?,
            ema: self.ema(table)?,
            slots: self.slots(table)?,
        })
    }

    fn check_size(&self, name: &str, record: &FileRecord) -> Result<(), CkptError> {
        let path = self.path.join(name);
        let actual = checked_size(&path, MAX_TENSOR_FILE_BYTES).map_err(|error| match error {
            CkptError::Io { source, path, .. } if source.kind() == io::ErrorKind::NotFound => {
                CkptError::MissingFile { path }
            }
            other => other,
        })?;
        if actual != record.bytes {
            return Err(CkptError::WrongSize {
                path,
                expected: record.bytes,
                actual,
            });
        }
        Ok(())
    }

    /// A file of the checkpoint with the recorded size and checksum.
    fn read(&self, name: &str) -> Result<Vec<u8>, CkptError> {
        let path = self.path.join(name);
        let Some(record) = self.manifest.files.get(name) else {
            return Err(CkptError::MissingFile { path });
        };
        self.check_size(name, record)?;
        let bytes = read_limited(&path, MAX_TENSOR_FILE_BYTES)?;
        if bytes.len() as u64 != record.bytes {
            return Err(CkptError::WrongSize {
                path,
                expected: record.bytes,
                actual: bytes.len() as u64,
            });
        }
        let actual = sha256_hex(&bytes);
        if actual != record.sha256 {
            return Err(CkptError::WrongChecksum {
                path,
                expected: record.sha256.clone(),
                actual,
            });
        }
        Ok(bytes)
    }
}

/// A checkpoint that could not be used, and why.
#[derive(Debug)]
pub struct PassedOver {
    /// Its directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub error: CkptError,
}

/// The checkpoints of a directory.
#[derive(Debug, Default)]
pub struct Listing {
    /// Complete ones, ascending by step.
    pub complete: Vec<CheckpointReader>,
    /// `step-*` directories that are none, ascending by step.
    pub passed_over: Vec<PassedOver>,
}

/// Result of [`CheckpointStore::load_latest`].
#[derive(Debug)]
pub struct Latest {
    /// The newest intact checkpoint; none if there is no intact one.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones that are not intact, newest first. When this is not empty the user has to be told, and without a checkpoint training must
    /// not start afresh by itself.
    pub passed_over: Vec<PassedOver>,
}

/// Which checkpoints [`CheckpointStore::prune`] keeps: a checkpoint is removed when no rule keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many. The newest intact one is kept even for 0.
    pub keep_last: usize,
    /// The best so many by [`CheckpointState::metric`], the newer of equals.
    pub keep_best: usize,
    /// These steps, such as the one that training was resumed from.
    pub keep_steps: Vec<u64>,
}

/// Result of [`CheckpointStore::prune`].
#[derive(Debug, Default)]
pub struct Pruned {
    /// Steps removed, ascending.
    pub removed: Vec<u64>,
    /// Checkpoints that could not be removed; worth a warning, not worth stopping.
    pub failed: Vec<PassedOver>,
}

/// A directory of checkpoints. One process at a time may write to it.
pub struct CheckpointStore {
    dir: PathBuf,
    filesystem: Box<dyn Filesystem>,
}

impl std::fmt::Debug for CheckpointStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckpointStore")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl CheckpointStore {
    /// A store in `dir`, which the first save creates.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self::with_filesystem(dir, Box::new(Disk))
    }

    pub(crate) fn with_filesystem(dir: impl Into<PathBuf>, filesystem: Box<dyn Filesystem>) -> Self {
        Self {
            dir: dir.into(),
            filesystem,
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Directory of the checkpoint of one step.
    pub fn path_of(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step:08}"))
    }

    /// Saves a checkpoint and returns its directory.
    ///
    /// * **An error was returned**: the earlier checkpoints are as they were, and nothing new is visible. (Except
    ///   [`CkptError::NotDurable`]: the new one is there and complete.)
    /// * **The process was killed, or power was lost**: the same; a hidden `.step-*.tmp-*` may be left for [`CheckpointStore::gc`].
    /// * **The step is there already**: with the same values its state is brought up to date; when it is damaged it is replaced; when it is
    ///   intact with other values it is left alone, and that is an error.
    ///
    /// # Errors
    /// [`CkptError::Io`], [`CkptError::NotDurable`], [`CkptError::StepExists`]; [`CkptError::WrongLength`] and
    /// [`CkptError::InvalidState`] before anything is written.
    pub fn save(&self, snapshot: &Snapshot<'_>) -> Result<PathBuf, CkptError> {
        let table = snapshot.table;
        let mut contents = vec![(WEIGHTS_FILE, encode_weights(table, snapshot.weights)?)];
        if let Some(ema) = snapshot.ema {
            contents.push((EMA_FILE, encode_weights(table, ema)?));
        }
        if !snapshot.slots.is_empty() {
            contents.push((SLOTS_FILE, encode_slots(table, snapshot.slots)?));
        }
        let record = |bytes: &[u8]| FileRecord {
            bytes: bytes.len() as u64,
            sha256: sha256_hex(bytes),
        };
        let manifest = Manifest {
            state: snapshot.state.clone(),
            files: contents
                .iter()
                .map(|(name, bytes)| ((*name).to_owned(), record(bytes)))
                .collect(),
        };
        contents.push((MANIFEST_FILE, manifest.encode()?));

        self.create_store()?;
        let target = self.path_of(snapshot.state.step);
        if target.exists() && self.update_existing(&target, &manifest)? {
            return Ok(target);
        }
        let scratch = self.scratch(snapshot.state.step, "");
        let committed = self.write_scratch(&scratch, &contents).and_then(|()| {
            let aside = self.scratch(snapshot.state.step, "-damaged");
            let damaged = target.exists();
            if damaged {
                self.rename(&target, &aside)?;
            }
            self.rename(&scratch, &target)?;
            if damaged {
                // Hidden already; what cannot be removed now is left for `gc`.
                let _ = self.filesystem.remove_dir_all(&aside);
            }
            Ok(())
        });
        if let Err(error) = committed {
            // The first failure is the one to report.
            let _ = self.filesystem.remove_dir_all(&scratch);
            return Err(error);
        }
        self.filesystem
            .sync_dir(&self.dir)
            .map_err(|source| CkptError::NotDurable {
                path: target.clone(),
                source,
            })?;
        Ok(target)
    }

    /// Every checkpoint of the directory, judged by manifest and sizes; a directory that does not exist has none.
    ///
    /// # Errors
    /// [`CkptError::Io`] when the directory itself cannot be read.
    pub fn list(&self) -> Result<Listing, CkptError> {
        let mut listing = Listing::default();
        for step in self.steps()? {
            let path = self.path_of(step);
            let opened = CheckpointReader::open(&path).and_then(|reader| {
                if reader.state().step == step {
                    Ok(reader)
                } else {
                    Err(CkptError::NotACheckpoint {
                        path: path.clone(),
                        reason: "its manifest is of another step",
                    })
                }
            });
            match opened {
                Ok(reader) => listing.complete.push(reader),
                Err(error) => listing.passed_over.push(PassedOver { path, error }),
            }
        }
        Ok(listing)
    }

    /// Loads the newest intact checkpoint, passing over those that are damaged or cannot be read.
    ///
    /// # Errors
    /// [`CkptError::Io`] when the directory itself cannot be read; [`CkptError::MissingTensor`] and the like when the newest intact
    /// checkpoint is of another network than `table`.
    pub fn load_latest(&self, table: &VariableTable) -> Result<Latest, CkptError> {
        let listing = self.list()?;
        let mut passed_over = listing.passed_over;
        let mut found = None;
        for reader in listing.complete.into_iter().rev() {
            match reader.load(table) {
                Ok(checkpoint) => {
                    found = Some(checkpoint);
                    break;
                }
                Err(error) if error.is_corruption() || matches!(error, CkptError::Io { .. }) => {
                    passed_over.push(PassedOver {
                        path: reader.path,
                        error,
                    });
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(checkpoint) = &found {
            passed_over.retain(|other| step_of(&other.path) > step_of(&checkpoint.path));
        }
        passed_over.sort_by_key(|other| std::cmp::Reverse(step_of(&other.path)));
        Ok(Latest {
            checkpoint: found,
            passed_over,
        })
    }

    /// Loads one checkpoint directory, wherever it is.
    ///
    /// # Errors
    /// Those of [`CheckpointReader::open`] and [`CheckpointReader::load`].
    pub fn load(path: &Path, table: &VariableTable) -> Result<Checkpoint, CkptError> {
        CheckpointReader::open(path)?.load(table)
    }

    /// Notes the metric of a saved checkpoint, for [`Retention::keep_best`]. Its manifest is replaced atomically.
    ///
    /// # Errors
    /// Those of [`CheckpointReader::open`]; [`CkptError::InvalidState`] when the metric is not finite.
    pub fn record_metric(&self, step: u64, metric: f64) -> Result<(), CkptError> {
        let path = self.path_of(step);
        let mut manifest = CheckpointReader::open(&path)?.manifest;
        manifest.state.metric = Some(metric);
        self.replace_manifest(&path, &manifest)
    }

    /// Removes the checkpoints that no rule of `retention` keeps.
    ///
    /// The newest intact checkpoint always stays: before anything is removed, checksums are verified from the newest one down to the first
    /// that is intact. Without one nothing is removed. Directories that [`CheckpointStore::list`] passes over are left alone.
    ///
    /// # Errors
    /// [`CkptError::Io`] when the directory cannot be read; a checkpoint that cannot be removed is in [`Pruned::failed`].
    pub fn prune(&self, retention: &Retention) -> Result<Pruned, CkptError> {
        let mut pruned = Pruned::default();
        for (step, path) in self.superfluous(retention)? {
            match self.remove(&path, step) {
                Ok(()) => pruned.removed.push(step),
                Err(error) => pruned.failed.push(PassedOver { path, error }),
            }
        }
        Ok(pruned)
    }

    /// Steps and folders of the checkpoints that [`prune`](Self::prune) would remove.
    ///
    /// # Errors
    /// [`CkptError::Io`] when the directory cannot be read.
    pub fn superfluous(&self, retention: &Retention) -> Result<Vec<(u64, PathBuf)>, CkptError> {
        let readers = self.list()?.complete;
        let Some(newest_intact) = readers.iter().rposition(|reader| reader.verify().is_ok()) else {
            return Ok(Vec::new());
        };
        let mut by_metric: Vec<(f64, u64)> = readers
            .iter()
            .filter_map(|reader| Some((reader.state().metric?, reader.state().step)))
            .collect();
        by_metric.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
        by_metric.truncate(retention.keep_best);

        let mut superfluous = Vec::new();
        for (index, reader) in readers.iter().enumerate() {
            let step = reader.state().step;
            let keep = index >= newest_intact
                || index + retention.keep_last >= readers.len()
                || by_metric.iter().any(|&(_, best)| best == step)
                || retention.keep_steps.contains(&step);
            if !keep {
                superfluous.push((step, reader.path().to_owned()));
            }
        }
        Ok(superfluous)
    }

    /// Removes what killed saves left behind and returns it. Call it when no other process saves here.
    ///
    /// # Errors
    /// [`CkptError::Io`].
    pub fn gc(&self) -> Result<Vec<PathBuf>, CkptError> {
        let mut removed = Vec::new();
        for name in self.names()? {
            let path = self.dir.join(&name);
            if is_leftover(&name, ".step-") && path.is_dir() {
                self.filesystem
                    .remove_dir_all(&path)
                    .map_err(CkptError::io("remove", &path))?;
                removed.push(path);
            }
        }
        for step in self.steps()? {
            let dir = self.path_of(step);
            for name in names_in(&dir)? {
                if is_leftover(&name, ".manifest.json.") {
                    let path = dir.join(name);
                    self.filesystem
                        .remove_file(&path)
                        .map_err(CkptError::io("remove", &path))?;
                    removed.push(path);
                }
            }
        }
        removed.sort_unstable();
        Ok(removed)
    }

    fn create_store(&self) -> Result<(), CkptError> {
        if self.dir.is_dir() {
            return Ok(());
        }
        self.filesystem
            .create_dir_all(&self.dir)
            .map_err(CkptError::io("create directory", &self.dir))
    }

    /// Hidden sibling of a checkpoint: on the same file system, so that the rename is atomic.
    fn scratch(&self, step: u64, suffix: &str) -> PathBuf {
        self.dir
            .join(format!(".step-{step:08}.tmp-{}{suffix}", std::process::id()))
    }

    fn write_scratch(&self, scratch: &Path, contents: &[(&str, Vec<u8>)]) -> Result<(), CkptError> {
        if scratch.exists() {
            // A killed process had the same id.
            self.filesystem
                .remove_dir_all(scratch)
                .map_err(CkptError::io("remove", scratch))?;
        }
        self.filesystem
            .create_dir_all(scratch)
            .map_err(CkptError::io("create directory", scratch))?;
        for (name, bytes) in contents {
            write_synced(&*self.filesystem, &scratch.join(name), bytes)?;
        }
        self.filesystem
            .sync_dir(scratch)
            .map_err(CkptError::io("sync directory", scratch))
    }

    /// Whether `target` holds these values already, its state then being brought up to date; false if it is damaged.
    fn update_existing(&self, target: &Path, manifest: &Manifest) -> Result<bool, CkptError> {
        if !target.is_dir() {
            return Err(CkptError::NotACheckpoint {
                path: target.to_owned(),
                reason: "it is not a directory",
            });
        }
        let opened = CheckpointReader::open(target).and_then(|reader| reader.verify().map(|()| reader));
        match opened {
            Ok(existing) if existing.manifest == *manifest => Ok(true),
            Ok(existing) if existing.manifest.files == manifest.files => {
                self.replace_manifest(target, manifest).map(|()| true)
            }
            Ok(_) => Err(CkptError::StepExists {
                path: target.to_owned(),
            }),
            Err(error) if error.is_corruption() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn replace_manifest(&self, dir: &Path, manifest: &Manifest) -> Result<(), CkptError> {
        let bytes = manifest.encode()?;
        let path = dir.join(MANIFEST_FILE);
        let scratch = dir.join(format!(".{MANIFEST_FILE}.tmp-{}", std::process::id()));
        if scratch.exists() {
            self.filesystem
                .remove_file(&scratch)
                .map_err(CkptError::io("remove", &scratch))?;
        }
        let committed =
            write_synced(&*self.filesystem, &scratch, &bytes).and_then(|()| self.rename(&scratch, &path));
        if let Err(error) = committed {
            // The first failure is the one to report.
            let _ = self.filesystem.remove_file(&scratch);
            return Err(error);
        }
        self.filesystem
            .sync_dir(dir)
            .map_err(|source| CkptError::NotDurable { path, source })
    }

    /// Hides a checkpoint in one step, then removes it.
    fn remove(&self, path: &Path, step: u64) -> Result<(), CkptError> {
        let aside = self.scratch(step, "-pruned");
        self.rename(path, &aside)?;
        self.filesystem
            .remove_dir_all(&aside)
            .map_err(CkptError::io("remove", &aside))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), CkptError> {
        self.filesystem
            .rename(from, to)
            .map_err(CkptError::io("rename to its final name", from))
    }

    /// Steps that have a directory, ascending.
    fn steps(&self) -> Result<Vec<u64>, CkptError> {
        let mut steps: Vec<u64> = self
            .names()?
            .iter()
            .filter_map(|name| step_of(Path::new(name)))
            .collect();
        steps.sort_unstable();
        Ok(steps)
    }

    fn names(&self) -> Result<Vec<String>, CkptError> {
        match names_in(&self.dir) {
            Err(CkptError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            names => names,
        }
    }
}

/// Names of the entries of a directory that are directories or files themselves, not links.
fn names_in(dir: &Path) -> Result<Vec<String>, CkptError> {
    let failed = |source| CkptError::Io {
        operation: "list",
        path: dir.to_owned(),
        source,
    };
    if !fs::metadata(dir).map_err(failed)?.is_dir() {
        // A file where a checkpoint should be has no entries.
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_link = entry.file_type().map_err(failed)?.is_symlink();
        if let (false, Ok(name)) = (is_link, entry.file_name().into_string()) {
            names.push(name);
        }
    }
    Ok(names)
}

/// The step of `step-NNNNNNNN`; none for any other name.
fn step_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (format!("step-{step:08}") == name).then_some(step)
}

fn is_leftover(name: &str, prefix: &str) -> bool {
    name.starts_with(prefix) && name.contains(".tmp-")
}

#[cfg(test)]
mod faults;
