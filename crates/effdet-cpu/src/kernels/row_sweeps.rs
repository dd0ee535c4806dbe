//! Elementwise passes over a block of rows, which surround the matrix products of a pointwise convolution.
//!
//! All of them go down the rows a few at a time and along the channels inside, so that tensors are read in long pieces and
//! the channels' vectors and sums are touched once per few rows. Sums run over ascending rows.

use std::marker::PhantomData;

use crate::math::Activation;
use crate::simd::{Simd, dispatch, dispatch_with_bf16};
use crate::storage::{Bf16, Stored};

/// Rows that share one load of the channels' vectors.
const ROWS: usize = 4;

/// Values from one row of a tensor to the same column of a later row, which a pass that reads `columns` of each row had better fetch
/// now: some thousand values of what it reads lie between, as long as main memory takes to answer.
///
/// Processors fetch ahead by themselves, but only to the end of a 4 KB page and of the columns that are read.
#[inline(always)]
pub(crate) const fn fetch_distance(stride: usize, columns: usize) -> usize {
    const VALUES: usize = 2048;
    stride * VALUES.div_ceil(columns)
}

/// One elementwise pass.
///
/// # Safety
/// Implementations hold pointers; whoever makes one answers for these being valid for its rows and columns.
pub(crate) trait Sweep {
    fn rows(&self) -> usize;
    fn columns(&self) -> usize;
    /// Works on one vector of R rows; its lanes reach past the columns unless `WHOLE`, and `lanes` are inside.
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        lanes: usize,
    );
}

#[inline(always)]
unsafe fn sweep_rows<S: Simd, T: Sweep, const R: usize>(pass: &T, row: usize) {
    let columns = pass.columns();
    let mut column = 0;
    // SAFETY: inside the rows and columns of the pass.
    unsafe {
        while column + S::LANES <= columns {
            pass.vector::<S, R, true>(row, column, S::LANES);
            column += S::LANES;
        }
        if column < columns {
            pass.vector::<S, R, false>(row, column, columns - column);
        }
    }
}

#[inline(always)]
unsafe fn sweep_body<S: Simd, T: Sweep>(pass: &T) {
    let mut row = 0;
    // SAFETY: inside the rows of the pass.
    unsafe {
        while row + ROWS <= pass.rows() {
            sweep_rows::<S, T, ROWS>(pass, row);
            row += ROWS;
        }
        while row < pass.rows() {
            sweep_rows::<S, T, 1>(pass, row);
            row += 1;
        }
    }
}

dispatch_with_bf16! {
    /// Runs a pass.
    ///
    /// # Safety
    /// `isa` must be available and the pointers of `pass` valid.
    pub(crate) unsafe fn sweep[T: Sweep][T](pass: &T) = sweep_body;
}

#[inline(always)]
pub(crate) unsafe fn load<S: Simd, const WHOLE: bool>(source: *const impl Stored, lanes: usize) -> S::V {
    // SAFETY: the caller promises `lanes` values, all of them if WHOLE.
    unsafe { load_of::<S, WHOLE, _>(source, lanes) }
}

#[inline(always)]
unsafe fn load_of<S: Simd, const WHOLE: bool, T: Stored>(source: *const T, lanes: usize) -> S::V {
    // SAFETY: as in `load`.
    unsafe {
        if WHOLE {
            T::load::<S>(source)
        } else {
            T::load_partial::<S>(source, lanes)
        }
    }
}

#[inline(always)]
pub(crate) unsafe fn store<S: Simd, const WHOLE: bool>(target: *mut impl Stored, v: S::V, lanes: usize) {
    // SAFETY: as in `load`.
    unsafe { store_of::<S, WHOLE, _>(target, v, lanes) }
}

#[inline(always)]
unsafe fn store_of<S: Simd, const WHOLE: bool, T: Stored>(target: *mut T, v: S::V, lanes: usize) {
    // SAFETY: as in `load`.
    unsafe {
        if WHOLE {
            T::store::<S>(target, v)
        } else {
            T::store_partial::<S>(target, v, lanes)
        }
    }
}

/// Where a pass leaves the operand of a product that it forms.
///
/// # Safety
/// As for [`Sweep`]; whole vectors are written, so the targets must reach up to these.
pub(crate) trait Sink: Copy {
    /// Takes vectors of R rows. A pass gives an even number of rows at a time, all rows in order, or one of them.
    unsafe fn put<S: Simd, const R: usize>(self, row: usize, column: usize, values: [S::V; R]);
}

/// Row-major values.
pub(crate) struct Rows<T> {
    pub out: *mut T,
    /// Values from one row to the next.
    pub stride: usize,
}

impl<T> Clone for Rows<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Rows<T> {}

impl<T: Stored> Sink for Rows<T> {
    #[inline(always)]
    unsafe fn put<S: Simd, const R: usize>(self, row: usize, column: usize, values: [S::V; R]) {
        for (i, value) in values.into_iter().enumerate() {
            // SAFETY: the promise of whoever made this.
            unsafe { T::store::<S>(self.out.add((row + i) * self.stride + column), value) };
        }
    }
}

/// Lanes of bfloat16 from one row and the next; an odd last row goes with zeros.
#[derive(Clone, Copy)]
pub(crate) struct RowPairs {
    pub out: *mut f32,
    /// Lanes from one pair of rows to the next.
    pub stride: usize,
}

impl Sink for RowPairs {
    #[inline(always)]
    unsafe fn put<S: Simd, const R: usize>(self, row: usize, column: usize, values: [S::V; R]) {
        let first = self.out.wrapping_add(row / 2 * self.stride + column);
        // SAFETY: the promise of whoever made this.
        unsafe {
            if R == 1 {
                let [value] = [values[0]];
                let pair = if row.is_multiple_of(2) {
                    S::pair(value, S::zero())
                } else {
                    S::pair(S::pair_low(S::load(first)), value)
                };
                S::store(first, pair);
                return;
            }
            for (i, pair) in values.chunks_exact(2).enumerate() {
                S::store(first.add(i * self.stride), S::pair(pair[0], pair[1]));
            }
        }
    }
}

/// What the two products of a backward pass read: rows of bfloat16, and pairs of rows.
#[derive(Clone, Copy)]
pub(crate) struct RowsAndPairs {
    pub rows: Rows<Bf16>,
    pub pairs: RowPairs,
}

impl Sink for RowsAndPairs {
    #[inline(always)]
    unsafe fn put<S: Simd, const R: usize>(self, row: usize, column: usize, values: [S::V; R]) {
        // SAFETY: the promise of whoever made this.
        unsafe {
            if R == 1 {
                self.rows.put::<S, R>(row, column, values);
                self.pairs.put::<S, R>(row, column, values);
                return;
            }
            let target = |row: usize| self.rows.out.add(row * self.rows.stride + column).cast();
            for (i, pair) in values.chunks_exact(2).enumerate() {
                let first = row + 2 * i;
                let lanes = S::pair_and_store_bf16(pair[0], pair[1], [target(first), target(first + 1)]);
                S::store(self.pairs.out.add(first / 2 * self.pairs.stride + column), lanes);
            }
        }
    }
}

/// `out = gate·act(scale·raw + shift)`.
pub(crate) struct Activate<A, X, K> {
    pub rows: usize,
    pub columns: usize,
    pub raw: *const X,
    pub raw_stride: usize,
    pub scale: *const f32,
    pub shift: *const f32,
    /// 1 where null.
    pub gate: *const f32,
    pub out: K,
    pub act: PhantomData<A>,
}

impl<A: Activation, X: Stored, K: Sink> Sweep for Activate<A, X, K> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        lanes: usize,
    ) {
        // SAFETY: inside the rows and columns of the pass.
        unsafe {
            let scale = load::<S, WHOLE>(self.scale.add(column), lanes);
            let shift = load::<S, WHOLE>(self.shift.add(column), lanes);
            let gate = if self.gate.is_null() {
                S::splat(1.0)
            } else {
                load::<S, WHOLE>(self.gate.add(column), lanes)
            };
            let mut values = [S::zero(); R];
            for (i, value) in values.iter_mut().enumerate() {
                let raw = load::<S, WHOLE>(self.raw.add((row + i) * self.raw_stride + column), lanes);
                *value = S::fma(raw, scale, shift);
            }
            values = A::values::<S, R>(values);
            for value in &mut values {
                *value = S::mul(*value, gate);
            }
            self.out.put::<S, R>(row, column, values);
        }
    }
}

/// `out = scale·raw + shift (+ residual)`, all with rows of `columns` values.
pub(crate) struct Normalize {
    pub rows: usize,
    pub columns: usize,
    pub raw: *const f32,
    pub scale: *const f32,
    pub shift: *const f32,
    /// 0 where null.
    pub residual: *const f32,
    pub out: *mut f32,
}

impl Sweep for Normalize {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        lanes: usize,
    ) {
        // SAFETY: inside the rows and columns of the pass.
        unsafe {
            let scale = load::<S, WHOLE>(self.scale.add(column), lanes);
            let shift = load::<S, WHOLE>(self.shift.add(column), lanes);
            for row in row..row + R {
                let at = row * self.columns + column;
                let mut x = S::fma(load::<S, WHOLE>(self.raw.add(at), lanes), scale, shift);
                if !self.residual.is_null() {
                    x = S::add(x, load::<S, WHOLE>(self.residual.add(at), lanes));
                }
                store::<S, WHOLE>(self.out.add(at), x, lanes);
            }
        }
    }
}

/// `out = a·dz + b·y + c`, or `dz` alone where `y` is null; columns up to whole vectors become 0.
pub(crate) struct FormGradient<G, Y, K> {
    pub rows: usize,
    pub columns: usize,
    pub dz: *const G,
    pub y: *const Y,
    pub stride: usize,
    pub a: *const f32,
    pub b: *const f32,
    pub c: *const f32,
    pub out: K,
}

impl<G: Stored, Y: Stored, K: Sink> Sweep for FormGradient<G, Y, K> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        lanes: usize,
    ) {
        // SAFETY: inside the rows and columns of the pass.
        unsafe {
            let mut values = [S::zero(); R];
            for (i, value) in values.iter_mut().enumerate() {
                *value = load::<S, WHOLE>(self.dz.add((row + i) * self.stride + column), lanes);
            }
            if !self.y.is_null() {
                let a = load::<S, WHOLE>(self.a.add(column), lanes);
                let b = load::<S, WHOLE>(self.b.add(column), lanes);
                let c = load::<S, WHOLE>(self.c.add(column), lanes);
                for (i, value) in values.iter_mut().enumerate() {
                    let y = load::<S, WHOLE>(self.y.add((row + i) * self.stride + column), lanes);
                    *value = S::fma(*value, a, S::fma(y, b, c));
                }
            }
            self.out.put::<S, R>(row, column, values);
        }
    }
}

/// `out = x`.
pub(crate) struct CopyRows<K> {
    pub rows: usize,
    pub columns: usize,
    pub x: *const f32,
    pub stride: usize,
    pub out: K,
}

impl<K: Sink> Sweep for CopyRows<K> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        lanes: usize,
    ) {
        // SAFETY: inside the rows and columns of the pass.
        unsafe {
            let mut values = [S::zero(); R];
            for (i, value) in values.iter_mut().enumerate() {
                *value = load::<S, WHOLE>(self.x.add((row + i) * self.stride + column), lanes);
            }
            self.out.put::<S, R>(row, column, values);
        }
    }
}

/// `sums += Σ x` over the rows.
pub(crate) struct ColumnSums {
    pub rows: usize,
    pub columns: usize,
    /// Readable up to whole vectors.
    pub x: *const f32,
    pub stride: usize,
    /// Writable up to whole vectors.
    pub sums: *mut f32,
}

impl Sweep for ColumnSums {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        _lanes: usize,
    ) {
        // SAFETY: inside the rows and columns of the pass, whole vectors included.
        unsafe {
            let mut sum = S::load(self.sums.add(column));
            for row in row..row + R {
                sum = S::add(sum, S::load(self.x.add(row * self.stride + column)));
            }
            S::store(self.sums.add(column), sum);
        }
    }
}

/// `dx += addends` and the sums Σdx and Σdx·y, all with rows of `columns` values.
pub(crate) struct FinishGradient {
    pub rows: usize,
    pub columns: usize,
    pub dx: *mut f32,
    /// Left out where null.
    pub addends: [*const f32; 2],
    /// No sums where null.
    pub y: *const f32,
    /// Σdx, and Σdx·y `sums_stride` further on; writable up to whole vectors.
    pub sums: *mut f32,
    pub sums_stride: usize,
}

impl Sweep for FinishGradient {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        lanes: usize,
    ) {
        // SAFETY: inside the rows and columns of the pass.
        unsafe {
            let products = self.sums.add(self.sums_stride);
            let (mut sum, mut product) = if self.y.is_null() {
                (S::zero(), S::zero())
            } else {
                (S::load(self.sums.add(column)), S::load(products.add(column)))
            };
            for row in row..row + R {
                let at = row * self.columns + column;
                let mut dx = load::<S, WHOLE>(self.dx.add(at), lanes);
                for addend in self.addends {
                    if !addend.is_null() {
                        dx = S::add(dx, load::<S, WHOLE>(addend.add(at), lanes));
                    }
                }
                store::<S, WHOLE>(self.dx.add(at), dx, lanes);
                if !self.y.is_null() {
                    sum = S::add(sum, dx);
                    product = S::fma(dx, load::<S, WHOLE>(self.y.add(at), lanes), product);
                }
            }
            if !self.y.is_null() {
                S::store(self.sums.add(column), sum);
                S::store(products.add(column), product);
            }
        }
    }
}

/// Number of sums that [`ActivateBackward`] makes.
pub(crate) const ACTIVATION_SUMS: usize = 5;

/// Takes dA from `tile`, stores it, adds to the five sums of dA and the activation, and gives the gated activation, the
/// operand of dW, to `operand`, which may be `tile`.
pub(crate) struct ActivateBackward<A, X, G, K> {
    pub rows: usize,
    pub columns: usize,
    pub raw: *const X,
    /// Values from one row of `raw` and `da` to the next.
    pub stride: usize,
    pub scale: *const f32,
    pub shift: *const f32,
    /// 1 where null.
    pub gate: *const f32,
    /// dA; readable up to whole vectors.
    pub tile: *const f32,
    pub tile_stride: usize,
    pub operand: K,
    pub da: *mut G,
    /// Whether to store dA past the caches; needs its rows on 64-byte boundaries.
    pub streaming: bool,
    /// Σ dA·act, Σ dA·s', Σ dA·s'·raw, Σ s', Σ s'·raw, `sums_stride` apart; writable up to whole vectors.
    pub sums: *mut f32,
    pub sums_stride: usize,
    pub act: PhantomData<A>,
}

impl<A: Activation, X: Stored, G: Stored, K: Sink> Sweep for ActivateBackward<A, X, G, K> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        lanes: usize,
    ) {
        // SAFETY: inside the rows and columns of the pass.
        unsafe {
            let scale = load::<S, WHOLE>(self.scale.add(column), lanes);
            let shift = load::<S, WHOLE>(self.shift.add(column), lanes);
            let gate = if self.gate.is_null() {
                S::splat(1.0)
            } else {
                load::<S, WHOLE>(self.gate.add(column), lanes)
            };
            let mut sums = [S::zero(); ACTIVATION_SUMS];
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(self.sums.add(i * self.sums_stride + column));
            }
            let (mut raws, mut z) = ([S::zero(); R], [S::zero(); R]);
            for (i, (raw, z)) in raws.iter_mut().zip(&mut z).enumerate() {
                *raw = load::<S, WHOLE>(self.raw.add((row + i) * self.stride + column), lanes);
                *z = S::fma(*raw, scale, shift);
            }
            let (mut operand, slopes) = A::values_and_slopes::<S, R>(z);
            for (i, ((act, slope), raw)) in operand.iter_mut().zip(slopes).zip(raws).enumerate() {
                let row = row + i;
                let at = row * self.stride + column;
                let tile = self.tile.add(row * self.tile_stride + column);
                let da = S::load(tile);
                if WHOLE && self.streaming {
                    G::stream::<S>(self.da.add(at), da);
                } else {
                    // The rows after next, before they are written: a store that misses holds up those behind it.
                    S::prefetch(self.da.wrapping_add(at + 2 * R * self.stride).cast());
                    store::<S, WHOLE>(self.da.add(at), da, lanes);
                }
                let through = S::mul(da, slope);
                sums[0] = S::fma(da, *act, sums[0]);
                sums[1] = S::add(sums[1], through);
                sums[2] = S::fma(through, raw, sums[2]);
                sums[3] = S::add(sums[3], slope);
                sums[4] = S::fma(slope, raw, sums[4]);
                *act = S::mul(*act, gate);
            }
            self.operand.put::<S, R>(row, column, operand);
            for (i, sum) in sums.into_iter().enumerate() {
                S::store(self.sums.add(i * self.sums_stride + column), sum);
            }
        }
    }
}

/// `out (+)= Σ partials` in ascending order, for a range of rows of a matrix.
pub(crate) struct ReducePartials {
    pub rows: usize,
    pub columns: usize,
    pub partials: *const f32,
    pub count: usize,
    /// Values from one partial matrix to the next.
    pub partial_stride: usize,
    /// Values from one row of a partial matrix to the next.
    pub row_stride: usize,
    pub out: *mut f32,
    /// Whether to start from what `out` holds.
    pub accumulate: bool,
}

impl Sweep for ReducePartials {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        lanes: usize,
    ) {
        // SAFETY: inside the rows and columns of the pass.
        unsafe {
            let mut sums = [S::zero(); R];
            for (i, sum) in sums.iter_mut().enumerate().filter(|_| self.accumulate) {
                *sum = load::<S, WHOLE>(self.out.add((row + i) * self.columns + column), lanes);
            }
            for partial in 0..self.count {
                let partial = self.partials.add(partial * self.partial_stride + column);
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = S::add(
                        *sum,
                        load::<S, WHOLE>(partial.add((row + i) * self.row_stride), lanes),
                    );
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                store::<S, WHOLE>(self.out.add((row + i) * self.columns + column), sum, lanes);
            }
        }
    }
}

#[inline(always)]
unsafe fn flush_body<S: Simd>(sums: &mut [f32], totals: &mut [f64]) {
    // Plain loops: compiled with the wide registers of `S`, vectorised by the compiler.
    let _ = S::LANES;
    for (total, sum) in totals.iter_mut().zip(sums) {
        *total += f64::from(*sum);
        *sum = 0.0;
    }
}

dispatch! {
    /// Adds a block's f32 sums to f64 totals and sets them to 0.
    ///
    /// # Safety
    /// `isa` must be available.
    pub(crate) unsafe fn flush(sums: &mut [f32], totals: &mut [f64]) = flush_body;
}
