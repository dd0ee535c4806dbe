//! `manifest.json`: what a checkpoint is of, and the sizes and checksums of its files.

use std::collections::BTreeMap;
use std::path::Path;

use effdet_model::hparams::{HParams, Profile};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::CkptError;
use crate::hash::sha256_hex;

/// Version of the layout of directory and manifest. Readers accept this and older ones.
pub const FORMAT_VERSION: u32 = 1;
/// Largest manifest that is written or read.
pub const MAX_MANIFEST_BYTES: u64 = 16 << 20;

pub(crate) const MANIFEST_FILE: &str = "manifest.json";
const FORMAT: &str = "effdet-checkpoint";

/// One class of the data that a network was trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassEntry {
    /// Category id of the data set.
    pub id: u32,
    /// Name.
    pub name: String,
}

/// State of dynamic loss scaling.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScaleState {
    /// Current factor.
    pub scale: f32,
    /// Steps since the last overflow or change of the factor.
    pub clean_steps: u64,
    /// Steps skipped for overflow since the start of training.
    pub skipped_steps: u64,
}

/// Everything about a moment of training but the values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointState {
    /// Optimiser steps done.
    pub step: u64,
    /// Epoch in progress, from 0.
    pub epoch: u64,
    /// Samples of that epoch already used: the position in its order at which training continues.
    pub sample_position: u64,
    /// Preset, such as `efficientdet-d0`.
    pub model: String,
    /// Conventions that the weights belong to; they are never run under another.
    pub profile: Profile,
    /// Effective hyper-parameters, an `HParams` as JSON.
    pub hparams: Value,
    /// Classes in the order of the network's outputs.
    pub class_map: Vec<ClassEntry>,
    /// Identifies the training data.
    pub data_fingerprint: String,
    /// Identifies the configuration of the run.
    pub config_hash: String,
    /// Loss scaling, when it is used.
    pub loss_scale: Option<LossScaleState>,
    /// What [`crate::Retention::keep_best`] goes by, higher is better (validation AP); none before the first evaluation.
    pub metric: Option<f64>,
    /// Whatever else the trainer wants back.
    pub extra: Value,
}

impl CheckpointState {
    /// The hyper-parameters, typed and validated.
    ///
    /// # Errors
    /// [`CkptError::InvalidState`] when they are not those of a network this program knows.
    pub fn parse_hparams(&self) -> Result<HParams, CkptError> {
        let invalid = |reason: String| CkptError::InvalidState {
            field: "hparams".to_owned(),
            reason,
        };
        let hparams: HParams =
            serde_json::from_value(self.hparams.clone()).map_err(|e| invalid(e.to_string()))?;
        hparams.validate().map_err(|e| invalid(e.to_string()))?;
        Ok(hparams)
    }

    /// JSON has no NaN and no infinity.
    fn check(&self) -> Result<(), CkptError> {
        let scale = self.loss_scale.map(|state| f64::from(state.scale));
        for (field, value) in [("metric", self.metric), ("loss_scale", scale)] {
            if let Some(value) = value.filter(|value| !value.is_finite()) {
                return Err(CkptError::InvalidState {
                    field: field.to_owned(),
                    reason: format!("{value} is not finite"),
                });
            }
        }
        Ok(())
    }
}

/// Size and checksum of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256, 64 lower-case hexadecimal digits.
    pub sha256: String,
}

/// Content of `manifest.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// What the trainer gave.
    pub state: CheckpointState,
    /// Files of the checkpoint by name.
    pub files: BTreeMap<String, FileRecord>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    format: String,
    version: u32,
    files: BTreeMap<String, FileRecord>,
    state: CheckpointState,
}

/// Format and version alone, readable whatever a later version adds.
#[derive(Deserialize)]
struct Preamble {
    format: String,
    version: u32,
}

/// A manifest begins with these bytes, 64 digits and `",`; the digest covers all bytes after that.
const DIGEST_PREFIX: &str = "{\n  \"sha256\": \"";
const DIGEST_SUFFIX: &str = "\",";
const DIGEST_LEN: usize = 64;

impl Manifest {
    /// The bytes of `manifest.json`.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, CkptError> {
        self.state.check()?;
        let document = Document {
            format: FORMAT.to_owned(),
            version: FORMAT_VERSION,
            files: self.files.clone(),
            state: self.state.clone(),
        };
        let text = serde_json::to_string_pretty(&document).map_err(|error| CkptError::InvalidState {
            field: "manifest".to_owned(),
            reason: error.to_string(),
        })?;
        let rest = format!("{}\n", text.strip_prefix('{').unwrap_or(&text));
        let bytes = format!(
            "{DIGEST_PREFIX}{}{DIGEST_SUFFIX}{rest}",
            sha256_hex(rest.as_bytes())
        )
        .into_bytes();
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(CkptError::InvalidState {
                field: "manifest".to_owned(),
                reason: format!("{} bytes exceed the limit of {MAX_MANIFEST_BYTES}", bytes.len()),
            });
        }
        Ok(bytes)
    }

    /// Reads the bytes of `path`.
    pub(crate) fn decode(path: &Path, bytes: &[u8]) -> Result<Self, CkptError> {
        let bad = |offset: usize, reason: &str| CkptError::BadManifest {
            path: path.to_owned(),
            offset: offset as u64,
            reason: reason.to_owned(),
        };
        let digest_start = DIGEST_PREFIX.len();
        let digest_end = digest_start + DIGEST_LEN;
        let rest_start = digest_end + DIGEST_SUFFIX.len();
        let digest = bytes
            .strip_prefix(DIGEST_PREFIX.as_bytes())
            .and_then(|tail| tail.get(..DIGEST_LEN))
            .ok_or_else(|| bad(0, "it does not begin with its checksum"))?;
        let rest = bytes
            .get(digest_end..)
            .and_then(|tail| tail.strip_prefix(DIGEST_SUFFIX.as_bytes()))
            .ok_or_else(|| bad(digest_end, "the checksum does not end"))?;
        if sha256_hex(rest).as_bytes() != digest {
            return Err(bad(
                digest_start,
                "the checksum is not that of the bytes after it: it was edited, truncated or damaged",
            ));
        }

        let malformed = |error: serde_json::Error| {
            let line_start = bytes
                .split_inclusive(|&byte| byte == b'\n')
                .take(error.line().saturating_sub(1))
                .map(<[u8]>::len)
                .sum::<usize>();
            bad((line_start + error.column()).max(rest_start), &error.to_string())
        };
        let preamble: Preamble = serde_json::from_slice(bytes).map_err(malformed)?;
        if preamble.format != FORMAT {
            return Err(bad(rest_start, &format!("the format is {:?}", preamble.format)));
        }
        if preamble.version > FORMAT_VERSION {
            return Err(CkptError::UnsupportedVersion {
                path: path.to_owned(),
                version: preamble.version,
                supported: FORMAT_VERSION,
            });
        }
        let document: Document = serde_json::from_slice(bytes).map_err(malformed)?;
        Ok(Self {
            state: document.state,
            files: document.files,
        })
    }
}
