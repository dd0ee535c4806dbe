//! Convolutions, as cross-correlations with SAME padding.

use super::Window;
use crate::reference::{Float, Tensor};

/// Dense convolution without bias or with one.
///
/// ```text
/// y[n, p, o] = bias[o] + Σ_tap Σ_i x[n, p·stride + tap − before, i] · kernel[tap, i, o]
/// ```
///
/// # Shapes
/// `kernel`: `[size, size, in, out]`; `bias`: `[out]`; result: `[batch, ⌈height/stride⌉, ⌈width/stride⌉, out]`.
pub fn conv2d<F: Float>(
    x: &Tensor<F>,
    kernel: &[F],
    bias: Option<&[F]>,
    size: usize,
    stride: usize,
) -> Tensor<F> {
    let (inputs, outputs) = (x.channels, kernel.len() / (size * size * x.channels));
    let window = Window::square(x.map, size, stride);
    let mut y = Tensor::zeros(x.batch, window.output(), outputs);
    if let Some(bias) = bias {
        (y.data.chunks_exact_mut(outputs)).for_each(|cell| cell.copy_from_slice(bias));
    }
    for (x, y) in x.images().zip(y.images_mut()) {
        window.for_each_tap(|to, tap, from| {
            let y = &mut y[to * outputs..][..outputs];
            let rows = kernel[tap * inputs * outputs..].chunks_exact(outputs);
            for (&x, row) in x[from * inputs..][..inputs].iter().zip(rows) {
                add_multiple(y, x, row);
            }
        });
    }
    y
}

/// Gradients of [`conv2d`] by its input and its kernel; [`bias_backward`] gives the one by the bias.
///
/// ```text
/// dx[n, q, i]        = Σ_{p, tap: p·stride + tap − before = q} Σ_o dy[n, p, o] · kernel[tap, i, o]
/// dkernel[tap, i, o] = Σ_n Σ_p dy[n, p, o] · x[n, p·stride + tap − before, i]
/// ```
pub fn conv2d_backward<F: Float>(
    x: &Tensor<F>,
    kernel: &[F],
    size: usize,
    stride: usize,
    dy: &Tensor<F>,
) -> (Tensor<F>, Vec<F>) {
    let (inputs, outputs) = (x.channels, dy.channels);
    let window = Window::square(x.map, size, stride);
    let transposed = transpose_taps(kernel, inputs, outputs);
    let mut dx = x.zeros_like();
    let mut dkernel = vec![F::ZERO; kernel.len()];
    for ((x, dx), dy) in x.images().zip(dx.images_mut()).zip(dy.images()) {
        window.for_each_tap(|to, tap, from| {
            let dy = &dy[to * outputs..][..outputs];
            let start = tap * inputs * outputs;

            let dx = &mut dx[from * inputs..][..inputs];
            let columns = transposed[start..].chunks_exact(inputs);
            for (&dy, column) in dy.iter().zip(columns) {
                add_multiple(dx, dy, column);
            }

            let rows = dkernel[start..].chunks_exact_mut(outputs);
            for (&x, row) in x[from * inputs..][..inputs].iter().zip(rows) {
                add_multiple(row, x, dy);
            }
        });
    }
    (dx, dkernel)
}

/// Gradient by a bias that is added to every cell: `dbias[o] = Σ_n Σ_p dy[n, p, o]`.
pub fn bias_backward<F: Float>(dy: &Tensor<F>) -> Vec<F> {
    let mut sums = vec![0.0; dy.channels];
    for cell in dy.cells() {
        for (sum, &dy) in sums.iter_mut().zip(cell) {
            *sum += dy.to_f64();
        }
    }
    sums.into_iter().map(F::from_f64).collect()
}

/// Depthwise convolution, multiplier 1, no bias.
///
/// ```text
/// y[n, p, c] = Σ_tap x[n, p·stride + tap − before, c] · kernel[tap, c]
/// ```
///
/// # Shapes
/// `kernel`: `[size, size, channels, 1]`; result: `[batch, ⌈height/stride⌉, ⌈width/stride⌉, channels]`.
pub fn depthwise<F: Float>(x: &Tensor<F>, kernel: &[F], size: usize, stride: usize) -> Tensor<F> {
    let channels = x.channels;
    let window = Window::square(x.map, size, stride);
    let mut y = Tensor::zeros(x.batch, window.output(), channels);
    for (x, y) in x.images().zip(y.images_mut()) {
        window.for_each_tap(|to, tap, from| {
            let y = &mut y[to * channels..][..channels];
            add_products(
                y,
                &x[from * channels..][..channels],
                &kernel[tap * channels..][..channels],
            );
        });
    }
    y
}

/// Gradients of [`depthwise`] by its input and its kernel.
///
/// ```text
/// dx[n, q, c]     = Σ_{p, tap: p·stride + tap − before = q} dy[n, p, c] · kernel[tap, c]
/// dkernel[tap, c] = Σ_n Σ_p dy[n, p, c] · x[n, p·stride + tap − before, c]
/// ```
pub fn depthwise_backward<F: Float>(
    x: &Tensor<F>,
    kernel: &[F],
    size: usize,
    stride: usize,
    dy: &Tensor<F>,
) -> (Tensor<F>, Vec<F>) {
    let channels = x.channels;
    let window = Window::square(x.map, size, stride);
    let mut dx = x.zeros_like();
    let mut dkernel = vec![F::ZERO; kernel.len()];
    for ((x, dx), dy) in x.images().zip(dx.images_mut()).zip(dy.images()) {
        window.for_each_tap(|to, tap, from| {
            let dy = &dy[to * channels..][..channels];
            let taps = tap * channels..(tap + 1) * channels;
            let cell = from * channels..(from + 1) * channels;
            add_products(&mut dx[cell.clone()], dy, &kernel[taps.clone()]);
            add_products(&mut dkernel[taps], dy, &x[cell]);
        });
    }
    (dx, dkernel)
}

/// `y += factor·x`.
fn add_multiple<F: Float>(y: &mut [F], factor: F, x: &[F]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// `y += a·b`, element by element.
fn add_products<F: Float>(y: &mut [F], a: &[F], b: &[F]) {
    for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
        *y += a * b;
    }
}

/// `[taps, rows, columns]` → `[taps, columns, rows]`.
fn transpose_taps<F: Float>(kernel: &[F], rows: usize, columns: usize) -> Vec<F> {
    let mut transposed = Vec::with_capacity(kernel.len());
    for tap in kernel.chunks_exact(rows * columns) {
        for column in 0..columns {
            transposed.extend((0..rows).map(|row| tap[row * columns + column]));
        }
    }
    transposed
}

#[cfg(test)]
mod tests {
    use effdet_model::network::MapSize;

    use super::super::gradient_check::{check_gradient, dot, noise, noise_tensor};
    use super::*;

    const MAPS: [MapSize; 3] = [
        MapSize { height: 5, width: 4 },
        MapSize { height: 6, width: 7 },
        MapSize { height: 1, width: 2 },
    ];

    fn tensor(map: MapSize, data: Vec<f64>) -> Tensor<f64> {
        let channels = data.len() / map.cells();
        Tensor {
            batch: 1,
            map,
            channels,
            data,
        }
    }

    #[test]
    fn a_stride_of_two_on_an_even_map_pads_at_the_end_only() {
        let map = MapSize { height: 4, width: 4 };
        let x = tensor(map, (1..=16).map(f64::from).collect());
        let y = conv2d(&x, &[1.0; 9], None, 3, 2);
        assert_eq!(y.data, [54.0, 45.0, 72.0, 54.0]);
    }

    #[test]
    fn kernels_are_not_flipped() {
        let map = MapSize { height: 1, width: 3 };
        let x = tensor(map, vec![1.0, 10.0, 100.0]);
        let kernel = [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0];
        let expected = [32.0, 321.0, 210.0];
        assert_eq!(conv2d(&x, &kernel, None, 3, 1).data, expected);
        assert_eq!(depthwise(&x, &kernel, 3, 1).data, expected);
    }

    #[test]
    fn a_pointwise_convolution_is_a_matrix_product_plus_bias() {
        let map = MapSize { height: 1, width: 2 };
        let x = tensor(map, vec![1.0, 2.0, 3.0, 4.0]);
        let y = conv2d(
            &x,
            &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            Some(&[100.0, 200.0, 300.0]),
            1,
            1,
        );
        assert_eq!(y.data, [109.0, 212.0, 315.0, 119.0, 226.0, 333.0]);
    }

    #[test]
    fn gradients_of_dense_convolutions_match_finite_differences() {
        for map in MAPS {
            for (size, stride) in [(1, 1), (3, 1), (3, 2), (5, 2)] {
                let x = noise_tensor(1, 2, map, 3);
                let kernel = noise(2, size * size * 3 * 2);
                let bias = noise(3, 2);
                let dy = {
                    let y = conv2d(&x, &kernel, Some(&bias), size, stride);
                    noise_tensor(4, y.batch, y.map, y.channels)
                };
                let (dx, dkernel) = conv2d_backward(&x, &kernel, size, stride, &dy);
                check_gradient(&x.data, &dx.data, |data| {
                    let x = Tensor {
                        data: data.to_vec(),
                        ..x
                    };
                    dot(&dy, &conv2d(&x, &kernel, Some(&bias), size, stride))
                });
                check_gradient(&kernel, &dkernel, |kernel| {
                    dot(&dy, &conv2d(&x, kernel, Some(&bias), size, stride))
                });
                check_gradient(&bias, &bias_backward(&dy), |bias| {
                    dot(&dy, &conv2d(&x, &kernel, Some(bias), size, stride))
                });
            }
        }
    }

    #[test]
    fn gradients_of_depthwise_convolutions_match_finite_differences() {
        for map in MAPS {
            for (size, stride) in [(3, 1), (3, 2), (5, 1), (5, 2)] {
                let x = noise_tensor(5, 2, map, 3);
                let kernel = noise(6, size * size * 3);
                let dy = {
                    let y = depthwise(&x, &kernel, size, stride);
                    noise_tensor(7, y.batch, y.map, y.channels)
                };
                let (dx, dkernel) = depthwise_backward(&x, &kernel, size, stride, &dy);
                check_gradient(&x.data, &dx.data, |data| {
                    let x = Tensor {
                        data: data.to_vec(),
                        ..x
                    };
                    dot(&dy, &depthwise(&x, &kernel, size, stride))
                });
                check_gradient(&kernel, &dkernel, |kernel| {
                    dot(&dy, &depthwise(&x, kernel, size, stride))
                });
            }
        }
    }
}
