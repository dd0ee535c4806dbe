//! How a run goes.

use effdet_model::engine::Precision;
use serde::{Deserialize, Serialize};

use crate::guard::OnNonFinite;
use crate::modes::EvaluationRule;

/// How a run goes, beside its hyper-parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Images per micro-batch and rank, with the number of ranks that the run was started with.
    pub batch_size: usize,
    /// Ranks that the run was started with; other ranks that go on with it divide the same batches.
    #[serde(default = "one")]
    pub ranks: usize,
    /// Send gradients between ranks in half precision.
    #[serde(default)]
    pub half_gradients: bool,
    /// Ranks compute what one process with the whole batch would: batch-norm statistics and the loss's normaliser are those of all.
    #[serde(default)]
    pub sync_bn: bool,
    /// Micro-batches of an update.
    pub accumulate: usize,
    /// Samples that make an epoch; none = the data set's size.
    pub num_examples_per_epoch: Option<u64>,
    /// Stop after this many updates in all.
    pub max_steps: Option<u64>,
    /// Save every N epochs; 0 = at the end only.
    pub checkpoint_period: u64,
    /// Save every N updates as well.
    pub checkpoint_every_steps: Option<u64>,
    /// Checkpoints kept, the newest ones.
    pub keep_last: usize,
    /// Checkpoints kept beside them, the best ones by the metric.
    #[serde(default = "one")]
    pub keep_best: usize,
    /// Keep every checkpoint whose step is a multiple of this.
    #[serde(default)]
    pub keep_every: Option<u64>,
    /// When to evaluate and when to stop.
    pub rule: EvaluationRule,
    /// Metric to stop on and evaluations without improvement.
    pub early_stop: Option<EarlyStop>,
    /// How the engine stores activations and gradients.
    #[serde(default)]
    pub precision: Precision,
    /// Seed of every draw.
    pub seed: u64,
    /// Loader threads.
    pub workers: usize,
    /// What happens when a loss, gradient or statistic is no number.
    #[serde(default)]
    pub on_nonfinite: OnNonFinite,
    /// Updates by which the schedule lags behind the updates done: a run that goes on with another batch size keeps its place in the
    /// stream of samples, not its number of updates.
    #[serde(default)]
    pub schedule_shift: i64,
    /// Train on the first batch over and over.
    pub use_fake_data: bool,
}

fn one() -> usize {
    1
}

/// Stops a run that no longer improves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EarlyStop {
    /// One of [`effdet_metrics::METRIC_NAMES`].
    pub metric: String,
    /// Evaluations without improvement.
    pub patience: u64,
}

impl TrainConfig {
    /// Images of a micro-batch of all ranks.
    pub fn global_batch(&self) -> usize {
        self.batch_size * self.ranks
    }

    /// The same run going on with batches of `batch_size` images, from `sample_position` after `step` updates.
    ///
    /// The schedule stands where as many samples would have brought it.
    #[must_use]
    pub fn with_batch_size(
        &self,
        batch_size: usize,
        dataset_len: usize,
        step: u64,
        sample_position: u64,
    ) -> Self {
        let mut changed = self.clone();
        changed.batch_size = batch_size;
        let update = (changed.global_batch() * changed.accumulate).max(1) as u64;
        let passes = sample_position / dataset_len.max(1) as u64;
        // Whole epochs count as such, though their last update may have held fewer new samples.
        let within = sample_position - passes * dataset_len as u64;
        let scheduled = match changed.num_examples_per_epoch {
            None => passes * steps_per_epoch(&changed, dataset_len) + within / update,
            Some(_) => sample_position / update,
        };
        changed.schedule_shift = step as i64 - scheduled as i64;
        changed
    }
}

/// Updates per epoch: `ceil(examples / (batch·accumulate·ranks))`.
pub fn steps_per_epoch(config: &TrainConfig, dataset_len: usize) -> u64 {
    let examples = config.num_examples_per_epoch.unwrap_or(dataset_len as u64);
    let per_step = (config.global_batch() * config.accumulate).max(1) as u64;
    examples.div_ceil(per_step).max(1)
}
