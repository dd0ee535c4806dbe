//! Pointwise (1×1) convolutions: products of an NHWC tensor, seen as rows × channels, with a small weight matrix, fused with
//! what surrounds them in the network.
//!
//! Forward, `y = A·W (+ bias)`. A is formed block by block from what is stored ([`Input`]): a tensor as it is, the
//! activation of a raw convolution output with its batch norm and squeeze-and-excitation gate, or a normalised tensor plus
//! residual, which is written out on the way. The batch-norm statistics of `y` come out of the same pass.
//!
//! Backward, `dX = dY·Wᵀ` and `dW = Aᵀ·dY`. dY is formed block by block from what is stored ([`OutputGradient`]) and feeds
//! both products; what the layer below needs is summed in the same pass ([`InputGradient`], [`BackwardActivated`]).

use std::marker::PhantomData;

use super::Executor;
use super::gemm::{self, Epilogue, Multiply, MultiplyTransposed, PANEL, padded, scratch_stride};
use super::row_plan::{BLOCK_ROWS, RowBlock, RowTask};
use super::row_sweeps::{
    ACTIVATION_SUMS, ActivateBackward, CopyRows, FinishGradient, RowPairs, Rows, Sink, flush, sweep,
};
use crate::arena::{ALIGNMENT, Bump, SharedPtr};
use crate::math::{Act, with_activation};
use crate::probe::{Kernel, Work};
use crate::simd::Isa;
use crate::storage::{Products, Stored};

pub use super::row_plan::{RowPlan, Segment};
pub use weights::{PackedWeights, Packing, pack};

mod operands;
mod partials;
mod weights;

use operands::{FormedGradient, LeftOperand};
use partials::WeightPartials;

/// Most tasks of a forward pass: enough to balance many threads.
const FORWARD_TASKS: usize = 64;

/// Most columns of the left operand that are formed at a time.
const SLAB_COLUMNS: usize = 240;

/// Columns per slab where an operand has `columns`: equal slabs, whole panels.
fn slab_columns(columns: usize) -> usize {
    padded(columns.div_ceil(columns.div_ceil(SLAB_COLUMNS).max(1)).max(1))
}

/// The slabs of an operand: first column and number of columns.
fn slabs(columns: usize) -> impl Iterator<Item = (usize, usize)> {
    let width = slab_columns(columns);
    (0..columns)
        .step_by(width)
        .map(move |first| (first, width.min(columns - first)))
}

/// Vectors over channels, one per group or one per image.
///
/// # Shapes
/// `values`: `[groups or images, channels]`.
#[derive(Debug, Clone, Copy)]
pub struct ChannelVectors<'a> {
    /// The vectors.
    pub values: &'a [f32],
    /// What selects a row's vector.
    pub index: VectorIndex,
}

/// What selects the channel vector that applies to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VectorIndex {
    /// The row's batch-norm group.
    Group,
    /// The row's image.
    Image,
}

impl<'a> ChannelVectors<'a> {
    /// One vector per group; a plain `[channels]` in the backbone.
    pub fn per_group(values: &'a [f32]) -> Self {
        Self {
            values,
            index: VectorIndex::Group,
        }
    }

    /// One vector per image.
    pub fn per_image(values: &'a [f32]) -> Self {
        Self {
            values,
            index: VectorIndex::Image,
        }
    }

    fn check(&self, what: &str, plan: &RowPlan, channels: usize) {
        let count = match self.index {
            VectorIndex::Group => plan.group_count(),
            VectorIndex::Image => plan.image_count(),
        };
        check(what, self.values.len(), count * channels);
    }

    /// The vector of a block, from `column` on.
    fn of(&self, block: &RowBlock, channels: usize, column: usize) -> *const f32 {
        let index = match self.index {
            VectorIndex::Group => block.group,
            VectorIndex::Image => block.image,
        };
        self.values[index * channels + column..].as_ptr()
    }
}

/// The tensor `gate·act(scale·raw + shift)`, of which only `raw` is stored.
#[derive(Debug, Clone, Copy)]
pub struct Activated<'a, X = f32> {
    /// Output of the convolution below, before its batch norm: `[rows, channels]`.
    pub raw: &'a [X],
    /// Batch norm's γ/σ.
    pub scale: ChannelVectors<'a>,
    /// Batch norm's β − μγ/σ.
    pub shift: ChannelVectors<'a>,
    /// The activation.
    pub act: Act,
    /// Gate of squeeze-and-excitation, `[images, channels]`; 1 where absent.
    pub gate: Option<&'a [f32]>,
}

/// The left operand of [`forward`], rows × input channels.
#[derive(Debug)]
pub enum Input<'a, X = f32> {
    /// Stored as it is.
    Plain(&'a [f32]),
    /// Formed on the way, not stored.
    Activated(Activated<'a, X>),
    /// `x = scale·raw + shift (+ residual)`, formed and written to `x`. Stochastic depth goes into per-image vectors.
    Normalized {
        /// Output of the convolution below, before its batch norm: `[rows, channels]`.
        raw: &'a [f32],
        /// Batch norm's γ/σ.
        scale: ChannelVectors<'a>,
        /// Batch norm's β − μγ/σ.
        shift: ChannelVectors<'a>,
        /// What is added, `[rows, channels]`.
        residual: Option<&'a [f32]>,
        /// Overwritten with the sum, `[rows, channels]`.
        x: &'a mut [f32],
    },
}

/// An operand of which nothing is stored in halves.
pub type FullInput<'a> = Input<'a, f32>;

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, X = f32, Y = f32> {
    /// The rows of all tensors.
    pub rows: &'a RowPlan,
    /// The weights.
    pub weights: &'a PackedWeights,
    /// The left operand.
    pub input: Input<'a, X>,
    /// `[outputs]`, added to every row.
    pub bias: Option<&'a [f32]>,
    /// Overwritten with the product: `[rows, stride]`.
    pub y: &'a mut [Y],
    /// Values from one row of `y` to the next, at least the number of output channels; the columns past these become 0.
    pub stride: usize,
    /// Overwritten with Σy and Σy² over the rows of each group: `[groups, 2, outputs]`.
    pub sums: Option<&'a mut [f64]>,
    /// Whether to write `y` past the caches, which pays where `y` is larger than they are. Ignored where rows are not aligned.
    pub streaming: bool,
}

/// Computes a pointwise convolution.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn forward<X: Stored, Y: Stored>(executor: &Executor, args: Forward<'_, X, Y>) {
    let Forward {
        rows: plan,
        weights,
        input,
        bias,
        y,
        stride,
        sums,
        streaming,
    } = args;
    let (inputs, outputs) = (weights.inputs, weights.outputs);
    let _report = executor.report(
        Kernel::Pointwise,
        Work::new(
            plan.rows() * inputs * outputs,
            plan.rows() * (inputs + outputs) + inputs * outputs,
        ),
    );
    weights.check_forward();
    assert!(
        stride >= outputs,
        "the stride {stride} of y is below its {outputs} channels"
    );
    check("y", y.len(), plan.rows() * stride);
    if let Some(bias) = bias {
        check("bias", bias.len(), outputs);
    }
    if let Some(sums) = &sums {
        check("sums", sums.len(), plan.group_count() * 2 * outputs);
    }
    let operand = LeftOperand::new(input, plan, inputs);

    let (isa, pool) = (executor.isa(), executor.pool());
    let tasks = plan.tasks(FORWARD_TASKS);
    let sums_stride = padded(outputs);
    let products = weights.products.forward;
    // Partial sums would lose bits in a format of halves.
    let slabs: Vec<(usize, usize)> = match size_of::<Y>() < size_of::<f32>() {
        true => vec![(0, inputs)],
        false => slabs(inputs).collect(),
    };
    let slab_stride = operand.slab_stride(products, slabs[0].1);
    let streaming = streaming && slabs.len() == 1 && rows_are_aligned(y, stride);
    let mut workspace = executor.workspace();
    let totals = workspace.totals(tasks.len() * 2 * outputs);
    let task_totals = SharedPtr::new(totals);
    let y = SharedPtr::new(y);
    let scratch_len =
        Bump::room(2 * sums_stride) + Bump::room(sums_stride) + Bump::room(BLOCK_ROWS * slab_stride);

    let cost = |task: usize| tasks[task].blocks.len() as u64;
    pool.run_weighed(tasks.len(), cost, &|task, worker| {
        // SAFETY: inside the task, with its worker, once; the totals at `task` belong to it alone.
        let (mut scratch, totals) = unsafe {
            (
                Bump::new(pool.scratch(worker, scratch_len)),
                part(task_totals, task, 2 * outputs),
            )
        };
        let block_sums = scratch.take_zeroed(2 * sums_stride);
        let padded_bias = scratch.take_zeroed(sums_stride);
        if let Some(bias) = bias {
            // SAFETY: the scratch piece holds the bias.
            unsafe { padded_bias.copy_from_nonoverlapping(bias.as_ptr(), outputs) };
        }
        let slab = scratch.take(BLOCK_ROWS * slab_stride);
        totals.fill(0.0);
        for (index, block) in plan.blocks(&tasks[task]).iter().enumerate() {
            let mut ahead = operand.ahead(plan.rows_after(&tasks, task, index), inputs);
            // SAFETY: the sizes are checked above, and the rows of a block belong to one task.
            unsafe {
                operand.prepare(isa, block, inputs);
                let c = y.get().add(block.row * stride);
                for &(first, depth) in &slabs {
                    let (a, a_stride) =
                        operand.slab(isa, products, block, inputs, (first, depth), (slab, slab_stride));
                    let last = first + depth == inputs;
                    let epilogue = Epilogue {
                        accumulate: first > 0,
                        bias: if last && bias.is_some() {
                            padded_bias
                        } else {
                            std::ptr::null()
                        },
                        sums: if last && sums.is_some() {
                            block_sums
                        } else {
                            std::ptr::null_mut()
                        },
                        sums_stride,
                        streaming,
                        ..Epilogue::store(c, stride)
                    };
                    let b = weights.forward.as_ptr().add(products.lanes(first) * PANEL);
                    let product = Multiply {
                        rows: block.rows,
                        columns: outputs,
                        depth: products.lanes(depth),
                        a,
                        a_stride,
                        b,
                        b_panel_stride: products.lanes(inputs) * PANEL,
                        epilogue,
                    };
                    gemm::multiply(isa, products, &product, &mut ahead);
                }
                for row in (0..block.rows).filter(|_| stride > outputs) {
                    c.add(row * stride + outputs).write_bytes(0, stride - outputs);
                }
                if sums.is_some() {
                    flush_rows(isa, block_sums, sums_stride, totals, outputs);
                }
            }
        }
    });
    if let Some(sums) = sums {
        reduce_totals(totals, tasks.iter().map(|task| task.group), sums, 2 * outputs);
    }
}

/// The gradient of the loss by the output of the convolution, dY.
///
/// # Shapes
/// Tensors are `[rows, stride]`, of which the first `outputs` columns count.
#[derive(Debug, Clone, Copy)]
pub enum OutputGradient<'a, G = f32, Y = f32> {
    /// Stored as it is.
    Plain {
        /// dY.
        dy: &'a [G],
        /// Values from one row to the next.
        stride: usize,
    },
    /// Batch norm's backward pass: `dY = a·dz + b·y + c`, formed on the way.
    ///
    /// With σ⁻¹ = 1/√(var + ε), m₁ = mean dz and m₂ = mean dz·ŷ: a = γσ⁻¹, b = −a·σ⁻¹·m₂, c = −a·(m₁ − μσ⁻¹·m₂). Stochastic
    /// depth goes into per-image vectors.
    Normalized {
        /// Gradient by batch norm's output.
        dz: &'a [G],
        /// Output of this convolution, batch norm's input.
        y: &'a [Y],
        /// Factor of `dz`.
        a: ChannelVectors<'a>,
        /// Factor of `y`.
        b: ChannelVectors<'a>,
        /// Constant.
        c: ChannelVectors<'a>,
        /// Values from one row of `dz` and `y` to the next.
        stride: usize,
    },
}

/// A gradient of which nothing is stored in halves.
pub type FullGradient<'a> = OutputGradient<'a, f32, f32>;

/// Where the gradients of weights and bias go.
#[derive(Debug)]
pub struct WeightGradient<'a> {
    /// `[inputs, outputs]`.
    pub dw: &'a mut [f32],
    /// Σ dY over all rows, `[outputs]`.
    pub db: Option<&'a mut [f32]>,
    /// Whether to add to what is there instead of overwriting it.
    pub accumulate: bool,
}

/// Where the gradient by a stored input goes.
#[derive(Debug)]
pub struct InputGradient<'a> {
    /// `[rows, inputs]`, overwritten with dY·Wᵀ + what is asked for below.
    pub dx: &'a mut [f32],
    /// Whether what `dx` holds is added.
    pub accumulate: bool,
    /// Further gradients to add, each `[rows, inputs]`: of the residual branch, of a feature that leaves the backbone.
    pub addends: [Option<&'a [f32]>; 2],
    /// What batch norm's backward pass of the layer below needs.
    pub sums: Option<GradientSums<'a>>,
}

/// Sums of the finished dx.
#[derive(Debug)]
pub struct GradientSums<'a> {
    /// Output of the convolution below, before its batch norm: `[rows, inputs]`.
    pub y: &'a [f32],
    /// Overwritten with Σdx and Σdx·y over the rows of each group: `[groups, 2, inputs]`.
    pub sums: &'a mut [f64],
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a, G = f32, Y = f32> {
    /// The rows of all tensors.
    pub rows: &'a RowPlan,
    /// The weights, packed with [`Packing::ForwardAndBackward`] where `input_gradient` is asked for.
    pub weights: &'a PackedWeights,
    /// dY.
    pub output_gradient: OutputGradient<'a, G, Y>,
    /// The left operand of the forward pass: `[rows, inputs]`.
    pub x: &'a [f32],
    /// Where dX goes, if it is needed.
    pub input_gradient: Option<InputGradient<'a>>,
    /// Where dW goes.
    pub weight_gradient: WeightGradient<'a>,
}

/// Computes the gradients of a pointwise convolution whose input was stored ([`Input::Plain`], [`Input::Normalized`]).
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn backward<G: Stored, Y: Stored>(executor: &Executor, args: Backward<'_, G, Y>) {
    let Backward {
        rows: plan,
        weights,
        output_gradient,
        x,
        input_gradient,
        weight_gradient,
    } = args;
    let (inputs, outputs) = (weights.inputs, weights.outputs);
    let _report = executor.report(
        Kernel::PointwiseBackward,
        gradient_work(plan, &output_gradient, inputs, outputs, input_gradient.is_some()),
    );
    output_gradient.check(plan, outputs);
    check("x", x.len(), plan.rows() * inputs);
    if let Some(gradient) = &input_gradient {
        weights.check_backward();
        check("dx", gradient.dx.len(), plan.rows() * inputs);
        for addend in gradient.addends.iter().flatten() {
            check("an addend of dx", addend.len(), plan.rows() * inputs);
        }
        if let Some(sums) = &gradient.sums {
            check("y below", sums.y.len(), plan.rows() * inputs);
            check("sums", sums.sums.len(), plan.group_count() * 2 * inputs);
        }
    }
    let (mut dx, mut sums_below) = (None, None);
    let (mut accumulate, mut addends, mut y_below) = (false, [None; 2], None);
    if let Some(gradient) = input_gradient {
        dx = Some(SharedPtr::new(gradient.dx));
        accumulate = gradient.accumulate;
        addends = gradient.addends;
        if let Some(sums) = gradient.sums {
            y_below = Some(sums.y);
            sums_below = Some(sums.sums);
        }
    }

    let (isa, pool) = (executor.isa(), executor.pool());
    let mut workspace = executor.workspace();
    let partials = WeightPartials::new(plan, inputs, outputs, weight_gradient);
    let tasks = &partials.tasks;
    let (floats, totals) = workspace.both(partials.len(), tasks.len() * (2 * inputs + outputs));
    let (dw_partials, task_totals) = (SharedPtr::new(floats), SharedPtr::new(totals));
    let products = weights.products.backward;
    let sums_stride = padded(inputs);
    let bias_len = padded(outputs);
    let slab_width = slab_columns(outputs).min(outputs);
    let x_stride = match products {
        Products::Single => 0,
        Products::Bf16Pairs | Products::Bf16Tiles => scratch_stride(inputs),
    };
    let scratch_len = Bump::room(2 * sums_stride)
        + Bump::room(bias_len)
        + FormedGradient::room(products, slab_width, partials.has_bias())
        + Bump::room(BLOCK_ROWS / 2 * x_stride);

    let cost = |task: usize| tasks[task].blocks.len() as u64;
    pool.run_weighed(tasks.len(), cost, &|task, worker| {
        // SAFETY: inside the task, with its worker, once; the totals and partials at `task` belong to it alone.
        let (mut scratch, totals, dw) = unsafe {
            (
                Bump::new(pool.scratch(worker, scratch_len)),
                part(task_totals, task, 2 * inputs + outputs),
                part(dw_partials, task, partials.stride()).as_mut_ptr(),
            )
        };
        let block_sums = scratch.take_zeroed(2 * sums_stride);
        let bias_sums = scratch.take_zeroed(bias_len);
        let slab = FormedGradient::new(products, slab_width, partials.has_bias(), &mut scratch);
        let x_pairs = scratch.take(BLOCK_ROWS / 2 * x_stride);
        totals.fill(0.0);
        let (below_totals, bias_totals) = totals.split_at_mut(2 * inputs);
        for (index, block) in plan.blocks(&tasks[task]).iter().enumerate() {
            let next = plan.rows_after(tasks, task, index);
            let narrow = next.start * inputs..next.end * inputs;
            let mut ahead = output_gradient.ahead(next).and(&x[narrow.clone()]);
            for tensor in y_below.iter().chain(addends.iter().flatten()) {
                ahead = ahead.and(&tensor[narrow.clone()]);
            }
            // SAFETY: the sizes are checked above, and the rows of a block belong to one task.
            unsafe {
                let at = block.row * inputs;
                let (p, p_stride) = match products {
                    Products::Single => (x.as_ptr().add(at), inputs),
                    Products::Bf16Pairs | Products::Bf16Tiles => {
                        let pass = CopyRows {
                            rows: block.rows,
                            columns: inputs,
                            x: x.as_ptr().add(at),
                            stride: inputs,
                            out: RowPairs {
                                out: x_pairs,
                                stride: x_stride,
                            },
                        };
                        sweep(isa, &pass);
                        (x_pairs.cast_const(), x_stride)
                    }
                };
                for (first, columns) in slabs(outputs) {
                    let bias_sums = partials.has_bias().then(|| bias_sums.add(first));
                    let dy = slab.form(isa, &output_gradient, block, outputs, (first, columns), bias_sums);
                    if let Some(dx) = &dx {
                        let (a, a_stride) = dy.left;
                        let product = Multiply {
                            rows: block.rows,
                            columns: inputs,
                            depth: products.lanes(columns),
                            a,
                            a_stride,
                            b: weights.backward.as_ptr().add(products.lanes(first) * PANEL),
                            b_panel_stride: products.lanes(outputs) * PANEL,
                            epilogue: Epilogue {
                                accumulate: accumulate || first > 0,
                                ..Epilogue::store(dx.get().add(at), inputs)
                            },
                        };
                        gemm::multiply(isa, products, &product, &mut ahead);
                    }
                    let (q, q_stride) = dy.right;
                    let product = MultiplyTransposed {
                        depth: products.lanes(block.rows),
                        rows: inputs,
                        columns,
                        p,
                        p_stride,
                        q,
                        q_stride,
                        c: dw.add(first),
                        c_stride: padded(outputs),
                        accumulate: index > 0,
                    };
                    gemm::multiply_transposed(isa, products, &product, &mut ahead);
                }
                if partials.has_bias() {
                    flush_rows(isa, bias_sums, bias_len, bias_totals, outputs);
                }
                if let Some(dx) = &dx
                    && (y_below.is_some() || addends.iter().any(Option::is_some))
                {
                    let finish = FinishGradient {
                        rows: block.rows,
                        columns: inputs,
                        dx: dx.get().add(at),
                        addends: addends
                            .map(|addend| addend.map_or(std::ptr::null(), |addend| addend[at..].as_ptr())),
                        y: y_below.map_or(std::ptr::null(), |y| y[at..].as_ptr()),
                        sums: block_sums,
                        sums_stride,
                    };
                    sweep(isa, &finish);
                    flush_rows(isa, block_sums, sums_stride, below_totals, inputs);
                }
            }
        }
    });
    let width = 2 * inputs + outputs;
    if let Some(sums) = sums_below {
        sums.fill(0.0);
        for (task, totals) in tasks.iter().zip(totals.chunks_exact(width)) {
            add(&mut sums[task.group * 2 * inputs..], &totals[..2 * inputs]);
        }
    }
    let bias_totals = totals
        .chunks_exact(width)
        .map(|totals| &totals[2 * inputs..])
        .take(tasks.len());
    partials.reduce(executor, floats, bias_totals);
}

/// Nominal work of both gradients, or of the weight gradient alone.
fn gradient_work<G, Y>(
    plan: &RowPlan,
    output_gradient: &OutputGradient<'_, G, Y>,
    inputs: usize,
    outputs: usize,
    with_input: bool,
) -> Work {
    let products = if with_input { 2 } else { 1 };
    let of_output = match output_gradient {
        OutputGradient::Plain { .. } => outputs,
        OutputGradient::Normalized { .. } => 2 * outputs,
    };
    Work::new(
        products * plan.rows() * inputs * outputs,
        plan.rows() * (of_output + products * inputs) + products * inputs * outputs,
    )
}

/// Arguments of [`backward_activated`].
#[derive(Debug)]
pub struct BackwardActivated<'a, X = f32, G = f32> {
    /// The rows of all tensors.
    pub rows: &'a RowPlan,
    /// The weights, packed with [`Packing::ForwardAndBackward`].
    pub weights: &'a PackedWeights,
    /// dY.
    pub output_gradient: OutputGradient<'a>,
    /// The left operand of the forward pass, formed again from what is stored.
    pub input: Activated<'a, X>,
    /// Overwritten with dA = dY·Wᵀ, the gradient by the gated activation: `[rows, inputs]`.
    pub da: &'a mut [G],
    /// Overwritten with five sums over the rows of each image, `[images, 5, inputs]`:
    /// Σ dA·act, Σ dA·s', Σ dA·s'·raw, Σ s', Σ s'·raw, where act and s' are the activation and its slope at
    /// z = scale·raw + shift.
    ///
    /// They are all that squeeze-and-excitation and the batch norm below need. The first is the gradient by the gate. With
    /// the gradient `dpool` that comes back through the pooling of N rows, dz = (gate·dA + dpool/N)·s', hence
    /// Σdz = gate·S₂ + dpool/N·S₄ and Σdz·raw = gate·S₃ + dpool/N·S₅.
    pub sums: &'a mut [f64],
    /// Whether to write `da` past the caches.
    pub streaming: bool,
    /// Where dW goes.
    pub weight_gradient: WeightGradient<'a>,
}

/// Computes the gradients of a pointwise convolution whose input was [`Input::Activated`].
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn backward_activated<X: Stored, G: Stored>(executor: &Executor, args: BackwardActivated<'_, X, G>) {
    let BackwardActivated {
        rows: plan,
        weights,
        output_gradient,
        input,
        da,
        sums,
        streaming,
        weight_gradient,
    } = args;
    let (inputs, outputs) = (weights.inputs, weights.outputs);
    let _report = executor.report(
        Kernel::PointwiseBackward,
        gradient_work(plan, &output_gradient, inputs, outputs, true),
    );
    weights.check_backward();
    output_gradient.check(plan, outputs);
    input.check(plan, inputs);
    check("da", da.len(), plan.rows() * inputs);
    check("sums", sums.len(), plan.image_count() * ACTIVATION_SUMS * inputs);

    let (isa, pool) = (executor.isa(), executor.pool());
    let mut workspace = executor.workspace();
    let partials = WeightPartials::new(plan, inputs, outputs, weight_gradient);
    let tasks = &partials.tasks;
    let (spans, first_spans) = image_spans(plan, tasks);
    let sums_len = ACTIVATION_SUMS * inputs;
    let bias_at = spans.len() * sums_len;
    let (floats, totals) = workspace.both(partials.len(), bias_at + tasks.len() * outputs);
    let (span_totals, bias_totals) = totals.split_at_mut(bias_at);
    let dw_partials = SharedPtr::new(floats);
    let (task_span_totals, task_bias_totals) = (SharedPtr::new(span_totals), SharedPtr::new(bias_totals));
    let streaming = streaming && rows_are_aligned(da, inputs);
    let da = SharedPtr::new(da);
    let products = weights.products.backward;
    let tile_columns = slab_columns(inputs);
    let tile_stride = scratch_stride(tile_columns);
    let sums_stride = padded(tile_columns);
    let bias_len = padded(outputs);
    let scratch_len = Bump::room(ACTIVATION_SUMS * sums_stride)
        + Bump::room(bias_len)
        + FormedGradient::room(products, outputs, partials.has_bias())
        + Bump::room(BLOCK_ROWS * tile_stride);

    let cost = |task: usize| tasks[task].blocks.len() as u64;
    pool.run_weighed(tasks.len(), cost, &|task, worker| {
        // SAFETY: inside the task, with its worker, once; the totals and partials at `task` belong to it alone.
        let (mut scratch, bias_totals, dw) = unsafe {
            (
                Bump::new(pool.scratch(worker, scratch_len)),
                part(task_bias_totals, task, outputs),
                part(dw_partials, task, partials.stride()).as_mut_ptr(),
            )
        };
        let block_sums = scratch.take_zeroed(ACTIVATION_SUMS * sums_stride);
        let bias_sums = scratch.take_zeroed(bias_len);
        let dy_scratch = FormedGradient::new(products, outputs, partials.has_bias(), &mut scratch);
        let tile = scratch.take(BLOCK_ROWS * tile_stride);
        bias_totals.fill(0.0);
        let mut span = first_spans[task];
        let mut image = None;
        for (index, block) in plan.blocks(&tasks[task]).iter().enumerate() {
            let next = plan.rows_after(tasks, task, index);
            let wide = next.start * inputs..next.end * inputs;
            let mut ahead = output_gradient.ahead(next).and(&input.raw[wide]);
            // SAFETY: the sizes are checked above; the rows of a block and the totals of a span belong to one task.
            unsafe {
                if image.is_some_and(|image| image != block.image) {
                    span += 1;
                }
                let totals = part(task_span_totals, span, sums_len);
                if image != Some(block.image) {
                    totals.fill(0.0);
                    image = Some(block.image);
                }
                let sums = partials.has_bias().then_some(bias_sums);
                let dy = dy_scratch.form(isa, &output_gradient, block, outputs, (0, outputs), sums);
                if partials.has_bias() {
                    flush_rows(isa, bias_sums, bias_len, bias_totals, outputs);
                }
                let ((a, a_stride), (q, q_stride)) = (dy.left, dy.right);
                for (first, columns) in slabs(inputs) {
                    let product = Multiply {
                        rows: block.rows,
                        columns,
                        depth: products.lanes(outputs),
                        a,
                        a_stride,
                        b: weights.backward.as_ptr().add(first * products.lanes(outputs)),
                        b_panel_stride: products.lanes(outputs) * PANEL,
                        epilogue: Epilogue::store(tile, tile_stride),
                    };
                    gemm::multiply(isa, products, &product, &mut ahead);
                    let at = block.row * inputs + first;
                    let pass = ActivationPass {
                        input: &input,
                        block,
                        channels: inputs,
                        columns: (first, columns),
                        tile,
                        tile_stride,
                        da: da.get().add(at),
                        streaming,
                        sums: block_sums,
                        sums_stride,
                    };
                    match products {
                        Products::Single => pass.run(
                            isa,
                            Rows {
                                out: tile,
                                stride: tile_stride,
                            },
                        ),
                        // A pair of rows takes the place of a row that was read before.
                        Products::Bf16Pairs | Products::Bf16Tiles => pass.run(
                            isa,
                            RowPairs {
                                out: tile,
                                stride: tile_stride,
                            },
                        ),
                    }
                    for (i, totals) in totals.chunks_exact_mut(inputs).enumerate() {
                        let sums = std::slice::from_raw_parts_mut(block_sums.add(i * sums_stride), columns);
                        flush(isa, sums, &mut totals[first..first + columns]);
                    }
                    let product = MultiplyTransposed {
                        depth: products.lanes(block.rows),
                        rows: columns,
                        columns: outputs,
                        p: tile,
                        p_stride: tile_stride,
                        q,
                        q_stride,
                        c: dw.add(first * padded(outputs)),
                        c_stride: padded(outputs),
                        accumulate: index > 0,
                    };
                    gemm::multiply_transposed(isa, products, &product, &mut ahead);
                }
            }
        }
    });
    reduce_totals(span_totals, spans.iter().copied(), sums, sums_len);
    partials.reduce(executor, floats, bias_totals.chunks_exact(outputs));
}

/// The elementwise pass of [`backward_activated`] over some columns of a block.
struct ActivationPass<'a, X, G> {
    input: &'a Activated<'a, X>,
    block: &'a RowBlock,
    channels: usize,
    columns: (usize, usize),
    tile: *const f32,
    tile_stride: usize,
    da: *mut G,
    streaming: bool,
    sums: *mut f32,
    sums_stride: usize,
}

impl<X: Stored, G: Stored> ActivationPass<'_, X, G> {
    /// # Safety
    /// As for [`sweep`] with [`ActivateBackward`].
    unsafe fn run(&self, isa: Isa, operand: impl Sink) {
        let (input, block, (first, columns)) = (self.input, self.block, self.columns);
        // SAFETY: the caller's promise.
        unsafe {
            with_activation!(input.act, A => {
                let pass = ActivateBackward::<A, X, G, _> {
                    rows: block.rows,
                    columns,
                    raw: input.raw.as_ptr().add(block.row * self.channels + first),
                    stride: self.channels,
                    scale: input.scale.of(block, self.channels, first),
                    shift: input.shift.of(block, self.channels, first),
                    gate: input.gate_of(block, self.channels, first),
                    tile: self.tile,
                    tile_stride: self.tile_stride,
                    operand,
                    da: self.da,
                    streaming: self.streaming,
                    sums: self.sums,
                    sums_stride: self.sums_stride,
                    act: PhantomData,
                };
                sweep(isa, &pass);
            });
        }
    }
}

/// The runs of blocks that lie in one task and one image: the image of each, and the first one of each task.
fn image_spans(plan: &RowPlan, tasks: &[RowTask]) -> (Vec<usize>, Vec<usize>) {
    let (mut images, mut first_of_task) = (Vec::new(), Vec::with_capacity(tasks.len()));
    for task in tasks {
        first_of_task.push(images.len());
        let blocks = plan.blocks(task);
        images.extend(
            blocks
                .chunk_by(|a, b| a.image == b.image)
                .map(|blocks| blocks[0].image),
        );
    }
    (images, first_of_task)
}

/// Adds each part's totals, `width` long, to those of its owner.
pub(super) fn reduce_totals(
    totals: &[f64],
    owners: impl Iterator<Item = usize>,
    sums: &mut [f64],
    width: usize,
) {
    sums.fill(0.0);
    for (owner, totals) in owners.zip(totals.chunks_exact(width)) {
        add(&mut sums[owner * width..], totals);
    }
}

pub(super) fn add(sums: &mut [f64], values: &[f64]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += value;
    }
}

/// Adds a block's f32 sums, rows of `stride`, to f64 totals, rows of `columns`, and sets them to 0.
///
/// # Safety
/// `isa` must be available, and there must be as many rows of sums as of totals.
pub(super) unsafe fn flush_rows(isa: Isa, sums: *mut f32, stride: usize, totals: &mut [f64], columns: usize) {
    for (row, totals) in totals.chunks_exact_mut(columns).enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            flush(
                isa,
                std::slice::from_raw_parts_mut(sums.add(row * stride), columns),
                totals,
            )
        };
    }
}

/// The part of a shared buffer that belongs to one task.
///
/// # Safety
/// The buffer must hold it, and nobody else may use it at the same time.
pub(super) unsafe fn part<'a, T>(buffer: SharedPtr<T>, index: usize, len: usize) -> &'a mut [T] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(buffer.get().add(index * len), len) }
}

/// Whether all rows start on 64-byte boundaries, which streaming stores of all widths need, in a format that streams.
pub(super) fn rows_are_aligned<T: Stored>(values: &[T], stride: usize) -> bool {
    T::STREAMS
        && values.as_ptr().addr().is_multiple_of(ALIGNMENT)
        && (stride * size_of::<T>()).is_multiple_of(ALIGNMENT)
}

/// # Panics
/// When a slice has not the length it must have.
#[track_caller]
pub(super) fn check(what: &str, actual: usize, expected: usize) {
    assert!(
        actual == expected,
        "{what} holds {actual} values, {expected} expected"
    );
}

#[cfg(test)]
mod tests;
