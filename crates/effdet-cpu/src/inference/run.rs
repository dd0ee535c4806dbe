//! What the layers of one run over an image share.

use super::lifetimes::{Placement, Slot};
use crate::arena::SharedPtr;
use crate::kernels::{Executor, Report};
use crate::probe::{Kernel, Stage, Work};
use crate::simd::Isa;

/// Who computes a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Crew {
    /// All of the pool together.
    All,
    /// This one, inside a task of the pool, while the others have images of their own.
    One(usize),
}

/// One run over one image.
#[derive(Debug)]
pub(super) struct Run<'a> {
    pub executor: &'a Executor,
    pub crew: Crew,
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
    /// Calls `f(task, worker)` for every task below `tasks`, which take as long as `cost` says.
    pub(super) fn each(&self, tasks: usize, cost: impl Fn(usize) -> u64, f: &(dyn Fn(usize, usize) + Sync)) {
        match self.crew {
            Crew::All => self.executor.pool().run_weighed(tasks, cost, f),
            Crew::One(worker) => (0..tasks).for_each(|task| f(task, worker)),
        }
    }

    /// Says that what follows belongs to `stage`.
    pub(super) fn enter(&self, stage: Stage) {
        if self.speaks_for().is_some() {
            self.executor.enter(stage);
        }
    }

    /// Reports `kernel` when the guard goes out of scope.
    pub(super) fn report(&self, kernel: Kernel, work: Work) -> Option<Report<'_>> {
        let workers = self.speaks_for()?;
        Some(self.executor.report(kernel, work.times(workers)))
    }

    /// How many runs this one reports for: where every worker has an image, the one on the calling thread speaks for all.
    fn speaks_for(&self) -> Option<usize> {
        match self.crew {
            Crew::All => Some(1),
            Crew::One(0) => Some(self.executor.pool().threads()),
            Crew::One(_) => None,
        }
    }

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
