//! Stem and MBConv blocks.
//!
//! A block saves the raw outputs of its three convolutions and its input; activations are formed again on the way wherever
//! they are needed. Gradients travel as `dx` of a block's input plus the sums that batch norm needs, made in the same pass.

use effdet_model::network::{MbConv, Network, SqueezeExcite, Stem};

use super::batch_norm::BatchNormState;
use super::pass::{Gradients, Pass, per_image};
use crate::arena::AlignedBuf;
use crate::kernels::depthwise::{self, DepthwisePlan};
use crate::kernels::elementwise::{self, Activate, Affine, Source};
use crate::kernels::pointwise::{
    self, Activated, Backward, BackwardActivated, ChannelVectors, Forward, GradientSums, Input,
    InputGradient, OutputGradient, PackedWeights, Packing, RowPlan, Segment, WeightGradient,
};
use crate::kernels::{se, stem};
use crate::math::Act;
use crate::probe::Stage;

/// The backbone with its buffers for one batch size.
#[derive(Debug)]
pub(super) struct Backbone {
    images: usize,
    /// Whether every block keeps y₁ and y₂ for a backward pass.
    keeps: bool,
    act: Act,
    stem: StemState,
    blocks: Vec<BlockState>,
    /// Block that gives each backbone level.
    levels: Vec<usize>,
    /// Output of the last block.
    last: AlignedBuf,
    /// Wide buffers that all blocks share: y₁ and y₂ in inference, dA and dz in training.
    wide: [AlignedBuf; 2],
    /// Gradients by the input and the output of the block at hand.
    narrow: [AlignedBuf; 2],
}

#[derive(Debug)]
struct StemState {
    layer: Stem,
    y: AlignedBuf,
    bn: BatchNormState,
}

#[derive(Debug)]
struct BlockState {
    layer: MbConv,
    images: usize,
    /// Block input; empty in the first block, which reads the stem's raw output.
    x: AlignedBuf,
    expand: Option<Expand>,
    y2: AlignedBuf,
    bn2: BatchNormState,
    squeeze: Option<Squeeze>,
    depthwise: DepthwisePlan,
    project: PackedWeights,
    y3: AlignedBuf,
    bn3: BatchNormState,
    rows: RowPlan,
    /// Scale and shift of the residual branch per image, where stochastic depth applies.
    branch: Option<Branch>,
}

#[derive(Debug)]
struct Expand {
    weights: PackedWeights,
    y1: AlignedBuf,
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

impl BlockState {
    fn new(layer: &MbConv, images: usize, training: bool) -> Self {
        let (input, output) = (layer.input.cells() * images, layer.output.cells() * images);
        let wide = layer.depthwise.channels;
        let kept = |len: usize| AlignedBuf::zeroed(if training { len } else { 0 });
        Self {
            layer: layer.clone(),
            images,
            x: AlignedBuf::default(),
            expand: layer.expand.map(|(conv, bn)| Expand {
                weights: PackedWeights::new(conv.in_channels, conv.out_channels),
                y1: kept(input * wide),
                bn1: BatchNormState::new(&[bn]),
                rows: RowPlan::images(images, layer.input.cells()),
            }),
            y2: kept(output * wide),
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
            project: PackedWeights::new(wide, layer.project.out_channels),
            y3: AlignedBuf::zeroed(output * layer.project.out_channels),
            bn3: BatchNormState::new(&[layer.project_bn]),
            rows: RowPlan::images(images, layer.output.cells()),
            branch: None,
        }
    }

    fn in_channels(&self) -> usize {
        self.layer
            .expand
            .map_or(self.layer.depthwise.channels, |(conv, _)| conv.in_channels)
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

    fn gate(&self) -> Option<&[f32]> {
        self.squeeze.as_ref().map(|squeeze| &squeeze.gate[..])
    }

    fn residual(&self) -> Option<&[f32]> {
        self.layer.skip.then_some(&self.x[..])
    }
}

impl Backbone {
    pub(super) fn new(network: &Network, act: Act, images: usize, training: bool) -> Self {
        let stem = StemState {
            layer: network.stem,
            y: AlignedBuf::zeroed(images * network.stem.output.cells() * network.stem.conv.out_channels),
            bn: BatchNormState::new(&[network.stem.bn]),
        };
        let mut blocks: Vec<BlockState> = network
            .blocks
            .iter()
            .map(|block| BlockState::new(block, images, training))
            .collect();
        for block in blocks.iter_mut().skip(1) {
            block.x = AlignedBuf::zeroed(block.input_rows() * block.in_channels());
        }
        let input = |block: &MbConv| images * block.input.cells() * block.depthwise.channels;
        let output = |block: &MbConv| images * block.output.cells() * block.depthwise.channels;
        let widest = |size: &dyn Fn(&MbConv) -> usize| network.blocks.iter().map(size).max().unwrap_or(0);
        let narrow = (blocks
            .iter()
            .skip(1)
            .map(|block| block.x.len())
            .max()
            .unwrap_or(0))
        .max(blocks.iter().map(|block| block.y3.len()).max().unwrap_or(0));
        let last = blocks.last().map_or(0, |block| block.y3.len());
        Self {
            images,
            keeps: training,
            act,
            stem,
            blocks,
            levels: network.backbone_levels.clone(),
            last: AlignedBuf::zeroed(last),
            wide: [
                AlignedBuf::zeroed(widest(&input)),
                AlignedBuf::zeroed(widest(&output)),
            ],
            narrow: std::array::from_fn(|_| AlignedBuf::zeroed(if training { narrow } else { 0 })),
        }
    }

    /// Output of a block, `[images, height, width, channels]`.
    pub(super) fn output(&self, block: usize) -> &[f32] {
        match self.blocks.get(block + 1) {
            Some(next) => &next.x,
            None => &self.last,
        }
    }

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

    /// Output of a backbone level, finest first.
    pub(super) fn level_output(&self, level: usize) -> &[f32] {
        self.output(self.levels[level])
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

/// Forward.
impl Backbone {
    pub(super) fn forward(&mut self, pass: &mut Pass<'_>, pixels: &[f32]) {
        pass.executor.enter(Stage::Stem);
        self.stem.forward(pass, self.images, pixels);
        for index in 0..self.blocks.len() {
            pass.executor.enter(Stage::Block(index));
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
        block.materialize_output(pass, &mut self.last);
    }
}

impl StemState {
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
    fn output(&self, act: Act) -> Source<'_> {
        Source {
            raw: &self.y,
            affine: Some(self.bn.affine()),
            act,
        }
    }
}

impl BlockState {
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
        stem: &StemState,
        previous: Option<&BlockState>,
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
                    input: Input::Normalized {
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

        let input = match (&self.expand, previous) {
            (Some(expand), _) => Source {
                raw: &expand.y1[..len1],
                affine: Some(expand.bn1.affine()),
                act,
            },
            (None, None) => stem.output(act),
            (None, Some(_)) => Source::plain(&self.x),
        };
        depthwise::forward(
            pass.executor,
            depthwise::Forward {
                plan: &self.depthwise,
                input,
                weights: pass.variable(self.layer.depthwise.kernel),
                y: &mut self.y2[..len2],
                sums: training.then_some(&mut self.bn2.sums),
                streaming: true,
            },
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

    fn forward(
        &mut self,
        pass: &Pass<'_>,
        act: Act,
        images: usize,
        rows_per_image: usize,
        source: Source<'_>,
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
impl Backbone {
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
        pass.executor.enter(Stage::Block(last));
        let [mut above, mut below] = std::mem::take(&mut self.narrow);
        let len = self.blocks[last].y3.len();
        match feature_of(last) {
            Some(feature) => above[..len].copy_from_slice(feature),
            None => above[..len].fill(0.0),
        }
        let block = &mut self.blocks[last];
        let by_image = block.rows_by_image();
        let mut image_sums = vec![0.0; 2 * self.images * block.layer.project.out_channels];
        elementwise::gradient_sums(
            pass.executor,
            elementwise::GradientSums {
                rows: &by_image,
                channels: block.bn3.channels(),
                dz: &above[..len],
                y: &block.y3,
                sums: &mut image_sums,
            },
        );
        block.take_output_sums(&image_sums);

        for index in (0..self.blocks.len()).rev() {
            pass.executor.enter(Stage::Block(index));
            let (done, rest) = self.blocks.split_at_mut(index);
            let block = &mut rest[0];
            let feature = index.checked_sub(1).and_then(feature_of);
            let io = BlockGradients {
                output: &above,
                input: &mut below,
                feature,
                wide: &mut self.wide,
            };
            block.backward(pass, self.act, &mut self.stem, done.last_mut(), io, gradients);
            std::mem::swap(&mut above, &mut below);
        }
        self.narrow = [above, below];
        pass.executor.enter(Stage::Stem);

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
                dz: &self.wide[0][..y.len()],
                y,
                a: ChannelVectors::per_group(&bn.a),
                b: ChannelVectors::per_group(&bn.b),
                c: ChannelVectors::per_group(&bn.c),
                dw: gradients.of(layer.conv.kernel),
            },
        );
    }
}

/// Buffers of one block's backward pass.
struct BlockGradients<'a> {
    /// Gradient by the block's output.
    output: &'a [f32],
    /// Gradient by its input, written here.
    input: &'a mut [f32],
    /// Further gradient by its input, from the BiFPN.
    feature: Option<&'a [f32]>,
    /// dz₁ and dA.
    wide: &'a mut [AlignedBuf; 2],
}

impl BlockState {
    /// Rows whose sums are kept per image, which stochastic depth weighs.
    fn rows_by_image(&self) -> RowPlan {
        let rows = self.layer.output.cells();
        RowPlan::new(
            &(0..self.images)
                .map(|image| Segment {
                    rows,
                    image,
                    group: image,
                })
                .collect::<Vec<_>>(),
        )
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
        stem: &mut StemState,
        previous: Option<&mut BlockState>,
        io: BlockGradients<'_>,
        gradients: &mut Gradients<'_>,
    ) {
        let (output_rows, input_rows) = (self.output_rows(), self.input_rows());
        let wide = self.layer.depthwise.channels;
        let [dz_buffer, da_buffer] = io.wide;
        let da = &mut da_buffer[..output_rows * wide];
        let dz = &mut dz_buffer[..input_rows * wide];
        let output_gradient = &io.output[..self.y3.len()];

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
                    gate: self.gate(),
                },
                da,
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

        let first = previous.is_none();
        let (input, sums) = match (&mut self.expand, first) {
            (Some(Expand { y1, bn1, .. }), _) => {
                let affine = Affine::per_group(&bn1.scale, &bn1.shift);
                (
                    Source {
                        raw: y1,
                        affine: Some(affine),
                        act,
                    },
                    Some(&mut bn1.sums[..]),
                )
            }
            (None, true) => {
                let StemState { y, bn, .. } = stem;
                let affine = Affine::per_group(&bn.scale, &bn.shift);
                (
                    Source {
                        raw: y,
                        affine: Some(affine),
                        act,
                    },
                    Some(&mut bn.sums[..]),
                )
            }
            (None, false) => (Source::plain(&self.x), None),
        };
        depthwise::backward(
            pass.executor,
            depthwise::Backward {
                plan: &self.depthwise,
                input,
                weights: pass.variable(self.layer.depthwise.kernel),
                output_gradient: depthwise::OutputGradient::Activated {
                    da,
                    y: &self.y2,
                    affine: self.bn2.affine(),
                    act,
                    gain: match &self.squeeze {
                        Some(_) => ChannelVectors::per_image(&gain),
                        None => ChannelVectors::per_group(&self.bn2.a),
                    },
                    offset: self.squeeze.as_ref().map(|_| ChannelVectors::per_image(&offset)),
                    b: ChannelVectors::per_group(&self.bn2.b),
                    c: ChannelVectors::per_group(&self.bn2.c),
                },
                input_gradient: depthwise::InputGradient {
                    dz,
                    accumulate: false,
                    sums,
                    streaming: true,
                },
                dw: gradients.of(self.layer.depthwise.kernel),
            },
        );

        let Some(previous) = previous else { return };
        let residual = self.layer.skip.then_some(output_gradient);
        let by_image = previous.rows_by_image();
        let mut image_sums = vec![0.0; 2 * self.images * previous.bn3.channels()];
        let dx = &mut io.input[..self.x.len()];
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
                            dz,
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
                            addends: [residual, io.feature],
                            sums: Some(GradientSums {
                                y: &previous.y3,
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
                dx.copy_from_slice(dz);
                for addend in [residual, io.feature].into_iter().flatten() {
                    dx.iter_mut().zip(addend).for_each(|(x, a)| *x += a);
                }
                let channels = previous.bn3.channels();
                let args = elementwise::GradientSums {
                    rows: &by_image,
                    channels,
                    dz: dx,
                    y: &previous.y3,
                    sums: &mut image_sums,
                };
                elementwise::gradient_sums(pass.executor, args);
            }
        }
        previous.take_output_sums(&image_sums);
    }
}
