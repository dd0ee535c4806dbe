//! Max-pooling and nearest-neighbour upsampling.

use effdet_model::hparams::UpsampleRule;
use effdet_model::network::MapSize;

use super::Window;
use crate::reference::{Float, Tensor};

/// Max-pool with SAME padding, kernel = stride + 1 per axis; padding never wins.
///
/// Also gives, for every output value, the index in `x.data` of the value that won: the first one in row-major order.
///
/// # Shapes
/// `strides`: vertical, horizontal; result: `[batch, ⌈height/strides.0⌉, ⌈width/strides.1⌉, channels]`.
pub fn max_pool<F: Float>(x: &Tensor<F>, strides: (usize, usize)) -> (Tensor<F>, Vec<usize>) {
    let channels = x.channels;
    let window = Window::same(x.map, (strides.0 + 1, strides.1 + 1), strides);
    let mut y = Tensor::zeros(x.batch, window.output(), channels);
    y.data.fill(F::NEG_INFINITY);
    let mut winners = vec![usize::MAX; y.data.len()];
    for image in 0..x.batch {
        let (x_start, y_start) = (image * x.map.cells(), image * y.map.cells());
        window.for_each_tap(|to, _, from| {
            for c in 0..channels {
                let (from, to) = ((x_start + from) * channels + c, (y_start + to) * channels + c);
                // The first value wins over the initial −∞ even when it is −∞ or not a number itself.
                if winners[to] == usize::MAX || x.data[from] > y.data[to] {
                    y.data[to] = x.data[from];
                    winners[to] = from;
                }
            }
        });
    }
    (y, winners)
}

/// Gradient of [`max_pool`]: every `dy` goes to the input that won.
pub fn max_pool_backward<F: Float>(x: &Tensor<F>, winners: &[usize], dy: &Tensor<F>) -> Tensor<F> {
    let mut dx = x.zeros_like();
    for (&winner, &dy) in winners.iter().zip(&dy.data) {
        dx.data[winner] += dy;
    }
    dx
}

/// Nearest-neighbour resize: `y[n, (i, j), c] = x[n, (source(i), source(j)), c]`, see [`nearest_source`].
///
/// # Shapes
/// Result: `[batch, output.height, output.width, channels]`.
pub fn nearest<F: Float>(x: &Tensor<F>, output: MapSize, rule: UpsampleRule) -> Tensor<F> {
    let mut y = Tensor::zeros(x.batch, output, x.channels);
    for (x_image, y_image) in x.images().zip(y.images_mut()) {
        for_each_source(x.map, output, rule, |to, from| {
            let from = &x_image[from * x.channels..][..x.channels];
            y_image[to * x.channels..][..x.channels].copy_from_slice(from);
        });
    }
    y
}

/// Gradient of [`nearest`]: every input gets the sum over the outputs that copied it.
pub fn nearest_backward<F: Float>(x: &Tensor<F>, rule: UpsampleRule, dy: &Tensor<F>) -> Tensor<F> {
    let mut dx = x.zeros_like();
    for (dx, dy_image) in dx.images_mut().zip(dy.images()) {
        for_each_source(x.map, dy.map, rule, |to, from| {
            let dy = &dy_image[to * x.channels..][..x.channels];
            for (dx, &dy) in dx[from * x.channels..].iter_mut().zip(dy) {
                *dx += dy;
            }
        });
    }
    dx
}

/// Source index of output position `i` along one axis, in TensorFlow's float32 arithmetic.
///
/// Half-pixel: `min(⌊(i + ½)·input/output⌋, input − 1)`; legacy: `min(⌊i·input/output⌋, input − 1)`.
pub fn nearest_source(i: usize, input: usize, output: usize, rule: UpsampleRule) -> usize {
    let scale = input as f32 / output as f32;
    let position = match rule {
        UpsampleRule::HalfPixel => (i as f32 + 0.5) * scale,
        UpsampleRule::Legacy => i as f32 * scale,
    };
    (position as usize).min(input - 1)
}

/// Calls `visit(output cell, input cell)` for every output cell, row by row.
fn for_each_source(input: MapSize, output: MapSize, rule: UpsampleRule, mut visit: impl FnMut(usize, usize)) {
    for y in 0..output.height {
        let from_y = nearest_source(y, input.height, output.height, rule);
        for x in 0..output.width {
            let from_x = nearest_source(x, input.width, output.width, rule);
            visit(y * output.width + x, from_y * input.width + from_x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{check_gradient, dot, noise_tensor};
    use super::*;

    /// Source: TensorFlow's resize, 3 → 5 by both rules.
    #[test]
    fn upsampling_rules_differ_where_the_step_is_no_doubling() {
        let sources = |input, output, rule| -> Vec<usize> {
            (0..output)
                .map(|i| nearest_source(i, input, output, rule))
                .collect()
        };
        assert_eq!(sources(3, 5, UpsampleRule::HalfPixel), [0, 0, 1, 2, 2]);
        assert_eq!(sources(3, 5, UpsampleRule::Legacy), [0, 0, 1, 1, 2]);
        for rule in [UpsampleRule::HalfPixel, UpsampleRule::Legacy] {
            assert_eq!(sources(2, 4, rule), [0, 0, 1, 1]);
            assert_eq!(sources(1, 1, rule), [0]);
        }
    }

    #[test]
    fn padding_never_wins_a_pool() {
        let x = Tensor {
            batch: 1,
            map: MapSize { height: 2, width: 3 },
            channels: 1,
            data: vec![-5.0, -6.0, -7.0, -8.0, -9.0, -4.0],
        };
        let (y, winners) = max_pool(&x, (2, 2));
        assert_eq!(y.shape(), [1, 1, 2, 1]);
        assert_eq!(y.data, [-5.0, -4.0]);
        assert_eq!(winners, [0, 5]);
    }

    #[test]
    fn equal_values_send_their_gradient_to_the_first() {
        let x = Tensor {
            batch: 1,
            map: MapSize { height: 2, width: 2 },
            channels: 1,
            data: vec![1.0, 3.0, 3.0, 3.0],
        };
        assert_eq!(max_pool(&x, (2, 2)).1, [1]);
    }

    #[test]
    fn gradients_of_pools_match_finite_differences() {
        for (map, strides) in [
            (MapSize { height: 4, width: 6 }, (2, 2)),
            (MapSize { height: 5, width: 3 }, (2, 2)),
            (MapSize { height: 7, width: 4 }, (3, 2)),
        ] {
            let x = noise_tensor(1, 2, map, 2);
            let (y, winners) = max_pool(&x, strides);
            let dy = noise_tensor(2, 2, y.map, 2);
            check_gradient(&x.data, &max_pool_backward(&x, &winners, &dy).data, |data| {
                dot(
                    &dy,
                    &max_pool(
                        &Tensor {
                            data: data.to_vec(),
                            ..x
                        },
                        strides,
                    )
                    .0,
                )
            });
        }
    }

    #[test]
    fn gradients_of_upsampling_match_finite_differences() {
        for rule in [UpsampleRule::HalfPixel, UpsampleRule::Legacy] {
            let output = MapSize { height: 5, width: 4 };
            let x = noise_tensor(1, 2, MapSize { height: 3, width: 2 }, 2);
            let dy = noise_tensor(2, 2, output, 2);
            check_gradient(&x.data, &nearest_backward(&x, rule, &dy).data, |data| {
                dot(
                    &dy,
                    &nearest(
                        &Tensor {
                            data: data.to_vec(),
                            ..x
                        },
                        output,
                        rule,
                    ),
                )
            });
        }
    }
}
