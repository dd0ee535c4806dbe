//! Backward pass of cells and extra levels.

use super::{Feature, Gradient, InputState, NodeState, Origin, Pyramid};
use crate::arena::AlignedBuf;
use crate::engine::gradients::Gradients;
use crate::engine::pass::Pass;
use crate::engine::timeline::Step;
use crate::kernels::depthwise;
use crate::kernels::elementwise::{self, Source};
use crate::kernels::fuse::{self, FuseGradient};
use crate::kernels::pointwise::{
    self, Backward, ChannelVectors, FullGradient, InputGradient, OutputGradient, WeightGradient,
};
use crate::kernels::resample;
use crate::math::Act;

impl Pyramid {
    /// Gradients of all pyramid variables from those by the last cell's outputs, laid out as by [`Self::write_outputs`].
    pub(in crate::engine) fn backward(
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
    pub(in crate::engine) fn level_gradients(&mut self, pass: &Pass<'_>) -> Vec<&[f32]> {
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
