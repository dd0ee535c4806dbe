//! Class and box heads: convolutions shared by all levels, batch norm per level.
//!
//! All levels are one batch of rows, `[level][image][cell][channels]`.

use effdet_model::network::{Head, Level, Network};

use super::batch_norm::BatchNormState;
use super::build::{Beside, BuildContext};
use super::gradients::Gradients;
use super::pass::Pass;
use super::timeline::Step;
use crate::arena::AlignedBuf;
use crate::kernels::depthwise::{self, DepthwisePlan};
use crate::kernels::elementwise::{self, Activate, ActivateBackward, Source};
use crate::kernels::loss::HeadRows;
use crate::kernels::pointwise::{
    self, Backward, ChannelVectors, Forward, FullGradient, FullInput, InputGradient, OutputGradient,
    PackedWeights, Packing, RowPlan, WeightGradient,
};
use crate::math::Act;

/// Both heads; they run one after the other and share their buffers.
#[derive(Debug)]
pub(super) struct Heads {
    pub class: HeadState,
    pub boxes: HeadState,
    buffers: Buffers,
}

/// Which head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Class,
    Box,
}

impl Which {
    fn step(self) -> Step {
        match self {
            Self::Class => Step::ClassHead,
            Self::Box => Step::BoxHead,
        }
    }
}

#[derive(Debug)]
pub(super) struct HeadState {
    layer: Head,
    layers: Vec<LayerState>,
    predict: PackedWeights,
    /// Values from one row of outputs to the next.
    stride: usize,
}

#[derive(Debug)]
struct LayerState {
    weights: PackedWeights,
    bn: BatchNormState,
    /// Factor of every image's branch under stochastic depth, per level.
    gains: Option<Vec<Vec<f32>>>,
}

#[derive(Debug)]
struct Buffers {
    images: usize,
    /// Layers with a residual branch before those of the heads.
    backbone_layers: u64,
    act: Act,
    /// Whether layers after the first add their input (`survival_prob` is set).
    residual: Option<f32>,
    cells: Vec<usize>,
    rows: RowPlan,
    depthwise: DepthwisePlan,
    /// Outputs of the depthwise halves, the predicting one's last.
    depthwise_outputs: Vec<AlignedBuf>,
    /// Raw outputs of the layers.
    y: Vec<AlignedBuf>,
    /// Finished outputs of the layers, where they are stored.
    x: Vec<AlignedBuf>,
    outputs: AlignedBuf,
    scratch: [AlignedBuf; 3],
}

impl HeadState {
    fn new(layer: &Head, context: &BuildContext<'_>) -> Self {
        let outputs = layer.predict.pointwise.out_channels;
        Self {
            layers: (layer.layers.iter())
                .map(|l| LayerState {
                    weights: context.weights(l.conv.pointwise.in_channels, l.conv.pointwise.out_channels),
                    bn: BatchNormState::new(&l.bns),
                    gains: None,
                })
                .collect(),
            predict: context.weights(layer.predict.pointwise.in_channels, outputs),
            stride: outputs.next_multiple_of(16),
            layer: layer.clone(),
        }
    }

    fn pack_into<'a>(&'a mut self, pass: &Pass<'a>, list: &mut Vec<(&'a mut PackedWeights, &'a [f32])>) {
        for (state, layer) in self.layers.iter_mut().zip(&self.layer.layers) {
            list.push((&mut state.weights, pass.variable(layer.conv.pointwise.kernel)));
        }
        list.push((
            &mut self.predict,
            pass.variable(self.layer.predict.pointwise.kernel),
        ));
    }
}

impl Heads {
    pub(super) fn new(network: &Network, act: Act, context: &mut BuildContext<'_>) -> Self {
        let images = context.images;
        let filters = network.hparams.fpn_num_filters;
        let maps: Vec<_> = network.levels.iter().map(|level: &Level| level.map).collect();
        let cells: Vec<usize> = maps.iter().map(|map| map.cells()).collect();
        let rows = RowPlan::levels(images, &cells);
        let len = rows.rows() * filters;
        let repeats = network.class_head.layers.len();
        let class = HeadState::new(&network.class_head, context);
        let boxes = HeadState::new(&network.box_head, context);
        let residual = network.hparams.survival_prob.map(|p| p as f32);
        let steps = context.timeline.span(Step::ClassHead, Step::BoxHead);
        let mut several = |owner, count: usize, len: usize| -> Vec<AlignedBuf> {
            (0..count)
                .map(|_| context.memory.buffer(owner, len, steps))
                .collect()
        };
        let finished = if residual.is_some() { repeats } else { 0 };
        let outputs_len = rows.rows() * class.stride.max(boxes.stride);
        let buffers = Buffers {
            images,
            backbone_layers: network.blocks.len() as u64,
            act,
            residual,
            depthwise: DepthwisePlan::new(images, &maps, filters, 3, 1),
            // Without a backward pass one buffer of each kind would do; rows are few, so all layers keep theirs.
            depthwise_outputs: several("heads: activations", repeats + 1, len),
            y: several("heads: activations", repeats, len),
            x: several("heads: activations", finished, len),
            outputs: context.memory.buffer("heads: outputs", outputs_len, steps),
            scratch: [true, true, residual.is_some()]
                .map(|used| context.gradient("heads: gradients", if used { len } else { 0 }, steps)),
            cells,
            rows,
        };
        Self {
            class,
            boxes,
            buffers,
        }
    }

    /// Adds what every convolution needs beside its buffers.
    pub(super) fn count(&self, estimate: &mut Beside) {
        for head in [&self.class, &self.boxes] {
            for layer in &head.layers {
                estimate.pointwise(&layer.weights, &self.buffers.rows);
            }
            estimate.pointwise(&head.predict, &self.buffers.rows);
        }
        estimate.depthwise(&self.buffers.depthwise);
    }

    /// Values of a head's input: `[level][image][cell][F]`.
    pub(super) fn input_len(network: &Network, images: usize) -> usize {
        let cells: usize = network.levels.iter().map(|level| level.map.cells()).sum();
        images * cells * network.hparams.fpn_num_filters
    }

    pub(super) fn pack(&mut self, pass: &Pass<'_>, packing: Packing) {
        let mut layers = Vec::new();
        self.class.pack_into(pass, &mut layers);
        self.boxes.pack_into(pass, &mut layers);
        pointwise::pack(pass.executor, packing, &mut layers);
    }

    fn split(&mut self, which: Which) -> (&mut HeadState, &mut Buffers) {
        match which {
            Which::Class => (&mut self.class, &mut self.buffers),
            Which::Box => (&mut self.boxes, &mut self.buffers),
        }
    }

    /// Runs a head; its outputs stay in [`Self::outputs`] until the next head runs.
    pub(super) fn forward(&mut self, pass: &mut Pass<'_>, which: Which, input: &[f32]) {
        pass.enter(which.step());
        let (head, buffers) = self.split(which);
        let of_a_head = (buffers.cells.len() * head.layers.len()) as u64;
        let first_number = buffers.backbone_layers + if which == Which::Box { of_a_head } else { 0 };
        buffers.forward(pass, head, first_number, input);
    }

    /// Runs a head backward from the gradients in [`Self::outputs`]; writes or adds the gradient by the input.
    pub(super) fn backward(
        &mut self,
        pass: &Pass<'_>,
        which: Which,
        input: &[f32],
        input_gradient: &mut [f32],
        accumulate: bool,
        gradients: &mut Gradients<'_>,
    ) {
        pass.enter(which.step());
        let (head, buffers) = self.split(which);
        buffers.backward(pass, head, input, input_gradient, accumulate, gradients);
    }

    /// Outputs of the head that ran last, `[level][image][cell][stride]`, and where the anchors are in them.
    pub(super) fn outputs(&mut self, which: Which) -> (&mut [f32], HeadRows<'_>) {
        let (head, buffers) = match which {
            Which::Class => (&self.class, &mut self.buffers),
            Which::Box => (&self.boxes, &mut self.buffers),
        };
        let anchors_per_cell = head.predict.outputs() / head.layer.outputs_per_anchor;
        let rows = HeadRows {
            images: buffers.images,
            cells_per_level: &buffers.cells,
            anchors_per_cell,
            stride: head.stride,
        };
        (&mut buffers.outputs[..buffers.rows.rows() * head.stride], rows)
    }

    /// Copies the outputs of one level without their padding: `[image][cell][A·K]`.
    pub(super) fn copy_level(&mut self, which: Which, level: usize, out: &mut Vec<f32>) {
        let channels = match which {
            Which::Class => self.class.predict.outputs(),
            Which::Box => self.boxes.predict.outputs(),
        };
        let (outputs, rows) = self.outputs(which);
        let first: usize = rows.cells_per_level[..level].iter().sum::<usize>() * rows.images;
        let count = rows.cells_per_level[level] * rows.images;
        out.clear();
        out.reserve(count * channels);
        for row in outputs[first * rows.stride..][..count * rows.stride].chunks_exact(rows.stride) {
            out.extend_from_slice(&row[..channels]);
        }
    }
}

/// One level of a tensor of all levels.
struct LevelSlice {
    index: usize,
    plan: RowPlan,
    values: std::ops::Range<usize>,
}

impl Buffers {
    /// Rows of each level over all images: what batch norm counts.
    fn counts(&self) -> Vec<usize> {
        self.cells.iter().map(|cells| cells * self.images).collect()
    }

    /// The rows of each level.
    fn level_slices(&self, channels: usize) -> Vec<LevelSlice> {
        let mut start = 0;
        (self.cells.iter().enumerate())
            .map(|(index, &cells)| {
                let values = start..start + cells * self.images * channels;
                start = values.end;
                LevelSlice {
                    index,
                    plan: RowPlan::images(self.images, cells),
                    values,
                }
            })
            .collect()
    }

    /// Layers with a residual branch are numbered on from `first_number`, level by level.
    fn forward(&mut self, pass: &mut Pass<'_>, head: &mut HeadState, first_number: u64, input: &[f32]) {
        let counts = self.counts();
        let training = pass.training();
        for (index, layer) in head.layer.layers.iter().enumerate() {
            let (before, from) = head.layers.split_at_mut(index);
            let state = &mut from[0];
            let source = match index.checked_sub(1) {
                None => Source::plain(input),
                Some(below) => match self.residual {
                    None => Source {
                        raw: &self.y[below],
                        affine: Some(before[below].bn.affine()),
                        act: self.act,
                    },
                    Some(_) => Source::plain(&self.x[below]),
                },
            };
            depthwise::forward(
                pass.executor,
                depthwise::Forward {
                    plan: &self.depthwise,
                    input: source,
                    weights: pass.variable(layer.conv.depthwise.kernel),
                    y: &mut self.depthwise_outputs[index],
                    sums: None,
                    streaming: false,
                },
            );
            pointwise::forward(
                pass.executor,
                Forward {
                    rows: &self.rows,
                    weights: &state.weights,
                    input: FullInput::Plain(&self.depthwise_outputs[index]),
                    bias: Some(pass.bias(&layer.conv.pointwise)),
                    stride: state.weights.outputs(),
                    y: &mut self.y[index],
                    sums: training.then_some(&mut state.bn.sums),
                    streaming: false,
                },
            );
            pass.normalize(&mut state.bn, &counts);
            if let Some(survival) = self.residual {
                let number = |level: usize| first_number + (level * head.layer.layers.len() + index) as u64;
                state.gains = (0..self.cells.len())
                    .map(|level| pass.branch_factors(survival, number(level)).filter(|_| index > 0))
                    .collect();
                let levels = self.level_slices(state.bn.channels());
                let (below, x) = self.x.split_at_mut(index);
                for level in levels {
                    let args = Activate {
                        rows: &level.plan,
                        channels: state.bn.channels(),
                        source: Source {
                            raw: &self.y[index][level.values.clone()],
                            affine: Some(state.bn.affine_of(level.index)),
                            act: self.act,
                        },
                        gain: state.gains.as_ref().map(|gains| &gains[level.index][..]),
                        residual: below.last().map(|x| &x[level.values.clone()]),
                        out: &mut x[0][level.values.clone()],
                    };
                    elementwise::activate(pass.executor, args);
                }
            }
        }
        let predict = head.layer.predict;
        let last = self.depthwise_outputs.len() - 1;
        let mut output = std::mem::take(&mut self.depthwise_outputs[last]);
        depthwise::forward(
            pass.executor,
            depthwise::Forward {
                plan: &self.depthwise,
                input: self.last_source(head, input),
                weights: pass.variable(predict.depthwise.kernel),
                y: &mut output,
                sums: None,
                streaming: false,
            },
        );
        pointwise::forward(
            pass.executor,
            Forward {
                rows: &self.rows,
                weights: &head.predict,
                input: FullInput::Plain(&output),
                bias: Some(pass.bias(&predict.pointwise)),
                stride: head.stride,
                y: &mut self.outputs[..self.rows.rows() * head.stride],
                sums: None,
                streaming: false,
            },
        );
        self.depthwise_outputs[last] = output;
    }

    /// What the predicting convolution reads.
    fn last_source<'a>(&'a self, head: &'a HeadState, input: &'a [f32]) -> Source<'a> {
        match (head.layers.last(), self.y.last(), self.x.last()) {
            (Some(_), _, Some(x)) => Source::plain(x),
            (Some(state), Some(y), None) => Source {
                raw: y,
                affine: Some(state.bn.affine()),
                act: self.act,
            },
            _ => Source::plain(input),
        }
    }

    fn backward(
        &mut self,
        pass: &Pass<'_>,
        head: &mut HeadState,
        input: &[f32],
        input_gradient: &mut [f32],
        accumulate: bool,
        gradients: &mut Gradients<'_>,
    ) {
        let counts = self.counts();
        let predict = head.layer.predict;
        let count = head.layers.len();
        // Gradients by the output of the depthwise half at hand, by batch norm's output below it, and by that layer's
        // finished output where skips are added.
        let [mut d_depthwise, mut dz, mut dx] = std::mem::take(&mut self.scratch);

        let [dw, db] = gradients.of_all([Some(predict.pointwise.kernel), predict.pointwise.bias]);
        pointwise::backward(
            pass.executor,
            Backward {
                rows: &self.rows,
                weights: &head.predict,
                output_gradient: FullGradient::Plain {
                    dy: &self.outputs[..self.rows.rows() * head.stride],
                    stride: head.stride,
                },
                x: &self.depthwise_outputs[count],
                input_gradient: Some(plain_gradient(&mut d_depthwise)),
                weight_gradient: WeightGradient {
                    dw,
                    db: Some(db),
                    accumulate: false,
                },
            },
        );
        let mut kernel = predict.depthwise.kernel;
        for index in (0..count).rev() {
            let state = &mut head.layers[index];
            let channels = state.bn.channels();
            let mut sums = std::mem::take(&mut state.bn.sums);
            let activated = Source {
                raw: &self.y[index],
                affine: Some(state.bn.affine()),
                act: self.act,
            };
            let mut convolution = depthwise::Backward {
                plan: &self.depthwise,
                input: activated,
                weights: pass.variable(kernel),
                output_gradient: depthwise::OutputGradient::<f32, f32>::Plain(&d_depthwise),
                input_gradient: depthwise::InputGradient {
                    dz: &mut dz,
                    accumulate: false,
                    sums: Some(&mut sums),
                    streaming: false,
                },
                dw: gradients.of(kernel),
            };
            if self.residual.is_some() {
                convolution.input = Source::plain(&self.x[index]);
                // What came back to the layer above also comes back around it, by the skip.
                let accumulate = index + 1 < count;
                convolution.input_gradient = depthwise::InputGradient {
                    dz: &mut dx,
                    accumulate,
                    sums: None,
                    streaming: false,
                };
                depthwise::backward(pass.executor, convolution);
                for level in self.level_slices(channels) {
                    let args = ActivateBackward {
                        rows: &level.plan,
                        channels,
                        source: Source {
                            raw: &self.y[index][level.values.clone()],
                            affine: Some(state.bn.affine_of(level.index)),
                            act: self.act,
                        },
                        gain: state.gains.as_ref().map(|gains| &gains[level.index][..]),
                        dout: &dx[level.values.clone()],
                        dz: &mut dz[level.values.clone()],
                        sums: Some(&mut sums[level.index * 2 * channels..][..2 * channels]),
                    };
                    elementwise::activate_backward(pass.executor, args);
                }
            } else {
                depthwise::backward(pass.executor, convolution);
            }
            state.bn.sums = sums;
            pass.backward_norm(&mut state.bn, &counts, gradients);

            let conv = head.layer.layers[index].conv;
            let [dw, db] = gradients.of_all([Some(conv.pointwise.kernel), conv.pointwise.bias]);
            pointwise::backward(
                pass.executor,
                Backward {
                    rows: &self.rows,
                    weights: &state.weights,
                    output_gradient: OutputGradient::Normalized {
                        dz: &dz,
                        y: &self.y[index],
                        a: ChannelVectors::per_group(&state.bn.a),
                        b: ChannelVectors::per_group(&state.bn.b),
                        c: ChannelVectors::per_group(&state.bn.c),
                        stride: channels,
                    },
                    x: &self.depthwise_outputs[index],
                    input_gradient: Some(plain_gradient(&mut d_depthwise)),
                    weight_gradient: WeightGradient {
                        dw,
                        db: Some(db),
                        accumulate: false,
                    },
                },
            );
            kernel = conv.depthwise.kernel;
        }
        depthwise::backward(
            pass.executor,
            depthwise::Backward {
                plan: &self.depthwise,
                input: Source::plain(input),
                weights: pass.variable(kernel),
                output_gradient: depthwise::OutputGradient::<f32, f32>::Plain(&d_depthwise),
                input_gradient: depthwise::InputGradient {
                    dz: input_gradient,
                    accumulate,
                    sums: None,
                    streaming: false,
                },
                dw: gradients.of(kernel),
            },
        );
        self.scratch = [d_depthwise, dz, dx];
    }
}

fn plain_gradient(dx: &mut [f32]) -> InputGradient<'_> {
    InputGradient {
        dx,
        accumulate: false,
        addends: [None, None],
        sums: None,
    }
}
