//! Operations on colours; boxes stay as they are.

use image::{Rgb, RgbImage};

/// Stretches every channel to 0..=255: `x·255/(hi − lo) − lo·255/(hi − lo)`, truncated; a constant channel stays.
pub fn autocontrast(image: &mut RgbImage) {
    for channel in 0..3 {
        let values = || image.pixels().map(|pixel| pixel.0[channel]);
        let (Some(low), Some(high)) = (values().min(), values().max()) else {
            return;
        };
        if high <= low {
            continue;
        }
        let scale = 255.0 / f32::from(high - low);
        let offset = -f32::from(low) * scale;
        let lut: [u8; 256] =
            std::array::from_fn(|value| (value as f32 * scale + offset).clamp(0.0, 255.0) as u8);
        map_channel(image, channel, &lut);
    }
}

/// Flattens the histogram of every channel, as Pillow does.
pub fn equalize(image: &mut RgbImage) {
    for channel in 0..3 {
        let mut histogram = [0u64; 256];
        for pixel in image.pixels() {
            histogram[usize::from(pixel.0[channel])] += 1;
        }
        let last = histogram
            .iter()
            .rev()
            .copied()
            .find(|&count| count > 0)
            .unwrap_or(0);
        let step = (histogram.iter().sum::<u64>() - last) / 255;
        if step == 0 {
            continue;
        }
        let mut below = 0;
        let lut: [u8; 256] = std::array::from_fn(|value| {
            let level = if value == 0 { 0 } else { (below + step / 2) / step };
            below += histogram[value];
            level.min(255) as u8
        });
        map_channel(image, channel, &lut);
    }
}

/// Keeps the highest `bits` bits; 0 bits keep one, since TensorFlow limits a shift of 8-bit values to 7.
pub fn posterize(image: &mut RgbImage, bits: u32) {
    let shift = 8u32.saturating_sub(bits).min(7);
    map(image, |value| (value >> shift) << shift);
}

/// Inverts values from `threshold` on.
pub fn solarize(image: &mut RgbImage, threshold: u32) {
    map(image, |value| {
        if u32::from(value) < threshold {
            value
        } else {
            255 - value
        }
    });
}

/// Adds to values below 128.
pub fn solarize_add(image: &mut RgbImage, addition: u8) {
    map(image, |value| {
        if value < 128 {
            value.saturating_add(addition)
        } else {
            value
        }
    });
}

/// Blends from the grey image (factor 0) to the image (factor 1) and beyond.
pub fn color(image: &mut RgbImage, factor: f32) {
    for pixel in image.pixels_mut() {
        let grey = grey(*pixel);
        for value in &mut pixel.0 {
            *value = blend(grey, *value, factor);
        }
    }
}

/// Blends from the constant mean grey to the image and beyond.
pub fn contrast(image: &mut RgbImage, factor: f32) {
    let count = u64::from(image.width()) * u64::from(image.height());
    let sum: u64 = image.pixels().map(|pixel| u64::from(grey(*pixel))).sum();
    let mean = (sum / count.max(1)) as u8;
    map(image, |value| blend(mean, value, factor));
}

/// Blends from black to the image and beyond.
pub fn brightness(image: &mut RgbImage, factor: f32) {
    map(image, |value| blend(0, value, factor));
}

/// Blends from the image smoothed by `[[1, 1, 1], [1, 5, 1], [1, 1, 1]]/13` to the image and beyond; a border of one pixel stays.
pub fn sharpness(image: &mut RgbImage, factor: f32) {
    let source = image.clone();
    let (width, height) = source.dimensions();
    for y in 1..height.saturating_sub(1) {
        for x in 1..width.saturating_sub(1) {
            for channel in 0..3 {
                let mut smooth = 0.0f32;
                for dy in 0..3 {
                    for dx in 0..3 {
                        let weight = if (dy, dx) == (1, 1) {
                            5.0 / 13.0
                        } else {
                            1.0 / 13.0
                        };
                        let value = source.get_pixel(x + dx - 1, y + dy - 1).0[channel];
                        smooth += f32::from(value) * weight;
                    }
                }
                let value = &mut image.get_pixel_mut(x, y).0[channel];
                *value = blend(smooth.clamp(0.0, 255.0) as u8, *value, factor);
            }
        }
    }
}

/// Turns the hue by a part of a turn and multiplies saturation and value, both limited to 1.
pub fn hsv(image: &mut RgbImage, hue_turns: f32, saturation_factor: f32, value_factor: f32) {
    for pixel in image.pixels_mut() {
        let [r, g, b] = pixel.0.map(|v| f32::from(v) / 255.0);
        let (most, least) = (r.max(g).max(b), r.min(g).min(b));
        let span = most - least;
        let sixths = match span {
            0.0 => 0.0,
            _ if most == r => (g - b) / span,
            _ if most == g => (b - r) / span + 2.0,
            _ => (r - g) / span + 4.0,
        };
        let hue = (sixths + 6.0 * hue_turns).rem_euclid(6.0);
        let saturation = if most == 0.0 { 0.0 } else { span / most };
        let saturation = (saturation * saturation_factor).clamp(0.0, 1.0);
        let value = (most * value_factor).clamp(0.0, 1.0);
        // f(n) = V − V·S·max(0, min(k, 4 − k, 1)), k = (n + H/60°) mod 6, for n = 5, 3, 1.
        pixel.0 = [5.0, 3.0, 1.0].map(|n| {
            let k = (n + hue) % 6.0;
            let part = k.min(4.0 - k).clamp(0.0, 1.0);
            ((value - value * saturation * part) * 255.0).round() as u8
        });
    }
}

/// `trunc(255.5·(0.2989·r + 0.587·g + 0.114·b))` of values divided by 255.
fn grey(pixel: Rgb<u8>) -> u8 {
    let [r, g, b] = pixel.0.map(|value| f32::from(value) * (1.0 / 255.0));
    ((r * 0.2989 + g * 0.587 + b * 0.114) * 255.5).min(255.0) as u8
}

/// `a + factor·(b − a)`, truncated; clipping matters only beyond `b`.
fn blend(a: u8, b: u8, factor: f32) -> u8 {
    let (a, b) = (f32::from(a), f32::from(b));
    (a + factor * (b - a)).clamp(0.0, 255.0) as u8
}

fn map(image: &mut RgbImage, f: impl Fn(u8) -> u8) {
    let lut: [u8; 256] = std::array::from_fn(|value| f(value as u8));
    image
        .iter_mut()
        .for_each(|value| *value = lut[usize::from(*value)]);
}

fn map_channel(image: &mut RgbImage, channel: usize, lut: &[u8; 256]) {
    for pixel in image.pixels_mut() {
        pixel.0[channel] = lut[usize::from(pixel.0[channel])];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hsv_without_change_is_the_identity_and_a_third_of_a_turn_rotates_the_channels() {
        let source = RgbImage::from_fn(64, 64, |x, y| Rgb([(4 * x) as u8, (4 * y) as u8, (x * y) as u8]));
        let mut image = source.clone();
        hsv(&mut image, 0.0, 1.0, 1.0);
        assert_eq!(image, source);
        hsv(&mut image, 1.0 / 3.0, 1.0, 1.0);
        for (turned, pixel) in image.pixels().zip(source.pixels()) {
            let [r, g, b] = pixel.0;
            assert!(turned.0.iter().zip([b, r, g]).all(|(&a, b)| a.abs_diff(b) <= 1));
        }
        hsv(&mut image, 0.0, 0.0, 0.5);
        assert!(
            image
                .pixels()
                .all(|pixel| pixel.0[0] == pixel.0[1] && pixel.0[0] <= 128)
        );
    }
}
