//! Why training or evaluation stopped.

use effdet_ckpt::CkptError;
use effdet_data::error::DataError;
use effdet_dist::DistError;
use effdet_metrics::MetricsError;
use effdet_model::anchors::AnchorError;
use effdet_model::detect::DetectError;
use effdet_model::engine::EngineError;

use crate::guard::NonFinite;
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
    /// A loss, gradient or statistic that is no number; the step was not taken.
    #[error(
        "step {}: {} is {}; it began in {} (images {:?}); weights are as before the step{replay}. Lower the learning rate, lengthen \
         the warm-up, look at these images, or go on without them: --resume --on-nonfinite skip-step",
        found.step, found.what, found.value, found.place, found.images
    )]
    NonFinite {
        /// What was found.
        found: Box<NonFinite>,
        /// Where the batch lies, as a part of the sentence; empty when it was not saved.
        replay: String,
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
