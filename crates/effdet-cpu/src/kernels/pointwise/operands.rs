//! What the products read, formed block by block from what is stored.

use std::marker::PhantomData;
use std::ops::Range;

use super::super::gemm::{Prefetch, TILE_ROWS, padded, scratch_stride};
use super::super::row_plan::{BLOCK_ROWS, RowBlock, RowPlan};
use super::super::row_sweeps::{
    Activate, ColumnSums, CopyRows, FormGradient, Normalize, RowPairs, Rows, RowsAndPairs, Sink, sweep,
};
use super::{Activated, ChannelVectors, Input, OutputGradient, check, rows_are_aligned};
use crate::arena::{Bump, SharedPtr};
use crate::math::with_activation;
use crate::simd::Isa;
use crate::storage::{Bf16, Products, Stored};

// What is formed for a block is read in whole tiles.
const _: () = assert!(BLOCK_ROWS.is_multiple_of(TILE_ROWS));

/// The left operand of a forward pass with its pointers ready to be shared by tasks.
pub(super) enum LeftOperand<'a, X> {
    Plain(&'a [f32]),
    Activated(Activated<'a, X>),
    Normalized {
        raw: &'a [f32],
        scale: ChannelVectors<'a>,
        shift: ChannelVectors<'a>,
        residual: Option<&'a [f32]>,
        x: SharedPtr<f32>,
    },
}

impl<'a, X: Stored> LeftOperand<'a, X> {
    pub(super) fn new(input: Input<'a, X>, plan: &RowPlan, channels: usize) -> Self {
        let len = plan.rows() * channels;
        match input {
            Input::Plain(x) => {
                check("x", x.len(), len);
                Self::Plain(x)
            }
            Input::Activated(activated) => {
                activated.check(plan, channels);
                Self::Activated(activated)
            }
            Input::Normalized {
                raw,
                scale,
                shift,
                residual,
                x,
            } => {
                check("raw", raw.len(), len);
                scale.check("scale", plan, channels);
                shift.check("shift", plan, channels);
                check("residual", residual.map_or(len, <[f32]>::len), len);
                check("x", x.len(), len);
                Self::Normalized {
                    raw,
                    scale,
                    shift,
                    residual,
                    x: SharedPtr::new(x),
                }
            }
        }
    }

    /// What a block with these rows will read.
    pub(super) fn ahead(&self, rows: Range<usize>, channels: usize) -> Prefetch {
        let range = rows.start * channels..rows.end * channels;
        match self {
            Self::Plain(x) => Prefetch::of(&x[range]),
            Self::Activated(input) => Prefetch::of(&input.raw[range]),
            Self::Normalized { raw, residual, .. } => {
                Prefetch::of(&raw[range.clone()]).and(residual.map_or(&[], |residual| &residual[range]))
            }
        }
    }

    /// Row stride in lanes of the scratch slab for `columns`, 0 where none is needed.
    pub(super) fn slab_stride(&self, products: Products, columns: usize) -> usize {
        match (self, products) {
            (Self::Plain(_) | Self::Normalized { .. }, Products::Single) => 0,
            _ => scratch_stride(products.lanes(columns)),
        }
    }

    /// Does what is to be done once per block.
    ///
    /// # Safety
    /// `isa` must be available and the block's rows of `x` belong to the caller.
    pub(super) unsafe fn prepare(&self, isa: Isa, block: &RowBlock, channels: usize) {
        if let Self::Normalized {
            raw,
            scale,
            shift,
            residual,
            x,
        } = self
        {
            let at = block.row * channels;
            // SAFETY: the sizes were checked in `new`.
            unsafe {
                let pass = Normalize {
                    rows: block.rows,
                    columns: channels,
                    raw: raw[at..].as_ptr(),
                    scale: scale.of(block, channels, 0),
                    shift: shift.of(block, channels, 0),
                    residual: residual.map_or(std::ptr::null(), |residual| residual[at..].as_ptr()),
                    out: x.get().add(at),
                };
                sweep(isa, &pass);
            }
        }
    }

    /// Some columns of the block, as pointer and row stride; they are formed in `scratch` where not stored.
    ///
    /// # Safety
    /// `isa` must be available, and `scratch` hold `BLOCK_ROWS` rows of its stride.
    pub(super) unsafe fn slab(
        &self,
        isa: Isa,
        products: Products,
        block: &RowBlock,
        channels: usize,
        (first, columns): (usize, usize),
        (out, stride): (*mut f32, usize),
    ) -> (*const f32, usize) {
        let at = block.row * channels + first;
        // SAFETY: the sizes were checked in `new`.
        unsafe {
            let stored = match self {
                Self::Plain(x) => x.as_ptr().add(at),
                Self::Normalized { x, .. } => x.get().add(at).cast_const(),
                Self::Activated(_) => std::ptr::null(),
            };
            let halves = Rows::<Bf16> {
                out: out.cast(),
                stride: 2 * stride,
            };
            match (self, products) {
                (Self::Activated(input), Products::Single) => {
                    input.form(isa, block, channels, (first, columns), Rows { out, stride });
                }
                (Self::Activated(input), Products::Bf16Pairs | Products::Bf16Tiles) => {
                    input.form(isa, block, channels, (first, columns), halves);
                }
                (Self::Plain(_) | Self::Normalized { .. }, Products::Single) => return (stored, channels),
                (Self::Plain(_) | Self::Normalized { .. }, Products::Bf16Pairs | Products::Bf16Tiles) => {
                    let pass = CopyRows {
                        rows: block.rows,
                        columns,
                        x: stored,
                        stride: channels,
                        out: halves,
                    };
                    sweep(isa, &pass);
                }
            }
            (out, stride)
        }
    }
}

impl<X: Stored> Activated<'_, X> {
    /// Forms some columns of a block.
    ///
    /// # Safety
    /// `isa` must be available, the sizes checked and `out` hold `BLOCK_ROWS` rows.
    pub(super) unsafe fn form(
        &self,
        isa: Isa,
        block: &RowBlock,
        channels: usize,
        (first, columns): (usize, usize),
        out: impl Sink,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            with_activation!(self.act, A => {
                let pass = Activate::<A, X, _> {
                    rows: block.rows,
                    columns,
                    raw: self.raw.as_ptr().add(block.row * channels + first),
                    raw_stride: channels,
                    scale: self.scale.of(block, channels, first),
                    shift: self.shift.of(block, channels, first),
                    gate: self.gate_of(block, channels, first),
                    out,
                    act: PhantomData,
                };
                sweep(isa, &pass);
            });
        }
    }
}

impl<X> Activated<'_, X> {
    pub(super) fn check(&self, plan: &RowPlan, channels: usize) {
        check("raw", self.raw.len(), plan.rows() * channels);
        self.scale.check("scale", plan, channels);
        self.shift.check("shift", plan, channels);
        if let Some(gate) = self.gate {
            check("gate", gate.len(), plan.image_count() * channels);
        }
    }

    pub(super) fn gate_of(&self, block: &RowBlock, channels: usize, first: usize) -> *const f32 {
        self.gate.map_or(std::ptr::null(), |gate| {
            gate[block.image * channels + first..].as_ptr()
        })
    }
}

impl<G: Stored, Y: Stored> OutputGradient<'_, G, Y> {
    pub(super) fn check(&self, plan: &RowPlan, channels: usize) {
        let (Self::Plain { stride, .. } | Self::Normalized { stride, .. }) = *self;
        assert!(
            stride >= channels,
            "the stride {stride} of dY is below its {channels} channels"
        );
        let len = plan.rows() * stride;
        match self {
            Self::Plain { dy, .. } => check("dy", dy.len(), len),
            Self::Normalized { dz, y, a, b, c, .. } => {
                check("dz", dz.len(), len);
                check("y", y.len(), len);
                a.check("a", plan, channels);
                b.check("b", plan, channels);
                c.check("c", plan, channels);
            }
        }
    }

    /// What a block with these rows will read.
    pub(super) fn ahead(&self, rows: Range<usize>) -> Prefetch {
        match *self {
            Self::Plain { dy, stride } => Prefetch::of(&dy[rows.start * stride..rows.end * stride]),
            Self::Normalized { dz, y, stride, .. } => {
                let range = rows.start * stride..rows.end * stride;
                Prefetch::of(&dz[range.clone()]).and(&y[range])
            }
        }
    }

    /// A block of dY from column `first` on with its row stride, where the products can read it as it is stored: f32, in aligned rows
    /// with room for whole panels.
    fn stored(&self, block: &RowBlock, channels: usize, first: usize) -> Option<(*const f32, usize)> {
        match *self {
            Self::Plain { dy, stride } if stride >= padded(channels) && rows_are_aligned(dy, stride) => {
                let values = dy[block.row * stride + first..].as_ptr().cast_mut();
                Some((G::as_f32(values)?.cast_const(), stride))
            }
            _ => None,
        }
    }

    /// Forms some columns of a block of dY.
    ///
    /// # Safety
    /// `isa` must be available, the sizes checked and `out` hold `BLOCK_ROWS` rows.
    pub(super) unsafe fn form(
        &self,
        isa: Isa,
        block: &RowBlock,
        channels: usize,
        (first, columns): (usize, usize),
        out: impl Sink,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut pass = FormGradient {
                rows: block.rows,
                columns,
                dz: std::ptr::null(),
                y: std::ptr::null(),
                stride: 0,
                a: std::ptr::null(),
                b: std::ptr::null(),
                c: std::ptr::null(),
                out,
            };
            match self {
                Self::Plain { dy, stride } => {
                    pass.stride = *stride;
                    pass.dz = dy.as_ptr().add(block.row * stride + first);
                }
                Self::Normalized {
                    dz,
                    y,
                    a,
                    b,
                    c,
                    stride,
                } => {
                    pass.stride = *stride;
                    pass.dz = dz.as_ptr().add(block.row * stride + first);
                    pass.y = y.as_ptr().add(block.row * stride + first);
                    pass.a = a.of(block, channels, first);
                    pass.b = b.of(block, channels, first);
                    pass.c = c.of(block, channels, first);
                }
            }
            sweep(isa, &pass);
        }
    }
}

/// What the products of a backward pass read of dY, each with its row stride in lanes.
pub(super) struct Operands {
    /// For dX = dY·Wᵀ.
    pub left: (*const f32, usize),
    /// For dW = Aᵀ·dY.
    pub right: (*const f32, usize),
}

/// Scratch for some columns of a block of dY as the products of a backward pass read it.
pub(super) struct FormedGradient {
    products: Products,
    /// Rows of f32; without memory where nothing reads them.
    plain: Rows<f32>,
    halves: RowsAndPairs,
}

impl FormedGradient {
    /// Strides in lanes of rows of f32, of rows of bfloat16 and of pairs of rows, 0 where there are none.
    pub(super) fn strides(products: Products, columns: usize, with_bias: bool) -> [usize; 3] {
        let whole = scratch_stride(columns);
        match products {
            Products::Single => [whole, 0, 0],
            Products::Bf16Pairs | Products::Bf16Tiles => [
                if with_bias { whole } else { 0 },
                scratch_stride(products.lanes(columns)),
                whole,
            ],
        }
    }

    /// Scratch values that a slab of `columns` takes.
    pub(super) fn room(products: Products, columns: usize, with_bias: bool) -> usize {
        let [plain, rows, pairs] = Self::strides(products, columns, with_bias);
        Bump::room(BLOCK_ROWS * plain) + Bump::room(BLOCK_ROWS * rows) + Bump::room(BLOCK_ROWS / 2 * pairs)
    }

    pub(super) fn new(products: Products, columns: usize, with_bias: bool, scratch: &mut Bump) -> Self {
        let [plain, rows, pairs] = Self::strides(products, columns, with_bias);
        Self {
            products,
            plain: Rows {
                out: scratch.take(BLOCK_ROWS * plain),
                stride: plain,
            },
            halves: RowsAndPairs {
                rows: Rows {
                    out: scratch.take(BLOCK_ROWS * rows).cast(),
                    stride: 2 * rows,
                },
                pairs: RowPairs {
                    out: scratch.take(BLOCK_ROWS / 2 * pairs),
                    stride: pairs,
                },
            },
        }
    }

    /// Some columns of a block of dY as the two products read them; adds Σ dY over its rows to `bias_sums`.
    ///
    /// # Safety
    /// As for [`OutputGradient::form`]; the slab must have been made for as many columns, and with bias if sums are given.
    pub(super) unsafe fn form<G: Stored, Y: Stored>(
        &self,
        isa: Isa,
        gradient: &OutputGradient<'_, G, Y>,
        block: &RowBlock,
        channels: usize,
        (first, columns): (usize, usize),
        bias_sums: Option<*mut f32>,
    ) -> Operands {
        let paired = self.products.are_paired();
        let stored = gradient.stored(block, channels, first);
        let plain = stored.unwrap_or((self.plain.out.cast_const(), self.plain.stride));
        // SAFETY: the caller's promise.
        unsafe {
            if paired && bias_sums.is_none() {
                gradient.form(isa, block, channels, (first, columns), self.halves);
            } else if stored.is_none() {
                gradient.form(isa, block, channels, (first, columns), self.plain);
            }
            if let Some(sums) = bias_sums {
                let pass = ColumnSums {
                    rows: block.rows,
                    columns,
                    x: plain.0,
                    stride: plain.1,
                    sums,
                };
                sweep(isa, &pass);
                if paired {
                    let pass = CopyRows {
                        rows: block.rows,
                        columns,
                        x: plain.0,
                        stride: plain.1,
                        out: self.halves,
                    };
                    sweep(isa, &pass);
                }
            }
        }
        match self.products {
            Products::Single => Operands {
                left: plain,
                right: plain,
            },
            Products::Bf16Pairs | Products::Bf16Tiles => Operands {
                left: (self.halves.rows.out.cast(), self.halves.rows.stride / 2),
                right: (self.halves.pairs.out, self.halves.pairs.stride),
            },
        }
    }
}
