//! An engine against the plain reference in float64, on networks that between them have every kind of layer.

use std::sync::Arc;

use effdet_cpu::reference::ReferenceEngine;
use effdet_model::engine::{Engine, HeadOutputs, ImageBatch, StepLosses, StepOptions, Targets, TrainBatch};
use effdet_model::hparams::{ActType, FusionMethod, HParams, ImageSize, Profile};
use effdet_model::network::{Network, Variable, VariableKind};
use effdet_model::weights::Weights;

use super::golden::{hashed, weights};
use super::worst::Worst;

/// Defines one test per network for the engine that a closure over `Arc<Network>` makes.
#[macro_export]
macro_rules! agreement_tests {
    ($make:expr) => {
        mod agreement {
            use std::sync::Arc;

            use effdet_model::engine::Engine;
            use effdet_model::network::Network;

            use super::*;
            use $crate::common::agreement;

            fn engine(network: Arc<Network>) -> Box<dyn Engine> {
                #[allow(clippy::redundant_closure_call)]
                Box::new(($make)(network))
            }

            #[test]
            fn d0_of_the_seed_agrees_with_the_reference_in_float64() {
                agreement::check_d0_of_the_seed(&engine);
            }

            #[test]
            fn d0_of_google_agrees_with_the_reference_in_float64() {
                agreement::check_d0_of_google(&engine);
            }

            #[test]
            fn lite0_with_a_smooth_activation_agrees_with_the_reference_in_float64() {
                agreement::check_smooth_lite0(&engine);
            }

            #[test]
            fn lite0_agrees_with_the_reference_in_float64_up_to_kinks() {
                agreement::check_lite0(&engine);
            }
        }
    };
}

/// Makes an engine for a network.
pub type Make = dyn Fn(Arc<Network>) -> Box<dyn Engine>;

/// Largest distance of a variable's gradient from its float64 value on a smooth network.
///
/// Rounding makes a few 1e-4. The images are such that no max-pool window is near a tie, which rounding could decide either way
/// and would show as 1e-2.
const SMOOTH: f64 = 5e-3;

/// The same where an activation has kinks: rounding puts some values on the other side, which changes their slope by one.
const KINKED: f64 = 2e-1;

/// D0 in the seed's conventions, an image no power of two divides, stochastic depth everywhere.
pub fn check_d0_of_the_seed(make: &Make) {
    check(make, "efficientdet-d0", 2, SMOOTH, |hparams| {
        hparams.image_size = ImageSize {
            height: 100,
            width: 140,
        };
        hparams.num_classes = 7;
        hparams.backbone_survival_prob = Some(0.6);
        hparams.survival_prob = Some(0.7);
    });
}

/// D0 in Google's conventions, softmax fusion, another activation.
pub fn check_d0_of_google(make: &Make) {
    check(make, "efficientdet-d0", 3, SMOOTH, |hparams| {
        hparams.profile = Profile::Google;
        hparams.rescale_input = false;
        hparams.fusion_relu = true;
        hparams.fpn_weight_method = Some(FusionMethod::Attn);
        hparams.act_type = ActType::Hswish;
        hparams.image_size = ImageSize::square(96);
        hparams.num_classes = 3;
    });
}

/// Lite0 with swish: no squeeze-and-excite, plain sums, legacy upsampling at sizes where it matters.
pub fn check_smooth_lite0(make: &Make) {
    check(make, "efficientdet-lite0", 2, SMOOTH, |hparams| {
        hparams.act_type = ActType::Swish;
        hparams.image_size = ImageSize::square(160);
        hparams.num_classes = 3;
    });
}

/// Lite0: ReLU6.
pub fn check_lite0(make: &Make) {
    check(make, "efficientdet-lite0", 2, KINKED, |hparams| {
        hparams.image_size = ImageSize::square(128);
        hparams.num_classes = 3;
    });
}

struct Outcome {
    heads: HeadOutputs,
    losses: StepLosses,
    gradients: Vec<f32>,
    statistics: Vec<f32>,
}

fn check(make: &Make, preset: &str, batch: usize, tolerance: f64, change: impl Fn(&mut HParams)) {
    let mut hparams = HParams::preset(preset).unwrap();
    change(&mut hparams);
    let network = Arc::new(Network::new(&hparams).unwrap());
    let weights = weights(&network);
    let expected = run(
        &mut ReferenceEngine::<f64>::new(network.clone()).unwrap(),
        &network,
        &weights,
        batch,
    );
    let actual = run(make(network.clone()).as_mut(), &network, &weights, batch);

    let mut heads = Worst::new(format!("{preset} head outputs (distance)"), 1e-4);
    for (index, (actual, expected)) in actual.heads.levels.iter().zip(&expected.heads.levels).enumerate() {
        let at = |kind: &str| format!("{kind} of level {index}");
        heads.note(
            &at("class logits"),
            distance(&actual.class_logits, &expected.class_logits),
        );
        heads.note(&at("box codes"), distance(&actual.box_codes, &expected.box_codes));
    }
    heads.check();

    let mut losses = Worst::new(format!("{preset} losses (relative)"), 1e-4);
    let pair = |pick: fn(&StepLosses) -> f32| [&actual, &expected].map(|run| f64::from(pick(&run.losses)));
    for (at, [actual, expected]) in [
        ("class_loss", pair(|l| l.class_loss)),
        ("box_loss", pair(|l| l.box_loss)),
        ("det_loss", pair(|l| l.det_loss)),
    ] {
        losses.relative(at, actual, expected);
    }
    losses.check();

    let mut gradients = Worst::new(format!("{preset} gradients by variable (distance)"), tolerance);
    let mut fusion = Worst::new(
        format!("{preset} gradients of fusion weights (relative to all of them)"),
        tolerance,
    );
    let mut noise = Worst::new(
        format!("{preset} gradients that are zero (relative to all)"),
        1e-5,
    );
    let mut statistics = Worst::new(format!("{preset} moving statistics (distance)"), 1e-4);
    let total = norm(&expected.gradients);
    // Differences of nearly equal sums: each one by itself has few digits.
    let fusion_total = (network.variables.iter())
        .filter(|variable| is_fusion_weight(variable))
        .map(|variable| norm(&expected.gradients[variable.range()]).powi(2))
        .sum::<f64>()
        .sqrt();
    for variable in &network.variables {
        let (range, name) = (variable.range(), &variable.name);
        if variable.kind == VariableKind::Statistic {
            statistics.note(
                name,
                distance(&actual.statistics[range.clone()], &expected.statistics[range]),
            );
            continue;
        }
        let (actual, expected) = (&actual.gradients[range.clone()], &expected.gradients[range]);
        if is_fusion_weight(variable) {
            fusion.note(name, distance(actual, expected) * norm(expected) / fusion_total);
        } else if norm(expected) < 1e-9 * total {
            // Whatever feeds a batch norm through linear layers only has no gradient but rounding.
            noise.note(name, norm(actual) / total);
        } else {
            gradients.note(name, distance(actual, expected));
        }
    }
    gradients.check();
    fusion.check();
    noise.check();
    statistics.check();
}

fn is_fusion_weight(variable: &Variable) -> bool {
    variable.leaf().starts_with("WSM")
}

fn run(engine: &mut dyn Engine, network: &Network, weights: &Weights, batch: usize) -> Outcome {
    let ImageSize { height, width } = network.hparams.image_size;
    let pixels: Vec<f32> = (0..batch * height * width * 3)
        .map(|i| hashed(4, i) as f32)
        .collect();
    let images = ImageBatch {
        pixels: &pixels,
        batch,
        height,
        width,
    };
    let mut heads = HeadOutputs::default();
    engine.infer(weights, &images, &mut heads).unwrap();

    let rows = batch * network.num_anchors();
    // About one anchor in a hundred is positive and one in fifty ignored.
    let classes = network.hparams.num_classes;
    let class_targets: Vec<i32> = (0..rows)
        .map(|row| match 50.0 * (1.0 + hashed(2, row)) {
            draw if draw < 1.0 => (row % classes) as i32,
            draw if draw < 3.0 => -2,
            _ => -1,
        })
        .collect();
    let box_targets: Vec<f32> = (0..4 * rows)
        .map(|i| {
            if class_targets[i / 4] >= 0 {
                hashed(3, i) as f32
            } else {
                0.0
            }
        })
        .collect();
    let positives = class_targets.iter().filter(|&&class| class >= 0).count();
    let keys: Vec<u64> = (0..batch as u64).collect();
    let batch = TrainBatch {
        images,
        targets: Targets {
            class_targets: &class_targets,
            box_targets: &box_targets,
            normalizer: effdet_model::loss::normalizer(positives),
        },
        draw_keys: &keys,
    };
    let mut moved = weights.clone();
    let mut gradients = vec![f32::NAN; weights.trainable.len()];
    let options = StepOptions {
        seed: 3,
        epoch: 2,
        ..StepOptions::default()
    };
    let losses = engine
        .train_step(&mut moved, &batch, &options, &mut gradients)
        .unwrap();
    assert!(
        moved.trainable == weights.trainable,
        "a step of the engine leaves the weights to the optimiser"
    );
    Outcome {
        heads,
        losses,
        gradients,
        statistics: moved.statistics,
    }
}

/// ‖actual − expected‖/‖expected‖.
fn distance(actual: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let difference = actual
        .iter()
        .zip(expected)
        .map(|(&a, &e)| (f64::from(a) - f64::from(e)).powi(2));
    difference.sum::<f64>().sqrt() / norm(expected)
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}
