//! Formats that tensors are stored in; arithmetic is always f32.
//!
//! Conversions round to nearest, ties to even, on every instruction set alike, so stored tensors have the same bits everywhere.
//! float16 keeps its denormals; bfloat16 takes values below 2⁻¹²⁶ as 0, as the processors' own instructions do.

#![allow(
    clippy::missing_safety_doc,
    reason = "all methods need what the method of `Simd` that they call needs"
)]

use effdet_model::engine::Precision;

use crate::arena::Element;
use crate::simd::Simd;

/// IEEE binary16: 11 significant bits, largest value 65504, smallest 6·10⁻⁸.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct F16(pub u16);

/// The upper half of an f32: 8 significant bits, the range of f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Bf16(pub u16);

// SAFETY: both are integers.
unsafe impl Element for F16 {}
// SAFETY: as above.
unsafe impl Element for Bf16 {}

impl F16 {
    /// Rounds to nearest, ties to even; beyond 65520 to infinity.
    pub fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        let sign = (bits >> 16 & 0x8000) as u16;
        let magnitude = bits & 0x7fff_ffff;
        let half = if magnitude > 0x7f80_0000 {
            0x7e00 | (magnitude >> 13 & 0x3ff)
        } else if magnitude >= 0x4780_0000 {
            0x7c00
        } else if magnitude < 0x3880_0000 {
            // Denormal: adding ½ lets the processor round at the last place, 2⁻²⁴.
            (f32::from_bits(magnitude) + 0.5).to_bits() - 0x3f00_0000
        } else {
            let odd = magnitude >> 13 & 1;
            (magnitude - 0x3800_0000 + 0xfff + odd) >> 13
        };
        Self(sign | half as u16)
    }

    /// Exact.
    pub fn to_f32(self) -> f32 {
        let sign = u32::from(self.0 & 0x8000) << 16;
        let magnitude = u32::from(self.0 & 0x7fff);
        let bits = match magnitude {
            0x7c00.. => 0x7f80_0000 | (magnitude & 0x3ff) << 13,
            0x400.. => (magnitude << 13) + 0x3800_0000,
            _ => (magnitude as f32 * f32::from_bits(0x3380_0000)).to_bits(),
        };
        f32::from_bits(sign | bits)
    }
}

impl Bf16 {
    /// Rounds to nearest, ties to even; values below 2⁻¹²⁶ to 0.
    pub fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        if x.is_subnormal() {
            return Self((bits >> 16 & 0x8000) as u16);
        }
        if x.is_nan() {
            return Self((bits >> 16) as u16 | 0x40);
        }
        Self(((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16)
    }

    /// Exact.
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

/// A format that kernels load from and store to.
pub trait Stored: Element + PartialEq + std::fmt::Debug {
    /// Whether values can be written past the caches.
    const STREAMS: bool;

    /// From f32, rounded.
    fn from_f32(x: f32) -> Self;
    /// To f32, exactly.
    fn to_f32(self) -> f32;
    /// The pointer itself, where the format is f32.
    fn as_f32(pointer: *mut Self) -> Option<*mut f32>;
    /// See [`Simd::load`].
    unsafe fn load<S: Simd>(source: *const Self) -> S::V;
    /// See [`Simd::load_partial`].
    unsafe fn load_partial<S: Simd>(source: *const Self, n: usize) -> S::V;
    /// See [`Simd::store`].
    unsafe fn store<S: Simd>(target: *mut Self, v: S::V);
    /// See [`Simd::store_partial`].
    unsafe fn store_partial<S: Simd>(target: *mut Self, v: S::V, n: usize);
    /// See [`Simd::stream`]; an ordinary store where the format does not stream.
    unsafe fn stream<S: Simd>(target: *mut Self, v: S::V);
}

impl Stored for f32 {
    const STREAMS: bool = true;

    fn from_f32(x: f32) -> Self {
        x
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn as_f32(pointer: *mut Self) -> Option<*mut f32> {
        Some(pointer)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(source: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load(source) }
    }
    #[inline(always)]
    unsafe fn load_partial<S: Simd>(source: *const Self, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_partial(source, n) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(target: *mut Self, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { S::store(target, v) }
    }
    #[inline(always)]
    unsafe fn store_partial<S: Simd>(target: *mut Self, v: S::V, n: usize) {
        // SAFETY: the caller's promise.
        unsafe { S::store_partial(target, v, n) }
    }
    #[inline(always)]
    unsafe fn stream<S: Simd>(target: *mut Self, v: S::V) {
        // SAFETY: the caller's promise.
        unsafe { S::stream(target, v) }
    }
}

macro_rules! half {
    ($type:ident, $load:ident, $store:ident) => {
        impl Stored for $type {
            // A vector of halves is no whole cache line, and lines written in pieces cost main memory more than they save.
            const STREAMS: bool = false;

            fn from_f32(x: f32) -> Self {
                Self::from_f32(x)
            }
            fn to_f32(self) -> f32 {
                self.to_f32()
            }
            fn as_f32(_: *mut Self) -> Option<*mut f32> {
                None
            }
            #[inline(always)]
            unsafe fn load<S: Simd>(source: *const Self) -> S::V {
                // SAFETY: the caller's promise.
                unsafe { S::$load(source.cast()) }
            }
            #[inline(always)]
            unsafe fn load_partial<S: Simd>(source: *const Self, n: usize) -> S::V {
                let mut lanes = [0u16; 16];
                // SAFETY: only n <= 16 values are read.
                unsafe {
                    std::ptr::copy_nonoverlapping(source.cast(), lanes.as_mut_ptr(), n);
                    S::$load(lanes.as_ptr())
                }
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(target: *mut Self, v: S::V) {
                // SAFETY: the caller's promise.
                unsafe { S::$store(target.cast(), v) }
            }
            #[inline(always)]
            unsafe fn store_partial<S: Simd>(target: *mut Self, v: S::V, n: usize) {
                let mut lanes = [0u16; 16];
                // SAFETY: only n <= 16 values are written.
                unsafe {
                    S::$store(lanes.as_mut_ptr(), v);
                    std::ptr::copy_nonoverlapping(lanes.as_ptr(), target.cast(), n);
                }
            }
            #[inline(always)]
            unsafe fn stream<S: Simd>(target: *mut Self, v: S::V) {
                // SAFETY: the caller's promise.
                unsafe { Self::store::<S>(target, v) }
            }
        }
    };
}

half!(F16, load_f16, store_f16);
half!(Bf16, load_bf16, store_bf16);

/// What a lane of the operands of a product holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Products {
    /// An f32.
    #[default]
    Single,
    /// Two bfloat16 that follow each other along the index that is summed over, the first in the lower half; the second
    /// product is added first. Sums are f32.
    Bf16Pairs,
    /// The same lanes, in the order of AMX tiles: of 16 lanes each, those of the lower halves are summed apart from those of the
    /// upper ones before both are added to the rest.
    Bf16Tiles,
}

impl Products {
    /// Lanes that hold `depth` values.
    pub(crate) const fn lanes(self, depth: usize) -> usize {
        match self {
            Self::Single => depth,
            Self::Bf16Pairs | Self::Bf16Tiles => depth.div_ceil(2),
        }
    }

    /// Whether a lane holds two values.
    pub(crate) const fn are_paired(self) -> bool {
        !matches!(self, Self::Single)
    }
}

/// What the products of a layer's two passes multiply; f32 in the forward pass of the first half of the backbone, where the 8
/// significant bits of bfloat16 are too few, for many layers amplify what is rounded off there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PassProducts {
    /// Of inputs and weights.
    pub forward: Products,
    /// Of output gradients with weights and with inputs.
    pub backward: Products,
}

impl PassProducts {
    /// f32 in both passes.
    pub const SINGLE: Self = Self {
        forward: Products::Single,
        backward: Products::Single,
    };

    /// What training in `precision` multiplies.
    pub fn of(precision: Precision) -> Self {
        let both = |products| Self {
            forward: products,
            backward: products,
        };
        match precision {
            Precision::Fp32 | Precision::Fp16 => Self::SINGLE,
            Precision::Bf16Pairs => both(Products::Bf16Pairs),
            Precision::Bf16Tiles => both(Products::Bf16Tiles),
        }
    }

    /// The same with f32 in the forward pass.
    pub const fn with_single_forward(self) -> Self {
        Self {
            forward: Products::Single,
            ..self
        }
    }
}

/// The formats of a training step's wide tensors.
pub trait Storage: Send + std::fmt::Debug + 'static {
    /// Outputs of convolutions in front of their batch norm.
    type Activation: Stored;
    /// Gradients by what batch norm puts out.
    type Gradient: Stored;
}

/// float32.
#[derive(Debug, Clone, Copy)]
pub struct Full;

/// float16; gradients of small losses vanish without a loss scale.
#[derive(Debug, Clone, Copy)]
pub struct Half;

/// Gradients as bfloat16. Its 8 significant bits are too few for tensors in front of batch norm, which takes the mean off and
/// leaves the rounding: these are float16.
#[derive(Debug, Clone, Copy)]
pub struct Brain;

impl Storage for Full {
    type Activation = f32;
    type Gradient = f32;
}

impl Storage for Half {
    type Activation = F16;
    type Gradient = F16;
}

impl Storage for Brain {
    type Activation = F16;
    type Gradient = Bf16;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, dispatch_with_bf16};

    #[inline(always)]
    unsafe fn convert_body<S: Simd, T: Stored>(from: &[f32], stored: &mut [T], back: &mut [f32]) {
        let len = from.len();
        // SAFETY: whole vectors, then a partial one.
        unsafe {
            let mut i = 0;
            while i < len {
                let n = S::LANES.min(len - i);
                let v = S::load_partial(from.as_ptr().add(i), n);
                let (to, out) = (stored.as_mut_ptr().add(i), back.as_mut_ptr().add(i));
                if n == S::LANES {
                    T::store::<S>(to, v);
                    S::store(out, T::load::<S>(to));
                } else {
                    T::store_partial::<S>(to, v, n);
                    S::store_partial(out, T::load_partial::<S>(to, n), n);
                }
                i += n;
            }
        }
    }
    dispatch_with_bf16! {
        unsafe fn convert[T: Stored][T](from: &[f32], stored: &mut [T], back: &mut [f32]) = convert_body;
    }

    /// Every exponent with mantissas around the points where rounding changes, in both signs.
    fn awkward() -> Vec<f32> {
        let mut values = Vec::new();
        for exponent in 0..=255u32 {
            for mantissa in [
                0, 1, 0xfff, 0x1000, 0x1001, 0x1fff, 0x2000, 0x2fff, 0x3000, 0x3001, 0x7fff, 0x8000, 0x8001,
                0xffff, 0x1_7fff, 0x1_8000, 0x3f_ffff, 0x40_0000, 0x7f_e000, 0x7f_efff, 0x7f_f000, 0x7f_ffff,
            ] {
                for sign in [0, 1 << 31] {
                    values.push(f32::from_bits(sign | exponent << 23 | mantissa));
                }
            }
        }
        values
    }

    fn check<T: Stored>(is_nan: impl Fn(T) -> bool) {
        let from = awkward();
        for isa in Isa::available() {
            let (mut stored, mut back) = (vec![T::from_f32(0.0); from.len()], vec![0.0; from.len()]);
            // SAFETY: the instruction set is available.
            unsafe { convert(isa, &from, &mut stored, &mut back) };
            for ((&x, &half), &y) in from.iter().zip(&stored).zip(&back) {
                if x.is_nan() {
                    assert!(is_nan(half) && y.is_nan(), "{isa}: {x}");
                } else {
                    assert_eq!(half, T::from_f32(x), "{isa}: {x:e}");
                    assert_eq!(y.to_bits(), half.to_f32().to_bits(), "{isa}: {x:e}");
                }
            }
        }
    }

    #[test]
    fn conversions_have_the_same_bits_on_every_instruction_set() {
        check::<f32>(f32::is_nan);
        check::<F16>(|half| half.to_f32().is_nan());
        check::<Bf16>(|half| half.to_f32().is_nan());
    }

    #[test]
    fn every_half_but_denormal_bfloat16_survives_the_way_to_f32_and_back() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (F16(bits), Bf16(bits));
            if !half.to_f32().is_nan() {
                assert_eq!(F16::from_f32(half.to_f32()), half);
            }
            if !brain.to_f32().is_nan() {
                let sign = Bf16(bits & 0x8000);
                let expected = if brain.to_f32().is_subnormal() {
                    sign
                } else {
                    brain
                };
                assert_eq!(Bf16::from_f32(brain.to_f32()), expected);
            }
        }
    }

    #[test]
    fn rounding_goes_to_the_nearest_half_and_ties_to_the_even_one() {
        for bits in (0..0x7bff).step_by(7) {
            let (low, high) = (F16(bits), F16(bits + 1));
            let (a, b) = (f64::from(low.to_f32()), f64::from(high.to_f32()));
            let middle = ((a + b) / 2.0) as f32;
            let even = if bits % 2 == 0 { low } else { high };
            assert_eq!(F16::from_f32(middle), even, "{bits:04x}");
            assert_eq!(F16::from_f32(f32::from_bits(middle.to_bits() + 1)), high);
            assert_eq!(F16::from_f32(f32::from_bits(middle.to_bits() - 1)), low);
        }
        assert_eq!(F16::from_f32(65_519.99), F16(0x7bff));
        assert_eq!(F16::from_f32(65_520.0), F16(0x7c00));
        assert_eq!(F16::from_f32(1.0), F16(0x3c00));
        assert_eq!(Bf16::from_f32(1.0), Bf16(0x3f80));
        assert_eq!(Bf16::from_f32(1.0 + 1.0 / 256.0), Bf16(0x3f80));
        assert_eq!(Bf16::from_f32(1.0 + 3.0 / 256.0), Bf16(0x3f82));
    }
}
