//! The real binary, end to end, on small rendered data in scratch folders.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::Scratch;
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden")).join(name)
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one() {
    let scratch = Scratch::with_data();
    scratch.train("whole", "");
    // Step 3 lies in the middle of the second epoch.
    scratch.train("cut", "--max-steps 3");
    let cut = scratch.hashes("cut");
    scratch.succeed("train --resume --run-dir cut --max-steps 4 --quiet");
    assert_eq!(scratch.hashes("cut"), scratch.hashes("whole"));
    assert_ne!(scratch.hashes("cut"), cut);

    // Logs go on where the checkpoint stands; the columns of time differ, of course.
    let losses = |run: &str| -> Vec<String> {
        let table = fs::read_to_string(scratch.path(run).join("steps.csv")).unwrap();
        let rows = table
            .lines()
            .map(|row| row.split(',').take(4).collect::<Vec<_>>().join(","));
        rows.collect()
    };
    assert_eq!(losses("cut").len(), 5, "a heading and four steps");
    assert_eq!(losses("cut"), losses("whole"));
    let log = fs::read_to_string(scratch.path("cut/time_log.txt")).unwrap();
    assert!(log.lines().all(|line| line.starts_with("DLLL {")), "{log}");
    for file in ["curves.svg", "evaluations.csv", "tensorboard", "detections.json"] {
        assert!(scratch.path("whole").join(file).exists(), "{file}");
    }
}

#[cfg(unix)]
#[test]
fn a_signal_saves_and_the_run_goes_on_to_the_same_bits() {
    let scratch = Scratch::with_data();
    let arguments = "train --data shapes --image-size 64 --batch-size 4 --epochs 40 --quiet --eval-samples 1";
    let mut child = Command::new(env!("CARGO_BIN_EXE_effdet"))
        .args(arguments.split_whitespace())
        .args(["--run-dir", "cut"])
        .current_dir(scratch.path(""))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !scratch.path("cut/step-00000002").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before the signal");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let sent = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(143));

    let report: Value = serde_json::from_str(&scratch.succeed("inspect checkpoint cut --json")).unwrap();
    let step = report["step"].as_u64().unwrap();
    assert!((2..80).contains(&step), "{step}");
    scratch.succeed(&format!(
        "train --resume --run-dir cut --quiet --max-steps {}",
        step + 2
    ));
    scratch.succeed(&format!("{arguments} --run-dir whole --max-steps {}", step + 2));
    assert_eq!(scratch.hashes("cut"), scratch.hashes("whole"));
}

#[test]
fn resume_finds_the_last_run_on_the_data_and_keeps_its_configuration() {
    let scratch = Scratch::with_data();
    let message = scratch.fail(1, "train --data shapes --resume");
    assert!(message.contains("--run-dir"), "{message}");
    scratch.succeed("train --data shapes --image-size 64 --batch-size 4 --epochs 1 --max-steps 1 --quiet");
    let message = scratch.fail(1, "train --data shapes --resume --lr 0.1 --seed 0");
    assert!(
        message.contains("hparams.learning_rate: 0.005 in the run, 0.1 asked for")
            && !message.contains("seed"),
        "{message}"
    );
    let message = scratch.fail(1, "train --data shapes --resume --num-classes 7 --allow-changes");
    assert!(message.contains("another network"), "{message}");
    let finished = scratch.run("train --data shapes --resume --quiet");
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("resuming runs/d0-1 at step 1"),
        "{}",
        finished.stderr
    );
    scratch.succeed("train --data shapes --resume --lr 0.1 --allow-changes --epochs 2 --quiet");
    // The change is part of the run from here on.
    let finished = scratch.run("train --data shapes --resume --lr 0.1 --epochs 2 --quiet");
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    let message = scratch.fail(1, "train --data elsewhere --resume");
    assert!(message.contains("no run on this data"), "{message}");
}

#[test]
fn pretrained_weights_are_listed_and_frozen_ones_stay() {
    let scratch = Scratch::with_data();
    scratch.train("base", "--max-steps 1");
    let finished = scratch.run(
        "train --data shapes --image-size 64 --batch-size 4 --max-steps 1 --run-dir tuned --num-classes 6 \
         --pretrained-ckpt base --freeze (stem|stack_|fpn) --hparams moving_average_decay=0",
    );
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("707 variables loaded"),
        "{}",
        finished.stderr
    );
    assert!(
        finished.stderr.contains("class_net/class-predict/bias"),
        "{}",
        finished.stderr
    );
    let variables = |file: &str| fs::read(scratch.path(file)).unwrap();
    // The averages of the base run are what the tuned run starts from.
    let base = fs::read_dir(scratch.path("base"))
        .unwrap()
        .map(|entry| entry.unwrap().path().join("ema.safetensors"))
        .find(|file| file.is_file())
        .unwrap();
    let base = fs::read(base).unwrap();
    let tuned = variables("tuned/step-00000001/weights.safetensors");
    let base = safetensors::SafeTensors::deserialize(&base).unwrap();
    let tuned = safetensors::SafeTensors::deserialize(&tuned).unwrap();
    let same = |name: &str| base.tensor(name).unwrap().data() == tuned.tensor(name).unwrap().data();
    assert!(same("stem_conv2d/kernel"), "frozen");
    assert!(!same("box_net/box-predict/bias"), "trained");
}

#[test]
fn threads_instruction_sets_loader_workers_and_what_is_kept_leave_the_bits_alone() {
    let scratch = Scratch::with_data();
    scratch.train("one", "--threads 1 --workers 0 --max-steps 2");
    scratch.train("two", "--threads 2 --workers 2 --max-steps 2");
    scratch.train("portable", "--isa portable --max-steps 2");
    scratch.train("again", "--grad-checkpoint --max-steps 1");
    scratch.train("again", "--resume --max-steps 2");
    scratch.train("ram", "--cache ram --max-steps 2");
    scratch.train("disk", "--cache disk --cache-dir images --max-steps 1");
    scratch.train(
        "disk",
        "--resume --cache disk --cache-dir images --cache-limit 1MB --max-steps 2",
    );
    assert_eq!(scratch.hashes("one"), scratch.hashes("two"));
    assert_eq!(scratch.hashes("one"), scratch.hashes("portable"));
    for run in ["again", "ram", "disk"] {
        assert_eq!(scratch.hashes("one"), scratch.hashes(run), "{run}");
    }
    assert!(fs::read_dir(scratch.path("images")).unwrap().count() > 0);
    scratch.train("other_seed", "--seed 1 --max-steps 2");
    assert_ne!(scratch.hashes("one"), scratch.hashes("other_seed"));
}

/// Whatever changes the pixels is drawn by (seed, pass, image), so a restart in the middle changes nothing; and it is part of the run.
#[test]
fn a_run_with_every_augmentation_goes_on_with_the_same_bits_and_with_no_others() {
    let scratch = Scratch::with_data();
    for (name, options) in [
        (
            "augmented",
            "--augment randaugment,gridmask --mosaic 0.5 --mixup 0.5 --hsv --close-mosaic 1",
        ),
        ("reduced", "--reduced-decode --hparams jitter_max=0.4"),
    ] {
        let (whole, parts) = (format!("{name}-whole"), format!("{name}-parts"));
        scratch.train(&whole, &format!("{options} --max-steps 3 --workers 2"));
        scratch.train(&parts, &format!("{options} --max-steps 1 --workers 0"));
        scratch.train(&parts, "--resume --max-steps 3 --workers 1");
        assert_eq!(scratch.hashes(&whole), scratch.hashes(&parts), "{name}");
    }
    scratch.train("plain", "--max-steps 3");
    assert_ne!(scratch.hashes("plain"), scratch.hashes("augmented-whole"));
    scratch.train("whole", "--hparams jitter_max=0.4 --max-steps 3");
    assert_ne!(scratch.hashes("whole"), scratch.hashes("reduced-whole"));
    for (other, key) in [
        ("--mosaic 1", "mosaic"),
        ("--reduced-decode", "reduced_decode"),
        ("--hsv", "hsv_s"),
    ] {
        let message = scratch.fail(
            1,
            &format!("train --data shapes --image-size 64 --batch-size 4 --epochs 2 --run-dir plain --resume {other}"),
        );
        assert!(message.contains(&format!("hparams.{key}: ")), "{message}");
    }
}

#[test]
fn a_trained_checkpoint_is_evaluated_run_and_traced() {
    let scratch = Scratch::with_data();
    scratch.train("run", "");
    assert!(scratch.path("run/config.toml").is_file());
    assert_eq!(fs::read_dir(scratch.path("run/samples")).unwrap().count(), 3);

    // Scoring the saved detections without the model gives the numbers of the evaluation that saved them.
    let of_checkpoint: Value = serde_json::from_str(
        &scratch.succeed("eval --checkpoint run --data shapes --json --save-results results.json"),
    )
    .unwrap();
    let of_file: Value =
        serde_json::from_str(&scratch.succeed(
            "eval --results results.json --ground-truth shapes/annotations/instances_val.json --json",
        ))
        .unwrap();
    assert_eq!(of_checkpoint["metrics"], of_file["metrics"]);
    let found = json_of(&scratch.path("results.json")).as_array().unwrap().len();
    assert_eq!(found, 300, "100 detections per image");

    let before = fs::read(scratch.path("shapes/val/000008.jpg")).unwrap();
    let message = scratch.fail(
        1,
        "infer --checkpoint run shapes/val --output-dir shapes/../shapes/val",
    );
    assert!(message.contains("would be written over"), "{message}");
    assert_eq!(fs::read(scratch.path("shapes/val/000008.jpg")).unwrap(), before);

    fs::write(scratch.path("shapes/val/broken.jpg"), b"\xff\xd8\xff not a JPEG").unwrap();
    let finished = scratch.run("infer --checkpoint run shapes/val --score-threshold 0 --output-dir out");
    assert_eq!(finished.code, Some(1));
    assert!(finished.stderr.contains("broken.jpg"), "{}", finished.stderr);
    let images = json_of(&scratch.path("out/detections.json"));
    assert_eq!(images.as_array().unwrap().len(), 3);
    for image in images.as_array().unwrap() {
        let stem = Path::new(image["file"].as_str().unwrap()).file_stem().unwrap();
        let drawn = scratch.path("out").join(stem).with_extension("jpg");
        assert!(drawn.is_file(), "{}", drawn.display());
        for detection in image["detections"].as_array().unwrap() {
            let values: Vec<f64> = (detection["bbox"].as_array().unwrap().iter())
                .map(|value| value.as_f64().unwrap())
                .collect();
            let [x, y, w, h] = values[..] else {
                panic!("{values:?}")
            };
            assert!(
                x >= 0.0 && y >= 0.0 && x + w <= 64.001 && y + h <= 64.001,
                "{values:?}"
            );
            assert!(detection["score"].as_f64().unwrap() > 0.0);
        }
    }

    fs::write(
        scratch.path("boxes.json"),
        r#"[[{"box": [8, 8, 40, 48], "class": 2}]]"#,
    )
    .unwrap();
    let image = "--checkpoint run --input shapes/val/000008.jpg --boxes boxes.json";
    scratch.succeed(&format!("inspect trace {image} --out fast.safetensors"));
    scratch.succeed(&format!(
        "inspect trace {image} --reference --out plain.safetensors"
    ));
    let fast = fs::read(scratch.path("fast.safetensors")).unwrap();
    let plain = fs::read(scratch.path("plain.safetensors")).unwrap();
    let fast = safetensors::SafeTensors::deserialize(&fast).unwrap();
    let plain = safetensors::SafeTensors::deserialize(&plain).unwrap();
    let mut names = fast.names();
    names.sort();
    let mut expected = plain.names();
    expected.sort();
    assert_eq!(names, expected, "both engines name the same outputs");
    for name in ["losses/class", "losses/box", "losses/det"] {
        let value = |tensors: &safetensors::SafeTensors<'_>| {
            let bytes = tensors.tensor(name).unwrap().data().to_vec();
            f32::from_le_bytes(bytes.try_into().unwrap())
        };
        let (fast, plain) = (value(&fast), value(&plain));
        assert!(
            (fast - plain).abs() <= 1e-4 * plain.abs(),
            "{name}: {fast} and {plain}"
        );
    }
    assert_eq!(
        fast.tensor("targets/class").unwrap().data(),
        plain.tensor("targets/class").unwrap().data()
    );
    assert!(names.contains(&"gradients/class_net/class-predict/bias"));
}

/// Source: `golden_coco.json`, numbers of pycocotools.
#[test]
fn somebody_elses_detections_score_as_with_pycocotools() {
    let scratch = Scratch::new();
    let document = json_of(&golden("golden_coco.json"));
    let rows: Vec<Value> = (document["detections"].as_array().unwrap().iter())
        .map(|row| {
            serde_json::json!({"image_id": row[0], "bbox": [row[1], row[2], row[3], row[4]],
                               "score": row[5], "category_id": row[6]})
        })
        .collect();
    fs::write(scratch.path("truth.json"), document["ground_truth"].to_string()).unwrap();
    fs::write(scratch.path("results.json"), Value::from(rows).to_string()).unwrap();
    let report: Value = serde_json::from_str(
        &scratch.succeed("eval --results results.json --ground-truth truth.json --json"),
    )
    .unwrap();
    let expected = document["result"]["stats"].as_array().unwrap();
    let metrics = report["metrics"].as_object().unwrap();
    assert_eq!(metrics.len(), expected.len());
    for (name, value) in document["result"]["names"]
        .as_array()
        .unwrap()
        .iter()
        .zip(expected)
    {
        let name = name.as_str().unwrap();
        let (found, value) = (metrics[name].as_f64().unwrap(), value.as_f64().unwrap());
        assert!((found - value).abs() < 1e-12, "{name}: {found} and {value}");
    }
}

#[test]
fn wrong_use_is_an_error_of_usage_that_suggests_the_right_one() {
    let scratch = Scratch::new();
    let message = scratch.fail(2, "train --batch-sise 4");
    assert!(message.contains("--batch-size"), "{message}");
    let message = scratch.fail(1, "inspect model --model d00");
    assert!(message.contains("did you mean"), "{message}");
    let message = scratch.fail(1, "inspect model --hparams num_clases=3");
    assert!(message.contains("did you mean"), "{message}");
    let message = scratch.fail(1, "train --early-stop mAP");
    assert!(message.contains("known metrics are AP, AP50"), "{message}");
    let message = scratch.fail(2, "train --precision fp8");
    assert!(
        message.contains("use fp32, fp16, bf16, bf16-pairs or bf16-tiles"),
        "{message}"
    );
    let message = scratch.fail(1, "train --amp --precision fp32");
    assert!(message.contains("contradicts"), "{message}");
}

#[test]
fn missing_data_and_checkpoints_are_named() {
    let scratch = Scratch::with_data();
    let message = scratch.fail(1, "train --data nowhere");
    assert!(message.contains("nowhere"), "{message}");
    assert!(!scratch.path("runs").exists(), "nothing was created");
    let message = scratch.fail(1, "train --data shapes --train-split tain");
    assert!(message.contains("tain") && message.contains("train"), "{message}");
    let message = scratch.fail(1, "eval --checkpoint shapes --data shapes");
    assert!(message.contains("no complete checkpoint"), "{message}");
    let message = scratch.fail(1, "infer --checkpoint shapes nothing.jpg");
    assert!(message.contains("nothing.jpg"), "{message}");
}

#[test]
fn a_run_folder_is_never_overwritten() {
    let scratch = Scratch::with_data();
    scratch.train("run", "--max-steps 1");
    let before = scratch.hashes("run");
    let message = scratch.fail(1, "train --data shapes --image-size 64 --run-dir run");
    assert!(message.contains("--resume"), "{message}");
    assert_eq!(scratch.hashes("run"), before);
}

#[test]
fn a_data_set_survives_records_and_back() {
    let scratch = Scratch::with_data();
    scratch.succeed("data convert --data shapes --to tfrecord --output records/train --num-shards 3");
    scratch.succeed("data convert --data records --to coco --output copy");
    let fingerprint = |data: &str| {
        let report: Value =
            serde_json::from_str(&scratch.succeed(&format!("data inspect --data {data} --json"))).unwrap();
        report["splits"][0]["fingerprint"].as_str().unwrap().to_owned()
    };
    assert_eq!(fingerprint("copy"), fingerprint("shapes"));
    let image = "train/000003.jpg";
    assert_eq!(
        fs::read(scratch.path("copy").join(image)).unwrap(),
        fs::read(scratch.path("shapes").join(image)).unwrap()
    );
    let message = scratch.fail(1, "data convert --data shapes --to coco --output copy");
    assert!(message.contains("already"), "{message}");
}

/// The reference evaluates images from records against ground truth from an instances file.
#[test]
fn records_train_and_score_like_the_files_they_were_made_from() {
    let scratch = Scratch::with_data();
    scratch.train("files", "--max-steps 1");
    scratch.succeed("data convert --data shapes --to tfrecord --output records/train --num-shards 2");
    scratch.succeed(
        "data convert --data shapes --train-split val --to tfrecord --output records/val --num-shards 1",
    );
    scratch.succeed(
        "train --training_file_pattern records/train-* --val_file_pattern records/val-* \
         --val_json_file shapes/annotations/instances_val.json --image_size 64 --batch_size 4 --num_epochs 2 \
         --max-steps 1 --quiet --model_dir records_run",
    );
    assert_eq!(scratch.hashes("files"), scratch.hashes("records_run"));
    let score = |options: &str| {
        let report = scratch.succeed(&format!("eval --checkpoint files --json {options}"));
        serde_json::from_str::<Value>(&report).unwrap()["metrics"].clone()
    };
    assert_eq!(
        score("--val_file_pattern records/val-* --val_json_file shapes/annotations/instances_val.json"),
        score("--data shapes")
    );
}

#[test]
fn benchmarks_report_what_they_measured_and_on_what() {
    let scratch = Scratch::new();
    for kind in ["train", "infer"] {
        let line = scratch.succeed(&format!(
            "bench {kind} --image-size 64 --batch 2 --warmup 0 --steps 3 --threads 1 --isa portable --json"
        ));
        let report: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(report["times_s"].as_array().unwrap().len(), 3);
        assert_eq!((&report["batch"], &report["threads"]), (&2.into(), &1.into()));
        assert_eq!(report["isa"], "portable");
        let (img_s, latency_ms) = (report["img_s"].as_f64(), report["latency_ms"].as_f64());
        assert!((img_s.unwrap() * latency_ms.unwrap() / 2000.0 - 1.0).abs() < 1e-9);
    }
}

#[test]
fn post_processing_is_timed_on_made_up_or_given_outputs() {
    let scratch = Scratch::new();
    for (data, method) in [("clustered", "hard"), ("random", "gaussian")] {
        let line = scratch.succeed(&format!(
            "bench postprocess --image-size 128 --num-classes 7 --data {data} --method {method} --steps 3 --json"
        ));
        let report: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            (&report["classes"], &report["method"]),
            (&7.into(), &method.into())
        );
        assert!(report["ms"].as_f64().unwrap() > 0.0);
        assert_eq!(report["detections"], 100);
    }
    let message = scratch.fail(1, "bench postprocess --inputs nowhere");
    assert!(message.contains("cls.npy"), "{message}");
}

#[test]
fn the_machine_is_described_for_the_instruction_set_of_the_environment() {
    let inspect = |isa: &str| {
        Command::new(env!("CARGO_BIN_EXE_effdet"))
            .args(["inspect", "machine", "--json"])
            .env("EFFDET_ISA", isa)
            .output()
            .unwrap()
    };
    let output = inspect("portable");
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["isa"], "portable");
    let ceilings = report["ceilings"].as_array().unwrap();
    assert!(ceilings.len() >= 9);
    for ceiling in ceilings {
        assert!(ceiling["one_thread"].as_f64().unwrap() > 0.0, "{ceiling}");
    }
    let output = inspect("sse2");
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(
        message.contains("EFFDET_ISA") && message.contains("portable"),
        "{message}"
    );
}

#[test]
fn preparation_of_samples_is_timed_stage_by_stage() {
    let scratch = Scratch::with_data();
    let line = scratch.succeed("bench data --data shapes --image-size 64 --passes 2 --limit 5 --json");
    let report: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&report["images"], report["times_s"].as_array().unwrap().len()),
        (&5.into(), 2)
    );
    for key in ["img_s_per_core", "decode_ms", "augment_ms", "assign_ms"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}");
    }
    for cache in ["ram", "disk"] {
        let line = scratch.succeed(&format!(
            "bench data --data shapes --image-size 64 --passes 1 --limit 5 --cache {cache} --json"
        ));
        let report: Value = serde_json::from_str(&line).unwrap();
        assert!(report["cache_bytes"].as_u64().unwrap() > 0, "{cache}");
    }
    let message = scratch.fail(1, "bench data --data shapes --cache-dir x");
    assert!(message.contains("--cache disk"), "{message}");
    let message = scratch.fail(1, "bench data --data shapes --cache ram --reduced-decode");
    assert!(message.contains("give one of them"), "{message}");
    let message = scratch.fail(1, "bench data --data shapes --passes 0");
    assert!(message.contains("--passes"), "{message}");
}

#[test]
fn a_dry_run_prints_a_configuration_and_leaves_nothing_behind() {
    let scratch = Scratch::with_data();
    let text = scratch.succeed("train --data shapes --image-size 64 --lr 0.01 --dry-run");
    assert!(text.contains("learning_rate = 0.01"), "{text}");
    assert!(text.contains("num_classes = 4"), "{text}");
    assert!(!scratch.path("runs").exists());
}
