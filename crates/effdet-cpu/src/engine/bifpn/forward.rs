//! Forward pass of extra levels and cells.

use super::{Feature, InputState, NodeState, Origin, Pyramid};
use crate::arena::AlignedBuf;
use crate::engine::batch_norm::BatchNormState;
use crate::engine::pass::Pass;
use crate::engine::timeline::Step;
use crate::kernels::depthwise;
use crate::kernels::elementwise::{Affine, Source};
use crate::kernels::fuse::{self, FuseInput, FusionWeights};
use crate::kernels::pointwise::{self, Forward, FullInput};
use crate::kernels::resample;
use crate::math::Act;

impl Pyramid {
    pub(in crate::engine) fn forward(&mut self, pass: &mut Pass<'_>, backbone: &[&[f32]]) {
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
    pub(super) fn source<'a>(
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
}

impl NodeState {
    pub(super) fn fusion_weights(&self, pass: &Pass<'_>, filters: usize) -> FusionWeights {
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
}
