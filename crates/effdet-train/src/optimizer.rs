//! One update: L2, clipping, SGD or Adam, moving averages, over flat buffers.
//!
//! # Determinism
//! Every norm is summed in f64, variable by variable, in lanes that depend on the index alone; workers take whole variables or
//! single values, so nothing depends on their number.

use std::ops::Range;
use std::sync::Arc;

use effdet_model::engine::Workers;
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

/// What is to be made of gradients that were looked through, which [`Optimizer::apply`] does on its way.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// What the update will do.
    pub report: UpdateReport,
    /// Per trained variable, the factor that clips its gradient, L2 term included.
    factors: Vec<f32>,
    /// The factor of all gradients that clips the global norm.
    global_factor: f32,
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
    team: Team,
    /// Momentum of SGD, first moment of Adam.
    first: Vec<f32>,
    /// Second moment of Adam.
    second: Vec<f32>,
}

/// Who does the work; does not tell optimisers apart.
#[derive(Debug, Clone, Default)]
struct Team(Option<Arc<dyn Workers>>);

impl Team {
    fn get(&self) -> Option<&dyn Workers> {
        self.0.as_deref()
    }
}

impl PartialEq for Team {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
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
            team: Team::default(),
            first: vec![0.0; table.trainable_len()],
            second: vec![0.0; if adam { table.trainable_len() } else { 0 }],
        })
    }

    /// Shares the work of updates among workers where there is enough of it.
    pub fn use_workers(&mut self, workers: Arc<dyn Workers>) {
        self.team = Team(Some(workers));
    }

    /// Parts of all values, one per worker, with about as many trained ones in each, and the variables in them; frozen variables
    /// belong to the part that begins before them.
    fn parts(&self) -> Vec<(Range<usize>, &[Slot])> {
        let total: usize = self.variables.iter().map(|slot| slot.range.len()).sum();
        let workers = self.team.get().map_or(1, |workers| workers.count());
        let share = total.div_ceil(parallel::useful_workers(total, workers)).max(1);
        let mut parts = Vec::new();
        let (mut begin, mut first, mut values) = (0, 0, 0);
        for (index, slot) in self.variables.iter().enumerate() {
            values += slot.range.len();
            let next = self.variables.get(index + 1);
            if values >= share
                && let Some(next) = next
            {
                parts.push((begin..next.range.start, &self.variables[first..=index]));
                (begin, first, values) = (next.range.start, index + 1, 0);
            }
        }
        parts.push((begin..self.first.len(), &self.variables[first..]));
        parts
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

    /// Finds the norms of the gradients and so how to clip each variable, then all together.
    ///
    /// With the L2 gradient added, `g ← g·c/max(‖g‖, c)` per variable, then the same with the norm over all variables.
    pub fn prepare(&self, weights: &Weights, gradients: &[f32]) -> Prepared {
        let of_parts = parallel::map(self.team.get(), self.parts(), |(_, slots)| {
            let norms = slots.iter().map(|slot| self.norms(slot, weights, gradients));
            norms.collect::<Vec<_>>()
        });
        let (mut l2_sum, mut raw, mut clipped) = (0.0, 0.0, 0.0);
        let mut factors = Vec::with_capacity(self.variables.len());
        for norms in of_parts.iter().flatten() {
            l2_sum += norms.l2;
            raw += norms.raw;
            clipped += norms.clipped;
            factors.push(norms.factor);
        }
        let mut norm = f64::sqrt(clipped);
        let mut global_factor = 1.0;
        if self.clip_norm > 0.0 && norm > self.clip_norm {
            global_factor = (self.clip_norm / norm) as f32;
            norm = self.clip_norm;
        }
        Prepared {
            report: UpdateReport {
                l2_loss: (0.5 * f64::from(self.weight_decay) * l2_sum) as f32,
                gradient_norm: norm as f32,
                raw_gradient_norm: raw.sqrt() as f32,
            },
            factors,
            global_factor,
        }
    }

    /// Applies prepared gradients and moves the averages of all variables, batch-norm statistics included, in the same sweep, for
    /// main memory is what it waits for; `step` counts the updates before this one.
    ///
    /// SGD: `a ← m·a − lr·g; w ← w + a`. Adam: Keras' defaults, β₁ = momentum. Averages, which start at zero:
    /// `avg ← avg − (1 − d)·(avg − w)` with `d = min(decay, (1 + n)/(10 + n))`, where n counts this update, too.
    pub fn apply(
        &mut self,
        weights: &mut Weights,
        mut average: Option<&mut Weights>,
        (gradients, prepared): (&[f32], &Prepared),
        learning_rate: f32,
        step: u64,
    ) {
        let n = (step + 1) as f64;
        let correct = |beta: f32| 1.0 - f64::from(beta).powf(n);
        let rule = Rule {
            kind: self.kind,
            momentum: self.momentum,
            weight_decay: self.weight_decay,
            learning_rate,
            adam_rate: (f64::from(learning_rate) * correct(ADAM_BETA_2).sqrt() / correct(self.momentum))
                as f32,
            average_rate: (1.0 - self.ema_decay.min((1.0 + n) / (10.0 + n))) as f32,
        };
        if let Some(average) = &mut average {
            rule.move_average(&mut average.statistics, &weights.statistics);
        }
        let (spans, counts): (Vec<_>, Vec<_>) = (self.parts().into_iter())
            .map(|(span, slots)| (span, slots.len()))
            .unzip();
        let averages = average.map_or(&mut [][..], |average| &mut average.trainable);
        let values = split_mut(&mut weights.trainable, spans.iter().cloned());
        let firsts = split_mut(&mut self.first, spans.iter().cloned());
        let seconds = split_unless_empty(&mut self.second, &spans);
        let averages = split_unless_empty(averages, &spans);
        let (mut slots, mut factors) = (&self.variables[..], &prepared.factors[..]);
        let mut jobs = Vec::with_capacity(spans.len());
        let buffers = values.into_iter().zip(firsts).zip(seconds).zip(averages);
        for ((span, count), (((values, first), second), average)) in spans.iter().zip(counts).zip(buffers) {
            let part = Part {
                start: span.start,
                slots: slots.split_off(..count).unwrap_or_default(),
                factors: factors.split_off(..count).unwrap_or_default(),
                global_factor: prepared.global_factor,
                gradients,
                values,
                first,
                second,
                average,
            };
            jobs.push(part);
        }
        parallel::map(self.team.get(), jobs, |part| part.update(&rule));
    }

    /// The norms of a variable, and the factor that clips it.
    fn norms(&self, slot: &Slot, weights: &Weights, gradients: &[f32]) -> Norms {
        let (gradient, values) = (
            &gradients[slot.range.clone()],
            &weights.trainable[slot.range.clone()],
        );
        let decay = self.weight_decay;
        let squares = |factor: f32| match slot.regularized {
            true => sum_of_squares(gradient, values, |g, w| (g + decay * w) * factor),
            false => sum_of_squares(gradient, gradient, |g, _| g * factor),
        };
        let l2 = match slot.regularized {
            true => sum_of_squares(values, values, |w, _| w),
            false => 0.0,
        };
        let raw = squares(1.0);
        let norm = raw.sqrt();
        let (factor, clipped) = if self.clip_norm <= 0.0 {
            (1.0, raw)
        } else if norm > self.clip_norm {
            // An infinite norm makes all of it NaN, which the caller's check finds; a NaN norm is not above the limit.
            let factor = (self.clip_norm / norm) as f32;
            (factor, squares(factor))
        } else {
            (1.0, norm * norm)
        };
        Norms {
            l2,
            raw,
            clipped,
            factor,
        }
    }
}

/// Squares of the norms of a variable: of its weights where these are regularised, of its gradient before and after clipping.
struct Norms {
    l2: f64,
    raw: f64,
    clipped: f64,
    /// What clips the gradient.
    factor: f32,
}

/// Σ f(a, b)², value i in lane i mod 16, the lanes then in order: independent sums instead of one chain of additions.
fn sum_of_squares(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f64 {
    let mut lanes = [0.0; 16];
    let add = |lane: &mut f64, a: f32, b: f32| {
        let value = f64::from(f(a, b));
        *lane += value * value;
    };
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            add(lane, a, b);
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        add(lane, a, b);
    }
    lanes.iter().sum()
}

/// The numbers of one update.
struct Rule {
    kind: OptimizerKind,
    momentum: f32,
    weight_decay: f32,
    learning_rate: f32,
    /// The learning rate with Adam's corrections of its first steps.
    adam_rate: f32,
    /// 1 − d of the averages.
    average_rate: f32,
}

impl Rule {
    fn move_average(&self, averages: &mut [f32], values: &[f32]) {
        for (a, &w) in averages.iter_mut().zip(values) {
            *a -= self.average_rate * (*a - w);
        }
    }
}

/// Values that one thread updates, those of frozen variables among them.
struct Part<'a> {
    /// Index of the first one.
    start: usize,
    slots: &'a [Slot],
    /// Of the gradient of each slot.
    factors: &'a [f32],
    global_factor: f32,
    /// Of all variables.
    gradients: &'a [f32],
    values: &'a mut [f32],
    first: &'a mut [f32],
    /// Empty with SGD.
    second: &'a mut [f32],
    /// Empty where no averages are kept.
    average: &'a mut [f32],
}

/// Values that are updated and then averaged while the L1 cache has them.
const CHUNK: usize = 1024;

impl Part<'_> {
    fn update(mut self, rule: &Rule) {
        let (mut done, global_factor) = (0, self.global_factor);
        for (slot, &factor) in self.slots.iter().zip(self.factors) {
            let (begin, end) = (slot.range.start - self.start, slot.range.end - self.start);
            self.move_average(rule, done..begin);
            let decay = if slot.regularized { rule.weight_decay } else { 0.0 };
            for at in (begin..end).step_by(CHUNK) {
                let range = at..(at + CHUNK).min(end);
                self.step(rule, range.clone(), |g, w| {
                    (g + decay * w) * factor * global_factor
                });
                self.move_average(rule, range);
            }
            done = end;
        }
        self.move_average(rule, done..self.values.len());
    }

    fn move_average(&mut self, rule: &Rule, range: Range<usize>) {
        let averages = self.average.get_mut(range.clone()).unwrap_or_default();
        rule.move_average(averages, &self.values[range]);
    }

    /// Updates some values of a variable; `prepared` makes of a gradient and its weight what is applied.
    fn step(&mut self, rule: &Rule, range: Range<usize>, prepared: impl Fn(f32, f32) -> f32) {
        let gradients = &self.gradients[self.start + range.start..self.start + range.end];
        let first = &mut self.first[range.clone()];
        let values = &mut self.values[range.clone()];
        match rule.kind {
            OptimizerKind::Sgd => {
                for ((w, &g), a) in values.iter_mut().zip(gradients).zip(first) {
                    *a = rule.momentum * *a - rule.learning_rate * prepared(g, *w);
                    *w += *a;
                }
            }
            OptimizerKind::Adam => {
                let second = &mut self.second[range];
                for (((w, &g), m), v) in values.iter_mut().zip(gradients).zip(first).zip(second) {
                    let g = prepared(g, *w);
                    *m += (1.0 - rule.momentum) * (g - *m);
                    *v += (1.0 - ADAM_BETA_2) * (g * g - *v);
                    *w -= rule.adam_rate * *m / (v.sqrt() + ADAM_EPSILON);
                }
            }
        }
    }
}

/// The parts of `values` at `spans`, empty ones of none.
fn split_unless_empty<'a>(values: &'a mut [f32], spans: &[Range<usize>]) -> Vec<&'a mut [f32]> {
    match values.is_empty() {
        true => spans.iter().map(|_| &mut [][..]).collect(),
        false => split_mut(values, spans.iter().cloned()),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::testing::Threads;
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

    /// Prepares and applies; what of the gradients was applied is, at rate 1 from rest, the momentum's negative.
    fn update(
        optimizer: &mut Optimizer,
        weights: &mut Weights,
        gradients: &[f32],
        rate: f32,
        step: u64,
    ) -> UpdateReport {
        let prepared = optimizer.prepare(weights, gradients);
        optimizer.apply(weights, None, (gradients, &prepared), rate, step);
        prepared.report
    }

    #[test]
    fn the_sum_of_squares_misses_no_value_at_any_length() {
        for len in 0..50 {
            let values: Vec<f32> = (1..=len).map(|i| i as f32).collect();
            let expected = len * (len + 1) * (2 * len + 1) / 6;
            assert_eq!(sum_of_squares(&values, &values, |v, _| v), f64::from(expected));
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
                optimizer.use_workers(Arc::new(Threads(threads)));
                let mut weights = Weights::init(&network.variables, 3);
                let mut average = weights.clone();
                let mut reports = Vec::new();
                for step in 0..3 {
                    let gradients: Vec<f32> = (0..weights.trainable.len())
                        .map(|i| ((i * 7 + step as usize) % 1013) as f32 * 1e-3 - 0.4)
                        .collect();
                    let prepared = optimizer.prepare(&weights, &gradients);
                    optimizer.apply(
                        &mut weights,
                        Some(&mut average),
                        (&gradients, &prepared),
                        0.01,
                        step,
                    );
                    reports.push(prepared.report);
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
        let mut sgd = optimizer(&network, |h| {
            (h.momentum, h.weight_decay, h.clip_gradients_norm) = (0.5, 0.0, 0.0);
        });
        let mut weights = Weights::zeros(&network.variables);
        let gradients = vec![1.0; weights.trainable.len()];
        let mut expected = (0.0f32, 0.0f32);
        for step in 0..3 {
            update(&mut sgd, &mut weights, &gradients, 0.25, step);
            expected.0 = 0.5 * expected.0 - 0.25;
            expected.1 += expected.0;
            assert!(weights.trainable.iter().all(|&w| w == expected.1));
        }
        assert_eq!(expected.1, -0.25 - 0.375 - 0.4375);
    }

    #[test]
    fn adam_moves_by_the_learning_rate_at_first() {
        let network = network();
        let mut adam = optimizer(&network, |h| {
            (h.optimizer, h.clip_gradients_norm) = (OptimizerKind::Adam, 0.0);
        });
        let mut weights = Weights::zeros(&network.variables);
        let gradients = vec![3.0; weights.trainable.len()];
        update(&mut adam, &mut weights, &gradients, 0.01, 0);
        assert!(weights.trainable.iter().all(|&w| (w + 0.01).abs() < 1e-5));
    }

    #[test]
    fn each_variable_is_clipped_before_all_together() {
        let network = network();
        let mut sgd = optimizer(&network, |h| h.weight_decay = 0.0);
        let mut weights = Weights::zeros(&network.variables);
        let mut gradients = vec![0.0; weights.trainable.len()];
        let variables: Vec<_> = network
            .variables
            .iter()
            .filter(|v| v.kind == VariableKind::Trainable)
            .take(2)
            .collect();
        gradients[variables[0].offset] = 300.0;
        gradients[variables[1].offset] = 10.0;
        let report = update(&mut sgd, &mut weights, &gradients, 1.0, 0);
        let applied: Vec<f32> = sgd.slots()[0].1.iter().map(|a| -a).collect();
        // 300 → 10 on its own; then √(10² + 10²) → 10 together.
        let expected = 10.0 / 2f32.sqrt();
        assert!((applied[variables[0].offset] - expected).abs() < 1e-5);
        assert!((applied[variables[1].offset] - expected).abs() < 1e-5);
        assert!((report.gradient_norm - 10.0).abs() < 1e-5);
        assert!((report.raw_gradient_norm - 90100f32.sqrt()).abs() < 1e-2);
    }

    #[test]
    fn the_l2_term_concerns_kernels_only() {
        let network = network();
        let mut sgd = optimizer(&network, |h| h.weight_decay = 0.1);
        let mut weights = Weights::zeros(&network.variables);
        weights.trainable.fill(1.0);
        let gradients = vec![0.0; weights.trainable.len()];
        let report = update(&mut sgd, &mut weights, &gradients, 1.0, 0);
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
                sgd.slots()[0].1[variable.offset] != 0.0,
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
        let gradients = vec![1.0; weights.trainable.len()];
        update(&mut sgd, &mut weights, &gradients, 1.0, 0);
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
        let mut sgd = optimizer(&network, |h| h.var_freeze_expr = Some("(stem|box_net)".into()));
        let mut weights = Weights::zeros(&network.variables);
        weights.trainable.fill(1.0);
        weights.statistics.fill(2.0);
        let gradients = vec![0.0; weights.trainable.len()];
        let mut average = Weights::zeros(&network.variables);
        let mut expected = 0.0f64;
        for n in 1..=3u64 {
            let prepared = sgd.prepare(&weights, &gradients);
            sgd.apply(
                &mut weights,
                Some(&mut average),
                (&gradients, &prepared),
                0.0,
                n - 1,
            );
            let decay = (1.0 + n as f64) / (10.0 + n as f64);
            expected -= (1.0 - decay) * (expected - 1.0);
            let near = |average: &[f32], expected: f64| {
                average.iter().all(|&a| (f64::from(a) - expected).abs() < 1e-6)
            };
            assert!(near(&average.trainable, expected), "frozen variables, too");
            assert!(near(&average.statistics, 2.0 * expected));
        }
    }
}
