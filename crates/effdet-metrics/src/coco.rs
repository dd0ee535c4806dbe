//! The evaluation: matching per class and image, then accumulation over images.

use crate::error::{MetricsError, Warning};
use crate::matching::{Matcher, Outcome};
use crate::summary::{
    AreaRange, CocoSummary, Curves, MAX_DETECTIONS, NUM_AREAS, NUM_IOU_THRESHOLDS, NUM_RECALL_THRESHOLDS,
    iou_thresholds, recall_thresholds,
};

/// One annotated object.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroundTruth {
    /// Id of the annotation. Number them from 1: see [`Warning::AnnotationIdZero`].
    pub id: i64,
    /// Image that shows the object.
    pub image_id: i64,
    /// Category of the object, an id of the data set.
    pub category_id: i64,
    /// Left, top, width and height in pixels; the right edge is `x + w`, without +1.
    pub bbox_xywh_px: [f64; 4],
    /// Area in square pixels, of the segmentation where there is one; it decides between small, medium and large.
    pub area: f64,
    /// A group of objects: detections inside it are ignored, any number of them.
    pub iscrowd: bool,
    /// An object that nobody has to find and whose detection is no mistake (Pascal VOC's `difficult`).
    ///
    /// pycocotools overwrites this COCO field with `iscrowd`; leave it false where equality is wanted.
    pub ignore: bool,
}

impl GroundTruth {
    /// Whether the object has to be found by an evaluation over `area`.
    pub(crate) fn counts_in(&self, area: AreaRange) -> bool {
        !self.iscrowd && !self.ignore && area.contains(self.area)
    }
}

/// One detection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DetectionRow {
    /// Image that was detected on.
    pub image_id: i64,
    /// Category, an id of the data set. Rows of other categories (the padding rows of category 0) are left out.
    pub category_id: i64,
    /// Left, top, width and height in pixels of the original image.
    pub bbox_xywh_px: [f64; 4],
    /// Confidence; only the order counts.
    pub score: f64,
}

/// What detections are evaluated against.
#[derive(Debug, Clone, Copy)]
pub struct Dataset<'a> {
    /// Every image of the data set, with or without objects. Order and repetitions do not matter.
    pub image_ids: &'a [i64],
    /// Every category. Order and repetitions do not matter: results are in ascending order.
    pub category_ids: &'a [i64],
    /// Every annotation. The order matters in one case only: of two objects with exactly the same IoU the later one is matched.
    pub ground_truth: &'a [GroundTruth],
}

/// Which images an evaluation is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImageSet {
    /// All images of the data set: objects on images without detections are missed objects.
    #[default]
    All,
    /// Only images that have at least one row, of whatever category, as the reference implementation does. Padding rows count, so this
    /// differs from [`ImageSet::All`] only for images that were never detected on.
    OnlyWithDetections,
}

/// Choices of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EvalOptions {
    /// Which images are evaluated.
    pub images: ImageSet,
}

/// One detection on its way from its image to the ranking of its class.
struct Ranked {
    score: f64,
    /// Rank among the detections of its class in its image.
    rank: u32,
    outcome: Outcome,
}

/// A row keyed for sorting: class and image by position, row by index.
#[derive(Clone, Copy)]
struct Key {
    class: u32,
    image: u32,
    row: u32,
}

/// Evaluates detections by the rules of COCO (`bbox`, IoU 0.50:0.05:0.95, 101 recall points, 1, 10 and 100 detections per image).
///
/// Within a class and image, detections are ranked by descending score, equal scores in the given order; across images, equal scores
/// rank in ascending order of image id. A number of a class without objects is −1 and left out of
/// the means.
///
/// # Errors
/// [`MetricsError`] when a detection is on an unknown image or a number is not finite.
///
/// # Determinism
/// One thread and a fixed order of operations: the result is a function of the arguments. Means are summed pairwise in NumPy's order.
pub fn evaluate(
    dataset: &Dataset<'_>,
    detections: &[DetectionRow],
    options: &EvalOptions,
) -> Result<CocoSummary, MetricsError> {
    check_counts(dataset, detections)?;
    check_values(dataset.ground_truth, detections)?;

    let category_ids = sorted_unique(dataset.category_ids.iter().copied());
    let known_images = sorted_unique(dataset.image_ids.iter().copied());
    if let Some((index, row)) = detections
        .iter()
        .enumerate()
        .find(|(_, row)| known_images.binary_search(&row.image_id).is_err())
    {
        return Err(MetricsError::UnknownImage {
            index,
            image_id: row.image_id,
        });
    }
    let image_ids = match options.images {
        ImageSet::All => known_images,
        ImageSet::OnlyWithDetections => sorted_unique(detections.iter().map(|row| row.image_id)),
    };
    let key = |row: usize, image_id: i64, category_id: i64| {
        Some(Key {
            class: category_ids.binary_search(&category_id).ok()? as u32,
            image: image_ids.binary_search(&image_id).ok()? as u32,
            row: row as u32,
        })
    };
    let mut truth_keys: Vec<Key> = dataset
        .ground_truth
        .iter()
        .enumerate()
        .filter_map(|(row, object)| key(row, object.image_id, object.category_id))
        .collect();
    truth_keys.sort_unstable_by_key(|key| (key.class, key.image, key.row));
    let mut detection_keys: Vec<Key> = detections
        .iter()
        .enumerate()
        .filter_map(|(row, detection)| key(row, detection.image_id, detection.category_id))
        .collect();
    detection_keys.sort_unstable_by(|a, b| {
        let score = |key: &Key| detections[key.row as usize].score;
        (a.class, a.image)
            .cmp(&(b.class, b.image))
            .then_with(|| descending(score(a), score(b)))
            .then(a.row.cmp(&b.row))
    });

    let thresholds = iou_thresholds();
    let mut curves = Curves::new(category_ids.len());
    let mut num_objects = vec![0; category_ids.len()];
    let mut matcher = Matcher::default();
    let (mut truth_left, mut detections_left) = (&truth_keys[..], &detection_keys[..]);
    let mut objects: Vec<&GroundTruth> = Vec::new();
    let mut rows: Vec<&DetectionRow> = Vec::new();
    let mut outcomes = Vec::new();
    let mut ranking: Vec<Ranked> = Vec::new();
    for class in 0..category_ids.len() as u32 {
        let mut class_truth = take_while(&mut truth_left, |key| key.class == class);
        let mut class_detections = take_while(&mut detections_left, |key| key.class == class);
        let mut num_counting = [0usize; NUM_AREAS];
        ranking.clear();
        while let Some(image) = [class_truth.first(), class_detections.first()]
            .into_iter()
            .flatten()
            .map(|key| key.image)
            .min()
        {
            let of_image = |key: &Key| key.image == image;
            objects.clear();
            objects.extend(
                take_while(&mut class_truth, of_image)
                    .iter()
                    .map(|key| &dataset.ground_truth[key.row as usize]),
            );
            rows.clear();
            rows.extend(
                take_while(&mut class_detections, of_image)
                    .iter()
                    .take(MAX_DETECTIONS[2])
                    .map(|key| &detections[key.row as usize]),
            );
            for area in AreaRange::ALL {
                num_counting[area as usize] += objects.iter().filter(|o| o.counts_in(area)).count();
            }
            outcomes.clear();
            matcher.run(&thresholds, &objects, &rows, &mut outcomes);
            ranking.extend(
                rows.iter()
                    .zip(&outcomes)
                    .enumerate()
                    .map(|(rank, (row, &outcome))| Ranked {
                        score: row.score,
                        rank: rank as u32,
                        outcome,
                    }),
            );
        }
        // Stable: equal scores stay in the order of image ids.
        ranking.sort_by(|a, b| descending(a.score, b.score));
        accumulate(&ranking, &num_counting, class as usize, &mut curves);
        num_objects[class as usize] = num_counting[AreaRange::All as usize];
    }

    let mut warnings = Vec::new();
    let mut warn = |count: usize, warning: fn(usize) -> Warning| {
        if count > 0 {
            warnings.push(warning(count));
        }
    };
    warn(
        truth_keys
            .iter()
            .filter(|key| dataset.ground_truth[key.row as usize].id == 0)
            .count(),
        |count| Warning::AnnotationIdZero { count },
    );
    warn(dataset.ground_truth.len() - truth_keys.len(), |count| {
        Warning::GroundTruthOutside { count }
    });
    warn(detections.len() - detection_keys.len(), |count| {
        Warning::DetectionsOfUnknownCategory { count }
    });
    Ok(CocoSummary::new(category_ids, num_objects, curves, warnings))
}

/// Recall and interpolated precision of one class from its ranking over all images.
fn accumulate(ranking: &[Ranked], num_counting: &[usize; NUM_AREAS], class: usize, curves: &mut Curves) {
    let recall_points = recall_thresholds();
    // Precision and score at each hit, in order of rank.
    let mut hits: Vec<(f64, f64)> = Vec::new();
    for area in AreaRange::ALL {
        let a = area as usize;
        let num_objects = num_counting[a] as f64;
        if num_counting[a] == 0 {
            continue;
        }
        for t in 0..NUM_IOU_THRESHOLDS {
            let (mut true_positives, mut false_positives) = (0.0f64, 0.0f64);
            let mut hits_within = [0.0f64; MAX_DETECTIONS.len()];
            hits.clear();
            for row in ranking {
                if row.outcome.ignored[a] >> t & 1 != 0 {
                    continue;
                }
                if row.outcome.matched[a] >> t & 1 != 0 {
                    true_positives += 1.0;
                    let precision = true_positives / (false_positives + true_positives + f64::EPSILON);
                    hits.push((precision, row.score));
                    for (count, &limit) in hits_within.iter_mut().zip(&MAX_DETECTIONS) {
                        *count += f64::from(u8::from((row.rank as usize) < limit));
                    }
                } else {
                    false_positives += 1.0;
                }
            }
            for (m, count) in hits_within.into_iter().enumerate() {
                *curves.recall_mut(class, area, m, t) = count / num_objects;
            }

            // Precision at a rank becomes the highest at that rank or below. It rises at hits only, so hits are all there is to look at.
            let mut highest = 0.0f64;
            for hit in hits.iter_mut().rev() {
                highest = highest.max(hit.0);
                hit.0 = highest;
            }
            let (precision, score) = curves.curve_mut(class, area, t);
            *precision = [0.0; NUM_RECALL_THRESHOLDS];
            *score = [0.0; NUM_RECALL_THRESHOLDS];
            let mut next = 0;
            for (point, &recall) in recall_points.iter().enumerate() {
                while next < hits.len() && ((next + 1) as f64) / num_objects < recall {
                    next += 1;
                }
                let Some(&(p, s)) = hits.get(next) else { break };
                precision[point] = p;
                score[point] = s;
            }
            // Recall 0 is reached by the first row of the ranking, hit or not.
            if let Some(first) = ranking.first() {
                score[0] = first.score;
            }
        }
    }
}

/// Order of −score; the scores are finite.
fn descending(a: f64, b: f64) -> std::cmp::Ordering {
    b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal)
}

fn sorted_unique(ids: impl Iterator<Item = i64>) -> Vec<i64> {
    let mut ids: Vec<i64> = ids.collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Splits off the leading elements that satisfy `belongs`.
fn take_while<'a, T>(rest: &mut &'a [T], belongs: impl Fn(&T) -> bool) -> &'a [T] {
    let end = rest.iter().position(|item| !belongs(item)).unwrap_or(rest.len());
    let (taken, left) = rest.split_at(end);
    *rest = left;
    taken
}

fn check_counts(dataset: &Dataset<'_>, detections: &[DetectionRow]) -> Result<(), MetricsError> {
    for (what, count) in [
        ("detections", detections.len()),
        ("annotations", dataset.ground_truth.len()),
        ("images", dataset.image_ids.len()),
        ("categories", dataset.category_ids.len()),
    ] {
        if u32::try_from(count).is_err() {
            return Err(MetricsError::TooManyRows { what, count });
        }
    }
    Ok(())
}

fn check_values(ground_truth: &[GroundTruth], detections: &[DetectionRow]) -> Result<(), MetricsError> {
    let first_bad = |values: &[f64]| values.iter().copied().find(|value| !value.is_finite());
    for (index, object) in ground_truth.iter().enumerate() {
        for (field, values) in [
            ("bbox_xywh_px", &object.bbox_xywh_px[..]),
            ("area", &[object.area][..]),
        ] {
            if let Some(value) = first_bad(values) {
                return Err(MetricsError::GroundTruthNotFinite {
                    index,
                    id: object.id,
                    field,
                    value,
                });
            }
        }
    }
    for (index, row) in detections.iter().enumerate() {
        for (field, values) in [
            ("bbox_xywh_px", &row.bbox_xywh_px[..]),
            ("score", &[row.score][..]),
        ] {
            if let Some(value) = first_bad(values) {
                return Err(MetricsError::DetectionNotFinite {
                    index,
                    image_id: row.image_id,
                    field,
                    value,
                });
            }
        }
    }
    Ok(())
}
