//! Options of augmentation.

use clap::{Args, ValueEnum};

/// Augmentation beside flip, scale jitter and crop, and how its images are decoded; wins over --hparams.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct AugmentArgs {
    /// AutoAugment or RandAugment, GridMask, or both with a comma between them; none turns off what --hparams turn on.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub augment: Vec<Augmentation>,
    /// Probability that four images make one; without a value 1.
    #[arg(long, value_name = "P", num_args = 0..=1, default_missing_value = "1")]
    pub mosaic: Option<f64>,
    /// Probability that a second image is blended over a sample; without a value 1.
    #[arg(long, value_name = "P", num_args = 0..=1, default_missing_value = "1")]
    pub mixup: Option<f64>,
    /// Largest change of hue (turns), saturation and value (fractions); without a value 0.015,0.7,0.4.
    #[arg(long, value_name = "H,S,V", num_args = 0..=1, default_missing_value = "0.015,0.7,0.4", value_parser = hsv)]
    pub hsv: Option<[f64; 3]>,
    /// Last epochs without mosaic and mixup.
    #[arg(long, value_name = "N", alias = "close_mosaic")]
    pub close_mosaic: Option<f64>,
    /// Decode JPEGs that the jitter shrinks to half or less in that reduced size: faster, smoother pixels than the reference's.
    #[arg(long, alias = "reduced_decode")]
    pub reduced_decode: bool,
}

impl AugmentArgs {
    /// Whether the command line names any of them.
    pub fn is_given(&self) -> bool {
        *self != Self::default()
    }
}

/// What `--augment` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Augmentation {
    /// AutoAugment, 5 sub-policies.
    #[value(name = "autoaugment-v0", alias = "v0")]
    AutoaugmentV0,
    /// AutoAugment, 20 sub-policies.
    #[value(name = "autoaugment-v1", alias = "v1")]
    AutoaugmentV1,
    /// AutoAugment, 15 sub-policies of up to three operations.
    #[value(name = "autoaugment-v2", alias = "v2")]
    AutoaugmentV2,
    /// AutoAugment, 15 sub-policies of two operations.
    #[value(name = "autoaugment-v3", alias = "v3")]
    AutoaugmentV3,
    /// One operation of ten, magnitude 15.
    #[value(name = "randaugment", alias = "randaug")]
    Randaugment,
    /// GridMask.
    #[value(name = "gridmask", alias = "grid-mask")]
    Gridmask,
    /// None of these.
    None,
}

fn hsv(text: &str) -> Result<[f64; 3], String> {
    let numbers: Option<Vec<f64>> = text.split(',').map(|part| part.trim().parse().ok()).collect();
    numbers
        .and_then(|numbers| numbers.try_into().ok())
        .ok_or_else(|| "three numbers: hue,saturation,value, such as 0.015,0.7,0.4".to_owned())
}
