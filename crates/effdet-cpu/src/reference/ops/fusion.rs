//! Weighted fusion of the inputs of a BiFPN node.

use effdet_model::hparams::FusionMethod;
use effdet_model::network::FUSION_EPSILON;

use crate::reference::{Float, Tensor};

/// How inputs are weighted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fusion {
    /// Method.
    pub method: FusionMethod,
    /// Whether negative weights count as 0 in the fast methods.
    pub relu: bool,
}

/// Weighted mean of inputs of one shape.
///
/// ```text
/// y = Σ_i x_i·v_i / s
/// attn, channel_attn          v_i = exp(w_i − max_j w_j)      s = Σ_j v_j
/// fastattn, channel_fastattn  v_i = w_i, or max(w_i, 0)       s = Σ_j v_j + 1e-4
/// sum                         v_i = 1                         s = 1
/// ```
///
/// # Shapes
/// `weights`: one entry per input, `[1]`, or `[channels]` for the channel methods; empty for `sum`.
pub fn fuse<F: Float>(inputs: &[&Tensor<F>], weights: &[&[F]], fusion: Fusion) -> Tensor<F> {
    let channels = inputs[0].channels;
    let mut y = inputs[0].zeros_like();
    let shares = Shares::new(inputs.len(), weights, fusion);
    for (i, x) in inputs.iter().enumerate() {
        for (y, x) in y.data.chunks_exact_mut(channels).zip(x.cells()) {
            for (c, (y, &x)) in y.iter_mut().zip(x).enumerate() {
                *y += x * shares.value(i, c) / shares.sum(c);
            }
        }
    }
    y
}

/// Gradients of [`fuse`] by its inputs and its weights.
///
/// ```text
/// dx_i = dy·v_i/s      dv_i = Σ dy·(x_i − y)/s      dw_i = dv_i·∂v_i/∂w_i
/// ```
///
/// The sum runs over images and cells, and over channels for scalar weights; ∂v_i/∂w_i is v_i for the softmax methods, else 1,
/// or 0 where the ReLU cuts.
pub fn fuse_backward<F: Float>(
    inputs: &[&Tensor<F>],
    weights: &[&[F]],
    fusion: Fusion,
    dy: &Tensor<F>,
) -> (Vec<Tensor<F>>, Vec<Vec<F>>) {
    let shares = Shares::new(inputs.len(), weights, fusion);
    let mut dinputs: Vec<Tensor<F>> = inputs.iter().map(|_| dy.clone()).collect();
    for (i, dx) in dinputs.iter_mut().enumerate() {
        for cell in dx.data.chunks_exact_mut(dy.channels) {
            for (c, dx) in cell.iter_mut().enumerate() {
                *dx = *dx * shares.value(i, c) / shares.sum(c);
            }
        }
    }

    let y = fuse(inputs, weights, fusion);
    let dweights = (inputs.iter().zip(weights).enumerate())
        .map(|(i, (x, weight))| {
            let mut sums = vec![0.0; weight.len()];
            for ((dy, x), y) in dy.cells().zip(x.cells()).zip(y.cells()) {
                for c in 0..dy.len() {
                    let slot = c.min(weight.len() - 1);
                    sums[slot] += (dy[c] * (x[c] - y[c])).to_f64();
                }
            }
            let slopes = (0..weight.len()).map(|slot| shares.slope(i, slot, weight[slot]) / shares.sum(slot));
            sums.iter()
                .zip(slopes)
                .map(|(&sum, slope)| F::from_f64(sum) * slope)
                .collect()
        })
        .collect();
    (dinputs, dweights)
}

/// The `v_i` and `s` of [`fuse`].
struct Shares<F> {
    fusion: Fusion,
    values: Vec<Vec<F>>,
    sums: Vec<F>,
}

impl<F: Float> Shares<F> {
    fn new(inputs: usize, weights: &[&[F]], fusion: Fusion) -> Self {
        let values: Vec<Vec<F>> = match fusion.method {
            FusionMethod::Sum => vec![vec![F::ONE]; inputs],
            FusionMethod::Attn | FusionMethod::ChannelAttn => {
                let largest = |slot: usize| (weights.iter()).fold(F::NEG_INFINITY, |max, w| max.max(w[slot]));
                let shares = |w: &&[F]| {
                    w.iter()
                        .enumerate()
                        .map(|(slot, &w)| (w - largest(slot)).exp())
                        .collect()
                };
                weights.iter().map(shares).collect()
            }
            FusionMethod::FastAttn | FusionMethod::ChannelFastAttn => {
                let share = |&w: &F| if fusion.relu { w.max(F::ZERO) } else { w };
                weights.iter().map(|w| w.iter().map(share).collect()).collect()
            }
        };
        let sums = (0..values[0].len())
            .map(|slot| {
                let sum: F = values.iter().map(|v| v[slot]).sum();
                match fusion.method {
                    FusionMethod::Sum => F::ONE,
                    FusionMethod::Attn | FusionMethod::ChannelAttn => sum,
                    FusionMethod::FastAttn | FusionMethod::ChannelFastAttn => {
                        sum + F::from_f32(FUSION_EPSILON)
                    }
                }
            })
            .collect();
        Self { fusion, values, sums }
    }

    /// v_i of one channel.
    fn value(&self, i: usize, channel: usize) -> F {
        self.values[i][channel.min(self.sums.len() - 1)]
    }

    /// s of one channel.
    fn sum(&self, channel: usize) -> F {
        self.sums[channel.min(self.sums.len() - 1)]
    }

    /// ∂v_i/∂w_i.
    fn slope(&self, i: usize, slot: usize, weight: F) -> F {
        match self.fusion.method {
            FusionMethod::Attn | FusionMethod::ChannelAttn => self.values[i][slot],
            _ if self.fusion.relu && weight <= F::ZERO => F::ZERO,
            _ => F::ONE,
        }
    }
}

#[cfg(test)]
mod tests {
    use effdet_model::network::MapSize;

    use super::super::gradient_check::{check_gradient, dot, noise, noise_tensor};
    use super::*;

    const MAP: MapSize = MapSize { height: 2, width: 3 };
    const CHANNELS: usize = 4;

    fn all() -> impl Iterator<Item = Fusion> {
        let methods = [
            FusionMethod::Attn,
            FusionMethod::FastAttn,
            FusionMethod::Sum,
            FusionMethod::ChannelAttn,
            FusionMethod::ChannelFastAttn,
        ];
        (methods.into_iter()).flat_map(|method| [false, true].map(|relu| Fusion { method, relu }))
    }

    /// Weights of three inputs; one of them negative.
    fn weights(method: FusionMethod) -> Vec<Vec<f64>> {
        match method {
            FusionMethod::Sum => Vec::new(),
            FusionMethod::Attn | FusionMethod::FastAttn => vec![vec![0.7], vec![1.3], vec![-0.4]],
            _ => (0..3)
                .map(|i| noise(10 + i, CHANNELS).iter().map(|w| 1.0 + 0.9 * w).collect())
                .collect(),
        }
    }

    fn slices(weights: &[Vec<f64>]) -> Vec<&[f64]> {
        weights.iter().map(Vec::as_slice).collect()
    }

    fn fusion(method: FusionMethod, relu: bool) -> Fusion {
        Fusion { method, relu }
    }

    #[test]
    fn known_values_of_every_method() {
        let x = |value: f64| noise_tensor(1, 1, MAP, 1).map_values(|_| value);
        let (a, b) = (x(10.0), x(20.0));
        let fused = |method, relu, w: [f64; 2]| {
            let weights = [&w[..1], &w[1..]];
            let weights = if method == FusionMethod::Sum {
                &[][..]
            } else {
                &weights[..]
            };
            fuse(&[&a, &b], weights, fusion(method, relu)).data[0]
        };
        assert_eq!(fused(FusionMethod::Sum, false, [1.0, 1.0]), 30.0);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a}, {b}");
        close(fused(FusionMethod::FastAttn, false, [1.0, 1.0]), 30.0 / 2.0001);
        close(fused(FusionMethod::FastAttn, false, [3.0, -1.0]), 10.0 / 2.0001);
        close(fused(FusionMethod::FastAttn, true, [3.0, -1.0]), 30.0 / 3.0001);
        close(fused(FusionMethod::Attn, false, [0.0, 3f64.ln()]), 17.5);
        close(fused(FusionMethod::ChannelAttn, false, [0.0, 3f64.ln()]), 17.5);
    }

    #[test]
    fn gradients_of_every_method_match_finite_differences() {
        let inputs: Vec<Tensor<f64>> = (0..3).map(|i| noise_tensor(i, 2, MAP, CHANNELS)).collect();
        let dy = noise_tensor(9, 2, MAP, CHANNELS);
        for fusion in all() {
            let weights = weights(fusion.method);
            let inputs: Vec<&Tensor<f64>> = inputs.iter().collect();
            let (dinputs, dweights) = fuse_backward(&inputs, &slices(&weights), fusion, &dy);
            for i in 0..3 {
                check_gradient(&inputs[i].data, &dinputs[i].data, |data| {
                    let x = Tensor {
                        data: data.to_vec(),
                        ..*inputs[i]
                    };
                    let mut inputs = inputs.clone();
                    inputs[i] = &x;
                    dot(&dy, &fuse(&inputs, &slices(&weights), fusion))
                });
            }
            assert_eq!(dweights.len(), weights.len());
            for i in 0..weights.len() {
                check_gradient(&weights[i], &dweights[i], |weight| {
                    let mut weights = slices(&weights);
                    weights[i] = weight;
                    dot(&dy, &fuse(&inputs, &weights, fusion))
                });
            }
        }
    }
}
