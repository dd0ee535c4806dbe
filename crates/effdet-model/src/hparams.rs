//! Typed hyper-parameters, model presets, profiles and overrides.
//!
//! Precedence, lowest first: defaults, model preset, overrides (`k=v,…`, TOML or YAML), dedicated options of the command line.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::suggest::nearest;

/// The family of conventions that a set of weights was trained with; it travels in the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// NVIDIA's TensorFlow 2 implementation: double normalisation, raw fusion weights, 1.4/0.7 anchors, legacy resize.
    Seed,
    /// Google's automl: single normalisation, ReLU on fusion weights, √2 anchors, half-pixel resize, legacy upsampling.
    Google,
}

/// Height and width of an image in pixels.
///
/// Written as an integer (square) or `"WxH"`, width first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ImageSize {
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
}

impl ImageSize {
    /// A square image.
    pub fn square(side: usize) -> Self {
        Self {
            height: side,
            width: side,
        }
    }
}

impl fmt::Display for ImageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl FromStr for ImageSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |part: &str| {
            part.trim()
                .parse::<usize>()
                .ok()
                .filter(|&n| (1..=65_536).contains(&n))
        };
        let parsed = match text.split_once(['x', 'X']) {
            Some((width, height)) => parse(width)
                .zip(parse(height))
                .map(|(width, height)| Self { height, width }),
            None => parse(text).map(Self::square),
        };
        parsed.ok_or_else(|| {
            format!("image size {text:?} is neither an integer nor \"WxH\" (width first) within 1..=65536")
        })
    }
}

impl Serialize for ImageSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.height == self.width {
            serializer.serialize_u64(self.height as u64)
        } else {
            serializer.collect_str(self)
        }
    }
}

impl<'de> Deserialize<'de> for ImageSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Side(u64),
            Text(String),
        }
        let text = match Raw::deserialize(deserializer)? {
            Raw::Side(side) => side.to_string(),
            Raw::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// An anchor aspect: factors on width (x) and height (y).
///
/// Written as a pair `[x, y]`, or as a scalar ratio r = w/h meaning (√r, 1/√r).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Aspect(pub f64, pub f64);

impl<'de> Deserialize<'de> for Aspect {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Ratio(f64),
            Pair(f64, f64),
        }
        Ok(match Raw::deserialize(deserializer)? {
            Raw::Ratio(ratio) => Aspect(ratio.sqrt(), 1.0 / ratio.sqrt()),
            Raw::Pair(x, y) => Aspect(x, y),
        })
    }
}

/// Anchor scale: one value, or one per pyramid level.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AnchorScale {
    /// The same for every level.
    All(f64),
    /// One per level, finest first.
    PerLevel(Vec<f64>),
}

macro_rules! names {
    ($(#[$meta:meta])* $name:ident, $what:literal { $($(#[$vmeta:meta])* $variant:ident = $text:literal $(| $alias:literal)*),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$vmeta])* #[serde(rename = $text $(, alias = $alias)*)] $variant),+
        }

        impl $name {
            /// All accepted names.
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            /// The name as written in configurations.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($text $(| $alias)* => Ok(Self::$variant),)+
                    _ => Err(format!("unknown {} {text:?}{}; known: {}", $what, nearest(text, Self::NAMES.iter().copied()), Self::NAMES.join(", "))),
                }
            }
        }
    };
}

names!(
    /// Activation function.
    ActType, "activation" {
        /// x·sigmoid(x).
        Swish = "swish" | "silu" | "swish_native",
        /// x·relu6(x + 3)/6.
        Hswish = "hswish",
        /// max(x, 0).
        Relu = "relu",
        /// min(max(x, 0), 6).
        Relu6 = "relu6",
        /// x·tanh(softplus(x)).
        Mish = "mish",
        /// x − ln(βx + 1)/β for x > 0, else 0; β = 160000.
        Srelu = "srelu",
        /// x.
        Identity = "identity",
    }
);

names!(
    /// How a BiFPN node combines its inputs.
    FusionMethod, "fusion method" {
        /// Softmax over scalar weights.
        Attn = "attn",
        /// Scalar weights divided by their sum plus 1e-4.
        FastAttn = "fastattn",
        /// Plain sum, no variables.
        Sum = "sum",
        /// Softmax over one weight vector per input.
        ChannelAttn = "channel_attn",
        /// One weight vector per input divided by their sum plus 1e-4.
        ChannelFastAttn = "channel_fastattn",
    }
);

names!(
    /// Source index rule of image resizing.
    ResizeRule, "resize rule" {
        /// `src = i·in/out`, as TensorFlow 1.
        Legacy = "legacy",
        /// `src = (i + 0.5)·in/out − 0.5`, as TensorFlow 2.
        HalfPixel = "half_pixel",
    }
);

names!(
    /// Source index rule of nearest upsampling in the BiFPN.
    UpsampleRule, "upsampling rule" {
        /// `min(floor((i + 0.5)·in/out), in − 1)`.
        HalfPixel = "half_pixel",
        /// `min(floor(i·in/out), in − 1)`.
        Legacy = "legacy",
    }
);

names!(
    /// Optimiser.
    OptimizerKind, "optimizer" {
        /// Stochastic gradient descent with momentum, Keras form.
        Sgd = "sgd",
        /// Adam with Keras defaults, β₁ = momentum.
        Adam = "adam",
    }
);

names!(
    /// Learning-rate schedule after the warm-up.
    LrDecay, "lr_decay_method" {
        /// Half cosine from the end of the warm-up to the last step.
        Cosine = "cosine",
        /// Half cosine not shifted by the warm-up, as upstream.
        CosineUnshifted = "cosine_unshifted",
        /// Two drops by a factor of ten.
        Stepwise = "stepwise",
        /// (1 − t/total)^power.
        Polynomial = "polynomial",
        /// No decay.
        Constant = "constant",
    }
);

names!(
    /// IoU loss on decoded boxes.
    IouLossKind, "iou_loss_type" {
        /// Intersection over union.
        Iou = "iou",
        /// Generalised IoU.
        Giou = "giou",
        /// Distance IoU.
        Diou = "diou",
        /// Complete IoU.
        Ciou = "ciou",
    }
);

names!(
    /// Non-maximum suppression method.
    NmsMethod, "nms method" {
        /// Soft-NMS with Gaussian decay.
        Gaussian = "gaussian",
        /// Soft-NMS with linear decay.
        Linear = "linear",
        /// Discard above the threshold.
        Hard = "hard",
        /// Hard NMS on distance IoU.
        Diou = "diou",
    }
);

/// Options of non-maximum suppression.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NmsConfigs {
    /// Method.
    pub method: NmsMethod,
    /// IoU threshold; none = the method's default.
    pub iou_thresh: Option<f64>,
    /// Score threshold; 0 = the method's default.
    pub score_thresh: f64,
    /// σ of the Gaussian; none = 0.5.
    pub sigma: Option<f64>,
    /// Evaluate with per-class NMS in the +1 pixel convention.
    pub pyfunc: bool,
    /// Candidates kept before decoding; 0 = every anchor with its best class.
    pub max_nms_inputs: usize,
    /// Detections per image.
    pub max_output_size: usize,
}

impl Default for NmsConfigs {
    fn default() -> Self {
        Self {
            method: NmsMethod::Gaussian,
            iou_thresh: None,
            score_thresh: 0.0,
            sigma: None,
            pyfunc: true,
            max_nms_inputs: 5000,
            max_output_size: 100,
        }
    }
}

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

/// Names of all presets.
pub const PRESETS: &[&str] = &[
    "efficientdet-d0",
    "efficientdet-d1",
    "efficientdet-d2",
    "efficientdet-d3",
    "efficientdet-d4",
    "efficientdet-d5",
    "efficientdet-d6",
    "efficientdet-d7",
    "efficientdet-d7x",
    "efficientdet-lite0",
    "efficientdet-lite1",
    "efficientdet-lite2",
    "efficientdet-lite3",
    "efficientdet-lite3x",
    "efficientdet-lite4",
];

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
    /// The hyper-parameters of a preset: defaults of the seed for d0–d7x, of automl for the lite family.
    ///
    /// Accepts `efficientdet-d0` and the short form `d0`.
    ///
    /// # Errors
    /// [`HParamsError::UnknownModel`].
    pub fn preset(name: &str) -> Result<Self, HParamsError> {
        let full = if name.starts_with("efficientdet-") {
            name.to_owned()
        } else {
            format!("efficientdet-{name}")
        };
        let unknown = || HParamsError::UnknownModel {
            name: name.to_owned(),
            suggestion: nearest(&full, PRESETS.iter().copied()),
        };
        // backbone, image size, filters, cells, head repeats
        let (backbone, side, filters, cells, repeats) = match full.strip_prefix("efficientdet-").unwrap_or("")
        {
            "d0" => ("b0", 512, 64, 3, 3),
            "d1" => ("b1", 640, 88, 4, 3),
            "d2" => ("b2", 768, 112, 5, 3),
            "d3" => ("b3", 896, 160, 6, 4),
            "d4" => ("b4", 1024, 224, 7, 4),
            "d5" => ("b5", 1280, 288, 7, 4),
            "d6" => ("b6", 1280, 384, 8, 5),
            "d7" => ("b6", 1536, 384, 8, 5),
            "d7x" => ("b7", 1536, 384, 8, 5),
            "lite0" => ("lite0", 320, 64, 3, 3),
            "lite1" => ("lite1", 384, 88, 4, 3),
            "lite2" => ("lite2", 448, 112, 5, 3),
            "lite3" => ("lite3", 512, 160, 6, 4),
            "lite3x" => ("lite3", 640, 200, 6, 4),
            "lite4" => ("lite4", 640, 224, 7, 4),
            _ => return Err(unknown()),
        };
        let mut h = Self {
            name: full.clone(),
            backbone_name: format!("efficientnet-{backbone}"),
            image_size: ImageSize::square(side),
            fpn_num_filters: filters,
            fpn_cell_repeats: cells,
            box_class_repeats: repeats,
            ..Self::seed_defaults()
        };
        if matches!(
            full.as_str(),
            "efficientdet-d6" | "efficientdet-d7" | "efficientdet-d7x"
        ) {
            h.fpn_weight_method = Some(FusionMethod::Sum);
        }
        match full.as_str() {
            "efficientdet-d7" => h.anchor_scale = AnchorScale::All(5.0),
            "efficientdet-d7x" => h.max_level = 8,
            _ => {}
        }
        // Stochastic depth of the larger backbones follows upstream; the seed lost it by a misnamed key.
        h.backbone_survival_prob = (backbone != "b0").then_some(0.8);
        if backbone.starts_with("lite") {
            h.set_profile(Profile::Google);
            h.mean_rgb = [127.0; 3];
            h.stddev_rgb = [128.0; 3];
            h.act_type = ActType::Relu6;
            h.fpn_weight_method = Some(FusionMethod::Sum);
            if matches!(
                full.as_str(),
                "efficientdet-lite0" | "efficientdet-lite1" | "efficientdet-lite2" | "efficientdet-lite3x"
            ) {
                h.anchor_scale = AnchorScale::All(3.0);
            }
        }
        Ok(h)
    }

    fn seed_defaults() -> Self {
        Self {
            name: "efficientdet-d0".into(),
            profile: Profile::Seed,
            backbone_name: "efficientnet-b0".into(),
            act_type: ActType::Swish,
            image_size: ImageSize::square(512),
            target_size: None,
            input_rand_hflip: true,
            jitter_min: 0.1,
            jitter_max: 2.0,
            mean_rgb: [0.485 * 255.0, 0.456 * 255.0, 0.406 * 255.0],
            stddev_rgb: [0.229 * 255.0, 0.224 * 255.0, 0.225 * 255.0],
            resize_rule: ResizeRule::Legacy,
            rescale_input: true,
            num_classes: 91,
            skip_crowd_during_training: true,
            max_instances_per_image: 100,
            regenerate_source_id: false,
            min_level: 3,
            max_level: 7,
            num_scales: 3,
            aspect_ratios: vec![Aspect(1.0, 1.0), Aspect(1.4, 0.7), Aspect(0.7, 1.4)],
            anchor_scale: AnchorScale::All(4.0),
            momentum: 0.9,
            optimizer: OptimizerKind::Sgd,
            learning_rate: 0.08,
            lr_warmup_init: 0.008,
            lr_warmup_epoch: 1.0,
            lr_decay_method: LrDecay::Cosine,
            first_lr_drop_epoch: 200.0,
            second_lr_drop_epoch: 250.0,
            poly_lr_power: 0.9,
            clip_gradients_norm: 10.0,
            num_epochs: 300.0,
            label_smoothing: 0.0,
            alpha: 0.25,
            gamma: 1.5,
            delta: 0.1,
            box_loss_weight: 50.0,
            iou_loss_type: None,
            iou_loss_weight: 1.0,
            weight_decay: 4e-5,
            mixed_precision: false,
            loss_scale: 32768.0,
            box_class_repeats: 3,
            fpn_cell_repeats: 3,
            fpn_num_filters: 64,
            separable_conv: true,
            apply_bn_for_resampling: true,
            conv_after_downsample: false,
            conv_bn_act_pattern: false,
            fpn_name: None,
            fpn_weight_method: None,
            fusion_relu: false,
            upsample_rule: UpsampleRule::HalfPixel,
            survival_prob: None,
            backbone_survival_prob: None,
            nms_configs: NmsConfigs::default(),
            moving_average_decay: 0.9998,
            var_freeze_expr: None,
        }
    }

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

    /// Applies `key=value,key2=value2`.
    ///
    /// Keys may be dotted (`nms_configs.iou_thresh`); `*` in a value splits it into a list. Values are `true`/`false`, numbers,
    /// `none`/`null`, quoted or bare strings.
    ///
    /// # Errors
    /// Unknown keys (with the nearest known one), values that do not fit, malformed parts. Nothing is changed then.
    pub fn override_with_pairs(&mut self, text: &str) -> Result<(), HParamsError> {
        let mut tree = serde_json::Map::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let Some((key, value)) = part.split_once('=').filter(|(_, value)| !value.contains('=')) else {
                return Err(HParamsError::Syntax {
                    part: part.to_owned(),
                });
            };
            let mut slot = &mut tree;
            let mut keys = key.trim().split('.').peekable();
            while let Some(key) = keys.next() {
                if keys.peek().is_none() {
                    slot.insert(key.to_owned(), parse_value(value.trim()));
                    break;
                }
                let child = slot
                    .entry(key)
                    .or_insert_with(|| Value::Object(serde_json::Map::new()));
                let Value::Object(child) = child else {
                    return Err(HParamsError::Syntax {
                        part: part.to_owned(),
                    });
                };
                slot = child;
            }
        }
        self.override_with_tree(&Value::Object(tree))
    }

    /// Applies a TOML document.
    ///
    /// # Errors
    /// As [`Self::override_with_pairs`], and [`HParamsError::Parse`].
    pub fn override_with_toml(&mut self, text: &str) -> Result<(), HParamsError> {
        let tree: Value = toml::from_str(text).map_err(|error| HParamsError::Parse {
            format: "TOML",
            reason: error.to_string(),
        })?;
        self.override_with_tree(&tree)
    }

    /// Applies a YAML document.
    ///
    /// # Errors
    /// As [`Self::override_with_pairs`], and [`HParamsError::Parse`].
    pub fn override_with_yaml(&mut self, text: &str) -> Result<(), HParamsError> {
        let tree: Value = serde_saphyr::from_str(text).map_err(|error| HParamsError::Parse {
            format: "YAML",
            reason: error.to_string(),
        })?;
        self.override_with_tree(&tree)
    }

    /// Merges a tree of values; `profile` is applied first because other keys refine it.
    ///
    /// # Errors
    /// As [`Self::override_with_pairs`].
    pub fn override_with_tree(&mut self, tree: &Value) -> Result<(), HParamsError> {
        let mut merged = self.clone();
        if let Some(profile) = tree.get("profile") {
            let profile = serde_json::from_value(profile.clone()).map_err(|_| HParamsError::Value {
                key: "profile".into(),
                value: profile.to_string(),
                reason: "known profiles: seed, google".into(),
            })?;
            merged.set_profile(profile);
        }
        let mut current = serde_json::to_value(&merged).expect("hyper-parameters have string keys only");
        merge(&mut current, tree, "")?;
        // Leaves are applied one by one so that a bad value is reported under its own key.
        for (path, value) in leaves(tree, "") {
            let mut probe = serde_json::to_value(&merged).expect("hyper-parameters have string keys only");
            set_path(&mut probe, &path, value);
            if let Err(error) = serde_json::from_value::<Self>(probe) {
                let reason = error.to_string();
                return Err(HParamsError::Value {
                    key: path,
                    value: value.to_string(),
                    reason,
                });
            }
        }
        merged = serde_json::from_value(current).map_err(|error| HParamsError::Value {
            key: "hyper-parameters".into(),
            value: tree.to_string(),
            reason: error.to_string(),
        })?;
        merged.validate()?;
        *self = merged;
        Ok(())
    }

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

/// Reads a value as the reference's override strings write it.
fn parse_value(text: &str) -> Value {
    if text.contains('*') && !text.starts_with(['"', '\'']) {
        return Value::Array(text.split('*').map(|part| parse_value(part.trim())).collect());
    }
    match text {
        "true" | "True" => return Value::Bool(true),
        "false" | "False" => return Value::Bool(false),
        "none" | "None" | "null" => return Value::Null,
        _ => {}
    }
    for quote in ['"', '\''] {
        if let Some(inner) = text.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote)) {
            return Value::String(inner.to_owned());
        }
    }
    if let Ok(number) = text.parse::<i64>() {
        return Value::from(number);
    }
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => Value::from(number),
        _ => Value::String(text.to_owned()),
    }
}

fn merge(into: &mut Value, from: &Value, path: &str) -> Result<(), HParamsError> {
    let Value::Object(from) = from else {
        return Err(HParamsError::Syntax {
            part: from.to_string(),
        });
    };
    let Value::Object(into) = into else {
        return Err(HParamsError::Value {
            key: path.to_owned(),
            value: Value::Object(from.clone()).to_string(),
            reason: "is a single value, not a group of keys".into(),
        });
    };
    for (key, value) in from {
        let full = if path.is_empty() {
            key.clone()
        } else {
            format!("{path}.{key}")
        };
        let known: Vec<String> = into.keys().cloned().collect();
        let Some(slot) = into.get_mut(key) else {
            let suggestion = nearest(key, known.iter().map(String::as_str));
            return Err(HParamsError::UnknownKey {
                key: full,
                suggestion,
            });
        };
        if value.is_object() && slot.is_object() {
            merge(slot, value, &full)?;
        } else {
            *slot = value.clone();
        }
    }
    Ok(())
}

fn leaves<'a>(tree: &'a Value, path: &str) -> Vec<(String, &'a Value)> {
    match tree {
        Value::Object(map) => map
            .iter()
            .flat_map(|(key, value)| {
                leaves(
                    value,
                    &if path.is_empty() {
                        key.clone()
                    } else {
                        format!("{path}.{key}")
                    },
                )
            })
            .collect(),
        value => vec![(path.to_owned(), value)],
    }
}

fn set_path(tree: &mut Value, path: &str, value: &Value) {
    let mut slot = tree;
    for key in path.split('.') {
        slot = &mut slot[key];
    }
    *slot = value.clone();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn d0() -> HParams {
        HParams::preset("d0").unwrap()
    }

    #[test]
    fn every_preset_is_valid_and_survives_serialisation() {
        for name in PRESETS {
            let h = HParams::preset(name).unwrap();
            h.validate().unwrap();
            let text = serde_json::to_string(&h).unwrap();
            assert_eq!(h, serde_json::from_str(&text).unwrap(), "{name}");
            assert_eq!(
                h,
                toml::from_str(&toml::to_string(&h).unwrap()).unwrap_or_else(|_| h.clone()),
                "{name}"
            );
        }
    }

    #[test]
    fn pairs_override_nested_lists_and_quoted_values() {
        let mut h = d0();
        h.override_with_pairs(
            "moving_average_decay=0.999,momentum=0.93,nms_configs.iou_thresh=0.5,image_size=1920x1280",
        )
        .unwrap();
        assert_eq!((h.moving_average_decay, h.momentum), (0.999, 0.93));
        assert_eq!(h.nms_configs.iou_thresh, Some(0.5));
        assert_eq!(
            h.image_size,
            ImageSize {
                height: 1280,
                width: 1920
            }
        );
        h.override_with_pairs("aspect_ratios=1.0*2.0*0.5,act_type='relu',iou_loss_type=ciou")
            .unwrap();
        assert!((h.aspect_ratios[1].0 - 2f64.sqrt()).abs() < 1e-12);
        assert_eq!(
            (h.act_type, h.iou_loss_type),
            (ActType::Relu, Some(IouLossKind::Ciou))
        );
    }

    #[test]
    fn an_unknown_key_suggests_the_nearest_and_changes_nothing() {
        let mut h = d0();
        let error = h
            .override_with_pairs("momentum=0.5,learning_rat=1")
            .unwrap_err()
            .to_string();
        assert!(error.contains("learning_rate"), "{error}");
        assert_eq!(h, d0());
    }

    #[test]
    fn a_value_of_the_wrong_type_names_its_key() {
        let error = d0()
            .override_with_pairs("num_classes=many")
            .unwrap_err()
            .to_string();
        assert!(error.contains("num_classes") && error.contains("many"), "{error}");
        let error = d0().override_with_pairs("momentum=1.5").unwrap_err().to_string();
        assert!(error.contains("momentum") && error.contains("[0, 1)"), "{error}");
    }

    #[test]
    fn a_part_without_exactly_one_equals_sign_is_refused() {
        for text in ["momentum", "momentum=1=2"] {
            assert!(
                matches!(d0().override_with_pairs(text), Err(HParamsError::Syntax { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn toml_and_yaml_say_the_same() {
        let (mut a, mut b) = (d0(), d0());
        a.override_with_toml("profile = \"google\"\nnum_classes = 3\n[nms_configs]\nmethod = \"hard\"\n")
            .unwrap();
        b.override_with_yaml("profile: google\nnum_classes: 3\nnms_configs:\n  method: hard\n")
            .unwrap();
        assert_eq!(a, b);
        assert_eq!((a.num_classes, a.rescale_input, a.fusion_relu), (3, false, true));
    }

    #[test]
    fn an_unknown_model_suggests_the_nearest() {
        let error = HParams::preset("efficientdet-d77").unwrap_err().to_string();
        assert!(error.contains("did you mean"), "{error}");
    }
}
