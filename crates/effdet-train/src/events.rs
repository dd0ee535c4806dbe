//! One stream of events, many sinks.

use effdet_metrics::CocoSummary;

use crate::error::TrainError;

/// What happens in a run.
#[derive(Debug, Clone)]
pub enum Event<'a> {
    /// Before the first step.
    Started {
        /// Updates done before, when resumed.
        step: u64,
        /// Updates of the whole run.
        total_steps: u64,
        /// Updates per epoch.
        steps_per_epoch: u64,
    },
    /// After each update.
    Step(StepRecord),
    /// An evaluation is under way.
    Evaluating {
        /// Images done.
        done: usize,
        /// Images in all.
        total: usize,
    },
    /// After an evaluation.
    Evaluated {
        /// Updates done.
        step: u64,
        /// Epochs done.
        epoch: u64,
        /// The COCO numbers.
        summary: &'a CocoSummary,
    },
    /// A checkpoint is on disk.
    Saved {
        /// Updates done.
        step: u64,
        /// Its directory.
        path: &'a std::path::Path,
    },
    /// The loss scale changed: it doubled after many clean steps, or gradients overflowed and the update was skipped.
    LossScaled {
        /// Steps done.
        step: u64,
        /// From the next step on.
        scale: f32,
        /// Until then.
        before: f32,
        /// Updates skipped since the start of training.
        skipped_steps: u64,
    },
    /// Something worth knowing.
    Warning(String),
    /// After the last step.
    Finished {
        /// Updates done.
        step: u64,
        /// Images per second over the run, the first tenth left out.
        images_per_second: f64,
        /// Seconds since the start of the run.
        elapsed_s: f64,
    },
}

/// One update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRecord {
    /// Updates done, this one included.
    pub step: u64,
    /// Epoch, from 0.
    pub epoch: u64,
    /// Total loss, L2 included.
    pub loss: f32,
    /// Detection loss.
    pub det_loss: f32,
    /// Class loss.
    pub class_loss: f32,
    /// Box loss, unweighted.
    pub box_loss: f32,
    /// IoU loss.
    pub box_iou_loss: f32,
    /// L2 term.
    pub l2_loss: f32,
    /// Learning rate.
    pub learning_rate: f32,
    /// Gradient norm after clipping.
    pub gradient_norm: f32,
    /// Gradient norm before clipping.
    pub raw_gradient_norm: f32,
    /// Factor of the gradients on their way through the network; 1 without loss scaling.
    pub loss_scale: f32,
    /// Seconds of the whole step, data included.
    pub seconds: f64,
    /// Seconds spent waiting for data.
    pub wait_s: f64,
    /// Images of the step, those of all ranks together.
    pub images: usize,
}

/// Receives events in order.
pub trait EventSink {
    /// Takes one event.
    ///
    /// # Errors
    /// A log that cannot be written stops the run.
    fn event(&mut self, event: &Event<'_>) -> Result<(), TrainError>;
}
