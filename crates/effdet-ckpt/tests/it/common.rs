//! A small part of a real network, and a snapshot of it.

use std::path::{Path, PathBuf};

use effdet_ckpt::{CheckpointState, CheckpointStore, CkptError, ClassEntry, LossScaleState, Snapshot};
use effdet_model::hparams::HParams;
use effdet_model::network::{Network, VariableTable};
use effdet_model::weights::Weights;
use serde_json::json;

/// Stem and first stack of D0, with fusion weights for their scalar shape.
pub fn table() -> VariableTable {
    let network = Network::new(&HParams::preset("efficientdet-d0").unwrap()).unwrap();
    let wanted = ["stem_", "stack_0/", "fpn_cells/cell_0/fnode0/WSM"];
    VariableTable::new(
        network
            .variables
            .iter()
            .filter(|variable| wanted.iter().any(|prefix| variable.name.starts_with(prefix)))
            .cloned()
            .collect(),
    )
}

pub fn state(step: u64) -> CheckpointState {
    CheckpointState {
        step,
        epoch: 3,
        sample_position: u64::MAX - 1,
        model: "efficientdet-d0".to_owned(),
        profile: effdet_model::hparams::Profile::Seed,
        hparams: serde_json::to_value(HParams::preset("efficientdet-d0").unwrap()).unwrap(),
        class_map: vec![
            ClassEntry {
                id: 1,
                name: "person".to_owned(),
            },
            ClassEntry {
                id: 18,
                name: "Hündchen \"x\"\n".to_owned(),
            },
        ],
        data_fingerprint: "data".to_owned(),
        config_hash: "config".to_owned(),
        loss_scale: Some(LossScaleState {
            scale: 32768.0,
            clean_steps: 17,
            skipped_steps: 2,
        }),
        metric: None,
        extra: json!({"learning_rate": 0.1 + 0.2, "nested": [1, null, {"a": 0.3944444444444444}]}),
    }
}

/// Values with every bit pattern that floating point has trouble with.
pub fn weights(table: &VariableTable, seed: u64) -> Weights {
    let mut weights = Weights::init(table, seed);
    weights.trainable[..6].copy_from_slice(&[
        -0.0,
        f32::INFINITY,
        f32::from_bits(0x7fc0_1234),
        f32::MIN_POSITIVE / 8.0,
        f32::MAX,
        f32::from_bits(0xffff_ffff),
    ]);
    for (i, value) in weights.statistics.iter_mut().enumerate() {
        *value += i as f32 * 1e-3;
    }
    weights
}

/// Saves weights of the seed `step`, averages of another seed, and two optimiser slots.
pub fn save(store: &CheckpointStore, state: &CheckpointState) -> Result<PathBuf, CkptError> {
    let table = table();
    let slots = [weights(&table, 100), weights(&table, 200)];
    store.save(&Snapshot {
        state,
        table: &table,
        weights: &weights(&table, state.step),
        ema: Some(&weights(&table, 1000 + state.step)),
        slots: &[("m", &slots[0].trainable), ("v", &slots[1].trainable)],
    })
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub const FILES: [&str; 4] = [
    "manifest.json",
    "weights.safetensors",
    "ema.safetensors",
    "momentum.safetensors",
];

pub fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
