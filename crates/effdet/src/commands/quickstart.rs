//! `effdet train` without data: a small detector on the synthetic set, in a few minutes on two cores.

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use effdet_data::synthetic::CLASS_NAMES;
use effdet_model::hparams::ImageSize;

use super::memory;
use super::model::{apply_augmentation, apply_overrides, resolve_hparams};
use super::run_config::{DataConfig, RunConfig, apply_schedule, rule, run_config};
use crate::cli::TrainArgs;

/// Enough images for held-out AP above 0.8, few enough for some minutes on two cores.
const TRAIN_IMAGES: u64 = 1200;
const VAL_IMAGES: u64 = 100;
const IMAGE_SIZE: usize = 128;
const BATCH_SIZE: usize = 8;
const EPOCHS: f64 = 30.0;
const LEARNING_RATE: f64 = 0.06;
/// Objects of a fifth to nine tenths of the image's side, so that a small input shows what they are.
const SMALLEST_RADIUS: f32 = 0.11;
/// More would hide each other, and the extent of what is hidden cannot be learnt.
const MAX_OBJECTS: u64 = 2;
/// At this input size the levels above are maps of one or two cells, over which batch norm has no statistics worth the name.
const MAX_LEVEL: usize = 5;

/// Configuration of the quickstart; options given on the command line win.
pub fn configure(args: &TrainArgs, ranks: usize) -> Result<RunConfig> {
    let mut hparams = resolve_hparams(&args.model, "d0")?;
    if args.model.num_classes.is_none() {
        hparams.num_classes = CLASS_NAMES.len();
    }
    if args.model.image_size.is_none() {
        hparams.image_size = ImageSize::square(IMAGE_SIZE);
    }
    hparams.max_level = MAX_LEVEL;
    hparams.num_epochs = EPOCHS;
    (hparams.learning_rate, hparams.lr_warmup_init) = (LEARNING_RATE, LEARNING_RATE / 100.0);
    // Objects are of similar size already; shrinking them to a tenth would only blur them.
    (hparams.jitter_min, hparams.jitter_max) = (0.7, 1.4);
    apply_overrides(&mut hparams, &args.model.hparams)?;
    apply_schedule(args, &mut hparams);
    apply_augmentation(&args.augmentation, &mut hparams)?;
    hparams.validate()?;
    let data = DataConfig::Synthetic {
        images: TRAIN_IMAGES,
        val_images: VAL_IMAGES,
        image_size: hparams.image_size.height as u32,
        max_objects: MAX_OBJECTS,
        smallest_radius: SMALLEST_RADIUS,
    };
    let batch_size = memory::batch_size(args, &hparams, BATCH_SIZE)?;
    run_config(args, hparams, data, (batch_size, ranks), rule(args)?)
}

/// What to try after the quickstart.
pub fn next_steps(run_dir: &Path) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let dir = run_dir.display();
    let steps = [
        (
            format!("effdet infer --checkpoint {dir} photo.jpg"),
            "detect in an image",
        ),
        (
            "effdet train --data my_data".to_owned(),
            "train on a COCO or VOC folder",
        ),
        (
            format!("effdet inspect checkpoint {dir}"),
            "look inside the checkpoint",
        ),
        ("effdet train --help".to_owned(), "every option, with examples"),
    ];
    let width = steps.iter().map(|(command, _)| command.len()).max().unwrap_or(0);
    writeln!(out, "\nWhat to try next:")?;
    for (command, what) in steps {
        writeln!(out, "  {command:<width$}  {what}")?;
    }
    Ok(())
}
