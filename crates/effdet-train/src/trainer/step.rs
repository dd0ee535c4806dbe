//! One update.

use std::time::Instant;

use effdet_data::batch::Batch;
use effdet_data::loader::Loader;
use effdet_dist::Wire;
use effdet_model::engine::{StepLosses, StepOptions, SumOverRanks};
use effdet_model::loss::normalizer;

use super::{RunInputs, TrainState, Trainer};
use crate::error::TrainError;
use crate::events::StepRecord;
use crate::guard::{NonFinite, all_finite, encode_batch, first_non_finite};
use crate::loss_scale::LossScale;
use crate::ranks::{
    BatchNormSums, Reduction, first_bytes, gather_ids, join_words, reduce_losses, sum_positives,
    train_step_on_ranks,
};

/// What became of an update.
pub(super) enum Update {
    Done(StepRecord),
    /// The state is that before the step.
    NonFinite(NonFinite),
}

/// Buffers of the updates of a run.
pub(super) struct Scratch {
    pub gradients: Vec<f32>,
    /// Sum over micro-batches; empty without accumulation.
    pub sum: Vec<f32>,
    /// The batch that is used over and over.
    pub fake: Option<Batch>,
}

impl Scratch {
    pub(super) fn new(values: usize, accumulate: usize) -> Self {
        Self {
            gradients: vec![0.0; values],
            sum: vec![0.0; if accumulate > 1 { values } else { 0 }],
            fake: None,
        }
    }
}

impl Trainer<'_> {
    /// One update: micro-batches, reduction over ranks, L2, clipping, optimiser, averages.
    pub(super) fn step(
        &self,
        inputs: &mut RunInputs<'_>,
        state: &mut TrainState,
        loader: &mut Loader,
        scratch: &mut Scratch,
    ) -> Result<Update, TrainError> {
        let Scratch { gradients, sum, fake } = scratch;
        let (gradients, sum) = (&mut gradients[..], &mut sum[..]);
        let clock = Instant::now();
        let loss_scale = state.loss_scale.map_or(1.0, |scaling| scaling.scale());
        let waited = loader.wait_us();
        let epoch = self.scheduled(state.step) / self.steps_per_epoch;
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
        let mut prepare_us = 0;
        let mut position = state.sample_position;
        // The batch to look at when the step goes wrong: the first that went wrong by itself, or else the last.
        let (mut suspect, mut suspect_found) = (None, false);
        sum.fill(0.0);
        // Batch norm moves its statistics in the forward pass; they are taken back when the step is refused.
        let statistics = state.weights.statistics.clone();
        for _ in 0..self.config.accumulate {
            let batch = match fake.take() {
                Some(batch) => batch,
                None => {
                    let batch = loader.next_batch().ok_or_else(|| {
                        TrainError::Config("the training data ended: this is a bug, please report it".into())
                    })??;
                    prepare_us += batch.decode_us + batch.prepare_us + batch.assign_us;
                    batch
                }
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
                loss_scale,
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
            let mut fine = part.det_loss.is_finite();
            if self.config.accumulate > 1 {
                sum.iter_mut().zip(&*gradients).for_each(|(s, g)| *s += share * g);
                fine = fine && all_finite(gradients);
            }
            rank_share = part_of_rank;
            position = batch.end_position;
            ids.extend(&batch.image_ids);
            if suspect_found {
                loader.recycle(batch);
            } else if let Some(passed) = suspect.replace(batch) {
                loader.recycle(passed);
            }
            suspect_found = suspect_found || !fine;
            if self.config.use_fake_data {
                *fake = suspect.clone();
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
        if loss_scale != 1.0 {
            gradients.iter_mut().for_each(|g| *g /= loss_scale);
        }
        let prepared = state.optimizer.prepare(&state.weights, gradients);
        let update = prepared.report;
        let learning_rate = self.schedule.at(self.scheduled(state.step));
        let record = StepRecord {
            step: state.step + 1,
            epoch,
            loss: losses.det_loss + update.l2_loss,
            det_loss: losses.det_loss,
            class_loss: losses.class_loss,
            box_loss: losses.box_loss,
            box_iou_loss: losses.box_iou_loss,
            l2_loss: update.l2_loss,
            learning_rate,
            gradient_norm: update.gradient_norm,
            raw_gradient_norm: update.raw_gradient_norm,
            loss_scale,
            seconds: clock.elapsed().as_secs_f64(),
            wait_s: (loader.wait_us() - waited) as f64 * 1e-6,
            prepare_s: prepare_us as f64 * 1e-6,
            images: self.config.global_batch() * self.config.accumulate,
        };
        // A skipped update counts as a step of the schedule, as in the reference.
        if record.loss.is_finite()
            && !update.raw_gradient_norm.is_finite()
            && state.loss_scale.as_mut().is_some_and(LossScale::overflowed)
        {
            state.weights.statistics = statistics;
            state.step += 1;
            state.sample_position = position;
            return Ok(Update::Done(record));
        }
        let statistic = match all_finite(&state.weights.statistics) {
            true => 0.0,
            false => f32::NAN,
        };
        let watched = [
            ("the loss", losses.det_loss + update.l2_loss),
            ("the gradient norm", update.raw_gradient_norm),
            ("a moving statistic", statistic),
        ];
        if let Some(&(what, value)) = watched.iter().find(|(_, value)| !value.is_finite()) {
            state.weights.statistics = statistics;
            let (mut place, mut encoded) = (String::new(), Vec::new());
            if let Some(batch) = &suspect {
                let table = &inputs.network.variables;
                place = first_non_finite(inputs.engine, table, &state.weights, batch, gradients)?;
                encoded = encode_batch(batch, state.step, &place)?;
            }
            // Where a rank's own batch is fine, another one's is to blame.
            let blamed = ranks == 1 || suspect_found;
            let group = inputs.group;
            return Ok(Update::NonFinite(NonFinite {
                step: state.step,
                what,
                value,
                place: join_words(group, &place, blamed)?,
                images: gather_ids(group, &ids)?,
                end_position: position,
                batch: first_bytes(group, encoded, blamed)?,
            }));
        }
        if let Some(batch) = suspect {
            loader.recycle(batch);
        }
        state.optimizer.apply(
            &mut state.weights,
            state.average.as_mut(),
            (gradients, &prepared),
            learning_rate,
            state.step,
        );
        state.step += 1;
        state.sample_position = position;
        if let Some(loss_scale) = &mut state.loss_scale {
            loss_scale.applied();
        }
        Ok(Update::Done(StepRecord {
            seconds: clock.elapsed().as_secs_f64(),
            ..record
        }))
    }
}
