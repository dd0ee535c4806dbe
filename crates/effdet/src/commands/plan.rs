//! What a run would do: the answer to `effdet train --dry-run`.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Result, ensure};
use effdet_model::network::Network;
use effdet_train::schedule::Schedule;
use effdet_train::trainer::{Trainer, steps_per_epoch};

use super::memory;
use super::run_config::{RunConfig, RunData};
use crate::cli::TrainArgs;

/// Checks what a run reads and needs; the plan as comments of the configuration that follows it.
pub fn plan(args: &TrainArgs, config: &RunConfig, data: &RunData) -> Result<String> {
    for (option, path) in [
        ("--backbone-init", &args.backbone_init),
        ("--pretrained-ckpt", &args.pretrained_ckpt),
    ] {
        if let Some(path) = path {
            ensure!(path.exists(), "{option}: {} is missing", path.display());
        }
    }
    let train = &config.train;
    let network = Network::new(&config.hparams)?;
    let images = data.train.examples.len();
    let trainer = Trainer::new(train, &network, images);
    let steps_per_epoch = steps_per_epoch(train, images);
    let update = train.global_batch() * train.accumulate;
    let schedule = Schedule::new(&config.hparams, steps_per_epoch);
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "# data: {images} training images, {} held out, {} classes",
        data.val.as_ref().map_or(0, |val| val.examples.len()),
        config.hparams.num_classes
    );
    let _ = writeln!(
        text,
        "# batch: {} ranks x {} images x {} micro-batches = {update} images per step",
        train.ranks, train.batch_size, train.accumulate
    );
    let _ = writeln!(
        text,
        "# steps: {steps_per_epoch} per epoch, {} of a schedule of {}; learning rate {} at first, {} at most",
        trainer.total_steps(),
        schedule.total_steps(),
        schedule.at(0),
        config.hparams.learning_rate
    );
    let _ = writeln!(text, "# precision: {}", train.precision);
    let _ = writeln!(text, "# memory: {}", memory(args, config)?);
    let _ = writeln!(
        text,
        "# results: {}",
        args.run_dir.as_deref().unwrap_or(Path::new("runs/")).display()
    );
    Ok(text)
}

/// What one rank takes, against what this machine has.
fn memory(args: &TrainArgs, config: &RunConfig) -> Result<String> {
    Ok(match memory::check(args, config) {
        Ok(Some(text)) => text,
        Ok(None) => format!(
            "needs {}",
            memory::gb(memory::Demand::of(args, config).bytes(&config.hparams)?)
        ),
        // A plan may be for another machine.
        Err(refusal) => refusal.to_string(),
    })
}
