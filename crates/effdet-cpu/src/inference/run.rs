//! What the layers of one run over an image share.

use super::lifetimes::{Placement, Slot};
use crate::arena::SharedPtr;
use crate::kernels::Executor;
use crate::simd::Isa;

/// One run over one image.
#[derive(Debug)]
pub(super) struct Run<'a> {
    pub executor: &'a Executor,
    pub placement: &'a Placement,
    pub arena: SharedPtr<f32>,
    pub constants: &'a [f32],
    /// `[height, width, 3]`.
    pub pixels: &'a [f32],
    /// Class logits and box codes of each level.
    pub outputs: &'a [[SharedPtr<f32>; 2]],
}

/// Where the result of a layer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    /// A buffer of the arena.
    Slot(Slot),
    /// Class logits of a level.
    Class(usize),
    /// Box codes of a level.
    Box(usize),
}

impl Run<'_> {
    pub(super) fn isa(&self) -> Isa {
        self.executor.isa()
    }

    /// First value of a buffer. The placement keeps apart what lives at the same time.
    pub(super) fn buffer(&self, slot: Slot) -> *mut f32 {
        self.arena.get().wrapping_add(self.placement.offset(slot))
    }

    /// First value of constants.
    pub(super) fn constant(&self, at: usize) -> *const f32 {
        self.constants[at..].as_ptr()
    }

    /// First value of an output.
    pub(super) fn output(&self, output: Output) -> *mut f32 {
        match output {
            Output::Slot(slot) => self.buffer(slot),
            Output::Class(level) => self.outputs[level][0].get(),
            Output::Box(level) => self.outputs[level][1].get(),
        }
    }
}
