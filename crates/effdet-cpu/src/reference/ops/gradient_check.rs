//! Finite differences against analytic gradients.

use effdet_model::network::MapSize;
use effdet_model::rng::{Draws, Purpose};

use crate::reference::Tensor;

const STEP: f64 = 1e-5;

/// `len` standard normal numbers; every `key` gives others.
pub(crate) fn noise(key: u64, len: usize) -> Vec<f64> {
    let mut draws = Draws::new(2019, Purpose::Init, 0, key);
    (0..len).map(|_| draws.normal()).collect()
}

/// A tensor of [`noise`].
pub(crate) fn noise_tensor(key: u64, batch: usize, map: MapSize, channels: usize) -> Tensor<f64> {
    Tensor {
        batch,
        map,
        channels,
        data: noise(key, batch * map.cells() * channels),
    }
}

/// Σ dy·y: the scalar whose gradient by `y` is `dy`.
pub(crate) fn dot(dy: &Tensor<f64>, y: &Tensor<f64>) -> f64 {
    assert_eq!(dy.shape(), y.shape());
    dy.data.iter().zip(&y.data).map(|(dy, y)| dy * y).sum()
}

/// Compares `gradient` with central differences of `f` at `x`, coordinate by coordinate.
#[track_caller]
pub(crate) fn check_gradient(x: &[f64], gradient: &[f64], f: impl Fn(&[f64]) -> f64) {
    assert_eq!(x.len(), gradient.len());
    let scale = gradient.iter().fold(1.0f64, |scale, g| scale.max(g.abs()));
    let mut moved = x.to_vec();
    for (i, &analytic) in gradient.iter().enumerate() {
        moved[i] = x[i] + STEP;
        let above = f(&moved);
        moved[i] = x[i] - STEP;
        let below = f(&moved);
        moved[i] = x[i];
        let numeric = (above - below) / (2.0 * STEP);
        assert!(
            (numeric - analytic).abs() <= 1e-7 * scale,
            "coordinate {i}: analytic {analytic}, numeric {numeric}"
        );
    }
}
