//! Products of bfloat16 pairs on AMX tiles, with the bits of [`super::tile_order`].
//!
//! A tile holds 16 rows of 64 bytes. One instruction multiplies 16 rows of 16 lanes with 16 lanes of 16 columns, for which the
//! operands lie as they are packed for all products of pairs: left ones in rows, right ones in panels.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::tile_order::BLOCK_LANES;
use super::{LINE, Multiply, MultiplyTransposed, PANEL, Prefetch, TILE_ROWS};
use crate::simd::{Avx512Bf16, Simd, configure_tiles};
use crate::storage::Stored;

type S = Avx512Bf16;

/// Most tiles that are worked on at a time, one below the other.
const TILES: usize = 4;

/// Lanes of the rows that are turned at a time; a multiple of [`BLOCK_LANES`].
const TURNED_LANES: usize = 48;

/// Cache lines to fetch per tile of a product.
const LINES_PER_TILE: usize = 16;

/// Memory on cache lines, whatever it holds.
#[repr(C, align(64))]
struct Scratch<const N: usize>(MaybeUninit<[f32; N]>);

impl<const N: usize> Scratch<N> {
    const fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    const fn as_mut_ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Room for the sums of all tiles that are worked on at a time.
type Sums = Scratch<{ TILES * TILE_ROWS * PANEL }>;

/// Operands of up to [`TILES`] tiles of one product, one below the other; strides in bytes.
#[derive(Clone, Copy)]
struct Operands {
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    /// Whole blocks of lanes.
    blocks: usize,
    /// Whether lanes are left over.
    rest: bool,
    /// Bytes from every row of B to what is read next: it is brought to the innermost cache.
    b_ahead: usize,
}

/// Writes the function for some number of tiles. Registers: those named hold sums, 4 and 5 whole operands, 6 and 7 what is left
/// over.
macro_rules! tiles {
    ($name:ident, $($sum:tt)*) => {
        /// C = A·B, or C += A·B, where what C holds comes before all products.
        ///
        /// # Safety
        /// Tiles must be configured for the lanes left over; the operands and the rows of C must be valid for whole tiles.
        unsafe fn $name(args: Operands, c: *mut f32, c_stride: usize, accumulate: bool) {
            let Operands { a, a_stride, b, b_stride, blocks, rest, b_ahead } = args;
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    "test {flags:e}, 1",
                    "jz 20f",
                    "mov {at}, {c}",
                    $(
                        concat!("tileloadd ", $sum, ", [{at} + {c_stride}*1]"),
                        "add {at}, {c_tile}",
                    )*
                    "jmp 22f",
                    "20:",
                    $(concat!("tilezero ", $sum),)*
                    "22:",
                    "test {blocks}, {blocks}",
                    "jz 24f",
                    "23:",
                    "tileloadd tmm5, [{b} + {b_stride}*1]",
                    "lea {at}, [{b} + {b_ahead}]",
                    ".rept 15",
                    "prefetcht0 [{at}]",
                    "add {at}, {b_stride}",
                    ".endr",
                    "prefetcht0 [{at}]",
                    "mov {at}, {a}",
                    $(
                        "tileloadd tmm4, [{at} + {a_stride}*1]",
                        concat!("tdpbf16ps ", $sum, ", tmm4, tmm5"),
                        "add {at}, {a_tile}",
                    )*
                    "add {a}, 64",
                    "add {b}, {b_block}",
                    "dec {blocks}",
                    "jnz 23b",
                    "24:",
                    "test {flags:e}, 2",
                    "jz 25f",
                    "tileloadd tmm7, [{b} + {b_stride}*1]",
                    $(
                        "tileloadd tmm6, [{a} + {a_stride}*1]",
                        concat!("tdpbf16ps ", $sum, ", tmm6, tmm7"),
                        "add {a}, {a_tile}",
                    )*
                    "25:",
                    $(
                        concat!("tilestored [{c} + {c_stride}*1], ", $sum),
                        "add {c}, {c_tile}",
                    )*
                    a = inout(reg) a => _,
                    a_stride = in(reg) a_stride,
                    a_tile = in(reg) TILE_ROWS * a_stride,
                    b = inout(reg) b => _,
                    b_stride = in(reg) b_stride,
                    b_block = in(reg) BLOCK_LANES * b_stride,
                    b_ahead = in(reg) b_ahead,
                    c = inout(reg) c => _,
                    c_stride = in(reg) c_stride,
                    c_tile = in(reg) TILE_ROWS * c_stride,
                    at = out(reg) _,
                    blocks = inout(reg) blocks => _,
                    flags = in(reg) u32::from(accumulate) | u32::from(rest) << 1,
                    $(out($sum) _,)*
                    out("tmm4") _,
                    out("tmm5") _,
                    out("tmm6") _,
                    out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

tiles!(one_tile, "tmm0");
tiles!(two_tiles, "tmm0" "tmm1");
tiles!(three_tiles, "tmm0" "tmm1" "tmm2");
tiles!(four_tiles, "tmm0" "tmm1" "tmm2" "tmm3");

/// C = A·B, or C += A·B, in `tiles` tiles.
///
/// # Safety
/// As for the function of that number of tiles.
#[inline(always)]
unsafe fn product(tiles: usize, args: Operands, c: *mut f32, c_stride: usize, accumulate: bool) {
    let of_tiles = match tiles {
        1 => one_tile,
        2 => two_tiles,
        3 => three_tiles,
        _ => four_tiles,
    };
    // SAFETY: the caller's promise.
    unsafe { of_tiles(args, c, c_stride, accumulate) }
}

/// Cuts `rows` into groups of tiles of about equal size: the first row of each and its rows.
fn groups(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let tiles = rows.div_ceil(TILE_ROWS);
    let groups = tiles.div_ceil(TILES);
    (0..groups).map(move |group| {
        let [start, end] = [group, group + 1].map(|group| tiles * group / groups * TILE_ROWS);
        (start, end.min(rows) - start)
    })
}

/// Fetches some of what will be read soon.
///
/// # Safety
/// The processor must have AVX-512.
#[inline(always)]
unsafe fn fetch(ahead: &mut Prefetch, lines: usize) {
    // SAFETY: a prefetch never faults.
    unsafe {
        let (mut line, step) = ahead.take(lines, std::ptr::null());
        if step == 0 {
            return;
        }
        for _ in 0..lines {
            S::prefetch(line);
            line = line.wrapping_add(LINE);
        }
    }
}

/// As [`super::multiply`]; rows of A up to a whole number of tiles must be readable.
///
/// # Safety
/// As for [`super::multiply`], on a processor with tiles.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16")]
pub(super) unsafe fn multiply<T: Stored>(args: &Multiply<T>, ahead: &mut Prefetch) {
    let mut sums = Sums::new();
    let epilogue = &args.epilogue;
    let is_plain = !epilogue.accumulate && epilogue.bias.is_null() && epilogue.sums.is_null();
    let rest = args.depth % BLOCK_LANES;
    // SAFETY: the caller promises the operands; the sums hold the tiles of a group.
    unsafe {
        configure_tiles(rest);
        for column in (0..args.columns).step_by(PANEL) {
            for (row, rows) in groups(args.rows) {
                let tiles = rows.div_ceil(TILE_ROWS);
                fetch(ahead, tiles * LINES_PER_TILE);
                let operands = Operands {
                    a: args.a.add(row * args.a_stride),
                    a_stride: args.a_stride * size_of::<f32>(),
                    b: args.b.add(column / PANEL * args.b_panel_stride),
                    b_stride: PANEL * size_of::<f32>(),
                    blocks: args.depth / BLOCK_LANES,
                    rest: rest > 0,
                    b_ahead: BLOCK_LANES * PANEL * size_of::<f32>(),
                };
                let fits = rows % TILE_ROWS == 0 && column + PANEL <= args.columns;
                let target = epilogue.c.add(row * epilogue.c_stride + column);
                if let (true, Some(target)) = (is_plain && fits, T::as_f32(target)) {
                    product(
                        tiles,
                        operands,
                        target,
                        epilogue.c_stride * size_of::<f32>(),
                        false,
                    );
                    continue;
                }
                let sums = sums.as_mut_ptr();
                product(tiles, operands, sums, PANEL * size_of::<f32>(), false);
                let mut done = 0;
                while done + 8 <= rows {
                    finish::<T, 8>(args, sums, row, done, column);
                    done += 8;
                }
                while done < rows {
                    finish::<T, 1>(args, sums, row, done, column);
                    done += 1;
                }
            }
        }
    }
}

/// Does with R rows of sums what the epilogue says: those from `done` on, where the first of all belongs to `row`.
///
/// # Safety
/// As for [`multiply`]; the sums must hold so many rows.
#[inline(always)]
unsafe fn finish<T: Stored, const R: usize>(
    args: &Multiply<T>,
    sums: *const f32,
    row: usize,
    done: usize,
    column: usize,
) {
    // SAFETY: the caller promises these rows of sums and what the epilogue needs.
    unsafe {
        let tile = std::array::from_fn::<_, R, _>(|i| [S::load(sums.add((done + i) * PANEL))]);
        (args.epilogue).finish::<S, R, 1>(row + done, column, args.columns, tile);
    }
}

/// As [`super::multiply_transposed`]; P must be readable up to whole panels, too.
///
/// # Safety
/// As for [`super::multiply_transposed`], on a processor with tiles.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16")]
pub(super) unsafe fn multiply_transposed(args: &MultiplyTransposed, ahead: &mut Prefetch) {
    let mut turned = Scratch::<{ TILES * TILE_ROWS * TURNED_LANES }>::new();
    let turned = turned.as_mut_ptr();
    // SAFETY: the caller promises the operands; a group of rows of C with its lanes fits into what is turned.
    unsafe {
        for lane in (0..args.depth).step_by(TURNED_LANES) {
            let lanes = TURNED_LANES.min(args.depth - lane);
            let rest = lanes % BLOCK_LANES;
            configure_tiles(rest);
            let accumulate = args.accumulate || lane > 0;
            for (row, rows) in groups(args.rows) {
                let tiles = rows.div_ceil(TILE_ROWS);
                for tile in 0..tiles {
                    let p = args.p.add(lane * args.p_stride + row + tile * TILE_ROWS);
                    turn(
                        p,
                        args.p_stride,
                        lanes,
                        turned.add(tile * TILE_ROWS * TURNED_LANES),
                    );
                }
                for column in (0..args.columns).step_by(PANEL) {
                    fetch(ahead, tiles * LINES_PER_TILE);
                    let operands = Operands {
                        a: turned,
                        a_stride: TURNED_LANES * size_of::<f32>(),
                        b: args.q.add(lane * args.q_stride + column),
                        b_stride: args.q_stride * size_of::<f32>(),
                        blocks: lanes / BLOCK_LANES,
                        rest: rest > 0,
                        b_ahead: PANEL * size_of::<f32>(),
                    };
                    let c = args.c.add(row * args.c_stride + column);
                    let c_stride = args.c_stride * size_of::<f32>();
                    if rows % TILE_ROWS == 0 {
                        product(tiles, operands, c, c_stride, accumulate);
                    } else {
                        product_of_rows(operands, rows, c, args.c_stride, accumulate);
                    }
                }
            }
        }
    }
}

/// [`product`] of `rows` rows, no others of C being touched.
///
/// # Safety
/// As for [`product`], but that C need not be valid past these rows.
unsafe fn product_of_rows(args: Operands, rows: usize, c: *mut f32, c_stride: usize, accumulate: bool) {
    let mut sums = Sums::new();
    let sums = sums.as_mut_ptr();
    // SAFETY: the caller promises a panel of so many rows of C, at most as many as there are sums.
    unsafe {
        for row in (0..rows).filter(|_| accumulate) {
            sums.add(row * PANEL)
                .copy_from_nonoverlapping(c.add(row * c_stride), PANEL);
        }
        let tiles = rows.div_ceil(TILE_ROWS);
        product(tiles, args, sums, PANEL * size_of::<f32>(), accumulate);
        for row in 0..rows {
            c.add(row * c_stride)
                .copy_from_nonoverlapping(sums.add(row * PANEL), PANEL);
        }
    }
}

/// Makes `lanes` rows of 16 lanes to 16 rows of [`TURNED_LANES`] lanes.
///
/// # Safety
/// Both must be valid, and the processor have AVX-512.
#[inline(always)]
unsafe fn turn(from: *const f32, stride: usize, lanes: usize, to: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        for first in (0..lanes).step_by(16) {
            let rows: [__m512; 16] = std::array::from_fn(|i| match first + i < lanes {
                true => S::load(from.add((first + i) * stride)),
                false => S::zero(),
            });
            for (i, row) in transposed(rows).into_iter().enumerate() {
                S::store(to.add(i * TURNED_LANES + first), row);
            }
        }
    }
}

/// The transpose of 16 × 16 lanes.
#[inline(always)]
unsafe fn transposed(rows: [__m512; 16]) -> [__m512; 16] {
    // SAFETY: needs AVX-512 F only.
    unsafe {
        // Within quarters of 4 lanes: the transposes of 4 × 4.
        let mut quarters = [_mm512_setzero_ps(); 16];
        for i in (0..16).step_by(4) {
            let [a, b, c, d] = [rows[i], rows[i + 1], rows[i + 2], rows[i + 3]];
            let [low, high] =
                [_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)].map(|v| _mm512_castps_pd(v));
            let [low_next, high_next] =
                [_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)].map(|v| _mm512_castps_pd(v));
            quarters[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, low_next));
            quarters[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, low_next));
            quarters[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, high_next));
            quarters[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, high_next));
        }
        // Then the transpose of the 4 × 4 quarters.
        let mut out = [_mm512_setzero_ps(); 16];
        for i in 0..4 {
            let [a, b, c, d] = [quarters[i], quarters[i + 4], quarters[i + 8], quarters[i + 12]];
            let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
            let odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
            let even_next = _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d);
            let odd_next = _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d);
            out[i] = _mm512_shuffle_f32x4::<0b10_00_10_00>(even, even_next);
            out[i + 8] = _mm512_shuffle_f32x4::<0b11_01_11_01>(even, even_next);
            out[i + 4] = _mm512_shuffle_f32x4::<0b10_00_10_00>(odd, odd_next);
            out[i + 12] = _mm512_shuffle_f32x4::<0b11_01_11_01>(odd, odd_next);
        }
        out
    }
}
