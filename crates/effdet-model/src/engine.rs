//! The contract between a trainer and whatever runs the network.
//!
//! An engine is coarse: it takes a batch and gives losses and gradients, or takes images and gives head outputs. It speaks of
//! batches, flat parameter buffers and named outputs, so a GPU engine can stand behind the same trait.

use std::fmt;
use std::str::FromStr;
use std::sync::mpsc::Sender;

use serde::{Deserialize, Serialize};

use crate::weights::Weights;

/// A batch of network inputs as the loader hands them over.
///
/// # Shapes
/// `pixels`: `[batch, height, width, 3]`, NHWC, RGB, normalised once by the loader.
#[derive(Debug, Clone, Copy)]
pub struct ImageBatch<'a> {
    /// Pixel values.
    pub pixels: &'a [f32],
    /// Number of images.
    pub batch: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
}

/// Training targets of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Targets<'a> {
    /// `[batch, anchors]`: class index of the matched object, −1 background, −2 ignored.
    pub class_targets: &'a [i32],
    /// `[batch, anchors, 4]`: `ty, tx, th, tw`, zero where unmatched.
    pub box_targets: &'a [f32],
    /// Loss normaliser P: positives of the whole batch plus one.
    pub normalizer: f32,
}

/// Everything a training step reads.
#[derive(Debug, Clone, Copy)]
pub struct TrainBatch<'a> {
    /// Network inputs.
    pub images: ImageBatch<'a>,
    /// Targets.
    pub targets: Targets<'a>,
    /// One key per image for the draws of stochastic depth.
    pub draw_keys: &'a [u64],
}

/// Adds up values of the ranks that train together, in place.
///
/// Batch norm over the batches of all ranks asks for it in the middle of a pass, with the same number of values on every rank. An
/// implementation that fails remembers why and leaves the values as they are; its owner looks after the step.
pub trait SumOverRanks: std::fmt::Debug {
    /// Replaces `values` by their sums.
    fn sum(&self, values: &mut [f64]);
}

/// What a step may vary beside its batch.
#[derive(Debug, Clone, Copy)]
pub struct StepOptions<'a> {
    /// Seed of the run.
    pub seed: u64,
    /// Epoch of the batch, part of the key of stochastic depth.
    pub epoch: u64,
    /// Batch norm takes its statistics over the batches of all ranks; none = over this batch.
    pub sync: Option<&'a dyn SumOverRanks>,
    /// Factor of all gradients, those handed out included, which keeps small ones from vanishing in half precision; losses
    /// are handed out without it. A power of two changes no bit of a gradient in f32 but its exponent.
    pub loss_scale: f32,
}

impl Default for StepOptions<'_> {
    fn default() -> Self {
        Self {
            seed: 0,
            epoch: 0,
            sync: None,
            loss_scale: 1.0,
        }
    }
}

/// How an engine stores the large tensors of a training step. Parameters, batch-norm statistics and sums are f32 or better
/// in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// As float32.
    #[default]
    Fp32,
    /// As float16; gradients need a loss scale.
    Fp16,
    /// Gradients as bfloat16, which has the range of float32; what convolutions multiply may be rounded likewise, and two such
    /// products after the other are added to a sum (as AVX-512's `vdpbf16ps` does).
    #[serde(alias = "bf16")]
    Bf16Pairs,
    /// The same, with the products of blocks added up apart from the sum (as AMX's `tdpbf16ps` does).
    Bf16Tiles,
}

impl Precision {
    const ALL: [Self; 4] = [Self::Fp32, Self::Fp16, Self::Bf16Pairs, Self::Bf16Tiles];

    const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16Pairs => "bf16-pairs",
            Self::Bf16Tiles => "bf16-tiles",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no precision.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown precision {0:?}: use fp32, fp16, bf16-pairs or bf16-tiles")]
pub struct UnknownPrecision(String);

impl FromStr for Precision {
    type Err = UnknownPrecision;

    fn from_str(name: &str) -> Result<Self, UnknownPrecision> {
        Self::ALL
            .into_iter()
            .find(|precision| precision.name() == name)
            .ok_or_else(|| UnknownPrecision(name.to_owned()))
    }
}

/// Losses of one step, without the L2 term (the trainer adds that, it needs no engine).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepLosses {
    /// Focal loss over all levels, anchors and classes, divided by P.
    pub class_loss: f32,
    /// Huber loss divided by 4P, not yet multiplied by its weight.
    pub box_loss: f32,
    /// IoU loss divided by 4P; 0 when off.
    pub box_iou_loss: f32,
    /// `class_loss + box_loss_weight·box_loss + iou_loss_weight·box_iou_loss`.
    pub det_loss: f32,
}

/// Head outputs of one pyramid level.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LevelOutput {
    /// Cells per column.
    pub height: usize,
    /// Cells per row.
    pub width: usize,
    /// `[batch, height, width, anchors·classes]`, channel = anchor·classes + class.
    pub class_logits: Vec<f32>,
    /// `[batch, height, width, anchors·4]`, channel = anchor·4 + {ty, tx, th, tw}.
    pub box_codes: Vec<f32>,
}

/// Head outputs of all levels, finest first.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeadOutputs {
    /// Number of images.
    pub batch: usize,
    /// One entry per level.
    pub levels: Vec<LevelOutput>,
}

/// Whether batch norm uses the batch's own statistics or the moving ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Batch statistics, stochastic depth active.
    Train,
    /// Moving statistics.
    Infer,
}

/// Receives named outputs: name, shape, values.
pub type TraceSink<'a> = dyn FnMut(&str, &[usize], &[f32]) + 'a;

/// Why an engine refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A buffer does not have the size that the batch or the network implies.
    #[error("{what} holds {actual} values, {expected} expected: {remedy}")]
    Shape {
        /// The buffer.
        what: &'static str,
        /// Values given.
        actual: usize,
        /// Values needed.
        expected: usize,
        /// What to do.
        remedy: &'static str,
    },
    /// The engine cannot run this network.
    #[error("this engine cannot run {feature}: {remedy}")]
    Unsupported {
        /// The option or layer.
        feature: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The instruction set asked for is not available on this processor.
    #[error("instruction set {isa} is not available here; available: {available}")]
    Isa {
        /// The one asked for.
        isa: String,
        /// Those that would work.
        available: String,
    },
    /// The targets do not fit the network.
    #[error(transparent)]
    Targets(#[from] crate::loss::LossError),
}

/// Runs one network.
pub trait Engine: Send {
    /// Runs forward, losses and backward on one batch.
    ///
    /// Reads `weights.trainable`, updates the moving statistics in `weights.statistics` and overwrites `gradients` with
    /// loss_scale·∂det_loss/∂trainable (no L2 term).
    ///
    /// # Shapes
    /// `gradients`: as `weights.trainable`.
    ///
    /// # Errors
    /// [`EngineError::Shape`] when a buffer does not fit; nothing is changed then.
    ///
    /// # Determinism
    /// The same arguments give the same bits whatever the number of threads and the instruction set.
    fn train_step(
        &mut self,
        weights: &mut Weights,
        batch: &TrainBatch<'_>,
        options: &StepOptions<'_>,
        gradients: &mut [f32],
    ) -> Result<StepLosses, EngineError>;

    /// The same, handing out parts of `gradients` that are finished while the pass goes on, so that they can be summed over ranks
    /// meanwhile.
    ///
    /// Parts come from the end of the buffer to its beginning and make up all of it; where they are cut depends on the network
    /// alone. An engine that cannot tell hands out everything at the end.
    ///
    /// # Errors
    /// As [`Self::train_step`]; nothing is handed out then.
    fn train_step_in_parts<'g>(
        &mut self,
        weights: &mut Weights,
        batch: &TrainBatch<'_>,
        options: &StepOptions<'_>,
        gradients: &'g mut [f32],
        finished: Sender<&'g mut [f32]>,
    ) -> Result<StepLosses, EngineError> {
        let losses = self.train_step(weights, batch, options, gradients)?;
        // A receiver that is gone has failed and knows why.
        let _ = finished.send(gradients);
        Ok(losses)
    }

    /// Runs the network with moving statistics.
    ///
    /// # Errors
    /// [`EngineError::Shape`] when a buffer does not fit.
    fn infer(
        &mut self,
        weights: &Weights,
        images: &ImageBatch<'_>,
        outputs: &mut HeadOutputs,
    ) -> Result<(), EngineError>;

    /// Runs the forward pass and hands every named stage output to `sink`, in network order.
    ///
    /// # Errors
    /// [`EngineError::Shape`] when a buffer does not fit.
    fn trace(
        &mut self,
        weights: &Weights,
        images: &ImageBatch<'_>,
        mode: Mode,
        sink: &mut TraceSink<'_>,
    ) -> Result<(), EngineError>;
}

/// An engine's threads, for work beside its own.
pub trait Workers: std::fmt::Debug + Send + Sync {
    /// How many there are.
    fn count(&self) -> usize;

    /// Calls `job` with every index below `jobs`, each once, and returns when all are done. Do not call it from inside a job.
    fn each(&self, jobs: usize, job: &(dyn Fn(usize) + Sync));
}

impl ImageBatch<'_> {
    /// Checks that `pixels` has the size the other fields imply and that they are those of the network.
    ///
    /// # Errors
    /// [`EngineError::Shape`] naming the buffer.
    pub fn check(&self, height: usize, width: usize) -> Result<(), EngineError> {
        let shape = |what, actual, expected, remedy| EngineError::Shape {
            what,
            actual,
            expected,
            remedy,
        };
        if (self.height, self.width) != (height, width) {
            let (actual, expected) = (self.height * self.width, height * width);
            return Err(shape(
                "an image",
                actual,
                expected,
                "resize the images to the network's image_size",
            ));
        }
        let expected = self.batch * height * width * 3;
        if self.batch == 0 || self.pixels.len() != expected {
            let expected = expected.max(1);
            return Err(shape(
                "pixels",
                self.pixels.len(),
                expected,
                "pass [batch, height, width, 3] values",
            ));
        }
        Ok(())
    }
}
