//! The training loop.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use effdet_ckpt::{CheckpointState, CheckpointStore, ClassEntry, Retention, Snapshot, weights_hash};
use effdet_data::dataset::DetectionDataset;
use effdet_data::loader::{Loader, LoaderConfig, LoaderMode, Shard};
use effdet_dist::{ProcessGroup, Wire, same_weights};
use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::assign::Assigner;
use effdet_model::engine::{Engine, StepLosses, StepOptions, SumOverRanks};
use effdet_model::label_map::{ClassIndex, LabelMap};
use effdet_model::loss::normalizer;
use effdet_model::network::Network;
use effdet_model::weights::Weights;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::TrainError;
use crate::eval::{Evaluation, Evaluator, preparation};
use crate::events::{Event, EventSink, StepRecord};
use crate::modes::EvaluationRule;
use crate::optimizer::Optimizer;
use crate::ranks::{
    BatchNormSums, Reduction, broadcast_state, gather_ids, reduce_losses, sum_positives, train_step_on_ranks,
};
use crate::schedule::Schedule;

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
    /// Checkpoints kept beside the best.
    pub keep_last: usize,
    /// When to evaluate and when to stop.
    pub rule: EvaluationRule,
    /// Metric to stop on and evaluations without improvement.
    pub early_stop: Option<EarlyStop>,
    /// Seed of every draw.
    pub seed: u64,
    /// Loader threads.
    pub workers: usize,
    /// Train on the first batch over and over.
    pub use_fake_data: bool,
}

fn one() -> usize {
    1
}

/// Updates between two comparisons of the ranks' weights.
const VERIFY_EVERY: u64 = 100;

/// Stops a run that no longer improves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EarlyStop {
    /// One of [`effdet_metrics::METRIC_NAMES`].
    pub metric: String,
    /// Evaluations without improvement.
    pub patience: u64,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The schedule is through.
    Complete,
    /// The metric stopped improving.
    EarlyStopped,
    /// Asked to stop; a checkpoint was saved.
    Interrupted,
}

/// What a run leaves.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// Updates done.
    pub step: u64,
    /// The last evaluation.
    pub evaluation: Option<Evaluation>,
    /// Images per second, the first tenth of the steps left out.
    pub images_per_second: f64,
}

/// Data and model of a run.
pub struct RunInputs<'a> {
    /// Network description.
    pub network: &'a Network,
    /// Runs it.
    pub engine: &'a mut dyn Engine,
    /// Training data.
    pub train: Arc<DetectionDataset>,
    /// Held-out data; none = no evaluation.
    pub evaluator: Option<Evaluator>,
    /// Categories.
    pub label_map: LabelMap,
    /// Ranks.
    pub group: &'a dyn ProcessGroup,
    /// Where checkpoints go.
    pub checkpoints: PathBuf,
    /// Set from outside to stop after the step at hand.
    pub stop: Arc<AtomicBool>,
}

/// Everything that training changes.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainState {
    /// Variables.
    pub weights: Weights,
    /// Moving averages; none when switched off.
    pub average: Option<Weights>,
    /// Optimiser with its slots.
    pub optimizer: Optimizer,
    /// Updates done.
    pub step: u64,
    /// Position in the stream of samples.
    pub sample_position: u64,
    /// Best value of the selection metric and evaluations since.
    pub best: Option<f64>,
    /// Evaluations without improvement.
    pub stale: u64,
}

impl TrainState {
    /// The start of a run from `weights`.
    ///
    /// # Errors
    /// A freeze pattern that is no regular expression.
    pub fn new(network: &Network, weights: Weights) -> Result<Self, TrainError> {
        let averaged = network.hparams.moving_average_decay > 0.0;
        Ok(Self {
            average: averaged.then(|| Weights::zeros(&network.variables)),
            optimizer: Optimizer::new(&network.hparams, &network.variables)?,
            weights,
            step: 0,
            sample_position: 0,
            best: None,
            stale: 0,
        })
    }

    /// The state of a checkpoint.
    ///
    /// # Errors
    /// [`TrainError::Resume`] when something a run needs is missing.
    pub fn from_checkpoint(
        network: &Network,
        checkpoint: effdet_ckpt::Checkpoint,
    ) -> Result<Self, TrainError> {
        let path = checkpoint.path.display().to_string();
        let missing = |what: String| TrainError::Resume {
            path: path.clone(),
            what,
        };
        let mut state = Self::new(network, checkpoint.weights)?;
        if state.average.is_some() {
            state.average = Some(checkpoint.ema.ok_or_else(|| {
                missing("it has no moving averages; set moving_average_decay=0 or start a new run".into())
            })?);
        }
        for (name, values) in state.optimizer.slots_mut() {
            let saved = checkpoint
                .slots
                .get(name)
                .filter(|saved| saved.len() == values.len());
            let saved = saved.ok_or_else(|| missing(format!("it has no {name} of this optimiser")))?;
            values.copy_from_slice(saved);
        }
        state.step = checkpoint.state.step;
        state.sample_position = checkpoint.state.sample_position;
        let extra = &checkpoint.state.extra;
        state.best = extra.get("best").and_then(serde_json::Value::as_f64);
        state.stale = extra
            .get("stale")
            .and_then(serde_json::Value::as_u64)
            .unwrap_or(0);
        Ok(state)
    }

    /// The weights to evaluate and to ship: averages where there are any and a step has been made.
    pub fn evaluation_weights(&self) -> &Weights {
        self.average
            .as_ref()
            .filter(|_| self.step > 0)
            .unwrap_or(&self.weights)
    }
}

impl TrainConfig {
    /// Images of a micro-batch of all ranks.
    pub fn global_batch(&self) -> usize {
        self.batch_size * self.ranks
    }
}

/// Updates per epoch: `ceil(examples / (batch·accumulate·ranks))`.
pub fn steps_per_epoch(config: &TrainConfig, dataset_len: usize) -> u64 {
    let examples = config.num_examples_per_epoch.unwrap_or(dataset_len as u64);
    let per_step = (config.global_batch() * config.accumulate).max(1) as u64;
    examples.div_ceil(per_step).max(1)
}

/// Runs the training loop.
#[derive(Debug)]
pub struct Trainer<'c> {
    config: &'c TrainConfig,
    schedule: Schedule,
    steps_per_epoch: u64,
}

impl<'c> Trainer<'c> {
    /// A trainer for a data set of `dataset_len` images.
    pub fn new(config: &'c TrainConfig, network: &Network, dataset_len: usize) -> Self {
        let steps_per_epoch = steps_per_epoch(config, dataset_len);
        Self {
            config,
            schedule: Schedule::new(&network.hparams, steps_per_epoch),
            steps_per_epoch,
        }
    }

    /// Updates of the whole run.
    pub fn total_steps(&self) -> u64 {
        let by_rule = self
            .config
            .rule
            .last_epoch(self.schedule.total_steps().div_ceil(self.steps_per_epoch));
        let total = (by_rule * self.steps_per_epoch).min(self.schedule.total_steps().max(1));
        self.config.max_steps.unwrap_or(u64::MAX).min(total)
    }

    /// Trains from the `state` of rank 0 to the end of the schedule, or until any rank is asked to stop.
    ///
    /// # Errors
    /// [`TrainError`]; after a non-finite loss or gradient the state is that before the step.
    ///
    /// # Determinism
    /// The same state, data, configuration and number of ranks give the same bits, whatever the threads, workers or restarts.
    pub fn run(
        &self,
        inputs: &mut RunInputs<'_>,
        state: &mut TrainState,
        sinks: &mut [&mut dyn EventSink],
    ) -> Result<Outcome, TrainError> {
        let started = Instant::now();
        let store = CheckpointStore::new(&inputs.checkpoints);
        let total_steps = self.total_steps();
        let (group, batch) = (inputs.group, self.config.global_batch());
        if group.size() > batch {
            return Err(TrainError::Config(format!(
                "{} ranks share batches of {batch} images: start at most {batch} ranks, or a new run with a larger --batch-size",
                group.size()
            )));
        }
        broadcast_state(group, state)?;
        let anchors = Anchors::new(&AnchorConfig::from(&inputs.network.hparams))?;
        let loader_config = LoaderConfig {
            batch_size: batch,
            shard: Shard {
                rank: group.rank(),
                ranks: group.size(),
            },
            workers: self.config.workers,
            prefetch: 2,
            mode: LoaderMode::Train {
                start_position: state.sample_position,
            },
        };
        let prepared = preparation(&inputs.network.hparams, &inputs.label_map, self.config.seed);
        let assigner = Some(Assigner::new(&anchors));
        let mut loader = Loader::new(Arc::clone(&inputs.train), prepared, assigner, loader_config)?;
        let mut fake = None;
        let mut gradients = vec![0.0; state.weights.trainable.len()];
        let mut sum = vec![
            0.0;
            if self.config.accumulate > 1 {
                gradients.len()
            } else {
                0
            }
        ];
        let mut speeds = Vec::new();
        let mut evaluation = None;
        let mut saved_at = None;
        // A run that stopped early stays stopped when it is resumed.
        let mut ending = match self.stops_early(state) {
            true => Ending::EarlyStopped,
            false => Ending::Complete,
        };
        emit(
            sinks,
            &Event::Started {
                step: state.step,
                total_steps,
                steps_per_epoch: self.steps_per_epoch,
            },
        )?;

        while state.step < total_steps && ending == Ending::Complete {
            let record = self.step(inputs, state, &mut loader, &mut fake, &mut gradients, &mut sum)?;
            speeds.push(record.images as f64 / record.seconds);
            emit(sinks, &Event::Step(record))?;

            let epoch_done = state.step.is_multiple_of(self.steps_per_epoch);
            let epochs = state.step / self.steps_per_epoch;
            let last = state.step >= total_steps;
            let evaluate =
                epoch_done && self.config.rule.evaluates_after(epochs) || last && self.config.rule.at_end();
            if let Some(evaluator) = inputs.evaluator.as_ref().filter(|_| evaluate) {
                let weights = state.evaluation_weights();
                let result = evaluator.run_on_ranks(inputs.engine, weights, group, &mut |done, total| {
                    // Progress is a courtesy: a sink's failure shows up at the next event that matters.
                    let _ = emit(sinks, &Event::Evaluating { done, total });
                })?;
                emit(
                    sinks,
                    &Event::Evaluated {
                        step: state.step,
                        epoch: epochs,
                        summary: &result.summary,
                    },
                )?;
                self.note_metric(state, &result);
                evaluation = Some(result);
            }
            if group.size() > 1 && state.step.is_multiple_of(VERIFY_EVERY) {
                same_weights(group, state.step, &weights_hash(&state.weights))?;
            }
            let stop_early = self.stops_early(state);
            let interrupted = inputs.group.any(inputs.stop.load(Ordering::Relaxed))?;
            let by_epoch = epoch_done
                && self.config.checkpoint_period > 0
                && epochs.is_multiple_of(self.config.checkpoint_period);
            let by_step = self
                .config
                .checkpoint_every_steps
                .is_some_and(|n| n > 0 && state.step.is_multiple_of(n));
            if by_epoch || by_step || last || stop_early || interrupted {
                let metric = evaluation
                    .as_ref()
                    .filter(|_| evaluate)
                    .map(|e| self.selection_metric(e));
                self.save(inputs, state, &store, metric, sinks)?;
                saved_at = Some(state.step);
            }
            if interrupted {
                ending = Ending::Interrupted;
                break;
            }
            if stop_early && !last {
                ending = Ending::EarlyStopped;
                break;
            }
        }
        if saved_at != Some(state.step) && inputs.group.is_root() && state.step == 0 {
            self.save(inputs, state, &store, None, sinks)?;
        }
        let images_per_second = mean_without_first_tenth(&speeds);
        let elapsed_s = started.elapsed().as_secs_f64();
        emit(
            sinks,
            &Event::Finished {
                step: state.step,
                images_per_second,
                elapsed_s,
            },
        )?;
        Ok(Outcome {
            ending,
            step: state.step,
            evaluation,
            images_per_second,
        })
    }

    /// One update: micro-batches, reduction over ranks, L2, clipping, optimiser, averages.
    fn step(
        &self,
        inputs: &mut RunInputs<'_>,
        state: &mut TrainState,
        loader: &mut Loader,
        fake: &mut Option<effdet_data::batch::Batch>,
        gradients: &mut [f32],
        sum: &mut [f32],
    ) -> Result<StepRecord, TrainError> {
        let clock = Instant::now();
        let waited = loader.wait_us();
        let epoch = state.step / self.steps_per_epoch;
        let mut losses = StepLosses::default();
        let ranks = inputs.group.size();
        let mut rank_share = 1.0;
        let sync = self.config.sync_bn && ranks > 1;
        // Batch norm over all ranks talks to them in the middle of the pass, so its gradients wait until that is over.
        let overlaps = ranks > 1 && !sync && self.config.accumulate == 1;
        let wire = match self.config.half_gradients {
            true => Wire::F16,
            false => Wire::F32,
        };
        let sums = BatchNormSums::new(inputs.group);
        let mut ids = Vec::new();
        let mut position = state.sample_position;
        sum.fill(0.0);
        // Batch norm moves its statistics in the forward pass; they are taken back when the step is refused.
        let statistics = state.weights.statistics.clone();
        for _ in 0..self.config.accumulate {
            let batch = match fake.take() {
                Some(batch) => batch,
                None => loader.next_batch().ok_or_else(|| {
                    TrainError::Config("the training data ended: this is a bug, please report it".into())
                })??,
            };
            let mut train_batch = batch.train_batch();
            if sync {
                let positives = sum_positives(inputs.group, batch.positives.iter().sum())?;
                train_batch.targets.normalizer = normalizer(positives);
            }
            // Ranks may take parts of different sizes; every image counts the same.
            let part_of_rank = batch.len() as f32 / self.config.global_batch() as f32;
            let own = if ranks > 1 && !sync { part_of_rank } else { 1.0 };
            let share = own / self.config.accumulate as f32;
            // Stochastic depth draws by sample; the stream's position stands for the epoch in its keys.
            let options = StepOptions {
                seed: self.config.seed,
                epoch: 0,
                sync: sync.then_some(&sums as &dyn SumOverRanks),
            };
            let (engine, weights) = (&mut *inputs.engine, &mut state.weights);
            let part = if overlaps {
                let group = inputs.group;
                let reduction = Reduction { group, wire, share };
                train_step_on_ranks(engine, weights, &train_batch, &options, gradients, reduction)?
            } else {
                engine.train_step(weights, &train_batch, &options, gradients)?
            };
            sums.check()?;
            losses.class_loss += share * part.class_loss;
            losses.box_loss += share * part.box_loss;
            losses.box_iou_loss += share * part.box_iou_loss;
            losses.det_loss += share * part.det_loss;
            if self.config.accumulate > 1 {
                sum.iter_mut().zip(&*gradients).for_each(|(s, g)| *s += share * g);
            }
            rank_share = part_of_rank;
            position = batch.end_position;
            ids.extend(&batch.image_ids);
            if self.config.use_fake_data {
                *fake = Some(batch);
            } else {
                loader.recycle(batch);
            }
        }
        let gradients = if self.config.accumulate > 1 {
            sum
        } else {
            gradients
        };
        if ranks > 1 {
            if !overlaps {
                inputs.group.all_reduce_sum(gradients, wire)?;
            }
            // Synchronised statistics are the same everywhere.
            let statistics = match sync {
                true => &mut [][..],
                false => &mut state.weights.statistics[..],
            };
            statistics.iter_mut().for_each(|value| *value *= rank_share);
            reduce_losses(inputs.group, &mut losses, statistics)?;
        }
        let update = state.optimizer.prepare(&state.weights, gradients);
        for (what, value) in [
            ("the loss", losses.det_loss + update.l2_loss),
            ("the gradient norm", update.raw_gradient_norm),
        ] {
            if !value.is_finite() {
                state.weights.statistics = statistics;
                return Err(TrainError::NonFinite {
                    step: state.step,
                    what,
                    value,
                    images: gather_ids(inputs.group, &ids)?,
                });
            }
        }
        let learning_rate = self.schedule.at(state.step);
        state
            .optimizer
            .apply(&mut state.weights, gradients, learning_rate, state.step);
        state.step += 1;
        state.sample_position = position;
        if let Some(average) = &mut state.average {
            state.optimizer.average(average, &state.weights, state.step);
        }
        Ok(StepRecord {
            step: state.step,
            epoch,
            loss: losses.det_loss + update.l2_loss,
            det_loss: losses.det_loss,
            class_loss: losses.class_loss,
            box_loss: losses.box_loss,
            box_iou_loss: losses.box_iou_loss,
            l2_loss: update.l2_loss,
            learning_rate,
            gradient_norm: update.gradient_norm,
            seconds: clock.elapsed().as_secs_f64(),
            wait_s: (loader.wait_us() - waited) as f64 * 1e-6,
            images: self.config.global_batch() * self.config.accumulate,
        })
    }

    fn stops_early(&self, state: &TrainState) -> bool {
        let stop = self.config.early_stop.as_ref();
        stop.is_some_and(|stop| state.stale >= stop.patience.max(1))
    }

    /// The metric that early stopping and the choice of the best checkpoint go by.
    fn selection_metric(&self, evaluation: &Evaluation) -> f64 {
        let wanted = self
            .config
            .early_stop
            .as_ref()
            .map_or("AP", |stop| stop.metric.as_str());
        evaluation
            .summary
            .named()
            .find(|(name, _)| *name == wanted)
            .map_or(evaluation.summary.ap(), |(_, v)| v)
    }

    fn note_metric(&self, state: &mut TrainState, evaluation: &Evaluation) {
        let value = self.selection_metric(evaluation);
        if state.best.is_none_or(|best| value > best) {
            (state.best, state.stale) = (Some(value), 0);
        } else {
            state.stale += 1;
        }
    }

    fn save(
        &self,
        inputs: &RunInputs<'_>,
        state: &TrainState,
        store: &CheckpointStore,
        metric: Option<f64>,
        sinks: &mut [&mut dyn EventSink],
    ) -> Result<(), TrainError> {
        if !inputs.group.is_root() {
            return Ok(());
        }
        let hparams = serde_json::to_value(&inputs.network.hparams)
            .map_err(|error| TrainError::Config(format!("hyper-parameters: {error}")))?;
        let configuration = serde_json::to_string(&(&hparams, self.config))
            .map_err(|error| TrainError::Config(format!("configuration: {error}")))?;
        let manifest = CheckpointState {
            step: state.step,
            epoch: state.step / self.steps_per_epoch,
            sample_position: state.sample_position,
            model: inputs.network.hparams.name.clone(),
            profile: inputs.network.hparams.profile,
            hparams,
            class_map: class_entries(&inputs.label_map),
            data_fingerprint: inputs.train.fingerprint(),
            config_hash: effdet_ckpt::sha256_hex(configuration.as_bytes()),
            loss_scale: None,
            metric,
            extra: json!({
                "best": state.best,
                "stale": state.stale,
                "label_map": inputs.label_map,
                "train": self.config,
            }),
        };
        let slots = state.optimizer.slots();
        let snapshot = Snapshot {
            state: &manifest,
            table: &inputs.network.variables,
            weights: &state.weights,
            ema: state.average.as_ref(),
            slots: &slots,
        };
        let path = store.save(&snapshot)?;
        emit(
            sinks,
            &Event::Saved {
                step: state.step,
                path: &path,
            },
        )?;
        let retention = Retention {
            keep_last: self.config.keep_last.max(1),
            keep_best: 1,
            keep_steps: Default::default(),
        };
        for failed in store.prune(&retention)?.failed {
            let text = format!(
                "cannot remove the old checkpoint {}: {}",
                failed.path.display(),
                failed.error
            );
            emit(sinks, &Event::Warning(text))?;
        }
        Ok(())
    }
}

/// The classes as a checkpoint lists them: one entry per output that stands for a category id, unnamed where the id has none.
pub fn class_entries(label_map: &LabelMap) -> Vec<ClassEntry> {
    (0..label_map.min_num_classes() as u32)
        .filter_map(|index| {
            let id = label_map.category_id(ClassIndex(index))?;
            let name = label_map.name(id).unwrap_or_default().to_owned();
            Some(ClassEntry { id: id.0, name })
        })
        .collect()
}

fn emit(sinks: &mut [&mut dyn EventSink], event: &Event<'_>) -> Result<(), TrainError> {
    sinks.iter_mut().try_for_each(|sink| sink.event(event))
}

/// Mean of rates as the reference reports it: the first tenth of the records is left out.
fn mean_without_first_tenth(rates: &[f64]) -> f64 {
    let counted = &rates[rates.len() / 10..];
    counted.iter().sum::<f64>() / counted.len().max(1) as f64
}
