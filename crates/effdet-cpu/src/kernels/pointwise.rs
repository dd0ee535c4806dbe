//! Pointwise (1×1) convolutions: products of an NHWC tensor, seen as rows × channels, with a small weight matrix, fused with
//! what surrounds them in the network.
//!
//! Forward, `y = A·W (+ bias)`. A is formed block by block from what is stored ([`Input`]): a tensor as it is, the
//! activation of a raw convolution output with its batch norm and squeeze-and-excitation gate, or a normalised tensor plus
//! residual, which is written out on the way. The batch-norm statistics of `y` come out of the same pass.
//!
//! Backward, `dX = dY·Wᵀ` and `dW = Aᵀ·dY`. dY is formed block by block from what is stored ([`OutputGradient`]) and feeds
//! both products; what the layer below needs is summed in the same pass ([`InputGradient`], [`BackwardActivated`]).

use super::Executor;
use crate::arena::AlignedBuf;
use crate::math::Act;

/// Consecutive rows of one image and one batch-norm group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Number of rows (pixels).
    pub rows: usize,
    /// Index of the image.
    pub image: usize,
    /// Index of the group that batch norm takes its statistics over: 0 in the backbone, the level in the heads. Segments of
    /// a group are consecutive and groups ascend.
    pub group: usize,
}

/// How the rows of a tensor are cut into blocks and tasks; a function of the shapes alone.
#[derive(Debug, Clone)]
pub struct RowPlan {
    rows: usize,
}

impl RowPlan {
    /// The plan for rows laid out as `segments`, one after the other.
    ///
    /// # Panics
    /// When groups do not ascend from 0 without gaps.
    pub fn new(segments: &[Segment]) -> Self {
        Self {
            rows: segments.iter().map(|s| s.rows).sum(),
        }
    }

    /// The plan for `[images, rows_per_image, channels]`, all in group 0.
    pub fn images(images: usize, rows_per_image: usize) -> Self {
        let segment = |image| Segment {
            rows: rows_per_image,
            image,
            group: 0,
        };
        Self::new(&(0..images).map(segment).collect::<Vec<_>>())
    }

    /// The plan for tensors of several levels one after the other, each `[images, rows_per_level[level], channels]`; a group
    /// per level.
    pub fn levels(images: usize, rows_per_level: &[usize]) -> Self {
        let level = |(group, &rows)| (0..images).map(move |image| Segment { rows, image, group });
        Self::new(
            &rows_per_level
                .iter()
                .enumerate()
                .flat_map(level)
                .collect::<Vec<_>>(),
        )
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of images: one more than the largest index.
    pub fn image_count(&self) -> usize {
        todo!()
    }

    /// Number of groups.
    pub fn group_count(&self) -> usize {
        todo!()
    }
}

/// The weights of a pointwise convolution in the layouts the kernels read.
#[derive(Debug, Clone)]
pub struct PackedWeights {
    inputs: usize,
    outputs: usize,
    forward: AlignedBuf,
    backward: AlignedBuf,
}

impl PackedWeights {
    /// Zero weights from `inputs` to `outputs` channels.
    pub fn new(inputs: usize, outputs: usize) -> Self {
        Self {
            inputs,
            outputs,
            forward: AlignedBuf::default(),
            backward: AlignedBuf::default(),
        }
    }

    /// Number of input channels.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Number of output channels.
    pub fn outputs(&self) -> usize {
        self.outputs
    }
}

/// What [`pack`] is to prepare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// What [`forward`] reads.
    Forward,
    /// What [`forward`] and the backward functions read.
    ForwardAndBackward,
}

/// Packs the weights of many layers, in parallel.
///
/// # Shapes
/// Each source: `[inputs, outputs]`, row-major, which is TensorFlow's `[1, 1, inputs, outputs]`.
///
/// # Panics
/// When a source has another size.
pub fn pack(executor: &Executor, packing: Packing, layers: &mut [(&mut PackedWeights, &[f32])]) {
    let _ = (executor, packing, layers);
    todo!()
}

/// Vectors over channels, one per group or one per image.
///
/// # Shapes
/// `values`: `[groups or images, channels]`.
#[derive(Debug, Clone, Copy)]
pub struct ChannelVectors<'a> {
    /// The vectors.
    pub values: &'a [f32],
    /// What selects a row's vector.
    pub index: VectorIndex,
}

/// What selects the channel vector that applies to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VectorIndex {
    /// The row's batch-norm group.
    Group,
    /// The row's image.
    Image,
}

impl<'a> ChannelVectors<'a> {
    /// One vector per group; a plain `[channels]` in the backbone.
    pub fn per_group(values: &'a [f32]) -> Self {
        Self {
            values,
            index: VectorIndex::Group,
        }
    }

    /// One vector per image.
    pub fn per_image(values: &'a [f32]) -> Self {
        Self {
            values,
            index: VectorIndex::Image,
        }
    }
}

/// The tensor `gate·act(scale·raw + shift)`, of which only `raw` is stored.
#[derive(Debug, Clone, Copy)]
pub struct Activated<'a> {
    /// Output of the convolution below, before its batch norm: `[rows, channels]`.
    pub raw: &'a [f32],
    /// Batch norm's γ/σ.
    pub scale: ChannelVectors<'a>,
    /// Batch norm's β − μγ/σ.
    pub shift: ChannelVectors<'a>,
    /// The activation.
    pub act: Act,
    /// Gate of squeeze-and-excitation, `[images, channels]`; 1 where absent.
    pub gate: Option<&'a [f32]>,
}

/// The left operand of [`forward`], rows × input channels.
#[derive(Debug)]
pub enum Input<'a> {
    /// Stored as it is.
    Plain(&'a [f32]),
    /// Formed on the way, not stored.
    Activated(Activated<'a>),
    /// `x = scale·raw + shift (+ residual)`, formed and written to `x`. Stochastic depth goes into per-image vectors.
    Normalized {
        /// Output of the convolution below, before its batch norm: `[rows, channels]`.
        raw: &'a [f32],
        /// Batch norm's γ/σ.
        scale: ChannelVectors<'a>,
        /// Batch norm's β − μγ/σ.
        shift: ChannelVectors<'a>,
        /// What is added, `[rows, channels]`.
        residual: Option<&'a [f32]>,
        /// Overwritten with the sum, `[rows, channels]`.
        x: &'a mut [f32],
    },
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// The rows of all tensors.
    pub rows: &'a RowPlan,
    /// The weights.
    pub weights: &'a PackedWeights,
    /// The left operand.
    pub input: Input<'a>,
    /// `[outputs]`, added to every row.
    pub bias: Option<&'a [f32]>,
    /// Overwritten with the product: `[rows, stride]`.
    pub y: &'a mut [f32],
    /// Values from one row of `y` to the next, at least the number of output channels; the columns past these become 0.
    pub stride: usize,
    /// Overwritten with Σy and Σy² over the rows of each group: `[groups, 2, outputs]`.
    pub sums: Option<&'a mut [f64]>,
    /// Whether to write `y` past the caches, which pays where `y` is larger than they are. Ignored where rows are not aligned.
    pub streaming: bool,
}

/// Computes a pointwise convolution.
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
/// Tensors are `[rows, stride]`, of which the first `outputs` columns count.
#[derive(Debug, Clone, Copy)]
pub enum OutputGradient<'a> {
    /// Stored as it is.
    Plain {
        /// dY.
        dy: &'a [f32],
        /// Values from one row to the next.
        stride: usize,
    },
    /// Batch norm's backward pass: `dY = a·dz + b·y + c`, formed on the way.
    ///
    /// With σ⁻¹ = 1/√(var + ε), m₁ = mean dz and m₂ = mean dz·ŷ: a = γσ⁻¹, b = −a·σ⁻¹·m₂, c = −a·(m₁ − μσ⁻¹·m₂). Stochastic
    /// depth goes into per-image vectors.
    Normalized {
        /// Gradient by batch norm's output.
        dz: &'a [f32],
        /// Output of this convolution, batch norm's input.
        y: &'a [f32],
        /// Factor of `dz`.
        a: ChannelVectors<'a>,
        /// Factor of `y`.
        b: ChannelVectors<'a>,
        /// Constant.
        c: ChannelVectors<'a>,
        /// Values from one row of `dz` and `y` to the next.
        stride: usize,
    },
}

/// Where the gradients of weights and bias go.
#[derive(Debug)]
pub struct WeightGradient<'a> {
    /// `[inputs, outputs]`.
    pub dw: &'a mut [f32],
    /// Σ dY over all rows, `[outputs]`.
    pub db: Option<&'a mut [f32]>,
    /// Whether to add to what is there instead of overwriting it.
    pub accumulate: bool,
}

/// Where the gradient by a stored input goes.
#[derive(Debug)]
pub struct InputGradient<'a> {
    /// `[rows, inputs]`, overwritten with dY·Wᵀ + what is asked for below.
    pub dx: &'a mut [f32],
    /// Whether what `dx` holds is added.
    pub accumulate: bool,
    /// Further gradients to add, each `[rows, inputs]`: of the residual branch, of a feature that leaves the backbone.
    pub addends: [Option<&'a [f32]>; 2],
    /// What batch norm's backward pass of the layer below needs.
    pub sums: Option<GradientSums<'a>>,
}

/// Sums of the finished dx.
#[derive(Debug)]
pub struct GradientSums<'a> {
    /// Output of the convolution below, before its batch norm: `[rows, inputs]`.
    pub y: &'a [f32],
    /// Overwritten with Σdx and Σdx·y over the rows of each group: `[groups, 2, inputs]`.
    pub sums: &'a mut [f64],
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// The rows of all tensors.
    pub rows: &'a RowPlan,
    /// The weights, packed with [`Packing::ForwardAndBackward`] where `input_gradient` is asked for.
    pub weights: &'a PackedWeights,
    /// dY.
    pub output_gradient: OutputGradient<'a>,
    /// The left operand of the forward pass: `[rows, inputs]`.
    pub x: &'a [f32],
    /// Where dX goes, if it is needed.
    pub input_gradient: Option<InputGradient<'a>>,
    /// Where dW goes.
    pub weight_gradient: WeightGradient<'a>,
}

/// Computes the gradients of a pointwise convolution whose input was stored ([`Input::Plain`], [`Input::Normalized`]).
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

/// Arguments of [`backward_activated`].
#[derive(Debug)]
pub struct BackwardActivated<'a> {
    /// The rows of all tensors.
    pub rows: &'a RowPlan,
    /// The weights, packed with [`Packing::ForwardAndBackward`].
    pub weights: &'a PackedWeights,
    /// dY.
    pub output_gradient: OutputGradient<'a>,
    /// The left operand of the forward pass, formed again from what is stored.
    pub input: Activated<'a>,
    /// Overwritten with dA = dY·Wᵀ, the gradient by the gated activation: `[rows, inputs]`.
    pub da: &'a mut [f32],
    /// Overwritten with five sums over the rows of each image, `[images, 5, inputs]`:
    /// Σ dA·act, Σ dA·s', Σ dA·s'·raw, Σ s', Σ s'·raw, where act and s' are the activation and its slope at
    /// z = scale·raw + shift.
    ///
    /// They are all that squeeze-and-excitation and the batch norm below need. The first is the gradient by the gate. With
    /// the gradient `dpool` that comes back through the pooling of N rows, dz = (gate·dA + dpool/N)·s', hence
    /// Σdz = gate·S₂ + dpool/N·S₄ and Σdz·raw = gate·S₃ + dpool/N·S₅.
    pub sums: &'a mut [f64],
    /// Whether to write `da` past the caches.
    pub streaming: bool,
    /// Where dW goes.
    pub weight_gradient: WeightGradient<'a>,
}

/// Computes the gradients of a pointwise convolution whose input was [`Input::Activated`].
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn backward_activated(executor: &Executor, args: BackwardActivated<'_>) {
    let _ = (executor, args);
    todo!()
}
