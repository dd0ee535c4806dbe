//! `effdet bench data`: what one core prepares a second.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use effdet_data::batch::{Batch, SampleKey, Scratch};
use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::assign::Assigner;
use effdet_train::eval::preparation;
use serde_json::json;

use super::distribution::Distribution;
use crate::cli::DataBenchOptions;
use crate::commands::cache::image_cache;
use crate::commands::host::{ForeignLoad, cpu_name, write_foreign};
use crate::commands::memory::{self, gb};
use crate::commands::model::{apply_augmentation, resolve_hparams};
use crate::commands::run_config::label_map_of;
use crate::commands::sources::{self, Part};

/// Prepares training samples on one thread, pass after pass, and prints where the time goes.
pub fn run(options: &DataBenchOptions) -> Result<()> {
    ensure!(options.passes > 0, "--passes must be at least 1");
    let mut hparams = resolve_hparams(&options.model, "d0")?;
    apply_augmentation(&options.augmentation, &mut hparams)?;
    let mut dataset = sources::require(&options.source, Part::Train)?;
    dataset.examples.truncate(options.limit.unwrap_or(usize::MAX));
    ensure!(!dataset.examples.is_empty(), "there is no image to prepare");
    let mut preparation = preparation(&hparams, &label_map_of(&dataset)?, options.seed);
    let spare_bytes = memory::allowed(None).map_or(0, |(bytes, _)| bytes);
    let cache = image_cache(
        &options.cache,
        &hparams,
        &dataset,
        spare_bytes,
        Path::new("cache"),
    )?;
    preparation.cache = cache.as_ref().map(|(cache, _)| Arc::clone(cache));
    let assigner = Assigner::new(&Anchors::new(&AnchorConfig::from(&hparams))?);
    let images = dataset.examples.len();

    let load = ForeignLoad::start();
    let mut batch = Batch::default();
    let mut scratch = Scratch::default();
    let mut pass_s = Vec::new();
    let mut spent_us = [0u64; 3];
    // The first pass fills the page cache and does not count.
    for pass in 0..=options.passes {
        let clock = Instant::now();
        for index in 0..images as u64 {
            preparation.start(&mut batch, 1, Some(&assigner));
            let key = SampleKey { pass, index };
            preparation.append(&mut batch, &dataset.examples, key, Some(&assigner), &mut scratch)?;
            if pass > 0 {
                let parts = [batch.decode_us, batch.prepare_us, batch.assign_us];
                spent_us
                    .iter_mut()
                    .zip(parts)
                    .for_each(|(sum, part)| *sum += part);
            }
        }
        if pass > 0 {
            pass_s.push(clock.elapsed().as_secs_f64());
        }
    }
    let foreign_cores = load.cores();
    let distribution = Distribution::new(&pass_s);
    let img_s = images as f64 / distribution.percentile_s(50);
    let count = images as f64 * options.passes as f64;
    let ms = spent_us.map(|us| us as f64 * 1e-3 / count);
    let [decode, augment, assign] = ms;

    let mut out = std::io::stdout().lock();
    if options.json {
        let report = json!({
            "bench": "data", "model": hparams.name, "image_size": hparams.image_size, "images": images,
            "cpu": cpu_name(), "img_s_per_core": img_s, "times_s": pass_s, "decode_ms": decode,
            "augment_ms": augment, "assign_ms": assign, "foreign_cores": foreign_cores,
            "cache": options.cache.cache, "cache_bytes": cache.as_ref().map(|(cache, _)| cache.used_bytes()),
        });
        writeln!(out, "{report}")?;
        return Ok(());
    }
    writeln!(
        out,
        "data for {}, input {}, {images} images of {}, one core, {}",
        hparams.name,
        hparams.image_size,
        options
            .source
            .data
            .as_ref()
            .map_or_else(|| dataset.name.clone(), |data| data.display().to_string()),
        cpu_name().as_deref().unwrap_or("unknown processor")
    )?;
    if let Some((cache, line)) = &cache {
        writeln!(out, "  {line} at first, {} at last", gb(cache.used_bytes()))?;
    }
    for (name, ms) in [
        ("read and decode", decode),
        ("augment, resize, crop", augment),
        ("assign anchors", assign),
    ] {
        let rate = 1e3 / ms.max(1e-6);
        writeln!(out, "  {name:<24} {ms:>8.3} ms  {rate:>9.1} images/s")?;
    }
    let total_ms = 1e3 / img_s;
    writeln!(
        out,
        "  {:<24} {total_ms:>8.3} ms  {img_s:>9.1} images/s per core",
        "total"
    )?;
    write_foreign(&mut out, foreign_cores)?;
    Ok(())
}
