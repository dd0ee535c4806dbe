//! Samples are prepared in memory that is kept.

use std::path::PathBuf;

use effdet_data::augment::AugmentConfig;
use effdet_data::batch::{Batch, Preparation, SampleKey, Scratch};
use effdet_data::dataset::{Example, ImageSource, ObjectAnnotation};
use effdet_data::preprocess::PreprocessConfig;
use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::assign::Assigner;
use effdet_model::hparams::{HParams, ImageSize};
use effdet_model::label_map::{CategoryId, LabelMap};

fn example(index: usize, name: &str) -> Example {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("src/jpeg/fixtures/{name}.jpg"));
    let object = ObjectAnnotation {
        box_xywh_px: [4.0, 3.0, 40.0, 30.0],
        category: CategoryId(1),
        area: 1200.0,
        is_crowd: false,
        difficult: false,
    };
    Example {
        image_id: index as i64,
        source_id: index.to_string(),
        file_name: name.to_owned(),
        width: 75,
        height: 53,
        objects: vec![object],
        source: ImageSource::File(file),
    }
}

#[test]
fn a_training_sample_allocates_nothing_once_its_buffers_have_grown() {
    let mut hparams = HParams::preset("d0").unwrap();
    hparams.image_size = ImageSize::square(128);
    let preparation = Preparation {
        preprocess: PreprocessConfig::new(&hparams),
        augment: AugmentConfig::new(&hparams),
        decode: Default::default(),
        max_encoded_bytes: 1 << 20,
        label_map: LabelMap::from_names(["thing"]),
        skip_crowd: true,
        seed: 5,
        cache: None,
    };
    let assigner = Assigner::new(&Anchors::new(&AnchorConfig::from(&hparams)).unwrap());
    let names = ["420", "422_restart", "444_harsh", "grey"];
    let examples: Vec<Example> = names
        .iter()
        .enumerate()
        .map(|(index, name)| example(index, name))
        .collect();
    let (mut batch, mut scratch) = (Batch::default(), Scratch::default());
    let mut prepare = |assigner: Option<&Assigner>| {
        for pass in 0..8 {
            preparation.start(&mut batch, examples.len(), assigner);
            for index in 0..examples.len() as u64 {
                let key = SampleKey { pass, index };
                preparation
                    .append(&mut batch, &examples, key, assigner, &mut scratch)
                    .unwrap();
            }
        }
    };
    for assigner in [Some(&assigner), None] {
        prepare(assigner);
        let counted = allocation_counter::measure(|| prepare(assigner));
        assert_eq!(counted.count_total, 0, "training: {}", assigner.is_some());
    }
    // The counter counts.
    let counted = allocation_counter::measure(|| drop(std::hint::black_box(vec![1u8; 100])));
    assert_eq!(counted.count_total, 1);
}
