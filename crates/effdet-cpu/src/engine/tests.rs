//! The engine's memory.

use std::sync::Arc;

use effdet_model::engine::{Engine, ImageBatch, Precision, StepOptions, Targets, TrainBatch};
use effdet_model::hparams::{HParams, ImageSize};
use effdet_model::network::Network;
use effdet_model::weights::Weights;

use super::{CpuEngine, CpuOptions, MemoryEstimate, Training};

fn small_network(preset: &str) -> Arc<Network> {
    let mut hparams = HParams::preset(preset).unwrap();
    hparams.image_size = ImageSize::square(128);
    hparams.num_classes = 3;
    Arc::new(Network::new(&hparams).unwrap())
}

/// Gradients of a step on flat grey images.
fn step(engine: &mut CpuEngine, network: &Network, images: usize) -> Vec<f32> {
    let mut weights = Weights::init(&network.variables, 1);
    let anchors = network.num_anchors();
    let pixels = vec![0.25; images * 128 * 128 * 3];
    let class_targets: Vec<i32> = (0..images * anchors).map(|i| (i % 50) as i32 / 48 - 1).collect();
    let train = TrainBatch {
        images: ImageBatch {
            pixels: &pixels,
            batch: images,
            height: 128,
            width: 128,
        },
        targets: Targets {
            class_targets: &class_targets,
            box_targets: &vec![0.5; images * anchors * 4],
            normalizer: 5.0,
        },
        draw_keys: &vec![3; images],
    };
    let mut gradients = vec![0.0; weights.trainable.len()];
    engine
        .train_step(&mut weights, &train, &StepOptions::default(), &mut gradients)
        .unwrap();
    gradients
}

/// Bytes of the buffers that a step has allocated.
fn allocated(engine: &CpuEngine) -> usize {
    match &engine.training {
        Training::Full(layers) => layers.as_ref().unwrap().clock.bytes(),
        Training::Half(layers) => layers.as_ref().unwrap().clock.bytes(),
        Training::Brain(layers) => layers.as_ref().unwrap().clock.bytes(),
    }
}

#[test]
fn predicted_memory_is_what_a_step_allocates() {
    for (preset, images, precision, grad_checkpoint) in [
        ("d0", 2, Precision::Fp32, false),
        ("d0", 2, Precision::Fp32, true),
        ("d0", 1, Precision::Bf16Pairs, false),
        ("lite1", 1, Precision::Fp16, true),
        ("d1", 3, Precision::Fp32, false),
    ] {
        let network = small_network(preset);
        let options = CpuOptions {
            precision,
            grad_checkpoint,
            ..CpuOptions::default()
        };
        let mut engine = CpuEngine::new(Arc::clone(&network), options).unwrap();
        let estimate = engine.training_memory(images);
        step(&mut engine, &network, images);
        assert_eq!(estimate.buffer_bytes, allocated(&engine));
        assert_eq!(
            estimate.partial_bytes,
            engine.executor.workspace_bytes(),
            "{preset}"
        );
        // Sharing pays: the owners together ask for more than there is.
        let asked: usize = estimate.buffers.iter().map(|owned| owned.bytes).sum();
        assert!(asked > estimate.buffer_bytes * 5 / 4);
    }
}

#[test]
fn halves_take_half_the_memory_of_wide_tensors() {
    let network = small_network("d0");
    let [full, half] = [Precision::Fp32, Precision::Fp16].map(|precision| {
        let options = CpuOptions {
            precision,
            ..CpuOptions::default()
        };
        let engine = CpuEngine::new(Arc::clone(&network), options).unwrap();
        engine.training_memory(4)
    });
    for (full, half) in full.buffers.iter().zip(&half.buffers) {
        let expected = if full.owner.contains("wide") { 0.5 } else { 1.0 };
        let share = half.bytes as f64 / full.bytes as f64;
        assert!((share - expected).abs() < 0.01, "{}: {share}", full.owner);
    }
}

#[test]
fn blocks_that_are_computed_again_keep_nothing_wide() {
    let network = small_network("d0");
    let [kept, again] = [false, true].map(|grad_checkpoint| {
        let options = CpuOptions {
            grad_checkpoint,
            ..CpuOptions::default()
        };
        let engine = CpuEngine::new(Arc::clone(&network), options).unwrap();
        engine.training_memory(4)
    });
    let wide = |estimate: &MemoryEstimate| -> usize {
        let wide = estimate
            .buffers
            .iter()
            .filter(|owned| owned.owner.contains("wide activations"));
        wide.map(|owned| owned.at_peak).sum()
    };
    assert!(wide(&again) < wide(&kept) / 2, "{again:?}");
    assert!(again.buffer_bytes < kept.buffer_bytes);
}

#[test]
fn nothing_a_step_computes_depends_on_what_the_memory_held() {
    let network = small_network("d1");
    let mut engine = CpuEngine::new(Arc::clone(&network), CpuOptions::default()).unwrap();
    let first = step(&mut engine, &network, 2);
    assert_eq!(step(&mut engine, &network, 2), first);
}
