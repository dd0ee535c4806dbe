//! Class and box heads: convolutions shared by all levels, batch norm per level.
//!
//! All levels are one batch of rows, `[level][image][cell][channels]`.

use std::ops::Range;

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
    /// All rows of the outputs, in parts; more than one in training passes only.
    parts: Vec<OutputPart>,
}

/// Maps whose outputs are predicted, judged and led back before those of the next part take their place.
///
/// Class outputs are the largest tensor that a step makes; in parts they take little memory, whatever the batch.
#[derive(Debug)]
struct OutputPart {
    /// As level · images + image.
    maps: Range<usize>,
    rows: Range<usize>,
    plan: RowPlan,
}

/// Bytes of a part of the outputs at most, unless a map alone takes more. Weight gradients are added up part by part, which at half
/// the size costs more time than caches save.
const PART_BYTES: usize = 32 << 20;

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

impl OutputPart {
    /// All maps of `cells` rows and `row_bytes` each, in parts if wanted.
    fn cut(cells: &[usize], images: usize, row_bytes: usize, in_parts: bool) -> Vec<Self> {
        let limit = if in_parts {
            PART_BYTES / row_bytes
        } else {
            usize::MAX
        };
        let mut parts: Vec<(Range<usize>, Range<usize>)> = Vec::new();
        let mut end = 0;
        for (map, &rows) in cells.iter().flat_map(|cells| vec![cells; images]).enumerate() {
            let begin = end;
            end += rows;
            match parts.last_mut() {
                Some((maps, rows)) if end - rows.start <= limit => (maps.end, rows.end) = (map + 1, end),
                _ => parts.push((map..map + 1, begin..end)),
            }
        }
        (parts.into_iter())
            .map(|(maps, rows)| Self {
                plan: RowPlan::images(1, rows.len()),
                maps,
                rows,
            })
            .collect()
    }

    /// The part's values of a tensor with rows of `channels`.
    fn values(&self, channels: usize) -> Range<usize> {
        self.rows.start * channels..self.rows.end * channels
    }
}

impl HeadState {
    fn new(layer: &Head, cells: &[usize], context: &BuildContext<'_>) -> Self {
        let outputs = layer.predict.pointwise.out_channels;
        let stride = outputs.next_multiple_of(16);
        let row_bytes = stride * size_of::<f32>();
        Self {
            layers: (layer.layers.iter())
                .map(|l| LayerState {
                    weights: context.weights(l.conv.pointwise.in_channels, l.conv.pointwise.out_channels),
                    bn: BatchNormState::new(&l.bns),
                    gains: None,
                })
                .collect(),
            predict: context.weights(layer.predict.pointwise.in_channels, outputs),
            stride,
            parts: OutputPart::cut(cells, context.images, row_bytes, context.keep.training()),
            layer: layer.clone(),
        }
    }

    /// Values of the largest part.
    fn outputs_len(&self) -> usize {
        let rows = self.parts.iter().map(|part| part.rows.len()).max();
        rows.unwrap_or(0) * self.stride
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
        let class = HeadState::new(&network.class_head, &cells, context);
        let boxes = HeadState::new(&network.box_head, &cells, context);
        let residual = network.hparams.survival_prob.map(|p| p as f32);
        let steps = context.timeline.span(Step::ClassHead, Step::BoxHead);
        let mut several = |owner, count: usize, len: usize| -> Vec<AlignedBuf> {
            (0..count)
                .map(|_| context.memory.buffer(owner, len, steps))
                .collect()
        };
        let finished = if residual.is_some() { repeats } else { 0 };
        let outputs_len = class.outputs_len().max(boxes.outputs_len());
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
            let plans = head.parts.iter().map(|part| &part.plan);
            estimate.pointwise_in_parts(&head.predict, plans);
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

    /// Runs a head without a backward pass; its outputs stay until the next head runs.
    pub(super) fn forward(&mut self, pass: &mut Pass<'_>, which: Which, input: &[f32]) {
        let (head, buffers) = self.enter(pass, which, input);
        for part in &head.parts {
            buffers.predict(pass, head, part);
        }
    }

    /// Runs a head forward and backward; writes or adds the gradient by the input.
    ///
    /// `loss` gets the outputs of some maps at a time, gives their loss and leaves its gradient in their place. The sum of the
    /// losses is returned.
    pub(super) fn train(
        &mut self,
        pass: &mut Pass<'_>,
        which: Which,
        (input, input_gradient): (&[f32], &mut AlignedBuf),
        accumulate: bool,
        gradients: &mut Gradients<'_>,
        mut loss: impl FnMut(&mut [f32], HeadRows<'_>) -> f64,
    ) -> f64 {
        let (head, buffers) = self.enter(pass, which, input);
        let mut sum = 0.0;
        for (index, part) in head.parts.iter().enumerate() {
            buffers.predict(pass, head, part);
            let outputs = &mut buffers.outputs[..part.rows.len() * head.stride];
            let rows = head_rows(head, &buffers.cells, buffers.images, part.maps.clone());
            sum += loss(outputs, rows);
            buffers.predict_backward(pass, head, (part, index > 0), gradients);
        }
        buffers.backward(pass, head, input, input_gradient, accumulate, gradients);
        sum
    }

    /// Runs a head up to where it predicts.
    fn enter(&mut self, pass: &mut Pass<'_>, which: Which, input: &[f32]) -> (&mut HeadState, &mut Buffers) {
        pass.enter(which.step());
        let (head, buffers) = match which {
            Which::Class => (&mut self.class, &mut self.buffers),
            Which::Box => (&mut self.boxes, &mut self.buffers),
        };
        let of_a_head = (buffers.cells.len() * head.layers.len()) as u64;
        let first_number = buffers.backbone_layers + if which == Which::Box { of_a_head } else { 0 };
        buffers.forward(pass, head, first_number, input);
        (head, buffers)
    }

    /// Copies the outputs that [`Self::forward`] made of one level, without their padding: `[image][cell][A·K]`.
    pub(super) fn copy_level(&self, which: Which, level: usize, out: &mut Vec<f32>) {
        let head = match which {
            Which::Class => &self.class,
            Which::Box => &self.boxes,
        };
        let Buffers {
            images,
            cells,
            outputs,
            ..
        } = &self.buffers;
        let first: usize = cells[..level].iter().sum::<usize>() * images;
        let count = cells[level] * images;
        out.clear();
        out.reserve(count * head.predict.outputs());
        for row in outputs[first * head.stride..][..count * head.stride].chunks_exact(head.stride) {
            out.extend_from_slice(&row[..head.predict.outputs()]);
        }
    }
}

/// Where the anchors of some maps are in a head's outputs.
fn head_rows<'a>(head: &HeadState, cells: &'a [usize], images: usize, maps: Range<usize>) -> HeadRows<'a> {
    HeadRows {
        images,
        cells_per_level: cells,
        anchors_per_cell: head.predict.outputs() / head.layer.outputs_per_anchor,
        stride: head.stride,
        maps,
    }
}

/// One level of a tensor of all levels.
struct LevelSlice {
    index: usize,
    plan: RowPlan,
    values: Range<usize>,
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

    /// Up to the input of the predicting 1×1 convolution; layers with a residual branch are numbered on from `first_number`,
    /// level by level.
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
        self.depthwise_outputs[last] = output;
    }

    /// Makes the outputs of a part.
    fn predict(&mut self, pass: &Pass<'_>, head: &HeadState, part: &OutputPart) {
        let input = &self.depthwise_outputs[head.layers.len()];
        pointwise::forward(
            pass.executor,
            Forward {
                rows: &part.plan,
                weights: &head.predict,
                input: FullInput::Plain(&input[part.values(head.predict.inputs())]),
                bias: Some(pass.bias(&head.layer.predict.pointwise)),
                stride: head.stride,
                y: &mut self.outputs[..part.rows.len() * head.stride],
                sums: None,
                streaming: false,
            },
        );
    }

    /// Makes the gradients of the predicting 1×1 convolution from those by the outputs of a part; weight gradients are added to
    /// those of the parts before where there are any.
    fn predict_backward(
        &mut self,
        pass: &Pass<'_>,
        head: &HeadState,
        (part, accumulate): (&OutputPart, bool),
        gradients: &mut Gradients<'_>,
    ) {
        let predict = &head.layer.predict.pointwise;
        let values = part.values(head.predict.inputs());
        let [dw, db] = gradients.of_all([Some(predict.kernel), predict.bias]);
        pointwise::backward(
            pass.executor,
            Backward {
                rows: &part.plan,
                weights: &head.predict,
                output_gradient: FullGradient::Plain {
                    dy: &self.outputs[..part.rows.len() * head.stride],
                    stride: head.stride,
                },
                x: &self.depthwise_outputs[head.layers.len()][values.clone()],
                input_gradient: Some(plain_gradient(&mut self.scratch[0][values])),
                weight_gradient: WeightGradient {
                    dw,
                    db: Some(db),
                    accumulate,
                },
            },
        );
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

    /// From the gradient by the input of the predicting 1×1 convolution on, which is in the first scratch buffer.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_the_outputs_hold_every_map_once_and_no_more_than_fits() {
        let row_bytes = PART_BYTES / 100;
        let ranges = |in_parts| -> Vec<_> {
            (OutputPart::cut(&[60, 15, 4, 1], 3, row_bytes, in_parts).into_iter())
                .map(|part| (part.maps, part.rows, part.plan.rows()))
                .collect()
        };
        assert_eq!(ranges(false), [(0..12, 0..240, 240)]);
        let expected = [
            (0..1, 0..60, 60),
            (1..2, 60..120, 60),
            (2..5, 120..210, 90),
            (5..12, 210..240, 30),
        ];
        assert_eq!(ranges(true), expected);
        // A map that does not fit is a part of its own.
        let large = OutputPart::cut(&[300, 1], 2, row_bytes, true);
        assert_eq!(
            large.iter().map(|part| part.rows.len()).collect::<Vec<_>>(),
            [300, 300, 2]
        );
    }
}
