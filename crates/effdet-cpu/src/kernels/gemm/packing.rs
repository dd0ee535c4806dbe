//! Matrices into the panels that products read as their right operand.

use super::{PANEL, pair};
use crate::simd::{Simd, dispatch_with_bf16};
use crate::storage::Products;

/// Lanes of a row that are scattered over a panel at a time: those of 16 rows stay in the L1 cache meanwhile.
const SCATTERED: usize = 64;

/// Packs row-major `matrix` (`rows` × `columns`) into panels: `[⌈columns/16⌉, rows, 16]`, the last one padded with zeros.
pub(crate) fn pack(matrix: &[f32], columns: usize, packed: &mut [f32]) {
    let rows = matrix.len() / columns;
    for (panel, out) in packed.chunks_exact_mut(rows * PANEL).enumerate() {
        for (row, out) in matrix.chunks_exact(columns).zip(out.as_chunks_mut::<PANEL>().0) {
            copy_columns(&row[panel * PANEL..], out);
        }
    }
}

/// Copies as many columns as a panel takes; zeros where there are fewer.
fn copy_columns(row: &[f32], out: &mut [f32; PANEL]) {
    match row.first_chunk() {
        Some(columns) => *out = *columns,
        None => {
            out[..row.len()].copy_from_slice(row);
            out[row.len()..].fill(0.0);
        }
    }
}

/// Packs the transpose of row-major `matrix` (`rows` × `columns`): panels over its rows, `[⌈rows/16⌉, columns, 16]`.
pub(crate) fn pack_transposed(matrix: &[f32], columns: usize, packed: &mut [f32]) {
    let panels = packed.chunks_exact_mut(PANEL * columns);
    for (rows, out) in matrix.chunks(PANEL * columns).zip(panels) {
        scatter(rows, columns, out);
    }
}

/// Turns up to 16 rows of `lanes` lanes into a panel `[lanes, 16]`; zeros in the place of missing rows.
fn scatter(rows: &[f32], lanes: usize, panel: &mut [f32]) {
    if rows.len() < PANEL * lanes {
        panel.fill(0.0);
    }
    for (first, out) in (0..).step_by(SCATTERED).zip(panel.chunks_mut(SCATTERED * PANEL)) {
        let out = out.as_chunks_mut::<PANEL>().0;
        for (column, row) in rows.chunks_exact(lanes).enumerate() {
            for (out, &lane) in out.iter_mut().zip(&row[first..]) {
                out[column] = lane;
            }
        }
    }
}

dispatch_with_bf16! {
    /// Packs row-major `matrix` into panels of pairs of rows: `[⌈columns/16⌉, ⌈rows/2⌉, 16]` lanes; an odd last row goes with zeros.
    ///
    /// # Safety
    /// `isa` must be available.
    pub(crate) unsafe fn pack_pairs(matrix: &[f32], columns: usize, packed: &mut [f32]) = pack_pairs_body;
}

#[inline(always)]
unsafe fn pack_pairs_body<S: Simd>(matrix: &[f32], columns: usize, packed: &mut [f32]) {
    let lanes = Products::Bf16Pairs.lanes(matrix.len() / columns);
    for (panel, out) in packed.chunks_exact_mut(lanes * PANEL).enumerate() {
        let first = panel * PANEL;
        for (rows, out) in matrix.chunks(2 * columns).zip(out.as_chunks_mut::<PANEL>().0) {
            let (low, high) = rows.split_at(columns);
            let (mut pairs, mut below) = ([0.0; PANEL], [0.0; PANEL]);
            copy_columns(&low[first..], &mut pairs);
            if let Some(high) = high.get(first..) {
                copy_columns(high, &mut below);
            }
            for at in (0..PANEL).step_by(S::LANES) {
                // SAFETY: whole vectors of a panel; the caller promises the instruction set.
                unsafe {
                    let pair = S::pair(S::load(pairs[at..].as_ptr()), S::load(below[at..].as_ptr()));
                    S::store(out[at..].as_mut_ptr(), pair);
                }
            }
        }
    }
}

dispatch_with_bf16! {
    /// Packs the transpose of row-major `matrix` (`rows` × `columns`) as [`pack_pairs`] does: `[⌈rows/16⌉, ⌈columns/2⌉, 16]`.
    ///
    /// # Safety
    /// `isa` must be available.
    pub(crate) unsafe fn pack_pairs_transposed(matrix: &[f32], columns: usize, packed: &mut [f32]) =
        pack_pairs_transposed_body;
}

#[inline(always)]
unsafe fn pack_pairs_transposed_body<S: Simd>(matrix: &[f32], columns: usize, packed: &mut [f32]) {
    let lanes = Products::Bf16Pairs.lanes(columns);
    let mut pairs = vec![0.0f32; PANEL * lanes];
    let panels = packed.chunks_exact_mut(PANEL * lanes);
    for (rows, out) in matrix.chunks(PANEL * columns).zip(panels) {
        let mut count = 0;
        for (row, pairs) in rows.chunks_exact(columns).zip(pairs.chunks_exact_mut(lanes)) {
            // Neighbouring columns make a lane, so whole vectors are halves in their order.
            let whole = columns / 16 * 16;
            for at in (0..whole).step_by(S::LANES) {
                // SAFETY: whole vectors of the row, and half as many lanes; the caller promises the instruction set.
                unsafe { S::store_bf16(pairs[at / 2..].as_mut_ptr().cast(), S::load(row[at..].as_ptr())) };
            }
            for (lane, values) in pairs[whole / 2..].iter_mut().zip(row[whole..].chunks(2)) {
                *lane = pair(values[0], values.get(1).copied().unwrap_or(0.0));
            }
            count += 1;
        }
        scatter(&pairs[..count * lanes], lanes, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::gemm::packed_len;
    use crate::simd::Isa;

    /// Value `(row, column)` of the panels of a matrix `[rows, _]`.
    fn at(packed: &[f32], rows: usize, (row, column): (usize, usize)) -> u32 {
        packed[(column / PANEL * rows + row) * PANEL + column % PANEL].to_bits()
    }

    #[test]
    fn panels_hold_every_value_at_its_place_and_zeros_beyond() {
        for (rows, columns) in [(1, 1), (2, 16), (37, 21), (48, 33), (5, 150), (70, 67)] {
            let matrix: Vec<f32> = (0..rows * columns).map(|i| (i as f32 + 0.3) / 7.0).collect();
            let value = |row: usize, column: usize| match row < rows && column < columns {
                true => matrix[row * columns + column],
                false => 0.0,
            };
            let packed = |lanes, columns, pack: &dyn Fn(&mut [f32])| {
                let mut packed = vec![f32::NAN; packed_len(lanes, columns)];
                pack(&mut packed);
                packed
            };
            let plain = packed(rows, columns, &|out| pack(&matrix, columns, out));
            let transposed = packed(columns, rows, &|out| pack_transposed(&matrix, columns, out));
            for row in 0..rows.next_multiple_of(PANEL) {
                for column in 0..columns.next_multiple_of(PANEL) {
                    let value = value(row, column).to_bits();
                    if row < rows {
                        assert_eq!(at(&plain, rows, (row, column)), value);
                    }
                    if column < columns {
                        assert_eq!(at(&transposed, columns, (column, row)), value);
                    }
                }
            }
            let [row_lanes, column_lanes] = [rows, columns].map(|n| Products::Bf16Pairs.lanes(n));
            for isa in Isa::available() {
                // SAFETY: the instruction set is available.
                let pairs = packed(row_lanes, columns, &|out| unsafe {
                    pack_pairs(isa, &matrix, columns, out)
                });
                // SAFETY: as above.
                let transposed = packed(column_lanes, rows, &|out| unsafe {
                    pack_pairs_transposed(isa, &matrix, columns, out)
                });
                for lane in 0..row_lanes {
                    for column in 0..columns.next_multiple_of(PANEL) {
                        let expected = pair(value(2 * lane, column), value(2 * lane + 1, column));
                        assert_eq!(at(&pairs, row_lanes, (lane, column)), expected.to_bits(), "{isa}");
                    }
                }
                for lane in 0..column_lanes {
                    for row in 0..rows.next_multiple_of(PANEL) {
                        let expected = pair(value(row, 2 * lane), value(row, 2 * lane + 1));
                        assert_eq!(
                            at(&transposed, column_lanes, (lane, row)),
                            expected.to_bits(),
                            "{isa}"
                        );
                    }
                }
            }
        }
    }
}
