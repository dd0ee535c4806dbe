//! Candidates for suppression: the best logits of an image, decoded.

use std::cmp::Ordering;

use super::DetectError;
use crate::anchors::{AnchorLevel, Anchors};
use crate::boxes;
use crate::engine::{HeadOutputs, LevelOutput};
use crate::label_map::ClassIndex;

/// A box with a class and a score, before suppression.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// `[ymin, xmin, ymax, xmax]` in pixels of the network input, not clipped.
    pub box_yxyx_px: [f32; 4],
    /// Sigmoid of the logit.
    pub score: f32,
    /// Class.
    pub class: ClassIndex,
}

/// The head outputs of one image of a batch, checked against the anchors.
#[derive(Debug, Clone)]
pub struct ImageHeads<'a> {
    anchors: &'a Anchors,
    levels: Vec<LevelHeads<'a>>,
    num_classes: usize,
}

/// One level of one image.
#[derive(Debug, Clone, Copy)]
struct LevelHeads<'a> {
    /// `[anchors of the level, classes]`.
    class_logits: &'a [f32],
    /// `[anchors of the level, 4]`.
    box_codes: &'a [f32],
}

impl<'a> ImageHeads<'a> {
    /// Takes image `image` out of a batch of head outputs. The number of classes follows from the sizes.
    ///
    /// # Errors
    /// [`DetectError::Levels`], [`DetectError::Shape`] or [`DetectError::Image`].
    pub fn new(outputs: &'a HeadOutputs, image: usize, anchors: &'a Anchors) -> Result<Self, DetectError> {
        let batch = outputs.batch;
        if image >= batch {
            return Err(DetectError::Image { image, batch });
        }
        let (actual, expected) = (outputs.levels.len(), anchors.levels.len());
        if actual != expected || actual == 0 {
            return Err(DetectError::Levels { actual, expected });
        }
        let num_classes =
            outputs.levels[0].class_logits.len() / (batch * anchors.levels[0].range.len()).max(1);
        let levels = outputs
            .levels
            .iter()
            .zip(&anchors.levels)
            .map(|(output, grid)| level_of_image(output, grid, image, batch, num_classes.max(1)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            anchors,
            levels,
            num_classes,
        })
    }

    /// Class outputs per anchor.
    pub fn num_classes(&self) -> usize {
        self.num_classes
    }

    /// Anchors × classes.
    pub fn num_logits(&self) -> usize {
        self.anchors.len() * self.num_classes
    }

    /// The `limit` greatest of all anchors' and classes' logits, greatest first; of equal ones the lower flat index
    /// `anchor · classes + class` first. An anchor can appear with several classes.
    ///
    /// Logits that are NaN are passed over, and so are boxes that are not finite, so fewer than `limit` may come back.
    pub fn top(&self, limit: usize) -> Vec<Candidate> {
        let mut best = TopK::new(limit);
        for (level, grid) in self.levels.iter().zip(&self.anchors.levels) {
            best.scan(level.class_logits, grid.range.start * self.num_classes);
        }
        best.into_sorted()
            .into_iter()
            .filter_map(|Entry { value, index }| {
                self.candidate(index / self.num_classes, index % self.num_classes, value)
            })
            .collect()
    }

    /// Every anchor once, in order, with its greatest logit (of equal ones the lower class).
    ///
    /// Anchors without a finite box or with NaN logits only are passed over.
    pub fn best_class_of_each(&self) -> Vec<Candidate> {
        let rows = self
            .levels
            .iter()
            .flat_map(|level| level.class_logits.chunks_exact(self.num_classes));
        rows.enumerate()
            .filter_map(|(anchor, logits)| {
                let numbers = logits
                    .iter()
                    .copied()
                    .enumerate()
                    .filter(|(_, logit)| !logit.is_nan());
                let (class, logit) =
                    numbers.reduce(|best, next| if next.1 > best.1 { next } else { best })?;
                self.candidate(anchor, class, logit)
            })
            .collect()
    }

    /// [`Self::top`], or [`Self::best_class_of_each`] for `max_inputs` = 0.
    pub fn candidates(&self, max_inputs: usize) -> Vec<Candidate> {
        if max_inputs == 0 {
            self.best_class_of_each()
        } else {
            self.top(max_inputs)
        }
    }

    fn candidate(&self, anchor: usize, class: usize, logit: f32) -> Option<Candidate> {
        let level = self
            .anchors
            .levels
            .partition_point(|grid| grid.range.end <= anchor);
        let first = 4 * (anchor - self.anchors.levels[level].range.start);
        let &code = self.levels[level].box_codes[first..].first_chunk::<4>()?;
        let box_yxyx_px = boxes::decode(code, self.anchors.boxes_yxyx_px[anchor]);
        let finite = box_yxyx_px.iter().all(|coordinate| coordinate.is_finite());
        let class = ClassIndex(u32::try_from(class).ok()?);
        finite.then_some(Candidate {
            box_yxyx_px,
            score: sigmoid(logit),
            class,
        })
    }
}

fn level_of_image<'a>(
    output: &'a LevelOutput,
    grid: &AnchorLevel,
    image: usize,
    batch: usize,
    num_classes: usize,
) -> Result<LevelHeads<'a>, DetectError> {
    let slice = |what, values: &'a [f32], per_anchor: usize| {
        let len = grid.range.len() * per_anchor;
        let (actual, expected) = (values.len(), len * batch);
        if actual == expected {
            Ok(&values[image * len..(image + 1) * len])
        } else {
            Err(DetectError::Shape {
                what,
                level: grid.level,
                actual,
                expected,
            })
        }
    };
    Ok(LevelHeads {
        class_logits: slice("class_logits", &output.class_logits, num_classes)?,
        box_codes: slice("box_codes", &output.box_codes, 4)?,
    })
}

fn sigmoid(logit: f32) -> f32 {
    (1.0 / (1.0 + f64::from(-logit).exp())) as f32
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Entry {
    value: f32,
    index: usize,
}

impl Entry {
    /// Greater values first, then lower indices. No value is NaN.
    fn order(&self, other: &Self) -> Ordering {
        other
            .value
            .partial_cmp(&self.value)
            .unwrap_or(Ordering::Equal)
            .then(self.index.cmp(&other.index))
    }
}

/// The k greatest of a stream of values given in ascending order of their indices.
///
/// Values are collected until there are 2k, then all but the best k are dropped and the k-th becomes the bar for the rest of the
/// stream. A later value equal to the bar has a higher index than those kept, so it loses the tie. Linear in the stream in the
/// worst case; usually nearly every value fails the first comparison.
struct TopK {
    limit: usize,
    entries: Vec<Entry>,
    bar: Option<f32>,
}

impl TopK {
    fn new(limit: usize) -> Self {
        Self {
            limit,
            entries: Vec::new(),
            bar: None,
        }
    }

    fn scan(&mut self, values: &[f32], first_index: usize) {
        /// Long enough to vectorise the test of a whole block, short enough that most blocks pass none.
        const BLOCK: usize = 32;
        for (block, values) in values.chunks(BLOCK).enumerate() {
            let start = first_index + block * BLOCK;
            if let Some(bar) = self.bar
                && !values.iter().fold(false, |any, &value| any | (value > bar))
            {
                continue;
            }
            for (offset, &value) in values.iter().enumerate() {
                let accepted = match self.bar {
                    Some(bar) => value > bar,
                    None => !value.is_nan(),
                };
                if accepted {
                    self.entries.push(Entry {
                        value,
                        index: start + offset,
                    });
                    if self.entries.len() >= self.limit.saturating_mul(2) {
                        self.prune();
                    }
                }
            }
        }
    }

    fn prune(&mut self) {
        if self.limit > 0 && self.entries.len() > self.limit {
            self.entries.select_nth_unstable_by(self.limit - 1, Entry::order);
            self.bar = Some(self.entries[self.limit - 1].value);
        }
        self.entries.truncate(self.limit);
    }

    fn into_sorted(mut self) -> Vec<Entry> {
        self.prune();
        self.entries.sort_unstable_by(Entry::order);
        self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anchors::AnchorConfig;
    use crate::hparams::HParams;
    use proptest::prelude::*;

    fn top_k(values: &[f32], limit: usize, split: usize) -> Vec<usize> {
        let mut best = TopK::new(limit);
        let (head, tail) = values.split_at(split.min(values.len()));
        best.scan(head, 0);
        best.scan(tail, head.len());
        best.into_sorted().iter().map(|entry| entry.index).collect()
    }

    proptest! {
        #[test]
        fn the_selection_equals_a_full_stable_sort(
            values in prop::collection::vec(
                prop_oneof![-3.0..3.0_f32, (-3..3_i32).prop_map(|v| v as f32), Just(-0.0_f32), Just(f32::NAN), any::<f32>()],
                0..600,
            ),
            limit in 0..50_usize,
            split in 0..600_usize,
        ) {
            let mut sorted: Vec<usize> = (0..values.len()).filter(|&i| !values[i].is_nan()).collect();
            sorted.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).unwrap());
            sorted.truncate(limit);
            prop_assert_eq!(top_k(&values, limit, split), sorted);
        }
    }

    #[test]
    fn ascending_values_are_the_slowest_stream_and_still_right() {
        let values: Vec<f32> = (0..10_000).map(|v| v as f32).collect();
        assert_eq!(top_k(&values, 3, 5000), [9999, 9998, 9997]);
    }

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

    fn outputs(anchors: &Anchors, batch: usize, num_classes: usize) -> HeadOutputs {
        let level = |grid: &AnchorLevel| LevelOutput {
            height: grid.height,
            width: grid.width,
            class_logits: vec![-5.0; batch * grid.range.len() * num_classes],
            box_codes: vec![0.0; batch * grid.range.len() * 4],
        };
        HeadOutputs {
            batch,
            levels: anchors.levels.iter().map(level).collect(),
        }
    }

    #[test]
    fn a_zero_code_is_the_anchor_itself_at_its_level_and_image() {
        let anchors = anchors();
        let mut outputs = outputs(&anchors, 2, 3);
        let (anchor_in_level, class) = (4, 2);
        let image_stride = anchors.levels[1].range.len() * 3;
        outputs.levels[1].class_logits[image_stride + anchor_in_level * 3 + class] = 1.0;
        let heads = ImageHeads::new(&outputs, 1, &anchors).unwrap();
        let [best] = heads.top(1)[..] else {
            panic!("one candidate")
        };
        assert_eq!(best.class, ClassIndex(2));
        let anchor = anchors.boxes_yxyx_px[anchors.levels[1].range.start + anchor_in_level];
        for (got, want) in best.box_yxyx_px.iter().zip(anchor) {
            assert!((got - want).abs() < 1e-4);
        }
        assert!((best.score - 0.731_058_6).abs() < 1e-7);
        let other = ImageHeads::new(&outputs, 0, &anchors).unwrap().top(1)[0];
        assert_eq!((other.class, other.score < 0.01), (ClassIndex(0), true));
    }

    #[test]
    fn without_a_limit_every_anchor_appears_once_with_its_first_best_class() {
        let anchors = anchors();
        let outputs = outputs(&anchors, 1, 3);
        let all = ImageHeads::new(&outputs, 0, &anchors).unwrap().candidates(0);
        assert_eq!(all.len(), anchors.len());
        assert!(all.iter().all(|candidate| candidate.class == ClassIndex(0)));
    }

    #[test]
    fn logits_and_boxes_that_are_not_numbers_are_passed_over() {
        let anchors = anchors();
        let mut outputs = outputs(&anchors, 1, 3);
        outputs.levels[0].class_logits[0..3].fill(f32::NAN);
        outputs.levels[0].box_codes[4 + 2] = 1000.0;
        outputs.levels[0].box_codes[8] = f32::NAN;
        let heads = ImageHeads::new(&outputs, 0, &anchors).unwrap();
        assert_eq!(heads.candidates(0).len(), anchors.len() - 3);
        assert_eq!(heads.candidates(1000).len(), 3 * (anchors.len() - 3));
    }

    #[test]
    fn outputs_of_another_network_are_refused() {
        let anchors = anchors();
        let mut short = outputs(&anchors, 2, 3);
        assert!(matches!(
            ImageHeads::new(&short, 2, &anchors),
            Err(DetectError::Image { image: 2, batch: 2 })
        ));
        short.levels[1].box_codes.pop();
        assert!(matches!(
            ImageHeads::new(&short, 0, &anchors),
            Err(DetectError::Shape {
                what: "box_codes",
                level: 5,
                actual: 71,
                expected: 72
            })
        ));
        short.levels.pop();
        assert!(matches!(
            ImageHeads::new(&short, 0, &anchors),
            Err(DetectError::Levels {
                actual: 1,
                expected: 2
            })
        ));
    }

    #[test]
    fn empty_outputs_are_refused_rather_than_divided_by() {
        let anchors = anchors();
        let mut empty = outputs(&anchors, 1, 3);
        empty
            .levels
            .iter_mut()
            .for_each(|level| level.class_logits.clear());
        assert!(matches!(
            ImageHeads::new(&empty, 0, &anchors),
            Err(DetectError::Shape { .. })
        ));
    }
}
