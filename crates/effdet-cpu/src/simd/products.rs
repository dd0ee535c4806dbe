//! Products of lanes that hold one f32 or two bfloat16.

#[cfg(target_arch = "x86_64")]
use super::{Avx2, Avx512};
use super::{Isa, Simd};

/// How a lane of one operand is multiplied with a lane of the other.
///
/// # Safety
/// As for [`Simd`].
pub(crate) trait Product<S: Simd> {
    /// `sum + a·b`.
    unsafe fn accumulate(a: S::V, b: S::V, sum: S::V) -> S::V;
}

/// Lanes of f32: `a·b + sum`, rounded once.
pub(crate) struct SingleProduct;

impl<S: Simd> Product<S> for SingleProduct {
    #[inline(always)]
    unsafe fn accumulate(a: S::V, b: S::V, sum: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::fma(a, b, sum) }
    }
}

/// Lanes of two bfloat16: the product of the upper halves is added first, then that of the lower ones, each rounded once.
///
/// This is what [`NativePairs`] computes, except that the processor's instruction takes sums below 2⁻¹²⁶ as 0.
pub(crate) struct PairProduct;

impl<S: Simd> Product<S> for PairProduct {
    #[inline(always)]
    unsafe fn accumulate(a: S::V, b: S::V, sum: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let sum = S::fma(S::pair_high(a), S::pair_high(b), sum);
            S::fma(S::pair_low(a), S::pair_low(b), sum)
        }
    }
}

/// Lanes of two bfloat16 with `vdpbf16ps`.
#[cfg(target_arch = "x86_64")]
pub(crate) struct NativePairs;

#[cfg(target_arch = "x86_64")]
impl Product<Avx512> for NativePairs {
    #[inline(always)]
    unsafe fn accumulate(
        a: <Avx512 as Simd>::V,
        b: <Avx512 as Simd>::V,
        sum: <Avx512 as Simd>::V,
    ) -> <Avx512 as Simd>::V {
        use std::arch::x86_64::{__m512, __m512bh, _mm512_dpbf16_ps};
        // SAFETY: the caller promises AVX-512 BF16; all types of 512 bits hold any bits.
        unsafe {
            let pairs = |lanes: __m512| std::mem::transmute::<__m512, __m512bh>(lanes);
            _mm512_dpbf16_ps(sum, pairs(a), pairs(b))
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Product<Avx2> for NativePairs {
    #[inline(always)]
    unsafe fn accumulate(
        a: <Avx2 as Simd>::V,
        b: <Avx2 as Simd>::V,
        sum: <Avx2 as Simd>::V,
    ) -> <Avx2 as Simd>::V {
        use std::arch::x86_64::{__m256, __m256bh, _mm256_dpbf16_ps};
        // SAFETY: the caller promises AVX-512 BF16 and VL; all types of 256 bits hold any bits.
        unsafe {
            let pairs = |lanes: __m256| std::mem::transmute::<__m256, __m256bh>(lanes);
            _mm256_dpbf16_ps(sum, pairs(a), pairs(b))
        }
    }
}

/// Whether products of pairs and rounding to bfloat16 have instructions of their own (AVX-512 BF16) where kernels run on `isa`.
pub(crate) fn has_native_bf16(isa: Isa) -> bool {
    #[cfg(target_arch = "x86_64")]
    return isa == Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = isa;
        false
    }
}
