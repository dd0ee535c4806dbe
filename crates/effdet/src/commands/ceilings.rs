//! What this machine can do at most, measured: multiply-adds, memory, fork and join.

use std::time::Instant;

use effdet_cpu::arena::AlignedBuf;
use effdet_cpu::ceilings;
use effdet_cpu::kernels::Executor;
use effdet_cpu::storage::Products;

use super::bench::Peaks;

/// Shortest time that counts as a measurement.
const SHORTEST_S: f64 = 0.01;

/// Measurements of which the fastest counts: what disturbs a measurement only slows it down.
const REPEATS: usize = 5;

/// Bytes that no cache holds.
pub const BEYOND_CACHES: usize = 192 << 20;

/// The most units per second of `work`, which does as many units as it returns when it is asked for `amount`.
fn fastest(mut work: impl FnMut(usize) -> f64) -> f64 {
    let mut timed = |amount: usize| {
        let begin = Instant::now();
        let units = work(amount);
        (begin.elapsed().as_secs_f64(), units)
    };
    let mut amount = 1;
    while timed(amount).0 < SHORTEST_S {
        amount *= 2;
    }
    (0..REPEATS)
        .map(|_| timed(amount))
        .map(|(seconds, units)| units / seconds)
        .fold(0.0, f64::max)
}

/// Billions of floating-point operations per second in registers, on all threads of `executor`.
pub fn gflop_s(executor: &Executor, products: Products) -> f64 {
    1e-9 * fastest(|turns| ceilings::multiply_adds(executor, products, 1000 * turns))
}

/// Memory whose pages the system has given out.
fn written(bytes: usize) -> AlignedBuf {
    let mut values = AlignedBuf::zeroed(bytes / size_of::<f32>());
    values.fill(1.0);
    values
}

/// Billions of bytes per second read from `bytes` of memory, each thread its part of them.
pub fn read_gb_s(executor: &Executor, bytes: usize) -> f64 {
    let values = written(bytes);
    1e-9 * fastest(|passes| ceilings::read(executor, &values, passes))
}

/// Billions of bytes per second read and written by a copy of `bytes` of memory.
pub fn copy_gb_s(executor: &Executor, bytes: usize, streaming: bool) -> f64 {
    let (from, mut to) = (written(bytes / 2), written(bytes / 2));
    1e-9 * fastest(|passes| {
        (0..passes)
            .map(|_| ceilings::copy(executor, &from, &mut to, streaming))
            .sum()
    })
}

/// Microseconds of an empty job.
pub fn fork_join_us(executor: &Executor) -> f64 {
    1e6 / fastest(|times| {
        ceilings::fork_join(executor, 100 * times);
        100.0 * times as f64
    })
}

/// Microseconds until a page of 4 KiB that the system has not given out yet can be written.
pub fn fresh_page_us() -> f64 {
    const PAGES: usize = 4096;
    let pages_s = (0..REPEATS).map(|_| {
        let begin = Instant::now();
        let mut memory = vec![0u8; PAGES * 4096];
        for page in memory.chunks_exact_mut(4096) {
            page[0] = 1;
        }
        std::hint::black_box(&memory);
        PAGES as f64 / begin.elapsed().as_secs_f64()
    });
    1e6 / pages_s.fold(0.0, f64::max)
}

/// The ceilings that shares of a stage table are taken of.
pub fn peaks(executor: &Executor, pointwise: Products) -> Peaks {
    let gflop_s_of_f32 = gflop_s(executor, Products::Single);
    Peaks {
        gflop_s: gflop_s_of_f32,
        pointwise_gflop_s: match pointwise {
            Products::Single => gflop_s_of_f32,
            Products::Bf16Pairs | Products::Bf16Tiles => gflop_s(executor, pointwise),
        },
        gb_s: read_gb_s(executor, BEYOND_CACHES),
    }
}
