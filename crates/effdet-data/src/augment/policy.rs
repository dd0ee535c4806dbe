//! Policies: which operations a sample goes through, and how strong they are.

use effdet_model::hparams::AutoaugmentPolicy;
use effdet_model::rng::Draws;
use image::{Rgb, RgbImage, imageops};

use super::geometry::Movement;
use super::tables::{self, SubPolicy};
use super::{REPLACE, pixels};

/// Operations of a policy by name; `…InBoxes` are upstream's `…_Only_BBoxes`, movements its `…_BBox`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the reference")]
pub enum Operation {
    AutoContrast,
    Equalize,
    Posterize,
    Solarize,
    SolarizeAdd,
    Color,
    Contrast,
    Brightness,
    Sharpness,
    Cutout,
    BoxCutout,
    TranslateX,
    TranslateY,
    ShearX,
    ShearY,
    Rotate,
    TranslateYInBoxes,
    ShearXInBoxes,
    ShearYInBoxes,
    FlipInBoxes,
    EqualizeInBoxes,
    CutoutInBoxes,
}

/// One operation of a sub-policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// What.
    pub operation: Operation,
    /// How often.
    pub probability: f32,
    /// How strong: 0 to 10, RandAugment 15.
    pub level: u8,
}

/// What an operation does to the pixels of a box.
type PatchChange = Box<dyn Fn(&mut RgbImage, &mut Draws)>;

const RANDOM_LEVEL: u8 = 15;

/// Applies a policy to an image and its boxes of normalised corners.
///
/// # Determinism
/// A function of the arguments; the same stream of draws gives the same bits.
pub fn apply(
    policy: AutoaugmentPolicy,
    image: &mut RgbImage,
    boxes_yxyx_norm: &mut [[f32; 4]],
    draws: &mut Draws,
) {
    let sub_policies: &[SubPolicy] = match policy {
        AutoaugmentPolicy::V0 => tables::V0,
        AutoaugmentPolicy::V1 => tables::V1,
        AutoaugmentPolicy::V2 => tables::V2,
        AutoaugmentPolicy::V3 => tables::V3,
        AutoaugmentPolicy::Test => tables::TEST,
        AutoaugmentPolicy::Randaug => {
            let operation = tables::RANDOM[draws.below(tables::RANDOM.len() as u64) as usize];
            let step = Step {
                operation,
                probability: 1.0,
                level: RANDOM_LEVEL,
            };
            return step.apply(image, boxes_yxyx_norm, draws);
        }
    };
    for step in sub_policies[draws.below(sub_policies.len() as u64) as usize] {
        step.apply(image, boxes_yxyx_norm, draws);
    }
}

impl Step {
    /// Applies the operation, or with its probability does not.
    pub fn apply(self, image: &mut RgbImage, boxes_yxyx_norm: &mut [[f32; 4]], draws: &mut Draws) {
        if let Some(patch) = self.in_boxes() {
            let mut order: Vec<usize> = (0..boxes_yxyx_norm.len()).collect();
            draws.shuffle(&mut order);
            for index in order {
                // The reference scales the probability down because it visits every box.
                if fires(self.probability / 3.0, draws) {
                    change_patch(image, boxes_yxyx_norm[index], |image| patch(image, draws));
                }
            }
            return;
        }
        if !fires(self.probability, draws) {
            return;
        }
        let share = f32::from(self.level) / 10.0;
        let factor = share * 1.8 + 0.1;
        match self.operation {
            Operation::AutoContrast => pixels::autocontrast(image),
            Operation::Equalize => pixels::equalize(image),
            Operation::Posterize => pixels::posterize(image, (share * 4.0) as u32),
            Operation::Solarize => pixels::solarize(image, (share * 256.0) as u32),
            Operation::SolarizeAdd => pixels::solarize_add(image, (share * 110.0) as u8),
            Operation::Color => pixels::color(image, factor),
            Operation::Contrast => pixels::contrast(image, factor),
            Operation::Brightness => pixels::brightness(image, factor),
            Operation::Sharpness => pixels::sharpness(image, factor),
            Operation::Cutout => cutout(image, (share * 100.0) as i64, draws),
            Operation::BoxCutout => box_cutout(image, boxes_yxyx_norm, share * 0.75, draws),
            operation => {
                let movement = movement(operation, share, 250.0, draws);
                *image = movement.image(image);
                let (height, width) = (image.height() as usize, image.width() as usize);
                for b in boxes_yxyx_norm {
                    *b = movement.bounding_box(*b, height, width);
                }
            }
        }
    }

    /// What happens to the patch of a box, of operations that change patches.
    fn in_boxes(self) -> Option<PatchChange> {
        let share = f32::from(self.level) / 10.0;
        let moved = |operation| -> Option<PatchChange> {
            Some(Box::new(move |patch, draws| {
                *patch = movement(operation, share, 120.0, draws).image(patch);
            }))
        };
        match self.operation {
            Operation::TranslateYInBoxes => moved(Operation::TranslateY),
            Operation::ShearXInBoxes => moved(Operation::ShearX),
            Operation::ShearYInBoxes => moved(Operation::ShearY),
            Operation::FlipInBoxes => Some(Box::new(|patch, _| imageops::flip_horizontal_in_place(patch))),
            Operation::EqualizeInBoxes => Some(Box::new(|patch, _| pixels::equalize(patch))),
            Operation::CutoutInBoxes => Some(Box::new(move |patch, draws| {
                cutout(patch, (share * 50.0) as i64, draws);
            })),
            _ => None,
        }
    }
}

/// `floor(u + p) = 1`.
fn fires(probability: f32, draws: &mut Draws) -> bool {
    draws.uniform() + probability >= 1.0
}

/// A movement of a drawn sign.
fn movement(operation: Operation, share: f32, pixels: f32, draws: &mut Draws) -> Movement {
    let sign = if draws.uniform() < 0.5 { -1.0 } else { 1.0 };
    match operation {
        Operation::TranslateX => Movement::TranslateX(sign * share * pixels),
        Operation::TranslateY => Movement::TranslateY(sign * share * pixels),
        Operation::ShearX => Movement::ShearX(sign * share * 0.3),
        Operation::ShearY => Movement::ShearY(sign * share * 0.3),
        _ => Movement::Rotate(sign * share * 30.0),
    }
}

/// Pixels of a box, first and last included.
fn pixel_box(image: &RgbImage, [top, left, bottom, right]: [f32; 4]) -> [u32; 4] {
    let (w, h) = image.dimensions();
    let pixel = |v: f32, side: u32| ((v * side as f32) as u32).min(side - 1);
    let (top, left) = (pixel(top, h), pixel(left, w));
    [top, left, pixel(bottom, h).max(top), pixel(right, w).max(left)]
}

fn change_patch(image: &mut RgbImage, box_yxyx_norm: [f32; 4], change: impl FnOnce(&mut RgbImage)) {
    let [top, left, bottom, right] = pixel_box(image, box_yxyx_norm);
    let mut patch = imageops::crop_imm(image, left, top, right - left + 1, bottom - top + 1).to_image();
    change(&mut patch);
    imageops::replace(image, &patch, i64::from(left), i64::from(top));
}

/// Fills `[centre − pad, centre + pad)` on both axes.
fn fill(image: &mut RgbImage, centre_yx: [i64; 2], pad_yx: [i64; 2]) {
    let range = |axis: usize, side: u32| {
        let limit = |v: i64| v.clamp(0, i64::from(side)) as u32;
        limit(centre_yx[axis] - pad_yx[axis])..limit(centre_yx[axis] + pad_yx[axis])
    };
    let (rows, columns) = (range(0, image.height()), range(1, image.width()));
    for y in rows {
        for x in columns.clone() {
            image.put_pixel(x, y, Rgb([REPLACE; 3]));
        }
    }
}

/// Fills a square of half-size `pad` about a drawn centre.
fn cutout(image: &mut RgbImage, pad: i64, draws: &mut Draws) {
    let centre = [image.height(), image.width()].map(|side| draws.below(side.into()) as i64);
    fill(image, centre, [pad; 2]);
}

/// Fills a part of a drawn box about a centre within it.
fn box_cutout(image: &mut RgbImage, boxes_yxyx_norm: &[[f32; 4]], fraction: f32, draws: &mut Draws) {
    if boxes_yxyx_norm.is_empty() {
        return;
    }
    let chosen = boxes_yxyx_norm[draws.below(boxes_yxyx_norm.len() as u64) as usize];
    let [top, left, bottom, right] = pixel_box(image, chosen);
    let axes = [(top, bottom), (left, right)].map(|(low, high)| {
        let size = high - low + 1;
        let centre = i64::from(low) + draws.below(size.into()) as i64;
        (centre, (fraction * (size as f32 / 2.0)) as i64)
    });
    fill(image, axes.map(|axis| axis.0), axes.map(|axis| axis.1));
}

#[cfg(test)]
mod tests {
    use super::*;
    use effdet_model::rng::Purpose;
    use proptest::prelude::*;

    fn picture(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            Rgb([(7 * x + 3 * y) as u8, (x * y) as u8, (5 * x) as u8])
        })
    }

    #[test]
    fn policies_have_the_sub_policies_of_the_reference() {
        let counts = [tables::V0, tables::V1, tables::V2, tables::V3, tables::TEST].map(<[_]>::len);
        assert_eq!(counts, [5, 20, 15, 15, 1]);
    }

    #[test]
    fn a_step_of_probability_zero_never_and_of_one_always_acts() {
        let source = picture(40, 30);
        for index in 0..200 {
            for (probability, acts) in [(0.0, false), (1.0, true)] {
                let mut image = source.clone();
                let step = Step {
                    operation: Operation::Solarize,
                    probability,
                    level: 0,
                };
                step.apply(
                    &mut image,
                    &mut [],
                    &mut Draws::new(1, Purpose::Augment, 0, index),
                );
                assert_eq!(image != source, acts);
            }
        }
    }

    #[test]
    fn operations_in_boxes_leave_other_pixels_alone() {
        let source = picture(40, 30);
        let mut changed = 0;
        for index in 0..60 {
            let mut image = source.clone();
            let mut boxes = [[0.2, 0.25, 0.6, 0.5]];
            let step = Step {
                operation: Operation::ShearXInBoxes,
                probability: 1.0,
                level: 10,
            };
            step.apply(
                &mut image,
                &mut boxes,
                &mut Draws::new(1, Purpose::Augment, 0, index),
            );
            assert_eq!(boxes, [[0.2, 0.25, 0.6, 0.5]]);
            for (x, y, pixel) in image.enumerate_pixels() {
                let inside = (6..=18).contains(&y) && (10..=20).contains(&x);
                assert!(inside || pixel == source.get_pixel(x, y), "{x} {y}");
            }
            changed += usize::from(image != source);
        }
        // A third of them in the mean.
        assert!((8..40).contains(&changed), "{changed}");
    }

    proptest! {
        #[test]
        fn any_policy_keeps_sizes_and_boxes_within_the_image(
            which in 0usize..6, width in 1u32..60, height in 1u32..60, seed: u64,
            corners in prop::collection::vec((0.0f32..1.0, 0.0f32..1.0, 0.0f32..1.0, 0.0f32..1.0), 0..4),
        ) {
            let name = AutoaugmentPolicy::NAMES[which];
            let mut image = picture(width, height);
            let mut boxes: Vec<[f32; 4]> = corners.iter()
                .map(|&(a, b, c, d)| [a.min(c), b.min(d), a.max(c), b.max(d)]).collect();
            let mut again = (image.clone(), boxes.clone());
            let draws = || Draws::new(seed, Purpose::Augment, 0, 0);
            apply(name.parse().unwrap(), &mut image, &mut boxes, &mut draws());
            prop_assert_eq!(image.dimensions(), (width, height));
            for [top, left, bottom, right] in &boxes {
                prop_assert!(0.0 <= *top && top <= bottom && *bottom <= 1.0);
                prop_assert!(0.0 <= *left && left <= right && *right <= 1.0);
            }
            apply(name.parse().unwrap(), &mut again.0, &mut again.1, &mut draws());
            prop_assert!(again == (image, boxes));
        }
    }
}
