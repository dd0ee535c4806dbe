//! Dynamic loss scaling: gradients that would vanish in half precision are multiplied by a factor on their way and divided by
//! it at the end.
//!
//! Source: the reference's `LossScaleOptimizer`, dynamic, initial scale 2¹⁵, growth every 2000 steps.

use effdet_ckpt::LossScaleState;
use effdet_model::engine::Precision;

/// Factor of the first step.
pub const INITIAL_SCALE: f32 = 32_768.0;
/// Clean steps in a row after which the factor doubles.
pub const GROWTH_INTERVAL: u64 = 2_000;
/// The factor never falls below this one.
pub const MIN_SCALE: f32 = 1.0;

/// The factor and its history.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScale {
    scale: f32,
    clean_steps: u64,
    skipped_steps: u64,
}

impl LossScale {
    /// The start of a run that needs one: gradients stored as float16. bfloat16 has the range of float32.
    pub fn new(precision: Precision) -> Option<Self> {
        (precision == Precision::Fp16).then_some(Self {
            scale: INITIAL_SCALE,
            clean_steps: 0,
            skipped_steps: 0,
        })
    }

    /// The factor of the next step, a power of two.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Updates skipped since the start of training.
    pub fn skipped_steps(&self) -> u64 {
        self.skipped_steps
    }

    /// After an update: doubles the factor after [`GROWTH_INTERVAL`] of them in a row, if the result is finite.
    pub fn applied(&mut self) {
        self.clean_steps += 1;
        if self.clean_steps >= GROWTH_INTERVAL {
            let doubled = self.scale * 2.0;
            if doubled.is_finite() {
                self.scale = doubled;
            }
            self.clean_steps = 0;
        }
    }

    /// After gradients that are not finite: halves the factor. False where it cannot fall, so the factor is not at fault.
    pub fn overflowed(&mut self) -> bool {
        if self.scale <= MIN_SCALE {
            return false;
        }
        self.scale = (self.scale / 2.0).max(MIN_SCALE);
        self.clean_steps = 0;
        self.skipped_steps += 1;
        true
    }
}

impl From<LossScale> for LossScaleState {
    fn from(loss_scale: LossScale) -> Self {
        let LossScale {
            scale,
            clean_steps,
            skipped_steps,
        } = loss_scale;
        Self {
            scale,
            clean_steps,
            skipped_steps,
        }
    }
}

impl From<LossScaleState> for LossScale {
    fn from(state: LossScaleState) -> Self {
        let LossScaleState {
            scale,
            clean_steps,
            skipped_steps,
        } = state;
        Self {
            scale,
            clean_steps,
            skipped_steps,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_float16_gradients_are_scaled() {
        assert!(LossScale::new(Precision::Fp32).is_none());
        assert!(LossScale::new(Precision::Bf16Pairs).is_none());
        assert_eq!(LossScale::new(Precision::Fp16).unwrap().scale(), 32_768.0);
    }

    #[test]
    fn the_scale_doubles_after_two_thousand_clean_steps_in_a_row() {
        let mut scale = LossScale::new(Precision::Fp16).unwrap();
        (0..1999).for_each(|_| scale.applied());
        assert_eq!(scale.scale(), 32_768.0);
        scale.applied();
        assert_eq!(scale.scale(), 65_536.0);
        (0..1999).for_each(|_| scale.applied());
        assert!(scale.overflowed());
        assert_eq!((scale.scale(), scale.skipped_steps()), (32_768.0, 1));
        (0..1999).for_each(|_| scale.applied());
        assert_eq!(scale.scale(), 32_768.0);
    }

    #[test]
    fn the_scale_falls_to_one_and_no_farther() {
        let mut scale = LossScale::new(Precision::Fp16).unwrap();
        (0..15).for_each(|_| assert!(scale.overflowed()));
        assert_eq!(scale.scale(), 1.0);
        assert!(!scale.overflowed());
        assert_eq!((scale.scale(), scale.skipped_steps()), (1.0, 15));
    }

    #[test]
    fn the_scale_stops_growing_before_infinity() {
        let mut scale = LossScale::from(LossScaleState {
            scale: f32::MAX / 1.5,
            clean_steps: 1999,
            skipped_steps: 0,
        });
        scale.applied();
        assert_eq!(scale.scale(), f32::MAX / 1.5);
    }
}
