//! `effdet data` and the data options of training, with the real binary in scratch folders.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

struct Scratch(tempfile::TempDir);

impl Scratch {
    /// A scratch folder with a data set `shapes` of 12 training and 4 held-out images.
    fn with_data() -> Self {
        let scratch = Self(tempfile::tempdir().unwrap());
        scratch.run(
            0,
            "data synth --output shapes --images 12 --val-images 4 --image-size 64",
        );
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs the binary, which has to end with `code`; its output and its messages.
    fn run(&self, code: i32, arguments: &str) -> (String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_effdet"))
            .args(arguments.split_whitespace())
            .current_dir(self.0.path())
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "effdet {arguments}\n{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
        (String::from_utf8(output.stdout).unwrap(), stderr)
    }

    fn json(&self, code: i32, arguments: &str) -> Value {
        serde_json::from_str(&self.run(code, arguments).0).unwrap()
    }

    fn inspect(&self, data: &str) -> Value {
        self.json(0, &format!("data inspect --data {data} --json"))["splits"].clone()
    }
}

#[test]
fn every_format_converts_to_every_other_and_trains() {
    let scratch = Scratch::with_data();
    scratch.run(0, "data convert --data shapes --to yolo --output yolo");
    scratch.run(0, "data convert --data yolo --to voc --output voc");
    scratch.run(
        0,
        "data convert --data voc --splits train,val --to tfrecord --output records --num-shards 2",
    );
    scratch.run(0, "data convert --data records --to coco --output coco");
    let original = scratch.inspect("shapes");
    for data in ["yolo", "voc", "records", "coco"] {
        let found = scratch.inspect(data);
        for split in 0..2 {
            assert_eq!(
                (&found[split]["split"], &found[split]["fingerprint"]),
                (&original[split]["split"], &original[split]["fingerprint"]),
                "{data}"
            );
        }
    }
    let hash = |data: &str| {
        let (out, _) = scratch.run(
            0,
            &format!(
                "train --data {data} --image-size 64 --batch-size 4 --max-steps 1 --quiet --run-dir run_{}",
                data.replace('/', "_")
            ),
        );
        let line = out.lines().find(|line| line.contains("weights ")).unwrap();
        assert!(line.contains("images/s, waiting "), "{line}");
        line.split("weights ").nth(1).unwrap()[..16].to_owned()
    };
    let expected = hash("shapes");
    assert_eq!(hash("yolo/data.yaml"), expected);
    assert_eq!(hash("voc"), expected);
    assert_eq!(hash("records"), expected);
}

#[test]
fn the_doctor_reports_as_table_json_and_page_and_by_its_exit_code() {
    let scratch = Scratch::with_data();
    let (table, _) = scratch.run(0, "data doctor --data shapes --image-size 256 --html page.html");
    assert!(
        table.contains("0 errors") && table.contains("page.html"),
        "{table}"
    );
    let page = fs::read_to_string(scratch.path("page.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("shapes"));
    fs::write(scratch.path("shapes/train/000003.jpg"), "no image").unwrap();
    let report = scratch.json(1, "data doctor --data shapes --json");
    let problem = &report["problems"][0];
    assert_eq!(
        (&problem["check"], &problem["severity"]),
        (&"undecodable".into(), &"error".into())
    );
    assert_eq!(problem["instances"][0]["file"], "000003.jpg");
    let (table, _) = scratch.run(1, "data doctor --data shapes --quick");
    assert!(
        table.contains("000003.jpg") && table.contains("remedy:"),
        "{table}"
    );
}

#[test]
fn the_doctor_explains_records_without_boxes_and_training_refuses_them() {
    let scratch = Scratch::with_data();
    let json = scratch.path("shapes/annotations/instances_train.json");
    let mut tree: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    tree["annotations"] = Value::Array(Vec::new());
    fs::write(&json, tree.to_string()).unwrap();
    scratch.run(
        0,
        "data convert --data shapes --to tfrecord --output records/train --num-shards 2",
    );
    let (table, _) = scratch.run(1, "data doctor --data records");
    assert!(
        table.contains("get_coco.sh") && table.contains("instances_train2017.json"),
        "{table}"
    );
    let (_, message) = scratch.run(1, "train --data records --image-size 64");
    assert!(message.contains("get_coco.sh"), "{message}");
}

#[test]
fn training_stops_at_what_the_quick_doctor_finds_unless_told_otherwise() {
    let scratch = Scratch::with_data();
    let json = scratch.path("shapes/annotations/instances_train.json");
    let mut tree: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    for annotation in tree["annotations"].as_array_mut().unwrap() {
        let number = |at: usize| annotation["bbox"][at].as_f64().unwrap();
        annotation["bbox"] =
            serde_json::json!([number(0), number(1), number(0) + number(2), number(1) + number(3)]);
    }
    fs::write(&json, tree.to_string()).unwrap();
    let options = "train --data shapes --image-size 64 --batch-size 4 --max-steps 1 --quiet";
    let (_, message) = scratch.run(1, options);
    assert!(
        message.contains("far corner") && message.contains("--no-doctor"),
        "{message}"
    );
    scratch.run(0, &format!("{options} --no-doctor"));
}

#[test]
fn damaged_samples_stop_or_are_left_out_and_listed_within_a_cap() {
    let scratch = Scratch::with_data();
    scratch.run(
        0,
        "data convert --data shapes --splits train,val --to tfrecord --output records --num-shards 2",
    );
    let image = scratch.path("shapes/train/000003.jpg");
    let bytes = fs::read(&image).unwrap();
    fs::write(&image, &bytes[..bytes.len() / 2]).unwrap();
    // A bit in the payload of the last record of the first shard.
    let shard = scratch.path("records/train-00000-of-00002.tfrecord");
    let mut bytes = fs::read(&shard).unwrap();
    let at = bytes.len() - 100;
    bytes[at] ^= 4;
    fs::write(&shard, bytes).unwrap();
    let train = |data: &str, options: &str| {
        format!("train --data {data} --image-size 64 --batch-size 4 --epochs 1 --quiet --no-doctor {options}")
    };
    let (_, message) = scratch.run(1, &train("shapes", ""));
    assert!(message.contains("000003.jpg"), "{message}");
    let (_, message) = scratch.run(1, &train("records", ""));
    assert!(
        message.contains("record 5 at byte") && message.contains("checksum"),
        "{message}"
    );
    for data in ["shapes", "records"] {
        let options = format!("--on-corrupt quarantine --run-dir run_{data}");
        let (_, message) = scratch.run(0, &train(data, &options));
        assert!(
            message.contains("1 damaged samples are left out of the train data"),
            "{message}"
        );
        let list = fs::read_to_string(scratch.path(&format!("run_{data}/corrupt-train.jsonl"))).unwrap();
        let row: Value = serde_json::from_str(list.lines().next().unwrap()).unwrap();
        assert!(
            row["what"].as_str().unwrap().len() > 20 && row["file"].is_string(),
            "{row}"
        );
        let (_, message) = scratch.run(1, &train(data, "--on-corrupt skip --max-corrupt 0"));
        assert!(message.contains("more than the 0 allowed"), "{message}");
    }
    assert!(scratch.path("run_shapes/quarantine-train/000000.bin").exists());
    // A conversion leaves them out, too, and the copy is sound.
    scratch.run(
        0,
        "data convert --data shapes --to coco --output sound --on-corrupt skip",
    );
    assert!(scratch.path("effdet-corrupt/corrupt-train.jsonl").exists());
    scratch.run(0, "data doctor --data sound --image-size 256");
}

#[test]
fn images_are_drawn_on_a_sheet_and_a_page() {
    let mut sheets = Vec::new();
    let scratch = Scratch::with_data();
    scratch.run(
        0,
        "data view --data shapes --split val --count 3 --columns 2 --tile 64 --output sheet.png",
    );
    let sheet = image::open(scratch.path("sheet.png")).unwrap();
    assert_eq!((sheet.width(), sheet.height()), (2 * 70 + 6, 2 * 70 + 6));
    scratch.run(
        0,
        "data view --data shapes --category star --seed 3 --output page.html",
    );
    let page = fs::read_to_string(scratch.path("page.html")).unwrap();
    assert!(page.contains("data:image/jpeg;base64,"));
    for (pass, hparams) in [
        (0, "mosaic=0.0"),
        (
            0,
            "autoaugment_policy=v1,grid_mask=true,hsv_s=0.7,mosaic=1.0,mixup=1.0",
        ),
        (
            1,
            "autoaugment_policy=v1,grid_mask=true,hsv_s=0.7,mosaic=1.0,mixup=1.0",
        ),
    ] {
        let sheet = |name: &str| {
            let command = format!(
                "data view --data shapes --augmented --pass {pass} --image-size 128 --hparams {hparams} --count 4 --tile 64 --output {name}"
            );
            scratch.run(0, &command);
            std::fs::read(scratch.path(name)).unwrap()
        };
        let first = sheet("augmented.png");
        assert_eq!(sheet("again.png"), first);
        sheets.push(first);
    }
    assert!(sheets[0] != sheets[1] && sheets[1] != sheets[2]);
    let (_, message) = scratch.run(1, "data view --data shapes --category stern --output a.png");
    assert!(message.contains("circle, square"), "{message}");
}

#[test]
fn options_of_augmentation_set_what_the_hyper_parameters_do_in_training_and_view() {
    let scratch = Scratch::with_data();
    let options = "--augment randaugment,gridmask --mosaic 0.5 --mixup --hsv --close-mosaic 2";
    let hparams = "--hparams autoaugment_policy=randaug,grid_mask=true,mosaic=0.5,mixup=1.0,hsv_h=0.015,hsv_s=0.7,hsv_v=0.4,close_mosaic=2.0";
    let plan = |options: &str| {
        scratch
            .run(
                0,
                &format!("train --data shapes --image-size 64 --dry-run {options}"),
            )
            .0
    };
    let hparams_of = |plan: &str| plan[plan.find("[hparams]").unwrap()..].to_owned();
    assert_eq!(hparams_of(&plan(options)), hparams_of(&plan(hparams)));
    assert_ne!(hparams_of(&plan(options)), hparams_of(&plan("")));
    // Options win, and none takes back.
    let taken_back =
        plan("--hparams autoaugment_policy=v1,grid_mask=true,mosaic=0.5 --augment none --mosaic 0");
    assert_eq!(hparams_of(&taken_back), hparams_of(&plan("")));
    let sheet = |options: &str, name: &str| {
        let view = format!("data view --data shapes --image-size 128 --pass 1 --count 4 --tile 64 {options}");
        scratch.run(0, &format!("{view} --output {name}"));
        fs::read(scratch.path(name)).unwrap()
    };
    let expected = sheet(&format!("--augmented {hparams}"), "hparams.png");
    assert_eq!(sheet(options, "options.png"), expected);
    let plain = sheet("--augmented", "plain.png");
    assert_ne!(plain, expected);
    let reduced = sheet("--reduced-decode --hparams jitter_max=0.2", "reduced.png");
    assert_eq!(
        sheet(
            "--augmented --hparams reduced_decode=true,jitter_max=0.2",
            "again.png"
        ),
        reduced
    );
    assert_ne!(
        sheet("--augmented --hparams jitter_max=0.2", "whole.png"),
        reduced
    );
    for (wrong, told) in [
        ("--augment v0,v1", "one policy"),
        ("--augment none,gridmask", "nothing else"),
        ("--mosaic 1.5", "must be in [0, 1]"),
    ] {
        let (_, message) = scratch.run(
            1,
            &format!("train --data shapes --image-size 64 --dry-run {wrong}"),
        );
        assert!(message.contains(told), "{wrong}: {message}");
    }
    let (_, message) = scratch.run(2, "train --data shapes --augment randaugmnt");
    assert!(message.contains("randaugment"), "{message}");
    let (_, message) = scratch.run(2, "train --data shapes --hsv 0.1,0.2");
    assert!(message.contains("hue,saturation,value"), "{message}");
}

#[cfg(feature = "download")]
#[test]
fn a_download_of_other_bytes_is_refused_and_leaves_nothing_to_train_on() {
    let scratch = Scratch(tempfile::tempdir().unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let body = "not the archive";
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all((head + body).as_bytes());
        }
    });
    let (_, message) = scratch.run(
        1,
        &format!("data download voc2012 --output voc --base-url http://{address}/mirror"),
    );
    assert!(message.contains("6cd6e144f989b92b3379bac3b3de84fd"), "{message}");
    assert_eq!(fs::read_dir(scratch.path("voc")).unwrap().count(), 0);
    let (_, message) = scratch.run(1, "data download voc2012 --output voc --parts train");
    assert!(message.contains("trainval"), "{message}");
    let (_, message) = scratch.run(1, "data download voc2012 --output voc --base-url file:///etc");
    assert!(message.contains("http"), "{message}");
}
