//! Products in the order of AMX tiles on any instruction set: slower than the other products, and the reference of [`super::amx`].
//!
//! Of every [`BLOCK_LANES`] lanes of bfloat16 pairs the products of the lower halves are summed from 0 in ascending order, and so
//! are those of the upper halves; the two sums are added, and then added to what the element held. Each step is rounded once. So
//! does `tdpbf16ps`, which in addition takes what is below 2⁻¹²⁶ as 0.

use super::{Epilogue, Multiply, MultiplyTransposed, PANEL, padded};
use crate::simd::{Simd, dispatch};
use crate::storage::Stored;

/// Lanes whose products are summed apart from the rest.
pub(super) const BLOCK_LANES: usize = 16;

/// Rows of a tile here, few enough for two sums of each and its total to stay in 16 registers.
const ROWS: usize = 4;

/// Adds the products of `depth` lanes to R vectors: row i of the left operand starts at `a + i·a_row` and its lanes lie `a_lane`
/// apart; those of the right operand lie `b_lane` apart.
#[inline(always)]
unsafe fn accumulate<S: Simd, const R: usize>(
    tile: &mut [S::V; R],
    depth: usize,
    (a, a_row, a_lane): (*const f32, usize, usize),
    (b, b_lane): (*const f32, usize),
) {
    // SAFETY: the caller promises the operands.
    unsafe {
        for first in (0..depth).step_by(BLOCK_LANES) {
            let (mut low, mut high) = ([S::zero(); R], [S::zero(); R]);
            for lane in first..depth.min(first + BLOCK_LANES) {
                let vector = S::load(b.add(lane * b_lane));
                let (vector_low, vector_high) = (S::pair_low(vector), S::pair_high(vector));
                for i in 0..R {
                    let value = S::splat(*a.add(i * a_row + lane * a_lane));
                    low[i] = S::fma(S::pair_low(value), vector_low, low[i]);
                    high[i] = S::fma(S::pair_high(value), vector_high, high[i]);
                }
            }
            for i in 0..R {
                tile[i] = S::add(tile[i], S::add(low[i], high[i]));
            }
        }
    }
}

#[inline(always)]
unsafe fn product_rows<S: Simd, T: Stored, const R: usize>(args: &Multiply<T>, row: usize) {
    for column in (0..args.columns).step_by(S::LANES) {
        // SAFETY: the caller promises the operands; vectors are parts of panels.
        unsafe {
            let b = args.b.add(column / PANEL * args.b_panel_stride + column % PANEL);
            let a = args.a.add(row * args.a_stride);
            let mut tile = [S::zero(); R];
            accumulate::<S, R>(&mut tile, args.depth, (a, args.a_stride, 1), (b, PANEL));
            let tile = tile.map(|vector| [vector]);
            Epilogue::finish::<S, R, 1>(&args.epilogue, row, column, args.columns, tile);
        }
    }
}

#[inline(always)]
unsafe fn multiply_body<S: Simd, T: Stored>(args: &Multiply<T>) {
    let whole = args.rows / ROWS * ROWS;
    // SAFETY: the caller's promise.
    unsafe {
        for row in (0..whole).step_by(ROWS) {
            product_rows::<S, T, ROWS>(args, row);
        }
        for row in whole..args.rows {
            product_rows::<S, T, 1>(args, row);
        }
    }
}

dispatch! {
    /// As [`super::multiply`]; fetches nothing.
    ///
    /// # Safety
    /// As for [`super::multiply`].
    pub(super) unsafe fn multiply[T: Stored][T](args: &Multiply<T>) = multiply_body;
}

#[inline(always)]
unsafe fn transposed_rows<S: Simd, const R: usize>(args: &MultiplyTransposed, row: usize) {
    for column in (0..padded(args.columns)).step_by(S::LANES) {
        // SAFETY: the caller promises the operands, and Q and C up to whole panels.
        unsafe {
            let c = args.c.add(row * args.c_stride + column);
            let mut tile: [S::V; R] = std::array::from_fn(|i| match args.accumulate {
                true => S::load(c.add(i * args.c_stride)),
                false => S::zero(),
            });
            let (p, q) = (args.p.add(row), args.q.add(column));
            accumulate::<S, R>(&mut tile, args.depth, (p, 1, args.p_stride), (q, args.q_stride));
            for (i, vector) in tile.into_iter().enumerate() {
                S::store(c.add(i * args.c_stride), vector);
            }
        }
    }
}

#[inline(always)]
unsafe fn multiply_transposed_body<S: Simd>(args: &MultiplyTransposed) {
    let whole = args.rows / ROWS * ROWS;
    // SAFETY: the caller's promise.
    unsafe {
        for row in (0..whole).step_by(ROWS) {
            transposed_rows::<S, ROWS>(args, row);
        }
        for row in whole..args.rows {
            transposed_rows::<S, 1>(args, row);
        }
    }
}

dispatch! {
    /// As [`super::multiply_transposed`], where what C holds comes before all products; fetches nothing.
    ///
    /// # Safety
    /// As for [`super::multiply_transposed`].
    pub(super) unsafe fn multiply_transposed(args: &MultiplyTransposed) = multiply_transposed_body;
}
