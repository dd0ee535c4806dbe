//! The first convolution: 3×3, stride 2, from RGB.

use effdet_model::network::{MapSize, same_padding};

use super::Executor;
use super::elementwise::Vectors;
use super::gemm::padded;
use super::pointwise::{ChannelVectors, add, check, flush_rows, part, rows_are_aligned};
use super::row_sweeps::{FormGradient, Rows, store, sweep};
use crate::arena::{Bump, SharedPtr};
use crate::probe::{Kernel, Work};
use crate::simd::{Isa, Simd, dispatch};
use crate::storage::Stored;

/// Side and stride of the kernel, colours.
const KERNEL: usize = 3;
const STRIDE: usize = 2;
const COLOURS: usize = 3;
/// Neighbouring values of an image line that one kernel row meets.
const ROW_TAPS: usize = KERNEL * COLOURS;
const TAPS: usize = KERNEL * ROW_TAPS;

/// Tasks that suffice to keep the threads of a workstation evenly busy.
const TASKS: usize = 16;

/// Terms that are added in f32 before the sum is flushed to f64, about.
const TERMS_PER_FLUSH: usize = 1024;

/// A common period of the colours and all vector widths, in values.
const PATTERN: usize = 48;

/// The normalisation that the backbone applies to its input, `(x − mean)/stddev` per colour.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalize {
    /// RGB.
    pub mean: [f32; 3],
    /// RGB.
    pub stddev: [f32; 3],
}

/// The image side of the convolution.
///
/// # Shapes
/// `pixels`: `[images, height, width, 3]`.
#[derive(Debug, Clone, Copy)]
pub struct StemInput<'a> {
    /// The pixels as the loader hands them over; SAME padding is 0 after `normalize`.
    pub pixels: &'a [f32],
    /// Number of images.
    pub images: usize,
    /// Height and width of an image.
    pub map: MapSize,
    /// What the backbone does to the pixels first.
    pub normalize: Option<Normalize>,
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, Y = f32> {
    /// The images.
    pub input: StemInput<'a>,
    /// Number of output channels.
    pub channels: usize,
    /// `[3, 3, 3, channels]`.
    pub weights: &'a [f32],
    /// Overwritten with the convolution: `[images, ⌈height/2⌉, ⌈width/2⌉, channels]`.
    pub y: &'a mut [Y],
    /// Overwritten with Σy and Σy² over all rows: `[2, channels]`.
    pub sums: Option<&'a mut [f64]>,
    /// Whether to write `y` past the caches. Ignored where rows are not aligned.
    pub streaming: bool,
}

/// Computes the stem's convolution.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn forward<Y: Stored>(executor: &Executor, args: Forward<'_, Y>) {
    let Forward {
        input,
        channels,
        weights,
        y,
        sums,
        streaming,
    } = args;
    let shape = Shape::new(&input);
    let _report = executor.report(Kernel::Stem, work(&input, y.len(), y.len()));
    check("weights", weights.len(), TAPS * channels);
    check("y", y.len(), input.images * shape.output.cells() * channels);
    if let Some(sums) = &sums {
        check("sums", sums.len(), 2 * channels);
    }
    let (isa, pool) = (executor.isa(), executor.pool());
    let streaming = streaming && rows_are_aligned(y, channels);
    let stride = padded(channels);
    let with_sums = sums.is_some();
    let y = SharedPtr::new(y);
    let mut workspace = executor.workspace();
    let totals = workspace.totals(shape.tasks() * 2 * channels);
    let task_totals = SharedPtr::new(totals);
    let scratch_len = shape.lines_room() + Bump::room(TAPS * stride) + Bump::room(2 * stride);
    pool.run(shape.tasks(), &|task, worker| {
        // SAFETY: inside the task, with its worker, once; the totals at `task` belong to it alone.
        let (mut scratch, totals) = unsafe {
            (
                Bump::new(pool.scratch(worker, scratch_len)),
                part(task_totals, task, 2 * channels),
            )
        };
        let (image, top, bottom) = shape.part(task);
        let mut lines = Lines::new(&input, &shape, image, &mut scratch);
        let packed = scratch.take_zeroed(TAPS * stride);
        let line_sums = scratch.take_zeroed(2 * stride);
        totals.fill(0.0);
        let flush_interval = (TERMS_PER_FLUSH / shape.output.width).max(1);
        // SAFETY: the sizes are checked above, and output lines are disjoint.
        unsafe {
            for (tap, row) in weights.chunks_exact(channels).enumerate() {
                packed
                    .add(tap * stride)
                    .copy_from_nonoverlapping(row.as_ptr(), channels);
            }
            for oy in top..bottom {
                let pixel = (image * shape.output.height + oy) * shape.output.width;
                let line = OutputLine {
                    lines: lines.window(isa, oy),
                    pixels: shape.output.width,
                    channels,
                    weights: packed,
                    y: y.get().add(pixel * channels),
                    streaming,
                    sums: if with_sums {
                        line_sums
                    } else {
                        std::ptr::null_mut()
                    },
                };
                output_line(isa, &line);
                if with_sums && ((oy + 1 - top) % flush_interval == 0 || oy + 1 == bottom) {
                    flush_rows(isa, line_sums, stride, totals, channels);
                }
            }
        }
    });
    if let Some(sums) = sums {
        sums.fill(0.0);
        totals
            .chunks_exact(2 * channels)
            .for_each(|totals| add(sums, totals));
    }
}

/// Sizes that follow from the input, and the tasks.
struct Shape {
    output: MapSize,
    pad_top: usize,
    pad_left: usize,
    images: usize,
    bands: usize,
    /// Values of a padded image line.
    line_len: usize,
}

impl Shape {
    /// # Panics
    /// When the images are empty or have another size.
    #[track_caller]
    fn new(input: &StemInput<'_>) -> Self {
        assert!(
            input.images > 0 && input.map.cells() > 0,
            "images must not be empty"
        );
        check(
            "pixels",
            input.pixels.len(),
            input.images * input.map.cells() * COLOURS,
        );
        let (height, pad_top) = same_padding(input.map.height, KERNEL, STRIDE);
        let (width, pad_left) = same_padding(input.map.width, KERNEL, STRIDE);
        Self {
            output: MapSize { height, width },
            pad_top,
            pad_left,
            images: input.images,
            bands: TASKS.div_ceil(input.images).min(height),
            line_len: ((width - 1) * STRIDE + KERNEL) * COLOURS,
        }
    }

    fn tasks(&self) -> usize {
        self.images * self.bands
    }

    /// Image, first and last output line of a task.
    fn part(&self, task: usize) -> (usize, usize, usize) {
        let (image, band) = (task / self.bands, task % self.bands);
        let line = |band| self.output.height * band / self.bands;
        (image, line(band), line(band + 1))
    }

    /// Scratch that [`Lines`] takes.
    fn lines_room(&self) -> usize {
        (KERNEL + 1) * Bump::room(self.line_len) + 2 * Bump::room(PATTERN)
    }
}

/// Normalised and padded lines of an image, the last three of them.
struct Lines<'a> {
    shape: &'a Shape,
    map: MapSize,
    pixels: &'a [f32],
    ring: [*mut f32; KERNEL],
    zeros: *mut f32,
    /// Mean and deviation of the colours, repeated.
    pattern: Option<(*mut f32, *mut f32)>,
    next: usize,
}

impl<'a> Lines<'a> {
    fn new(input: &StemInput<'a>, shape: &'a Shape, image: usize, scratch: &mut Bump) -> Self {
        let len = input.map.cells() * COLOURS;
        let pattern = input.normalize.map(|normalize| {
            let (mean, stddev) = (scratch.take(PATTERN), scratch.take(PATTERN));
            for i in 0..PATTERN {
                // SAFETY: both hold PATTERN values.
                unsafe {
                    mean.add(i).write(normalize.mean[i % COLOURS]);
                    stddev.add(i).write(normalize.stddev[i % COLOURS]);
                }
            }
            (mean, stddev)
        });
        Self {
            shape,
            map: input.map,
            pixels: &input.pixels[image * len..][..len],
            ring: std::array::from_fn(|_| scratch.take_zeroed(shape.line_len)),
            zeros: scratch.take_zeroed(shape.line_len),
            pattern,
            next: 0,
        }
    }

    /// The lines that an output line needs; ask for ascending output lines.
    ///
    /// # Safety
    /// `isa` must be available.
    unsafe fn window(&mut self, isa: Isa, oy: usize) -> [*const f32; KERNEL] {
        let first = (oy * STRIDE) as isize - self.shape.pad_top as isize;
        self.next = self.next.max(first.max(0) as usize);
        let end = ((first + KERNEL as isize) as usize).min(self.map.height);
        while self.next < end {
            let len = self.map.width * COLOURS;
            let (mean, stddev) = self
                .pattern
                .unwrap_or((std::ptr::null_mut(), std::ptr::null_mut()));
            // SAFETY: the line and its ring buffer hold the image's width behind the padding.
            unsafe {
                let source = &self.pixels[self.next * len..][..len];
                let target = self.ring[self.next % KERNEL].add(self.shape.pad_left * COLOURS);
                normalize_line(isa, source, mean, stddev, target);
            }
            self.next += 1;
        }
        std::array::from_fn(|ky| {
            let iy = first + ky as isize;
            let is_inside = (0..self.map.height as isize).contains(&iy);
            if is_inside {
                self.ring[iy as usize % KERNEL]
            } else {
                self.zeros
            }
            .cast_const()
        })
    }
}

#[inline(always)]
unsafe fn normalize_line_body<S: Simd>(
    source: &[f32],
    mean: *const f32,
    stddev: *const f32,
    target: *mut f32,
) {
    for (i, chunk) in source.chunks(S::LANES).enumerate() {
        let at = i * S::LANES;
        // SAFETY: the target is as long as the source, the patterns repeat after PATTERN values.
        unsafe {
            let mut x = S::load_partial(chunk.as_ptr(), chunk.len());
            if !mean.is_null() {
                let mean = S::load(mean.add(at % PATTERN));
                x = S::div(S::sub(x, mean), S::load(stddev.add(at % PATTERN)));
            }
            S::store_partial(target.add(at), x, chunk.len());
        }
    }
}

dispatch! {
    /// Copies a line of pixels, normalised where `mean` is not null.
    ///
    /// # Safety
    /// `isa` must be available and the pointers valid.
    unsafe fn normalize_line(source: &[f32], mean: *const f32, stddev: *const f32, target: *mut f32)
        = normalize_line_body;
}

/// One output line.
struct OutputLine<Y> {
    lines: [*const f32; KERNEL],
    pixels: usize,
    channels: usize,
    /// `[27, padded channels]`.
    weights: *const f32,
    y: *mut Y,
    streaming: bool,
    /// Σy and Σy² are added to these two padded vectors; null where not needed.
    sums: *mut f32,
}

/// P neighbouring pixels, one vector of channels each. Every element is one chain over (ky, kx, colour).
#[inline(always)]
unsafe fn tile<S: Simd, Y, const P: usize>(line: &OutputLine<Y>, pixel: usize, channel: usize) -> [S::V; P] {
    let stride = padded(line.channels);
    // SAFETY: inside the lines and weights.
    unsafe {
        let mut out = [S::zero(); P];
        for (ky, input) in line.lines.iter().enumerate() {
            let input = input.add(pixel * STRIDE * COLOURS);
            for tap in 0..ROW_TAPS {
                let weight = S::load(line.weights.add((ky * ROW_TAPS + tap) * stride + channel));
                for (p, out) in out.iter_mut().enumerate() {
                    *out = S::fma(S::splat(*input.add(p * STRIDE * COLOURS + tap)), weight, *out);
                }
            }
        }
        out
    }
}

#[inline(always)]
unsafe fn pixels<S: Simd, Y: Stored, const P: usize>(line: &OutputLine<Y>, pixel: usize) {
    let channels = line.channels;
    for channel in (0..channels).step_by(S::LANES) {
        let lanes = S::LANES.min(channels - channel);
        // SAFETY: inside the line; sums hold whole vectors.
        unsafe {
            let out = tile::<S, Y, P>(line, pixel, channel);
            let y = line.y.add(pixel * channels + channel);
            for (p, &v) in out.iter().enumerate() {
                let y = y.add(p * channels);
                if lanes < S::LANES {
                    store::<S, false>(y, v, lanes);
                } else if line.streaming {
                    Y::stream::<S>(y, v);
                } else {
                    Y::store::<S>(y, v);
                }
            }
            if !line.sums.is_null() {
                let sums = line.sums.add(channel);
                let squares = sums.add(padded(channels));
                let (mut sum, mut square) = (S::load(sums), S::load(squares));
                for v in out {
                    sum = S::add(sum, v);
                    square = S::fma(v, v, square);
                }
                S::store(sums, sum);
                S::store(squares, square);
            }
        }
    }
}

#[inline(always)]
unsafe fn output_line_body<S: Simd, Y: Stored>(line: &OutputLine<Y>) {
    let mut pixel = 0;
    // SAFETY: pixels of the line.
    unsafe {
        while pixel + 8 <= line.pixels {
            pixels::<S, Y, 8>(line, pixel);
            pixel += 8;
        }
        while pixel < line.pixels {
            pixels::<S, Y, 1>(line, pixel);
            pixel += 1;
        }
    }
}

dispatch! {
    /// Computes one output line.
    ///
    /// # Safety
    /// `isa` must be available and the pointers valid.
    unsafe fn output_line[Y: Stored][Y](line: &OutputLine<Y>) = output_line_body;
}

/// Nominal work for `outputs` values of the convolution's output, `values` of which are read or written.
fn work(input: &StemInput<'_>, outputs: usize, values: usize) -> Work {
    Work::new(TAPS * outputs, input.pixels.len() + values)
}

/// Arguments of [`backward_weights`].
#[derive(Debug)]
pub struct BackwardWeights<'a, G = f32, Y = f32> {
    /// The images.
    pub input: StemInput<'a>,
    /// Number of output channels.
    pub channels: usize,
    /// Gradient by batch norm's output, `[output rows, channels]`.
    pub dz: &'a [G],
    /// Output of the convolution, `[output rows, channels]`.
    pub y: &'a [Y],
    /// Factor of `dz` in dY = a·dz + b·y + c.
    pub a: ChannelVectors<'a>,
    /// Factor of `y`.
    pub b: ChannelVectors<'a>,
    /// Constant.
    pub c: ChannelVectors<'a>,
    /// Overwritten with the gradient by the weights: `[3, 3, 3, channels]`.
    pub dw: &'a mut [f32],
}

/// Computes the weight gradient of the stem; images need none.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn backward_weights<G: Stored, Y: Stored>(executor: &Executor, args: BackwardWeights<'_, G, Y>) {
    let BackwardWeights {
        input,
        channels,
        dz,
        y,
        a,
        b,
        c,
        dw,
    } = args;
    let shape = Shape::new(&input);
    let _report = executor.report(Kernel::StemBackward, work(&input, y.len(), 2 * y.len()));
    let len = input.images * shape.output.cells() * channels;
    check("dz", dz.len(), len);
    check("y", y.len(), len);
    check("dw", dw.len(), TAPS * channels);
    let counts = (1, input.images, channels);
    let a = Vectors::new("a", Some(a), 1.0, counts);
    let b = Vectors::new("b", Some(b), 0.0, counts);
    let c = Vectors::new("c", Some(c), 0.0, counts);
    let (isa, pool) = (executor.isa(), executor.pool());
    let stride = padded(channels);
    let mut workspace = executor.workspace();
    let (partials, _) = workspace.both(shape.tasks() * TAPS * stride, 0);
    let task_partials = SharedPtr::new(partials);
    let scratch_len = shape.lines_room() + Bump::room(shape.output.width * stride);
    pool.run(shape.tasks(), &|task, worker| {
        // SAFETY: inside the task, with its worker, once; the partial gradient at `task` belongs to it alone.
        let (mut scratch, partial) = unsafe {
            (
                Bump::new(pool.scratch(worker, scratch_len)),
                part(task_partials, task, TAPS * stride),
            )
        };
        let (image, top, bottom) = shape.part(task);
        let mut lines = Lines::new(&input, &shape, image, &mut scratch);
        let dy = scratch.take(shape.output.width * stride);
        partial.fill(0.0);
        for oy in top..bottom {
            let at = (image * shape.output.height + oy) * shape.output.width * channels;
            // SAFETY: the sizes are checked above.
            unsafe {
                let gradient = FormGradient {
                    rows: shape.output.width,
                    columns: channels,
                    dz: dz.as_ptr().add(at),
                    y: y.as_ptr().add(at),
                    stride: channels,
                    a: a.at(0, image, channels, 0),
                    b: b.at(0, image, channels, 0),
                    c: c.at(0, image, channels, 0),
                    out: Rows { out: dy, stride },
                };
                sweep(isa, &gradient);
                let line = GradientLine {
                    lines: lines.window(isa, oy),
                    pixels: shape.output.width,
                    channels,
                    dy,
                    dw: partial.as_mut_ptr(),
                };
                gradient_line(isa, &line);
            }
        }
    });
    dw.fill(0.0);
    for partial in partials.chunks_exact(TAPS * stride) {
        for (dw, partial) in dw.chunks_exact_mut(channels).zip(partial.chunks_exact(stride)) {
            for (dw, partial) in dw.iter_mut().zip(partial) {
                *dw += partial;
            }
        }
    }
}

/// One output line of the weight gradient.
struct GradientLine {
    lines: [*const f32; KERNEL],
    pixels: usize,
    channels: usize,
    /// `[pixels, padded channels]`.
    dy: *const f32,
    /// Added to: `[27, padded channels]`.
    dw: *mut f32,
}

#[inline(always)]
unsafe fn gradient_line_body<S: Simd>(line: &GradientLine) {
    let stride = padded(line.channels);
    for channel in (0..line.channels).step_by(S::LANES) {
        for (ky, input) in line.lines.iter().enumerate() {
            // SAFETY: inside the lines, which are padded to whole vectors.
            unsafe {
                let dw = line.dw.add(ky * ROW_TAPS * stride + channel);
                let mut sums = [S::zero(); ROW_TAPS];
                for (tap, sum) in sums.iter_mut().enumerate() {
                    *sum = S::load(dw.add(tap * stride));
                }
                for pixel in 0..line.pixels {
                    let dy = S::load(line.dy.add(pixel * stride + channel));
                    let input = input.add(pixel * STRIDE * COLOURS);
                    for (tap, sum) in sums.iter_mut().enumerate() {
                        *sum = S::fma(S::splat(*input.add(tap)), dy, *sum);
                    }
                }
                for (tap, sum) in sums.into_iter().enumerate() {
                    S::store(dw.add(tap * stride), sum);
                }
            }
        }
    }
}

dispatch! {
    /// Adds the weight gradient of one output line.
    ///
    /// # Safety
    /// `isa` must be available and the pointers valid.
    unsafe fn gradient_line(line: &GradientLine) = gradient_line_body;
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, buffer, same_everywhere, values};
    use super::*;
    use crate::arena::AlignedBuf;

    const NORMALIZE: Normalize = Normalize {
        mean: [0.485, 0.456, 0.406],
        stddev: [0.229, 0.224, 0.225],
    };

    /// Calls `f(output row, tap, input value)` for every value that an output meets.
    fn taps(input: &StemInput<'_>, mut f: impl FnMut(usize, usize, f64)) {
        let (height, width) = (input.map.height, input.map.width);
        let (out_height, out_width) = (height.div_ceil(2), width.div_ceil(2));
        let before = |size: usize| (((size.div_ceil(2) - 1) * 2 + 3).saturating_sub(size)) / 2;
        for row in 0..input.images * out_height * out_width {
            let (image, oy, ox) = (
                row / (out_height * out_width),
                row / out_width % out_height,
                row % out_width,
            );
            for tap in 0..TAPS {
                let (ky, kx, colour) = (tap / 9, tap / 3 % 3, tap % 3);
                let y = (oy * 2 + ky).wrapping_sub(before(height));
                let x = (ox * 2 + kx).wrapping_sub(before(width));
                if y < height && x < width {
                    let pixel = f64::from(input.pixels[((image * height + y) * width + x) * 3 + colour]);
                    let value = input.normalize.map_or(pixel, |n| {
                        (pixel - f64::from(n.mean[colour])) / f64::from(n.stddev[colour])
                    });
                    f(row, tap, value);
                }
            }
        }
    }

    #[test]
    fn both_passes_match_float64_and_themselves_everywhere() {
        let cases = [(1, 1, 1, 3), (2, 5, 7, 32), (1, 8, 20, 40), (3, 34, 6, 24)];
        for (images, height, width, channels) in cases {
            for normalize in [None, Some(NORMALIZE)] {
                let pixels = values(images * height * width * 3, 1);
                let input = StemInput {
                    pixels: &pixels,
                    images,
                    map: MapSize { height, width },
                    normalize,
                };
                let weights = values(TAPS * channels, 2);
                let len = images * height.div_ceil(2) * width.div_ceil(2) * channels;
                let (dz, raw) = (buffer(len, 3), buffer(len, 4));
                let [a, b, c] = [5, 6, 7].map(|seed| values(channels, seed));
                let run = |streaming: bool| {
                    same_everywhere(|executor| {
                        let mut y = AlignedBuf::from_slice(&vec![f32::NAN; len]);
                        let mut sums = vec![f64::NAN; 2 * channels];
                        let args = Forward {
                            input,
                            channels,
                            weights: &weights,
                            y: &mut y,
                            sums: Some(&mut sums),
                            streaming,
                        };
                        forward(executor, args);
                        let mut dw = vec![f32::NAN; weights.len()];
                        let args = BackwardWeights {
                            input,
                            channels,
                            dz: &dz,
                            y: &raw,
                            a: ChannelVectors::per_group(&a),
                            b: ChannelVectors::per_group(&b),
                            c: ChannelVectors::per_group(&c),
                            dw: &mut dw,
                        };
                        backward_weights(executor, args);
                        (y.to_vec(), sums, dw)
                    })
                };
                let (y, sums, dw) = run(false);
                assert!(run(true).0 == y, "streaming changes nothing");
                let mut expected = vec![0.0; len];
                let mut expected_dw = vec![0.0; weights.len()];
                taps(&input, |row, tap, value| {
                    for i in 0..channels {
                        let at = row * channels + i;
                        let [a, b, c] = [a[i], b[i], c[i]].map(f64::from);
                        expected[at] += value * f64::from(weights[tap * channels + i]);
                        let dy = a * f64::from(dz[at]) + b * f64::from(raw[at]) + c;
                        expected_dw[tap * channels + i] += value * dy;
                    }
                });
                let mut expected_sums = vec![0.0; 2 * channels];
                for (i, y) in expected.iter().enumerate() {
                    expected_sums[i % channels] += y;
                    expected_sums[channels + i % channels] += y * y;
                }
                assert_close("y", &y, &expected, 1e-6);
                assert_close("sums", &sums, &expected_sums, 2e-6);
                assert_close("dw", &dw, &expected_dw, 2e-6);
            }
        }
    }
}
