//! The forward pass over one part of the output.

use super::super::row_sweeps::store;
use super::plan::LANE_GROUP;
use crate::simd::{Simd, dispatch};
use crate::storage::Stored;

/// Pixels of a line that are worked on for one lane group before the next one: output is written in pieces of this many
/// neighbouring pixels, while the weights of a lane group stay in registers and what a strip reads stays in L1: 3 lines of a
/// 3×3 kernel, 5 of a 5×5 one.
pub(super) const fn strip_pixels(kernel_size: usize) -> usize {
    if kernel_size == 3 { 128 } else { 64 }
}

/// One output line of a part.
#[derive(Debug, Clone, Copy)]
pub(super) struct OutputLine<Y, const K: usize> {
    /// The K input lines, at the first pixel that the first output pixel needs.
    pub lines: [*const f32; K],
    /// Values from one lane group of a line to the next.
    pub group_stride: usize,
    pub pixels: usize,
    pub channels: usize,
    /// `[lane groups, K·K, 16]`.
    pub weights: *const f32,
    /// First pixel of the output tensor.
    pub y: *mut Y,
    /// Values from one pixel of the output tensor to the next.
    pub pixel_stride: usize,
    pub streaming: bool,
    /// Scratch for [`stream_strip`]: `[strip_pixels(K), 16]`.
    pub staging: *mut f32,
    /// Σy and then Σy² are added here, `sums_stride` apart; null where not needed.
    pub sums: *mut f32,
    pub sums_stride: usize,
}

/// Convolves P neighbouring pixels, one vector of channels each. Every element is one chain over (ky, kx).
#[inline(always)]
unsafe fn tile<S: Simd, const K: usize, const ST: usize, const P: usize>(
    lines: &[*const f32; K],
    at: usize,
    weights: *const f32,
) -> [S::V; P] {
    // SAFETY: the lines reach (P − 1)·ST + K pixels past `at`.
    unsafe {
        let mut out = [S::zero(); P];
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

/// Whether streamed lane groups must be put together first, since a vector is no whole cache line.
///
/// Halves of a line that leave the processor one by one cost main memory a read and two writes.
pub(super) const fn must_stage<S: Simd>() -> bool {
    S::LANES < LANE_GROUP
}

/// Writes a staged lane group past the caches, whole cache lines at a time.
///
/// # Safety
/// `staging` must hold `[pixels, 16]`, and `target` have room at aligned pixels.
#[inline(always)]
pub(super) unsafe fn stream_strip<S: Simd, T: Stored>(
    staging: *const f32,
    pixels: usize,
    target: *mut T,
    pixel_stride: usize,
) {
    for pixel in 0..pixels {
        for lane in (0..LANE_GROUP).step_by(S::LANES) {
            // SAFETY: the caller's promise.
            unsafe {
                let v = S::load(staging.add(pixel * LANE_GROUP + lane));
                T::stream::<S>(target.add(pixel * pixel_stride + lane), v);
            }
        }
    }
}

/// The vectors of channels at `channel`, for pixels `from..to`.
#[inline(always)]
unsafe fn strip<S: Simd, Y: Stored, const K: usize, const ST: usize, const WHOLE: bool>(
    line: &OutputLine<Y, K>,
    (from, to): (usize, usize),
    channel: usize,
    lanes: usize,
) {
    // SAFETY: pixels and channels of the line.
    unsafe {
        let (group, lane) = (channel / LANE_GROUP, channel % LANE_GROUP);
        let weights = line.weights.add(group * K * K * LANE_GROUP + lane);
        let source = group * line.group_stride + lane;
        let (mut sum, mut squares) = (S::zero(), S::zero());
        let with_sums = !line.sums.is_null();
        if with_sums {
            sum = S::load(line.sums.add(channel));
            squares = S::load(line.sums.add(line.sums_stride + channel));
        }
        let staged = line.streaming && must_stage::<S>();
        let staging = line.staging.add(lane);
        let target = line.y.add(from * line.pixel_stride + channel);
        let mut pixel = from;
        macro_rules! tiles {
            ($pixels:literal) => {
                while pixel + ($pixels - 1) < to {
                    let y = target.add((pixel - from) * line.pixel_stride);
                    if !line.streaming {
                        // What the next strip will write: a store that misses holds up those behind it.
                        for p in to - from..to - from + $pixels {
                            S::prefetch(y.wrapping_add(p * line.pixel_stride).cast());
                        }
                    }
                    let out =
                        tile::<S, K, ST, $pixels>(&line.lines, source + pixel * ST * LANE_GROUP, weights);
                    if staged {
                        let staging = staging.add((pixel - from) * LANE_GROUP);
                        for (p, &v) in out.iter().enumerate() {
                            store::<S, WHOLE>(staging.add(p * LANE_GROUP), v, lanes);
                        }
                    } else if WHOLE && line.streaming {
                        for (p, &v) in out.iter().enumerate() {
                            Y::stream::<S>(y.add(p * line.pixel_stride), v);
                        }
                    } else {
                        for (p, &v) in out.iter().enumerate() {
                            store::<S, WHOLE>(y.add(p * line.pixel_stride), v, lanes);
                        }
                    }
                    if with_sums {
                        for v in out {
                            sum = S::add(sum, v);
                            squares = S::fma(v, v, squares);
                        }
                    }
                    pixel += $pixels;
                }
            };
        }
        if S::LANES == LANE_GROUP {
            tiles!(8);
        }
        tiles!(4);
        tiles!(1);
        if with_sums {
            S::store(line.sums.add(channel), sum);
            S::store(line.sums.add(line.sums_stride + channel), squares);
        }
    }
}

#[inline(always)]
unsafe fn output_line_body<S: Simd, Y: Stored, const K: usize, const ST: usize>(line: &OutputLine<Y, K>) {
    let mut from = 0;
    while from < line.pixels {
        let to = (from + strip_pixels(K)).min(line.pixels);
        let mut channel = 0;
        // SAFETY: pixels and channels of the line.
        unsafe {
            while channel + S::LANES <= line.channels {
                strip::<S, Y, K, ST, true>(line, (from, to), channel, S::LANES);
                channel += S::LANES;
                if line.streaming && must_stage::<S>() && channel % LANE_GROUP == 0 {
                    let y = line.y.add(from * line.pixel_stride + channel - LANE_GROUP);
                    stream_strip::<S, Y>(line.staging, to - from, y, line.pixel_stride);
                }
            }
            if channel < line.channels {
                strip::<S, Y, K, ST, false>(line, (from, to), channel, line.channels - channel);
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
    pub(super) unsafe fn output_line[Y: Stored, const K: usize, const ST: usize][Y, K, ST](line: &OutputLine<Y, K>)
        = output_line_body;
}
