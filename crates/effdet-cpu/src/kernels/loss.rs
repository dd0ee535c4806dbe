//! The detection losses over padded logit rows, which become their own gradients in place.

use super::Executor;

/// Where the anchors of a head's output are.
///
/// Logits are `[level][image][cell][stride]`, of which the first `anchors_per_cell·K` columns count (K values per anchor);
/// targets are `[image][level][cell][anchor]`.
#[derive(Debug, Clone, Copy)]
pub struct HeadRows<'a> {
    /// Number of images.
    pub images: usize,
    /// Cells of each level.
    pub cells_per_level: &'a [usize],
    /// Anchors of a cell.
    pub anchors_per_cell: usize,
    /// Values from one row of logits to the next.
    pub stride: usize,
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
    let _ = (executor, args);
    todo!()
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
    let _ = (executor, args);
    todo!()
}
