//! What the layers of one forward or backward pass share.

use std::sync::Arc;

use effdet_model::engine::{Mode, SumOverRanks};
use effdet_model::hparams::FusionMethod;
use effdet_model::network::{Conv, VariableId, VariableTable};

use super::batch_norm::BatchNormState;
use super::gradients::Gradients;
use super::timeline::{Step, Timeline};
use crate::arena::Region;
use crate::kernels::Executor;
use crate::kernels::stem::Normalize;
use crate::stochastic_depth::DrawKeys;

/// One pass over a batch.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    pub executor: &'a Executor,
    pub table: &'a VariableTable,
    pub mode: Mode,
    /// Trainable values.
    pub trainable: &'a [f32],
    /// Moving statistics: read in inference, moved in training.
    pub statistics: Statistics<'a>,
    pub normalize_input: Option<Normalize>,
    /// BiFPN fusion, and whether its weights go through a ReLU.
    pub fusion: (FusionMethod, bool),
    pub draws: Option<DrawKeys<'a>>,
    /// Batch statistics are those of all ranks together.
    pub sync: Option<&'a dyn SumOverRanks>,
    /// Of the layers that the pass goes through.
    pub clock: Option<&'a Clock>,
}

/// Tells the buffers which step is at hand.
#[derive(Debug, Clone)]
pub(super) struct Clock {
    timeline: Timeline,
    region: Arc<Region>,
}

impl Clock {
    pub(super) fn new(timeline: Timeline, region: Arc<Region>) -> Self {
        Self { timeline, region }
    }

    /// Bytes of the buffers.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.region.bytes()
    }
}

/// The moving statistics.
#[derive(Debug)]
pub(super) enum Statistics<'a> {
    Read(&'a [f32]),
    Move(&'a mut [f32]),
}

impl<'a> Pass<'a> {
    pub(super) fn training(&self) -> bool {
        self.mode == Mode::Train
    }

    /// Goes on to a step.
    pub(super) fn enter(&self, step: Step) {
        if let Some(Clock { timeline, region }) = self.clock {
            self.executor.enter(timeline.stage(step));
            // SAFETY: layers borrow from their buffers during their own steps only, which the lifetimes of these cover.
            unsafe { region.enter(timeline.number(step)) };
        }
    }

    /// Values of a trainable variable.
    pub(super) fn variable(&self, id: VariableId) -> &'a [f32] {
        &self.trainable[self.table[id].range()]
    }

    /// Values of a convolution's bias; none gives an empty slice.
    pub(super) fn bias(&self, conv: &Conv) -> &'a [f32] {
        conv.bias.map_or(&[], |id| self.variable(id))
    }

    /// Makes a batch norm ready for its consumers: from the batch's sums in training, from the moving statistics otherwise.
    ///
    /// `counts`: values per channel of each group.
    pub(super) fn normalize(&mut self, state: &mut BatchNormState, counts: &[usize]) {
        match &mut self.statistics {
            Statistics::Read(statistics) => state.use_moving(self.table, self.trainable, statistics),
            Statistics::Move(statistics) => {
                let counts = state.sum_over_ranks(self.sync, counts);
                state.use_batch(self.table, self.trainable, statistics, &counts);
            }
        }
    }

    /// Makes a batch norm ready for its backward pass from its gradient sums; writes the gradients of γ and β.
    pub(super) fn backward_norm(
        &self,
        state: &mut BatchNormState,
        counts: &[usize],
        gradients: &mut Gradients<'_>,
    ) {
        // γ and β belong to this rank's loss; what goes on backwards depends on the batches of all.
        state.write_gradients(self.table, gradients.all());
        let counts = state.sum_over_ranks(self.sync, counts);
        state.backward(self.table, self.trainable, &counts);
    }

    /// Factor of a residual branch for every image.
    pub(super) fn branch_factors(&self, survival: f32, layer: u64) -> Option<Vec<f32>> {
        let keys = self.draws.filter(|_| self.training() && survival < 1.0)?;
        Some(keys.branch_factors(survival, layer))
    }
}

/// `[channels]` values times a factor per image: `[images, channels]`.
pub(super) fn per_image(values: &[f32], factors: &[f32]) -> Vec<f32> {
    factors
        .iter()
        .flat_map(|&factor| values.iter().map(move |&value| value * factor))
        .collect()
}
