//! Extra pyramid levels and BiFPN cells.

use effdet_model::hparams::UpsampleRule;
use effdet_model::network::{ChannelMatch, MapSize, Network, Node, Resample, ResizeKind};

use super::batch_norm::BatchNormState;
use super::gradients::Gradients;
use super::pass::Pass;
use super::timeline::{Step, Timeline};
use super::{Beside, BuildContext};
use crate::arena::{AlignedBuf, Lifetime};
use crate::kernels::depthwise::{self, DepthwisePlan};
use crate::kernels::elementwise::{self, Activate, Affine, Source};
use crate::kernels::fuse::{self, FuseGradient, FuseInput, FusionWeights};
use crate::kernels::pointwise::{
    self, Backward, ChannelVectors, Forward, FullGradient, FullInput, InputGradient, OutputGradient,
    PackedWeights, Packing, RowPlan, WeightGradient,
};
use crate::kernels::resample::{self, Resampler};
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

    pub(super) fn forward(&mut self, pass: &mut Pass<'_>, backbone: &[&[f32]]) {
        for (index, extra) in self.extra.iter_mut().enumerate() {
            pass.enter(Step::ExtraLevel(index));
            extra.input.forward_match(pass, backbone);
            let mut out = std::mem::take(&mut self.features[extra.output].raw);
            let mut argmax = std::mem::take(&mut extra.input.argmax);
            let (raw, affine) = extra.input.source(backbone, &self.features);
            let args = resample::Forward {
                images: self.images,
                channels: self.filters,
                resampler: &extra.input.resampler,
                raw,
                affine,
                argmax: (!argmax.is_empty()).then_some(&mut argmax[..]),
                out: &mut out,
            };
            resample::forward(pass.executor, args);
            extra.input.argmax = argmax;
            self.features[extra.output].raw = out;
        }
        for (index, node) in self.nodes.iter_mut().enumerate() {
            pass.enter(Step::Node(index));
            node.forward(
                pass,
                self.act,
                self.images,
                self.filters,
                backbone,
                &mut self.features,
            );
        }
    }

    /// Gradients of all pyramid variables from those by the last cell's outputs, laid out as by [`Self::write_outputs`].
    pub(super) fn backward(
        &mut self,
        pass: &Pass<'_>,
        backbone: &[&[f32]],
        output_gradients: &[f32],
        gradients: &mut Gradients<'_>,
    ) {
        pass.enter(Step::HeadGradient);
        self.features
            .iter_mut()
            .for_each(|feature| feature.gradient.written = false);
        self.level_gradients
            .iter_mut()
            .for_each(|gradient| gradient.written = false);
        let mut rest = output_gradients;
        for &index in self.cell_outputs.last().map_or(&[][..], |outputs| outputs) {
            let gradient = &mut self.features[index].gradient;
            let (slice, tail) = rest.split_at(gradient.values.len());
            gradient.values.copy_from_slice(slice);
            gradient.written = true;
            rest = tail;
        }
        for (index, node) in self.nodes.iter_mut().enumerate().rev() {
            pass.enter(Step::NodeBackward(index));
            let context = NodeContext {
                images: self.images,
                filters: self.filters,
                act: self.act,
                backbone,
            };
            node.backward(
                pass,
                context,
                &mut self.features,
                &mut self.level_gradients,
                gradients,
            );
        }
        for (index, extra) in self.extra.iter_mut().enumerate().rev() {
            pass.enter(Step::ExtraLevelBackward(index));
            let dout = std::mem::take(&mut self.features[extra.output].gradient).finished();
            let target = extra
                .input
                .take_target(&mut self.features, &mut self.level_gradients);
            let Gradient { mut values, written } = target;
            let args = resample::Backward {
                images: self.images,
                channels: self.filters,
                resampler: &extra.input.resampler,
                argmax: (!extra.input.argmax.is_empty()).then_some(&extra.input.argmax[..]),
                dout: &dout,
                dx: &mut values,
                accumulate: written,
            };
            resample::backward(pass.executor, args);
            self.features[extra.output].gradient = Gradient {
                values: dout,
                written: true,
            };
            extra
                .input
                .put_target(values, &mut self.features, &mut self.level_gradients);
            extra
                .input
                .backward_match(pass, backbone, &mut self.level_gradients, gradients);
        }
    }

    /// Gradients by the backbone's level outputs.
    pub(super) fn level_gradients(&mut self, pass: &Pass<'_>) -> Vec<&[f32]> {
        if let Some(last) = self.last_block {
            pass.enter(Step::BlockBackward(last));
        }
        // A level that no consumer read has gradient zero.
        for gradient in self
            .level_gradients
            .iter_mut()
            .filter(|gradient| !gradient.written)
        {
            gradient.values.fill(0.0);
        }
        self.level_gradients
            .iter()
            .map(|gradient| &gradient.values[..])
            .collect()
    }
}

impl Gradient {
    /// The values, zero where no consumer wrote them.
    fn finished(mut self) -> AlignedBuf {
        if !self.written {
            self.values.fill(0.0);
        }
        self.values
    }
}

impl InputState {
    /// Runs the channel match.
    fn forward_match(&mut self, pass: &mut Pass<'_>, backbone: &[&[f32]]) {
        let (Some(matched), Origin::Backbone(level)) = (&mut self.matched, self.origin) else {
            return;
        };
        let training = pass.training();
        pointwise::forward(
            pass.executor,
            Forward {
                rows: &matched.rows,
                weights: &matched.weights,
                input: FullInput::Plain(backbone[level]),
                bias: Some(pass.bias(&matched.layer.conv)),
                stride: matched.weights.outputs(),
                y: &mut matched.y,
                sums: matched
                    .bn
                    .as_mut()
                    .filter(|_| training)
                    .map(|bn| &mut bn.sums[..]),
                streaming: false,
            },
        );
        if let Some(bn) = &mut matched.bn {
            pass.normalize(bn, &[matched.rows.rows()]);
        }
    }

    /// What is resampled.
    fn source<'a>(
        &'a self,
        backbone: &'a [&'a [f32]],
        features: &'a [Feature],
    ) -> (&'a [f32], Option<Affine<'a>>) {
        match (&self.matched, self.origin) {
            (Some(matched), _) => (&matched.y, matched.bn.as_ref().map(BatchNormState::affine)),
            (None, Origin::Backbone(level)) => (backbone[level], None),
            (None, Origin::Feature(index)) => (&features[index].raw, features[index].affine()),
        }
    }

    /// Takes the buffer that the gradient by the resampled tensor goes to.
    fn take_target(&mut self, features: &mut [Feature], levels: &mut [Gradient]) -> Gradient {
        match (&mut self.matched, self.origin) {
            (Some(matched), _) => Gradient {
                values: std::mem::take(&mut matched.gradient),
                written: false,
            },
            (None, Origin::Backbone(level)) => std::mem::take(&mut levels[level]),
            (None, Origin::Feature(index)) => std::mem::take(&mut features[index].gradient),
        }
    }

    /// Gives it back, written.
    fn put_target(&mut self, values: AlignedBuf, features: &mut [Feature], levels: &mut [Gradient]) {
        match (&mut self.matched, self.origin) {
            (Some(matched), _) => matched.gradient = values,
            (None, Origin::Backbone(level)) => {
                levels[level] = Gradient {
                    values,
                    written: true,
                }
            }
            (None, Origin::Feature(index)) => {
                features[index].gradient = Gradient {
                    values,
                    written: true,
                }
            }
        }
    }

    /// Runs the channel match backward into its backbone level.
    fn backward_match(
        &mut self,
        pass: &Pass<'_>,
        backbone: &[&[f32]],
        levels: &mut [Gradient],
        gradients: &mut Gradients<'_>,
    ) {
        let (Some(matched), Origin::Backbone(level)) = (&mut self.matched, self.origin) else {
            return;
        };
        let channels = matched.weights.outputs();
        if let Some(bn) = &mut matched.bn {
            let args = elementwise::GradientSums {
                rows: &matched.rows,
                channels,
                dz: &matched.gradient,
                y: &matched.y,
                sums: &mut bn.sums,
            };
            elementwise::gradient_sums(pass.executor, args);
            pass.backward_norm(bn, &[matched.rows.rows()], gradients);
        }
        let output_gradient = match &matched.bn {
            Some(bn) => OutputGradient::Normalized {
                dz: &matched.gradient,
                y: &matched.y,
                a: ChannelVectors::per_group(&bn.a),
                b: ChannelVectors::per_group(&bn.b),
                c: ChannelVectors::per_group(&bn.c),
                stride: channels,
            },
            None => FullGradient::Plain {
                dy: &matched.gradient,
                stride: channels,
            },
        };
        let target = &mut levels[level];
        let [dw, db] = gradients.of_all([Some(matched.layer.conv.kernel), matched.layer.conv.bias]);
        pointwise::backward(
            pass.executor,
            Backward {
                rows: &matched.rows,
                weights: &matched.weights,
                output_gradient,
                x: backbone[level],
                input_gradient: Some(InputGradient {
                    dx: &mut target.values,
                    accumulate: target.written,
                    addends: [None, None],
                    sums: None,
                }),
                weight_gradient: WeightGradient {
                    dw,
                    db: Some(db),
                    accumulate: false,
                },
            },
        );
        target.written = true;
    }
}

/// What a node's backward pass needs beside its own state.
struct NodeContext<'a> {
    images: usize,
    filters: usize,
    act: Act,
    backbone: &'a [&'a [f32]],
}

impl NodeState {
    fn fusion_weights(&self, pass: &Pass<'_>, filters: usize) -> FusionWeights {
        let variables: Vec<&[f32]> = self
            .layer
            .fusion_weights
            .iter()
            .map(|&id| pass.variable(id))
            .collect();
        FusionWeights::new(
            pass.fusion.0,
            pass.fusion.1,
            self.inputs.len(),
            filters,
            &variables,
        )
    }

    fn forward(
        &mut self,
        pass: &mut Pass<'_>,
        act: Act,
        images: usize,
        filters: usize,
        backbone: &[&[f32]],
        features: &mut [Feature],
    ) {
        for input in &mut self.inputs {
            input.forward_match(pass, backbone);
        }
        let weights = self.fusion_weights(pass, filters);
        let mut argmaxes: Vec<AlignedBuf> = self
            .inputs
            .iter_mut()
            .map(|input| std::mem::take(&mut input.argmax))
            .collect();
        {
            let mut inputs: Vec<FuseInput<'_>> = (self.inputs.iter().zip(&mut argmaxes))
                .map(|(input, argmax)| {
                    let (raw, affine) = input.source(backbone, features);
                    let argmax = (!argmax.is_empty()).then_some(&mut argmax[..]);
                    FuseInput {
                        raw,
                        affine,
                        resampler: &input.resampler,
                        argmax,
                    }
                })
                .collect();
            let out = &mut self.fused[..];
            let args = fuse::Forward {
                images,
                channels: filters,
                weights: &weights,
                inputs: &mut inputs,
                out,
            };
            fuse::forward(pass.executor, args);
        }
        for (input, argmax) in self.inputs.iter_mut().zip(argmaxes) {
            input.argmax = argmax;
        }

        depthwise::forward(
            pass.executor,
            depthwise::Forward {
                plan: &self.depthwise,
                input: Source {
                    raw: &self.fused,
                    affine: None,
                    act,
                },
                weights: pass.variable(self.layer.conv.depthwise.kernel),
                y: &mut self.depthwise_output,
                sums: None,
                streaming: false,
            },
        );
        let training = pass.training();
        let Feature { raw, bn, .. } = &mut features[self.output];
        pointwise::forward(
            pass.executor,
            Forward {
                rows: &self.rows,
                weights: &self.pointwise,
                input: FullInput::Plain(&self.depthwise_output),
                bias: Some(pass.bias(&self.layer.conv.pointwise)),
                stride: filters,
                y: raw,
                sums: bn.as_mut().filter(|_| training).map(|bn| &mut bn.sums[..]),
                streaming: false,
            },
        );
        if let Some(bn) = bn {
            pass.normalize(bn, &[self.rows.rows()]);
        }
    }

    fn backward(
        &mut self,
        pass: &Pass<'_>,
        context: NodeContext<'_>,
        features: &mut [Feature],
        levels: &mut [Gradient],
        gradients: &mut Gradients<'_>,
    ) {
        let NodeContext {
            images,
            filters,
            act,
            backbone,
        } = context;
        let feature = &mut features[self.output];
        let dz = std::mem::take(&mut feature.gradient).finished();
        let Some(bn) = &mut feature.bn else { return };
        let args = elementwise::GradientSums {
            rows: &self.rows,
            channels: filters,
            dz: &dz,
            y: &feature.raw,
            sums: &mut bn.sums,
        };
        elementwise::gradient_sums(pass.executor, args);
        pass.backward_norm(bn, &[self.rows.rows()], gradients);
        let conv = self.layer.conv;
        let [dw, db] = gradients.of_all([Some(conv.pointwise.kernel), conv.pointwise.bias]);
        pointwise::backward(
            pass.executor,
            Backward {
                rows: &self.rows,
                weights: &self.pointwise,
                output_gradient: OutputGradient::Normalized {
                    dz: &dz,
                    y: &feature.raw,
                    a: ChannelVectors::per_group(&bn.a),
                    b: ChannelVectors::per_group(&bn.b),
                    c: ChannelVectors::per_group(&bn.c),
                    stride: filters,
                },
                x: &self.depthwise_output,
                input_gradient: Some(InputGradient {
                    dx: &mut self.d_depthwise,
                    accumulate: false,
                    addends: [None, None],
                    sums: None,
                }),
                weight_gradient: WeightGradient {
                    dw,
                    db: Some(db),
                    accumulate: false,
                },
            },
        );
        feature.gradient = Gradient {
            values: dz,
            written: true,
        };
        depthwise::backward(
            pass.executor,
            depthwise::Backward {
                plan: &self.depthwise,
                input: Source {
                    raw: &self.fused,
                    affine: None,
                    act,
                },
                weights: pass.variable(conv.depthwise.kernel),
                output_gradient: depthwise::OutputGradient::<f32, f32>::Plain(&self.d_depthwise),
                input_gradient: depthwise::InputGradient {
                    dz: &mut self.d_fused,
                    accumulate: false,
                    sums: None,
                    streaming: false,
                },
                dw: gradients.of(conv.depthwise.kernel),
            },
        );

        let weights = self.fusion_weights(pass, filters);
        let mut targets: Vec<Gradient> = self
            .inputs
            .iter_mut()
            .map(|input| input.take_target(features, levels))
            .collect();
        let mut dots = vec![0.0; self.inputs.len() * filters];
        let trained = !self.layer.fusion_weights.is_empty();
        {
            let mut inputs: Vec<FuseGradient<'_>> = (self.inputs.iter().zip(&mut targets))
                .map(|(input, target)| {
                    let (raw, affine) = input.source(backbone, features);
                    let argmax = (!input.argmax.is_empty()).then_some(&input.argmax[..]);
                    let accumulate = target.written;
                    let dx = &mut target.values[..];
                    FuseGradient {
                        raw,
                        affine,
                        resampler: &input.resampler,
                        argmax,
                        dx,
                        accumulate,
                    }
                })
                .collect();
            let args = fuse::Backward {
                images,
                channels: filters,
                weights: &weights,
                df: &self.d_fused,
                inputs: &mut inputs,
                dots: trained.then_some(&mut dots[..]),
            };
            fuse::backward(pass.executor, args);
        }
        if trained {
            let mut slices: Vec<Vec<f32>> = self
                .layer
                .fusion_weights
                .iter()
                .map(|&id| vec![0.0; gradients.of(id).len()])
                .collect();
            let mut views: Vec<&mut [f32]> = slices.iter_mut().map(|slice| &mut slice[..]).collect();
            weights.gradients(&dots, &mut views);
            for (&id, slice) in self.layer.fusion_weights.iter().zip(&slices) {
                gradients.of(id).copy_from_slice(slice);
            }
        }
        for (input, target) in self.inputs.iter_mut().zip(targets) {
            input.put_target(target.values, features, levels);
        }
        for input in &mut self.inputs {
            input.backward_match(pass, backbone, levels, gradients);
        }
    }
}
