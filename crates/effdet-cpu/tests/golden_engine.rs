//! The fast engine against the numbers measured on the reference implementation, against the plain reference in float64, and
//! against itself on every instruction set and number of threads.

mod common;
mod plan;

use std::sync::Arc;

use effdet_cpu::engine::{CpuEngine, CpuOptions};
use effdet_cpu::reference::ReferenceEngine;
use effdet_cpu::simd::Isa;
use effdet_model::engine::{Engine, Precision, StepLosses, StepOptions, Targets, TrainBatch};
use effdet_model::hparams::{ActType, HParams, ImageSize, IouLossKind};
use effdet_model::network::{Network, VariableKind};
use effdet_model::weights::Weights;

fn fast_engine(network: Arc<Network>) -> CpuEngine {
    CpuEngine::new(
        network,
        CpuOptions {
            threads: 2,
            isa: None,
            ..CpuOptions::default()
        },
    )
    .unwrap()
}

mod fast {
    use super::fast_engine;
    use crate::{agreement_tests, golden_tests};

    golden_tests!(fast_engine);
    agreement_tests!(fast_engine);
}

/// Everything a training step computes.
#[derive(Debug, PartialEq)]
struct Step {
    losses: StepLosses,
    gradients: Vec<f32>,
    weights: Weights,
}

fn step(network: &Arc<Network>, options: CpuOptions) -> Step {
    let mut engine = CpuEngine::new(Arc::clone(network), options).unwrap();
    let mut weights = common::golden::weights(network);
    let size = network.hparams.image_size;
    let batch = 2;
    let pixels: Vec<f32> = (0..batch * size.height * size.width * 3)
        .map(|e| common::golden::hashed(99_999, e) as f32)
        .collect();
    let anchors = network.num_anchors();
    let class = |e: usize| match common::golden::hashed(7, e) {
        s if s > 0.98 => (e % network.hparams.num_classes) as i32,
        s if s > 0.96 => -2,
        _ => -1,
    };
    let class_targets: Vec<i32> = (0..batch * anchors).map(class).collect();
    let box_targets: Vec<f32> = (0..batch * anchors * 4)
        .map(|e| {
            if class_targets[e / 4] >= 0 {
                common::golden::hashed(8, e) as f32
            } else {
                0.0
            }
        })
        .collect();
    let targets = Targets {
        class_targets: &class_targets,
        box_targets: &box_targets,
        normalizer: 37.0,
    };
    let images = effdet_model::engine::ImageBatch {
        pixels: &pixels,
        batch,
        height: size.height,
        width: size.width,
    };
    let train = TrainBatch {
        images,
        targets,
        draw_keys: &[11, 12],
    };
    let mut gradients = vec![f32::NAN; weights.trainable.len()];
    let mut losses = StepLosses::default();
    for epoch in 0..2 {
        losses = engine
            .train_step(
                &mut weights,
                &train,
                &StepOptions {
                    seed: 5,
                    epoch,
                    ..StepOptions::default()
                },
                &mut gradients,
            )
            .unwrap();
    }
    Step {
        losses,
        gradients,
        weights,
    }
}

/// A network with stochastic depth, whose maps are odd.
fn odd_network(preset: &str) -> Arc<Network> {
    let mut hparams = HParams::preset(preset).unwrap();
    hparams.image_size = ImageSize {
        height: 136,
        width: 104,
    };
    hparams.num_classes = 5;
    hparams.backbone_survival_prob = Some(0.7);
    Arc::new(Network::new(&hparams).unwrap())
}

#[test]
fn training_gives_the_same_bits_on_every_instruction_set() {
    for (preset, precision) in [
        ("d0", Precision::Fp32),
        ("lite0", Precision::Fp32),
        ("d0", Precision::Fp16),
        ("lite0", Precision::Bf16Pairs),
        ("d0", Precision::Bf16Tiles),
        ("lite0", Precision::Bf16Tiles),
    ] {
        let network = odd_network(preset);
        let run = |isa| {
            let options = CpuOptions {
                threads: 2,
                isa: Some(isa),
                precision,
                grad_checkpoint: false,
            };
            step(&network, options)
        };
        let expected = run(Isa::Portable);
        assert!(expected.gradients.iter().all(|g| g.is_finite()));
        for isa in Isa::available() {
            assert!(run(isa) == expected, "{preset} in {precision} on {isa}");
        }
    }
}

#[test]
fn training_gives_the_same_bits_with_any_number_of_threads() {
    let network = odd_network("d0");
    for precision in [
        Precision::Fp32,
        Precision::Fp16,
        Precision::Bf16Pairs,
        Precision::Bf16Tiles,
    ] {
        let run = |threads| {
            let options = CpuOptions {
                threads,
                isa: None,
                precision,
                grad_checkpoint: false,
            };
            step(&network, options)
        };
        let expected = run(1);
        for threads in [2, 3, 5] {
            assert!(run(threads) == expected, "{threads} threads in {precision}");
        }
    }
}

#[test]
fn blocks_that_are_computed_again_give_the_same_bits() {
    for preset in ["d0", "d1", "lite0"] {
        let network = odd_network(preset);
        for precision in [
            Precision::Fp32,
            Precision::Fp16,
            Precision::Bf16Pairs,
            Precision::Bf16Tiles,
        ] {
            let [kept, again] = [false, true].map(|grad_checkpoint| {
                let options = CpuOptions {
                    threads: 2,
                    isa: None,
                    precision,
                    grad_checkpoint,
                };
                step(&network, options)
            });
            assert!(kept == again, "{preset} in {precision}");
        }
    }
}

/// Distances of gradients from float64: of all together, and the median over the variables.
fn gradient_errors(network: &Network, got: &[f32], expected: &[f32]) -> (f64, f64) {
    let distance = |range: std::ops::Range<usize>| {
        let pairs = || got[range.clone()].iter().zip(&expected[range.clone()]);
        let size: f64 = pairs().map(|(_, &e)| f64::from(e).powi(2)).sum();
        let off: f64 = pairs()
            .map(|(&g, &e)| (f64::from(g) - f64::from(e)).powi(2))
            .sum();
        (off / size).sqrt()
    };
    let mut each: Vec<f64> = (network.variables.iter())
        .filter(|v| v.kind == VariableKind::Trainable)
        .map(|v| distance(v.range()))
        .filter(|d| d.is_finite())
        .collect();
    each.sort_by(f64::total_cmp);
    (distance(0..got.len()), each[each.len() / 2])
}

/// Gradients from float64 in relative distance, with weights as at the start of a run and pixels drawn at random: fp32 8e-6, fp16
/// and bf16 0.09, other images 1.5. The network multiplies rounding by hundreds here, batch norm over maps of few cells most of
/// all; what halves may cost is what their digits are fewer, and far less than what the choice of images does.
#[test]
fn gradients_in_half_precision_lose_no_more_than_the_digits_they_lack() {
    let mut hparams = HParams::preset("d0").unwrap();
    hparams.image_size = ImageSize::square(128);
    let network = Arc::new(Network::new(&hparams).unwrap());
    let mut reference = ReferenceEngine::<f64>::new(Arc::clone(&network)).unwrap();
    let draw = Draw {
        weights: Weights::init(&network.variables, 1),
        batch: 4,
        pixels: 99_999,
    };
    let (_, expected) = draw.step(&network, &mut reference);
    let other = Draw {
        pixels: 99_998,
        ..draw.clone()
    };
    let (_, of_other) = other.step(&network, &mut fast_engine(Arc::clone(&network)));
    let (other, _) = gradient_errors(&network, &of_other, &expected);
    println!("other images: gradient distance {other:.2}");
    let errors = [
        Precision::Fp32,
        Precision::Fp16,
        Precision::Bf16Pairs,
        Precision::Bf16Tiles,
    ]
    .map(|precision| {
        let options = CpuOptions {
            precision,
            ..CpuOptions::default()
        };
        let mut engine = CpuEngine::new(Arc::clone(&network), options).unwrap();
        let (_, got) = draw.step(&network, &mut engine);
        let (all, median) = gradient_errors(&network, &got, &expected);
        println!("{precision}: gradient distance {all:.1e}, median over variables {median:.1e}");
        all
    });
    let [full, half, brain, tiles] = errors;
    assert!(full < 3e-5, "{full}");
    // float16 has 13 bits less than float32, bfloat16 16; float16 rounds tensors that float32 does not round again.
    assert!(half < full * 2f64.powi(14) && half < 0.15, "{half}");
    assert!(brain < full * 2f64.powi(16) && brain < 0.15, "{brain}");
    assert!(tiles < full * 2f64.powi(16) && tiles < 0.15, "{tiles}");
    assert!(other > 1.0, "{other}");
}

#[test]
fn a_loss_scale_multiplies_the_gradients_and_nothing_else() {
    let network = odd_network("lite0");
    let mut results = [1.0, 1024.0].map(|loss_scale| {
        let mut engine = fast_engine(Arc::clone(&network));
        scaled_step(&network, &mut engine, &golden_draw(&network), loss_scale)
    });
    results[1].1.iter_mut().for_each(|gradient| *gradient /= 1024.0);
    assert!(results[0] == results[1]);
}

#[test]
fn buffers_of_another_size_are_refused_and_nothing_changes() {
    let network = odd_network("lite0");
    let mut engine = fast_engine(Arc::clone(&network));
    let mut weights = Weights::init(&network.variables, 1);
    let before = weights.clone();
    let pixels = vec![0.0; 136 * 104 * 3];
    let images = effdet_model::engine::ImageBatch {
        pixels: &pixels,
        batch: 1,
        height: 136,
        width: 104,
    };
    let targets = Targets {
        class_targets: &[],
        box_targets: &[],
        normalizer: 1.0,
    };
    let train = TrainBatch {
        images,
        targets,
        draw_keys: &[0],
    };
    let mut gradients = vec![0.0; weights.trainable.len()];
    let error = engine
        .train_step(&mut weights, &train, &StepOptions::default(), &mut gradients)
        .unwrap_err();
    assert!(error.to_string().contains("class targets"), "{error}");
    assert_eq!(weights, before);
}

/// The rare IoU losses against the plain reference in float64.
#[test]
fn iou_losses_agree_with_the_reference_in_float64() {
    for kind in [IouLossKind::Giou, IouLossKind::Ciou] {
        let mut hparams = HParams::preset("lite0").unwrap();
        hparams.image_size = ImageSize::square(256);
        hparams.num_classes = 2;
        hparams.act_type = ActType::Swish;
        hparams.iou_loss_type = Some(kind);
        hparams.iou_loss_weight = 3.0;
        let network = Arc::new(Network::new(&hparams).unwrap());
        let mut reference = ReferenceEngine::<f64>::new(Arc::clone(&network)).unwrap();
        let draw = golden_draw(&network);
        let expected = draw.step(&network, &mut reference);
        let got = draw.step(&network, &mut fast_engine(Arc::clone(&network)));
        assert!(expected.0.box_iou_loss > 0.0);
        for (got, expected) in [
            (got.0.box_iou_loss, expected.0.box_iou_loss),
            (got.0.det_loss, expected.0.det_loss),
        ] {
            assert!(
                (got - expected).abs() <= 1e-5 * expected.abs(),
                "{kind}: {got}, {expected} expected"
            );
        }
        // The predicting convolution sees the loss at first hand; farther down, small batch norms amplify rounding.
        for name in ["depthwise_kernel", "pointwise_kernel", "bias"] {
            let range = network
                .variables
                .find(&format!("box_net/box-predict/{name}"))
                .unwrap()
                .range();
            let pairs = || got.1[range.clone()].iter().zip(&expected.1[range.clone()]);
            let size: f64 = pairs().map(|(_, &e)| f64::from(e).powi(2)).sum();
            let off: f64 = pairs()
                .map(|(&g, &e)| (f64::from(g) - f64::from(e)).powi(2))
                .sum();
            let distance = (off / size).sqrt();
            println!("{kind} {name}: gradient distance {distance:.1e}");
            assert!(distance < 1e-4, "{kind} {name}: gradient distance {distance}");
        }
    }
}

/// What a step starts from.
#[derive(Clone)]
struct Draw {
    weights: Weights,
    batch: usize,
    /// Key of the pixels.
    pixels: u64,
}

impl Draw {
    /// Losses and gradients of a step, scaled as float16 needs it on the way.
    fn step(&self, network: &Arc<Network>, engine: &mut dyn Engine) -> (StepLosses, Vec<f32>) {
        let loss_scale = 1024.0;
        let (losses, mut gradients) = scaled_step(network, engine, self, loss_scale);
        gradients.iter_mut().for_each(|gradient| *gradient /= loss_scale);
        (losses, gradients)
    }
}

/// The weights and pixels of the golden file.
fn golden_draw(network: &Network) -> Draw {
    Draw {
        weights: common::golden::weights(network),
        batch: 2,
        pixels: 99_999,
    }
}

fn scaled_step(
    network: &Arc<Network>,
    engine: &mut dyn Engine,
    draw: &Draw,
    loss_scale: f32,
) -> (StepLosses, Vec<f32>) {
    let (mut weights, batch) = (draw.weights.clone(), draw.batch);
    let size = network.hparams.image_size;
    let pixels: Vec<f32> = (0..batch * size.height * size.width * 3)
        .map(|e| common::golden::hashed(draw.pixels, e) as f32)
        .collect();
    let anchors = network.num_anchors();
    let class_targets: Vec<i32> = (0..batch * anchors)
        .map(|e| if e % 97 == 5 { 1 } else { -1 })
        .collect();
    let box_targets: Vec<f32> = (0..4 * batch * anchors)
        .map(|e| {
            if class_targets[e / 4] >= 0 {
                0.4 * common::golden::hashed(8, e) as f32
            } else {
                0.0
            }
        })
        .collect();
    let images = effdet_model::engine::ImageBatch {
        pixels: &pixels,
        batch,
        height: size.height,
        width: size.width,
    };
    let targets = Targets {
        class_targets: &class_targets,
        box_targets: &box_targets,
        normalizer: 11.0,
    };
    let draw_keys: Vec<u64> = (1..=batch as u64).collect();
    let train = TrainBatch {
        images,
        targets,
        draw_keys: &draw_keys,
    };
    let mut gradients = vec![0.0; weights.trainable.len()];
    let options = StepOptions {
        loss_scale,
        ..StepOptions::default()
    };
    let losses = engine
        .train_step(&mut weights, &train, &options, &mut gradients)
        .unwrap();
    (losses, gradients)
}

#[test]
fn weights_and_images_are_generated_as_for_the_golden_file() {
    common::golden::check_generator();
}
