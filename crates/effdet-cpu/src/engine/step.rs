//! One training step over the layers.

use effdet_model::anchors::Anchors;
use effdet_model::assign::IGNORED;
use effdet_model::engine::{EngineError, StepLosses, Targets, TrainBatch};
use effdet_model::hparams::IouLossKind;
use effdet_model::loss::LossError;
use effdet_model::loss::iou::coded_loss;
use effdet_model::network::Network;

use super::build::Layers;
use super::first_of;
use super::gradients::Gradients;
use super::heads::Which;
use super::pass::Pass;
use super::timeline::Step;
use crate::kernels::loss::{self, Focal, HeadRows, Huber};
use crate::kernels::pointwise::Packing;
use crate::storage::Storage;

impl<P: Storage> Layers<P> {
    /// Forward, losses and backward; `pass` gets the layers' clock.
    pub(super) fn step(
        &mut self,
        pass: Pass<'_>,
        network: &Network,
        anchors: &Anchors,
        batch: &TrainBatch<'_>,
        loss_scale: f32,
        mut gradients: Gradients<'_>,
    ) -> StepLosses {
        let hparams = &network.hparams;
        let clock = self.clock.clone();
        let mut pass = Pass {
            clock: Some(&clock),
            ..pass
        };
        self.forward(&mut pass, batch.images.pixels, Packing::ForwardAndBackward);
        let Layers {
            backbone,
            pyramid,
            heads,
            head_input,
            head_gradient,
            ..
        } = self;
        let last_cell = network.cells.len() - 1;
        pass.enter(Step::HeadInput);
        pyramid.write_outputs(&pass, last_cell, head_input);

        let executor = pass.executor;
        let focal = |logits: &mut [f32], rows: HeadRows<'_>| {
            let focal = Focal {
                rows,
                classes: hparams.num_classes,
                alpha: hparams.alpha as f32,
                gamma: hparams.gamma as f32,
                label_smoothing: hparams.label_smoothing as f32,
                normalizer: batch.targets.normalizer / loss_scale,
                targets: batch.targets.class_targets,
                logits,
            };
            loss::focal(executor, focal)
        };
        let buffers = (&head_input[..], &mut *head_gradient);
        let class_loss = heads.train(&mut pass, Which::Class, buffers, false, &mut gradients, focal)
            / f64::from(loss_scale);

        let mut box_iou_loss = 0.0;
        let huber = |codes: &mut [f32], rows: HeadRows<'_>| {
            let iou = (hparams.iou_loss_type).map(|kind| {
                IouGradients::new(
                    kind,
                    hparams.iou_loss_weight * f64::from(loss_scale),
                    anchors,
                    &rows,
                    &batch.targets,
                    codes,
                )
            });
            let huber = Huber {
                rows,
                delta: hparams.delta as f32,
                normalizer: batch.targets.normalizer,
                gradient_weight: hparams.box_loss_weight as f32 * loss_scale,
                targets: batch.targets.box_targets,
                codes: &mut *codes,
            };
            let box_loss = loss::huber(executor, huber);
            box_iou_loss += iou.map_or(0.0, |iou| iou.add_to(codes));
            box_loss
        };
        let buffers = (&head_input[..], &mut *head_gradient);
        let box_loss = heads.train(&mut pass, Which::Box, buffers, true, &mut gradients, huber);

        gradients.finish_from(first_of(&network.class_head).min(first_of(&network.box_head)));
        pyramid.backward(&pass, &backbone.level_outputs(), head_gradient, &mut gradients);
        // The backbone comes first; its last block writes the gradients of its last batch norm later.
        let last = network
            .blocks
            .last()
            .map_or(&network.stem.bn, |block| &block.project_bn);
        gradients.finish_behind(last);
        backbone.backward(
            &pass,
            batch.images.pixels,
            &pyramid.level_gradients(&pass),
            &mut gradients,
        );
        let det_loss =
            class_loss + hparams.box_loss_weight * box_loss + hparams.iou_loss_weight * box_iou_loss;
        StepLosses {
            class_loss: class_loss as f32,
            box_loss: box_loss as f32,
            box_iou_loss: box_iou_loss as f32,
            det_loss: det_loss as f32,
        }
    }
}

/// Targets that no class output or division can take are the caller's mistake.
pub(super) fn check_targets(
    targets: &Targets<'_>,
    anchors: usize,
    num_classes: usize,
) -> Result<(), EngineError> {
    let normalizer = targets.normalizer;
    if !(normalizer.is_finite() && normalizer > 0.0) {
        return Err(LossError::Normalizer { normalizer }.into());
    }
    let fits = |class: i32| class < num_classes as i32 && class >= IGNORED;
    match targets.class_targets.iter().position(|&class| !fits(class)) {
        None => Ok(()),
        Some(row) => {
            let class = targets.class_targets[row];
            Err(LossError::Class {
                image: row / anchors,
                anchor: row % anchors,
                class,
                num_classes,
            }
            .into())
        }
    }
}

/// The IoU loss of a batch, taken from the plain reference: it concerns matched anchors only, which are few.
struct IouGradients {
    loss: f64,
    /// First value of an anchor's code in the head's outputs, and the gradient by the code.
    gradients: Vec<(usize, [f64; 4])>,
}

impl IouGradients {
    fn new(
        kind: IouLossKind,
        weight: f64,
        anchors: &Anchors,
        rows: &HeadRows<'_>,
        targets: &Targets<'_>,
        codes: &[f32],
    ) -> Self {
        let per_positive = 1.0 / (4.0 * f64::from(targets.normalizer));
        let (mut loss, mut gradients) = (0.0, Vec::new());
        let targets = targets.box_targets.as_chunks::<4>().0;
        let mut first_row = 0;
        for map in rows.maps.clone() {
            let (level, image) = (map / rows.images, map % rows.images);
            let cells = rows.cells_per_level[level];
            let first_anchor = rows.cells_per_level[..level].iter().sum::<usize>() * rows.anchors_per_cell;
            for index in 0..cells * rows.anchors_per_cell {
                let anchor = first_anchor + index;
                let target = targets[image * anchors.len() + anchor];
                if target != [0.0; 4] {
                    let (cell, in_cell) = (index / rows.anchors_per_cell, index % rows.anchors_per_cell);
                    let at = (first_row + cell) * rows.stride + 4 * in_cell;
                    let code = std::array::from_fn(|i| codes[at + i]);
                    let term = coded_loss(kind, code, target, anchors.boxes_yxyx_px[anchor]);
                    loss += term.value * per_positive;
                    gradients.push((at, term.gradient.map(|g| g * weight * per_positive)));
                }
            }
            first_row += cells;
        }
        Self { loss, gradients }
    }

    /// Adds the gradients to those of the box loss; gives the loss.
    fn add_to(&self, codes: &mut [f32]) -> f64 {
        for &(at, gradient) in &self.gradients {
            for (value, added) in codes[at..at + 4].iter_mut().zip(gradient) {
                *value = (f64::from(*value) + added) as f32;
            }
        }
        self.loss
    }
}
