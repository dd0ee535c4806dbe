//! Checkpoint directories committed by rename, and import and export of weights by name.
//!
//! # A checkpoint on disk
//!
//! ```text
//! <directory of the run>/
//! ├── step-00001234/               complete: it appeared by one rename
//! │   ├── manifest.json            step, position, configuration; size and SHA-256 of each other file
//! │   ├── weights.safetensors      every variable, by name, in TensorFlow's layout
//! │   ├── ema.safetensors          their moving averages, when there are any
//! │   └── momentum.safetensors     optimiser slots `<slot>/<variable>`, when there are any
//! └── .step-00001300.tmp-4711/     a save in progress, or what a killed one left; invisible, removed by `gc`
//! ```
//!
//! [`CheckpointStore::save`] writes into the hidden directory, syncs every file, syncs the directory, renames it, and syncs its parent.
//! So after a crash, a kill or a power cut, `step-*` holds either the whole checkpoint or nothing, and a failed save leaves the earlier
//! ones as they were. The first key of `manifest.json` is the SHA-256 of the bytes that follow it, so a change of any byte of any file is
//! noticed. Two checkpoints with the same content are the same bytes.
//!
//! # What is promised
//!
//! * What [`CheckpointStore::list`] shows has an intact manifest and files of the recorded sizes; every load verifies checksums.
//! * [`CheckpointStore::load_latest`] falls back to the newest intact checkpoint and says what it passed over.
//! * [`CheckpointStore::prune`] never removes the newest intact checkpoint.
//! * Bad input is an error, never a panic, and no file is read before its size is checked.
//!
//! # Limits
//!
//! | what | limit |
//! |---|---|
//! | `manifest.json` | [`MAX_MANIFEST_BYTES`] |
//! | one safetensors file | [`MAX_TENSOR_FILE_BYTES`] |
//! | header of a safetensors file | 100 MB (crate `safetensors`) |
#![forbid(unsafe_code)]

mod error;
mod filesystem;
mod hash;
mod import;
mod lock;
mod manifest;
mod store;
mod tensors;

pub use error::CkptError;
pub use hash::{sha256_hex, weights_hash};
pub use import::{MatchReport, Reinitialised, Rename, Skipped, load_backbone, match_variables};
pub use lock::RunLock;
pub use manifest::{
    CheckpointState, ClassEntry, FORMAT_VERSION, FileRecord, LossScaleState, MAX_MANIFEST_BYTES, Manifest,
};
pub use store::{
    Checkpoint, CheckpointReader, CheckpointStore, Latest, Listing, PassedOver, Pruned, Retention, Snapshot,
};
pub use tensors::{
    MAX_TENSOR_FILE_BYTES, Tensor, Tensors, encode_tensors, load_notes, load_tensors, save_weights,
    write_file,
};
