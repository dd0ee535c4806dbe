//! `effdet inspect checkpoint`.

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use effdet_ckpt::weights_hash;
use effdet_model::network::{Network, VariableKind, VariableTable};
use effdet_model::weights::Weights;
use serde_json::json;

use super::checkpoint::Trained;

/// Prints what a checkpoint is of, the hashes of its values and, with `variables`, the range of every variable.
pub fn run(path: &Path, variables: bool, as_json: bool) -> Result<()> {
    let trained = Trained::open(path)?;
    trained.reader.verify()?;
    let state = trained.reader.state();
    let network = Network::new(&trained.hparams)?;
    let table = &network.variables;
    let weights = trained.reader.weights(table)?;
    let averages = trained.reader.ema(table)?;
    let slots = trained.reader.slots(table)?;
    let hash = weights_hash(&weights);
    let average_hash = averages.as_ref().map(weights_hash);
    let rows = if variables {
        statistics(table, &weights)
    } else {
        Vec::new()
    };

    let mut out = std::io::stdout().lock();
    if as_json {
        let files: serde_json::Map<_, _> = (trained.reader.manifest().files.iter())
            .map(|(name, file)| (name.clone(), json!({"bytes": file.bytes, "sha256": file.sha256})))
            .collect();
        let rows: Vec<_> = rows
            .iter()
            .map(|row| {
                json!({"name": row.name, "shape": row.shape, "mean": row.mean, "deviation": row.deviation,
                       "min": row.min, "max": row.max, "not_finite": row.not_finite})
            })
            .collect();
        let summary = json!({
            "path": trained.reader.path(), "step": state.step, "epoch": state.epoch,
            "sample_position": state.sample_position, "model": state.model, "profile": state.profile,
            "image_size": trained.hparams.image_size, "num_classes": trained.hparams.num_classes,
            "classes": state.class_map, "data_fingerprint": state.data_fingerprint,
            "config_hash": state.config_hash, "metric": state.metric, "weights_hash": hash,
            "ema_hash": average_hash, "slots": slots.keys().collect::<Vec<_>>(), "files": files,
            "variables": rows,
        });
        writeln!(out, "{summary}")?;
        return Ok(());
    }
    writeln!(out, "{}", trained.reader.path().display())?;
    writeln!(
        out,
        "  step {}, epoch {}, {} samples into it",
        state.step, state.epoch, state.sample_position
    )?;
    writeln!(
        out,
        "  {} ({:?} profile), input {}, {} class outputs, {} variables",
        state.model,
        trained.hparams.profile,
        trained.hparams.image_size,
        trained.hparams.num_classes,
        table.len()
    )?;
    let names: Vec<&str> = trained.label_map.categories().map(|(_, name)| name).collect();
    writeln!(out, "  classes: {}", names.join(", "))?;
    if let Some(metric) = state.metric {
        writeln!(out, "  AP when last evaluated: {metric:.4}")?;
    }
    writeln!(out, "  weights  {hash}")?;
    if let Some(hash) = average_hash {
        writeln!(out, "  averages {hash}")?;
    }
    for (name, file) in &trained.reader.manifest().files {
        writeln!(out, "  {name:<24} {:>12} bytes  intact", file.bytes)?;
    }
    if variables {
        writeln!(
            out,
            "\n{:<62} {:>16} {:>11} {:>11} {:>11} {:>11}",
            "variable", "shape", "mean", "deviation", "min", "max"
        )?;
        for row in &rows {
            let shape: Vec<String> = row.shape.iter().map(usize::to_string).collect();
            let remark = match row.not_finite {
                0 => String::new(),
                count => format!("  {count} not finite"),
            };
            writeln!(
                out,
                "{:<62} {:>16} {:>11.4e} {:>11.4e} {:>11.4e} {:>11.4e}{remark}",
                row.name,
                shape.join("x"),
                row.mean,
                row.deviation,
                row.min,
                row.max
            )?;
        }
    }
    Ok(())
}

/// Range of the values of one variable; values that are not finite are counted apart.
struct Row<'a> {
    name: &'a str,
    shape: &'a [usize],
    mean: f64,
    deviation: f64,
    min: f32,
    max: f32,
    not_finite: usize,
}

fn statistics<'a>(table: &'a VariableTable, weights: &Weights) -> Vec<Row<'a>> {
    table
        .iter()
        .map(|variable| {
            let values = match variable.kind {
                VariableKind::Trainable => &weights.trainable[variable.range()],
                VariableKind::Statistic => &weights.statistics[variable.range()],
            };
            let finite = || values.iter().copied().filter(|value| value.is_finite());
            let count = finite().count().max(1) as f64;
            let mean = finite().map(f64::from).sum::<f64>() / count;
            let variance = finite().map(|v| (f64::from(v) - mean).powi(2)).sum::<f64>() / count;
            Row {
                name: &variable.name,
                shape: &variable.shape,
                mean,
                deviation: variance.sqrt(),
                min: finite().reduce(f32::min).unwrap_or(f32::NAN),
                max: finite().reduce(f32::max).unwrap_or(f32::NAN),
                not_finite: values.len() - finite().count(),
            }
        })
        .collect()
}
