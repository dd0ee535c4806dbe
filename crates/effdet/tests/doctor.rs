//! One broken data set per thing that `effdet data doctor` looks for: each is found with its place and its remedy, in the table, as
//! JSON, on the page and by the exit code.

mod common;

use std::fs;
use std::path::Path;

use common::Scratch;
use effdet_data::tfrecord::framing::write_record;
use effdet_model::label_map::LabelMap;
use serde_json::{Value, json};

const TRAIN: &str = "shapes/annotations/instances_train.json";
const VAL: &str = "shapes/annotations/instances_val.json";

/// A broken set and what has to be said about it.
struct Case {
    /// Check, as in the JSON.
    check: &'static str,
    severity: &'static str,
    /// Part of a file, record or message that tells where.
    place: &'static str,
    /// Part of the remedy.
    remedy: &'static str,
    /// What names the data.
    options: &'static str,
    spoil: fn(&Scratch),
}

/// A case of the folder `shapes`.
fn case(
    check: &'static str,
    severity: &'static str,
    place: &'static str,
    remedy: &'static str,
    spoil: fn(&Scratch),
) -> Case {
    let options = "--data shapes";
    Case {
        check,
        severity,
        place,
        remedy,
        options,
        spoil,
    }
}

/// 12 training and 4 held-out images of 128x64 pixels with their objects in the right half, so that x and y cannot be confused.
fn sound() -> Scratch {
    let scratch = Scratch::new();
    scratch.succeed("data synth --output shapes --images 12 --val-images 4 --image-size 64");
    for split in ["train", "val"] {
        change(
            &scratch,
            &format!("shapes/annotations/instances_{split}.json"),
            |tree| {
                for image in list(tree, "images") {
                    image["width"] = json!(128);
                    let file = scratch.path(&format!(
                        "shapes/{split}/{}",
                        image["file_name"].as_str().unwrap()
                    ));
                    let narrow = image::open(&file).unwrap().to_rgb8();
                    let mut wide = image::RgbImage::new(128, 64);
                    image::imageops::replace(&mut wide, &narrow, 64, 0);
                    wide.save(&file).unwrap();
                }
                each_box(tree, |[x, y, w, h]| [x + 64.0, y, w, h]);
            },
        );
    }
    scratch
}

fn change(scratch: &Scratch, file: &str, change: impl FnOnce(&mut Value)) {
    let file = scratch.path(file);
    let mut tree: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    change(&mut tree);
    fs::write(&file, tree.to_string()).unwrap();
}

fn train(scratch: &Scratch, change_tree: impl FnOnce(&mut Value)) {
    change(scratch, TRAIN, change_tree);
}

fn list<'a>(tree: &'a mut Value, key: &str) -> &'a mut Vec<Value> {
    tree[key].as_array_mut().unwrap()
}

fn each_box(tree: &mut Value, change: impl Fn([f64; 4]) -> [f64; 4]) {
    for annotation in list(tree, "annotations") {
        let bbox = [0, 1, 2, 3].map(|at| annotation["bbox"][at].as_f64().unwrap());
        annotation["bbox"] = json!(change(bbox));
    }
}

fn shift_ids(scratch: &Scratch, by: i64) {
    train(scratch, |tree| {
        for annotation in list(tree, "annotations") {
            annotation["category_id"] = json!(annotation["category_id"].as_i64().unwrap() + by);
        }
    });
}

/// COCO's names under the ids 1 to 80 in both splits.
fn coco_names_on_1_to_80(scratch: &Scratch) {
    let coco = LabelMap::coco();
    let categories: Vec<Value> = (coco.categories().zip(1..))
        .map(|((_, name), id)| json!({"id": id, "name": name}))
        .collect();
    for file in [TRAIN, VAL] {
        change(scratch, file, |tree| tree["categories"] = json!(categories));
    }
}

/// COCO's names under COCO's ids.
fn coco_categories(scratch: &Scratch) {
    let categories: Vec<Value> = (LabelMap::coco().categories())
        .map(|(id, name)| json!({"id": id.0, "name": name}))
        .collect();
    for file in [TRAIN, VAL] {
        change(scratch, file, |tree| tree["categories"] = json!(categories));
    }
}

/// Training images of four times the size, with boxes of `width` × `height` pixels.
fn enlarge(scratch: &Scratch, (width, height): (f64, f64)) {
    train(scratch, |tree| {
        for image in list(tree, "images") {
            let file = scratch.path(&format!("shapes/train/{}", image["file_name"].as_str().unwrap()));
            let small = image::open(&file).unwrap();
            small
                .resize_exact(512, 256, image::imageops::FilterType::Nearest)
                .save(&file)
                .unwrap();
            (image["width"], image["height"]) = (json!(512), json!(256));
        }
        elongate(tree, [8.0, 20.0, width, height]);
    });
}

/// Gives every object a box, and the area that says how large it is.
fn elongate(tree: &mut Value, bbox: [f64; 4]) {
    for annotation in list(tree, "annotations") {
        (annotation["bbox"], annotation["area"]) = (json!(bbox), json!(bbox[2] * bbox[3]));
    }
}

fn rename_first_category(tree: &mut Value) {
    tree["categories"][0]["name"] = json!("disc");
}

fn to_records(scratch: &Scratch) {
    scratch.succeed(
        "data convert --data shapes --splits train,val --to tfrecord --output records --num-shards 2",
    );
}

/// A field of a protocol buffer that is bytes or a message.
fn field(tag: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![tag << 3 | 2];
    let mut len = bytes.len();
    while len >= 0x80 {
        out.push(len as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
    out.extend(bytes);
    out
}

/// Records as the reference's `create_coco_tfrecord.py` writes them when `get_coco.sh` names the captions: no boxes, captions instead.
fn captions_by_get_coco(scratch: &Scratch) {
    let number = |value: u8| field(3, &field(1, &[value]));
    let bytes = |value: &[u8]| field(1, &field(1, value));
    fs::create_dir(scratch.path("records")).unwrap();
    let mut shard = Vec::new();
    for index in 0..3u8 {
        let name = format!("00000{index}.jpg");
        let jpeg = fs::read(scratch.path(&format!("shapes/train/{name}"))).unwrap();
        let features: Vec<u8> = [
            ("image/height", number(64)),
            ("image/width", field(3, &field(1, &[0x80, 1]))),
            ("image/filename", bytes(name.as_bytes())),
            ("image/source_id", bytes(index.to_string().as_bytes())),
            ("image/encoded", bytes(&jpeg)),
            ("image/format", bytes(b"jpeg")),
            ("image/caption", bytes(b"Three shapes on a plain ground.")),
        ]
        .iter()
        .flat_map(|(key, value)| field(1, &[field(1, key.as_bytes()), field(2, value)].concat()))
        .collect();
        write_record(&mut shard, &field(1, &features)).unwrap();
    }
    fs::write(scratch.path("records/train-00000-of-00001.tfrecord"), shard).unwrap();
}

/// Puts an EXIF segment with an orientation into a JPEG.
fn orient(file: &Path, orientation: u8) {
    let jpeg = fs::read(file).unwrap();
    let mut exif = b"\xff\xe1\x00\x22Exif\0\0MM\x00\x2a\x00\x00\x00\x08\x00\x01".to_vec();
    exif.extend([0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, orientation, 0, 0, 0, 0, 0, 0]);
    fs::write(file, [&jpeg[..2], &exif, &jpeg[2..]].concat()).unwrap();
}

#[rustfmt::skip]
fn cases() -> Vec<Case> {
    let convention = "convert the boxes to the format";
    let files = "--train-json shapes/annotations/instances_train.json --train-images shapes/train";
    vec![
        case("no-boxes", "error", "12 images, no box", "instances_*.json", |s| train(s, |tree| tree["annotations"] = json!([]))),
        case("no-boxes", "error", "captions file", "get_coco.sh", |s| train(s, |tree| {
            for annotation in list(tree, "annotations") {
                *annotation = json!({"id": annotation["id"], "image_id": annotation["image_id"], "caption": "shapes"});
            }
        })),
        Case { options: "--data records", ..case("no-boxes", "error", "They hold captions", "get_coco.sh", captions_by_get_coco) },
        case("unknown-category", "error", "77 (1 objects)", "correct the ids", |s| train(s, |tree| tree["annotations"][0]["category_id"] = json!(77))),
        case("off-by-one", "error", "With +1", "subtract one", |s| shift_ids(s, -1)),
        case("off-by-one", "error", "With -1", "subtract one", |s| shift_ids(s, 1)),
        case("coco-ids", "warning", "ids 1 to 80", "91 outputs in the reference, 90 upstream", coco_names_on_1_to_80),
        case("unknown-category", "error", "use COCO's ids 1 to 90", "add the categories", |s| {
            coco_names_on_1_to_80(s);
            train(s, |tree| tree["annotations"][0]["category_id"] = json!(90));
        }),
        case("background-class", "warning", "category 0 (background)", "remove it", |s| for file in [TRAIN, VAL] {
            change(s, file, |tree| list(tree, "categories").push(json!({"id": 0, "name": "background"})));
        }),
        case("class-map-differs", "error", "in val", "one class map", |s| change(s, VAL, rename_first_category)),
        Case { options: "--training_file_pattern records/train-* --val_file_pattern records/val-* --val-json other.json", ..case(
            "class-map-differs", "error", "other.json", "one class map", |s| {
                to_records(s);
                fs::copy(s.path(VAL), s.path("other.json")).unwrap();
                change(s, "other.json", rename_first_category);
            })
        },
        Case { options: "--data shapes --checkpoint run", ..case("class-map-differs", "error", "checkpoint run", "one class map", |s| {
            s.train("run", "--max-steps 1");
            for file in [TRAIN, VAL] {
                change(s, file, rename_first_category);
            }
        }) },
        Case { options: "--data shapes --checkpoint run", ..case("outputs-differ", "warning", "checkpoint run: 90 class outputs", "--num-classes", |s| {
            coco_categories(s);
            s.train("run", "--max-steps 1 --num-classes 90");
        }) },
        Case { options: "--data shapes --checkpoint run --num-classes 91", ..case("outputs-differ", "warning", "--num-classes: 91 class outputs", "starts anew", |s| {
            coco_categories(s);
            s.train("run", "--max-steps 1 --num-classes 90");
        }) },
        Case { options: "--data shapes --checkpoint run", ..case("outputs-differ", "error", "the categories need 90", "as many outputs", |s| {
            s.train("run", "--max-steps 1");
            coco_categories(s);
        }) },
        Case { options: "--data shapes --num-classes 80", ..case("outputs-differ", "error", "80 class outputs; the categories need 90", "as many outputs", coco_categories) },
        case("box-convention", "error", "far corner", convention, |s| train(s, |tree| each_box(tree, |[x, y, w, h]| [x, y, x + w, y + h]))),
        case("box-convention", "error", "changed places", convention, |s| train(s, |tree| each_box(tree, |[x, y, w, h]| [y, x, h, w]))),
        Case { options: files, ..case("box-outside", "warning", "000000.jpg, record 1:", "correct or remove", |s| train(s, |tree| {
            tree["annotations"][0]["bbox"] = json!([300, 10, 10, 10]);
        })) },
        case("box-clipped", "warning", "000000.jpg, record 1:", "goes on beyond the edge", |s| train(s, |tree| {
            tree["annotations"][0]["bbox"] = json!([100, 10, 60, 10]);
        })),
        case("box-no-area", "warning", "000000.jpg, record 1:", "draw them again", |s| train(s, |tree| {
            tree["annotations"][0]["bbox"] = json!([70, 10, 0, 10]);
        })),
        case("duplicate-image", "error", "instances_train.json", "remove one of the entries", |s| train(s, |tree| {
            let image = tree["images"][0].clone();
            list(tree, "images").push(image);
        })),
        case("unknown-image", "error", "image id 555", "add the images", |s| train(s, |tree| tree["annotations"][0]["image_id"] = json!(555))),
        case("missing-file", "error", "000003.jpg", "copy what is missing", |s| fs::remove_file(s.path("shapes/train/000003.jpg")).unwrap()),
        case("undecodable", "error", "000003.jpg", "--on-corrupt skip", |s| fs::write(s.path("shapes/train/000003.jpg"), "no image").unwrap()),
        case("undecodable", "error", "000003.jpg", "--on-corrupt skip", |s| {
            fs::remove_file(s.path("shapes/train/000003.jpg")).unwrap();
            fs::create_dir(s.path("shapes/train/000003.jpg")).unwrap();
        }),
        Case { options: "--data records", ..case("damaged-record", "error", "train-00000-of-00002.tfrecord", "--on-corrupt skip", |s| {
            to_records(s);
            let shard = s.path("records/train-00000-of-00002.tfrecord");
            let mut bytes = fs::read(&shard).unwrap();
            let at = bytes.len() - 100;
            bytes[at] ^= 4;
            fs::write(&shard, bytes).unwrap();
        }) },
        case("size-differs", "error", "annotated as 960x64", "restore the originals", |s| train(s, |tree| tree["images"][0]["width"] = json!(960))),
        case("exif-rotation", "warning", "000003.jpg", "exiftran", |s| orient(&s.path("shapes/train/000003.jpg"), 6)),
        case("leakage", "warning", "000003.jpg of train", "remove them from one of the two", |s| {
            fs::copy(s.path("shapes/train/000003.jpg"), s.path("shapes/val/000013.jpg")).unwrap();
        }),
        case("anchor-recall", "warning", "--hparams anchor_scale=", "larger --image-size", |s| train(s, |tree| {
            each_box(tree, |[x, y, ..]| [x.min(120.0), y.min(56.0), 3.0, 3.0]);
        })),
        case("anchor-recall", "warning", "medium boxes", "see the anchors", |s| train(s, |tree| elongate(tree, [8.0, 5.0, 110.0, 10.0]))),
        case("anchor-recall", "warning", "large boxes", "see the anchors", |s| enlarge(s, (480.0, 24.0))),
        case("imbalance", "note", "times as frequent as square (1)", "examples of the rare ones", |s| train(s, |tree| {
            let one = |id: u32, image: u32, category: u32| {
                let bbox = [64.0 + f64::from(id % 16) * 2.0, f64::from(id % 17) * 2.0, 24.0, 24.0];
                json!({"id": id, "image_id": image, "category_id": category, "bbox": bbox, "area": 576.0, "iscrowd": 0})
            };
            let images: Vec<u32> = list(tree, "images").iter().map(|image| image["id"].as_u64().unwrap() as u32).collect();
            let mut all: Vec<Value> = (0..240).map(|id| one(id + 1, images[id as usize % images.len()], 1)).collect();
            all.push(one(500, images[0], 2));
            tree["annotations"] = json!(all);
        })),
    ]
}

#[test]
fn a_sound_set_has_none_of_these() {
    let scratch = sound();
    let report = scratch.succeed("data doctor --data shapes --image-size 512 --json");
    let report: Value = serde_json::from_str(&report).unwrap();
    for problem in report["problems"].as_array().unwrap() {
        let found = problem["check"].as_str().unwrap();
        assert!(cases().iter().all(|case| case.check != found), "{problem}");
    }
}

#[test]
fn every_broken_set_has_its_finding_in_every_report() {
    let sound = sound();
    for (number, case) in cases().iter().enumerate() {
        let scratch = Scratch::new();
        copy_folder(&sound.path("shapes"), &scratch.path("shapes"));
        (case.spoil)(&scratch);
        let name = format!("case {number}, {}: {}", case.check, case.place);
        let doctor = format!("data doctor --image-size 512 {}", case.options);

        let code = i32::from(case.severity == "error");
        let finished = scratch.run(&format!("{doctor} --json --html page.html"));
        assert_eq!(finished.code, Some(code), "{name}\n{}", finished.stdout);
        let report: Value = serde_json::from_str(&finished.stdout).unwrap();
        let told = |instance: &Value| {
            let record = instance["record"]
                .as_i64()
                .map_or_else(String::new, |record| format!(", record {record}"));
            let (file, what) = (
                instance["file"].as_str().unwrap(),
                instance["what"].as_str().unwrap(),
            );
            assert!(!file.is_empty(), "{name}: {instance}");
            format!("{file}{record}: {what}")
        };
        let names_place = |problem: &&Value| {
            let instances = problem["instances"].as_array().unwrap();
            let place = |instance| told(instance).contains(case.place);
            problem["check"] == case.check
                && !instances.is_empty()
                && (problem["detail"].as_str().unwrap().contains(case.place) || instances.iter().any(place))
        };
        let problem = (report["problems"].as_array().unwrap().iter())
            .find(names_place)
            .unwrap_or_else(|| panic!("{name}: {}", report["problems"]));
        assert_eq!(problem["severity"], case.severity, "{name}");
        assert!(
            problem["remedy"].as_str().unwrap().contains(case.remedy),
            "{name}: {problem}"
        );

        let page = fs::read_to_string(scratch.path("page.html")).unwrap();
        let page = page.replace("</code>", "").replace("&#39;", "'");
        for wanted in [case.check, case.place, case.remedy] {
            assert!(page.contains(wanted), "{name}: {wanted} is not on the page");
        }
        let finished = scratch.run(&format!("{doctor} --strict"));
        let lines = finished.stdout.lines();
        assert!(
            lines
                .clone()
                .any(|line| line.starts_with(case.severity) && line.contains(case.check)),
            "{name}\n{}",
            finished.stdout
        );
        for wanted in [case.place, case.remedy] {
            assert!(
                finished.stdout.contains(wanted),
                "{name}: {wanted}\n{}",
                finished.stdout
            );
        }
        if case.severity != "note" {
            assert_eq!(finished.code, Some(1), "{name}");
        }
    }
}

#[test]
fn training_refuses_records_of_captions_with_the_explanation() {
    let scratch = sound();
    captions_by_get_coco(&scratch);
    let message = scratch.fail(1, "train --data records --image-size 64");
    assert!(
        message.contains("get_coco.sh") && message.contains("instances_train2017.json"),
        "{message}"
    );
}

/// A checkpoint of the same classes and another number of outputs is a trap that training names before it starts.
#[test]
fn fine_tuning_with_another_number_of_outputs_is_warned_of() {
    let scratch = sound();
    coco_categories(&scratch);
    scratch.train("run", "--max-steps 1 --num-classes 90");
    let tune = |outputs: usize| {
        let finished = scratch.run(&format!(
            "train --data shapes --image-size 64 --batch-size 4 --max-steps 1 --num-classes {outputs} \
             --pretrained-ckpt run --run-dir tuned-{outputs}"
        ));
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
        finished.stderr
    };
    let warned = tune(91);
    for told in [
        "checkpoint run: 90 class outputs",
        "this run: 91 class outputs",
        "--num-classes",
    ] {
        assert!(warned.contains(told), "{told}\n{warned}");
    }
    assert!(!tune(90).contains("class outputs;"));
}

/// Root reads everything, so nothing is shown where tests run as root.
#[cfg(unix)]
#[test]
fn a_file_without_permission_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = sound();
    let file = scratch.path("shapes/train/000003.jpg");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::read(&file).is_ok() {
        println!("skipped: this user may read every file");
        return;
    }
    let finished = scratch.run("data doctor --data shapes --image-size 512");
    assert_eq!(finished.code, Some(1));
    for told in ["undecodable", "000003.jpg", "ermission"] {
        assert!(finished.stdout.contains(told), "{told}\n{}", finished.stdout);
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_folder(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}
