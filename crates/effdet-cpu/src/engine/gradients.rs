//! The flat gradient buffer of a backward pass, of which finished parts may leave.

use std::sync::mpsc::Sender;

use effdet_model::network::{BatchNorm, VariableId, VariableTable};

/// Values from which on a finished part leaves: 1 MiB.
const PART: usize = 1 << 18;

/// Where gradients are written, or what is left of it.
pub(super) trait GradientBuffer {
    /// The values from the first on; those of finished parts are no longer among them.
    fn values(&mut self) -> &mut [f32];

    /// Nothing is written from value `start` on any more.
    fn finish_from(&mut self, start: usize);
}

/// A buffer that stays whole.
impl GradientBuffer for &mut [f32] {
    fn values(&mut self) -> &mut [f32] {
        self
    }

    fn finish_from(&mut self, _: usize) {}
}

/// A buffer whose finished parts are sent away.
pub(super) struct Parts<'g> {
    pub rest: &'g mut [f32],
    pub finished: Sender<&'g mut [f32]>,
}

impl GradientBuffer for Parts<'_> {
    fn values(&mut self) -> &mut [f32] {
        self.rest
    }

    fn finish_from(&mut self, start: usize) {
        let ready = self.rest.len().saturating_sub(start);
        if ready == 0 || (ready < PART && start > 0) {
            return;
        }
        let (rest, part) = std::mem::take(&mut self.rest).split_at_mut(start);
        self.rest = rest;
        // A receiver that is gone has failed and knows why.
        let _ = self.finished.send(part);
    }
}

/// Gradients by variable.
pub(super) struct Gradients<'a> {
    pub table: &'a VariableTable,
    pub buffer: &'a mut dyn GradientBuffer,
}

impl Gradients<'_> {
    /// All that are not finished, as they lie in the buffer.
    pub(super) fn all(&mut self) -> &mut [f32] {
        self.buffer.values()
    }

    /// Gradient of one variable.
    pub(super) fn of(&mut self, id: VariableId) -> &mut [f32] {
        &mut self.buffer.values()[self.table[id].range()]
    }

    /// Gradients of several different variables at once; none gives an empty slice.
    pub(super) fn of_all<const N: usize>(&mut self, ids: [Option<VariableId>; N]) -> [&mut [f32]; N] {
        let mut order: Vec<usize> = (0..N).filter(|&i| ids[i].is_some()).collect();
        order.sort_by_key(|&i| ids[i]);
        let mut slices: [&mut [f32]; N] = std::array::from_fn(|_| Default::default());
        let (mut rest, mut taken) = (self.buffer.values(), 0);
        for i in order {
            let Some(id) = ids[i] else { continue };
            let range = self.table[id].range();
            let (_, tail) = rest.split_at_mut(range.start - taken);
            let (slice, tail) = tail.split_at_mut(range.len());
            slices[i] = slice;
            (rest, taken) = (tail, range.end);
        }
        slices
    }

    /// Nothing is written to this variable or those behind it any more.
    pub(super) fn finish_from(&mut self, first: VariableId) {
        self.buffer.finish_from(self.table[first].range().start);
    }

    /// Nothing is written behind this batch norm any more.
    pub(super) fn finish_behind(&mut self, last: &BatchNorm) {
        self.buffer.finish_from(self.table[last.beta].range().end);
    }
}
