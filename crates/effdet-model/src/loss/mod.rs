//! Training losses of head outputs: the plain reference that fast kernels are compared with.
//!
//! Every element is computed in f64 from its f32 inputs and summed in f64 in index order, so sums do not depend on threads or
//! instruction sets. The classification loss is [`focal`], the box loss [`huber`], the optional third one [`iou`].
//!
//! Source: the reference's `model/efficientdet_keras.py`, `utils/train_lib.py`; arXiv:1708.02002 (focal loss).

pub mod focal;
pub mod huber;
pub mod iou;

use crate::anchors::Anchors;
use crate::assign::{BACKGROUND, IGNORED};
use crate::engine::{StepLosses, Targets};
use crate::hparams::{HParams, IouLossKind};
use focal::Focal;
use huber::Huber;

/// Parameters of the losses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossConfig {
    /// Focal loss: weight of positives; negatives weigh `1 − alpha`.
    pub alpha: f64,
    /// Focal loss: exponent of the modulating factor.
    pub gamma: f64,
    /// Smoothing of the cross-entropy targets.
    pub label_smoothing: f64,
    /// Huber loss: where it turns from quadratic to linear.
    pub delta: f64,
    /// Weight of the box loss in the sum.
    pub box_loss_weight: f64,
    /// IoU loss; none = off.
    pub iou_loss_type: Option<IouLossKind>,
    /// Weight of the IoU loss in the sum.
    pub iou_loss_weight: f64,
}

impl From<&HParams> for LossConfig {
    fn from(hparams: &HParams) -> Self {
        Self {
            alpha: hparams.alpha,
            gamma: hparams.gamma,
            label_smoothing: hparams.label_smoothing,
            delta: hparams.delta,
            box_loss_weight: hparams.box_loss_weight,
            iou_loss_type: hparams.iou_loss_type,
            iou_loss_weight: hparams.iou_loss_weight,
        }
    }
}

/// Head outputs with anchors flattened over levels, as the losses read them.
#[derive(Debug, Clone, Copy)]
pub struct HeadSlices<'a> {
    /// `[batch, anchors, classes]`.
    pub class_logits: &'a [f32],
    /// `[batch, anchors, 4]`: `ty, tx, th, tw`.
    pub box_codes: &'a [f32],
    /// Class outputs per anchor.
    pub num_classes: usize,
}

/// Where the gradients of [`StepLosses::det_loss`] go; same shapes as [`HeadSlices`].
#[derive(Debug)]
pub struct HeadGradients<'a> {
    /// `[batch, anchors, classes]`.
    pub class_logits: &'a mut [f32],
    /// `[batch, anchors, 4]`.
    pub box_codes: &'a mut [f32],
}

/// Why losses could not be computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LossError {
    /// A slice does not have the size that the class targets and the anchors imply.
    #[error("{what} holds {actual} values, {expected} expected for {images} images of {anchors} anchors")]
    Shape {
        /// The slice.
        what: &'static str,
        /// Values given.
        actual: usize,
        /// Values needed.
        expected: usize,
        /// Images.
        images: usize,
        /// Anchors per image.
        anchors: usize,
    },
    /// A class target names no class output.
    #[error(
        "class target {class} of anchor {anchor} of image {image} is neither -2 (ignored), -1 (background) nor a class index \
         below {num_classes}: check num_classes against the label map"
    )]
    Class {
        /// Image in the batch.
        image: usize,
        /// Anchor.
        anchor: usize,
        /// The target.
        class: i32,
        /// Class outputs.
        num_classes: usize,
    },
    /// The normaliser is not positive.
    #[error(
        "loss normaliser {normalizer} is not a positive number: pass the positives of the batch plus one"
    )]
    Normalizer {
        /// The value.
        normalizer: f32,
    },
}

/// The loss normaliser P of a batch: its positive anchors plus one.
pub fn normalizer(positives_in_batch: usize) -> f32 {
    positives_in_batch as f32 + 1.0
}

/// Losses of a batch and, where wanted, their gradients.
///
/// ```text
/// class_loss   = Σ focal(logit, one-hot target) / P        anchors with target −2 left out
/// box_loss     = Σ [target ≠ 0] · huber(code − target) / 4P
/// box_iou_loss = Σ (1 − similarity(decoded code, decoded target)) / 4P
/// det_loss     = class_loss + box_loss_weight · box_loss + iou_loss_weight · box_iou_loss
/// ```
///
/// The box mask is by value and per coordinate: a positive anchor's coordinate whose target is exactly 0 is left out too. In the
/// IoU loss that mask multiplies the decoded coordinates. Each image is decoded with its own anchors; the reference mixes them
/// up for batches above one, which changes DIoU and CIoU.
///
/// # Shapes
/// As [`HeadSlices`], [`Targets`] and [`HeadGradients`]; the batch is `class_targets.len() / anchors.len()`.
///
/// # Errors
/// [`LossError`]; gradients may be partly written then.
pub fn detection_loss(
    config: &LossConfig,
    anchors: &Anchors,
    heads: &HeadSlices<'_>,
    targets: &Targets<'_>,
    mut gradients: Option<HeadGradients<'_>>,
) -> Result<StepLosses, LossError> {
    check_shapes(anchors, heads, targets, gradients.as_ref())?;
    let class_loss = class_loss(
        config,
        anchors.len(),
        heads,
        targets,
        gradients.as_mut().map(|gradients| &mut *gradients.class_logits),
    )?;
    let mut code_gradients = gradients.map(|gradients| gradients.box_codes);
    let box_loss = box_loss(config, heads, targets, code_gradients.as_deref_mut());
    let box_iou_loss = match config.iou_loss_type {
        None => 0.0,
        Some(kind) => box_iou_loss(config, kind, anchors, heads, targets, code_gradients),
    };
    let det_loss = class_loss + config.box_loss_weight * box_loss + config.iou_loss_weight * box_iou_loss;
    Ok(StepLosses {
        class_loss: class_loss as f32,
        box_loss: box_loss as f32,
        box_iou_loss: box_iou_loss as f32,
        det_loss: det_loss as f32,
    })
}

fn class_loss(
    config: &LossConfig,
    anchors: usize,
    heads: &HeadSlices<'_>,
    targets: &Targets<'_>,
    mut gradients: Option<&mut [f32]>,
) -> Result<f64, LossError> {
    let focal = Focal::from(config);
    let per_positive = 1.0 / f64::from(targets.normalizer);
    let num_classes = heads.num_classes;
    let mut sum = 0.0;
    for (row, (&class, logits)) in targets
        .class_targets
        .iter()
        .zip(heads.class_logits.chunks_exact(num_classes))
        .enumerate()
    {
        let mut gradients = gradients
            .as_deref_mut()
            .map(|all| &mut all[row * num_classes..(row + 1) * num_classes]);
        if class == IGNORED {
            if let Some(gradients) = gradients {
                gradients.fill(0.0);
            }
            continue;
        }
        let positive = usize::try_from(class).ok().filter(|&class| class < num_classes);
        if positive.is_none() && class != BACKGROUND {
            let (image, anchor) = (row / anchors, row % anchors);
            return Err(LossError::Class {
                image,
                anchor,
                class,
                num_classes,
            });
        }
        for (index, &logit) in logits.iter().enumerate() {
            let loss = focal.evaluate(f64::from(logit), positive == Some(index));
            sum += loss.value * per_positive;
            if let Some(gradients) = gradients.as_deref_mut() {
                gradients[index] = (loss.gradient * per_positive) as f32;
            }
        }
    }
    Ok(sum)
}

fn box_loss(
    config: &LossConfig,
    heads: &HeadSlices<'_>,
    targets: &Targets<'_>,
    mut gradients: Option<&mut [f32]>,
) -> f64 {
    let huber = Huber { delta: config.delta };
    let per_positive = 1.0 / (4.0 * f64::from(targets.normalizer));
    let mut sum = 0.0;
    if let Some(gradients) = gradients.as_deref_mut() {
        gradients.fill(0.0);
    }
    for (index, (&code, &target)) in heads.box_codes.iter().zip(targets.box_targets).enumerate() {
        if target == 0.0 {
            continue;
        }
        let loss = huber.evaluate(f64::from(code) - f64::from(target));
        sum += loss.value * per_positive;
        if let Some(gradients) = gradients.as_deref_mut() {
            gradients[index] = (config.box_loss_weight * loss.gradient * per_positive) as f32;
        }
    }
    sum
}

/// Adds its gradients to those of the box loss.
fn box_iou_loss(
    config: &LossConfig,
    kind: IouLossKind,
    anchors: &Anchors,
    heads: &HeadSlices<'_>,
    targets: &Targets<'_>,
    mut gradients: Option<&mut [f32]>,
) -> f64 {
    let per_positive = 1.0 / (4.0 * f64::from(targets.normalizer));
    let mut sum = 0.0;
    let rows = heads
        .box_codes
        .as_chunks::<4>()
        .0
        .iter()
        .zip(targets.box_targets.as_chunks::<4>().0);
    for (row, (code, target)) in rows.enumerate() {
        if target.iter().all(|&coordinate| coordinate == 0.0) {
            continue;
        }
        let anchor = anchors.boxes_yxyx_px[row % anchors.len()];
        let loss = iou::coded_loss(kind, *code, *target, anchor);
        sum += loss.value * per_positive;
        if let Some(gradients) = gradients.as_deref_mut() {
            for (gradient, partial) in gradients[4 * row..4 * row + 4].iter_mut().zip(loss.gradient) {
                let added = config.iou_loss_weight * partial * per_positive;
                *gradient = (f64::from(*gradient) + added) as f32;
            }
        }
    }
    sum
}

fn check_shapes(
    anchors: &Anchors,
    heads: &HeadSlices<'_>,
    targets: &Targets<'_>,
    gradients: Option<&HeadGradients<'_>>,
) -> Result<(), LossError> {
    let rows = targets.class_targets.len();
    let images = rows / anchors.len().max(1);
    let expect = |what, actual, expected| {
        if actual == expected {
            Ok(())
        } else {
            Err(LossError::Shape {
                what,
                actual,
                expected,
                images,
                anchors: anchors.len(),
            })
        }
    };
    expect("class targets", rows, images * anchors.len())?;
    expect("box targets", targets.box_targets.len(), 4 * rows)?;
    expect("class logits", heads.class_logits.len(), rows * heads.num_classes)?;
    expect("box codes", heads.box_codes.len(), 4 * rows)?;
    if let Some(gradients) = gradients {
        expect(
            "class logit gradients",
            gradients.class_logits.len(),
            rows * heads.num_classes,
        )?;
        expect("box code gradients", gradients.box_codes.len(), 4 * rows)?;
    }
    expect(
        "class outputs per anchor",
        heads.num_classes,
        heads.num_classes.max(1),
    )?;
    let normalizer = targets.normalizer;
    if normalizer.is_finite() && normalizer > 0.0 {
        Ok(())
    } else {
        Err(LossError::Normalizer { normalizer })
    }
}

/// A loss of one element and its derivative.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Term {
    /// Value.
    pub value: f64,
    /// Derivative with respect to the prediction.
    pub gradient: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anchors::AnchorConfig;
    use crate::hparams::HParams;

    const NUM_CLASSES: usize = 3;

    fn anchors() -> Anchors {
        let config = AnchorConfig::from(&HParams::preset("efficientdet-d0").unwrap());
        let (image_height, image_width, min_level) = (16, 16, 4);
        Anchors::new(&AnchorConfig {
            image_height,
            image_width,
            min_level,
            max_level: 5,
            ..config
        })
        .unwrap()
    }

    fn config(iou_loss_type: Option<IouLossKind>) -> LossConfig {
        let seed = LossConfig::from(&HParams::preset("efficientdet-d0").unwrap());
        LossConfig {
            iou_loss_type,
            iou_loss_weight: 3.0,
            label_smoothing: 0.1,
            ..seed
        }
    }

    struct Case {
        logits: Vec<f32>,
        codes: Vec<f32>,
        classes: Vec<i32>,
        boxes: Vec<f32>,
    }

    /// Two images of 18 anchors with positives, background and ignored anchors, and one target coordinate of exactly 0.
    fn case() -> Case {
        let wave =
            |index: usize, size: f32| ((index as f32 * 0.7391).sin() + (index as f32 * 0.313).cos()) * size;
        let rows = 2 * anchors().len();
        let classes: Vec<i32> = (0..rows)
            .map(|row| [BACKGROUND, 1, BACKGROUND, 2, IGNORED, 0][row % 6])
            .collect();
        let mut boxes: Vec<f32> = (0..4 * rows)
            .map(|i| {
                if classes[i / 4] >= 0 {
                    wave(i + 50, 0.2)
                } else {
                    0.0
                }
            })
            .collect();
        boxes[4 * 3 + 2] = 0.0;
        let logits = (0..NUM_CLASSES * rows).map(|i| wave(i, 3.0)).collect();
        Case {
            logits,
            codes: (0..4 * rows).map(|i| wave(i + 7, 0.3)).collect(),
            classes,
            boxes,
        }
    }

    fn losses(
        case: &Case,
        config: &LossConfig,
        gradients: Option<HeadGradients<'_>>,
    ) -> Result<StepLosses, LossError> {
        let heads = HeadSlices {
            class_logits: &case.logits,
            box_codes: &case.codes,
            num_classes: NUM_CLASSES,
        };
        let normalizer = normalizer(case.classes.iter().filter(|&&class| class >= 0).count());
        let targets = Targets {
            class_targets: &case.classes,
            box_targets: &case.boxes,
            normalizer,
        };
        detection_loss(config, &anchors(), &heads, &targets, gradients)
    }

    fn gradients(case: &Case, config: &LossConfig) -> (Vec<f32>, Vec<f32>) {
        let (mut logits, mut codes) = (vec![7.0; case.logits.len()], vec![7.0; case.codes.len()]);
        let into = HeadGradients {
            class_logits: &mut logits,
            box_codes: &mut codes,
        };
        losses(case, config, Some(into)).unwrap();
        (logits, codes)
    }

    #[test]
    fn the_sum_weighs_its_parts() {
        let parts = losses(&case(), &config(Some(IouLossKind::Giou)), None).unwrap();
        let sum = parts.class_loss + 50.0 * parts.box_loss + 3.0 * parts.box_iou_loss;
        assert!(
            parts.class_loss > 0.0 && parts.box_loss > 0.0 && parts.box_iou_loss > 0.0,
            "{parts:?}"
        );
        assert!((parts.det_loss - sum).abs() < 1e-5 * sum);
    }

    #[test]
    fn the_gradients_are_the_slopes_of_the_sum() {
        let step = 2e-3;
        for kind in [
            None,
            Some(IouLossKind::Iou),
            Some(IouLossKind::Giou),
            Some(IouLossKind::Diou),
        ] {
            let (config, case) = (config(kind), case());
            let (logits, codes) = gradients(&case, &config);
            let slope = |change: &dyn Fn(&mut Case, f32)| {
                let at = |offset: f32| {
                    let mut moved = self::case();
                    change(&mut moved, offset);
                    let losses = losses(&moved, &config, None).unwrap();
                    // Unlike `det_loss`, the parts keep their digits in f32.
                    f64::from(losses.class_loss)
                        + config.box_loss_weight * f64::from(losses.box_loss)
                        + config.iou_loss_weight * f64::from(losses.box_iou_loss)
                };
                (at(step) - at(-step)) / (2.0 * f64::from(step))
            };
            for (index, &got) in logits.iter().enumerate() {
                let want = slope(&|case, offset| case.logits[index] += offset);
                assert!(
                    (f64::from(got) - want).abs() < 1e-4,
                    "{kind:?} logit {index}: {got} {want}"
                );
            }
            for (index, &got) in codes.iter().enumerate() {
                let want = slope(&|case, offset| case.codes[index] += offset);
                assert!(
                    (f64::from(got) - want).abs() < 1e-3,
                    "{kind:?} code {index}: {got} {want}"
                );
            }
        }
    }

    #[test]
    fn ignored_anchors_and_zero_coordinates_have_no_gradient() {
        let (logits, codes) = gradients(&case(), &config(None));
        assert!(
            logits[4 * NUM_CLASSES..5 * NUM_CLASSES]
                .iter()
                .all(|&gradient| gradient == 0.0)
        );
        assert!(
            logits[5 * NUM_CLASSES..6 * NUM_CLASSES]
                .iter()
                .all(|&gradient| gradient != 0.0)
        );
        assert_eq!(codes[4 * 3 + 2], 0.0);
        assert_ne!(codes[4 * 3 + 1], 0.0);
        assert_eq!(codes[4 * 2..4 * 3], [0.0; 4]);
    }

    #[test]
    fn a_class_without_an_output_is_refused_with_its_place() {
        let mut case = case();
        case.classes[20] = 3;
        let error = losses(&case, &config(None), None).unwrap_err();
        assert_eq!(
            error,
            LossError::Class {
                image: 1,
                anchor: 2,
                class: 3,
                num_classes: NUM_CLASSES
            }
        );
        case.classes[20] = -3;
        assert!(losses(&case, &config(None), None).is_err());
    }

    #[test]
    fn slices_of_the_wrong_length_are_refused() {
        let mut short = case();
        short.codes.pop();
        assert!(matches!(
            losses(&short, &config(None), None),
            Err(LossError::Shape {
                what: "box codes",
                actual: 143,
                expected: 144,
                ..
            })
        ));
    }

    #[test]
    fn outputs_that_are_not_numbers_give_a_loss_that_is_none() {
        let mut broken = case();
        broken.logits[0] = f32::NAN;
        broken.codes[4] = f32::INFINITY;
        let parts = losses(&broken, &config(Some(IouLossKind::Ciou)), None).unwrap();
        assert!(parts.class_loss.is_nan() && !parts.det_loss.is_finite());
    }
}
