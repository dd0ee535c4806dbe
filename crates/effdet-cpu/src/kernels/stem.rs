//! The first convolution: 3×3, stride 2, from RGB.

use effdet_model::network::MapSize;

use super::Executor;
use super::pointwise::ChannelVectors;

/// The normalisation that the backbone applies to its input, `(x − mean)/stddev` per colour.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalize {
    /// RGB.
    pub mean: [f32; 3],
    /// RGB.
    pub stddev: [f32; 3],
}

/// The image side of the convolution.
///
/// # Shapes
/// `pixels`: `[images, height, width, 3]`.
#[derive(Debug, Clone, Copy)]
pub struct StemInput<'a> {
    /// The pixels as the loader hands them over; SAME padding is 0 after `normalize`.
    pub pixels: &'a [f32],
    /// Number of images.
    pub images: usize,
    /// Height and width of an image.
    pub map: MapSize,
    /// What the backbone does to the pixels first.
    pub normalize: Option<Normalize>,
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// The images.
    pub input: StemInput<'a>,
    /// Number of output channels.
    pub channels: usize,
    /// `[3, 3, 3, channels]`.
    pub weights: &'a [f32],
    /// Overwritten with the convolution: `[images, ⌈height/2⌉, ⌈width/2⌉, channels]`.
    pub y: &'a mut [f32],
    /// Overwritten with Σy and Σy² over all rows: `[2, channels]`.
    pub sums: Option<&'a mut [f64]>,
    /// Whether to write `y` past the caches. Ignored where rows are not aligned.
    pub streaming: bool,
}

/// Computes the stem's convolution.
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

/// Arguments of [`backward_weights`].
#[derive(Debug)]
pub struct BackwardWeights<'a> {
    /// The images.
    pub input: StemInput<'a>,
    /// Number of output channels.
    pub channels: usize,
    /// Gradient by batch norm's output, `[output rows, channels]`.
    pub dz: &'a [f32],
    /// Output of the convolution, `[output rows, channels]`.
    pub y: &'a [f32],
    /// Factor of `dz` in dY = a·dz + b·y + c.
    pub a: ChannelVectors<'a>,
    /// Factor of `y`.
    pub b: ChannelVectors<'a>,
    /// Constant.
    pub c: ChannelVectors<'a>,
    /// Overwritten with the gradient by the weights: `[3, 3, 3, channels]`.
    pub dw: &'a mut [f32],
}

/// Computes the weight gradient of the stem; images need none.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn backward_weights(executor: &Executor, args: BackwardWeights<'_>) {
    let _ = (executor, args);
    todo!()
}
