//! The operations of the network, each as a pair of forward and backward.
//!
//! Every function is pure. In a backward function `dy` is the gradient of a scalar by the output `y`, and the results are the
//! gradients of the same scalar by the inputs. Composites need no functions of their own: a separable convolution is
//! [`depthwise`] then [`conv2d`] of size 1, squeeze-and-excite is [`spatial_mean`], two [`conv2d`] and [`gate`], a residual
//! is [`add`].
//!
//! # Determinism
//! Single-threaded, every sum in program order. Sums over images and cells run in f64 for either number type, except the
//! gradients of convolution kernels.

mod activation;
mod batch_norm;
mod conv;
mod elementwise;
mod fusion;
#[cfg(test)]
pub(super) mod gradient_check;
mod resample;

pub use activation::{activate, activate_backward};
pub use batch_norm::{
    Moments, batch_norm, batch_norm_infer_backward, batch_norm_train_backward, moments, updated_moving,
};
pub use conv::{bias_backward, conv2d, conv2d_backward, depthwise, depthwise_backward};
pub use elementwise::{add, drop_connect, gate, gate_backward, spatial_mean, spatial_mean_backward};
pub use fusion::{Fusion, fuse, fuse_backward};
pub use resample::{max_pool, max_pool_backward, nearest, nearest_backward, nearest_source};

use effdet_model::network::{MapSize, same_padding};

/// One axis of a sliding window with SAME padding.
#[derive(Debug, Clone, Copy)]
struct Axis {
    input: usize,
    output: usize,
    size: usize,
    stride: usize,
    before: usize,
}

impl Axis {
    fn same(input: usize, size: usize, stride: usize) -> Self {
        let (output, before) = same_padding(input, size, stride);
        Self {
            input,
            output,
            size,
            stride,
            before,
        }
    }

    /// Taps of the window at output position `at` that lie inside the input, with their input positions.
    fn taps(self, at: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..self.size).filter_map(move |tap| {
            let position = (at * self.stride + tap).checked_sub(self.before)?;
            (position < self.input).then_some((tap, position))
        })
    }
}

/// A sliding window over a map with SAME padding.
#[derive(Debug, Clone, Copy)]
struct Window {
    rows: Axis,
    columns: Axis,
}

impl Window {
    fn same(map: MapSize, (size_y, size_x): (usize, usize), (stride_y, stride_x): (usize, usize)) -> Self {
        Self {
            rows: Axis::same(map.height, size_y, stride_y),
            columns: Axis::same(map.width, size_x, stride_x),
        }
    }

    fn square(map: MapSize, size: usize, stride: usize) -> Self {
        Self::same(map, (size, size), (stride, stride))
    }

    fn output(self) -> MapSize {
        MapSize {
            height: self.rows.output,
            width: self.columns.output,
        }
    }

    /// Calls `visit(output cell, tap, input cell)` for every pair that the window connects: output cells row by row, and
    /// within each its taps row by row.
    fn for_each_tap(self, mut visit: impl FnMut(usize, usize, usize)) {
        for y in 0..self.rows.output {
            for x in 0..self.columns.output {
                let output = y * self.columns.output + x;
                for (tap_y, from_y) in self.rows.taps(y) {
                    for (tap_x, from_x) in self.columns.taps(x) {
                        visit(
                            output,
                            tap_y * self.columns.size + tap_x,
                            from_y * self.columns.input + from_x,
                        );
                    }
                }
            }
        }
    }
}
