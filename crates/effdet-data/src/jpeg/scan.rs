//! Entropy-coded data to planes of samples, of the blocks that are needed alone.

use std::ops::Range;

use super::header::{Component, Header, Tables, ZIGZAG};
use super::huffman::{Bits, END_OF_BLOCK, HuffmanTable, SPECIAL};
use super::idct::{EXACT_SUM, Packed, WRAPPING_SUM, flat_sample, idct, idct_plainly, packed_index};
use super::reduced::{reduced_idct, reduced_idct_plainly};

/// Entropy-coded data without stuffing and markers.
#[derive(Debug, Default)]
pub(super) struct Entropy {
    bytes: Vec<u8>,
    /// Ends of the restart intervals in `bytes`.
    ends: Vec<usize>,
}

impl Entropy {
    /// Takes the data of a scan; none unless it is restart intervals in order up to the end of the image.
    pub(super) fn read(&mut self, mut data: &[u8]) -> Option<()> {
        self.bytes.clear();
        self.ends.clear();
        self.bytes.reserve(data.len());
        loop {
            let at = memchr::memchr(0xff, data)?;
            let marker = *data.get(at + 1)?;
            match marker {
                0 => self.bytes.extend_from_slice(&data[..=at]),
                0xd9 => {
                    self.bytes.extend_from_slice(&data[..at]);
                    self.ends.push(self.bytes.len());
                    return Some(());
                }
                _ => {
                    self.bytes.extend_from_slice(&data[..at]);
                    if usize::from(marker) != 0xd0 + self.ends.len() % 8 {
                        return None;
                    }
                    self.ends.push(self.bytes.len());
                }
            }
            data = &data[at + 2..];
        }
    }

    fn intervals(&self) -> usize {
        self.ends.len()
    }

    fn interval(&self, index: usize) -> &[u8] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..self.ends[index]]
    }
}

/// Samples of one component: some of its blocks.
#[derive(Debug, Default)]
pub(super) struct Plane {
    pub(super) samples: Vec<u8>,
    /// Rows and columns of samples that a block has: 8, or 4, 2, 1 in reduced size.
    pub(super) side: usize,
    /// Columns of blocks that are held.
    pub(super) columns: Range<usize>,
    /// Rows of blocks that are held.
    pub(super) rows: Range<usize>,
    /// Columns and rows of blocks that there are.
    pub(super) size: (usize, usize),
}

impl Plane {
    /// Makes room for some of `size` blocks of `side` × `side` samples.
    pub(super) fn hold(
        &mut self,
        side: usize,
        size: (usize, usize),
        columns: Range<usize>,
        rows: Range<usize>,
    ) {
        self.samples.resize(columns.len() * rows.len() * side * side, 0);
        (self.side, self.size, self.columns, self.rows) = (side, size, columns, rows);
    }

    /// Samples of the whole plane: across, down.
    pub(super) fn extent(&self) -> (usize, usize) {
        (self.size.0 * self.side, self.size.1 * self.side)
    }

    /// First column of samples that is held.
    pub(super) fn first_column(&self) -> usize {
        self.columns.start * self.side
    }

    pub(super) fn stride(&self) -> usize {
        self.columns.len() * self.side
    }

    /// Row `y` of the whole plane: the samples that are held.
    pub(super) fn row(&self, y: usize) -> &[u8] {
        &self.samples[(y - self.rows.start * self.side) * self.stride()..][..self.stride()]
    }
}

/// Where the coefficients of a block go.
trait Sink {
    fn put(&mut self, position: usize, value: i32, quantizer: &[u8; 64]);
}

/// Coefficients for the vectors.
struct Narrow {
    block: Packed,
    sum: u32,
}

impl Sink for Narrow {
    #[inline(always)]
    fn put(&mut self, position: usize, value: i32, quantizer: &[u8; 64]) {
        const PLACES: [u8; 64] = {
            let mut places = [0; 64];
            let mut position = 0;
            while position < 64 {
                let natural = ZIGZAG[position] as usize;
                places[position] = packed_index(natural / 8, natural % 8) as u8;
                position += 1;
            }
            places
        };
        let value = value * i32::from(quantizer[position & 63]);
        self.sum += value.unsigned_abs();
        self.block[usize::from(PLACES[position & 63]) & 63] = value as i16;
    }
}

/// Coefficients by rows.
struct Wide([i32; 64]);

impl Sink for Wide {
    fn put(&mut self, position: usize, value: i32, quantizer: &[u8; 64]) {
        self.0[usize::from(ZIGZAG[position])] = value * i32::from(quantizer[position]);
    }
}

/// The coefficient of frequency 0 alone.
struct Mean(i32);

impl Sink for Mean {
    #[inline(always)]
    fn put(&mut self, position: usize, value: i32, quantizer: &[u8; 64]) {
        if position == 0 {
            self.0 = value * i32::from(quantizer[0]);
        }
    }
}

/// Nothing is kept.
struct Skip;

impl Sink for Skip {
    #[inline(always)]
    fn put(&mut self, _: usize, _: i32, _: &[u8; 64]) {}
}

/// Tables of one component at work, and its prediction.
struct Coder<'a> {
    quantizer: &'a [u8; 64],
    dc: &'a HuffmanTable,
    ac: &'a HuffmanTable,
    prediction: i32,
}

impl<'a> Coder<'a> {
    fn new(tables: &'a Tables, component: Component) -> Option<Self> {
        Some(Self {
            quantizer: tables.quantizers[component.quantizer].as_ref()?,
            dc: &tables.dc[component.dc_table],
            ac: &tables.ac[component.ac_table],
            prediction: 0,
        })
    }

    /// Reads one block; gives the position of its last coefficient in the stream's order.
    #[inline(always)]
    fn read<S: Sink>(&mut self, reader: &mut Bits<'_>, sink: &mut S) -> Option<usize> {
        // A copy stays in registers.
        let mut bits = *reader;
        let last = self.read_from(&mut bits, sink);
        *reader = bits;
        last
    }

    #[inline(always)]
    fn read_from<S: Sink>(&mut self, bits: &mut Bits<'_>, sink: &mut S) -> Option<usize> {
        bits.refill();
        let entry = self.dc.look(bits);
        let difference = if entry & SPECIAL == 0 {
            bits.consume_entry(entry);
            entry as i32 >> 16
        } else {
            self.dc.read_special(entry, bits, true)?.value
        };
        // Eleven bits a difference: it takes a million blocks to leave 32 bits.
        self.prediction = self.prediction.wrapping_add(difference);
        // Samples of 8 bits have coefficients of 12 at most.
        if self.prediction.unsigned_abs() > 0x8000 {
            return None;
        }
        sink.put(0, self.prediction, self.quantizer);
        let mut position = 0;
        loop {
            // The first code comes with the bits that the one before has left.
            for fresh in [false, true] {
                if fresh {
                    bits.refill();
                }
                let entry = self.ac.look(bits);
                let value = if entry & SPECIAL == 0 {
                    bits.consume_entry(entry);
                    position += (entry >> 8 & 31) as usize;
                    entry as i32 >> 16
                } else if entry & END_OF_BLOCK != 0 {
                    bits.consume(entry & 31);
                    return Some(position);
                } else {
                    let special = self.ac.read_special(entry, bits, false)?;
                    if special.go_on == 0 {
                        return Some(position);
                    }
                    position += special.go_on as usize;
                    special.value
                };
                if position > 63 {
                    return None;
                }
                sink.put(position, value, self.quantizer);
                if position == 63 {
                    return Some(63);
                }
            }
        }
    }

    /// Reads one block and transforms it to `SIDE` × `SIDE` samples.
    #[inline(never)]
    fn decode<const SIDE: usize>(
        &mut self,
        bits: &mut Bits<'_>,
        out: &mut [u8],
        stride: usize,
    ) -> Option<()> {
        if SIDE == 1 {
            let mut mean = Mean(0);
            self.read(bits, &mut mean)?;
            out[0] = flat_sample(mean.0);
            return Some(());
        }
        let before = (*bits, self.prediction);
        let mut narrow = Narrow {
            block: [0; 64],
            sum: 0,
        };
        let last = self.read(bits, &mut narrow)?;
        // No encoder makes such blocks of pixels; what they look like is for the full decoder to say.
        if narrow.sum > WRAPPING_SUM {
            return None;
        }
        if narrow.sum > EXACT_SUM {
            (*bits, self.prediction) = before;
            let mut wide = Wide([0; 64]);
            self.read(bits, &mut wide)?;
            match SIDE {
                8 => idct_plainly(&wide.0, out, stride),
                _ => reduced_idct_plainly(SIDE, &wide.0, out, stride),
            }
        } else if last == 0 {
            let sample = flat_sample(i32::from(narrow.block[0]));
            (0..SIDE).for_each(|row| out[row * stride..][..SIDE].fill(sample));
        } else {
            match SIDE {
                2 => reduced_idct::<2>(&narrow.block, out, stride),
                4 => reduced_idct::<4>(&narrow.block, out, stride),
                _ if last < 10 => idct::<true>(&narrow.block, out, stride),
                _ => idct::<false>(&narrow.block, out, stride),
            }
        }
        Some(())
    }

    #[inline(never)]
    fn skip(&mut self, bits: &mut Bits<'_>) -> Option<()> {
        self.read(bits, &mut Skip).map(|_| ())
    }
}

/// Decodes the blocks that the planes hold; none for data that is not exactly what the header announces.
///
/// Data behind the last of these blocks is not looked at.
pub(super) fn decode(
    header: &Header,
    tables: &Tables,
    entropy: &Entropy,
    planes: &mut [Plane; 3],
) -> Option<()> {
    let count = header.sampling.components();
    let (across, down) = header.sampling.luma_blocks();
    let units = (
        header.width.div_ceil(8 * across),
        header.height.div_ceil(8 * down),
    );
    let total = units.0 * units.1;
    let per_interval = match header.restart_interval {
        0 => total,
        interval => interval,
    };
    if entropy.intervals() != total.div_ceil(per_interval) {
        return None;
    }
    let coder = |index: usize| Coder::new(tables, header.components[index.min(count - 1)]);
    let mut coders = [coder(0)?, coder(1)?, coder(2)?];
    let coders = &mut coders[..count];
    let blocks = |index: usize| if index == 0 { (across, down) } else { (1, 1) };
    // Behind the last unit that a plane needs.
    let end = (0..count)
        .map(|index| {
            let (across, down) = blocks(index);
            let (rows, columns) = (
                planes[index].rows.end.div_ceil(down),
                planes[index].columns.end.div_ceil(across),
            );
            match rows {
                0 => 0,
                rows => (rows - 1) * units.0 + columns,
            }
        })
        .max()?;
    for (interval, first) in (0..end.min(total)).step_by(per_interval).enumerate() {
        let mut bits = Bits::new(entropy.interval(interval));
        coders.iter_mut().for_each(|coder| coder.prediction = 0);
        let behind = (first + per_interval).min(total);
        for unit in first..behind.min(end) {
            let (unit_row, unit_column) = (unit / units.0, unit % units.0);
            for (index, (coder, plane)) in coders.iter_mut().zip(planes.iter_mut()).enumerate() {
                let (across, down) = blocks(index);
                for row in unit_row * down..(unit_row + 1) * down {
                    for column in unit_column * across..(unit_column + 1) * across {
                        if plane.rows.contains(&row) && plane.columns.contains(&column) {
                            let (side, stride) = (plane.side, plane.stride());
                            let at = (row - plane.rows.start) * side * stride
                                + (column - plane.columns.start) * side;
                            let out = &mut plane.samples[at..];
                            match side {
                                8 => coder.decode::<8>(&mut bits, out, stride)?,
                                4 => coder.decode::<4>(&mut bits, out, stride)?,
                                2 => coder.decode::<2>(&mut bits, out, stride)?,
                                _ => coder.decode::<1>(&mut bits, out, stride)?,
                            }
                        } else {
                            coder.skip(&mut bits)?;
                        }
                    }
                }
            }
            if unit_column + 1 == units.0 && bits.left() < 0 {
                return None;
            }
        }
        // What is left of an interval fills its last byte.
        let left = bits.left();
        if left < 0 || left > 7 && behind <= end && behind < total {
            return None;
        }
    }
    Some(())
}
