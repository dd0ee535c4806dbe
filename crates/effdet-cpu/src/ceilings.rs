//! Work that reaches what the processor and its memory can do at most, for whoever holds a clock.
//!
//! Source: the usual peak and STREAM measurements, with the instruction sets and the threads of the kernels.

use std::hint::black_box;

use crate::arena::{ALIGNMENT, AlignedBuf, SharedPtr};
use crate::kernels::Executor;
use crate::kernels::gemm::{self, Epilogue, Multiply, PANEL, Prefetch};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx512, NativePairs};
use crate::simd::{Isa, PairProduct, Product, Simd, SingleProduct, dispatch, has_native_bf16, has_tiles};
use crate::storage::Products;

/// Whether the processor has an instruction for products of bfloat16 pairs that kernels on this executor's instruction set use.
pub fn has_bf16_products(executor: &Executor) -> bool {
    has_native_bf16(executor.isa())
}

/// Whether the processor has instructions for products of bfloat16 in tiles that kernels on this executor's instruction set use.
pub fn has_tile_products(executor: &Executor) -> bool {
    has_tiles(executor.isa())
}

/// Independent chains of multiply-adds, enough for the latency of any processor.
const CHAINS: (usize, usize) = (24, 12);

#[inline(always)]
unsafe fn chains_body<S: Simd, P: Product<S>, const N: usize>(turns: usize) -> f32 {
    // SAFETY: arrays of 16 values hold a vector.
    unsafe {
        let start: [f32; 16] = black_box(std::array::from_fn(|i| i as f32 * 1e-3));
        let (factor, term) = (S::load(start.as_ptr()), S::splat(black_box(1e-9)));
        let mut chains: [S::V; N] = std::array::from_fn(|i| S::splat(black_box(i as f32)));
        for _ in 0..turns {
            for chain in &mut chains {
                *chain = P::accumulate(factor, term, *chain);
            }
        }
        let mut out = [0.0f32; 16];
        let total = chains
            .into_iter()
            .fold(S::zero(), |sum, chain| S::add(sum, chain));
        S::store(out.as_mut_ptr(), total);
        out[0]
    }
}

#[inline(always)]
unsafe fn single_body<S: Simd>(turns: usize) -> (f32, usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if S::REGISTERS == 32 {
            (
                chains_body::<S, SingleProduct, { CHAINS.0 }>(turns),
                CHAINS.0 * S::LANES,
            )
        } else {
            (
                chains_body::<S, SingleProduct, { CHAINS.1 }>(turns),
                CHAINS.1 * S::LANES,
            )
        }
    }
}

#[inline(always)]
unsafe fn pairs_body<S: Simd>(turns: usize) -> (f32, usize) {
    // SAFETY: the caller's promise.
    unsafe {
        (
            chains_body::<S, PairProduct, { CHAINS.1 }>(turns),
            2 * CHAINS.1 * S::LANES,
        )
    }
}

dispatch! {
    /// # Safety
    /// `isa` must be available.
    unsafe fn single(turns: usize) -> (f32, usize) = single_body;
}

dispatch! {
    /// # Safety
    /// `isa` must be available.
    unsafe fn pairs(turns: usize) -> (f32, usize) = pairs_body;
}

/// # Safety
/// The processor must have AVX-512 BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16")]
unsafe fn native_pairs(turns: usize) -> (f32, usize) {
    // SAFETY: the features are enabled here.
    unsafe {
        (
            chains_body::<Avx512, NativePairs, { CHAINS.0 }>(turns),
            2 * CHAINS.0 * Avx512::LANES,
        )
    }
}

/// Products of matrices that the innermost cache holds: one of them for every so many `turns`, and lanes as if for each of these.
///
/// # Safety
/// `isa` must be available.
unsafe fn tiles(isa: Isa, turns: usize) -> (f32, usize) {
    const TURNS: usize = 64;
    let (rows, columns, depth) = (96, 32, 64);
    let (a, b) = (
        AlignedBuf::zeroed(rows * depth),
        AlignedBuf::<f32>::zeroed(columns * depth),
    );
    let mut c = AlignedBuf::zeroed(rows * columns);
    let product = Multiply {
        rows,
        columns,
        depth,
        a: a.as_ptr(),
        a_stride: depth,
        b: b.as_ptr(),
        b_panel_stride: depth * PANEL,
        epilogue: Epilogue::store(c.as_mut_ptr(), columns),
    };
    for _ in 0..turns.div_ceil(TURNS) {
        // SAFETY: the buffers have the sizes given; the instruction set is the caller's promise.
        unsafe { gemm::multiply(isa, Products::Bf16Tiles, &product, &mut Prefetch::none()) };
    }
    (c[0], 2 * rows * columns * depth / TURNS)
}

/// Does nothing but multiply-adds in registers, on all threads, and returns the floating-point operations that were done. Tiles are
/// loaded from the innermost cache.
pub fn multiply_adds(executor: &Executor, products: Products, turns: usize) -> f64 {
    let (isa, threads) = (executor.isa(), executor.pool().threads());
    let mut done = vec![0usize; threads];
    let counts = SharedPtr::new(&mut done);
    executor.pool().run(threads, &|task, _| {
        // SAFETY: an executor's instruction set is available, and each task has a count to itself.
        unsafe {
            let (sum, lanes) = match products {
                Products::Single => single(isa, turns),
                #[cfg(target_arch = "x86_64")]
                Products::Bf16Pairs if has_native_bf16(isa) => native_pairs(turns),
                Products::Bf16Pairs => pairs(isa, turns),
                Products::Bf16Tiles => tiles(isa, turns),
            };
            black_box(sum);
            *counts.get().add(task) = lanes;
        }
    });
    done.iter().map(|&lanes| 2.0 * (lanes * turns) as f64).sum()
}

#[inline(always)]
unsafe fn read_body<S: Simd>(values: &[f32], passes: usize) -> f32 {
    const VECTORS: usize = 8;
    // Far enough ahead for main memory.
    const AHEAD: usize = 512;
    let line = ALIGNMENT / size_of::<f32>();
    // SAFETY: whole groups of vectors inside the slice; a prefetch may go past it.
    unsafe {
        let mut sums = [S::zero(); VECTORS];
        for _ in 0..passes {
            for group in values.chunks_exact(VECTORS * S::LANES) {
                let group = group.as_ptr();
                for i in (0..VECTORS * S::LANES).step_by(line) {
                    S::prefetch(group.wrapping_add(AHEAD + i));
                }
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = S::add(*sum, S::load(group.add(i * S::LANES)));
                }
            }
        }
        let mut out = [0.0f32; 16];
        let total = sums.into_iter().fold(S::zero(), |total, sum| S::add(total, sum));
        S::store(out.as_mut_ptr(), total);
        out[0]
    }
}

dispatch! {
    /// # Safety
    /// `isa` must be available.
    unsafe fn read_part(values: &[f32], passes: usize) -> f32 = read_body;
}

#[inline(always)]
unsafe fn copy_body<S: Simd>(from: &[f32], to: &mut [f32], streaming: bool) {
    let vectors = from.chunks_exact(S::LANES).zip(to.chunks_exact_mut(S::LANES));
    // SAFETY: whole vectors of both slices; streaming was asked for where `to` is aligned.
    unsafe {
        if streaming {
            vectors.for_each(|(from, to)| S::stream(to.as_mut_ptr(), S::load(from.as_ptr())));
        } else {
            vectors.for_each(|(from, to)| S::store(to.as_mut_ptr(), S::load(from.as_ptr())));
        }
    }
}

dispatch! {
    /// # Safety
    /// `isa` must be available; `to` on a 64-byte boundary where `streaming`.
    unsafe fn copy_part(from: &[f32], to: &mut [f32], streaming: bool) = copy_body;
}

/// Values of a thread's part: whole cache lines and groups of vectors.
fn part_len(executor: &Executor, values: usize) -> usize {
    values / executor.pool().threads() / 256 * 256
}

/// Reads `values` `passes` times, each thread its own part, and returns the bytes read.
pub fn read(executor: &Executor, values: &[f32], passes: usize) -> f64 {
    let (isa, threads) = (executor.isa(), executor.pool().threads());
    let len = part_len(executor, values.len());
    executor.pool().run(threads, &|task, _| {
        // SAFETY: an executor's instruction set is available.
        black_box(unsafe { read_part(isa, &values[task * len..][..len], passes) });
    });
    (threads * len * passes * size_of::<f32>()) as f64
}

/// Copies `from` to `to`, past the caches where `streaming` and `to` lies on a 64-byte boundary, each thread its own part, and
/// returns the bytes read and written.
///
/// # Panics
/// When the lengths differ.
pub fn copy(executor: &Executor, from: &[f32], to: &mut [f32], streaming: bool) -> f64 {
    assert_eq!(from.len(), to.len(), "copies have equal lengths");
    let (isa, threads) = (executor.isa(), executor.pool().threads());
    let len = part_len(executor, from.len());
    let streaming = streaming && to.as_ptr().addr().is_multiple_of(ALIGNMENT);
    let target = SharedPtr::new(to);
    executor.pool().run(threads, &|task, _| {
        // SAFETY: an executor's instruction set is available; the parts are disjoint and inside the slices.
        unsafe {
            let to = std::slice::from_raw_parts_mut(target.get().add(task * len), len);
            copy_part(isa, &from[task * len..][..len], to, streaming);
        }
    });
    (2 * threads * len * size_of::<f32>()) as f64
}

/// Starts and ends empty jobs on all threads.
pub fn fork_join(executor: &Executor, times: usize) {
    for _ in 0..times {
        executor.pool().run(executor.pool().threads(), &|task, _| {
            black_box(task);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::AlignedBuf;
    use crate::simd::Isa;

    #[test]
    fn work_is_counted_for_every_instruction_set_and_copies_arrive() {
        for isa in Isa::available() {
            let executor = Executor::new(2, isa);
            for products in [Products::Single, Products::Bf16Pairs, Products::Bf16Tiles] {
                let [once, twice] = [64, 128].map(|turns| multiply_adds(&executor, products, turns));
                assert!(once >= (2 * 2 * 64 * 12 * 4) as f64, "{isa}: {once}");
                assert_eq!(twice, 2.0 * once, "{isa}");
            }
            let from = AlignedBuf::from_slice(&(0..2048).map(|i| i as f32).collect::<Vec<_>>());
            for streaming in [false, true] {
                let mut to = AlignedBuf::zeroed(2048);
                assert_eq!(copy(&executor, &from, &mut to, streaming), 2.0 * 4.0 * 2048.0);
                assert_eq!(to[..], from[..], "{isa}");
            }
            assert_eq!(read(&executor, &from, 3), 3.0 * 4.0 * 2048.0);
            fork_join(&executor, 3);
        }
    }
}
