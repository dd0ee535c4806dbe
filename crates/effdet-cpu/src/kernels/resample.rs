//! Resampling of feature maps in the pyramid: nearest-neighbour upsampling and max-pooling, and their way back.

use effdet_model::hparams::UpsampleRule;
use effdet_model::network::{MapSize, ResizeKind};

use super::Executor;
use super::elementwise::Affine;

/// How cells of one map size come from cells of another.
#[derive(Debug, Clone)]
pub struct Resampler {
    input: MapSize,
    output: MapSize,
}

impl Resampler {
    /// The resampler from `input` to `output`.
    ///
    /// Max-pooling has kernel = stride + 1 per axis and SAME padding that never wins; of equal values the first in
    /// row-major order is the maximum. Upsampling takes cell `⌊(i + ½)·in/out⌋` or, by the legacy rule, `⌊i·in/out⌋`.
    ///
    /// # Panics
    /// When a map is empty, the sizes of [`ResizeKind::Same`] differ, or a max-pool's strides do not lead to `output`.
    pub fn new(input: MapSize, output: MapSize, kind: ResizeKind, rule: UpsampleRule) -> Self {
        let _ = (kind, rule);
        Self { input, output }
    }

    /// Input map.
    pub fn input(&self) -> MapSize {
        self.input
    }

    /// Output map.
    pub fn output(&self) -> MapSize {
        self.output
    }

    /// Whether the forward pass records which input was the maximum.
    pub fn needs_argmax(&self) -> bool {
        todo!()
    }
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// Number of images.
    pub images: usize,
    /// Number of channels.
    pub channels: usize,
    /// Maps.
    pub resampler: &'a Resampler,
    /// What is stored of the input: `[images, input height, input width, channels]`.
    pub raw: &'a [f32],
    /// Batch norm on the input, one group.
    pub affine: Option<Affine<'a>>,
    /// Overwritten with the place of each maximum in its window, counted from 0 in row-major order, for the backward pass of
    /// a max-pool: `[images, output height, output width, channels]`.
    pub argmax: Option<&'a mut [f32]>,
    /// Overwritten: `[images, output height, output width, channels]`.
    pub out: &'a mut [f32],
}

/// Resamples `scale·raw + shift`.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
pub fn forward(executor: &Executor, args: Forward<'_>) {
    let _ = (executor, args);
    todo!()
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// Number of images.
    pub images: usize,
    /// Number of channels.
    pub channels: usize,
    /// Maps.
    pub resampler: &'a Resampler,
    /// Of the forward pass; a max-pool needs it.
    pub argmax: Option<&'a [f32]>,
    /// Gradient by the output.
    pub dout: &'a [f32],
    /// Overwritten with the gradient by the resampled tensor, `scale·raw + shift`.
    pub dx: &'a mut [f32],
    /// Whether it is added to what `dx` holds instead.
    pub accumulate: bool,
}

/// The backward pass of [`forward`].
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// Every input cell gathers from its output cells in row-major order: the same bits for any number of threads.
pub fn backward(executor: &Executor, args: Backward<'_>) {
    let _ = (executor, args);
    todo!()
}
