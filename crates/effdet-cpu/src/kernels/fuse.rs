//! BiFPN's weighted fusion of two or three resampled features in one pass.

use effdet_model::hparams::FusionMethod;

use super::Executor;
use super::elementwise::Affine;
use super::resample::Resampler;

/// The weights of a fusion, ready for use: input `i` counts `x·w_i/total`.
#[derive(Debug, Clone)]
pub struct FusionWeights {
    method: FusionMethod,
}

impl FusionWeights {
    /// Prepares the trainable weights of one node.
    ///
    /// # Shapes
    /// `variables`: one slice per input, a single value or `channels` values as `method` asks; ignored for
    /// [`FusionMethod::Sum`].
    ///
    /// # Panics
    /// When a slice has another size.
    pub fn new(
        method: FusionMethod,
        relu: bool,
        inputs: usize,
        channels: usize,
        variables: &[&[f32]],
    ) -> Self {
        let _ = (relu, inputs, channels, variables);
        Self { method }
    }

    /// Turns Σ df·x of every input and channel into the gradients by the variables.
    ///
    /// # Shapes
    /// `dots`: `[inputs, channels]`, of [`backward`]; `gradients`: shaped as the variables, overwritten; none for
    /// [`FusionMethod::Sum`].
    ///
    /// # Panics
    /// When sizes do not agree.
    pub fn gradients(&self, dots: &[f64], gradients: &mut [&mut [f32]]) {
        let _ = (self.method, dots, gradients);
        todo!()
    }
}

/// One input of [`forward`].
#[derive(Debug)]
pub struct FuseInput<'a> {
    /// What is stored of the feature: `[images, input height, input width, channels]`.
    pub raw: &'a [f32],
    /// Batch norm on it, one group.
    pub affine: Option<Affine<'a>>,
    /// To the node's map.
    pub resampler: &'a Resampler,
    /// As in [`resample::Forward`](super::resample::Forward).
    pub argmax: Option<&'a mut [f32]>,
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// Number of images.
    pub images: usize,
    /// Number of channels.
    pub channels: usize,
    /// Weights.
    pub weights: &'a FusionWeights,
    /// Features in order.
    pub inputs: &'a mut [FuseInput<'a>],
    /// Overwritten with `Σ_i R_i(scale_i·raw_i + shift_i)·w_i/total`, added in order: `[images, height, width, channels]`.
    pub out: &'a mut [f32],
}

/// Fuses features.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
pub fn forward(executor: &Executor, args: Forward<'_>) {
    let _ = (executor, args);
    todo!()
}

/// One input of [`backward`].
#[derive(Debug)]
pub struct FuseGradient<'a> {
    /// As in the forward pass.
    pub raw: &'a [f32],
    /// As in the forward pass.
    pub affine: Option<Affine<'a>>,
    /// As in the forward pass.
    pub resampler: &'a Resampler,
    /// Of the forward pass.
    pub argmax: Option<&'a [f32]>,
    /// Overwritten with the gradient by the feature, `w_i/total · R_iᵀ·df`: shaped as `raw`.
    pub dx: &'a mut [f32],
    /// Whether it is added to what `dx` holds instead.
    pub accumulate: bool,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// Number of images.
    pub images: usize,
    /// Number of channels.
    pub channels: usize,
    /// Weights.
    pub weights: &'a FusionWeights,
    /// Gradient by the fused feature: `[images, height, width, channels]`.
    pub df: &'a [f32],
    /// Features in order.
    pub inputs: &'a mut [FuseGradient<'a>],
    /// Overwritten with Σ df·x over all cells, x the resampled feature, for [`FusionWeights::gradients`]:
    /// `[inputs, channels]`.
    pub dots: Option<&'a mut [f64]>,
}

/// The backward pass of [`forward`].
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
