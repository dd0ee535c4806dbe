//! A run that is killed again and again ends as one that never was.
//!
//! The short form kills a dozen times; the long one, `cargo test --release -p effdet --test kills -- --ignored`, two hundred times.
#![cfg(unix)]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{Scratch, spawn};

const TRAIN: &str = "--data shapes --image-size 64 --batch-size 4 --quiet --no-doctor --checkpoint-every-steps 1 --eval-every 4 \
                     --eval-samples 2 --workers 1";

/// Kills a run of `epochs` epochs of two steps `kills` times at moments that `seed` draws; some wait for a save to begin.
fn torture(kills: u64, epochs: u64, seed: u64) {
    let scratch = Scratch::with_data();
    let run = |name: &str| format!("train {TRAIN} --epochs {epochs} --run-dir {name}");
    scratch.succeed(&run("whole"));
    let (mut random, mut killed, mut in_save) = (seed, 0, 0);
    let mut draw = |below: u64| {
        // SplitMix64.
        random = random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % below
    };
    let saving = || {
        let entries = fs::read_dir(scratch.path("cut"));
        entries.is_ok_and(|entries| {
            entries
                .flatten()
                .any(|e| e.file_name().to_string_lossy().starts_with(".step-"))
        })
    };
    let started = |name: &str| scratch.path(name).join("config.toml").exists();
    while killed < kills {
        let command = match scratch
            .run("checkpoint list cut --json")
            .stdout
            .contains("\"step\":")
        {
            true => "train --resume --run-dir cut --quiet --no-doctor".to_owned(),
            false => {
                let _ = fs::remove_dir_all(scratch.path("cut"));
                run("cut")
            }
        };
        let mut child = spawn(&scratch, &command);
        let wait_for_save = draw(3) > 0;
        let pause = Duration::from_micros(draw(if wait_for_save { 12_000 } else { 120_000 }));
        let since = Instant::now();
        let mut ended = false;
        while !ended && (if wait_for_save { !saving() } else { !started("cut") }) {
            ended = child.try_wait().unwrap().is_some();
            assert!(since.elapsed() < Duration::from_secs(60), "nothing happens");
        }
        std::thread::sleep(pause);
        if child.try_wait().unwrap().is_some() {
            // It came to its end before the blow fell: begin again.
            assert_eq!(
                scratch.hashes("cut"),
                scratch.hashes("whole"),
                "after {killed} kills"
            );
            fs::remove_dir_all(scratch.path("cut")).unwrap();
            continue;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        killed += 1;
        in_save += u64::from(saving());
        // Whatever is listed is whole.
        if scratch
            .run("checkpoint list cut --json")
            .stdout
            .contains("\"step\":")
        {
            scratch.succeed("checkpoint verify cut");
        }
    }
    println!("{killed} kills, {in_save} of them within a save");
    assert!(in_save > 0, "no kill met a save");
    if scratch.path("cut/config.toml").exists()
        && scratch
            .run("checkpoint list cut --json")
            .stdout
            .contains("\"step\":")
    {
        scratch.succeed("train --resume --run-dir cut --quiet --no-doctor");
    } else {
        let _ = fs::remove_dir_all(scratch.path("cut"));
        scratch.succeed(&run("cut"));
    }
    scratch.succeed("compare whole cut --exact");
    scratch.succeed("checkpoint gc cut");
    assert!(!saving(), "leftovers of killed saves");
}

#[test]
fn a_dozen_kills_change_nothing() {
    torture(12, 8, 1);
}

#[test]
#[ignore = "takes two minutes; `.ci/run` does it in a step of its own"]
fn two_hundred_kills_change_nothing() {
    torture(200, 120, 2);
}
