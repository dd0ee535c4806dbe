//! Folders in YOLO's layout, read and written.

use std::fs;
use std::sync::Arc;

use super::*;
use crate::convert::ConvertOptions;
use crate::layout::Layout;
use crate::report::Faults;

fn png(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::RgbImage::new(width, height)
        .write_to(&mut bytes, image::ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let file = root.path().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        match name.ends_with(".png") && text.is_empty() {
            true => fs::write(file, png(40, 20)).unwrap(),
            false => fs::write(file, text).unwrap(),
        }
    }
    root
}

const YAML: &str = "train: images/train\nval: val.txt\nnames: [cat, dog]\n";

#[test]
fn folders_and_lists_of_images_are_read_with_their_labels() {
    let root = folder(&[
        ("data.yaml", YAML),
        ("images/train/b.png", ""),
        ("images/train/a.png", ""),
        ("images/train/sub/c.png", ""),
        ("labels/train/a.txt", "1 0.5 0.5 0.5 0.5\n"),
        ("labels/train/sub/c.txt", "0 0.25 0.5 0.1 0.2"),
        ("images/val/7.png", ""),
        ("labels/val/7.txt", "0 0.5 0.5 0.2 0.2"),
        ("val.txt", "./images/val/7.png\n"),
    ]);
    let layout = Layout::find(root.path()).unwrap();
    let (train, report) = layout.split("train").unwrap().load().unwrap();
    let rows: Vec<(i64, &str, usize)> = (train.examples.iter())
        .map(|e| (e.image_id, e.file_name.as_str(), e.objects.len()))
        .collect();
    assert_eq!(rows, [(1, "a.png", 1), (2, "b.png", 0), (3, "sub/c.png", 1)]);
    assert_eq!(train.examples[0].objects[0].box_xywh_px, [10.0, 5.0, 20.0, 10.0]);
    assert_eq!(train.examples[0].objects[0].category, CategoryId(2));
    assert_eq!((train.examples[0].width, train.examples[0].height), (40, 20));
    assert!(report.is_clean());
    // A file that is called by a number has it as its id; the file itself may be named.
    let layout = Layout::find(&root.path().join("data.yaml")).unwrap();
    let (val, _) = layout.split("val").unwrap().load().unwrap();
    assert_eq!(val.examples[0].image_id, 7);
}

#[test]
fn a_list_of_classes_stands_in_for_a_configuration() {
    let root = folder(&[
        ("classes.txt", "cat\ndog\n"),
        ("images/a.png", ""),
        ("labels/a.txt", "0 0.5 0.5 0.5 0.5"),
    ]);
    let layout = Layout::find(root.path()).unwrap();
    let (train, _) = layout.split("train").unwrap().load().unwrap();
    assert_eq!((train.examples.len(), train.examples[0].objects.len()), (1, 1));
}

#[test]
fn faults_name_file_and_line_and_are_collected_on_request() {
    let root = folder(&[
        ("data.yaml", "train: images\nval: list.txt\nnames: [cat, dog]\n"),
        ("images/a.png", ""),
        ("labels/a.txt", "2 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5"),
        ("images/b.png", "no image"),
        ("images/c.png", ""),
        ("labels/c.txt", "0 0.5"),
        ("list.txt", "images/a.png\nimages/a.png\nimages/missing.png\n"),
    ]);
    let config = root.path().join("data.yaml");
    let error = load(&config, "train").unwrap_err().to_string();
    assert!(error.contains("a.txt: line 1: class 2"), "{error}");
    let collect = LoadOptions {
        faults: Faults::Collect,
        ..LoadOptions::default()
    };
    let kinds = |split| -> (usize, Vec<FindingKind>) {
        let (data, report) = load_with(&config, split, &collect).unwrap();
        let kinds = report.faults.iter().map(|fault| fault.kind);
        (data.examples.len(), kinds.collect())
    };
    let expected = [
        FindingKind::UnknownCategory,
        FindingKind::Undecodable,
        FindingKind::Malformed,
    ];
    assert_eq!(kinds("train"), (1, expected.to_vec()));
    let expected = [
        FindingKind::UnknownCategory,
        FindingKind::DuplicateImage,
        FindingKind::MissingFile,
    ];
    assert_eq!(kinds("val"), (1, expected.to_vec()));
    assert!(
        load(&config, "test")
            .unwrap_err()
            .to_string()
            .contains("train, val")
    );
}

#[test]
fn images_of_other_formats_are_named_instead_of_left_out() {
    let root = folder(&[
        ("data.yaml", "train: images\nnames: [cat]\n"),
        ("images/a.bmp", ""),
        ("images/a.cache", ""),
    ]);
    let error = load(&root.path().join("data.yaml"), "train")
        .unwrap_err()
        .to_string();
    assert!(error.contains("a.bmp"), "{error}");
}

fn dataset() -> DetectionDataset {
    let object = |box_xywh_px: [f64; 4], id: u32, is_crowd| ObjectAnnotation {
        box_xywh_px,
        category: CategoryId(id),
        area: 7.25,
        is_crowd,
        difficult: false,
    };
    let example = |image_id: i64, objects: Vec<ObjectAnnotation>| Example {
        image_id,
        source_id: format!("source {image_id}"),
        file_name: format!("sub/{image_id}.png"),
        width: 40,
        height: 20,
        source: ImageSource::Memory(Arc::from(png(40, 20))),
        objects,
    };
    let category = |(id, name): (u32, &str)| Category {
        id: CategoryId(id),
        name: name.into(),
    };
    DetectionDataset {
        name: "test".into(),
        examples: vec![
            example(
                500,
                vec![
                    object([0.1, 0.2, 1.0 / 3.0, 4.4], 70, false),
                    object([1.0, 1.0, 9.0, 9.0], 3, true),
                    object([3.0, 3.0, 3.0, 3.0], 3, false),
                ],
            ),
            example(7, vec![]),
        ],
        categories: [(3, "traffic light"), (70, "no: 1"), (90, "unseen")]
            .map(category)
            .to_vec(),
    }
}

#[test]
fn what_is_written_reads_back_equal_with_ids_areas_and_crowds() {
    let data = dataset();
    let root = tempfile::tempdir().unwrap();
    for split in ["train", "val"] {
        let converted = write(&data, root.path(), split, &ConvertOptions::default(), &mut || {}).unwrap();
        assert_eq!((converted.images, converted.objects, converted.crowds), (2, 2, 1));
    }
    let layout = Layout::find(root.path()).unwrap();
    assert_eq!(layout.splits.keys().collect::<Vec<_>>(), ["train", "val"]);
    let (read, report) = layout.split("train").unwrap().load().unwrap();
    assert_eq!(read.categories, data.categories);
    let by_id = |data: &DetectionDataset| -> std::collections::BTreeMap<i64, Example> {
        let plain = |example: &Example| Example {
            source: ImageSource::File("".into()),
            ..example.clone()
        };
        data.examples.iter().map(|e| (e.image_id, plain(e))).collect()
    };
    assert_eq!(by_id(&read), by_id(&data));
    assert!(report.is_clean() && report.notes.is_empty(), "{report:?}");
    let text = fs::read_to_string(root.path().join("labels/train/sub/500.txt")).unwrap();
    assert_eq!(text.lines().count(), 2, "the crowd is in the sidecar only");
    // Labels win.
    fs::write(
        root.path().join("labels/train/sub/500.txt"),
        "0 0.5 0.5 0.5 0.5\n",
    )
    .unwrap();
    let (read, report) = layout.split("train").unwrap().load().unwrap();
    let edited = read
        .examples
        .iter()
        .find(|example| example.image_id == 500)
        .unwrap();
    assert_eq!((edited.objects.len(), edited.objects[0].area), (1, 200.0));
    assert_eq!(report.notes[0].kind, FindingKind::Edited);
}

#[test]
fn a_failed_conversion_leaves_nothing_and_other_categories_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let convert = |data: &DetectionDataset, split: &str| {
        write(data, root.path(), split, &ConvertOptions::default(), &mut || {})
    };
    let mut broken = dataset();
    broken.examples[1].source = ImageSource::Memory(Arc::from(*b"no image"));
    assert!(convert(&broken, "train").is_err());
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    convert(&dataset(), "train").unwrap();
    let mut other = dataset();
    other.categories[0].name = "other".into();
    assert!(
        convert(&other, "val")
            .unwrap_err()
            .to_string()
            .contains("other categories")
    );
    assert!(
        convert(&dataset(), "train")
            .unwrap_err()
            .to_string()
            .contains("already")
    );
}
