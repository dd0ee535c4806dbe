//! The four paths from head outputs to detections.

use super::candidates::{Candidate, ImageHeads};
use super::nms::{self, ScoredBox, V5};
use super::{DetectError, Detection};
use crate::anchors::Anchors;
use crate::engine::HeadOutputs;
use crate::hparams::{NmsConfigs, NmsMethod};

/// Detections of one image for evaluation, best first, at most `max_output_size`.
///
/// With `config.pyfunc` (the default) NMS runs per class in the +1 pixel convention ([`nms::suppress_inclusive`]); without, this is
/// [`postprocess_per_class`]. Of equal scores the lower class comes first, then the order of suppression. Boxes are not
/// clipped to the image.
///
/// `image_scale` is pixels of the original image per pixel of the network input.
///
/// # Errors
/// [`DetectError`] when the head outputs do not fit the anchors.
pub fn postprocess_evaluation(
    outputs: &HeadOutputs,
    image: usize,
    anchors: &Anchors,
    config: &NmsConfigs,
    image_scale: f32,
) -> Result<Vec<Detection>, DetectError> {
    if !config.pyfunc {
        return postprocess_per_class(outputs, image, anchors, config, image_scale);
    }
    let heads = ImageHeads::new(outputs, image, anchors)?;
    let candidates = heads.candidates(config.max_nms_inputs);
    Ok(suppress_evaluation(candidates, config, image_scale))
}

/// The second half of [`postprocess_evaluation`] with `config.pyfunc`: from candidates to detections.
pub fn suppress_evaluation(
    candidates: Vec<Candidate>,
    config: &NmsConfigs,
    image_scale: f32,
) -> Vec<Detection> {
    let limit = config.max_output_size;
    best_of_classes(candidates, config, image_scale, |boxes| {
        nms::suppress_inclusive(boxes, config, limit)
    })
}

/// Detections of one image as served: class-agnostic `NonMaxSuppressionV5`, boxes clipped to the network input, best first.
///
/// The Gaussian method takes 1.0 for an unset IoU threshold as the seed does; upstream uses 0.5.
///
/// # Errors
/// As [`postprocess_evaluation`]; [`DetectError::Method`] for other methods than hard and gaussian.
pub fn postprocess_global(
    outputs: &HeadOutputs,
    image: usize,
    anchors: &Anchors,
    config: &NmsConfigs,
    image_scale: f32,
) -> Result<Vec<Detection>, DetectError> {
    let parameters = v5_parameters(config, "global")?;
    let heads = ImageHeads::new(outputs, image, anchors)?;
    let candidates = heads.candidates(config.max_nms_inputs);
    let boxes: Vec<ScoredBox> = candidates.iter().map(scored).collect();
    let kept = nms::suppress_v5(&boxes, &parameters);
    let clipped = kept.iter().map(|kept| {
        let candidate = Candidate {
            score: kept.score,
            ..candidates[kept.index]
        };
        in_original_image(&clip(candidate, anchors), image_scale)
    });
    Ok(clipped.collect())
}

/// Detections of one image by `NonMaxSuppressionV5` per class, best first, at most `max_output_size`; not clipped.
///
/// Of equal scores the lower class comes first.
///
/// # Errors
/// As [`postprocess_global`].
pub fn postprocess_per_class(
    outputs: &HeadOutputs,
    image: usize,
    anchors: &Anchors,
    config: &NmsConfigs,
    image_scale: f32,
) -> Result<Vec<Detection>, DetectError> {
    let parameters = v5_parameters(config, "per-class")?;
    let heads = ImageHeads::new(outputs, image, anchors)?;
    let candidates = heads.candidates(config.max_nms_inputs);
    Ok(best_of_classes(candidates, config, image_scale, |boxes| {
        nms::suppress_v5(boxes, &parameters)
    }))
}

/// Detections of one image by TensorFlow's combined NMS: hard suppression per class over all anchors × classes, clipped, best
/// first.
///
/// `max_nms_inputs` and the method are not used; IoU threshold 0.5 and no score threshold where unset.
///
/// # Errors
/// As [`postprocess_evaluation`].
pub fn postprocess_combined(
    outputs: &HeadOutputs,
    image: usize,
    anchors: &Anchors,
    config: &NmsConfigs,
    image_scale: f32,
) -> Result<Vec<Detection>, DetectError> {
    /// Enough for nearly every image; more are taken where they do not give all detections.
    const FIRST_LOOK: usize = 5000;
    let heads = ImageHeads::new(outputs, image, anchors)?;
    let iou_threshold = nms::set(config.iou_thresh).unwrap_or(0.5);
    let score_threshold = nms::set(Some(config.score_thresh)).unwrap_or(f32::NEG_INFINITY);
    let mut limit = FIRST_LOOK.max(config.max_output_size);
    // Candidates come best first and boxes only suppress worse ones of their class, so a longer list changes no earlier decision.
    let kept = loop {
        let candidates = heads.top(limit);
        let kept = hard_within_classes(
            &candidates,
            iou_threshold,
            score_threshold,
            config.max_output_size,
        );
        let all_seen = limit >= heads.num_logits()
            || candidates
                .last()
                .is_some_and(|worst| worst.score <= score_threshold);
        if kept.len() >= config.max_output_size || all_seen {
            break kept;
        }
        limit = limit.saturating_mul(4);
    };
    Ok(kept
        .iter()
        .map(|&candidate| in_original_image(&clip(candidate, anchors), image_scale))
        .collect())
}

/// Hard suppression of candidates that come best first.
fn hard_within_classes(
    candidates: &[Candidate],
    iou_threshold: f32,
    score_threshold: f32,
    max_output_size: usize,
) -> Vec<Candidate> {
    let mut kept: Vec<Candidate> = Vec::new();
    for candidate in candidates
        .iter()
        .take_while(|candidate| candidate.score > score_threshold)
    {
        if kept.len() >= max_output_size {
            break;
        }
        let mut rivals = kept.iter().filter(|earlier| earlier.class == candidate.class);
        if rivals.all(|rival| nms::v5_iou(candidate.box_yxyx_px, rival.box_yxyx_px) <= iou_threshold) {
            kept.push(*candidate);
        }
    }
    kept
}

/// Suppresses each class by itself and keeps the best of all.
fn best_of_classes(
    mut candidates: Vec<Candidate>,
    config: &NmsConfigs,
    image_scale: f32,
    suppress: impl Fn(&[ScoredBox]) -> Vec<nms::Kept>,
) -> Vec<Detection> {
    candidates.sort_by_key(|candidate| candidate.class);
    let mut survivors = Vec::new();
    for of_class in candidates.chunk_by(|a, b| a.class == b.class) {
        let boxes: Vec<ScoredBox> = of_class.iter().map(scored).collect();
        let kept = suppress(&boxes);
        survivors.extend(kept.iter().map(|kept| Candidate {
            score: kept.score,
            ..of_class[kept.index]
        }));
    }
    survivors.sort_by(|a, b| b.score.total_cmp(&a.score));
    survivors.truncate(config.max_output_size);
    survivors
        .iter()
        .map(|candidate| in_original_image(candidate, image_scale))
        .collect()
}

fn v5_parameters(config: &NmsConfigs, path: &'static str) -> Result<V5, DetectError> {
    let score_threshold = nms::set(Some(config.score_thresh));
    let (sigma, iou_default, score_default) = match config.method {
        NmsMethod::Hard => (None, 0.5, f32::NEG_INFINITY),
        NmsMethod::Gaussian => (Some(nms::set(config.sigma).unwrap_or(0.5)), 1.0, 0.001),
        method => return Err(DetectError::Method { path, method }),
    };
    Ok(V5 {
        sigma,
        iou_threshold: nms::set(config.iou_thresh).unwrap_or(iou_default),
        score_threshold: score_threshold.unwrap_or(score_default),
        max_output_size: config.max_output_size,
    })
}

fn scored(candidate: &Candidate) -> ScoredBox {
    ScoredBox {
        box_yxyx_px: candidate.box_yxyx_px,
        score: candidate.score,
    }
}

/// Clips to `[0, height] × [0, width]` of the network input.
fn clip(candidate: Candidate, anchors: &Anchors) -> Candidate {
    let (height, width) = (anchors.image_height as f32, anchors.image_width as f32);
    let [ymin, xmin, ymax, xmax] = candidate.box_yxyx_px;
    let box_yxyx_px = [
        ymin.clamp(0.0, height),
        xmin.clamp(0.0, width),
        ymax.clamp(0.0, height),
        xmax.clamp(0.0, width),
    ];
    Candidate {
        box_yxyx_px,
        ..candidate
    }
}

fn in_original_image(candidate: &Candidate, image_scale: f32) -> Detection {
    Detection {
        box_yxyx_px: candidate.box_yxyx_px.map(|coordinate| coordinate * image_scale),
        score: candidate.score,
        class: candidate.class,
    }
}
