//! Largest errors of groups of numbers.

/// The largest error of one group of numbers, and where it is.
pub struct Worst {
    group: String,
    tolerance: f64,
    error: f64,
    at: String,
}

impl Worst {
    /// Nothing noted yet.
    pub fn new(group: impl Into<String>, tolerance: f64) -> Self {
        Self {
            group: group.into(),
            tolerance,
            error: 0.0,
            at: String::new(),
        }
    }

    /// Notes `(actual − expected)/|expected|`.
    pub fn relative(&mut self, at: &str, actual: f64, expected: f64) {
        self.note(at, (actual - expected) / expected.abs().max(f64::MIN_POSITIVE));
    }

    /// Notes `actual − expected`.
    pub fn absolute(&mut self, at: &str, actual: f64, expected: f64) {
        self.note(at, actual - expected);
    }

    /// Notes an error.
    pub fn note(&mut self, at: &str, error: f64) {
        // A NaN is worse than anything.
        if error.is_nan() || error.abs() > self.error {
            self.error = if error.is_nan() {
                f64::INFINITY
            } else {
                error.abs()
            };
            self.at = at.to_owned();
        }
    }

    /// Prints the largest error and fails if it exceeds the tolerance.
    #[track_caller]
    pub fn check(self) {
        let Self {
            group,
            tolerance,
            error,
            at,
        } = self;
        println!("{group}: largest error {error:.2e} at {at}, tolerance {tolerance:.0e}");
        assert!(
            error <= tolerance,
            "{group}: error {error:.3e} at {at} exceeds {tolerance:.0e}"
        );
    }
}
