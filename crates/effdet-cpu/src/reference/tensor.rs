//! A batch of feature maps.

use effdet_model::network::MapSize;

use super::Float;

/// A batch of feature maps, NHWC.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor<F> {
    /// Images.
    pub batch: usize,
    /// Rows and columns.
    pub map: MapSize,
    /// Channels.
    pub channels: usize,
    /// `[batch, map.height, map.width, channels]`.
    pub data: Vec<F>,
}

impl<F: Float> Tensor<F> {
    /// All zeros.
    pub fn zeros(batch: usize, map: MapSize, channels: usize) -> Self {
        Self {
            batch,
            map,
            channels,
            data: vec![F::ZERO; batch * map.cells() * channels],
        }
    }

    /// All zeros, of the size of `self`.
    pub fn zeros_like(&self) -> Self {
        Self::zeros(self.batch, self.map, self.channels)
    }

    /// `f` of every value.
    pub fn map_values(&self, f: impl Fn(F) -> F) -> Self {
        Self {
            data: self.data.iter().map(|&x| f(x)).collect(),
            ..*self
        }
    }

    /// `f` of every pair of values; both tensors have the same shape.
    pub fn zip_values(&self, other: &Self, f: impl Fn(F, F) -> F) -> Self {
        debug_assert_eq!(self.shape(), other.shape());
        Self {
            data: (self.data.iter().zip(&other.data))
                .map(|(&x, &y)| f(x, y))
                .collect(),
            ..*self
        }
    }

    /// `[batch, height, width, channels]`.
    pub fn shape(&self) -> [usize; 4] {
        [self.batch, self.map.height, self.map.width, self.channels]
    }

    /// The channels of every cell of every image, in order.
    pub fn cells(&self) -> std::slice::ChunksExact<'_, F> {
        self.data.chunks_exact(self.channels)
    }

    /// The values of every image.
    pub fn images(&self) -> std::slice::ChunksExact<'_, F> {
        self.data.chunks_exact(self.map.cells() * self.channels)
    }

    /// The values of every image.
    pub fn images_mut(&mut self) -> std::slice::ChunksExactMut<'_, F> {
        self.data.chunks_exact_mut(self.map.cells() * self.channels)
    }
}
