//! Why training or evaluation stopped.

use effdet_ckpt::CkptError;
use effdet_data::error::DataError;
use effdet_dist::DistError;
use effdet_metrics::MetricsError;
use effdet_model::anchors::AnchorError;
use effdet_model::detect::DetectError;
use effdet_model::engine::EngineError;

use crate::optimizer::FreezePatternError;

/// Why training or evaluation stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// Data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CkptError),
    /// The process group.
    #[error(transparent)]
    Group(#[from] DistError),
    /// The metric.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// Anchors.
    #[error(transparent)]
    Anchors(#[from] AnchorError),
    /// Post-processing.
    #[error(transparent)]
    Detect(#[from] DetectError),
    /// The freeze pattern.
    #[error(transparent)]
    Freeze(#[from] FreezePatternError),
    /// A loss or gradient that is no number; nothing was updated.
    #[error(
        "step {step}: {what} is {value} (images {images:?}); weights are as before the step. Lower the learning rate, lengthen \
         the warm-up, or look at these images"
    )]
    NonFinite {
        /// Updates before it.
        step: u64,
        /// What is not finite.
        what: &'static str,
        /// Its value.
        value: f32,
        /// Image ids of the batch.
        images: Vec<i64>,
    },
    /// A checkpoint of another run.
    #[error("cannot resume from {path}: {what}")]
    Resume {
        /// Checkpoint.
        path: String,
        /// What differs and what to do.
        what: String,
    },
    /// Options that contradict each other.
    #[error("{0}")]
    Config(String),
    /// A log could not be written.
    #[error("cannot write {path}: {source}")]
    Log {
        /// File.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
}
