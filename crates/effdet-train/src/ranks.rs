//! What a step, an evaluation and the start of a run exchange between ranks.

use std::cell::RefCell;
use std::sync::mpsc;
use std::thread;

use effdet_ckpt::LossScaleState;
use effdet_dist::{DistError, ProcessGroup, Wire};
use effdet_metrics::DetectionRow;
use effdet_model::engine::{Engine, StepLosses, StepOptions, SumOverRanks, TrainBatch};
use effdet_model::weights::Weights;

use crate::error::TrainError;
use crate::loss_scale::LossScale;
use crate::trainer::TrainState;

/// What is sent where there is no loss scaling.
const NO_SCALING: LossScaleState = LossScaleState {
    scale: 1.0,
    clean_steps: 0,
    skipped_steps: 0,
};

/// Gives every rank the state of rank 0.
///
/// # Errors
/// Those of the group.
pub fn broadcast_state(group: &dyn ProcessGroup, state: &mut TrainState) -> Result<(), DistError> {
    if group.size() == 1 {
        return Ok(());
    }
    let scaling = state.loss_scale.map_or(NO_SCALING, LossScaleState::from);
    let mut words = [
        state.step,
        state.sample_position,
        state.stale,
        u64::from(state.best.is_some()),
        state.best.unwrap_or_default().to_bits(),
        u64::from(state.evaluation_due),
        u64::from(state.loss_scale.is_some()),
        u64::from(scaling.scale.to_bits()),
        scaling.clean_steps,
        scaling.skipped_steps,
    ];
    group.broadcast(bytemuck::cast_slice_mut(&mut words), 0)?;
    let [
        step,
        sample_position,
        stale,
        has_best,
        best,
        due,
        has_scaling,
        scale,
        clean_steps,
        skipped_steps,
    ] = words;
    state.evaluation_due = due != 0;
    (state.step, state.sample_position, state.stale) = (step, sample_position, stale);
    state.best = (has_best != 0).then(|| f64::from_bits(best));
    let scaling = LossScaleState {
        scale: f32::from_bits(scale as u32),
        clean_steps,
        skipped_steps,
    };
    state.loss_scale = (has_scaling != 0).then(|| LossScale::from(scaling));
    for weights in std::iter::once(&mut state.weights).chain(&mut state.average) {
        group.broadcast_f32(&mut weights.trainable, 0)?;
        group.broadcast_f32(&mut weights.statistics, 0)?;
    }
    for (_, slot) in state.optimizer.slots_mut() {
        group.broadcast_f32(slot, 0)?;
    }
    Ok(())
}

/// How gradients are summed over ranks.
#[derive(Clone, Copy)]
pub struct Reduction<'a> {
    /// The ranks.
    pub group: &'a dyn ProcessGroup,
    /// How values travel.
    pub wire: Wire,
    /// This rank's gradients count by this factor.
    pub share: f32,
}

/// Runs a step whose gradients are summed over ranks part by part, as the backward pass finishes them.
///
/// The engine has a thread of its own meanwhile; this one talks to the other ranks, and so batch norm is each rank's own:
/// `options.sync` is left out.
///
/// # Errors
/// Those of the engine and the group.
///
/// # Determinism
/// The bits of a sum behind the pass: parts are cut where the network says, and every value is summed on its own.
pub fn train_step_on_ranks(
    engine: &mut dyn Engine,
    weights: &mut Weights,
    batch: &TrainBatch<'_>,
    options: &StepOptions<'_>,
    gradients: &mut [f32],
    reduction: Reduction<'_>,
) -> Result<StepLosses, TrainError> {
    let (sender, finished) = mpsc::channel::<&mut [f32]>();
    let &StepOptions {
        seed,
        epoch,
        loss_scale,
        ..
    } = options;
    thread::scope(|scope| {
        let step = scope.spawn(move || {
            let sync = None;
            let options = StepOptions {
                seed,
                epoch,
                sync,
                loss_scale,
            };
            engine.train_step_in_parts(weights, batch, &options, gradients, sender)
        });
        for part in finished {
            part.iter_mut().for_each(|g| *g *= reduction.share);
            reduction.group.all_reduce_sum(part, reduction.wire)?;
        }
        let losses = step
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(losses)
    })
}

/// Adds up losses and batch-norm statistics, each already multiplied by the share of its rank.
///
/// Statistics are averaged in every step, which a moving average allows: it is linear. So every rank holds the same state at any
/// time, and what is evaluated and saved is no single rank's.
///
/// # Errors
/// Those of the group.
pub fn reduce_losses(
    group: &dyn ProcessGroup,
    losses: &mut StepLosses,
    statistics: &mut [f32],
) -> Result<(), DistError> {
    let mut small = statistics.to_vec();
    small.extend([
        losses.class_loss,
        losses.box_loss,
        losses.box_iou_loss,
        losses.det_loss,
    ]);
    group.all_reduce_sum(&mut small, Wire::F32)?;
    let (reduced, sums) = small.split_at(statistics.len());
    statistics.copy_from_slice(reduced);
    *losses = StepLosses {
        class_loss: sums[0],
        box_loss: sums[1],
        box_iou_loss: sums[2],
        det_loss: sums[3],
    };
    Ok(())
}

/// Sums over a group as batch norm asks for them in the middle of a pass.
pub struct BatchNormSums<'a> {
    group: &'a dyn ProcessGroup,
    failure: RefCell<Option<DistError>>,
}

impl<'a> BatchNormSums<'a> {
    /// Sums over `group`.
    pub fn new(group: &'a dyn ProcessGroup) -> Self {
        Self {
            group,
            failure: RefCell::default(),
        }
    }

    /// The first failure since the last call.
    ///
    /// # Errors
    /// Those of the group.
    pub fn check(&self) -> Result<(), DistError> {
        self.failure.take().map_or(Ok(()), Err)
    }
}

impl std::fmt::Debug for BatchNormSums<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BatchNormSums over {} ranks", self.group.size())
    }
}

impl SumOverRanks for BatchNormSums<'_> {
    fn sum(&self, values: &mut [f64]) {
        let mut failure = self.failure.borrow_mut();
        if failure.is_none() {
            *failure = self.group.all_reduce_sum_f64(values).err();
        }
    }
}

/// Matched anchors of a batch of all ranks.
///
/// # Errors
/// Those of the group.
pub fn sum_positives(group: &dyn ProcessGroup, own: usize) -> Result<usize, DistError> {
    // Exact in f64.
    let mut sum = [own as f64];
    group.all_reduce_sum_f64(&mut sum)?;
    Ok(sum[0] as usize)
}

/// Numbers of all ranks in their order: image ids of a step.
///
/// # Errors
/// Those of the group.
pub fn gather_ids(group: &dyn ProcessGroup, ids: &[i64]) -> Result<Vec<i64>, DistError> {
    let all = group.all_gather(bytemuck::cast_slice(ids))?;
    Ok(all
        .iter()
        .flat_map(|bytes| words(bytes).map(i64::from_ne_bytes))
        .collect())
}

/// What ranks that are to blame say, each with its number; what rank 0 says when none is.
///
/// # Errors
/// Those of the group.
pub fn join_words(group: &dyn ProcessGroup, own: &str, blamed: bool) -> Result<String, DistError> {
    if group.size() == 1 {
        return Ok(own.to_owned());
    }
    let own = format!("{}{own}", if blamed { "!" } else { " " });
    let all = group.all_gather(own.as_bytes())?;
    let words: Vec<String> = all
        .iter()
        .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
        .collect();
    let said: Vec<String> = (words.iter().enumerate())
        .filter_map(|(rank, words)| Some(format!("rank {rank}: {}", words.strip_prefix('!')?)))
        .collect();
    Ok(match said.is_empty() {
        true => words[0].trim_start().to_owned(),
        false => said.join("; "),
    })
}

/// The bytes of the first rank that is to blame; those of rank 0 when none is.
///
/// # Errors
/// Those of the group.
pub fn first_bytes(group: &dyn ProcessGroup, own: Vec<u8>, blamed: bool) -> Result<Vec<u8>, DistError> {
    if group.size() == 1 {
        return Ok(own);
    }
    let votes = group.all_gather(&[u8::from(blamed)])?;
    let root = votes.iter().position(|vote| vote == &[1]).unwrap_or(0);
    group.broadcast_bytes(own, root)
}

/// Detections of all ranks in their order.
///
/// # Errors
/// Those of the group.
pub fn gather_detections(
    group: &dyn ProcessGroup,
    rows: Vec<DetectionRow>,
) -> Result<Vec<DetectionRow>, DistError> {
    if group.size() == 1 {
        return Ok(rows);
    }
    let mut bytes = Vec::with_capacity(rows.len() * WORDS * 8);
    for row in &rows {
        let [x, y, w, h] = row.bbox_xywh_px.map(f64::to_bits);
        let record: [u64; WORDS] = [
            row.image_id as u64,
            row.category_id as u64,
            x,
            y,
            w,
            h,
            row.score.to_bits(),
        ];
        bytes.extend_from_slice(bytemuck::cast_slice(&record));
    }
    drop(rows);
    let all = group.all_gather(&bytes)?;
    Ok(all
        .iter()
        .flat_map(|bytes| bytes.chunks_exact(8 * WORDS).map(row))
        .collect())
}

/// Words of a detection on its way.
const WORDS: usize = 7;

fn words(bytes: &[u8]) -> impl Iterator<Item = [u8; 8]> {
    bytes.as_chunks::<8>().0.iter().copied()
}

fn row(bytes: &[u8]) -> DetectionRow {
    let mut words = words(bytes).map(u64::from_ne_bytes);
    let mut next = || words.next().unwrap_or_default();
    DetectionRow {
        image_id: next() as i64,
        category_id: next() as i64,
        bbox_xywh_px: std::array::from_fn(|_| f64::from_bits(next())),
        score: f64::from_bits(next()),
    }
}
