//! Anchor boxes: the fixed grid of reference boxes that the heads speak about.
//!
//! Source: the reference's `model/anchors.py`.

use std::ops::Range;

use crate::hparams::{AnchorScale, Aspect, HParams};

/// Most anchors a configuration may ask for; d7x has 442,368.
pub const MAX_ANCHORS: usize = 1 << 25;

/// What an anchor grid is made from.
#[derive(Debug, Clone, PartialEq)]
pub struct AnchorConfig {
    /// Height of the network input in pixels.
    pub image_height: usize,
    /// Width of the network input in pixels.
    pub image_width: usize,
    /// Finest pyramid level.
    pub min_level: usize,
    /// Coarsest pyramid level.
    pub max_level: usize,
    /// Octave scales per level: factors `2^(o / num_scales)`.
    pub num_scales: usize,
    /// Factors on width and height.
    pub aspect_ratios: Vec<Aspect>,
    /// Side of the square anchor of octave 0 in strides of its level.
    pub anchor_scale: AnchorScale,
}

impl From<&HParams> for AnchorConfig {
    fn from(hparams: &HParams) -> Self {
        Self {
            image_height: hparams.image_size.height,
            image_width: hparams.image_size.width,
            min_level: hparams.min_level,
            max_level: hparams.max_level,
            num_scales: hparams.num_scales,
            aspect_ratios: hparams.aspect_ratios.clone(),
            anchor_scale: hparams.anchor_scale.clone(),
        }
    }
}

/// Why an anchor grid was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AnchorError {
    /// The image has no pixels.
    #[error("an image of {height}x{width} (height x width) pixels has no anchors: both must be at least 1")]
    EmptyImage {
        /// Height in pixels.
        height: usize,
        /// Width in pixels.
        width: usize,
    },
    /// The levels are not an ascending range within 0..=16.
    #[error("levels {min_level}..={max_level} are not an ascending range within 0..=16")]
    Levels {
        /// Finest level.
        min_level: usize,
        /// Coarsest level.
        max_level: usize,
    },
    /// A cell would have no anchors.
    #[error(
        "{num_scales} octave scales and {aspects} aspect ratios give no anchors: both must be at least 1"
    )]
    NoShapes {
        /// Octave scales.
        num_scales: usize,
        /// Aspect ratios.
        aspects: usize,
    },
    /// A size factor is not a positive number.
    #[error("{what} {value} is not a positive finite number")]
    Factor {
        /// `anchor scale`, `aspect x factor` or `aspect y factor`.
        what: &'static str,
        /// The value.
        value: f64,
    },
    /// The list of anchor scales does not match the levels.
    #[error("{scales} anchor scales for {levels} levels: give one value, or one per level")]
    ScaleCount {
        /// Scales given.
        scales: usize,
        /// Levels.
        levels: usize,
    },
    /// The grid exceeds [`MAX_ANCHORS`].
    #[error("{count} anchors exceed the limit of {MAX_ANCHORS}: use a smaller image or a larger min_level")]
    TooMany {
        /// Anchors asked for.
        count: usize,
    },
}

/// The anchors of one pyramid level.
#[derive(Debug, Clone, PartialEq)]
pub struct AnchorLevel {
    /// Level number.
    pub level: usize,
    /// Cells per column.
    pub height: usize,
    /// Cells per row.
    pub width: usize,
    /// Cell height in pixels.
    pub stride_y_px: f64,
    /// Cell width in pixels.
    pub stride_x_px: f64,
    /// Where the level's anchors lie in [`Anchors::boxes_yxyx_px`].
    pub range: Range<usize>,
}

/// The anchor boxes of a network input, in the order of the head outputs.
///
/// For level l of `Hl × Wl` cells the strides are `sy = H/Hl`, `sx = W/Wl`; the anchor of octave o and aspect `(ax, ay)` centred on
/// a cell has the half sizes
///
/// ```text
/// by = anchor_scale · sy · 2^(o/num_scales) · ay / 2      bx = anchor_scale · sx · 2^(o/num_scales) · ax / 2
/// ```
///
/// Order: level ascending; row-major over cells; then `a = o · aspects + aspect`. Anchors are not clipped to the image. Computed
/// in f64, stored in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Anchors {
    /// Boxes `[ymin, xmin, ymax, xmax]` in pixels of the network input.
    pub boxes_yxyx_px: Vec<[f32; 4]>,
    /// Levels, finest first.
    pub levels: Vec<AnchorLevel>,
    /// Anchors per cell.
    pub per_cell: usize,
    /// Height of the network input in pixels.
    pub image_height: usize,
    /// Width of the network input in pixels.
    pub image_width: usize,
}

impl Anchors {
    /// Lays out the anchors of a configuration.
    ///
    /// # Errors
    /// [`AnchorError`] when the configuration gives no grid, or one above [`MAX_ANCHORS`].
    pub fn new(config: &AnchorConfig) -> Result<Self, AnchorError> {
        check(config)?;
        let per_cell = config.num_scales.saturating_mul(config.aspect_ratios.len());
        let levels = lay_out_levels(config, per_cell);
        let count = levels.last().map_or(0, |level| level.range.end);
        if count > MAX_ANCHORS {
            return Err(AnchorError::TooMany { count });
        }
        let mut boxes_yxyx_px = Vec::with_capacity(count);
        for (index, level) in levels.iter().enumerate() {
            let half_sizes = half_sizes_yx_px(config, level, scale_of_level(&config.anchor_scale, index));
            for row in 0..level.height {
                let y = level.stride_y_px / 2.0 + row as f64 * level.stride_y_px;
                for column in 0..level.width {
                    let x = level.stride_x_px / 2.0 + column as f64 * level.stride_x_px;
                    boxes_yxyx_px.extend(half_sizes.iter().map(|&(by, bx)| {
                        [(y - by) as f32, (x - bx) as f32, (y + by) as f32, (x + bx) as f32]
                    }));
                }
            }
        }
        Ok(Self {
            boxes_yxyx_px,
            levels,
            per_cell,
            image_height: config.image_height,
            image_width: config.image_width,
        })
    }

    /// Number of anchors.
    pub fn len(&self) -> usize {
        self.boxes_yxyx_px.len()
    }

    /// Whether there are none; never true for a grid from [`Anchors::new`].
    pub fn is_empty(&self) -> bool {
        self.boxes_yxyx_px.is_empty()
    }
}

fn check(config: &AnchorConfig) -> Result<(), AnchorError> {
    let (height, width) = (config.image_height, config.image_width);
    if height == 0 || width == 0 {
        return Err(AnchorError::EmptyImage { height, width });
    }
    let (min_level, max_level) = (config.min_level, config.max_level);
    if min_level > max_level || max_level > 16 {
        return Err(AnchorError::Levels { min_level, max_level });
    }
    let (num_scales, aspects) = (config.num_scales, config.aspect_ratios.len());
    if num_scales == 0 || aspects == 0 {
        return Err(AnchorError::NoShapes { num_scales, aspects });
    }
    let positive = |what, value: f64| {
        if value.is_finite() && value > 0.0 {
            Ok(())
        } else {
            Err(AnchorError::Factor { what, value })
        }
    };
    for &Aspect(x, y) in &config.aspect_ratios {
        positive("aspect x factor", x)?;
        positive("aspect y factor", y)?;
    }
    match &config.anchor_scale {
        AnchorScale::All(scale) => positive("anchor scale", *scale),
        AnchorScale::PerLevel(scales) => {
            let levels = max_level - min_level + 1;
            if scales.len() != levels {
                let scales = scales.len();
                return Err(AnchorError::ScaleCount { scales, levels });
            }
            scales
                .iter()
                .try_for_each(|&scale| positive("anchor scale", scale))
        }
    }
}

fn lay_out_levels(config: &AnchorConfig, per_cell: usize) -> Vec<AnchorLevel> {
    let halve = |side: usize| (side - 1) / 2 + 1;
    let (mut height, mut width) = (config.image_height, config.image_width);
    let mut levels = Vec::new();
    let mut start = 0_usize;
    for level in 0..=config.max_level {
        if level >= config.min_level {
            let count = height.saturating_mul(width).saturating_mul(per_cell);
            let end = start.saturating_add(count);
            levels.push(AnchorLevel {
                level,
                height,
                width,
                stride_y_px: config.image_height as f64 / height as f64,
                stride_x_px: config.image_width as f64 / width as f64,
                range: start..end,
            });
            start = end;
        }
        (height, width) = (halve(height), halve(width));
    }
    levels
}

fn scale_of_level(scale: &AnchorScale, index: usize) -> f64 {
    match scale {
        AnchorScale::All(scale) => *scale,
        AnchorScale::PerLevel(scales) => scales[index],
    }
}

fn half_sizes_yx_px(config: &AnchorConfig, level: &AnchorLevel, scale: f64) -> Vec<(f64, f64)> {
    let octaves = (0..config.num_scales).map(|octave| (octave as f64 / config.num_scales as f64).exp2());
    octaves
        .flat_map(|octave| {
            config.aspect_ratios.iter().map(move |&Aspect(x, y)| {
                (
                    scale * level.stride_y_px * octave * y / 2.0,
                    scale * level.stride_x_px * octave * x / 2.0,
                )
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(height: usize, width: usize) -> AnchorConfig {
        AnchorConfig {
            image_height: height,
            image_width: width,
            ..AnchorConfig::from(&HParams::preset("efficientdet-d0").unwrap())
        }
    }

    #[test]
    fn the_first_anchor_is_a_square_of_four_strides_around_the_first_cell() {
        let anchors = Anchors::new(&config(512, 512)).unwrap();
        assert_eq!(anchors.boxes_yxyx_px[0], [-12.0, -12.0, 20.0, 20.0]);
    }

    #[test]
    fn sides_that_are_no_multiple_of_the_stride_halve_rounding_up() {
        let anchors = Anchors::new(&config(100, 260)).unwrap();
        let cells: Vec<_> = anchors.levels.iter().map(|l| (l.height, l.width)).collect();
        assert_eq!(cells, [(13, 33), (7, 17), (4, 9), (2, 5), (1, 3)]);
        assert_eq!(anchors.levels[0].stride_y_px, 100.0 / 13.0);
        assert_eq!(anchors.len(), anchors.levels.last().unwrap().range.end);
    }

    #[test]
    fn one_scale_per_level_scales_that_level_only() {
        let mut per_level = config(128, 128);
        per_level.anchor_scale = AnchorScale::PerLevel(vec![4.0, 4.0, 8.0, 4.0, 4.0]);
        let scaled = Anchors::new(&per_level).unwrap();
        let plain = Anchors::new(&config(128, 128)).unwrap();
        for (index, level) in plain.levels.iter().enumerate() {
            let height = |anchors: &Anchors| {
                let [ymin, _, ymax, _] = anchors.boxes_yxyx_px[level.range.start];
                ymax - ymin
            };
            let factor = if index == 2 { 2.0 } else { 1.0 };
            assert_eq!(height(&scaled), factor * height(&plain));
        }
    }

    #[test]
    fn impossible_grids_are_refused_with_the_offending_value() {
        let refused = |change: &dyn Fn(&mut AnchorConfig)| {
            let mut config = config(64, 64);
            change(&mut config);
            Anchors::new(&config).unwrap_err()
        };
        let scales = vec![1.0];
        assert_eq!(
            refused(&|c| c.image_height = 0),
            AnchorError::EmptyImage { height: 0, width: 64 }
        );
        assert_eq!(
            refused(&|c| c.min_level = 9),
            AnchorError::Levels {
                min_level: 9,
                max_level: 7
            }
        );
        assert_eq!(
            refused(&|c| c.num_scales = 0),
            AnchorError::NoShapes {
                num_scales: 0,
                aspects: 3
            }
        );
        assert_eq!(
            refused(&|c| c.anchor_scale = AnchorScale::PerLevel(scales.clone())),
            AnchorError::ScaleCount { scales: 1, levels: 5 }
        );
        assert_eq!(
            refused(&|c| c.aspect_ratios[0] = Aspect(-1.0, 1.0)),
            AnchorError::Factor {
                what: "aspect x factor",
                value: -1.0
            }
        );
        assert!(matches!(
            refused(&|c| (c.image_height, c.image_width) = (usize::MAX, usize::MAX)),
            AnchorError::TooMany { .. }
        ));
    }
}
