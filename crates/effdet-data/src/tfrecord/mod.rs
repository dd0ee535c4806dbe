//! TFRecord files in the schema of the reference's COCO converter (`dataset/create_coco_tfrecord.py`).
//!
//! A data set is a set of shards `<prefix>-00000-of-00032.tfrecord` …; record i lies in shard i mod n. A record is a serialised
//! `tf.train.Example` whose boxes are float32 corners divided by the image size: boxes read from records agree with the JSON they
//! came from to float32, and the normalised corners that training sees are the same bits on either way.

pub mod example;
pub mod framing;
mod manifest;
mod reader;
mod shards;
mod writer;

#[cfg(test)]
mod tests;

pub use manifest::{Manifest, ShardEntry};
pub use reader::{Damage, ReadOptions, load, load_shards, parse_record};
pub(crate) use shards::{ShardName, is_shard_file};
pub use shards::{check_complete, find_shards};
pub use writer::{WriteOptions, WriteReport, write};

/// Keys of the features of a record.
mod key {
    pub const HEIGHT: &str = "image/height";
    pub const WIDTH: &str = "image/width";
    pub const FILENAME: &str = "image/filename";
    pub const SOURCE_ID: &str = "image/source_id";
    pub const SHA256: &str = "image/key/sha256";
    pub const ENCODED: &str = "image/encoded";
    pub const FORMAT: &str = "image/format";
    pub const CAPTION: &str = "image/caption";
    pub const XMIN: &str = "image/object/bbox/xmin";
    pub const XMAX: &str = "image/object/bbox/xmax";
    pub const YMIN: &str = "image/object/bbox/ymin";
    pub const YMAX: &str = "image/object/bbox/ymax";
    pub const TEXT: &str = "image/object/class/text";
    pub const LABEL: &str = "image/object/class/label";
    pub const IS_CROWD: &str = "image/object/is_crowd";
    pub const AREA: &str = "image/object/area";
    /// Of the reference's VOC converter.
    pub const DIFFICULT: &str = "image/object/difficult";
}
