//! Batch norm.

use effdet_model::network::{BN_EPSILON, BN_MOMENTUM};

use crate::reference::{Float, Tensor};

/// Mean and biased variance of every channel.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments<F> {
    /// `[channels]`.
    pub mean: Vec<F>,
    /// `[channels]`.
    pub variance: Vec<F>,
}

/// Mean and biased variance of every channel over images and cells.
///
/// ```text
/// μ[c] = Σ x[n, p, c]/m      σ²[c] = Σ (x[n, p, c] − μ[c])²/m      m = batch·height·width
/// ```
pub fn moments<F: Float>(x: &Tensor<F>) -> Moments<F> {
    let mean = channel_means(x, |_, x| x);
    let variance = channel_means(x, |c, x| (x - mean[c]) * (x - mean[c]));
    let round = |sums: Vec<f64>| sums.into_iter().map(F::from_f64).collect();
    Moments {
        variance: round(variance),
        mean: round(mean),
    }
}

/// Scales and shifts every channel: `y = γ·(x − μ)/√(σ² + ε) + β`, ε = 1e-3.
///
/// In training the moments are those of `x` ([`moments`]), in inference the moving ones.
pub fn batch_norm<F: Float>(x: &Tensor<F>, gamma: &[F], beta: &[F], moments: &Moments<F>) -> Tensor<F> {
    let inverse = inverse_deviations(moments);
    let mut y = x.clone();
    for cell in y.data.chunks_exact_mut(x.channels) {
        for (c, y) in cell.iter_mut().enumerate() {
            *y = gamma[c] * (*y - moments.mean[c]) * inverse[c] + beta[c];
        }
    }
    y
}

/// Gradients of [`batch_norm`] by `x`, γ and β where the moments are those of `x`.
///
/// ```text
/// x̂ = (x − μ)/√(σ² + ε)      dβ = Σ dy      dγ = Σ dy·x̂      dx = γ/√(σ² + ε) · (dy − dβ/m − x̂·dγ/m)
/// ```
pub fn batch_norm_train_backward<F: Float>(
    x: &Tensor<F>,
    gamma: &[F],
    moments: &Moments<F>,
    dy: &Tensor<F>,
) -> (Tensor<F>, Vec<F>, Vec<F>) {
    let (mut dx, dgamma, dbeta) = batch_norm_infer_backward(x, gamma, moments, dy);
    let inverse = inverse_deviations(moments);
    let count = F::from_f64((x.batch * x.map.cells()) as f64);
    for (dx, x) in dx.data.chunks_exact_mut(x.channels).zip(x.cells()) {
        for (c, (dx, &x)) in dx.iter_mut().zip(x).enumerate() {
            let normalized = (x - moments.mean[c]) * inverse[c];
            *dx = *dx - gamma[c] * inverse[c] * (dbeta[c] + normalized * dgamma[c]) / count;
        }
    }
    (dx, dgamma, dbeta)
}

/// Gradients of [`batch_norm`] by `x`, γ and β where the moments are constants.
///
/// ```text
/// x̂ = (x − μ)/√(σ² + ε)      dβ = Σ dy      dγ = Σ dy·x̂      dx = γ/√(σ² + ε) · dy
/// ```
pub fn batch_norm_infer_backward<F: Float>(
    x: &Tensor<F>,
    gamma: &[F],
    moments: &Moments<F>,
    dy: &Tensor<F>,
) -> (Tensor<F>, Vec<F>, Vec<F>) {
    let inverse = inverse_deviations(moments);
    let mut dx = dy.clone();
    let (mut dgamma, mut dbeta) = (vec![0.0; x.channels], vec![0.0; x.channels]);
    for (dx, x) in dx.data.chunks_exact_mut(x.channels).zip(x.cells()) {
        for (c, (dx, &x)) in dx.iter_mut().zip(x).enumerate() {
            let dy = *dx;
            let normalized = (x - moments.mean[c]) * inverse[c];
            dgamma[c] += (dy * normalized).to_f64();
            dbeta[c] += dy.to_f64();
            *dx = gamma[c] * inverse[c] * dy;
        }
    }
    let round = |sums: Vec<f64>| sums.into_iter().map(F::from_f64).collect();
    (dx, round(dgamma), round(dbeta))
}

/// Moving statistics after one training step.
///
/// `moving ← 0.99·moving + 0.01·batch`, where the batch's variance is the unbiased one: σ²·m/(m − 1) with m = `count` values
/// per channel (σ² itself for a single value).
pub fn updated_moving<F: Float>(moving: &Moments<F>, batch: &Moments<F>, count: usize) -> Moments<F> {
    let momentum = F::from_f32(BN_MOMENTUM);
    let unbiased = F::from_f64(count as f64 / (count.max(2) - 1) as f64);
    let blend = |moving: &[F], batch: &[F], factor: F| {
        let pairs = moving.iter().zip(batch);
        pairs
            .map(|(&moving, &batch)| momentum * moving + (F::ONE - momentum) * batch * factor)
            .collect()
    };
    Moments {
        mean: blend(&moving.mean, &batch.mean, F::ONE),
        variance: blend(&moving.variance, &batch.variance, unbiased),
    }
}

fn inverse_deviations<F: Float>(moments: &Moments<F>) -> Vec<F> {
    let epsilon = F::from_f32(BN_EPSILON);
    let inverse = |&variance: &F| F::ONE / (variance + epsilon).sqrt();
    moments.variance.iter().map(inverse).collect()
}

/// Mean of `f(channel, x)` over images and cells, per channel.
fn channel_means<F: Float>(x: &Tensor<F>, f: impl Fn(usize, f64) -> f64) -> Vec<f64> {
    let mut sums = vec![0.0; x.channels];
    for cell in x.cells() {
        for (c, (sum, &x)) in sums.iter_mut().zip(cell).enumerate() {
            *sum += f(c, x.to_f64());
        }
    }
    let count = (x.batch * x.map.cells()) as f64;
    sums.iter_mut().for_each(|sum| *sum /= count);
    sums
}

#[cfg(test)]
mod tests {
    use effdet_model::network::MapSize;

    use super::super::gradient_check::{check_gradient, dot, noise, noise_tensor};
    use super::*;

    const MAP: MapSize = MapSize { height: 3, width: 2 };

    #[test]
    fn normalised_channels_have_mean_beta_and_deviation_gamma() {
        let x = noise_tensor(1, 4, MAP, 2).map_values(|x| 50.0 * x + 7.0);
        let y = batch_norm(&x, &[2.0, 3.0], &[-1.0, 4.0], &moments(&x));
        let after = moments(&y);
        for c in 0..2 {
            assert!((after.mean[c] - [-1.0, 4.0][c]).abs() < 1e-12);
            assert!((after.variance[c].sqrt() - [2.0, 3.0][c]).abs() < 1e-5);
        }
    }

    /// Source: measured behaviour of the reference's fused kernel.
    #[test]
    fn the_moving_variance_takes_the_unbiased_variance() {
        let batch = Moments {
            mean: vec![2.0],
            variance: vec![3.0],
        };
        let moving = Moments {
            mean: vec![0.0],
            variance: vec![1.0],
        };
        let updated = updated_moving(&moving, &batch, 4);
        assert!((updated.mean[0] - 0.02f64).abs() < 1e-7);
        assert!((updated.variance[0] - (0.99 + 0.01 * 4.0)).abs() < 1e-7);
        assert_eq!(updated_moving(&moving, &batch, 1).variance.len(), 1);
    }

    #[test]
    fn gradients_in_training_match_finite_differences() {
        check(moments, batch_norm_train_backward);
    }

    #[test]
    fn gradients_in_inference_match_finite_differences() {
        let fixed = Moments {
            mean: noise(8, 3),
            variance: vec![0.5, 1.0, 2.0],
        };
        check(|_| fixed.clone(), batch_norm_infer_backward);
    }

    type Backward =
        fn(&Tensor<f64>, &[f64], &Moments<f64>, &Tensor<f64>) -> (Tensor<f64>, Vec<f64>, Vec<f64>);

    fn check(moments: impl Fn(&Tensor<f64>) -> Moments<f64>, backward: Backward) {
        let x = noise_tensor(2, 2, MAP, 3);
        let (gamma, beta) = (noise(3, 3), noise(4, 3));
        let dy = noise_tensor(5, 2, MAP, 3);
        let (dx, dgamma, dbeta) = backward(&x, &gamma, &moments(&x), &dy);
        check_gradient(&x.data, &dx.data, |data| {
            let x = Tensor {
                data: data.to_vec(),
                ..x
            };
            dot(&dy, &batch_norm(&x, &gamma, &beta, &moments(&x)))
        });
        check_gradient(&gamma, &dgamma, |gamma| {
            dot(&dy, &batch_norm(&x, gamma, &beta, &moments(&x)))
        });
        check_gradient(&beta, &dbeta, |beta| {
            dot(&dy, &batch_norm(&x, &gamma, beta, &moments(&x)))
        });
    }
}
