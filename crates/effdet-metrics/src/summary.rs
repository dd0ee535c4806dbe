//! The numbers of an evaluation and the standard table.

use std::fmt::Write as _;

use crate::error::Warning;

/// IoU thresholds of COCO, 0.50 to 0.95.
pub const NUM_IOU_THRESHOLDS: usize = 10;
/// Recall points at which precision is interpolated, 0.00 to 1.00.
pub const NUM_RECALL_THRESHOLDS: usize = 101;
/// Detections per class and image that an average recall looks at; average precision looks at the last.
pub const MAX_DETECTIONS: [usize; 3] = [1, 10, 100];
/// Names of the twelve numbers, in the order of [`CocoSummary::stats`].
pub const METRIC_NAMES: [&str; 12] = [
    "AP", "AP50", "AP75", "APs", "APm", "APl", "ARmax1", "ARmax10", "ARmax100", "ARs", "ARm", "ARl",
];

pub(crate) const NUM_AREAS: usize = AreaRange::ALL.len();

/// Range of object areas, both ends included, in square pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AreaRange {
    /// Up to 10¹⁰: everything.
    All = 0,
    /// Up to 32².
    Small = 1,
    /// From 32² to 96².
    Medium = 2,
    /// From 96².
    Large = 3,
}

impl AreaRange {
    /// The four ranges in COCO's order.
    pub const ALL: [Self; 4] = [Self::All, Self::Small, Self::Medium, Self::Large];

    /// COCO's name of the range.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Small => "small",
            Self::Medium => "medium",
            Self::Large => "large",
        }
    }

    pub(crate) fn contains(self, area: f64) -> bool {
        let (low, high) = match self {
            Self::All => (0.0, 1e10),
            Self::Small => (0.0, 1024.0),
            Self::Medium => (1024.0, 9216.0),
            Self::Large => (9216.0, 1e10),
        };
        !(area < low || area > high)
    }
}

/// The IoU thresholds 0.50, 0.55, …, 0.95, with the rounding of `numpy.linspace`.
pub fn iou_thresholds() -> [f64; NUM_IOU_THRESHOLDS] {
    linspace(0.5, 0.95)
}

/// The recall points 0.00, 0.01, …, 1.00, with the rounding of `numpy.linspace`.
pub fn recall_thresholds() -> [f64; NUM_RECALL_THRESHOLDS] {
    linspace(0.0, 1.0)
}

fn linspace<const N: usize>(start: f64, stop: f64) -> [f64; N] {
    let step = (stop - start) / (N - 1) as f64;
    std::array::from_fn(|i| if i == N - 1 { stop } else { i as f64 * step + start })
}

/// Interpolated precision, score and recall of every class, area range and IoU threshold; −1 where a class has no objects.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Curves {
    /// `[class, area, threshold][recall point]`, at 100 detections per image.
    precision: Vec<[f64; NUM_RECALL_THRESHOLDS]>,
    /// Score of the detection that reaches the recall point, same layout.
    score: Vec<[f64; NUM_RECALL_THRESHOLDS]>,
    /// `[class, area, max detections][threshold]`.
    recall: Vec<[f64; NUM_IOU_THRESHOLDS]>,
}

impl Curves {
    pub fn new(num_classes: usize) -> Self {
        let num_curves = num_classes * NUM_AREAS * NUM_IOU_THRESHOLDS;
        Self {
            precision: vec![[-1.0; NUM_RECALL_THRESHOLDS]; num_curves],
            score: vec![[-1.0; NUM_RECALL_THRESHOLDS]; num_curves],
            recall: vec![[-1.0; NUM_IOU_THRESHOLDS]; num_classes * NUM_AREAS * MAX_DETECTIONS.len()],
        }
    }

    fn index(class: usize, area: AreaRange, threshold: usize) -> usize {
        (class * NUM_AREAS + area as usize) * NUM_IOU_THRESHOLDS + threshold
    }

    fn recall_index(class: usize, area: AreaRange, max_detections: usize) -> usize {
        (class * NUM_AREAS + area as usize) * MAX_DETECTIONS.len() + max_detections
    }

    /// Precision and score of one curve.
    pub fn curve_mut(
        &mut self,
        class: usize,
        area: AreaRange,
        threshold: usize,
    ) -> (
        &mut [f64; NUM_RECALL_THRESHOLDS],
        &mut [f64; NUM_RECALL_THRESHOLDS],
    ) {
        let index = Self::index(class, area, threshold);
        (&mut self.precision[index], &mut self.score[index])
    }

    pub fn recall_mut(
        &mut self,
        class: usize,
        area: AreaRange,
        max_detections: usize,
        threshold: usize,
    ) -> &mut f64 {
        &mut self.recall[Self::recall_index(class, area, max_detections)][threshold]
    }

    /// Mean precision over thresholds, recall points and classes that have objects.
    ///
    /// The order of the terms is that of pycocotools' array, which has the class as its fastest axis.
    fn mean_precision(
        &self,
        classes: std::ops::Range<usize>,
        area: AreaRange,
        thresholds: std::ops::Range<usize>,
    ) -> f64 {
        let mut values = Vec::with_capacity(classes.len() * thresholds.len() * NUM_RECALL_THRESHOLDS);
        for threshold in thresholds {
            for point in 0..NUM_RECALL_THRESHOLDS {
                values.extend(
                    classes
                        .clone()
                        .map(|class| self.precision[Self::index(class, area, threshold)][point])
                        .filter(|&precision| precision > -1.0),
                );
            }
        }
        mean(&values)
    }

    fn mean_recall(&self, classes: std::ops::Range<usize>, area: AreaRange, max_detections: usize) -> f64 {
        let mut values = Vec::with_capacity(classes.len() * NUM_IOU_THRESHOLDS);
        for threshold in 0..NUM_IOU_THRESHOLDS {
            values.extend(
                classes
                    .clone()
                    .map(|class| self.recall[Self::recall_index(class, area, max_detections)][threshold])
                    .filter(|&recall| recall > -1.0),
            );
        }
        mean(&values)
    }
}

/// Mean of `values`; −1 when there are none.
fn mean(values: &[f64]) -> f64 {
    if values.is_empty() {
        -1.0
    } else {
        pairwise_sum(values) / values.len() as f64
    }
}

/// Sum in the order of NumPy's `add.reduce` of a contiguous array, so that means agree to the last bit.
fn pairwise_sum(values: &[f64]) -> f64 {
    const BLOCK: usize = 128;
    if values.len() < 8 {
        return values.iter().fold(0.0, |sum, value| sum + value);
    }
    if values.len() > BLOCK {
        let half = values.len() / 2;
        let (left, right) = values.split_at(half - half % 8);
        return pairwise_sum(left) + pairwise_sum(right);
    }
    let (chunks, remainder) = values.as_chunks::<8>();
    let mut lanes = chunks[0];
    for chunk in &chunks[1..] {
        lanes
            .iter_mut()
            .zip(chunk)
            .for_each(|(lane, value)| *lane += value);
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    let sum = ((a + b) + (c + d)) + ((e + f) + (g + h));
    remainder.iter().fold(sum, |sum, value| sum + value)
}

/// Results of one class.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassSummary {
    /// Category id of the data set.
    pub category_id: i64,
    /// Objects that count: on evaluated images, neither crowd nor ignored.
    pub num_objects: usize,
    /// AP over IoU 0.50:0.95, all areas, 100 detections; −1 without objects.
    pub ap: f64,
    /// AP at IoU 0.50; −1 without objects.
    pub ap50: f64,
    /// AP at IoU 0.75; −1 without objects.
    pub ap75: f64,
    /// Average recall with 100 detections per image; −1 without objects.
    pub ar100: f64,
}

/// Result of an evaluation.
#[derive(Debug, Clone, PartialEq)]
pub struct CocoSummary {
    /// The twelve COCO numbers, named by [`METRIC_NAMES`]; −1 where there is nothing to average.
    pub stats: [f64; 12],
    /// One entry per category, ascending by id.
    pub per_class: Vec<ClassSummary>,
    /// Oddities of the input.
    pub warnings: Vec<Warning>,
    curves: Curves,
}

/// Positions of IoU 0.50 and 0.75 among the thresholds.
const AT_50: std::ops::Range<usize> = 0..1;
const AT_75: std::ops::Range<usize> = 5..6;
const AT_ALL: std::ops::Range<usize> = 0..NUM_IOU_THRESHOLDS;

impl CocoSummary {
    pub(crate) fn new(
        category_ids: Vec<i64>,
        num_objects: Vec<usize>,
        curves: Curves,
        warnings: Vec<Warning>,
    ) -> Self {
        let every = 0..category_ids.len();
        let precision = |area, thresholds| curves.mean_precision(every.clone(), area, thresholds);
        let recall = |area, max_detections| curves.mean_recall(every.clone(), area, max_detections);
        let stats = [
            precision(AreaRange::All, AT_ALL),
            precision(AreaRange::All, AT_50),
            precision(AreaRange::All, AT_75),
            precision(AreaRange::Small, AT_ALL),
            precision(AreaRange::Medium, AT_ALL),
            precision(AreaRange::Large, AT_ALL),
            recall(AreaRange::All, 0),
            recall(AreaRange::All, 1),
            recall(AreaRange::All, 2),
            recall(AreaRange::Small, 2),
            recall(AreaRange::Medium, 2),
            recall(AreaRange::Large, 2),
        ];
        let per_class = category_ids
            .into_iter()
            .zip(num_objects)
            .enumerate()
            .map(|(class, (category_id, num_objects))| ClassSummary {
                category_id,
                num_objects,
                ap: curves.mean_precision(class..class + 1, AreaRange::All, AT_ALL),
                ap50: curves.mean_precision(class..class + 1, AreaRange::All, AT_50),
                ap75: curves.mean_precision(class..class + 1, AreaRange::All, AT_75),
                ar100: curves.mean_recall(class..class + 1, AreaRange::All, 2),
            })
            .collect();
        Self {
            stats,
            per_class,
            warnings,
            curves,
        }
    }

    /// AP over IoU 0.50:0.95, the number that COCO ranks by.
    pub fn ap(&self) -> f64 {
        self.stats[0]
    }

    /// AP at IoU 0.50.
    pub fn ap50(&self) -> f64 {
        self.stats[1]
    }

    /// The twelve numbers with their names.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, f64)> + '_ {
        METRIC_NAMES.into_iter().zip(self.stats)
    }

    /// Interpolated precision at the 101 recall points, with 100 detections per image; all −1 if the class has no objects in `area`.
    ///
    /// `class` is a position in [`CocoSummary::per_class`], `threshold` a position in [`iou_thresholds`]; `None` outside of them.
    pub fn precision_curve(
        &self,
        class: usize,
        area: AreaRange,
        threshold: usize,
    ) -> Option<&[f64; NUM_RECALL_THRESHOLDS]> {
        self.curve_of(&self.curves.precision, class, area, threshold)
    }

    /// Score of the detection at which each of the 101 recall points is reached: the score threshold of that point of the curve.
    ///
    /// 0 where the recall is never reached, −1 without objects. Arguments as for [`CocoSummary::precision_curve`].
    pub fn score_curve(
        &self,
        class: usize,
        area: AreaRange,
        threshold: usize,
    ) -> Option<&[f64; NUM_RECALL_THRESHOLDS]> {
        self.curve_of(&self.curves.score, class, area, threshold)
    }

    /// Highest recall reached with `MAX_DETECTIONS[max_detections]` detections per image, at each IoU threshold.
    pub fn recall(
        &self,
        class: usize,
        area: AreaRange,
        max_detections: usize,
    ) -> Option<&[f64; NUM_IOU_THRESHOLDS]> {
        let inside = class < self.per_class.len() && max_detections < MAX_DETECTIONS.len();
        inside.then(|| &self.curves.recall[Curves::recall_index(class, area, max_detections)])
    }

    fn curve_of<'a>(
        &self,
        curves: &'a [[f64; NUM_RECALL_THRESHOLDS]],
        class: usize,
        area: AreaRange,
        threshold: usize,
    ) -> Option<&'a [f64; NUM_RECALL_THRESHOLDS]> {
        let inside = class < self.per_class.len() && threshold < NUM_IOU_THRESHOLDS;
        inside.then(|| &curves[Curves::index(class, area, threshold)])
    }

    /// The twelve lines that pycocotools prints, each ended by a newline.
    pub fn table(&self) -> String {
        use AreaRange::{All, Large, Medium, Small};
        let rows = [
            ("0.50:0.95", All, 100),
            ("0.50", All, 100),
            ("0.75", All, 100),
            ("0.50:0.95", Small, 100),
            ("0.50:0.95", Medium, 100),
            ("0.50:0.95", Large, 100),
            ("0.50:0.95", All, 1),
            ("0.50:0.95", All, 10),
            ("0.50:0.95", All, 100),
            ("0.50:0.95", Small, 100),
            ("0.50:0.95", Medium, 100),
            ("0.50:0.95", Large, 100),
        ];
        let mut table = String::new();
        for (index, ((iou, area, max_detections), value)) in rows.into_iter().zip(self.stats).enumerate() {
            let (title, kind) = if index < 6 {
                ("Average Precision", "(AP)")
            } else {
                ("Average Recall", "(AR)")
            };
            let area = area.name();
            writeln!(
                table,
                " {title:<18} {kind} @[ IoU={iou:<9} | area={area:>6} | maxDets={max_detections:>3} ] = {value:0.3}"
            )
            .expect("writing to a String cannot fail");
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_those_of_numpy_linspace() {
        // repr of numpy.linspace(.5, 0.95, 10) and numpy.linspace(.0, 1.00, 101), NumPy 2.4.
        let iou = [
            0.5,
            0.55,
            0.6,
            0.65,
            0.7,
            0.75,
            0.8,
            0.85,
            0.8999999999999999,
            0.95,
        ];
        assert_eq!(iou_thresholds(), iou);
        let recall = recall_thresholds();
        assert_eq!(
            (recall[7], recall[29], recall[57], recall[100]),
            (0.07, 0.29, 0.5700000000000001, 1.0)
        );
    }

    #[test]
    fn a_long_sum_is_pairwise_and_a_short_one_is_plain() {
        assert_eq!(pairwise_sum(&[0.1; 3]), 0.1 + 0.1 + 0.1);
        // numpy.sum(1 / (numpy.arange(n) + 1.0)), NumPy 2.4.
        let harmonic = |n: usize| pairwise_sum(&(0..n).map(|i| 1.0 / (i as f64 + 1.0)).collect::<Vec<_>>());
        assert_eq!(
            [harmonic(100), harmonic(1000), harmonic(1013)],
            [5.187377517639621, 7.485470860550345, 7.4983806713576255]
        );
    }
}
