//! Inverse cosine transforms of blocks: whole, and of their low frequencies alone.
//!
//! The arithmetic is that of the full decoder: 12-bit constants, two spare bits between the passes, exact integer sums. So every
//! order of operations gives its very pixels, as long as nothing leaves the 16 bits that vectors hold.
//!
//! Source: the integer transform of libjpeg and stb_image.

use bytemuck::cast;
use wide::{i16x8, i32x4, i32x8, u8x16};

/// Sum of the absolute coefficients up to which [`idct`] is exact: the first pass multiplies by less than 5.6.
pub(super) const EXACT_SUM: u32 = 5800;

/// Sum of the absolute coefficients up to which no sum of either pass leaves 32 bits: each coefficient counts 5683·5683/2¹⁰ times at most.
pub(super) const WRAPPING_SUM: u32 = 60_000;

/// Rounding of the first pass.
pub(super) const FIRST: i32 = 512;
/// Rounding of the second pass, with the level shift.
pub(super) const SECOND: i32 = 512 + 65536 + (128 << 17);

/// Places of rows and columns in [`Packed`]: 0 with 4, 2 with 6, 1 with 3, 5 with 7.
const PLACE: [usize; 8] = [0, 4, 2, 5, 1, 6, 3, 7];

/// Coefficients with rows paired as the transform multiplies them: `[pair of rows][column by PLACE][member of the pair]`.
pub(super) type Packed = [i16; 64];

/// Place in [`Packed`] of a coefficient by its row and column.
pub(super) const fn packed_index(row: usize, column: usize) -> usize {
    (PLACE[row] / 2) * 16 + PLACE[column] * 2 + PLACE[row] % 2
}

pub(super) const fn pair(a: i16, b: i16) -> i16x8 {
    i16x8::new([a, b, a, b, a, b, a, b])
}

/// One pass over four vectors of pairs (0,4), (2,6), (1,3), (5,7); with `SPARSE`, 4 to 7 are zero.
#[inline(always)]
fn pass<const SPARSE: bool, const SHIFT: i32>([a, b, c, d]: [i16x8; 4], rounding: i32) -> [i32x4; 8] {
    let rounding = i32x4::splat(rounding);
    let (t0, t1) = (
        a.dot(const { pair(4096, 4096) }) + rounding,
        a.dot(const { pair(4096, -4096) }) + rounding,
    );
    let (t3, t2) = (
        b.dot(const { pair(5352, 2217) }),
        b.dot(const { pair(2217, -5350) }),
    );
    let (x0, x3, x1, x2) = (t0 + t3, t0 - t3, t1 + t2, t1 - t2);
    let mut odd = [
        c.dot(const { pair(5683, 4816) }),
        c.dot(const { pair(4816, -1129) }),
        c.dot(const { pair(3219, -5681) }),
        c.dot(const { pair(1131, -3218) }),
    ];
    if !SPARSE {
        odd[0] += d.dot(const { pair(3219, 1131) });
        odd[1] += d.dot(const { pair(-5681, -3218) });
        odd[2] += d.dot(const { pair(1132, 4816) });
        odd[3] += d.dot(const { pair(4816, -5680) });
    }
    [
        (x0 + odd[0]) >> SHIFT,
        (x1 + odd[1]) >> SHIFT,
        (x2 + odd[2]) >> SHIFT,
        (x3 + odd[3]) >> SHIFT,
        (x3 - odd[3]) >> SHIFT,
        (x2 - odd[2]) >> SHIFT,
        (x1 - odd[1]) >> SHIFT,
        (x0 - odd[0]) >> SHIFT,
    ]
}

#[inline(always)]
pub(super) fn narrow(low: i32x4, high: i32x4) -> i16x8 {
    i16x8::from_i32x8_saturate(cast::<[i32x4; 2], i32x8>([low, high]))
}

/// The 64 samples of a block into the rows of `out`; with `SPARSE`, coefficients are zero from row and column 4 on.
///
/// # Panics
/// When `out` has no room for 8 rows.
#[inline(always)]
pub(super) fn idct<const SPARSE: bool>(block: &Packed, out: &mut [u8], stride: usize) {
    let parts: &[[i16; 8]] = block.as_chunks::<8>().0;
    let load =
        |half: usize| -> [i16x8; 4] { std::array::from_fn(|group| i16x8::new(parts[2 * group + half])) };
    let (left, right) = (
        pass::<SPARSE, 10>(load(0), FIRST),
        pass::<SPARSE, 10>(load(1), FIRST),
    );
    let rows: [i32x4; 8] = std::array::from_fn(|row| cast(narrow(left[row], right[row])));
    let top = i32x4::transpose([rows[0], rows[1], rows[2], rows[3]]);
    let bottom = i32x4::transpose([rows[4], rows[5], rows[6], rows[7]]);
    let (top, bottom) = (
        pass::<SPARSE, 17>(top.map(cast), SECOND),
        pass::<SPARSE, 17>(bottom.map(cast), SECOND),
    );
    // Columns by now: bytes of column x and x + 4, of all rows.
    let columns: [i16x8; 8] = std::array::from_fn(|column| narrow(top[column], bottom[column]));
    let [p0, p1, p2, p3]: [u8x16; 4] =
        std::array::from_fn(|column| u8x16::narrow_i16x8(columns[column], columns[column + 4]));
    let (low02, high46) = (u8x16::unpack_low(p0, p2), u8x16::unpack_high(p0, p2));
    let (low13, high57) = (u8x16::unpack_low(p1, p3), u8x16::unpack_high(p1, p3));
    let quarter = |v: u8x16| -> [[u8; 4]; 4] { cast(v) };
    let (left_top, left_bottom) = (
        quarter(u8x16::unpack_low(low02, low13)),
        quarter(u8x16::unpack_high(low02, low13)),
    );
    let (right_top, right_bottom) = (
        quarter(u8x16::unpack_low(high46, high57)),
        quarter(u8x16::unpack_high(high46, high57)),
    );
    let out = &mut out[..7 * stride + 8];
    for row in 0..4 {
        out[row * stride..][..4].copy_from_slice(&left_top[row]);
        out[row * stride + 4..][..4].copy_from_slice(&right_top[row]);
        out[(row + 4) * stride..][..4].copy_from_slice(&left_bottom[row]);
        out[(row + 4) * stride + 4..][..4].copy_from_slice(&right_bottom[row]);
    }
}

/// The sample of a block whose only coefficient is that of frequency 0.
pub(super) fn flat_sample(dc: i32) -> u8 {
    ((dc + 4 + 1024) >> 3).clamp(0, 255) as u8
}

/// [`idct`] step by step, of coefficients of any size by rows: for blocks beyond [`EXACT_SUM`], and what tests compare with.
pub(super) fn idct_plainly(block: &[i32; 64], out: &mut [u8], stride: usize) {
    let mut between = [0i32; 64];
    for column in 0..8 {
        let sums = pass_plainly(std::array::from_fn(|row| block[row * 8 + column]), FIRST);
        (0..8).for_each(|row| between[row * 8 + column] = sums[row] >> 10);
    }
    for row in 0..8 {
        let sums = pass_plainly(std::array::from_fn(|column| between[row * 8 + column]), SECOND);
        for column in 0..8 {
            out[row * stride + column] = (sums[column] >> 17).clamp(0, 255) as u8;
        }
    }
}

/// Weights of the frequencies in the upper four samples; in the lower four, mirrored, odd ones have the other sign.
pub(super) const WEIGHTS: [[i32; 8]; 4] = [
    [4096, 5683, 5352, 4816, 4096, 3219, 2217, 1131],
    [4096, 4816, 2217, -1129, -4096, -5681, -5350, -3218],
    [4096, 3219, -2217, -5681, -4096, 1132, 5350, 4816],
    [4096, 1131, -5352, -3218, 4096, 4816, -2217, -5680],
];

fn pass_plainly(input: [i32; 8], rounding: i32) -> [i32; 8] {
    std::array::from_fn(|index| {
        let mirrored = index >= 4;
        let weights = WEIGHTS[if mirrored { 7 - index } else { index }];
        (0..8).fold(rounding, |sum, k| {
            let weight = if mirrored && k % 2 == 1 {
                -weights[k]
            } else {
                weights[k]
            };
            sum.wrapping_add(input[k].wrapping_mul(weight))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn compare(coefficients: &[i32; 64], sparse: bool) {
        let mut packed: Packed = [0; 64];
        for (index, &value) in coefficients.iter().enumerate() {
            packed[packed_index(index / 8, index % 8)] = value as i16;
        }
        let (mut got, mut want) = ([0; 8 * 11], [0; 8 * 11]);
        match sparse {
            true => idct::<true>(&packed, &mut got, 11),
            false => idct::<false>(&packed, &mut got, 11),
        }
        idct_plainly(coefficients, &mut want, 11);
        assert_eq!(got, want);
        if coefficients[1..].iter().all(|&value| value == 0) {
            assert_eq!(got[0], flat_sample(coefficients[0]));
            assert_eq!(got[7 * 11 + 7], got[0]);
        }
    }

    #[test]
    fn a_constant_block_is_flat() {
        for dc in -1100..1100 {
            let mut block = [0; 64];
            block[0] = dc;
            compare(&block, false);
            compare(&block, true);
        }
    }

    #[test]
    fn a_single_large_coefficient_anywhere_is_transformed_exactly() {
        for index in 0..64 {
            for value in [-(EXACT_SUM as i32), -300, -1, 1, 300, EXACT_SUM as i32] {
                let mut block = [0; 64];
                block[index] = value;
                compare(&block, false);
            }
        }
    }

    proptest! {
        #[test]
        fn vectors_and_plain_steps_give_the_same_samples(
            values in prop::collection::vec(-90i32..=90, 64), column in prop::collection::vec(-725i32..=725, 8), at in 0usize..8,
        ) {
            compare(&values.clone().try_into().unwrap(), false);
            let sparse: [i32; 64] = std::array::from_fn(|i| if i / 8 < 4 && i % 8 < 4 { values[i] } else { 0 });
            compare(&sparse, true);
            let tall: [i32; 64] = std::array::from_fn(|i| if i % 8 == at { column[i / 8] } else { 0 });
            compare(&tall, false);
        }
    }
}
