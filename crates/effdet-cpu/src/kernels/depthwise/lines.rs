//! Line buffers: activated input or formed gradient, a line at a time, laid out for the register tiles.
//!
//! A line is `[lane group][pixel][16 channels]`, so that a tile finds neighbouring pixels at fixed distances.

use std::marker::PhantomData;

use super::super::row_sweeps::{fetch_distance, load};
use super::plan::LANE_GROUP;
use crate::math::Activation;
use crate::simd::{Isa, Simd, dispatch};
use crate::storage::Stored;

/// Pixels that share one load of the channels' vectors.
const PIXELS: usize = 4;

/// Where a line goes, and the channels it has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Line {
    pub pixels: usize,
    pub channels: usize,
    /// Values from one pixel of the tensor to the next.
    pub pixel_stride: usize,
    /// First pixel in the line buffer.
    pub out: *mut f32,
    /// Values from one lane group of the line buffer to the next.
    pub group_stride: usize,
}

impl Line {
    /// Values from a pixel to the same channel of one that is worth prefetching.
    #[inline(always)]
    fn ahead(&self) -> usize {
        fetch_distance(self.pixel_stride, self.channels)
    }

    #[inline(always)]
    unsafe fn place(&self, pixel: usize, channel: usize) -> *mut f32 {
        let at = channel / LANE_GROUP * self.group_stride + pixel * LANE_GROUP + channel % LANE_GROUP;
        // SAFETY: inside the line by the caller's promise.
        unsafe { self.out.add(at) }
    }
}

/// What a line is made of.
///
/// # Safety
/// Implementations hold pointers; whoever makes one answers for these being valid for the line.
pub(super) trait LineSource {
    /// The vectors of `channel` for P pixels, which start at `first`; prefetches those of `line` further on.
    unsafe fn vectors<S: Simd, const P: usize, const WHOLE: bool>(
        &self,
        line: &Line,
        first: usize,
        channel: usize,
        lanes: usize,
    ) -> [S::V; P];
}

#[inline(always)]
unsafe fn fill_pixels<S: Simd, T: LineSource, const P: usize>(line: &Line, source: &T, pixel: usize) {
    let mut channel = 0;
    // SAFETY: inside the line by the caller's promise; a line buffer holds whole lane groups.
    unsafe {
        let first = pixel * line.pixel_stride;
        while channel + S::LANES <= line.channels {
            let vectors = source.vectors::<S, P, true>(line, first + channel, channel, S::LANES);
            let out = line.place(pixel, channel);
            for (i, v) in vectors.into_iter().enumerate() {
                S::store(out.add(i * LANE_GROUP), v);
            }
            channel += S::LANES;
        }
        if channel < line.channels {
            let lanes = line.channels - channel;
            let vectors = source.vectors::<S, P, false>(line, first + channel, channel, lanes);
            let out = line.place(pixel, channel);
            for (i, v) in vectors.into_iter().enumerate() {
                S::store(out.add(i * LANE_GROUP), v);
            }
        }
    }
}

#[inline(always)]
unsafe fn fill_body<S: Simd, T: LineSource>(line: &Line, source: &T) {
    let mut pixel = 0;
    // SAFETY: pixels of the line.
    unsafe {
        while pixel + PIXELS <= line.pixels {
            fill_pixels::<S, T, PIXELS>(line, source, pixel);
            pixel += PIXELS;
        }
        while pixel < line.pixels {
            fill_pixels::<S, T, 1>(line, source, pixel);
            pixel += 1;
        }
    }
}

dispatch! {
    /// Makes a line.
    ///
    /// # Safety
    /// `isa` must be available and all pointers valid.
    pub(super) unsafe fn fill[T: LineSource][T](line: &Line, source: &T) = fill_body;
}

/// `act(scale·raw + shift)`.
#[derive(Debug)]
pub(super) struct ActivatedLine<A, X> {
    pub raw: *const X,
    pub scale: *const f32,
    pub shift: *const f32,
    pub act: PhantomData<A>,
}

impl<A: Activation, X: Stored> LineSource for ActivatedLine<A, X> {
    #[inline(always)]
    unsafe fn vectors<S: Simd, const P: usize, const WHOLE: bool>(
        &self,
        line: &Line,
        first: usize,
        channel: usize,
        lanes: usize,
    ) -> [S::V; P] {
        // SAFETY: inside the line.
        unsafe {
            let scale = load::<S, WHOLE>(self.scale.add(channel), lanes);
            let shift = load::<S, WHOLE>(self.shift.add(channel), lanes);
            let mut out = [S::zero(); P];
            for (i, out) in out.iter_mut().enumerate() {
                let raw = self.raw.add(first + i * line.pixel_stride);
                S::prefetch(raw.wrapping_add(line.ahead()).cast());
                *out = S::fma(load::<S, WHOLE>(raw, lanes), scale, shift);
            }
            A::values::<S, P>(out)
        }
    }
}

/// A tensor as it is.
#[derive(Debug)]
pub(super) struct PlainLine {
    pub values: *const f32,
}

impl LineSource for PlainLine {
    #[inline(always)]
    unsafe fn vectors<S: Simd, const P: usize, const WHOLE: bool>(
        &self,
        line: &Line,
        first: usize,
        _channel: usize,
        lanes: usize,
    ) -> [S::V; P] {
        // SAFETY: inside the line.
        unsafe {
            let mut out = [S::zero(); P];
            for (i, out) in out.iter_mut().enumerate() {
                let values = self.values.add(first + i * line.pixel_stride);
                S::prefetch(values.wrapping_add(line.ahead()));
                *out = load::<S, WHOLE>(values, lanes);
            }
            out
        }
    }
}

/// `act'(scale·y + shift)·(gain·da + offset) + b·y + c`.
#[derive(Debug)]
pub(super) struct GradientLine<A, G, Y> {
    pub da: *const G,
    pub y: *const Y,
    pub scale: *const f32,
    pub shift: *const f32,
    pub gain: *const f32,
    pub offset: *const f32,
    pub b: *const f32,
    pub c: *const f32,
    pub act: PhantomData<A>,
}

impl<A: Activation, G: Stored, Y: Stored> LineSource for GradientLine<A, G, Y> {
    #[inline(always)]
    unsafe fn vectors<S: Simd, const P: usize, const WHOLE: bool>(
        &self,
        line: &Line,
        first: usize,
        channel: usize,
        lanes: usize,
    ) -> [S::V; P] {
        // SAFETY: inside the line.
        unsafe {
            let scale = load::<S, WHOLE>(self.scale.add(channel), lanes);
            let shift = load::<S, WHOLE>(self.shift.add(channel), lanes);
            let gain = load::<S, WHOLE>(self.gain.add(channel), lanes);
            let offset = load::<S, WHOLE>(self.offset.add(channel), lanes);
            let b = load::<S, WHOLE>(self.b.add(channel), lanes);
            let c = load::<S, WHOLE>(self.c.add(channel), lanes);
            let (mut y, mut z) = ([S::zero(); P], [S::zero(); P]);
            for (i, (y, z)) in y.iter_mut().zip(&mut z).enumerate() {
                let at = first + i * line.pixel_stride;
                S::prefetch(self.y.wrapping_add(at + line.ahead()).cast());
                S::prefetch(self.da.wrapping_add(at + line.ahead()).cast());
                *y = load::<S, WHOLE>(self.y.add(at), lanes);
                *z = S::fma(*y, scale, shift);
            }
            let (_, mut out) = A::values_and_slopes::<S, P>(z);
            for (i, (slope, y)) in out.iter_mut().zip(y).enumerate() {
                let da = load::<S, WHOLE>(self.da.add(first + i * line.pixel_stride), lanes);
                *slope = S::fma(*slope, S::fma(da, gain, offset), S::fma(y, b, c));
            }
            out
        }
    }
}

/// One lane group of a few neighbouring pixels, which is activated for the backward tiles.
#[derive(Debug, Clone, Copy)]
pub(super) struct Strip<X> {
    pub pixels: usize,
    /// Channels that exist, up to 16.
    pub channels: usize,
    pub raw: *const X,
    pub pixel_stride: usize,
    pub scale: *const f32,
    pub shift: *const f32,
    /// `[pixels, 16]`.
    pub act: *mut f32,
    /// `[pixels, 16]`.
    pub slope: *mut f32,
    /// Where the first pixel's gradient will be written: fetched, since a store that misses holds up those behind it. An address in
    /// the cache, with a stride of 0, where gradients are streamed.
    pub target: *const u8,
    /// Bytes from one pixel's gradient to the next.
    pub target_stride: usize,
}

/// One vector of P pixels.
#[inline(always)]
unsafe fn activate_pixels<S: Simd, A: Activation, X: Stored, const P: usize, const WHOLE: bool>(
    strip: &Strip<X>,
    first: usize,
    channel: usize,
    lanes: usize,
) {
    // SAFETY: inside the strip.
    unsafe {
        let scale = load::<S, WHOLE>(strip.scale.add(channel), lanes);
        let shift = load::<S, WHOLE>(strip.shift.add(channel), lanes);
        let mut z = [S::zero(); P];
        for (i, z) in z.iter_mut().enumerate() {
            let raw = strip.raw.add((first + i) * strip.pixel_stride + channel);
            S::prefetch(raw.wrapping_add(strip.pixels * strip.pixel_stride).cast());
            S::prefetch(
                strip
                    .target
                    .wrapping_add((first + i) * strip.target_stride)
                    .cast(),
            );
            *z = S::fma(load::<S, WHOLE>(raw, lanes), scale, shift);
        }
        let (acts, slopes) = A::values_and_slopes::<S, P>(z);
        for (i, (act, slope)) in acts.into_iter().zip(slopes).enumerate() {
            let at = (first + i) * LANE_GROUP + channel;
            S::store(strip.act.add(at), act);
            S::store(strip.slope.add(at), slope);
        }
    }
}

#[inline(always)]
unsafe fn activate_strip_vector<S: Simd, A: Activation, X: Stored, const WHOLE: bool>(
    strip: &Strip<X>,
    channel: usize,
    lanes: usize,
) {
    let mut pixel = 0;
    // SAFETY: inside the strip.
    unsafe {
        while pixel + PIXELS <= strip.pixels {
            activate_pixels::<S, A, X, PIXELS, WHOLE>(strip, pixel, channel, lanes);
            pixel += PIXELS;
        }
        while pixel < strip.pixels {
            activate_pixels::<S, A, X, 1, WHOLE>(strip, pixel, channel, lanes);
            pixel += 1;
        }
    }
}

#[inline(always)]
unsafe fn activate_strip_body<S: Simd, A: Activation, X: Stored>(strip: &Strip<X>) {
    let mut channel = 0;
    // SAFETY: inside the strip, whose buffers hold 16 lanes.
    unsafe {
        while channel + S::LANES <= strip.channels {
            activate_strip_vector::<S, A, X, true>(strip, channel, S::LANES);
            channel += S::LANES;
        }
        if channel < strip.channels {
            activate_strip_vector::<S, A, X, false>(strip, channel, strip.channels - channel);
        }
    }
}

dispatch! {
    /// Makes activation and slope of a strip.
    ///
    /// # Safety
    /// `isa` must be available and all pointers valid.
    pub(super) unsafe fn activate_strip[A: Activation, X: Stored][A, X](strip: &Strip<X>) = activate_strip_body;
}

/// A function that [`activate_strip`] gives for an activation.
pub(super) type ActivateStrip<X> = unsafe fn(Isa, &Strip<X>);

/// Sets the pixels of every lane group outside `from..to` to 0.
///
/// # Safety
/// The line must hold `groups` lane groups of `pixels` pixels.
pub(super) unsafe fn clear_margins(
    line: *mut f32,
    groups: usize,
    group_stride: usize,
    (from, to): (usize, usize),
    pixels: usize,
) {
    for group in 0..groups {
        // SAFETY: the caller's promise.
        unsafe {
            let line = line.add(group * group_stride);
            line.write_bytes(0, from * LANE_GROUP);
            line.add(to * LANE_GROUP)
                .write_bytes(0, (pixels - to) * LANE_GROUP);
        }
    }
}
