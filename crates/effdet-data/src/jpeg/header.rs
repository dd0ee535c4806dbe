//! Segments before the scan of a baseline JPEG.

use super::huffman::HuffmanTable;

/// Coefficient positions by their order in the stream (T.81, figure A.6).
pub(super) const ZIGZAG: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7,
    14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39,
    46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// How often the luma is sampled for one sample of the chroma.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sampling {
    /// Luma alone.
    Grey,
    /// 4:4:4.
    Full,
    /// 4:2:2, half as many columns.
    HalfColumns,
    /// 4:2:0, half as many columns and rows.
    Half,
}

impl Sampling {
    /// Number of components.
    pub(super) fn components(self) -> usize {
        if self == Self::Grey { 1 } else { 3 }
    }

    /// Luma blocks of one minimum coded unit: across, down.
    pub(super) fn luma_blocks(self) -> (usize, usize) {
        match self {
            Self::Grey | Self::Full => (1, 1),
            Self::HalfColumns => (2, 1),
            Self::Half => (2, 2),
        }
    }
}

/// What one component of the frame refers to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Component {
    pub(super) quantizer: usize,
    pub(super) dc_table: usize,
    pub(super) ac_table: usize,
}

/// Frame and scan of a baseline JPEG whose components come in one scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) sampling: Sampling,
    pub(super) components: [Component; 3],
    /// Minimum coded units between restart markers; 0 = none.
    pub(super) restart_interval: usize,
    /// First byte of entropy-coded data.
    pub(super) scan_start: usize,
}

/// Quantisers by number, in the order of the stream; Huffman tables by number.
#[derive(Debug, Default)]
pub(super) struct Tables {
    pub(super) quantizers: [Option<[u8; 64]>; 4],
    pub(super) dc: [HuffmanTable; 4],
    pub(super) ac: [HuffmanTable; 4],
}

/// Big-endian reader of one segment.
struct Segment<'a>(&'a [u8]);

impl<'a> Segment<'a> {
    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn word(&mut self) -> Option<usize> {
        self.take(2)
            .map(|bytes| usize::from(u16::from_be_bytes([bytes[0], bytes[1]])))
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }
}

/// What a start-of-frame segment says.
struct Frame {
    width: usize,
    height: usize,
    sampling: Sampling,
    ids: [u8; 3],
    quantizers: [usize; 3],
}

impl Frame {
    fn read(body: &mut Segment<'_>) -> Option<Self> {
        if body.byte()? != 8 {
            return None;
        }
        let (height, width) = (body.word()?, body.word()?);
        let count = usize::from(body.byte()?);
        let (mut ids, mut factors, mut quantizers) = ([0; 3], [0; 3], [0; 3]);
        if height == 0 || width == 0 || count > 3 || body.0.len() != 3 * count {
            return None;
        }
        for index in 0..count {
            ids[index] = body.byte()?;
            factors[index] = body.byte()?;
            quantizers[index] = usize::from(body.byte()?);
        }
        let sampling = match (count, factors) {
            (1, [0x11, ..]) => Sampling::Grey,
            (3, [0x11, 0x11, 0x11]) => Sampling::Full,
            (3, [0x21, 0x11, 0x11]) => Sampling::HalfColumns,
            (3, [0x22, 0x11, 0x11]) => Sampling::Half,
            _ => return None,
        };
        let distinct = count == 1 || (ids[0] != ids[1] && ids[0] != ids[2] && ids[1] != ids[2]);
        // Files without an Adobe segment tell RGB by the names of the components.
        (distinct && ids != *b"RGB").then_some(Self {
            width,
            height,
            sampling,
            ids,
            quantizers,
        })
    }
}

/// Reads up to the scan; none for every file that is not plain baseline JPEG from its first byte on.
pub(super) fn read(bytes: &[u8], tables: &mut Tables) -> Option<Header> {
    tables.quantizers = [None; 4];
    let (mut dc_seen, mut ac_seen) = ([false; 4], [false; 4]);
    let mut frame = None;
    let (mut restart_interval, mut adobe) = (0, false);
    let mut rest = Segment(bytes);
    if rest.take(2)? != [0xff, 0xd8] {
        return None;
    }
    loop {
        let &[0xff, marker] = rest.take(2)? else {
            return None;
        };
        let length = rest.word()?.checked_sub(2)?;
        let mut body = Segment(rest.take(length)?);
        match marker {
            0xdb => {
                while !body.0.is_empty() {
                    let number = usize::from(body.byte()?);
                    // 16-bit quantisers have 1 in the high half of the byte.
                    *tables.quantizers.get_mut(number)? = Some(body.take(64)?.try_into().ok()?);
                }
            }
            0xc4 => {
                while !body.0.is_empty() {
                    let (kind, number) = body.byte().map(|byte| (byte >> 4, usize::from(byte & 15)))?;
                    let counts: &[u8; 16] = body.take(16)?.try_into().ok()?;
                    let symbols = body.take(counts.iter().map(|&count| usize::from(count)).sum())?;
                    let (table, seen) = match kind {
                        0 => (tables.dc.get_mut(number)?, &mut dc_seen),
                        1 => (tables.ac.get_mut(number)?, &mut ac_seen),
                        _ => return None,
                    };
                    table.set(counts, symbols, kind == 0)?;
                    seen[number] = true;
                }
            }
            // Extended sequential with 8 bits is coded as baseline is.
            0xc0 | 0xc1 if frame.is_none() => frame = Some(Frame::read(&mut body)?),
            0xdd => {
                restart_interval = body.word()?;
                if !body.0.is_empty() {
                    return None;
                }
            }
            0xda => {
                let Frame {
                    width,
                    height,
                    sampling,
                    ids,
                    quantizers,
                } = frame?;
                let count = sampling.components();
                if adobe && count == 1 || usize::from(body.byte()?) != count {
                    return None;
                }
                let mut components = [Component::default(); 3];
                for (index, component) in components[..count].iter_mut().enumerate() {
                    let (id, numbers) = (body.byte()?, body.byte()?);
                    let (dc_table, ac_table) = (usize::from(numbers >> 4), usize::from(numbers & 15));
                    let quantizer = quantizers[index];
                    let defined = *dc_seen.get(dc_table)? && *ac_seen.get(ac_table)?;
                    if id != ids[index] || !defined || tables.quantizers.get(quantizer)?.is_none() {
                        return None;
                    }
                    *component = Component {
                        quantizer,
                        dc_table,
                        ac_table,
                    };
                }
                if body.0 != [0, 63, 0] {
                    return None;
                }
                return Some(Header {
                    width,
                    height,
                    sampling,
                    components,
                    restart_interval,
                    scan_start: bytes.len() - rest.0.len(),
                });
            }
            // Motion JPEG may leave its tables out.
            0xe0 if body.0.starts_with(b"AVI1") => return None,
            0xe1 if body.0.starts_with(b"http://ns.adobe.com/xmp/extension/") => return None,
            0xee if body.0.starts_with(b"Adobe") => {
                // Transform 1 is YCbCr.
                if body.0.get(11) != Some(&1) {
                    return None;
                }
                adobe = true;
            }
            0xe0..=0xef | 0xfe => {}
            _ => return None,
        }
    }
}
