//! Pointwise convolutions over whole maps, with squeeze-and-excitation gates and residuals.

use std::ops::Range;

use super::fold::Dense;
use super::lifetimes::Slot;
use super::product::{Product, Rows, multiply};
use super::run::Run;
use crate::arena::SharedPtr;
use crate::kernels::gemm::PANEL;
use crate::kernels::se;
use crate::math::Act;
use crate::probe::Kernel;
use crate::simd::{Simd, dispatch};

/// Rows that are gated at a time: few enough to stay in the L2 cache beside the weights.
const GATED_ROWS: usize = 16;

/// Tasks of a layer: enough to keep the threads of a workstation evenly busy.
const TASKS: usize = 16;

/// Rows of a task are a multiple of this, so that tiles are whole.
const ROW_UNIT: usize = 8;

/// Values of the left operand that are worked on at a time: they should stay in the L2 cache beside the weights.
const BLOCK_VALUES: usize = 64 << 10;

/// Where a gate per input channel goes: to the weights or to the rows, whichever are fewer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    None,
    /// Weights made at run time in place of those among the constants.
    Weights(Slot),
    /// The gates, `[channels]`, which multiply every row.
    Rows(Slot),
}

impl Gate {
    /// Whether rows are to be multiplied: they are in the caches, while weights come from memory and their products go there.
    pub(super) fn belongs_to_rows(rows: usize, dense: &Dense) -> bool {
        rows <= 2 * dense.outputs
    }
}

/// One pointwise convolution: `out = bias + x·W (+ residual)`.
#[derive(Debug)]
pub(super) struct PointwiseLayer {
    pub dense: Dense,
    pub gate: Gate,
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

    /// Multiply-adds of a row.
    pub(super) fn row_cost(&self) -> u64 {
        (self.dense.inputs * self.dense.outputs) as u64
    }

    /// The rows of each task; a function of the shape alone.
    pub(super) fn tasks(&self) -> Vec<Range<usize>> {
        let rows = self.rows.div_ceil(TASKS).next_multiple_of(ROW_UNIT);
        (0..self.rows)
            .step_by(rows)
            .map(|first| first..(first + rows).min(self.rows))
            .collect()
    }

    /// Rows that are worked on at a time.
    fn block(&self) -> usize {
        let rows = (BLOCK_VALUES / self.dense.inputs / ROW_UNIT).max(1) * ROW_UNIT;
        match self.gate {
            Gate::Rows(_) => rows.min(GATED_ROWS),
            Gate::None | Gate::Weights(_) => rows * 3,
        }
    }

    /// Values of scratch memory that a task needs.
    pub(super) fn scratch_len(&self) -> usize {
        match self.gate {
            Gate::Rows(_) => self.block() * self.dense.inputs,
            Gate::None | Gate::Weights(_) => 0,
        }
    }

    /// Computes some rows.
    ///
    /// # Safety
    /// Call it inside a task of the pool with its worker; the slots must hold what the layer reads, and the rows of `out` belong
    /// to the caller.
    pub(super) unsafe fn run(&self, run: &Run<'_>, rows: Range<usize>, worker: usize) {
        let (inputs, outputs) = (self.dense.inputs, self.dense.outputs);
        let block = self.block();
        // SAFETY: the caller's promise; rows are inside the tensors.
        unsafe {
            let b = match self.gate {
                Gate::Weights(slot) => run.buffer(slot).cast_const(),
                Gate::None | Gate::Rows(_) => run.constant(self.dense.weights),
            };
            let slab = run
                .executor
                .pool()
                .scratch(worker, self.scratch_len())
                .as_mut_ptr();
            for first in rows.clone().step_by(block) {
                let count = block.min(rows.end - first);
                let mut a = run.buffer(self.input).add(first * inputs).cast_const();
                if let Gate::Rows(gate) = self.gate {
                    gate_rows(run.isa(), (count, inputs), run.buffer(gate), a, slab);
                    a = slab;
                }
                let product = Product::plain(
                    (count, outputs, inputs),
                    (a, inputs),
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

/// Squeeze-and-excitation: gates from channel sums, and the projection's weights multiplied by them where that is where they go.
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
    /// Overwritten with the gates or with the gated weights, packed as those of `project`.
    pub gate: Gate,
}

impl Excitation {
    /// Computes gates and gated weights.
    ///
    /// # Safety
    /// The sums must be made, and nobody else use the slot of `gate`.
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
            let report = run.report(Kernel::SqueezeExcite, args.work());
            se::excite_alone(run.isa(), args);
            drop(report);
            let gated = match self.gate {
                Gate::None => return,
                Gate::Rows(slot) => {
                    let out = std::slice::from_raw_parts_mut(run.buffer(slot), self.channels);
                    out.copy_from_slice(&gate);
                    return;
                }
                Gate::Weights(slot) => SharedPtr::new(std::slice::from_raw_parts_mut(
                    run.buffer(slot),
                    self.project.packed_len(),
                )),
            };
            let panels = self.project.outputs.div_ceil(PANEL);
            let panel_len = self.channels * PANEL;
            run.each(panels, |_| 1, &|panel, _| {
                let at = panel * panel_len;
                scale_rows(
                    run.isa(),
                    &gate,
                    run.constant(self.project.weights).add(at),
                    gated.get().add(at),
                );
            });
        }
    }
}

#[inline(always)]
unsafe fn gate_rows_body<S: Simd>(
    (rows, columns): (usize, usize),
    gate: *const f32,
    source: *const f32,
    out: *mut f32,
) {
    for row in 0..rows {
        for column in (0..columns).step_by(S::LANES) {
            let (at, lanes) = (row * columns + column, S::LANES.min(columns - column));
            // SAFETY: rows and columns of both, `columns` gates.
            unsafe {
                if lanes == S::LANES {
                    let gated = S::mul(S::load(source.add(at)), S::load(gate.add(column)));
                    S::store(out.add(at), gated);
                } else {
                    let gated = S::mul(
                        S::load_partial(source.add(at), lanes),
                        S::load_partial(gate.add(column), lanes),
                    );
                    S::store_partial(out.add(at), gated, lanes);
                }
            }
        }
    }
}

dispatch! {
    /// Multiplies rows by a vector.
    ///
    /// # Safety
    /// `isa` must be available and the pointers valid.
    unsafe fn gate_rows(shape: (usize, usize), gate: *const f32, source: *const f32, out: *mut f32)
        = gate_rows_body;
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
