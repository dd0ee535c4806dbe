//! Assignment of the detections of one class in one image to its objects.

use crate::coco::{DetectionRow, GroundTruth};
use crate::summary::{AreaRange, NUM_AREAS, NUM_IOU_THRESHOLDS};

/// What became of one detection, per area range; bit `t` stands for the IoU threshold of index `t`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Outcome {
    /// Matched to an object.
    pub matched: [u16; NUM_AREAS],
    /// Neither a hit nor a miss: matched to an ignored object, or unmatched and outside the area range.
    pub ignored: [u16; NUM_AREAS],
}

/// Buffers kept from one image to the next.
#[derive(Debug, Default)]
pub(crate) struct Matcher {
    /// IoU of detection `d` with object `g`, at `d·G + g`.
    ious: Vec<f64>,
    /// Objects in the order of the search: those that count first, otherwise as given.
    order: Vec<u32>,
    taken: Vec<bool>,
}

const ALL_THRESHOLDS: u16 = (1 << NUM_IOU_THRESHOLDS) - 1;

impl Matcher {
    /// Matches one class in one image, for every area range and IoU threshold.
    ///
    /// `detections` are in descending order of score and at most 100; one [`Outcome`] each is appended to `outcomes`.
    /// A detection takes the free object of highest IoU (the last of equals); objects that count go before ignored ones, and a crowd
    /// can be taken any number of times.
    pub fn run(
        &mut self,
        thresholds: &[f64; NUM_IOU_THRESHOLDS],
        objects: &[&GroundTruth],
        detections: &[&DetectionRow],
        outcomes: &mut Vec<Outcome>,
    ) {
        let first = outcomes.len();
        outcomes.extend(detections.iter().map(|_| Outcome::default()));
        let outcomes = &mut outcomes[first..];

        self.ious.clear();
        for detection in detections {
            self.ious
                .extend(objects.iter().map(|object| iou(detection, object)));
        }
        for area in AreaRange::ALL {
            self.match_in_area(area, thresholds, objects, outcomes);
            for (detection, outcome) in detections.iter().zip(outcomes.iter_mut()) {
                let [_, _, width, height] = detection.bbox_xywh_px;
                if !area.contains(width * height) {
                    outcome.ignored[area as usize] |= !outcome.matched[area as usize] & ALL_THRESHOLDS;
                }
            }
        }
    }

    fn match_in_area(
        &mut self,
        area: AreaRange,
        thresholds: &[f64; NUM_IOU_THRESHOLDS],
        objects: &[&GroundTruth],
        outcomes: &mut [Outcome],
    ) {
        let num_objects = objects.len();
        if num_objects == 0 {
            return;
        }
        let counts = |index: &u32| objects[*index as usize].counts_in(area);
        self.order.clear();
        self.order.extend((0..num_objects as u32).filter(counts));
        let num_counting = self.order.len();
        self.order
            .extend((0..num_objects as u32).filter(|index| !counts(index)));

        for (t, &threshold) in thresholds.iter().enumerate() {
            let bit = 1u16 << t;
            self.taken.clear();
            self.taken.resize(num_objects, false);
            for (ious, outcome) in self.ious.chunks_exact(num_objects).zip(outcomes.iter_mut()) {
                let mut best_iou = threshold.min(1.0 - 1e-10);
                let mut best = None;
                for (position, &index) in self.order.iter().enumerate() {
                    let index = index as usize;
                    if self.taken[index] && !objects[index].iscrowd {
                        continue;
                    }
                    // Ignored objects come last: once one that counts is found they cannot replace it.
                    if position >= num_counting && best.is_some_and(|(p, _)| p < num_counting) {
                        break;
                    }
                    if ious[index] >= best_iou {
                        best_iou = ious[index];
                        best = Some((position, index));
                    }
                }
                let Some((position, index)) = best else { continue };
                self.taken[index] = true;
                // pycocotools stores the id of the object as the mark of a match, so the id 0 reads as "no match".
                if objects[index].id != 0 {
                    outcome.matched[area as usize] |= bit;
                }
                if position >= num_counting {
                    outcome.ignored[area as usize] |= bit;
                }
            }
        }
    }
}

/// Intersection over union; over the detection's own area when the object is a crowd.
fn iou(detection: &DetectionRow, object: &GroundTruth) -> f64 {
    let [dx, dy, dw, dh] = detection.bbox_xywh_px;
    let [gx, gy, gw, gh] = object.bbox_xywh_px;
    let width = (dw + dx).min(gw + gx) - dx.max(gx);
    if width <= 0.0 {
        return 0.0;
    }
    let height = (dh + dy).min(gh + gy) - dy.max(gy);
    if height <= 0.0 {
        return 0.0;
    }
    let intersection = width * height;
    let detection_area = dw * dh;
    let union = if object.iscrowd {
        detection_area
    } else {
        detection_area + gw * gh - intersection
    };
    intersection / union
}
