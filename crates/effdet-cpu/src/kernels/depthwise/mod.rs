//! Depthwise convolutions over NHWC tensors, fused with the batch norms and activations around them.
//!
//! Forward, `y = conv(act(scale·raw + shift))` and the batch-norm statistics of `y`. Backward, one pass over the input rows
//! makes the input gradient, the weight gradient and the sums for the batch norm below.

use effdet_model::network::MapSize;

use super::Executor;
use super::elementwise::{Affine, Source};
use super::pointwise::ChannelVectors;
use crate::math::Act;

/// The shapes of a depthwise convolution and how its work is cut into tasks; a function of the shapes alone.
///
/// Tensors hold one map after the other as `[map][image][height][width][channels]`; the maps are batch-norm groups (levels
/// in the heads, a single one elsewhere) that share the weights.
#[derive(Debug, Clone)]
pub struct DepthwisePlan {
    input_rows: usize,
    output_rows: usize,
}

impl DepthwisePlan {
    /// The plan for `images` images with one map per group.
    ///
    /// # Panics
    /// When `kernel_size` is not 3 or 5, `stride` not 1 or 2, or a count is 0.
    pub fn new(images: usize, maps: &[MapSize], channels: usize, kernel_size: usize, stride: usize) -> Self {
        let _ = (images, maps, channels, kernel_size, stride);
        todo!()
    }

    /// Rows (pixels) of the input tensor over all maps and images.
    pub fn input_rows(&self) -> usize {
        self.input_rows
    }

    /// Rows (pixels) of the output tensor over all maps and images.
    pub fn output_rows(&self) -> usize {
        self.output_rows
    }
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// Shapes.
    pub plan: &'a DepthwisePlan,
    /// The input: `[input rows, channels]`. Padding is 0 after the activation.
    pub input: Source<'a>,
    /// `[k, k, channels, 1]`.
    pub weights: &'a [f32],
    /// Overwritten with the convolution: `[output rows, channels]`.
    pub y: &'a mut [f32],
    /// Overwritten with Σy and Σy² over the rows of each group: `[groups, 2, channels]`.
    pub sums: Option<&'a mut [f64]>,
    /// Whether to write `y` past the caches, which pays where `y` is larger than they are. Ignored where rows are not aligned.
    pub streaming: bool,
}

/// Computes a depthwise convolution.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn forward(executor: &Executor, args: Forward<'_>) {
    let _ = (executor, args);
    todo!()
}

/// The gradient of the loss by the output of the convolution, dY.
///
/// # Shapes
/// Tensors are `[output rows, channels]`.
#[derive(Debug, Clone, Copy)]
pub enum OutputGradient<'a> {
    /// Stored as it is.
    Plain(&'a [f32]),
    /// The way back through activation, squeeze-and-excitation and batch norm, formed on the way:
    /// `dY = act'(scale·y + shift)·(gain·da + offset) + b·y + c`.
    ///
    /// With batch norm's a, b and c: gain = a·gate and offset = a·dpool/N, which
    /// [`se::gain_and_offset`](super::se::gain_and_offset) makes.
    Activated {
        /// Gradient by the gated activation.
        da: &'a [f32],
        /// Output of this convolution, batch norm's input.
        y: &'a [f32],
        /// Batch norm.
        affine: Affine<'a>,
        /// The activation.
        act: Act,
        /// Factor of `da`.
        gain: ChannelVectors<'a>,
        /// Added to `gain·da`, 0 where absent.
        offset: Option<ChannelVectors<'a>>,
        /// Factor of `y`.
        b: ChannelVectors<'a>,
        /// Constant.
        c: ChannelVectors<'a>,
    },
}

/// Where the gradient by the input goes.
#[derive(Debug)]
pub struct InputGradient<'a> {
    /// Overwritten with the gradient by z = scale·raw + shift, `[input rows, channels]`.
    pub dz: &'a mut [f32],
    /// Whether it is added to what `dz` holds instead.
    pub accumulate: bool,
    /// Overwritten with Σdz and Σdz·raw over the rows of each group: `[groups, 2, channels]`.
    pub sums: Option<&'a mut [f64]>,
    /// Whether to write `dz` past the caches. Ignored where rows are not aligned.
    pub streaming: bool,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// Shapes.
    pub plan: &'a DepthwisePlan,
    /// The input of the forward pass.
    pub input: Source<'a>,
    /// `[k, k, channels, 1]`.
    pub weights: &'a [f32],
    /// dY.
    pub output_gradient: OutputGradient<'a>,
    /// Where the gradient by the input goes.
    pub input_gradient: InputGradient<'a>,
    /// Overwritten with the gradient by the weights: `[k, k, channels, 1]`.
    pub dw: &'a mut [f32],
}

/// Computes both gradients of a depthwise convolution.
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
