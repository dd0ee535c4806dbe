//! Where a number that is none began, with the fast engine.

use std::sync::Arc;

use effdet_cpu::engine::{CpuEngine, CpuOptions};
use effdet_data::batch::Batch;
use effdet_model::hparams::{HParams, ImageSize};
use effdet_model::network::{Network, VariableKind};
use effdet_model::weights::Weights;
use effdet_train::guard::first_non_finite;

const SIDE: usize = 64;

#[test]
fn numbers_that_are_none_are_found_where_they_begin() {
    let mut hparams = HParams::preset("efficientdet-d0").unwrap();
    hparams.image_size = ImageSize::square(SIDE);
    hparams.max_level = 5;
    let network = Arc::new(Network::new(&hparams).unwrap());
    let table = &network.variables;
    let mut engine = CpuEngine::new(Arc::clone(&network), CpuOptions::default()).unwrap();
    let (weights, anchors) = (Weights::init(table, 1), network.num_anchors());
    let batch = Batch {
        images: (0..2 * SIDE * SIDE * 3).map(|i| (i % 89) as f32 / 89.0).collect(),
        height: SIDE,
        width: SIDE,
        class_targets: vec![-1; 2 * anchors],
        box_targets: vec![0.0; 2 * anchors * 4],
        positives: vec![0; 2],
        draw_keys: vec![0; 2],
        image_ids: vec![17, 42],
        ..Batch::default()
    };
    let gradients = vec![0.0; weights.trainable.len()];
    let mut place = |weights: &Weights, batch: &Batch, gradients: &[f32]| {
        first_non_finite(&mut engine, table, weights, batch, gradients).unwrap()
    };

    let mut input = batch.clone();
    input.images[SIDE * SIDE * 3 + 5] = f32::NAN;
    assert_eq!(
        place(&weights, &input, &gradients),
        "the pixels of the images [42]"
    );

    let mut target = batch.clone();
    target.box_targets[1] = f32::INFINITY;
    assert_eq!(
        place(&weights, &target, &gradients),
        "the box targets of the images [17]"
    );

    let variable = table
        .iter()
        .filter(|v| v.kind == VariableKind::Trainable)
        .nth(40)
        .unwrap();
    let mut broken = weights.clone();
    broken.trainable[variable.range().start] = f32::NEG_INFINITY;
    assert_eq!(
        place(&broken, &batch, &gradients),
        format!("the weights, {}", variable.name)
    );

    // Finite weights whose products are not.
    let mut large = weights.clone();
    large.trainable[variable.range()].fill(1e38);
    let found = place(&large, &batch, &gradients);
    assert!(found.starts_with("the forward pass, output "), "{found}");

    let mut gradient = gradients.clone();
    gradient[0] = f32::NAN;
    gradient[variable.range().start] = f32::NAN;
    assert_eq!(
        place(&weights, &batch, &gradient),
        format!("the backward pass, gradient of {}", variable.name)
    );
    assert!(place(&weights, &batch, &gradients).starts_with("the loss"));
}
