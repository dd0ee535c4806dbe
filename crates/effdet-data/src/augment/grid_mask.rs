//! GridMask: bars of an image stay, what is between them is black.
//!
//! Source: automl's `aug/gridmask.py` with the settings of its pipeline; Chen et al., "GridMask Data Augmentation" (2020).

use effdet_model::rng::Draws;
use image::{Rgb, RgbImage};

/// Deviations from the mean below which the mask is used, so it is with probability Φ(0.5) ≈ 0.69.
const THRESHOLD: f64 = 0.5;
/// Bars of a period that are kept.
const RATIO: f32 = 0.6;
const ROTATE_DEGREES: f64 = 10.0;

/// Masks an image, or with its probability does not; boxes stay as they are.
pub fn apply(image: &mut RgbImage, draws: &mut Draws) {
    let (width, height) = (image.width(), image.height());
    if draws.normal() >= THRESHOLD || width == 0 || height == 0 {
        return;
    }
    let side = (1.5 * width.max(height) as f32) as i64;
    let (a, b) = (0.5 * height as f32, 0.3 * width as f32);
    let (least, most) = (a.min(b) as u64, a.max(b) as u64 + 1);
    let period = (least + draws.below(most - least)).max(1) as i64;
    let length = ((period as f32 * RATIO + 0.5) as i64).max(1).min(period - 1);
    let starts = [0; 2].map(|_: i64| draws.below(period as u64 + 1) as i64);
    let degrees = ROTATE_DEGREES * (draws.normal() - 1.0);
    let (sin, cos) = (degrees.to_radians() as f32).sin_cos();

    let in_bar = |position: i64, start: i64| {
        let shifted = position - start;
        shifted >= 0 && shifted / period < side / period && shifted % period < length
    };
    let kept = |y: i64, x: i64| {
        (0..side).contains(&y) && (0..side).contains(&x) && (in_bar(y, starts[0]) || in_bar(x, starts[1]))
    };
    let last = side as f32 - 1.0;
    let offset_x = (last - (cos * last - sin * last)) / 2.0;
    let offset_y = (last - (sin * last + cos * last)) / 2.0;
    let corner = [(side - i64::from(height)) / 2, (side - i64::from(width)) / 2];
    for (x, y, pixel) in image.enumerate_pixels_mut() {
        let (y, x) = (
            (corner[0] + i64::from(y)) as f32,
            (corner[1] + i64::from(x)) as f32,
        );
        let (yi, xi) = (sin * x + cos * y + offset_y, cos * x - sin * y + offset_x);
        // Bilinear interpolation of a mask of whole numbers: 1 only where all that takes part is 1.
        let rows = yi.floor() as i64..=yi.ceil() as i64;
        let columns = xi.floor() as i64..=xi.ceil() as i64;
        if !rows.into_iter().all(|y| columns.clone().all(|x| kept(y, x))) {
            *pixel = Rgb([0; 3]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use effdet_model::rng::Purpose;

    #[test]
    fn seven_of_ten_images_are_masked_and_keep_most_of_their_pixels() {
        let (mut masked, mut kept) = (0, 0.0);
        for index in 0..300 {
            let mut image = RgbImage::from_pixel(40, 30, Rgb([9; 3]));
            apply(&mut image, &mut Draws::new(2, Purpose::GridMask, 0, index));
            let left = image.pixels().filter(|pixel| pixel.0 == [9; 3]).count();
            assert_eq!(
                left + image.pixels().filter(|pixel| pixel.0 == [0; 3]).count(),
                1200
            );
            if left < 1200 {
                masked += 1;
                kept += left as f64 / 1200.0;
            }
        }
        assert!(
            (180..=235).contains(&masked),
            "{masked} of 300; Φ(0.5) of them is 207"
        );
        // Bars on both axes: 1 − 0.4², less what the rotation rounds away.
        let mean = kept / f64::from(masked);
        assert!((0.6..0.9).contains(&mean), "{mean}");
    }

    #[test]
    fn an_image_of_one_pixel_is_no_trouble() {
        for index in 0..50 {
            let mut image = RgbImage::from_pixel(1, 1, Rgb([9; 3]));
            apply(&mut image, &mut Draws::new(2, Purpose::GridMask, 0, index));
            assert!([[9; 3], [0; 3]].contains(&image.get_pixel(0, 0).0));
        }
    }
}
