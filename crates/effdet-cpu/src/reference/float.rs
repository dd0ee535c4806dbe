//! The number type of the reference: f32 as the fast engine, f64 to see what rounding does.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

/// f32 or f64.
pub trait Float:
    Copy
    + Debug
    + Default
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + Sum
    + Send
    + Sync
    + 'static
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// −∞.
    const NEG_INFINITY: Self;

    /// Rounds to this type.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// eˣ.
    fn exp(self) -> Self;
    /// ln x.
    fn ln(self) -> Self;
    /// ln(1 + x).
    fn ln_1p(self) -> Self;
    /// √x.
    fn sqrt(self) -> Self;
    /// tanh x.
    fn tanh(self) -> Self;
    /// |x|.
    fn abs(self) -> Self;
    /// The larger one.
    fn max(self, other: Self) -> Self;
    /// The smaller one.
    fn min(self, other: Self) -> Self;

    /// Exact.
    fn from_f32(value: f32) -> Self {
        Self::from_f64(f64::from(value))
    }

    /// Rounds to f32.
    fn to_f32(self) -> f32 {
        self.to_f64() as f32
    }

    /// 1/(1 + e⁻ˣ).
    fn sigmoid(self) -> Self {
        Self::ONE / (Self::ONE + (-self).exp())
    }

    /// ln(1 + eˣ), without overflow.
    fn softplus(self) -> Self {
        self.max(Self::ZERO) + (-self.abs()).exp().ln_1p()
    }
}

macro_rules! float {
    ($type:ident, $to_f64:expr) => {
        impl Float for $type {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $type::NEG_INFINITY;

            fn from_f64(value: f64) -> Self {
                value as $type
            }

            fn to_f64(self) -> f64 {
                $to_f64(self)
            }

            float!($type: exp ln ln_1p sqrt tanh abs);

            fn max(self, other: Self) -> Self {
                $type::max(self, other)
            }

            fn min(self, other: Self) -> Self {
                $type::min(self, other)
            }
        }
    };
    ($type:ident: $($function:ident)+) => {
        $(fn $function(self) -> Self {
            $type::$function(self)
        })+
    };
}

float!(f32, f64::from);
float!(f64, std::convert::identity);
