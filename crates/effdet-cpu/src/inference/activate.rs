//! Activations over values that a product or a convolution has just left in the cache.
//!
//! Those of the published networks are compiled into the kernels, where they overlap with the arithmetic around them and cost
//! half as much; the others pass over the result, so that kernels need not be compiled for each.

use std::marker::PhantomData;

use super::depthwise::LANE_GROUP;
use crate::kernels::row_sweeps::{load, store};
use crate::math::{Act, Activation, with_activation};
use crate::simd::{Isa, Simd, dispatch};

/// Whether kernels are compiled for an activation.
pub(super) fn is_fused(act: Act) -> bool {
    matches!(act, Act::Swish | Act::Relu6 | Act::Identity)
}

/// Runs an expression with a type alias bound to the marker type of an activation that kernels are compiled for, and to the
/// identity for all others: `with_fused!(act, A => kernel::<A>(..))`.
macro_rules! with_fused {
    ($act:expr, $alias:ident => $body:expr) => {{
        use $crate::math::{Act, activations};
        match $act {
            Act::Swish => {
                type $alias = activations::Swish;
                $body
            }
            Act::Relu6 => {
                type $alias = activations::Relu6;
                $body
            }
            _ => {
                type $alias = activations::Identity;
                $body
            }
        }
    }};
}
pub(super) use with_fused;

/// `values = act(values) (+ residual)`.
///
/// # Safety
/// `isa` must be available; `len` values must belong to the caller, and as many to `residual` unless it is null.
pub(super) unsafe fn activate(isa: Isa, act: Act, values: *mut f32, len: usize, residual: *const f32) {
    if act == Act::Identity && residual.is_null() {
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { with_activation!(act, A => activate_values::<A>(isa, values, len, residual, PhantomData)) }
}

#[inline(always)]
unsafe fn activate_values_body<S: Simd, A: Activation>(
    values: *mut f32,
    len: usize,
    residual: *const f32,
    _act: PhantomData<A>,
) {
    let mut at = 0;
    // SAFETY: `len` values; the last vector is partial.
    unsafe {
        let with_residual = !residual.is_null();
        while at + 4 * S::LANES <= len {
            let residual = residual.wrapping_add(at);
            activate_vectors::<S, A, 4, true>(values.add(at), residual, with_residual, S::LANES);
            at += 4 * S::LANES;
        }
        while at + S::LANES <= len {
            let residual = residual.wrapping_add(at);
            activate_vectors::<S, A, 1, true>(values.add(at), residual, with_residual, S::LANES);
            at += S::LANES;
        }
        if at < len {
            let residual = residual.wrapping_add(at);
            activate_vectors::<S, A, 1, false>(values.add(at), residual, with_residual, len - at);
        }
    }
}

#[inline(always)]
unsafe fn activate_vectors<S: Simd, A: Activation, const P: usize, const WHOLE: bool>(
    values: *mut f32,
    residual: *const f32,
    has_residual: bool,
    lanes: usize,
) {
    // SAFETY: P vectors each, of `lanes` values.
    unsafe {
        let mut raw = [S::zero(); P];
        for (p, raw) in raw.iter_mut().enumerate() {
            *raw = load::<S, WHOLE>(values.add(p * S::LANES), lanes);
        }
        for (p, mut v) in A::values::<S, P>(raw).into_iter().enumerate() {
            if has_residual {
                v = S::add(v, load::<S, WHOLE>(residual.add(p * S::LANES), lanes));
            }
            store::<S, WHOLE>(values.add(p * S::LANES), v, lanes);
        }
    }
}

dispatch! {
    /// # Safety
    /// As [`activate`].
    unsafe fn activate_values[A: Activation][A](
        values: *mut f32,
        len: usize,
        residual: *const f32,
        act: PhantomData<A>,
    ) = activate_values_body;
}

/// Some pixels of a line that leave the cache: `out = act(raw)`, and their sums.
#[derive(Debug, Clone, Copy)]
pub(super) struct ActivatedLine {
    /// `[pixels, raw_stride]`.
    pub raw: *const f32,
    pub raw_stride: usize,
    pub pixels: usize,
    pub channels: usize,
    pub out: *mut f32,
    /// Values from one pixel of `out` to the next.
    pub pixel_stride: usize,
    /// Σ of the activations is added here, whole lane groups; null where not wanted.
    pub sums: *mut f32,
}

impl ActivatedLine {
    /// Runs the pass.
    ///
    /// # Safety
    /// `isa` must be available and the pointers valid.
    pub(super) unsafe fn run(&self, isa: Isa, act: Act) {
        // SAFETY: the caller's promise.
        unsafe { with_activation!(act, A => activate_line::<A>(isa, self, PhantomData)) }
    }
}

#[inline(always)]
unsafe fn activate_column<S: Simd, A: Activation, const WHOLE: bool>(
    line: &ActivatedLine,
    channel: usize,
    lanes: usize,
) {
    // SAFETY: pixels and channels of the line; sums hold whole lane groups.
    unsafe {
        let mut sum = if line.sums.is_null() {
            S::zero()
        } else {
            S::load(line.sums.add(channel))
        };
        let mut pixel = 0;
        macro_rules! pixels {
            ($pixels:literal) => {
                while pixel + ($pixels - 1) < line.pixels {
                    let mut raw = [S::zero(); $pixels];
                    for (p, raw) in raw.iter_mut().enumerate() {
                        *raw = load::<S, WHOLE>(line.raw.add((pixel + p) * line.raw_stride + channel), lanes);
                    }
                    for (p, v) in A::values::<S, $pixels>(raw).into_iter().enumerate() {
                        let out = line.out.add((pixel + p) * line.pixel_stride + channel);
                        store::<S, WHOLE>(out, v, lanes);
                        sum = S::add(sum, v);
                    }
                    pixel += $pixels;
                }
            };
        }
        pixels!(4);
        pixels!(1);
        if !line.sums.is_null() {
            S::store(line.sums.add(channel), sum);
        }
    }
}

#[inline(always)]
unsafe fn activate_line_body<S: Simd, A: Activation>(line: &ActivatedLine, _act: PhantomData<A>) {
    debug_assert!(LANE_GROUP.is_multiple_of(S::LANES));
    let mut channel = 0;
    // SAFETY: channels of the line.
    unsafe {
        while channel + S::LANES <= line.channels {
            activate_column::<S, A, true>(line, channel, S::LANES);
            channel += S::LANES;
        }
        if channel < line.channels {
            activate_column::<S, A, false>(line, channel, line.channels - channel);
        }
    }
}

dispatch! {
    /// # Safety
    /// `isa` must be available and the pointers valid.
    unsafe fn activate_line[A: Activation][A](line: &ActivatedLine, act: PhantomData<A>) = activate_line_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{activation, assert_close, same_everywhere, values};

    #[test]
    fn activations_match_float64_and_themselves_everywhere() {
        for act in [Act::Swish, Act::Relu6, Act::Identity] {
            for (pixels, channels) in [(1, 3), (7, 40), (33, 16)] {
                let stride = channels + 5;
                let (raw, residual) = (values(pixels * stride, 1), values(pixels * stride, 2));
                let (in_place, out, sums) = same_everywhere(|executor| {
                    let mut in_place = raw.clone();
                    let mut out = vec![f32::NAN; pixels * channels];
                    let mut sums = vec![0.5; channels.next_multiple_of(LANE_GROUP)];
                    // SAFETY: the buffers have the sizes of the line.
                    unsafe {
                        activate(
                            executor.isa(),
                            act,
                            in_place.as_mut_ptr(),
                            in_place.len(),
                            residual.as_ptr(),
                        );
                        let line = ActivatedLine {
                            raw: raw.as_ptr(),
                            raw_stride: stride,
                            pixels,
                            channels,
                            out: out.as_mut_ptr(),
                            pixel_stride: channels,
                            sums: sums.as_mut_ptr(),
                        };
                        line.run(executor.isa(), act);
                    }
                    sums.truncate(channels);
                    (in_place, out, sums)
                });
                let value = |x: f32| activation(act, f64::from(x)).0;
                let expected: Vec<f64> = (raw.iter().zip(&residual))
                    .map(|(&x, &residual)| value(x) + f64::from(residual))
                    .collect();
                assert_close("in place", &in_place, &expected, 1e-6);
                let expected: Vec<f64> = (0..pixels * channels)
                    .map(|i| value(raw[i / channels * stride + i % channels]))
                    .collect();
                assert_close("out", &out, &expected, 1e-6);
                let mut expected_sums = vec![0.5; channels];
                for (i, value) in expected.iter().enumerate() {
                    expected_sums[i % channels] += value;
                }
                assert_close("sums", &sums, &expected_sums, 2e-6);
            }
        }
    }
}
