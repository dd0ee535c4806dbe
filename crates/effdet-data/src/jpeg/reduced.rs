//! Inverse cosine transforms to fewer samples: each is the mean of those that it stands for.
//!
//! The mean of neighbouring samples of a cosine is a cosine of fewer samples, so the whole block is never formed. Weights are the
//! means of those of [`super::idct`], in the same fixed point; sums stay as small, so what is exact there is exact here.

use bytemuck::cast;
use wide::{i16x8, i32x4};

use super::idct::{FIRST, Packed, SECOND, WEIGHTS, idct_plainly, narrow, pair};

/// Weights of the upper half of `side` means; those of the lower half differ in the sign of odd frequencies.
const fn means(side: usize) -> [[i16; 8]; 2] {
    let count = 8 / side;
    let mut means = [[0; 8]; 2];
    let mut row = 0;
    while row < side / 2 {
        let mut frequency = 0;
        while frequency < 8 {
            let (mut sum, mut member) = (0, 0);
            while member < count {
                sum += WEIGHTS[row * count + member][frequency];
                member += 1;
            }
            means[row][frequency] = (sum / count as i32) as i16;
            frequency += 1;
        }
        row += 1;
    }
    means
}

/// One pass over four vectors of pairs (0,4), (2,6), (1,3), (5,7) to `SIDE` vectors; the rest are zero.
#[inline(always)]
fn pass<const SIDE: usize, const SHIFT: i32>([a, b, c, d]: [i16x8; 4], rounding: i32) -> [i32x4; 4] {
    let rounding = i32x4::splat(rounding);
    let mut out = [i32x4::ZERO; 4];
    for (row, weights) in const { means(SIDE) }.iter().enumerate().take(SIDE / 2) {
        let by = |vector: i16x8, one: usize, other: usize| vector.dot(pair(weights[one], weights[other]));
        let even = by(a, 0, 4) + by(b, 2, 6) + rounding;
        let odd = by(c, 1, 3) + by(d, 5, 7);
        out[row] = (even + odd) >> SHIFT;
        out[SIDE - 1 - row] = (even - odd) >> SHIFT;
    }
    out
}

/// `SIDE` × `SIDE` samples, 4 or 2, of a block into the rows of `out`.
///
/// # Panics
/// When `out` has no room for them.
#[inline(always)]
pub(super) fn reduced_idct<const SIDE: usize>(block: &Packed, out: &mut [u8], stride: usize) {
    let parts: &[[i16; 8]] = block.as_chunks::<8>().0;
    let load =
        |half: usize| -> [i16x8; 4] { std::array::from_fn(|group| i16x8::new(parts[2 * group + half])) };
    let (left, right) = (pass::<SIDE, 10>(load(0), FIRST), pass::<SIDE, 10>(load(1), FIRST));
    let rows: [i32x4; 4] = std::array::from_fn(|row| cast(narrow(left[row], right[row])));
    let columns = pass::<SIDE, 17>(i32x4::transpose(rows).map(cast), SECOND);
    for (row, samples) in i32x4::transpose(columns).iter().enumerate().take(SIDE) {
        let samples = samples.as_array().map(|sample| sample.clamp(0, 255) as u8);
        out[row * stride..][..SIDE].copy_from_slice(&samples[..SIDE]);
    }
}

/// [`reduced_idct`] by way of the whole block: for coefficients of any size, and what tests compare with.
pub(super) fn reduced_idct_plainly(side: usize, block: &[i32; 64], out: &mut [u8], stride: usize) {
    let mut whole = [0; 64];
    idct_plainly(block, &mut whole, 8);
    let count = 8 / side;
    for row in 0..side {
        for column in 0..side {
            let members = (0..count * count)
                .map(|member| whole[(row * count + member / count) * 8 + column * count + member % count]);
            let sum: usize = members.map(usize::from).sum();
            out[row * stride + column] = ((sum + count * count / 2) / (count * count)) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::idct::{flat_sample, packed_index};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Coefficients small enough that no sample leaves 0 … 255, where the mean of clamped samples is another one.
        #[test]
        fn reduced_samples_are_the_means_of_the_whole_block_within_one(
            values in prop::collection::vec(-9i32..=9, 64), dc in -300i32..=300,
        ) {
            let mut coefficients: [i32; 64] = values.try_into().unwrap();
            coefficients[0] = dc;
            let mut packed: Packed = [0; 64];
            for (index, &value) in coefficients.iter().enumerate() {
                packed[packed_index(index / 8, index % 8)] = value as i16;
            }
            for side in [4, 2, 1] {
                let (mut got, mut want) = ([0; 5 * 4], [0; 5 * 4]);
                match side {
                    4 => reduced_idct::<4>(&packed, &mut got, 5),
                    2 => reduced_idct::<2>(&packed, &mut got, 5),
                    _ => got[0] = flat_sample(dc),
                }
                reduced_idct_plainly(side, &coefficients, &mut want, 5);
                for (got, want) in got.iter().zip(want) {
                    prop_assert!(got.abs_diff(want) <= 1, "side {}: {:?} {:?}", side, got, want);
                }
            }
        }
    }
}
