//! Stem and MBConv blocks.
//!
//! A block saves the raw outputs of its three convolutions and its input; activations are formed again on the way wherever
//! they are needed. Where the wide ones of these outputs are not kept, the backward pass computes them again from the input and
//! the batch norms of the forward pass, which gives the same bits. Gradients travel as `dx` of a block's input plus the sums that batch norm needs, made in the same pass.

use effdet_model::network::{MbConv, Network, SqueezeExcite, Stem};

use super::batch_norm::BatchNormState;
use super::gradients::Gradients;
use super::pass::{Pass, per_image};
use super::timeline::Step;
use super::{Beside, BuildContext, Keep};
use crate::arena::{AlignedBuf, Lifetime};
use crate::kernels::depthwise::{self, DepthwisePlan};
use crate::kernels::elementwise::{self, Activate, Affine, Source};
use crate::kernels::pointwise::{
    self, Activated, Backward, BackwardActivated, ChannelVectors, Forward, FullInput, GradientSums, Input,
    InputGradient, OutputGradient, PackedWeights, Packing, RowPlan, Segment, WeightGradient,
};
use crate::kernels::{se, stem};
use crate::math::Act;
use crate::storage::{Full, Storage, Stored};

/// The backbone with its buffers for one batch size.
#[derive(Debug)]
pub(super) struct Backbone<P: Storage> {
    images: usize,
    /// Whether every block keeps y₁ and y₂ for a backward pass.
    keeps: bool,
    act: Act,
    stem: StemState<P>,
    blocks: Vec<BlockState<P>>,
    /// Block that gives each backbone level.
    levels: Vec<usize>,
    /// Output of the last block.
    last: AlignedBuf,
    /// y₁ and y₂ of the block at hand, where blocks keep nothing for a backward pass.
    wide: [AlignedBuf<P::Activation>; 2],
}

#[derive(Debug)]
struct StemState<P: Storage> {
    layer: Stem,
    y: AlignedBuf<P::Activation>,
    bn: BatchNormState,
}

#[derive(Debug)]
struct BlockState<P: Storage> {
    layer: MbConv,
    images: usize,
    /// Block input; empty in the first block, which reads the stem's raw output.
    x: AlignedBuf,
    expand: Option<Expand<P>>,
    y2: AlignedBuf<P::Activation>,
    /// Where y₁ and y₂ are computed again for the backward pass.
    again: Option<[AlignedBuf<P::Activation>; 2]>,
    bn2: BatchNormState,
    squeeze: Option<Squeeze>,
    depthwise: DepthwisePlan,
    project: PackedWeights,
    y3: AlignedBuf,
    bn3: BatchNormState,
    rows: RowPlan,
    /// Gradient by the block's output.
    output_gradient: AlignedBuf,
    /// dA, the gradient by the input of the projection.
    da: AlignedBuf<P::Gradient>,
    /// Gradient by batch norm's output in front of the depthwise convolution; empty where that reads the block's input.
    dz: AlignedBuf<P::Gradient>,
    /// Scale and shift of the residual branch per image, where stochastic depth applies.
    branch: Option<Branch>,
}

#[derive(Debug)]
struct Expand<P: Storage> {
    weights: PackedWeights,
    y1: AlignedBuf<P::Activation>,
    bn1: BatchNormState,
    rows: RowPlan,
}

#[derive(Debug)]
struct Squeeze {
    layer: SqueezeExcite,
    mean: Vec<f32>,
    hidden: Vec<f32>,
    gate: Vec<f32>,
}

/// The residual branch under stochastic depth.
#[derive(Debug)]
struct Branch {
    factors: Vec<f32>,
    scale: Vec<f32>,
    shift: Vec<f32>,
}

impl<P: Storage> BlockState<P> {
    fn new(layer: &MbConv, index: usize, context: &mut BuildContext<'_>) -> Self {
        let (images, keep, timeline) = (context.images, context.keep, context.timeline);
        let (input, output) = (layer.input.cells() * images, layer.output.cells() * images);
        let wide = layer.depthwise.channels;
        let in_channels = layer.expand.map_or(wide, |(conv, _)| conv.in_channels);
        let (forward, backward) = (Step::Block(index), Step::BlockBackward(index));
        let kept_steps = timeline.span(forward, backward);
        // The gradient by the first block's input is the stem's.
        let dz_steps = match index {
            0 => timeline.span(backward, Step::StemBackward),
            _ => timeline.during(backward),
        };
        let gradient_steps = match index + 1 == timeline.blocks() {
            true => timeline.during(backward),
            false => timeline.span(Step::BlockBackward(index + 1), backward),
        };
        let kept = |len: usize| if keep.training() { len } else { 0 };
        let (y1_len, dz_len) = match (layer.expand, index) {
            (Some(_), _) => (input * wide, input * wide),
            (None, 0) => (0, input * wide),
            (None, _) => (0, 0),
        };
        let memory = &mut *context.memory;
        let wide_steps = match keep {
            Keep::BlockInputs => timeline.during(forward),
            Keep::All | Keep::Outputs => kept_steps,
        };
        let y1 = memory.buffer("backbone: wide activations", kept(y1_len), wide_steps);
        let y2 = memory.buffer("backbone: wide activations", kept(output * wide), wide_steps);
        let again = (keep == Keep::BlockInputs).then(|| {
            [y1_len, output * wide].map(|len| {
                memory.buffer(
                    "backbone: wide activations, again",
                    len,
                    timeline.during(backward),
                )
            })
        });
        let da_steps = timeline.during(backward);
        let da = memory.buffer("backbone: wide gradients", kept(output * wide), da_steps);
        let dz = memory.buffer("backbone: wide gradients", kept(dz_len), dz_steps);
        let narrow = output * layer.project.out_channels;
        let output_gradient = memory.buffer("backbone: narrow gradients", kept(narrow), gradient_steps);
        let x_len = if index > 0 { input * in_channels } else { 0 };
        let mut always = |len| {
            context
                .memory
                .buffer("backbone: narrow activations", len, kept_steps)
        };
        let (x, y3) = (always(x_len), always(narrow));
        Self {
            layer: layer.clone(),
            images,
            x,
            expand: layer.expand.map(|(conv, bn)| Expand {
                weights: context.weights(conv.in_channels, conv.out_channels),
                y1,
                bn1: BatchNormState::new(&[bn]),
                rows: RowPlan::images(images, layer.input.cells()),
            }),
            y2,
            again,
            bn2: BatchNormState::new(&[layer.depthwise_bn]),
            squeeze: layer.squeeze_excite.map(|layer| Squeeze {
                layer,
                mean: vec![0.0; images * wide],
                hidden: vec![0.0; images * layer.reduce.out_channels],
                gate: vec![0.0; images * wide],
            }),
            depthwise: DepthwisePlan::new(
                images,
                &[layer.input],
                wide,
                layer.depthwise.size,
                layer.depthwise.stride,
            ),
            project: context.weights(wide, layer.project.out_channels),
            y3,
            output_gradient,
            da,
            dz,
            bn3: BatchNormState::new(&[layer.project_bn]),
            rows: RowPlan::images(images, layer.output.cells()),
            branch: None,
        }
    }

    fn input_rows(&self) -> usize {
        self.images * self.layer.input.cells()
    }

    fn output_rows(&self) -> usize {
        self.images * self.layer.output.cells()
    }

    /// What makes the block's output from `y3`, before the residual.
    fn output_affine(&self) -> Affine<'_> {
        match &self.branch {
            Some(branch) => Affine::per_image(&branch.scale, &branch.shift),
            None => self.bn3.affine(),
        }
    }

    fn residual(&self) -> Option<&[f32]> {
        self.layer.skip.then_some(&self.x[..])
    }
}

impl<P: Storage> Backbone<P> {
    pub(super) fn new(network: &Network, act: Act, context: &mut BuildContext<'_>) -> Self {
        let (images, keep, timeline) = (context.images, context.keep, context.timeline);
        let stem_len = images * network.stem.output.cells() * network.stem.conv.out_channels;
        let stem_steps = timeline.span(Step::Stem, Step::StemBackward);
        let stem = StemState {
            layer: network.stem,
            y: (context.memory).buffer("backbone: wide activations", stem_len, stem_steps),
            bn: BatchNormState::new(&[network.stem.bn]),
        };
        let blocks: Vec<BlockState<P>> = (network.blocks.iter().enumerate())
            .map(|(index, block)| BlockState::new(block, index, context))
            .collect();
        let wide = |size: &dyn Fn(&MbConv) -> usize| {
            let widest = network.blocks.iter().map(size).max().unwrap_or(0);
            if keep.training() { 0 } else { images * widest }
        };
        let wide_lens = [
            wide(&|block| block.input.cells() * block.depthwise.channels),
            wide(&|block| block.output.cells() * block.depthwise.channels),
        ];
        let last_len = (network.blocks.last())
            .map_or(0, |last| images * last.output.cells() * last.project.out_channels);
        let last_steps = timeline.span(Step::BackboneOutput, Step::BlockBackward(timeline.blocks() - 1));
        Self {
            images,
            keeps: keep.training(),
            act,
            stem,
            blocks,
            levels: network.backbone_levels.clone(),
            last: (context.memory).buffer("backbone: narrow activations", last_len, last_steps),
            wide: wide_lens
                .map(|len| (context.memory).buffer("backbone: wide activations", len, Lifetime::ALWAYS)),
        }
    }

    /// Output of a block, `[images, height, width, channels]`.
    pub(super) fn output(&self, block: usize) -> &[f32] {
        match self.blocks.get(block + 1) {
            Some(next) => &next.x,
            None => &self.last,
        }
    }

    /// Outputs of the backbone levels, finest first.
    pub(super) fn level_outputs(&self) -> Vec<&[f32]> {
        self.levels.iter().map(|&level| self.output(level)).collect()
    }

    /// Packs the weights of all pointwise convolutions.
    pub(super) fn pack(&mut self, pass: &Pass<'_>, packing: Packing) {
        let mut layers: Vec<(&mut PackedWeights, &[f32])> = Vec::new();
        for block in &mut self.blocks {
            if let (Some(expand), Some((conv, _))) = (&mut block.expand, &block.layer.expand) {
                layers.push((&mut expand.weights, pass.variable(conv.kernel)));
            }
            layers.push((&mut block.project, pass.variable(block.layer.project.kernel)));
        }
        pointwise::pack(pass.executor, packing, &mut layers);
    }
}

impl<P: Storage> Backbone<P> {
    /// Adds what every convolution needs beside its buffers.
    pub(super) fn count(&self, estimate: &mut Beside) {
        for block in &self.blocks {
            if let Some(expand) = &block.expand {
                estimate.pointwise(&expand.weights, &block.input_plan());
            }
            estimate.pointwise(&block.project, &block.rows);
            estimate.depthwise(&block.depthwise);
        }
    }
}

impl Backbone<Full> {
    /// Writes the activated output of the stem.
    pub(super) fn write_stem(&self, pass: &Pass<'_>, out: &mut [f32]) {
        let args = Activate {
            rows: &RowPlan::images(self.images, self.stem.layer.output.cells()),
            channels: self.stem.layer.conv.out_channels,
            source: self.stem.output(self.act),
            gain: None,
            residual: None,
            out,
        };
        elementwise::activate(pass.executor, args);
    }
}

/// Forward.
impl<P: Storage> Backbone<P> {
    pub(super) fn forward(&mut self, pass: &mut Pass<'_>, pixels: &[f32]) {
        pass.enter(Step::Stem);
        self.stem.forward(pass, self.images, pixels);
        for index in 0..self.blocks.len() {
            pass.enter(Step::Block(index));
            let (done, rest) = self.blocks.split_at_mut(index);
            let block = &mut rest[0];
            if !self.keeps {
                // Nothing is kept for a backward pass, so all blocks use the same two buffers.
                if let Some(expand) = &mut block.expand {
                    std::mem::swap(&mut expand.y1, &mut self.wide[0]);
                }
                std::mem::swap(&mut block.y2, &mut self.wide[1]);
            }
            block.forward(pass, self.act, index, &self.stem, done.last());
            if !self.keeps {
                if let Some(expand) = &mut block.expand {
                    std::mem::swap(&mut expand.y1, &mut self.wide[0]);
                }
                std::mem::swap(&mut block.y2, &mut self.wide[1]);
            }
        }
        let Some(block) = self.blocks.last() else { return };
        pass.enter(Step::BackboneOutput);
        block.materialize_output(pass, &mut self.last);
    }
}

impl<P: Storage> StemState<P> {
    fn forward(&mut self, pass: &mut Pass<'_>, images: usize, pixels: &[f32]) {
        stem::forward(
            pass.executor,
            stem::Forward {
                input: self.input(pass, images, pixels),
                channels: self.layer.conv.out_channels,
                weights: pass.variable(self.layer.conv.kernel),
                y: &mut self.y,
                sums: pass.training().then_some(&mut self.bn.sums),
                streaming: true,
            },
        );
        pass.normalize(&mut self.bn, &[images * self.layer.output.cells()]);
    }

    fn input<'a>(&self, pass: &Pass<'_>, images: usize, pixels: &'a [f32]) -> stem::StemInput<'a> {
        stem::StemInput {
            pixels,
            images,
            map: self.layer.input,
            normalize: pass.normalize_input,
        }
    }

    /// The activated output, which the first block reads.
    fn output(&self, act: Act) -> Source<'_, P::Activation> {
        Source {
            raw: &self.y,
            affine: Some(self.bn.affine()),
            act,
        }
    }
}

impl<P: Storage> BlockState<P> {
    /// Writes the block's output: `scale·y3 + shift (+ x)`.
    fn materialize_output(&self, pass: &Pass<'_>, out: &mut [f32]) {
        let args = Activate {
            rows: &self.rows,
            channels: self.bn3.channels(),
            source: Source {
                raw: &self.y3,
                affine: Some(self.output_affine()),
                act: Act::Identity,
            },
            gain: None,
            residual: self.residual(),
            out,
        };
        elementwise::activate(pass.executor, args);
    }

    fn forward(
        &mut self,
        pass: &mut Pass<'_>,
        act: Act,
        index: usize,
        stem: &StemState<P>,
        previous: Option<&Self>,
    ) {
        let training = pass.training();
        // Shared buffers are as large as the largest block needs.
        let wide = self.layer.depthwise.channels;
        let (len1, len2) = (self.input_rows() * wide, self.output_rows() * wide);
        if let (Some(expand), Some(previous)) = (&mut self.expand, previous) {
            let Affine { scale, shift } = previous.output_affine();
            pointwise::forward(
                pass.executor,
                Forward {
                    rows: &expand.rows,
                    weights: &expand.weights,
                    input: FullInput::Normalized {
                        raw: &previous.y3,
                        scale,
                        shift,
                        residual: previous.residual(),
                        x: &mut self.x,
                    },
                    bias: None,
                    stride: expand.weights.outputs(),
                    y: &mut expand.y1[..len1],
                    sums: training.then_some(&mut expand.bn1.sums),
                    streaming: true,
                },
            );
            pass.normalize(&mut expand.bn1, &[expand.rows.rows()]);
        } else if let Some(previous) = previous {
            previous.materialize_output(pass, &mut self.x);
        }

        self.convolve(
            pass,
            act,
            previous.is_none().then_some(stem),
            (len1, len2),
            training,
        );
        pass.normalize(&mut self.bn2, &[self.rows.rows()]);

        if let Some(squeeze) = &mut self.squeeze {
            let source = Source {
                raw: &self.y2[..len2],
                affine: Some(self.bn2.affine()),
                act,
            };
            squeeze.forward(pass, act, self.images, self.layer.output.cells(), source);
        }
        pointwise::forward(
            pass.executor,
            Forward {
                rows: &self.rows,
                weights: &self.project,
                input: Input::Activated(Activated {
                    raw: &self.y2[..len2],
                    scale: ChannelVectors::per_group(&self.bn2.scale),
                    shift: ChannelVectors::per_group(&self.bn2.shift),
                    act,
                    gate: self.squeeze.as_ref().map(|squeeze| &squeeze.gate[..]),
                }),
                bias: None,
                stride: self.project.outputs(),
                y: &mut self.y3,
                sums: training.then_some(&mut self.bn3.sums),
                streaming: false,
            },
        );
        pass.normalize(&mut self.bn3, &[self.rows.rows()]);
        self.branch = pass
            .branch_factors(self.layer.survival, index as u64)
            .map(|factors| Branch {
                scale: per_image(&self.bn3.scale, &factors),
                shift: per_image(&self.bn3.shift, &factors),
                factors,
            });
    }
}

impl<P: Storage> BlockState<P> {
    /// The depthwise convolution, of the stem's output where there is no block in front.
    fn convolve(
        &mut self,
        pass: &Pass<'_>,
        act: Act,
        stem: Option<&StemState<P>>,
        (len1, len2): (usize, usize),
        with_sums: bool,
    ) {
        let (plan, weights) = (&self.depthwise, pass.variable(self.layer.depthwise.kernel));
        let y = &mut self.y2[..len2];
        let sums = with_sums.then_some(&mut self.bn2.sums[..]);
        match (&self.expand, stem) {
            (Some(expand), _) => {
                let input = Source {
                    raw: &expand.y1[..len1],
                    affine: Some(expand.bn1.affine()),
                    act,
                };
                convolve(pass, plan, weights, input, y, sums);
            }
            (None, Some(stem)) => convolve(pass, plan, weights, stem.output(act), y, sums),
            (None, None) => convolve(pass, plan, weights, Source::plain(&self.x[..]), y, sums),
        }
    }

    /// Lets y₁ and y₂ change places with the buffers they are computed into again.
    fn swap_wide(&mut self) {
        if let Some([y1, y2]) = &mut self.again {
            if let Some(expand) = &mut self.expand {
                std::mem::swap(&mut expand.y1, y1);
            }
            std::mem::swap(&mut self.y2, y2);
        }
    }

    /// Computes y₁ and y₂ again from the input and the batch norms of the forward pass.
    fn compute_wide(&mut self, pass: &Pass<'_>, act: Act, stem: Option<&StemState<P>>) {
        if let Some(expand) = &mut self.expand {
            pointwise::forward(
                pass.executor,
                Forward {
                    rows: &expand.rows,
                    weights: &expand.weights,
                    input: FullInput::Plain(&self.x),
                    bias: None,
                    stride: expand.weights.outputs(),
                    y: &mut expand.y1[..],
                    sums: None,
                    streaming: true,
                },
            );
        }
        let len1 = self.expand.as_ref().map_or(0, |expand| expand.y1.len());
        self.convolve(pass, act, stem, (len1, self.y2.len()), false);
    }
}

/// The depthwise convolution of a block.
fn convolve<X: Stored, Y: Stored>(
    pass: &Pass<'_>,
    plan: &DepthwisePlan,
    weights: &[f32],
    input: Source<'_, X>,
    y: &mut [Y],
    sums: Option<&mut [f64]>,
) {
    let convolution = depthwise::Forward {
        plan,
        input,
        weights,
        y,
        sums,
        streaming: true,
    };
    depthwise::forward(pass.executor, convolution);
}

impl Squeeze {
    fn weights<'a>(&self, pass: &Pass<'a>) -> se::Weights<'a> {
        let SqueezeExcite { reduce, expand } = &self.layer;
        se::Weights {
            reduce_kernel: pass.variable(reduce.kernel),
            reduce_bias: pass.bias(reduce),
            expand_kernel: pass.variable(expand.kernel),
            expand_bias: pass.bias(expand),
        }
    }

    fn forward<X: Stored>(
        &mut self,
        pass: &Pass<'_>,
        act: Act,
        images: usize,
        rows_per_image: usize,
        source: Source<'_, X>,
    ) {
        let weights = self.weights(pass);
        let channels = self.layer.expand.out_channels;
        let pool = se::Pool {
            images,
            rows_per_image,
            channels,
            source,
            mean: &mut self.mean,
        };
        se::pool(pass.executor, pool);
        let excite = se::Excite {
            weights,
            act,
            mean: &self.mean,
            hidden: &mut self.hidden,
            gate: &mut self.gate,
        };
        se::excite(pass.executor, excite);
    }

    /// Gradients of the four weight tensors and, into `dpool`, dpool/N.
    fn backward(
        &self,
        pass: &Pass<'_>,
        act: Act,
        rows_per_image: usize,
        sums: &[f64],
        dpool: &mut [f32],
        gradients: &mut Gradients<'_>,
    ) {
        let SqueezeExcite { reduce, expand } = &self.layer;
        let [reduce_kernel, reduce_bias, expand_kernel, expand_bias] =
            gradients.of_all([Some(reduce.kernel), reduce.bias, Some(expand.kernel), expand.bias]);
        let args = se::Backward {
            weights: self.weights(pass),
            act,
            rows_per_image,
            mean: &self.mean,
            hidden: &self.hidden,
            gate: &self.gate,
            sums,
            dpool,
            weight_gradients: se::WeightGradients {
                reduce_kernel,
                reduce_bias,
                expand_kernel,
                expand_bias,
            },
        };
        se::backward(pass.executor, args);
    }
}

/// Backward.
impl<P: Storage> Backbone<P> {
    /// Gradients of all backbone variables from the gradients by its level outputs.
    ///
    /// `level_gradients[i]`: as the output of level i.
    pub(super) fn backward(
        &mut self,
        pass: &Pass<'_>,
        pixels: &[f32],
        level_gradients: &[&[f32]],
        gradients: &mut Gradients<'_>,
    ) {
        let Some(last) = self.blocks.len().checked_sub(1) else {
            return;
        };
        let feature_of = |block: usize| {
            self.levels
                .iter()
                .position(|&level| level == block)
                .map(|level| level_gradients[level])
        };
        pass.enter(Step::BlockBackward(last));
        let block = &mut self.blocks[last];
        match feature_of(last) {
            Some(feature) => block.output_gradient.copy_from_slice(feature),
            None => block.output_gradient.fill(0.0),
        }
        let by_image = block.rows_by_image();
        let mut image_sums = vec![0.0; 2 * self.images * block.layer.project.out_channels];
        elementwise::gradient_sums(
            pass.executor,
            elementwise::GradientSums {
                rows: &by_image,
                channels: block.bn3.channels(),
                dz: &block.output_gradient,
                y: &block.y3,
                sums: &mut image_sums,
            },
        );
        block.take_output_sums(&image_sums);

        for index in (0..self.blocks.len()).rev() {
            pass.enter(Step::BlockBackward(index));
            let feature = index.checked_sub(1).and_then(feature_of);
            let (done, rest) = self.blocks.split_at_mut(index);
            let block = &mut rest[0];
            if block.again.is_some() {
                block.swap_wide();
                block.compute_wide(pass, self.act, (index == 0).then_some(&self.stem));
            }
            block.backward(
                pass,
                self.act,
                &mut self.stem,
                done.last_mut(),
                feature,
                gradients,
            );
            block.swap_wide();
            gradients.finish_from(self.blocks[index].layer.first_variable());
        }

        pass.enter(Step::StemBackward);
        pass.backward_norm(
            &mut self.stem.bn,
            &[self.images * self.stem.layer.output.cells()],
            gradients,
        );
        let StemState { layer, y, bn } = &self.stem;
        stem::backward_weights(
            pass.executor,
            stem::BackwardWeights {
                input: self.stem.input(pass, self.images, pixels),
                channels: layer.conv.out_channels,
                dz: self.blocks.first().map_or(&[], |first| &first.dz),
                y,
                a: ChannelVectors::per_group(&bn.a),
                b: ChannelVectors::per_group(&bn.b),
                c: ChannelVectors::per_group(&bn.c),
                dw: gradients.of(layer.conv.kernel),
            },
        );
    }
}

/// Rows whose groups are the images.
fn by_image(images: usize, rows: usize) -> RowPlan {
    let segment = |image| Segment {
        rows,
        image,
        group: image,
    };
    RowPlan::new(&(0..images).map(segment).collect::<Vec<_>>())
}

impl<P: Storage> BlockState<P> {
    /// Rows whose sums are kept per image, which stochastic depth weighs.
    fn rows_by_image(&self) -> RowPlan {
        by_image(self.images, self.layer.output.cells())
    }

    /// The same for the input.
    fn input_plan(&self) -> RowPlan {
        by_image(self.images, self.layer.input.cells())
    }

    /// From Σdx and Σdx·y₃ of each image to those of the batch norm behind the residual branch.
    fn take_output_sums(&mut self, image_sums: &[f64]) {
        self.bn3.sums.fill(0.0);
        for (image, sums) in image_sums.chunks_exact(self.bn3.sums.len()).enumerate() {
            let factor = self
                .branch
                .as_ref()
                .map_or(1.0, |branch| f64::from(branch.factors[image]));
            for (total, sum) in self.bn3.sums.iter_mut().zip(sums) {
                *total += factor * sum;
            }
        }
    }

    fn backward(
        &mut self,
        pass: &Pass<'_>,
        act: Act,
        stem: &mut StemState<P>,
        mut previous: Option<&mut Self>,
        // Further gradient by the block's input, from the BiFPN.
        feature: Option<&[f32]>,
        gradients: &mut Gradients<'_>,
    ) {
        let (output_rows, input_rows) = (self.output_rows(), self.input_rows());
        let wide = self.layer.depthwise.channels;
        let output_gradient = &self.output_gradient[..];

        pass.backward_norm(&mut self.bn3, &[output_rows], gradients);
        let branch_a = self
            .branch
            .as_ref()
            .map(|branch| per_image(&self.bn3.a, &branch.factors));
        let mut sums = vec![0.0; self.images * 5 * wide];
        pointwise::backward_activated(
            pass.executor,
            BackwardActivated {
                rows: &self.rows,
                weights: &self.project,
                output_gradient: OutputGradient::Normalized {
                    dz: output_gradient,
                    y: &self.y3,
                    a: match &branch_a {
                        Some(a) => ChannelVectors::per_image(a),
                        None => ChannelVectors::per_group(&self.bn3.a),
                    },
                    b: ChannelVectors::per_group(&self.bn3.b),
                    c: ChannelVectors::per_group(&self.bn3.c),
                    stride: self.project.outputs(),
                },
                input: Activated {
                    raw: &self.y2,
                    scale: ChannelVectors::per_group(&self.bn2.scale),
                    shift: ChannelVectors::per_group(&self.bn2.shift),
                    act,
                    gate: self.squeeze.as_ref().map(|squeeze| &squeeze.gate[..]),
                },
                da: &mut self.da,
                sums: &mut sums,
                streaming: true,
                weight_gradient: WeightGradient {
                    dw: gradients.of(self.layer.project.kernel),
                    db: None,
                    accumulate: false,
                },
            },
        );

        let mut dpool = vec![0.0; self.images * wide];
        if let Some(squeeze) = &self.squeeze {
            squeeze.backward(pass, act, self.layer.output.cells(), &sums, &mut dpool, gradients);
        }
        let gate = self.squeeze.as_ref().map(|squeeze| &squeeze.gate[..]);
        se::gradient_sums(&sums, gate, gate.map(|_| &dpool[..]), &mut self.bn2.sums);
        pass.backward_norm(&mut self.bn2, &[output_rows], gradients);
        let (mut gain, mut offset) = (vec![0.0; self.images * wide], vec![0.0; self.images * wide]);
        if let Some(squeeze) = &self.squeeze {
            se::gain_and_offset(&self.bn2.a, &squeeze.gate, &dpool, &mut gain, &mut offset);
        }

        let output_gradient_of_y2 = depthwise::OutputGradient::Activated {
            da: &self.da[..],
            y: &self.y2[..],
            affine: self.bn2.affine(),
            act,
            gain: match &self.squeeze {
                Some(_) => ChannelVectors::per_image(&gain),
                None => ChannelVectors::per_group(&self.bn2.a),
            },
            offset: self.squeeze.as_ref().map(|_| ChannelVectors::per_image(&offset)),
            b: ChannelVectors::per_group(&self.bn2.b),
            c: ChannelVectors::per_group(&self.bn2.c),
        };
        let (plan, weights) = (&self.depthwise, pass.variable(self.layer.depthwise.kernel));
        let dw = gradients.of(self.layer.depthwise.kernel);
        // The batch norm in front, and what it normalises.
        let in_front = match &mut self.expand {
            Some(Expand { y1, bn1, .. }) => Some((&y1[..], bn1)),
            None if previous.is_none() => Some((&stem.y[..], &mut stem.bn)),
            None => None,
        };
        match (in_front, &mut previous) {
            (Some((raw, bn)), _) => {
                let convolution = depthwise::Backward {
                    plan,
                    input: Source {
                        raw,
                        affine: Some(Affine::per_group(&bn.scale, &bn.shift)),
                        act,
                    },
                    weights,
                    output_gradient: output_gradient_of_y2,
                    input_gradient: depthwise::InputGradient {
                        dz: &mut self.dz[..],
                        accumulate: false,
                        sums: Some(&mut bn.sums),
                        streaming: true,
                    },
                    dw,
                };
                depthwise::backward(pass.executor, convolution);
            }
            (None, Some(previous)) => {
                let convolution = depthwise::Backward {
                    plan,
                    input: Source::plain(&self.x[..]),
                    weights,
                    output_gradient: output_gradient_of_y2,
                    input_gradient: depthwise::InputGradient {
                        dz: &mut previous.output_gradient[..],
                        accumulate: false,
                        sums: None,
                        streaming: true,
                    },
                    dw,
                };
                depthwise::backward(pass.executor, convolution);
            }
            (None, None) => {}
        }

        let Some(previous) = previous else { return };
        let residual = self.layer.skip.then_some(output_gradient);
        let by_image = previous.rows_by_image();
        let mut image_sums = vec![0.0; 2 * self.images * previous.bn3.channels()];
        let y_below = &previous.y3;
        let dx = &mut previous.output_gradient[..];
        match &mut self.expand {
            Some(expand) => {
                pass.backward_norm(&mut expand.bn1, &[input_rows], gradients);
                let Some((conv, _)) = self.layer.expand else {
                    return;
                };
                // Groups are images here, so the vectors of the one batch norm are repeated.
                let ones = vec![1.0; self.images];
                let [a, b, c] = [&expand.bn1.a, &expand.bn1.b, &expand.bn1.c].map(|v| per_image(v, &ones));
                pointwise::backward(
                    pass.executor,
                    Backward {
                        rows: &by_image,
                        weights: &expand.weights,
                        output_gradient: OutputGradient::Normalized {
                            dz: &self.dz,
                            y: &expand.y1,
                            a: ChannelVectors::per_image(&a),
                            b: ChannelVectors::per_image(&b),
                            c: ChannelVectors::per_image(&c),
                            stride: wide,
                        },
                        x: &self.x,
                        input_gradient: Some(InputGradient {
                            dx,
                            accumulate: false,
                            addends: [residual, feature],
                            sums: Some(GradientSums {
                                y: y_below,
                                sums: &mut image_sums,
                            }),
                        }),
                        weight_gradient: WeightGradient {
                            dw: gradients.of(conv.kernel),
                            db: None,
                            accumulate: false,
                        },
                    },
                );
            }
            None => {
                for addend in [residual, feature].into_iter().flatten() {
                    dx.iter_mut().zip(addend).for_each(|(x, a)| *x += a);
                }
                let channels = previous.bn3.channels();
                let args = elementwise::GradientSums {
                    rows: &by_image,
                    channels,
                    dz: dx,
                    y: y_below,
                    sums: &mut image_sums,
                };
                elementwise::gradient_sums(pass.executor, args);
            }
        }
        previous.take_output_sums(&image_sums);
    }
}
