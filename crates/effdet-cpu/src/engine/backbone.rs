//! Stem and MBConv blocks.
//!
//! A block saves the raw outputs of its three convolutions and its input; activations are formed again on the way wherever
//! they are needed. Where the wide ones of these outputs are not kept, the backward pass computes them again from the input and
//! the batch norms of the forward pass, which gives the same bits. Gradients travel as `dx` of a block's input plus the sums that batch norm needs, made in the same pass.

mod backward;
mod forward;
mod squeeze;

use effdet_model::network::{MbConv, Network, SqueezeExcite, Stem};

use super::Keep;
use super::batch_norm::BatchNormState;
use super::build::{Beside, BuildContext};
use super::pass::Pass;
use super::timeline::Step;
use crate::arena::{AlignedBuf, Lifetime};
use crate::kernels::depthwise::DepthwisePlan;
use crate::kernels::elementwise::{self, Activate, Affine};
use crate::kernels::pointwise::{self, PackedWeights, Packing, RowPlan};
use crate::math::Act;
use crate::storage::{Full, Storage};

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
        let products = match 2 * index > timeline.blocks() {
            true => context.products,
            false => context.products.with_single_forward(),
        };
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
                weights: PackedWeights::with_products(conv.in_channels, conv.out_channels, products),
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
            project: PackedWeights::with_products(wide, layer.project.out_channels, products),
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
