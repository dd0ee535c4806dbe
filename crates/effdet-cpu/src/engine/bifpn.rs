//! Extra pyramid levels and BiFPN cells.

mod backward;
mod forward;

use effdet_model::hparams::UpsampleRule;
use effdet_model::network::{ChannelMatch, MapSize, Network, Node, Resample, ResizeKind};

use super::batch_norm::BatchNormState;
use super::build::{Beside, BuildContext};
use super::pass::Pass;
use super::timeline::{Step, Timeline};
use crate::arena::{AlignedBuf, Lifetime};
use crate::kernels::depthwise::DepthwisePlan;
use crate::kernels::elementwise::{self, Activate, Affine, Source};
use crate::kernels::pointwise::{self, PackedWeights, Packing, RowPlan};
use crate::kernels::resample::Resampler;
use crate::math::Act;

/// Where a feature comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// A backbone level, finest first.
    Backbone(usize),
    /// An extra level or a node's output, in order of creation.
    Feature(usize),
}

/// A feature map of the pyramid.
#[derive(Debug)]
struct Feature {
    map: MapSize,
    raw: AlignedBuf,
    /// Batch norm on it; none for extra levels, which are stored finished.
    bn: Option<BatchNormState>,
    gradient: Gradient,
}

/// The gradient by a tensor with several consumers.
#[derive(Debug, Default)]
struct Gradient {
    values: AlignedBuf,
    /// Whether a consumer has written it in this backward pass; further ones add.
    written: bool,
}

/// 1×1 convolution to F channels with its batch norm.
#[derive(Debug)]
struct MatchState {
    layer: ChannelMatch,
    weights: PackedWeights,
    y: AlignedBuf,
    bn: Option<BatchNormState>,
    gradient: AlignedBuf,
    rows: RowPlan,
}

/// One resampled input.
#[derive(Debug)]
struct InputState {
    origin: Origin,
    matched: Option<MatchState>,
    resampler: Resampler,
    argmax: AlignedBuf,
}

#[derive(Debug)]
struct ExtraState {
    input: InputState,
    /// Index of the feature it makes.
    output: usize,
}

#[derive(Debug)]
struct NodeState {
    layer: Node,
    inputs: Vec<InputState>,
    fused: AlignedBuf,
    depthwise: DepthwisePlan,
    depthwise_output: AlignedBuf,
    /// Gradients by the outputs of the depthwise half and of the fusion.
    d_depthwise: AlignedBuf,
    d_fused: AlignedBuf,
    pointwise: PackedWeights,
    rows: RowPlan,
    /// Index of the feature it makes.
    output: usize,
}

/// The feature pyramid with its buffers for one batch size.
#[derive(Debug)]
pub(super) struct Pyramid {
    images: usize,
    act: Act,
    filters: usize,
    extra: Vec<ExtraState>,
    nodes: Vec<NodeState>,
    features: Vec<Feature>,
    level_gradients: Vec<Gradient>,
    /// Features of each cell's outputs, finest first.
    cell_outputs: Vec<Vec<usize>>,
    last_block: Option<usize>,
}

impl Feature {
    /// The feature that step `made` makes; `gradient_from` is the first step that adds to its gradient.
    fn new(
        map: MapSize,
        filters: usize,
        bn: Option<BatchNormState>,
        context: &mut BuildContext<'_>,
        (made, gradient_from, undone): (Step, u32, Step),
    ) -> Self {
        let len = context.images * map.cells() * filters;
        let gradient_steps = Lifetime {
            first: gradient_from,
            last: context.timeline.number(undone),
        };
        let values = context.gradient("bifpn: gradients", len, gradient_steps);
        let steps = context.timeline.span(made, undone);
        Self {
            map,
            raw: context.memory.buffer("bifpn: activations", len, steps),
            bn,
            gradient: Gradient {
                values,
                written: false,
            },
        }
    }

    fn affine(&self) -> Option<Affine<'_>> {
        self.bn.as_ref().map(BatchNormState::affine)
    }
}

impl InputState {
    /// The input of what step `made` makes and step `undone` takes back.
    fn new(
        origin: Origin,
        resample: &Resample,
        filters: usize,
        rule: UpsampleRule,
        context: &mut BuildContext<'_>,
        (made, undone): (Step, Step),
    ) -> Self {
        let Resample {
            channel_match,
            resize,
            input,
            output,
        } = *resample;
        let images = context.images;
        let steps = context.timeline.span(made, undone);
        let pooled = matches!(resize, ResizeKind::MaxPool { .. });
        Self {
            origin,
            matched: channel_match.map(|layer| {
                let len = images * input.cells() * filters;
                let gradient_steps = context.timeline.during(undone);
                MatchState {
                    weights: context.weights(layer.conv.in_channels, layer.conv.out_channels),
                    y: context.memory.buffer("bifpn: activations", len, steps),
                    bn: layer.bn.map(|bn| BatchNormState::new(&[bn])),
                    gradient: context.gradient("bifpn: gradients", len, gradient_steps),
                    rows: RowPlan::images(images, input.cells()),
                    layer,
                }
            }),
            resampler: Resampler::new(input, output, resize, rule),
            argmax: context.gradient(
                "bifpn: activations",
                if pooled {
                    images * output.cells() * filters
                } else {
                    0
                },
                steps,
            ),
        }
    }
}

/// The first step of the backward pass that adds to the gradient of each backbone level and feature.
fn gradient_starts(network: &Network, timeline: Timeline) -> (Vec<u32>, Vec<u32>) {
    let of_block =
        |&block: &usize| timeline.number(Step::BlockBackward((block + 1).min(timeline.blocks() - 1)));
    let mut levels: Vec<u32> = network.backbone_levels.iter().map(of_block).collect();
    let mut features: Vec<u32> = Vec::new();
    let mut origins: Vec<Origin> = (0..levels.len()).map(Origin::Backbone).collect();
    let read = |levels: &mut [u32], features: &mut [u32], origin: Origin, step: Step| {
        let start = match origin {
            Origin::Backbone(level) => &mut levels[level],
            Origin::Feature(feature) => &mut features[feature],
        };
        *start = timeline.number(step).min(*start);
    };
    for index in 0..network.extra_levels.len() {
        let step = Step::ExtraLevelBackward(index);
        read(&mut levels, &mut features, origins[origins.len() - 1], step);
        origins.push(Origin::Feature(features.len()));
        features.push(timeline.number(step));
    }
    let mut node = 0;
    for cell in &network.cells {
        let mut ids = origins.clone();
        for layer in &cell.nodes {
            let step = Step::NodeBackward(node);
            for input in &layer.inputs {
                read(&mut levels, &mut features, ids[input.feature], step);
            }
            ids.push(Origin::Feature(features.len()));
            features.push(timeline.number(step));
            node += 1;
        }
        origins = cell.outputs.iter().map(|&id| ids[id]).collect();
    }
    for origin in origins {
        read(&mut levels, &mut features, origin, Step::HeadGradient);
    }
    (levels, features)
}

impl Pyramid {
    pub(super) fn new(network: &Network, act: Act, context: &mut BuildContext<'_>) -> Self {
        let (images, timeline) = (context.images, context.timeline);
        let filters = network.hparams.fpn_num_filters;
        let rule = network.hparams.upsample_rule;
        let (level_starts, feature_starts) = gradient_starts(network, timeline);
        let mut features = Vec::new();
        let mut origins: Vec<Origin> = (0..network.backbone_levels.len()).map(Origin::Backbone).collect();
        let mut extra = Vec::new();
        for (index, level) in network.extra_levels.iter().enumerate() {
            let origin = origins[origins.len() - 1];
            let steps = (Step::ExtraLevel(index), Step::ExtraLevelBackward(index));
            let input = InputState::new(origin, &level.resample, filters, rule, context, steps);
            let output = features.len();
            origins.push(Origin::Feature(output));
            extra.push(ExtraState { input, output });
            let steps = (steps.0, feature_starts[output], steps.1);
            features.push(Feature::new(level.resample.output, filters, None, context, steps));
        }
        let mut nodes = Vec::new();
        let mut cell_outputs = Vec::new();
        for cell in &network.cells {
            let mut ids = origins.clone();
            for layer in &cell.nodes {
                let output = features.len();
                let (made, undone) = (Step::Node(nodes.len()), Step::NodeBackward(nodes.len()));
                let steps = timeline.span(made, undone);
                let inputs = (layer.inputs.iter())
                    .map(|input| {
                        let origin = ids[input.feature];
                        InputState::new(origin, &input.resample, filters, rule, context, (made, undone))
                    })
                    .collect();
                let len = layer.map.cells() * images * filters;
                let undone_steps = timeline.during(undone);
                let mut buffer = |len| context.memory.buffer("bifpn: activations", len, steps);
                let (fused, depthwise_output) = (buffer(len), buffer(len));
                nodes.push(NodeState {
                    layer: layer.clone(),
                    inputs,
                    fused,
                    depthwise: DepthwisePlan::new(images, &[layer.map], filters, 3, 1),
                    depthwise_output,
                    d_depthwise: context.gradient("bifpn: gradients", len, undone_steps),
                    d_fused: context.gradient("bifpn: gradients", len, undone_steps),
                    pointwise: context.weights(filters, filters),
                    rows: RowPlan::images(images, layer.map.cells()),
                    output,
                });
                let bn = BatchNormState::new(&[layer.bn]);
                let steps = (made, feature_starts[output], undone);
                features.push(Feature::new(layer.map, filters, Some(bn), context, steps));
                ids.push(Origin::Feature(output));
            }
            origins = cell.outputs.iter().map(|&id| ids[id]).collect();
            let made = |origin: &Origin| match *origin {
                Origin::Feature(feature) => Some(feature),
                Origin::Backbone(_) => None,
            };
            cell_outputs.push(origins.iter().filter_map(made).collect());
        }
        let level_gradients = (network.backbone_levels.iter().zip(level_starts))
            .map(|(&block, first)| {
                let last = timeline.number(Step::BlockBackward((block + 1).min(timeline.blocks() - 1)));
                let block = &network.blocks[block];
                let len = images * block.output.cells() * block.project.out_channels;
                // All levels are handed to the backbone together, before its first step.
                let first = first.min(timeline.number(Step::BlockBackward(timeline.blocks() - 1)));
                Gradient {
                    values: context.gradient("bifpn: gradients", len, Lifetime { first, last }),
                    written: false,
                }
            })
            .collect();
        Self {
            images,
            act,
            filters,
            extra,
            nodes,
            features,
            level_gradients,
            cell_outputs,
            last_block: timeline.blocks().checked_sub(1),
        }
    }

    /// Packs the weights of all pointwise convolutions.
    pub(super) fn pack(&mut self, pass: &Pass<'_>, packing: Packing) {
        let mut layers: Vec<(&mut PackedWeights, &[f32])> = Vec::new();
        let extra = self.extra.iter_mut().map(|extra| &mut extra.input);
        let (mut inputs, mut convs) = (extra.collect::<Vec<_>>(), Vec::new());
        for node in &mut self.nodes {
            inputs.extend(&mut node.inputs);
            convs.push((
                &mut node.pointwise,
                pass.variable(node.layer.conv.pointwise.kernel),
            ));
        }
        for matched in inputs.into_iter().filter_map(|input| input.matched.as_mut()) {
            layers.push((&mut matched.weights, pass.variable(matched.layer.conv.kernel)));
        }
        layers.extend(convs);
        pointwise::pack(pass.executor, packing, &mut layers);
    }

    /// Adds what every convolution needs beside its buffers.
    pub(super) fn count(&self, estimate: &mut Beside) {
        let inputs = (self.extra.iter().map(|extra| &extra.input))
            .chain(self.nodes.iter().flat_map(|node| &node.inputs));
        for matched in inputs.filter_map(|input| input.matched.as_ref()) {
            estimate.pointwise(&matched.weights, &matched.rows);
        }
        for node in &self.nodes {
            estimate.pointwise(&node.pointwise, &node.rows);
            estimate.depthwise(&node.depthwise);
        }
    }

    /// Map, batch-normalised values and level index of extra level `index`, for tracing.
    pub(super) fn extra_level(&self, index: usize) -> (MapSize, &[f32]) {
        let feature = &self.features[self.extra[index].output];
        (feature.map, &feature.raw)
    }

    /// Writes the outputs of a cell, `[level][image][cell][F]`.
    pub(super) fn write_outputs(&self, pass: &Pass<'_>, cell: usize, out: &mut [f32]) {
        let mut rest = out;
        for &index in &self.cell_outputs[cell] {
            let feature = &self.features[index];
            let (slice, tail) = rest.split_at_mut(feature.raw.len());
            rest = tail;
            let args = Activate {
                rows: &RowPlan::images(self.images, feature.map.cells()),
                channels: self.filters,
                source: Source {
                    raw: &feature.raw,
                    affine: feature.affine(),
                    act: Act::Identity,
                },
                gain: None,
                residual: None,
                out: slice,
            };
            elementwise::activate(pass.executor, args);
        }
    }
}
