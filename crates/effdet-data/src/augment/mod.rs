//! Augmentation of 8-bit images and normalised boxes, before they are placed in the network's input.
//!
//! AutoAugment and GridMask follow automl, operations bit for bit; mosaic, mixup and hsv follow Ultralytics.
//!
//! Source: automl's `aug/autoaugment.py`, itself after Cubuk et al., "AutoAugment" (2019) and Zoph et al., "Learning Data
//! Augmentation Strategies for Object Detection" (2019).

pub mod compose;
pub mod geometry;
pub mod grid_mask;
pub mod pixels;
pub mod policy;
mod tables;

use effdet_model::hparams::{AutoaugmentPolicy, HParams};
use effdet_model::rng::{Draws, Purpose};

use self::compose::Sample;

/// Value of every channel where an operation leaves nothing of the image.
pub const REPLACE: u8 = 128;

/// What happens to training samples beside flip, scale jitter and crop; nothing by default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AugmentConfig {
    /// AutoAugment or RandAugment.
    pub policy: Option<AutoaugmentPolicy>,
    /// GridMask.
    pub grid_mask: bool,
    /// Largest change of hue in turns, of saturation and of value as fractions.
    pub hsv: [f32; 3],
    /// Probability of a mosaic.
    pub mosaic: f32,
    /// Probability of mixup.
    pub mixup: f32,
    /// First pass over the data set without mosaic and mixup; none = there is no such pass.
    pub mosaic_until_pass: Option<u64>,
}

impl AugmentConfig {
    /// The augmentation that `hparams` ask for; mosaics end `close_mosaic` passes before the last epoch does.
    pub fn new(hparams: &HParams) -> Self {
        Self {
            policy: hparams.autoaugment_policy,
            grid_mask: hparams.grid_mask,
            hsv: [hparams.hsv_h, hparams.hsv_s, hparams.hsv_v].map(|gain| gain as f32),
            mosaic: hparams.mosaic as f32,
            mixup: hparams.mixup as f32,
            mosaic_until_pass: (hparams.close_mosaic > 0.0)
                .then(|| (hparams.num_epochs - hparams.close_mosaic).max(0.0).floor() as u64),
        }
    }

    /// Whether samples of a pass may differ from their examples.
    pub fn is_on(&self, pass: u64) -> bool {
        let open = self.mosaic_until_pass.is_none_or(|end| pass < end);
        let mixes = open && (self.mosaic > 0.0 || self.mixup > 0.0);
        mixes || self.grid_mask || self.policy.is_some() || self.hsv != [0.0; 3]
    }

    /// Makes the sample of a key from that of its example; `load` gives the plain sample of another one of `count` examples.
    ///
    /// Mosaic, mixup, GridMask, AutoAugment, hsv, in this order.
    ///
    /// # Errors
    /// Those of `load`.
    ///
    /// # Determinism
    /// A function of (seed, pass, index) and the data alone; each kind of augmentation has draws of its own.
    pub fn apply<E>(
        &self,
        mut sample: Sample,
        size: effdet_model::hparams::ImageSize,
        (seed, pass, index): (u64, u64, u64),
        count: u64,
        load: impl Fn(u64) -> Result<Sample, E>,
    ) -> Result<Sample, E> {
        let draws = |purpose| Draws::new(seed, purpose, pass, index);
        let open = self.mosaic_until_pass.is_none_or(|end| pass < end);
        if open && self.mosaic > 0.0 {
            let mut draws = draws(Purpose::Mosaic);
            if draws.uniform() < self.mosaic {
                let others = [0; 3].map(|_: u64| draws.below(count));
                let [a, b, c] = others.map(&load);
                sample = compose::mosaic([sample, a?, b?, c?], size, &mut draws);
            }
        }
        if open && self.mixup > 0.0 {
            let mut draws = draws(Purpose::Mixup);
            if draws.uniform() < self.mixup {
                let other = load(draws.below(count))?;
                compose::mixup(&mut sample, &other, &mut draws);
            }
        }
        if self.grid_mask {
            grid_mask::apply(&mut sample.image, &mut draws(Purpose::GridMask));
        }
        if let Some(policy) = self.policy {
            let mut draws = draws(Purpose::Augment);
            policy::apply(policy, &mut sample.image, &mut sample.boxes_yxyx_norm, &mut draws);
        }
        if self.hsv != [0.0; 3] {
            let mut draws = draws(Purpose::Hsv);
            let [hue, saturation, value] = self.hsv.map(|gain| draws.range(-1.0, 1.0) * gain);
            pixels::hsv(&mut sample.image, hue, 1.0 + saturation, 1.0 + value);
        }
        Ok(sample)
    }
}

#[cfg(test)]
mod golden_tests;
