//! Batch norm as the affine `scale·y + shift` that the kernels apply on the way.

use effdet_model::engine::SumOverRanks;
use effdet_model::network::{BN_EPSILON, BN_MOMENTUM, BatchNorm, VariableTable};

use crate::kernels::elementwise::Affine;

/// One batch norm, or one per level of a head, with everything the kernels read of it.
///
/// # Shapes
/// `scale`, `shift`, `a`, `b`, `c`: `[groups, channels]`; sums: `[groups, 2, channels]`.
#[derive(Debug)]
pub(super) struct BatchNormState {
    norms: Vec<BatchNorm>,
    channels: usize,
    /// γ/σ.
    pub scale: Vec<f32>,
    /// β − μγ/σ.
    pub shift: Vec<f32>,
    mean: Vec<f64>,
    inverse_deviation: Vec<f64>,
    /// Factor of dz in the gradient by y.
    pub a: Vec<f32>,
    /// Factor of y in the gradient by y.
    pub b: Vec<f32>,
    /// Constant in the gradient by y.
    pub c: Vec<f32>,
    /// Σy and Σy² of the forward pass, then Σdz and Σdz·y of the backward pass.
    pub sums: Vec<f64>,
}

impl BatchNormState {
    pub(super) fn new(norms: &[BatchNorm]) -> Self {
        let channels = norms[0].channels;
        let len = norms.len() * channels;
        let zeros = || vec![0.0; len];
        Self {
            norms: norms.to_vec(),
            channels,
            scale: zeros(),
            shift: zeros(),
            mean: vec![0.0; len],
            inverse_deviation: vec![0.0; len],
            a: zeros(),
            b: zeros(),
            c: zeros(),
            sums: vec![0.0; 2 * len],
        }
    }

    /// What consumers of the raw tensor apply.
    pub(super) fn affine(&self) -> Affine<'_> {
        Affine::per_group(&self.scale, &self.shift)
    }

    /// The same for one group on its own.
    pub(super) fn affine_of(&self, group: usize) -> Affine<'_> {
        let range = group * self.channels..(group + 1) * self.channels;
        Affine::per_group(&self.scale[range.clone()], &self.shift[range])
    }

    pub(super) fn channels(&self) -> usize {
        self.channels
    }

    /// Takes mean and variance from the moving statistics.
    pub(super) fn use_moving(&mut self, table: &VariableTable, trainable: &[f32], statistics: &[f32]) {
        for (group, norm) in self.norms.iter().enumerate() {
            let at = group * self.channels;
            let mean = &statistics[table[norm.mean].range()];
            let variance = &statistics[table[norm.variance].range()];
            for i in 0..self.channels {
                self.mean[at + i] = f64::from(mean[i]);
                self.inverse_deviation[at + i] =
                    1.0 / (f64::from(variance[i]) + f64::from(BN_EPSILON)).sqrt();
            }
        }
        self.make_affine(table, trainable);
    }

    /// Takes mean and variance from the sums of the forward pass and moves the moving statistics.
    ///
    /// The batch is normalised with the biased variance; the moving one takes the unbiased variance.
    pub(super) fn use_batch(
        &mut self,
        table: &VariableTable,
        trainable: &[f32],
        statistics: &mut [f32],
        counts: &[usize],
    ) {
        let momentum = f64::from(BN_MOMENTUM);
        for (group, norm) in self.norms.iter().enumerate() {
            let at = group * self.channels;
            let n = counts[group] as f64;
            for i in 0..self.channels {
                let mean = self.sums[2 * at + i] / n;
                let variance = (self.sums[2 * at + self.channels + i] / n - mean * mean).max(0.0);
                self.mean[at + i] = mean;
                self.inverse_deviation[at + i] = 1.0 / (variance + f64::from(BN_EPSILON)).sqrt();
                let unbiased = variance * n / (n - 1.0).max(1.0);
                let moved = [(norm.mean, mean), (norm.variance, unbiased)];
                for (id, value) in moved {
                    let moving = &mut statistics[table[id].offset + i];
                    *moving = (momentum * f64::from(*moving) + (1.0 - momentum) * value) as f32;
                }
            }
        }
        self.make_affine(table, trainable);
    }

    fn make_affine(&mut self, table: &VariableTable, trainable: &[f32]) {
        for (group, norm) in self.norms.iter().enumerate() {
            let at = group * self.channels;
            let gamma = &trainable[table[norm.gamma].range()];
            let beta = &trainable[table[norm.beta].range()];
            for i in 0..self.channels {
                let scale = f64::from(gamma[i]) * self.inverse_deviation[at + i];
                self.scale[at + i] = scale as f32;
                self.shift[at + i] = (f64::from(beta[i]) - self.mean[at + i] * scale) as f32;
            }
        }
    }

    /// Adds up the sums and the counts of all ranks; gives the counts.
    pub(super) fn sum_over_ranks(&mut self, sync: Option<&dyn SumOverRanks>, counts: &[usize]) -> Vec<usize> {
        let Some(sync) = sync else {
            return counts.to_vec();
        };
        let len = self.sums.len();
        // Behind the sums for one exchange; counts are exact in f64.
        self.sums.extend(counts.iter().map(|&count| count as f64));
        sync.sum(&mut self.sums);
        self.sums.drain(len..).map(|count| count as usize).collect()
    }

    /// From Σdz and Σdz·y makes the gradients of γ and β: dγ = Σdz·ŷ, dβ = Σdz.
    pub(super) fn write_gradients(&self, table: &VariableTable, gradients: &mut [f32]) {
        for (group, norm) in self.norms.iter().enumerate() {
            let at = group * self.channels;
            let (gamma_at, beta_at) = (table[norm.gamma].offset, table[norm.beta].offset);
            for i in 0..self.channels {
                gradients[gamma_at + i] = self.sum_dz_normalized(at, i) as f32;
                gradients[beta_at + i] = self.sums[2 * at + i] as f32;
            }
        }
    }

    /// Σdz·ŷ of channel `i` of the group that begins at `at`.
    fn sum_dz_normalized(&self, at: usize, i: usize) -> f64 {
        let (sum_dz, sum_dz_y) = (self.sums[2 * at + i], self.sums[2 * at + self.channels + i]);
        (sum_dz_y - self.mean[at + i] * sum_dz) * self.inverse_deviation[at + i]
    }

    /// From Σdz and Σdz·y makes `dy = a·dz + b·y + c`.
    ///
    /// With m₁ = mean dz and m₂ = mean dz·ŷ: a = γ/σ, b = −a·m₂/σ, c = −a·(m₁ − μ·m₂/σ).
    pub(super) fn backward(&mut self, table: &VariableTable, trainable: &[f32], counts: &[usize]) {
        for (group, norm) in self.norms.iter().enumerate() {
            let at = group * self.channels;
            let n = counts[group] as f64;
            let gamma_at = table[norm.gamma].offset;
            for i in 0..self.channels {
                let (mean, inverse) = (self.mean[at + i], self.inverse_deviation[at + i]);
                let (m1, m2) = (self.sums[2 * at + i] / n, self.sum_dz_normalized(at, i) / n);
                let a = f64::from(trainable[gamma_at + i]) * inverse;
                self.a[at + i] = a as f32;
                self.b[at + i] = (-a * inverse * m2) as f32;
                self.c[at + i] = (-a * (m1 - mean * inverse * m2)) as f32;
            }
        }
    }
}
