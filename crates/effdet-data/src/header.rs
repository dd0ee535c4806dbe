//! What an image file says of itself before its pixels: colours, orientation, extension.

use std::io::Cursor;
use std::path::Path;

use image::metadata::Orientation;
use image::{ImageDecoder, ImageReader};
use serde::Serialize;

/// Colours of an encoded image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Colour {
    /// Three channels of 8 bits.
    Rgb,
    /// One channel.
    Grey,
    /// Four inks.
    Cmyk,
    /// Indices into a palette.
    Palette,
    /// Samples of 16 bits.
    SixteenBit,
    /// With an alpha channel, which is dropped.
    Alpha,
    /// Not known.
    Unknown,
}

/// The colours that the header of a JPEG or PNG announces.
pub fn colour(bytes: &[u8]) -> Colour {
    match bytes {
        [0x89, b'P', b'N', b'G', ..] => match (bytes.get(24), bytes.get(25)) {
            (Some(16), _) => Colour::SixteenBit,
            (_, Some(0)) => Colour::Grey,
            (_, Some(2)) => Colour::Rgb,
            (_, Some(3)) => Colour::Palette,
            (_, Some(4 | 6)) => Colour::Alpha,
            _ => Colour::Unknown,
        },
        [0xff, 0xd8, ..] => match jpeg_components(bytes) {
            Some(1) => Colour::Grey,
            Some(3) => Colour::Rgb,
            Some(4) => Colour::Cmyk,
            _ => Colour::Unknown,
        },
        _ => Colour::Unknown,
    }
}

/// Components of the frame of a JPEG.
fn jpeg_components(bytes: &[u8]) -> Option<u8> {
    for (marker, body) in JpegSegments::new(bytes) {
        // Start of frame of any kind; C4, C8 and CC are tables.
        if (0xc0..=0xcf).contains(&marker) && !matches!(marker, 0xc4 | 0xc8 | 0xcc) {
            return body.get(5).copied();
        }
    }
    None
}

/// Marker segments of a JPEG up to its first scan, that of the scan included.
pub(crate) struct JpegSegments<'a> {
    bytes: &'a [u8],
    at: usize,
    done: bool,
}

impl<'a> JpegSegments<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 2,
            done: false,
        }
    }

    /// First byte behind the segments so far.
    pub(crate) fn position(&self) -> usize {
        self.at
    }
}

impl<'a> Iterator for JpegSegments<'a> {
    /// Marker and what stands behind the length.
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        const START_OF_SCAN: u8 = 0xda;
        while !self.done {
            let &[first, marker] = self.bytes.get(self.at..)?.first_chunk()?;
            if first != 0xff || marker == 0xff {
                // Fill bytes and stray bytes between segments.
                self.at += 1;
                continue;
            }
            let &[_, _, high, low] = self.bytes.get(self.at..)?.first_chunk()?;
            let length = usize::from(u16::from_be_bytes([high, low])).max(2);
            let start = self.at + 4;
            self.at += 2 + length;
            self.done = marker == START_OF_SCAN;
            let body = self.bytes.get(start..self.at.min(self.bytes.len()));
            return Some((marker, body.unwrap_or_default()));
        }
        None
    }
}

/// EXIF orientation 1 to 8; 1 = as stored, also where there is none.
pub fn orientation(bytes: &[u8]) -> u8 {
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let decoder = reader.ok().and_then(|reader| reader.into_decoder().ok());
    let orientation = decoder.and_then(|mut decoder| decoder.orientation().ok());
    orientation.unwrap_or(Orientation::NoTransforms).to_exif()
}

/// Whether a file is called as its content is: `jpeg` is `.jpg` or `.jpeg`, `png` is `.png`.
pub fn extension_fits(name: &str, format_name: &str) -> bool {
    let extension = Path::new(name)
        .extension()
        .and_then(|extension| extension.to_str());
    match extension.map(str::to_ascii_lowercase).as_deref() {
        Some("jpg" | "jpeg") => format_name == "jpeg",
        Some("png") => format_name == "png",
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_told_by_the_header() {
        let png = |bits: u8, kind: u8| {
            let mut header = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\x01\0\0\0\x01".to_vec();
            header.extend([bits, kind, 0, 0, 0]);
            colour(&header)
        };
        assert_eq!(png(8, 2), Colour::Rgb);
        assert_eq!(png(8, 0), Colour::Grey);
        assert_eq!(png(8, 3), Colour::Palette);
        assert_eq!(png(8, 6), Colour::Alpha);
        assert_eq!(png(16, 2), Colour::SixteenBit);
        let jpeg = |components: u8| {
            let mut bytes = vec![
                0xff, 0xd8, 0xff, 0xe0, 0, 4, 1, 2, 0xff, 0xff, 0xc2, 0, 8, 8, 0, 1, 0, 1,
            ];
            bytes.push(components);
            colour(&bytes)
        };
        assert_eq!([1, 3, 4].map(jpeg), [Colour::Grey, Colour::Rgb, Colour::Cmyk]);
        for bytes in [
            &b""[..],
            b"GIF89a",
            &[0xff, 0xd8],
            &[0xff, 0xd8, 0xff, 0xc0, 0xff, 0xff],
        ] {
            assert_eq!(colour(bytes), Colour::Unknown);
        }
    }

    #[test]
    fn extensions_are_compared_without_regard_to_case() {
        assert!(extension_fits("a.JPG", "jpeg") && extension_fits("a", "png"));
        assert!(!extension_fits("a.png", "jpeg") && !extension_fits("a.jpeg", "png"));
    }
}
