//! Residuals, stochastic depth and the two ends of squeeze-and-excite.

use effdet_model::network::MapSize;

use crate::reference::{Float, Tensor};

/// `a + b`; the gradient by either is `dy`.
pub fn add<F: Float>(a: &Tensor<F>, b: &Tensor<F>) -> Tensor<F> {
    a.zip_values(b, |a, b| a + b)
}

/// Stochastic depth: `y[n, p, c] = x[n, p, c]·factors[n]`; the gradient is the same function of `dy`.
///
/// # Shapes
/// `factors`: `[batch]`, each `1/survival` for an image whose branch survives and 0 for another.
pub fn drop_connect<F: Float>(x: &Tensor<F>, factors: &[F]) -> Tensor<F> {
    let mut y = x.clone();
    for (image, &factor) in y.images_mut().zip(factors) {
        image.iter_mut().for_each(|value| *value = *value * factor);
    }
    y
}

/// Squeeze: `y[n, c] = Σ_p x[n, p, c]/(height·width)`.
///
/// # Shapes
/// Result: `[batch, 1, 1, channels]`.
pub fn spatial_mean<F: Float>(x: &Tensor<F>) -> Tensor<F> {
    let mut y = Tensor::zeros(x.batch, MapSize { height: 1, width: 1 }, x.channels);
    for (image, y) in x.images().zip(y.images_mut()) {
        for (c, y) in y.iter_mut().enumerate() {
            let sum: f64 = image.iter().skip(c).step_by(x.channels).map(|x| x.to_f64()).sum();
            *y = F::from_f64(sum / x.map.cells() as f64);
        }
    }
    y
}

/// Gradient of [`spatial_mean`]: `dx[n, p, c] = dy[n, c]/(height·width)`.
pub fn spatial_mean_backward<F: Float>(x: &Tensor<F>, dy: &Tensor<F>) -> Tensor<F> {
    let cells = F::from_f64(x.map.cells() as f64);
    let mut dx = x.zeros_like();
    for (dx, dy) in dx.images_mut().zip(dy.images()) {
        for cell in dx.chunks_exact_mut(dy.len()) {
            for (dx, &dy) in cell.iter_mut().zip(dy) {
                *dx = dy / cells;
            }
        }
    }
    dx
}

/// Excite: `y[n, p, c] = x[n, p, c]·σ(logits[n, c])`.
///
/// # Shapes
/// `logits`: `[batch, 1, 1, channels]`.
pub fn gate<F: Float>(x: &Tensor<F>, logits: &Tensor<F>) -> Tensor<F> {
    let mut y = x.clone();
    for (y, logits) in y.images_mut().zip(logits.images()) {
        let gates: Vec<F> = logits.iter().map(|g| g.sigmoid()).collect();
        for cell in y.chunks_exact_mut(gates.len()) {
            for (y, &gate) in cell.iter_mut().zip(&gates) {
                *y = *y * gate;
            }
        }
    }
    y
}

/// Gradients of [`gate`] by `x` and `logits`.
///
/// ```text
/// s = σ(logits)      dx = dy·s      dlogits[n, c] = s·(1 − s)·Σ_p dy·x
/// ```
pub fn gate_backward<F: Float>(x: &Tensor<F>, logits: &Tensor<F>, dy: &Tensor<F>) -> (Tensor<F>, Tensor<F>) {
    let dx = gate(dy, logits);
    let mut dlogits = logits.zeros_like();
    for (((dlogits, logits), x), dy) in (dlogits.images_mut().zip(logits.images()))
        .zip(x.images())
        .zip(dy.images())
    {
        let mut sums = vec![0.0; logits.len()];
        for (x, dy) in x.chunks_exact(sums.len()).zip(dy.chunks_exact(logits.len())) {
            for ((sum, &x), &dy) in sums.iter_mut().zip(x).zip(dy) {
                *sum += (dy * x).to_f64();
            }
        }
        for ((dlogits, &logit), sum) in dlogits.iter_mut().zip(logits).zip(sums) {
            let s = logit.sigmoid();
            *dlogits = s * (F::ONE - s) * F::from_f64(sum);
        }
    }
    (dx, dlogits)
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{check_gradient, dot, noise_tensor};
    use super::*;

    const MAP: MapSize = MapSize { height: 3, width: 2 };
    const POINT: MapSize = MapSize { height: 1, width: 1 };

    #[test]
    fn a_mean_is_taken_per_image_and_channel() {
        let x = Tensor {
            batch: 2,
            map: MapSize { height: 1, width: 2 },
            channels: 2,
            data: vec![1.0, 10.0, 3.0, 30.0, 5.0, 50.0, 7.0, 70.0],
        };
        assert_eq!(spatial_mean(&x).data, [2.0, 20.0, 6.0, 60.0]);
    }

    #[test]
    fn a_kept_image_is_scaled_and_a_dropped_one_is_zero() {
        let x = noise_tensor(1, 2, MAP, 2);
        let y = drop_connect(&x, &[0.0, 1.25]);
        let half = x.data.len() / 2;
        assert!(y.data[..half].iter().all(|&y| y == 0.0));
        assert!(
            y.data[half..]
                .iter()
                .zip(&x.data[half..])
                .all(|(&y, &x)| y == x * 1.25)
        );
    }

    #[test]
    fn gradients_of_stochastic_depth_match_finite_differences() {
        let x = noise_tensor(1, 2, MAP, 2);
        let dy = noise_tensor(2, 2, MAP, 2);
        let factors = [1.25, 0.0];
        check_gradient(&x.data, &drop_connect(&dy, &factors).data, |data| {
            dot(
                &dy,
                &drop_connect(
                    &Tensor {
                        data: data.to_vec(),
                        ..x
                    },
                    &factors,
                ),
            )
        });
    }

    #[test]
    fn gradients_of_a_residual_match_finite_differences() {
        let (a, b) = (noise_tensor(1, 2, MAP, 2), noise_tensor(3, 2, MAP, 2));
        let dy = noise_tensor(2, 2, MAP, 2);
        check_gradient(&a.data, &dy.data, |data| {
            dot(
                &dy,
                &add(
                    &Tensor {
                        data: data.to_vec(),
                        ..a
                    },
                    &b,
                ),
            )
        });
        check_gradient(&b.data, &dy.data, |data| {
            dot(
                &dy,
                &add(
                    &a,
                    &Tensor {
                        data: data.to_vec(),
                        ..b
                    },
                ),
            )
        });
    }

    #[test]
    fn gradients_of_squeeze_and_excite_match_finite_differences() {
        let x = noise_tensor(1, 2, MAP, 3);
        let logits = noise_tensor(2, 2, POINT, 3);
        let dy = noise_tensor(3, 2, MAP, 3);
        let (dx, dlogits) = gate_backward(&x, &logits, &dy);
        check_gradient(&x.data, &dx.data, |data| {
            dot(
                &dy,
                &gate(
                    &Tensor {
                        data: data.to_vec(),
                        ..x
                    },
                    &logits,
                ),
            )
        });
        check_gradient(&logits.data, &dlogits.data, |data| {
            dot(
                &dy,
                &gate(
                    &x,
                    &Tensor {
                        data: data.to_vec(),
                        ..logits
                    },
                ),
            )
        });

        let dy = noise_tensor(4, 2, POINT, 3);
        check_gradient(&x.data, &spatial_mean_backward(&x, &dy).data, |data| {
            dot(
                &dy,
                &spatial_mean(&Tensor {
                    data: data.to_vec(),
                    ..x
                }),
            )
        });
    }
}
