//! Huber loss on box codes.

use super::Term;

/// Huber loss of an error e.
///
/// ```text
/// loss = e²/2           |e| ≤ δ          d/de = e
///        δ·|e| − δ²/2   otherwise               δ·sign(e)
/// ```
///
/// Not divided by δ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Huber {
    /// δ, where it turns linear.
    pub delta: f64,
}

impl Huber {
    /// Loss of one error, not normalised.
    pub fn evaluate(&self, error: f64) -> Term {
        let delta = self.delta;
        if error.abs() <= delta {
            Term {
                value: 0.5 * error * error,
                gradient: error,
            }
        } else {
            Term {
                value: delta * error.abs() - 0.5 * delta * delta,
                gradient: delta * error.signum(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_is_the_slope_of_the_value() {
        let (huber, step) = (Huber { delta: 0.1 }, 1e-6);
        for error in [-3.0, -0.11, -0.05, 0.0, 0.02, 0.0999, 0.2, 5.0] {
            let slope =
                (huber.evaluate(error + step).value - huber.evaluate(error - step).value) / (2.0 * step);
            assert!((huber.evaluate(error).gradient - slope).abs() < 1e-9, "{error}");
        }
    }

    #[test]
    fn both_branches_meet_at_delta() {
        let huber = Huber { delta: 0.1 };
        let (inside, outside) = (huber.evaluate(0.1), huber.evaluate(0.1 + 1e-15));
        assert!((inside.value - outside.value).abs() < 1e-12);
        assert!((inside.gradient - outside.gradient).abs() < 1e-12);
    }
}
