//! Typed hyper-parameters, model presets, profiles and overrides.
//!
//! Precedence, lowest first: defaults, model preset, overrides (`k=v,…`, TOML or YAML), dedicated options of the command line.

mod overrides;
mod presets;
#[cfg(test)]
mod tests;
mod types;
mod validate;

use serde::{Deserialize, Serialize};

pub use self::presets::PRESETS;
pub use self::types::{
    ActType, AnchorScale, Aspect, AutoaugmentPolicy, FusionMethod, ImageSize, IouLossKind, LrDecay,
    NmsConfigs, NmsMethod, OptimizerKind, Profile, ResizeRule, UpsampleRule,
};

/// Every hyper-parameter of a model and its training.
///
/// Names are those of the reference (`spec` of hyper-parameters of NVIDIA's EfficientDet and of automl).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HParams {
    /// Preset name, `efficientdet-d0` and so on.
    pub name: String,
    /// Family of conventions.
    pub profile: Profile,
    /// Backbone, `efficientnet-b0` … `b7`, `efficientnet-lite0` … `lite4`.
    pub backbone_name: String,
    /// Activation of backbone, BiFPN and heads.
    pub act_type: ActType,
    /// Network input size.
    pub image_size: ImageSize,
    /// Reference size of the scale jitter; none = `image_size`.
    pub target_size: Option<ImageSize>,
    /// Flip training images with probability one half.
    pub input_rand_hflip: bool,
    /// Smallest scale of the jitter.
    pub jitter_min: f64,
    /// Largest scale of the jitter.
    pub jitter_max: f64,
    /// AutoAugment policy; none = off.
    #[serde(default)]
    pub autoaugment_policy: Option<AutoaugmentPolicy>,
    /// GridMask.
    #[serde(default)]
    pub grid_mask: bool,
    /// Largest change of hue in turns, as Ultralytics; 0 = off.
    #[serde(default)]
    pub hsv_h: f64,
    /// Largest change of saturation as a fraction.
    #[serde(default)]
    pub hsv_s: f64,
    /// Largest change of value as a fraction.
    #[serde(default)]
    pub hsv_v: f64,
    /// Probability that four training images make one; 0 = off.
    #[serde(default)]
    pub mosaic: f64,
    /// Probability that two training images are blended; 0 = off.
    #[serde(default)]
    pub mixup: f64,
    /// Last epochs without mosaic and mixup.
    #[serde(default)]
    pub close_mosaic: f64,
    /// Decode training images in the reduced size that their scale leaves: faster, and other pixels than the reference's.
    #[serde(default)]
    pub reduced_decode: bool,
    /// Mean subtracted by the loader, RGB, in units of `[0, 255]`.
    pub mean_rgb: [f64; 3],
    /// Deviation divided by in the loader, RGB, in units of `[0, 255]`.
    pub stddev_rgb: [f64; 3],
    /// Source index rule of image resizing.
    pub resize_rule: ResizeRule,
    /// Normalise a second time inside the backbone (quirk of the seed that its checkpoints need).
    pub rescale_input: bool,
    /// Class outputs.
    pub num_classes: usize,
    /// Leave crowd objects out of training.
    pub skip_crowd_during_training: bool,
    /// Rows of the ground-truth table of one image.
    pub max_instances_per_image: usize,
    /// Replace source ids by hashes of the encoded image.
    pub regenerate_source_id: bool,
    /// Finest pyramid level.
    pub min_level: usize,
    /// Coarsest pyramid level.
    pub max_level: usize,
    /// Anchor octave scales per level.
    pub num_scales: usize,
    /// Anchor aspects.
    pub aspect_ratios: Vec<Aspect>,
    /// Anchor size relative to the level's stride.
    pub anchor_scale: AnchorScale,
    /// SGD momentum (Adam's β₁).
    pub momentum: f64,
    /// Optimiser.
    pub optimizer: OptimizerKind,
    /// Base learning rate.
    pub learning_rate: f64,
    /// Learning rate of step 0.
    pub lr_warmup_init: f64,
    /// Warm-up length in epochs.
    pub lr_warmup_epoch: f64,
    /// Schedule after the warm-up.
    pub lr_decay_method: LrDecay,
    /// Epoch of the first drop (stepwise).
    pub first_lr_drop_epoch: f64,
    /// Epoch of the second drop (stepwise).
    pub second_lr_drop_epoch: f64,
    /// Exponent (polynomial).
    pub poly_lr_power: f64,
    /// Gradient clipping, per variable then global; 0 = off.
    pub clip_gradients_norm: f64,
    /// Length of the schedule in epochs.
    pub num_epochs: f64,
    /// Label smoothing of the cross-entropy term.
    pub label_smoothing: f64,
    /// Focal loss α.
    pub alpha: f64,
    /// Focal loss γ.
    pub gamma: f64,
    /// Huber δ.
    pub delta: f64,
    /// Weight of the box loss.
    pub box_loss_weight: f64,
    /// IoU loss; none = off.
    pub iou_loss_type: Option<IouLossKind>,
    /// Weight of the IoU loss.
    pub iou_loss_weight: f64,
    /// L2 coefficient on kernels.
    pub weight_decay: f64,
    /// Half-precision training.
    pub mixed_precision: bool,
    /// Initial dynamic loss scale of half-precision training.
    pub loss_scale: f64,
    /// Convolutions per head before the predicting one.
    pub box_class_repeats: usize,
    /// BiFPN cells.
    pub fpn_cell_repeats: usize,
    /// BiFPN and head channels.
    pub fpn_num_filters: usize,
    /// Separable convolutions in BiFPN and heads.
    pub separable_conv: bool,
    /// Batch norm after channel-matching convolutions.
    pub apply_bn_for_resampling: bool,
    /// Channel-match after pooling instead of before.
    pub conv_after_downsample: bool,
    /// conv → BN → activation in BiFPN nodes instead of activation → conv → BN.
    pub conv_bn_act_pattern: bool,
    /// BiFPN topology; none = `bifpn`.
    pub fpn_name: Option<String>,
    /// BiFPN fusion; none = `fastattn`.
    pub fpn_weight_method: Option<FusionMethod>,
    /// ReLU on the fusion weights.
    pub fusion_relu: bool,
    /// Source index rule of upsampling in the BiFPN.
    pub upsample_rule: UpsampleRule,
    /// Survival probability of head layers; none = 1.
    pub survival_prob: Option<f64>,
    /// Survival probability of the last backbone block, earlier ones linearly nearer to 1; none = 1.
    pub backbone_survival_prob: Option<f64>,
    /// Options of non-maximum suppression.
    pub nms_configs: NmsConfigs,
    /// Moving average of weights; 0 = off.
    pub moving_average_decay: f64,
    /// Variables whose name matches (from its start) are not trained.
    pub var_freeze_expr: Option<String>,
}

/// Why a preset name or an override was refused; the message names the key, the value and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HParamsError {
    /// No such preset.
    #[error("unknown model {name:?}{suggestion}; known: {}", PRESETS.join(", "))]
    UnknownModel {
        /// The name given.
        name: String,
        /// `; did you mean …?` or nothing.
        suggestion: String,
    },
    /// No such hyper-parameter.
    #[error("unknown hyper-parameter {key:?}{suggestion}")]
    UnknownKey {
        /// The key given.
        key: String,
        /// `; did you mean …?` or nothing.
        suggestion: String,
    },
    /// A part of the override string is not of the form `key=value`.
    #[error("override {part:?} is not of the form key=value (parts are separated by commas)")]
    Syntax {
        /// The part.
        part: String,
    },
    /// A value does not fit its key.
    #[error("hyper-parameter {key} = {value}: {reason}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// Why it does not fit.
        reason: String,
    },
    /// The TOML or YAML text could not be read.
    #[error("hyper-parameters in {format}: {reason}")]
    Parse {
        /// `TOML` or `YAML`.
        format: &'static str,
        /// What the parser said.
        reason: String,
    },
}

impl HParams {
    /// Sets the profile and every convention that belongs to it.
    pub fn set_profile(&mut self, profile: Profile) {
        self.profile = profile;
        let google = profile == Profile::Google;
        self.rescale_input = !google;
        self.fusion_relu = google;
        self.num_classes = if google { 90 } else { 91 };
        self.resize_rule = if google {
            ResizeRule::HalfPixel
        } else {
            ResizeRule::Legacy
        };
        self.upsample_rule = if google {
            UpsampleRule::Legacy
        } else {
            UpsampleRule::HalfPixel
        };
        let root = std::f64::consts::SQRT_2;
        let (long, short) = if google { (root, 1.0 / root) } else { (1.4, 0.7) };
        self.aspect_ratios = vec![Aspect(1.0, 1.0), Aspect(long, short), Aspect(short, long)];
    }

    /// Anchors per cell: octave scales × aspects.
    pub fn anchors_per_cell(&self) -> usize {
        self.num_scales * self.aspect_ratios.len()
    }

    /// The fusion method in force.
    pub fn fusion(&self) -> FusionMethod {
        self.fpn_weight_method.unwrap_or(FusionMethod::FastAttn)
    }
}
