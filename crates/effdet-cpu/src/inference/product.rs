//! Matrix products into line buffers and tensors.
//!
//! Every element is one chain of fused multiply-adds over ascending index that starts from the bias, whatever the tile, so the
//! tile shapes are free to differ between instruction sets.

use std::marker::PhantomData;

use crate::kernels::gemm::PANEL;
use crate::kernels::row_sweeps::{fetch_distance, load, store};
use crate::math::{Activation, activations};
use crate::simd::{Simd, dispatch};

/// Lines that the rows of a left operand may be put together from.
pub(super) const LINES: usize = 3;

/// A product `C = bias + A·B`.
///
/// A row of A is `depth` neighbouring values of each line one after the other: one line for a plain matrix, three for the
/// kernel rows of a 3×3 convolution.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    pub rows: usize,
    pub columns: usize,
    /// Values of a row in each line.
    pub depth: usize,
    /// First row of A in each line.
    pub lines: [*const f32; LINES],
    /// Lines in use.
    pub line_count: usize,
    /// Values from one row of A to the next.
    pub a_stride: usize,
    /// Values from what is read of A to what is worth prefetching.
    pub ahead: usize,
    /// B in panels of 16 columns.
    pub b: *const f32,
    /// Values from one panel to the next.
    pub b_panel_stride: usize,
    /// Readable up to whole panels.
    pub bias: *const f32,
}

impl Product {
    /// The product of a plain row-major matrix with packed weights.
    pub(super) fn plain(
        (rows, columns, depth): (usize, usize, usize),
        (a, a_stride): (*const f32, usize),
        b: *const f32,
        bias: *const f32,
    ) -> Self {
        Self {
            rows,
            columns,
            depth,
            lines: [a; LINES],
            line_count: 1,
            a_stride,
            ahead: fetch_distance(a_stride, depth),
            b,
            b_panel_stride: depth * PANEL,
            bias,
        }
    }
}

/// Where the elements of a product go.
///
/// # Safety
/// Implementations hold pointers; whoever makes one answers for these being valid for the product's rows and columns.
pub(super) trait Sink {
    /// What becomes of elements before they are stored.
    type Act: Activation;

    /// Has the cache lines of a row fetched that will be read and written from `column` on.
    unsafe fn fetch<S: Simd>(&self, row: usize, column: usize);

    /// Stores one activated vector of a row; its lanes reach past the columns unless `WHOLE`, and `lanes` are inside.
    unsafe fn put<S: Simd, const WHOLE: bool>(&self, row: usize, column: usize, lanes: usize, v: S::V);
}

/// `out = v (+ residual)`, row-major.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub out: *mut f32,
    /// Values from one row of `out` and `residual` to the next.
    pub stride: usize,
    /// 0 where null.
    pub residual: *const f32,
}

impl Sink for Rows {
    type Act = activations::Identity;

    #[inline(always)]
    unsafe fn fetch<S: Simd>(&self, row: usize, column: usize) {
        let at = row * self.stride + column;
        // SAFETY: the caller promises the instruction set; any address may be fetched.
        unsafe {
            S::prefetch(self.out.wrapping_add(at));
            if !self.residual.is_null() {
                S::prefetch(self.residual.wrapping_add(at));
            }
        }
    }

    #[inline(always)]
    unsafe fn put<S: Simd, const WHOLE: bool>(&self, row: usize, column: usize, lanes: usize, mut v: S::V) {
        let at = row * self.stride + column;
        // SAFETY: inside the rows and columns of the product.
        unsafe {
            if !self.residual.is_null() {
                v = S::add(v, load::<S, WHOLE>(self.residual.add(at), lanes));
            }
            store::<S, WHOLE>(self.out.add(at), v, lanes);
        }
    }
}

/// `out = act(v)` in the layout of line buffers, `[lane group][row][16]`; writable up to whole groups.
#[derive(Debug, Clone, Copy)]
pub(super) struct Line<A> {
    pub out: *mut f32,
    /// Values from one lane group to the next.
    pub group_stride: usize,
    pub act: PhantomData<A>,
}

impl<A: Activation> Sink for Line<A> {
    type Act = A;

    /// Line buffers stay in the caches.
    #[inline(always)]
    unsafe fn fetch<S: Simd>(&self, _row: usize, _column: usize) {}

    #[inline(always)]
    unsafe fn put<S: Simd, const WHOLE: bool>(&self, row: usize, column: usize, _lanes: usize, v: S::V) {
        let at = column / PANEL * self.group_stride + row * PANEL + column % PANEL;
        // SAFETY: inside the line.
        unsafe { S::store(self.out.add(at), v) }
    }
}

/// R rows and V vectors of the product.
#[inline(always)]
unsafe fn tile<S: Simd, K: Sink, const R: usize, const V: usize>(
    p: &Product,
    sink: &K,
    row: usize,
    column: usize,
) {
    // SAFETY: the caller of `multiply` promises the operands; panels are whole.
    unsafe {
        let mut sums = [[S::zero(); V]; R];
        for (j, bias) in (0..V).map(|j| (j, S::load(p.bias.add(column + j * S::LANES)))) {
            for sums in &mut sums {
                sums[j] = bias;
            }
        }
        let panel = |j: usize| {
            let column = column + j * S::LANES;
            column / PANEL * p.b_panel_stride + column % PANEL
        };
        let mut b: [*const f32; V] = std::array::from_fn(|j| p.b.add(panel(j)));
        for i in 0..R {
            for j in 0..V {
                sink.fetch::<S>(row + i, column + j * S::LANES);
            }
        }
        for line in p.lines.iter().take(p.line_count) {
            let mut a = line.add(row * p.a_stride);
            // As many lines of rows further on as this tile reads.
            let mut fetch = a.wrapping_add(p.ahead.max(R * p.a_stride));
            for _ in 0..p.depth {
                S::prefetch(fetch);
                fetch = fetch.wrapping_add(R);
                let mut vectors = [S::zero(); V];
                for (vector, b) in vectors.iter_mut().zip(&mut b) {
                    *vector = S::load(*b);
                    *b = b.add(PANEL);
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let value = S::splat(*a.add(i * p.a_stride));
                    for (sum, &vector) in sums.iter_mut().zip(&vectors) {
                        *sum = S::fma(value, vector, *sum);
                    }
                }
                a = a.add(1);
            }
        }
        let whole = column + V * S::LANES <= p.columns;
        for (i, sums) in sums.into_iter().enumerate() {
            for (j, v) in K::Act::values::<S, V>(sums).into_iter().enumerate() {
                let column = column + j * S::LANES;
                if whole {
                    sink.put::<S, true>(row + i, column, S::LANES, v);
                } else if column < p.columns {
                    let lanes = S::LANES.min(p.columns - column);
                    if lanes == S::LANES {
                        sink.put::<S, true>(row + i, column, lanes, v);
                    } else {
                        sink.put::<S, false>(row + i, column, lanes, v);
                    }
                }
            }
        }
    }
}

/// All rows of V vectors of columns, R at a time.
#[inline(always)]
unsafe fn column_tiles<S: Simd, K: Sink, const R: usize, const V: usize>(
    p: &Product,
    sink: &K,
    column: usize,
) {
    let mut row = 0;
    // SAFETY: tiles inside the operands the caller promises.
    unsafe {
        while row + R <= p.rows {
            tile::<S, K, R, V>(p, sink, row, column);
            row += R;
        }
        while row + 4 <= p.rows {
            tile::<S, K, 4, V>(p, sink, row, column);
            row += 4;
        }
        while row < p.rows {
            tile::<S, K, 1, V>(p, sink, row, column);
            row += 1;
        }
    }
}

/// The vectors that the tiles of some columns have.
#[derive(Clone, Copy)]
enum Width {
    Three,
    Two,
    One,
    ThreeHalves,
    Half,
}

impl Width {
    /// The widest that does not waste lanes where `left > 0` columns are left.
    #[inline(always)]
    fn of<S: Simd>(left: usize) -> Self {
        let (whole, half) = (S::LANES, S::Half::LANES);
        let has_half = half < whole;
        if S::REGISTERS < 32 {
            // Three vectors in four rows keep twelve chains going, which one vector at the end would not.
            return match left {
                _ if left <= whole => Self::One,
                _ if left > 2 * whole && left <= 3 * whole => Self::Three,
                _ => Self::Two,
            };
        }
        match left {
            _ if left >= 3 * whole => Self::Three,
            _ if has_half && left <= half => Self::Half,
            _ if left <= whole => Self::One,
            _ if has_half && left <= whole + half => Self::ThreeHalves,
            _ if left <= 2 * whole => Self::Two,
            _ if has_half && left <= 2 * whole + half => Self::One,
            _ => Self::Three,
        }
    }

    #[inline(always)]
    fn lanes<S: Simd>(self) -> usize {
        match self {
            Self::Three => 3 * S::LANES,
            Self::Two => 2 * S::LANES,
            Self::One => S::LANES,
            Self::ThreeHalves => 3 * S::Half::LANES,
            Self::Half => S::Half::LANES,
        }
    }
}

#[inline(always)]
unsafe fn multiply_body<S: Simd, K: Sink>(p: &Product, sink: &K) {
    let mut column = 0;
    while column < p.columns {
        let width = Width::of::<S>(p.columns - column);
        // SAFETY: tiles inside the operands the caller promises.
        unsafe {
            if S::REGISTERS < 32 {
                match width {
                    Width::Three => column_tiles::<S, K, 4, 3>(p, sink, column),
                    Width::Two => column_tiles::<S, K, 6, 2>(p, sink, column),
                    _ => column_tiles::<S, K, 12, 1>(p, sink, column),
                }
            } else {
                match width {
                    Width::Three => column_tiles::<S, K, 8, 3>(p, sink, column),
                    Width::Two => column_tiles::<S, K, 12, 2>(p, sink, column),
                    Width::One => column_tiles::<S, K, 12, 1>(p, sink, column),
                    Width::ThreeHalves => column_tiles::<S::Half, K, 8, 3>(p, sink, column),
                    Width::Half => column_tiles::<S::Half, K, 12, 1>(p, sink, column),
                }
            }
        }
        column += width.lanes::<S>();
    }
}

dispatch! {
    /// Computes a product.
    ///
    /// # Safety
    /// `isa` must be available; all pointers must be valid for what [`Product`] and the sink say.
    pub(super) unsafe fn multiply[K: Sink][K](p: &Product, sink: &K) = multiply_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::AlignedBuf;
    use crate::kernels::gemm;
    use crate::kernels::testing::{activation, assert_close, buffer, same_everywhere, values};
    use crate::math::{Act, activations};

    #[test]
    fn products_match_float64_and_themselves_everywhere() {
        let shapes = [
            (1, 1, 1),
            (7, 36, 5),
            (12, 48, 16),
            (29, 88, 33),
            (16, 40, 64),
            (9, 819, 8),
            (13, 24, 7),
        ];
        for (rows, columns, depth) in shapes {
            let stride = columns + 3;
            let (a, w) = (values(rows * depth, 1), values(depth * columns, 2));
            let mut bias = buffer(gemm::padded(columns), 3);
            bias[columns..].fill(0.0);
            let residual = values(rows * stride, 4);
            let mut b = AlignedBuf::zeroed(gemm::packed_len(depth, columns));
            gemm::pack(&w, columns, &mut b);
            let (out, line) = same_everywhere(|executor| {
                let p = Product::plain(
                    (rows, columns, depth),
                    (a.as_ptr(), depth),
                    b.as_ptr(),
                    bias.as_ptr(),
                );
                let mut out = vec![7.0; rows * stride];
                let mut line = vec![0.0; rows * gemm::padded(columns)];
                let to_rows = Rows {
                    out: out.as_mut_ptr(),
                    stride,
                    residual: residual.as_ptr(),
                };
                let to_line = Line::<activations::Swish> {
                    out: line.as_mut_ptr(),
                    group_stride: rows * PANEL,
                    act: PhantomData,
                };
                // SAFETY: all buffers have the sizes of the product.
                unsafe {
                    multiply(executor.isa(), &p, &to_rows);
                    multiply(executor.isa(), &p, &to_line);
                }
                (out, line)
            });
            for row in 0..rows {
                let z: Vec<f64> = (0..columns)
                    .map(|c| {
                        let terms =
                            (0..depth).map(|k| f64::from(a[row * depth + k]) * f64::from(w[k * columns + c]));
                        f64::from(bias[c]) + terms.sum::<f64>()
                    })
                    .collect();
                let expected: Vec<f64> = (z.iter().enumerate())
                    .map(|(c, &z)| z + f64::from(residual[row * stride + c]))
                    .collect();
                assert_close("out", &out[row * stride..][..columns], &expected, 2e-6);
                assert_eq!(
                    out[row * stride + columns..][..3],
                    [7.0; 3],
                    "nothing past the columns"
                );
                let of_line: Vec<f32> = (0..columns)
                    .map(|c| line[c / PANEL * rows * PANEL + row * PANEL + c % PANEL])
                    .collect();
                let expected: Vec<f64> = z.iter().map(|&z| activation(Act::Swish, z).0).collect();
                assert_close("line", &of_line, &expected, 2e-6);
            }
        }
    }
}
