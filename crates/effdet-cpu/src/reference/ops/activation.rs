//! Activation functions.

use effdet_model::hparams::ActType;

use crate::reference::{Float, Tensor};

/// β of smooth ReLU: 20⁴.
const SRELU_BETA: f64 = 160_000.0;

/// The activation of every value.
///
/// | name | f(x) |
/// |---|---|
/// | swish | x·σ(x) |
/// | hswish | x·min(max(x + 3, 0), 6)/6 |
/// | relu | max(x, 0) |
/// | relu6 | min(max(x, 0), 6) |
/// | mish | x·tanh(ln(1 + eˣ)) |
/// | srelu | x − ln(βx + 1)/β for x > 0, else 0; β = 160000 |
/// | identity | x |
pub fn activate<F: Float>(x: &Tensor<F>, act: ActType) -> Tensor<F> {
    let [three, six, beta] = [3.0, 6.0, SRELU_BETA].map(F::from_f64);
    let relu6 = |x: F| x.max(F::ZERO).min(six);
    x.map_values(|x| match act {
        ActType::Swish => x * x.sigmoid(),
        ActType::Hswish => x * relu6(x + three) / six,
        ActType::Relu => x.max(F::ZERO),
        ActType::Relu6 => relu6(x),
        ActType::Mish => x * x.softplus().tanh(),
        ActType::Srelu if x > F::ZERO => x - (beta * x).ln_1p() / beta,
        ActType::Srelu => F::ZERO,
        ActType::Identity => x,
    })
}

/// Gradient of [`activate`]: `dx = dy·f′(x)`, with the left derivative at a kink.
pub fn activate_backward<F: Float>(x: &Tensor<F>, act: ActType, dy: &Tensor<F>) -> Tensor<F> {
    let [half, three, six, beta] = [0.5, 3.0, 6.0, SRELU_BETA].map(F::from_f64);
    let step = |inside: bool| if inside { F::ONE } else { F::ZERO };
    x.zip_values(dy, |x, dy| {
        let slope = match act {
            ActType::Swish => {
                let s = x.sigmoid();
                s * (F::ONE + x * (F::ONE - s))
            }
            ActType::Hswish if x <= -three => F::ZERO,
            ActType::Hswish if x > three => F::ONE,
            ActType::Hswish => x / three + half,
            ActType::Relu => step(x > F::ZERO),
            ActType::Relu6 => step(x > F::ZERO && x <= six),
            ActType::Mish => {
                let t = x.softplus().tanh();
                t + x * (F::ONE - t * t) * x.sigmoid()
            }
            ActType::Srelu if x > F::ZERO => beta * x / (beta * x + F::ONE),
            ActType::Srelu => F::ZERO,
            ActType::Identity => F::ONE,
        };
        dy * slope
    })
}

#[cfg(test)]
mod tests {
    use effdet_model::network::MapSize;

    use super::super::gradient_check::{check_gradient, dot, noise_tensor};
    use super::*;

    const ALL: [ActType; 7] = [
        ActType::Swish,
        ActType::Hswish,
        ActType::Relu,
        ActType::Relu6,
        ActType::Mish,
        ActType::Srelu,
        ActType::Identity,
    ];

    fn row(data: Vec<f64>) -> Tensor<f64> {
        Tensor {
            batch: 1,
            map: MapSize {
                height: 1,
                width: data.len(),
            },
            channels: 1,
            data,
        }
    }

    /// Source: the formulas of the reference's `utils/activation_builder.py`, evaluated by hand.
    #[test]
    fn known_values_of_every_activation() {
        let x = row(vec![-1.0, 0.0, 2.0, 7.0]);
        let expected = [
            [
                -0.268_941_421_369_995_1,
                0.0,
                1.761_594_155_955_764_8,
                6.993_622_646_061_25,
            ],
            [-1.0 / 3.0, 0.0, 5.0 / 3.0, 7.0],
            [0.0, 0.0, 2.0, 7.0],
            [0.0, 0.0, 2.0, 6.0],
            [-0.303_401_46, 0.0, 1.943_958_95, 6.999_988_4],
            [
                0.0,
                0.0,
                2.0 - 320_001f64.ln() / 160_000.0,
                7.0 - 1_120_001f64.ln() / 160_000.0,
            ],
            [-1.0, 0.0, 2.0, 7.0],
        ];
        for (act, expected) in ALL.into_iter().zip(expected) {
            for (y, expected) in activate(&x, act).data.into_iter().zip(expected) {
                assert!((y - expected).abs() < 1e-6, "{act}: {y}, {expected}");
            }
        }
    }

    #[test]
    fn large_magnitudes_stay_finite() {
        let x = row(vec![-1e4, -100.0, 100.0, 1e4]);
        let x = Tensor {
            data: x.data.iter().map(|&x| x as f32).collect(),
            ..row32(&x)
        };
        for act in ALL {
            let y = activate(&x, act);
            let dx = activate_backward(&x, act, &y);
            assert!(y.data.iter().chain(&dx.data).all(|v| v.is_finite()), "{act}");
        }
    }

    fn row32(x: &Tensor<f64>) -> Tensor<f32> {
        Tensor::zeros(x.batch, x.map, x.channels)
    }

    #[test]
    fn gradients_of_activations_match_finite_differences() {
        let map = MapSize { height: 5, width: 5 };
        let x = noise_tensor(1, 2, map, 2).map_values(|x| 3.0 * x);
        let dy = noise_tensor(2, 2, map, 2);
        for act in ALL {
            check_gradient(&x.data, &activate_backward(&x, act, &dy).data, |data| {
                dot(
                    &dy,
                    &activate(
                        &Tensor {
                            data: data.to_vec(),
                            ..x
                        },
                        act,
                    ),
                )
            });
        }
    }
}
