//! The common model of a data set to shards.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;
use sha2::{Digest, Sha256};

use super::example::Example as Features;
use super::framing::write_record;
use super::key;
use super::manifest::{self, Manifest, ShardEntry};
use super::shards::ShardName;
use crate::coco::write_categories;
use crate::dataset::{DetectionDataset, Example, stable_id};
use crate::decode::{MAX_ENCODED_BYTES, probe};
use crate::error::{DataError, Result};

/// How records are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteOptions {
    /// Number of shards, 1 to 99 999.
    pub num_shards: usize,
    /// Largest encoded image in bytes.
    pub max_encoded_bytes: u64,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            num_shards: 32,
            max_encoded_bytes: MAX_ENCODED_BYTES,
        }
    }
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriteReport {
    /// Shards in order.
    pub shards: Vec<PathBuf>,
    /// Names of the categories, for [`load`](super::load).
    pub categories: PathBuf,
    /// Counts and checksums, see [`Manifest`].
    pub manifest: PathBuf,
    /// Records.
    pub records: usize,
    /// Objects.
    pub objects: usize,
    /// Bytes in all shards.
    pub bytes: u64,
}

/// `<prefix>.categories.json`.
pub(super) fn categories_file(prefix: &Path) -> PathBuf {
    let mut file = prefix.as_os_str().to_owned();
    file.push(".categories.json");
    file.into()
}

/// Writes `<prefix>-00000-of-<n>.tfrecord` …, `<prefix>.categories.json` and `<prefix>.manifest.json`; example i goes to shard
/// i mod n.
///
/// The shards get their names when all are complete; after an error none is left. `progress` is called after every record.
///
/// # Errors
/// [`DataError::Caller`] for a number of shards out of range and for shards of this prefix that are there already; an image that
/// cannot be read or has another size than annotated; [`DataError::Io`].
///
/// # Determinism
/// The same data set gives the same bytes.
pub fn write(
    dataset: &DetectionDataset,
    prefix: &Path,
    options: &WriteOptions,
    progress: &mut dyn FnMut(),
) -> Result<WriteReport> {
    let total = options.num_shards;
    if !(1..=99_999).contains(&total) {
        return Err(DataError::Caller {
            what: format!("{total} shards were asked for; 1 to 99999 are possible"),
        });
    }
    let folder = match prefix.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let prefix_name = prefix.file_name().and_then(|name| name.to_str());
    let prefix_name = prefix_name.ok_or_else(|| DataError::Caller {
        what: format!(
            "{} is no prefix for files: give a folder and a name, as in records/train",
            prefix.display()
        ),
    })?;
    fs::create_dir_all(folder).map_err(io_error(folder))?;
    refuse_existing(folder, prefix_name)?;

    let mut report = WriteReport {
        categories: categories_file(prefix),
        manifest: manifest::file(prefix),
        ..WriteReport::default()
    };
    let names: HashMap<_, _> = (dataset.categories.iter())
        .map(|category| (category.id, category.name.as_str()))
        .collect();
    let mut scratch = ScratchFiles::default();
    let mut entries = Vec::with_capacity(total);
    for shard in 0..total {
        let file = folder.join(ShardName::file_name(prefix_name, shard, total));
        let mut writer = Hashing::new(scratch.create(&file)?);
        let records_before = report.records;
        let examples = dataset.examples.iter().skip(shard).step_by(total);
        for example in examples {
            let encoded = example.source.read_bytes(options.max_encoded_bytes)?;
            let features = features_of(example, encoded, &names)?;
            let payload = features.encode_to_vec();
            write_record(&mut writer, &payload).map_err(io_error(&file))?;
            report.records += 1;
            report.objects += example.objects.len();
            progress();
        }
        let sync = |writer: BufWriter<File>| -> io::Result<()> {
            writer
                .into_inner()
                .map_err(io::IntoInnerError::into_error)?
                .sync_all()
        };
        let (writer, bytes, sha256) = writer.finish();
        sync(writer).map_err(io_error(&file))?;
        report.bytes += bytes;
        entries.push(ShardEntry {
            file: ShardName::file_name(prefix_name, shard, total),
            records: (report.records - records_before) as u64,
            bytes,
            sha256,
        });
        report.shards.push(file);
    }
    scratch.publish()?;
    let published = write_categories(&report.categories, &dataset.categories)
        .and_then(|()| Manifest::new(dataset, entries).write(&report.manifest));
    if published.is_err() {
        for file in report.shards.iter().chain([&report.categories]) {
            // Nothing can be done about a file that stays.
            let _ = fs::remove_file(file);
        }
    }
    published.map(|()| report)
}

fn refuse_existing(folder: &Path, prefix: &str) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(io_error(folder))? {
        let file = entry.map_err(io_error(folder))?.path();
        let is_shard = ShardName::parse(&file).is_some_and(|name| name.prefix == prefix);
        if is_shard && file.extension().is_none_or(|extension| extension != "tmp") {
            return Err(DataError::Caller {
                what: format!(
                    "{} is there already: remove it or choose another prefix",
                    file.display()
                ),
            });
        }
    }
    Ok(())
}

fn io_error(file: &Path) -> impl Fn(io::Error) -> DataError {
    move |source| DataError::Io {
        file: file.to_path_buf(),
        source,
    }
}

/// Counts and hashes what passes through.
struct Hashing<W> {
    inner: W,
    bytes: u64,
    sha256: Sha256,
}

impl<W: Write> Hashing<W> {
    fn new(inner: W) -> Self {
        Self {
            inner,
            bytes: 0,
            sha256: Sha256::new(),
        }
    }

    /// What it wrote to, the number of bytes and their SHA-256 in hexadecimal.
    fn finish(self) -> (W, u64, String) {
        let digest = self.sha256.finalize();
        let hex = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        (self.inner, self.bytes, hex)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.bytes += written as u64;
        self.sha256.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Files under temporary names, removed when dropped unless published.
#[derive(Debug, Default)]
struct ScratchFiles(Vec<(PathBuf, PathBuf)>);

impl ScratchFiles {
    fn create(&mut self, file: &Path) -> Result<BufWriter<File>> {
        let mut scratch = file.as_os_str().to_owned();
        scratch.push(".tmp");
        let scratch = PathBuf::from(scratch);
        let output = File::create(&scratch).map_err(io_error(&scratch))?;
        self.0.push((scratch, file.to_path_buf()));
        Ok(BufWriter::with_capacity(1 << 20, output))
    }

    fn publish(mut self) -> Result<()> {
        while let Some((scratch, file)) = self.0.last() {
            fs::rename(scratch, file).map_err(io_error(file))?;
            self.0.pop();
        }
        Ok(())
    }
}

impl Drop for ScratchFiles {
    fn drop(&mut self) {
        for (scratch, _) in &self.0 {
            // Nothing can be done about a file that stays; its name says what it is.
            let _ = fs::remove_file(scratch);
        }
    }
}

fn features_of(
    example: &Example,
    encoded: Vec<u8>,
    names: &HashMap<effdet_model::label_map::CategoryId, &str>,
) -> Result<Features> {
    let probed = probe(&encoded).map_err(|reason| DataError::Image {
        file: example.file_name.clone(),
        reason,
    })?;
    let annotated = (example.width, example.height);
    if annotated.0 != 0 && annotated.1 != 0 && annotated != (probed.width, probed.height) {
        return Err(DataError::SizeMismatch {
            file: example.file_name.clone(),
            decoded: (probed.width, probed.height),
            annotated,
        });
    }
    let text = |text: &str| vec![Bytes::copy_from_slice(text.as_bytes())];
    let sha256: String = Sha256::digest(&encoded)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mut features = Features::default();
    features.set_ints(key::HEIGHT, vec![probed.height.into()]);
    features.set_ints(key::WIDTH, vec![probed.width.into()]);
    features.set_bytes(key::FILENAME, text(&example.file_name));
    // A text stands for its own number; the reference writes numbers.
    let source_id = match stable_id(&example.source_id) == example.image_id {
        true => example.source_id.clone(),
        false => example.image_id.to_string(),
    };
    features.set_bytes(key::SOURCE_ID, text(&source_id));
    features.set_bytes(key::SHA256, text(&sha256));
    features.set_bytes(key::FORMAT, text(probed.format_name));
    features.set_bytes(key::ENCODED, vec![encoded.into()]);
    let objects = &example.objects;
    if objects.is_empty() {
        return Ok(features);
    }
    let (width, height) = (f64::from(probed.width), f64::from(probed.height));
    let floats = |value: &dyn Fn(&[f64; 4]) -> f64| -> Vec<f32> {
        objects
            .iter()
            .map(|object| value(&object.box_xywh_px) as f32)
            .collect()
    };
    features.set_floats(key::XMIN, floats(&|[x, _, _, _]| x / width));
    features.set_floats(key::XMAX, floats(&|[x, _, w, _]| (x + w) / width));
    features.set_floats(key::YMIN, floats(&|[_, y, _, _]| y / height));
    features.set_floats(key::YMAX, floats(&|[_, y, _, h]| (y + h) / height));
    features.set_floats(
        key::AREA,
        objects.iter().map(|object| object.area as f32).collect(),
    );
    let flags = |flag: &dyn Fn(usize) -> bool| (0..objects.len()).map(|at| flag(at).into()).collect();
    features.set_ints(key::IS_CROWD, flags(&|at| objects[at].is_crowd));
    if objects.iter().any(|object| object.difficult) {
        features.set_ints(key::DIFFICULT, flags(&|at| objects[at].difficult));
    }
    let mut labels = Vec::with_capacity(objects.len());
    let mut texts = Vec::with_capacity(objects.len());
    for (record, object) in objects.iter().enumerate() {
        let name = names.get(&object.category).ok_or_else(|| DataError::Category {
            file: example.file_name.clone(),
            record,
            category: object.category.0,
        })?;
        labels.push(object.category.0.into());
        texts.push(Bytes::copy_from_slice(name.as_bytes()));
    }
    features.set_ints(key::LABEL, labels);
    features.set_bytes(key::TEXT, texts);
    Ok(features)
}
