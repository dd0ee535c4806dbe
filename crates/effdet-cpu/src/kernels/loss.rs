//! The detection losses over padded logit rows, which become their own gradients in place.

use std::ops::Range;

use super::Executor;
use super::lanes::{LaneSums, VIRTUAL_LANES};
use super::pointwise::check;
use crate::arena::SharedPtr;
use crate::math::{exp, exp_of_minus_abs, reciprocal_and_ln_1p_unit};
use crate::probe::{Kernel, Work};
use crate::simd::{Simd, dispatch};

/// Rows of logits that a task works on.
const ROWS_PER_TASK: usize = 32;

/// Class target of anchors that do not count.
const IGNORED: i32 = -2;

/// A logit that no rounding saves from a loss and a gradient of 0.
const CERTAINLY_NOT: f32 = -1e4;

/// Where the anchors of a head's output, or of some maps of it, are.
///
/// Logits are `[level][image][cell][stride]`, of which the first `anchors_per_cell·K` columns count (K values per anchor);
/// targets are `[image][level][cell][anchor]`, those of all maps.
#[derive(Debug, Clone)]
pub struct HeadRows<'a> {
    /// Number of images.
    pub images: usize,
    /// Cells of each level.
    pub cells_per_level: &'a [usize],
    /// Anchors of a cell.
    pub anchors_per_cell: usize,
    /// Values from one row of logits to the next.
    pub stride: usize,
    /// The maps that are there, as level · images + image.
    pub maps: Range<usize>,
}

/// Arguments of [`focal`].
#[derive(Debug)]
pub struct Focal<'a> {
    /// Anchors.
    pub rows: HeadRows<'a>,
    /// Classes, K.
    pub classes: usize,
    /// α.
    pub alpha: f32,
    /// γ.
    pub gamma: f32,
    /// s in z' = z·(1 − s) + s/2, in the cross-entropy only.
    pub label_smoothing: f32,
    /// P, by which the loss is divided.
    pub normalizer: f32,
    /// Class index per anchor, −1 background, −2 ignored: `[images, anchors]`.
    pub targets: &'a [i32],
    /// Overwritten with the gradient; padding columns with 0.
    pub logits: &'a mut [f32],
}

/// Sums the focal loss and replaces the logits by its gradient.
///
/// For a logit x with target z ∈ {0, 1}: `loss = α_z·exp(−γ·z·x − γ·softplus(−x))·ce/P`, where `ce = softplus(x) − x·z'` and
/// α_z is α for z = 1, otherwise 1 − α.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn focal(executor: &Executor, args: Focal<'_>) -> f64 {
    let Focal {
        rows,
        classes,
        alpha,
        gamma,
        label_smoothing,
        normalizer,
        targets,
        logits,
    } = args;
    let _report = executor.report(Kernel::Loss, Work::new(0, 2 * logits.len() + targets.len()));
    let width = rows.check(classes, logits.len());
    check("targets", targets.len(), rows.images * rows.anchors());
    let background = Term::new(alpha, gamma, label_smoothing, normalizer, 0.0);
    let positive = Term::new(alpha, gamma, label_smoothing, normalizer, 1.0);
    let modulator = match gamma {
        1.5 => Modulator::ThreeHalves,
        2.0 => Modulator::Square,
        _ => Modulator::Any,
    };
    let logits = SharedPtr::new(logits);
    rows.sum_tasks(executor, &|run| {
        // SAFETY: the sizes are checked above, and runs are disjoint.
        unsafe {
            let run = FocalRun {
                rows: run.rows,
                width,
                stride: rows.stride,
                classes,
                background,
                positive,
                modulator,
                targets: &targets[run.anchor..][..run.rows * rows.anchors_per_cell],
                logits: logits.get().add(run.row * rows.stride),
            };
            focal_rows(executor.isa(), &run)
        }
    })
}

impl HeadRows<'_> {
    /// Values of a row that count.
    ///
    /// # Panics
    /// When the logits have another size.
    #[track_caller]
    fn check(&self, values_per_anchor: usize, len: usize) -> usize {
        let width = self.anchors_per_cell * values_per_anchor;
        assert!(
            self.stride >= width,
            "the stride {} is below the {width} values of a row",
            self.stride
        );
        let cells: usize = self
            .maps
            .clone()
            .map(|map| self.cells_per_level[map / self.images])
            .sum();
        check("the head's output", len, cells * self.stride);
        width
    }

    /// Anchors of an image.
    fn anchors(&self) -> usize {
        self.cells_per_level.iter().sum::<usize>() * self.anchors_per_cell
    }

    /// Sums `work` over runs of rows, in order.
    fn sum_tasks(&self, executor: &Executor, work: &(dyn Fn(&Run) -> f64 + Sync)) -> f64 {
        let (mut runs, mut row) = (Vec::new(), 0);
        for map in self.maps.clone() {
            let (level, image) = (map / self.images, map % self.images);
            let (before, cells) = (&self.cells_per_level[..level], self.cells_per_level[level]);
            let first_anchor = image * self.anchors() + before.iter().sum::<usize>() * self.anchors_per_cell;
            for cell in (0..cells).step_by(ROWS_PER_TASK) {
                runs.push(Run {
                    row: row + cell,
                    rows: ROWS_PER_TASK.min(cells - cell),
                    anchor: first_anchor + cell * self.anchors_per_cell,
                });
            }
            row += cells;
        }
        let mut losses = vec![0.0; runs.len()];
        let shared = SharedPtr::new(&mut losses);
        executor.pool().run(runs.len(), &|task, _| {
            // SAFETY: every task has its own element.
            unsafe { *shared.get().add(task) = work(&runs[task]) };
        });
        losses.iter().sum()
    }
}

/// Neighbouring rows of one level and image.
struct Run {
    row: usize,
    rows: usize,
    /// Index of the first anchor in the targets.
    anchor: usize,
}

/// How (1 − p_t)^γ is computed out of 1 − p_t.
#[derive(Debug, Clone, Copy)]
enum Modulator {
    ThreeHalves,
    Square,
    /// By the exponential function.
    Any,
}

/// The constants of the loss for one kind of target.
#[derive(Debug, Clone, Copy)]
struct Term {
    /// z.
    target: f32,
    /// z'.
    smoothed: f32,
    /// α_z/P.
    factor: f32,
    gamma: f32,
}

impl Term {
    fn new(alpha: f32, gamma: f32, label_smoothing: f32, normalizer: f32, target: f32) -> Self {
        let alpha = if target == 1.0 { alpha } else { 1.0 - alpha };
        Self {
            target,
            smoothed: target * (1.0 - label_smoothing) + 0.5 * label_smoothing,
            factor: alpha / normalizer,
            gamma,
        }
    }

    /// Losses and gradients of P vectors of logits, step by step for all of them: the steps of one vector wait for each other.
    ///
    /// With u = x for z = 0 and −x for z = 1, the probability of being wrong is σ(u) and the modulator σ(u)^γ.
    #[inline(always)]
    unsafe fn evaluate<S: Simd, const P: usize>(
        &self,
        modulator: Modulator,
        x: [S::V; P],
    ) -> ([S::V; P], [S::V; P]) {
        // SAFETY: needs the instruction set only.
        unsafe {
            let zero = S::zero();
            let is_positive = self.target == 1.0;
            let u = |x: S::V| if is_positive { S::sub(zero, x) } else { x };
            // e = exp(−|x|) gives σ(u), σ(−u) and softplus(u) without cancellation.
            let e = exp_of_minus_abs::<S, P>(&x);
            let (near_one, log) = reciprocal_and_ln_1p_unit::<S, P>(&e);
            let (mut wrong, mut right) = (e, e);
            for (i, (wrong, right)) in wrong.iter_mut().zip(&mut right).enumerate() {
                let near_zero = S::mul(e[i], near_one[i]);
                *wrong = S::select_lt(u(x[i]), zero, near_zero, near_one[i]);
                *right = S::select_lt(u(x[i]), zero, near_one[i], near_zero);
            }
            let mut weighed = wrong;
            for (i, weighed) in weighed.iter_mut().enumerate() {
                let modulator = match modulator {
                    Modulator::ThreeHalves => S::mul(*weighed, S::sqrt(*weighed)),
                    Modulator::Square => S::mul(*weighed, *weighed),
                    Modulator::Any => {
                        let softplus_of_minus_u = S::add(S::max(zero, S::sub(zero, u(x[i]))), log[i]);
                        exp::<S>(S::mul(S::splat(-self.gamma), softplus_of_minus_u))
                    }
                };
                *weighed = S::mul(S::splat(self.factor), modulator);
            }
            let (mut losses, mut gradients) = (x, x);
            for (i, (loss, gradient)) in losses.iter_mut().zip(&mut gradients).enumerate() {
                let cross_entropy =
                    S::fnma(x[i], S::splat(self.smoothed), S::add(S::max(zero, x[i]), log[i]));
                // σ(x) − z' as the distance from the target plus the smoothing's part.
                let distance = if is_positive {
                    S::sub(zero, wrong[i])
                } else {
                    wrong[i]
                };
                let slope = S::add(distance, S::splat(self.target - self.smoothed));
                // The modulator's own slope is ±γ·modulator·σ(−u).
                let gamma = S::splat(if is_positive { -self.gamma } else { self.gamma });
                let steepness = S::fma(S::mul(gamma, right[i]), cross_entropy, slope);
                *loss = S::mul(weighed[i], cross_entropy);
                *gradient = S::mul(weighed[i], steepness);
            }
            (losses, gradients)
        }
    }
}

/// The rows of one task of [`focal`].
#[derive(Debug)]
struct FocalRun<'a> {
    rows: usize,
    width: usize,
    stride: usize,
    classes: usize,
    background: Term,
    positive: Term,
    modulator: Modulator,
    targets: &'a [i32],
    logits: *mut f32,
}

/// Overwrites a row of logits by the gradient for z = 0 and sums the loss.
#[inline(always)]
unsafe fn background_row<S: Simd>(run: &FocalRun<'_>, row: *mut f32, modulator: Modulator) -> f32 {
    // SAFETY: inside the row; vectors at the end are partial.
    unsafe {
        let mut sums = LaneSums::<S>::zero();
        let mut column = 0;
        macro_rules! vectors {
            ($vectors:literal) => {
                while column + $vectors * VIRTUAL_LANES <= run.width {
                    for i in 0..LaneSums::<S>::VECTORS {
                        let at = row.add(column + i * S::LANES);
                        let mut x = [S::zero(); $vectors];
                        for (j, x) in x.iter_mut().enumerate() {
                            *x = S::load(at.add(j * VIRTUAL_LANES));
                        }
                        let (losses, gradients) = run.background.evaluate::<S, $vectors>(modulator, x);
                        let sum = sums.vector(i);
                        for (j, (loss, gradient)) in losses.into_iter().zip(gradients).enumerate() {
                            S::store(at.add(j * VIRTUAL_LANES), gradient);
                            *sum = S::add(*sum, loss);
                        }
                    }
                    column += $vectors * VIRTUAL_LANES;
                }
            };
        }
        if S::REGISTERS == 32 {
            vectors!(4);
        }
        vectors!(2);
        vectors!(1);
        for i in 0..LaneSums::<S>::VECTORS {
            let first = column + i * S::LANES;
            if first < run.width {
                let lanes = (run.width - first).min(S::LANES);
                let mut tail = [CERTAINLY_NOT; VIRTUAL_LANES];
                tail[..lanes].copy_from_slice(std::slice::from_raw_parts(row.add(first), lanes));
                let ([loss], [gradient]) = run
                    .background
                    .evaluate::<S, 1>(modulator, [S::load(tail.as_ptr())]);
                S::store_partial(row.add(first), gradient, lanes);
                let sum = sums.vector(i);
                *sum = S::add(*sum, loss);
            }
        }
        sums.total()
    }
}

#[inline(always)]
unsafe fn focal_rows_body<S: Simd>(run: &FocalRun<'_>) -> f64 {
    let anchors = run.width / run.classes;
    let mut total = 0.0;
    let mut taken = Vec::with_capacity(anchors);
    for row in 0..run.rows {
        // SAFETY: inside the row.
        unsafe {
            let logits = run.logits.add(row * run.stride);
            let values = std::slice::from_raw_parts_mut(logits, run.stride);
            values[run.width..].fill(0.0);
            // Logits that are no background are taken out of the row, where they then count nothing.
            let targets = &run.targets[row * anchors..][..anchors];
            taken.clear();
            for (anchor, &target) in targets.iter().enumerate() {
                let of_anchor = &mut values[anchor * run.classes..][..run.classes];
                if target <= IGNORED {
                    of_anchor.fill(CERTAINLY_NOT);
                } else if let Some(logit) = usize::try_from(target)
                    .ok()
                    .and_then(|class| of_anchor.get_mut(class))
                {
                    taken.push((anchor * run.classes + target as usize, *logit));
                    *logit = CERTAINLY_NOT;
                }
            }
            let loss = match run.modulator {
                Modulator::ThreeHalves => background_row::<S>(run, logits, Modulator::ThreeHalves),
                Modulator::Square => background_row::<S>(run, logits, Modulator::Square),
                Modulator::Any => background_row::<S>(run, logits, Modulator::Any),
            };
            total += f64::from(loss);
            for &(column, logit) in &taken {
                let ([loss], [gradient]) = run.positive.evaluate::<S, 1>(run.modulator, [S::splat(logit)]);
                S::store_partial(logits.add(column), gradient, 1);
                let mut value = 0.0;
                S::store_partial(&mut value, loss, 1);
                total += f64::from(value);
            }
        }
    }
    total
}

dispatch! {
    /// Loss of some rows, which become their gradients.
    ///
    /// # Safety
    /// `isa` must be available and the pointers valid.
    unsafe fn focal_rows(run: &FocalRun<'_>) -> f64 = focal_rows_body;
}

/// Arguments of [`huber`].
#[derive(Debug)]
pub struct Huber<'a> {
    /// Anchors; K = 4.
    pub rows: HeadRows<'a>,
    /// δ.
    pub delta: f32,
    /// P: the loss is divided by 4P.
    pub normalizer: f32,
    /// Factor of the gradient, not of the returned loss.
    pub gradient_weight: f32,
    /// Box codes per anchor, `[images, anchors, 4]`; coordinates whose target is 0 do not count.
    pub targets: &'a [f32],
    /// Overwritten with the gradient; padding columns with 0.
    pub codes: &'a mut [f32],
}

/// Sums the Huber loss and replaces the box codes by its gradient.
///
/// For e = code − target: `e²/2` where |e| <= δ, otherwise `δ·|e| − δ²/2`, divided by 4P.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn huber(executor: &Executor, args: Huber<'_>) -> f64 {
    let Huber {
        rows,
        delta,
        normalizer,
        gradient_weight,
        targets,
        codes,
    } = args;
    let _report = executor.report(Kernel::Loss, Work::new(0, 2 * codes.len() + targets.len()));
    let width = rows.check(CODE_LEN, codes.len());
    check("targets", targets.len(), rows.images * rows.anchors() * CODE_LEN);
    let codes = SharedPtr::new(codes);
    let loss = rows.sum_tasks(executor, &|run| {
        // SAFETY: the sizes are checked above, and runs are disjoint.
        unsafe {
            let run = HuberRun {
                rows: run.rows,
                width,
                stride: rows.stride,
                delta,
                gradient_factor: gradient_weight / (CODE_LEN as f32 * normalizer),
                targets: targets[run.anchor * CODE_LEN..].as_ptr(),
                codes: codes.get().add(run.row * rows.stride),
            };
            huber_rows(executor.isa(), &run)
        }
    });
    loss / (CODE_LEN as f64 * f64::from(normalizer))
}

/// Values of a box code.
const CODE_LEN: usize = 4;

/// The rows of one task of [`huber`].
#[derive(Debug)]
struct HuberRun {
    rows: usize,
    width: usize,
    stride: usize,
    delta: f32,
    gradient_factor: f32,
    /// `[rows, width]`.
    targets: *const f32,
    codes: *mut f32,
}

#[inline(always)]
unsafe fn huber_rows_body<S: Simd>(run: &HuberRun) -> f64 {
    let mut total = 0.0;
    for row in 0..run.rows {
        // SAFETY: inside the rows; vectors at the end are partial.
        unsafe {
            let codes = run.codes.add(row * run.stride);
            let targets = run.targets.add(row * run.width);
            let (zero, half) = (S::zero(), S::splat(0.5));
            let (delta, factor) = (S::splat(run.delta), S::splat(run.gradient_factor));
            let mut sums = LaneSums::<S>::zero();
            for column in (0..run.width).step_by(S::LANES) {
                let lanes = S::LANES.min(run.width - column);
                let target = S::load_partial(targets.add(column), lanes);
                let error = S::sub(S::load_partial(codes.add(column), lanes), target);
                let size = S::abs(error);
                let square = S::mul(half, S::mul(error, error));
                let line = S::mul(delta, S::fnma(half, delta, size));
                let loss = S::select_lt(delta, size, line, square);
                let clipped = S::min(delta, S::max(S::sub(zero, delta), error));
                let is_set = S::abs(target);
                let sum = sums.vector(column / S::LANES % LaneSums::<S>::VECTORS);
                *sum = S::add(*sum, S::select_lt(zero, is_set, loss, zero));
                let gradient = S::select_lt(zero, is_set, S::mul(clipped, factor), zero);
                S::store_partial(codes.add(column), gradient, lanes);
            }
            std::slice::from_raw_parts_mut(codes, run.stride)[run.width..].fill(0.0);
            total += f64::from(sums.total());
        }
    }
    total
}

dispatch! {
    /// Loss of some rows, which become their gradients.
    ///
    /// # Safety
    /// `isa` must be available and the pointers valid.
    unsafe fn huber_rows(run: &HuberRun) -> f64 = huber_rows_body;
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, same_everywhere, values};
    use super::*;

    /// Loss of one logit in float64, by the formula as it is written.
    fn reference_focal(x: f64, z: f64, alpha: f64, gamma: f64, smoothing: f64) -> f64 {
        let modulator = (-gamma * z * x - gamma * (-x).exp().ln_1p()).exp();
        let smoothed = z * (1.0 - smoothing) + 0.5 * smoothing;
        let cross_entropy = x.max(0.0) - x * smoothed + (-x.abs()).exp().ln_1p();
        (if z == 1.0 { alpha } else { 1.0 - alpha }) * modulator * cross_entropy
    }

    fn reference_huber(error: f64, delta: f64) -> f64 {
        if error.abs() <= delta {
            0.5 * error * error
        } else {
            delta * error.abs() - 0.5 * delta * delta
        }
    }

    const IMAGES: usize = 2;
    const CELLS: [usize; 3] = [70, 5, 1];
    const ANCHORS: usize = 3;

    fn rows(stride: usize) -> HeadRows<'static> {
        HeadRows {
            images: IMAGES,
            cells_per_level: &CELLS,
            anchors_per_cell: ANCHORS,
            stride,
            maps: 0..IMAGES * CELLS.len(),
        }
    }

    /// Index of each anchor's first value in the head's output, in the order of the targets.
    fn places(stride: usize, values_per_anchor: usize) -> Vec<usize> {
        let mut places = Vec::new();
        for image in 0..IMAGES {
            let mut first = 0;
            for cells in CELLS {
                for cell in 0..cells {
                    let row = first + image * cells + cell;
                    places.extend((0..ANCHORS).map(|anchor| row * stride + anchor * values_per_anchor));
                }
                first += IMAGES * cells;
            }
        }
        places
    }

    #[test]
    fn focal_loss_and_gradient_match_float64_and_themselves_everywhere() {
        let anchors = IMAGES * ANCHORS * CELLS.iter().sum::<usize>();
        for (classes, stride, gamma, smoothing) in [
            (1, 3, 1.5, 0.0),
            (7, 32, 1.5, 0.1),
            (90, 270, 2.0, 0.0),
            (11, 48, 0.7, 0.05),
        ] {
            let len = anchors / ANCHORS * stride;
            let logits: Vec<f32> = values(len, 1).iter().map(|x| x * 12.0 - 3.0).collect();
            let targets: Vec<i32> = (0..anchors)
                .map(|i| {
                    if i % 5 < 3 {
                        -1
                    } else {
                        (i * 7 % (classes + 1)) as i32 - 2
                    }
                })
                .collect();
            let targets: Vec<i32> = targets
                .iter()
                .map(|&t| if t == -1 { -1 } else { t.min(classes as i32 - 1) })
                .collect();
            let of_parts = |parts: &[Range<usize>]| {
                same_everywhere(|executor| {
                    let mut logits = logits.clone();
                    let (mut rest, mut loss) = (&mut logits[..], 0.0);
                    for maps in parts {
                        let cells: usize = maps.clone().map(|map| CELLS[map / IMAGES]).sum();
                        let (part, after) = rest.split_at_mut(cells * stride);
                        rest = after;
                        let args = Focal {
                            rows: HeadRows {
                                maps: maps.clone(),
                                ..rows(stride)
                            },
                            classes,
                            alpha: 0.25,
                            gamma,
                            label_smoothing: smoothing,
                            normalizer: 3.0,
                            targets: &targets,
                            logits: part,
                        };
                        loss += focal(executor, args);
                    }
                    (loss, logits)
                })
            };
            let maps = IMAGES * CELLS.len();
            let (loss, gradient) = of_parts(&[rows(stride).maps]);
            let (in_parts, gradient_in_parts) = of_parts(&[0..1, 1..3, 3..maps]);
            assert!(gradient_in_parts == gradient, "parts have the whole's gradient");
            assert!((in_parts - loss).abs() < 1e-12 * loss);
            let mut expected = vec![0.0; len];
            let mut expected_loss = 0.0;
            for (&target, place) in targets.iter().zip(places(stride, classes)) {
                for class in 0..classes {
                    let z = if target == class as i32 { 1.0 } else { 0.0 };
                    let of =
                        |x: f64| reference_focal(x, z, 0.25, f64::from(gamma), f64::from(smoothing)) / 3.0;
                    let (x, h) = (f64::from(logits[place + class]), 1e-5);
                    if target != IGNORED {
                        expected_loss += of(x);
                        expected[place + class] = (of(x + h) - of(x - h)) / (2.0 * h);
                    }
                }
            }
            assert!(
                (loss - expected_loss).abs() < 1e-6 * expected_loss,
                "{loss} for {expected_loss}"
            );
            assert_close("the gradient", &gradient, &expected, 1e-6);
            for (i, (&gradient, &expected)) in gradient.iter().zip(&expected).enumerate() {
                let error = (f64::from(gradient) - expected).abs();
                assert!(
                    error < 1e-4 * expected.abs() + 1e-10,
                    "gradient[{i}] is {gradient} for {expected}"
                );
            }
        }
    }

    #[test]
    fn focal_loss_of_extreme_logits_is_finite() {
        for (target, logit, loss_per_x, slope) in [(-1, 200.0, 0.75, 0.75), (0, -200.0, 0.25, -0.25)] {
            let mut logits = [logit, -200.0, 0.0, 0.0];
            let args = Focal {
                rows: HeadRows {
                    images: 1,
                    cells_per_level: &[1],
                    anchors_per_cell: 1,
                    stride: 4,
                    maps: 0..1,
                },
                classes: 2,
                alpha: 0.25,
                gamma: 1.5,
                label_smoothing: 0.0,
                normalizer: 1.0,
                targets: &[target],
                logits: &mut logits,
            };
            let loss = focal(&Executor::new(1, crate::simd::Isa::detect()), args);
            assert!((loss - 200.0 * loss_per_x).abs() < 1e-4, "{loss}");
            assert_eq!(logits, [slope, 0.0, 0.0, 0.0]);
        }
    }

    #[test]
    fn huber_loss_and_gradient_match_float64_and_themselves_everywhere() {
        let anchors = IMAGES * ANCHORS * CELLS.iter().sum::<usize>();
        for stride in [12, 16, 48] {
            let len = anchors / ANCHORS * stride;
            let codes = values(len, 1);
            let targets: Vec<f32> = values(anchors * CODE_LEN, 2)
                .iter()
                .zip(0..)
                .map(|(x, i)| if i % 7 < 3 { 0.0 } else { x * 0.2 })
                .collect();
            let (loss, gradient) = same_everywhere(|executor| {
                let mut codes = codes.clone();
                let args = Huber {
                    rows: rows(stride),
                    delta: 0.1,
                    normalizer: 3.0,
                    gradient_weight: 50.0,
                    targets: &targets,
                    codes: &mut codes,
                };
                (huber(executor, args), codes)
            });
            let (mut expected, mut expected_loss) = (vec![0.0; len], 0.0);
            for (targets, place) in targets.chunks(CODE_LEN).zip(places(stride, CODE_LEN)) {
                for (i, &target) in targets.iter().enumerate() {
                    let error = f64::from(codes[place + i]) - f64::from(target);
                    let of = |error: f64| reference_huber(error, f64::from(0.1f32)) / 12.0;
                    if target != 0.0 {
                        expected_loss += of(error);
                        expected[place + i] = 50.0 * (of(error + 1e-6) - of(error - 1e-6)) / 2e-6;
                    }
                }
            }
            assert!(
                (loss - expected_loss).abs() < 1e-6 * expected_loss,
                "{loss} for {expected_loss}"
            );
            assert_close("the gradient", &gradient, &expected, 1e-5);
        }
    }
}
