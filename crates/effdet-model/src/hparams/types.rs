//! The values that hyper-parameters take.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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
    /// Automatic augmentation of training images, after automl.
    AutoaugmentPolicy, "autoaugment_policy" {
        /// Learned policy of 5 sub-policies.
        V0 = "v0",
        /// `v0` and 15 more.
        V1 = "v1",
        /// 15 sub-policies of up to three operations.
        V2 = "v2",
        /// 15 sub-policies of two operations.
        V3 = "v3",
        /// Translation and equalisation, always.
        Test = "test",
        /// RandAugment: one operation of ten, magnitude 15.
        Randaug = "randaug",
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
