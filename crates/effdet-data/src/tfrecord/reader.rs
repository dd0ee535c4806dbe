//! Records to the common model of a data set.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, BufReader, Cursor, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use effdet_model::label_map::CategoryId;
use flate2::read::MultiGzDecoder;
use prost::Message;

use super::example::Example as Features;
use super::framing::{HEADER_BYTES, Record, RecordReader, is_header};
use super::key;
use super::manifest;
use super::shards::{ShardName, find_shards};
use super::writer::categories_file;
use crate::coco::{clip, read_categories};
use crate::dataset::{
    Category, DetectionDataset, Example, ImageSource, ObjectAnnotation, hashed_id, stable_id,
};
use crate::decode::probe;
use crate::error::{DataError, Result};
use crate::report::{Faults, Finding, FindingKind, LoadOptions, LoadReport};

/// What to do about a damaged record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// Stop with an error that names it.
    Refuse,
    /// Leave it out and report it; stop when there are more than this many.
    ///
    /// Behind a damaged length nothing can be found: the rest of that shard is left out, too.
    Skip {
        /// Records, or rests of shards.
        at_most: usize,
    },
}

/// How records are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadOptions {
    /// Largest record in bytes, checked before it is allocated; a decoded record takes up to 16 times as much.
    pub max_record_bytes: u64,
    /// Largest shard compressed with gzip in bytes, when unpacked; its images stay in memory.
    pub max_unpacked_bytes: u64,
    /// What to do about a damaged record.
    pub damage: Damage,
    /// Accept sets of shards with gaps.
    pub allow_partial: bool,
    /// Accept data without any box, for images to be predicted.
    pub allow_unlabelled: bool,
    /// Threads, at least 1; results are the same for any number.
    pub threads: usize,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            max_record_bytes: 64 << 20,
            max_unpacked_bytes: 1 << 30,
            damage: Damage::Refuse,
            allow_partial: false,
            allow_unlabelled: false,
            threads: 1,
        }
    }
}

impl ReadOptions {
    /// Options that treat damage as `options` say.
    pub fn of(options: &LoadOptions) -> Self {
        Self {
            damage: match options.faults {
                Faults::Refuse => Damage::Refuse,
                Faults::Collect => Damage::Skip { at_most: usize::MAX },
            },
            ..Self::default()
        }
    }
}

/// Reads the shards that match a glob pattern, see [`load_shards`].
///
/// # Errors
/// Those of [`find_shards`] and [`load_shards`].
pub fn load(pattern: &str, options: &ReadOptions) -> Result<(DetectionDataset, LoadReport)> {
    let (mut dataset, report) = load_shards(&find_shards(pattern, options.allow_partial)?, options)?;
    pattern.clone_into(&mut dataset.name);
    Ok((dataset, report))
}

/// Reads every record once, checks it, and keeps its annotations and the place of its image.
///
/// Examples come from the shards in turn, one of each: in the order of the data set that [`write`](super::write) dealt out.
///
/// Categories are those of the file `<prefix>.categories.json` beside the shards, which [`write`](super::write) leaves there, and
/// those of the records, with `class/text` as their names. An id that no source names is its own name. Ids of images that are no
/// numbers, and missing ones, are replaced by 53 bits of a SHA-256.
///
/// Boxes are clipped and dropped as [`coco::load`](crate::coco::load) does.
///
/// # Errors
/// [`DataError::Record`] with file, record and offset for damage and for features that make no sense; [`DataError::Malformed`]
/// for an image id that occurs twice and for a category with two names; [`DataError::NoBoxes`] for data without a single box (records
/// converted from captions); [`DataError::TooLarge`]; [`DataError::Io`].
pub fn load_shards(shards: &[PathBuf], options: &ReadOptions) -> Result<(DetectionDataset, LoadReport)> {
    let contents = read_all(shards, options)?;
    let mut names = CategoryNames::default();
    let prefixes: BTreeSet<PathBuf> = (shards.iter())
        .filter_map(|file| Some(file.with_file_name(ShardName::parse(file)?.prefix)))
        .collect();
    for categories in prefixes.iter().map(|prefix| categories_file(prefix)) {
        if categories.is_file() {
            for category in read_categories(&categories)? {
                names.add(category.id, Some(&category.name), &categories)?;
            }
        }
    }
    if options.damage == Damage::Refuse {
        let counts = contents.iter().map(|content| content.examples.len() as u64);
        manifest::check(shards, counts)?;
    }
    let mut by_shard = Vec::with_capacity(contents.len());
    let mut report = LoadReport::default();
    let mut captions = false;
    for (file, content) in shards.iter().zip(contents) {
        for (id, name) in &content.categories.0 {
            names.add(*id, name.as_deref(), file)?;
        }
        by_shard.push(content.examples.into_iter());
        report.append(content.report);
        captions |= content.captions;
    }
    let examples = in_turn(by_shard);
    let malformed = |what: String| DataError::Malformed {
        file: shards.first().cloned().unwrap_or_default(),
        what,
    };
    if let Damage::Skip { at_most } = options.damage
        && report.skipped.len() > at_most
    {
        let listed: Vec<String> = report.skipped.iter().take(8).map(Finding::to_string).collect();
        return Err(malformed(format!(
            "{} records are damaged, more than the {at_most} allowed: copy or convert the shards again. The first: {}",
            report.skipped.len(),
            listed.join("; ")
        )));
    }
    if examples.is_empty() {
        return Err(malformed("holds no record, nor does any other shard".into()));
    }
    let labelled = examples.iter().any(|example| !example.objects.is_empty()) || !report.dropped.is_empty();
    if !labelled && !options.allow_unlabelled {
        let cause = match captions {
            true => {
                "They hold captions: they were converted from a captions file, as the reference's get_coco.sh does"
            }
            false => "They were probably converted from a captions file, as the reference's get_coco.sh does",
        };
        return Err(DataError::NoBoxes {
            file: shards.first().cloned().unwrap_or_default(),
            what: format!(
                "none of the {} records has a box. {cause}. Convert again from the instances file \
                 (instances_train2017.json, instances_val2017.json)",
                examples.len()
            ),
        });
    }
    refuse_duplicates(&examples)?;
    let categories = names
        .0
        .into_iter()
        .map(|(id, name)| Category {
            id,
            name: name.unwrap_or_else(|| id.to_string()),
        })
        .collect();
    let name = shards
        .first()
        .map_or_else(String::new, |file| file.display().to_string());
    Ok((
        DetectionDataset {
            name,
            examples,
            categories,
        },
        report,
    ))
}

/// One example of every shard in turn: the order in which they were dealt out.
fn in_turn(mut by_shard: Vec<std::vec::IntoIter<Example>>) -> Vec<Example> {
    let count = by_shard.iter().map(ExactSizeIterator::len).sum();
    let mut examples = Vec::with_capacity(count);
    while examples.len() < count {
        examples.extend(by_shard.iter_mut().filter_map(Iterator::next));
    }
    examples
}

fn refuse_duplicates(examples: &[Example]) -> Result<()> {
    let mut places = HashMap::with_capacity(examples.len());
    for example in examples {
        let Some(first) = places.insert(example.image_id, &example.source) else {
            continue;
        };
        if let (
            ImageSource::Record { shard, offset, .. },
            ImageSource::Record {
                shard: first,
                offset: at,
                ..
            },
        ) = (&example.source, first)
        {
            return Err(DataError::Malformed {
                file: shard.to_path_buf(),
                what: format!(
                    "image id {} at byte {offset} is also in {} at byte {at}: is a shard there twice?",
                    example.image_id,
                    first.display()
                ),
            });
        }
        return Err(DataError::Malformed {
            file: PathBuf::from(&example.file_name),
            what: format!(
                "image id {} is in two records: is a shard there twice, once compressed?",
                example.image_id
            ),
        });
    }
    Ok(())
}

#[derive(Debug, Default)]
struct CategoryNames(BTreeMap<CategoryId, Option<String>>);

impl CategoryNames {
    fn add(&mut self, id: CategoryId, name: Option<&str>, file: &Path) -> Result<()> {
        let known = self.0.entry(id).or_default();
        match (&known, name) {
            (Some(known), Some(name)) if known != name => Err(DataError::Malformed {
                file: file.to_path_buf(),
                what: format!(
                    "category id {id} is called {name:?}, but {known:?} elsewhere: are these shards of two data sets?"
                ),
            }),
            (None, Some(name)) => {
                *known = Some(name.to_owned());
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// What one shard holds.
#[derive(Debug, Default)]
struct ShardContent {
    examples: Vec<Example>,
    categories: CategoryNames,
    report: LoadReport,
    captions: bool,
}

/// Reads shards on several threads; the error, if any, is the one of the first faulty shard.
fn read_all(shards: &[PathBuf], options: &ReadOptions) -> Result<Vec<ShardContent>> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let results: Vec<Mutex<Option<Result<ShardContent>>>> = shards.iter().map(|_| Mutex::default()).collect();
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(shard) = shards.get(index) else { break };
            let result = read_shard(shard, options);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            *results[index].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..options.threads.min(shards.len()) {
            scope.spawn(work);
        }
        work();
    });
    // Shards are taken in order, so that everything before the first faulty one has been read.
    results
        .into_iter()
        .map_while(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect()
}

fn read_shard(file: &Path, options: &ReadOptions) -> Result<ShardContent> {
    let io = |source| DataError::Io {
        file: file.to_path_buf(),
        source,
    };
    let mut input = File::open(file).map_err(io)?;
    let file_bytes = input.metadata().map_err(io)?.len();
    let place = match is_gzip(&mut input).map_err(io)? {
        true => Place::Memory,
        false => Place::Shard(file.into()),
    };
    let input = BufReader::with_capacity(1 << 20, input);
    let (input, bytes): (Box<dyn Read>, u64) = match place {
        Place::Shard(_) => (Box::new(input), file_bytes),
        Place::Memory => {
            let unpacked = unpack(MultiGzDecoder::new(input), file, options.max_unpacked_bytes)?;
            let bytes = unpacked.len() as u64;
            (Box::new(Cursor::new(unpacked)), bytes)
        }
    };
    let mut reader = RecordReader::new(input, file, bytes, options.max_record_bytes);
    let mut content = ShardContent::default();
    loop {
        let result = match reader.next_record() {
            Ok(None) => return Ok(content),
            Ok(Some(record)) => read_record(file, &place, record, &mut content),
            Err(error) => Err(error),
        };
        match (result, options.damage) {
            (Ok(()), _) => {}
            (
                Err(DataError::Record {
                    record, offset, what, ..
                }),
                Damage::Skip { .. },
            ) => {
                content.report.skipped.push(Finding {
                    kind: FindingKind::DamagedRecord,
                    file: file.display().to_string(),
                    record: record as i64,
                    what: format!("at byte {offset}: {what}"),
                    box_xywh_px: None,
                });
            }
            (Err(error), _) => return Err(error),
        }
    }
}

/// Where the images of a shard stay.
enum Place {
    /// In the file.
    Shard(Arc<Path>),
    /// In memory, because nothing but reading everything before it finds a place in a compressed file.
    Memory,
}

/// Whether a file is compressed; a length may begin with gzip's two bytes, but then its checksum is right.
fn is_gzip(input: &mut File) -> io::Result<bool> {
    let mut head = Vec::with_capacity(HEADER_BYTES as usize);
    input.by_ref().take(HEADER_BYTES).read_to_end(&mut head)?;
    input.rewind()?;
    Ok(head.starts_with(&[0x1f, 0x8b]) && !is_header(&head))
}

fn unpack(input: impl Read, file: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = input.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|error| DataError::Malformed {
        file: file.to_path_buf(),
        what: format!("cannot be unpacked ({error}): the file was cut off or is damaged, copy it again"),
    })?;
    if bytes.len() as u64 > limit {
        return Err(DataError::Malformed {
            file: file.to_path_buf(),
            what: format!(
                "holds more than {limit} bytes when unpacked, too many to keep in memory: unpack it first (gzip -d)"
            ),
        });
    }
    Ok(bytes)
}

fn read_record(shard: &Path, place: &Place, record: Record, content: &mut ShardContent) -> Result<()> {
    let (index, offset) = (record.index, record.payload_offset);
    let fault = |what: String| DataError::Record {
        file: shard.to_path_buf(),
        record: index,
        offset,
        what,
    };
    let payload = Bytes::from(record.payload);
    let features = Features::decode(payload.clone()).map_err(|error| {
        fault(format!(
            "is no tf.train.Example ({error}): is this a detection data set?"
        ))
    })?;
    let fields = Fields::take(&features).map_err(fault)?;
    let mut example = fields.example(place, offset, &payload).map_err(fault)?;
    let objects = fields.objects().map_err(fault)?;
    let mut report = LoadReport::default();
    for (object, raw) in objects.iter().enumerate() {
        content
            .categories
            .add(raw.category, raw.text.as_deref(), shard)
            .map_err(|error| fault(format!("object {object}: {error}")))?;
        if let Some(annotation) = raw.annotation(&example, object, &mut report) {
            example.objects.push(annotation);
        }
    }
    content.report.append(report);
    content.captions |= fields.has_captions;
    content.examples.push(example);
    Ok(())
}

/// The example of one payload, as [`load_shards`] reads it, with its image in memory.
///
/// # Errors
/// [`DataError::Record`]; never panics on any input.
pub fn parse_record(file: &Path, payload: &[u8]) -> Result<Example> {
    let record = Record {
        index: 0,
        payload_offset: HEADER_BYTES,
        payload: payload.to_vec(),
    };
    let mut content = ShardContent::default();
    read_record(file, &Place::Memory, record, &mut content)?;
    content.examples.pop().ok_or(DataError::Internal {
        what: "a record without an example",
    })
}

/// The features of a record, typed but not yet checked against each other.
struct Fields<'a> {
    encoded: &'a Bytes,
    width: u32,
    height: u32,
    source_id: String,
    file_name: String,
    /// xmin, ymin, xmax, ymax.
    corners: [&'a [f32]; 4],
    labels: &'a [i64],
    texts: &'a [Bytes],
    areas: &'a [f32],
    crowds: &'a [i64],
    difficult: &'a [i64],
    has_captions: bool,
}

type Checked<T> = std::result::Result<T, String>;

impl<'a> Fields<'a> {
    fn take(features: &'a Features) -> Checked<Self> {
        let wrong = |error: super::example::WrongType| format!("{error}: is this a detection data set?");
        let bytes = |key: &str| features.bytes(key).map_err(wrong);
        let floats = |key: &str| features.floats(key).map_err(wrong);
        let ints = |key: &str| features.ints(key).map_err(wrong);
        let text = |key: &str| -> Checked<String> {
            let first = bytes(key)?.first();
            Ok(first.map_or_else(String::new, |text| String::from_utf8_lossy(text).into_owned()))
        };
        let encoded = bytes(key::ENCODED)?
            .first()
            .filter(|encoded| !encoded.is_empty())
            .ok_or_else(|| format!("has no {}: is this a detection data set?", key::ENCODED))?;
        let side = |key: &str| -> Checked<u32> {
            let side = ints(key)?.first().copied().unwrap_or(-1);
            u32::try_from(side.max(0)).map_err(|_| format!("{key} is {side}: no image is that large"))
        };
        let (mut width, mut height) = (side(key::WIDTH)?, side(key::HEIGHT)?);
        if width == 0 || height == 0 {
            let probed = probe(encoded).map_err(|reason| {
                format!("has no {} and its image cannot be measured: {reason}", key::WIDTH)
            })?;
            (width, height) = (probed.width, probed.height);
        }
        Ok(Self {
            encoded,
            width,
            height,
            source_id: text(key::SOURCE_ID)?,
            file_name: text(key::FILENAME)?,
            corners: [
                floats(key::XMIN)?,
                floats(key::YMIN)?,
                floats(key::XMAX)?,
                floats(key::YMAX)?,
            ],
            labels: ints(key::LABEL)?,
            texts: bytes(key::TEXT)?,
            areas: floats(key::AREA)?,
            crowds: ints(key::IS_CROWD)?,
            difficult: ints(key::DIFFICULT)?,
            has_captions: !bytes(key::CAPTION)?.is_empty(),
        })
    }

    fn example(&self, place: &Place, payload_offset: u64, payload: &Bytes) -> Checked<Example> {
        // Decoding shares the payload's memory, so that addresses tell where in the file the image lies.
        let at = self.encoded.as_ptr().addr().checked_sub(payload.as_ptr().addr());
        let at = at.filter(|at| at + self.encoded.len() <= payload.len());
        let at = at.ok_or("cannot be located in its file; please report it")? as u64;
        let source_id = self.source_id.trim();
        let image_id = match source_id {
            "" => hashed_id(self.encoded),
            id => stable_id(id),
        };
        let named = |name: &str| match name {
            "" => image_id.to_string(),
            name => name.to_owned(),
        };
        Ok(Example {
            image_id,
            source_id: named(source_id),
            file_name: named(&self.file_name),
            width: self.width,
            height: self.height,
            source: match place {
                Place::Shard(shard) => ImageSource::Record {
                    shard: Arc::clone(shard),
                    offset: payload_offset + at,
                    len: self.encoded.len() as u64,
                },
                Place::Memory => ImageSource::Memory(Arc::from(&self.encoded[..])),
            },
            objects: Vec::new(),
        })
    }

    fn objects(&self) -> Checked<Vec<RawObject>> {
        let count = self.labels.len();
        let required = [
            (key::XMIN, self.corners[0].len()),
            (key::YMIN, self.corners[1].len()),
            (key::XMAX, self.corners[2].len()),
            (key::YMAX, self.corners[3].len()),
        ];
        let optional = [
            (key::TEXT, self.texts.len()),
            (key::AREA, self.areas.len()),
            (key::IS_CROWD, self.crowds.len()),
            (key::DIFFICULT, self.difficult.len()),
        ];
        let uneven = (required.iter().find(|(_, len)| *len != count))
            .or_else(|| optional.iter().find(|(_, len)| *len != count && *len != 0));
        if let Some((key, len)) = uneven {
            return Err(format!(
                "{key} has {len} values and {} {count}: convert it again",
                key::LABEL
            ));
        }
        (0..count)
            .map(|at| {
                let id = self.labels[at];
                let category = u32::try_from(id)
                    .map_err(|_| format!("object {at}: category id {id} is negative or too large"))?;
                let corners = self.corners.map(|corner| corner[at]);
                let area = self.areas.get(at).copied();
                if !corners.iter().chain(&area).all(|v| v.is_finite()) {
                    return Err(format!("object {at}: box {corners:?} or its area is not finite"));
                }
                Ok(RawObject {
                    corners,
                    category: CategoryId(category),
                    text: self
                        .texts
                        .get(at)
                        .map(|text| String::from_utf8_lossy(text).into_owned()),
                    area,
                    is_crowd: self.crowds.get(at).is_some_and(|&crowd| crowd != 0),
                    difficult: self.difficult.get(at).is_some_and(|&difficult| difficult != 0),
                })
            })
            .collect()
    }
}

/// An object as the record holds it.
struct RawObject {
    /// xmin, ymin, xmax, ymax divided by the image size.
    corners: [f32; 4],
    category: CategoryId,
    text: Option<String>,
    area: Option<f32>,
    is_crowd: bool,
    difficult: bool,
}

impl RawObject {
    fn annotation(
        &self,
        example: &Example,
        object: usize,
        report: &mut LoadReport,
    ) -> Option<ObjectAnnotation> {
        let bbox = pixels(self.corners, example.width, example.height);
        let [xmin, ymin, xmax, ymax] = self.corners;
        let inside = self.corners.iter().all(|corner| (0.0..=1.0).contains(corner));
        // Rounding of x + width must not look like a box that runs past the image.
        let box_xywh_px = match inside && xmin < xmax && ymin < ymax {
            true => {
                report.census.count(bbox, (example.width, example.height));
                bbox
            }
            false => clip(bbox, example, object as i64, report)?,
        };
        Some(ObjectAnnotation {
            box_xywh_px,
            category: self.category,
            area: self.area.map_or(box_xywh_px[2] * box_xywh_px[3], f64::from),
            is_crowd: self.is_crowd,
            difficult: self.difficult,
        })
    }
}

/// `[x, y, width, height]` in pixels of corners divided by the image's size in f32.
///
/// Annotations have a few decimals, which the division hides: where pixels with at most two decimals give the very same four
/// corners, they are what was meant.
fn pixels(corners: [f32; 4], width: u32, height: u32) -> [f64; 4] {
    let sides = [width, height, width, height].map(f64::from);
    let exact = |at: usize| f64::from(corners[at]) * sides[at];
    let decimal = |v: f64| (v * 100.0).round() / 100.0;
    let [left, top, right, bottom] = [0, 1, 2, 3].map(|at| decimal(exact(at)));
    let [x, y, w, h] = [left, top, decimal(right - left), decimal(bottom - top)];
    let again = [x, y, x + w, y + h];
    if (0..4).all(|at| (again[at] / sides[at]) as f32 == corners[at]) {
        return [x, y, w, h];
    }
    // Exact: the products need no more than 53 bits for images of less than 2^29 pixels a side.
    let [left, top, right, bottom] = [0, 1, 2, 3].map(exact);
    [left, top, right - left, bottom - top]
}
