//! Errors, by whose fault they are.

use std::io;
use std::path::{Path, PathBuf};

/// Why reading or writing a checkpoint failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CkptError {
    /// Environment: the operating system refused an operation.
    #[error("cannot {operation} {}: {source}; check free space, permissions and that the path is right", path.display())]
    Io {
        /// What was tried, as a verb: `write`, `sync`, `rename` …
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Environment: the checkpoint is complete, but its directory entry could not be forced to disk, so a power cut may undo it.
    #[error("{} is saved, but a power cut may lose it: syncing its parent directory failed: {source}", path.display())]
    NotDurable {
        /// The checkpoint.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Environment: another process writes into this folder.
    #[error("{} is in use by {holder}: wait until it ends, or choose another folder", path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
        /// Who has it, in its own words.
        holder: String,
    },
    /// Limit: a file is larger than anything that is ever written.
    #[error("{} has {bytes} bytes, more than the limit of {limit}; it is not a file of this kind", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// Data: not a directory with a manifest.
    #[error("{} is not a checkpoint: {reason}; give a directory step-NNNNNNNN of a run", path.display())]
    NotACheckpoint {
        /// The path.
        path: PathBuf,
        /// What it is instead.
        reason: &'static str,
    },
    /// Data: the manifest is damaged or was edited.
    #[error("{} is damaged at byte {offset}: {reason}; use an earlier checkpoint", path.display())]
    BadManifest {
        /// The manifest.
        path: PathBuf,
        /// Where reading stopped.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// Data: written by a newer version of the program.
    #[error("{} has format version {version}, this program reads up to {supported}; update the program", path.display())]
    UnsupportedVersion {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        version: u32,
        /// The newest version that can be read.
        supported: u32,
    },
    /// Data: the manifest names a file that is not there.
    #[error("{} is missing; use an earlier checkpoint", path.display())]
    MissingFile {
        /// The file.
        path: PathBuf,
    },
    /// Data: a file is longer or shorter than its manifest says.
    #[error("{} has {actual} bytes instead of {expected}; use an earlier checkpoint", path.display())]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes on disk.
        actual: u64,
    },
    /// Data: the content of a file is not what was written.
    #[error("{} has the SHA-256 {actual} instead of {expected}; the disk changed it, use an earlier checkpoint", path.display())]
    WrongChecksum {
        /// The file.
        path: PathBuf,
        /// Checksum by the manifest.
        expected: String,
        /// Checksum of the bytes on disk.
        actual: String,
    },
    /// Data: not a valid safetensors file.
    #[error("{} is not a valid safetensors file (byte {offset}): {reason}; fetch or export it again", path.display())]
    BadTensorFile {
        /// The file.
        path: PathBuf,
        /// Start of the part that is wrong.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// Data: a tensor is not of a type that can be read.
    #[error("{}: tensor {tensor:?} has the type {dtype}; convert it to F32", path.display())]
    UnsupportedType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type in safetensors' words.
        dtype: String,
    },
    /// Data: a tensor has another shape than the variable of its name.
    #[error("{}: tensor {tensor:?} has the shape {actual:?}, the network needs {expected:?}; use the configuration that the weights were trained with", path.display())]
    WrongShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Shape of the variable.
        expected: Vec<usize>,
        /// Shape in the file.
        actual: Vec<usize>,
    },
    /// Data: a variable of the network is not in the file.
    #[error("{}: no tensor {tensor:?}; use the configuration that the weights were trained with", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The variable.
        tensor: String,
    },
    /// Data: the file has a tensor that the network has no variable for.
    #[error("{}: the network has no variable {tensor:?}; use the configuration that the weights were trained with", path.display())]
    UnexpectedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// Data: not one tensor of the file belongs to the network.
    #[error("{}: none of its {} tensors fits a variable of the network (the first is {example:?}, the network wants names like {wanted:?}); add a rename or choose another file", path.display(), count)]
    NothingMatched {
        /// The file.
        path: PathBuf,
        /// Tensors in the file.
        count: usize,
        /// A tensor of the file.
        example: String,
        /// A variable of the network.
        wanted: String,
    },
    /// Caller: a buffer does not have the length that the variable table gives it.
    #[error("{what} has {actual} values, the variable table has {expected}")]
    WrongLength {
        /// Which buffer.
        what: String,
        /// Values by the table.
        expected: usize,
        /// Values given.
        actual: usize,
    },
    /// Caller: a value that the manifest cannot hold.
    #[error("{field} cannot be saved: {reason}")]
    InvalidState {
        /// Field of the state or slot of the optimiser.
        field: String,
        /// Why not.
        reason: String,
    },
    /// Caller: another checkpoint of the same step is there, intact and with other weights.
    #[error("{} exists with other weights; resume from it, remove it, or use another directory", path.display())]
    StepExists {
        /// The checkpoint.
        path: PathBuf,
    },
}

impl CkptError {
    /// Whether the files themselves are at fault (damaged, incomplete or no checkpoint at all), so that an earlier checkpoint may do.
    pub fn is_corruption(&self) -> bool {
        matches!(
            self,
            Self::TooLarge { .. }
                | Self::NotACheckpoint { .. }
                | Self::BadManifest { .. }
                | Self::MissingFile { .. }
                | Self::WrongSize { .. }
                | Self::WrongChecksum { .. }
                | Self::BadTensorFile { .. }
        )
    }

    /// Adapter for `map_err`.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            operation,
            path,
            source,
        }
    }
}
