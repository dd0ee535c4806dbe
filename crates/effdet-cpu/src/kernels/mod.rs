//! Fused kernels over NHWC tensors: f32, channels innermost.
//!
//! # Determinism
//! Every result has the same bits for every instruction set and every number of threads: vectors run over channels, sums run
//! in program order over all other indices, and the grouping of partial sums depends on shapes alone.

pub mod depthwise;
pub mod elementwise;
pub mod fuse;
pub(crate) mod gemm;
#[cfg(test)]
mod halves;
pub(crate) mod lanes;
pub mod loss;
pub mod pointwise;
pub mod resample;
pub(crate) mod row_plan;
pub(crate) mod row_sweeps;
pub mod se;
pub mod stem;
#[cfg(test)]
pub(crate) mod testing;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::arena::AlignedBuf;
use crate::pool::Pool;
use crate::probe::{Kernel, Probe, Stage, Work};
use crate::simd::Isa;

/// What every kernel runs on: a pool of threads and an instruction set that is available here.
#[derive(Debug)]
pub struct Executor {
    pool: Arc<Pool>,
    isa: Isa,
    workspace: Mutex<Workspace>,
    probe: Option<Arc<dyn Probe>>,
}

/// Partial results of the tasks of one kernel call, kept between calls for their memory.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    floats: AlignedBuf,
    totals: Vec<f64>,
    /// Never written.
    zeros: AlignedBuf,
}

impl Workspace {
    /// `floats` values and `totals` totals, whatever they hold.
    pub(crate) fn both(&mut self, floats: usize, totals: usize) -> (&mut [f32], &mut [f64]) {
        self.floats.grow(floats);
        if self.totals.len() < totals {
            self.totals.resize(totals, 0.0);
        }
        (&mut self.floats[..floats], &mut self.totals[..totals])
    }

    /// `len` totals, whatever they hold.
    pub(crate) fn totals(&mut self, len: usize) -> &mut [f64] {
        self.both(0, len).1
    }

    /// `totals` totals, whatever they hold, and `zeros` zeros.
    pub(crate) fn totals_and_zeros(&mut self, totals: usize, zeros: usize) -> (&mut [f64], &[f32]) {
        self.zeros.grow(zeros);
        self.both(0, totals);
        (&mut self.totals[..totals], &self.zeros[..zeros])
    }
}

impl Executor {
    /// An executor with `threads` threads.
    ///
    /// # Panics
    /// When `isa` is not available on this processor; ask [`Isa::is_available`] first.
    pub fn new(threads: usize, isa: Isa) -> Self {
        assert!(
            isa.is_available(),
            "instruction set {isa} is not available on this processor"
        );
        Self {
            pool: Arc::new(Pool::new(threads)),
            isa,
            workspace: Mutex::default(),
            probe: None,
        }
    }

    /// The threads.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    pub(crate) fn workspace(&self) -> MutexGuard<'_, Workspace> {
        // A poisoned lock only says that a task panicked; the content is overwritten anyway.
        self.workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `probe` listen to all that follows; none ends it.
    pub fn listen(&mut self, probe: Option<Arc<dyn Probe>>) {
        self.probe = probe;
    }

    /// Says that what follows belongs to `stage`.
    pub(crate) fn enter(&self, stage: Stage) {
        if let Some(probe) = &self.probe {
            probe.enter(stage);
        }
    }

    /// Reports `kernel` when the guard goes out of scope.
    pub(crate) fn report(&self, kernel: Kernel, work: Work) -> Report<'_> {
        Report {
            probe: self.probe.as_deref(),
            kernel,
            work,
        }
    }

    /// Bytes of the partial results that are kept.
    #[cfg(test)]
    pub(crate) fn workspace_bytes(&self) -> usize {
        self.workspace().floats.len() * size_of::<f32>()
    }

    /// The instruction set, available on this processor.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

/// Reports a kernel call at its end.
#[must_use]
#[derive(Debug)]
pub(crate) struct Report<'a> {
    probe: Option<&'a dyn Probe>,
    kernel: Kernel,
    work: Work,
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        if let Some(probe) = self.probe {
            probe.done(self.kernel, self.work);
        }
    }
}
