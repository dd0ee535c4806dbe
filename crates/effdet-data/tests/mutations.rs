//! Damaged input at every place where bytes from outside enter: the entry points of `fuzz/`, on sound input with bytes changed,
//! inserted, removed and cut off. `cargo fuzz` goes further; this goes with every change.

#[path = "../../../fuzz/entry_points.rs"]
mod entry_points;

use std::fs;
use std::path::Path;

use bytes::Bytes;
use effdet_data::synthetic::{SyntheticConfig, render};
use effdet_data::tfrecord::example::Example;
use effdet_data::tfrecord::framing::{RecordReader, write_record};
use effdet_data::tfrecord::parse_record;
use prost::Message;

/// Numbers that break assumptions.
const TOKENS: [&[u8]; 14] = [
    b"\xff\xff\xff\xff",
    b"\0\0\0\0\0\0\0\0",
    b"\xff\xd8",
    b"\xff\xda",
    b"-1",
    b"1e999",
    b"NaN",
    b"18446744073709551616",
    b"\"",
    b"[[[[[[[[",
    b"<!DOCTYPE a>",
    b"&a;",
    b"../",
    b"\xef\xbb\xbf",
];

/// A small generator, so that a failure comes again.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % end.max(1)
    }
}

fn mutate(seed: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.below(256) as u8,
            2 => bytes.truncate(at),
            3 => {
                let token = TOKENS[random.below(TOKENS.len())];
                bytes.splice(at..at, token.iter().copied());
            }
            4 => {
                let end = (at + random.below(16)).min(bytes.len());
                bytes.drain(at..end);
            }
            _ => {
                let end = (at + random.below(32)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, copy);
            }
        }
    }
    bytes
}

fn drive(entry: fn(&[u8]), seeds: &[Vec<u8>], rounds: usize) {
    for seed in seeds {
        entry(seed);
        for len in 0..seed.len().min(600) {
            entry(&seed[..len]);
        }
        let mut random = Random(seed.len() as u64);
        for _ in 0..rounds {
            entry(&mutate(seed, &mut random));
        }
    }
}

fn jpeg() -> Vec<u8> {
    let config = SyntheticConfig {
        image_size: 32,
        quality: 50,
        ..SyntheticConfig::default()
    };
    render(&config, 1).jpeg
}

fn png() -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::RgbaImage::from_fn(9, 7, |x, y| image::Rgba([(x * 20) as u8, (y * 30) as u8, 3, 200]))
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

fn example() -> Vec<u8> {
    let mut features = Example::default();
    features.set_bytes("image/encoded", vec![png().into()]);
    features.set_bytes("image/source_id", vec![Bytes::from_static(b"a-7")]);
    features.set_ints("image/width", vec![9]);
    features.set_ints("image/height", vec![7]);
    for (key, value) in [("xmin", 0.1), ("ymin", 0.2), ("xmax", 0.7), ("ymax", 0.9)] {
        features.set_floats(&format!("image/object/bbox/{key}"), vec![value; 2]);
    }
    features.set_ints("image/object/class/label", vec![1, 2]);
    features.encode_to_vec()
}

/// The seeds of a fuzz target, by name.
fn fuzz_seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    let mut seeds: Vec<(String, Vec<u8>)> = fs::read_dir(folder.join(target))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|file| {
            let name = file.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(&file).unwrap())
        })
        .collect();
    seeds.sort();
    seeds
}

#[test]
fn the_seeds_of_the_record_framing_are_sound_or_broken_as_their_names_say() {
    for (name, bytes) in fuzz_seeds("record_framing") {
        let file = Path::new(&name);
        let mut reader = RecordReader::new(&bytes[..], file, bytes.len() as u64, 1 << 20);
        let records: Result<Vec<_>, _> = std::iter::from_fn(|| reader.next_record().transpose()).collect();
        let expected = match name.as_str() {
            "empty" => Some(0),
            "one" => Some(1),
            "three" => Some(3),
            _ => None,
        };
        assert_eq!(records.ok().map(|records| records.len()), expected, "{name}");
        drive(entry_points::record_framing, &[bytes], 500);
    }
}

#[test]
fn the_seeds_of_the_examples_are_sound_or_broken_as_their_names_say() {
    for (name, bytes) in fuzz_seeds("tf_example") {
        let sound = [
            "coco",
            "unpacked-lists",
            "no-boxes",
            "captions",
            "voc-difficult",
            "text-id",
            "box-outside",
        ]
        .contains(&name.as_str());
        let parsed = parse_record(Path::new(&name), &bytes);
        assert_eq!(parsed.is_ok(), sound, "{name}: {parsed:?}");
        drive(entry_points::tf_example, &[bytes], 500);
    }
}

#[test]
fn damaged_records_come_back() {
    let mut records = Vec::new();
    for payload in [&b""[..], b"abc", &[7; 300]] {
        write_record(&mut records, payload).unwrap();
    }
    drive(entry_points::record_framing, &[records], 5000);
}

#[test]
fn damaged_examples_come_back() {
    drive(entry_points::tf_example, &[example()], 5000);
}

#[test]
fn damaged_instances_files_come_back() {
    let text = r#"{"info": {"a": [1, {"b": null}]}, "images": [{"id": 3, "file_name": "a.jpg", "width": 20, "height": 10},
        {"id": "x-1", "file_name": "b.jpg"}], "annotations": [
        {"id": 1, "image_id": 3, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 1, "area": 5.5, "segmentation": [[1, 2]]},
        {"image_id": "x-1", "category_id": 7, "bbox": [15, 5, 10, 10]}], "categories": [{"id": 7, "name": "cat"}]}"#;
    drive(entry_points::coco_json, &[text.as_bytes().to_vec()], 5000);
}

#[test]
fn damaged_voc_annotations_come_back() {
    let text = "<?xml version=\"1.0\"?><annotation><size><width>20</width><height>10</height></size><object><name>A &amp; B</name>\
        <difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax><ymax>8</ymax></bndbox></object></annotation>";
    drive(entry_points::voc_xml, &[text.as_bytes().to_vec()], 5000);
}

#[test]
fn damaged_yolo_labels_come_back() {
    let text = b"0 0.5 0.5 0.25 0.5\n\n 3.0\t0.1 0.2  0.3 0.2 0.3 0.6 0.1 0.6 \n";
    drive(entry_points::yolo_labels, &[text.to_vec()], 5000);
}

#[test]
fn damaged_images_come_back() {
    drive(entry_points::image, &[jpeg(), png()], 2500);
}
