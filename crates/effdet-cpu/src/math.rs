//! Elementary functions and activations on vectors; the same bits on every instruction set.

#![allow(
    clippy::missing_safety_doc,
    reason = "all functions need only the instruction set of `S`, as `Simd` states"
)]

use crate::simd::Simd;

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// log₂e minus its f32 value.
const LOG2_E_LOW: f32 = 1.925_963e-8;
const LN_2: f32 = std::f32::consts::LN_2;
/// ln 2 minus its f32 value.
const LN_2_LOW: f32 = -1.904_654_3e-9;

/// Adding 1.5·2²³ rounds a float to an integer in its lowest bits.
const ROUNDER: f32 = 12_582_912.0;
/// The same, with the exponent's bias added to the integer.
const EXPONENT_ROUNDER: f32 = ROUNDER + 127.0;

/// 2ᶠ for |f| <= ½, relative error 2e-9 before rounding; exactly 1 at 0.
#[inline(always)]
unsafe fn exp2_fraction<S: Simd>(f: S::V) -> S::V {
    // SAFETY: the caller promises the instruction set, here and in all functions of this module.
    unsafe {
        let mut p = S::splat(1.534_581_2e-4);
        for c in [
            1.339_993e-3,
            9.618_489e-3,
            5.550_328_6e-2,
            2.402_264_6e-1,
            6.931_472e-1,
            1.0,
        ] {
            p = S::fma(p, f, S::splat(c));
        }
        p
    }
}

/// eˣ within 2 ulp; 0 below −104, infinite above 88.73, denormals and NaN kept.
#[inline(always)]
pub unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see `exp2_fraction`.
    unsafe {
        let x = S::min(S::splat(89.0), S::max(S::splat(-104.0), x));
        let rounder = S::splat(ROUNDER);
        let n = S::sub(S::fma(x, S::splat(LOG2_E), rounder), rounder);
        let f = S::fma(x, S::splat(LOG2_E), S::sub(S::zero(), n));
        let f = S::fma(x, S::splat(LOG2_E_LOW), f);
        // Two factors, since 2ⁿ alone leaves the normal range at both ends.
        let bias = S::splat(EXPONENT_ROUNDER);
        let first = S::fma(n, S::splat(0.5), bias);
        let second = S::add(S::sub(n, S::sub(first, bias)), bias);
        let p = S::mul(exp2_fraction::<S>(f), S::shift_to_exponent(first));
        S::mul(p, S::shift_to_exponent(second))
    }
}

/// Adding 1.5·2²⁰ rounds a float to eighths, and counts them in its lowest bits.
const EIGHTHS_ROUNDER: f32 = 1_572_864.0;

/// p and q with e⁻ˣ = p·q within 2e-7 + 1.4e-8·|x| for |x| <= 87.
///
/// The power of two is cut into eighths, which a table has, so that a cubic polynomial suffices for the rest: the multipliers of a
/// processor are what this function keeps busiest.
#[inline(always)]
unsafe fn factors_of_exp_of_minus<S: Simd, const P: usize>(x: &[S::V; P]) -> ([S::V; P], [S::V; P]) {
    // SAFETY: see `exp2_fraction`.
    unsafe {
        let (log2_e, rounder) = (S::splat(LOG2_E), S::splat(EIGHTHS_ROUNDER));
        let mut rounded = [rounder; P];
        for (rounded, &x) in rounded.iter_mut().zip(x) {
            *rounded = S::fnma(x, log2_e, rounder);
        }
        let mut f = rounded;
        for f in &mut f {
            *f = S::sub(rounder, *f);
        }
        for (f, &x) in f.iter_mut().zip(x) {
            *f = S::fnma(x, log2_e, *f);
        }
        // 2ᶠ for |f| <= 1/16, relative error 2.7e-8 before rounding; exactly 1 at 0.
        let mut p = [S::splat(5.549_617e-2); P];
        for c in [2.402_578_3e-1, 6.931_472_4e-1, 1.0] {
            for (p, &f) in p.iter_mut().zip(&f) {
                *p = S::fma(*p, f, S::splat(c));
            }
        }
        let mut q = rounded;
        for q in &mut q {
            *q = S::power_of_eighths(*q);
        }
        (p, q)
    }
}

/// 1 + e⁻ˣ, relative error below 2e-7 + 1.4e-8·|x|; constant beyond ±87.
#[inline(always)]
unsafe fn one_plus_exp_of_minus<S: Simd, const P: usize>(x: &[S::V; P]) -> [S::V; P] {
    // SAFETY: see `exp2_fraction`.
    unsafe {
        let mut clamped = *x;
        for x in &mut clamped {
            *x = S::max(S::splat(-87.0), *x);
        }
        for x in &mut clamped {
            *x = S::min(S::splat(87.0), *x);
        }
        let (mut p, q) = factors_of_exp_of_minus::<S, P>(&clamped);
        for (p, q) in p.iter_mut().zip(q) {
            *p = S::fma(*p, q, S::splat(1.0));
        }
        p
    }
}

/// e^−|x|, relative error below 2e-7 + 1.4e-8·|x|; 0 beyond ±87, NaN kept.
#[inline(always)]
pub unsafe fn exp_of_minus_abs<S: Simd, const P: usize>(x: &[S::V; P]) -> [S::V; P] {
    // SAFETY: see `exp2_fraction`.
    unsafe {
        let limit = S::splat(87.0);
        let (mut distances, mut clamped) = (*x, *x);
        for (distance, clamped) in distances.iter_mut().zip(&mut clamped) {
            *distance = S::abs(*distance);
            *clamped = S::min(limit, *distance);
        }
        let (mut p, q) = factors_of_exp_of_minus::<S, P>(&clamped);
        for ((p, q), distance) in p.iter_mut().zip(q).zip(distances) {
            *p = S::select_lt(limit, distance, S::zero(), S::mul(*p, q));
        }
        p
    }
}

/// The logistic function 1/(1 + e⁻ˣ), relative error below 3e-7 + 1.4e-8·|x|; constant beyond ±87.
#[inline(always)]
pub unsafe fn sigmoid<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see `exp2_fraction`.
    unsafe {
        let [divisor] = one_plus_exp_of_minus::<S, 1>(&[x]);
        S::div(S::splat(1.0), divisor)
    }
}

/// 2·atanh(s)/s at `y` = s², for 0 <= y <= 1/9.
#[inline(always)]
unsafe fn atanh_series<S: Simd, const P: usize>(y: &[S::V; P]) -> [S::V; P] {
    // SAFETY: see `exp2_fraction`.
    unsafe {
        let mut p = [S::splat(2.817_833_4e-1); P];
        for c in [2.796_06e-1, 4.002_491e-1, 6.666_631_7e-1, 2.0] {
            for (p, &y) in p.iter_mut().zip(y) {
                *p = S::fma(*p, y, S::splat(c));
            }
        }
        p
    }
}

/// ln(1 + x) for 0 <= x <= 1, within 3 ulp also where x is tiny.
#[inline(always)]
pub unsafe fn ln_1p_unit<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see `exp2_fraction`.
    unsafe {
        let s = S::div(x, S::add(x, S::splat(2.0)));
        let [series] = atanh_series::<S, 1>(&[S::mul(s, s)]);
        S::mul(s, series)
    }
}

/// 1/(1 + x) and ln(1 + x) for 0 <= x <= 1, within 3 and 4 ulp: one division serves both, and divisions are what takes longest.
#[inline(always)]
pub unsafe fn reciprocal_and_ln_1p_unit<S: Simd, const P: usize>(x: &[S::V; P]) -> ([S::V; P], [S::V; P]) {
    // SAFETY: see `exp2_fraction`.
    unsafe {
        let (mut plus_one, mut plus_two, mut both) = (*x, *x, *x);
        for (one, two) in plus_one.iter_mut().zip(&mut plus_two) {
            *one = S::add(*one, S::splat(1.0));
            *two = S::add(*two, S::splat(2.0));
        }
        for ((both, &one), &two) in both.iter_mut().zip(&plus_one).zip(&plus_two) {
            *both = S::div(S::splat(1.0), S::mul(one, two));
        }
        let mut s = *x;
        for ((s, &both), &one) in s.iter_mut().zip(&both).zip(&plus_one) {
            *s = S::mul(*s, S::mul(both, one));
        }
        let mut squares = s;
        for s in &mut squares {
            *s = S::mul(*s, *s);
        }
        let mut ln = atanh_series::<S, P>(&squares);
        for (ln, s) in ln.iter_mut().zip(s) {
            *ln = S::mul(s, *ln);
        }
        for (both, two) in both.iter_mut().zip(plus_two) {
            *both = S::mul(*both, two);
        }
        (both, ln)
    }
}

/// ln x for finite normal x > 0, within 2 ulp except next to 1, where the absolute error stays below 1e-7.
#[inline(always)]
pub unsafe fn ln<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see `exp2_fraction`.
    unsafe {
        let (m, e) = S::split_exponent(x);
        let one = S::splat(1.0);
        let s = S::div(S::sub(m, one), S::add(m, one));
        let [series] = atanh_series::<S, 1>(&[S::mul(s, s)]);
        let mantissa_part = S::fma(s, series, S::mul(e, S::splat(LN_2_LOW)));
        S::fma(e, S::splat(LN_2), mantissa_part)
    }
}

/// ln(1 + eˣ) as max(x, 0) + ln(1 + e^−|x|): no overflow, and accurate where the result is tiny.
#[inline(always)]
pub unsafe fn softplus<S: Simd>(x: S::V) -> S::V {
    // SAFETY: see `exp2_fraction`.
    unsafe {
        let e = exp::<S>(S::sub(S::zero(), S::abs(x)));
        S::add(S::max(S::zero(), x), ln_1p_unit::<S>(e))
    }
}

/// The activations of EfficientDet's `act_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Act {
    /// z·σ(z)
    Swish,
    /// max(z, 0)
    Relu,
    /// min(max(z, 0), 6)
    Relu6,
    /// z·relu6(z + 3)/6
    HSwish,
    /// z·tanh(softplus(z))
    Mish,
    /// z
    Identity,
    /// z − ln(βz + 1)/β for z > 0, else 0, with β = 20⁴
    SRelu,
}

/// An activation that kernels are compiled for; the marker types are named as the variants of [`Act`].
pub trait Activation: Copy + Send + Sync + 'static {
    /// The activation at `z`.
    unsafe fn value<S: Simd>(z: S::V) -> S::V;
    /// The activation and its derivative at `z`; the activation may differ from [`value`](Self::value) in the last place.
    unsafe fn value_and_slope<S: Simd>(z: S::V) -> (S::V, S::V);

    /// [`value`](Self::value) of several vectors, step by step for all of them: the steps of one vector wait for each other, and
    /// a processor looks only a few dozen instructions ahead for others.
    #[inline(always)]
    unsafe fn values<S: Simd, const P: usize>(mut z: [S::V; P]) -> [S::V; P] {
        for z in &mut z {
            // SAFETY: the caller promises the instruction set of `S`.
            *z = unsafe { Self::value::<S>(*z) };
        }
        z
    }

    /// [`value_and_slope`](Self::value_and_slope) of several vectors, step by step as in [`values`](Self::values).
    #[inline(always)]
    unsafe fn values_and_slopes<S: Simd, const P: usize>(mut z: [S::V; P]) -> ([S::V; P], [S::V; P]) {
        let mut slopes = z;
        for (z, slope) in z.iter_mut().zip(&mut slopes) {
            // SAFETY: the caller promises the instruction set of `S`.
            (*z, *slope) = unsafe { Self::value_and_slope::<S>(*z) };
        }
        (z, slopes)
    }
}

/// Runs an expression with a type alias bound to the marker type of an [`Act`]:
/// `with_activation!(act, A => kernel::<A>(..))`.
macro_rules! with_activation {
    ($act:expr, $alias:ident => $body:expr) => {{
        use $crate::math::{Act, activations};
        match $act {
            Act::Swish => {
                type $alias = activations::Swish;
                $body
            }
            Act::Relu => {
                type $alias = activations::Relu;
                $body
            }
            Act::Relu6 => {
                type $alias = activations::Relu6;
                $body
            }
            Act::HSwish => {
                type $alias = activations::HSwish;
                $body
            }
            Act::Mish => {
                type $alias = activations::Mish;
                $body
            }
            Act::Identity => {
                type $alias = activations::Identity;
                $body
            }
            Act::SRelu => {
                type $alias = activations::SRelu;
                $body
            }
        }
    }};
}
pub(crate) use with_activation;

/// Marker types of the activations.
pub mod activations {
    use super::{Activation, Simd, exp, ln, one_plus_exp_of_minus};

    /// z·σ(z).
    #[derive(Debug, Clone, Copy)]
    pub struct Swish;
    /// max(z, 0).
    #[derive(Debug, Clone, Copy)]
    pub struct Relu;
    /// min(max(z, 0), 6).
    #[derive(Debug, Clone, Copy)]
    pub struct Relu6;
    /// z·relu6(z + 3)/6.
    #[derive(Debug, Clone, Copy)]
    pub struct HSwish;
    /// z·tanh(softplus(z)).
    #[derive(Debug, Clone, Copy)]
    pub struct Mish;
    /// z.
    #[derive(Debug, Clone, Copy)]
    pub struct Identity;
    /// z − ln(βz + 1)/β for z > 0, else 0.
    #[derive(Debug, Clone, Copy)]
    pub struct SRelu;

    // SAFETY of all blocks below: the caller promises the instruction set of `S`.

    impl Activation for Swish {
        #[inline(always)]
        unsafe fn value<S: Simd>(z: S::V) -> S::V {
            // SAFETY: see above.
            let [value] = unsafe { Self::values::<S, 1>([z]) };
            value
        }
        #[inline(always)]
        unsafe fn value_and_slope<S: Simd>(z: S::V) -> (S::V, S::V) {
            // SAFETY: see above.
            let ([value], [slope]) = unsafe { Self::values_and_slopes::<S, 1>([z]) };
            (value, slope)
        }
        #[inline(always)]
        unsafe fn values<S: Simd, const P: usize>(mut z: [S::V; P]) -> [S::V; P] {
            // SAFETY: see above.
            unsafe {
                let rest = if S::REGISTERS == 32 {
                    let (groups, rest) = z.as_chunks_mut::<4>();
                    for z in groups {
                        swish::<S, 4>(z);
                    }
                    let (groups, rest) = rest.as_chunks_mut::<3>();
                    for z in groups {
                        swish::<S, 3>(z);
                    }
                    let (groups, rest) = rest.as_chunks_mut::<2>();
                    for z in groups {
                        swish::<S, 2>(z);
                    }
                    rest
                } else {
                    let (groups, rest) = z.as_chunks_mut::<2>();
                    for z in groups {
                        swish::<S, 2>(z);
                    }
                    rest
                };
                for z in rest.as_chunks_mut().0 {
                    swish::<S, 1>(z);
                }
            }
            z
        }
        #[inline(always)]
        unsafe fn values_and_slopes<S: Simd, const P: usize>(mut z: [S::V; P]) -> ([S::V; P], [S::V; P]) {
            let mut slopes = z;
            // SAFETY: see above.
            unsafe {
                let (rest, slopes) = if S::REGISTERS == 32 {
                    let ((z, rest), (slopes, more)) = (z.as_chunks_mut::<4>(), slopes.as_chunks_mut::<4>());
                    for (z, slopes) in z.iter_mut().zip(slopes) {
                        swish_and_slope::<S, 4>(z, slopes);
                    }
                    (rest, more)
                } else {
                    let ((z, rest), (slopes, more)) = (z.as_chunks_mut::<2>(), slopes.as_chunks_mut::<2>());
                    for (z, slopes) in z.iter_mut().zip(slopes) {
                        swish_and_slope::<S, 2>(z, slopes);
                    }
                    (rest, more)
                };
                let (rest, slopes) = (rest.as_chunks_mut().0, slopes.as_chunks_mut().0);
                for (z, slopes) in rest.iter_mut().zip(slopes) {
                    swish_and_slope::<S, 1>(z, slopes);
                }
            }
            (z, slopes)
        }
    }

    /// As many vectors at once as registers hold with what is computed on the way.
    #[inline(always)]
    unsafe fn swish<S: Simd, const P: usize>(z: &mut [S::V; P]) {
        // SAFETY: see above.
        unsafe {
            let divisors = one_plus_exp_of_minus::<S, P>(z);
            for (z, divisor) in z.iter_mut().zip(divisors) {
                *z = S::div(*z, divisor);
            }
        }
    }

    /// One sigmoid serves both: the slope is σ + act·(1 − σ).
    #[inline(always)]
    unsafe fn swish_and_slope<S: Simd, const P: usize>(z: &mut [S::V; P], slopes: &mut [S::V; P]) {
        // SAFETY: see above.
        unsafe {
            *slopes = one_plus_exp_of_minus::<S, P>(z);
            for s in slopes.iter_mut() {
                *s = S::div(S::splat(1.0), *s);
            }
            for (z, &s) in z.iter_mut().zip(slopes.iter()) {
                *z = S::mul(*z, s);
            }
            for (slope, &act) in slopes.iter_mut().zip(z.iter()) {
                *slope = S::fnma(act, *slope, S::add(act, *slope));
            }
        }
    }

    impl Activation for Relu {
        #[inline(always)]
        unsafe fn value<S: Simd>(z: S::V) -> S::V {
            // SAFETY: see above.
            unsafe { S::max(S::zero(), z) }
        }
        #[inline(always)]
        unsafe fn value_and_slope<S: Simd>(z: S::V) -> (S::V, S::V) {
            // SAFETY: see above.
            unsafe {
                (
                    Self::value::<S>(z),
                    S::select_lt(S::zero(), z, S::splat(1.0), S::zero()),
                )
            }
        }
    }

    impl Activation for Relu6 {
        #[inline(always)]
        unsafe fn value<S: Simd>(z: S::V) -> S::V {
            // SAFETY: see above.
            unsafe { S::min(S::splat(6.0), S::max(S::zero(), z)) }
        }
        #[inline(always)]
        unsafe fn value_and_slope<S: Simd>(z: S::V) -> (S::V, S::V) {
            // SAFETY: see above.
            unsafe {
                let below_six = S::select_lt(z, S::splat(6.0), S::splat(1.0), S::zero());
                (
                    Self::value::<S>(z),
                    S::select_lt(S::zero(), z, below_six, S::zero()),
                )
            }
        }
    }

    impl Activation for HSwish {
        #[inline(always)]
        unsafe fn value<S: Simd>(z: S::V) -> S::V {
            // SAFETY: see above.
            unsafe {
                let six_relu6 = Relu6::value::<S>(S::add(z, S::splat(3.0)));
                S::mul(z, S::mul(six_relu6, S::splat(1.0 / 6.0)))
            }
        }
        #[inline(always)]
        unsafe fn value_and_slope<S: Simd>(z: S::V) -> (S::V, S::V) {
            // SAFETY: see above.
            unsafe {
                let three = S::splat(3.0);
                let middle = S::fma(z, S::splat(1.0 / 3.0), S::splat(0.5));
                let below_three = S::select_lt(z, three, middle, S::splat(1.0));
                let slope = S::select_lt(S::splat(-3.0), z, below_three, S::zero());
                (Self::value::<S>(z), slope)
            }
        }
    }

    /// With e = eᶻ and n = e(e + 2): tanh(softplus z) = n/(n + 2). Beyond 20 both are 1 in f32.
    impl Activation for Mish {
        #[inline(always)]
        unsafe fn value<S: Simd>(z: S::V) -> S::V {
            // SAFETY: see above.
            unsafe { Self::value_and_slope::<S>(z).0 }
        }
        #[inline(always)]
        unsafe fn value_and_slope<S: Simd>(z: S::V) -> (S::V, S::V) {
            // SAFETY: see above.
            unsafe {
                let two = S::splat(2.0);
                let z = S::max(S::splat(-1e30), z);
                let e = exp::<S>(S::min(S::splat(20.0), z));
                let n = S::mul(e, S::add(e, two));
                let d = S::add(n, two);
                let tanh = S::div(n, d);
                // d tanh(softplus z)/dz = 4·e(1 + e)/d², in quotients that stay finite.
                let change = S::mul(S::div(S::fma(e, e, e), d), S::div(S::splat(4.0), d));
                (S::mul(z, tanh), S::fma(z, change, tanh))
            }
        }
    }

    impl Activation for Identity {
        #[inline(always)]
        unsafe fn value<S: Simd>(z: S::V) -> S::V {
            z
        }
        #[inline(always)]
        unsafe fn value_and_slope<S: Simd>(z: S::V) -> (S::V, S::V) {
            // SAFETY: see above.
            unsafe { (z, S::splat(1.0)) }
        }
    }

    /// β of the smooth rectifier: 20⁴.
    const SRELU_BETA: f32 = 160_000.0;

    impl Activation for SRelu {
        #[inline(always)]
        unsafe fn value<S: Simd>(z: S::V) -> S::V {
            // SAFETY: see above.
            unsafe {
                let z = S::max(S::zero(), z);
                let log = ln::<S>(S::fma(z, S::splat(SRELU_BETA), S::splat(1.0)));
                S::fnma(log, S::splat(1.0 / SRELU_BETA), z)
            }
        }
        #[inline(always)]
        unsafe fn value_and_slope<S: Simd>(z: S::V) -> (S::V, S::V) {
            // SAFETY: see above.
            unsafe {
                let scaled = S::mul(S::max(S::zero(), z), S::splat(SRELU_BETA));
                (Self::value::<S>(z), S::div(scaled, S::add(scaled, S::splat(1.0))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, dispatch};

    #[derive(Clone, Copy)]
    enum Function {
        Exp,
        ExpOfMinusAbs,
        Sigmoid,
        Ln,
        Ln1pUnit,
        ReciprocalAndLn(usize),
        Softplus,
    }

    #[inline(always)]
    unsafe fn apply_body<S: Simd>(function: Function, x: &mut [f32]) {
        for chunk in x.chunks_mut(S::LANES) {
            let n = chunk.len();
            // SAFETY: n values are read and written.
            unsafe {
                let v = S::load_partial(chunk.as_ptr(), n);
                let v = match function {
                    Function::Exp => exp::<S>(v),
                    Function::ExpOfMinusAbs => exp_of_minus_abs::<S, 1>(&[v])[0],
                    Function::Sigmoid => sigmoid::<S>(v),
                    Function::Ln => ln::<S>(v),
                    Function::Ln1pUnit => ln_1p_unit::<S>(v),
                    Function::ReciprocalAndLn(part) => {
                        let ([reciprocal], [ln]) = reciprocal_and_ln_1p_unit::<S, 1>(&[v]);
                        if part == 0 { reciprocal } else { ln }
                    }
                    Function::Softplus => softplus::<S>(v),
                };
                S::store_partial(chunk.as_mut_ptr(), v, n);
            }
        }
    }
    dispatch! { unsafe fn apply(function: Function, x: &mut [f32]) = apply_body; }

    #[inline(always)]
    unsafe fn activate_body<S: Simd, A: Activation>(z: &[f32]) -> Vec<[f32; 3]> {
        z.iter()
            .map(|&z| {
                // SAFETY: one lane is stored.
                unsafe {
                    let mut out = [0.0; 3];
                    let z = S::splat(z);
                    let (value, slope) = A::value_and_slope::<S>(z);
                    S::store_partial(&mut out[0], A::value::<S>(z), 1);
                    S::store_partial(&mut out[1], value, 1);
                    S::store_partial(&mut out[2], slope, 1);
                    out
                }
            })
            .collect()
    }
    dispatch! { unsafe fn activate[A: Activation][A](z: &[f32]) -> Vec<[f32; 3]> = activate_body; }

    fn evaluate(isa: Isa, function: Function, x: &[f32]) -> Vec<f32> {
        let mut out = x.to_vec();
        // SAFETY: tests pass available instruction sets.
        unsafe { apply(isa, function, &mut out) };
        out
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter()
            .map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() })
            .collect()
    }

    fn grid(low: f32, high: f32) -> Vec<f32> {
        (0..20_011)
            .map(|i| low + (high - low) * i as f32 / 20_010.0)
            .collect()
    }

    /// Largest error of `function` over `x` in units of the last place of the true value.
    fn largest_ulp(function: Function, x: &[f32], truth: impl Fn(f64) -> f64) -> f64 {
        let out = evaluate(Isa::detect(), function, x);
        let error = |(&x, &y): (&f32, &f32)| {
            let t = truth(f64::from(x));
            let ulp = f64::from(f32::EPSILON) * 2f64.powi((t.abs().log2().floor() as i32).max(-126));
            (f64::from(y) - t).abs() / ulp
        };
        x.iter().zip(&out).map(error).fold(0.0, f64::max)
    }

    #[test]
    fn functions_are_accurate_to_a_few_units_in_the_last_place() {
        let check = |largest: f64, bound: f64| assert!(largest < bound, "{largest} units, {bound} allowed");
        check(largest_ulp(Function::Exp, &grid(-87.0, 88.7), f64::exp), 1.5);
        // A unit is at least 6e-8 of the value.
        let unit = |x: f64| (-x.abs()).exp();
        for reach in [4.0, 87.0] {
            let allowed = (2e-7 + 1.4e-8 * f64::from(reach)) / 6e-8;
            let largest = largest_ulp(Function::ExpOfMinusAbs, &grid(-reach, reach), unit);
            check(largest, allowed);
        }
        let tiny: Vec<f32> = (0..100).map(|i| 2f32.powi(-i) * 0.9).collect();
        for x in [&grid(0.0, 1.0)[1..], &tiny] {
            check(largest_ulp(Function::Ln1pUnit, x, f64::ln_1p), 3.0);
            check(
                largest_ulp(Function::ReciprocalAndLn(0), x, |x| 1.0 / (1.0 + x)),
                3.0,
            );
            check(largest_ulp(Function::ReciprocalAndLn(1), x, f64::ln_1p), 4.0);
        }
        check(largest_ulp(Function::Ln, &grid(1.5, 1e5), f64::ln), 3.0);
        check(largest_ulp(Function::Ln, &grid(1e-6, 0.7), f64::ln), 3.0);
        check(
            largest_ulp(Function::Softplus, &grid(-80.0, 80.0), |x| x.exp().ln_1p()),
            3.0,
        );
        assert!(
            largest_ulp(Function::Sigmoid, &grid(-15.0, 15.0), |x| 1.0
                / (1.0 + (-x).exp()))
                < 5.0
        );
    }

    #[test]
    fn functions_have_the_right_limits() {
        let x = [
            0.0,
            -1e30,
            1e30,
            f32::NEG_INFINITY,
            f32::INFINITY,
            f32::NAN,
            -103.0,
        ];
        for isa in Isa::available() {
            let out = evaluate(isa, Function::Exp, &x);
            assert_eq!(out[..5], [1.0, 0.0, f32::INFINITY, 0.0, f32::INFINITY]);
            assert!(out[5].is_nan());
            assert_eq!(out[6], (-103f64).exp() as f32, "a denormal");
            let out = evaluate(isa, Function::Sigmoid, &x);
            assert_eq!((out[0], out[2], out[4]), (0.5, 1.0, 1.0));
            assert!(out[1] > 0.0 && out[1] < 2e-38 && out[1] == out[3] && out[5].is_nan());
            let out = evaluate(isa, Function::ExpOfMinusAbs, &x);
            assert_eq!((out[0], &out[1..5], out[6]), (1.0, &[0.0; 4][..], 0.0));
            assert!(out[5].is_nan());
            let out = evaluate(isa, Function::Softplus, &x);
            assert_eq!((out[1], out[2], out[4]), (0.0, 1e30, f32::INFINITY));
            assert!((out[0] - 2f32.ln()).abs() < 1e-7 && out[5].is_nan());
        }
    }

    #[test]
    fn functions_give_the_same_bits_on_every_instruction_set() {
        let mut x = grid(-120.0, 120.0);
        x.extend([0.0, -0.0, 1e30, -1e30, f32::NAN, 1e-40, f32::INFINITY]);
        for function in [
            Function::Exp,
            Function::ExpOfMinusAbs,
            Function::Sigmoid,
            Function::Ln,
            Function::Ln1pUnit,
            Function::ReciprocalAndLn(0),
            Function::ReciprocalAndLn(1),
            Function::Softplus,
        ] {
            let expected = bits(&evaluate(Isa::Portable, function, &x));
            for isa in Isa::available() {
                assert_eq!(bits(&evaluate(isa, function, &x)), expected, "{isa}");
            }
        }
    }

    fn truth(act: Act, z: f64) -> f64 {
        match act {
            Act::Swish => z / (1.0 + (-z).exp()),
            Act::Relu => z.max(0.0),
            Act::Relu6 => z.clamp(0.0, 6.0),
            Act::HSwish => z * (z + 3.0).clamp(0.0, 6.0) / 6.0,
            Act::Mish => z * z.exp().ln_1p().tanh(),
            Act::Identity => z,
            Act::SRelu => (z - (160_000.0 * z.max(0.0)).ln_1p() / 160_000.0).max(0.0),
        }
    }

    #[test]
    fn activations_and_their_slopes_match_float64() {
        let acts = [
            Act::Swish,
            Act::Relu,
            Act::Relu6,
            Act::HSwish,
            Act::Mish,
            Act::Identity,
            Act::SRelu,
        ];
        let z: Vec<f32> = (0..2001).map(|i| (i as f32 - 1000.0) * 0.021_3).collect();
        for act in acts {
            // SAFETY: only available instruction sets are used.
            let run = |isa| unsafe { with_activation!(act, A => activate::<A>(isa, &z)) };
            let expected = run(Isa::Portable);
            for isa in Isa::available() {
                assert_eq!(run(isa), expected, "{act:?} on {isa}");
            }
            for (&z, &[value, value_with_slope, slope]) in z.iter().zip(&expected) {
                let (z, h) = (f64::from(z), 1e-6);
                let (t, numeric) = (truth(act, z), (truth(act, z + h) - truth(act, z - h)) / (2.0 * h));
                let unit = value.abs() * f32::EPSILON;
                assert!(
                    (value - value_with_slope).abs() <= unit,
                    "{act:?}({z}) = {value} and {value_with_slope}"
                );
                assert!(
                    (f64::from(value) - t).abs() < 3e-6 * t.abs() + 1e-8,
                    "{act:?}({z}) = {value}, {t} expected"
                );
                // The kinks have no slope to compare with.
                let kink = matches!(act, Act::Relu | Act::Relu6 | Act::HSwish | Act::SRelu)
                    && [-3.0, 0.0, 3.0, 6.0].iter().any(|k| (z - k).abs() < 0.01);
                assert!(
                    kink || (f64::from(slope) - numeric).abs() < 3e-6,
                    "{act:?}'({z}) = {slope}, {numeric} expected"
                );
            }
        }
    }
}
