//! Squeeze-and-excitation: `gate = σ(W₂·act(W₁·mean(x) + b₁) + b₂)`, a factor per image and channel.

use std::marker::PhantomData;
use std::ops::Range;

use super::Executor;
use super::elementwise::{AffineVectors, Source, for_blocks};
use super::lanes::dot;
use super::pointwise::{RowPlan, Segment, check, part};
use super::row_sweeps::{Sweep, fetch_distance, load, sweep};
use crate::arena::SharedPtr;
use crate::math::{Act, Activation, sigmoid, with_activation};
use crate::probe::{Kernel, Work};
use crate::simd::{Isa, Simd, dispatch};
use crate::storage::Stored;

/// Tasks that the weight gradients are cut into.
const GRADIENT_TASKS: usize = 8;

/// Arguments of [`pool`].
#[derive(Debug)]
pub struct Pool<'a, X = f32> {
    /// Number of images.
    pub images: usize,
    /// Rows (pixels) of an image.
    pub rows_per_image: usize,
    /// Number of channels.
    pub channels: usize,
    /// What is averaged, one group.
    pub source: Source<'a, X>,
    /// Overwritten with the mean over the rows of each image: `[images, channels]`.
    pub mean: &'a mut [f32],
}

/// Nominal work of `products` passes over both fully connected layers.
fn work(images: usize, channels: usize, squeezed: usize, products: usize) -> Work {
    let weights = 2 * channels * squeezed;
    Work::new(products * images * weights, products * weights)
}

/// Averages each channel over the pixels of an image.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn pool<X: Stored>(executor: &Executor, args: Pool<'_, X>) {
    let Pool {
        images,
        rows_per_image,
        channels,
        source,
        mean,
    } = args;
    let _report = executor.report(Kernel::SqueezeExcite, Work::new(0, source.raw.len()));
    check("the source", source.raw.len(), images * rows_per_image * channels);
    check("mean", mean.len(), images * channels);
    let affine = AffineVectors::new(source.affine, (1, images, channels));
    // A group per image makes the totals those of images.
    let segment = |image| Segment {
        rows: rows_per_image,
        image,
        group: image,
    };
    let rows = RowPlan::new(&(0..images).map(segment).collect::<Vec<_>>());
    let mut totals = vec![0.0; images * channels];
    with_activation!(source.act, A => {
        for_blocks::<1>(executor, &rows, channels, Some(&mut totals), &|block, sums| {
            // SAFETY: the sizes are checked above.
            unsafe {
                let pass = PoolPass::<A, X> {
                    rows: block.rows,
                    columns: channels,
                    raw: source.raw.as_ptr().add(block.row * channels),
                    scale: affine.scale.at(0, block.image, channels, 0),
                    shift: affine.shift.at(0, block.image, channels, 0),
                    sums,
                    ahead: fetch_distance(channels, channels),
                    act: PhantomData,
                };
                sweep(executor.isa(), &pass);
            }
        });
    });
    for (mean, total) in mean.iter_mut().zip(totals) {
        *mean = (total / rows_per_image as f64) as f32;
    }
}

struct PoolPass<A, X> {
    rows: usize,
    columns: usize,
    raw: *const X,
    scale: *const f32,
    shift: *const f32,
    sums: *mut f32,
    /// Values from one that is read to one that is fetched.
    ahead: usize,
    act: PhantomData<A>,
}

impl<A: Activation, X: Stored> Sweep for PoolPass<A, X> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    unsafe fn vector<S: Simd, const R: usize, const WHOLE: bool>(
        &self,
        row: usize,
        column: usize,
        lanes: usize,
    ) {
        // SAFETY: inside the rows and columns of the pass; sums hold whole vectors.
        unsafe {
            let scale = load::<S, WHOLE>(self.scale.add(column), lanes);
            let shift = load::<S, WHOLE>(self.shift.add(column), lanes);
            let mut z = [S::zero(); R];
            for (i, z) in z.iter_mut().enumerate() {
                let raw = self.raw.add((row + i) * self.columns + column);
                S::prefetch(raw.wrapping_add(self.ahead).cast());
                *z = S::fma(load::<S, WHOLE>(raw, lanes), scale, shift);
            }
            let mut sum = S::load(self.sums.add(column));
            for value in A::values::<S, R>(z) {
                sum = S::add(sum, value);
            }
            S::store(self.sums.add(column), sum);
        }
    }
}

/// The four weight tensors.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    /// `[1, 1, channels, squeezed]`.
    pub reduce_kernel: &'a [f32],
    /// `[squeezed]`.
    pub reduce_bias: &'a [f32],
    /// `[1, 1, squeezed, channels]`.
    pub expand_kernel: &'a [f32],
    /// `[channels]`.
    pub expand_bias: &'a [f32],
}

/// Gradients by the four weight tensors, shaped as in [`Weights`].
#[derive(Debug)]
pub struct WeightGradients<'a> {
    /// `[1, 1, channels, squeezed]`.
    pub reduce_kernel: &'a mut [f32],
    /// `[squeezed]`.
    pub reduce_bias: &'a mut [f32],
    /// `[1, 1, squeezed, channels]`.
    pub expand_kernel: &'a mut [f32],
    /// `[channels]`.
    pub expand_bias: &'a mut [f32],
}

/// Arguments of [`excite`].
#[derive(Debug)]
pub struct Excite<'a> {
    /// Weights.
    pub weights: Weights<'a>,
    /// Activation between the two products.
    pub act: Act,
    /// Output of [`pool`]: `[images, channels]`.
    pub mean: &'a [f32],
    /// Overwritten with `W₁·mean + b₁`, before its activation: `[images, squeezed]`.
    pub hidden: &'a mut [f32],
    /// Overwritten with the gates: `[images, channels]`.
    pub gate: &'a mut [f32],
}

/// Computes the gates.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn excite(executor: &Executor, args: Excite<'_>) {
    let _report = executor.report(Kernel::SqueezeExcite, args.work());
    excite_with(executor.isa(), args, |images, f| executor.pool().run(images, f));
}

/// [`excite`] on the calling thread alone.
///
/// # Panics
/// As [`excite`].
pub(crate) fn excite_alone(isa: Isa, args: Excite<'_>) {
    excite_with(isa, args, |images, f| (0..images).for_each(|image| f(image, 0)));
}

/// `each` calls what it is given for every image.
fn excite_with(isa: Isa, args: Excite<'_>, each: impl FnOnce(usize, &(dyn Fn(usize, usize) + Sync))) {
    let Excite {
        weights,
        act,
        mean,
        hidden,
        gate,
    } = args;
    let (channels, squeezed) = weights.check();
    let images = mean.len() / channels;
    check("mean", mean.len(), images * channels);
    check("hidden", hidden.len(), images * squeezed);
    check("gate", gate.len(), images * channels);
    let (hidden, gate) = (SharedPtr::new(hidden), SharedPtr::new(gate));
    each(images, &|image, _| {
        let mut activated = vec![0.0; squeezed];
        // SAFETY: the sizes are checked above, and every image has its own parts.
        unsafe {
            let step = Excitation {
                weights: &weights,
                mean: &mean[image * channels..][..channels],
                hidden: part(hidden, image, squeezed),
                activated: &mut activated,
                gate: part(gate, image, channels),
            };
            with_activation!(act, A => excite_image::<A>(isa, step));
        }
    });
}

impl Excite<'_> {
    pub(crate) fn work(&self) -> Work {
        let (channels, squeezed) = self.weights.check();
        work(self.mean.len() / channels, channels, squeezed, 1)
    }
}

impl Weights<'_> {
    /// Channels and squeezed channels.
    ///
    /// # Panics
    /// When sizes do not agree.
    #[track_caller]
    fn check(&self) -> (usize, usize) {
        let (channels, squeezed) = (self.expand_bias.len(), self.reduce_bias.len());
        assert!(
            channels > 0 && squeezed > 0,
            "squeeze-and-excitation needs channels"
        );
        check("reduce_kernel", self.reduce_kernel.len(), channels * squeezed);
        check("expand_kernel", self.expand_kernel.len(), channels * squeezed);
        (channels, squeezed)
    }
}

/// `out[..] = bias[..] + Σ_i factors[i]·rows[i][..]`: one chain over i per element.
#[inline(always)]
unsafe fn combine_rows<S: Simd>(factors: &[f32], rows: &[f32], bias: &[f32], out: &mut [f32]) {
    let width = out.len();
    for column in (0..width).step_by(S::LANES) {
        let lanes = S::LANES.min(width - column);
        // SAFETY: `lanes` values of each row.
        unsafe {
            let mut sum = S::load_partial(bias.as_ptr().add(column), lanes);
            for (i, &factor) in factors.iter().enumerate() {
                let row = S::load_partial(rows.as_ptr().add(i * width + column), lanes);
                sum = S::fma(S::splat(factor), row, sum);
            }
            S::store_partial(out.as_mut_ptr().add(column), sum, lanes);
        }
    }
}

/// The forward pass of one image.
struct Excitation<'a> {
    weights: &'a Weights<'a>,
    mean: &'a [f32],
    hidden: &'a mut [f32],
    activated: &'a mut [f32],
    gate: &'a mut [f32],
}

#[inline(always)]
unsafe fn excite_image_body<S: Simd, A: Activation>(step: Excitation<'_>) {
    let weights = step.weights;
    // SAFETY: the caller checks the sizes; vectors at the ends are partial.
    unsafe {
        combine_rows::<S>(step.mean, weights.reduce_kernel, weights.reduce_bias, step.hidden);
        for (activated, hidden) in step
            .activated
            .chunks_mut(S::LANES)
            .zip(step.hidden.chunks(S::LANES))
        {
            let z = S::load_partial(hidden.as_ptr(), hidden.len());
            S::store_partial(activated.as_mut_ptr(), A::value::<S>(z), hidden.len());
        }
        combine_rows::<S>(
            step.activated,
            weights.expand_kernel,
            weights.expand_bias,
            step.gate,
        );
        for gate in step.gate.chunks_mut(S::LANES) {
            let z = S::load_partial(gate.as_ptr(), gate.len());
            S::store_partial(gate.as_mut_ptr(), sigmoid::<S>(z), gate.len());
        }
    }
}

dispatch! {
    /// Hidden values and gates of one image.
    ///
    /// # Safety
    /// `isa` must be available and the sizes agree.
    unsafe fn excite_image[A: Activation][A](step: Excitation<'_>) = excite_image_body;
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// Weights.
    pub weights: Weights<'a>,
    /// Activation between the two products.
    pub act: Act,
    /// Rows (pixels) of an image, N.
    pub rows_per_image: usize,
    /// Output of [`pool`].
    pub mean: &'a [f32],
    /// Of the forward pass.
    pub hidden: &'a [f32],
    /// Of the forward pass.
    pub gate: &'a [f32],
    /// Sums of [`pointwise::backward_activated`](super::pointwise::backward_activated), `[images, 5, channels]`; the first of
    /// the five is the gradient by the gate.
    pub sums: &'a [f64],
    /// Overwritten with the gradient that comes back to every pixel, dpool/N: `[images, channels]`.
    pub dpool: &'a mut [f32],
    /// Overwritten.
    pub weight_gradients: WeightGradients<'a>,
}

/// The backward pass of [`pool`] and [`excite`].
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn backward(executor: &Executor, args: Backward<'_>) {
    let Backward {
        weights,
        act,
        rows_per_image,
        mean,
        hidden,
        gate,
        sums,
        dpool,
        weight_gradients,
    } = args;
    let WeightGradients {
        reduce_kernel,
        reduce_bias,
        expand_kernel,
        expand_bias,
    } = weight_gradients;
    let (channels, squeezed) = weights.check();
    let images = mean.len() / channels;
    let _report = executor.report(Kernel::SqueezeExciteBackward, work(images, channels, squeezed, 2));
    check("mean", mean.len(), images * channels);
    check("hidden", hidden.len(), images * squeezed);
    check("gate", gate.len(), images * channels);
    check("sums", sums.len(), images * 5 * channels);
    check("dpool", dpool.len(), images * channels);
    check(
        "the gradient of reduce_kernel",
        reduce_kernel.len(),
        channels * squeezed,
    );
    check("the gradient of reduce_bias", reduce_bias.len(), squeezed);
    check(
        "the gradient of expand_kernel",
        expand_kernel.len(),
        channels * squeezed,
    );
    check("the gradient of expand_bias", expand_bias.len(), channels);
    let (isa, pool) = (executor.isa(), executor.pool());

    let mut activated = vec![0.0; images * squeezed];
    let mut d_hidden = vec![0.0; images * squeezed];
    let mut d_logits = vec![0.0; images * channels];
    let shared = [&mut activated, &mut d_hidden, &mut d_logits].map(|values| SharedPtr::new(values));
    let dpool = SharedPtr::new(dpool);
    pool.run(images, &|image, _| {
        // SAFETY: the sizes are checked above, and every image has its own parts.
        unsafe {
            let step = ExcitationBackward {
                weights: &weights,
                rows_per_image: rows_per_image as f32,
                hidden: &hidden[image * squeezed..][..squeezed],
                gate: &gate[image * channels..][..channels],
                d_gate: &sums[image * 5 * channels..][..channels],
                activated: part(shared[0], image, squeezed),
                d_hidden: part(shared[1], image, squeezed),
                d_logits: part(shared[2], image, channels),
                dpool: part(dpool, image, channels),
            };
            with_activation!(act, A => backward_image::<A>(isa, step));
        }
    });

    sum_images(&d_logits, expand_bias);
    sum_images(&d_hidden, reduce_bias);
    let (reduce_kernel, expand_kernel) = (SharedPtr::new(reduce_kernel), SharedPtr::new(expand_kernel));
    pool.run(GRADIENT_TASKS, &|task, _| {
        let rows = |count: usize| count * task / GRADIENT_TASKS..count * (task + 1) / GRADIENT_TASKS;
        // SAFETY: the sizes are checked above, and tasks have disjoint rows.
        unsafe {
            let (size, out) = ((channels, squeezed), reduce_kernel.get());
            outer_products(isa, rows(channels), mean, &d_hidden, size, out);
            let (size, out) = ((squeezed, channels), expand_kernel.get());
            outer_products(isa, rows(squeezed), &activated, &d_logits, size, out);
        }
    });
}

/// Sums `[images, len]` over the images.
fn sum_images(values: &[f32], sums: &mut [f32]) {
    sums.fill(0.0);
    for values in values.chunks_exact(sums.len()) {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += value;
        }
    }
}

/// The backward pass of one image.
struct ExcitationBackward<'a> {
    weights: &'a Weights<'a>,
    rows_per_image: f32,
    hidden: &'a [f32],
    gate: &'a [f32],
    d_gate: &'a [f64],
    /// `act(hidden)`.
    activated: &'a mut [f32],
    /// Gradient by `hidden`.
    d_hidden: &'a mut [f32],
    /// Gradient by what the sigmoid gets.
    d_logits: &'a mut [f32],
    dpool: &'a mut [f32],
}

#[inline(always)]
unsafe fn backward_image_body<S: Simd, A: Activation>(step: ExcitationBackward<'_>) {
    let (channels, squeezed) = (step.gate.len(), step.hidden.len());
    for ((d_logit, &gate), &d_gate) in step.d_logits.iter_mut().zip(step.gate).zip(step.d_gate) {
        *d_logit = d_gate as f32 * (gate * (1.0 - gate));
    }
    // SAFETY: the caller checks the sizes; vectors at the ends are partial.
    unsafe {
        let rows = step.weights.expand_kernel.chunks_exact(channels);
        for (row, d_hidden) in rows.zip(step.d_hidden.iter_mut()) {
            *d_hidden = dot::<S>(row, step.d_logits);
        }
        for at in (0..squeezed).step_by(S::LANES) {
            let lanes = S::LANES.min(squeezed - at);
            let (act, slope) = A::value_and_slope::<S>(S::load_partial(step.hidden.as_ptr().add(at), lanes));
            let d_hidden = step.d_hidden.as_mut_ptr().add(at);
            S::store_partial(step.activated.as_mut_ptr().add(at), act, lanes);
            S::store_partial(d_hidden, S::mul(S::load_partial(d_hidden, lanes), slope), lanes);
        }
        let rows = step.weights.reduce_kernel.chunks_exact(squeezed);
        for (row, dpool) in rows.zip(step.dpool) {
            *dpool = dot::<S>(row, step.d_hidden) / step.rows_per_image;
        }
    }
}

dispatch! {
    /// All gradients of one image.
    ///
    /// # Safety
    /// `isa` must be available and the sizes agree.
    unsafe fn backward_image[A: Activation][A](step: ExcitationBackward<'_>) = backward_image_body;
}

/// Some rows of `Σ_image left[image]ᵀ·right[image]`.
#[inline(always)]
unsafe fn outer_products_body<S: Simd>(
    rows: Range<usize>,
    left: &[f32],
    right: &[f32],
    (height, width): (usize, usize),
    out: *mut f32,
) {
    let images = left.len() / height;
    for row in rows {
        for column in (0..width).step_by(S::LANES) {
            let lanes = S::LANES.min(width - column);
            // SAFETY: inside the matrices; vectors at the ends are partial.
            unsafe {
                let mut sum = S::zero();
                for image in 0..images {
                    let right = S::load_partial(right.as_ptr().add(image * width + column), lanes);
                    sum = S::fma(S::splat(left[image * height + row]), right, sum);
                }
                S::store_partial(out.add(row * width + column), sum, lanes);
            }
        }
    }
}

dispatch! {
    /// Some rows of a sum of outer products.
    ///
    /// # Safety
    /// `isa` must be available and the sizes agree.
    unsafe fn outer_products(
        rows: Range<usize>,
        left: &[f32],
        right: &[f32],
        size: (usize, usize),
        out: *mut f32,
    ) = outer_products_body;
}

/// Σdz and Σdz·y over all images for `dz = (gate·dA + dpool/N)·act'(z)`, out of the five sums of
/// [`pointwise::backward_activated`](super::pointwise::backward_activated).
///
/// # Shapes
/// `sums`: `[images, 5, channels]`; `gate` and `dpool` (which is divided by N already): `[images, channels]`, 1 and 0 where
/// absent; `gradient_sums`: `[2, channels]`, overwritten.
///
/// # Panics
/// When sizes do not agree.
pub fn gradient_sums(sums: &[f64], gate: Option<&[f32]>, dpool: Option<&[f32]>, gradient_sums: &mut [f64]) {
    let channels = gradient_sums.len() / 2;
    let images = sums.len() / (5 * channels);
    check("sums", sums.len(), images * 5 * channels);
    for (what, values) in [("gate", gate), ("dpool", dpool)] {
        if let Some(values) = values {
            check(what, values.len(), images * channels);
        }
    }
    gradient_sums.fill(0.0);
    let (sum_dz, sum_dz_y) = gradient_sums.split_at_mut(channels);
    for (image, sums) in sums.chunks_exact(5 * channels).enumerate() {
        for c in 0..channels {
            let of_image = |values: Option<&[f32]>, default: f64| {
                values.map_or(default, |values| f64::from(values[image * channels + c]))
            };
            let (gate, dpool) = (of_image(gate, 1.0), of_image(dpool, 0.0));
            sum_dz[c] += gate * sums[channels + c] + dpool * sums[3 * channels + c];
            sum_dz_y[c] += gate * sums[2 * channels + c] + dpool * sums[4 * channels + c];
        }
    }
}

/// `gain = a·gate` and `offset = a·dpool/N` of
/// [`depthwise::OutputGradient::Activated`](super::depthwise::OutputGradient::Activated).
///
/// # Shapes
/// `a`: `[channels]`, batch norm's factor of dz; the others: `[images, channels]`; `dpool` is divided by N already.
///
/// # Panics
/// When sizes do not agree.
pub fn gain_and_offset(a: &[f32], gate: &[f32], dpool: &[f32], gain: &mut [f32], offset: &mut [f32]) {
    for (what, len) in [
        ("dpool", dpool.len()),
        ("gain", gain.len()),
        ("offset", offset.len()),
    ] {
        check(what, len, gate.len());
    }
    assert!(
        gate.len().is_multiple_of(a.len()),
        "gate holds a vector of {} values per image",
        a.len()
    );
    let terms = gate.iter().zip(dpool).zip(a.iter().cycle());
    for (((gate, dpool), a), (gain, offset)) in terms.zip(gain.iter_mut().zip(offset)) {
        *gain = a * gate;
        *offset = a * dpool;
    }
}

#[cfg(test)]
mod tests {
    use super::super::elementwise::Affine;
    use super::super::testing::{activation, assert_close, same_everywhere, values};
    use super::*;

    struct Case {
        images: usize,
        rows: usize,
        channels: usize,
        squeezed: usize,
        raw: Vec<f32>,
        scale: Vec<f32>,
        shift: Vec<f32>,
        /// reduce kernel, reduce bias, expand kernel, expand bias.
        weights: [Vec<f32>; 4],
        sums: Vec<f64>,
    }

    fn cases() -> Vec<Case> {
        let sizes = [(1, 1, 3, 1), (2, 200, 40, 10), (3, 7, 88, 5), (2, 5, 200, 50)];
        let case = |(images, rows, channels, squeezed)| Case {
            images,
            rows,
            channels,
            squeezed,
            raw: values(images * rows * channels, 1),
            scale: values(channels, 2),
            shift: values(channels, 3),
            weights: [
                values(channels * squeezed, 4),
                values(squeezed, 5),
                values(channels * squeezed, 6),
                values(channels, 7),
            ],
            sums: values(images * 5 * channels, 8)
                .into_iter()
                .map(f64::from)
                .collect(),
        };
        sizes.into_iter().map(case).collect()
    }

    impl Case {
        fn weights(&self) -> Weights<'_> {
            let [reduce_kernel, reduce_bias, expand_kernel, expand_bias] = &self.weights;
            Weights {
                reduce_kernel,
                reduce_bias,
                expand_kernel,
                expand_bias,
            }
        }

        fn reference_mean(&self) -> Vec<f64> {
            let mut mean = vec![0.0; self.images * self.channels];
            for (i, &raw) in self.raw.iter().enumerate() {
                let (row, c) = (i / self.channels, i % self.channels);
                let z = f64::from(raw) * f64::from(self.scale[c]) + f64::from(self.shift[c]);
                mean[row / self.rows * self.channels + c] += activation(Act::Swish, z).0 / self.rows as f64;
            }
            mean
        }

        /// Hidden values and gates.
        fn reference_excite(&self, weights: &[Vec<f64>; 4], mean: &[f64]) -> (Vec<f64>, Vec<f64>) {
            let [w1, b1, w2, b2] = weights;
            let (mut hidden, mut gate) = (Vec::new(), Vec::new());
            for mean in mean.chunks(self.channels) {
                let h: Vec<f64> = (0..self.squeezed)
                    .map(|j| {
                        b1[j]
                            + (0..self.channels)
                                .map(|c| mean[c] * w1[c * self.squeezed + j])
                                .sum::<f64>()
                    })
                    .collect();
                gate.extend((0..self.channels).map(|c| {
                    let z: f64 = (0..self.squeezed)
                        .map(|j| activation(Act::Swish, h[j]).0 * w2[j * self.channels + c])
                        .sum();
                    1.0 / (1.0 + (-z - b2[c]).exp())
                }));
                hidden.extend(h);
            }
            (hidden, gate)
        }

        fn weights_f64(&self) -> [Vec<f64>; 4] {
            self.weights
                .clone()
                .map(|w| w.into_iter().map(f64::from).collect())
        }

        /// Σ gate·dgate, whose slopes are the gradients.
        fn loss(&self, weights: &[Vec<f64>; 4], mean: &[f64]) -> f64 {
            let (_, gate) = self.reference_excite(weights, mean);
            let d_gate = |i: usize| self.sums[i / self.channels * 5 * self.channels + i % self.channels];
            gate.iter().enumerate().map(|(i, gate)| gate * d_gate(i)).sum()
        }
    }

    fn forward(case: &Case, executor: &Executor) -> [Vec<f32>; 3] {
        let mut mean = vec![f32::NAN; case.images * case.channels];
        let mut hidden = vec![f32::NAN; case.images * case.squeezed];
        let mut gate = vec![f32::NAN; case.images * case.channels];
        let source = Source {
            raw: &case.raw,
            affine: Some(Affine::per_group(&case.scale, &case.shift)),
            act: Act::Swish,
        };
        let args = Pool {
            images: case.images,
            rows_per_image: case.rows,
            channels: case.channels,
            source,
            mean: &mut mean,
        };
        pool(executor, args);
        let args = Excite {
            weights: case.weights(),
            act: Act::Swish,
            mean: &mean,
            hidden: &mut hidden,
            gate: &mut gate,
        };
        excite(executor, args);
        [mean, hidden, gate]
    }

    #[test]
    fn gates_match_float64_and_themselves_everywhere() {
        for case in cases() {
            let [mean, hidden, gate] = same_everywhere(|executor| forward(&case, executor));
            let expected_mean = case.reference_mean();
            let (expected_hidden, expected_gate) = case.reference_excite(&case.weights_f64(), &expected_mean);
            assert_close("mean", &mean, &expected_mean, 1e-6);
            assert_close("hidden", &hidden, &expected_hidden, 3e-6);
            assert_close("gate", &gate, &expected_gate, 3e-6);
        }
    }

    #[test]
    fn gradients_are_the_slopes_of_the_float64_reference() {
        for case in cases() {
            let (dpool, gradients) = same_everywhere(|executor| {
                let [mean, hidden, gate] = forward(&case, executor);
                let mut dpool = vec![f32::NAN; mean.len()];
                let mut gradients = case.weights.clone();
                let [reduce_kernel, reduce_bias, expand_kernel, expand_bias] = &mut gradients;
                let args = Backward {
                    weights: case.weights(),
                    act: Act::Swish,
                    rows_per_image: case.rows,
                    mean: &mean,
                    hidden: &hidden,
                    gate: &gate,
                    sums: &case.sums,
                    dpool: &mut dpool,
                    weight_gradients: WeightGradients {
                        reduce_kernel,
                        reduce_bias,
                        expand_kernel,
                        expand_bias,
                    },
                };
                backward(executor, args);
                (dpool, gradients)
            });
            let (weights, mean) = (case.weights_f64(), case.reference_mean());
            let h = 1e-5;
            for (which, gradient) in gradients.iter().enumerate() {
                // Every 37th value of a large tensor.
                for i in (0..gradient.len()).step_by(gradient.len().div_ceil(100) | 1) {
                    let slope = |h: f64| {
                        let mut moved = weights.clone();
                        moved[which][i] += h;
                        case.loss(&moved, &mean)
                    };
                    let expected = (slope(h) - slope(-h)) / (2.0 * h);
                    let error = (f64::from(gradient[i]) - expected).abs();
                    assert!(
                        error < 1e-5,
                        "tensor {which}, {i}: {} for {expected}",
                        gradient[i]
                    );
                }
            }
            for i in (0..dpool.len()).step_by(dpool.len().div_ceil(100)) {
                let slope = |h: f64| {
                    let mut moved = mean.clone();
                    moved[i] += h;
                    case.loss(&weights, &moved)
                };
                let expected = (slope(h) - slope(-h)) / (2.0 * h * case.rows as f64);
                let error = (f64::from(dpool[i]) - expected).abs();
                assert!(error < 1e-5, "dpool {i}: {} for {expected}", dpool[i]);
            }
        }
    }

    #[test]
    fn the_five_sums_give_the_sums_of_dz() {
        let sums = [1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0];
        let mut out = [0.0; 2];
        gradient_sums(&sums, Some(&[0.5, 2.0]), Some(&[1.0, 0.25]), &mut out);
        assert_eq!(
            out,
            [
                0.5 * 2.0 + 4.0 + 2.0 * 20.0 + 10.0,
                0.5 * 3.0 + 5.0 + 2.0 * 30.0 + 12.5
            ]
        );
        gradient_sums(&sums, None, None, &mut out);
        assert_eq!(out, [22.0, 33.0]);
    }
}
