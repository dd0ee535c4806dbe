//! Resampling of feature maps in the pyramid: nearest-neighbour upsampling and max-pooling, and their way back.

use std::ops::Range;

use effdet_model::hparams::UpsampleRule;
use effdet_model::network::{MapSize, ResizeKind, same_padding};

use super::Executor;
use super::elementwise::{Affine, AffineVectors};
use super::pointwise::check;
use super::row_sweeps::{load, store};
use crate::arena::SharedPtr;
use crate::probe::{Kernel, Work};
use crate::simd::{Simd, dispatch};

/// Values that a task works on, about: a task should be worth starting.
const VALUES_PER_TASK: usize = 32 << 10;

/// How cells of one map size come from cells of another.
#[derive(Debug, Clone)]
pub struct Resampler {
    input: MapSize,
    output: MapSize,
    /// Whether it takes maxima.
    pools: bool,
    rows: Axis,
    columns: Axis,
}

/// One axis of a [`Resampler`].
#[derive(Debug, Clone)]
struct Axis {
    /// Input cells of each output cell.
    sources: Vec<Range<usize>>,
    /// Output cells of each input cell.
    targets: Vec<Range<usize>>,
    /// Size of a window, its stride, and the padding before the first one; 1, 1, 0 unless pooling.
    kernel: usize,
    stride: usize,
    padding: usize,
}

impl Axis {
    /// Every output cell takes one input cell, in ascending order.
    fn nearest(input: usize, source: impl Fn(usize) -> usize, output: usize) -> Self {
        let sources: Vec<_> = (0..output)
            .map(|i| source(i).min(input - 1))
            .map(|i| i..i + 1)
            .collect();
        Self::new(input, sources, (1, 1, 0))
    }

    /// Windows of `stride + 1` cells, clipped to the input.
    fn windows(input: usize, stride: usize) -> Self {
        let kernel = stride + 1;
        let (output, padding) = same_padding(input, kernel, stride);
        let window =
            |i: usize| (i * stride).saturating_sub(padding)..(i * stride + kernel - padding).min(input);
        Self::new(
            input,
            (0..output).map(window).collect(),
            (kernel, stride, padding),
        )
    }

    fn new(
        input: usize,
        sources: Vec<Range<usize>>,
        (kernel, stride, padding): (usize, usize, usize),
    ) -> Self {
        // Both ends of the sources ascend, so the targets of a cell are neighbours.
        let target = |cell: usize| {
            let first = sources.partition_point(|source| source.end <= cell);
            first..sources.partition_point(|source| source.start <= cell).max(first)
        };
        Self {
            targets: (0..input).map(target).collect(),
            sources,
            kernel,
            stride,
            padding,
        }
    }
}

impl Resampler {
    /// The resampler from `input` to `output`.
    ///
    /// Max-pooling has kernel = stride + 1 per axis and SAME padding that never wins; of equal values the first in
    /// row-major order is the maximum. Upsampling takes cell `⌊(i + ½)·in/out⌋` or, by the legacy rule, `⌊i·in/out⌋`.
    ///
    /// # Panics
    /// When a map is empty, the sizes of [`ResizeKind::Same`] differ, or a max-pool's strides do not lead to `output`.
    pub fn new(input: MapSize, output: MapSize, kind: ResizeKind, rule: UpsampleRule) -> Self {
        assert!(
            input.cells() > 0 && output.cells() > 0,
            "maps must not be empty: {input:?}, {output:?}"
        );
        let nearest = |input: usize, output: usize| {
            // In f32, as TensorFlow computes it.
            let scale = input as f32 / output as f32;
            let first = match rule {
                UpsampleRule::HalfPixel => 0.5,
                UpsampleRule::Legacy => 0.0,
            };
            Axis::nearest(input, |i| ((i as f32 + first) * scale) as usize, output)
        };
        let (pools, rows, columns) = match kind {
            ResizeKind::Same | ResizeKind::Nearest => (
                false,
                nearest(input.height, output.height),
                nearest(input.width, output.width),
            ),
            ResizeKind::MaxPool { stride_y, stride_x } => (
                true,
                Axis::windows(input.height, stride_y),
                Axis::windows(input.width, stride_x),
            ),
        };
        let resampler = Self {
            input,
            output,
            pools,
            rows,
            columns,
        };
        let made = MapSize {
            height: resampler.rows.sources.len(),
            width: resampler.columns.sources.len(),
        };
        assert!(
            made == output && (kind != ResizeKind::Same || input == output),
            "{kind:?} does not lead from {input:?} to {output:?}"
        );
        resampler
    }

    /// Input map.
    pub fn input(&self) -> MapSize {
        self.input
    }

    /// Output map.
    pub fn output(&self) -> MapSize {
        self.output
    }

    /// Whether it takes maxima.
    pub(crate) fn pools(&self) -> bool {
        self.pools
    }

    /// Input lines of an output line: the window of a max-pool, otherwise a single one.
    pub(crate) fn source_lines(&self, line: usize) -> Range<usize> {
        self.rows.sources[line].clone()
    }

    /// Input columns of an output column, as [`source_lines`](Self::source_lines).
    pub(crate) fn source_columns(&self, column: usize) -> Range<usize> {
        self.columns.sources[column].clone()
    }

    /// Whether the forward pass records which input was the maximum.
    pub fn needs_argmax(&self) -> bool {
        self.pools
    }

    /// The recorded maxima, empty unless pooling.
    ///
    /// # Panics
    /// When they are missing or not `len` long.
    #[track_caller]
    pub(super) fn argmax<'a>(&self, argmax: Option<&'a [f32]>, len: usize) -> &'a [f32] {
        if !self.pools {
            return &[];
        }
        let argmax = argmax.unwrap_or_else(|| panic!("the way back through a max-pool needs its argmax"));
        check("argmax", argmax.len(), len);
        argmax
    }
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// Number of images.
    pub images: usize,
    /// Number of channels.
    pub channels: usize,
    /// Maps.
    pub resampler: &'a Resampler,
    /// What is stored of the input: `[images, input height, input width, channels]`.
    pub raw: &'a [f32],
    /// Batch norm on the input, one group.
    pub affine: Option<Affine<'a>>,
    /// Overwritten with the place of each maximum in its window, counted from 0 in row-major order, for the backward pass of
    /// a max-pool: `[images, output height, output width, channels]`.
    pub argmax: Option<&'a mut [f32]>,
    /// Overwritten: `[images, output height, output width, channels]`.
    pub out: &'a mut [f32],
}

/// Resamples `scale·raw + shift`.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
pub fn forward(executor: &Executor, args: Forward<'_>) {
    let Forward {
        images,
        channels,
        resampler,
        raw,
        affine,
        argmax,
        out,
    } = args;
    let output = resampler.output;
    let _report = executor.report(Kernel::Fuse, Work::new(0, raw.len() + out.len()));
    check(
        "the input",
        raw.len(),
        images * resampler.input.cells() * channels,
    );
    check("out", out.len(), images * output.cells() * channels);
    let affine = AffineVectors::new(affine, (1, images, channels));
    let argmax = argmax.map(|argmax| {
        check("argmax", argmax.len(), out.len());
        SharedPtr::new(argmax)
    });
    let out = SharedPtr::new(out);
    for_lines(executor, images, output, channels, &|image, y| {
        let at = (image * output.height + y) * output.width * channels;
        // SAFETY: the sizes are checked above, and lines are disjoint.
        unsafe {
            let line = ForwardLine {
                resampler,
                y,
                channels,
                raw: raw[image * resampler.input.cells() * channels..].as_ptr(),
                scale: affine.scale.at(0, image, channels, 0),
                shift: affine.shift.at(0, image, channels, 0),
                argmax: argmax.map_or(std::ptr::null_mut(), |argmax| argmax.get().add(at)),
                combine: Combine::Copy,
                out: out.get().add(at),
            };
            forward_line(executor.isa(), &line);
        }
    });
}

/// Calls `work(image, line)` for every line of the maps of all images, some lines per task.
pub(super) fn for_lines(
    executor: &Executor,
    images: usize,
    map: MapSize,
    channels: usize,
    work: &(dyn Fn(usize, usize) + Sync),
) {
    for_line_tasks(executor, images, map, channels, &|_, _, lines| {
        lines.for_each(|line| work(line / map.height, line % map.height));
    });
}

/// Number of tasks of [`for_line_tasks`].
pub(super) fn line_tasks(images: usize, map: MapSize, channels: usize) -> usize {
    (images * map.cells() * channels)
        .div_ceil(VALUES_PER_TASK)
        .clamp(1, images * map.height)
}

/// Calls `work(task, worker, lines)` with ranges of lines, counted through all images.
pub(super) fn for_line_tasks(
    executor: &Executor,
    images: usize,
    map: MapSize,
    channels: usize,
    work: &(dyn Fn(usize, usize, Range<usize>) + Sync),
) {
    let (tasks, lines) = (line_tasks(images, map, channels), images * map.height);
    executor.pool().run(tasks, &|task, worker| {
        work(task, worker, lines * task / tasks..lines * (task + 1) / tasks);
    });
}

/// What happens to a resampled value x.
#[derive(Debug, Clone, Copy)]
pub(super) enum Combine {
    /// `out = x`.
    Copy,
    /// `out = x·weight/total`, the first input of a fusion.
    Weigh(*const f32, *const f32),
    /// `out += x·weight/total`.
    AddWeighed(*const f32, *const f32),
    /// `out += x`.
    Add,
}

/// One output line of a resampling.
#[derive(Debug)]
pub(super) struct ForwardLine<'a> {
    pub resampler: &'a Resampler,
    pub y: usize,
    pub channels: usize,
    /// Input map of the image.
    pub raw: *const f32,
    pub scale: *const f32,
    pub shift: *const f32,
    /// Not wanted where null.
    pub argmax: *mut f32,
    pub combine: Combine,
    pub out: *mut f32,
}

/// V neighbouring vectors of channels; see [`backward_vectors`].
#[inline(always)]
unsafe fn forward_vectors<S: Simd, const V: usize, const WHOLE: bool>(
    line: &ForwardLine<'_>,
    x: usize,
    channel: usize,
    lanes: usize,
) {
    let (rows, columns) = (&line.resampler.rows, &line.resampler.columns);
    // SAFETY: inside the maps.
    unsafe {
        let load_all = |source: *const f32| {
            let mut vectors = [S::zero(); V];
            for (i, vector) in vectors.iter_mut().enumerate() {
                *vector = load::<S, WHOLE>(source.add(channel + i * S::LANES), lanes);
            }
            vectors
        };
        let (scales, shifts) = (load_all(line.scale), load_all(line.shift));
        let (window_y, window_x) = (&rows.sources[line.y], &columns.sources[x]);
        let width = line.resampler.input.width;
        let input = |y: usize, x: usize| {
            let mut values = load_all(line.raw.add((y * width + x) * line.channels));
            for (i, value) in values.iter_mut().enumerate() {
                *value = S::fma(*value, scales[i], shifts[i]);
            }
            values
        };
        let mut values = input(window_y.start, window_x.start);
        let at = x * line.channels + channel;
        if line.resampler.pools {
            // Places in the window count the padding.
            let place = |y: usize, x_in: usize| {
                (y + rows.padding - line.y * rows.stride) * columns.kernel + x_in + columns.padding
                    - x * columns.stride
            };
            let mut argmax = [S::splat(place(window_y.start, window_x.start) as f32); V];
            for y in window_y.clone() {
                for x_in in window_x.clone() {
                    let here = S::splat(place(y, x_in) as f32);
                    for (i, other) in input(y, x_in).into_iter().enumerate() {
                        argmax[i] = S::select_lt(values[i], other, here, argmax[i]);
                        values[i] = S::select_lt(values[i], other, other, values[i]);
                    }
                }
            }
            if !line.argmax.is_null() {
                for (i, &argmax) in argmax.iter().enumerate() {
                    store::<S, WHOLE>(line.argmax.add(at + i * S::LANES), argmax, lanes);
                }
            }
        }
        for (i, &value) in values.iter().enumerate() {
            let out = line.out.add(at + i * S::LANES);
            let result = match line.combine {
                Combine::Copy => value,
                Combine::Add => S::add(load::<S, WHOLE>(out, lanes), value),
                Combine::Weigh(weight, total) | Combine::AddWeighed(weight, total) => {
                    let weight = load::<S, WHOLE>(weight.add(channel + i * S::LANES), lanes);
                    let total = load::<S, WHOLE>(total.add(channel + i * S::LANES), lanes);
                    // A division by zero in lanes past the channels is not stored.
                    let weighed = S::div(S::mul(value, weight), total);
                    if matches!(line.combine, Combine::Weigh(..)) {
                        weighed
                    } else {
                        S::add(load::<S, WHOLE>(out, lanes), weighed)
                    }
                }
            };
            store::<S, WHOLE>(out, result, lanes);
        }
    }
}

#[inline(always)]
unsafe fn forward_line_body<S: Simd>(line: &ForwardLine<'_>) {
    for x in 0..line.resampler.output.width {
        let mut channel = 0;
        // SAFETY: channels of the maps.
        unsafe {
            while channel + 4 * S::LANES <= line.channels {
                forward_vectors::<S, 4, true>(line, x, channel, S::LANES);
                channel += 4 * S::LANES;
            }
            while channel + S::LANES <= line.channels {
                forward_vectors::<S, 1, true>(line, x, channel, S::LANES);
                channel += S::LANES;
            }
            if channel < line.channels {
                forward_vectors::<S, 1, false>(line, x, channel, line.channels - channel);
            }
        }
    }
}

dispatch! {
    /// Resamples one output line.
    ///
    /// # Safety
    /// `isa` must be available and all pointers valid.
    pub(super) unsafe fn forward_line(line: &ForwardLine<'_>) = forward_line_body;
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// Number of images.
    pub images: usize,
    /// Number of channels.
    pub channels: usize,
    /// Maps.
    pub resampler: &'a Resampler,
    /// Of the forward pass; a max-pool needs it.
    pub argmax: Option<&'a [f32]>,
    /// Gradient by the output.
    pub dout: &'a [f32],
    /// Overwritten with the gradient by the resampled tensor, `scale·raw + shift`.
    pub dx: &'a mut [f32],
    /// Whether it is added to what `dx` holds instead.
    pub accumulate: bool,
}

/// The backward pass of [`forward`].
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// Every input cell gathers from its output cells in row-major order: the same bits for any number of threads.
pub fn backward(executor: &Executor, args: Backward<'_>) {
    let Backward {
        images,
        channels,
        resampler,
        argmax,
        dout,
        dx,
        accumulate,
    } = args;
    let input = resampler.input;
    let _report = executor.report(Kernel::FuseBackward, Work::new(0, dout.len() + dx.len()));
    check("dout", dout.len(), images * resampler.output.cells() * channels);
    check("dx", dx.len(), images * input.cells() * channels);
    let argmax = resampler.argmax(argmax, dout.len());
    let dx = SharedPtr::new(dx);
    for_lines(executor, images, input, channels, &|image, y| {
        let output = image * resampler.output.cells() * channels;
        // SAFETY: the sizes are checked above, and lines are disjoint.
        unsafe {
            let line = BackwardLine {
                resampler,
                y,
                channels,
                dout: dout.as_ptr().add(output),
                argmax: argmax[output.min(argmax.len())..].as_ptr(),
                weight: std::ptr::null(),
                total: std::ptr::null(),
                dx: dx.get().add((image * input.height + y) * input.width * channels),
                accumulate,
                dots: None,
            };
            backward_line(executor.isa(), &line);
        }
    });
}

/// One input line of a resampling's way back.
#[derive(Debug)]
pub(super) struct BackwardLine<'a> {
    pub resampler: &'a Resampler,
    pub y: usize,
    pub channels: usize,
    /// Output map of the image.
    pub dout: *const f32,
    /// Of the image; not used unless the resampler needs it.
    pub argmax: *const f32,
    /// `dx = weight/total·gathered`; 1 where null.
    pub weight: *const f32,
    pub total: *const f32,
    pub dx: *mut f32,
    pub accumulate: bool,
    pub dots: Option<Dots>,
}

/// Where `Σ gathered·(scale·raw + shift)` is added.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dots {
    /// First pixel of the input line.
    pub raw: *const f32,
    pub scale: *const f32,
    pub shift: *const f32,
    /// Whole vectors.
    pub sums: *mut f32,
}

/// V neighbouring vectors of channels, so that what depends on the pixels alone is found once for all of them.
#[inline(always)]
unsafe fn backward_vectors<S: Simd, const V: usize, const WHOLE: bool>(
    line: &BackwardLine<'_>,
    channel: usize,
    lanes: usize,
) {
    let (rows, columns) = (&line.resampler.rows, &line.resampler.columns);
    // SAFETY: inside the maps; sums hold whole vectors.
    unsafe {
        let load_all = |source: *const f32| {
            let mut vectors = [S::zero(); V];
            for (i, vector) in vectors.iter_mut().enumerate() {
                *vector = load::<S, WHOLE>(source.add(channel + i * S::LANES), lanes);
            }
            vectors
        };
        let mut factors = [S::splat(1.0); V];
        if !line.weight.is_null() {
            let (weights, totals) = (load_all(line.weight), load_all(line.total));
            for (i, factor) in factors.iter_mut().enumerate() {
                *factor = S::div(weights[i], totals[i]);
            }
        }
        let [mut scales, mut shifts, mut sums] = [[S::zero(); V]; 3];
        if let Some(dots) = line.dots {
            (scales, shifts) = (load_all(dots.scale), load_all(dots.shift));
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(dots.sums.add(channel + i * S::LANES));
            }
        }
        for x in 0..line.resampler.input.width {
            let mut gathered = [S::zero(); V];
            for y_out in rows.targets[line.y].clone() {
                for x_out in columns.targets[x].clone() {
                    let at = (y_out * line.resampler.output.width + x_out) * line.channels;
                    let mut douts = load_all(line.dout.add(at));
                    if line.resampler.pools {
                        let place = (line.y + rows.padding - y_out * rows.stride) * columns.kernel
                            + x
                            + columns.padding
                            - x_out * columns.stride;
                        let argmax = load_all(line.argmax.add(at));
                        for (dout, argmax) in douts.iter_mut().zip(argmax) {
                            let off = S::sub(argmax, S::splat(place as f32));
                            *dout = S::select_lt(S::abs(off), S::splat(0.5), *dout, S::zero());
                        }
                    }
                    for (gathered, dout) in gathered.iter_mut().zip(douts) {
                        *gathered = S::add(*gathered, dout);
                    }
                }
            }
            for (i, &gathered) in gathered.iter().enumerate() {
                let at = x * line.channels + channel + i * S::LANES;
                let dx = line.dx.add(at);
                let mut value = S::mul(gathered, factors[i]);
                if line.accumulate {
                    value = S::add(load::<S, WHOLE>(dx, lanes), value);
                }
                store::<S, WHOLE>(dx, value, lanes);
                if let Some(dots) = line.dots {
                    let raw = load::<S, WHOLE>(dots.raw.add(at), lanes);
                    sums[i] = S::fma(gathered, S::fma(raw, scales[i], shifts[i]), sums[i]);
                }
            }
        }
        if let Some(dots) = line.dots {
            for (i, sum) in sums.into_iter().enumerate() {
                S::store(dots.sums.add(channel + i * S::LANES), sum);
            }
        }
    }
}

#[inline(always)]
unsafe fn backward_line_body<S: Simd>(line: &BackwardLine<'_>) {
    let mut channel = 0;
    // SAFETY: channels of the maps.
    unsafe {
        while channel + 4 * S::LANES <= line.channels {
            backward_vectors::<S, 4, true>(line, channel, S::LANES);
            channel += 4 * S::LANES;
        }
        while channel + S::LANES <= line.channels {
            backward_vectors::<S, 1, true>(line, channel, S::LANES);
            channel += S::LANES;
        }
        if channel < line.channels {
            backward_vectors::<S, 1, false>(line, channel, line.channels - channel);
        }
    }
}

dispatch! {
    /// Gathers the gradient of one input line.
    ///
    /// # Safety
    /// `isa` must be available and all pointers valid.
    pub(super) unsafe fn backward_line(line: &BackwardLine<'_>) = backward_line_body;
}

/// A scalar version in float64 with its own index arithmetic.
#[cfg(test)]
pub(super) mod reference {
    use super::*;

    /// The input cell that an output cell takes; the first largest one of its window when pooling.
    pub(crate) fn source(
        kind: ResizeKind,
        rule: UpsampleRule,
        (input, output): (MapSize, MapSize),
        (y, x): (usize, usize),
        value: impl Fn(usize) -> f64,
    ) -> usize {
        let near = |i: usize, input: usize, output: usize| {
            let offset = if rule == UpsampleRule::HalfPixel { 0.5 } else { 0.0 };
            (((i as f64 + offset) * input as f64 / output as f64) as usize).min(input - 1)
        };
        let ResizeKind::MaxPool { stride_y, stride_x } = kind else {
            return near(y, input.height, output.height) * input.width + near(x, input.width, output.width);
        };
        let first = |i: usize, input: usize, output: usize, stride: usize| {
            let total = ((output - 1) * stride + stride + 1).saturating_sub(input);
            (i * stride) as isize - (total / 2) as isize
        };
        let (top, left) = (
            first(y, input.height, output.height, stride_y),
            first(x, input.width, output.width, stride_x),
        );
        let mut best = None;
        for iy in top..=top + stride_y as isize {
            for ix in left..=left + stride_x as isize {
                if (0..input.height as isize).contains(&iy) && (0..input.width as isize).contains(&ix) {
                    let cell = iy as usize * input.width + ix as usize;
                    if best.is_none_or(|best| value(cell) > value(best)) {
                        best = Some(cell);
                    }
                }
            }
        }
        best.expect("a window meets the map")
    }

    /// Input and output heights and widths with the ways between them.
    pub(crate) fn cases() -> Vec<(MapSize, MapSize, ResizeKind, UpsampleRule)> {
        let map = |(height, width)| MapSize { height, width };
        let case = |(input, output, kind, rule)| (map(input), map(output), kind, rule);
        let pool = |stride_y, stride_x| ResizeKind::MaxPool { stride_y, stride_x };
        let (half_pixel, legacy) = (UpsampleRule::HalfPixel, UpsampleRule::Legacy);
        [
            ((4, 6), (4, 6), ResizeKind::Same, half_pixel),
            ((2, 3), (4, 6), ResizeKind::Nearest, half_pixel),
            ((3, 5), (5, 9), ResizeKind::Nearest, half_pixel),
            ((3, 4), (5, 7), ResizeKind::Nearest, legacy),
            ((1, 1), (2, 1), ResizeKind::Nearest, legacy),
            ((8, 6), (4, 3), pool(2, 2), half_pixel),
            ((5, 9), (3, 5), pool(2, 2), half_pixel),
            ((7, 8), (3, 8), pool(3, 1), half_pixel),
            ((1, 1), (1, 1), pool(1, 1), half_pixel),
            ((64, 40), (32, 20), pool(2, 2), half_pixel),
        ]
        .into_iter()
        .map(case)
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, same_everywhere, values};
    use super::*;

    #[test]
    fn both_ways_match_float64_and_themselves_everywhere() {
        let images = 2;
        for (case, (input, output, kind, rule)) in reference::cases().into_iter().enumerate() {
            let channels = [3, 8, 40, 88, 64][case % 5];
            let resampler = Resampler::new(input, output, kind, rule);
            // Few distinct values make ties.
            let raw: Vec<f32> = values(images * input.cells() * channels, 1)
                .iter()
                .map(|x| (x * 4.0).round())
                .collect();
            let scale: Vec<f32> = values(channels, 2)
                .iter()
                .map(|x| (x * 4.0).round() / 4.0)
                .collect();
            let shift = values(channels, 3);
            let dout = values(images * output.cells() * channels, 4);
            let (out, dx, added) = same_everywhere(|executor| {
                let mut out = vec![f32::NAN; dout.len()];
                let mut argmax = vec![f32::NAN; dout.len()];
                let args = Forward {
                    images,
                    channels,
                    resampler: &resampler,
                    raw: &raw,
                    affine: Some(Affine::per_group(&scale, &shift)),
                    argmax: resampler.needs_argmax().then_some(&mut argmax),
                    out: &mut out,
                };
                forward(executor, args);
                let mut dx = vec![f32::NAN; raw.len()];
                let mut added = vec![0.5; raw.len()];
                for (dx, accumulate) in [(&mut dx, false), (&mut added, true)] {
                    let args = Backward {
                        images,
                        channels,
                        resampler: &resampler,
                        argmax: Some(&argmax),
                        dout: &dout,
                        dx,
                        accumulate,
                    };
                    backward(executor, args);
                }
                (out, dx, added)
            });
            let mut expected = vec![0.0; out.len()];
            let mut expected_dx = vec![0.0; raw.len()];
            for (i, expected) in expected.iter_mut().enumerate() {
                let (cell, c) = (i / channels, i % channels);
                let (image, cell) = (cell / output.cells(), cell % output.cells());
                let at = |cell: usize| (image * input.cells() + cell) * channels + c;
                let value =
                    |cell: usize| f64::from(raw[at(cell)]) * f64::from(scale[c]) + f64::from(shift[c]);
                let place = (cell / output.width, cell % output.width);
                let source = reference::source(kind, rule, (input, output), place, value);
                *expected = value(source);
                expected_dx[at(source)] += f64::from(dout[i]);
            }
            assert_close("out", &out, &expected, 1e-6);
            assert_close("dx", &dx, &expected_dx, 1e-6);
            for (added, dx) in added.iter().zip(&dx) {
                assert_eq!(*added, 0.5 + dx);
            }
        }
    }

    #[test]
    fn three_cells_become_five_by_either_rule() {
        let map = |width| MapSize { height: 1, width };
        let sources = |rule| {
            let resampler = Resampler::new(map(3), map(5), ResizeKind::Nearest, rule);
            resampler
                .columns
                .sources
                .iter()
                .map(|source| source.start)
                .collect::<Vec<_>>()
        };
        assert_eq!(sources(UpsampleRule::HalfPixel), [0, 0, 1, 2, 2]);
        assert_eq!(sources(UpsampleRule::Legacy), [0, 0, 1, 1, 2]);
    }

    #[test]
    #[should_panic(expected = "does not lead")]
    fn a_pool_that_does_not_reach_the_output_is_refused() {
        let map = |width| MapSize { height: 4, width };
        let kind = ResizeKind::MaxPool {
            stride_y: 1,
            stride_x: 2,
        };
        Resampler::new(map(8), map(3), kind, UpsampleRule::HalfPixel);
    }
}
