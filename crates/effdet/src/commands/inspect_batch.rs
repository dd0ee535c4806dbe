//! `effdet inspect batch`: a step that was not taken, made again.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use effdet_ckpt::{load_notes, load_tensors};
use effdet_data::batch::Batch;
use effdet_model::engine::{Engine, StepOptions};
use effdet_train::guard::first_non_finite;

use super::checkpoint::Trained;
use super::engine::cpu_engine;
use crate::cli::{EngineArgs, StepMemory};

/// Runs the command.
pub fn run(file: &Path, checkpoint: Option<&Path>, engine: &EngineArgs) -> Result<()> {
    let batch = read(file)?;
    let notes = load_notes(file)?;
    let note = |name: &str| notes.get(name).map_or("not noted", String::as_str);
    let mut out = std::io::stdout().lock();
    writeln!(out, "step {}: it began in {}", note("step"), note("place"))?;
    writeln!(
        out,
        "{:>12} {:>9} {:>9} {:>9} {:>10}",
        "image", "smallest", "largest", "no number", "positives"
    )?;
    let per_image = batch.images.len() / batch.len();
    for (image, pixels) in batch.images.chunks(per_image).enumerate() {
        let smallest = pixels.iter().copied().fold(f32::INFINITY, f32::min);
        let largest = pixels.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let bad = pixels.iter().filter(|value| !value.is_finite()).count();
        writeln!(
            out,
            "{:>12} {smallest:>9.3} {largest:>9.3} {bad:>9} {:>10}",
            batch.image_ids[image], batch.positives[image]
        )?;
    }
    let Some(checkpoint) = checkpoint else {
        return Ok(());
    };
    let trained = Trained::open(checkpoint)?;
    let network = trained.network()?;
    let mut weights = trained.weights(&network, true)?;
    let before = weights.clone();
    let mut engine = cpu_engine(&network, engine, StepMemory::default())?;
    let mut gradients = vec![0.0; weights.trainable.len()];
    let losses = engine.train_step(
        &mut weights,
        &batch.train_batch(),
        &StepOptions::default(),
        &mut gradients,
    )?;
    let norm = gradients
        .iter()
        .map(|g| f64::from(*g).powi(2))
        .sum::<f64>()
        .sqrt();
    writeln!(
        out,
        "with the weights of {}: class loss {}, box loss {}, gradient norm {norm}",
        trained.reader.path().display(),
        losses.class_loss,
        losses.box_loss
    )?;
    if !(losses.det_loss.is_finite() && norm.is_finite()) {
        let place = first_non_finite(&mut engine, &network.variables, &before, &batch, &gradients)?;
        writeln!(out, "it begins in {place}")?;
    }
    Ok(())
}

/// The batch of a file that a run wrote.
fn read(file: &Path) -> Result<Batch> {
    let mut tensors = load_tensors(file)?.by_name;
    let notes = load_notes(file)?;
    let context = || format!("{} is not a batch that a run wrote", file.display());
    let mut take = |name: &str| tensors.remove(name).with_context(context);
    let (pixels, classes, boxes) = (take("pixels")?, take("class_targets")?, take("box_targets")?);
    fn numbers<T: std::str::FromStr>(text: Option<&String>) -> Option<Vec<T>> {
        text?.split_whitespace().map(|word| word.parse().ok()).collect()
    }
    let image_ids: Vec<i64> = numbers(notes.get("image_ids")).with_context(context)?;
    let draw_keys: Vec<u64> = numbers(notes.get("draw_keys")).with_context(context)?;
    let positives: Vec<usize> = numbers(notes.get("positives")).with_context(context)?;
    let count = image_ids.len();
    let [n, height, width, 3] = pixels.shape[..] else {
        return Err(anyhow::anyhow!(context()));
    };
    let fits = [n, draw_keys.len(), positives.len()]
        .iter()
        .all(|&len| len == count)
        && count > 0;
    ensure!(fits, "{}", context());
    Ok(Batch {
        images: pixels.values,
        height,
        width,
        class_targets: classes.values.iter().map(|&class| class as i32).collect(),
        box_targets: boxes.values,
        positives,
        draw_keys,
        image_ids,
        ..Batch::default()
    })
}
