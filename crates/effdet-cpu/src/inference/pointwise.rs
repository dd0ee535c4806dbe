//! Pointwise convolutions over whole maps, with squeeze-and-excitation gates and residuals.

use std::ops::Range;

use super::fold::Dense;
use super::lifetimes::Slot;
use super::product::{Product, Rows, multiply};
use super::run::Run;
use crate::kernels::gemm::PANEL;
use crate::kernels::se;
use crate::math::Act;
use crate::simd::{Simd, dispatch};

/// Tasks of a layer: enough to keep the threads of a workstation evenly busy.
const TASKS: usize = 16;

/// Rows of a task are a multiple of this, so that tiles are whole.
const ROW_UNIT: usize = 8;

/// Values of the left operand that are worked on at a time: they should stay in the L2 cache beside the weights.
const BLOCK_VALUES: usize = 64 << 10;

/// One pointwise convolution: `out = bias + x·W (+ residual)`.
#[derive(Debug)]
pub(super) struct PointwiseLayer {
    pub dense: Dense,
    /// Weights made at run time in place of those among the constants.
    pub gated: Option<Slot>,
    pub input: Slot,
    pub residual: Option<Slot>,
    pub out: Slot,
    pub rows: usize,
}

impl PointwiseLayer {
    /// Multiply-adds and values of all tensors.
    pub(super) fn cost(&self) -> (usize, usize) {
        let (inputs, outputs) = (self.dense.inputs, self.dense.outputs);
        let residual = if self.residual.is_some() { outputs } else { 0 };
        let values = self.rows * (inputs + outputs + residual) + inputs * outputs;
        (self.rows * inputs * outputs, values)
    }

    /// The rows of each task; a function of the shape alone.
    pub(super) fn tasks(&self) -> Vec<Range<usize>> {
        let rows = self.rows.div_ceil(TASKS).next_multiple_of(ROW_UNIT);
        (0..self.rows)
            .step_by(rows)
            .map(|first| first..(first + rows).min(self.rows))
            .collect()
    }

    /// Computes some rows.
    ///
    /// # Safety
    /// The slots must hold what the layer reads, and the rows of `out` belong to the caller.
    pub(super) unsafe fn run(&self, run: &Run<'_>, rows: Range<usize>) {
        let (inputs, outputs) = (self.dense.inputs, self.dense.outputs);
        let block = (BLOCK_VALUES / inputs / ROW_UNIT).max(1) * 3 * ROW_UNIT;
        // SAFETY: the caller's promise; rows are inside the tensors.
        unsafe {
            let b = match self.gated {
                Some(slot) => run.buffer(slot).cast_const(),
                None => run.constant(self.dense.weights),
            };
            for first in rows.clone().step_by(block) {
                let count = block.min(rows.end - first);
                let product = Product::plain(
                    (count, outputs, inputs),
                    (run.buffer(self.input).add(first * inputs), inputs),
                    b,
                    run.constant(self.dense.bias),
                );
                let at = first * outputs;
                let sink = Rows {
                    out: run.buffer(self.out).add(at),
                    stride: outputs,
                    residual: self
                        .residual
                        .map_or(std::ptr::null(), |slot| run.buffer(slot).add(at).cast_const()),
                };
                multiply(run.isa(), &product, &sink);
            }
        }
    }
}

/// Squeeze-and-excitation: gates from channel sums, and the projection's weights multiplied by them.
///
/// Weights have fewer values than the map they are applied to, so the gates go there.
#[derive(Debug)]
pub(super) struct Excitation {
    /// Channel sums of bands, `[bands, channels up to whole lane groups]`.
    pub sums: Slot,
    pub bands: usize,
    pub channels: usize,
    /// Pixels that were summed.
    pub pixels: usize,
    pub reduce_kernel: Range<usize>,
    pub reduce_bias: Range<usize>,
    pub expand_kernel: Range<usize>,
    pub expand_bias: Range<usize>,
    pub act: Act,
    pub project: Dense,
    /// Overwritten with the gated weights, packed as those of `project`.
    pub gated: Slot,
}

impl Excitation {
    /// Computes gates and gated weights.
    ///
    /// # Safety
    /// The sums must be made, and nobody else use `gated`.
    pub(super) unsafe fn run(&self, run: &Run<'_>) {
        let squeezed = self.reduce_bias.len();
        let stride = self.channels.next_multiple_of(PANEL);
        let mut mean = vec![0.0; self.channels];
        let (mut hidden, mut gate) = (vec![0.0; squeezed], vec![0.0; self.channels]);
        // SAFETY: the caller's promise; slots have the sizes of the layer.
        unsafe {
            let sums = std::slice::from_raw_parts(run.buffer(self.sums).cast_const(), self.bands * stride);
            for (c, mean) in mean.iter_mut().enumerate() {
                let total: f64 = (0..self.bands)
                    .map(|band| f64::from(sums[band * stride + c]))
                    .sum();
                *mean = (total / self.pixels as f64) as f32;
            }
            let constant =
                |range: &Range<usize>| std::slice::from_raw_parts(run.constant(range.start), range.len());
            let args = se::Excite {
                weights: se::Weights {
                    reduce_kernel: constant(&self.reduce_kernel),
                    reduce_bias: constant(&self.reduce_bias),
                    expand_kernel: constant(&self.expand_kernel),
                    expand_bias: constant(&self.expand_bias),
                },
                act: self.act,
                mean: &mean,
                hidden: &mut hidden,
                gate: &mut gate,
            };
            se::excite(run.executor, args);
            let panels = self.project.outputs.div_ceil(PANEL);
            let panel_len = self.channels * PANEL;
            run.executor.pool().run(panels, &|panel, _| {
                let at = panel * panel_len;
                scale_rows(
                    run.isa(),
                    &gate,
                    run.constant(self.project.weights).add(at),
                    run.buffer(self.gated).add(at),
                );
            });
        }
    }
}

#[inline(always)]
unsafe fn scale_rows_body<S: Simd>(factors: &[f32], rows: *const f32, out: *mut f32) {
    for (row, &factor) in factors.iter().enumerate() {
        for lane in (0..PANEL).step_by(S::LANES) {
            let at = row * PANEL + lane;
            // SAFETY: the caller promises rows of 16.
            unsafe { S::store(out.add(at), S::mul(S::load(rows.add(at)), S::splat(factor))) };
        }
    }
}

dispatch! {
    /// Multiplies every row of a panel by its factor.
    ///
    /// # Safety
    /// `isa` must be available; both panels must hold a row per factor.
    unsafe fn scale_rows(factors: &[f32], rows: *const f32, out: *mut f32) = scale_rows_body;
}
