//! One line of a pyramid node's input: features resampled, weighted, added and activated.

use std::marker::PhantomData;

use super::depthwise::LANE_GROUP;
use crate::kernels::resample::Resampler;
use crate::kernels::row_sweeps::{load, store};
use crate::math::Activation;
use crate::simd::{Simd, dispatch};

/// A feature that enters.
#[derive(Debug, Clone, Copy)]
pub(super) struct FuseInput<'a> {
    /// `[input height, input width, channels]`.
    pub values: *const f32,
    pub resampler: &'a Resampler,
    /// `[channels]`; 1 where null.
    pub factor: *const f32,
}

/// One line of `act(Σ_i factor_i·R_i(x_i))`.
#[derive(Debug)]
pub(super) struct FusedLine<'a, A> {
    pub inputs: &'a [FuseInput<'a>],
    pub line: usize,
    pub pixels: usize,
    pub channels: usize,
    pub out: *mut f32,
    /// Values from one pixel to the next.
    pub pixel_stride: usize,
    /// Values from one lane group to the next.
    pub group_stride: usize,
    pub act: PhantomData<A>,
}

/// P vectors of the resampled feature at pixel `x`: one cell, or the largest of a window.
#[inline(always)]
unsafe fn resampled<S: Simd, const P: usize, const WHOLE: bool>(
    input: &FuseInput<'_>,
    (line, x): (usize, usize),
    channels: usize,
    (channel, lanes): (usize, usize),
) -> [S::V; P] {
    let (rows, columns) = (
        input.resampler.source_lines(line),
        input.resampler.source_columns(x),
    );
    let width = input.resampler.input().width;
    // SAFETY: sources lie inside the feature.
    unsafe {
        let at = |y: usize, x: usize, p: usize| {
            let at = (y * width + x) * channels + channel + p * S::LANES;
            load::<S, WHOLE>(input.values.add(at), lanes)
        };
        let mut values = std::array::from_fn(|p| at(rows.start, columns.start, p));
        if input.resampler.pools() {
            for y in rows {
                for x in columns.clone() {
                    for (p, value) in values.iter_mut().enumerate() {
                        *value = S::max(at(y, x, p), *value);
                    }
                }
            }
        }
        values
    }
}

/// P vectors of pixel `x`.
#[inline(always)]
unsafe fn fuse_vectors<S: Simd, A: Activation, const P: usize, const WHOLE: bool>(
    line: &FusedLine<'_, A>,
    x: usize,
    channel: usize,
    lanes: usize,
) {
    // SAFETY: channels of the features and the line.
    unsafe {
        let mut sums = [S::zero(); P];
        for (i, input) in line.inputs.iter().enumerate() {
            let values = resampled::<S, P, WHOLE>(input, (line.line, x), line.channels, (channel, lanes));
            for (p, (sum, value)) in sums.iter_mut().zip(values).enumerate() {
                let factor = || load::<S, WHOLE>(input.factor.add(channel + p * S::LANES), lanes);
                *sum = match (input.factor.is_null(), i) {
                    (true, 0) => value,
                    (true, _) => S::add(*sum, value),
                    (false, 0) => S::mul(value, factor()),
                    (false, _) => S::fma(value, factor(), *sum),
                };
            }
        }
        for (p, v) in A::values::<S, P>(sums).into_iter().enumerate() {
            let channel = channel + p * S::LANES;
            let at = channel / LANE_GROUP * line.group_stride + x * line.pixel_stride + channel % LANE_GROUP;
            store::<S, WHOLE>(line.out.add(at), v, lanes);
        }
    }
}

#[inline(always)]
unsafe fn fuse_line_body<S: Simd, A: Activation>(line: &FusedLine<'_, A>) {
    for x in 0..line.pixels {
        let mut channel = 0;
        // SAFETY: channels of the features and the line.
        unsafe {
            while channel + 4 * S::LANES <= line.channels {
                fuse_vectors::<S, A, 4, true>(line, x, channel, S::LANES);
                channel += 4 * S::LANES;
            }
            while channel + S::LANES <= line.channels {
                fuse_vectors::<S, A, 1, true>(line, x, channel, S::LANES);
                channel += S::LANES;
            }
            if channel < line.channels {
                fuse_vectors::<S, A, 1, false>(line, x, channel, line.channels - channel);
            }
        }
    }
}

dispatch! {
    /// Makes one line.
    ///
    /// # Safety
    /// `isa` must be available and all pointers valid.
    pub(super) unsafe fn fuse_line[A: Activation][A](line: &FusedLine<'_, A>) = fuse_line_body;
}
