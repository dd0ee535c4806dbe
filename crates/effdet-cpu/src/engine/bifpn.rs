//! Extra pyramid levels and BiFPN cells.

use effdet_model::hparams::UpsampleRule;
use effdet_model::network::{ChannelMatch, MapSize, Network, Node, Resample, ResizeKind};

use super::backbone::Backbone;
use super::batch_norm::BatchNormState;
use super::pass::{Gradients, Pass};
use crate::arena::AlignedBuf;
use crate::kernels::depthwise::{self, DepthwisePlan};
use crate::kernels::elementwise::{self, Activate, Affine, Source};
use crate::kernels::fuse::{self, FuseGradient, FuseInput, FusionWeights};
use crate::kernels::pointwise::{
    self, Backward, ChannelVectors, Forward, Input, InputGradient, OutputGradient, PackedWeights, Packing,
    RowPlan, WeightGradient,
};
use crate::kernels::resample::{self, Resampler};
use crate::math::Act;
use crate::probe::Stage;

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
    scratch: [AlignedBuf; 2],
}

impl Feature {
    fn new(map: MapSize, images: usize, filters: usize, bn: Option<BatchNormState>, training: bool) -> Self {
        let len = images * map.cells() * filters;
        let values = AlignedBuf::zeroed(if training { len } else { 0 });
        Self {
            map,
            raw: AlignedBuf::zeroed(len),
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
    fn new(
        origin: Origin,
        resample: &Resample,
        images: usize,
        filters: usize,
        rule: UpsampleRule,
        training: bool,
    ) -> Self {
        let Resample {
            channel_match,
            resize,
            input,
            output,
        } = *resample;
        let pooled = matches!(resize, ResizeKind::MaxPool { .. }) && training;
        Self {
            origin,
            matched: channel_match.map(|layer| {
                let len = images * input.cells() * filters;
                MatchState {
                    weights: PackedWeights::new(layer.conv.in_channels, layer.conv.out_channels),
                    y: AlignedBuf::zeroed(len),
                    bn: layer.bn.map(|bn| BatchNormState::new(&[bn])),
                    gradient: AlignedBuf::zeroed(if training { len } else { 0 }),
                    rows: RowPlan::images(images, input.cells()),
                    layer,
                }
            }),
            resampler: Resampler::new(input, output, resize, rule),
            argmax: AlignedBuf::zeroed(if pooled {
                images * output.cells() * filters
            } else {
                0
            }),
        }
    }
}

impl Pyramid {
    pub(super) fn new(network: &Network, act: Act, images: usize, training: bool) -> Self {
        let filters = network.hparams.fpn_num_filters;
        let rule = network.hparams.upsample_rule;
        let mut features = Vec::new();
        let mut origins: Vec<Origin> = (0..network.backbone_levels.len()).map(Origin::Backbone).collect();
        let mut extra = Vec::new();
        for level in &network.extra_levels {
            let origin = origins[origins.len() - 1];
            let input = InputState::new(origin, &level.resample, images, filters, rule, training);
            origins.push(Origin::Feature(features.len()));
            extra.push(ExtraState {
                input,
                output: features.len(),
            });
            features.push(Feature::new(
                level.resample.output,
                images,
                filters,
                None,
                training,
            ));
        }
        let mut nodes = Vec::new();
        let mut cell_outputs = Vec::new();
        for cell in &network.cells {
            let mut ids = origins.clone();
            for layer in &cell.nodes {
                let output = features.len();
                let inputs = (layer.inputs.iter())
                    .map(|input| {
                        InputState::new(
                            ids[input.feature],
                            &input.resample,
                            images,
                            filters,
                            rule,
                            training,
                        )
                    })
                    .collect();
                let cells = layer.map.cells() * images;
                nodes.push(NodeState {
                    layer: layer.clone(),
                    inputs,
                    fused: AlignedBuf::zeroed(cells * filters),
                    depthwise: DepthwisePlan::new(images, &[layer.map], filters, 3, 1),
                    depthwise_output: AlignedBuf::zeroed(cells * filters),
                    pointwise: PackedWeights::new(filters, filters),
                    rows: RowPlan::images(images, layer.map.cells()),
                    output,
                });
                let bn = BatchNormState::new(&[layer.bn]);
                features.push(Feature::new(layer.map, images, filters, Some(bn), training));
                ids.push(Origin::Feature(output));
            }
            origins = cell.outputs.iter().map(|&id| ids[id]).collect();
            let made = |origin: &Origin| match *origin {
                Origin::Feature(feature) => Some(feature),
                Origin::Backbone(_) => None,
            };
            cell_outputs.push(origins.iter().filter_map(made).collect());
        }
        let largest = features
            .iter()
            .map(|feature| feature.raw.len())
            .max()
            .unwrap_or(0);
        let level_gradients = (network.backbone_levels.iter())
            .map(|&block| {
                let block = &network.blocks[block];
                let len = images * block.output.cells() * block.project.out_channels;
                Gradient {
                    values: AlignedBuf::zeroed(if training { len } else { 0 }),
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
            scratch: std::array::from_fn(|_| AlignedBuf::zeroed(if training { largest } else { 0 })),
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

    pub(super) fn forward(&mut self, pass: &mut Pass<'_>, backbone: &Backbone) {
        pass.executor.enter(Stage::Pyramid);
        for extra in &mut self.extra {
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
        for node in &mut self.nodes {
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
        backbone: &Backbone,
        output_gradients: &[f32],
        gradients: &mut Gradients<'_>,
    ) {
        pass.executor.enter(Stage::Pyramid);
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
        for node in self.nodes.iter_mut().rev() {
            let context = NodeContext {
                images: self.images,
                filters: self.filters,
                act: self.act,
                backbone,
                scratch: &mut self.scratch,
            };
            node.backward(
                pass,
                context,
                &mut self.features,
                &mut self.level_gradients,
                gradients,
            );
        }
        for extra in self.extra.iter_mut().rev() {
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
    pub(super) fn level_gradients(&mut self) -> Vec<&[f32]> {
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
    fn forward_match(&mut self, pass: &mut Pass<'_>, backbone: &Backbone) {
        let (Some(matched), Origin::Backbone(level)) = (&mut self.matched, self.origin) else {
            return;
        };
        let training = pass.training();
        pointwise::forward(
            pass.executor,
            Forward {
                rows: &matched.rows,
                weights: &matched.weights,
                input: Input::Plain(backbone.level_output(level)),
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
        backbone: &'a Backbone,
        features: &'a [Feature],
    ) -> (&'a [f32], Option<Affine<'a>>) {
        match (&self.matched, self.origin) {
            (Some(matched), _) => (&matched.y, matched.bn.as_ref().map(BatchNormState::affine)),
            (None, Origin::Backbone(level)) => (backbone.level_output(level), None),
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
        backbone: &Backbone,
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
            None => OutputGradient::Plain {
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
                x: backbone.level_output(level),
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
    backbone: &'a Backbone,
    scratch: &'a mut [AlignedBuf; 2],
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
        backbone: &Backbone,
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
                input: Input::Plain(&self.depthwise_output),
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
            scratch,
        } = context;
        let [d_depthwise, d_fused] = scratch.each_mut().map(|buffer| &mut buffer[..self.fused.len()]);
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
                    dx: d_depthwise,
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
                output_gradient: depthwise::OutputGradient::Plain(d_depthwise),
                input_gradient: depthwise::InputGradient {
                    dz: d_fused,
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
                df: d_fused,
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
