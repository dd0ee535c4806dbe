//! Vectors of f32 behind one trait, and the run-time choice of an instruction set.
//!
//! A kernel is written once as an `#[inline(always)] unsafe fn body<S: Simd>(..)` and instantiated for every instruction
//! set by the macro `dispatch!`. Vectors run over channels only and every sum over another index runs in program order with fused
//! multiply-add, so all instruction sets give the same bits: [`Simd`] promises identical results lane by lane, NaN payloads
//! aside.

use std::fmt;
use std::str::FromStr;

use crate::storage::{Bf16, F16};

#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod products;
mod tiles;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
pub use neon::Neon;
pub use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use products::NativePairs;
pub(crate) use products::{PairProduct, Product, SingleProduct, has_native_bf16};
pub(crate) use tiles::has_tiles;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use tiles::{configure as configure_tiles, release as release_tiles};
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512, Avx512Bf16};

/// The bits of 2^(j/8) for the 8 j, less `j << 20`: adding `n << 20` for n = 8k + j leaves those of 2^(j/8)·2ᵏ.
const POWERS_OF_EIGHTHS: [u32; 8] = {
    let powers = [
        1.0f32,
        1.090_507_7,
        1.189_207_1,
        1.296_839_6,
        std::f32::consts::SQRT_2,
        1.542_210_8,
        1.681_792_8,
        1.834_008_1,
    ];
    let mut bits = [0; 8];
    let mut j = 0;
    while j < 8 {
        bits[j] = powers[j].to_bits() - ((j as u32) << 20);
        j += 1;
    }
    bits
};

/// A vector of [`LANES`](Simd::LANES) f32.
///
/// # Safety
/// Every method may be called only on a processor that has the instruction set; the methods with pointers need these to
/// be valid for the lanes they touch (no alignment needed unless stated).
#[allow(
    clippy::missing_safety_doc,
    reason = "the contract is the same for all methods and stated on the trait"
)]
pub trait Simd: Copy + Send + Sync + 'static {
    /// The vector.
    type V: Copy;
    /// Number of f32 in a vector; divides 16.
    const LANES: usize;
    /// Number of vector registers.
    const REGISTERS: usize;
    /// The vector of half the width where the instruction set has one, otherwise `Self`.
    type Half: Simd;

    /// All lanes 0.
    unsafe fn zero() -> Self::V;
    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self::V;
    /// Loads `LANES` values.
    unsafe fn load(source: *const f32) -> Self::V;
    /// Stores `LANES` values.
    unsafe fn store(target: *mut f32, v: Self::V);
    /// Loads `n <= LANES` values into the first lanes, 0 into the others; touches no memory past `source + n`.
    unsafe fn load_partial(source: *const f32, n: usize) -> Self::V;
    /// Stores the first `n <= LANES` lanes; touches no memory past `target + n`.
    unsafe fn store_partial(target: *mut f32, v: Self::V, n: usize);
    /// Stores past the caches; `target` must be aligned to the vector's size. [`Pool`](crate::pool::Pool) fences after
    /// each task.
    unsafe fn stream(target: *mut f32, v: Self::V);
    /// Loads `LANES` halves of IEEE binary16.
    unsafe fn load_f16(source: *const u16) -> Self::V {
        // SAFETY: the caller promises LANES readable halves.
        unsafe { load_lanes::<Self>(source, |bits| F16(bits).to_f32()) }
    }
    /// Stores as IEEE binary16, rounded to nearest, ties to even.
    unsafe fn store_f16(target: *mut u16, v: Self::V) {
        // SAFETY: the caller promises LANES writable halves.
        unsafe { store_lanes::<Self>(target, v, |x| F16::from_f32(x).0) }
    }
    /// Loads `LANES` upper halves of f32.
    unsafe fn load_bf16(source: *const u16) -> Self::V {
        // SAFETY: the caller promises LANES readable halves.
        unsafe { load_lanes::<Self>(source, |bits| Bf16(bits).to_f32()) }
    }
    /// Stores upper halves of f32, rounded as by [`Bf16::from_f32`].
    unsafe fn store_bf16(target: *mut u16, v: Self::V) {
        // SAFETY: the caller promises LANES writable halves.
        unsafe { store_lanes::<Self>(target, v, |x| Bf16::from_f32(x).0) }
    }
    /// Rounds both to bfloat16 and puts them into one lane, `low` into its lower half.
    unsafe fn pair(low: Self::V, high: Self::V) -> Self::V {
        // SAFETY: no more than the caller promises.
        unsafe {
            zip_lanes::<Self>(low, high, |low, high| {
                let [low, high] = [low, high].map(|x| u32::from(Bf16::from_f32(x).0));
                f32::from_bits(high << 16 | low)
            })
        }
    }
    /// [`pair`](Self::pair) that also stores the two rows of `LANES` bfloat16 it is made of.
    unsafe fn pair_and_store_bf16(low: Self::V, high: Self::V, targets: [*mut u16; 2]) -> Self::V {
        // SAFETY: no more than the caller promises.
        unsafe {
            Self::store_bf16(targets[0], low);
            Self::store_bf16(targets[1], high);
            Self::pair(low, high)
        }
    }
    /// The lower halves of pairs.
    unsafe fn pair_low(pairs: Self::V) -> Self::V {
        // SAFETY: no more than the caller promises.
        unsafe { zip_lanes::<Self>(pairs, pairs, |pair, _| f32::from_bits(pair.to_bits() << 16)) }
    }
    /// The upper halves of pairs.
    unsafe fn pair_high(pairs: Self::V) -> Self::V {
        // SAFETY: no more than the caller promises.
        unsafe {
            zip_lanes::<Self>(pairs, pairs, |pair, _| {
                f32::from_bits(pair.to_bits() & 0xffff_0000)
            })
        }
    }
    /// Asks for the cache line at `address` to be brought to L2; any address is allowed.
    unsafe fn prefetch(address: *const f32);

    /// `a + b`.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// `a − b`.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// `a·b`.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`, correctly rounded.
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `√a`, correctly rounded.
    unsafe fn sqrt(a: Self::V) -> Self::V;
    /// `a·b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `c − a·b`, rounded once.
    unsafe fn fnma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `if a < b { a } else { b }`: `b` where either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`: `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `|a|`.
    unsafe fn abs(a: Self::V) -> Self::V;
    /// The largest integer not above `a`.
    unsafe fn floor(a: Self::V) -> Self::V;
    /// `if a < b { yes } else { no }`: `no` where either is NaN.
    unsafe fn select_lt(a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// The bits of each lane shifted left by 23: makes 2ⁿ out of a float whose lowest 8 bits hold n + 127.
    unsafe fn shift_to_exponent(a: Self::V) -> Self::V;
    /// 2^(n/8) out of a float whose lowest 12 bits hold n modulo 4096, for −1008 <= n < 1024.
    unsafe fn power_of_eighths(a: Self::V) -> Self::V;
    /// `(m, e)` with `a = m·2ᵉ`, m in [√½, √2) and e integral, for finite normal `a > 0`.
    unsafe fn split_exponent(a: Self::V) -> (Self::V, Self::V);
}

#[inline(always)]
unsafe fn load_lanes<S: Simd>(source: *const u16, convert: impl Fn(u16) -> f32) -> S::V {
    let mut lanes = [0.0f32; 16];
    for (i, lane) in lanes.iter_mut().enumerate().take(S::LANES) {
        // SAFETY: the caller promises LANES readable halves.
        *lane = convert(unsafe { source.add(i).read() });
    }
    // SAFETY: 16 values are at least LANES.
    unsafe { S::load(lanes.as_ptr()) }
}

#[inline(always)]
unsafe fn store_lanes<S: Simd>(target: *mut u16, v: S::V, convert: impl Fn(f32) -> u16) {
    let mut lanes = [0.0f32; 16];
    // SAFETY: 16 values are at least LANES, and the caller promises LANES writable halves.
    unsafe {
        S::store(lanes.as_mut_ptr(), v);
        for (i, &lane) in lanes.iter().enumerate().take(S::LANES) {
            target.add(i).write(convert(lane));
        }
    }
}

#[inline(always)]
unsafe fn zip_lanes<S: Simd>(a: S::V, b: S::V, f: impl Fn(f32, f32) -> f32) -> S::V {
    let (mut a_lanes, mut b_lanes) = ([0.0f32; 16], [0.0f32; 16]);
    // SAFETY: 16 values are at least LANES.
    unsafe {
        S::store(a_lanes.as_mut_ptr(), a);
        S::store(b_lanes.as_mut_ptr(), b);
        for (a, b) in a_lanes.iter_mut().zip(b_lanes) {
            *a = f(*a, b);
        }
        S::load(a_lanes.as_ptr())
    }
}

/// Bits of √½, the lower end of the mantissas of [`Simd::split_exponent`].
const SQRT_HALF_BITS: i32 = 0x3f35_04f3;

/// An instruction set that the kernels are built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust with `f32::mul_add`; runs everywhere, slowly.
    Portable,
    /// x86-64 with AVX2, FMA and F16C: 8 lanes.
    Avx2,
    /// x86-64 with AVX-512 F, VL, DQ and BW: 16 lanes.
    Avx512,
    /// AArch64 Advanced SIMD: 4 lanes.
    Neon,
}

impl Isa {
    const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Neon];

    /// The fastest instruction set of this processor.
    pub fn detect() -> Self {
        [Isa::Avx512, Isa::Avx2, Isa::Neon]
            .into_iter()
            .find(|isa| isa.is_available())
            .unwrap_or(Isa::Portable)
    }

    /// All instruction sets that this processor can run, slowest first.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this processor can run it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            #[allow(unreachable_patterns, reason = "which variants remain depends on the target")]
            _ => false,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no instruction set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown instruction set {0:?}: use portable, avx2, avx512 or neon")]
pub struct UnknownIsa(String);

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| UnknownIsa(name.to_owned()))
    }
}

/// Sums 16 values in a fixed tree, so that a sum across lanes does not depend on the vector's width.
pub fn sum_16(mut lanes: [f32; 16]) -> f32 {
    let mut half = 8;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Instantiates a kernel body for every instruction set and makes the function that picks one at run time.
///
/// ```text
/// #[inline(always)]
/// unsafe fn scale_body<S: Simd>(factor: f32, x: &mut [f32]) { .. }
///
/// dispatch! {
///     /// Multiplies `x` by `factor`.
///     ///
///     /// # Safety
///     /// `isa` must be available on this processor.
///     pub(crate) unsafe fn scale(factor: f32, x: &mut [f32]) = scale_body;
/// }
/// // unsafe { scale(isa, 2.0, &mut x) }
/// ```
///
/// The made function takes the [`Isa`](crate::simd::Isa) before the other arguments. Further generics go in brackets, once
/// as declared and once as used, after which the body is `body::<S, A>`: `unsafe fn act[A: Activation][A](..) = act_body;`.
/// Call it inside the pool's closure, once per block of work: the body must be inlined into the instantiation, so a closure
/// that is run by the pool cannot itself be the body.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis unsafe fn $name:ident $([$($declared:tt)*] [$($used:ident),*])?
     ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident;) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "one more than the body has")]
        $vis unsafe fn $name $(<$($declared)*>)? (isa: $crate::simd::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2 $(<$($declared)*>)? ($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the features are enabled here; the rest is the caller's promise to the body.
                unsafe { $body::<$crate::simd::Avx2 $(, $($used),*)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw")]
            unsafe fn avx512 $(<$($declared)*>)? ($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as above.
                unsafe { $body::<$crate::simd::Avx512 $(, $($used),*)?>($($arg),*) }
            }
            // SAFETY: the caller promises that the instruction set is available and what the body asks for.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::simd::Isa::Avx2 => avx2 $(::<$($used),*>)? ($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::simd::Isa::Avx512 => avx512 $(::<$($used),*>)? ($($arg),*),
                    #[cfg(target_arch = "aarch64")]
                    $crate::simd::Isa::Neon => $body::<$crate::simd::Neon $(, $($used),*)?>($($arg),*),
                    _ => $body::<$crate::simd::Portable $(, $($used),*)?>($($arg),*),
                }
            }
        }
    };
}
pub(crate) use dispatch;

/// [`dispatch!`] with one more instantiation, for processors that round to bfloat16 by instructions of their own.
macro_rules! dispatch_with_bf16 {
    ($(#[$meta:meta])* $vis:vis unsafe fn $name:ident $([$($declared:tt)*] [$($used:ident),*])?
     ($($arg:ident : $ty:ty),* $(,)?) = $body:ident;) => {
        $(#[$meta])*
        $vis unsafe fn $name $(<$($declared)*>)? (isa: $crate::simd::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16")]
            unsafe fn bf16 $(<$($declared)*>)? ($($arg: $ty),*) {
                // SAFETY: the features are enabled here; the rest is the caller's promise to the body.
                unsafe { $body::<$crate::simd::Avx512Bf16 $(, $($used),*)?>($($arg),*) }
            }
            $crate::simd::dispatch! {
                unsafe fn others $([$($declared)*] [$($used),*])? ($($arg: $ty),*) = $body;
            }
            #[cfg(target_arch = "x86_64")]
            if $crate::simd::has_native_bf16(isa) {
                // SAFETY: the processor has the instructions; the rest is the caller's promise.
                return unsafe { bf16 $(::<$($used),*>)? ($($arg),*) };
            }
            // SAFETY: the caller's promise.
            unsafe { others $(::<$($used),*>)? (isa, $($arg),*) }
        }
    };
}
pub(crate) use dispatch_with_bf16;

#[cfg(test)]
mod tests {
    use super::*;

    /// Results of every operation on some awkward values, as bits with all NaNs made equal.
    #[inline(always)]
    unsafe fn all_operations_body<S: Simd>(out: &mut Vec<u32>) {
        let values = [
            0.0,
            -0.0,
            1.0,
            -1.5,
            2.5,
            1e-30,
            -3e7,
            7e20,
            1e-41,
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            0.75,
            5.5,
            -2.5,
            123.456,
        ];
        let positive: [f32; 16] = std::array::from_fn(|i| 0.3 * 1.7f32.powi(3 * i as i32 - 20));
        // SAFETY: the arrays hold 16 values, a multiple of the lanes.
        unsafe {
            let mut keep = |v: S::V| {
                let mut lanes = [0.0f32; 16];
                S::store(lanes.as_mut_ptr(), v);
                out.extend(
                    lanes[..S::LANES]
                        .iter()
                        .map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }),
                );
            };
            type Operation<V> = fn(V, V) -> V;
            let operations: [Operation<S::V>; 16] = [
                |a, b| S::add(a, b),
                |a, b| S::sub(a, b),
                |a, b| S::mul(a, b),
                |a, b| S::div(a, b),
                |a, _| S::sqrt(a),
                |a, b| S::fma(a, b, a),
                |a, b| S::fnma(a, b, b),
                |a, b| S::min(a, b),
                |a, b| S::max(a, b),
                |a, _| S::abs(a),
                |a, _| S::floor(a),
                |a, b| S::select_lt(a, b, S::splat(1.0), S::splat(2.0)),
                |a, _| S::shift_to_exponent(a),
                |a, b| S::pair(a, b),
                |a, b| S::pair_low(S::pair(a, b)),
                |a, b| S::pair_high(S::pair(a, b)),
            ];
            for operation in operations {
                for shift in 0..16 {
                    let mut rotated = values;
                    rotated.rotate_left(shift);
                    for i in (0..16).step_by(S::LANES) {
                        keep(operation(
                            S::load(values.as_ptr().add(i)),
                            S::load(rotated.as_ptr().add(i)),
                        ));
                    }
                }
            }
            for first in (-1008..1024).step_by(S::LANES) {
                let eighths: [f32; 16] =
                    std::array::from_fn(|i| f32::from_bits((first + i as i32) as u32 & 0xfff));
                keep(S::power_of_eighths(S::load(eighths.as_ptr())));
            }
            for i in (0..16).step_by(S::LANES) {
                keep(S::split_exponent(S::load(positive.as_ptr().add(i))).0);
            }
            for i in (0..16).step_by(S::LANES) {
                keep(S::split_exponent(S::load(positive.as_ptr().add(i))).1);
            }
        }
    }
    dispatch! { unsafe fn all_operations(out: &mut Vec<u32>) = all_operations_body; }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let run = |isa| {
            let mut out = Vec::new();
            // SAFETY: only available instruction sets are asked for.
            unsafe { all_operations(isa, &mut out) };
            out
        };
        let expected = run(Isa::Portable);
        assert_eq!(expected.len(), 16 * 256 + (1024 + 1008) + 32);
        for isa in Isa::available() {
            assert_eq!(run(isa), expected, "{isa}");
        }
    }

    #[test]
    fn powers_of_eighths_are_correctly_rounded() {
        for n in -1008..1024 {
            let counted = f32::from_bits(n as u32 & 0xfff);
            // SAFETY: plain Rust is always available.
            let power = unsafe { Portable::power_of_eighths(Portable::splat(counted)) };
            assert_eq!(power[0], (f64::from(n) / 8.0).exp2() as f32, "{n}/8");
        }
    }

    #[inline(always)]
    unsafe fn partial_body<S: Simd>(n: usize) -> [f32; 18] {
        let source: [f32; 16] = std::array::from_fn(|i| i as f32 + 1.0);
        let mut out = [-1.0; 18];
        let n = n.min(S::LANES);
        // SAFETY: n is at most LANES <= 16.
        unsafe {
            let v = S::load_partial(source.as_ptr(), n);
            S::store(out.as_mut_ptr(), v);
            S::store_partial(out.as_mut_ptr(), S::splat(9.0), n / 2);
        }
        out
    }
    dispatch! { unsafe fn partial(n: usize) -> [f32; 18] = partial_body; }

    #[test]
    fn partial_loads_zero_the_rest_and_partial_stores_leave_it() {
        for isa in Isa::available() {
            for n in 0..=4 {
                // SAFETY: the instruction set is available.
                let out = unsafe { partial(isa, n) };
                for (i, &x) in out.iter().enumerate().take(4) {
                    let expected = if i < n / 2 {
                        9.0
                    } else if i < n {
                        i as f32 + 1.0
                    } else {
                        0.0
                    };
                    assert_eq!(x, expected, "{isa}, n = {n}, lane {i}");
                }
                assert_eq!(out[16..], [-1.0; 2]);
            }
        }
    }

    #[test]
    fn names_parse_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        assert!("sse9".parse::<Isa>().is_err());
        assert!(Isa::available().contains(&Isa::detect()));
    }

    #[test]
    fn the_lane_tree_adds_halves() {
        let lanes: [f32; 16] = std::array::from_fn(|i| (1 << i) as f32);
        assert_eq!(sum_16(lanes), 65535.0);
    }
}
