//! How well a model's anchors fit the boxes of a data set, and which anchors would fit better.
//!
//! An anchor fits a box that it overlaps by half (IoU ≥ 0.5, the threshold of the assignment). Boxes are taken at the size at which
//! an image is evaluated. Of the anchors of one shape, the one whose centre is nearest overlaps most, so one is tried per shape.

use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::hparams::{AnchorScale, Aspect};
use serde::Serialize;

use super::Split;
use super::findings::{Check, Instance, Problem};
use crate::dataset::DetectionDataset;

/// Overlap from which on an anchor learns a box.
const MATCH_IOU: f64 = 0.5;
/// Boxes that suggestions are tried on.
const SAMPLE: usize = 2000;
/// Recall below which anchors are worth a warning.
const ENOUGH: f64 = 0.9;
/// Fewer boxes of a size class say nothing.
const FEWEST: usize = 10;
/// What a suggestion has to gain.
const GAIN: f64 = 0.02;
/// Anchor scales that are tried.
const SCALES: [f64; 11] = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0];

/// Recall of anchors.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AnchorReport {
    /// Model.
    pub model: String,
    /// Network input, width and height.
    pub input_px: (usize, usize),
    /// Boxes, all sizes.
    pub all: SizeRecall,
    /// Small, medium and large ones, by the areas of the COCO metric.
    pub by_size: [SizeRecall; 3],
    /// Anchors that fit better, if any do.
    pub suggestion: Option<Suggestion>,
}

/// Recall over boxes of one size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct SizeRecall {
    /// Boxes.
    pub boxes: usize,
    /// Of them, those that an anchor overlaps by half.
    pub covered: usize,
    /// Mean of the best overlap.
    pub mean_iou: f64,
}

impl SizeRecall {
    /// Share that is covered; 1 for no boxes.
    pub fn recall(&self) -> f64 {
        match self.boxes {
            0 => 1.0,
            boxes => self.covered as f64 / boxes as f64,
        }
    }

    fn add(&mut self, iou: f64) {
        self.boxes += 1;
        self.covered += usize::from(iou >= MATCH_IOU);
        self.mean_iou += (iou - self.mean_iou) / self.boxes as f64;
    }
}

/// Anchors that fit better.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Suggestion {
    /// As `--hparams` takes it.
    pub hparams: String,
    /// Recall that it reaches.
    pub recall: f64,
    /// Recall of the model's own anchors on the same boxes.
    pub recall_before: f64,
}

/// A box in pixels of the network input.
#[derive(Debug, Clone, Copy)]
struct Placed {
    center_y: f64,
    center_x: f64,
    height: f64,
    width: f64,
    size_class: usize,
}

pub(super) fn report(dataset: &DetectionDataset, model: &str, config: &AnchorConfig) -> AnchorReport {
    let boxes = placed(dataset, config);
    let mut report = AnchorReport {
        model: model.to_owned(),
        input_px: (config.image_width, config.image_height),
        all: SizeRecall::default(),
        by_size: [SizeRecall::default(); 3],
        suggestion: None,
    };
    let Some(shapes) = Shapes::new(config) else {
        return report;
    };
    for placed in &boxes {
        let iou = shapes.best_iou(placed);
        report.all.add(iou);
        report.by_size[placed.size_class].add(iou);
    }
    if report.all.recall() < ENOUGH || weak_sizes(&report).next().is_some() {
        report.suggestion = suggest(&boxes, config);
    }
    report
}

/// Sizes with enough boxes of which too few are covered.
fn weak_sizes(report: &AnchorReport) -> impl Iterator<Item = usize> + '_ {
    (0..3).filter(|&size| report.by_size[size].boxes >= FEWEST && report.by_size[size].recall() < ENOUGH)
}

pub(super) fn check(split: &Split, report: &AnchorReport, problems: &mut Vec<Problem>) {
    let weak: Vec<String> = weak_sizes(report)
        .map(|size| {
            let recall = report.by_size[size];
            format!(
                "{} of {} {} boxes",
                recall.boxes - recall.covered,
                recall.boxes,
                ["small", "medium", "large"][size]
            )
        })
        .collect();
    if weak.is_empty() {
        return;
    }
    let (width, height) = report.input_px;
    let mut detail = format!(
        "at {width}x{height} the anchors of {} overlap by less than half: {}",
        report.model,
        weak.join(", ")
    );
    if let Some(suggestion) = &report.suggestion {
        detail.push_str(&format!(
            ". --hparams {} covers {:.1} % instead of {:.1} % of all boxes",
            suggestion.hparams,
            100.0 * suggestion.recall,
            100.0 * suggestion.recall_before
        ));
    }
    let instance = Instance::file(&split.place, detail.clone());
    let count = report.all.boxes - report.all.covered;
    problems.push(Problem::new(Check::AnchorRecall, &split.name, count, [instance]).detail(detail));
}

/// Boxes of known images without crowds, placed as evaluation does.
fn placed(dataset: &DetectionDataset, config: &AnchorConfig) -> Vec<Placed> {
    let mut boxes = Vec::new();
    for example in &dataset.examples {
        if example.width == 0 || example.height == 0 {
            continue;
        }
        let scale = (config.image_width as f64 / f64::from(example.width))
            .min(config.image_height as f64 / f64::from(example.height));
        for object in example.objects.iter().filter(|object| !object.is_crowd) {
            let [x, y, w, h] = object.box_xywh_px.map(|v| v * scale);
            boxes.push(Placed {
                center_y: y + h / 2.0,
                center_x: x + w / 2.0,
                height: h,
                width: w,
                size_class: match object.area {
                    area if area < 32.0 * 32.0 => 0,
                    area if area <= 96.0 * 96.0 => 1,
                    _ => 2,
                },
            });
        }
    }
    boxes
}

/// The shapes of the anchors of every level.
struct Shapes(Vec<LevelShapes>);

struct LevelShapes {
    rows: usize,
    columns: usize,
    stride_y: f64,
    stride_x: f64,
    /// Heights and widths.
    sizes: Vec<(f64, f64)>,
}

impl Shapes {
    fn new(config: &AnchorConfig) -> Option<Self> {
        let anchors = Anchors::new(config).ok()?;
        let level = |level: &effdet_model::anchors::AnchorLevel| {
            let first = &anchors.boxes_yxyx_px[level.range.start..level.range.start + anchors.per_cell];
            LevelShapes {
                rows: level.height,
                columns: level.width,
                stride_y: level.stride_y_px,
                stride_x: level.stride_x_px,
                sizes: (first.iter())
                    .map(|[top, left, bottom, right]| (f64::from(bottom - top), f64::from(right - left)))
                    .collect(),
            }
        };
        Some(Self(anchors.levels.iter().map(level).collect()))
    }

    fn best_iou(&self, object: &Placed) -> f64 {
        let mut best = 0.0_f64;
        for level in &self.0 {
            let nearest = |center: f64, stride: f64, cells: usize| {
                let cell = (center / stride - 0.5).round().clamp(0.0, cells as f64 - 1.0);
                (cell + 0.5) * stride - center
            };
            let dy = nearest(object.center_y, level.stride_y, level.rows);
            let dx = nearest(object.center_x, level.stride_x, level.columns);
            for &(height, width) in &level.sizes {
                let y = overlap(dy, height, object.height);
                let x = overlap(dx, width, object.width);
                let intersection = y * x;
                let union = height * width + object.height * object.width - intersection;
                best = best.max(intersection / union);
            }
        }
        best
    }
}

/// Common length of two intervals whose centres are `distance` apart.
fn overlap(distance: f64, a: f64, b: f64) -> f64 {
    let (low, high) = (
        (distance - a / 2.0).max(-b / 2.0),
        (distance + a / 2.0).min(b / 2.0),
    );
    (high - low).max(0.0)
}

fn suggest(boxes: &[Placed], config: &AnchorConfig) -> Option<Suggestion> {
    let step = boxes.len().div_ceil(SAMPLE).max(1);
    let sample: Vec<&Placed> = boxes.iter().step_by(step).collect();
    let recall = |config: &AnchorConfig| {
        let shapes = Shapes::new(config)?;
        let covered = sample
            .iter()
            .filter(|placed| shapes.best_iou(placed) >= MATCH_IOU);
        Some(covered.count() as f64 / sample.len() as f64)
    };
    let recall_before = recall(config)?;
    let ratios = typical_ratios(&sample);
    let aspects: Vec<Aspect> = (ratios.iter())
        .map(|ratio| Aspect(ratio.sqrt(), 1.0 / ratio.sqrt()))
        .collect();
    let mut best: Option<(f64, String)> = None;
    // Scales alone first: the smaller change wins unless the larger one gains something.
    for own_aspects in [true, false] {
        for scale in SCALES {
            let candidate = AnchorConfig {
                anchor_scale: AnchorScale::All(scale),
                aspect_ratios: match own_aspects {
                    true => config.aspect_ratios.clone(),
                    false => aspects.clone(),
                },
                ..config.clone()
            };
            let Some(found) = recall(&candidate) else { continue };
            let needed = match &best {
                Some((best, _)) if own_aspects => *best + 1e-9,
                Some((best, _)) => *best + GAIN / 2.0,
                None => recall_before + GAIN,
            };
            if found >= needed {
                let mut hparams = format!("anchor_scale={scale:?}");
                if !own_aspects {
                    let list: Vec<String> = ratios.iter().map(|ratio| format!("{ratio:?}")).collect();
                    hparams.push_str(&format!(",aspect_ratios={}", list.join("*")));
                }
                best = Some((found, hparams));
            }
        }
    }
    best.map(|(recall, hparams)| Suggestion {
        hparams,
        recall,
        recall_before,
    })
}

/// Width by height of narrow, usual and wide boxes, in twentieths; at least a factor apart, so that no anchor is there twice.
fn typical_ratios(sample: &[&Placed]) -> [f64; 3] {
    const APART: f64 = 1.5;
    let mut ratios: Vec<f64> = sample.iter().map(|placed| placed.width / placed.height).collect();
    ratios.sort_by(f64::total_cmp);
    let [narrow, usual, wide] =
        [1, 3, 5].map(|sixth| ratios.get(ratios.len() * sixth / 6).copied().unwrap_or(1.0));
    [narrow.min(usual / APART), usual, wide.max(usual * APART)]
        .map(|ratio| ((ratio * 20.0).round() / 20.0).clamp(0.05, 20.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use effdet_model::boxes::iou;
    use effdet_model::hparams::{HParams, ImageSize};

    fn config() -> AnchorConfig {
        let mut hparams = HParams::preset("d0").unwrap();
        hparams.image_size = ImageSize::square(128);
        AnchorConfig::from(&hparams)
    }

    #[test]
    fn the_nearest_anchor_of_every_shape_gives_the_best_overlap_of_all_anchors() {
        let shapes = Shapes::new(&config()).unwrap();
        let anchors = Anchors::new(&config()).unwrap();
        let mut state = 1u64;
        let mut random = move |low: f64, high: f64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            low + (high - low) * (state >> 40) as f64 / (1u64 << 24) as f64
        };
        for _ in 0..200 {
            let placed = Placed {
                center_y: random(0.0, 128.0),
                center_x: random(0.0, 128.0),
                height: random(2.0, 128.0),
                width: random(2.0, 128.0),
                size_class: 0,
            };
            let object = [
                placed.center_y - placed.height / 2.0,
                placed.center_x - placed.width / 2.0,
                placed.center_y + placed.height / 2.0,
                placed.center_x + placed.width / 2.0,
            ]
            .map(|v| v as f32);
            let expected = anchors
                .boxes_yxyx_px
                .iter()
                .map(|&anchor| iou(anchor, object))
                .fold(0.0, f32::max);
            let found = shapes.best_iou(&placed);
            assert!((found - f64::from(expected)).abs() < 1e-5, "{found} {expected}");
        }
    }

    #[test]
    fn small_boxes_get_a_smaller_scale_suggested_and_fitting_ones_nothing() {
        let boxes = |side: f64| -> Vec<Placed> {
            (0..100)
                .map(|index| Placed {
                    center_y: 20.0 + f64::from(index % 10) * 8.0,
                    center_x: 20.0 + f64::from(index / 10) * 8.0,
                    height: side,
                    width: side * 1.1,
                    size_class: 0,
                })
                .collect()
        };
        let suggestion = suggest(&boxes(10.0), &config()).unwrap();
        assert!(
            suggestion.recall > 0.95 && suggestion.recall_before < 0.5,
            "{suggestion:?}"
        );
        let mut hparams = HParams::preset("d0").unwrap();
        hparams.override_with_pairs(&suggestion.hparams).unwrap();
        assert!(matches!(hparams.anchor_scale, AnchorScale::All(scale) if scale < 4.0));
        assert_eq!(suggest(&boxes(32.0), &config()), None);
    }
}
