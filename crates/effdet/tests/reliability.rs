//! Runs that are interrupted, damaged, shared and starved, with the real binary. The numbers of the promises are those of
//! `docs/reliability.md`.
#![cfg(unix)]

mod common;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Scratch, signal, spawn, wait_for};
use serde_json::Value;

/// A run that never ends by itself.
const ENDLESS: &str =
    "train --data shapes --image-size 64 --batch-size 4 --epochs 100000 --quiet --no-doctor --eval-samples 1";

/// Files of a run without the columns and lines of time.
fn numbers(scratch: &Scratch, run: &str) -> Vec<String> {
    let text = |name: &str| fs::read_to_string(scratch.path(run).join(name)).unwrap();
    let mut numbers: Vec<String> = text("steps.csv")
        .lines()
        .map(|row| row.split(',').take(11).collect::<Vec<_>>().join(","))
        .collect();
    numbers.extend(text("evaluations.csv").lines().map(str::to_owned));
    for line in text("time_log.txt").lines() {
        let line: Value = serde_json::from_str(line.strip_prefix("DLLL ").unwrap()).unwrap();
        let data = &line["data"];
        numbers.push(format!(
            "{} {} {}",
            data["steps"], data["epoch"], data["validation_accuracy_mAP"]
        ));
    }
    numbers
}

#[test]
fn runs_killed_at_any_step_end_with_the_bits_and_logs_of_an_undisturbed_one() {
    // Warm-up, accumulation, the end of an epoch and the steps beside it (R7, R8).
    let scratch = Scratch::with_data();
    let options = "--epochs 4 --warmup-epochs 2 --batch-size 2 --accumulate 2 --eval-every 2 --checkpoint-every-steps 1";
    scratch.train("whole", options);
    let expected = (scratch.hashes("whole"), numbers(&scratch, "whole"));
    assert_eq!(
        expected.1.iter().filter(|line| line.starts_with("8,")).count(),
        2,
        "8 steps and the last evaluation"
    );
    for at in [1, 2, 3, 4, 5, 7] {
        let run = format!("killed-{at}");
        let mut child = spawn(
            &scratch,
            &format!("train --data shapes --image-size 64 --quiet {options} --run-dir {run}"),
        );
        wait_for(&mut child, || {
            scratch.path(&format!("{run}/step-{at:08}")).exists()
        });
        child.kill().unwrap();
        child.wait().unwrap();
        scratch.succeed(&format!(
            "train --resume --run-dir {run} --quiet --workers {}",
            at % 3
        ));
        assert_eq!(
            (scratch.hashes(&run), numbers(&scratch, &run)),
            expected,
            "killed at {at}"
        );
        scratch.succeed(&format!("compare whole {run} --exact"));
    }
}

#[test]
fn a_run_killed_in_an_evaluation_makes_it_again() {
    let scratch = Scratch::with_data();
    scratch.train("whole", "--eval-every 1");
    for moment in 0..3 {
        let run = format!("cut-{moment}");
        let mut child = spawn(
            &scratch,
            &format!(
                "train --data shapes --image-size 64 --batch-size 4 --epochs 2 --quiet --eval-every 1 --run-dir {run}"
            ),
        );
        // The row of the last step of an epoch is written, its evaluation is not.
        wait_for(&mut child, || {
            fs::read_to_string(scratch.path(&format!("{run}/steps.csv")))
                .is_ok_and(|rows| rows.lines().count() > 2)
        });
        std::thread::sleep(Duration::from_millis(moment * 5));
        signal(&child, "-TERM");
        let code = child.wait().unwrap().code();
        assert!([Some(143), Some(0)].contains(&code), "{code:?}");
        scratch.succeed(&format!("train --resume --run-dir {run} --quiet"));
        assert_eq!(scratch.hashes(&run), scratch.hashes("whole"));
        assert_eq!(numbers(&scratch, &run), numbers(&scratch, "whole"));
    }
}

#[test]
fn another_batch_size_goes_on_in_the_same_samples_and_another_class_count_is_refused() {
    let scratch = Scratch::with_data();
    scratch.train("run", "--max-steps 2 --epochs 4");
    let finished = scratch.run("train --resume --run-dir run --batch-size 2 --max-steps 3 --quiet");
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("batches of 2 images instead of 4"),
        "{}",
        finished.stderr
    );
    let report: Value = serde_json::from_str(&scratch.succeed("inspect checkpoint run --json")).unwrap();
    assert_eq!(
        (&report["step"], &report["sample_position"]),
        (&3.into(), &10.into())
    );
    let message = scratch.fail(1, "train --resume --run-dir run --num-classes 9 --allow-changes");
    assert!(message.contains("another network"), "{message}");
    let message = scratch.fail(1, "train --resume --run-dir run --hparams momentum=0.5");
    assert!(
        message.contains("hparams.momentum: 0.9 in the run, 0.5 asked for")
            && message.contains("--allow-changes"),
        "{message}"
    );
}

#[test]
fn a_damaged_newest_checkpoint_gives_way_to_the_one_before_it_unless_that_is_refused() {
    let scratch = Scratch::with_data();
    scratch.train("run", "--checkpoint-every-steps 1");
    scratch.train("whole", "");
    let file = scratch.path("run/step-00000004/weights.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();
    let message = scratch.fail(1, "checkpoint verify run");
    assert!(message.is_empty(), "{message}");
    let message = scratch.fail(1, "train --resume --run-dir run --strict --quiet");
    assert!(message.contains("SHA-256"), "{message}");
    let finished = scratch.run("train --resume --run-dir run --quiet");
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("passed over") && finished.stderr.contains("at step 3"),
        "{}",
        finished.stderr
    );
    assert_eq!(scratch.hashes("run"), scratch.hashes("whole"));
}

#[test]
fn checkpoints_are_listed_compared_and_cleaned_up() {
    let scratch = Scratch::with_data();
    scratch.train("run", "--checkpoint-every-steps 1 --keep 4 --keep-every 2");
    fs::create_dir(scratch.path("run/.step-00000009.tmp-1")).unwrap();
    let listed: Value = serde_json::from_str(&scratch.succeed("checkpoint list run --json")).unwrap();
    let steps: Vec<u64> = (listed["complete"].as_array().unwrap().iter())
        .map(|entry| entry["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 2, 3, 4]);
    let told = scratch.succeed("checkpoint gc run --keep 2");
    assert!(told.contains("tmp-1") && told.contains("step-00000001"), "{told}");
    assert!(!scratch.path("run/step-00000001").exists());
    scratch.succeed("checkpoint verify run");
    let diff: Value =
        serde_json::from_str(&scratch.succeed("checkpoint diff run/step-00000003 run/step-00000004 --json"))
            .unwrap();
    assert_eq!(diff["exact"], false);
    assert_eq!(
        diff["values"].as_array().unwrap().len(),
        3,
        "weights, averages and momentum"
    );
    scratch.fail(1, "compare run/step-00000003 run/step-00000004 --exact");
    scratch.succeed("compare run/step-00000004 run --exact");
}

#[test]
fn one_process_at_a_time_writes_into_a_run_folder() {
    let scratch = Scratch::with_data();
    let mut child = spawn(
        &scratch,
        &format!("{ENDLESS} --checkpoint-every-steps 1 --run-dir run"),
    );
    wait_for(&mut child, || scratch.path("run/step-00000001").exists());
    let message = scratch.fail(1, "train --resume --run-dir run --quiet");
    assert!(
        message.contains(&format!("in use by process {}", child.id())),
        "{message}"
    );
    let message = scratch.fail(1, "checkpoint gc run");
    assert!(message.contains("in use"), "{message}");
    child.kill().unwrap();
    child.wait().unwrap();
    // The lock died with its holder.
    let report: Value = serde_json::from_str(&scratch.succeed("inspect checkpoint run --json")).unwrap();
    let next = report["step"].as_u64().unwrap() + 1;
    scratch.succeed(&format!(
        "train --resume --run-dir run --quiet --max-steps {next}"
    ));
}

#[test]
fn a_save_that_fails_is_loud_and_leaves_the_last_good_checkpoint() {
    let scratch = Scratch::with_data();
    scratch.train("run", "--max-steps 1 --epochs 4");
    let before = scratch.hashes("run");
    // Files may not grow beyond a megabyte: the weights do not fit, logs do.
    let output = Command::new("bash")
        .args([
            "-c",
            "ulimit -f 1024; trap '' XFSZ; exec \"$0\" train --resume --run-dir run --quiet",
        ])
        .arg(env!("CARGO_BIN_EXE_effdet"))
        .current_dir(scratch.path(""))
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(
        message.contains("cannot write") && message.contains("step-"),
        "{message}"
    );
    assert_eq!(scratch.hashes("run"), before);
    let leftovers = fs::read_dir(scratch.path("run")).unwrap();
    let leftovers: Vec<String> = (leftovers.map(|entry| entry.unwrap().file_name().into_string().unwrap()))
        .filter(|name| name.contains(".tmp-"))
        .collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
    scratch.succeed("train --resume --run-dir run --quiet");
}

#[test]
fn a_full_disk_ends_the_run_with_its_last_good_checkpoint() {
    let scratch = Scratch::with_data();
    let small = scratch.path("small");
    fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=60m", "tmpfs"])
        .arg(&small)
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("**** SKIPPED: a full disk: mounting a small file system needs root");
        return;
    }
    struct Unmount<'a>(&'a Path);
    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0).status();
        }
    }
    let _unmount = Unmount(&small);
    let message = scratch.fail(
        1,
        &format!("{ENDLESS} --checkpoint-every-steps 1 --keep 9 --run-dir small/run"),
    );
    assert!(message.contains("No space left on device"), "{message}");
    let listed: Value = serde_json::from_str(&scratch.succeed("checkpoint list small/run --json")).unwrap();
    assert!(listed["damaged"].as_array().unwrap().is_empty(), "{listed}");
    scratch.succeed("checkpoint verify small/run");
}

#[test]
fn folders_that_cannot_be_written_are_named() {
    let scratch = Scratch::with_data();
    fs::write(scratch.path("file"), "").unwrap();
    for (run_dir, reason) in [("file/run", "Not a directory"), ("file", "File exists")] {
        let message = scratch.fail(
            1,
            &format!("train --data shapes --image-size 64 --epochs 1 --quiet --run-dir {run_dir}"),
        );
        assert!(message.contains(run_dir) && message.contains(reason), "{message}");
    }
}

#[test]
fn signals_save_stop_go_on_or_are_ignored_as_documented() {
    let scratch = Scratch::with_data();
    // SIGUSR1 saves and goes on, SIGHUP does nothing, SIGINT ends with a checkpoint (S2, S5).
    let mut child = spawn(
        &scratch,
        &format!("{ENDLESS} --checkpoint-period 0 --run-dir run"),
    );
    wait_for(&mut child, || {
        fs::read_to_string(scratch.path("run/steps.csv")).is_ok_and(|rows| rows.lines().count() > 2)
    });
    signal(&child, "-HUP");
    signal(&child, "-USR1");
    let has_checkpoint = || {
        fs::read_dir(scratch.path("run")).is_ok_and(|entries| {
            entries
                .flatten()
                .any(|e| e.file_name().to_string_lossy().starts_with("step-"))
        })
    };
    wait_for(&mut child, has_checkpoint);
    let saved = scratch.hashes("run");
    signal(&child, "-INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_ne!(scratch.hashes("run"), saved);
    scratch.succeed("checkpoint verify run");
}

#[test]
fn signals_before_the_first_step_end_at_once_and_leave_nothing_in_the_way() {
    let scratch = Scratch::with_data();
    scratch.succeed("data synth --output many --images 400 --image-size 64");
    let mut child = spawn(
        &scratch,
        "train --data many --image-size 64 --batch-size 4 --epochs 1 --on-corrupt skip --quiet --run-dir run",
    );
    std::thread::sleep(Duration::from_millis(60));
    signal(&child, "-TERM");
    let code = child.wait().unwrap().code();
    // A signal before the handler is there ends a process as any other.
    assert!([Some(143), None].contains(&code), "{code:?}");
    scratch.succeed(
        "train --data many --image-size 64 --batch-size 4 --epochs 1 --max-steps 1 --quiet --run-dir run",
    );
}

#[test]
fn a_signal_to_the_whole_group_and_a_closed_terminal_still_save() {
    let scratch = Scratch::with_data();
    let mut child = group(
        &scratch,
        &format!("{ENDLESS} --workers 2 --checkpoint-every-steps 3 --run-dir run"),
    );
    wait_for(&mut child, || scratch.path("run/step-00000003").exists());
    // Whoever read its messages is gone: writing them fails from here on.
    drop(child.stderr.take());
    let sent = Command::new("kill")
        .args(["-TERM", "--", &format!("-{}", child.id())])
        .status();
    assert!(sent.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(143));
    scratch.succeed("checkpoint verify run");
}

/// Starts the binary as the leader of a process group, its messages in a pipe.
fn group(scratch: &Scratch, arguments: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_effdet"))
        .args(arguments.split_whitespace().filter(|word| *word != "--quiet"))
        .current_dir(scratch.path(""))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap()
}

#[test]
fn a_run_whose_readers_have_left_trains_to_its_end_nevertheless() {
    let scratch = Scratch::with_data();
    let arguments = "train --data shapes --image-size 64 --batch-size 4 --epochs 1 --run-dir";
    let heard = scratch.run(&format!("{arguments} heard"));
    assert!(heard.code == Some(0) && heard.stderr.contains("warning: few-objects"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_effdet"))
        .args(format!("{arguments} unheard").split_whitespace())
        .current_dir(scratch.path(""))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(scratch.hashes("unheard"), scratch.hashes("heard"));
}

#[test]
fn a_refused_resume_leaves_the_configuration_of_the_run() {
    let scratch = Scratch::with_data();
    scratch.train("run", "--epochs 1");
    let config = || std::fs::read_to_string(scratch.path("run/config.toml")).unwrap();
    let before = config();
    let resume = "train --resume --run-dir run --allow-changes --epochs 3";
    for (refused, why) in [
        ("--memory-limit 1MB", "allowed by --memory-limit"),
        ("--isa sse9", "unknown instruction set"),
    ] {
        let message = scratch.fail(1, &format!("{resume} {refused}"));
        assert!(message.contains(why), "{message}");
        assert_eq!(config(), before);
    }
    scratch.succeed(&format!("{resume} --quiet"));
    assert_ne!(config(), before);
}

#[test]
fn absurd_numbers_are_refused_before_anything_starts() {
    let scratch = Scratch::new();
    for (option, code) in [
        ("--threads 1000000", 2),
        ("--workers 1000000", 2),
        ("--dist-timeout 1e300", 1),
        ("--dist-timeout 0", 1),
        ("--dist-timeout NaN", 1),
    ] {
        let message = scratch.fail(code, &format!("train {option} --run-dir run"));
        let name = option.split(' ').next().unwrap();
        assert!(message.contains(name), "{message}");
    }
    assert!(!scratch.path("run").exists());
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let output = Command::new("bash")
        .args([
            "-c",
            "set -o pipefail; \"$0\" inspect model --model d0 --variables | head -n 1",
        ])
        .arg(env!("CARGO_BIN_EXE_effdet"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_step_that_is_no_number_is_named_replayed_and_survived() {
    let scratch = Scratch::with_data();
    // A learning rate that blows up the weights.
    let options = "--lr 1e30 --warmup-value 1e30 --epochs 50 --hparams clip_gradients_norm=0";
    let base = "train --data shapes --image-size 64 --batch-size 4 --quiet";
    let message = scratch.fail(1, &format!("{base} {options} --run-dir run"));
    for part in ["it began in", "images", "effdet inspect batch", "skip-step"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let dump = fs::read_dir(scratch.path("run")).unwrap().flatten();
    let dump = dump
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .unwrap();
    let report = scratch.succeed(&format!("inspect batch {} --checkpoint run", dump.display()));
    assert!(report.contains("it begins in"), "{report}");
    // What was saved is that before the step.
    scratch.succeed("checkpoint verify run");
}

#[test]
fn a_run_that_does_not_fit_is_refused_before_its_first_step_and_auto_finds_what_fits() {
    let scratch = Scratch::with_data();
    let message = scratch.fail(
        1,
        "train --data shapes --image-size 512 --batch-size 32 --memory-limit 1GB --no-doctor --run-dir big",
    );
    assert!(
        message.contains("more than the 1.0 GB") && message.contains("--batch-size"),
        "{message}"
    );
    assert!(!scratch.path("big").exists());
    let finished = scratch.run(
        "train --data shapes --image-size 64 --batch-size auto --memory-limit 400MB --epochs 1 --max-steps 1 --no-doctor --run-dir auto",
    );
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("the largest power of two"),
        "{}",
        finished.stderr
    );
    assert!(
        finished.stderr.contains("memory: needs 0."),
        "{}",
        finished.stderr
    );
}

#[test]
fn eight_images_are_learnt_by_heart_and_too_few_steps_are_explained() {
    let scratch = Scratch::new();
    scratch.succeed("data synth --output shapes --images 16 --val-images 2 --image-size 96");
    let small = "--model lite0 --image-size 96 --hparams fpn_num_filters=32,fpn_cell_repeats=2,max_level=5";
    let told = scratch.succeed(&format!(
        "train --data shapes {small} --sanity --quiet --no-doctor"
    ));
    assert!(told.contains("sanity: passed"), "{told}");
    let failed = scratch.run(&format!(
        "train --data shapes {small} --sanity --quiet --no-doctor --max-steps 25"
    ));
    assert_eq!(failed.code, Some(1));
    assert!(failed.stdout.contains("sanity: failed"), "{}", failed.stdout);
}

#[test]
fn memory_files_and_threads_do_not_grow_with_the_steps() {
    let scratch = Scratch::with_data();
    let mut child = spawn(
        &scratch,
        &format!("{ENDLESS} --checkpoint-every-steps 20 --workers 2 --run-dir run"),
    );
    let steps = || fs::read_to_string(scratch.path("run/steps.csv")).map_or(0, |rows| rows.lines().count());
    let look = |child: &Child| {
        let proc = format!("/proc/{}", child.id());
        let status = fs::read_to_string(format!("{proc}/status")).unwrap();
        let number = |name: &str| -> i64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let files = fs::read_dir(format!("{proc}/fd")).unwrap().count() as i64;
        (number("VmRSS:"), number("Threads:"), files)
    };
    wait_for(&mut child, || steps() > 60);
    let (rss, threads, files) = look(&child);
    wait_for(&mut child, || steps() > 260);
    let (rss_later, threads_later, files_later) = look(&child);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(threads_later, threads);
    // A checkpoint that is being written has files of its own.
    assert!(
        (files_later - files).abs() <= 2,
        "{files} and {files_later} files"
    );
    assert!(rss_later - rss < 8 * 1024, "{rss} and {rss_later} KiB");
}

#[test]
fn bare_environments_change_nothing_but_looks() {
    let scratch = Scratch::with_data();
    scratch.train("whole", "");
    for (number, environment) in [
        "NO_COLOR=1 COLUMNS=20",
        "LC_ALL=C LANG=C TERM=dumb",
        "HOME=/proc XDG_CACHE_HOME=/proc",
        "",
    ]
    .into_iter()
    .enumerate()
    {
        let run = format!("run-{number}");
        let mut command = Command::new(env!("CARGO_BIN_EXE_effdet"));
        command
            .args(
                "train --data shapes --image-size 64 --batch-size 4 --epochs 2 --run-dir".split_whitespace(),
            )
            .arg(&run)
            .current_dir(scratch.path(""))
            .env_clear();
        for pair in environment.split_whitespace() {
            let (name, value) = pair.split_once('=').unwrap();
            command.env(name, value);
        }
        let output = command.output().unwrap();
        let messages = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{environment}: {messages}");
        assert!(
            !messages.contains('\u{1b}'),
            "escape codes without a terminal: {messages}"
        );
        assert_eq!(scratch.hashes(&run), scratch.hashes("whole"), "{environment}");
    }
}
