//! The common model of a data set, whatever format it came from.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use effdet_model::label_map::CategoryId;
use sha2::{Digest, Sha256};

use crate::error::{DataError, Result};

/// One annotated object.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectAnnotation {
    /// `[x, y, width, height]` in pixels of the stored image.
    pub box_xywh_px: [f64; 4],
    /// Category.
    pub category: CategoryId,
    /// Area that the COCO metric sorts by size, in pixels².
    pub area: f64,
    /// Whether the box covers a crowd.
    pub is_crowd: bool,
    /// VOC's mark of objects that are hard to recognise.
    pub difficult: bool,
}

/// Where the encoded bytes of an image are.
#[derive(Debug, Clone, PartialEq)]
pub enum ImageSource {
    /// A file of its own.
    File(PathBuf),
    /// A range of a record file.
    Record {
        /// Record file.
        shard: Arc<Path>,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// In memory.
    Memory(Arc<[u8]>),
}

impl ImageSource {
    /// Reads the encoded image.
    ///
    /// # Errors
    /// [`DataError::Io`]; [`DataError::TooLarge`] before anything is allocated.
    pub fn read_bytes(&self, max_bytes: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read_into(max_bytes, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads the encoded image in place of what `bytes` hold.
    ///
    /// # Errors
    /// Those of [`Self::read_bytes`].
    pub fn read_into(&self, max_bytes: u64, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.clear();
        match self {
            Self::File(file) => read_file_into(file, max_bytes, bytes),
            Self::Record { shard, offset, len } => {
                refuse_large(shard, *len, max_bytes)?;
                let mut read = || -> io::Result<()> {
                    let mut file = File::open(shard)?;
                    file.seek(SeekFrom::Start(*offset))?;
                    bytes.resize(*len as usize, 0);
                    file.read_exact(bytes)
                };
                read().map_err(|source| DataError::Io {
                    file: shard.to_path_buf(),
                    source,
                })
            }
            Self::Memory(held) => {
                bytes.extend_from_slice(held);
                Ok(())
            }
        }
    }
}

/// Opens a regular file of at most `max_bytes`; what it grows by afterwards is not read.
///
/// # Errors
/// [`DataError::Io`], also for pipes and devices, which may never end; [`DataError::TooLarge`].
pub(crate) fn open_file(file: &Path, max_bytes: u64) -> Result<io::Take<File>> {
    let io = |source| DataError::Io {
        file: file.to_path_buf(),
        source,
    };
    let metadata = fs::metadata(file).map_err(io)?;
    if !metadata.is_file() {
        return Err(io(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        )));
    }
    refuse_large(file, metadata.len(), max_bytes)?;
    Ok(File::open(file).map_err(io)?.take(metadata.len()))
}

/// Reads a regular file of at most `max_bytes`.
///
/// # Errors
/// Those of [`open_file`], before anything is allocated.
pub(crate) fn read_file(file: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    read_file_into(file, max_bytes, &mut bytes)?;
    Ok(bytes)
}

fn read_file_into(file: &Path, max_bytes: u64, bytes: &mut Vec<u8>) -> Result<()> {
    let mut input = open_file(file, max_bytes)?;
    bytes.reserve_exact(input.limit() as usize);
    input.read_to_end(bytes).map_err(|source| DataError::Io {
        file: file.to_path_buf(),
        source,
    })?;
    Ok(())
}

fn refuse_large(file: &Path, bytes: u64, limit: u64) -> Result<()> {
    match bytes > limit {
        true => Err(DataError::TooLarge {
            file: file.display().to_string(),
            bytes,
            limit,
        }),
        false => Ok(()),
    }
}

/// One image with its objects.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Numeric id, as the COCO metric uses it.
    pub image_id: i64,
    /// Id as the source writes it.
    pub source_id: String,
    /// File name as the source writes it.
    pub file_name: String,
    /// Width by the annotation, 0 = unknown.
    pub width: u32,
    /// Height by the annotation, 0 = unknown.
    pub height: u32,
    /// Encoded image.
    pub source: ImageSource,
    /// Objects.
    pub objects: Vec<ObjectAnnotation>,
}

impl Example {
    /// Whether an image of this width and height is what the annotation says; a side it does not give fits any.
    pub fn fits(&self, (width, height): (u32, u32)) -> bool {
        (self.width == 0 || self.width == width) && (self.height == 0 || self.height == height)
    }
}

/// A category of a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Category {
    /// Id.
    pub id: CategoryId,
    /// Name.
    pub name: String,
}

/// Images, objects and categories.
#[derive(Debug, Clone, PartialEq)]
pub struct DetectionDataset {
    /// Name for messages.
    pub name: String,
    /// Images in order.
    pub examples: Vec<Example>,
    /// Categories in ascending order of their ids.
    pub categories: Vec<Category>,
}

impl DetectionDataset {
    /// SHA-256 over ids, file names, sizes, boxes, areas and categories, in hexadecimal: equal for equal annotations.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        let text = |hash: &mut Sha256, text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        for category in &self.categories {
            hash.update(category.id.0.to_le_bytes());
            text(&mut hash, &category.name);
        }
        for example in &self.examples {
            hash.update(example.image_id.to_le_bytes());
            text(&mut hash, &example.file_name);
            hash.update(example.width.to_le_bytes());
            hash.update(example.height.to_le_bytes());
            hash.update((example.objects.len() as u64).to_le_bytes());
            for object in &example.objects {
                object
                    .box_xywh_px
                    .iter()
                    .for_each(|v| hash.update(v.to_le_bytes()));
                hash.update(object.category.0.to_le_bytes());
                hash.update(object.area.to_le_bytes());
                hash.update([u8::from(object.is_crowd), u8::from(object.difficult)]);
            }
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The number that stands for an id: its own, or 53 bits of its SHA-256 where it is no number.
///
/// 53 bits, so that the number is the same in JSON readers that know floats only.
pub fn stable_id(text: &str) -> i64 {
    text.trim()
        .parse()
        .unwrap_or_else(|_| hashed_id(text.trim().as_bytes()))
}

/// 53 bits of a SHA-256.
pub(crate) fn hashed_id(bytes: &[u8]) -> i64 {
    let digest = Sha256::digest(bytes);
    let head = digest[..8].try_into().expect("32 bytes");
    (u64::from_be_bytes(head) >> 11) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset() -> DetectionDataset {
        let object = |difficult| ObjectAnnotation {
            box_xywh_px: [1.0, 2.0, 3.0, 4.0],
            category: CategoryId(1),
            area: 12.0,
            is_crowd: false,
            difficult,
        };
        DetectionDataset {
            name: "test".into(),
            examples: vec![Example {
                image_id: 1,
                source_id: "1".into(),
                file_name: "a.jpg".into(),
                width: 10,
                height: 10,
                source: ImageSource::Memory(Arc::from(*b"")),
                objects: [true, false, true].map(object).to_vec(),
            }],
            categories: vec![Category {
                id: CategoryId(1),
                name: "cat".into(),
            }],
        }
    }

    #[test]
    fn a_fingerprint_depends_on_annotations_and_not_on_names_of_sets_or_places_of_images() {
        let changed = |change: fn(&mut DetectionDataset)| {
            let mut data = dataset();
            change(&mut data);
            data.fingerprint() != dataset().fingerprint()
        };
        assert!(!changed(|data| data.name.clear()));
        assert!(!changed(
            |data| data.examples[0].source = ImageSource::File("elsewhere".into())
        ));
        assert!(changed(|data| data.examples[0].image_id = 2));
        assert!(changed(|data| data.examples[0].width = 11));
        assert!(changed(|data| data.examples[0].objects[0].box_xywh_px[3] = 4.5));
        assert!(changed(|data| data.examples[0].objects[0].is_crowd = true));
        assert!(changed(|data| data.examples[0].objects[0].area = 13.0));
        assert!(changed(|data| data.categories[0].name = "dog".into()));
    }

    #[test]
    fn files_over_the_limit_and_devices_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.jpg");
        fs::write(&file, [7; 100]).unwrap();
        let source = ImageSource::File(file);
        assert_eq!(source.read_bytes(100).unwrap(), [7; 100]);
        assert!(matches!(
            source.read_bytes(99),
            Err(DataError::TooLarge { bytes: 100, .. })
        ));
        let folder = ImageSource::File(folder.path().to_path_buf());
        assert!(matches!(folder.read_bytes(100), Err(DataError::Io { .. })));
    }

    #[test]
    fn a_range_of_a_file_is_read_and_a_range_past_its_end_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.tfrecord");
        fs::write(&file, b"0123456789").unwrap();
        let range = |offset, len| ImageSource::Record {
            shard: file.as_path().into(),
            offset,
            len,
        };
        assert_eq!(range(2, 3).read_bytes(3).unwrap(), b"234");
        assert!(matches!(
            range(2, 3).read_bytes(2),
            Err(DataError::TooLarge { .. })
        ));
        assert!(matches!(range(8, 3).read_bytes(3), Err(DataError::Io { .. })));
    }
}
