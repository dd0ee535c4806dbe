//! The engine's memory.

use std::sync::Arc;

use effdet_model::engine::{Engine, ImageBatch, StepOptions, Targets, TrainBatch};
use effdet_model::hparams::{HParams, ImageSize};
use effdet_model::network::Network;
use effdet_model::weights::Weights;

use super::{CpuEngine, CpuOptions};

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

#[test]
fn predicted_memory_is_what_a_step_allocates() {
    for (preset, images) in [("d0", 2), ("lite1", 1), ("d1", 3)] {
        let network = small_network(preset);
        let mut engine = CpuEngine::new(Arc::clone(&network), CpuOptions::default()).unwrap();
        let estimate = engine.training_memory(images);
        step(&mut engine, &network, images);
        let layers = engine.training.as_ref().unwrap();
        assert_eq!(estimate.buffer_bytes.next_multiple_of(4), layers.clock.bytes());
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
fn nothing_a_step_computes_depends_on_what_the_memory_held() {
    let network = small_network("d1");
    let mut engine = CpuEngine::new(Arc::clone(&network), CpuOptions::default()).unwrap();
    let first = step(&mut engine, &network, 2);
    assert_eq!(step(&mut engine, &network, 2), first);
}
