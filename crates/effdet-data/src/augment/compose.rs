//! Pictures made of several: mosaic and mixup.
//!
//! Source: Bochkovskiy et al., "YOLOv4" (2020), Zhang et al., "mixup" (2018), with the settings of Ultralytics.

use effdet_model::hparams::ImageSize;
use effdet_model::rng::Draws;
use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};

/// Grey of places without an image.
const EMPTY: Rgb<u8> = Rgb([114; 3]);
/// The two parameters of the beta distribution of mixup's weight.
const BETA: usize = 32;

/// An image with its objects before it is placed.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Pixels.
    pub image: RgbImage,
    /// Normalised corners.
    pub boxes_yxyx_norm: Vec<[f32; 4]>,
    /// Class index of each box.
    pub classes: Vec<i32>,
}

impl Sample {
    /// The image scaled to fit a size, aspect kept.
    fn fitted(&self, height: u32, width: u32) -> RgbImage {
        let (w, h) = self.image.dimensions();
        let scale = (height as f32 / h as f32).min(width as f32 / w as f32);
        let side = |side: u32, limit: u32| ((side as f32 * scale).round() as u32).clamp(1, limit);
        let (w, h) = (side(w, width), side(h, height));
        imageops::resize(&self.image, w, h, FilterType::Triangle)
    }

    /// Appends the objects of another sample whose image lies at `(top, left)` with a size, cut to this image.
    fn adopt(&mut self, other: &Self, (top, left): (i64, i64), (height, width): (u32, u32)) {
        let (w, h) = (self.image.width() as f32, self.image.height() as f32);
        for (&[y0, x0, y1, x1], &class) in other.boxes_yxyx_norm.iter().zip(&other.classes) {
            let y = |v: f32| ((v * height as f32 + top as f32) / h).clamp(0.0, 1.0);
            let x = |v: f32| ((v * width as f32 + left as f32) / w).clamp(0.0, 1.0);
            let moved = [y(y0), x(x0), y(y1), x(x1)];
            if moved[2] > moved[0] && moved[3] > moved[1] {
                self.boxes_yxyx_norm.push(moved);
                self.classes.push(class);
            }
        }
    }
}

/// Four samples around a drawn point of a picture twice as large as the network's input.
///
/// The point is uniform in the middle half of both axes; each image is scaled to fit the input and touches the point with a corner.
pub fn mosaic(parts: [Sample; 4], size: ImageSize, draws: &mut Draws) -> Sample {
    let (height, width) = (size.height as u32, size.width as u32);
    let mut out = Sample {
        image: RgbImage::from_pixel(2 * width, 2 * height, EMPTY),
        boxes_yxyx_norm: Vec::new(),
        classes: Vec::new(),
    };
    let [y, x] = [height, width].map(|side| i64::from(side / 2) + draws.below(u64::from(side) + 1) as i64);
    for (index, part) in parts.into_iter().enumerate() {
        let small = part.fitted(height, width);
        let top = if index < 2 {
            y - i64::from(small.height())
        } else {
            y
        };
        let left = if index % 2 == 0 {
            x - i64::from(small.width())
        } else {
            x
        };
        imageops::replace(&mut out.image, &small, left, top);
        out.adopt(&part, (top, left), (small.height(), small.width()));
    }
    out
}

/// Blends another sample, scaled to fit, over a sample with a weight of the distribution Beta(32, 32).
pub fn mixup(base: &mut Sample, other: &Sample, draws: &mut Draws) {
    let weight = beta(draws);
    let (width, height) = base.image.dimensions();
    let small = other.fitted(height, width);
    let mut second = RgbImage::from_pixel(width, height, EMPTY);
    imageops::replace(&mut second, &small, 0, 0);
    for (value, &beside) in base.image.iter_mut().zip(second.iter()) {
        *value = (f32::from(*value) * weight + f32::from(beside) * (1.0 - weight)).round() as u8;
    }
    base.adopt(other, (0, 0), (small.height(), small.width()));
}

/// Beta(n, n) is the distribution of the median of 2n − 1 uniform draws.
fn beta(draws: &mut Draws) -> f32 {
    let mut values = [0.0f32; 2 * BETA - 1];
    values.fill_with(|| draws.uniform());
    values.sort_by(f32::total_cmp);
    values[BETA - 1]
}

#[cfg(test)]
mod tests {
    use super::*;
    use effdet_model::rng::Purpose;

    /// A grey image whose only object is white and has a box around it.
    fn sample(class: i32) -> Sample {
        let inside = |x, y| (20..60).contains(&x) && (10..30).contains(&y);
        Sample {
            image: RgbImage::from_fn(80, 40, |x, y| Rgb([if inside(x, y) { 255 } else { 50 }; 3])),
            boxes_yxyx_norm: vec![[0.25, 0.25, 0.75, 0.75]],
            classes: vec![class],
        }
    }

    #[test]
    fn boxes_of_a_mosaic_lie_on_their_objects() {
        let mut seen = 0;
        for index in 0..20 {
            let mut draws = Draws::new(3, Purpose::Mosaic, 0, index);
            let size = ImageSize {
                height: 64,
                width: 64,
            };
            let out = mosaic([0, 1, 2, 3].map(sample), size, &mut draws);
            assert_eq!(out.image.dimensions(), (128, 128));
            for [top, left, bottom, right] in out.boxes_yxyx_norm {
                let at = |v: f32| (v * 128.0) as u32;
                let centre = out
                    .image
                    .get_pixel(at((left + right) / 2.0), at((top + bottom) / 2.0));
                assert_eq!(centre.0, [255; 3]);
                seen += 1;
            }
        }
        assert!(seen > 60, "{seen}");
    }

    #[test]
    fn mixup_keeps_the_objects_of_both_and_blends_their_pixels() {
        let (mut base, other) = (sample(1), sample(2));
        base.image = RgbImage::from_pixel(80, 40, Rgb([0; 3]));
        mixup(&mut base, &other, &mut Draws::new(3, Purpose::Mixup, 0, 0));
        assert_eq!(base.classes, [1, 2]);
        assert_eq!(base.boxes_yxyx_norm, [[0.25, 0.25, 0.75, 0.75]; 2]);
        let [inside, outside] = [(40, 20), (2, 2)].map(|(x, y)| f32::from(base.image.get_pixel(x, y).0[0]));
        assert!(
            (inside / outside - 255.0 / 50.0).abs() < 0.4,
            "{inside} {outside}"
        );
    }

    #[test]
    fn the_weight_of_mixup_is_near_one_half() {
        let mut draws = Draws::new(3, Purpose::Mixup, 0, 0);
        let values: Vec<f32> = (0..2000).map(|_| beta(&mut draws)).collect();
        let mean = values.iter().sum::<f32>() / 2000.0;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 2000.0;
        // Beta(32, 32): variance 1/(4·65).
        assert!(
            (mean - 0.5).abs() < 0.01 && (variance * 260.0 - 1.0).abs() < 0.15,
            "{mean} {variance}"
        );
    }
}
