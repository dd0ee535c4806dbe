//! Huffman tables that give run, value and length of most codes at one look, and the reader of bits.

/// Bits that one look into a table takes.
const LOOK_BITS: u32 = 11;

/// Entries whose code is not done with a look: see [`HuffmanTable::lookup`].
pub(super) const SPECIAL: u32 = 0xe0;
pub(super) const END_OF_BLOCK: u32 = 0x20;
const LONG_CODE: u32 = 0x40;
const MAGNITUDE: u32 = 0x80;

/// A code with its run and value.
#[derive(Debug, Clone, Copy)]
pub(super) struct HuffmanTable {
    /// By the next bits: length in bits 0–4, what is special about it in bits 5–7, coefficients to go on by in bits 8–12, value in
    /// bits 16–31; where the value does not fit the look ([`MAGNITUDE`]) its number of bits.
    lookup: [u32; 1 << LOOK_BITS],
    /// First code behind those of each length, left-aligned to 16 bits.
    limit: [u32; 17],
    /// Index of the symbol less the code, by length.
    offset: [i32; 17],
    symbols: [u8; 256],
    counts: [u8; 16],
    symbol_count: usize,
}

impl Default for HuffmanTable {
    fn default() -> Self {
        Self {
            lookup: [LONG_CODE; 1 << LOOK_BITS],
            limit: [0; 17],
            offset: [0; 17],
            symbols: [0; 256],
            counts: [0; 16],
            symbol_count: 0,
        }
    }
}

impl HuffmanTable {
    /// Makes the table of code counts by length; none when they are no prefix code or a symbol is none of baseline JPEG.
    pub(super) fn set(&mut self, counts: &[u8; 16], symbols: &[u8], is_dc: bool) -> Option<()> {
        // Most files have the tables of the standard's annex.
        if self.counts == *counts && self.symbols[..self.symbol_count] == *symbols {
            return Some(());
        }
        *self = Self::default();
        let built = self.build(counts, symbols, is_dc);
        if built.is_none() {
            *self = Self::default();
        }
        built
    }

    fn build(&mut self, counts: &[u8; 16], symbols: &[u8], is_dc: bool) -> Option<()> {
        self.symbols.get_mut(..symbols.len())?.copy_from_slice(symbols);
        let (mut code, mut index) = (0u32, 0usize);
        for length in 1..=16u32 {
            self.offset[length as usize] = index as i32 - code as i32;
            for _ in 0..counts[length as usize - 1] {
                let symbol = self.symbols[index];
                if is_dc && symbol > 11 {
                    return None;
                }
                // No code is all ones.
                if code + 1 >= 1 << length {
                    return None;
                }
                if length <= LOOK_BITS {
                    self.fill(code, length, symbol, is_dc);
                }
                code += 1;
                index += 1;
            }
            self.limit[length as usize] = code << (16 - length);
            code <<= 1;
        }
        (self.counts, self.symbol_count) = (*counts, symbols.len());
        Some(())
    }

    /// Fills the entries that begin with a code.
    fn fill(&mut self, code: u32, length: u32, symbol: u8, is_dc: bool) {
        let free = LOOK_BITS - length;
        let first = (code << free) as usize;
        let (go_on, size) = (u32::from(symbol >> 4) + 1, u32::from(symbol & 15));
        for (rest, entry) in self.lookup[first..first + (1 << free)].iter_mut().enumerate() {
            *entry = match (symbol, size) {
                (0, _) if !is_dc => END_OF_BLOCK | length,
                // A run of 16 zeros is a coefficient of 0 behind 15 of them.
                (0xf0, _) | (0, _) => go_on << 8 | length,
                (_, 0 | 11..) if !is_dc => LONG_CODE,
                _ if size <= free => {
                    let value = extend(rest as u32 >> (free - size), size);
                    (value as u32) << 16 | go_on << 8 | (length + size)
                }
                _ => MAGNITUDE | size << 16 | go_on << 8 | length,
            };
        }
    }

    /// Entry for the bits to come.
    #[inline(always)]
    pub(super) fn look(&self, bits: &Bits<'_>) -> u32 {
        self.lookup[(bits.buffer >> (64 - LOOK_BITS)) as usize]
    }

    /// Reads a code that [`SPECIAL`] marks, other than the end of a block that a look tells; none for a code that baseline JPEG
    /// lacks.
    #[inline(always)]
    pub(super) fn read_special(&self, entry: u32, bits: &mut Bits<'_>, is_dc: bool) -> Option<Special> {
        // The bits go by value, or they would live in memory.
        let special = self.special(entry, bits.buffer, is_dc)?;
        bits.consume(special.length);
        Some(special)
    }

    #[inline(never)]
    fn special(&self, entry: u32, buffer: u64, is_dc: bool) -> Option<Special> {
        let (length, go_on, size) = if entry & MAGNITUDE != 0 {
            (entry & 31, entry >> 8 & 31, entry >> 16)
        } else {
            let ahead = (buffer >> 48) as u32;
            let length = (1..=16).find(|&length| ahead < self.limit[length])?;
            let index = (ahead >> (16 - length)) as i32 + self.offset[length];
            let symbol = self.symbols[usize::try_from(index).ok()?];
            let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
            let go_on = match (run, size) {
                (0, 0) if !is_dc => 0,
                (1..15, 0) => return None,
                (_, 11..) if !is_dc => return None,
                _ => run + 1,
            };
            (length as u32, go_on, size)
        };
        // Two shifts, for none may be by 64.
        let bits = ((buffer << length) >> 1 >> (63 - size)) as u32;
        Some(Special {
            length: length + size,
            go_on,
            value: extend(bits, size),
        })
    }
}

/// A code that takes more than a look.
#[derive(Debug, Clone, Copy)]
pub(super) struct Special {
    /// Bits of code and value, at most 27.
    length: u32,
    /// Coefficients to go on by; 0 at the end of a block.
    pub(super) go_on: u32,
    pub(super) value: i32,
}

/// The value that `size` bits stand for (T.81, F.12).
#[inline(always)]
fn extend(bits: u32, size: u32) -> i32 {
    if size == 0 {
        return 0;
    }
    let value = bits as i32;
    if value < 1 << (size - 1) {
        value - (1 << size) + 1
    } else {
        value
    }
}

/// Reads bits of entropy-coded data without stuffing; zeros follow its end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bits<'a> {
    data: &'a [u8],
    /// Next byte to load.
    at: usize,
    /// Bits to come, the first one on top.
    buffer: u64,
    /// Valid bits of the buffer.
    count: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Self {
            data,
            at: 0,
            buffer: 0,
            count: 0,
        }
    }

    /// Makes 56 bits available: two codes with their values.
    #[inline(always)]
    pub(super) fn refill(&mut self) {
        let bytes = match self.data.get(self.at..).and_then(<[u8]>::first_chunk::<8>) {
            Some(bytes) => *bytes,
            None => self.last_bytes(),
        };
        self.buffer |= u64::from_be_bytes(bytes) >> self.count;
        self.at += ((63 - self.count) >> 3) as usize;
        self.count |= 56;
    }

    #[cold]
    fn last_bytes(&self) -> [u8; 8] {
        let rest = self.data.get(self.at..).unwrap_or_default();
        std::array::from_fn(|index| rest.get(index).copied().unwrap_or(0))
    }

    /// Goes on behind the code of an entry that is not [`SPECIAL`].
    #[inline(always)]
    pub(super) fn consume_entry(&mut self, entry: u32) {
        // Bit 5 is clear, and shifts take six bits as they are.
        self.buffer <<= entry & 63;
        self.count -= entry & 31;
    }

    #[inline(always)]
    pub(super) fn consume(&mut self, count: u32) {
        self.buffer <<= count;
        self.count -= count;
    }

    /// Bits left of the data; negative when more were read than there were.
    pub(super) fn left(&self) -> i64 {
        (self.data.len() as i64 - self.at as i64) * 8 + i64::from(self.count)
    }
}
