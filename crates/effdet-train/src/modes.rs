//! When a run evaluates and when it stops.

use serde::{Deserialize, Serialize};

/// The rule of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvaluationRule {
    /// All epochs, evaluating every N of them (0 = never in between) and at the end.
    Every(u64),
    /// The reference's `train`: stops after the first epoch past 75 % of the schedule, or after epoch 300; evaluates at the end.
    Train,
    /// The reference's `traineval`: stops after epoch 300; evaluates every N epochs from epoch 200 on, and at the end of
    /// schedules below 200 epochs.
    TrainEval {
        /// Epochs between evaluations: the checkpoint period.
        period: u64,
    },
    /// The reference's `train300`: stops after epoch 300; evaluates at the end of schedules below 200 epochs.
    Train300,
    /// No evaluation.
    Never,
}

/// Epoch from which `traineval` evaluates.
pub const FIRST_EVALUATED_EPOCH: u64 = 200;
/// Epoch after which the reference's modes stop.
pub const LAST_EPOCH: u64 = 300;

impl EvaluationRule {
    /// Epochs that are trained when the schedule has `num_epochs`.
    pub fn last_epoch(self, num_epochs: u64) -> u64 {
        match self {
            Self::Every(_) | Self::Never => num_epochs,
            // The first epoch above three quarters: strictly above, so an exact quarter trains one more.
            Self::Train => (num_epochs * 3 / 4 + 1).min(LAST_EPOCH).min(num_epochs),
            Self::TrainEval { .. } | Self::Train300 => num_epochs.min(LAST_EPOCH),
        }
    }

    /// Whether to evaluate after `epochs` epochs, the end of the run aside.
    pub fn evaluates_after(self, epochs: u64) -> bool {
        match self {
            Self::Every(period) => period > 0 && epochs.is_multiple_of(period),
            Self::TrainEval { period } => {
                epochs >= FIRST_EVALUATED_EPOCH && epochs.is_multiple_of(period.max(1))
            }
            Self::Train | Self::Train300 | Self::Never => false,
        }
    }

    /// Whether to evaluate at the end of the run.
    ///
    /// Users expect a final AP from every run, so the reference's restriction to short schedules is not kept.
    pub fn at_end(self) -> bool {
        self != Self::Never
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Source: the reference's rules: 400 epochs stop at 300, 350 at 263, 300 at 226.
    #[test]
    fn the_train_mode_stops_past_three_quarters() {
        for (epochs, last) in [(400, 300), (350, 263), (300, 226), (4, 4), (1, 1)] {
            assert_eq!(EvaluationRule::Train.last_epoch(epochs), last, "{epochs}");
        }
    }

    #[test]
    fn the_other_modes_stop_at_three_hundred() {
        for rule in [EvaluationRule::TrainEval { period: 10 }, EvaluationRule::Train300] {
            assert_eq!((rule.last_epoch(400), rule.last_epoch(250)), (300, 250));
        }
        assert_eq!(EvaluationRule::Every(1).last_epoch(400), 400);
    }

    #[test]
    fn traineval_evaluates_by_the_period_from_epoch_200_on() {
        let rule = EvaluationRule::TrainEval { period: 10 };
        let evaluated: Vec<u64> = (1..=230).filter(|&epoch| rule.evaluates_after(epoch)).collect();
        assert_eq!(evaluated, [200, 210, 220, 230]);
        assert!(
            !EvaluationRule::Train.evaluates_after(220) && !EvaluationRule::Train300.evaluates_after(220)
        );
    }
}
