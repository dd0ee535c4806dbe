//! Depthwise convolutions over NHWC tensors, fused with the batch norms and activations around them.
//!
//! Forward, `y = conv(act(scale·raw + shift))` and the batch-norm statistics of `y`. Backward, one pass over the input rows
//! makes the input gradient, the weight gradient and the sums for the batch norm below.

use std::marker::PhantomData;

use self::backward::InputLine;
use self::forward::{OutputLine, strip_pixels};
use self::lines::{
    ActivateStrip, ActivatedLine, GradientLine, Line, PlainLine, activate_strip, clear_margins, fill,
};
use self::plan::{LANE_GROUP, Part};
use super::Executor;
use super::elementwise::{Affine, AffineVectors, Source, Vectors};
use super::pointwise::{ChannelVectors, check, flush_rows, part, rows_are_aligned};
use crate::arena::{Bump, SharedPtr};
use crate::math::{Act, with_activation};
use crate::probe::{Kernel, Work};
use crate::simd::Isa;
use crate::storage::Stored;

mod backward;
mod forward;
mod lines;
mod plan;
#[cfg(test)]
mod tests;

pub use self::plan::DepthwisePlan;

/// Terms that are added in f32 before the sum is flushed to f64, about.
const TERMS_PER_FLUSH: usize = 1024;

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, X = f32, Y = f32> {
    /// Shapes.
    pub plan: &'a DepthwisePlan,
    /// The input: `[input rows, channels]`. Padding is 0 after the activation.
    pub input: Source<'a, X>,
    /// `[k, k, channels, 1]`.
    pub weights: &'a [f32],
    /// Overwritten with the convolution: `[output rows, channels]`.
    pub y: &'a mut [Y],
    /// Overwritten with Σy and Σy² over the rows of each group: `[groups, 2, channels]`.
    pub sums: Option<&'a mut [f64]>,
    /// Whether to write `y` past the caches, which pays where `y` is larger than they are. Ignored where rows are not aligned.
    pub streaming: bool,
}

/// Computes a depthwise convolution.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn forward<X: Stored, Y: Stored>(executor: &Executor, args: Forward<'_, X, Y>) {
    let plan = args.plan;
    let values = args.input.raw.len() + args.y.len();
    let _report = executor.report(Kernel::Depthwise, Work::new(plan.multiply_adds(), values));
    check(
        "the input",
        args.input.raw.len(),
        plan.input_rows() * plan.channels,
    );
    check(
        "weights",
        args.weights.len(),
        plan.kernel_size * plan.kernel_size * plan.channels,
    );
    check("y", args.y.len(), plan.output_rows() * plan.channels);
    if let Some(sums) = &args.sums {
        check("sums", sums.len(), plan.maps.len() * 2 * plan.channels);
    }
    match (plan.kernel_size, plan.stride) {
        (3, 1) => forward_parts::<X, Y, 3, 1>(executor, args),
        (3, 2) => forward_parts::<X, Y, 3, 2>(executor, args),
        (5, 1) => forward_parts::<X, Y, 5, 1>(executor, args),
        _ => forward_parts::<X, Y, 5, 2>(executor, args),
    }
}

fn forward_parts<X: Stored, Y: Stored, const K: usize, const ST: usize>(
    executor: &Executor,
    args: Forward<'_, X, Y>,
) {
    let Forward {
        plan,
        input,
        weights,
        y,
        sums,
        streaming,
    } = args;
    let channels = plan.channels;
    let affine = AffineVectors::new(input.affine, (plan.maps.len(), plan.images, channels));
    let (isa, pool) = (executor.isa(), executor.pool());
    let streaming = streaming && rows_are_aligned(y, channels);
    let (with_sums, y) = (sums.is_some(), SharedPtr::new(y));
    let most_channels = plan.most_lane_groups() * LANE_GROUP;
    let mut workspace = executor.workspace();
    // Columns that a part reads; a line buffer holds these, the padding included.
    let line_pixels = |tile: &Part| (tile.width - 1) * ST + K;
    // An odd number of cache lines, so that lane groups spread over all sets of a cache.
    let group_stride = |tile: &Part| (line_pixels(tile) | 1) * LANE_GROUP;
    let line_len = |tile: &Part| tile.lane_groups() * group_stride(tile);
    let longest_line = plan.output_tasks.iter().map(line_len).max().unwrap_or(0);
    let totals_len = plan.output_tasks.len() * 2 * most_channels;
    let (totals, zeros) = workspace.totals_and_zeros(totals_len, longest_line);
    let task_totals = SharedPtr::new(totals);

    pool.run(plan.output_tasks.len(), &|task, worker| {
        let tile = &plan.output_tasks[task];
        let map = &plan.maps[tile.map];
        let groups = tile.lane_groups();
        let (line_pixels, group_stride, line_len) = (line_pixels(tile), group_stride(tile), line_len(tile));
        let first = (tile.left * ST) as isize - map.pad_left as isize;
        let from = first.max(0) as usize;
        let to = ((first + line_pixels as isize) as usize).min(map.input.width);
        let margins = ((from as isize - first) as usize, (to as isize - first) as usize);
        let sums_stride = groups * LANE_GROUP;
        let staging_len = strip_pixels(K) * LANE_GROUP;
        let scratch_len = K * Bump::room(line_len)
            + Bump::room(K * K * sums_stride)
            + Bump::room(2 * sums_stride)
            + Bump::room(staging_len);
        // SAFETY: inside the task, with its worker, once; the totals at `task` belong to it alone.
        let (mut scratch, totals) = unsafe {
            (
                Bump::new(pool.scratch(worker, scratch_len)),
                part(task_totals, task, 2 * most_channels),
            )
        };
        let ring: [_; K] = std::array::from_fn(|_| scratch.take(line_len));
        let packed = scratch.take_zeroed(K * K * sums_stride);
        let line_sums = scratch.take_zeroed(2 * sums_stride);
        let staging = scratch.take(staging_len);
        totals.fill(0.0);
        let flush_interval = (TERMS_PER_FLUSH / tile.width).max(1);
        let input_map = map.first_input + tile.image * map.input.cells();
        let output_map = map.first_output + tile.image * map.output.cells();
        let scale = affine.scale.at(tile.map, tile.image, channels, tile.channel);
        let shift = affine.shift.at(tile.map, tile.image, channels, tile.channel);
        // SAFETY: the sizes are checked by the caller; the lines hold what the part reads; parts are disjoint.
        unsafe {
            pack::<K>(weights, channels, tile, packed);
            for line in ring {
                clear_margins(line, groups, group_stride, margins, line_pixels);
            }
            let mut next = (tile.top * ST).saturating_sub(map.pad_top);
            for oy in tile.top..tile.bottom {
                let first_line = (oy * ST) as isize - map.pad_top as isize;
                let last_line = ((first_line + K as isize - 1) as usize).min(map.input.height - 1);
                while next <= last_line {
                    let pixel = input_map + next * map.input.width + from;
                    let line = Line {
                        pixels: to - from,
                        channels: tile.channels,
                        pixel_stride: channels,
                        out: ring[next % K].add(margins.0 * LANE_GROUP),
                        group_stride,
                    };
                    let raw = input.raw.as_ptr().add(pixel * channels + tile.channel);
                    fill_activated(isa, input.act, &line, (raw, scale, shift));
                    next += 1;
                }
                let line = OutputLine::<Y, K> {
                    lines: std::array::from_fn(|ky| {
                        let iy = first_line + ky as isize;
                        if (0..map.input.height as isize).contains(&iy) {
                            ring[iy as usize % K].cast_const()
                        } else {
                            zeros.as_ptr()
                        }
                    }),
                    group_stride,
                    pixels: tile.width,
                    channels: tile.channels,
                    weights: packed,
                    y: y.get()
                        .add((output_map + oy * map.output.width + tile.left) * channels + tile.channel),
                    pixel_stride: channels,
                    streaming,
                    staging,
                    sums: if with_sums {
                        line_sums
                    } else {
                        std::ptr::null_mut()
                    },
                    sums_stride,
                };
                forward::output_line::<Y, K, ST>(isa, &line);
                let lines = oy + 1 - tile.top;
                if with_sums && (lines % flush_interval == 0 || oy + 1 == tile.bottom) {
                    flush_rows(
                        isa,
                        line_sums,
                        sums_stride,
                        &mut totals[..2 * sums_stride],
                        sums_stride,
                    );
                }
            }
        }
    });
    if let Some(sums) = sums {
        reduce_totals(&plan.output_tasks, totals, most_channels, channels, sums);
    }
}

/// Packs the weights of a part as `[lane groups, K·K, 16]`.
///
/// # Safety
/// `packed` must hold that many values.
unsafe fn pack<const K: usize>(weights: &[f32], channels: usize, tile: &Part, packed: *mut f32) {
    for tap in 0..K * K {
        let row = &weights[tap * channels + tile.channel..][..tile.channels];
        for (group, row) in row.chunks(LANE_GROUP).enumerate() {
            // SAFETY: inside `packed` by the caller's promise.
            unsafe {
                packed
                    .add((group * K * K + tap) * LANE_GROUP)
                    .copy_from_nonoverlapping(row.as_ptr(), row.len());
            }
        }
    }
}

/// # Safety
/// `isa` must be available, the pointers valid for the line.
unsafe fn fill_activated<X: Stored>(
    isa: Isa,
    act: Act,
    line: &Line,
    (raw, scale, shift): (*const X, *const f32, *const f32),
) {
    // SAFETY: the caller's promise.
    unsafe {
        with_activation!(act, A => {
            let source = ActivatedLine::<A, X> { raw, scale, shift, act: PhantomData };
            fill(isa, line, &source)
        })
    }
}

/// Adds the totals of the parts, `[parts, 2, channels of the part]` with `2·most_channels` from part to part, to the sums of
/// their maps.
fn reduce_totals(parts: &[Part], totals: &[f64], most_channels: usize, channels: usize, sums: &mut [f64]) {
    sums.fill(0.0);
    for (tile, totals) in parts.iter().zip(totals.chunks_exact(2 * most_channels)) {
        let stride = tile.lane_groups() * LANE_GROUP;
        for kind in 0..2 {
            let sums = &mut sums[(tile.map * 2 + kind) * channels + tile.channel..][..tile.channels];
            super::pointwise::add(sums, &totals[kind * stride..]);
        }
    }
}

/// The gradient of the loss by the output of the convolution, dY.
///
/// # Shapes
/// Tensors are `[output rows, channels]`.
#[derive(Debug, Clone, Copy)]
pub enum OutputGradient<'a, G = f32, Y = f32> {
    /// Stored as it is.
    Plain(&'a [f32]),
    /// The way back through activation, squeeze-and-excitation and batch norm, formed on the way:
    /// `dY = act'(scale·y + shift)·(gain·da + offset) + b·y + c`.
    ///
    /// With batch norm's a, b and c: gain = a·gate and offset = a·dpool/N, which
    /// [`se::gain_and_offset`](super::se::gain_and_offset) makes.
    Activated {
        /// Gradient by the gated activation.
        da: &'a [G],
        /// Output of this convolution, batch norm's input.
        y: &'a [Y],
        /// Batch norm.
        affine: Affine<'a>,
        /// The activation.
        act: Act,
        /// Factor of `da`.
        gain: ChannelVectors<'a>,
        /// Added to `gain·da`, 0 where absent.
        offset: Option<ChannelVectors<'a>>,
        /// Factor of `y`.
        b: ChannelVectors<'a>,
        /// Constant.
        c: ChannelVectors<'a>,
    },
}

/// Where the gradient by the input goes.
#[derive(Debug)]
pub struct InputGradient<'a, G = f32> {
    /// Overwritten with the gradient by z = scale·raw + shift, `[input rows, channels]`.
    pub dz: &'a mut [G],
    /// Whether it is added to what `dz` holds instead.
    pub accumulate: bool,
    /// Overwritten with Σdz and Σdz·raw over the rows of each group: `[groups, 2, channels]`.
    pub sums: Option<&'a mut [f64]>,
    /// Whether to write `dz` past the caches. Ignored where rows are not aligned.
    pub streaming: bool,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a, X = f32, GX = f32, G = f32, Y = f32> {
    /// Shapes.
    pub plan: &'a DepthwisePlan,
    /// The input of the forward pass.
    pub input: Source<'a, X>,
    /// `[k, k, channels, 1]`.
    pub weights: &'a [f32],
    /// dY.
    pub output_gradient: OutputGradient<'a, G, Y>,
    /// Where the gradient by the input goes.
    pub input_gradient: InputGradient<'a, GX>,
    /// Overwritten with the gradient by the weights: `[k, k, channels, 1]`.
    pub dw: &'a mut [f32],
}

/// Computes both gradients of a depthwise convolution.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn backward<X: Stored, GX: Stored, G: Stored, Y: Stored>(
    executor: &Executor,
    args: Backward<'_, X, GX, G, Y>,
) {
    let plan = args.plan;
    let of_output = match args.output_gradient {
        OutputGradient::Plain(dy) => dy.len(),
        OutputGradient::Activated { da, y, .. } => da.len() + y.len(),
    };
    let values = args.input.raw.len() + args.input_gradient.dz.len() + of_output;
    let _report = executor.report(
        Kernel::DepthwiseBackward,
        Work::new(2 * plan.multiply_adds(), values),
    );
    check(
        "the input",
        args.input.raw.len(),
        plan.input_rows() * plan.channels,
    );
    check(
        "weights",
        args.weights.len(),
        plan.kernel_size * plan.kernel_size * plan.channels,
    );
    check("dw", args.dw.len(), args.weights.len());
    check(
        "dz",
        args.input_gradient.dz.len(),
        plan.input_rows() * plan.channels,
    );
    if let Some(sums) = &args.input_gradient.sums {
        check("sums", sums.len(), plan.maps.len() * 2 * plan.channels);
    }
    match (plan.kernel_size, plan.stride) {
        (3, 1) => backward_parts::<X, GX, G, Y, 3, 1>(executor, args),
        (3, 2) => backward_parts::<X, GX, G, Y, 3, 2>(executor, args),
        (5, 1) => backward_parts::<X, GX, G, Y, 5, 1>(executor, args),
        _ => backward_parts::<X, GX, G, Y, 5, 2>(executor, args),
    }
}

/// [`OutputGradient`], checked.
#[allow(clippy::large_enum_variant, reason = "one per kernel call")]
enum Gradient<'a, G, Y> {
    Plain(&'a [f32]),
    Activated {
        da: &'a [G],
        y: &'a [Y],
        affine: AffineVectors<'a>,
        act: Act,
        gain: Vectors<'a>,
        offset: Vectors<'a>,
        b: Vectors<'a>,
        c: Vectors<'a>,
    },
}

impl<'a, G: Stored, Y: Stored> Gradient<'a, G, Y> {
    fn new(gradient: OutputGradient<'a, G, Y>, plan: &DepthwisePlan) -> Self {
        let len = plan.output_rows() * plan.channels;
        let counts = (plan.maps.len(), plan.images, plan.channels);
        match gradient {
            OutputGradient::Plain(dy) => {
                check("dy", dy.len(), len);
                Self::Plain(dy)
            }
            OutputGradient::Activated {
                da,
                y,
                affine,
                act,
                gain,
                offset,
                b,
                c,
            } => {
                check("da", da.len(), len);
                check("y", y.len(), len);
                Self::Activated {
                    da,
                    y,
                    affine: AffineVectors::new(Some(affine), counts),
                    act,
                    gain: Vectors::new("gain", Some(gain), 1.0, counts),
                    offset: Vectors::new("offset", offset, 0.0, counts),
                    b: Vectors::new("b", Some(b), 0.0, counts),
                    c: Vectors::new("c", Some(c), 0.0, counts),
                }
            }
        }
    }

    /// Makes a line of dY, from `pixel` of the tensor on.
    ///
    /// # Safety
    /// `isa` must be available and the line valid.
    unsafe fn fill(&self, isa: Isa, line: &Line, tile: &Part, pixel: usize) {
        let at = pixel * line.pixel_stride + tile.channel;
        match self {
            Self::Plain(dy) => {
                let source = PlainLine {
                    values: dy[at..].as_ptr(),
                };
                // SAFETY: the caller's promise; the tensor's size is checked.
                unsafe { fill(isa, line, &source) }
            }
            Self::Activated {
                da,
                y,
                affine,
                act,
                gain,
                offset,
                b,
                c,
            } => {
                let vector =
                    |vectors: &Vectors<'_>| vectors.at(tile.map, tile.image, line.pixel_stride, tile.channel);
                with_activation!(*act, A => {
                    let source = GradientLine::<A, G, Y> {
                        da: da[at..].as_ptr(),
                        y: y[at..].as_ptr(),
                        scale: vector(&affine.scale),
                        shift: vector(&affine.shift),
                        gain: vector(gain),
                        offset: vector(offset),
                        b: vector(b),
                        c: vector(c),
                        act: PhantomData,
                    };
                    // SAFETY: as above.
                    unsafe { fill(isa, line, &source) }
                })
            }
        }
    }
}

fn backward_parts<X: Stored, GX: Stored, G: Stored, Y: Stored, const K: usize, const ST: usize>(
    executor: &Executor,
    args: Backward<'_, X, GX, G, Y>,
) {
    let Backward {
        plan,
        input,
        weights,
        output_gradient,
        input_gradient,
        dw,
    } = args;
    let InputGradient {
        dz,
        accumulate,
        sums,
        streaming,
    } = input_gradient;
    let channels = plan.channels;
    let affine = AffineVectors::new(input.affine, (plan.maps.len(), plan.images, channels));
    let gradient = Gradient::new(output_gradient, plan);
    let activate = with_activation!(input.act, A => activate_strip::<A, X> as ActivateStrip<X>);
    let (isa, pool) = (executor.isa(), executor.pool());
    let streaming = streaming && !accumulate && rows_are_aligned(dz, channels);
    let (with_sums, dz) = (sums.is_some(), SharedPtr::new(dz));
    let most_channels = plan.most_lane_groups() * LANE_GROUP;
    let dw_stride = plan.partial_stride();
    let mut workspace = executor.workspace();
    let tasks = plan.input_tasks.len();
    let (partials, totals) = workspace.both(tasks * dw_stride, tasks * 2 * most_channels);
    let (task_partials, task_totals) = (SharedPtr::new(partials), SharedPtr::new(totals));
    // Lines of dY that one input line needs.
    let ring_len = K.div_ceil(ST);

    pool.run(tasks, &|task, worker| {
        let tile = &plan.input_tasks[task];
        let map = &plan.maps[tile.map];
        let groups = tile.lane_groups();
        // Output columns that the part needs; a line buffer holds these, with 0 outside the map.
        let padded_left = tile.left + map.pad_left;
        let first = (padded_left / ST) as isize - (ring_len as isize - 1);
        let line_pixels = ((padded_left + tile.width - 1) / ST) as isize - first + 1;
        let from = first.max(0);
        let to = (first + line_pixels).min(map.output.width as isize).max(from);
        let margins = ((from - first) as usize, (to - first) as usize);
        let (line_pixels, from, to) = (line_pixels as usize, from as usize, to as usize);
        let group_stride = (line_pixels | 1) * LANE_GROUP;
        let line_len = groups * group_stride;
        let sums_stride = groups * LANE_GROUP;
        let strip_len = backward::strip_len(K);
        let scratch_len = K * Bump::room(line_len)
            + Bump::room(K * K * sums_stride)
            + Bump::room(2 * sums_stride)
            + Bump::room(strip_len);
        // SAFETY: inside the task, with its worker, once; the partial results at `task` belong to it alone.
        let (mut scratch, dw, totals) = unsafe {
            (
                Bump::new(pool.scratch(worker, scratch_len)),
                part(task_partials, task, dw_stride),
                part(task_totals, task, 2 * most_channels),
            )
        };
        let ring: [_; K] = std::array::from_fn(|i| {
            if i < ring_len {
                scratch.take(line_len)
            } else {
                std::ptr::null_mut()
            }
        });
        let packed = scratch.take_zeroed(K * K * sums_stride);
        let line_sums = scratch.take_zeroed(2 * sums_stride);
        let strip = scratch.take_zeroed(strip_len);
        dw.fill(0.0);
        totals.fill(0.0);
        let flush_interval = (TERMS_PER_FLUSH / tile.width).max(1);
        let input_map = map.first_input + tile.image * map.input.cells();
        let output_map = map.first_output + tile.image * map.output.cells();
        // SAFETY: the sizes are checked by the caller; the lines hold what the part reads; parts are disjoint.
        unsafe {
            pack::<K>(weights, channels, tile, packed);
            for &line in &ring[..ring_len] {
                clear_margins(line, groups, group_stride, margins, line_pixels);
            }
            let mut next = (tile.top + map.pad_top).saturating_sub(K - 1).div_ceil(ST);
            for iy in tile.top..tile.bottom {
                let last_line = ((iy + map.pad_top) / ST).min(map.output.height - 1);
                while next <= last_line {
                    let line = Line {
                        pixels: to - from,
                        channels: tile.channels,
                        pixel_stride: channels,
                        out: ring[next % ring_len].add(margins.0 * LANE_GROUP),
                        group_stride,
                    };
                    gradient.fill(isa, &line, tile, output_map + next * map.output.width + from);
                    next += 1;
                }
                let at = (input_map + iy * map.input.width + tile.left) * channels + tile.channel;
                let mut line = InputLine::<X, GX, K> {
                    gradients: [std::ptr::null(); K],
                    kernel_rows: [0; K],
                    count: 0,
                    first_column: first,
                    group_stride,
                    padded_left,
                    pixels: tile.width,
                    channels: tile.channels,
                    weights: packed,
                    dw: dw.as_mut_ptr(),
                    raw: input.raw.as_ptr().add(at),
                    scale: affine.scale.at(tile.map, tile.image, channels, tile.channel),
                    shift: affine.shift.at(tile.map, tile.image, channels, tile.channel),
                    activate,
                    scratch: strip,
                    dz: dz.get().add(at),
                    pixel_stride: channels,
                    accumulate,
                    streaming,
                    sums: if with_sums {
                        line_sums
                    } else {
                        std::ptr::null_mut()
                    },
                    sums_stride,
                };
                let padded = iy + map.pad_top;
                for ky in (padded % ST..K.min(padded + 1)).step_by(ST) {
                    let oy = (padded - ky) / ST;
                    if oy < map.output.height {
                        line.gradients[line.count] = ring[oy % ring_len];
                        line.kernel_rows[line.count] = ky;
                        line.count += 1;
                    }
                }
                backward::input_line::<X, GX, K, ST>(isa, &line);
                let lines = iy + 1 - tile.top;
                if with_sums && (lines % flush_interval == 0 || iy + 1 == tile.bottom) {
                    flush_rows(
                        isa,
                        line_sums,
                        sums_stride,
                        &mut totals[..2 * sums_stride],
                        sums_stride,
                    );
                }
            }
        }
    });
    if let Some(sums) = sums {
        reduce_totals(&plan.input_tasks, totals, most_channels, channels, sums);
    }
    let partials = &partials[..];
    let dw = SharedPtr::new(dw);
    pool.run(channels.div_ceil(LANE_GROUP), &|group, _| {
        let channel = group * LANE_GROUP;
        let mut sums = [[[0.0; LANE_GROUP]; K]; K];
        for (tile, partial) in plan.input_tasks.iter().zip(partials.chunks_exact(dw_stride)) {
            if (tile.channel..tile.channel + tile.channels).contains(&channel) {
                let first = (channel - tile.channel) * K * K;
                let values = sums.as_flattened_mut().as_flattened_mut();
                for (sum, value) in values.iter_mut().zip(&partial[first..]) {
                    *sum += value;
                }
            }
        }
        let width = LANE_GROUP.min(channels - channel);
        for (tap, sums) in sums.as_flattened().iter().enumerate() {
            // SAFETY: taps of this lane group, which belong to this task.
            let dw = unsafe { std::slice::from_raw_parts_mut(dw.get().add(tap * channels + channel), width) };
            dw.copy_from_slice(&sums[..width]);
        }
    });
}
