//! AArch64 Advanced SIMD.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{POWERS_OF_EIGHTHS, SQRT_HALF_BITS, Simd};

/// 4 lanes: AArch64 Advanced SIMD.
#[derive(Debug, Clone, Copy)]
pub struct Neon;

/// Bits whose upper halves are those of bfloat16 as [`Bf16::from_f32`](crate::storage::Bf16::from_f32) rounds.
#[inline(always)]
unsafe fn rounded(v: float32x4_t) -> uint32x4_t {
    // SAFETY: the instruction set is part of every AArch64 target with `std`.
    unsafe {
        let bits = vreinterpretq_u32_f32(v);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        // The carry of a NaN would make it infinite.
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x40_0000));
        let rounded = vbslq_u32(vceqq_f32(v, v), rounded, quiet);
        let sign = vandq_u32(bits, vdupq_n_u32(0x8000_0000));
        // Some bit of the exponent is set.
        let is_normal = vtstq_u32(bits, vdupq_n_u32(0x7f80_0000));
        vbslq_u32(is_normal, rounded, sign)
    }
}

/// Writes the methods that are one intrinsic each; the instruction set is part of every AArch64 target with `std`.
macro_rules! direct {
    ($($name:ident($($arg:ident),*) = $intrinsic:ident;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: Self::V),*) -> Self::V {
            // SAFETY: the caller promises that the instruction set is available.
            unsafe { $intrinsic($($arg),*) }
        }
    )*};
}

impl Simd for Neon {
    type V = float32x4_t;
    type Half = Self;
    const LANES: usize = 4;
    const REGISTERS: usize = 32;

    direct! {
        add(a, b) = vaddq_f32;
        sub(a, b) = vsubq_f32;
        mul(a, b) = vmulq_f32;
        div(a, b) = vdivq_f32;
        sqrt(a) = vsqrtq_f32;
        abs(a) = vabsq_f32;
        floor(a) = vrndmq_f32;
    }
    #[inline(always)]
    unsafe fn zero() -> Self::V {
        // SAFETY: available by the caller's promise.
        unsafe { vdupq_n_f32(0.0) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        // SAFETY: as above.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(source: *const f32) -> Self::V {
        // SAFETY: the caller promises 4 readable values.
        unsafe { vld1q_f32(source) }
    }
    #[inline(always)]
    unsafe fn store(target: *mut f32, v: Self::V) {
        // SAFETY: the caller promises 4 writable values.
        unsafe { vst1q_f32(target, v) }
    }
    #[inline(always)]
    unsafe fn load_partial(source: *const f32, n: usize) -> Self::V {
        let mut lanes = [0.0f32; 4];
        // SAFETY: only n <= 4 values are read.
        unsafe {
            std::ptr::copy_nonoverlapping(source, lanes.as_mut_ptr(), n);
            vld1q_f32(lanes.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_partial(target: *mut f32, v: Self::V, n: usize) {
        let mut lanes = [0.0f32; 4];
        // SAFETY: only n <= 4 values are written.
        unsafe {
            vst1q_f32(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), target, n);
        }
    }
    #[inline(always)]
    unsafe fn stream(target: *mut f32, v: Self::V) {
        // SAFETY: as for `store`; there is no non-temporal store intrinsic here.
        unsafe { vst1q_f32(target, v) }
    }
    // The conversions of binary16 are part of every AArch64; their intrinsics are younger than the oldest compiler supported.
    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> Self::V {
        // SAFETY: the caller promises 4 readable halves; the instruction touches its two registers only.
        unsafe {
            let halves = vld1_u16(source);
            let v: float32x4_t;
            asm!(
                "fcvtl {v:v}.4s, {halves:v}.4h",
                v = lateout(vreg) v,
                halves = in(vreg) halves,
                options(pure, nomem, nostack, preserves_flags)
            );
            v
        }
    }
    #[inline(always)]
    unsafe fn store_f16(target: *mut u16, v: Self::V) {
        // SAFETY: the caller promises 4 writable halves; the instruction touches its two registers only.
        unsafe {
            let halves: uint16x4_t;
            asm!(
                "fcvtn {halves:v}.4h, {v:v}.4s",
                halves = lateout(vreg) halves,
                v = in(vreg) v,
                options(pure, nomem, nostack, preserves_flags)
            );
            vst1_u16(target, halves);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(source: *const u16) -> Self::V {
        // SAFETY: the caller promises 4 readable halves.
        unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(source)))) }
    }
    #[inline(always)]
    unsafe fn store_bf16(target: *mut u16, v: Self::V) {
        // SAFETY: the caller promises 4 writable halves.
        unsafe { vst1_u16(target, vshrn_n_u32::<16>(rounded(v))) }
    }
    #[inline(always)]
    unsafe fn pair(low: Self::V, high: Self::V) -> Self::V {
        // SAFETY: available by the caller's promise.
        unsafe { vreinterpretq_f32_u32(vsriq_n_u32::<16>(rounded(high), rounded(low))) }
    }
    #[inline(always)]
    unsafe fn pair_low(pairs: Self::V) -> Self::V {
        // SAFETY: as above.
        unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vreinterpretq_u32_f32(pairs))) }
    }
    #[inline(always)]
    unsafe fn pair_high(pairs: Self::V) -> Self::V {
        // SAFETY: as above.
        unsafe {
            let bits = vandq_u32(vreinterpretq_u32_f32(pairs), vdupq_n_u32(0xffff_0000));
            vreinterpretq_f32_u32(bits)
        }
    }
    #[inline(always)]
    unsafe fn prefetch(_address: *const f32) {}
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: available by the caller's promise.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn fnma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: as above.
        unsafe { vfmsq_f32(c, a, b) }
    }
    // FMIN and FMAX treat NaN and signed zeros differently from x86, hence compare and select.
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: as above.
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: as above.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    unsafe fn select_lt(a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        // SAFETY: as above.
        unsafe { vbslq_f32(vcltq_f32(a, b), yes, no) }
    }
    #[inline(always)]
    unsafe fn shift_to_exponent(a: Self::V) -> Self::V {
        // SAFETY: as above.
        unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vreinterpretq_s32_f32(a))) }
    }
    #[inline(always)]
    unsafe fn power_of_eighths(a: Self::V) -> Self::V {
        // SAFETY: as above; the table is 32 bytes.
        unsafe {
            let n = vreinterpretq_u32_f32(a);
            let table = vld1q_u8_x2(POWERS_OF_EIGHTHS.as_ptr().cast());
            // The four bytes of entry j are 4j, 4j + 1, 4j + 2 and 4j + 3.
            let j = vandq_u32(n, vdupq_n_u32(7));
            let bytes = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), j, 0x0404_0404);
            let power = vreinterpretq_u32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u32(bytes)));
            vreinterpretq_f32_u32(vaddq_u32(power, vshlq_n_u32::<20>(n)))
        }
    }
    #[inline(always)]
    unsafe fn split_exponent(a: Self::V) -> (Self::V, Self::V) {
        // SAFETY: as above.
        unsafe {
            let bits = vreinterpretq_s32_f32(a);
            let exponent = vshrq_n_s32::<23>(vsubq_s32(bits, vdupq_n_s32(SQRT_HALF_BITS)));
            let mantissa = vsubq_s32(bits, vshlq_n_s32::<23>(exponent));
            (vreinterpretq_f32_s32(mantissa), vcvtq_f32_s32(exponent))
        }
    }
}
