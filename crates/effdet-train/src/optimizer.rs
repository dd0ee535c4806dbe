//! One update: L2, clipping, SGD or Adam, moving averages, over flat buffers.
//!
//! # Determinism
//! Every norm is summed in f64, variable by variable, in lanes that depend on the index alone; threads take whole variables or
//! single values, so nothing depends on their number.

use std::num::NonZeroUsize;
use std::ops::Range;

use effdet_model::hparams::{HParams, OptimizerKind};
use effdet_model::network::{VariableKind, VariableTable};
use effdet_model::weights::Weights;
use regex::Regex;

use crate::parallel::{self, split_mut};

/// A pattern of frozen variables that is no regular expression.
#[derive(Debug, thiserror::Error)]
#[error("var_freeze_expr {pattern:?}: {reason}")]
pub struct FreezePatternError {
    /// The pattern.
    pub pattern: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A trainable variable as the optimiser sees it.
#[derive(Debug, Clone, PartialEq)]
struct Slot {
    range: Range<usize>,
    regularized: bool,
}

/// What an update did.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct UpdateReport {
    /// `weight_decay·Σ ½‖v‖²` over the regularised variables, of the weights before the update.
    pub l2_loss: f32,
    /// Global gradient norm after both clippings.
    pub gradient_norm: f32,
    /// Global gradient norm before clipping, L2 term included.
    pub raw_gradient_norm: f32,
}

/// The optimiser with its slots.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimizer {
    kind: OptimizerKind,
    momentum: f32,
    weight_decay: f32,
    clip_norm: f64,
    ema_decay: f64,
    variables: Vec<Slot>,
    threads: NonZeroUsize,
    /// Momentum of SGD, first moment of Adam.
    first: Vec<f32>,
    /// Second moment of Adam.
    second: Vec<f32>,
}

const ADAM_BETA_2: f32 = 0.999;
const ADAM_EPSILON: f32 = 1e-7;

impl Optimizer {
    /// The optimiser of `hparams` for the variables of `table`.
    ///
    /// Variables whose name (with `:0`) matches `var_freeze_expr` from its start on are left alone.
    ///
    /// # Errors
    /// [`FreezePatternError`].
    pub fn new(hparams: &HParams, table: &VariableTable) -> Result<Self, FreezePatternError> {
        let frozen = hparams
            .var_freeze_expr
            .as_deref()
            .map(freeze_pattern)
            .transpose()?;
        let variables = table
            .iter()
            .filter(|v| v.kind == VariableKind::Trainable)
            .filter(|v| {
                frozen
                    .as_ref()
                    .is_none_or(|frozen| !frozen.is_match(&format!("{}:0", v.name)))
            })
            .map(|v| Slot {
                range: v.range(),
                regularized: v.is_regularized(),
            })
            .collect();
        let adam = hparams.optimizer == OptimizerKind::Adam;
        Ok(Self {
            kind: hparams.optimizer,
            momentum: hparams.momentum as f32,
            weight_decay: hparams.weight_decay as f32,
            clip_norm: hparams.clip_gradients_norm,
            ema_decay: hparams.moving_average_decay,
            variables,
            threads: NonZeroUsize::MIN,
            first: vec![0.0; table.trainable_len()],
            second: vec![0.0; if adam { table.trainable_len() } else { 0 }],
        })
    }

    /// Shares the work of updates among `threads` threads where there is enough of it; 0 counts as 1.
    pub fn use_threads(&mut self, threads: usize) {
        self.threads = NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN);
    }

    /// Variables in groups of about as many values, one per thread, with the values that each group spans.
    fn groups(&self) -> Vec<(Range<usize>, &[Slot])> {
        let total: usize = self.variables.iter().map(|slot| slot.range.len()).sum();
        let share = total
            .div_ceil(parallel::useful_threads(total, self.threads))
            .max(1);
        let mut groups = Vec::new();
        let (mut first, mut values) = (0, 0);
        for (index, slot) in self.variables.iter().enumerate() {
            values += slot.range.len();
            if values >= share || index + 1 == self.variables.len() {
                let group = &self.variables[first..=index];
                groups.push((group[0].range.start..slot.range.end, group));
                (first, values) = (index + 1, 0);
            }
        }
        groups
    }

    /// Number of variables that are trained.
    pub fn trained_variables(&self) -> usize {
        self.variables.len()
    }

    /// Slots by name, for checkpoints.
    pub fn slots(&self) -> Vec<(&'static str, &[f32])> {
        match self.kind {
            OptimizerKind::Sgd => vec![("momentum", &self.first[..])],
            OptimizerKind::Adam => vec![("adam_m", &self.first[..]), ("adam_v", &self.second[..])],
        }
    }

    /// Slots by name, to restore them.
    pub fn slots_mut(&mut self) -> Vec<(&'static str, &mut [f32])> {
        match self.kind {
            OptimizerKind::Sgd => vec![("momentum", &mut self.first[..])],
            OptimizerKind::Adam => vec![("adam_m", &mut self.first[..]), ("adam_v", &mut self.second[..])],
        }
    }

    /// Adds the L2 gradient, clips each variable, then all together.
    ///
    /// Per variable `g ← g·c/max(‖g‖, c)`, then the same with the norm over all variables.
    pub fn prepare(&self, weights: &Weights, gradients: &mut [f32]) -> UpdateReport {
        let groups = self.groups();
        let parts = split_mut(gradients, groups.iter().map(|(span, _)| span.clone()));
        let jobs = groups.iter().zip(parts).collect();
        let sums = parallel::map(jobs, |((span, group), part)| {
            let sums = group
                .iter()
                .map(|slot| self.clip(slot, weights, part, span.start));
            sums.collect::<Vec<_>>()
        });
        let (mut l2_sum, mut raw, mut clipped) = (0.0, 0.0, 0.0);
        for of_variable in sums.iter().flatten() {
            l2_sum += of_variable.l2;
            raw += of_variable.raw;
            clipped += of_variable.clipped;
        }
        let mut norm = f64::sqrt(clipped);
        if self.clip_norm > 0.0 && norm > self.clip_norm {
            let factor = (self.clip_norm / norm) as f32;
            let parts = split_mut(gradients, groups.iter().map(|(span, _)| span.clone()));
            let jobs = groups.iter().zip(parts).collect();
            parallel::map(jobs, |((span, group), part)| {
                for slot in *group {
                    part[within(&slot.range, span.start)]
                        .iter_mut()
                        .for_each(|g| *g *= factor);
                }
            });
            norm = self.clip_norm;
        }
        UpdateReport {
            l2_loss: (0.5 * f64::from(self.weight_decay) * l2_sum) as f32,
            gradient_norm: norm as f32,
            raw_gradient_norm: raw.sqrt() as f32,
        }
    }

    /// Applies prepared gradients; `step` counts the updates before this one.
    ///
    /// SGD: `a ← m·a − lr·g; w ← w + a`. Adam: Keras' defaults, β₁ = momentum.
    pub fn apply(&mut self, weights: &mut Weights, gradients: &[f32], learning_rate: f32, step: u64) {
        let spans: Vec<_> = self.groups().into_iter().map(|(span, _)| span).collect();
        let (kind, momentum) = (self.kind, self.momentum);
        let seconds = match kind {
            OptimizerKind::Sgd => spans.iter().map(|_| &mut [][..]).collect(),
            OptimizerKind::Adam => split_mut(&mut self.second, spans.iter().cloned()),
        };
        let firsts = split_mut(&mut self.first, spans.iter().cloned());
        let values = split_mut(&mut weights.trainable, spans.iter().cloned());
        // Of the variables of each group, frozen ones between them left out.
        let mut variables = &self.variables[..];
        let mut jobs = Vec::new();
        for (((span, values), first), second) in spans.iter().zip(values).zip(firsts).zip(seconds) {
            let (group, rest) =
                variables.split_at(variables.partition_point(|slot| slot.range.end <= span.end));
            variables = rest;
            jobs.push((span.start, group, values, first, second));
        }
        let t = (step + 1) as f64;
        let correct = |beta: f32| 1.0 - f64::from(beta).powf(t);
        let rate = (f64::from(learning_rate) * correct(ADAM_BETA_2).sqrt() / correct(momentum)) as f32;
        parallel::map(jobs, |(start, group, values, first, second)| {
            for slot in group {
                let at = within(&slot.range, start);
                let values = &mut values[at.clone()];
                let gradient = &gradients[slot.range.clone()];
                let first = &mut first[at.clone()];
                match kind {
                    OptimizerKind::Sgd => {
                        for ((w, &g), a) in values.iter_mut().zip(gradient).zip(first) {
                            *a = momentum * *a - learning_rate * g;
                            *w += *a;
                        }
                    }
                    OptimizerKind::Adam => {
                        let second = &mut second[at];
                        for (((w, &g), m), v) in values.iter_mut().zip(gradient).zip(first).zip(second) {
                            *m += (1.0 - momentum) * (g - *m);
                            *v += (1.0 - ADAM_BETA_2) * (g * g - *v);
                            *w -= rate * *m / (v.sqrt() + ADAM_EPSILON);
                        }
                    }
                }
            }
        });
    }

    /// Moves the averages of all variables, batch-norm statistics included; `step` counts the updates made, this one included.
    ///
    /// `avg ← avg − (1 − d)·(avg − w)` with `d = min(decay, (1 + n)/(10 + n))`; averages start at zero.
    pub fn average(&self, average: &mut Weights, weights: &Weights, step: u64) {
        let n = step as f64;
        let rate = (1.0 - self.ema_decay.min((1.0 + n) / (10.0 + n))) as f32;
        for (averages, values) in [
            (&mut average.trainable, &weights.trainable),
            (&mut average.statistics, &weights.statistics),
        ] {
            let part = values
                .len()
                .div_ceil(parallel::useful_threads(values.len(), self.threads))
                .max(1);
            let jobs = averages.chunks_mut(part).zip(values.chunks(part)).collect();
            parallel::map(jobs, |(averages, values)| {
                for (a, &w) in averages.iter_mut().zip(values) {
                    *a -= rate * (*a - w);
                }
            });
        }
    }
}

impl Optimizer {
    /// Adds the L2 gradient of a variable to its gradient and clips that; `gradients` begin at value `start`.
    fn clip(&self, slot: &Slot, weights: &Weights, gradients: &mut [f32], start: usize) -> VariableSums {
        let values = &weights.trainable[slot.range.clone()];
        let gradient = &mut gradients[within(&slot.range, start)];
        let mut l2 = 0.0;
        if slot.regularized {
            for (g, &w) in gradient.iter_mut().zip(values) {
                *g += self.weight_decay * w;
            }
            l2 = sum_of_squares(values);
        }
        let raw = sum_of_squares(gradient);
        let clipped = match self.clip_norm > 0.0 {
            true => scale_to(gradient, raw.sqrt(), self.clip_norm),
            false => raw,
        };
        VariableSums { l2, raw, clipped }
    }
}

/// Squares of the norms of a variable: of its weights where these are regularised, of its gradient before and after clipping.
struct VariableSums {
    l2: f64,
    raw: f64,
    clipped: f64,
}

/// A range of values as indices from value `start` on.
fn within(range: &Range<usize>, start: usize) -> Range<usize> {
    range.start - start..range.end - start
}

/// Compiles a freeze pattern with the meaning of Python's `re.match`.
fn freeze_pattern(pattern: &str) -> Result<Regex, FreezePatternError> {
    let error = |reason: String| FreezePatternError {
        pattern: pattern.to_owned(),
        reason,
    };
    regex::RegexBuilder::new(&format!("^(?:{pattern})"))
        .size_limit(1 << 20)
        .build()
        .map_err(|e| error(e.to_string()))
}

/// Scales a gradient of norm `norm` so that all of it has at most `limit`; gives the square of its new norm.
fn scale_to(gradient: &mut [f32], norm: f64, limit: f64) -> f64 {
    if norm <= limit {
        return norm * norm;
    }
    // A NaN norm is not above the limit; an infinite one turns the gradient into NaN, which the caller's check finds.
    let factor = (limit / norm) as f32;
    gradient.iter_mut().for_each(|g| *g *= factor);
    sum_of_squares(gradient)
}

/// Σ v², value i in lane i mod 16, the lanes then in order: independent sums instead of one chain of additions.
fn sum_of_squares(values: &[f32]) -> f64 {
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [0.0; 16];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(value) * f64::from(value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(value) * f64::from(value);
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use effdet_model::network::Network;

    fn network() -> Network {
        let mut hparams = HParams::preset("lite0").unwrap();
        hparams.num_classes = 2;
        Network::new(&hparams).unwrap()
    }

    fn optimizer(network: &Network, change: impl Fn(&mut HParams)) -> Optimizer {
        let mut hparams = network.hparams.clone();
        change(&mut hparams);
        Optimizer::new(&hparams, &network.variables).unwrap()
    }

    #[test]
    fn the_sum_of_squares_misses_no_value_at_any_length() {
        for len in 0..50 {
            let values: Vec<f32> = (1..=len).map(|i| i as f32).collect();
            let expected = len * (len + 1) * (2 * len + 1) / 6;
            assert_eq!(sum_of_squares(&values), f64::from(expected));
        }
    }

    #[test]
    fn updates_have_the_same_bits_with_any_number_of_threads() {
        let network = Network::new(&HParams::preset("d0").unwrap()).unwrap();
        for kind in [OptimizerKind::Sgd, OptimizerKind::Adam] {
            let run = |threads: usize| {
                let mut optimizer = optimizer(&network, |h| {
                    h.optimizer = kind;
                    h.var_freeze_expr = Some(".*fpn_cells/cell_1.*".to_owned());
                });
                optimizer.use_threads(threads);
                let mut weights = Weights::init(&network.variables, 3);
                let mut average = weights.clone();
                let mut reports = Vec::new();
                for step in 0..3 {
                    let mut gradients: Vec<f32> = (0..weights.trainable.len())
                        .map(|i| ((i * 7 + step as usize) % 1013) as f32 * 1e-3 - 0.4)
                        .collect();
                    reports.push(optimizer.prepare(&weights, &mut gradients));
                    optimizer.apply(&mut weights, &gradients, 0.01, step);
                    optimizer.average(&mut average, &weights, step);
                }
                (weights, average, reports, optimizer.slots()[0].1.to_vec())
            };
            let expected = run(1);
            for threads in [2, 3, 7] {
                assert!(run(threads) == expected, "{threads} threads");
            }
        }
    }

    #[test]
    fn three_sgd_steps_follow_the_formula() {
        let network = network();
        let mut sgd = optimizer(&network, |h| h.momentum = 0.5);
        let mut weights = Weights::zeros(&network.variables);
        let gradients = vec![1.0; weights.trainable.len()];
        let mut expected = (0.0f32, 0.0f32);
        for step in 0..3 {
            sgd.apply(&mut weights, &gradients, 0.25, step);
            expected.0 = 0.5 * expected.0 - 0.25;
            expected.1 += expected.0;
            assert!(weights.trainable.iter().all(|&w| w == expected.1));
        }
        assert_eq!(expected.1, -0.25 - 0.375 - 0.4375);
    }

    #[test]
    fn adam_moves_by_the_learning_rate_at_first() {
        let network = network();
        let mut adam = optimizer(&network, |h| h.optimizer = OptimizerKind::Adam);
        let mut weights = Weights::zeros(&network.variables);
        let gradients = vec![3.0; weights.trainable.len()];
        adam.apply(&mut weights, &gradients, 0.01, 0);
        assert!(weights.trainable.iter().all(|&w| (w + 0.01).abs() < 1e-5));
    }

    #[test]
    fn each_variable_is_clipped_before_all_together() {
        let network = network();
        let sgd = optimizer(&network, |h| h.weight_decay = 0.0);
        let weights = Weights::zeros(&network.variables);
        let mut gradients = vec![0.0; weights.trainable.len()];
        let variables: Vec<_> = network
            .variables
            .iter()
            .filter(|v| v.kind == VariableKind::Trainable)
            .take(2)
            .collect();
        gradients[variables[0].offset] = 300.0;
        gradients[variables[1].offset] = 10.0;
        let report = sgd.prepare(&weights, &mut gradients);
        // 300 → 10 on its own; then √(10² + 10²) → 10 together.
        let expected = 10.0 / 2f32.sqrt();
        assert!((gradients[variables[0].offset] - expected).abs() < 1e-5);
        assert!((gradients[variables[1].offset] - expected).abs() < 1e-5);
        assert!((report.gradient_norm - 10.0).abs() < 1e-5);
        assert!((report.raw_gradient_norm - 90100f32.sqrt()).abs() < 1e-2);
    }

    #[test]
    fn the_l2_term_concerns_kernels_only() {
        let network = network();
        let sgd = optimizer(&network, |h| h.weight_decay = 0.1);
        let mut weights = Weights::zeros(&network.variables);
        weights.trainable.fill(1.0);
        let mut gradients = vec![0.0; weights.trainable.len()];
        let report = sgd.prepare(&weights, &mut gradients);
        let kernels: usize = network
            .variables
            .iter()
            .filter(|v| v.is_regularized())
            .map(|v| v.len)
            .sum();
        assert!((report.l2_loss - 0.05 * kernels as f32).abs() < 1e-2 * report.l2_loss);
        for variable in network
            .variables
            .iter()
            .filter(|v| v.kind == VariableKind::Trainable)
        {
            assert_eq!(
                gradients[variable.offset] != 0.0,
                variable.is_regularized(),
                "{}",
                variable.name
            );
        }
    }

    #[test]
    fn frozen_variables_do_not_move_and_are_not_regularised() {
        let network = network();
        let mut sgd = optimizer(&network, |h| h.var_freeze_expr = Some("(stem|stack_)".into()));
        let mut weights = Weights::zeros(&network.variables);
        weights.trainable.fill(1.0);
        let mut gradients = vec![1.0; weights.trainable.len()];
        sgd.prepare(&weights, &mut gradients);
        sgd.apply(&mut weights, &gradients, 1.0, 0);
        for variable in network
            .variables
            .iter()
            .filter(|v| v.kind == VariableKind::Trainable)
        {
            let frozen = variable.name.starts_with("stem") || variable.name.starts_with("stack_");
            assert_eq!(
                weights.trainable[variable.offset] == 1.0,
                frozen,
                "{}",
                variable.name
            );
        }
    }

    #[test]
    fn a_pattern_must_match_from_the_start_and_a_broken_one_is_named() {
        let network = network();
        let all = optimizer(&network, |_| ()).trained_variables();
        let none = optimizer(&network, |h| h.var_freeze_expr = Some("kernel".into()));
        assert_eq!(none.trained_variables(), all);
        let mut hparams = network.hparams.clone();
        hparams.var_freeze_expr = Some("(stem".into());
        let error = Optimizer::new(&hparams, &network.variables)
            .unwrap_err()
            .to_string();
        assert!(error.contains("(stem"), "{error}");
    }

    /// Source: the specification: the first decays are 2/11, 3/12, 4/13, and after one step avg = 9/11·w.
    #[test]
    fn averages_ramp_up_from_zero() {
        let network = network();
        let sgd = optimizer(&network, |_| ());
        let mut weights = Weights::zeros(&network.variables);
        weights.trainable.fill(1.0);
        weights.statistics.fill(2.0);
        let mut average = Weights::zeros(&network.variables);
        let mut expected = 0.0f64;
        for n in 1..=3u64 {
            sgd.average(&mut average, &weights, n);
            let decay = (1.0 + n as f64) / (10.0 + n as f64);
            expected -= (1.0 - decay) * (expected - 1.0);
            assert!((f64::from(average.trainable[0]) - expected).abs() < 1e-6);
            assert!((f64::from(average.statistics[0]) - 2.0 * expected).abs() < 1e-6);
        }
    }
}
