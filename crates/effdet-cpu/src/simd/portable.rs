//! Plain Rust, 8 lanes.

use super::{POWERS_OF_EIGHTHS, SQRT_HALF_BITS, Simd};

/// Plain Rust with `f32::mul_add`, the yardstick for the other instruction sets.
#[derive(Debug, Clone, Copy)]
pub struct Portable;

const N: usize = 8;

#[inline(always)]
fn map(a: [f32; N], f: impl Fn(f32) -> f32) -> [f32; N] {
    a.map(f)
}

#[inline(always)]
fn zip(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = [f32; N];
    type Half = Self;
    const LANES: usize = N;
    const REGISTERS: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; N]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(source: *const f32) -> Self::V {
        // SAFETY: the caller promises 8 readable values.
        unsafe { source.cast::<[f32; N]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(target: *mut f32, v: Self::V) {
        // SAFETY: the caller promises 8 writable values.
        unsafe { target.cast::<[f32; N]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_partial(source: *const f32, n: usize) -> Self::V {
        // SAFETY: only lanes below n are read.
        std::array::from_fn(|i| if i < n { unsafe { *source.add(i) } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store_partial(target: *mut f32, v: Self::V, n: usize) {
        for (i, x) in v.into_iter().enumerate().take(n) {
            // SAFETY: only lanes below n are written.
            unsafe { *target.add(i) = x }
        }
    }
    #[inline(always)]
    unsafe fn stream(target: *mut f32, v: Self::V) {
        // SAFETY: as for `store`.
        unsafe { Self::store(target, v) }
    }
    #[inline(always)]
    unsafe fn prefetch(_address: *const f32) {}

    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn sqrt(a: Self::V) -> Self::V {
        map(a, f32::sqrt)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn fnma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| (-a[i]).mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn abs(a: Self::V) -> Self::V {
        map(a, f32::abs)
    }
    #[inline(always)]
    unsafe fn floor(a: Self::V) -> Self::V {
        map(a, f32::floor)
    }
    #[inline(always)]
    unsafe fn select_lt(a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    unsafe fn shift_to_exponent(a: Self::V) -> Self::V {
        map(a, |x| f32::from_bits(x.to_bits() << 23))
    }
    #[inline(always)]
    unsafe fn power_of_eighths(a: Self::V) -> Self::V {
        map(a, |x| {
            let n = x.to_bits();
            f32::from_bits(POWERS_OF_EIGHTHS[(n % 8) as usize].wrapping_add(n << 20))
        })
    }
    #[inline(always)]
    unsafe fn split_exponent(a: Self::V) -> (Self::V, Self::V) {
        let exponent = |x: f32| (x.to_bits() as i32).wrapping_sub(SQRT_HALF_BITS) >> 23;
        (
            map(a, |x| {
                f32::from_bits((x.to_bits() as i32).wrapping_sub(exponent(x) << 23) as u32)
            }),
            map(a, |x| exponent(x) as f32),
        )
    }
}
