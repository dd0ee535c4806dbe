//! The learned policies of automl's AutoAugment, and the operations that RandAugment chooses from.
//!
//! Source: automl's `aug/autoaugment.py`, `policy_v0` … `policy_v3`, `policy_vtest`.

use super::policy::Operation::{self, *};
use super::policy::Step;

/// Operations that are applied one after the other.
pub(super) type SubPolicy = &'static [Step];

const fn step(operation: Operation, probability: f32, level: u8) -> Step {
    Step {
        operation,
        probability,
        level,
    }
}

/// `v0`.
pub(super) const V0: &[SubPolicy] = &[
    &[step(TranslateX, 0.6, 4), step(Equalize, 0.8, 10)],
    &[step(TranslateYInBoxes, 0.2, 2), step(Cutout, 0.8, 8)],
    &[step(Sharpness, 0.0, 8), step(ShearX, 0.4, 0)],
    &[step(ShearY, 1.0, 2), step(TranslateYInBoxes, 0.6, 6)],
    &[step(Rotate, 0.6, 10), step(Color, 1.0, 6)],
];

/// `v1`.
pub(super) const V1: &[SubPolicy] = &[
    &[step(TranslateX, 0.6, 4), step(Equalize, 0.8, 10)],
    &[step(TranslateYInBoxes, 0.2, 2), step(Cutout, 0.8, 8)],
    &[step(Sharpness, 0.0, 8), step(ShearX, 0.4, 0)],
    &[step(ShearY, 1.0, 2), step(TranslateYInBoxes, 0.6, 6)],
    &[step(Rotate, 0.6, 10), step(Color, 1.0, 6)],
    &[step(Color, 0.0, 0), step(ShearXInBoxes, 0.8, 4)],
    &[step(ShearYInBoxes, 0.8, 2), step(FlipInBoxes, 0.0, 10)],
    &[step(Equalize, 0.6, 10), step(TranslateX, 0.2, 2)],
    &[step(Color, 1.0, 10), step(TranslateYInBoxes, 0.4, 6)],
    &[step(Rotate, 0.8, 10), step(Contrast, 0.0, 10)],
    &[step(Cutout, 0.2, 2), step(Brightness, 0.8, 10)],
    &[step(Color, 1.0, 6), step(Equalize, 1.0, 2)],
    &[step(CutoutInBoxes, 0.4, 6), step(TranslateYInBoxes, 0.8, 2)],
    &[step(Color, 0.2, 8), step(Rotate, 0.8, 10)],
    &[step(Sharpness, 0.4, 4), step(TranslateYInBoxes, 0.0, 4)],
    &[step(Sharpness, 1.0, 4), step(SolarizeAdd, 0.4, 4)],
    &[step(Rotate, 1.0, 8), step(Sharpness, 0.2, 8)],
    &[step(ShearY, 0.6, 10), step(EqualizeInBoxes, 0.6, 8)],
    &[step(ShearX, 0.2, 6), step(TranslateYInBoxes, 0.2, 10)],
    &[step(SolarizeAdd, 0.6, 8), step(Brightness, 0.8, 10)],
];

/// `v2`.
pub(super) const V2: &[SubPolicy] = &[
    &[step(Color, 0.0, 6), step(Cutout, 0.6, 8), step(Sharpness, 0.4, 8)],
    &[
        step(Rotate, 0.4, 8),
        step(Sharpness, 0.4, 2),
        step(Rotate, 0.8, 10),
    ],
    &[step(TranslateY, 1.0, 8), step(AutoContrast, 0.8, 2)],
    &[
        step(AutoContrast, 0.4, 6),
        step(ShearX, 0.8, 8),
        step(Brightness, 0.0, 10),
    ],
    &[
        step(SolarizeAdd, 0.2, 6),
        step(Contrast, 0.0, 10),
        step(AutoContrast, 0.6, 0),
    ],
    &[step(Cutout, 0.2, 0), step(Solarize, 0.8, 8), step(Color, 1.0, 4)],
    &[
        step(TranslateY, 0.0, 4),
        step(Equalize, 0.6, 8),
        step(Solarize, 0.0, 10),
    ],
    &[
        step(TranslateY, 0.2, 2),
        step(ShearY, 0.8, 8),
        step(Rotate, 0.8, 8),
    ],
    &[
        step(Cutout, 0.8, 8),
        step(Brightness, 0.8, 8),
        step(Cutout, 0.2, 2),
    ],
    &[
        step(Color, 0.8, 4),
        step(TranslateY, 1.0, 6),
        step(Rotate, 0.6, 6),
    ],
    &[
        step(Rotate, 0.6, 10),
        step(BoxCutout, 1.0, 4),
        step(Cutout, 0.2, 8),
    ],
    &[step(Rotate, 0.0, 0), step(Equalize, 0.6, 6), step(ShearY, 0.6, 8)],
    &[
        step(Brightness, 0.8, 8),
        step(AutoContrast, 0.4, 2),
        step(Brightness, 0.2, 2),
    ],
    &[
        step(TranslateY, 0.4, 8),
        step(Solarize, 0.4, 6),
        step(SolarizeAdd, 0.2, 10),
    ],
    &[
        step(Contrast, 1.0, 10),
        step(SolarizeAdd, 0.2, 8),
        step(Equalize, 0.2, 4),
    ],
];

/// `v3`.
pub(super) const V3: &[SubPolicy] = &[
    &[step(Posterize, 0.8, 2), step(TranslateX, 1.0, 8)],
    &[step(BoxCutout, 0.2, 10), step(Sharpness, 1.0, 8)],
    &[step(Rotate, 0.6, 8), step(Rotate, 0.8, 10)],
    &[step(Equalize, 0.8, 10), step(AutoContrast, 0.2, 10)],
    &[step(SolarizeAdd, 0.2, 2), step(TranslateY, 0.2, 8)],
    &[step(Sharpness, 0.0, 2), step(Color, 0.4, 8)],
    &[step(Equalize, 1.0, 8), step(TranslateY, 1.0, 8)],
    &[step(Posterize, 0.6, 2), step(Rotate, 0.0, 10)],
    &[step(AutoContrast, 0.6, 0), step(Rotate, 1.0, 6)],
    &[step(Equalize, 0.0, 4), step(Cutout, 0.8, 10)],
    &[step(Brightness, 1.0, 2), step(TranslateY, 1.0, 6)],
    &[step(Contrast, 0.0, 2), step(ShearY, 0.8, 0)],
    &[step(AutoContrast, 0.8, 10), step(Contrast, 0.2, 10)],
    &[step(Rotate, 1.0, 10), step(Cutout, 1.0, 10)],
    &[step(SolarizeAdd, 0.8, 6), step(Equalize, 0.8, 8)],
];

/// `test`.
pub(super) const TEST: &[SubPolicy] = &[&[step(TranslateX, 1.0, 4), step(Equalize, 1.0, 10)]];

/// What `randaug` draws one of, always applied at level 15.
pub(super) const RANDOM: [Operation; 10] = [
    Equalize,
    Solarize,
    Color,
    Cutout,
    SolarizeAdd,
    TranslateX,
    TranslateY,
    ShearX,
    ShearY,
    Rotate,
];
