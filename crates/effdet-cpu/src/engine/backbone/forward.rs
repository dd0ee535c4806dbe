//! Forward pass of the backbone, and wide tensors computed again for the backward pass.

use super::{Backbone, BlockState, Branch, StemState};
use crate::engine::pass::{Pass, per_image};
use crate::engine::timeline::Step;
use crate::kernels::depthwise::{self, DepthwisePlan};
use crate::kernels::elementwise::{self, Activate, Affine, Source};
use crate::kernels::pointwise::{self, Activated, ChannelVectors, Forward, FullInput, Input};
use crate::kernels::stem;
use crate::math::Act;
use crate::storage::{Storage, Stored};

impl<P: Storage> Backbone<P> {
    pub(in crate::engine) fn forward(&mut self, pass: &mut Pass<'_>, pixels: &[f32]) {
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

    pub(super) fn input<'a>(&self, pass: &Pass<'_>, images: usize, pixels: &'a [f32]) -> stem::StemInput<'a> {
        stem::StemInput {
            pixels,
            images,
            map: self.layer.input,
            normalize: pass.normalize_input,
        }
    }

    /// The activated output, which the first block reads.
    pub(super) fn output(&self, act: Act) -> Source<'_, P::Activation> {
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
    pub(super) fn swap_wide(&mut self) {
        if let Some([y1, y2]) = &mut self.again {
            if let Some(expand) = &mut self.expand {
                std::mem::swap(&mut expand.y1, y1);
            }
            std::mem::swap(&mut self.y2, y2);
        }
    }

    /// Computes y₁ and y₂ again from the input and the batch norms of the forward pass.
    pub(super) fn compute_wide(&mut self, pass: &Pass<'_>, act: Act, stem: Option<&StemState<P>>) {
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
