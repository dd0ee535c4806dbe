//! From RGB bytes and boxes to the network's input: normalise, flip, scale jitter, crop, resize, pad.
//!
//! Everything runs in float32 in the reference's order of operations, without fused multiply-add, so results agree with it bit
//! for bit where golden vectors exist. Source: the reference's `dataset/dataloader.py`, `object_detection/preprocessor.py`.

use effdet_model::hparams::{HParams, ImageSize, Profile, ResizeRule};
use effdet_model::rng::{Draws, Purpose};
use half::f16;
use image::RgbImage;

use crate::jpeg::Reduction;
use crate::resize::Placer;

/// Number format that pixels are normalised and resized in; they are delivered as float32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PixelPrecision {
    /// float32 throughout.
    #[default]
    Float32,
    /// Every step of the normalisation and the resized image rounded to float16, as the reference trains in half precision.
    Float16,
}

/// How images and boxes are prepared.
#[derive(Debug, Clone, PartialEq)]
pub struct PreprocessConfig {
    /// Network input size.
    pub image_size: ImageSize,
    /// Reference size of the scale jitter.
    pub target_size: ImageSize,
    /// Source index rule.
    pub resize_rule: ResizeRule,
    /// Smallest scale of the jitter.
    pub jitter_min: f32,
    /// Largest scale of the jitter.
    pub jitter_max: f32,
    /// Flip with probability one half.
    pub random_flip: bool,
    /// Decode training images in the reduced size that their scale leaves.
    pub reduced_decode: bool,
    /// Number format of the pixels.
    pub(crate) precision: PixelPrecision,
    /// Normalised value of every byte, per colour.
    pub(crate) lut: [[f32; 256]; 3],
}

impl PreprocessConfig {
    /// The preparation that `hparams` ask for, in float32.
    pub fn new(hparams: &HParams) -> Self {
        Self::with_precision(hparams, PixelPrecision::Float32)
    }

    /// The preparation that `hparams` ask for, in a number format.
    pub fn with_precision(hparams: &HParams, precision: PixelPrecision) -> Self {
        Self {
            image_size: hparams.image_size,
            target_size: hparams.target_size.unwrap_or(hparams.image_size),
            resize_rule: hparams.resize_rule,
            jitter_min: hparams.jitter_min as f32,
            jitter_max: hparams.jitter_max as f32,
            random_flip: hparams.input_rand_hflip,
            reduced_decode: hparams.reduced_decode,
            precision,
            lut: normalization_table(hparams, precision),
        }
    }
}

/// The nearest float16, ties to even.
pub(crate) fn round_to_f16(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

/// Normalised value of every byte.
///
/// Seed: `(p·(1/255) − mean)/stddev` with both in units of `[0, 1]`; automl: `(p − mean)/stddev` in units of `[0, 255]`.
fn normalization_table(hparams: &HParams, precision: PixelPrecision) -> [[f32; 256]; 3] {
    let round = match precision {
        PixelPrecision::Float32 => |value: f32| value,
        PixelPrecision::Float16 => round_to_f16,
    };
    let unit = round(1.0 / 255.0);
    std::array::from_fn(|channel| {
        let (mean, stddev) = (hparams.mean_rgb[channel], hparams.stddev_rgb[channel]);
        std::array::from_fn(|byte| {
            let (value, mean, stddev) = match hparams.profile {
                Profile::Seed => (round(byte as f32 * unit), mean / 255.0, stddev / 255.0),
                Profile::Google => (byte as f32, mean, stddev),
            };
            round(round(value - round(mean as f32)) / round(stddev as f32))
        })
    })
}

/// Where an image goes: scaled size, crop offset and flip.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placement {
    /// Scale s; boxes in input pixels divided by it are in original pixels.
    pub scale: f32,
    /// Height after scaling.
    pub scaled_height: usize,
    /// Width after scaling.
    pub scaled_width: usize,
    /// First scaled row that is kept.
    pub offset_y: usize,
    /// First scaled column that is kept.
    pub offset_x: usize,
    /// Whether the image is mirrored first.
    pub flip: bool,
}

impl Placement {
    /// Evaluation: the whole image, as large as fits.
    pub fn evaluation(config: &PreprocessConfig, height: usize, width: usize) -> Self {
        let ImageSize {
            height: out_height,
            width: out_width,
        } = config.image_size;
        let scale = (out_width as f32 / width as f32).min(out_height as f32 / height as f32);
        Self::scaled(height, width, scale)
    }

    /// Training: random scale and crop from the draws `u` = [scale, vertical offset, horizontal offset] in [0, 1).
    pub fn training(config: &PreprocessConfig, height: usize, width: usize, u: [f32; 3], flip: bool) -> Self {
        let jitter = u[0] * (config.jitter_max - config.jitter_min) + config.jitter_min;
        let scaled = |target: usize| (jitter * target as f32) as usize;
        let by_height = scaled(config.target_size.height) as f32 / height as f32;
        let by_width = scaled(config.target_size.width) as f32 / width as f32;
        let placed = Self::scaled(height, width, by_width.min(by_height));
        let offset = |scaled: usize, out: usize, u: f32| (scaled.saturating_sub(out) as f32 * u) as usize;
        Self {
            offset_y: offset(placed.scaled_height, config.image_size.height, u[1]),
            offset_x: offset(placed.scaled_width, config.image_size.width, u[2]),
            flip,
            ..placed
        }
    }

    /// Training placement of one sample by its key.
    ///
    /// # Determinism
    /// A function of (seed, epoch, sample) alone.
    pub fn draw(
        config: &PreprocessConfig,
        height: usize,
        width: usize,
        seed: u64,
        epoch: u64,
        sample: u64,
    ) -> Self {
        let flip = config.random_flip && Draws::new(seed, Purpose::Flip, epoch, sample).uniform() > 0.5;
        let mut draws = Draws::new(seed, Purpose::Jitter, epoch, sample);
        let u = [draws.uniform(), draws.uniform(), draws.uniform()];
        Self::training(config, height, width, u, flip)
    }

    fn scaled(height: usize, width: usize, scale: f32) -> Self {
        // A thin strip may scale to nothing; one row or column of it stays.
        let scaled = |side: usize| ((side as f32 * scale) as usize).max(1);
        Self {
            scale,
            scaled_height: scaled(height),
            scaled_width: scaled(width),
            offset_y: 0,
            offset_x: 0,
            flip: false,
        }
    }

    /// A box of normalised corners in pixels of the network input, clipped; none when nothing of it is left.
    ///
    /// `box_px = box·scaled size − offset`, clipped to `[0, size − 1]`; boxes of zero area are dropped.
    pub fn place_box(&self, config: &PreprocessConfig, box_yxyx_norm: [f32; 4]) -> Option<[f32; 4]> {
        let [top, left, bottom, right] = box_yxyx_norm;
        let (left, right) = if self.flip {
            (1.0 - right, 1.0 - left)
        } else {
            (left, right)
        };
        let ImageSize { height, width } = config.image_size;
        let y =
            |v: f32| (v * self.scaled_height as f32 - self.offset_y as f32).clamp(0.0, height as f32 - 1.0);
        let x = |v: f32| (v * self.scaled_width as f32 - self.offset_x as f32).clamp(0.0, width as f32 - 1.0);
        let placed = [y(top), x(left), y(bottom), x(right)];
        let area = (placed[2] - placed[0]) * (placed[3] - placed[1]);
        (area != 0.0 && !area.is_nan()).then_some(placed)
    }
}

/// Normalises, flips, resizes, crops and pads a whole image; see [`Placer`].
///
/// # Shapes
/// `out`: `[height, width, 3]` of `config.image_size`, overwritten.
///
/// # Panics
/// When `out` has another size or the image is empty.
pub fn place_image(config: &PreprocessConfig, image: &RgbImage, placement: &Placement, out: &mut [f32]) {
    let mut placer = Placer::default();
    placer.plan(
        config,
        (image.width() as usize, image.height() as usize),
        placement,
        Reduction::NONE,
    );
    placer.place(config, &mut &*image, out);
}

/// The plain version of [`place_image`]: every step of the reference on whole images.
#[cfg(test)]
fn place_image_plainly(config: &PreprocessConfig, image: &RgbImage, placement: &Placement) -> Vec<f32> {
    use crate::resize::Axis;
    let (w, h) = (image.width() as usize, image.height() as usize);
    let mut normalized = vec![0.0f32; w * h * 3];
    for y in 0..h {
        for x in 0..w {
            let source = if placement.flip { w - 1 - x } else { x };
            for c in 0..3 {
                let byte = image.get_pixel(source as u32, y as u32).0[c];
                normalized[(y * w + x) * 3 + c] = config.lut[c][usize::from(byte)];
            }
        }
    }
    let round = |value: f32| match config.precision {
        PixelPrecision::Float32 => value,
        PixelPrecision::Float16 => f16::from_f32(value).to_f32(),
    };
    let (sh, sw) = (placement.scaled_height, placement.scaled_width);
    let taps = |input, output| -> Vec<crate::resize::Tap> {
        crate::resize::taps(config.resize_rule, Axis::whole(input), output, 0, output).collect()
    };
    let (ys, xs) = (taps(h, sh), taps(w, sw));
    let mut resized = vec![0.0f32; sh * sw * 3];
    for (y, ty) in ys.iter().enumerate() {
        for (x, tx) in xs.iter().enumerate() {
            for c in 0..3 {
                let at = |y: usize, x: usize| normalized[(y * w + x) * 3 + c];
                let top = at(ty.low, tx.low) + (at(ty.low, tx.high) - at(ty.low, tx.low)) * tx.weight;
                let bottom = at(ty.high, tx.low) + (at(ty.high, tx.high) - at(ty.high, tx.low)) * tx.weight;
                resized[(y * sw + x) * 3 + c] = round(top + (bottom - top) * ty.weight);
            }
        }
    }
    let ImageSize { height, width } = config.image_size;
    let mut out = vec![0.0f32; height * width * 3];
    for y in 0..height.min(sh - placement.offset_y) {
        for x in 0..width.min(sw - placement.offset_x) {
            for c in 0..3 {
                out[(y * width + x) * 3 + c] =
                    resized[((y + placement.offset_y) * sw + x + placement.offset_x) * 3 + c];
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resize::{Axis, Tap, taps};
    use image::Rgb;
    use proptest::prelude::*;
    use serde_json::Value;

    /// Image of `golden.md`: `(7y + 13x + 31c + 5·((x·y) mod 17)) mod 256`, 37 rows and 53 columns.
    fn golden_image() -> RgbImage {
        RgbImage::from_fn(53, 37, |x, y| {
            Rgb(std::array::from_fn(|c| {
                ((7 * y + 13 * x + 31 * c as u32 + 5 * ((x * y) % 17)) % 256) as u8
            }))
        })
    }

    const GOLDEN_BOXES: [[f32; 4]; 3] = [
        [0.1, 0.2, 0.5, 0.6],
        [0.3, 0.7, 0.95, 1.0],
        [0.0, 0.0, 0.05, 0.04],
    ];

    fn config(height: usize, width: usize) -> PreprocessConfig {
        config_in(PixelPrecision::Float32, height, width)
    }

    fn config_in(precision: PixelPrecision, height: usize, width: usize) -> PreprocessConfig {
        let mut hparams = HParams::preset("d0").unwrap();
        hparams.image_size = ImageSize { height, width };
        PreprocessConfig::with_precision(&hparams, precision)
    }

    fn golden() -> Value {
        let text = include_str!("../../../tests/golden/golden.json");
        serde_json::from_str::<Value>(text).unwrap()["preprocess_losses_postprocess"].clone()
    }

    fn floats(value: &Value) -> Vec<f64> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_f64().unwrap())
            .collect()
    }

    /// Compares with a golden entry; gives the largest absolute error of single values.
    fn check(expected: &Value, config: &PreprocessConfig, placement: &Placement) -> f64 {
        let mut out = vec![f32::NAN; config.image_size.height * config.image_size.width * 3];
        place_image(config, &golden_image(), placement, &mut out);
        let want = &expected["img"];
        let sum: f64 = out.iter().map(|&v| f64::from(v)).sum();
        assert!((sum - want["sum"].as_f64().unwrap()).abs() < 1e-2, "sum {sum}");
        let abs_mean = out.iter().map(|&v| f64::from(v.abs())).sum::<f64>() / out.len() as f64;
        assert!((abs_mean - want["abs_mean"].as_f64().unwrap()).abs() < 1e-6);
        let mut worst = 0.0f64;
        let mut compare = |got: f32, want: f64| worst = worst.max((f64::from(got) - want).abs());
        for (got, want) in out.iter().zip(floats(&want["first6"])) {
            compare(*got, want);
        }
        compare(out[out.len() / 2], want["mid"].as_f64().unwrap());
        compare(
            out.iter().copied().fold(f32::MIN, f32::max),
            want["max"].as_f64().unwrap(),
        );
        compare(
            out.iter().copied().fold(f32::MAX, f32::min),
            want["min"].as_f64().unwrap(),
        );
        if let Some(pixels) = expected["px"].as_array() {
            let width = config.image_size.width;
            let last = (placement.scaled_height - 1, placement.scaled_width - 1);
            for ((y, x), want) in [(0, 0), (1, 1), (10, 20), last, (63, 63)].into_iter().zip(pixels) {
                for (got, want) in out[(y * width + x) * 3..].iter().zip(floats(want)) {
                    compare(*got, want);
                }
            }
        }
        let boxes: Vec<[f32; 4]> = GOLDEN_BOXES
            .iter()
            .filter_map(|&b| placement.place_box(config, b))
            .collect();
        let want = expected["boxes"].as_array().unwrap();
        assert_eq!(boxes.len(), want.len());
        for (got, want) in boxes.iter().zip(want) {
            for (got, want) in got.iter().zip(floats(want)) {
                compare(*got, want);
            }
        }
        worst
    }

    /// Source: `golden.json`, `eval_HxW_float32`.
    #[test]
    fn evaluation_inputs_equal_the_reference() {
        check_evaluation(PixelPrecision::Float32, "float32", 1e-5);
    }

    /// Source: `golden.json`, `eval_HxW_float16`; the values are float16 numbers and must be the very same.
    #[test]
    fn half_precision_inputs_are_the_float16_numbers_of_the_reference() {
        check_evaluation(PixelPrecision::Float16, "float16", 0.0);
    }

    fn check_evaluation(precision: PixelPrecision, name: &str, tolerance: f64) {
        for (height, width) in [(64, 64), (128, 96)] {
            let expected = &golden()[format!("eval_{height}x{width}_{name}")];
            let config = config_in(precision, height, width);
            let placement = Placement::evaluation(&config, 37, 53);
            let scaled = [placement.scaled_height as f64, placement.scaled_width as f64];
            assert_eq!(floats(&expected["scaled"]), scaled);
            assert_eq!(
                f64::from(1.0 / placement.scale) as f32,
                expected["scale"].as_f64().unwrap() as f32
            );
            let worst = check(expected, &config, &placement);
            println!("eval {height}x{width} {name}: largest error {worst:e}");
            assert!(worst <= tolerance, "{height}x{width}: largest error {worst}");
        }
    }

    /// Source: `golden.json`, `train_*`.
    #[test]
    fn training_inputs_equal_the_reference() {
        let golden = golden();
        let names: Vec<&String> = golden
            .as_object()
            .unwrap()
            .keys()
            .filter(|k| k.starts_with("train_"))
            .collect();
        assert_eq!(names.len(), 3);
        for name in names {
            let expected = &golden[name];
            let config = config(64, 64);
            let u: Vec<f32> = floats(&expected["u"]).iter().map(|&v| v as f32).collect();
            let placement = Placement::training(&config, 37, 53, [u[0], u[1], u[2]], false);
            assert_eq!(
                floats(&expected["scaled"]),
                [placement.scaled_height as f64, placement.scaled_width as f64]
            );
            assert_eq!(
                floats(&expected["off"]),
                [placement.offset_y as f64, placement.offset_x as f64]
            );
            let worst = check(expected, &config, &placement);
            println!("{name}: largest error {worst:e}");
            assert!(worst <= 1e-5, "{name}: largest error {worst}");
        }
    }

    /// Source: the specification's list of widths that come out one pixel short at 512.
    #[test]
    fn float32_truncation_leaves_some_widths_one_pixel_short() {
        let config = config(512, 512);
        let scaled = |width: usize| Placement::evaluation(&config, 100, width).scaled_width;
        for short in [209, 332, 355, 427, 428] {
            assert_eq!(scaled(short), 511, "{short}");
        }
        for whole in [640, 500, 375] {
            assert_eq!(scaled(whole), 512, "{whole}");
        }
        assert_eq!((200..=640).filter(|&width| scaled(width) == 511).count(), 56);
    }

    /// Source: the specification's example of both rules.
    #[test]
    fn four_samples_resized_to_six_follow_their_rule() {
        let resize = |rule| -> Vec<f32> {
            let at = |tap: Tap| tap.low as f32 + (tap.high as f32 - tap.low as f32) * tap.weight;
            taps(rule, Axis::whole(4), 6, 0, 6).map(at).collect()
        };
        for (rule, expected) in [
            (ResizeRule::Legacy, [0.0, 0.667, 1.333, 2.0, 2.667, 3.0]),
            (ResizeRule::HalfPixel, [0.0, 0.5, 1.167, 1.833, 2.5, 3.0]),
        ] {
            for (got, want) in resize(rule).into_iter().zip(expected) {
                assert!((got - want).abs() < 1e-3, "{rule}: {got} {want}");
            }
        }
    }

    #[test]
    fn a_flipped_box_covers_the_flipped_pixels() {
        let config = config(64, 64);
        let placement = Placement {
            flip: true,
            ..Placement::evaluation(&config, 64, 64)
        };
        assert_eq!(
            placement.place_box(&config, [0.0, 0.0, 0.5, 0.25]),
            Some([0.0, 48.0, 32.0, 63.0])
        );
    }

    proptest! {
        #[test]
        fn the_fused_pass_equals_the_plain_steps(
            (height, width) in (1usize..40, 1usize..40), (out_height, out_width) in (1usize..48, 1usize..48),
            u in [0.0f32..1.0, 0.0..1.0, 0.0..1.0], flip: bool, half_pixel: bool, float16: bool, seed: u64,
        ) {
            let precision = if float16 { PixelPrecision::Float16 } else { PixelPrecision::Float32 };
            let mut config = config_in(precision, out_height, out_width);
            if half_pixel {
                config.resize_rule = ResizeRule::HalfPixel;
            }
            let mut draws = Draws::new(seed, Purpose::Synthetic, 0, 0);
            let image = RgbImage::from_fn(width as u32, height as u32, |_, _| Rgb(std::array::from_fn(|_| draws.next_u32() as u8)));
            let placement = Placement::training(&config, height, width, u, flip);
            let mut out = vec![f32::NAN; out_height * out_width * 3];
            place_image(&config, &image, &placement, &mut out);
            prop_assert_eq!(out, place_image_plainly(&config, &image, &placement));
        }
    }
}
