//! AVX2 with FMA, and AVX-512.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::{POWERS_OF_EIGHTHS, SQRT_HALF_BITS, Simd};

/// 8 lanes: AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub struct Avx2;

/// The vectors of AVX-512, with a way to round to bfloat16.
#[derive(Debug, Clone, Copy)]
pub struct Wide<R>(PhantomData<R>);

/// 16 lanes: AVX-512 F, VL, DQ and BW.
pub type Avx512 = Wide<RoundBySteps>;

/// [`Avx512`] where the processor rounds to bfloat16 by instructions of its own (AVX-512 BF16).
pub type Avx512Bf16 = Wide<RoundByInstruction>;

/// Rounds 16 lanes to bfloat16 as [`Simd`] says.
#[allow(
    clippy::missing_safety_doc,
    reason = "that of the methods of `Simd` of these names"
)]
pub trait Round: Copy + Send + Sync + 'static {
    /// See [`Simd::store_bf16`].
    unsafe fn store(target: *mut u16, v: __m512);
    /// See [`Simd::pair`].
    unsafe fn pair(low: __m512, high: __m512) -> __m512;
    /// See [`Simd::pair_and_store_bf16`].
    unsafe fn pair_and_store(low: __m512, high: __m512, targets: [*mut u16; 2]) -> __m512;
}

/// Rounds with the arithmetic of integers.
#[derive(Debug, Clone, Copy)]
pub struct RoundBySteps;

/// Rounds with the instructions of AVX-512 BF16.
#[derive(Debug, Clone, Copy)]
pub struct RoundByInstruction;

/// Places of halves that lie in turn in two runs of 16.
static INTERLEAVED: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    order
};

/// Eight ones and eight zeros: the mask for n lanes starts at 8 − n.
static MASK: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

#[inline(always)]
unsafe fn mask_8(n: usize) -> __m256i {
    debug_assert!(n <= 8);
    // SAFETY: 8 − n + 8 <= 16 values.
    unsafe { _mm256_loadu_si256(MASK.as_ptr().add(8 - n).cast()) }
}

#[inline(always)]
fn mask_16(n: usize) -> __mmask16 {
    debug_assert!(n <= 16);
    ((1u32 << n) - 1) as __mmask16
}

/// Bits whose upper halves are those of bfloat16 as [`Bf16::from_f32`](crate::storage::Bf16::from_f32) rounds.
#[inline(always)]
unsafe fn rounded_8(v: __m256) -> __m256i {
    // SAFETY: needs AVX2 only.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        // The carry of a NaN would make it infinite.
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
        let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        let rounded = _mm256_blendv_epi8(rounded, quiet, is_nan);
        let sign = _mm256_set1_epi32(i32::MIN);
        let exponent = _mm256_and_si256(bits, _mm256_set1_epi32(0x7f80_0000));
        let is_denormal = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
        _mm256_blendv_epi8(rounded, _mm256_and_si256(bits, sign), is_denormal)
    }
}

/// As [`rounded_8`].
#[inline(always)]
unsafe fn rounded_16(v: __m512) -> __m512i {
    // SAFETY: needs AVX-512 F only.
    unsafe {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        // The carry of a NaN would make it infinite.
        let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x40_0000));
        let is_denormal = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f80_0000));
        _mm512_mask_and_epi32(rounded, is_denormal, bits, _mm512_set1_epi32(i32::MIN))
    }
}

/// Writes the methods that are one intrinsic each.
macro_rules! direct {
    ($($name:ident($($arg:ident),*) = $intrinsic:ident;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: Self::V),*) -> Self::V {
            // SAFETY: the caller promises that the instruction set is available.
            unsafe { $intrinsic($($arg),*) }
        }
    )*};
}

impl Simd for Avx2 {
    type V = __m256;
    type Half = Self;
    const LANES: usize = 8;
    const REGISTERS: usize = 16;

    direct! {
        zero() = _mm256_setzero_ps;
        add(a, b) = _mm256_add_ps;
        sub(a, b) = _mm256_sub_ps;
        mul(a, b) = _mm256_mul_ps;
        div(a, b) = _mm256_div_ps;
        sqrt(a) = _mm256_sqrt_ps;
        fma(a, b, c) = _mm256_fmadd_ps;
        fnma(a, b, c) = _mm256_fnmadd_ps;
        min(a, b) = _mm256_min_ps;
        max(a, b) = _mm256_max_ps;
        floor(a) = _mm256_floor_ps;
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        // SAFETY: needs AVX only.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(source: *const f32) -> Self::V {
        // SAFETY: the caller promises 8 readable values.
        unsafe { _mm256_loadu_ps(source) }
    }
    #[inline(always)]
    unsafe fn store(target: *mut f32, v: Self::V) {
        // SAFETY: the caller promises 8 writable values.
        unsafe { _mm256_storeu_ps(target, v) }
    }
    #[inline(always)]
    unsafe fn load_partial(source: *const f32, n: usize) -> Self::V {
        // SAFETY: masked lanes are not accessed.
        unsafe { _mm256_maskload_ps(source, mask_8(n)) }
    }
    #[inline(always)]
    unsafe fn store_partial(target: *mut f32, v: Self::V, n: usize) {
        // SAFETY: masked lanes are not accessed.
        unsafe { _mm256_maskstore_ps(target, mask_8(n), v) }
    }
    #[inline(always)]
    unsafe fn stream(target: *mut f32, v: Self::V) {
        // SAFETY: the caller promises 8 writable values, aligned.
        unsafe { _mm256_stream_ps(target, v) }
    }
    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> Self::V {
        // SAFETY: the caller promises 8 readable halves.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(source.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(target: *mut u16, v: Self::V) {
        // SAFETY: the caller promises 8 writable halves.
        unsafe {
            let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v);
            _mm_storeu_si128(target.cast(), halves);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(source: *const u16) -> Self::V {
        // SAFETY: the caller promises 8 readable halves.
        unsafe {
            let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(source.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(target: *mut u16, v: Self::V) {
        // SAFETY: the caller promises 8 writable halves.
        unsafe {
            let upper = _mm256_srli_epi32::<16>(rounded_8(v));
            let (low, high) = (
                _mm256_castsi256_si128(upper),
                _mm256_extracti128_si256::<1>(upper),
            );
            _mm_storeu_si128(target.cast(), _mm_packus_epi32(low, high));
        }
    }
    #[inline(always)]
    unsafe fn pair(low: Self::V, high: Self::V) -> Self::V {
        // SAFETY: needs AVX2 only.
        unsafe {
            let (low, high) = (_mm256_srli_epi32::<16>(rounded_8(low)), rounded_8(high));
            _mm256_castsi256_ps(_mm256_blend_epi16::<0b1010_1010>(low, high))
        }
    }
    #[inline(always)]
    unsafe fn pair_low(pairs: Self::V) -> Self::V {
        // SAFETY: needs AVX2 only.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(pairs))) }
    }
    #[inline(always)]
    unsafe fn pair_high(pairs: Self::V) -> Self::V {
        // SAFETY: needs AVX2 only.
        unsafe {
            let zero = _mm256_setzero_si256();
            _mm256_castsi256_ps(_mm256_blend_epi16::<0b1010_1010>(
                zero,
                _mm256_castps_si256(pairs),
            ))
        }
    }
    #[inline(always)]
    unsafe fn prefetch(address: *const f32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }
    #[inline(always)]
    unsafe fn abs(a: Self::V) -> Self::V {
        // SAFETY: needs AVX only.
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
    }
    #[inline(always)]
    unsafe fn select_lt(a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        // SAFETY: needs AVX only.
        unsafe { _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) }
    }
    #[inline(always)]
    unsafe fn shift_to_exponent(a: Self::V) -> Self::V {
        // SAFETY: needs AVX2 only.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(a))) }
    }
    #[inline(always)]
    unsafe fn power_of_eighths(a: Self::V) -> Self::V {
        // SAFETY: needs AVX2 only; the table holds 8 values.
        unsafe {
            let n = _mm256_castps_si256(a);
            let table = _mm256_loadu_si256(POWERS_OF_EIGHTHS.as_ptr().cast());
            let power = _mm256_permutevar8x32_epi32(table, n);
            _mm256_castsi256_ps(_mm256_add_epi32(power, _mm256_slli_epi32::<20>(n)))
        }
    }
    #[inline(always)]
    unsafe fn split_exponent(a: Self::V) -> (Self::V, Self::V) {
        // SAFETY: needs AVX2 only.
        unsafe {
            let bits = _mm256_castps_si256(a);
            let exponent = _mm256_srai_epi32::<23>(_mm256_sub_epi32(bits, _mm256_set1_epi32(SQRT_HALF_BITS)));
            let mantissa = _mm256_sub_epi32(bits, _mm256_slli_epi32::<23>(exponent));
            (_mm256_castsi256_ps(mantissa), _mm256_cvtepi32_ps(exponent))
        }
    }
}

impl<R: Round> Simd for Wide<R> {
    type V = __m512;
    type Half = Avx2;
    const LANES: usize = 16;
    const REGISTERS: usize = 32;

    direct! {
        zero() = _mm512_setzero_ps;
        add(a, b) = _mm512_add_ps;
        sub(a, b) = _mm512_sub_ps;
        mul(a, b) = _mm512_mul_ps;
        div(a, b) = _mm512_div_ps;
        sqrt(a) = _mm512_sqrt_ps;
        fma(a, b, c) = _mm512_fmadd_ps;
        fnma(a, b, c) = _mm512_fnmadd_ps;
        min(a, b) = _mm512_min_ps;
        max(a, b) = _mm512_max_ps;
        abs(a) = _mm512_abs_ps;
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        // SAFETY: needs AVX-512 F only.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(source: *const f32) -> Self::V {
        // SAFETY: the caller promises 16 readable values.
        unsafe { _mm512_loadu_ps(source) }
    }
    #[inline(always)]
    unsafe fn store(target: *mut f32, v: Self::V) {
        // SAFETY: the caller promises 16 writable values.
        unsafe { _mm512_storeu_ps(target, v) }
    }
    #[inline(always)]
    unsafe fn load_partial(source: *const f32, n: usize) -> Self::V {
        // SAFETY: masked lanes are not accessed.
        unsafe { _mm512_maskz_loadu_ps(mask_16(n), source) }
    }
    #[inline(always)]
    unsafe fn store_partial(target: *mut f32, v: Self::V, n: usize) {
        // SAFETY: masked lanes are not accessed.
        unsafe { _mm512_mask_storeu_ps(target, mask_16(n), v) }
    }
    #[inline(always)]
    unsafe fn stream(target: *mut f32, v: Self::V) {
        // SAFETY: the caller promises 16 writable values, aligned.
        unsafe { _mm512_stream_ps(target, v) }
    }
    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> Self::V {
        // SAFETY: the caller promises 16 readable halves.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(source.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(target: *mut u16, v: Self::V) {
        // SAFETY: the caller promises 16 writable halves.
        unsafe {
            let halves = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            _mm256_storeu_si256(target.cast(), halves);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(source: *const u16) -> Self::V {
        // SAFETY: the caller promises 16 readable halves.
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(source.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(target: *mut u16, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { R::store(target, v) }
    }
    #[inline(always)]
    unsafe fn pair(low: Self::V, high: Self::V) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { R::pair(low, high) }
    }
    #[inline(always)]
    unsafe fn pair_and_store_bf16(low: Self::V, high: Self::V, targets: [*mut u16; 2]) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { R::pair_and_store(low, high, targets) }
    }
    #[inline(always)]
    unsafe fn pair_low(pairs: Self::V) -> Self::V {
        // SAFETY: needs AVX-512 F only.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(pairs))) }
    }
    #[inline(always)]
    unsafe fn pair_high(pairs: Self::V) -> Self::V {
        // SAFETY: needs AVX-512 BW only.
        unsafe { _mm512_castsi512_ps(_mm512_maskz_mov_epi16(0xaaaa_aaaa, _mm512_castps_si512(pairs))) }
    }
    #[inline(always)]
    unsafe fn prefetch(address: *const f32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }
    #[inline(always)]
    unsafe fn floor(a: Self::V) -> Self::V {
        // SAFETY: needs AVX-512 F only.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    unsafe fn select_lt(a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        // SAFETY: needs AVX-512 F only.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes) }
    }
    #[inline(always)]
    unsafe fn shift_to_exponent(a: Self::V) -> Self::V {
        // SAFETY: needs AVX-512 F only.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(a))) }
    }
    #[inline(always)]
    unsafe fn power_of_eighths(a: Self::V) -> Self::V {
        // SAFETY: needs AVX-512 F only; the table holds 8 values.
        unsafe {
            let n = _mm512_castps_si512(a);
            let table = _mm512_broadcast_i64x4(_mm256_loadu_si256(POWERS_OF_EIGHTHS.as_ptr().cast()));
            let power = _mm512_permutexvar_epi32(n, table);
            _mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_slli_epi32::<20>(n)))
        }
    }
    #[inline(always)]
    unsafe fn split_exponent(a: Self::V) -> (Self::V, Self::V) {
        // SAFETY: needs AVX-512 F only.
        unsafe {
            let bits = _mm512_castps_si512(a);
            let exponent = _mm512_srai_epi32::<23>(_mm512_sub_epi32(bits, _mm512_set1_epi32(SQRT_HALF_BITS)));
            let mantissa = _mm512_sub_epi32(bits, _mm512_slli_epi32::<23>(exponent));
            (_mm512_castsi512_ps(mantissa), _mm512_cvtepi32_ps(exponent))
        }
    }
}

impl Round for RoundBySteps {
    #[inline(always)]
    unsafe fn store(target: *mut u16, v: __m512) {
        // SAFETY: the caller promises 16 writable halves.
        unsafe {
            let halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded_16(v)));
            _mm256_storeu_si256(target.cast(), halves);
        }
    }
    #[inline(always)]
    unsafe fn pair(low: __m512, high: __m512) -> __m512 {
        // SAFETY: needs AVX-512 BW only.
        unsafe {
            let (low, high) = (_mm512_srli_epi32::<16>(rounded_16(low)), rounded_16(high));
            _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaa_aaaa, low, high))
        }
    }
    #[inline(always)]
    unsafe fn pair_and_store(low: __m512, high: __m512, targets: [*mut u16; 2]) -> __m512 {
        // SAFETY: the caller promises twice 16 writable halves.
        unsafe {
            Self::store(targets[0], low);
            Self::store(targets[1], high);
            Self::pair(low, high)
        }
    }
}

impl Round for RoundByInstruction {
    #[inline(always)]
    unsafe fn store(target: *mut u16, v: __m512) {
        // SAFETY: the caller promises 16 writable halves; all types of 256 bits hold any bits.
        unsafe {
            let halves = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
            _mm256_storeu_si256(target.cast(), halves);
        }
    }
    #[inline(always)]
    unsafe fn pair(low: __m512, high: __m512) -> __m512 {
        // SAFETY: needs AVX-512 BF16 and BW only.
        unsafe { interleaved(both_halves(low, high)) }
    }
    #[inline(always)]
    unsafe fn pair_and_store(low: __m512, high: __m512, targets: [*mut u16; 2]) -> __m512 {
        // SAFETY: the caller promises twice 16 writable halves.
        unsafe {
            let halves = both_halves(low, high);
            _mm256_storeu_si256(targets[0].cast(), _mm512_castsi512_si256(halves));
            _mm256_storeu_si256(targets[1].cast(), _mm512_extracti64x4_epi64::<1>(halves));
            interleaved(halves)
        }
    }
}

/// Sixteen bfloat16 of `low`, then those of `high`.
#[inline(always)]
unsafe fn both_halves(low: __m512, high: __m512) -> __m512i {
    // SAFETY: needs AVX-512 BF16 only; all types of 512 bits hold any bits.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Pairs of the n-th of the first sixteen halves and the n-th of the others.
#[inline(always)]
unsafe fn interleaved(halves: __m512i) -> __m512 {
    // SAFETY: needs AVX-512 BW only.
    unsafe {
        let order = _mm512_loadu_si512(INTERLEAVED.as_ptr().cast());
        _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves))
    }
}
