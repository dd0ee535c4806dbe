//! Shards written and read back, and records that make no sense.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use effdet_model::label_map::CategoryId;
use proptest::prelude::*;
use prost::Message;
use sha2::{Digest, Sha256};

use super::example::Example as Features;
use super::framing::{RecordReader, write_record};
use super::*;
use crate::dataset::{Category, DetectionDataset, Example, ImageSource, ObjectAnnotation};
use crate::error::{DataError, Result};
use crate::report::LoadReport;

fn png(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::RgbImage::new(width, height)
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

fn object(box_xywh_px: [f64; 4], category: u32) -> ObjectAnnotation {
    ObjectAnnotation {
        box_xywh_px,
        category: CategoryId(category),
        area: 12.5,
        is_crowd: category == 2,
        difficult: false,
    }
}

fn dataset(images: i64, objects: &[ObjectAnnotation]) -> DetectionDataset {
    let example = |id: i64| Example {
        image_id: 100 + id,
        source_id: (100 + id).to_string(),
        file_name: format!("{id}.png"),
        width: 20 + id as u32,
        height: 10,
        source: ImageSource::Memory(Arc::from(png(20 + id as u32, 10))),
        // Every other image is without objects.
        objects: objects.iter().filter(|_| id % 2 == 0).cloned().collect(),
    };
    let category = |(id, name): (u32, &str)| Category {
        id: CategoryId(id),
        name: name.into(),
    };
    DetectionDataset {
        name: "test".into(),
        examples: (0..images).map(example).collect(),
        categories: [(1, "cat"), (2, "dog"), (5, "never seen")].map(category).to_vec(),
    }
}

fn options(num_shards: usize) -> WriteOptions {
    WriteOptions {
        num_shards,
        ..WriteOptions::default()
    }
}

fn pattern(folder: &Path) -> String {
    folder.join("*.tfrecord").to_string_lossy().into_owned()
}

/// The numbers that training computes from a box.
fn normalized(example: &Example) -> Vec<[f32; 4]> {
    let (width, height) = (f64::from(example.width), f64::from(example.height));
    let corners = |o: &ObjectAnnotation| {
        let [x, y, w, h] = o.box_xywh_px;
        [x / width, y / height, (x + w) / width, (y + h) / height].map(|v| v as f32)
    };
    example.objects.iter().map(corners).collect()
}

fn assert_same_for_training(read: &DetectionDataset, written: &DetectionDataset) {
    assert_eq!(read.categories, written.categories);
    assert_eq!(read.examples.len(), written.examples.len());
    for (read, written) in read.examples.iter().zip(&written.examples) {
        assert_eq!(
            (read.image_id, &read.file_name, read.width, read.height),
            (
                written.image_id,
                &written.file_name,
                written.width,
                written.height
            )
        );
        assert_eq!(normalized(read), normalized(written));
        for (read, written) in read.objects.iter().zip(&written.objects) {
            assert_eq!(
                (read.category, read.area as f32, read.is_crowd, read.difficult),
                (
                    written.category,
                    written.area as f32,
                    written.is_crowd,
                    written.difficult
                )
            );
        }
        assert_eq!(
            read.source.read_bytes(1 << 24).unwrap(),
            written.source.read_bytes(1 << 24).unwrap()
        );
    }
}

#[test]
fn what_is_written_reads_back_in_order_with_the_same_ids_and_boxes() {
    let mut objects = [object([1.1, 2.2, 3.3, 4.4], 1), object([0.0, 0.0, 20.0, 10.0], 2)];
    objects[0].difficult = true;
    let data = dataset(7, &objects);
    for num_shards in [1, 3, 9] {
        let folder = tempfile::tempdir().unwrap();
        let mut calls = 0;
        let prefix = folder.path().join("sub/train");
        let report = write(&data, &prefix, &options(num_shards), &mut || calls += 1).unwrap();
        assert_eq!((report.records, report.objects, calls), (7, 8, 7));
        let sizes = report.shards.iter().map(|file| fs::metadata(file).unwrap().len());
        assert_eq!(report.bytes, sizes.sum::<u64>());
        for threads in [1, 4] {
            let read_options = ReadOptions {
                threads,
                ..ReadOptions::default()
            };
            let (read, found) = load(&pattern(&folder.path().join("sub")), &read_options).unwrap();
            assert_same_for_training(&read, &data);
            assert!(found.is_clean(), "{found:?}");
        }
    }
}

#[test]
fn record_i_lies_in_shard_i_mod_n_under_the_name_of_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let report = write(
        &dataset(5, &[object([1.0, 1.0, 2.0, 2.0], 1)]),
        &folder.path().join("val"),
        &options(2),
        &mut || {},
    )
    .unwrap();
    let mut names: Vec<String> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "val-00000-of-00002.tfrecord",
            "val-00001-of-00002.tfrecord",
            "val.categories.json",
            "val.manifest.json"
        ]
    );
    let ids = |file: &PathBuf| -> Vec<Bytes> {
        let bytes = fs::read(file).unwrap();
        let mut reader = RecordReader::new(&bytes[..], file, bytes.len() as u64, 1 << 20);
        let mut ids = Vec::new();
        while let Some(record) = reader.next_record().unwrap() {
            let features = Features::decode(&record.payload[..]).unwrap();
            ids.extend_from_slice(features.bytes(key::SOURCE_ID).unwrap());
        }
        ids
    };
    assert_eq!(ids(&report.shards[0]), ["100", "102", "104"]);
    assert_eq!(ids(&report.shards[1]), ["101", "103"]);
}

#[test]
fn a_record_has_the_features_of_the_reference_and_object_features_only_with_objects() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(2, &[object([2.0, 1.0, 4.0, 5.0], 2)]);
    let report = write(&data, &folder.path().join("a"), &options(1), &mut || {}).unwrap();
    let bytes = fs::read(&report.shards[0]).unwrap();
    let mut reader = RecordReader::new(&bytes[..], &report.shards[0], bytes.len() as u64, 1 << 20);
    let mut next = || Features::decode(&reader.next_record().unwrap().unwrap().payload[..]).unwrap();

    let with = next();
    let image_keys = [
        "image/encoded",
        "image/filename",
        "image/format",
        "image/height",
        "image/key/sha256",
        "image/source_id",
        "image/width",
    ];
    let object_keys = [
        "image/object/area",
        "image/object/bbox/xmax",
        "image/object/bbox/xmin",
        "image/object/bbox/ymax",
        "image/object/bbox/ymin",
        "image/object/class/label",
        "image/object/class/text",
        "image/object/is_crowd",
    ];
    let keys = |features: &Features| -> BTreeSet<String> {
        features
            .features
            .as_ref()
            .unwrap()
            .feature
            .keys()
            .cloned()
            .collect()
    };
    let expected: BTreeSet<String> = image_keys
        .iter()
        .chain(&object_keys)
        .map(ToString::to_string)
        .collect();
    assert_eq!(keys(&with), expected);
    assert_eq!(with.floats("image/object/bbox/xmin").unwrap(), [0.1]);
    assert_eq!(with.floats("image/object/bbox/xmax").unwrap(), [0.3]);
    assert_eq!(with.floats("image/object/bbox/ymin").unwrap(), [0.1]);
    assert_eq!(with.floats("image/object/bbox/ymax").unwrap(), [0.6]);
    assert_eq!(with.floats("image/object/area").unwrap(), [12.5]);
    assert_eq!(with.ints("image/object/class/label").unwrap(), [2]);
    assert_eq!(with.ints("image/object/is_crowd").unwrap(), [1]);
    assert_eq!(with.bytes("image/object/class/text").unwrap(), ["dog"]);
    assert_eq!(with.bytes("image/format").unwrap(), ["png"]);
    assert_eq!(with.bytes("image/key/sha256").unwrap()[0].len(), 64);

    let without = next();
    assert_eq!(
        keys(&without),
        image_keys.iter().map(ToString::to_string).collect()
    );
}

#[test]
fn shards_that_are_there_already_are_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(2, &[object([1.0, 1.0, 2.0, 2.0], 1)]);
    let prefix = folder.path().join("a");
    let report = write(&data, &prefix, &options(1), &mut || {}).unwrap();
    let before = fs::read(&report.shards[0]).unwrap();
    let error = write(&data, &prefix, &options(2), &mut || {}).unwrap_err();
    assert!(matches!(error, DataError::Caller { .. }), "{error}");
    assert_eq!(fs::read(&report.shards[0]).unwrap(), before);
    // Another prefix that only begins alike is no obstacle, and the same data gives the same bytes.
    let again = write(&data, &folder.path().join("a-b"), &options(1), &mut || {}).unwrap();
    assert_eq!(fs::read(&again.shards[0]).unwrap(), before);
}

#[test]
fn a_conversion_that_fails_leaves_no_shards() {
    let folder = tempfile::tempdir().unwrap();
    let mut data = dataset(4, &[object([1.0, 1.0, 2.0, 2.0], 1)]);
    let convert = |data: &DetectionDataset| {
        let error = write(data, &folder.path().join("a"), &options(2), &mut || {}).unwrap_err();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        error
    };
    data.examples[3].width = 99;
    assert!(matches!(convert(&data), DataError::SizeMismatch { .. }));
    data.examples[3].source = ImageSource::Memory(Arc::from(*b"no image"));
    assert!(matches!(convert(&data), DataError::Image { .. }));
    data.examples[3].source = ImageSource::File(folder.path().join("missing.png"));
    assert!(matches!(convert(&data), DataError::Io { .. }));
    data.examples[3].objects = vec![object([1.0, 1.0, 2.0, 2.0], 77)];
    data.examples[3].source = data.examples[2].source.clone();
    data.examples[3].width = 22;
    assert!(matches!(convert(&data), DataError::Category { category: 77, .. }));
}

/// A valid record, changed by `change`, alone in a file.
fn load_changed(change: impl Fn(&mut Features)) -> Result<(DetectionDataset, LoadReport)> {
    load_records(&[record(1, change)], &ReadOptions::default())
}

fn record(id: i64, change: impl Fn(&mut Features)) -> Vec<u8> {
    let mut features = Features::default();
    features.set_bytes(key::ENCODED, vec![png(20, 10).into()]);
    features.set_bytes(key::SOURCE_ID, vec![id.to_string().into()]);
    features.set_ints(key::WIDTH, vec![20]);
    features.set_ints(key::HEIGHT, vec![10]);
    features.set_ints(key::LABEL, vec![3, 3]);
    features.set_floats(key::XMIN, vec![0.25, 0.0]);
    features.set_floats(key::YMIN, vec![0.5, 0.0]);
    features.set_floats(key::XMAX, vec![0.5, 1.0]);
    features.set_floats(key::YMAX, vec![0.75, 1.0]);
    change(&mut features);
    features.encode_to_vec()
}

fn load_records(payloads: &[Vec<u8>], options: &ReadOptions) -> Result<(DetectionDataset, LoadReport)> {
    let mut bytes = Vec::new();
    for payload in payloads {
        write_record(&mut bytes, payload).unwrap();
    }
    load_bytes(&bytes, options)
}

fn load_bytes(bytes: &[u8], options: &ReadOptions) -> Result<(DetectionDataset, LoadReport)> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.tfrecord"), bytes).unwrap();
    load(&pattern(folder.path()), options)
}

#[test]
fn boxes_become_pixels_and_absent_lists_their_defaults() {
    let (data, report) = load_changed(|_| {}).unwrap();
    let objects = &data.examples[0].objects;
    assert_eq!(objects[0].box_xywh_px, [5.0, 5.0, 5.0, 2.5]);
    assert_eq!(objects[1].box_xywh_px, [0.0, 0.0, 20.0, 10.0]);
    assert_eq!(
        (objects[0].area, objects[0].is_crowd, objects[0].difficult),
        (12.5, false, false)
    );
    assert!(report.is_clean(), "{report:?}");
    // Without any text an id is its own name.
    assert_eq!(data.categories[0].name, "3");
}

#[test]
fn unknown_features_are_ignored_and_a_missing_size_is_measured() {
    let (data, _) = load_changed(|features| {
        features.set_ints(key::WIDTH, vec![]);
        features.set_ints(key::HEIGHT, vec![-1]);
        features.set_floats("something/else", vec![f32::NAN]);
    })
    .unwrap();
    assert_eq!((data.examples[0].width, data.examples[0].height), (20, 10));
}

#[test]
fn boxes_past_the_image_are_clipped_and_boxes_without_area_dropped() {
    let (data, report) = load_changed(|features| {
        features.set_ints(key::LABEL, vec![3; 4]);
        features.set_floats(key::XMIN, vec![-0.5, 0.5, 0.75, 1.5]);
        features.set_floats(key::XMAX, vec![0.5, 0.5, 0.25, 1.75]);
        features.set_floats(key::YMIN, vec![0.0; 4]);
        features.set_floats(key::YMAX, vec![0.5; 4]);
    })
    .unwrap();
    assert_eq!(data.examples[0].objects.len(), 1);
    assert_eq!(data.examples[0].objects[0].box_xywh_px, [0.0, 0.0, 10.0, 5.0]);
    assert_eq!((report.clipped.len(), report.dropped.len()), (1, 3));
}

#[test]
fn ids_that_are_no_numbers_and_missing_ones_get_stable_numbers() {
    let id = |source_id: Vec<Bytes>| {
        let (data, _) =
            load_changed(|features| features.set_bytes(key::SOURCE_ID, source_id.clone())).unwrap();
        (data.examples[0].image_id, data.examples[0].source_id.clone())
    };
    assert_eq!(id(vec!["17".into()]), (17, "17".into()));
    let (named, text) = id(vec!["2007_000027".into()]);
    assert_eq!(text, "2007_000027");
    assert!((0..1 << 53).contains(&named));
    assert_eq!(named, id(vec!["2007_000027".into()]).0);
    assert_ne!(named, id(vec!["2007_000028".into()]).0);
    assert!((0..1 << 53).contains(&id(vec![]).0));
}

#[test]
fn features_that_make_no_sense_are_named_with_file_record_and_offset() {
    type Change = fn(&mut Features);
    let changes: [(Change, &str); 9] = [
        (|f| f.set_bytes(key::ENCODED, vec![]), "image/encoded"),
        (|f| f.set_floats(key::WIDTH, vec![1.0]), "image/width"),
        (|f| f.set_ints(key::HEIGHT, vec![1 << 40]), "image/height"),
        (
            |f| f.set_floats(key::XMAX, vec![0.5]),
            "xmax has 1 values and image/object/class/label 2",
        ),
        (|f| f.set_ints(key::IS_CROWD, vec![0]), "is_crowd has 1"),
        (
            |f| f.set_floats(key::YMIN, vec![f32::NAN, 0.0]),
            "object 0: box [0.25, NaN",
        ),
        (
            |f| f.set_floats(key::AREA, vec![1.0, f32::INFINITY]),
            "object 1: box",
        ),
        (
            |f| f.set_ints(key::LABEL, vec![1, -1]),
            "object 1: category id -1",
        ),
        (
            |f| f.set_bytes(key::TEXT, vec!["a".into(), "b".into()]),
            "category id 3 is called \"b\"",
        ),
    ];
    for (change, expected) in changes {
        let error = load_changed(change).unwrap_err();
        assert!(matches!(error, DataError::Record { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains(expected) && text.contains("a.tfrecord: record 0 at byte 12"),
            "{text}"
        );
    }
    let error = load_records(&[vec![0xff; 9]], &ReadOptions::default()).unwrap_err();
    assert!(error.to_string().contains("tf.train.Example"), "{error}");
}

#[test]
fn an_image_with_a_hundred_thousand_objects_is_read() {
    let (data, _) = load_changed(|features| {
        features.set_ints(key::LABEL, vec![3; 100_000]);
        for (key, value) in [
            (key::XMIN, 0.0),
            (key::YMIN, 0.0),
            (key::XMAX, 0.5),
            (key::YMAX, 0.5),
        ] {
            features.set_floats(key, vec![value; 100_000]);
        }
    })
    .unwrap();
    assert_eq!(data.examples[0].objects.len(), 100_000);
}

#[test]
fn records_of_captions_are_refused_with_the_way_out() {
    let captions = |features: &mut Features| {
        for key in [key::LABEL, key::XMIN, key::XMAX, key::YMIN, key::YMAX] {
            features.features.as_mut().unwrap().feature.remove(key);
        }
        features.set_bytes(key::CAPTION, vec!["a cat".into()]);
    };
    let error = load_changed(captions).unwrap_err().to_string();
    assert!(
        error.contains("get_coco.sh") && error.contains("instances_train2017.json"),
        "{error}"
    );
    let unlabelled = ReadOptions {
        allow_unlabelled: true,
        ..ReadOptions::default()
    };
    assert!(load_records(&[record(1, captions)], &unlabelled).is_ok());
}

#[test]
fn damaged_records_are_skipped_on_request_up_to_a_limit_and_listed() {
    let payloads: Vec<Vec<u8>> = (0..3).map(|id| record(id, |_| {})).collect();
    let mut bytes = Vec::new();
    for payload in &payloads {
        write_record(&mut bytes, payload).unwrap();
    }
    bytes[payloads[0].len() + 16 + 20] ^= 1;
    let skip = |at_most| ReadOptions {
        damage: Damage::Skip { at_most },
        ..ReadOptions::default()
    };
    let error = load_bytes(&bytes, &ReadOptions::default()).unwrap_err();
    assert!(matches!(error, DataError::Record { record: 1, .. }), "{error}");
    let (data, report) = load_bytes(&bytes, &skip(1)).unwrap();
    let ids: Vec<i64> = data.examples.iter().map(|example| example.image_id).collect();
    assert_eq!((ids, report.skipped.len()), (vec![0, 2], 1));
    let error = load_bytes(&bytes, &skip(0)).unwrap_err().to_string();
    assert!(
        error.contains("record 1: at byte") && error.contains("1 records"),
        "{error}"
    );
}

#[test]
fn an_image_id_that_occurs_twice_is_refused() {
    let twice = [record(4, |_| {}), record(4, |_| {})];
    let error = load_records(&twice, &ReadOptions::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("image id 4") && error.contains("twice"), "{error}");
}

#[test]
fn a_file_without_records_and_records_over_the_limit_are_refused() {
    let error = load_bytes(&[], &ReadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("holds no record"), "{error}");
    let small = ReadOptions {
        max_record_bytes: 16,
        ..ReadOptions::default()
    };
    let error = load_records(&[record(1, |_| {})], &small).unwrap_err();
    assert!(matches!(error, DataError::TooLarge { .. }), "{error}");
}

#[test]
fn the_error_is_the_one_of_the_first_faulty_shard_for_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in [("a", &b""[..]), ("b", b"short"), ("c", b"shorter")] {
        fs::write(folder.path().join(format!("{name}.tfrecord")), bytes).unwrap();
    }
    for threads in [0, 1, 2, 8] {
        let options = ReadOptions {
            threads,
            ..ReadOptions::default()
        };
        let error = load(&pattern(folder.path()), &options).unwrap_err().to_string();
        assert!(error.contains("b.tfrecord"), "{error}");
    }
}

#[test]
fn compressed_shards_read_like_plain_ones_and_bombs_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(5, &[object([1.1, 2.2, 3.3, 4.4], 1)]);
    let report = write(&data, &folder.path().join("a"), &options(2), &mut || {}).unwrap();
    for shard in &report.shards {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&fs::read(shard).unwrap()).unwrap();
        fs::write(format!("{}.gz", shard.display()), packed.finish().unwrap()).unwrap();
        fs::remove_file(shard).unwrap();
    }
    let pattern = folder.path().join("*.gz").display().to_string();
    let (read, _) = load(&pattern, &ReadOptions::default()).unwrap();
    assert_same_for_training(&read, &data);
    assert!(matches!(read.examples[0].source, ImageSource::Memory(_)));
    let small = ReadOptions {
        max_unpacked_bytes: 100,
        ..ReadOptions::default()
    };
    let error = load(&pattern, &small).unwrap_err().to_string();
    assert!(error.contains("gzip -d"), "{error}");
    let first = format!("{}.gz", report.shards[0].display());
    let bytes = fs::read(&first).unwrap();
    fs::write(&first, &bytes[..bytes.len() / 2]).unwrap();
    let error = load(&pattern, &ReadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("cut off"), "{error}");
}

/// The first record of one file in 65536 has a length that looks like gzip.
#[test]
fn a_record_whose_length_looks_like_gzip_is_a_record() {
    let payload = record(1, |features| {
        features.set_bytes("padding", vec![vec![0; 1].into()])
    });
    let overhead = payload.len() - 1;
    let padded = |len: usize| {
        record(1, |features| {
            features.set_bytes("padding", vec![vec![0; len].into()])
        })
    };
    let wanted = 0x8b1f;
    let payload = (0..16)
        .map(|slack| padded(wanted - overhead - slack))
        .find(|payload| payload.len() == wanted)
        .unwrap();
    let (data, _) = load_records(&[payload], &ReadOptions::default()).unwrap();
    assert!(matches!(data.examples[0].source, ImageSource::Record { .. }));
}

#[test]
fn a_manifest_holds_counts_checksums_and_classes_and_a_shorter_shard_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(4, &[object([1.0, 1.0, 2.0, 2.0], 1)]);
    let report = write(&data, &folder.path().join("a"), &options(2), &mut || {}).unwrap();
    let manifest = Manifest::read(&report.manifest).unwrap();
    assert_eq!((manifest.records, manifest.objects), (4, 2));
    assert_eq!(manifest.categories[&5], "never seen");
    for (entry, shard) in manifest.shards.iter().zip(&report.shards) {
        let bytes = fs::read(shard).unwrap();
        let digest: String = Sha256::digest(&bytes)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        assert_eq!((entry.bytes, &entry.sha256), (bytes.len() as u64, &digest));
        assert_eq!(entry.records, 2);
    }
    // Cut off between two records: nothing else would tell.
    let bytes = fs::read(&report.shards[0]).unwrap();
    let first = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 16;
    fs::write(&report.shards[0], &bytes[..first]).unwrap();
    let error = load(&pattern(folder.path()), &ReadOptions::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("holds 1 records"), "{error}");
}

#[test]
fn boxes_of_hundredths_and_texts_as_ids_come_back_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let mut data = dataset(
        1,
        &[
            object([1.13, 2.27, 3.31, 4.49], 1),
            object([0.0, 0.07, 19.99, 9.93], 1),
        ],
    );
    data.examples[0].source_id = "2007_000027".into();
    data.examples[0].image_id = crate::dataset::stable_id("2007_000027");
    write(&data, &folder.path().join("a"), &options(1), &mut || {}).unwrap();
    let (read, _) = load(&pattern(folder.path()), &ReadOptions::default()).unwrap();
    let boxes = |data: &DetectionDataset| {
        data.examples[0]
            .objects
            .iter()
            .map(|o| o.box_xywh_px)
            .collect::<Vec<_>>()
    };
    assert_eq!(boxes(&read), boxes(&data));
    assert_eq!(read.examples[0].source_id, "2007_000027");
    assert_eq!(read.examples[0].image_id, data.examples[0].image_id);
}

#[test]
fn real_annotations_survive_the_way_through_records() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/coco");
    if !root.exists() {
        println!("skipped: ../shared/data is absent");
        return;
    }
    let (data, _) = crate::coco::load(&root.join("instances_val2017.json"), &root.join("val2017")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write(&data, &folder.path().join("val"), &options(5), &mut || {}).unwrap();
    let (read, report) = load(&pattern(folder.path()), &ReadOptions::default()).unwrap();
    assert_same_for_training(&read, &data);
    assert!(report.is_clean(), "{report:?}");
}

proptest! {
    #[test]
    fn normalised_corners_survive_bit_for_bit(
        (width, height) in (1u32..8000, 1u32..8000),
        // Hundredths of a pixel as COCO writes them, and arbitrary fractions.
        corners in [0.0f64..1.0, 0.0..1.0, 0.0..1.0, 0.0..1.0], hundredths: bool,
    ) {
        let (w, h) = (f64::from(width), f64::from(height));
        let round = |v: f64| if hundredths { (v * 100.0).round() / 100.0 } else { v };
        let (left, right) = (corners[0].min(corners[1]) * w, corners[0].max(corners[1]) * w);
        let (top, bottom) = (corners[2].min(corners[3]) * h, corners[2].max(corners[3]) * h);
        let box_xywh_px = [left, top, right - left, bottom - top].map(round);
        let written = Example {
            width, height,
            objects: vec![object(box_xywh_px, 1)],
            ..dataset(1, &[]).examples.remove(0)
        };
        let [xmin, ymin, xmax, ymax] = normalized(&written)[0];
        prop_assume!(xmax > xmin && ymax > ymin && xmax <= 1.0 && ymax <= 1.0);
        let (read, report) = load_changed(|features| {
            features.set_ints(key::WIDTH, vec![width.into()]);
            features.set_ints(key::HEIGHT, vec![height.into()]);
            features.set_ints(key::LABEL, vec![1]);
            features.set_floats(key::XMIN, vec![xmin]);
            features.set_floats(key::YMIN, vec![ymin]);
            features.set_floats(key::XMAX, vec![xmax]);
            features.set_floats(key::YMAX, vec![ymax]);
        }).unwrap();
        prop_assert_eq!(normalized(&read.examples[0]), normalized(&written));
        prop_assert!(report.is_clean());
    }
}
