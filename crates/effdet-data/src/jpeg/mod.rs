//! Baseline JPEG, of which only the rectangle that is needed becomes pixels.
//!
//! A crop is known before its image is decoded. Entropy-coded data has to be read from its start, but the transform, the
//! upsampling and the colours are done for the blocks of the crop alone, and reading ends behind its last block.
//!
//! # What is decoded
//! 8 bits, Huffman codes, one scan, grey or YCbCr in 4:4:4, 4:2:2 or 4:2:0, with or without restart markers. For everything else
//! and for every doubt about a file the answer is *none*, and the caller takes [`crate::decode::decode_rgb`], which judges it.
//!
//! # Pixels
//! Those of [`crate::decode::decode_rgb`] exactly: the same integer transform, triangle filter and colour conversion. Damage
//! behind the rectangle is not seen, as it does not change these pixels there either.
//!
//! # Determinism
//! Integers throughout: the same pixels on every processor.

mod colour;
mod header;
mod huffman;
mod idct;
mod scan;
#[cfg(test)]
mod tests;

use std::ops::Range;

use header::{Header, Sampling, Tables};
use scan::{Entropy, Plane};

/// A rectangle of pixels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Columns.
    pub x: Range<usize>,
    /// Rows.
    pub y: Range<usize>,
}

/// A decoder whose memory serves one image after the other.
#[derive(Debug, Default)]
pub struct JpegDecoder {
    tables: Tables,
    header: Option<Header>,
    entropy: Entropy,
    planes: [Plane; 3],
    /// Chroma of one row of pixels, before and after the horizontal filter.
    filtered: Vec<u8>,
    chroma: [Vec<u8>; 2],
}

impl JpegDecoder {
    /// Reads the header of a file; gives width and height of an image that [`Self::decode`] may take.
    ///
    /// Nothing is allocated.
    pub fn open(&mut self, bytes: &[u8]) -> Option<(usize, usize)> {
        self.header = header::read(bytes, &mut self.tables);
        self.header.as_ref().map(|header| (header.width, header.height))
    }

    /// Decodes a rectangle of the image that was opened last, from the same bytes; none when [`crate::decode::decode_rgb`] has to
    /// judge the file.
    ///
    /// # Panics
    /// When the rectangle is empty or not inside the image.
    pub fn decode(&mut self, bytes: &[u8], region: &Region) -> Option<()> {
        let header = self.header.as_ref()?;
        assert!(
            !region.x.is_empty()
                && region.x.end <= header.width
                && !region.y.is_empty()
                && region.y.end <= header.height,
            "a rectangle of the image"
        );
        self.entropy.read(bytes.get(header.scan_start..)?)?;
        let (across, down) = header.sampling.luma_blocks();
        let units = (
            header.width.div_ceil(8 * across),
            header.height.div_ceil(8 * down),
        );
        let blocks = |samples: &Range<usize>| samples.start / 8..samples.end.div_ceil(8);
        let [luma, chroma @ ..] = &mut self.planes;
        luma.hold(
            (units.0 * across, units.1 * down),
            blocks(&region.x),
            blocks(&region.y),
        );
        if header.sampling != Sampling::Grey {
            // The filter looks at one neighbour on each side.
            let needed = |pixels: &Range<usize>, factor: usize, blocks: usize| match factor {
                1 => pixels.clone(),
                _ => (pixels.start / 2).saturating_sub(1)..((pixels.end - 1) / 2 + 2).min(8 * blocks),
            };
            let columns = blocks(&needed(&region.x, across, units.0));
            let rows = blocks(&needed(&region.y, down, units.1));
            for plane in chroma {
                plane.hold(units, columns.clone(), rows.clone());
            }
        }
        scan::decode(header, &self.tables, &self.entropy, &mut self.planes)
    }

    /// Pixels of a row inside the decoded rectangle, by colour.
    ///
    /// # Shapes
    /// `rgb`: three times as many bytes as `columns`.
    ///
    /// # Panics
    /// When the row or the columns were not decoded.
    pub fn row(&mut self, y: usize, columns: &Range<usize>, rgb: [&mut [u8]; 3]) {
        let sampling = self.header.as_ref().expect("an image was decoded").sampling;
        let [luma, chroma @ ..] = &self.planes;
        let held = |plane: &Plane, columns: &Range<usize>| {
            let first = plane.columns.start * 8;
            columns.start - first..columns.end - first
        };
        let luma = &luma.row(y)[held(luma, columns)];
        if sampling == Sampling::Grey {
            return rgb.into_iter().for_each(|colour| colour.copy_from_slice(luma));
        }
        if sampling == Sampling::Full {
            let [blue, red] = chroma.each_ref().map(|plane| &plane.row(y)[held(plane, columns)]);
            return colour::to_rgb(luma, blue, red, rgb);
        }
        for (plane, row) in chroma.iter().zip(&mut self.chroma) {
            colour::upsample_row(
                plane,
                y,
                sampling == Sampling::Half,
                columns,
                &mut self.filtered,
                row,
            );
        }
        let [blue, red] = &self.chroma;
        let skipped = columns.start % 2;
        colour::to_rgb(luma, &blue[skipped..], &red[skipped..], rgb);
    }
}
