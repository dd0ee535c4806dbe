//! What a run would do: the answer to `effdet train --dry-run`.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use effdet_cpu::engine::{CpuEngine, CpuOptions};
use effdet_model::network::Network;
use effdet_train::schedule::Schedule;
use effdet_train::trainer::{Trainer, steps_per_epoch};

use super::host::memory_gib;
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
    let network = Arc::new(Network::new(&config.hparams)?);
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
    if args.amp == Some(true) {
        let _ = writeln!(
            text,
            "# precision: half asked for, which this engine does not have yet: the run would be refused"
        );
    }
    let _ = writeln!(text, "# memory: {}", memory(&network, train.batch_size)?);
    let _ = writeln!(
        text,
        "# results: {}",
        args.run_dir.as_deref().unwrap_or(Path::new("runs/")).display()
    );
    Ok(text)
}

/// What one rank takes, against what this machine has.
fn memory(network: &Arc<Network>, images: usize) -> Result<String> {
    let options = CpuOptions {
        threads: 1,
        ..CpuOptions::default()
    };
    let engine = CpuEngine::new(Arc::clone(network), options)?;
    let size = network.hparams.image_size;
    // Weights, gradients, momentum and averages; pixels and targets of a batch.
    let values = 4 * network.variables.trainable_len();
    let batch = images * (size.height * size.width * 3 + 5 * network.num_anchors());
    let bytes = engine.training_memory(images).total_bytes() + 4 * (values + batch);
    let needed_gib = bytes as f64 / f64::from(1 << 30);
    Ok(match memory_gib() {
        None => format!("{needed_gib:.1} GiB per rank"),
        Some(have_gib) if needed_gib <= have_gib => {
            format!("{needed_gib:.1} GiB per rank; this machine has {have_gib:.1} GiB")
        }
        Some(have_gib) => format!(
            "{needed_gib:.1} GiB per rank, more than the {have_gib:.1} GiB of this machine: take a smaller --batch-size and make up \
             for it with --accumulate"
        ),
    })
}
