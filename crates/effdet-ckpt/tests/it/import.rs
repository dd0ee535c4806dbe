//! Export and import by name, and EfficientNet backbones.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{read, table, weights};
use effdet_ckpt::{
    CkptError, Rename, Tensor, Tensors, load_backbone, load_tensors, match_variables, save_weights,
    weights_hash,
};
use effdet_model::hparams::HParams;
use effdet_model::network::Network;
use effdet_model::weights::Weights;

/// A safetensors file with that header and so many zero bytes of data.
fn safetensors(header: &str, data_len: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data_len, 0);
    bytes
}

fn refused(dir: &Path, bytes: &[u8]) -> CkptError {
    let path = dir.join("crafted.safetensors");
    fs::write(&path, bytes).unwrap();
    load_tensors(&path).unwrap_err()
}

#[test]
fn exported_weights_come_back_to_the_last_bit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("export.safetensors");
    let table = table();
    let exported = weights(&table, 5);
    fs::write(&path, "an older file").unwrap();
    save_weights(&path, &table, &exported).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    let mut imported = Weights::zeros(&table);
    let report = match_variables(&table, &load_tensors(&path).unwrap(), &[], &mut imported).unwrap();
    assert_eq!(weights_hash(&imported), weights_hash(&exported));
    assert_eq!(report.loaded.len(), table.len());
    assert!(report.skipped.is_empty() && report.reinitialised.is_empty());
}

#[test]
fn an_export_that_fails_leaves_the_older_file() {
    let dir = tempfile::tempdir().unwrap();
    let table = table();
    let target = dir.path().join("directory");
    fs::create_dir_all(target.join("inside")).unwrap();
    let error = save_weights(&target, &table, &weights(&table, 1)).unwrap_err();
    assert!(matches!(error, CkptError::Io { .. }), "{error}");
    assert!(target.join("inside").exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    let mut short = weights(&table, 1);
    short.trainable.pop();
    let path = dir.path().join("x.safetensors");
    assert!(matches!(
        save_weights(&path, &table, &short),
        Err(CkptError::WrongLength { .. })
    ));
    assert!(!path.exists());
}

#[test]
fn another_number_of_classes_takes_everything_but_the_class_predictions() {
    let mut hparams = HParams::preset("efficientdet-d0").unwrap();
    let source = Network::new(&hparams).unwrap();
    hparams.num_classes = 3;
    let target = Network::new(&hparams).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("coco.safetensors");
    let trained = Weights::init(&source.variables, 1);
    save_weights(&path, &source.variables, &trained).unwrap();

    let initial = Weights::init(&target.variables, 2);
    let mut tuned = initial.clone();
    let report = match_variables(&target.variables, &load_tensors(&path).unwrap(), &[], &mut tuned).unwrap();
    let names: Vec<_> = report.reinitialised.iter().map(|r| r.variable.as_str()).collect();
    assert_eq!(
        names,
        [
            "class_net/class-predict/pointwise_kernel",
            "class_net/class-predict/bias"
        ]
    );
    assert_eq!(report.skipped.len(), 2);
    assert!(
        report.skipped[0].reason.contains("its shape is [819]"),
        "{:?}",
        report.skipped
    );
    assert_eq!(report.loaded.len(), target.variables.len() - 2);
    for variable in &target.variables {
        let values = tuned.slice(variable.kind, variable.range());
        let source = if names.contains(&variable.name.as_str()) {
            initial.slice(variable.kind, variable.range())
        } else {
            let original = source.variables.find(&variable.name).unwrap();
            trained.slice(original.kind, original.range())
        };
        assert_eq!(values, source, "{}", variable.name);
    }
}

#[test]
fn renames_replace_prefixes_and_leftovers_are_reported() {
    let table = table();
    let gamma = table.find("stem_bn/gamma").unwrap();
    let tensor = |value| Tensor {
        shape: vec![32],
        values: vec![value; 32],
    };
    let tensors = Tensors {
        path: PathBuf::from("x.safetensors"),
        by_name: [
            ("backbone.stem_bn/gamma".to_owned(), tensor(3.0)),
            ("something".to_owned(), tensor(4.0)),
        ]
        .into(),
        not_float: vec![("num_batches_tracked".to_owned(), "I64".to_owned())],
    };
    let mut weights = Weights::zeros(&table);
    let unmatched = match_variables(&table, &tensors, &[], &mut weights).unwrap_err();
    assert!(
        matches!(unmatched, CkptError::NothingMatched { count: 3, .. }),
        "{unmatched}"
    );

    let renames = [Rename {
        from: "backbone.".to_owned(),
        to: String::new(),
    }];
    let report = match_variables(&table, &tensors, &renames, &mut weights).unwrap();
    assert_eq!(report.loaded, ["stem_bn/gamma"]);
    assert_eq!(weights.trainable[gamma.range()], [3.0; 32]);
    let skipped: Vec<_> = report.skipped.iter().map(|s| s.tensor.as_str()).collect();
    assert_eq!(skipped, ["num_batches_tracked", "something"]);
    assert_eq!(report.reinitialised.len(), table.len() - 1);
}

#[test]
fn tensors_of_half_and_double_precision_are_read_and_integers_are_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mixed.safetensors");
    let header = r#"{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},"c":{"dtype":"F16","shape":[2],"data_offsets":[12,16]},"d":{"dtype":"I64","shape":[],"data_offsets":[16,24]}}"#;
    let mut bytes = safetensors(header, 0);
    bytes.extend(0.1f64.to_le_bytes());
    bytes.extend([0x80, 0x3f, 0x00, 0xc0]);
    bytes.extend([0x00, 0x3c, 0x00, 0xbc]);
    bytes.extend(7u64.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let tensors = load_tensors(&path).unwrap();
    assert_eq!(tensors.by_name["a"].values, [0.1]);
    assert_eq!(tensors.by_name["b"].values, [1.0, -2.0]);
    assert_eq!(tensors.by_name["c"].values, [1.0, -1.0]);
    assert_eq!(tensors.not_float, [("d".to_owned(), "I64".to_owned())]);
}

#[test]
fn hostile_safetensors_files_are_refused_with_an_offset() {
    let dir = tempfile::tempdir().unwrap();
    let bad = |bytes: &[u8], expected_offset: u64| {
        let error = refused(dir.path(), bytes);
        assert!(
            matches!(&error, CkptError::BadTensorFile { offset, .. } if *offset == expected_offset),
            "{error}"
        );
    };
    bad(b"", 0);
    bad(&[1, 2, 3], 0);
    bad(&u64::MAX.to_le_bytes(), 0);
    bad(&(1u64 << 60).to_le_bytes(), 0);
    bad(&safetensors("\u{fffd}", 0), 8);
    bad(&[2, 0, 0, 0, 0, 0, 0, 0, b'{', 0xff], 9);
    bad(
        &safetensors(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4),
        8,
    );
    // A hole, an overlap, bytes after the end, a claim beyond the end, an overflow.
    for (header, data_len) in [
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8),
        (
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            4,
        ),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 5),
        (
            r#"{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}"#,
            4,
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#,
            4,
        ),
    ] {
        bad(&safetensors(header, data_len), 8);
    }
    let deep = safetensors(&format!("{{\"a\":{}", "[".repeat(50_000)), 0);
    assert!(matches!(
        refused(dir.path(), &deep),
        CkptError::BadTensorFile { .. }
    ));
}

#[test]
fn every_thirty_seventh_prefix_of_an_export_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("export.safetensors");
    let table = table();
    save_weights(&path, &table, &weights(&table, 1)).unwrap();
    let whole = read(&path);
    for length in (0..whole.len()).step_by(37) {
        let error = refused(dir.path(), &whole[..length]);
        assert!(
            matches!(error, CkptError::BadTensorFile { .. }),
            "{length}: {error}"
        );
    }
}

#[test]
fn a_missing_file_a_directory_and_a_sparse_giant_are_refused_without_being_read() {
    let dir = tempfile::tempdir().unwrap();
    let absent = load_tensors(&dir.path().join("absent")).unwrap_err();
    assert!(absent.to_string().contains("absent"), "{absent}");
    assert!(matches!(load_tensors(dir.path()), Err(CkptError::Io { .. })));
    let giant = dir.path().join("giant");
    fs::File::create(&giant).unwrap().set_len(5 << 30).unwrap();
    assert!(matches!(load_tensors(&giant), Err(CkptError::TooLarge { .. })));
}

#[test]
fn a_backbone_under_our_own_names_leaves_the_rest_alone() {
    let network = Network::new(&HParams::preset("efficientdet-d0").unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("part.safetensors");
    let part = table();
    let given = weights(&part, 9);
    save_weights(&path, &part, &given).unwrap();
    let initial = Weights::init(&network.variables, 1);
    let mut started = initial.clone();
    let report = load_backbone(&path, &network.variables, &mut started).unwrap();
    assert_eq!(report.loaded.len(), part.len());
    let variable = network.variables.find("class_net/class-predict/bias").unwrap();
    assert_eq!(
        started.slice(variable.kind, variable.range()),
        initial.slice(variable.kind, variable.range())
    );
}

#[test]
fn the_imagenet_lite0_backbone_fits_efficientdet_lite0() {
    let path = Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../shared/data/weights/efficientnet_lite0_imagenet.safetensors"
    ));
    if !path.exists() {
        println!("skipped: ../shared/data is absent");
        return;
    }
    let network = Network::new(&HParams::preset("efficientdet-lite0").unwrap()).unwrap();
    let table = &network.variables;
    let mut weights = Weights::init(table, 1);
    let report = load_backbone(path, table, &mut weights).unwrap();

    let is_backbone = |name: &str| name.starts_with("stem_") || name.starts_with("stack_");
    // Stem 1 + 4, first block 10, fifteen blocks of 15.
    assert_eq!(report.loaded.len(), 240);
    assert!(report.loaded.iter().all(|name| is_backbone(name)));
    assert!(!report.reinitialised.iter().any(|r| is_backbone(&r.variable)));
    let skipped: Vec<_> = report.skipped.iter().map(|s| s.tensor.as_str()).collect();
    assert_eq!(
        skipped,
        [
            "_bn1.bias",
            "_bn1.running_mean",
            "_bn1.running_var",
            "_bn1.weight",
            "_conv_head.weight",
            "_fc.bias",
            "_fc.weight"
        ]
    );

    let file = load_tensors(path).unwrap();
    let value = |name: &str, index: usize| {
        let variable = table.find(name).unwrap();
        weights.slice(variable.kind, variable.range())[index]
    };
    // Stem [kh, kw, in, out] = [3, 3, 3, 32] from [32, 3, 3, 3], at (kh, kw, in, out) = (2, 1, 0, 17).
    let stem = &file.by_name["_conv_stem.weight"].values;
    assert_eq!(
        value("stem_conv2d/kernel", ((2 * 3 + 1) * 3) * 32 + 17),
        stem[17 * 27 + 2 * 3 + 1]
    );
    // Block 3 is the first of stack 2, kernel 5: [5, 5, 144, 1] from [144, 1, 5, 5], at (4, 3, 100).
    let depthwise = &file.by_name["_blocks.3._depthwise_conv.weight"].values;
    assert_eq!(
        value(
            "stack_2/block_0/depthwise_conv2d/depthwise_kernel",
            (4 * 5 + 3) * 144 + 100
        ),
        depthwise[100 * 25 + 4 * 5 + 3]
    );
    let variance = &file.by_name["_blocks.0._bn1.running_var"].values;
    assert_eq!(
        value("stack_0/block_0/depthwise_bn/moving_variance", 31),
        variance[31]
    );
}
