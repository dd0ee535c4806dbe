//! All values of a network in two flat buffers.

use crate::network::{Initializer, VariableKind, VariableTable};
use crate::rng::{Draws, Purpose};

/// The values of every variable of a network.
///
/// Variables are slices of two flat buffers, at the offsets of the [`VariableTable`]. Gradients, momentum and averages have the
/// same layout, so clipping, optimiser steps, reductions over ranks, checkpoints and hashes are loops over slices.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// Trainable variables.
    pub trainable: Vec<f32>,
    /// Batch-norm moving means and variances.
    pub statistics: Vec<f32>,
}

impl Weights {
    /// All zeros, with the sizes of `table`.
    pub fn zeros(table: &VariableTable) -> Self {
        Self {
            trainable: vec![0.0; table.trainable_len()],
            statistics: vec![0.0; table.statistics_len()],
        }
    }

    /// Initial values by each variable's initialiser.
    ///
    /// # Determinism
    /// Each variable has its own stream keyed by (seed, its name), so adding or removing other variables (another class count, say)
    /// leaves its initial values alone.
    pub fn init(table: &VariableTable, seed: u64) -> Self {
        let mut weights = Self::zeros(table);
        for variable in table.iter() {
            let mut draws = Draws::new(seed, Purpose::Init, 0, fnv1a_64(variable.name.as_bytes()));
            let (fan_in, fan_out) = variable.fans();
            let values = weights.slice_mut(variable.kind, variable.range());
            match variable.initializer {
                Initializer::Constant(value) => values.fill(value),
                Initializer::TruncatedNormalFanIn { scale } => {
                    // Keras divides by the standard deviation of a normal cut at ±2 so that the cut one has the wanted deviation.
                    let deviation = (scale / fan_in.max(1.0)).sqrt() / 0.879_625_661_034_239_8;
                    values
                        .iter_mut()
                        .for_each(|v| *v = (deviation * draws.truncated_normal()) as f32);
                }
                Initializer::NormalFanOut { scale } => {
                    let deviation = (scale / fan_out.max(1.0)).sqrt();
                    values
                        .iter_mut()
                        .for_each(|v| *v = (deviation * draws.normal()) as f32);
                }
                Initializer::GlorotUniform => {
                    let limit = (6.0 / (fan_in + fan_out)).sqrt();
                    values
                        .iter_mut()
                        .for_each(|v| *v = (limit * (2.0 * draws.uniform_f64() - 1.0)) as f32);
                }
                Initializer::Normal { deviation } => {
                    values
                        .iter_mut()
                        .for_each(|v| *v = (deviation * draws.normal()) as f32);
                }
            }
        }
        weights
    }

    /// The values of one range of one of the two buffers.
    pub fn slice(&self, kind: VariableKind, range: std::ops::Range<usize>) -> &[f32] {
        match kind {
            VariableKind::Trainable => &self.trainable[range],
            VariableKind::Statistic => &self.statistics[range],
        }
    }

    /// Mutable values of one range of one of the two buffers.
    pub fn slice_mut(&mut self, kind: VariableKind, range: std::ops::Range<usize>) -> &mut [f32] {
        match kind {
            VariableKind::Trainable => &mut self.trainable[range],
            VariableKind::Statistic => &mut self.statistics[range],
        }
    }
}

/// FNV-1a, 64 bits: a stable name for the key of a variable's stream.
fn fnv1a_64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
