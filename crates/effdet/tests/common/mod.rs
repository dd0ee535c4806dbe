//! The real binary in a scratch folder.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

/// A scratch folder in which the binary runs.
pub struct Scratch(TempDir);

/// One finished command.
pub struct Finished {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Scratch {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A scratch folder with a data set `shapes` of 8 training and 3 held-out images.
    pub fn with_data() -> Self {
        let scratch = Self::new();
        scratch.succeed("data synth --output shapes --images 8 --val-images 3 --image-size 64");
        scratch
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs the binary with arguments separated by spaces.
    pub fn run(&self, arguments: &str) -> Finished {
        let Output {
            status,
            stdout,
            stderr,
        } = Command::new(env!("CARGO_BIN_EXE_effdet"))
            .args(arguments.split_whitespace())
            .current_dir(self.0.path())
            .output()
            .unwrap();
        Finished {
            code: status.code(),
            stdout: String::from_utf8(stdout).unwrap(),
            stderr: String::from_utf8(stderr).unwrap(),
        }
    }

    pub fn succeed(&self, arguments: &str) -> String {
        let finished = self.run(arguments);
        assert_eq!(
            finished.code,
            Some(0),
            "effdet {arguments}\n{}\n{}",
            finished.stdout,
            finished.stderr
        );
        finished.stdout
    }

    /// Runs a command that has to fail with `code` and returns its messages.
    pub fn fail(&self, code: i32, arguments: &str) -> String {
        let finished = self.run(arguments);
        assert_eq!(
            finished.code,
            Some(code),
            "effdet {arguments}\n{}",
            finished.stderr
        );
        assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
        finished.stderr
    }

    /// Trains on `shapes` into `run_dir`: 4 steps of 2 epochs unless `options` say otherwise.
    pub fn train(&self, run_dir: &str, options: &str) {
        let mut arguments =
            format!("train --data shapes --image-size 64 --quiet --run-dir {run_dir} {options}");
        for (option, value) in [("--batch-size", 4), ("--epochs", 2)] {
            if !options.contains(option) {
                arguments.push_str(&format!(" {option} {value}"));
            }
        }
        self.succeed(&arguments);
    }

    /// Hashes of weights and moving averages of the newest checkpoint of `run_dir`.
    pub fn hashes(&self, run_dir: &str) -> (String, String) {
        let report: Value =
            serde_json::from_str(&self.succeed(&format!("inspect checkpoint {run_dir} --json"))).unwrap();
        let hash = |key: &str| report[key].as_str().unwrap().to_owned();
        (hash("weights_hash"), hash("ema_hash"))
    }
}

/// Starts the binary in the background, its messages in `messages` of the scratch folder.
pub fn spawn(scratch: &Scratch, arguments: &str) -> Child {
    let messages = fs::File::create(scratch.path("messages")).unwrap();
    Command::new(env!("CARGO_BIN_EXE_effdet"))
        .args(arguments.split_whitespace())
        .current_dir(scratch.path(""))
        .stdout(Stdio::null())
        .stderr(messages)
        .spawn()
        .unwrap()
}

/// Waits until `done`, which has to come while the process runs.
pub fn wait_for(child: &mut Child, done: impl Fn() -> bool) {
    while !done() {
        assert!(child.try_wait().unwrap().is_none(), "it ended too early");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Sends a signal, such as `-TERM`.
pub fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill")
        .args([name, &child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
}
