//! Learning-rate schedules.
//!
//! Source: the reference's `utils/learning_rate.py` (cosine behind a linear warm-up) and automl's variants.

use effdet_model::hparams::{HParams, LrDecay};

/// Learning rate as a function of the step, in float32 as the reference computes it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    decay: LrDecay,
    base: f32,
    warmup_init: f32,
    warmup_steps: f32,
    total_steps: f32,
    first_drop: f32,
    second_drop: f32,
    poly_power: f32,
}

impl Schedule {
    /// The schedule of `hparams` with epochs of `steps_per_epoch` steps.
    pub fn new(hparams: &HParams, steps_per_epoch: u64) -> Self {
        let steps = |epochs: f64| (epochs * steps_per_epoch as f64) as u64 as f32;
        Self {
            decay: hparams.lr_decay_method,
            base: hparams.learning_rate as f32,
            warmup_init: hparams.lr_warmup_init as f32,
            warmup_steps: steps(hparams.lr_warmup_epoch),
            total_steps: steps(hparams.num_epochs).max(1.0),
            first_drop: steps(hparams.first_lr_drop_epoch),
            second_drop: steps(hparams.second_lr_drop_epoch),
            poly_power: hparams.poly_lr_power as f32,
        }
    }

    /// Steps of the whole schedule.
    pub fn total_steps(&self) -> u64 {
        self.total_steps as u64
    }

    /// Learning rate of the update that follows `step` updates.
    ///
    /// `t < warm`: `init + (t/warm)·(base − init)`; then by the decay method, for the cosine
    /// `½·base·(1 + cos(π·(t − warm)/(total − warm)))`.
    pub fn at(&self, step: u64) -> f32 {
        let t = step as f32;
        if t < self.warmup_steps {
            return self.warmup_init + t / self.warmup_steps * (self.base - self.warmup_init);
        }
        let length = (self.total_steps - self.warmup_steps).max(1.0);
        let cosine = |t: f32| 0.5 * self.base * (1.0 + (std::f32::consts::PI * t / length).cos());
        match self.decay {
            LrDecay::Cosine => cosine((t - self.warmup_steps).min(length)),
            LrDecay::CosineUnshifted => cosine(t),
            LrDecay::Stepwise if t < self.first_drop => self.base,
            LrDecay::Stepwise if t < self.second_drop => self.base * 0.1,
            LrDecay::Stepwise => self.base * 0.01,
            LrDecay::Polynomial => self.base * (1.0 - (t / self.total_steps).min(1.0)).powf(self.poly_power),
            LrDecay::Constant => self.base,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hparams() -> HParams {
        let mut hparams = HParams::preset("d0").unwrap();
        (hparams.learning_rate, hparams.lr_warmup_init) = (2.2, 1e-4);
        (hparams.lr_warmup_epoch, hparams.num_epochs) = (25.0, 400.0);
        hparams
    }

    /// Source: `golden.json`, `network_and_training.lr`: 74 steps per epoch, warm-up 1850, total 29600.
    #[test]
    fn the_cosine_schedule_equals_the_reference() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/golden/golden.json")).unwrap();
        let schedule = Schedule::new(&hparams(), 74);
        assert_eq!(schedule.total_steps(), 29600);
        let values = golden["network_and_training"]["lr"]["values"]
            .as_object()
            .unwrap();
        let mut worst = 0.0f64;
        for (step, expected) in values {
            let got = f64::from(schedule.at(step.parse().unwrap()));
            worst = worst.max((got - expected.as_f64().unwrap()).abs() / 2.2);
        }
        println!(
            "lr: largest error {worst:e} of the base rate over {} steps",
            values.len()
        );
        assert!(worst < 1e-6, "largest error {worst}");
    }

    #[test]
    fn other_decays_follow_their_formulas() {
        let mut h = hparams();
        let at = |h: &HParams, step| Schedule::new(h, 10).at(step);
        h.lr_decay_method = LrDecay::Constant;
        assert_eq!(at(&h, 3999), 2.2);
        h.lr_decay_method = LrDecay::Stepwise;
        assert_eq!(
            [at(&h, 1999), at(&h, 2000), at(&h, 2500)],
            [2.2, 2.2 * 0.1, 2.2 * 0.01]
        );
        h.lr_decay_method = LrDecay::Polynomial;
        assert!((at(&h, 2000) - 2.2 * 0.5f32.powf(0.9)).abs() < 1e-6);
        h.lr_decay_method = LrDecay::CosineUnshifted;
        // The unshifted cosine has already moved when the warm-up ends.
        assert!(at(&h, 250) < 2.2 && at(&hparams(), 250) == 2.2);
    }

    #[test]
    fn the_cosine_stays_at_its_end_when_training_goes_on() {
        let schedule = Schedule::new(&hparams(), 10);
        assert!(schedule.at(10_000) < 1e-6);
    }
}
