//! Encoded images to RGB bytes, with limits before allocation.
//!
//! # Orientation
//! EXIF orientation is ignored unless asked for, as the reference does: annotations refer to the stored pixel grid.

use std::io::Cursor;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader, RgbImage};

/// What a decoder may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Largest number of pixels, checked from the header before anything is allocated.
    pub max_pixels: u64,
    /// Turn the image as its EXIF orientation says.
    pub apply_orientation: bool,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        Self {
            max_pixels: 100_000_000,
            apply_orientation: false,
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
    /// Broken data.
    #[error(
        "cannot be decoded ({reason}): the file is truncated or corrupt, replace it or remove it from the data set"
    )]
    Corrupt {
        /// What the decoder said.
        reason: String,
    },
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
    if reader.format().is_none() {
        return Err(DecodeError::UnknownFormat { bytes: bytes.len() });
    }
    let mut limits = image::Limits::default();
    // A 16-bit RGBA image needs 8 bytes a pixel, and decoders need some room beside the pixels.
    limits.max_alloc = Some(options.max_pixels.saturating_mul(16).max(64 << 20));
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(corrupt)?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > options.max_pixels {
        return Err(DecodeError::TooManyPixels {
            width,
            height,
            limit: options.max_pixels,
        });
    }
    let orientation = match options.apply_orientation {
        true => decoder.orientation().unwrap_or(Orientation::NoTransforms),
        false => Orientation::NoTransforms,
    };
    let mut image = DynamicImage::from_decoder(decoder).map_err(corrupt)?;
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ExtendedColorType, ImageEncoder, Luma, LumaA, Rgb, Rgba};

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

    fn jpeg() -> Vec<u8> {
        let mut out = Vec::new();
        image::codecs::jpeg::JpegEncoder::new_with_quality(&mut out, 90)
            .encode_image(&pattern())
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
    fn sixteen_bits_are_cut_to_eight() {
        let data: Vec<u8> = [0x1234u16, 0xffff].iter().flat_map(|v| v.to_ne_bytes()).collect();
        let rgb = decode_rgb(
            &png(2, 1, ExtendedColorType::L16, &data),
            &DecodeOptions::default(),
        )
        .unwrap();
        assert_eq!((rgb.get_pixel(0, 0).0[0], rgb.get_pixel(1, 0).0[0]), (0x12, 0xff));
    }

    #[test]
    fn every_truncation_is_an_error_or_an_image_and_never_a_panic() {
        let whole = png(37, 21, ExtendedColorType::Rgb8, pattern().as_raw());
        for len in (0..whole.len()).step_by(37) {
            assert!(
                decode_rgb(&whole[..len], &DecodeOptions::default()).is_err(),
                "PNG cut to {len} bytes"
            );
        }
        let whole = jpeg();
        for len in (0..whole.len()).step_by(37) {
            // A JPEG cut in its scan may decode to a partly grey image.
            let _ = decode_rgb(&whole[..len], &DecodeOptions::default());
        }
        assert_eq!(
            decode_rgb(&whole, &DecodeOptions::default())
                .unwrap()
                .dimensions(),
            (37, 21)
        );
    }

    #[test]
    fn the_pixel_limit_holds_before_allocation() {
        let options = DecodeOptions {
            max_pixels: 37 * 21 - 1,
            ..DecodeOptions::default()
        };
        assert!(matches!(
            decode_rgb(&jpeg(), &options),
            Err(DecodeError::TooManyPixels { width: 37, .. })
        ));
    }

    #[test]
    fn other_formats_are_named_as_such() {
        for bytes in [&b""[..], b"GIF89a....", b"hello"] {
            assert!(decode_rgb(bytes, &DecodeOptions::default()).is_err());
        }
    }
}
