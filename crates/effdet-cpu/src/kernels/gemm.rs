//! Matrix products on row-major operands, written with register tiles of broadcast × vector multiply-adds.
//!
//! [`multiply`] computes C = A·B with A unpacked and B packed in panels of [`PANEL`] columns; [`multiply_transposed`]
//! computes C += Pᵀ·Q with neither packed. Each element of a product is one chain of fused multiply-adds over ascending
//! index, whatever the tile, so the tile shapes are free to differ between instruction sets.
//!
//! Along the index that is summed over, operands consist of lanes: an f32 each, or two bfloat16 ([`Products`]). What is
//! called depth here counts lanes. Products in the order of tiles are several chains, see [`tile_order`].

use crate::arena::ALIGNMENT;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::simd::has_tiles;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx512, NativePairs, has_native_bf16};
use crate::simd::{Isa, PairProduct, Product, Simd, SingleProduct, dispatch};
use crate::storage::{Bf16, Products, Stored};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod packing;
mod tile_order;

pub(crate) use packing::{pack, pack_pairs, pack_pairs_transposed, pack_transposed};

/// The lane of two bfloat16.
fn pair(low: f32, high: f32) -> f32 {
    let [low, high] = [low, high].map(|x| u32::from(Bf16::from_f32(x).0));
    f32::from_bits(high << 16 | low)
}

/// Columns per panel of a packed matrix.
pub(crate) const PANEL: usize = 16;

/// Rows of a tile in products in the order of tiles.
pub(crate) const TILE_ROWS: usize = 16;

/// `columns` rounded up to whole panels.
pub(crate) const fn padded(columns: usize) -> usize {
    columns.next_multiple_of(PANEL)
}

/// Row stride in values for a scratch matrix: whole cache lines and an odd number of them, so that a column of it spreads
/// over all sets of a cache.
pub(crate) const fn scratch_stride(columns: usize) -> usize {
    (columns.div_ceil(PANEL) | 1) * PANEL
}

/// Length of a matrix of `rows` × `columns` once packed.
pub(crate) const fn packed_len(rows: usize, columns: usize) -> usize {
    rows * padded(columns)
}

/// Values that will be read soon; the products bring them to the cache, a line per step of their inner loop.
///
/// Blocks of rows are worked on one after the other in phases that read memory and phases that compute. Fetching the next
/// block's rows during the products of this one lets the two overlap.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prefetch {
    /// First value and number of cache lines left of each run.
    runs: [(*const f32, usize); MOST_RUNS],
}

/// Most tensors of which a block reads rows: dz, y, x, two addends and the layer below's y in the backward pass.
const MOST_RUNS: usize = 6;

/// Values in a cache line.
const LINE: usize = ALIGNMENT / size_of::<f32>();

impl Prefetch {
    /// Fetches nothing.
    pub(crate) fn none() -> Self {
        Self {
            runs: [(std::ptr::null(), 0); MOST_RUNS],
        }
    }

    /// Fetches a slice.
    pub(crate) fn of<T>(values: &[T]) -> Self {
        let mut fetch = Self::none();
        fetch.runs[0] = (values.as_ptr().cast(), size_of_val(values).div_ceil(ALIGNMENT));
        fetch
    }

    /// Fetches a slice after the others, [`MOST_RUNS`] in all; more are not fetched.
    pub(crate) fn and<T>(mut self, values: &[T]) -> Self {
        if let Some(run) = self.runs.iter_mut().find(|(_, left)| *left == 0) {
            *run = Self::of(values).runs[0];
        }
        self
    }

    /// Where a loop of `steps` steps starts to fetch and how far it moves per step; `idle` is an address in the cache.
    #[inline(always)]
    fn take(&mut self, steps: usize, idle: *const f32) -> (*const f32, usize) {
        for (next, left) in &mut self.runs {
            if *left > 0 {
                let start = *next;
                *left = left.saturating_sub(steps);
                *next = next.wrapping_add(steps * LINE);
                return (start, LINE);
            }
        }
        (idle, 0)
    }
}

/// Arguments of [`multiply`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Multiply<T = f32> {
    /// Rows of A and C.
    pub rows: usize,
    /// Columns of B and C.
    pub columns: usize,
    /// Columns of A and rows of B.
    pub depth: usize,
    /// A, row-major; readable up to a multiple of [`TILE_ROWS`] rows where products are in the order of tiles.
    pub a: *const f32,
    /// Values from one row of A to the next.
    pub a_stride: usize,
    /// First row of B to use within its first panel.
    pub b: *const f32,
    /// Values from one panel of B to the next.
    pub b_panel_stride: usize,
    /// What happens to the product.
    pub epilogue: Epilogue<T>,
}

/// What [`multiply`] does with a tile of the product, in this order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Epilogue<T = f32> {
    /// C, row-major.
    pub c: *mut T,
    /// Values from one row of C to the next.
    pub c_stride: usize,
    /// Whether to add what C holds.
    pub accumulate: bool,
    /// Added to every row where not null; readable up to whole panels.
    pub bias: *const f32,
    /// Where not null: ΣC and ΣC² over the rows are added to the vectors here and `sums_stride` further on, row by row;
    /// writable up to whole panels.
    pub sums: *mut f32,
    /// Values from the sums to the sums of squares.
    pub sums_stride: usize,
    /// Whether to store past the caches; needs C's rows on 64-byte boundaries.
    pub streaming: bool,
}

impl<T: Stored> Epilogue<T> {
    /// Stores the product.
    pub(crate) const fn store(c: *mut T, c_stride: usize) -> Self {
        Self {
            c,
            c_stride,
            accumulate: false,
            bias: std::ptr::null(),
            sums: std::ptr::null_mut(),
            sums_stride: 0,
            streaming: false,
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd, const R: usize, const V: usize>(
        &self,
        row: usize,
        column: usize,
        columns: usize,
        mut tile: [[S::V; V]; R],
    ) {
        // SAFETY: the caller of `multiply` promises C for `columns` columns; vectors that reach past them are partial.
        unsafe {
            let c = self.c.add(row * self.c_stride + column);
            let whole = column + V * S::LANES <= columns;
            let valid = |j: usize| (columns - column - j * S::LANES).min(S::LANES);
            if self.accumulate {
                for (i, row) in tile.iter_mut().enumerate() {
                    for (j, value) in row.iter_mut().enumerate() {
                        let c = c.add(i * self.c_stride + j * S::LANES);
                        *value = S::add(
                            *value,
                            if whole {
                                T::load::<S>(c)
                            } else {
                                T::load_partial::<S>(c, valid(j))
                            },
                        );
                    }
                }
            }
            if !self.bias.is_null() {
                for j in 0..V {
                    let bias = S::load(self.bias.add(column + j * S::LANES));
                    for row in &mut tile {
                        row[j] = S::add(row[j], bias);
                    }
                }
            }
            if !self.sums.is_null() {
                for j in 0..V {
                    let sums = self.sums.add(column + j * S::LANES);
                    let squares = sums.add(self.sums_stride);
                    let (mut sum, mut square) = (S::load(sums), S::load(squares));
                    for row in &tile {
                        sum = S::add(sum, row[j]);
                        square = S::fma(row[j], row[j], square);
                    }
                    S::store(sums, sum);
                    S::store(squares, square);
                }
            }
            // One plain loop per kind of store: anything more makes the compiler take the tile out of its registers.
            macro_rules! for_each {
                (|$c:ident, $value:ident, $j:ident| $store:expr) => {
                    for (i, row) in tile.iter().enumerate() {
                        for ($j, &$value) in row.iter().enumerate() {
                            let $c = c.add(i * self.c_stride + $j * S::LANES);
                            $store;
                        }
                    }
                };
            }
            if !whole {
                for_each!(|c, value, j| T::store_partial::<S>(c, value, valid(j)));
            } else if self.streaming {
                for_each!(|c, value, j| T::stream::<S>(c, value));
            } else {
                for_each!(|c, value, j| T::store::<S>(c, value));
            }
        }
    }
}

/// Has the cache lines fetched that a tile of C will write: stores leave in order, so one that misses holds up the others.
#[inline(always)]
unsafe fn fetch_tile<S: Simd, T, const R: usize, const V: usize>(c: *const T, c_stride: usize) {
    for row in 0..R {
        for bytes in (0..V * S::LANES * size_of::<T>()).step_by(ALIGNMENT) {
            let line = c.wrapping_add(row * c_stride).wrapping_byte_add(bytes);
            // SAFETY: the caller promises the instruction set; any address may be prefetched.
            unsafe { S::prefetch(line.cast()) };
        }
    }
}

/// One tile of A·B: R rows, V vectors.
#[inline(always)]
unsafe fn product_tile<S: Simd, P: Product<S>, const R: usize, const V: usize>(
    depth: usize,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_panel_stride: usize,
    ahead: &mut Prefetch,
) -> [[S::V; V]; R] {
    // SAFETY: the caller of `multiply` promises A and B; panels are whole.
    unsafe {
        let mut tile = [[S::zero(); V]; R];
        let (mut a, mut b) = (a, b);
        let (mut fetch, fetch_step) = ahead.take(depth, b);
        for _ in 0..depth {
            S::prefetch(fetch);
            fetch = fetch.wrapping_add(fetch_step);
            let mut vectors = [S::zero(); V];
            for (j, vector) in vectors.iter_mut().enumerate() {
                let lane = j * S::LANES;
                *vector = S::load(b.add(lane / PANEL * b_panel_stride + lane % PANEL));
            }
            for (i, row) in tile.iter_mut().enumerate() {
                let value = S::splat(*a.add(i * a_stride));
                for (sum, &vector) in row.iter_mut().zip(&vectors) {
                    *sum = P::accumulate(value, vector, *sum);
                }
            }
            a = a.add(1);
            b = b.add(PANEL);
        }
        tile
    }
}

impl<T: Stored> Multiply<T> {
    #[inline(always)]
    unsafe fn tile<S: Simd, P: Product<S>, const R: usize, const V: usize>(
        &self,
        row: usize,
        column: usize,
        ahead: &mut Prefetch,
    ) {
        // SAFETY: a tile inside the operands the caller promises.
        unsafe {
            let b = self.b.add(column / PANEL * self.b_panel_stride + column % PANEL);
            let a = self.a.add(row * self.a_stride);
            if !self.epilogue.streaming {
                let c = self
                    .epilogue
                    .c
                    .wrapping_add(row * self.epilogue.c_stride + column);
                fetch_tile::<S, T, R, V>(c, self.epilogue.c_stride);
            }
            let tile =
                product_tile::<S, P, R, V>(self.depth, a, self.a_stride, b, self.b_panel_stride, ahead);
            self.epilogue.finish::<S, R, V>(row, column, self.columns, tile);
        }
    }

    /// R rows of the columns below `end`.
    #[inline(always)]
    unsafe fn row_tiles<S: Simd, P: Product<S> + Product<S::Half>, const R: usize>(
        &self,
        row: usize,
        end: usize,
        ahead: &mut Prefetch,
    ) {
        let mut column = 0;
        while column < end {
            let width = Width::of::<S>(end - column);
            // SAFETY: tiles inside the operands the caller promises.
            unsafe {
                match width {
                    Width::Pair => self.tile::<S, P, R, 2>(row, column, ahead),
                    Width::Single => self.tile::<S, P, R, 1>(row, column, ahead),
                    Width::Half => self.tile::<S::Half, P, R, 1>(row, column, ahead),
                }
            }
            column += width.lanes::<S>();
        }
    }

    /// All rows of three vectors of columns.
    #[inline(always)]
    unsafe fn triple_tiles<S: Simd, P: Product<S>>(&self, column: usize, ahead: &mut Prefetch) {
        let mut row = 0;
        // SAFETY: tiles inside the operands the caller promises.
        unsafe {
            while row + 4 <= self.rows {
                self.tile::<S, P, 4, 3>(row, column, ahead);
                row += 4;
            }
            while row < self.rows {
                self.tile::<S, P, 1, 3>(row, column, ahead);
                row += 1;
            }
        }
    }
}

/// The columns before those that are better worked on in one tile of three vectors: where there are 16 registers, a single
/// vector at the end would keep too few chains of multiply-adds going.
#[inline(always)]
const fn before_triple<S: Simd>(columns: usize) -> usize {
    let rest = columns % (2 * S::LANES);
    if S::REGISTERS == 16 && columns > 2 * S::LANES && rest > 0 && rest <= S::LANES {
        columns - rest - 2 * S::LANES
    } else {
        columns
    }
}

/// Width of a tile.
#[derive(Clone, Copy)]
enum Width {
    Pair,
    Single,
    Half,
}

impl Width {
    /// The width to go on with where `left > 0` columns are left: pairs of vectors, then the narrowest that cover the rest.
    #[inline(always)]
    const fn of<S: Simd>(left: usize) -> Self {
        let (whole, half) = (S::LANES, S::Half::LANES);
        if left >= 2 * whole || left > whole && (whole == half || left > whole + half) {
            Self::Pair
        } else if left > half {
            Self::Single
        } else {
            Self::Half
        }
    }

    #[inline(always)]
    const fn lanes<S: Simd>(self) -> usize {
        match self {
            Self::Pair => 2 * S::LANES,
            Self::Single => S::LANES,
            Self::Half => S::Half::LANES,
        }
    }
}

#[inline(always)]
unsafe fn multiply_body<S: Simd, T: Stored, P: Product<S> + Product<S::Half>>(
    args: &Multiply<T>,
    ahead: &mut Prefetch,
) {
    let end = before_triple::<S>(args.columns);
    let mut row = 0;
    // SAFETY: tiles inside the operands the caller promises.
    unsafe {
        // 24 accumulators where there are 32 registers, 12 where there are 16.
        if S::REGISTERS == 32 {
            while row + 12 <= args.rows {
                args.row_tiles::<S, P, 12>(row, end, ahead);
                row += 12;
            }
        }
        while row + 6 <= args.rows {
            args.row_tiles::<S, P, 6>(row, end, ahead);
            row += 6;
        }
        if row + 4 <= args.rows {
            args.row_tiles::<S, P, 4>(row, end, ahead);
            row += 4;
        }
        if row + 2 <= args.rows {
            args.row_tiles::<S, P, 2>(row, end, ahead);
            row += 2;
        }
        if row < args.rows {
            args.row_tiles::<S, P, 1>(row, end, ahead);
        }
        if end < args.columns {
            args.triple_tiles::<S, P>(end, ahead);
        }
    }
}

macro_rules! products {
    ($(#[$meta:meta])* $vis:vis unsafe fn $name:ident $([$($declared:tt)*] [$($used:ident),*])? ($args:ty) = $body:ident;) => {
        $(#[$meta])*
        $vis unsafe fn $name $(<$($declared)*>)? (isa: Isa, products: Products, args: &$args, ahead: &mut Prefetch) {
            #[inline(always)]
            unsafe fn single_body<S: Simd $(, $($declared)*)?>(args: &$args, ahead: &mut Prefetch) {
                // SAFETY: the caller's promise.
                unsafe { $body::<S $(, $($used),*)?, SingleProduct>(args, ahead) }
            }
            #[inline(always)]
            unsafe fn pairs_body<S: Simd $(, $($declared)*)?>(args: &$args, ahead: &mut Prefetch) {
                // SAFETY: the caller's promise.
                unsafe { $body::<S $(, $($used),*)?, PairProduct>(args, ahead) }
            }
            dispatch! {
                unsafe fn single $([$($declared)*] [$($used),*])? (args: &$args, ahead: &mut Prefetch) = single_body;
            }
            dispatch! {
                unsafe fn pairs $([$($declared)*] [$($used),*])? (args: &$args, ahead: &mut Prefetch) = pairs_body;
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16")]
            unsafe fn native $(<$($declared)*>)? (args: &$args, ahead: &mut Prefetch) {
                // SAFETY: the features are enabled here; the rest is the caller's promise.
                unsafe { $body::<Avx512 $(, $($used),*)?, NativePairs>(args, ahead) }
            }
            // SAFETY: the instruction sets are available; the rest is the caller's promise.
            unsafe {
                match products {
                    Products::Single => single $(::<$($used),*>)? (isa, args, ahead),
                    #[cfg(target_arch = "x86_64")]
                    Products::Bf16Pairs if has_native_bf16(isa) => native $(::<$($used),*>)? (args, ahead),
                    Products::Bf16Pairs => pairs $(::<$($used),*>)? (isa, args, ahead),
                    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                    Products::Bf16Tiles if has_tiles(isa) => amx::$name(args, ahead),
                    Products::Bf16Tiles => tile_order::$name(isa, args),
                }
            }
        }
    };
}

products! {
    /// C = A·B with an [`Epilogue`]; fetches `ahead` on the way.
    ///
    /// # Safety
    /// `isa` must be available; all pointers must be valid for what [`Multiply`] and [`Epilogue`] say.
    pub(crate) unsafe fn multiply[T: Stored][T](Multiply<T>) = multiply_body;
}

/// Arguments of [`multiply_transposed`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct MultiplyTransposed {
    /// Rows of P and Q, the index that is summed over.
    pub depth: usize,
    /// Columns of P, rows of C.
    pub rows: usize,
    /// Columns of Q and C.
    pub columns: usize,
    /// P, row-major; readable up to whole panels where products are in the order of tiles.
    pub p: *const f32,
    /// Values from one row of P to the next.
    pub p_stride: usize,
    /// Q, row-major; readable up to whole panels.
    pub q: *const f32,
    /// Values from one row of Q to the next.
    pub q_stride: usize,
    /// C, row-major; writable up to whole panels.
    pub c: *mut f32,
    /// Values from one row of C to the next.
    pub c_stride: usize,
    /// Whether to add what C holds.
    pub accumulate: bool,
}

impl MultiplyTransposed {
    #[inline(always)]
    unsafe fn tile<S: Simd, P: Product<S>, const R: usize, const V: usize>(
        &self,
        row: usize,
        column: usize,
        ahead: &mut Prefetch,
    ) {
        // SAFETY: a tile inside the operands the caller promises.
        unsafe {
            fetch_tile::<S, f32, R, V>(self.c.wrapping_add(row * self.c_stride + column), self.c_stride);
            let mut tile = [[S::zero(); V]; R];
            let (mut p, mut q) = (self.p.add(row), self.q.add(column));
            let (mut fetch, fetch_step) = ahead.take(self.depth, q);
            for _ in 0..self.depth {
                S::prefetch(fetch);
                fetch = fetch.wrapping_add(fetch_step);
                let mut vectors = [S::zero(); V];
                for (j, vector) in vectors.iter_mut().enumerate() {
                    *vector = S::load(q.add(j * S::LANES));
                }
                for (i, row) in tile.iter_mut().enumerate() {
                    let value = S::splat(*p.add(i));
                    for (sum, &vector) in row.iter_mut().zip(&vectors) {
                        *sum = P::accumulate(value, vector, *sum);
                    }
                }
                p = p.add(self.p_stride);
                q = q.add(self.q_stride);
            }
            let c = self.c.add(row * self.c_stride + column);
            for (i, row) in tile.iter().enumerate() {
                for (j, &sum) in row.iter().enumerate() {
                    let c = c.add(i * self.c_stride + j * S::LANES);
                    S::store(
                        c,
                        if self.accumulate {
                            S::add(sum, S::load(c))
                        } else {
                            sum
                        },
                    );
                }
            }
        }
    }

    /// V vectors of all rows of C.
    #[inline(always)]
    unsafe fn column_tiles<S: Simd, P: Product<S>, const V: usize>(
        &self,
        column: usize,
        ahead: &mut Prefetch,
    ) {
        let mut row = 0;
        // SAFETY: tiles inside the operands the caller promises.
        unsafe {
            if V == 3 {
                while row + 4 <= self.rows {
                    self.tile::<S, P, 4, V>(row, column, ahead);
                    row += 4;
                }
                while row < self.rows {
                    self.tile::<S, P, 1, V>(row, column, ahead);
                    row += 1;
                }
                return;
            }
            if S::REGISTERS == 32 {
                while row + 12 <= self.rows {
                    self.tile::<S, P, 12, V>(row, column, ahead);
                    row += 12;
                }
            }
            while row + 6 <= self.rows {
                self.tile::<S, P, 6, V>(row, column, ahead);
                row += 6;
            }
            if row + 4 <= self.rows {
                self.tile::<S, P, 4, V>(row, column, ahead);
                row += 4;
            }
            if row + 2 <= self.rows {
                self.tile::<S, P, 2, V>(row, column, ahead);
                row += 2;
            }
            if row < self.rows {
                self.tile::<S, P, 1, V>(row, column, ahead);
            }
        }
    }
}

#[inline(always)]
unsafe fn multiply_transposed_body<S: Simd, P: Product<S> + Product<S::Half>>(
    args: &MultiplyTransposed,
    ahead: &mut Prefetch,
) {
    let end = before_triple::<S>(args.columns);
    let mut column = 0;
    while column < end {
        let width = Width::of::<S>(end - column);
        // SAFETY: tiles inside the operands the caller promises, rounded up to whole panels.
        unsafe {
            match width {
                Width::Pair => args.column_tiles::<S, P, 2>(column, ahead),
                Width::Single => args.column_tiles::<S, P, 1>(column, ahead),
                Width::Half => args.column_tiles::<S::Half, P, 1>(column, ahead),
            }
        }
        column += width.lanes::<S>();
    }
    if end < args.columns {
        // SAFETY: as above.
        unsafe { args.column_tiles::<S, P, 3>(end, ahead) }
    }
}

products! {
    /// C = Pᵀ·Q, or C += Pᵀ·Q; fetches `ahead` on the way.
    ///
    /// # Safety
    /// `isa` must be available; all pointers must be valid for what [`MultiplyTransposed`] says.
    pub(crate) unsafe fn multiply_transposed(MultiplyTransposed) = multiply_transposed_body;
}

#[cfg(test)]
mod tests;
