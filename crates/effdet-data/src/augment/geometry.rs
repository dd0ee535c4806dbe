//! Operations that move pixels and boxes: translation, shear and rotation.

use image::{Rgb, RgbImage};

use super::REPLACE;

/// One movement of an image with its boxes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Movement {
    /// Content goes left by pixels.
    TranslateX(f32),
    /// Content goes up by pixels.
    TranslateY(f32),
    /// Rows go left by this times their number.
    ShearX(f32),
    /// Columns go up by this times their number.
    ShearY(f32),
    /// Rotation about the centre by degrees.
    Rotate(f32),
}

impl Movement {
    /// Output to input: `[a, b, c, d, e, f]` with `xi = a·x + b·y + c`, `yi = d·x + e·y + f`.
    fn inverse_map(self, height: usize, width: usize) -> [f32; 6] {
        match self {
            Self::TranslateX(pixels) => [1.0, 0.0, pixels, 0.0, 1.0, 0.0],
            Self::TranslateY(pixels) => [1.0, 0.0, 0.0, 0.0, 1.0, pixels],
            Self::ShearX(level) => [1.0, level, 0.0, 0.0, 1.0, 0.0],
            Self::ShearY(level) => [1.0, 0.0, 0.0, level, 1.0, 0.0],
            Self::Rotate(degrees) => {
                let (sin, cos) = radians(degrees).sin_cos();
                let (w, h) = (width as f32 - 1.0, height as f32 - 1.0);
                let offset_x = (w - (cos * w - sin * h)) / 2.0;
                let offset_y = (h - (sin * w + cos * h)) / 2.0;
                [cos, -sin, offset_x, sin, cos, offset_y]
            }
        }
    }

    /// Moves an image: nearest neighbour, [`REPLACE`] where nothing comes from.
    pub fn image(self, source: &RgbImage) -> RgbImage {
        let (width, height) = (source.width() as usize, source.height() as usize);
        let [a, b, c, d, e, f] = self.inverse_map(height, width);
        // `f32::round` rounds halves away from zero, as the reference does.
        let index = |v: f32, size: usize| {
            let rounded = v.round();
            (rounded >= 0.0 && rounded < size as f32).then_some(rounded as u32)
        };
        RgbImage::from_fn(source.width(), source.height(), |x, y| {
            let (x, y) = (x as f32, y as f32);
            match (index(a * x + b * y + c, width), index(d * x + e * y + f, height)) {
                (Some(x), Some(y)) => *source.get_pixel(x, y),
                _ => Rgb([REPLACE; 3]),
            }
        })
    }

    /// Moves a box of normalised corners with an image of `height` × `width` pixels.
    ///
    /// Corners are whole pixels on the way; the smallest upright box around the moved corners, clipped to the image.
    pub fn bounding_box(self, box_yxyx_norm: [f32; 4], height: usize, width: usize) -> [f32; 4] {
        let (h, w) = (height as f32, width as f32);
        let [top, left, bottom, right] = box_yxyx_norm;
        if let Self::Rotate(degrees) = self {
            return rotated(box_yxyx_norm, degrees, h, w);
        }
        let (top, left) = ((h * top) as i64, (w * left) as i64);
        let (bottom, right) = ((h * bottom) as i64, (w * right) as i64);
        let corners = match self {
            Self::TranslateX(pixels) => {
                let pixels = pixels as i64;
                [
                    top,
                    (left - pixels).max(0),
                    bottom,
                    (right - pixels).min(width as i64),
                ]
            }
            Self::TranslateY(pixels) => {
                let pixels = pixels as i64;
                [
                    (top - pixels).max(0),
                    left,
                    (bottom - pixels).min(height as i64),
                    right,
                ]
            }
            Self::ShearX(level) => {
                let x = |x: i64, y: i64| (x as f32 - level * y as f32) as i64;
                let xs = [x(left, top), x(left, bottom), x(right, top), x(right, bottom)];
                let (least, most) = extent(xs);
                [top, least, bottom, most]
            }
            Self::ShearY(level) => {
                let y = |y: i64, x: i64| (y as f32 - level * x as f32) as i64;
                let ys = [y(top, left), y(top, right), y(bottom, left), y(bottom, right)];
                let (least, most) = extent(ys);
                [least, left, most, right]
            }
            Self::Rotate(_) => unreachable!("rotation returned above"),
        };
        let [top, left, bottom, right] = corners.map(|v| v as f32);
        within_the_image([top / h, left / w, bottom / h, right / w])
    }
}

fn radians(degrees: f32) -> f32 {
    degrees * (std::f64::consts::PI / 180.0) as f32
}

/// Corners relative to the centre, y upwards, rotated and truncated to whole pixels.
fn rotated(box_yxyx_norm: [f32; 4], degrees: f32, h: f32, w: f32) -> [f32; 4] {
    let (sin, cos) = radians(degrees).sin_cos();
    let y = |v: f32| -((h * (v - 0.5)) as i64) as f32;
    let x = |v: f32| ((w * (v - 0.5)) as i64) as f32;
    let [top, left, bottom, right] = box_yxyx_norm;
    let corners = [(top, left), (top, right), (bottom, left), (bottom, right)].map(|(v, u)| (y(v), x(u)));
    let (low_y, high_y) = extent(corners.map(|(y, x)| (cos * y + sin * x) as i64));
    let (low_x, high_x) = extent(corners.map(|(y, x)| (-sin * y + cos * x) as i64));
    within_the_image([
        -(high_y as f32 / h - 0.5),
        low_x as f32 / w + 0.5,
        -(low_y as f32 / h - 0.5),
        high_x as f32 / w + 0.5,
    ])
}

fn extent(values: [i64; 4]) -> (i64, i64) {
    values
        .into_iter()
        .fold((i64::MAX, i64::MIN), |(low, high), v| (low.min(v), high.max(v)))
}

/// Clips to [0, 1]; an axis without extent gets one of 0.05 at the image's edge.
fn within_the_image(box_yxyx_norm: [f32; 4]) -> [f32; 4] {
    const LEAST: f32 = 0.05;
    let mut clipped = box_yxyx_norm.map(|v| v.clamp(0.0, 1.0));
    for (low, high) in [(0, 2), (1, 3)] {
        if clipped[high] == clipped[low] {
            clipped[high] = clipped[high].max(LEAST);
            clipped[low] = clipped[low].min(1.0 - LEAST);
        }
    }
    clipped
}
