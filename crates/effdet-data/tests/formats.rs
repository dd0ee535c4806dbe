//! Data sets through every format and back: the same images, ids and boxes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use effdet_data::convert::{ConvertOptions, coco_folder};
use effdet_data::dataset::{Category, DetectionDataset, Example, ImageSource, ObjectAnnotation, stable_id};
use effdet_data::layout::Layout;
use effdet_data::report::LoadReport;
use effdet_data::synthetic::{self, SyntheticConfig};
use effdet_data::tfrecord::{self, WriteOptions};
use effdet_data::{voc, yolo};
use effdet_model::label_map::CategoryId;
use flate2::Compression;
use flate2::write::GzEncoder;

const FORMATS: [&str; 4] = ["COCO", "VOC", "YOLO", "TFRecord"];
/// With records compressed, and in a single shard.
const VARIANTS: [&str; 6] = [
    "COCO",
    "VOC",
    "YOLO",
    "TFRecord",
    "TFRecord gzip",
    "TFRecord single",
];

fn shared(name: &str) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let folder = folder.join(name);
    if !folder.is_dir() {
        println!("skipped: {} is absent", folder.display());
        return None;
    }
    Some(folder)
}

fn write(data: &DetectionDataset, format: &str, root: &Path, split: &str) {
    let options = ConvertOptions::default();
    let none = &mut || {};
    match format {
        "COCO" => drop(coco_folder(data, root, split, &options, none).unwrap()),
        "VOC" => drop(voc::write(data, root, split, &options, none).unwrap()),
        "YOLO" => drop(yolo::write(data, root, split, &options, none).unwrap()),
        _ => {
            let options = WriteOptions {
                num_shards: if format == "TFRecord single" { 1 } else { 3 },
                ..WriteOptions::default()
            };
            drop(tfrecord::write(data, &root.join(split), &options, none).unwrap());
            if format == "TFRecord gzip" {
                compress_shards(root);
            }
        }
    }
}

fn compress_shards(root: &Path) {
    for shard in fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()) {
        if shard.extension().is_some_and(|extension| extension == "tfrecord") {
            let packed = File::create(format!("{}.gz", shard.display())).unwrap();
            let mut packed = GzEncoder::new(packed, Compression::fast());
            packed.write_all(&fs::read(&shard).unwrap()).unwrap();
            packed.finish().unwrap();
            fs::remove_file(&shard).unwrap();
        }
    }
}

fn read(format: &str, root: &Path, split: &str) -> (DetectionDataset, LoadReport) {
    let layout = Layout::find(root).unwrap();
    let source = layout.split(split).unwrap();
    assert_eq!(source.format_name(), format.split(' ').next().unwrap());
    source.load().unwrap()
}

/// Boxes as training divides them.
fn normalised(example: &Example, object: &ObjectAnnotation) -> [f32; 4] {
    let [x, y, w, h] = object.box_xywh_px;
    let (width, height) = (f64::from(example.width), f64::from(example.height));
    [x / width, y / height, (x + w) / width, (y + h) / height].map(|v| v as f32)
}

/// Asserts that both hold the same, apart from what the formats named by `format` cannot hold, and returns the number of boxes that differ in the last bits of f64.
fn assert_same(read: &DetectionDataset, written: &DetectionDataset, format: &str) -> usize {
    assert_eq!(read.categories, written.categories, "{format}");
    let by_id = |data: &'_ DetectionDataset| -> BTreeMap<i64, Example> {
        data.examples.iter().map(|e| (e.image_id, e.clone())).collect()
    };
    let (read, written) = (by_id(read), by_id(written));
    assert_eq!(
        read.keys().collect::<Vec<_>>(),
        written.keys().collect::<Vec<_>>(),
        "{format}"
    );
    let mut inexact = 0;
    for (id, theirs) in &written {
        let ours = &read[id];
        assert_eq!(
            (&ours.file_name, ours.width, ours.height, ours.objects.len()),
            (
                &theirs.file_name,
                theirs.width,
                theirs.height,
                theirs.objects.len()
            ),
            "{format}"
        );
        assert_eq!(
            ours.source.read_bytes(1 << 26).unwrap(),
            theirs.source.read_bytes(1 << 26).unwrap(),
            "{format}"
        );
        for (a, b) in ours.objects.iter().zip(&theirs.objects) {
            assert_eq!(
                (a.category, a.is_crowd, a.area as f32, normalised(ours, a)),
                (b.category, b.is_crowd, b.area as f32, normalised(theirs, b)),
                "{format}, image {id}"
            );
            if !format.contains("COCO") {
                assert_eq!(a.difficult, b.difficult);
            }
            if !format.contains("TFRecord") {
                assert_eq!((a.box_xywh_px, a.area), (b.box_xywh_px, b.area), "{format}");
            }
            let differs = |(a, b): (f64, f64)| {
                assert!((a - b).abs() < 1e-4, "{format}, image {id}: {a} {b}");
                a != b
            };
            inexact += usize::from(a.box_xywh_px.into_iter().zip(b.box_xywh_px).any(differs));
        }
    }
    inexact
}

fn there_and_back(name: &str, split: &str, data: &DetectionDataset) {
    let scratch = tempfile::tempdir().unwrap();
    let objects: usize = data.examples.iter().map(|example| example.objects.len()).sum();
    for format in FORMATS {
        let root = scratch.path().join(format);
        write(data, format, &root, split);
        let (again, report) = read(format, &root, split);
        assert!(
            report.is_clean() && report.notes.is_empty(),
            "{format}: {report:?}"
        );
        let inexact = assert_same(&again, data, format);
        println!(
            "{name} {split}: {} images, {objects} objects through {format}: {inexact} boxes differ in the last bits",
            data.examples.len()
        );
    }
    // One after the other: nothing gets lost on a longer way either.
    let mut current = data.clone();
    for format in ["YOLO", "VOC", "TFRecord", "COCO"] {
        let root = scratch.path().join(format!("chain {format}"));
        write(&current, format, &root, split);
        current = read(format, &root, split).0;
    }
    assert_same(&current, data, "TFRecord");
}

#[test]
fn a_rendered_set_survives_every_format() {
    let config = SyntheticConfig {
        image_size: 64,
        ..SyntheticConfig::default()
    };
    let mut data = synthetic::dataset(&config, 0..6);
    // Fractions, crowds, areas of their own, ids out of order.
    for (index, example) in data.examples.iter_mut().enumerate() {
        example.image_id = 1000 - index as i64 * 7;
        example.source_id = example.image_id.to_string();
        for object in &mut example.objects {
            let [x, y, w, h] = object.box_xywh_px;
            object.box_xywh_px = [x + 0.25, y + 0.13, w - 0.41, h - 1.0 / 3.0];
            object.area = 17.125;
            object.is_crowd = index == 2;
        }
    }
    there_and_back("rendered", "train", &data);
}

#[test]
fn the_real_sets_survive_every_format() {
    for (name, split) in [("bccd", "train"), ("coco", "val"), ("shape", "val")] {
        let Some(folder) = shared(name) else { continue };
        let layout = Layout::find(&folder).unwrap();
        let (data, _) = layout.split(split).unwrap().load().unwrap();
        there_and_back(name, split, &data);
    }
}

/// Fractional boxes, crowds, ids that are text, images without objects, names in several scripts and folders, ids with gaps,
/// difficult objects, a greyscale image.
fn awkward() -> DetectionDataset {
    let config = SyntheticConfig {
        image_size: 64,
        ..SyntheticConfig::default()
    };
    let mut data = synthetic::dataset(&config, 0..7);
    let ids = [7, 300, 12, 4001].map(CategoryId);
    let names = ["circle", "größerer Stern", "квадрат", "a b,c"];
    let own: Vec<CategoryId> = data.categories.iter().map(|category| category.id).collect();
    data.categories = (ids.into_iter().zip(names))
        .map(|(id, name)| Category {
            id,
            name: name.to_owned(),
        })
        .collect();
    data.categories.sort_by_key(|category| category.id);
    let files = [
        "north/a.jpg",
        "south/a.jpg",
        "south/far/b-1.jpg",
        "Ünïcödé/日本.jpg",
        "plain.jpg",
        "grey.jpg",
        "empty.jpg",
    ];
    for (index, (example, file)) in data.examples.iter_mut().zip(files).enumerate() {
        file.clone_into(&mut example.file_name);
        example.source_id = format!("img-{index}-β");
        example.image_id = stable_id(&example.source_id);
        for (at, object) in example.objects.iter_mut().enumerate() {
            let [x, y, w, h] = object.box_xywh_px;
            object.box_xywh_px = [x + 0.25, y + 0.13, w - 0.41, h - 1.0 / 3.0];
            object.area = 17.125 + at as f64;
            object.is_crowd = index == 2 && at == 0;
            object.difficult = index == 1;
            object.category = ids[own.iter().position(|id| *id == object.category).unwrap()];
        }
    }
    data.examples[6].objects.clear();
    let mut grey = Vec::new();
    image::codecs::jpeg::JpegEncoder::new(&mut grey)
        .encode_image(&image::GrayImage::from_fn(64, 64, |x, y| {
            image::Luma([(2 * x + y) as u8])
        }))
        .unwrap();
    data.examples[5].source = ImageSource::Memory(grey.into());
    data
}

/// Every format to every other.
fn every_pair(name: &str, split: &str, data: &DetectionDataset, formats: &[&str]) {
    for from in formats {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("from");
        write(data, from, &root, split);
        let (first, _) = read(from, &root, split);
        for to in formats.iter().filter(|to| *to != from) {
            let way = format!("{name}: {from} to {to}");
            let there = scratch.path().join(format!("to {to}"));
            write(&first, to, &there, split);
            let (second, report) = read(to, &there, split);
            assert!(report.is_clean() && report.notes.is_empty(), "{way}: {report:?}");
            assert_same(&second, data, &way);
            fs::remove_dir_all(there).unwrap();
        }
    }
}

#[test]
fn an_awkward_set_survives_every_ordered_pair_of_formats() {
    every_pair("awkward", "train", &awkward(), &VARIANTS);
}

#[test]
fn the_real_sets_survive_every_ordered_pair_of_formats() {
    let sets = [
        ("bccd", "train"),
        ("coco", "train"),
        ("coco", "val"),
        ("shape", "val"),
    ];
    for (name, split) in sets {
        let Some(folder) = shared(name) else { continue };
        let layout = Layout::find(&folder).unwrap();
        let (data, _) = layout.split(split).unwrap().load().unwrap();
        every_pair(name, split, &data, &FORMATS);
    }
}
