//! From head outputs to detections.
//!
//! ```text
//! class logits, box codes ──► candidates: top-k over anchors × classes, decode, sigmoid
//!     ──► NMS: per class with +1 pixel areas (evaluation), class-agnostic (serving), per class, combined
//!     ──► detections in pixels of the original image
//! ```
//!
//! Candidate selection is [`candidates`], suppression [`nms`], and the four paths of the reference are the `postprocess_*`
//! functions. [`wbf`] fuses the detections of several models.
//!
//! Source: the reference's `model/{postprocess,nms_np}.py`.

pub mod candidates;
pub mod nms;
mod postprocess;
pub mod wbf;

pub use postprocess::{
    postprocess_combined, postprocess_evaluation, postprocess_global, postprocess_per_class,
    suppress_evaluation,
};

use serde::{Deserialize, Serialize};

use crate::hparams::NmsMethod;
use crate::label_map::ClassIndex;

/// An object found in an image.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Detection {
    /// `[ymin, xmin, ymax, xmax]` in pixels of the original image.
    pub box_yxyx_px: [f32; 4],
    /// Confidence in `[0, 1]`.
    pub score: f32,
    /// What it is.
    pub class: ClassIndex,
}

/// Why head outputs could not be turned into detections.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DetectError {
    /// A head output does not have the size that the anchors imply.
    #[error(
        "{what} of level {level} holds {actual} values, {expected} expected: were the anchors made for this network?"
    )]
    Shape {
        /// `class_logits` or `box_codes`.
        what: &'static str,
        /// Level number.
        level: usize,
        /// Values given.
        actual: usize,
        /// Values needed.
        expected: usize,
    },
    /// The head outputs have another number of levels than the anchors.
    #[error(
        "head outputs of {actual} levels for anchors of {expected}: were the anchors made for this network?"
    )]
    Levels {
        /// Levels given.
        actual: usize,
        /// Levels of the anchors.
        expected: usize,
    },
    /// There is no such image in the batch.
    #[error("image {image} of a batch of {batch}")]
    Image {
        /// The image asked for.
        image: usize,
        /// Images in the batch.
        batch: usize,
    },
    /// The path does not know the suppression method.
    #[error("{path} post-processing has no NMS method {method}: use hard or gaussian")]
    Method {
        /// The path.
        path: &'static str,
        /// The method.
        method: NmsMethod,
    },
}
