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
//! In reduced size ([`Reduction`]), samples of a component are the means of those that they stand for, within one level where none
//! of them was clamped. Chroma of 4:2:0 then has the resolution of luma as it is stored, and is not interpolated.
//!
//! # Determinism
//! Integers throughout: the same pixels on every processor.

mod colour;
mod header;
mod huffman;
mod idct;
mod reduced;
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

/// How many pixels of an image, across and down, make one that is decoded: 1, 2, 4 or 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reduction(usize);

impl Reduction {
    /// All pixels.
    pub const NONE: Self = Self(1);
    /// Each, from the weakest to the strongest.
    pub const ALL: [Self; 4] = [Self::NONE, Self(2), Self(4), Self(8)];

    /// The strongest that leaves at least as many pixels as are wanted, in every direction of `(pixels, wanted)`.
    pub fn leaving(directions: [(usize, usize); 2]) -> Self {
        let fits = |reduction: &&Self| {
            directions
                .iter()
                .all(|&(pixels, wanted)| wanted * reduction.0 <= pixels)
        };
        *Self::ALL.iter().rev().find(fits).unwrap_or(&Self::NONE)
    }

    /// Pixels, across or down, that make one.
    pub fn factor(self) -> usize {
        self.0
    }

    /// What is left of `pixels`, across or down; the last may stand for fewer.
    pub fn of(self, pixels: usize) -> usize {
        pixels.div_ceil(self.0)
    }
}

/// A decoder whose memory serves one image after the other.
#[derive(Debug, Default)]
pub struct JpegDecoder {
    tables: Tables,
    header: Option<Header>,
    /// Of the planes that were decoded.
    sampling: Option<Sampling>,
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
        self.sampling = None;
        self.header = header::read(bytes, &mut self.tables);
        self.header.as_ref().map(|header| (header.width, header.height))
    }

    /// Decodes a rectangle, in pixels of the reduced size, of the image that was opened last, from the same bytes; none when
    /// [`crate::decode::decode_rgb`] has to judge the file.
    ///
    /// # Panics
    /// When the rectangle is empty or not inside the image.
    pub fn decode(&mut self, bytes: &[u8], region: &Region, reduction: Reduction) -> Option<()> {
        let header = self.header.as_ref()?;
        assert!(
            !region.x.is_empty()
                && region.x.end <= reduction.of(header.width)
                && !region.y.is_empty()
                && region.y.end <= reduction.of(header.height),
            "a rectangle of the image"
        );
        self.sampling = None;
        self.entropy.read(bytes.get(header.scan_start..)?)?;
        let (across, down) = header.sampling.luma_blocks();
        let units = (
            header.width.div_ceil(8 * across),
            header.height.div_ceil(8 * down),
        );
        let side = 8 / reduction.factor();
        // Chroma of 4:2:0 has the samples for half the size.
        let (sampling, chroma_side) = match header.sampling {
            Sampling::Half if reduction != Reduction::NONE => (Sampling::Full, 2 * side),
            sampling => (sampling, side),
        };
        let blocks = |samples: &Range<usize>, side: usize| samples.start / side..samples.end.div_ceil(side);
        let [luma, chroma @ ..] = &mut self.planes;
        luma.hold(
            side,
            (units.0 * across, units.1 * down),
            blocks(&region.x, side),
            blocks(&region.y, side),
        );
        if sampling != Sampling::Grey {
            // The filter looks at one neighbour on each side.
            let needed = |pixels: &Range<usize>, factor: usize, samples: usize| match factor {
                1 => pixels.clone(),
                _ => (pixels.start / 2).saturating_sub(1)..((pixels.end - 1) / 2 + 2).min(samples),
            };
            let (across, down) = sampling.luma_blocks();
            let columns = needed(&region.x, across, chroma_side * units.0);
            let rows = needed(&region.y, down, chroma_side * units.1);
            for plane in chroma {
                plane.hold(
                    chroma_side,
                    units,
                    blocks(&columns, chroma_side),
                    blocks(&rows, chroma_side),
                );
            }
        }
        scan::decode(header, &self.tables, &self.entropy, &mut self.planes)?;
        self.sampling = Some(sampling);
        Some(())
    }

    /// Pixels of a row inside the decoded rectangle, by colour.
    ///
    /// # Shapes
    /// `rgb`: for each colour as many bytes as there are `columns`.
    ///
    /// # Panics
    /// When the row or the columns were not decoded.
    pub fn row(&mut self, y: usize, columns: &Range<usize>, rgb: [&mut [u8]; 3]) {
        let sampling = self.sampling.expect("an image was decoded");
        let [luma, chroma @ ..] = &self.planes;
        let held = |plane: &Plane, columns: &Range<usize>| {
            let first = plane.first_column();
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
