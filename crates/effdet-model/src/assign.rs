//! Assignment of objects to anchors: the targets of training.
//!
//! Source: the reference's `object_detection/{argmax_matcher,target_assigner}.py`.

use crate::anchors::{AnchorLevel, Anchors};
use crate::boxes;

/// Least overlap (inclusive) at which an anchor takes its best object.
pub const MATCH_IOU: f32 = 0.5;

/// Class target of an anchor without an object.
pub const BACKGROUND: i32 = -1;

/// Class target of an anchor that takes no part in the class loss. [`Assigner`] never gives it.
pub const IGNORED: i32 = -2;

/// Assigns objects to the anchors of one network input.
///
/// 1. Each anchor takes the object that overlaps it most (of equal ones the first) if their IoU is at least [`MATCH_IOU`].
/// 2. Each object then takes the anchor that overlaps it most (of equal ones the first), whatever their IoU, over step 1; an object
///    that overlaps none takes anchor 0. An anchor wanted by several objects goes to the first of them.
///
/// Overlaps are those of [`boxes::iou`]: equal anchors around a small box differ by rounding only, so another operation order
/// picks other anchors. Only the cells whose anchors can reach an object are looked at; everything else has an overlap of
/// exactly 0.
#[derive(Debug, Clone)]
pub struct Assigner {
    anchors: Columns,
    levels: Vec<GridLevel>,
    per_cell: usize,
}

/// Memory of [`Assigner::assign_with`] that serves one image after the other.
#[derive(Debug, Clone, Default)]
pub struct AssignScratch {
    /// Largest overlap of each anchor so far.
    best: Vec<f32>,
    /// Overlaps of one object with a row of cells.
    overlaps: Vec<f32>,
    favourites: Vec<usize>,
}

/// Anchor boxes by coordinate, so that the overlaps of a row of cells vectorise.
#[derive(Debug, Clone)]
struct Columns {
    ymin: Vec<f32>,
    xmin: Vec<f32>,
    ymax: Vec<f32>,
    xmax: Vec<f32>,
    area: Vec<f32>,
}

#[derive(Debug, Clone)]
struct GridLevel {
    grid: AnchorLevel,
    /// Half the height of the level's tallest anchor.
    reach_y_px: f64,
    /// Half the width of the level's widest anchor.
    reach_x_px: f64,
}

impl Assigner {
    /// Prepares the assignment to `anchors`.
    pub fn new(anchors: &Anchors) -> Self {
        let column = |coordinate: fn([f32; 4]) -> f32| {
            anchors
                .boxes_yxyx_px
                .iter()
                .map(|&anchor| coordinate(anchor))
                .collect::<Vec<f32>>()
        };
        let levels = anchors.levels.iter().map(|grid| {
            let shapes = &anchors.boxes_yxyx_px[grid.range.start..grid.range.start + anchors.per_cell];
            let reach = |low: usize, high: usize| {
                let half_side = |shape: &[f32; 4]| (f64::from(shape[high]) - f64::from(shape[low])) / 2.0;
                shapes.iter().map(half_side).fold(0.0, f64::max)
            };
            GridLevel {
                grid: grid.clone(),
                reach_y_px: reach(0, 2),
                reach_x_px: reach(1, 3),
            }
        });
        Self {
            levels: levels.collect(),
            per_cell: anchors.per_cell,
            anchors: Columns {
                ymin: column(|b| b[0]),
                xmin: column(|b| b[1]),
                ymax: column(|b| b[2]),
                xmax: column(|b| b[3]),
                area: column(boxes::area),
            },
        }
    }

    /// Number of anchors.
    pub fn num_anchors(&self) -> usize {
        self.anchors.area.len()
    }

    /// Writes the targets of one image and returns its number of positive anchors.
    ///
    /// `classes` are class indices. A positive anchor gets its object's class and [`boxes::encode`] of the object; any other gets
    /// [`BACKGROUND`] and zeros. Boxes should be finite: an object with NaN coordinates takes anchor 0.
    ///
    /// # Shapes
    /// `boxes_yxyx_px` and `classes`: one entry per object; `class_targets`: `[anchors]`; `box_targets`: `[anchors, 4]` as
    /// `ty, tx, th, tw`.
    ///
    /// # Panics
    /// When the slices do not have these lengths.
    pub fn assign(
        &self,
        boxes_yxyx_px: &[[f32; 4]],
        classes: &[i32],
        class_targets: &mut [i32],
        box_targets: &mut [f32],
    ) -> usize {
        let mut scratch = AssignScratch::default();
        self.assign_with(&mut scratch, boxes_yxyx_px, classes, class_targets, box_targets)
    }

    /// [`Self::assign`] in memory that is kept between images.
    ///
    /// # Panics
    /// As [`Self::assign`].
    pub fn assign_with(
        &self,
        scratch: &mut AssignScratch,
        boxes_yxyx_px: &[[f32; 4]],
        classes: &[i32],
        class_targets: &mut [i32],
        box_targets: &mut [f32],
    ) -> usize {
        check_lengths(
            self.num_anchors(),
            boxes_yxyx_px,
            classes,
            class_targets,
            box_targets,
        );
        // Until the end `class_targets` holds the row of the matched object.
        let matches = &mut *class_targets;
        matches.fill(BACKGROUND);
        let AssignScratch {
            best,
            overlaps,
            favourites,
        } = scratch;
        best.clear();
        best.resize(self.num_anchors(), 0.0);
        favourites.clear();
        for (row, &object) in boxes_yxyx_px.iter().enumerate() {
            favourites.push(self.match_object(row, object, best, matches, overlaps));
        }
        for (matched, &overlap) in matches.iter_mut().zip(&*best) {
            if overlap < MATCH_IOU {
                *matched = BACKGROUND;
            }
        }
        force_matches(favourites, matches);
        self.write_targets(boxes_yxyx_px, classes, class_targets, box_targets)
    }

    /// Lets one object compete for the anchors it overlaps; returns the anchor that overlaps it most.
    fn match_object(
        &self,
        row: usize,
        object: [f32; 4],
        best: &mut [f32],
        matches: &mut [i32],
        overlaps: &mut Vec<f32>,
    ) -> usize {
        let row = row_code(row);
        let area = boxes::area(object);
        let (mut favourite, mut favourite_overlap) = (0, 0.0);
        for level in &self.levels {
            let columns = level.columns_in_reach(object);
            for grid_row in level.rows_in_reach(object) {
                let cells = grid_row * level.grid.width;
                let first = level.grid.range.start + (cells + columns.start) * self.per_cell;
                let range = first..first + columns.len() * self.per_cell;
                overlaps.resize(range.len(), 0.0);
                self.anchors.overlaps(range.clone(), object, area, overlaps);
                for ((best, matched), &overlap) in best[range.clone()]
                    .iter_mut()
                    .zip(&mut matches[range])
                    .zip(&*overlaps)
                {
                    let better = overlap > *best;
                    *best = if better { overlap } else { *best };
                    *matched = if better { row } else { *matched };
                }
                if overlaps
                    .iter()
                    .fold(false, |any, &overlap| any | (overlap > favourite_overlap))
                {
                    for (index, &overlap) in overlaps.iter().enumerate() {
                        if overlap > favourite_overlap {
                            (favourite, favourite_overlap) = (first + index, overlap);
                        }
                    }
                }
            }
        }
        favourite
    }

    fn write_targets(
        &self,
        boxes_yxyx_px: &[[f32; 4]],
        classes: &[i32],
        matches: &mut [i32],
        box_targets: &mut [f32],
    ) -> usize {
        box_targets.fill(0.0);
        let mut positives = 0;
        for (anchor, (matched, code)) in matches
            .iter_mut()
            .zip(box_targets.chunks_exact_mut(4))
            .enumerate()
        {
            let Ok(row) = usize::try_from(*matched) else {
                continue;
            };
            positives += 1;
            *matched = classes[row];
            code.copy_from_slice(&boxes::encode(boxes_yxyx_px[row], self.anchors.get(anchor)));
        }
        positives
    }
}

impl Columns {
    fn get(&self, index: usize) -> [f32; 4] {
        [
            self.ymin[index],
            self.xmin[index],
            self.ymax[index],
            self.xmax[index],
        ]
    }

    /// Overlaps of one object with a range of anchors.
    fn overlaps(&self, range: std::ops::Range<usize>, object: [f32; 4], area: f32, overlaps: &mut [f32]) {
        let count = overlaps.len();
        let [ymin, xmin, ymax, xmax, areas] = [&self.ymin, &self.xmin, &self.ymax, &self.xmax, &self.area]
            .map(|column| &column[range.clone()][..count]);
        for (index, overlap) in overlaps.iter_mut().enumerate() {
            let anchor = [ymin[index], xmin[index], ymax[index], xmax[index]];
            *overlap = boxes::iou_with_areas(object, area, anchor, areas[index]);
        }
    }
}

impl GridLevel {
    fn rows_in_reach(&self, object: [f32; 4]) -> std::ops::Range<usize> {
        in_reach(
            object[0],
            object[2],
            self.reach_y_px,
            self.grid.stride_y_px,
            self.grid.height,
        )
    }

    fn columns_in_reach(&self, object: [f32; 4]) -> std::ops::Range<usize> {
        in_reach(
            object[1],
            object[3],
            self.reach_x_px,
            self.grid.stride_x_px,
            self.grid.width,
        )
    }
}

/// Cells whose anchors can overlap `low..high`, with a spare cell on either side for the rounding of anchors to f32.
fn in_reach(low: f32, high: f32, reach_px: f64, stride_px: f64, cells: usize) -> std::ops::Range<usize> {
    // The cast saturates and sends NaN to 0, so that any input gives a range within the grid.
    let cell = |position: f64| (position / stride_px - 0.5).max(-1.0) as usize;
    let first = cell(f64::from(low) - reach_px).saturating_sub(1);
    let last = cell(f64::from(high) + reach_px).saturating_add(3);
    first.min(cells)..last.clamp(first.min(cells), cells)
}

/// Gives each object its favourite anchor; the first object wins a shared one.
fn force_matches(favourites: &[usize], matches: &mut [i32]) {
    for (row, &anchor) in favourites.iter().enumerate().rev() {
        matches[anchor] = row_code(row);
    }
}

/// A row as it is kept in the class targets while matching.
fn row_code(row: usize) -> i32 {
    i32::try_from(row).expect("an image has fewer than 2^31 objects")
}

fn check_lengths(
    anchors: usize,
    boxes_yxyx_px: &[[f32; 4]],
    classes: &[i32],
    class_targets: &[i32],
    box_targets: &[f32],
) {
    assert_eq!(classes.len(), boxes_yxyx_px.len(), "one class per object");
    assert_eq!(class_targets.len(), anchors, "one class target per anchor");
    assert_eq!(box_targets.len(), 4 * anchors, "four box targets per anchor");
}

/// [`Assigner::assign`] from the full overlap matrix: slow, obviously right, the reference of the tests.
///
/// # Panics
/// As [`Assigner::assign`].
pub fn assign_plainly(
    anchors: &Anchors,
    boxes_yxyx_px: &[[f32; 4]],
    classes: &[i32],
    class_targets: &mut [i32],
    box_targets: &mut [f32],
) -> usize {
    check_lengths(anchors.len(), boxes_yxyx_px, classes, class_targets, box_targets);
    let overlaps: Vec<Vec<f32>> = boxes_yxyx_px
        .iter()
        .map(|&object| {
            anchors
                .boxes_yxyx_px
                .iter()
                .map(|&anchor| boxes::iou(object, anchor))
                .collect()
        })
        .collect();
    let first_largest = |values: &mut dyn Iterator<Item = f32>| {
        values
            .enumerate()
            .fold((0, 0.0), |best, (i, v)| if v > best.1 { (i, v) } else { best })
    };
    let mut matches: Vec<Option<usize>> = (0..anchors.len())
        .map(|anchor| {
            let (row, overlap) = first_largest(&mut overlaps.iter().map(|row| row[anchor]));
            (overlap >= MATCH_IOU).then_some(row)
        })
        .collect();
    for (row, overlaps) in overlaps.iter().enumerate().rev() {
        let (anchor, _) = first_largest(&mut overlaps.iter().copied());
        matches[anchor] = Some(row);
    }
    for (anchor, matched) in matches.iter().enumerate() {
        let code = matched.map(|row| boxes::encode(boxes_yxyx_px[row], anchors.boxes_yxyx_px[anchor]));
        class_targets[anchor] = matched.map_or(BACKGROUND, |row| classes[row]);
        box_targets[4 * anchor..4 * anchor + 4].copy_from_slice(&code.unwrap_or_default());
    }
    matches.iter().flatten().count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anchors::AnchorConfig;
    use crate::hparams::HParams;
    use proptest::prelude::*;

    fn anchors(height: usize, width: usize) -> Anchors {
        let config = AnchorConfig::from(&HParams::preset("efficientdet-d0").unwrap());
        Anchors::new(&AnchorConfig {
            image_height: height,
            image_width: width,
            ..config
        })
        .unwrap()
    }

    type Targets = (usize, Vec<i32>, Vec<f32>);

    fn assigned(anchors: &Anchors, objects: &[[f32; 4]], plainly: bool) -> Targets {
        let classes: Vec<i32> = (0..objects.len() as i32).collect();
        // Stale contents must not survive.
        let (mut class_targets, mut box_targets) = (vec![7; anchors.len()], vec![7.0; 4 * anchors.len()]);
        let positives = if plainly {
            assign_plainly(anchors, objects, &classes, &mut class_targets, &mut box_targets)
        } else {
            Assigner::new(anchors).assign(objects, &classes, &mut class_targets, &mut box_targets)
        };
        (positives, class_targets, box_targets)
    }

    fn bits((positives, classes, codes): &Targets) -> (usize, &[i32], Vec<u32>) {
        (
            *positives,
            classes,
            codes.iter().map(|code| code.to_bits()).collect(),
        )
    }

    #[test]
    fn an_image_without_objects_is_all_background() {
        let (positives, classes, codes) = assigned(&anchors(64, 64), &[], false);
        assert_eq!(positives, 0);
        assert!(classes.iter().all(|&class| class == BACKGROUND));
        assert!(codes.iter().all(|&code| code == 0.0));
    }

    #[test]
    fn an_object_that_overlaps_nothing_takes_anchor_zero_from_the_rightful_owner() {
        let anchors = anchors(64, 64);
        let objects = [anchors.boxes_yxyx_px[0], [1e6, 1e6, 1e6 + 10.0, 1e6 + 10.0]];
        let (_, classes, _) = assigned(&anchors, &objects, false);
        assert_eq!(classes[0], 0, "the first object wins a shared anchor");
        let (_, classes, _) = assigned(&anchors, &[objects[1], objects[0]], false);
        assert_eq!(classes[0], 0);
    }

    #[test]
    fn an_anchor_goes_to_the_first_of_two_equal_objects() {
        let object = [16.0, 32.0, 48.0, 64.0];
        let (positives, classes, _) = assigned(&anchors(64, 64), &[object, object], false);
        assert!(positives > 0);
        assert!(classes.iter().all(|&class| class != 1));
    }

    #[test]
    fn a_box_equal_to_an_anchor_has_that_anchor_with_zero_codes() {
        let anchors = anchors(128, 128);
        let chosen = anchors.levels[1].range.start + 20;
        let (_, classes, codes) = assigned(&anchors, &[anchors.boxes_yxyx_px[chosen]], false);
        assert_eq!(classes[chosen], 0);
        assert_eq!(codes[4 * chosen..4 * chosen + 4], [0.0; 4]);
    }

    #[test]
    fn objects_that_are_not_numbers_do_no_harm() {
        let anchors = anchors(64, 64);
        let nan = f32::NAN;
        let infinite = [f32::NEG_INFINITY, f32::NEG_INFINITY, f32::INFINITY, f32::INFINITY];
        for object in [[nan; 4], [nan, 0.0, 30.0, 30.0], infinite, [30.0, 30.0, 0.0, 0.0]] {
            let fast = assigned(&anchors, &[object, [8.0, 8.0, 40.0, 40.0]], false);
            let plain = assigned(&anchors, &[object, [8.0, 8.0, 40.0, 40.0]], true);
            assert_eq!((fast.0, &fast.1), (plain.0, &plain.1), "{object:?}");
        }
    }

    /// Boxes of every size, many of them degenerate, on a coarse grid so that ties are common.
    fn objects() -> impl Strategy<Value = Vec<[f32; 4]>> {
        let side = prop_oneof![
            0.0..4.0_f32,
            0.0..40.0_f32,
            0.0..300.0_f32,
            Just(0.0_f32),
            Just(32.0_f32)
        ];
        let corner = prop_oneof![
            -20.0..220.0_f32,
            (0..28_i32).prop_map(|cell| cell as f32 * 8.0 - 12.0)
        ];
        let object =
            (corner.clone(), corner, side.clone(), side).prop_map(|(y, x, h, w)| [y, x, y + h, x + w]);
        prop::collection::vec(object, 0..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_fast_assignment_equals_the_plain_one_bit_for_bit(
            objects in objects(),
            size in prop_oneof![Just((128, 128)), Just((128, 192)), Just((100, 260)), Just((77, 33)), Just((5, 9))],
        ) {
            let anchors = anchors(size.0, size.1);
            let (fast, plain) = (assigned(&anchors, &objects, false), assigned(&anchors, &objects, true));
            prop_assert_eq!(bits(&fast), bits(&plain));
        }

        #[test]
        fn the_count_of_positives_is_that_of_the_class_targets_and_objects_always_have_some(objects in objects()) {
            let anchors = anchors(128, 128);
            let (positives, classes, _) = assigned(&anchors, &objects, false);
            prop_assert_eq!(positives, classes.iter().filter(|&&class| class >= 0).count());
            prop_assert!(objects.is_empty() || positives > 0);
        }
    }
}
