//! Squeeze-and-excitation: `gate = σ(W₂·act(W₁·mean(x) + b₁) + b₂)`, a factor per image and channel.

use super::Executor;
use super::elementwise::Source;
use crate::math::Act;

/// Arguments of [`pool`].
#[derive(Debug)]
pub struct Pool<'a> {
    /// Number of images.
    pub images: usize,
    /// Rows (pixels) of an image.
    pub rows_per_image: usize,
    /// Number of channels.
    pub channels: usize,
    /// What is averaged, one group.
    pub source: Source<'a>,
    /// Overwritten with the mean over the rows of each image: `[images, channels]`.
    pub mean: &'a mut [f32],
}

/// Averages each channel over the pixels of an image.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn pool(executor: &Executor, args: Pool<'_>) {
    let _ = (executor, args);
    todo!()
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
    let _ = (executor, args);
    todo!()
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
    let _ = (executor, args);
    todo!()
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
    let _ = (sums, gate, dpool, gradient_sums);
    todo!()
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
    let _ = (a, gate, dpool, gain, offset);
    todo!()
}
