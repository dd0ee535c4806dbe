//! Products against float64, and against themselves on other instruction sets.

use super::*;
use crate::simd::Isa;

fn values(len: usize, seed: u32) -> Vec<f32> {
    let value = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(97)) >> 8) as f32;
    (0..len as u32)
        .map(|i| value(i) / (1 << 23) as f32 - 1.0)
        .collect()
}

/// C and, where asked for, the sums after one product; `None` sums leave them out.
fn product(
    isa: Isa,
    products: Products,
    (m, n, k): (usize, usize, usize),
    full: bool,
) -> (Vec<f32>, Vec<f32>) {
    let (a, b, bias) = (values(m * k, 1), values(k * n, 2), values(padded(n), 3));
    let lanes = products.lanes(k);
    let mut packed = vec![f32::NAN; packed_len(lanes, n)];
    let a = match products {
        Products::Single => {
            pack(&b, n, &mut packed);
            a
        }
        Products::Bf16Pairs | Products::Bf16Tiles => {
            // SAFETY: the instruction set is available.
            unsafe { pack_pairs(isa, &b, n, &mut packed) };
            let mut rows = pairs_of_columns(&a, k);
            rows.resize(m.next_multiple_of(TILE_ROWS) * lanes, f32::NAN);
            rows
        }
    };
    let (mut c, mut sums) = (values(m * (n + 3), 4), vec![0.5; 2 * padded(n)]);
    let mut epilogue = Epilogue::store(c.as_mut_ptr(), n + 3);
    if full {
        epilogue.accumulate = true;
        epilogue.bias = bias.as_ptr();
        epilogue.sums = sums.as_mut_ptr();
        epilogue.sums_stride = padded(n);
    }
    let args = Multiply {
        rows: m,
        columns: n,
        depth: lanes,
        a: a.as_ptr(),
        a_stride: lanes,
        b: packed.as_ptr(),
        b_panel_stride: lanes * PANEL,
        epilogue,
    };
    // SAFETY: the instruction set is available and the buffers have the sizes given.
    unsafe { multiply(isa, products, &args, &mut Prefetch::none()) };
    (c, sums)
}

/// Rows of pairs of neighbouring columns.
fn pairs_of_columns(matrix: &[f32], columns: usize) -> Vec<f32> {
    (matrix.chunks(columns))
        .flat_map(|row| {
            row.chunks(2)
                .map(|v| pair(v[0], v.get(1).copied().unwrap_or(0.0)))
        })
        .collect()
}

/// Pairs of neighbouring rows.
fn pairs_of_rows(matrix: &[f32], columns: usize) -> Vec<f32> {
    (matrix.chunks(2 * columns))
        .flat_map(|rows| (0..columns).map(|j| pair(rows[j], rows.get(columns + j).copied().unwrap_or(0.0))))
        .collect()
}

/// What the products multiply.
fn operand(products: Products, value: f32) -> f64 {
    f64::from(match products {
        Products::Single => value,
        Products::Bf16Pairs | Products::Bf16Tiles => Bf16::from_f32(value).to_f32(),
    })
}

const SHAPES: [(usize, usize, usize); 11] = [
    (70, 40, 100),
    (64, 48, 63),
    (1, 1, 1),
    (13, 8, 3),
    (7, 24, 27),
    (29, 40, 5),
    (12, 36, 40),
    (25, 51, 64),
    (3, 16, 9),
    (11, 33, 2),
    (96, 819, 4),
];

fn shapes() -> impl Iterator<Item = ((usize, usize, usize), Products)> {
    let all = [Products::Single, Products::Bf16Pairs, Products::Bf16Tiles];
    (SHAPES.into_iter()).flat_map(move |shape| all.map(|products| (shape, products)))
}

#[test]
fn a_product_matches_float64_and_touches_nothing_else() {
    for ((m, n, k), products) in shapes() {
        let (a, b, bias, before) = (
            values(m * k, 1),
            values(k * n, 2),
            values(padded(n), 3),
            values(m * (n + 3), 4),
        );
        for full in [false, true] {
            let (c, sums) = product(Isa::detect(), products, (m, n, k), full);
            let (mut total, mut squares) = (vec![0.5f64; n], vec![0.5f64; n]);
            for i in 0..m {
                for j in 0..n {
                    let dot: f64 = (0..k)
                        .map(|l| operand(products, a[i * k + l]) * operand(products, b[l * n + j]))
                        .sum();
                    let rest = f64::from(before[i * (n + 3) + j]) + f64::from(bias[j]);
                    let expected = if full { dot + rest } else { dot };
                    assert!(
                        (f64::from(c[i * (n + 3) + j]) - expected).abs() < 1e-5,
                        "{m}x{n}x{k} at {i}, {j}"
                    );
                    total[j] += expected;
                    squares[j] += expected * expected;
                }
                assert_eq!(c[i * (n + 3) + n..][..3], before[i * (n + 3) + n..][..3]);
            }
            for j in (0..n).filter(|_| full) {
                assert!((f64::from(sums[j]) - total[j]).abs() < 1e-4);
                assert!((f64::from(sums[padded(n) + j]) - squares[j]).abs() < 3e-4);
            }
        }
    }
}

#[test]
fn a_product_has_the_same_bits_on_every_instruction_set() {
    for (shape, products) in shapes() {
        let expected = product(Isa::Portable, products, shape, true);
        for isa in Isa::available() {
            let (c, sums) = product(isa, products, shape, true);
            let (n, padded_n) = (shape.1, padded(shape.1));
            assert_eq!(c, expected.0, "{shape:?}, {products:?} on {isa}");
            assert_eq!(sums[..n], expected.1[..n]);
            assert_eq!(sums[padded_n..][..n], expected.1[padded_n..][..n]);
        }
    }
}

fn transposed_product(
    isa: Isa,
    products: Products,
    (m, n, k): (usize, usize, usize),
    accumulate: bool,
) -> Vec<f32> {
    let (mut p, mut q) = (values(m * padded(k), 1), values(m * padded(n), 2));
    if products.are_paired() {
        (p, q) = (pairs_of_rows(&p, padded(k)), pairs_of_rows(&q, padded(n)));
    }
    let mut c = values(k * padded(n), 3);
    let args = MultiplyTransposed {
        depth: products.lanes(m),
        rows: k,
        columns: n,
        p: p.as_ptr(),
        p_stride: padded(k),
        q: q.as_ptr(),
        q_stride: padded(n),
        c: c.as_mut_ptr(),
        c_stride: padded(n),
        accumulate,
    };
    // SAFETY: the instruction set is available and the buffers have the sizes given.
    unsafe { multiply_transposed(isa, products, &args, &mut Prefetch::none()) };
    c.chunks(padded(n)).flat_map(|row| row[..n].to_vec()).collect()
}

#[test]
fn a_transposed_product_matches_float64_and_has_the_same_bits_on_every_instruction_set() {
    for ((m, n, k), products) in shapes() {
        let (p, q, before) = (
            values(m * padded(k), 1),
            values(m * padded(n), 2),
            values(k * padded(n), 3),
        );
        for accumulate in [false, true] {
            let expected = transposed_product(Isa::Portable, products, (m, n, k), accumulate);
            for isa in Isa::available() {
                assert_eq!(
                    transposed_product(isa, products, (m, n, k), accumulate),
                    expected,
                    "{m}x{n}x{k}, {products:?} on {isa}"
                );
            }
            for i in 0..k {
                for j in 0..n {
                    let dot = |r: usize| {
                        operand(products, p[r * padded(k) + i]) * operand(products, q[r * padded(n) + j])
                    };
                    let start = if accumulate {
                        f64::from(before[i * padded(n) + j])
                    } else {
                        0.0
                    };
                    let truth = start + (0..m).map(dot).sum::<f64>();
                    assert!((f64::from(expected[i * n + j]) - truth).abs() < 1e-5);
                }
            }
        }
    }
}
