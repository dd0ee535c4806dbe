//! Records between this program and TensorFlow's own reader and writer, both ways.
//!
//! Needs a Python with TensorFlow, named by `EFFDET_TF_PYTHON`; skipped without.

use std::fs;
use std::path::Path;
use std::process::Command;

use effdet_data::dataset::DetectionDataset;
use effdet_data::synthetic::{SyntheticConfig, dataset};
use effdet_data::tfrecord::{ReadOptions, WriteOptions, load, write};
use serde_json::Value;

/// The feature specification of the reference's `dataset/tf_example_decoder.py`.
const READ: &str = r#"
import glob, json, sys
import tensorflow as tf
features = {
    "image/encoded": tf.io.FixedLenFeature((), tf.string),
    "image/source_id": tf.io.FixedLenFeature((), tf.string, ""),
    "image/height": tf.io.FixedLenFeature((), tf.int64, -1),
    "image/width": tf.io.FixedLenFeature((), tf.int64, -1),
    "image/object/bbox/xmin": tf.io.VarLenFeature(tf.float32),
    "image/object/bbox/xmax": tf.io.VarLenFeature(tf.float32),
    "image/object/bbox/ymin": tf.io.VarLenFeature(tf.float32),
    "image/object/bbox/ymax": tf.io.VarLenFeature(tf.float32),
    "image/object/class/label": tf.io.VarLenFeature(tf.int64),
    "image/object/area": tf.io.VarLenFeature(tf.float32),
    "image/object/is_crowd": tf.io.VarLenFeature(tf.int64),
}
out = []
for file in sorted(glob.glob(sys.argv[1])):
    for record in tf.data.TFRecordDataset(file):
        parsed = tf.io.parse_single_example(record, features)
        image = tf.io.decode_image(parsed["image/encoded"], channels=3)
        row = {"id": parsed["image/source_id"].numpy().decode(), "shape": image.shape.as_list(),
               "size": [int(parsed["image/height"]), int(parsed["image/width"])]}
        for key in features:
            if key.startswith("image/object/"):
                row[key.rsplit("/", 1)[1]] = tf.sparse.to_dense(parsed[key]).numpy().tolist()
        out.append(row)
print(json.dumps(out))
"#;

/// Copies records field by field through TensorFlow's own message types and writer, plain and compressed.
const WRITE: &str = r#"
import glob, sys
import tensorflow as tf
for compression, name in (("", "plain.tfrecord"), ("GZIP", "packed.tfrecord.gz")):
    with tf.io.TFRecordWriter(sys.argv[2] + "/" + name, compression) as writer:
        for file in sorted(glob.glob(sys.argv[1])):
            for record in tf.data.TFRecordDataset(file):
                example = tf.train.Example.FromString(record.numpy())
                copy = tf.train.Example()
                for key in reversed(sorted(example.features.feature)):
                    copy.features.feature[key].CopyFrom(example.features.feature[key])
                writer.write(copy.SerializeToString())
"#;

fn python() -> Option<String> {
    let python = std::env::var("EFFDET_TF_PYTHON").ok();
    if python.is_none() {
        println!("skipped: EFFDET_TF_PYTHON names no Python with TensorFlow");
    }
    python
}

fn run(python: &str, script: &str, arguments: &[&Path]) -> String {
    let output = Command::new(python)
        .args(["-c", script])
        .args(arguments)
        .env("TF_CPP_MIN_LOG_LEVEL", "3")
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn data() -> DetectionDataset {
    let config = SyntheticConfig {
        image_size: 64,
        ..SyntheticConfig::default()
    };
    let mut data = dataset(&config, 0..7);
    data.examples[2].objects.clear();
    for example in &mut data.examples {
        for object in &mut example.objects {
            object.box_xywh_px = object.box_xywh_px.map(|v| v * 0.97 + 0.13);
            object.is_crowd = example.image_id == 4;
            object.area = 12.625;
        }
    }
    data
}

#[test]
fn tensorflow_reads_what_is_written_here_with_the_specification_of_the_reference() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let data = data();
    let options = WriteOptions {
        num_shards: 1,
        ..WriteOptions::default()
    };
    write(&data, &folder.path().join("train"), &options, &mut || {}).unwrap();
    let text = run(&python, READ, &[&folder.path().join("train-*.tfrecord")]);
    let rows: Vec<Value> = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(rows.len(), data.examples.len());
    for (row, example) in rows.iter().zip(&data.examples) {
        assert_eq!(row["id"], example.image_id.to_string());
        assert_eq!(row["shape"], serde_json::json!([64, 64, 3]));
        assert_eq!(row["size"], serde_json::json!([64, 64]));
        let list = |key: &str| -> Vec<f64> {
            let list = row[key].as_array().unwrap();
            list.iter().map(|value| value.as_f64().unwrap()).collect()
        };
        let expected = |value: &dyn Fn(&effdet_data::dataset::ObjectAnnotation) -> f64| -> Vec<f64> {
            example
                .objects
                .iter()
                .map(|object| f64::from(value(object) as f32))
                .collect()
        };
        assert_eq!(list("xmin"), expected(&|o| o.box_xywh_px[0] / 64.0));
        assert_eq!(list("ymin"), expected(&|o| o.box_xywh_px[1] / 64.0));
        assert_eq!(
            list("xmax"),
            expected(&|o| (o.box_xywh_px[0] + o.box_xywh_px[2]) / 64.0)
        );
        assert_eq!(
            list("ymax"),
            expected(&|o| (o.box_xywh_px[1] + o.box_xywh_px[3]) / 64.0)
        );
        assert_eq!(list("area"), expected(&|o| o.area));
        assert_eq!(list("label"), expected(&|o| f64::from(o.category.0)));
        assert_eq!(list("is_crowd"), expected(&|o| f64::from(u8::from(o.is_crowd))));
    }
}

#[test]
fn what_tensorflow_writes_is_read_here_plain_and_compressed() {
    let Some(python) = python() else { return };
    let (folder, copies) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let options = WriteOptions {
        num_shards: 1,
        ..WriteOptions::default()
    };
    write(&data(), &folder.path().join("train"), &options, &mut || {}).unwrap();
    let pattern = folder.path().join("train-*.tfrecord");
    run(&python, WRITE, &[&pattern, copies.path()]);
    let read = |file: &Path| {
        load(&file.display().to_string(), &ReadOptions::default())
            .unwrap()
            .0
    };
    let expected = read(&pattern);
    for file in ["plain.tfrecord", "packed.tfrecord.gz"] {
        let file = copies.path().join(file);
        assert!(fs::metadata(&file).unwrap().len() > 1000);
        let copy = read(&file);
        assert_eq!(copy.examples.len(), 7);
        for (ours, theirs) in expected.examples.iter().zip(&copy.examples) {
            assert_eq!((ours.image_id, &ours.objects), (theirs.image_id, &theirs.objects));
            let bytes = |example: &effdet_data::dataset::Example| example.source.read_bytes(1 << 20).unwrap();
            assert_eq!(bytes(ours), bytes(theirs));
        }
    }
}
