//! Checkpoints of released format versions stay readable.

use std::fs;
use std::path::Path;

use crate::common::FILES;
use effdet_ckpt::{CheckpointState, CheckpointStore, ClassEntry, LossScaleState, Snapshot};
use effdet_model::hparams::Profile;
use effdet_model::network::{Initializer, Variable, VariableKind, VariableTable};
use effdet_model::weights::Weights;
use serde_json::json;

fn table() -> VariableTable {
    let variable = |name: &str, shape: &[usize], kind| Variable {
        name: name.to_owned(),
        shape: shape.to_vec(),
        kind,
        offset: 0,
        len: shape.iter().product(),
        initializer: Initializer::Constant(0.0),
        object_key: String::new(),
        upstream_name: String::new(),
    };
    VariableTable::new(vec![
        variable("stem/kernel", &[1, 1, 2, 3], VariableKind::Trainable),
        variable("stem/moving_mean", &[3], VariableKind::Statistic),
        variable("fnode0/WSM", &[], VariableKind::Trainable),
    ])
}

fn state() -> CheckpointState {
    CheckpointState {
        step: 42,
        epoch: 1,
        sample_position: 17,
        model: "efficientdet-d0".to_owned(),
        profile: Profile::Google,
        hparams: json!({"learning_rate": 0.08, "num_classes": 2}),
        class_map: vec![ClassEntry {
            id: 7,
            name: "circle".to_owned(),
        }],
        data_fingerprint: "d".to_owned(),
        config_hash: "c".to_owned(),
        loss_scale: Some(LossScaleState {
            scale: 1024.0,
            clean_steps: 3,
            skipped_steps: 1,
        }),
        metric: Some(0.3944444444444444),
        extra: json!({"best": [1, 2]}),
    }
}

fn weights(offset: f32) -> Weights {
    Weights {
        trainable: (0..7).map(|i| i as f32 / 7.0 + offset).collect(),
        statistics: vec![offset, -0.0, f32::MIN_POSITIVE],
    }
}

/// `fixtures/v1` was written by this function when version 1 was current.
fn save(dir: &Path) {
    CheckpointStore::new(dir)
        .save(&Snapshot {
            state: &state(),
            table: &table(),
            weights: &weights(1.0),
            ema: Some(&weights(2.0)),
            slots: &[("momentum", &weights(3.0).trainable)],
        })
        .unwrap();
}

#[test]
fn version_1_is_read() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1/step-00000042");
    let loaded = CheckpointStore::load(&fixture, &table()).unwrap();
    assert_eq!(loaded.state, state());
    assert_eq!(loaded.weights, weights(1.0));
    assert_eq!(loaded.ema, Some(weights(2.0)));
    assert_eq!(loaded.slots["momentum"], weights(3.0).trainable);
}

#[test]
fn version_1_is_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path());
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1/step-00000042");
    for file in FILES {
        assert!(
            fs::read(fixture.join(file)).unwrap()
                == fs::read(dir.path().join("step-00000042").join(file)).unwrap(),
            "{file} differs: a change of the format needs a new version and a new fixture beside this one"
        );
    }
}
