//! Gradients that are handed out while the backward pass runs.

use std::sync::{Arc, mpsc};

use effdet_cpu::engine::{CpuEngine, CpuOptions};
use effdet_model::engine::{Engine, ImageBatch, StepOptions, Targets, TrainBatch};
use effdet_model::hparams::{HParams, ImageSize};
use effdet_model::network::Network;
use effdet_model::weights::Weights;

const SIDE: usize = 128;

#[test]
fn gradients_in_parts_are_those_of_a_whole_step_and_come_from_the_end() {
    for model in ["d0", "d2", "lite0"] {
        let mut hparams = HParams::preset(model).unwrap();
        hparams.image_size = ImageSize::square(SIDE);
        let network = Arc::new(Network::new(&hparams).unwrap());
        let mut engine = CpuEngine::new(Arc::clone(&network), CpuOptions::default()).unwrap();
        let anchors = network.num_anchors();
        let pixels: Vec<f32> = (0..SIDE * SIDE * 3).map(|i| (i % 97) as f32 / 97.0).collect();
        let classes: Vec<i32> = (0..anchors).map(|i| if i % 50 == 0 { 3 } else { -1 }).collect();
        let batch = TrainBatch {
            images: ImageBatch {
                pixels: &pixels,
                batch: 1,
                height: SIDE,
                width: SIDE,
            },
            targets: Targets {
                class_targets: &classes,
                box_targets: &vec![0.25; anchors * 4],
                normalizer: 30.0,
            },
            draw_keys: &[7],
        };
        let options = StepOptions::default();
        let start = Weights::init(&network.variables, 1);

        let mut weights = start.clone();
        let mut whole = vec![f32::NAN; weights.trainable.len()];
        let losses = engine
            .train_step(&mut weights, &batch, &options, &mut whole)
            .unwrap();

        let mut weights_in_parts = start.clone();
        let mut buffer = vec![f32::NAN; whole.len()];
        let (sender, finished) = mpsc::channel();
        let losses_in_parts =
            engine.train_step_in_parts(&mut weights_in_parts, &batch, &options, &mut buffer, sender);
        assert_eq!(losses_in_parts.unwrap(), losses);
        assert_eq!(weights_in_parts, weights, "moving statistics");
        let mut end = whole.len();
        let mut parts = 0;
        for part in finished {
            let values = &whole[end - part.len()..end];
            assert_eq!(part, values, "{model}: values {} to {end}", end - part.len());
            (end, parts) = (end - part.len(), parts + 1);
        }
        assert_eq!(end, 0, "{model}: values that were not handed out");
        assert!(parts > 3, "{model}: {parts} parts");
    }
}
