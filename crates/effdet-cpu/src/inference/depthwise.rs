//! Depthwise convolution of one line out of a ring of line buffers.

use std::marker::PhantomData;

use effdet_model::network::{MapSize, same_padding};

use crate::kernels::row_sweeps::store;
use crate::math::Activation;
use crate::simd::{Simd, dispatch};

/// Channels that a line buffer keeps together; every vector width divides it.
pub(super) const LANE_GROUP: usize = 16;

/// Pixels that are worked on for one lane group before the next one, so that their inputs stay in the L1 cache.
const STRIP_PIXELS: usize = 32;

/// Sizes of a convolution and of the line buffers it reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    pub input: MapSize,
    pub output: MapSize,
    pub size: usize,
    pub stride: usize,
    pad_top: usize,
    pad_left: usize,
    /// Pixels of a line with its padding.
    line_pixels: usize,
    /// Values that a line keeps together for a pixel.
    pixel_values: usize,
}

impl Geometry {
    /// Sizes of a depthwise convolution.
    ///
    /// # Panics
    /// When the kernel is not 3 or 5 or the stride not 1 or 2.
    pub(super) fn new(input: MapSize, size: usize, stride: usize) -> Self {
        assert!(
            matches!((size, stride), (3 | 5, 1 | 2)),
            "a depthwise convolution of kernel {size} and stride {stride} is not supported"
        );
        Self::with_pixels_of(LANE_GROUP, input, size, stride)
    }

    /// Sizes of a convolution over RGB pixels.
    pub(super) fn of_image(input: MapSize, size: usize, stride: usize) -> Self {
        Self::with_pixels_of(3, input, size, stride)
    }

    fn with_pixels_of(pixel_values: usize, input: MapSize, size: usize, stride: usize) -> Self {
        let (height, pad_top) = same_padding(input.height, size, stride);
        let (width, pad_left) = same_padding(input.width, size, stride);
        Self {
            input,
            output: MapSize { height, width },
            size,
            stride,
            pad_top,
            pad_left,
            line_pixels: ((width - 1) * stride + size).max(pad_left + input.width),
            pixel_values,
        }
    }

    /// Values from one lane group of a line to the next: an odd number of cache lines, so that the groups spread over all
    /// sets of a cache.
    pub(super) fn group_stride(&self) -> usize {
        (self.line_pixels | 1) * self.pixel_values
    }

    /// Where the first pixel of the map lies in a lane group.
    pub(super) fn first_pixel(&self) -> usize {
        self.pad_left * self.pixel_values
    }

    /// First input line that an output line reads; negative in the padding.
    fn first_line(&self, line: usize) -> isize {
        (line * self.stride) as isize - self.pad_top as isize
    }

    /// First input line that an output line reads of the map.
    pub(super) fn first_input_line(&self, line: usize) -> usize {
        self.first_line(line).max(0) as usize
    }

    /// Input lines that output lines `top..bottom` read.
    #[cfg(test)]
    pub(super) fn input_lines(&self, top: usize, bottom: usize) -> std::ops::Range<usize> {
        let end = self.first_line(bottom - 1) + self.size as isize;
        self.first_input_line(top)..(end as usize).min(self.input.height)
    }
}

/// The last few input lines of a band of output lines.
#[derive(Debug)]
pub(super) struct Ring<const K: usize> {
    geometry: Geometry,
    lines: [*mut f32; K],
    zeros: *const f32,
    next: usize,
}

impl<const K: usize> Ring<K> {
    /// A ring for the band that starts at output line `top`.
    ///
    /// # Safety
    /// All lines must hold `groups` lane groups, and `zeros` zeros.
    pub(super) unsafe fn new(
        geometry: Geometry,
        lines: [*mut f32; K],
        zeros: *const f32,
        groups: usize,
        top: usize,
    ) -> Self {
        let (from, to) = (geometry.pad_left, geometry.pad_left + geometry.input.width);
        for line in lines {
            for group in 0..groups {
                // SAFETY: the caller's promise.
                unsafe {
                    let line = line.add(group * geometry.group_stride());
                    line.write_bytes(0, from * geometry.pixel_values);
                    line.add(to * geometry.pixel_values)
                        .write_bytes(0, (geometry.line_pixels - to) * geometry.pixel_values);
                }
            }
        }
        Self {
            geometry,
            lines,
            zeros,
            next: geometry.first_input_line(top),
        }
    }

    /// The lines that an output line reads, those not yet there made by `fill(line, first pixel)`; ask in ascending order.
    pub(super) fn window(&mut self, line: usize, mut fill: impl FnMut(usize, *mut f32)) -> [*const f32; K] {
        let first = self.geometry.first_line(line);
        let end = ((first + K as isize).max(0) as usize).min(self.geometry.input.height);
        while self.next < end {
            // Padding is part of the line.
            fill(
                self.next,
                self.lines[self.next % K].wrapping_add(self.geometry.first_pixel()),
            );
            self.next += 1;
        }
        std::array::from_fn(|ky| {
            let y = first + ky as isize;
            if (0..self.geometry.input.height as isize).contains(&y) {
                self.lines[y as usize % K].cast_const()
            } else {
                self.zeros
            }
        })
    }
}

/// One output line.
#[derive(Debug, Clone, Copy)]
pub(super) struct OutputLine<const K: usize, A> {
    /// The K input lines.
    pub lines: [*const f32; K],
    /// Values from one lane group of a line to the next.
    pub group_stride: usize,
    pub pixels: usize,
    pub channels: usize,
    /// `[lane groups, K·K, 16]`.
    pub weights: *const f32,
    /// `[lane groups, 16]`; 0 where null.
    pub bias: *const f32,
    pub out: *mut f32,
    /// Values from one pixel of `out` to the next.
    pub pixel_stride: usize,
    /// Σ of the outputs is added here, `[lane groups, 16]`; null where not wanted.
    pub sums: *mut f32,
    pub act: PhantomData<A>,
}

impl<const K: usize, A> OutputLine<K, A> {
    /// The same line activated by B into a tensor, with its sums.
    pub(super) fn into_tensor<B>(
        self,
        out: *mut f32,
        pixel_stride: usize,
        sums: *mut f32,
    ) -> OutputLine<K, B> {
        OutputLine {
            lines: self.lines,
            group_stride: self.group_stride,
            pixels: self.pixels,
            channels: self.channels,
            weights: self.weights,
            bias: self.bias,
            out,
            pixel_stride,
            sums,
            act: PhantomData,
        }
    }
}

/// Convolves P neighbouring pixels, one vector of channels each. Every element is one chain over (ky, kx) from the bias.
#[inline(always)]
unsafe fn tile<S: Simd, const K: usize, const ST: usize, const P: usize>(
    lines: &[*const f32; K],
    at: usize,
    weights: *const f32,
    bias: S::V,
) -> [S::V; P] {
    // SAFETY: the lines reach (P − 1)·ST + K pixels past `at`.
    unsafe {
        let mut out = [bias; P];
        for (ky, line) in lines.iter().enumerate() {
            let line = line.add(at);
            for kx in 0..K {
                let w = S::load(weights.add((ky * K + kx) * LANE_GROUP));
                for (p, out) in out.iter_mut().enumerate() {
                    *out = S::fma(S::load(line.add((p * ST + kx) * LANE_GROUP)), w, *out);
                }
            }
        }
        out
    }
}

/// The vectors of channels at `channel`, for pixels `from..to`.
#[inline(always)]
unsafe fn strip<S: Simd, A: Activation, const K: usize, const ST: usize, const WHOLE: bool>(
    line: &OutputLine<K, A>,
    (from, to): (usize, usize),
    channel: usize,
    lanes: usize,
) {
    // SAFETY: pixels and channels of the line.
    unsafe {
        let (group, lane) = (channel / LANE_GROUP, channel % LANE_GROUP);
        let weights = line.weights.add(group * K * K * LANE_GROUP + lane);
        let source = group * line.group_stride + lane;
        let bias = if line.bias.is_null() {
            S::zero()
        } else {
            S::load(line.bias.add(channel))
        };
        let mut sum = if line.sums.is_null() {
            S::zero()
        } else {
            S::load(line.sums.add(channel))
        };
        let mut pixel = from;
        macro_rules! tiles {
            ($pixels:literal) => {
                while pixel + ($pixels - 1) < to {
                    let at = source + pixel * ST * LANE_GROUP;
                    let out = tile::<S, K, ST, $pixels>(&line.lines, at, weights, bias);
                    let target = line.out.add(pixel * line.pixel_stride + channel);
                    // What the next strip will write: a store that misses holds up those behind it.
                    for p in STRIP_PIXELS..STRIP_PIXELS + $pixels {
                        S::prefetch(target.wrapping_add(p * line.pixel_stride));
                    }
                    for (p, v) in A::values::<S, $pixels>(out).into_iter().enumerate() {
                        store::<S, WHOLE>(target.add(p * line.pixel_stride), v, lanes);
                        sum = S::add(sum, v);
                    }
                    pixel += $pixels;
                }
            };
        }
        if S::REGISTERS == 32 {
            tiles!(8);
        }
        tiles!(4);
        tiles!(1);
        if !line.sums.is_null() {
            S::store(line.sums.add(channel), sum);
        }
    }
}

#[inline(always)]
unsafe fn output_line_body<S: Simd, A: Activation, const K: usize, const ST: usize>(line: &OutputLine<K, A>) {
    let mut from = 0;
    while from < line.pixels {
        let to = (from + STRIP_PIXELS).min(line.pixels);
        let mut channel = 0;
        // SAFETY: pixels and channels of the line.
        unsafe {
            while channel + S::LANES <= line.channels {
                strip::<S, A, K, ST, true>(line, (from, to), channel, S::LANES);
                channel += S::LANES;
            }
            if channel < line.channels {
                strip::<S, A, K, ST, false>(line, (from, to), channel, line.channels - channel);
            }
        }
        from = to;
    }
}

dispatch! {
    /// Computes one output line.
    ///
    /// # Safety
    /// `isa` must be available and all pointers valid.
    pub(super) unsafe fn output_line[A: Activation, const K: usize, const ST: usize][A, K, ST](line: &OutputLine<K, A>)
        = output_line_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{activation, assert_close, same_everywhere, values};
    use crate::math::{Act, activations};

    /// A whole map through the ring, two bands, against float64.
    fn check<const K: usize, const ST: usize>(input: MapSize, channels: usize) {
        let geometry = Geometry::new(input, K, ST);
        let output = geometry.output;
        let groups = channels.div_ceil(LANE_GROUP);
        let raw = values(input.cells() * channels, 1);
        let weights = values(groups * K * K * LANE_GROUP, 2);
        let bias = values(groups * LANE_GROUP, 3);
        let (out, sums) = same_everywhere(|executor| {
            let mut out = vec![f32::NAN; output.cells() * channels];
            let mut sums = vec![0.0; groups * LANE_GROUP];
            let line_len = groups * geometry.group_stride();
            let middle = output.height.div_ceil(2);
            for (top, bottom) in [(0, middle), (middle, output.height)] {
                let mut buffers = vec![vec![f32::NAN; line_len]; K];
                let zeros = vec![0.0; line_len];
                let lines: [_; K] = std::array::from_fn(|i| buffers[i].as_mut_ptr());
                // SAFETY: the buffers hold whole lines, the tensors the maps.
                unsafe {
                    let mut ring = Ring::new(geometry, lines, zeros.as_ptr(), groups, top);
                    let mut filled = Vec::new();
                    for y in top..bottom {
                        let window = ring.window(y, |line, first| {
                            filled.push(line);
                            for x in 0..input.width {
                                for c in 0..channels {
                                    let at = c / LANE_GROUP * geometry.group_stride()
                                        + x * LANE_GROUP
                                        + c % LANE_GROUP;
                                    first.add(at).write(raw[(line * input.width + x) * channels + c]);
                                }
                            }
                        });
                        let line = OutputLine::<K, activations::Swish> {
                            lines: window,
                            group_stride: geometry.group_stride(),
                            pixels: output.width,
                            channels,
                            weights: weights.as_ptr(),
                            bias: bias.as_ptr(),
                            out: out.as_mut_ptr().add(y * output.width * channels),
                            pixel_stride: channels,
                            sums: sums.as_mut_ptr(),
                            act: PhantomData,
                        };
                        output_line::<_, K, ST>(executor.isa(), &line);
                    }
                    if top < bottom {
                        assert_eq!(filled, geometry.input_lines(top, bottom).collect::<Vec<_>>());
                    }
                }
            }
            sums.truncate(channels);
            (out, sums)
        });
        let (_, pad_top) = same_padding(input.height, K, ST);
        let (_, pad_left) = same_padding(input.width, K, ST);
        let mut expected = Vec::new();
        for i in 0..output.cells() * channels {
            let (cell, c) = (i / channels, i % channels);
            let (y, x) = (cell / output.width, cell % output.width);
            let mut z = f64::from(bias[c]);
            for tap in 0..K * K {
                let (iy, ix) = (
                    (y * ST + tap / K).wrapping_sub(pad_top),
                    (x * ST + tap % K).wrapping_sub(pad_left),
                );
                if iy < input.height && ix < input.width {
                    let w = weights[(c / LANE_GROUP * K * K + tap) * LANE_GROUP + c % LANE_GROUP];
                    z += f64::from(w) * f64::from(raw[(iy * input.width + ix) * channels + c]);
                }
            }
            expected.push(activation(Act::Swish, z).0);
        }
        assert_close("out", &out, &expected, 2e-6);
        let mut expected_sums = vec![0.0; channels];
        for (i, value) in expected.iter().enumerate() {
            expected_sums[i % channels] += value;
        }
        assert_close("sums", &sums, &expected_sums, 1e-5);
    }

    #[test]
    fn lines_match_float64_and_themselves_everywhere() {
        for ((height, width), channels) in [
            ((1, 1), 3),
            ((5, 9), 40),
            ((8, 37), 16),
            ((3, 2), 56),
            ((12, 70), 8),
        ] {
            let map = MapSize { height, width };
            check::<3, 1>(map, channels);
            check::<3, 2>(map, channels);
            check::<5, 1>(map, channels);
            check::<5, 2>(map, channels);
        }
    }
}
