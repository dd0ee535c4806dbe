//! Resizing of the part of an image that a crop shows.

use std::ops::Range;

use effdet_model::hparams::{ImageSize, ResizeRule};
use image::RgbImage;
use wide::f32x4;

use crate::jpeg::{JpegDecoder, Reduction, Region};
use crate::preprocess::{PixelPrecision, Placement, PreprocessConfig, round_to_f16};

/// Pixels that come by rows.
pub trait PixelRows {
    /// Bytes of some columns of a row, by colour.
    ///
    /// # Shapes
    /// Each colour has as many bytes as there are `columns`.
    fn row(&mut self, y: usize, columns: &Range<usize>, rgb: [&mut [u8]; 3]);
}

impl PixelRows for &RgbImage {
    fn row(&mut self, y: usize, columns: &Range<usize>, [r, g, b]: [&mut [u8]; 3]) {
        let width = self.width() as usize;
        let pixels = &self.as_raw()[3 * (y * width + columns.start)..][..3 * columns.len()];
        for (((pixel, r), g), b) in pixels.as_chunks::<3>().0.iter().zip(r).zip(g).zip(b) {
            [*r, *g, *b] = *pixel;
        }
    }
}

impl PixelRows for JpegDecoder {
    fn row(&mut self, y: usize, columns: &Range<usize>, rgb: [&mut [u8]; 3]) {
        JpegDecoder::row(self, y, columns, rgb);
    }
}

/// Indices and weight of the two source samples of one output sample.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tap {
    pub(crate) low: usize,
    pub(crate) high: usize,
    pub(crate) weight: f32,
}

/// Samples of a source, across or down, and the pixels that they stand for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Axis {
    /// Pixels of the image.
    pixels: usize,
    /// Samples that there are.
    samples: usize,
    /// Pixels per sample.
    step: f32,
    /// Where sample 0 lies, in pixels.
    first: f32,
}

impl Axis {
    /// Every pixel is a sample.
    #[cfg(test)]
    pub(crate) fn whole(pixels: usize) -> Self {
        Self::reduced(pixels, Reduction::NONE, false)
    }

    /// Samples lie in the middle of their pixels; counted from the other end where the image is mirrored.
    fn reduced(pixels: usize, reduction: Reduction, mirrored: bool) -> Self {
        let (samples, factor) = (reduction.of(pixels), reduction.factor());
        // From the other end, the last sample comes first and may stand for fewer pixels.
        let missing = if mirrored { samples * factor - pixels } else { 0 };
        Self {
            pixels,
            samples,
            step: factor as f32,
            first: (factor - 1) as f32 / 2.0 - missing as f32,
        }
    }
}

/// Taps of output samples `first..first + count` when the pixels of `axis` are resized to `output`.
pub(crate) fn taps(
    rule: ResizeRule,
    axis: Axis,
    output: usize,
    first: usize,
    count: usize,
) -> impl Iterator<Item = Tap> {
    let scale = axis.pixels as f32 / output as f32;
    let last = axis.samples - 1;
    (first..first + count).map(move |i| {
        let pixel = match rule {
            ResizeRule::Legacy => i as f32 * scale,
            ResizeRule::HalfPixel => (i as f32 + 0.5) * scale - 0.5,
        };
        let source = (pixel - axis.first) / axis.step;
        let floor = source.floor();
        Tap {
            low: (floor.max(0.0) as usize).min(last),
            high: (source.ceil().max(0.0) as usize).min(last),
            weight: source - floor,
        }
    })
}

/// Places images one after the other: first [`Self::plan`], then [`Self::place`].
#[derive(Debug, Default)]
pub struct Placer {
    rows: Vec<Tap>,
    /// With indices into a line of the region.
    columns: Vec<Tap>,
    region: Option<Region>,
    /// Bytes of a source row by colour.
    bytes: Vec<u8>,
    /// The same, normalised, by pixel.
    normalized: Vec<f32>,
    /// Two source rows, interpolated across.
    lines: [Vec<f32>; 2],
}

impl Placer {
    /// Works out what an image of `width` × `height` pixels shows under `placement`: the pixels that [`Self::place`] will read, in the
    /// reduced size.
    ///
    /// # Panics
    /// When the image is empty.
    pub fn plan(
        &mut self,
        config: &PreprocessConfig,
        (width, height): (usize, usize),
        placement: &Placement,
        reduction: Reduction,
    ) -> &Region {
        assert!(width > 0 && height > 0, "an image has pixels");
        let out = config.image_size;
        let rows = out.height.min(placement.scaled_height - placement.offset_y);
        let columns = out.width.min(placement.scaled_width - placement.offset_x);
        let rule = config.resize_rule;
        let down = Axis::reduced(height, reduction, false);
        let across = Axis::reduced(width, reduction, placement.flip);
        self.rows.clear();
        self.rows.extend(taps(
            rule,
            down,
            placement.scaled_height,
            placement.offset_y,
            rows,
        ));
        self.columns.clear();
        self.columns.extend(taps(
            rule,
            across,
            placement.scaled_width,
            placement.offset_x,
            columns,
        ));
        if placement.flip {
            let last = across.samples - 1;
            for tap in &mut self.columns {
                (tap.low, tap.high) = (last - tap.low, last - tap.high);
            }
        }
        let reach = |taps: &[Tap]| {
            let ends = [taps[0], taps[taps.len() - 1]].map(|tap| [tap.low, tap.high]);
            let ends = ends.as_flattened();
            let low = ends.iter().copied().min().unwrap_or(0);
            low..ends.iter().copied().max().unwrap_or(0) + 1
        };
        let region = Region {
            x: reach(&self.columns),
            y: reach(&self.rows),
        };
        for tap in &mut self.columns {
            (tap.low, tap.high) = (tap.low - region.x.start, tap.high - region.x.start);
        }
        self.region.insert(region)
    }

    /// Normalises, flips, resizes, crops and pads in one pass over the output, as planned.
    ///
    /// Bilinear without antialiasing, horizontal interpolation first; the rest of the output is 0.
    ///
    /// # Shapes
    /// `out`: `[height, width, 3]` of `config.image_size`, overwritten.
    ///
    /// # Panics
    /// When `out` has another size, when nothing was planned or the source lacks what was.
    pub fn place(&mut self, config: &PreprocessConfig, source: &mut impl PixelRows, out: &mut [f32]) {
        let ImageSize { height, width } = config.image_size;
        assert_eq!(out.len(), height * width * 3, "one network input");
        let region = self.region.take().expect("a planned placement");
        let (rows, columns) = (self.rows.len(), self.columns.len());
        let span = region.x.len();
        self.bytes.resize(3 * span, 0);
        // Vectors of four take one value more than a pixel has.
        self.normalized.resize(3 * span + 1, 0.0);
        self.lines
            .iter_mut()
            .for_each(|line| line.resize(3 * columns + 1, 0.0));

        // The two source rows at hand; consecutive output rows mostly share them.
        let mut held = [usize::MAX; 2];
        for row in 0..rows {
            let tap = self.rows[row];
            if held[0] != tap.low && held[1] == tap.low {
                self.lines.swap(0, 1);
                held.swap(0, 1);
            }
            for (slot, y) in [tap.low, tap.high].into_iter().enumerate() {
                if held[slot] == y {
                    continue;
                }
                if held[0] == y && slot == 1 {
                    let (first, second) = self.lines.split_at_mut(1);
                    second[0].copy_from_slice(&first[0]);
                } else {
                    self.interpolate(config, source, y, &region.x, slot);
                }
                held[slot] = y;
            }
            let target = &mut out[row * width * 3..][..width * 3];
            let (inside, padding) = target.split_at_mut(columns * 3);
            for ((value, &top), &bottom) in inside.iter_mut().zip(&self.lines[0]).zip(&self.lines[1]) {
                *value = top + (bottom - top) * tap.weight;
            }
            if config.precision == PixelPrecision::Float16 {
                inside.iter_mut().for_each(|value| *value = round_to_f16(*value));
            }
            padding.fill(0.0);
        }
        out[rows * width * 3..].fill(0.0);
    }

    /// Interpolates a source row across into a line.
    fn interpolate(
        &mut self,
        config: &PreprocessConfig,
        source: &mut impl PixelRows,
        y: usize,
        columns: &Range<usize>,
        slot: usize,
    ) {
        let span = columns.len();
        let (r, rest) = self.bytes.split_at_mut(span);
        let (g, b) = rest.split_at_mut(span);
        source.row(y, columns, [&mut *r, &mut *g, &mut *b]);
        let [red, green, blue] = &config.lut;
        let (r, g, b) = (&*r, &*g, &*b);
        let line = &mut self.lines[slot];
        if span > 2 * self.columns.len() {
            // Few of the pixels are looked at.
            for (target, tap) in line.as_chunks_mut::<3>().0.iter_mut().zip(&self.columns) {
                let channels = [(red, r), (green, g), (blue, b)];
                for (target, (lut, bytes)) in target.iter_mut().zip(channels) {
                    let left = lut[usize::from(bytes[tap.low])];
                    let right = lut[usize::from(bytes[tap.high])];
                    *target = left + (right - left) * tap.weight;
                }
            }
            return;
        }
        let pixels = self.normalized.as_chunks_mut::<3>().0;
        for (((pixel, &r), &g), &b) in pixels.iter_mut().zip(r).zip(g).zip(b) {
            *pixel = [red[usize::from(r)], green[usize::from(g)], blue[usize::from(b)]];
        }
        let four = |at: usize| -> f32x4 {
            let values = self.normalized[3 * at..].first_chunk::<4>();
            f32x4::new(*values.expect("one value behind the last pixel"))
        };
        for (index, tap) in self.columns.iter().enumerate() {
            let (left, right) = (four(tap.low), four(tap.high));
            let value = left + (right - left) * f32x4::splat(tap.weight);
            // The fourth value is overwritten by the next pixel.
            line[3 * index..][..4].copy_from_slice(value.as_array());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use effdet_model::hparams::HParams;
    use image::{GrayImage, Luma};

    /// On a slope of 3/7 of a level per pixel, a shift by half a pixel would be one by a fifth of a level. The width leaves an
    /// incomplete last sample, which comes first where the image is mirrored.
    #[test]
    fn an_image_decoded_in_reduced_size_lies_where_the_whole_one_does() {
        let (width, height) = (203, 149);
        let slopes = GrayImage::from_fn(width, height, |x, y| Luma([((3 * x + 2 * y) / 7) as u8]));
        let mut jpeg = Vec::new();
        image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 100)
            .encode_image(&slopes)
            .unwrap();
        let mut hparams = HParams::preset("d0").unwrap();
        hparams.image_size = ImageSize::square(128);
        hparams.mean_rgb = [0.0; 3];
        hparams.stddev_rgb = [1.0; 3];
        hparams.profile = effdet_model::hparams::Profile::Google;
        let size = (width as usize, height as usize);
        let (mut decoder, mut placer) = (JpegDecoder::default(), Placer::default());
        let mut seen = [false; 9];
        for rule in [ResizeRule::Legacy, ResizeRule::HalfPixel] {
            hparams.resize_rule = rule;
            let config = PreprocessConfig::new(&hparams);
            for (jitter, flip) in [0.1f32, 0.15, 0.25, 0.37, 0.6]
                .into_iter()
                .flat_map(|jitter| [(jitter, false), (jitter, true)])
            {
                let u = (jitter - config.jitter_min) / (config.jitter_max - config.jitter_min);
                let placement = Placement::training(&config, size.1, size.0, [u, 0.0, 0.0], flip);
                let strongest = Reduction::leaving([
                    (size.0, placement.scaled_width),
                    (size.1, placement.scaled_height),
                ]);
                seen[strongest.factor()] = true;
                let mut place = |reduction| {
                    decoder.open(&jpeg).unwrap();
                    let region = placer.plan(&config, size, &placement, reduction);
                    decoder.decode(&jpeg, region, reduction).unwrap();
                    let mut out = vec![f32::NAN; 128 * 128 * 3];
                    placer.place(&config, &mut decoder, &mut out);
                    out
                };
                let (whole, reduced) = (place(Reduction::NONE), place(strongest));
                let reach = strongest.factor() * placement.scaled_width / size.0 + 1;
                let (rows, columns) = (placement.scaled_height.min(128), placement.scaled_width.min(128));
                let mut sum = 0.0;
                let mut count = 0;
                for y in reach..rows - reach {
                    for x in reach..columns - reach {
                        let at = (y * 128 + x) * 3;
                        let difference = reduced[at] - whole[at];
                        assert!(
                            difference.abs() < 1.6,
                            "{rule}, {jitter}, flip {flip}: {x}, {y}: {difference}"
                        );
                        sum += f64::from(difference);
                        count += 1;
                    }
                }
                // Bytes are rounded, so the mean shows a shift that single pixels hide.
                let mean = sum / f64::from(count);
                println!(
                    "{rule}, {jitter}, flip {flip}, by {}: mean difference {mean:.3}",
                    strongest.factor()
                );
                assert!(
                    mean.abs() < 0.1,
                    "{rule}, {jitter}, flip {flip}: mean difference {mean}"
                );
            }
        }
        assert!(
            seen[2] && seen[4],
            "the scales ask for several reductions: {seen:?}"
        );
    }
}
