//! Focal loss on logits.

use super::{LossConfig, Term};

/// Focal loss (arXiv:1708.02002, eq. 5) in the reference's "stable" form.
///
/// For a logit x with target z ∈ {0, 1}, p = sigmoid(x) and z' = z·(1 − s) + s/2:
///
/// ```text
/// modulator = (1 − p_t)^γ = exp(−γ·softplus(x)) for z = 1, exp(−γ·softplus(−x)) for z = 0
/// ce        = softplus(x) − x·z'
/// loss      = (z = 1 ? α : 1 − α) · modulator · ce
/// d/dx      = (z = 1 ? α : 1 − α) · modulator · (γ·(1 − p − z)·ce + p − z')
/// ```
///
/// Smoothing s affects the cross-entropy only. The reference evaluates softplus(−x) as `log1p(exp(−x))`, which overflows below
/// −88.7 and gives a NaN gradient; here softplus(x) is `max(x, 0) + log1p(exp(−|x|))`, equal elsewhere.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Focal {
    /// Weight α of positives.
    pub alpha: f64,
    /// Exponent γ.
    pub gamma: f64,
    /// Smoothing s.
    pub label_smoothing: f64,
}

impl From<&LossConfig> for Focal {
    fn from(config: &LossConfig) -> Self {
        Self {
            alpha: config.alpha,
            gamma: config.gamma,
            label_smoothing: config.label_smoothing,
        }
    }
}

impl Focal {
    /// Loss of one logit, not normalised.
    pub fn evaluate(&self, logit: f64, positive: bool) -> Term {
        let target = if positive { 1.0 } else { 0.0 };
        let smoothed = target * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing;
        let (weight, wrongness) = if positive {
            (self.alpha, logit)
        } else {
            (1.0 - self.alpha, -logit)
        };
        let modulator = (-self.gamma * softplus(wrongness)).exp();
        let cross_entropy = cross_entropy(logit, smoothed);
        let probability = 1.0 / (1.0 + (-logit).exp());
        let inner = self.gamma * (1.0 - probability - target) * cross_entropy + probability - smoothed;
        Term {
            value: weight * modulator * cross_entropy,
            gradient: weight * modulator * inner,
        }
    }
}

/// `softplus(x) − x·z`, arranged so that a certain and right logit keeps its digits.
fn cross_entropy(logit: f64, target: f64) -> f64 {
    let tail = (-logit.abs()).exp().ln_1p();
    if logit > 0.0 {
        logit * (1.0 - target) + tail
    } else {
        tail - logit * target
    }
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOCAL: Focal = Focal {
        alpha: 0.25,
        gamma: 1.5,
        label_smoothing: 0.0,
    };

    #[test]
    fn the_gradient_is_the_slope_of_the_value() {
        let step = 1e-5;
        for label_smoothing in [0.0, 0.1] {
            let focal = Focal {
                label_smoothing,
                ..FOCAL
            };
            for positive in [false, true] {
                for logit in [-30.0, -7.5, -1.0, -0.1, 0.0, 0.3, 2.0, 9.0, 30.0] {
                    let rise = focal.evaluate(logit + step, positive).value
                        - focal.evaluate(logit - step, positive).value;
                    let (got, want) = (focal.evaluate(logit, positive).gradient, rise / (2.0 * step));
                    assert!(
                        (got - want).abs() < 1e-9 + 1e-8 * want.abs(),
                        "{logit} {positive}: {got} {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn extreme_logits_have_finite_losses_and_gradients() {
        for logit in [-1e30, -1e4, -100.0, 100.0, 1e4, 1e30] {
            for positive in [false, true] {
                let Term { value, gradient } = FOCAL.evaluate(logit, positive);
                assert!(value.is_finite() && value >= 0.0, "{logit}: {value}");
                assert!(gradient.is_finite(), "{logit}: {gradient}");
            }
        }
        assert_eq!(
            FOCAL.evaluate(-100.0, true),
            Term {
                value: 25.0,
                gradient: -0.25
            }
        );
    }

    #[test]
    fn no_gamma_and_even_weights_are_half_the_cross_entropy() {
        let focal = Focal {
            alpha: 0.5,
            gamma: 0.0,
            label_smoothing: 0.0,
        };
        let Term { value, gradient } = focal.evaluate(0.0, true);
        assert!((value - 0.5 * std::f64::consts::LN_2).abs() < 1e-15);
        assert_eq!(gradient, -0.25);
    }
}
