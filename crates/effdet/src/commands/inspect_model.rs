//! `effdet inspect model`.

use std::io::Write;

use anyhow::Result;
use effdet_model::network::{Network, StageGroup, VariableKind};
use serde_json::json;

use super::model::resolve_hparams;
use crate::cli::ModelArgs;

/// Prints the stage table, the variable table or the hyper-parameters of a model.
pub fn run(args: &ModelArgs, variables: bool, hparams_only: bool, as_json: bool) -> Result<()> {
    let hparams = resolve_hparams(args, "d0")?;
    let mut out = std::io::stdout().lock();
    if hparams_only {
        let text = if as_json {
            serde_json::to_string_pretty(&hparams)?
        } else {
            toml::to_string(&hparams)?
        };
        writeln!(out, "{}", text.trim_end())?;
        return Ok(());
    }
    let network = Network::new(&hparams)?;
    let costs = network.stage_costs();
    let (trainable, statistics) = (
        network.variables.trainable_len(),
        network.variables.statistics_len(),
    );
    let macs: u64 = costs.iter().map(|cost| cost.macs).sum();
    if as_json {
        let stages: Vec<_> = costs
            .iter()
            .map(|c| {
                json!({"name": c.name, "trainable": c.trainable, "statistics": c.statistics, "macs": c.macs,
                       "output": [c.output.height, c.output.width, c.out_channels]})
            })
            .collect();
        let table: Vec<_> = (network.variables.iter())
            .filter(|_| variables)
            .map(
                |v| json!({"name": v.name, "shape": v.shape, "trainable": v.kind == VariableKind::Trainable}),
            )
            .collect();
        let summary = json!({
            "model": hparams.name, "profile": hparams.profile, "image_size": hparams.image_size,
            "num_classes": hparams.num_classes, "anchors": network.num_anchors(), "trainable": trainable,
            "statistics": statistics, "macs": macs, "stages": stages, "variables": table,
        });
        writeln!(out, "{summary}")?;
        return Ok(());
    }
    if variables {
        writeln!(
            out,
            "{:>4}  {:<62} {:>16} {:>8}  kind",
            "#", "name", "shape", "values"
        )?;
        for (index, variable) in network.variables.iter().enumerate() {
            let shape = match variable.shape.as_slice() {
                [] => "scalar".to_owned(),
                shape => shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x"),
            };
            let kind = match variable.kind {
                VariableKind::Trainable => "trainable",
                VariableKind::Statistic => "statistic",
            };
            writeln!(
                out,
                "{index:>4}  {:<62} {shape:>16} {:>8}  {kind}",
                variable.name, variable.len
            )?;
        }
    } else {
        writeln!(
            out,
            "{:<24} {:>16} {:>12} {:>10} {:>12}",
            "stage", "output", "trainable", "statistics", "MMAC"
        )?;
        for cost in &costs {
            let output = format!(
                "{}x{}x{}",
                cost.output.height, cost.output.width, cost.out_channels
            );
            let mmac = cost.macs as f64 / 1e6;
            writeln!(
                out,
                "{:<24} {output:>16} {:>12} {:>10} {mmac:>12.2}",
                cost.name, cost.trainable, cost.statistics
            )?;
        }
    }
    let share = |group: StageGroup| {
        costs
            .iter()
            .filter(|c| c.group == group)
            .map(|c| c.macs)
            .sum::<u64>() as f64
            / 1e9
    };
    writeln!(
        out,
        "\n{} ({:?} profile), input {}, {} classes, {} anchors: {} variables, {trainable} trainable values, {statistics} statistics, \
         {:.3} GMAC (backbone {:.3}, BiFPN {:.3}, heads {:.3})",
        hparams.name,
        hparams.profile,
        hparams.image_size,
        hparams.num_classes,
        network.num_anchors(),
        network.variables.len(),
        macs as f64 / 1e9,
        share(StageGroup::Backbone),
        share(StageGroup::Fpn),
        share(StageGroup::Heads),
    )?;
    Ok(())
}
