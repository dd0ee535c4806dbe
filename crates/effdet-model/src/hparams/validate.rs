//! Ranges that types cannot express.

use std::fmt;

use super::*;

impl HParams {
    /// Checks the ranges that types cannot express.
    ///
    /// # Errors
    /// [`HParamsError::Value`] naming the key and the allowed range.
    pub fn validate(&self) -> Result<(), HParamsError> {
        let check = |ok: bool, key: &str, value: &dyn fmt::Debug, reason: &str| {
            if ok {
                return Ok(());
            }
            Err(HParamsError::Value {
                key: key.into(),
                value: format!("{value:?}"),
                reason: reason.into(),
            })
        };
        let finite_positive = |x: f64| x.is_finite() && x > 0.0;
        check(
            (1..=10_000).contains(&self.num_classes),
            "num_classes",
            &self.num_classes,
            "must be in 1..=10000",
        )?;
        check(
            self.min_level >= 1 && self.min_level <= 5,
            "min_level",
            &self.min_level,
            "must be in 1..=5, the levels a backbone has",
        )?;
        check(
            self.max_level > self.min_level && self.max_level <= 10,
            "max_level",
            &self.max_level,
            "must be above min_level and at most 10",
        )?;
        check(
            (1..=16).contains(&self.num_scales),
            "num_scales",
            &self.num_scales,
            "must be in 1..=16",
        )?;
        let aspects_ok = !self.aspect_ratios.is_empty()
            && self
                .aspect_ratios
                .iter()
                .all(|a| finite_positive(a.0) && finite_positive(a.1));
        check(
            aspects_ok,
            "aspect_ratios",
            &self.aspect_ratios,
            "needs at least one pair of positive factors",
        )?;
        let scales_ok = match &self.anchor_scale {
            AnchorScale::All(scale) => finite_positive(*scale),
            AnchorScale::PerLevel(scales) => {
                scales.len() == self.max_level - self.min_level + 1
                    && scales.iter().all(|&s| finite_positive(s))
            }
        };
        check(
            scales_ok,
            "anchor_scale",
            &self.anchor_scale,
            "must be positive: one value, or one per level",
        )?;
        check(
            self.jitter_min > 0.0 && self.jitter_max >= self.jitter_min && self.jitter_max.is_finite(),
            "jitter_max",
            &self.jitter_max,
            "needs 0 < jitter_min <= jitter_max",
        )?;
        for (key, value) in [
            ("hsv_h", self.hsv_h),
            ("hsv_s", self.hsv_s),
            ("hsv_v", self.hsv_v),
            ("mosaic", self.mosaic),
            ("mixup", self.mixup),
        ] {
            check((0.0..=1.0).contains(&value), key, &value, "must be in [0, 1]")?;
        }
        check(
            self.close_mosaic.is_finite() && self.close_mosaic >= 0.0,
            "close_mosaic",
            &self.close_mosaic,
            "must not be negative",
        )?;
        check(
            self.stddev_rgb.iter().all(|&s| finite_positive(s)),
            "stddev_rgb",
            &self.stddev_rgb,
            "must be positive",
        )?;
        check(
            (0.0..1.0).contains(&self.momentum),
            "momentum",
            &self.momentum,
            "must be in [0, 1)",
        )?;
        check(
            (0.0..1.0).contains(&self.moving_average_decay),
            "moving_average_decay",
            &self.moving_average_decay,
            "must be in [0, 1)",
        )?;
        check(
            self.learning_rate.is_finite() && self.learning_rate >= 0.0,
            "learning_rate",
            &self.learning_rate,
            "must be finite and not negative",
        )?;
        check(
            finite_positive(self.num_epochs),
            "num_epochs",
            &self.num_epochs,
            "must be positive",
        )?;
        check(
            (0.0..=1.0).contains(&self.alpha),
            "alpha",
            &self.alpha,
            "must be in [0, 1]",
        )?;
        check(
            self.gamma.is_finite() && self.gamma >= 0.0,
            "gamma",
            &self.gamma,
            "must not be negative",
        )?;
        check(
            finite_positive(self.delta),
            "delta",
            &self.delta,
            "must be positive",
        )?;
        check(
            (0.0..1.0).contains(&self.label_smoothing),
            "label_smoothing",
            &self.label_smoothing,
            "must be in [0, 1)",
        )?;
        for (key, value) in [
            ("survival_prob", self.survival_prob),
            ("backbone_survival_prob", self.backbone_survival_prob),
        ] {
            check(
                value.is_none_or(|p| p > 0.0 && p <= 1.0),
                key,
                &value,
                "must be in (0, 1]",
            )?;
        }
        check(
            (1..=4096).contains(&self.fpn_num_filters),
            "fpn_num_filters",
            &self.fpn_num_filters,
            "must be in 1..=4096",
        )?;
        check(
            (1..=64).contains(&self.fpn_cell_repeats),
            "fpn_cell_repeats",
            &self.fpn_cell_repeats,
            "must be in 1..=64",
        )?;
        check(
            (1..=64).contains(&self.box_class_repeats),
            "box_class_repeats",
            &self.box_class_repeats,
            "must be in 1..=64",
        )?;
        check(
            self.nms_configs.max_output_size >= 1,
            "nms_configs.max_output_size",
            &self.nms_configs.max_output_size,
            "must be at least 1",
        )?;
        Ok(())
    }
}
