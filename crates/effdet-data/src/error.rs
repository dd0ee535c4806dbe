//! Why data could not be used, by fault: the data, the caller, a limit, the environment.

use std::path::PathBuf;

use crate::decode::DecodeError;

/// Result of reading data.
pub type Result<T> = std::result::Result<T, DataError>;

/// A fault in data or its handling; names file, record and remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// Data: an image that cannot be decoded.
    #[error("image {file}: {reason}")]
    Image {
        /// File name.
        file: String,
        /// Why.
        reason: DecodeError,
    },
    /// Data: an image of another size than the one that was annotated.
    #[error(
        "image {file} has {}x{} pixels (width x height) but its annotations are for {}x{}: \
         it was resized or turned after annotation; annotate it again or restore the original",
        decoded.0, decoded.1, annotated.0, annotated.1
    )]
    SizeMismatch {
        /// File name.
        file: String,
        /// Width and height of the image.
        decoded: (u32, u32),
        /// Width and height by the annotations.
        annotated: (u32, u32),
    },
    /// Data: a category without a place in the label map.
    #[error(
        "{file}, object {record}: category id {category} is not in the label map; use the label map of this data set"
    )]
    Category {
        /// File name of the image.
        file: String,
        /// Index of the object.
        record: usize,
        /// Category id.
        category: u32,
    },
    /// Caller: nothing to read.
    #[error("data set {name} has no images, or the batch size is 0: check the path and the split")]
    Empty {
        /// Name of the data set.
        name: String,
    },
    /// Data: a file's content is wrong.
    #[error("{}: {what}", file.display())]
    Malformed {
        /// File.
        file: PathBuf,
        /// What is wrong, where, and what to do.
        what: String,
    },
    /// Data: not a single box to learn from.
    #[error("{}: {what}", file.display())]
    NoBoxes {
        /// File.
        file: PathBuf,
        /// How that came about, and what to do.
        what: String,
    },
    /// Data: a record of a TFRecord file is damaged or makes no sense.
    #[error("{}: record {record} at byte {offset}: {what}", file.display())]
    Record {
        /// File.
        file: PathBuf,
        /// Counted from 0.
        record: u64,
        /// Byte in the file.
        offset: u64,
        /// What is wrong and what to do.
        what: String,
    },
    /// Caller: something impossible was asked for.
    #[error("{what}")]
    Caller {
        /// What, and what to do instead.
        what: String,
    },
    /// Limit: larger than allowed.
    #[error("{file} has {bytes} bytes, more than the limit of {limit}; raise the limit if that is intended")]
    TooLarge {
        /// File.
        file: String,
        /// Size.
        bytes: u64,
        /// Limit.
        limit: u64,
    },
    /// Environment: reading or writing failed.
    #[error("cannot read or write {}: {source}", file.display())]
    Io {
        /// File.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A bug.
    #[error("{what}; please report it")]
    Internal {
        /// What happened.
        what: &'static str,
    },
}
