//! The inference plan against the plain reference in float64 and against itself on every instruction set and number of
//! threads. What an engine infers goes through a plan, so the golden numbers hold for it too.

use std::sync::Arc;

use effdet_cpu::engine::{CpuEngine, CpuOptions};
use effdet_cpu::inference::InferencePlan;
use effdet_cpu::reference::ReferenceEngine;
use effdet_cpu::simd::Isa;
use effdet_model::engine::{Engine, EngineError, HeadOutputs, ImageBatch, Precision};
use effdet_model::hparams::{ActType, FusionMethod, HParams, ImageSize, Profile};
use effdet_model::network::Network;
use effdet_model::weights::Weights;

use crate::common::golden::{self, hashed};

const TWO_THREADS: CpuOptions = CpuOptions {
    threads: 2,
    isa: None,
    precision: Precision::Fp32,
    grad_checkpoint: false,
};

fn network(preset: &str, (height, width): (usize, usize), change: impl Fn(&mut HParams)) -> Arc<Network> {
    let mut hparams = HParams::preset(preset).unwrap();
    hparams.num_classes = 5;
    hparams.image_size = ImageSize { height, width };
    change(&mut hparams);
    Arc::new(Network::new(&hparams).unwrap())
}

fn pixels(network: &Network, batch: usize) -> Vec<f32> {
    let size = network.hparams.image_size;
    (0..batch * size.height * size.width * 3)
        .map(|e| hashed(77, e) as f32)
        .collect()
}

fn batch_of<'a>(network: &Network, pixels: &'a [f32], batch: usize) -> ImageBatch<'a> {
    let size = network.hparams.image_size;
    ImageBatch {
        pixels,
        batch,
        height: size.height,
        width: size.width,
    }
}

fn infer(network: &Arc<Network>, weights: &Weights, batch: usize, options: CpuOptions) -> HeadOutputs {
    let mut plan = InferencePlan::new(Arc::clone(network), weights, options).unwrap();
    let mut outputs = HeadOutputs::default();
    let pixels = pixels(network, batch);
    plan.infer(&batch_of(network, &pixels, batch), &mut outputs)
        .unwrap();
    outputs
}

/// The largest distance of a head output's tensor from the reference in float64.
fn distance(outputs: &HeadOutputs, expected: &HeadOutputs) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let distance = |values: &[f32], expected: &[f32]| {
        assert_eq!(values.len(), expected.len());
        let off = (values.iter().zip(expected)).map(|(&a, &e)| f64::from(a) - f64::from(e));
        norm(&mut { off }) / norm(&mut expected.iter().map(|&e| f64::from(e)))
    };
    (outputs.levels.iter().zip(&expected.levels))
        .map(|(output, expected)| {
            assert_eq!((output.height, output.width), (expected.height, expected.width));
            distance(&output.class_logits, &expected.class_logits)
                .max(distance(&output.box_codes, &expected.box_codes))
        })
        .fold(0.0, f64::max)
}

/// The golden weights with all kernels multiplied by `gain`: deep networks would amplify rounding beyond use.
fn calm_weights(network: &Network, gain: f32) -> Weights {
    let mut weights = golden::weights(network);
    let is_kernel = |leaf: &str| leaf.ends_with("kernel");
    for variable in network
        .variables
        .iter()
        .filter(|variable| is_kernel(variable.leaf()))
    {
        weights.trainable[variable.range()]
            .iter_mut()
            .for_each(|value| *value *= gain);
    }
    weights
}

/// Compares a plan with the reference in float64, to three times what rounding makes of the plain reference in float32.
fn check(what: &str, network: &Arc<Network>, batch: usize, gain: f32) {
    let weights = calm_weights(network, gain);
    let pixels = pixels(network, batch);
    let images = batch_of(network, &pixels, batch);
    let run = |engine: &mut dyn Engine| {
        let mut outputs = HeadOutputs::default();
        engine.infer(&weights, &images, &mut outputs).unwrap();
        outputs
    };
    let expected = run(&mut ReferenceEngine::<f64>::new(Arc::clone(network)).unwrap());
    let rounded = run(&mut ReferenceEngine::<f32>::new(Arc::clone(network)).unwrap());
    let got = distance(&infer(network, &weights, batch, TWO_THREADS), &expected);
    let rounding = distance(&rounded, &expected);
    println!("{what}: {got:.1e} from float64, the reference in float32 {rounding:.1e}");
    assert!(rounding < 1e-4, "{what}: ill-conditioned, {rounding:.1e}");
    assert!(
        got < 1e-6_f64.max(3.0 * rounding),
        "{what}: {got:.1e} from float64, the reference in float32 {rounding:.1e}"
    );
}

#[test]
fn every_preset_agrees_with_the_reference_in_float64() {
    let presets = [
        ("d0", (128, 128)),
        ("d1", (136, 100)),
        ("d2", (128, 96)),
        ("d3", (96, 96)),
        ("d4", (96, 96)),
        ("d5", (64, 64)),
        ("d6", (64, 64)),
        ("d7x", (64, 64)),
        ("lite0", (160, 160)),
        ("lite1", (96, 128)),
        ("lite2", (112, 112)),
        ("lite3", (96, 96)),
        ("lite3x", (96, 96)),
        ("lite4", (64, 64)),
    ];
    for (preset, size) in presets {
        let gain = if preset == "d0" { 1.0 } else { 0.8 };
        check(preset, &network(preset, size, |_| {}), 1, gain);
    }
}

#[test]
fn every_activation_and_fusion_agrees_with_the_reference_in_float64() {
    let acts = [
        ActType::Swish,
        ActType::Hswish,
        ActType::Relu,
        ActType::Relu6,
        ActType::Mish,
        ActType::Srelu,
        ActType::Identity,
    ];
    let fusions = [
        FusionMethod::FastAttn,
        FusionMethod::Attn,
        FusionMethod::Sum,
        FusionMethod::ChannelAttn,
        FusionMethod::ChannelFastAttn,
    ];
    for (index, act) in acts.into_iter().enumerate() {
        let network = network("d0", (100, 76), |hparams| {
            hparams.act_type = act;
            hparams.fpn_weight_method = Some(fusions[index % fusions.len()]);
            hparams.fusion_relu = index % 2 == 0;
            hparams.rescale_input = index % 3 == 0;
            hparams.apply_bn_for_resampling = index != 1;
            hparams.survival_prob = (index == 2).then_some(0.8);
            if index == 3 {
                hparams.set_profile(Profile::Google);
            }
        });
        let gain = if act == ActType::Identity { 0.7 } else { 1.0 };
        check(&format!("{act:?}"), &network, 2, gain);
    }
}

#[test]
fn odd_image_sizes_agree_with_the_reference_in_float64() {
    for draw in 0..12 {
        let side = |key: u64| 65 + (95.0 * (1.0 + hashed(key, draw))) as usize;
        let (height, width) = (side(1), side(2));
        let preset = ["d0", "lite0"][draw % 2];
        let mut hparams = HParams::preset(preset).unwrap();
        hparams.image_size = ImageSize { height, width };
        if Network::new(&hparams).is_err() {
            // Larger on one axis only, at some level.
            continue;
        }
        check(
            &format!("{preset} {height}x{width}"),
            &network(preset, (height, width), |_| {}),
            1,
            1.0,
        );
    }
}

#[test]
fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
    for (preset, size) in [("d0", (136, 104)), ("d1", (67, 99)), ("lite0", (96, 96))] {
        let network = network(preset, size, |_| {});
        let weights = golden::weights(&network);
        let run = |threads, isa| {
            infer(
                &network,
                &weights,
                2,
                CpuOptions {
                    threads,
                    isa: Some(isa),
                    ..CpuOptions::default()
                },
            )
        };
        let expected = run(1, Isa::Portable);
        for isa in Isa::available() {
            for threads in [1, 2, 3] {
                assert!(
                    run(threads, isa) == expected,
                    "{preset} on {isa} with {threads} threads"
                );
            }
        }
    }
}

#[test]
fn an_image_gives_the_same_bits_in_any_batch() {
    let network = network("d0", (96, 96), |_| {});
    let weights = golden::weights(&network);
    let mut plan = InferencePlan::new(Arc::clone(&network), &weights, TWO_THREADS).unwrap();
    let pixels = pixels(&network, 3);
    let (mut together, mut alone) = (HeadOutputs::default(), HeadOutputs::default());
    plan.infer(&batch_of(&network, &pixels, 3), &mut together)
        .unwrap();
    for image in 0..3 {
        let len = pixels.len() / 3;
        plan.infer(&batch_of(&network, &pixels[image * len..][..len], 1), &mut alone)
            .unwrap();
        for (together, alone) in together.levels.iter().zip(&alone.levels) {
            let logits = alone.class_logits.len();
            assert_eq!(
                together.class_logits[image * logits..][..logits],
                alone.class_logits
            );
            let codes = alone.box_codes.len();
            assert!(together.box_codes[image * codes..][..codes] == alone.box_codes);
        }
    }
}

#[test]
fn an_engine_notices_when_weights_change() {
    let network = network("lite0", (64, 64), |_| {});
    let mut weights = golden::weights(&network);
    let mut engine = CpuEngine::new(Arc::clone(&network), TWO_THREADS).unwrap();
    let pixels = pixels(&network, 1);
    let images = batch_of(&network, &pixels, 1);
    let mut run = |weights: &Weights| {
        let mut outputs = HeadOutputs::default();
        engine.infer(weights, &images, &mut outputs).unwrap();
        outputs
    };
    let before = run(&weights);
    assert!(run(&weights) == before);
    let bias = network
        .variables
        .find("class_net/class-predict/bias")
        .unwrap()
        .offset;
    weights.trainable[bias] += 1.0;
    let after = run(&weights);
    assert!(after != before);
    assert!(after == infer(&network, &weights, 1, TWO_THREADS));
    weights.trainable[bias] -= 1.0;
    let mean = network.variables.find("stem_bn/moving_mean").unwrap().offset;
    weights.statistics[mean] += 1.0;
    assert!(run(&weights) != before, "a moving statistic counts");
}

#[test]
fn memory_grows_to_an_arena_per_thread_and_stays_below_the_sum_of_activations() {
    let network = network("d0", (512, 512), |_| {});
    let weights = Weights::init(&network.variables, 0);
    let plan = InferencePlan::new(Arc::clone(&network), &weights, TWO_THREADS).unwrap();
    let memory = plan.memory(2, 1);
    let parameters = 4 * (weights.trainable.len() + weights.statistics.len());
    assert!(memory.weights_bytes < parameters * 5 / 4, "{memory:?}");
    // The widest tensor is that of stack_1/block_1, 128·128·144 values; its input and output are alive beside it.
    let widest = 4 * 128 * 128 * 144;
    assert!(
        (widest..widest * 3 / 2).contains(&memory.activations_bytes),
        "{memory:?}"
    );
    assert!(memory.scratch_bytes < 2 << 20, "{memory:?}");
    for (threads, images, arenas) in [
        (1, 8, 1),
        (2, 2, 2),
        (2, 9, 2),
        (4, 3, 1),
        (4, 64, 4),
        (256, 256, 1),
    ] {
        let bytes = plan.memory(threads, images).activations_bytes;
        assert_eq!(bytes, arenas * memory.activations_bytes, "{images} on {threads}");
    }
}

#[test]
fn images_and_weights_of_another_size_are_refused() {
    let network = network("lite0", (64, 64), |_| {});
    let weights = Weights::init(&network.variables, 0);
    let mut plan = InferencePlan::new(Arc::clone(&network), &weights, TWO_THREADS).unwrap();
    let pixels = vec![0.0; 64 * 64 * 3];
    let images = ImageBatch {
        pixels: &pixels,
        batch: 1,
        height: 32,
        width: 128,
    };
    let error = plan.infer(&images, &mut HeadOutputs::default()).unwrap_err();
    assert!(matches!(error, EngineError::Shape { .. }), "{error}");
    let other = Weights {
        trainable: vec![0.0; 3],
        statistics: Vec::new(),
    };
    let error = InferencePlan::new(network, &other, TWO_THREADS).unwrap_err();
    assert!(error.to_string().contains("trainable weights"), "{error}");
}
