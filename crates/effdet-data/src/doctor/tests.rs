//! A sound data set, and one broken variant per finding.

use std::fs;
use std::path::Path;

use effdet_model::hparams::{HParams, ImageSize};
use effdet_model::label_map::{CategoryId, LabelMap};
use serde_json::{Value, json};

use super::*;
use crate::convert::{ConvertOptions, coco_folder};
use crate::layout::Layout;
use crate::report::{Faults, LoadOptions};
use crate::synthetic::{self, SyntheticConfig};

/// 24 training and 6 held-out images of 96x64 pixels as a COCO folder.
fn sound() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = SyntheticConfig {
        image_size: 96,
        smallest_radius: 0.12,
        max_objects: 4,
        ..SyntheticConfig::default()
    };
    for (split, range) in [("train", 0..24), ("val", 24..30)] {
        let mut data = synthetic::dataset(&config, range);
        for example in &mut data.examples {
            crop(example);
        }
        coco_folder(
            &data,
            folder.path(),
            split,
            &ConvertOptions::default(),
            &mut || {},
        )
        .unwrap();
    }
    folder
}

/// Leaves the upper two thirds of an image, so that x and y differ.
fn crop(example: &mut crate::dataset::Example) {
    let bytes = example.source.read_bytes(1 << 20).unwrap();
    let image = crate::decode::decode_rgb(&bytes, &DecodeOptions::default()).unwrap();
    let image = image::imageops::crop_imm(&image, 0, 0, 96, 64).to_image();
    let mut jpeg = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 90)
        .encode_image(&image)
        .unwrap();
    example.source = crate::dataset::ImageSource::Memory(jpeg.into());
    example.height = 64;
    example.objects.retain_mut(|object| {
        let [x, y, w, h] = object.box_xywh_px;
        object.box_xywh_px = [x, y, w, h.min(64.0 - y)];
        object.area = w * h.min(64.0 - y);
        64.0 - y > 8.0
    });
}

fn change_json(folder: &Path, split: &str, change: impl Fn(&mut Value)) {
    let file = folder.join(format!("annotations/instances_{split}.json"));
    let mut tree: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    change(&mut tree);
    fs::write(file, tree.to_string()).unwrap();
}

fn each_box(tree: &mut Value, change: impl Fn([f64; 4]) -> [f64; 4]) {
    for annotation in tree["annotations"].as_array_mut().unwrap() {
        let bbox = [0, 1, 2, 3].map(|at| annotation["bbox"][at].as_f64().unwrap());
        annotation["bbox"] = json!(change(bbox));
    }
}

fn splits(folder: &Path) -> Vec<Split> {
    let layout = Layout::find(folder).unwrap();
    let options = LoadOptions {
        faults: Faults::Collect,
        ..LoadOptions::default()
    };
    let split = |(name, source): (&String, &crate::layout::SplitSource)| {
        let (dataset, report) = source.load_with(&options).unwrap();
        Split {
            name: name.clone(),
            place: folder.display().to_string(),
            format: source.format_name(),
            dataset,
            report,
        }
    };
    layout.splits.iter().map(split).collect()
}

fn options() -> Options {
    let mut hparams = HParams::preset("d0").unwrap();
    hparams.image_size = ImageSize::square(256);
    Options {
        anchors: Some(("d0".into(), AnchorConfig::from(&hparams))),
        held_out: vec!["val".into()],
        ..Options::default()
    }
}

fn diagnose(folder: &Path) -> Diagnosis {
    examine(&splits(folder), &options(), &|_| {})
}

fn with(diagnosis: &Diagnosis, check: Check) -> &Problem {
    let found = diagnosis.problems.iter().find(|problem| problem.check == check);
    found.unwrap_or_else(|| {
        let all: Vec<_> = diagnosis
            .problems
            .iter()
            .map(|problem| (problem.check, problem.count))
            .collect();
        panic!("no {check:?} among {all:?}")
    })
}

#[test]
fn a_sound_set_has_neither_errors_nor_warnings() {
    let folder = sound();
    let diagnosis = diagnose(folder.path());
    for problem in &diagnosis.problems {
        assert_eq!(problem.severity, Severity::Note, "{problem:?}");
    }
    let anchors = diagnosis.anchors.as_ref().unwrap();
    assert_eq!(anchors.all.boxes, diagnosis.splits[0].statistics.objects);
}

/// What breaks in an annotation file, and what is found.
type Variant = (Check, &'static str, fn(&mut Value));

#[rustfmt::skip]
const VARIANTS: &[Variant] = &[
    (Check::NoBoxes, "no box", |tree| tree["annotations"] = json!([])),
    (Check::BoxConvention, "far corner", |tree| each_box(tree, |[x, y, w, h]| [x, y, x + w, y + h])),
    (Check::BoxConvention, "changed places", |tree| each_box(tree, |[x, y, w, h]| [y, x, h, w])),
    (Check::BoxConvention, "centre", |tree| each_box(tree, |[x, y, w, h]| [x + w / 2.0, y + h / 2.0, w, h])),
    (Check::BoxConvention, "divided", |tree| each_box(tree, |[x, y, w, h]| [x / 96.0, y / 64.0, w / 96.0, h / 64.0])),
    (Check::OffByOne, "With +1", |tree| each(tree, "category_id", |id| id - 1)),
    (Check::OffByOne, "With -1", |tree| each(tree, "category_id", |id| id + 1)),
    (Check::UnknownCategory, "77 (1 objects)", |tree| tree["annotations"][0]["category_id"] = json!(77)),
    (Check::ClassMapDiffers, "2 ids differ", |tree| {
        tree["categories"][0]["name"] = json!("disc");
        tree["categories"][1]["name"] = json!("box");
    }),
    (Check::ClassMapDiffers, "same names under different ids", |tree| {
        tree["categories"][0]["id"] = json!(2);
        tree["categories"][1]["id"] = json!(1);
    }),
    (Check::BackgroundClass, "background", |tree| push(tree, "categories", json!({"id": 9, "name": "__background__"}))),
    (Check::DuplicateName, "is called as", |tree| push(tree, "categories", json!({"id": 9, "name": "star"}))),
    (Check::NoCategory, "no category_id", |tree| drop(tree["annotations"][3].as_object_mut().unwrap().remove("category_id"))),
    (Check::NoBox, "bbox", |tree| drop(tree["annotations"][3].as_object_mut().unwrap().remove("bbox"))),
    (Check::NotFinite, "not finite", |tree| {
        tree["annotations"][3]["bbox"] = json!([1, 1, 1e200, 1e200]);
        tree["annotations"][3]["area"] = Value::Null;
    }),
    (Check::UnknownImage, "image id 555", |tree| tree["annotations"][3]["image_id"] = json!(555)),
    (Check::DuplicateImage, "twice", |tree| { let image = tree["images"][0].clone(); push(tree, "images", image); }),
    (Check::NameEscapes, "../a.jpg", |tree| tree["images"][0]["file_name"] = json!("../a.jpg")),
    (Check::MissingFile, "gone.jpg", |tree| tree["images"][0]["file_name"] = json!("gone.jpg")),
    (Check::SizeDiffers, "annotated as 960x64", |tree| tree["images"][0]["width"] = json!(960)),
    (Check::BoxClipped, "1 of them by more", |tree| {
        tree["annotations"][0]["bbox"] = json!([90, 10, 6.5, 10]);
        tree["annotations"][1]["bbox"] = json!([80, 10, 18, 10]);
    }),
    (Check::BoxNoArea, "no area", |tree| tree["annotations"][3]["bbox"] = json!([10, 10, 0, 10])),
    (Check::BoxOutside, "outside", |tree| tree["annotations"][3]["bbox"] = json!([200, 10, 10, 10])),
    (Check::DuplicateBoxes, "again", |tree| {
        let mut annotation = tree["annotations"][0].clone();
        annotation["id"] = json!(5000);
        push(tree, "annotations", annotation);
    }),
    (Check::DuplicateAnnotation, "more than once", |tree| tree["annotations"][0]["id"] = json!(2)),
    (Check::UnusedCategory, "has no object", |tree| push(tree, "categories", json!({"id": 9, "name": "spare"}))),
    (Check::FewObjects, "has 1 objects", |tree| {
        push(tree, "categories", json!({"id": 9, "name": "rare"}));
        tree["annotations"][0]["category_id"] = json!(9);
    }),
    (Check::EmptyImages, "no object", |tree| {
        let list = tree["annotations"].as_array_mut().unwrap();
        list.retain(|annotation| annotation["image_id"] != 1);
    }),
    (Check::ManyObjects, "objects", |tree| {
        for index in 0..101 {
            let bbox = [f64::from(index % 30), f64::from(index / 30), 9.0, 9.0];
            push(tree, "annotations", json!({"id": 1000 + index, "image_id": 1, "category_id": 1, "bbox": bbox}));
        }
    }),
    (Check::Crowds, "a crowd", |tree| tree["annotations"][3]["iscrowd"] = json!(1)),
    (Check::AnchorRecall, "--hparams anchor_scale=", |tree| each_box(tree, |[x, y, ..]| [x, y, 7.0, 7.0])),
];

fn each(tree: &mut Value, key: &str, change: impl Fn(i64) -> i64) {
    for annotation in tree["annotations"].as_array_mut().unwrap() {
        annotation[key] = json!(change(annotation[key].as_i64().unwrap()));
    }
}

fn push(tree: &mut Value, key: &str, value: Value) {
    tree[key].as_array_mut().unwrap().push(value);
}

#[test]
fn every_broken_annotation_file_has_its_finding() {
    let folder = sound();
    let file = folder.path().join("annotations/instances_train.json");
    let original = fs::read(&file).unwrap();
    for (check, expected, change) in VARIANTS {
        change_json(folder.path(), "train", change);
        let diagnosis = diagnose(folder.path());
        let problem = with(&diagnosis, *check);
        let text = format!("{} {:?}", problem.detail, problem.instances);
        assert!(text.contains(expected), "{check:?}: {text}");
        assert!(problem.count > 0 && !problem.instances.is_empty() && !problem.remedy.is_empty());
        assert!(problem.instances.iter().all(|instance| !instance.file.is_empty()));
        fs::write(&file, &original).unwrap();
    }
}

#[test]
fn a_category_without_training_objects_is_named() {
    let folder = sound();
    change_json(folder.path(), "train", |tree| {
        let list = tree["annotations"].as_array_mut().unwrap();
        list.retain(|annotation| annotation["category_id"] != 4);
    });
    let diagnosis = diagnose(folder.path());
    assert!(
        with(&diagnosis, Check::Untrained).instances[0]
            .what
            .contains("star")
    );
}

#[test]
fn names_of_coco_on_other_ids_and_ids_of_coco_on_other_maps_are_found() {
    let folder = sound();
    let names: Vec<String> = LabelMap::coco()
        .categories()
        .map(|(_, name)| name.to_owned())
        .collect();
    let contiguous: Vec<Value> = (1..)
        .zip(&names)
        .map(|(id, name)| json!({"id": id, "name": name}))
        .collect();
    for split in ["train", "val"] {
        change_json(folder.path(), split, |tree| {
            tree["categories"] = json!(contiguous)
        });
    }
    let diagnosis = diagnose(folder.path());
    let problem = with(&diagnosis, Check::CocoIds);
    assert!(problem.detail.contains("ids 1 to 80"), "{}", problem.detail);
    // COCO's ids reach 90 where the map ends at 80.
    change_json(folder.path(), "train", |tree| {
        tree["annotations"][0]["category_id"] = json!(90);
        tree["annotations"][1]["category_id"] = json!(13);
    });
    let diagnosis = diagnose(folder.path());
    let problem = with(&diagnosis, Check::UnknownCategory);
    assert!(
        problem.detail.contains("COCO's ids 1 to 90"),
        "{}",
        problem.detail
    );
}

#[test]
fn a_checkpoint_of_other_classes_is_an_error_with_both_names() {
    let folder = sound();
    let map = |names: &[&str]| ClassMap {
        source: "checkpoint runs/x".into(),
        categories: (1..)
            .zip(names)
            .map(|(id, name)| Category {
                id: CategoryId(id),
                name: (*name).into(),
            })
            .collect(),
        may_lack: false,
    };
    let with_map = |map: ClassMap| {
        let options = Options {
            class_maps: vec![map],
            ..options()
        };
        examine(&splits(folder.path()), &options, &|_| {})
    };
    let same = with_map(map(&["circle", "square", "triangle", "star"]));
    assert_eq!(same.count(Severity::Error), 0);
    let other = with_map(map(&["circle", "square", "star", "triangle"]));
    let problem = with(&other, Check::ClassMapDiffers);
    let text = &problem.instances[0].what;
    assert!(
        text.contains("\"triangle\"") && text.contains("\"star\"") && text.contains("runs/x"),
        "{text}"
    );
}

/// A JPEG with an EXIF segment that gives its orientation.
fn oriented(jpeg: &[u8], orientation: u8) -> Vec<u8> {
    let mut exif = b"\xff\xe1\x00\x22Exif\0\0MM\x00\x2a\x00\x00\x00\x08\x00\x01".to_vec();
    exif.extend([0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, orientation, 0, 0, 0, 0, 0, 0]);
    [&jpeg[..2], &exif, &jpeg[2..]].concat()
}

#[test]
fn every_broken_image_has_its_finding() {
    let folder = sound();
    let image = folder.path().join("train/000003.jpg");
    let other = fs::read(folder.path().join("train/000004.jpg")).unwrap();
    let held_out = fs::read(folder.path().join("val/000025.jpg")).unwrap();
    let original = fs::read(&image).unwrap();
    let encode = |image: image::DynamicImage, format| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    };
    let grey = encode(image::GrayImage::new(96, 64).into(), image::ImageFormat::Jpeg);
    let alpha = encode(image::RgbaImage::new(96, 64).into(), image::ImageFormat::Png);
    let half = original[..original.len() / 2].to_vec();
    for (check, bytes, expected) in [
        (Check::Undecodable, Vec::new(), "0 bytes"),
        (Check::Undecodable, half, "end marker"),
        (Check::ExifRotation, oriented(&original, 6), "orientation 6"),
        (Check::Greyscale, grey, "one channel"),
        (Check::OtherColours, alpha.clone(), "alpha"),
        (Check::Extension, alpha, "PNG"),
        (Check::DuplicateContent, other, "000003.jpg"),
        (Check::Leakage, held_out, "000003.jpg of train"),
    ] {
        fs::write(&image, bytes).unwrap();
        let diagnosis = diagnose(folder.path());
        let text = format!("{:?}", with(&diagnosis, check).instances);
        assert!(text.contains(expected), "{check:?}: {text}");
    }
    // A quick look opens images, too, where there are few.
    let quick = Options {
        depth: Depth::Quick,
        ..options()
    };
    fs::write(&image, b"nothing").unwrap();
    let diagnosis = examine(&splits(folder.path()), &quick, &|_| {});
    assert_eq!(with(&diagnosis, Check::Undecodable).count, 1);
}

#[test]
fn findings_are_the_same_for_any_number_of_threads() {
    let folder = sound();
    fs::write(folder.path().join("train/000003.jpg"), b"nothing").unwrap();
    fs::write(folder.path().join("train/000005.jpg"), b"").unwrap();
    let splits = splits(folder.path());
    let json = |threads| {
        let options = Options { threads, ..options() };
        serde_json::to_string(&examine(&splits, &options, &|_| {})).unwrap()
    };
    assert_eq!(json(1), json(4));
}

#[test]
fn a_page_shows_the_examples_and_escapes_every_name() {
    let folder = sound();
    change_json(folder.path(), "train", |tree| {
        tree["annotations"][0]["bbox"] = json!([90, 10, 20, 10]);
        tree["categories"][0]["name"] = json!("<img src=x onerror=alert(1)>\u{202e}");
    });
    let splits = splits(folder.path());
    let diagnosis = examine(&splits, &options(), &|_| {});
    let page = page(&diagnosis, &splits, "<b>title</b>", &HtmlOptions::default());
    assert!(page.contains("data:image/jpeg;base64,"));
    assert!(page.contains("<rect x=\"90\" y=\"10\" width=\"20\" height=\"10\""));
    assert!(!page.contains("<img") && !page.contains("<b>title") && !page.contains('\u{202e}'));
    assert!(!page.contains("<script") && page.contains("&lt;img src=x"));
}

#[test]
fn the_real_sets_have_their_known_faults() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    if !root.exists() {
        println!("skipped: ../shared/data is absent");
        return;
    }
    let quick = |name: &str| {
        let options = Options {
            depth: Depth::Quick,
            held_out: vec!["val".into()],
            ..Options::default()
        };
        examine(&splits(&root.join(name)), &options, &|_| {})
    };
    let count = |diagnosis: &Diagnosis, check: Check, splits: &[&str]| -> usize {
        let of = |problem: &&Problem| problem.check == check && splits.contains(&problem.split.as_str());
        diagnosis
            .problems
            .iter()
            .filter(of)
            .map(|problem| problem.count)
            .sum()
    };
    let bccd = quick("bccd");
    assert_eq!(count(&bccd, Check::BoxNoArea, &["train", "val", "test"]), 2);
    let shape = quick("shape");
    assert_eq!(count(&shape, Check::BoxClipped, &["train", "val"]), 391);
    let by_more: usize = (shape.problems.iter())
        .filter(|problem| problem.check == Check::BoxClipped)
        .map(|problem| {
            problem
                .detail
                .split(' ')
                .next()
                .unwrap()
                .parse::<usize>()
                .unwrap()
        })
        .sum();
    assert_eq!(by_more, 384);
    let coco = quick("coco");
    assert_eq!(count(&coco, Check::Crowds, &["train"]), 25);
    assert_eq!(count(&coco, Check::Crowds, &["val"]), 20);
    for diagnosis in [&bccd, &shape, &coco] {
        assert_eq!(diagnosis.count(Severity::Error), 0, "{:?}", diagnosis.problems);
    }
}
