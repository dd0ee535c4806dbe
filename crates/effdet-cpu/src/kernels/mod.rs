//! Fused kernels over NHWC tensors: f32, channels innermost.
//!
//! # Determinism
//! Every result has the same bits for every instruction set and every number of threads: vectors run over channels, sums run
//! in program order over all other indices, and the grouping of partial sums depends on shapes alone.

pub mod pointwise;

use crate::pool::Pool;
use crate::simd::Isa;

/// What every kernel runs on: a pool of threads and an instruction set that is available here.
#[derive(Debug)]
pub struct Executor {
    pool: Pool,
    isa: Isa,
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
            pool: Pool::new(threads),
            isa,
        }
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The instruction set, available on this processor.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}
