//! Backward pass of the backbone.

use super::{Backbone, BlockState, Expand, StemState};
use crate::engine::gradients::Gradients;
use crate::engine::pass::{Pass, per_image};
use crate::engine::timeline::Step;
use crate::kernels::depthwise;
use crate::kernels::elementwise::{self, Affine, Source};
use crate::kernels::pointwise::{
    self, Activated, Backward, BackwardActivated, ChannelVectors, GradientSums, InputGradient,
    OutputGradient, RowPlan, Segment, WeightGradient,
};
use crate::kernels::{se, stem};
use crate::math::Act;
use crate::storage::Storage;

impl<P: Storage> Backbone<P> {
    /// Gradients of all backbone variables from the gradients by its level outputs.
    ///
    /// `level_gradients[i]`: as the output of level i.
    pub(in crate::engine) fn backward(
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
    pub(super) fn input_plan(&self) -> RowPlan {
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
