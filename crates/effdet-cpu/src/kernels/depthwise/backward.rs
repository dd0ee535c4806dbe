//! The backward pass over one input line of a part.
//!
//! With output column ox and tap kx, the input column is `ix = ox·stride + kx − pad_left`. Columns of equal phase
//! `(ix + pad_left) mod stride` see the taps phase, phase + stride, …: for them both gradients are correlations of stride 1
//! in `j = (ix + pad_left − phase)/stride`, with `ox = j − t` for the t-th of these taps.

use super::super::row_sweeps::{load, store};
use super::forward::{must_stage, stream_strip, strip_pixels};
use super::lines::{ActivateStrip, Strip};
use super::plan::LANE_GROUP;
use crate::simd::{Isa, Simd, dispatch_with_bf16};
use crate::storage::Stored;

/// Where the slopes of a strip lie in its scratch: not whole 4 KB behind the activations, whose cache lines they would compete for.
const fn slopes_at(kernel_size: usize) -> usize {
    (strip_pixels(kernel_size) + 8) * LANE_GROUP
}

/// Length of the scratch of a strip.
pub(super) const fn strip_len(kernel_size: usize) -> usize {
    slopes_at(kernel_size) + strip_pixels(kernel_size) * LANE_GROUP
}

/// One input line of a part.
#[derive(Debug, Clone, Copy)]
pub(super) struct InputLine<X, G, const K: usize> {
    /// The gradient lines that this input line went into; the others are null. Each starts `K − 1` taps (whole strides)
    /// left of the first pixel.
    pub gradients: [*const f32; K],
    /// The kernel row of each gradient line.
    pub kernel_rows: [usize; K],
    /// How many gradient lines there are.
    pub count: usize,
    /// j − ox of the first value of a gradient line, for the first pixel of phase 0: see `column`.
    pub first_column: isize,
    /// Values from one lane group of a gradient line to the next.
    pub group_stride: usize,
    /// Column of the first pixel, plus the left padding.
    pub padded_left: usize,
    pub pixels: usize,
    pub channels: usize,
    /// `[lane groups, K·K, 16]`.
    pub weights: *const f32,
    /// Weight gradient, added to: `[lane groups, K·K, 16]`.
    pub dw: *mut f32,
    /// First pixel of the input tensor.
    pub raw: *const X,
    pub scale: *const f32,
    pub shift: *const f32,
    pub activate: ActivateStrip<X>,
    /// Scratch of a strip: activations `[strip_pixels(K), 16]`, and slopes at [`slopes_at`].
    pub scratch: *mut f32,
    /// First pixel of the gradient tensor.
    pub dz: *mut G,
    /// Values from one pixel of the input and gradient tensors to the next.
    pub pixel_stride: usize,
    pub accumulate: bool,
    pub streaming: bool,
    /// Σdz and then Σdz·raw are added here, `sums_stride` apart; null where not needed.
    pub sums: *mut f32,
    pub sums_stride: usize,
}

/// Both gradients for P pixels of one phase, one vector of channels each, T taps per kernel row.
///
/// Every element of the result is one chain over (ky, kx); every weight's gradient is one chain over the pixels.
#[inline(always)]
unsafe fn tile<S: Simd, X, G, const K: usize, const ST: usize, const T: usize, const P: usize>(
    line: &InputLine<X, G, K>,
    at: usize,
    taps: usize,
    act: *const f32,
) -> [S::V; P] {
    // SAFETY: the gradient lines reach P + T − 1 pixels past `at`, `act` P·ST pixels.
    unsafe {
        let mut out = [S::zero(); P];
        let mut acts = [S::zero(); P];
        for (p, act_p) in acts.iter_mut().enumerate() {
            *act_p = S::load(act.add(p * ST * LANE_GROUP));
        }
        for i in 0..line.count {
            let gradient = line.gradients[i].add(at);
            let row = line.kernel_rows[i] * K * LANE_GROUP + taps;
            let (weights, dw) = (line.weights.add(row), line.dw.add(row));
            let mut dw_sums = [S::zero(); T];
            for (t, sum) in dw_sums.iter_mut().enumerate() {
                *sum = S::load(dw.add(t * ST * LANE_GROUP));
            }
            for (p, (out, &act)) in out.iter_mut().zip(&acts).enumerate() {
                for (t, sum) in dw_sums.iter_mut().enumerate() {
                    let dy = S::load(gradient.add((p + T - 1 - t) * LANE_GROUP));
                    let w = S::load(weights.add(t * ST * LANE_GROUP));
                    *out = S::fma(dy, w, *out);
                    *sum = S::fma(dy, act, *sum);
                }
            }
            for (t, sum) in dw_sums.into_iter().enumerate() {
                S::store(dw.add(t * ST * LANE_GROUP), sum);
            }
        }
        out
    }
}

/// Sums of a vector of channels.
struct Sums<V> {
    dz: V,
    dz_raw: V,
}

/// Pixels `first`, `first + ST`, … below `to` of the strip that starts at `from`, which all have the same phase.
#[inline(always)]
unsafe fn phase<
    S: Simd,
    X: Stored,
    G: Stored,
    const K: usize,
    const ST: usize,
    const T: usize,
    const WHOLE: bool,
>(
    line: &InputLine<X, G, K>,
    phase: usize,
    (from, first, to): (usize, usize, usize),
    channel: usize,
    lanes: usize,
    sums: &mut Sums<S::V>,
) {
    // SAFETY: pixels and channels of the line.
    unsafe {
        let (group, lane) = (channel / LANE_GROUP, channel % LANE_GROUP);
        let taps = group * K * K * LANE_GROUP + phase * LANE_GROUP + lane;
        let slopes = line.scratch.add(slopes_at(K));
        let mut pixel = first;
        macro_rules! tiles {
            ($pixels:literal) => {
                while pixel + ($pixels - 1) * ST < to {
                    let j = (line.padded_left + pixel - phase) / ST;
                    let column = (j as isize - (T as isize - 1) - line.first_column) as usize;
                    let at = group * line.group_stride + column * LANE_GROUP + lane;
                    let in_strip = (pixel - from) * LANE_GROUP + lane;
                    let mut out =
                        tile::<S, X, G, K, ST, T, $pixels>(line, at, taps, line.scratch.add(in_strip));
                    for (p, out) in out.iter_mut().enumerate() {
                        *out = S::mul(*out, S::load(slopes.add(in_strip + p * ST * LANE_GROUP)));
                    }
                    let place = pixel * line.pixel_stride + channel;
                    let step = ST * line.pixel_stride;
                    let dz = line.dz.add(place);
                    if line.streaming && must_stage::<S>() {
                        // In the place of the slopes, which are used up.
                        for (p, &v) in out.iter().enumerate() {
                            S::store(slopes.add(in_strip + p * ST * LANE_GROUP), v);
                        }
                    } else if line.accumulate {
                        for (p, out) in out.iter_mut().enumerate() {
                            *out = S::add(load::<S, WHOLE>(dz.add(p * step), lanes), *out);
                            store::<S, WHOLE>(dz.add(p * step), *out, lanes);
                        }
                    } else if WHOLE && line.streaming {
                        for (p, &v) in out.iter().enumerate() {
                            G::stream::<S>(dz.add(p * step), v);
                        }
                    } else {
                        for (p, &v) in out.iter().enumerate() {
                            store::<S, WHOLE>(dz.add(p * step), v, lanes);
                        }
                    }
                    if !line.sums.is_null() {
                        let raw = line.raw.add(place);
                        for (p, &v) in out.iter().enumerate() {
                            sums.dz = S::add(sums.dz, v);
                            let raw = load::<S, WHOLE>(raw.add(p * step), lanes);
                            sums.dz_raw = S::fma(v, raw, sums.dz_raw);
                        }
                    }
                    pixel += $pixels * ST;
                }
            };
        }
        if S::LANES == LANE_GROUP {
            tiles!(8);
        }
        tiles!(4);
        tiles!(1);
    }
}

/// The vectors of channels at `channel`, for pixels `from..to`, whose activations and slopes are in the scratch.
#[inline(always)]
unsafe fn vectors<S: Simd, X: Stored, G: Stored, const K: usize, const ST: usize, const WHOLE: bool>(
    line: &InputLine<X, G, K>,
    (from, to): (usize, usize),
    channel: usize,
    lanes: usize,
) {
    // SAFETY: pixels and channels of the line.
    unsafe {
        let mut sums = Sums {
            dz: S::zero(),
            dz_raw: S::zero(),
        };
        if !line.sums.is_null() {
            sums.dz = S::load(line.sums.add(channel));
            sums.dz_raw = S::load(line.sums.add(line.sums_stride + channel));
        }
        for first in from..(from + ST).min(to) {
            let range = (from, first, to);
            let sums = &mut sums;
            match ((line.padded_left + first) % ST, ST, K) {
                (_, 1, 3) => phase::<S, X, G, K, ST, 3, WHOLE>(line, 0, range, channel, lanes, sums),
                (_, 1, 5) => phase::<S, X, G, K, ST, 5, WHOLE>(line, 0, range, channel, lanes, sums),
                (0, 2, 3) => phase::<S, X, G, K, ST, 2, WHOLE>(line, 0, range, channel, lanes, sums),
                (_, 2, 3) => phase::<S, X, G, K, ST, 1, WHOLE>(line, 1, range, channel, lanes, sums),
                (0, 2, 5) => phase::<S, X, G, K, ST, 3, WHOLE>(line, 0, range, channel, lanes, sums),
                (_, 2, 5) => phase::<S, X, G, K, ST, 2, WHOLE>(line, 1, range, channel, lanes, sums),
                _ => unreachable!("kernels are 3 or 5 wide, strides 1 or 2"),
            }
        }
        if !line.sums.is_null() {
            S::store(line.sums.add(channel), sums.dz);
            S::store(line.sums.add(line.sums_stride + channel), sums.dz_raw);
        }
    }
}

/// The lane group at channel `first`, for pixels `from..to`.
#[inline(always)]
unsafe fn strip_body<S: Simd, X: Stored, G: Stored, const K: usize, const ST: usize>(
    line: &InputLine<X, G, K>,
    (from, to): (usize, usize),
    first: usize,
) {
    let end = (first + LANE_GROUP).min(line.channels);
    let mut channel = first;
    // SAFETY: pixels and channels of the line.
    unsafe {
        while channel + S::LANES <= end {
            vectors::<S, X, G, K, ST, true>(line, (from, to), channel, S::LANES);
            channel += S::LANES;
        }
        if channel < end {
            vectors::<S, X, G, K, ST, false>(line, (from, to), channel, end - channel);
        }
        if line.streaming && must_stage::<S>() {
            let staged = line.scratch.add(slopes_at(K));
            let dz = line.dz.add(from * line.pixel_stride + first);
            stream_strip::<S, G>(staged, to - from, dz, line.pixel_stride);
        }
    }
}

dispatch_with_bf16! {
    /// Computes a lane group of a strip whose activations and slopes are in the scratch.
    ///
    /// A function of its own: inside the loop over the lane groups, the compiler would keep more pointers than there are registers.
    ///
    /// # Safety
    /// `isa` must be available and all pointers valid.
    unsafe fn strip[X: Stored, G: Stored, const K: usize, const ST: usize][X, G, K, ST](
        line: &InputLine<X, G, K>,
        pixels: (usize, usize),
        first: usize,
    ) = strip_body;
}

/// Computes one input line.
///
/// # Safety
/// `isa` must be available and all pointers valid.
pub(super) unsafe fn input_line<X: Stored, G: Stored, const K: usize, const ST: usize>(
    isa: Isa,
    line: &InputLine<X, G, K>,
) {
    for from in (0..line.pixels).step_by(strip_pixels(K)) {
        let to = (from + strip_pixels(K)).min(line.pixels);
        for first in (0..line.channels).step_by(LANE_GROUP) {
            // SAFETY: pixels and channels of the line.
            unsafe {
                let dz = line.dz.add(from * line.pixel_stride + first);
                let (target, target_stride) = if line.streaming {
                    (line.scratch.cast_const().cast(), 0)
                } else {
                    (dz.cast_const().cast(), line.pixel_stride * size_of::<G>())
                };
                let activation = Strip {
                    pixels: to - from,
                    channels: (line.channels - first).min(LANE_GROUP),
                    raw: line.raw.add(from * line.pixel_stride + first),
                    pixel_stride: line.pixel_stride,
                    scale: line.scale.add(first),
                    shift: line.shift.add(first),
                    act: line.scratch,
                    slope: line.scratch.add(slopes_at(K)),
                    target,
                    target_stride,
                };
                (line.activate)(isa, &activation);
                strip::<X, G, K, ST>(isa, line, (from, to), first);
            }
        }
    }
}
