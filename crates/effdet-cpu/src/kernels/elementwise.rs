//! Elementwise passes and per-channel sums, for the places where no convolution has them as a prologue or epilogue.

use super::Executor;
use super::pointwise::{ChannelVectors, RowPlan, VectorIndex, check};
use crate::math::Act;

/// An affine map per channel, `scale·raw + shift`: batch norm as its consumers apply it.
///
/// Vectors by group select the batch-norm group of a row (the level in the heads, 0 elsewhere).
#[derive(Debug, Clone, Copy)]
pub struct Affine<'a> {
    /// Batch norm's γ/σ.
    pub scale: ChannelVectors<'a>,
    /// Batch norm's β − μγ/σ.
    pub shift: ChannelVectors<'a>,
}

impl<'a> Affine<'a> {
    /// One pair of vectors per group: `[groups, channels]` each, a plain `[channels]` where there is one group.
    pub fn per_group(scale: &'a [f32], shift: &'a [f32]) -> Self {
        Self {
            scale: ChannelVectors::per_group(scale),
            shift: ChannelVectors::per_group(shift),
        }
    }

    /// One pair of vectors per image: `[images, channels]` each.
    pub fn per_image(scale: &'a [f32], shift: &'a [f32]) -> Self {
        Self {
            scale: ChannelVectors::per_image(scale),
            shift: ChannelVectors::per_image(shift),
        }
    }
}

/// Channel vectors, or a constant where there are none.
#[derive(Debug)]
pub(super) enum Vectors<'a> {
    Given(ChannelVectors<'a>),
    Constant(Vec<f32>),
}

impl<'a> Vectors<'a> {
    /// # Panics
    /// When the vectors are not `channels` long for each of `groups` or `images`.
    #[track_caller]
    pub(super) fn new(
        what: &str,
        vectors: Option<ChannelVectors<'a>>,
        default: f32,
        (groups, images, channels): (usize, usize, usize),
    ) -> Self {
        match vectors {
            Some(vectors) => {
                let count = match vectors.index {
                    VectorIndex::Group => groups,
                    VectorIndex::Image => images,
                };
                check(what, vectors.values.len(), count * channels);
                Self::Given(vectors)
            }
            None => Self::Constant(vec![default; channels]),
        }
    }

    /// The vector of a group and image, from `channel` on.
    pub(super) fn at(&self, group: usize, image: usize, channels: usize, channel: usize) -> *const f32 {
        match self {
            Self::Given(vectors) => {
                let index = match vectors.index {
                    VectorIndex::Group => group,
                    VectorIndex::Image => image,
                };
                vectors.values[index * channels + channel..].as_ptr()
            }
            Self::Constant(values) => values[channel..].as_ptr(),
        }
    }
}

/// The vectors of an affine map, which may be the identity.
#[derive(Debug)]
pub(super) struct AffineVectors<'a> {
    pub scale: Vectors<'a>,
    pub shift: Vectors<'a>,
}

impl<'a> AffineVectors<'a> {
    /// # Panics
    /// As [`Vectors::new`].
    #[track_caller]
    pub(super) fn new(affine: Option<Affine<'a>>, counts: (usize, usize, usize)) -> Self {
        Self {
            scale: Vectors::new("scale", affine.map(|affine| affine.scale), 1.0, counts),
            shift: Vectors::new("shift", affine.map(|affine| affine.shift), 0.0, counts),
        }
    }
}

/// The tensor `act(scale·raw + shift)`, of which only `raw` is stored.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// What is stored: `[rows, channels]`.
    pub raw: &'a [f32],
    /// The affine map, none for the identity.
    pub affine: Option<Affine<'a>>,
    /// The activation.
    pub act: Act,
}

impl<'a> Source<'a> {
    /// A tensor that is stored as it is.
    pub fn plain(x: &'a [f32]) -> Self {
        Self {
            raw: x,
            affine: None,
            act: Act::Identity,
        }
    }
}

/// Arguments of [`activate`].
#[derive(Debug)]
pub struct Activate<'a> {
    /// The rows of all tensors.
    pub rows: &'a RowPlan,
    /// Number of channels.
    pub channels: usize,
    /// What is activated.
    pub source: Source<'a>,
    /// Factor of each image, `[images]`: stochastic depth. 1 where absent.
    pub gain: Option<&'a [f32]>,
    /// What is added, `[rows, channels]`.
    pub residual: Option<&'a [f32]>,
    /// Overwritten with `gain·act(scale·raw + shift) + residual`: `[rows, channels]`.
    pub out: &'a mut [f32],
}

/// Forms a tensor that must be stored.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
pub fn activate(executor: &Executor, args: Activate<'_>) {
    let _ = (executor, args);
    todo!()
}

/// Arguments of [`activate_backward`].
#[derive(Debug)]
pub struct ActivateBackward<'a> {
    /// The rows of all tensors.
    pub rows: &'a RowPlan,
    /// Number of channels.
    pub channels: usize,
    /// What was activated.
    pub source: Source<'a>,
    /// Factor of each image, `[images]`.
    pub gain: Option<&'a [f32]>,
    /// Gradient by the output of [`activate`]: `[rows, channels]`.
    pub dout: &'a [f32],
    /// Overwritten with the gradient by z = scale·raw + shift, `gain·dout·act'(z)`: `[rows, channels]`.
    pub dz: &'a mut [f32],
    /// Overwritten with Σdz and Σdz·raw over the rows of each group: `[groups, 2, channels]`.
    pub sums: Option<&'a mut [f64]>,
}

/// The backward pass of [`activate`]; the gradient by its residual is `dout` itself.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
pub fn activate_backward(executor: &Executor, args: ActivateBackward<'_>) {
    let _ = (executor, args);
    todo!()
}

/// Arguments of [`gradient_sums`].
#[derive(Debug)]
pub struct GradientSums<'a> {
    /// The rows of both tensors.
    pub rows: &'a RowPlan,
    /// Number of channels.
    pub channels: usize,
    /// Gradient by batch norm's output: `[rows, channels]`.
    pub dz: &'a [f32],
    /// Batch norm's input: `[rows, channels]`.
    pub y: &'a [f32],
    /// Overwritten with Σdz and Σdz·y over the rows of each group: `[groups, 2, channels]`.
    pub sums: &'a mut [f64],
}

/// What batch norm's backward pass needs, for a gradient that is put together by several kernels.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
pub fn gradient_sums(executor: &Executor, args: GradientSums<'_>) {
    let _ = (executor, args);
    todo!()
}
