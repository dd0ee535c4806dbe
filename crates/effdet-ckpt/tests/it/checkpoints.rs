//! Save, list, load, fall back, prune, and every way a checkpoint can be damaged.

use std::fs;
use std::path::Path;

use crate::common::{FILES, bits, read, save, state, table, weights};
use effdet_ckpt::{
    Checkpoint, CheckpointReader, CheckpointStore, CkptError, Retention, Snapshot, sha256_hex, weights_hash,
};
use effdet_model::weights::Weights;
use proptest::prelude::*;

fn load(path: &Path) -> Result<Checkpoint, CkptError> {
    CheckpointStore::load(path, &table())
}

fn steps(store: &CheckpointStore) -> Vec<u64> {
    let listing = store.list().unwrap();
    listing
        .complete
        .iter()
        .map(|reader| reader.state().step)
        .collect()
}

fn flip(path: &Path, byte: usize, bit: u8) {
    let mut bytes = read(path);
    bytes[byte] ^= 1 << bit;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_checkpoint_comes_back_to_the_last_bit() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path().join("run/checkpoints"));
    let path = save(&store, &state(1234)).unwrap();
    assert!(path.ends_with("run/checkpoints/step-00001234"));

    let loaded = load(&path).unwrap();
    let table = table();
    let expected = weights(&table, 1234);
    assert_eq!(loaded.state, state(1234));
    assert_eq!(bits(&loaded.weights.trainable), bits(&expected.trainable));
    assert_eq!(bits(&loaded.weights.statistics), bits(&expected.statistics));
    assert_eq!(weights_hash(&loaded.weights), weights_hash(&expected));
    assert_eq!(
        weights_hash(loaded.ema.as_ref().unwrap()),
        weights_hash(&weights(&table, 2234))
    );
    assert_eq!(loaded.slots.keys().collect::<Vec<_>>(), ["m", "v"]);
    assert_eq!(bits(&loaded.slots["v"]), bits(&weights(&table, 200).trainable));
    assert_eq!(
        loaded.state.parse_hparams().unwrap(),
        effdet_model::hparams::HParams::preset("d0").unwrap()
    );
}

#[test]
fn averages_and_slots_are_optional() {
    let dir = tempfile::tempdir().unwrap();
    let table = table();
    let weights = weights(&table, 1);
    let path = CheckpointStore::new(dir.path())
        .save(&Snapshot {
            state: &state(5),
            table: &table,
            weights: &weights,
            ema: None,
            slots: &[],
        })
        .unwrap();
    let loaded = load(&path).unwrap();
    assert_eq!((loaded.ema, loaded.slots.len()), (None, 0));
    assert_eq!(fs::read_dir(path).unwrap().count(), 2);
}

#[test]
fn equal_snapshots_are_equal_bytes() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let paths = dirs
        .each_ref()
        .map(|dir| save(&CheckpointStore::new(dir.path()), &state(7)).unwrap());
    for file in FILES {
        assert_eq!(read(&paths[0].join(file)), read(&paths[1].join(file)), "{file}");
    }
}

#[test]
fn every_thirty_seventh_prefix_of_every_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(&CheckpointStore::new(dir.path()), &state(1)).unwrap();
    for file in FILES {
        let file_path = path.join(file);
        let whole = read(&file_path);
        for length in (0..whole.len()).step_by(37) {
            fs::write(&file_path, &whole[..length]).unwrap();
            let error = load(&path).unwrap_err();
            assert!(error.is_corruption(), "{file} cut to {length} bytes: {error}");
            assert!(error.to_string().contains(file), "{error}");
        }
        fs::write(&file_path, &whole).unwrap();
    }
    load(&path).unwrap();
}

#[test]
fn a_flipped_bit_in_any_byte_of_the_manifest_or_in_sampled_bytes_of_the_other_files_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path());
    let path = save(&store, &state(1)).unwrap();
    for file in FILES {
        let file_path = path.join(file);
        let whole = read(&file_path);
        let stride = if file == "manifest.json" { 1 } else { 29 };
        for byte in (0..whole.len()).step_by(stride) {
            let mut damaged = whole.clone();
            damaged[byte] ^= 1 << (byte / stride % 8);
            fs::write(&file_path, damaged).unwrap();
            if file == "manifest.json" {
                assert!(
                    matches!(CheckpointReader::open(&path), Err(CkptError::BadManifest { .. })),
                    "byte {byte}"
                );
            } else {
                let error = load(&path).unwrap_err();
                assert!(
                    matches!(error, CkptError::WrongChecksum { .. }),
                    "{file}, byte {byte}: {error}"
                );
            }
        }
        fs::write(&file_path, &whole).unwrap();
    }
    load(&path).unwrap();
}

#[test]
fn loading_falls_back_to_the_newest_intact_checkpoint_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path());
    let paths: Vec<_> = (1..=4).map(|step| save(&store, &state(step)).unwrap()).collect();
    flip(&paths[3].join("ema.safetensors"), 2000, 3);
    fs::remove_file(paths[2].join("weights.safetensors")).unwrap();
    flip(&paths[0].join("manifest.json"), 0, 0);

    assert_eq!(steps(&store), [2, 4]);
    let latest = store.load_latest(&table()).unwrap();
    assert_eq!(latest.checkpoint.unwrap().state.step, 2);
    let passed_over: Vec<_> = latest.passed_over.iter().map(|other| &other.path).collect();
    assert_eq!(passed_over, [&paths[3], &paths[2]]);
    assert!(matches!(
        latest.passed_over[0].error,
        CkptError::WrongChecksum { .. }
    ));
    assert!(matches!(
        latest.passed_over[1].error,
        CkptError::MissingFile { .. }
    ));
}

#[test]
fn a_directory_without_checkpoints_has_none_and_a_damaged_only_one_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path().join("absent"));
    let latest = store.load_latest(&table()).unwrap();
    assert!(latest.checkpoint.is_none() && latest.passed_over.is_empty());

    let store = CheckpointStore::new(dir.path());
    let path = save(&store, &state(1)).unwrap();
    fs::write(path.join("manifest.json"), "").unwrap();
    let latest = store.load_latest(&table()).unwrap();
    assert!(latest.checkpoint.is_none());
    assert_eq!(latest.passed_over.len(), 1);
}

#[test]
fn a_checkpoint_of_another_network_is_an_error_and_no_reason_to_fall_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path());
    save(&store, &state(1)).unwrap();
    let mut variables: Vec<_> = table().iter().cloned().collect();
    let last = variables.pop().unwrap();
    let smaller = effdet_model::network::VariableTable::new(variables.clone());
    let error = store.load_latest(&smaller).unwrap_err();
    assert!(
        matches!(&error, CkptError::UnexpectedTensor { tensor, .. } if *tensor == last.name),
        "{error}"
    );

    variables.push(last.clone());
    variables[0].shape[3] = 16;
    variables[0].len /= 2;
    let other_shape = effdet_model::network::VariableTable::new(variables.clone());
    assert!(matches!(
        store.load_latest(&other_shape),
        Err(CkptError::WrongShape { .. })
    ));

    variables[0] = last;
    variables[0].name = "another".to_owned();
    let other_name = effdet_model::network::VariableTable::new(variables);
    assert!(
        matches!(store.load_latest(&other_name), Err(CkptError::MissingTensor { tensor, .. }) if tensor == "another")
    );
}

#[test]
fn interrupted_saves_are_invisible_and_collected() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path());
    let path = save(&store, &state(1)).unwrap();
    let leftover = dir.path().join(".step-00000002.tmp-99");
    fs::create_dir(&leftover).unwrap();
    for file in FILES {
        fs::copy(path.join(file), leftover.join(file)).unwrap();
    }
    let inner = path.join(".manifest.json.tmp-99");
    fs::write(&inner, "half").unwrap();
    fs::create_dir(dir.path().join("step-2")).unwrap();
    fs::create_dir(dir.path().join("step-000000003")).unwrap();
    fs::create_dir(dir.path().join("tensorboard")).unwrap();

    let listing = store.list().unwrap();
    assert_eq!((listing.complete.len(), listing.passed_over.len()), (1, 0));
    assert_eq!(store.gc().unwrap(), [leftover.clone(), inner.clone()]);
    assert!(!leftover.exists() && !inner.exists());
    assert!(dir.path().join("tensorboard").exists());
    load(&path).unwrap();
}

#[test]
fn a_renamed_checkpoint_directory_is_not_taken_for_another_step() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path());
    let path = save(&store, &state(1)).unwrap();
    fs::rename(path, dir.path().join("step-00000009")).unwrap();
    let listing = store.list().unwrap();
    assert!(listing.complete.is_empty());
    assert!(listing.passed_over[0].error.to_string().contains("another step"));
}

#[test]
fn saving_where_a_file_is_fails_and_keeps_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let occupied = dir.path().join("occupied");
    fs::write(&occupied, "mine").unwrap();
    let error = save(&CheckpointStore::new(&occupied), &state(1)).unwrap_err();
    assert!(matches!(error, CkptError::Io { .. }), "{error}");
    assert!(error.to_string().contains("occupied"), "{error}");
    assert_eq!(read(&occupied), b"mine");

    let store = CheckpointStore::new(dir.path());
    fs::write(store.path_of(1), "mine").unwrap();
    let error = save(&store, &state(1)).unwrap_err();
    assert!(matches!(error, CkptError::NotACheckpoint { .. }), "{error}");
    assert_eq!(read(&store.path_of(1)), b"mine");
}

#[cfg(unix)]
#[test]
fn saving_into_a_read_only_directory_fails_and_keeps_the_last_good_one() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path().join("run"));
    save(&store, &state(1)).unwrap();
    let set_mode = |mode| fs::set_permissions(store.dir(), fs::Permissions::from_mode(mode)).unwrap();
    set_mode(0o555);
    let result = save(&store, &state(2));
    set_mode(0o755);
    match result {
        Err(error) => assert!(
            matches!(&error, CkptError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied),
            "{error}"
        ),
        // The administrator may write anywhere.
        Ok(path) => load(&path).map(drop).unwrap(),
    }
    assert_eq!(load(&store.path_of(1)).unwrap().state.step, 1);
}

#[test]
fn saving_the_same_step_again_updates_its_state_but_never_other_weights() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path());
    let path = save(&store, &state(3)).unwrap();
    let mut evaluated = state(3);
    evaluated.metric = Some(0.25);
    assert_eq!(save(&store, &evaluated).unwrap(), path);
    assert_eq!(load(&path).unwrap().state.metric, Some(0.25));

    let table = table();
    let other = store.save(&Snapshot {
        state: &state(3),
        table: &table,
        weights: &Weights::zeros(&table),
        ema: None,
        slots: &[],
    });
    assert!(matches!(other, Err(CkptError::StepExists { .. })));
    assert_eq!(load(&path).unwrap().state.metric, Some(0.25));

    // A damaged one is replaced.
    flip(&path.join("weights.safetensors"), 3000, 1);
    save(&store, &state(3)).unwrap();
    assert_eq!(load(&path).unwrap().state.metric, None);
    assert!(store.gc().unwrap().is_empty());
}

#[test]
fn pruning_keeps_the_last_the_best_the_named_and_always_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path());
    for step in 1..=7 {
        save(&store, &state(step)).unwrap();
    }
    for (step, metric) in [(1, 0.1), (2, 0.4), (3, 0.3), (4, 0.4)] {
        store.record_metric(step, metric).unwrap();
    }
    let retention = |keep_last, keep_best, keep_steps: &[u64]| Retention {
        keep_last,
        keep_best,
        keep_steps: keep_steps.to_vec(),
    };
    assert_eq!(store.prune(&retention(2, 2, &[1])).unwrap().removed, [3, 5]);
    assert_eq!(steps(&store), [1, 2, 4, 6, 7]);
    // Of equals the newer one is the better.
    assert_eq!(store.prune(&retention(1, 1, &[])).unwrap().removed, [1, 2, 6]);
    assert_eq!(store.prune(&retention(0, 0, &[])).unwrap().removed, [4]);
    assert_eq!(steps(&store), [7]);
    assert!(store.gc().unwrap().is_empty());
}

#[test]
fn pruning_keeps_the_newest_intact_checkpoint_when_newer_ones_are_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path());
    for step in 1..=3 {
        save(&store, &state(step)).unwrap();
    }
    let retention = Retention {
        keep_last: 1,
        keep_best: 0,
        keep_steps: Vec::new(),
    };
    flip(&store.path_of(3).join("momentum.safetensors"), 4000, 0);
    assert_eq!(store.prune(&retention).unwrap().removed, [1]);
    assert_eq!(
        store
            .load_latest(&table())
            .unwrap()
            .checkpoint
            .unwrap()
            .state
            .step,
        2
    );
    flip(&store.path_of(2).join("weights.safetensors"), 4000, 0);
    assert!(store.prune(&retention).unwrap().removed.is_empty());
}

#[test]
fn what_a_manifest_cannot_hold_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path().join("run"));
    let mut not_finite = state(1);
    not_finite.metric = Some(f64::NAN);
    assert!(
        matches!(save(&store, &not_finite), Err(CkptError::InvalidState { field, .. }) if field == "metric")
    );

    let table = table();
    let weights = weights(&table, 1);
    let with_slots = |slots: &[(&str, &[f32])]| {
        store.save(&Snapshot {
            state: &state(1),
            table: &table,
            weights: &weights,
            ema: None,
            slots,
        })
    };
    assert!(matches!(
        with_slots(&[("m", &[0.0])]),
        Err(CkptError::WrongLength { .. })
    ));
    let slot = &weights.trainable[..];
    assert!(matches!(
        with_slots(&[("a/b", slot)]),
        Err(CkptError::InvalidState { .. })
    ));
    assert!(matches!(
        with_slots(&[("m", slot), ("m", slot)]),
        Err(CkptError::InvalidState { .. })
    ));
    assert!(!store.dir().exists());
}

/// A manifest with a valid checksum over any text.
fn signed(rest: &str) -> String {
    format!("{{\n  \"sha256\": \"{}\",{rest}", sha256_hex(rest.as_bytes()))
}

#[test]
fn crafted_manifests_cannot_point_elsewhere_or_claim_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(&CheckpointStore::new(dir.path()), &state(1)).unwrap();
    let manifest = path.join("manifest.json");
    let text = String::from_utf8(read(&manifest)).unwrap();
    let rest = &text[text.find("\",").unwrap() + 2..];
    assert_eq!(signed(rest), text);

    let open = |rest: &str| {
        fs::write(&manifest, signed(rest)).unwrap();
        CheckpointReader::open(&path).unwrap_err()
    };
    let outside = rest.replace("\"ema.safetensors\"", "\"../../etc/passwd\"");
    assert!(matches!(open(&outside), CkptError::BadManifest { .. }));
    let newer = rest.replace("\"version\": 1", "\"version\": 2");
    assert!(matches!(
        open(&newer),
        CkptError::UnsupportedVersion {
            version: 2,
            supported: 1,
            ..
        }
    ));
    let other = rest.replace("effdet-checkpoint", "something");
    assert!(matches!(open(&other), CkptError::BadManifest { .. }));
    let huge = rest.replacen("\"bytes\": ", "\"bytes\": 99999999999", 1);
    assert!(matches!(open(&huge), CkptError::WrongSize { .. }));
    let error = open(&rest.replace("\"step\": 1,", "\"step\": -1,"));
    assert!(
        matches!(error, CkptError::BadManifest { offset, .. } if offset > 100),
        "{error}"
    );
    assert!(matches!(
        open(&"[".repeat(100_000)),
        CkptError::BadManifest { .. }
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_files_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), sign in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        let text = if sign { signed(&String::from_utf8_lossy(&bytes)).into_bytes() } else { bytes.clone() };
        fs::write(dir.path().join("manifest.json"), text).unwrap();
        prop_assert!(CheckpointReader::open(dir.path()).is_err());
        let tensors = dir.path().join("x.safetensors");
        fs::write(&tensors, &bytes).unwrap();
        prop_assert!(effdet_ckpt::load_tensors(&tensors).is_err());
    }
}
