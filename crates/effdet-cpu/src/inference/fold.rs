//! The constants of a plan: weights with batch norm folded in, in the layouts the kernels read.

use std::ops::Range;

use effdet_model::hparams::FusionMethod;
use effdet_model::network::{BN_EPSILON, BatchNorm, Conv, Depthwise, VariableId, VariableTable};

use super::depthwise::LANE_GROUP;
use crate::arena::{Bump, SharedPtr};
use crate::kernels::Executor;
use crate::kernels::fuse::FusionWeights;
use crate::kernels::gemm::{PANEL, packed_len, padded};

/// A dense layer among the constants.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dense {
    pub inputs: usize,
    pub outputs: usize,
    /// First value of the panels `[⌈outputs/16⌉, inputs, 16]`.
    pub weights: usize,
    /// First value of the bias, whole panels.
    pub bias: usize,
}

impl Dense {
    pub(super) fn packed_len(&self) -> usize {
        packed_len(self.inputs, self.outputs)
    }
}

/// A depthwise layer among the constants.
#[derive(Debug, Clone, Copy)]
pub(super) struct DepthwiseAt {
    /// First value of `[lane groups, k·k, 16]`.
    pub weights: usize,
    /// First value of the bias, whole lane groups; none without batch norm.
    pub bias: Option<usize>,
}

/// What the constants are made of, and where each lies.
#[derive(Debug, Default)]
pub(super) struct Constants {
    len: usize,
    folds: Vec<Fold>,
}

#[derive(Debug)]
enum Fold {
    Dense {
        /// `[inputs, outputs]`, row-major.
        kernel: VariableId,
        bias: Option<VariableId>,
        norm: Option<BatchNorm>,
        at: Dense,
    },
    Depthwise {
        /// `[taps, channels]`.
        kernel: VariableId,
        channels: usize,
        norm: Option<BatchNorm>,
        at: DepthwiseAt,
    },
    Copy {
        source: VariableId,
        at: usize,
    },
    /// Factors of a node's inputs, `[inputs, channels]`.
    Fusion {
        method: FusionMethod,
        relu: bool,
        weights: Vec<VariableId>,
        channels: usize,
        at: usize,
    },
}

/// The values that constants are made from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Variables<'a> {
    pub table: &'a VariableTable,
    pub trainable: &'a [f32],
    pub statistics: &'a [f32],
}

impl<'a> Variables<'a> {
    fn trainable(&self, id: VariableId) -> &'a [f32] {
        &self.trainable[self.table[id].range()]
    }

    /// Batch norm with moving statistics after a layer with `bias`, as factor and summand of the layer's raw output;
    /// without batch norm the factor is 1.
    fn affine(
        &self,
        norm: Option<BatchNorm>,
        bias: Option<VariableId>,
        channels: usize,
    ) -> (Vec<f32>, Vec<f32>) {
        let bias = |c: usize| bias.map_or(0.0, |id| f64::from(self.trainable(id)[c]));
        let Some(norm) = norm else {
            return (
                vec![1.0; channels],
                (0..channels).map(|c| bias(c) as f32).collect(),
            );
        };
        let (gamma, beta) = (self.trainable(norm.gamma), self.trainable(norm.beta));
        let mean = &self.statistics[self.table[norm.mean].range()];
        let variance = &self.statistics[self.table[norm.variance].range()];
        (0..channels)
            .map(|c| {
                let scale = f64::from(gamma[c]) / (f64::from(variance[c]) + f64::from(BN_EPSILON)).sqrt();
                let shift = f64::from(beta[c]) + (bias(c) - f64::from(mean[c])) * scale;
                (scale as f32, shift as f32)
            })
            .unzip()
    }
}

impl Constants {
    /// Values of all constants.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn take(&mut self, len: usize) -> usize {
        let at = self.len;
        self.len += Bump::room(len);
        at
    }

    /// Room for zeros.
    pub(super) fn zeros(&mut self, len: usize) -> usize {
        self.take(len)
    }

    /// A convolution, seen as `[k·k·inputs, outputs]`, with its bias and the batch norm after it.
    pub(super) fn dense(&mut self, conv: &Conv, norm: Option<BatchNorm>) -> Dense {
        let inputs = conv.size * conv.size * conv.in_channels;
        let at = Dense {
            inputs,
            outputs: conv.out_channels,
            weights: self.take(packed_len(inputs, conv.out_channels)),
            bias: self.take(padded(conv.out_channels)),
        };
        self.folds.push(Fold::Dense {
            kernel: conv.kernel,
            bias: conv.bias,
            norm,
            at,
        });
        at
    }

    /// A depthwise convolution with the batch norm after it.
    pub(super) fn depthwise(&mut self, layer: &Depthwise, norm: Option<BatchNorm>) -> DepthwiseAt {
        let lanes = layer.channels.next_multiple_of(LANE_GROUP);
        let at = DepthwiseAt {
            weights: self.take(layer.size * layer.size * lanes),
            bias: norm.map(|_| self.take(lanes)),
        };
        self.folds.push(Fold::Depthwise {
            kernel: layer.kernel,
            channels: layer.channels,
            norm,
            at,
        });
        at
    }

    /// A variable as it is.
    pub(super) fn copy(&mut self, table: &VariableTable, source: VariableId) -> Range<usize> {
        let len = table[source].len;
        let at = self.take(len);
        self.folds.push(Fold::Copy { source, at });
        at..at + len
    }

    /// Factors of a node's inputs, `[inputs, channels]`; none for a plain sum.
    pub(super) fn fusion(
        &mut self,
        (method, relu): (FusionMethod, bool),
        weights: &[VariableId],
        channels: usize,
    ) -> Option<usize> {
        if method == FusionMethod::Sum {
            return None;
        }
        let at = self.take(weights.len() * channels);
        self.folds.push(Fold::Fusion {
            method,
            relu,
            weights: weights.to_vec(),
            channels,
            at,
        });
        Some(at)
    }

    /// Writes all constants, in parallel; what is padding or zeros stays as it is.
    ///
    /// # Panics
    /// When `out` has another length.
    pub(super) fn write(&self, executor: &Executor, variables: Variables<'_>, out: &mut [f32]) {
        assert_eq!(out.len(), self.len, "constants have their own length");
        let out = SharedPtr::new(out);
        executor.pool().run(self.folds.len(), &|task, _| {
            let part = |at: usize, len: usize| {
                debug_assert!(at + len <= self.len);
                // SAFETY: every fold has its own parts of the constants.
                unsafe { std::slice::from_raw_parts_mut(out.get().add(at), len) }
            };
            match &self.folds[task] {
                Fold::Dense {
                    kernel,
                    bias,
                    norm,
                    at,
                } => {
                    let (scale, shift) = variables.affine(*norm, *bias, at.outputs);
                    part(at.bias, at.outputs).copy_from_slice(&shift);
                    let panels = part(at.weights, at.packed_len());
                    pack_scaled(variables.trainable(*kernel), &scale, panels);
                }
                Fold::Depthwise {
                    kernel,
                    channels,
                    norm,
                    at,
                } => {
                    let (scale, shift) = variables.affine(*norm, None, *channels);
                    if let Some(bias) = at.bias {
                        part(bias, *channels).copy_from_slice(&shift);
                    }
                    let kernel = variables.trainable(*kernel);
                    let taps = kernel.len() / channels;
                    let groups = part(at.weights, taps * channels.next_multiple_of(LANE_GROUP));
                    for (tap, row) in kernel.chunks_exact(*channels).enumerate() {
                        for (c, (&value, &scale)) in row.iter().zip(&scale).enumerate() {
                            groups[(c / LANE_GROUP * taps + tap) * LANE_GROUP + c % LANE_GROUP] =
                                value * scale;
                        }
                    }
                }
                Fold::Copy { source, at } => {
                    let values = variables.trainable(*source);
                    part(*at, values.len()).copy_from_slice(values);
                }
                Fold::Fusion {
                    method,
                    relu,
                    weights,
                    channels,
                    at,
                } => {
                    let values: Vec<&[f32]> = weights.iter().map(|&id| variables.trainable(id)).collect();
                    let fusion = FusionWeights::new(*method, *relu, weights.len(), *channels, &values);
                    part(*at, weights.len() * channels).copy_from_slice(&fusion.factors());
                }
            }
        });
    }
}

/// Packs a row-major matrix with its columns multiplied by `scale` into panels of 16; padding is left alone.
fn pack_scaled(matrix: &[f32], scale: &[f32], packed: &mut [f32]) {
    let columns = scale.len();
    let rows = matrix.len() / columns;
    for (panel, out) in packed.chunks_exact_mut(rows * PANEL).enumerate() {
        let first = panel * PANEL;
        let width = PANEL.min(columns - first);
        let scale = &scale[first..first + width];
        for (row, out) in matrix.chunks_exact(columns).zip(out.chunks_exact_mut(PANEL)) {
            let row = &row[first..first + width];
            for ((out, &value), &scale) in out.iter_mut().zip(row).zip(scale) {
                *out = value * scale;
            }
        }
    }
}
