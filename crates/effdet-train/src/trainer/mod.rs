//! The training loop.

mod config;
mod save;
mod state;
mod step;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use effdet_ckpt::{CheckpointStore, weights_hash, write_file};
use effdet_data::cache::ImageCache;
use effdet_data::dataset::DetectionDataset;
use effdet_data::loader::{Loader, LoaderConfig, LoaderMode, Shard};
use effdet_dist::{ProcessGroup, same_weights};
use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::assign::Assigner;
use effdet_model::engine::Engine;
use effdet_model::label_map::LabelMap;
use effdet_model::network::Network;

pub use self::config::{EarlyStop, TrainConfig, steps_per_epoch};
pub use self::save::class_entries;
pub use self::state::TrainState;
use self::step::{Scratch, Update};
use crate::error::TrainError;
use crate::eval::{Evaluation, Evaluator, preparation};
use crate::events::{DataTime, Event, EventSink};
use crate::guard::{MAX_REWINDS, MAX_SKIPS, NonFinite, OnNonFinite, SpikeWatch};
use crate::loss_scale::LossScale;
use crate::ranks::broadcast_state;
use crate::requests::Requests;
use crate::schedule::Schedule;

/// Updates between two comparisons of the ranks' weights.
const VERIFY_EVERY: u64 = 100;

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
    /// How the loader kept up, the first step left out, which waits for the loader to begin.
    pub data_time: DataTime,
}

/// Data and model of a run.
pub struct RunInputs<'a> {
    /// Network description.
    pub network: &'a Network,
    /// Runs it.
    pub engine: &'a mut dyn Engine,
    /// Training data.
    pub train: Arc<DetectionDataset>,
    /// Where decoded training images are kept; none = decoded each time.
    pub cache: Option<Arc<ImageCache>>,
    /// Held-out data; none = no evaluation.
    pub evaluator: Option<Evaluator>,
    /// Categories.
    pub label_map: LabelMap,
    /// Ranks.
    pub group: &'a dyn ProcessGroup,
    /// Where checkpoints go.
    pub checkpoints: PathBuf,
    /// What is asked of the run from outside.
    pub requests: Arc<Requests>,
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
        let total = total.saturating_add_signed(self.config.schedule_shift);
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
        if state.loss_scale.is_none() {
            state.loss_scale = LossScale::new(self.config.precision);
        }
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
        let mut loader = self.loader(inputs, state.sample_position)?;
        let mut scratch = Scratch::new(state.weights.trainable.len(), self.config.accumulate);
        let mut watches = [SpikeWatch::new("the loss"), SpikeWatch::new("the gradient norm")];
        let mut setbacks = Setbacks::default();
        let mut speeds = Vec::new();
        let mut data_time = DataTime::default();
        let mut evaluation = None;
        let (resumed_from, mut saved_at) = (state.step, None);
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

        if inputs.requests.agree(group)?.stop {
            ending = Ending::Interrupted;
        }
        while (state.step < total_steps || state.evaluation_due) && ending == Ending::Complete {
            let made_up_for = state.evaluation_due;
            if !made_up_for {
                let record = match self.step(inputs, state, &mut loader, &mut scratch)? {
                    Update::Done(record) => record,
                    Update::NonFinite(found) => {
                        if self.config.on_nonfinite == OnNonFinite::Stop && saved_at != Some(state.step) {
                            self.save(inputs, state, (&store, resumed_from), None, sinks)?;
                        }
                        self.set_back(inputs, state, &store, &mut setbacks, found, sinks)?;
                        loader = self.loader(inputs, state.sample_position)?;
                        continue;
                    }
                };
                setbacks.skips = 0;
                if !speeds.is_empty() {
                    data_time.add(&record);
                }
                speeds.push(record.images as f64 / record.seconds);
                let [loss, norm] = &mut watches;
                let jumps = [
                    loss.see(record.step, record.loss),
                    norm.see(record.step, record.raw_gradient_norm),
                ];
                emit(sinks, &Event::Step(record))?;
                if let Some(now) = state.loss_scale.filter(|now| now.scale() != record.loss_scale) {
                    emit(
                        sinks,
                        &Event::LossScaled {
                            step: state.step,
                            scale: now.scale(),
                            before: record.loss_scale,
                            skipped_steps: now.skipped_steps(),
                        },
                    )?;
                }
                for text in jumps.into_iter().flatten() {
                    emit(sinks, &Event::Warning(text))?;
                }
            }

            let epoch_done = self.scheduled(state.step).is_multiple_of(self.steps_per_epoch);
            let epochs = self.scheduled(state.step) / self.steps_per_epoch;
            let last = state.step >= total_steps;
            let due =
                epoch_done && self.config.rule.evaluates_after(epochs) || last && self.config.rule.at_end();
            let mut metric = None;
            if let Some(evaluator) = inputs.evaluator.as_ref().filter(|_| due) {
                let weights = state.evaluation_weights();
                let requests = &inputs.requests;
                let result =
                    evaluator.run_until(inputs.engine, weights, group, requests, &mut |done, total| {
                        // Progress is a courtesy: a sink's failure shows up at the next event that matters.
                        let _ = emit(sinks, &Event::Evaluating { done, total });
                    })?;
                state.evaluation_due = result.is_none();
                if let Some(result) = result {
                    let summary = &result.summary;
                    emit(
                        sinks,
                        &Event::Evaluated {
                            step: state.step,
                            epoch: epochs,
                            summary,
                        },
                    )?;
                    self.note_metric(state, &result);
                    metric = Some(self.selection_metric(&result));
                    evaluation = Some(result);
                }
            }
            if group.size() > 1 && state.step.is_multiple_of(VERIFY_EVERY) {
                same_weights(group, state.step, &weights_hash(&state.weights))?;
            }
            let stop_early = self.stops_early(state);
            let asked = inputs.requests.agree(group)?;
            let by_epoch = epoch_done
                && self.config.checkpoint_period > 0
                && epochs.is_multiple_of(self.config.checkpoint_period);
            let by_step = self
                .config
                .checkpoint_every_steps
                .is_some_and(|n| n > 0 && state.step.is_multiple_of(n));
            if by_epoch || by_step || last || stop_early || asked.stop || asked.save || made_up_for {
                self.save(inputs, state, (&store, resumed_from), metric, sinks)?;
                saved_at = Some(state.step);
            }
            if asked.stop {
                ending = Ending::Interrupted;
            } else if stop_early && !last {
                ending = Ending::EarlyStopped;
            }
        }
        if saved_at != Some(state.step) && state.step == 0 {
            self.save(inputs, state, (&store, resumed_from), None, sinks)?;
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
            data_time,
        })
    }

    /// Place in the schedule after `step` updates.
    fn scheduled(&self, step: u64) -> u64 {
        step.saturating_add_signed(-self.config.schedule_shift)
    }

    /// A loader of this rank's part from `position` on.
    fn loader(&self, inputs: &RunInputs<'_>, position: u64) -> Result<Loader, TrainError> {
        let anchors = Anchors::new(&AnchorConfig::from(&inputs.network.hparams))?;
        let config = LoaderConfig {
            batch_size: self.config.global_batch(),
            shard: Shard {
                rank: inputs.group.rank(),
                ranks: inputs.group.size(),
            },
            workers: self.config.workers,
            prefetch: 2,
            mode: LoaderMode::Train {
                start_position: position,
            },
        };
        let mut prepared = preparation(&inputs.network.hparams, &inputs.label_map, self.config.seed);
        prepared.cache = inputs.cache.clone();
        let assigner = Some(Assigner::new(&anchors));
        Ok(Loader::new(
            Arc::clone(&inputs.train),
            prepared,
            assigner,
            config,
        )?)
    }

    /// After a step that was not taken: writes its batch, then ends the run, leaves the batch out or goes back, as configured.
    fn set_back(
        &self,
        inputs: &RunInputs<'_>,
        state: &mut TrainState,
        store: &CheckpointStore,
        setbacks: &mut Setbacks,
        found: NonFinite,
        sinks: &mut [&mut dyn EventSink],
    ) -> Result<(), TrainError> {
        let group = inputs.group;
        let mut replay = String::new();
        if group.is_root() {
            let name = format!("nonfinite-{:08}-{}.safetensors", found.step, found.end_position);
            let path = inputs.checkpoints.join(name);
            write_file(&path, &found.batch)?;
            replay = format!("; replay the batch with: effdet inspect batch {}", path.display());
        }
        let give_up = |found: NonFinite| TrainError::NonFinite {
            found: Box::new(found),
            replay: replay.clone(),
        };
        setbacks.skips += 1;
        if setbacks.furthest < Some(found.step) {
            (setbacks.furthest, setbacks.rewinds) = (Some(found.step), 0);
        }
        setbacks.rewinds += 1;
        match self.config.on_nonfinite {
            OnNonFinite::SkipStep if setbacks.skips <= MAX_SKIPS => {}
            OnNonFinite::Rewind if setbacks.rewinds <= MAX_REWINDS => {
                let mut there_is_one = true;
                if group.is_root() {
                    match store.load_latest(&inputs.network.variables)?.checkpoint {
                        Some(checkpoint) => *state = TrainState::from_checkpoint(inputs.network, checkpoint)?,
                        None => there_is_one = false,
                    }
                }
                if group.any(!there_is_one)? {
                    return Err(give_up(found));
                }
                broadcast_state(group, state)?;
            }
            _ => return Err(give_up(found)),
        }
        state.sample_position = found.end_position;
        let text = format!(
            "step {}: {} is {}; it began in {} (images {:?}): left out, going on from step {}{replay}",
            found.step, found.what, found.value, found.place, found.images, state.step
        );
        emit(sinks, &Event::Warning(text))
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
}

/// Steps that were not taken.
#[derive(Default)]
struct Setbacks {
    /// One after the other.
    skips: u32,
    /// The last step that failed for the first time, and rewinds since then.
    furthest: Option<u64>,
    rewinds: u32,
}

fn emit(sinks: &mut [&mut dyn EventSink], event: &Event<'_>) -> Result<(), TrainError> {
    sinks.iter_mut().try_for_each(|sink| sink.event(event))
}

/// Mean of rates as the reference reports it: the first tenth of the records is left out.
fn mean_without_first_tenth(rates: &[f64]) -> f64 {
    let counted = &rates[rates.len() / 10..];
    counted.iter().sum::<f64>() / counted.len().max(1) as f64
}
