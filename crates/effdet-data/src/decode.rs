//! Encoded images to RGB bytes, with limits before allocation.
//!
//! # Orientation
//! EXIF orientation is ignored unless asked for, as the reference does: annotations refer to the stored pixel grid.
//!
//! # Truncation
//! A JPEG that ends before its end-of-image marker is refused unless asked for, as the reference does: half of it would be grey
//! while its boxes speak of objects. Damage inside the scan cannot be told from image data and gives wrong pixels.

use std::io::{BufRead, Cursor, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{
    DynamicImage, GrayAlphaImage, GrayImage, ImageDecoder, ImageFormat, ImageReader, RgbImage, RgbaImage,
};

use crate::header::JpegSegments;

/// Largest encoded image in bytes that is read unless the caller sets another limit.
pub const MAX_ENCODED_BYTES: u64 = 256 << 20;

const START_OF_SCAN: u8 = 0xda;

/// What a decoder may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Largest number of pixels, checked from the header before anything is allocated.
    pub max_pixels: u64,
    /// Most scans of a progressive JPEG; encoders write about ten.
    pub max_scans: usize,
    /// Turn the image as its EXIF orientation says.
    pub apply_orientation: bool,
    /// Take what there is of a JPEG without its end.
    pub allow_truncated: bool,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        Self {
            max_pixels: 100_000_000,
            max_scans: 200,
            apply_orientation: false,
            allow_truncated: false,
        }
    }
}

/// Why bytes are no usable image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Neither JPEG nor PNG.
    #[error("neither JPEG nor PNG ({bytes} bytes): convert the file or remove it from the data set")]
    UnknownFormat {
        /// Length of the data.
        bytes: usize,
    },
    /// More pixels than allowed.
    #[error("{width}x{height} pixels exceed the limit of {limit}: resize the image or raise the limit")]
    TooManyPixels {
        /// Width by the header.
        width: u32,
        /// Height by the header.
        height: u32,
        /// The limit.
        limit: u64,
    },
    /// A progressive JPEG that would take very long.
    #[error("{scans} progressive scans exceed the limit of {limit}: save the image again")]
    TooManyScans {
        /// Scans in the file.
        scans: usize,
        /// The limit.
        limit: usize,
    },
    /// The file stops in the middle.
    #[error(
        "the JPEG ends after {bytes} bytes without its end marker: it was cut off, copy or download it again"
    )]
    Truncated {
        /// Length of the data.
        bytes: usize,
    },
    /// Broken data.
    #[error(
        "cannot be decoded ({reason}): the file is truncated or corrupt, replace it or remove it from the data set"
    )]
    Corrupt {
        /// What the decoder said.
        reason: String,
    },
}

/// What the header of an encoded image says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Stored width in pixels.
    pub width: u32,
    /// Stored height in pixels.
    pub height: u32,
    /// `jpeg` or `png`.
    pub format_name: &'static str,
}

/// Reads the header of a JPEG or PNG and nothing more.
///
/// # Errors
/// [`DecodeError`]; never panics on any input.
pub fn probe(bytes: &[u8]) -> Result<Probe, DecodeError> {
    probe_reader(Cursor::new(bytes)).map_err(|error| match error {
        DecodeError::UnknownFormat { .. } => DecodeError::UnknownFormat { bytes: bytes.len() },
        other => other,
    })
}

/// As [`probe`], reading no further than it needs.
///
/// # Errors
/// [`DecodeError`]; never panics on any input.
pub fn probe_reader(mut input: impl BufRead + Seek) -> Result<Probe, DecodeError> {
    let corrupt = |reason: String| DecodeError::Corrupt { reason };
    let head = input.fill_buf().map_err(|error| corrupt(error.to_string()))?;
    let bytes = head.len();
    let reader = ImageReader::new(input)
        .with_guessed_format()
        .map_err(|error| corrupt(error.to_string()))?;
    let format_name = match reader.format() {
        Some(ImageFormat::Jpeg) => "jpeg",
        Some(ImageFormat::Png) => "png",
        _ => return Err(DecodeError::UnknownFormat { bytes }),
    };
    let (width, height) = guarded(|| (reader.into_dimensions()).map_err(|error| corrupt(error.to_string())))?;
    Ok(Probe {
        width,
        height,
        format_name,
    })
}

/// Decodes a JPEG or PNG of any colour type to RGB.
///
/// Greyscale is repeated over the channels, CMYK converted, palettes expanded, 16 bits cut to 8, alpha dropped.
///
/// # Errors
/// [`DecodeError`]; never panics on any input.
pub fn decode_rgb(bytes: &[u8], options: &DecodeOptions) -> Result<RgbImage, DecodeError> {
    let corrupt = |error: image::ImageError| DecodeError::Corrupt {
        reason: error.to_string(),
    };
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|error| DecodeError::Corrupt {
            reason: error.to_string(),
        })?;
    let Some(format @ (ImageFormat::Jpeg | ImageFormat::Png)) = reader.format() else {
        return Err(DecodeError::UnknownFormat { bytes: bytes.len() });
    };
    if format == ImageFormat::Jpeg {
        let scans = progressive_scans(bytes);
        if scans > options.max_scans {
            return Err(DecodeError::TooManyScans {
                scans,
                limit: options.max_scans,
            });
        }
    }
    if let Some(bytes) = ragged_palette(bytes).filter(|_| format == ImageFormat::Png) {
        return Err(DecodeError::Corrupt {
            reason: format!("its palette of {bytes} bytes is no list of colours of 3 bytes"),
        });
    }
    if let Some([luma, chroma]) = coarse_first_component(bytes).filter(|_| format == ImageFormat::Jpeg) {
        return Err(DecodeError::Corrupt {
            reason: format!(
                "its frame samples a later component {}x{} times where it samples the first {}x{} times",
                chroma.0, chroma.1, luma.0, luma.1
            ),
        });
    }
    let mut limits = image::Limits::default();
    // A 16-bit RGBA image needs 8 bytes a pixel, and decoders need some room beside the pixels.
    limits.max_alloc = Some(options.max_pixels.saturating_mul(16).max(64 << 20));
    reader.limits(limits);
    let mut decoder = guarded(|| reader.into_decoder().map_err(corrupt))?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > options.max_pixels {
        return Err(DecodeError::TooManyPixels {
            width,
            height,
            limit: options.max_pixels,
        });
    }
    if format == ImageFormat::Jpeg && !options.allow_truncated && !has_end_of_image(bytes) {
        return Err(DecodeError::Truncated { bytes: bytes.len() });
    }
    let orientation = match options.apply_orientation {
        true => guarded(|| Ok(decoder.orientation().unwrap_or(Orientation::NoTransforms)))?,
        false => Orientation::NoTransforms,
    };
    let mut image = guarded(|| DynamicImage::from_decoder(decoder).map_err(corrupt))?;
    image.apply_orientation(orientation);
    Ok(to_rgb8(image))
}

/// Runs a decoder; one that panics, as decoders of others have done on damaged data, refuses its file.
fn guarded<T>(decode: impl FnOnce() -> Result<T, DecodeError>) -> Result<T, DecodeError> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|_| {
        Err(DecodeError::Corrupt {
            reason: "the decoder ran past its data".to_owned(),
        })
    })
}

/// Sampling, across and down, of the first component of a JPEG's frame and of a later one that it samples more often, which the decoder
/// has no room for.
fn coarse_first_component(bytes: &[u8]) -> Option<[(u8, u8); 2]> {
    let frames = [0xc0..=0xc3, 0xc5..=0xc7, 0xc9..=0xcb, 0xcd..=0xcf];
    let (_, frame) =
        JpegSegments::new(bytes).find(|(marker, _)| frames.iter().any(|range| range.contains(marker)))?;
    let sampling = |component: &[u8; 3]| (component[1] >> 4, component[1] & 15);
    let components = frame.get(6..)?.as_chunks::<3>().0;
    let first = sampling(components.first()?);
    let later =
        (components.iter().map(sampling)).find(|&(across, down)| across > first.0 || down > first.1)?;
    Some([first, later])
}

/// Length of a PNG's palette that ends within a colour, which the decoder would run past.
fn ragged_palette(bytes: &[u8]) -> Option<usize> {
    let mut rest = bytes.get(8..)?;
    loop {
        let len = u32::from_be_bytes(*rest.first_chunk::<4>()?) as usize;
        match rest.get(4..8)? {
            b"PLTE" if !len.is_multiple_of(3) => return Some(len),
            b"IDAT" => return None,
            _ => rest = rest.get(len.checked_add(12)?..)?,
        }
    }
}

/// RGB bytes; 16-bit samples keep their high byte, as libpng's `strip_16` does (the `image` crate would round).
fn to_rgb8(image: DynamicImage) -> RgbImage {
    let (width, height) = (image.width(), image.height());
    let high_bytes =
        |samples: Vec<u16>| -> Vec<u8> { samples.iter().map(|&sample| (sample >> 8) as u8).collect() };
    let cut = match image {
        DynamicImage::ImageLuma16(image) => {
            GrayImage::from_raw(width, height, high_bytes(image.into_raw())).map(DynamicImage::from)
        }
        DynamicImage::ImageLumaA16(image) => {
            GrayAlphaImage::from_raw(width, height, high_bytes(image.into_raw())).map(DynamicImage::from)
        }
        DynamicImage::ImageRgb16(image) => {
            RgbImage::from_raw(width, height, high_bytes(image.into_raw())).map(DynamicImage::from)
        }
        DynamicImage::ImageRgba16(image) => {
            RgbaImage::from_raw(width, height, high_bytes(image.into_raw())).map(DynamicImage::from)
        }
        eight_bit => Some(eight_bit),
    };
    cut.expect("as many bytes as there were samples").into_rgb8()
}

/// Whether a JPEG has an end-of-image marker behind the start of its first scan.
///
/// Segments before the scan are skipped by their lengths: an EXIF thumbnail has a marker of its own.
fn has_end_of_image(bytes: &[u8]) -> bool {
    let mut segments = JpegSegments::new(bytes);
    let has_scan = segments.any(|(marker, _)| marker == START_OF_SCAN);
    let scan = bytes.get(segments.position()..).unwrap_or_default();
    has_scan && scan.windows(2).rev().any(|pair| pair == [0xff, 0xd9])
}

/// Scans of a progressive JPEG; 1 for every other one.
///
/// Each of them makes a decoder go over the whole image again.
fn progressive_scans(bytes: &[u8]) -> usize {
    const PROGRESSIVE: [u8; 2] = [0xc2, 0xca];
    let mut segments = JpegSegments::new(bytes);
    if !segments.any(|(marker, _)| PROGRESSIVE.contains(&marker)) {
        return 1;
    }
    let rest = bytes.get(segments.position()..).unwrap_or_default();
    rest.windows(2)
        .filter(|pair| **pair == [0xff, START_OF_SCAN])
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ExtendedColorType, ImageEncoder, Luma, LumaA, Rgb, Rgba};
    use proptest::prelude::*;

    fn pattern() -> RgbImage {
        RgbImage::from_fn(37, 21, |x, y| Rgb([(7 * x) as u8, (11 * y) as u8, (x * y) as u8]))
    }

    fn png(width: u32, height: u32, color: ExtendedColorType, data: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        image::codecs::png::PngEncoder::new(&mut out)
            .write_image(data, width, height, color)
            .unwrap();
        out
    }

    fn jpeg(image: &RgbImage) -> Vec<u8> {
        let mut out = Vec::new();
        image::codecs::jpeg::JpegEncoder::new_with_quality(&mut out, 90)
            .encode_image(image)
            .unwrap();
        out
    }

    #[test]
    fn png_pixels_come_back_exactly() {
        let image = pattern();
        let bytes = png(37, 21, ExtendedColorType::Rgb8, image.as_raw());
        assert_eq!(decode_rgb(&bytes, &DecodeOptions::default()).unwrap(), image);
    }

    #[test]
    fn greyscale_is_repeated_and_alpha_dropped() {
        let grey = image::GrayImage::from_fn(5, 4, |x, y| Luma([(x * 40 + y) as u8]));
        let bytes = png(5, 4, ExtendedColorType::L8, grey.as_raw());
        let rgb = decode_rgb(&bytes, &DecodeOptions::default()).unwrap();
        assert_eq!(rgb.get_pixel(3, 2).0, [122; 3]);
        let alpha = image::GrayAlphaImage::from_fn(5, 4, |x, _| LumaA([(x * 40) as u8, 3]));
        let bytes = png(5, 4, ExtendedColorType::La8, alpha.as_raw());
        assert_eq!(
            decode_rgb(&bytes, &DecodeOptions::default())
                .unwrap()
                .get_pixel(2, 0)
                .0,
            [80; 3]
        );
        let rgba = image::RgbaImage::from_fn(5, 4, |x, _| Rgba([x as u8, 2, 3, 0]));
        let bytes = png(5, 4, ExtendedColorType::Rgba8, rgba.as_raw());
        assert_eq!(
            decode_rgb(&bytes, &DecodeOptions::default())
                .unwrap()
                .get_pixel(4, 0)
                .0,
            [4, 2, 3]
        );
    }

    #[test]
    fn sixteen_bits_keep_their_high_byte() {
        let samples = [0x1234u16, 0x12ff, 0xffff, 0x00fe];
        let data: Vec<u8> = samples.iter().flat_map(|v| v.to_ne_bytes()).collect();
        let decode =
            |width, color| decode_rgb(&png(width, 1, color, &data), &DecodeOptions::default()).unwrap();
        let grey = decode(4, ExtendedColorType::L16);
        assert_eq!(
            grey.as_raw()[..],
            [0x12, 0x12, 0x12, 0x12, 0x12, 0x12, 0xff, 0xff, 0xff, 0, 0, 0]
        );
        assert_eq!(
            decode(2, ExtendedColorType::La16).as_raw()[..],
            [0x12, 0x12, 0x12, 0xff, 0xff, 0xff]
        );
        assert_eq!(
            decode(1, ExtendedColorType::Rgba16).as_raw()[..],
            [0x12, 0x12, 0xff]
        );
    }

    #[test]
    fn every_truncation_is_an_error_and_never_a_panic() {
        let png = png(37, 21, ExtendedColorType::Rgb8, pattern().as_raw());
        for whole in [png, jpeg(&pattern()), oriented(&jpeg(&pattern()), 1)] {
            for len in (0..whole.len()).step_by(37) {
                let cut = &whole[..len];
                assert!(
                    decode_rgb(cut, &DecodeOptions::default()).is_err(),
                    "cut to {len} bytes"
                );
                let lenient = DecodeOptions {
                    allow_truncated: true,
                    ..DecodeOptions::default()
                };
                // Whatever comes of it, it is no panic.
                let _ = decode_rgb(cut, &lenient);
            }
            assert_eq!(
                decode_rgb(&whole, &DecodeOptions::default())
                    .unwrap()
                    .dimensions(),
                (37, 21)
            );
        }
    }

    #[test]
    fn half_a_jpeg_is_used_when_asked_for() {
        let whole = jpeg(&RgbImage::from_fn(64, 64, |x, y| {
            Rgb([(x * y) as u8, (3 * x) as u8, (5 * y) as u8])
        }));
        let cut = &whole[..whole.len() * 2 / 3];
        assert!(matches!(
            decode_rgb(cut, &DecodeOptions::default()),
            Err(DecodeError::Truncated { .. })
        ));
        let lenient = DecodeOptions {
            allow_truncated: true,
            ..DecodeOptions::default()
        };
        let (half, whole) = (
            decode_rgb(cut, &lenient).unwrap(),
            decode_rgb(&whole, &lenient).unwrap(),
        );
        assert_eq!(half.as_raw()[..8 * 64 * 3], whole.as_raw()[..8 * 64 * 3]);
    }

    #[test]
    fn the_pixel_limit_holds_before_allocation() {
        let options = DecodeOptions {
            max_pixels: 37 * 21 - 1,
            ..DecodeOptions::default()
        };
        assert!(matches!(
            decode_rgb(&jpeg(&pattern()), &options),
            Err(DecodeError::TooManyPixels { width: 37, .. })
        ));
    }

    #[test]
    fn ten_thousand_progressive_scans_are_refused_before_decoding() {
        let mut bomb = jpeg(&pattern());
        let frame = bomb.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
        bomb[frame + 1] = 0xc2;
        let scan = bomb.windows(2).position(|pair| pair == [0xff, 0xda]).unwrap();
        let scan = bomb[scan..bomb.len() - 2].to_vec();
        bomb.truncate(bomb.len() - 2);
        (0..10_000).for_each(|_| bomb.extend(&scan));
        bomb.extend([0xff, 0xd9]);
        let error = decode_rgb(&bomb, &DecodeOptions::default()).unwrap_err();
        assert!(
            matches!(
                error,
                DecodeError::TooManyScans {
                    scans: 10_001,
                    limit: 200
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn headers_that_claim_enormous_images_are_refused() {
        let mut bomb = jpeg(&pattern());
        let frame = bomb.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
        bomb[frame + 5..frame + 9].copy_from_slice(&[0xff, 0xdc, 0xff, 0xdc]);
        let error = decode_rgb(&bomb, &DecodeOptions::default()).unwrap_err();
        assert!(
            matches!(
                error,
                DecodeError::TooManyPixels {
                    width: 65500,
                    height: 65500,
                    ..
                }
            ),
            "{error}"
        );

        let mut bomb = png(37, 21, ExtendedColorType::Rgb8, pattern().as_raw());
        bomb[16..20].copy_from_slice(&0x7fff_ffff_u32.to_be_bytes());
        let checksum = crc32(&bomb[12..29]).to_be_bytes();
        bomb[29..33].copy_from_slice(&checksum);
        let error = decode_rgb(&bomb, &DecodeOptions::default()).unwrap_err();
        assert!(
            matches!(
                error,
                DecodeError::TooManyPixels { .. } | DecodeError::Corrupt { .. }
            ),
            "{error}"
        );
    }

    #[test]
    fn orientation_is_ignored_unless_asked_for() {
        let upright = decode_rgb(&jpeg(&pattern()), &DecodeOptions::default()).unwrap();
        let apply = DecodeOptions {
            apply_orientation: true,
            ..DecodeOptions::default()
        };
        for orientation in 1..=8 {
            let turned = oriented(&jpeg(&pattern()), orientation);
            assert_eq!(decode_rgb(&turned, &DecodeOptions::default()).unwrap(), upright);
            let applied = decode_rgb(&turned, &apply).unwrap();
            // By the EXIF standard: where the first row and first column of the stored grid are shown.
            let first_stored_pixel_is_at = match orientation {
                1 => (0, 0),
                2 => (36, 0),
                3 => (36, 20),
                4 => (0, 20),
                5 => (0, 0),
                6 => (20, 0),
                7 => (20, 36),
                _ => (0, 36),
            };
            let size = if orientation <= 4 { (37, 21) } else { (21, 37) };
            assert_eq!(applied.dimensions(), size, "orientation {orientation}");
            let (x, y) = first_stored_pixel_is_at;
            assert_eq!(
                applied.get_pixel(x, y),
                upright.get_pixel(0, 0),
                "orientation {orientation}"
            );
        }
    }

    #[test]
    fn adobe_cmyk_and_ycck_become_rgb() {
        // Adobe stores inks inverted, so R = C·K/255 of the stored values, and so on.
        let cmyk = four_component_jpeg(0, [200, 100, 50, 128]);
        let rgb = decode_rgb(&cmyk, &DecodeOptions::default()).unwrap();
        for (got, want) in rgb.get_pixel(0, 0).0.into_iter().zip([100, 50, 25]) {
            assert!(u8::abs_diff(got, want) <= 1, "{got} {want}");
        }
        // Y = 80 without chroma is R = G = B = 80, the inverse of the stored inks of 175.
        let ycck = four_component_jpeg(2, [80, 128, 128, 255]);
        let rgb = decode_rgb(&ycck, &DecodeOptions::default()).unwrap();
        for got in rgb.get_pixel(0, 0).0 {
            assert!(u8::abs_diff(got, 175) <= 1, "{got}");
        }
    }

    #[test]
    fn thin_images_decode() {
        for (width, height) in [(1, 1), (1, 10_000), (10_000, 1)] {
            let image = RgbImage::from_pixel(width, height, Rgb([200, 100, 50]));
            let decoded = decode_rgb(&jpeg(&image), &DecodeOptions::default()).unwrap();
            assert_eq!(decoded.dimensions(), (width, height));
            let pixel = decoded.get_pixel(width - 1, height - 1).0;
            assert!(
                pixel
                    .iter()
                    .zip([200, 100, 50])
                    .all(|(&a, b)| u8::abs_diff(a, b) < 4),
                "{pixel:?}"
            );
        }
    }

    /// The decoder has no room for such a frame.
    #[test]
    fn a_frame_that_samples_chroma_more_often_than_luma_is_refused() {
        let whole = include_bytes!("jpeg/fixtures/444.jpg");
        assert!(decode_rgb(whole, &DecodeOptions::default()).is_ok());
        let frame = whole.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
        for sampling in [0x21, 0x12, 0x23] {
            let mut bytes = whole.to_vec();
            // The third of the components, behind marker, length, depth, size and count.
            bytes[frame + 10 + 2 * 3 + 1] = sampling;
            let error = decode_rgb(&bytes, &DecodeOptions::default()).unwrap_err();
            assert!(error.to_string().contains("samples a later component"), "{error}");
        }
    }

    #[test]
    fn a_decoder_that_panics_refuses_its_file() {
        let error = guarded::<()>(|| panic!("as a decoder might")).unwrap_err();
        assert!(error.to_string().contains("ran past its data"), "{error}");
        assert!(matches!(guarded(|| Ok(1)), Ok(1)));
    }

    #[test]
    fn a_palette_that_ends_within_a_colour_is_refused() {
        let chunk = |kind: &[u8], data: &[u8]| {
            let mut chunk = (data.len() as u32).to_be_bytes().to_vec();
            let body = [kind, data].concat();
            chunk.extend(&body);
            chunk.extend(crc32(&body).to_be_bytes());
            chunk
        };
        let with_palette = |bytes: usize| {
            let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
            png.extend(chunk(b"IHDR", &[0, 0, 0, 8, 0, 0, 0, 1, 4, 3, 0, 0, 0]));
            png.extend(chunk(b"PLTE", &vec![7; bytes]));
            // One row of 8 pixels in 4 bytes behind its filter, stored in a zlib stream: all of them the last colour.
            let row = [0, 0xff, 0xff, 0xff, 0xff];
            let mut zlib = vec![0x78, 1, 1, 5, 0, 0xfa, 0xff];
            zlib.extend(row);
            zlib.extend([0x09, 0xfb, 0x03, 0xfd]);
            png.extend(chunk(b"IDAT", &zlib));
            png.extend(chunk(b"IEND", &[]));
            png
        };
        let whole = decode_rgb(&with_palette(48), &DecodeOptions::default()).unwrap();
        assert_eq!(whole.get_pixel(3, 0).0, [7; 3]);
        for bytes in [1, 47, 53] {
            let error = decode_rgb(&with_palette(bytes), &DecodeOptions::default()).unwrap_err();
            assert!(error.to_string().contains("palette of"), "{bytes}: {error}");
        }
    }

    #[test]
    fn other_formats_are_named_as_such() {
        for bytes in [
            &b""[..],
            b"hello",
            b"GIF89a....",
            b"BM........",
            b"RIFF....WEBPVP8 ",
        ] {
            let error = decode_rgb(bytes, &DecodeOptions::default()).unwrap_err();
            assert!(matches!(error, DecodeError::UnknownFormat { .. }), "{error}");
        }
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(at in prop::collection::vec((0.0..1.0_f64, any::<u8>()), 1..6), as_png: bool) {
            let mut bytes = match as_png {
                true => png(37, 21, ExtendedColorType::Rgb8, pattern().as_raw()),
                false => jpeg(&pattern()),
            };
            let len = bytes.len() as f64;
            for (place, value) in at {
                bytes[(place * len) as usize] = value;
            }
            let options = DecodeOptions {
                max_pixels: 1 << 20,
                allow_truncated: true,
                ..DecodeOptions::default()
            };
            let _ = decode_rgb(&bytes, &options);
        }
    }

    /// A JPEG with an EXIF segment that gives its orientation.
    fn oriented(jpeg: &[u8], orientation: u8) -> Vec<u8> {
        let mut exif = b"\xff\xe1\x00\x22Exif\0\0MM\x00\x2a\x00\x00\x00\x08\x00\x01".to_vec();
        exif.extend([0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, orientation, 0, 0, 0, 0, 0, 0]);
        [&jpeg[..2], &exif, &jpeg[2..]].concat()
    }

    /// An 8x8 JPEG of one colour in four components with an Adobe segment.
    fn four_component_jpeg(transform: u8, color: [u8; 4]) -> Vec<u8> {
        let mut out = vec![0xff, 0xd8];
        out.extend(b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0");
        out.push(transform);
        // Quantiser 8 for every coefficient, so that the DC coefficient is the sample less 128.
        out.extend([0xff, 0xdb, 0, 67, 0]);
        out.extend([8; 64]);
        out.extend([0xff, 0xc0, 0, 20, 8, 0, 8, 0, 8, 4]);
        (1..=4).for_each(|id| out.extend([id, 0x11, 0]));
        // DC: categories 0..=8 have the 4-bit codes of their numbers. AC: end of block is the 1-bit code 0.
        out.extend([
            0xff, 0xc4, 0, 28, 0x00, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ]);
        out.extend(0..=8);
        out.extend([
            0xff, 0xc4, 0, 20, 0x10, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ]);
        out.extend([0xff, 0xda, 0, 14, 4]);
        (1..=4).for_each(|id| out.extend([id, 0]));
        out.extend([0, 63, 0]);
        let (mut bits, mut count) = (0u64, 0);
        for sample in color {
            let dc = i64::from(sample) - 128;
            let category = 64 - dc.unsigned_abs().leading_zeros();
            let magnitude = if dc < 0 { dc - 1 } else { dc } as u64 & ((1 << category) - 1);
            bits = ((bits << 4 | u64::from(category)) << category | magnitude) << 1;
            count += 4 + category + 1;
        }
        let padding = (8 - count % 8) % 8;
        bits = bits << padding | ((1 << padding) - 1);
        let bytes = bits.to_be_bytes();
        for &byte in &bytes[8 - (count + padding) as usize / 8..] {
            out.push(byte);
            if byte == 0xff {
                out.push(0);
            }
        }
        out.extend([0xff, 0xd9]);
        out
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| {
                (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
            })
        })
    }
}
