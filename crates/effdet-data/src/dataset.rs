//! The common model of a data set, whatever format it came from.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
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
        let io = |file: &Path| {
            let file = file.to_path_buf();
            move |source| DataError::Io { file, source }
        };
        let limit = |file: &Path, bytes: u64| match bytes > max_bytes {
            true => Err(DataError::TooLarge {
                file: file.display().to_string(),
                bytes,
                limit: max_bytes,
            }),
            false => Ok(()),
        };
        match self {
            Self::File(path) => {
                let mut file = File::open(path).map_err(io(path))?;
                let len = file.metadata().map_err(io(path))?.len();
                limit(path, len)?;
                let mut bytes = Vec::with_capacity(len as usize);
                file.read_to_end(&mut bytes).map_err(io(path))?;
                Ok(bytes)
            }
            Self::Record { shard, offset, len } => {
                limit(shard, *len)?;
                let mut file = File::open(shard).map_err(io(shard))?;
                file.seek(SeekFrom::Start(*offset)).map_err(io(shard))?;
                let mut bytes = vec![0; *len as usize];
                file.read_exact(&mut bytes).map_err(io(shard))?;
                Ok(bytes)
            }
            Self::Memory(bytes) => Ok(bytes.to_vec()),
        }
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
    /// SHA-256 over ids, file names, sizes, boxes and categories, in hexadecimal: equal for equal annotations.
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
                hash.update([u8::from(object.is_crowd), u8::from(object.difficult)]);
            }
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// What loading had to change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Boxes cut to their image.
    pub clipped: Vec<Finding>,
    /// Objects left out.
    pub dropped: Vec<Finding>,
    /// Damaged records left out.
    pub skipped: Vec<Finding>,
}

/// One remark about a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// File.
    pub file: String,
    /// Record in it: annotation id or index.
    pub record: i64,
    /// What about it.
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, record {}: {}", self.file, self.record, self.what)
    }
}
