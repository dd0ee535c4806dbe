//! The network as data: an ordered list of stages with named variables.
//!
//! Engines, initialisers, checkpoints, importers, exporters, the parameter table and cost counts all read this one description.
//! Nothing here computes.
//!
//! Source: the reference's `model/efficientdet_keras.py`, `model/backbone`; arXiv:1911.09070 and arXiv:1905.11946.

mod build;
mod cost;
mod variables;

pub use build::NetworkError;
pub use cost::{StageCost, StageGroup};
pub use variables::{Initializer, Variable, VariableId, VariableKind, VariableTable};

use crate::hparams::HParams;

/// Batch-norm ε, everywhere in the network.
pub const BN_EPSILON: f32 = 1e-3;
/// Batch-norm momentum: `moving = 0.99·moving + 0.01·batch`.
pub const BN_MOMENTUM: f32 = 0.99;
/// Added to the sum of fast-attention fusion weights.
pub const FUSION_EPSILON: f32 = 1e-4;
/// Mean subtracted a second time inside the seed's backbone, RGB.
pub const RESCALE_MEAN_RGB: [f32; 3] = [0.485, 0.456, 0.406];
/// Deviation divided by a second time inside the seed's backbone, RGB.
pub const RESCALE_STDDEV_RGB: [f32; 3] = [0.229, 0.224, 0.225];

/// Height and width of a feature map in cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MapSize {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl MapSize {
    /// Cells.
    pub fn cells(self) -> usize {
        self.height * self.width
    }
}

/// A dense convolution, SAME padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv {
    /// Kernel `[k, k, in, out]`.
    pub kernel: VariableId,
    /// Bias `[out]`.
    pub bias: Option<VariableId>,
    /// Side of the kernel.
    pub size: usize,
    /// Stride.
    pub stride: usize,
    /// Input channels.
    pub in_channels: usize,
    /// Output channels.
    pub out_channels: usize,
}

/// A depthwise convolution, SAME padding, no bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depthwise {
    /// Kernel `[k, k, channels, 1]`.
    pub kernel: VariableId,
    /// Side of the kernel.
    pub size: usize,
    /// Stride.
    pub stride: usize,
    /// Channels.
    pub channels: usize,
}

/// A batch norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchNorm {
    /// Scale γ.
    pub gamma: VariableId,
    /// Shift β.
    pub beta: VariableId,
    /// Moving mean.
    pub mean: VariableId,
    /// Moving variance.
    pub variance: VariableId,
    /// Channels.
    pub channels: usize,
}

/// Depthwise 3×3 followed by a pointwise convolution with bias, nothing in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeparableConv {
    /// The depthwise half.
    pub depthwise: Depthwise,
    /// The pointwise half.
    pub pointwise: Conv,
}

/// Squeeze-and-excite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SqueezeExcite {
    /// Wide → narrow, with bias.
    pub reduce: Conv,
    /// Narrow → wide, with bias.
    pub expand: Conv,
}

/// The first convolution: 3×3 stride 2 → BN → activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stem {
    /// Convolution from RGB.
    pub conv: Conv,
    /// Its batch norm.
    pub bn: BatchNorm,
    /// Input map.
    pub input: MapSize,
    /// Output map.
    pub output: MapSize,
}

/// One inverted-bottleneck block: expand → depthwise → squeeze-excite → project (+ skip).
#[derive(Debug, Clone, PartialEq)]
pub struct MbConv {
    /// `stack_S/block_B`.
    pub name: String,
    /// 1×1 expansion and its batch norm; none when the ratio is 1.
    pub expand: Option<(Conv, BatchNorm)>,
    /// Depthwise convolution.
    pub depthwise: Depthwise,
    /// Its batch norm.
    pub depthwise_bn: BatchNorm,
    /// Squeeze-and-excite; none in the lite family.
    pub squeeze_excite: Option<SqueezeExcite>,
    /// 1×1 projection.
    pub project: Conv,
    /// Its batch norm.
    pub project_bn: BatchNorm,
    /// Whether the block input is added.
    pub skip: bool,
    /// Probability that the residual branch survives in training; 1 = always.
    pub survival: f32,
    /// Input map.
    pub input: MapSize,
    /// Output map.
    pub output: MapSize,
    /// Reduction level whose endpoint this block's output is (1 = half size …).
    pub endpoint: Option<usize>,
}

impl MbConv {
    /// The first of its variables.
    pub fn first_variable(&self) -> VariableId {
        (self.expand.as_ref()).map_or(self.depthwise.kernel, |(conv, _)| conv.kernel)
    }
}

/// 1×1 convolution (with bias) that brings a feature to F channels, and its batch norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelMatch {
    /// Convolution.
    pub conv: Conv,
    /// Batch norm; none when `apply_bn_for_resampling` is false.
    pub bn: Option<BatchNorm>,
}

/// How a feature reaches a node's map size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResizeKind {
    /// Sizes agree.
    Same,
    /// Max-pool, SAME padding with −∞; kernel = stride + 1 per axis.
    MaxPool {
        /// Vertical stride.
        stride_y: usize,
        /// Horizontal stride.
        stride_x: usize,
    },
    /// Nearest neighbour, by the network's upsampling rule.
    Nearest,
}

/// Resampling of one feature: channel match, then resize.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resample {
    /// Channel match, when the channels differ.
    pub channel_match: Option<ChannelMatch>,
    /// Resize.
    pub resize: ResizeKind,
    /// Input map.
    pub input: MapSize,
    /// Output map.
    pub output: MapSize,
}

/// A pyramid level above the backbone's.
#[derive(Debug, Clone, PartialEq)]
pub struct ExtraLevel {
    /// Level number.
    pub level: usize,
    /// `resample_pL`.
    pub name: String,
    /// From the level below.
    pub resample: Resample,
}

/// One input of a BiFPN node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeInput {
    /// Index in the cell's feature list: the cell's inputs first, then one feature per node.
    pub feature: usize,
    /// Its resampling.
    pub resample: Resample,
}

/// One BiFPN node: resample → fuse → activation → separable convolution → BN.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// `fpn_cells/cell_C/fnodeN`.
    pub name: String,
    /// Pyramid level.
    pub level: usize,
    /// Inputs in order.
    pub inputs: Vec<NodeInput>,
    /// Fusion weights, one per input; empty for plain sums.
    pub fusion_weights: Vec<VariableId>,
    /// Separable convolution.
    pub conv: SeparableConv,
    /// Its batch norm.
    pub bn: BatchNorm,
    /// Map.
    pub map: MapSize,
}

/// One BiFPN cell.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    /// Nodes in order; node `i` appends feature `levels + i`.
    pub nodes: Vec<Node>,
    /// Feature index of each level's output, finest first.
    pub outputs: Vec<usize>,
}

/// One repeated layer of a head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadLayer {
    /// Separable convolution shared by all levels.
    pub conv: SeparableConv,
    /// One batch norm per level.
    pub bns: Vec<BatchNorm>,
}

/// A class or box head.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// `class_net` or `box_net`.
    pub name: &'static str,
    /// Repeated layers.
    pub layers: Vec<HeadLayer>,
    /// Predicting separable convolution, no BN, no activation.
    pub predict: SeparableConv,
    /// Outputs per anchor: classes, or 4.
    pub outputs_per_anchor: usize,
}

/// A pyramid level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level {
    /// Level number; stride 2^level.
    pub level: usize,
    /// Map.
    pub map: MapSize,
}

/// A complete network for one image size.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    /// Hyper-parameters it was built from.
    pub hparams: HParams,
    /// All variables.
    pub variables: VariableTable,
    /// Stem.
    pub stem: Stem,
    /// Backbone blocks in order.
    pub blocks: Vec<MbConv>,
    /// Index in `blocks` of the block that gives each backbone level, finest first.
    pub backbone_levels: Vec<usize>,
    /// Levels above the backbone's.
    pub extra_levels: Vec<ExtraLevel>,
    /// BiFPN cells.
    pub cells: Vec<Cell>,
    /// Class head.
    pub class_head: Head,
    /// Box head.
    pub box_head: Head,
    /// Pyramid levels, finest first.
    pub levels: Vec<Level>,
}

impl Network {
    /// Describes the network of `hparams`.
    ///
    /// # Errors
    /// [`NetworkError`] for hyper-parameters no network of this family has.
    pub fn new(hparams: &HParams) -> Result<Self, NetworkError> {
        build::build(hparams)
    }

    /// Anchors per cell.
    pub fn anchors_per_cell(&self) -> usize {
        self.hparams.anchors_per_cell()
    }

    /// Anchors of one image.
    pub fn num_anchors(&self) -> usize {
        self.levels.iter().map(|level| level.map.cells()).sum::<usize>() * self.anchors_per_cell()
    }
}

/// SAME padding of one axis: output size and padding before.
///
/// `out = ceil(in/s)`, `total = max((out − 1)·s + k − in, 0)`, before = ⌊total/2⌋.
pub fn same_padding(input: usize, kernel: usize, stride: usize) -> (usize, usize) {
    let output = input.div_ceil(stride);
    let total = ((output - 1) * stride + kernel).saturating_sub(input);
    (output, total / 2)
}
