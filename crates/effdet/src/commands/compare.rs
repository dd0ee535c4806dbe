//! `effdet compare`, `effdet checkpoint diff`: what differs between two runs or checkpoints.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use effdet_ckpt::weights_hash;
use effdet_model::network::{Network, VariableTable};
use effdet_model::weights::Weights;
use serde_json::{Value, json};

use super::checkpoint::Trained;
use crate::cli::CompareArgs;

/// A value that differs: its name, and what each side has.
type Difference = (String, String, String);

/// Values of one buffer that differ.
struct ValueDifference {
    /// `weights`, `averages`, `momentum` …
    buffer: String,
    /// Variables with a difference, of how many.
    variables: (usize, usize),
    largest: f32,
    /// The variable with the largest one.
    worst: String,
}

/// Everything that was compared.
struct Comparison {
    names: [String; 2],
    state: Vec<Difference>,
    configuration: Vec<Difference>,
    metrics: Vec<Difference>,
    /// First step whose losses differ, and steps that both have; none where a side has no log.
    losses: Option<(Option<u64>, usize)>,
    values: Vec<ValueDifference>,
    /// Whether weights, averages and optimiser could be compared.
    same_network: bool,
}

/// Runs `effdet compare`.
pub fn run(args: &CompareArgs) -> Result<ExitCode> {
    let comparison = compare(&args.a, &args.b)?;
    comparison.print(args.json)?;
    Ok(match args.exact && !comparison.is_exact() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

/// Runs `effdet checkpoint diff`.
pub fn diff(a: &Path, b: &Path, as_json: bool) -> Result<()> {
    compare(a, b)?.print(as_json)
}

fn compare(a: &Path, b: &Path) -> Result<Comparison> {
    let sides = [Trained::open(a)?, Trained::open(b)?];
    let [left, right] = sides.each_ref().map(|side| side.reader.state());
    let facts = |state: &effdet_ckpt::CheckpointState| {
        [
            ("step", state.step.to_string()),
            ("epoch", state.epoch.to_string()),
            ("sample_position", state.sample_position.to_string()),
            ("model", state.model.clone()),
            ("profile", format!("{:?}", state.profile)),
            ("data", state.data_fingerprint.clone()),
            (
                "classes",
                serde_json::to_string(&state.class_map).unwrap_or_default(),
            ),
            (
                "metric",
                state.metric.map_or_else(|| "none".to_owned(), |m| m.to_string()),
            ),
        ]
    };
    let differing = |(a, b): ((&'static str, String), (&'static str, String))| {
        (a.1 != b.1).then(|| (a.0.to_owned(), a.1, b.1))
    };
    let state = facts(left)
        .into_iter()
        .zip(facts(right))
        .filter_map(differing)
        .collect();
    let configuration = |state: &effdet_ckpt::CheckpointState| {
        let mut flat = BTreeMap::new();
        flatten("hparams", &state.hparams, &mut flat);
        flatten("train", &state.extra["train"], &mut flat);
        flat
    };
    let configuration = differences(&configuration(left), &configuration(right));

    let networks = [Network::new(&sides[0].hparams)?, Network::new(&sides[1].hparams)?];
    let same_network = networks[0].variables == networks[1].variables;
    let mut values = Vec::new();
    if same_network {
        let table = &networks[0].variables;
        let buffers = |side: &Trained| -> Result<BTreeMap<String, Weights>> {
            let mut buffers = BTreeMap::from([("weights".to_owned(), side.reader.weights(table)?)]);
            if let Some(averages) = side.reader.ema(table)? {
                buffers.insert("averages".to_owned(), averages);
            }
            for (slot, values) in side.reader.slots(table)? {
                let mut weights = Weights::zeros(table);
                weights.trainable = values;
                buffers.insert(slot, weights);
            }
            Ok(buffers)
        };
        let [a, b] = [buffers(&sides[0])?, buffers(&sides[1])?];
        for (buffer, a) in &a {
            if let Some(b) = b.get(buffer) {
                values.extend(value_difference(buffer, table, a, b));
            }
        }
        for buffer in a.keys().chain(b.keys()) {
            if a.contains_key(buffer) != b.contains_key(buffer) {
                values.push(ValueDifference {
                    buffer: buffer.clone(),
                    variables: (table.len(), table.len()),
                    largest: f32::NAN,
                    worst: "one side has none".to_owned(),
                });
            }
        }
    }
    let (metrics, losses) = (metric_differences(a, b)?, loss_difference(a, b)?);
    Ok(Comparison {
        names: [a, b].map(|path| path.display().to_string()),
        state,
        configuration,
        metrics,
        losses,
        values,
        same_network,
    })
}

/// None when all bits are the same.
fn value_difference(
    buffer: &str,
    table: &VariableTable,
    a: &Weights,
    b: &Weights,
) -> Option<ValueDifference> {
    if weights_hash(a) == weights_hash(b) {
        return None;
    }
    let (mut count, mut largest, mut worst) = (0, 0.0f32, String::new());
    for variable in table {
        let slices = [a, b].map(|weights| weights.slice(variable.kind, variable.range()));
        let pairs = || slices[0].iter().zip(slices[1]);
        if pairs().all(|(a, b)| a.to_bits() == b.to_bits()) {
            continue;
        }
        count += 1;
        // A difference from or to what is no number is beyond all others.
        let difference = pairs()
            .filter(|(a, b)| a.to_bits() != b.to_bits())
            .map(|(a, b)| match (a - b).abs() {
                distance if distance.is_nan() => f32::INFINITY,
                distance => distance,
            })
            .fold(0.0, f32::max);
        if worst.is_empty() || difference > largest {
            (largest, worst) = (difference, variable.name.clone());
        }
    }
    Some(ValueDifference {
        buffer: buffer.to_owned(),
        variables: (count, table.len()),
        largest,
        worst,
    })
}

fn flatten(prefix: &str, value: &Value, flat: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                flatten(&format!("{prefix}.{name}"), value, flat);
            }
        }
        value => {
            flat.insert(prefix.to_owned(), value.to_string());
        }
    }
}

fn differences(a: &BTreeMap<String, String>, b: &BTreeMap<String, String>) -> Vec<Difference> {
    let value = |side: &BTreeMap<String, String>, name: &String| {
        side.get(name).cloned().unwrap_or_else(|| "not set".to_owned())
    };
    let mut names: Vec<&String> = a.keys().chain(b.keys()).collect();
    names.sort_unstable();
    names.dedup();
    names
        .into_iter()
        .map(|name| (name.clone(), value(a, name), value(b, name)))
        .filter(|(_, a, b)| a != b)
        .collect()
}

/// A table of a run folder: its heading, and its rows by the first column.
type Table = (Vec<String>, BTreeMap<u64, Vec<String>>);

/// A table of a run folder; none when it is not there.
fn table(folder: &Path, name: &str) -> Result<Option<Table>> {
    let file = folder.join(name);
    if !file.is_file() {
        return Ok(None);
    }
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let cells = |line: &str| line.split(',').map(str::to_owned).collect::<Vec<_>>();
    let mut lines = text.lines();
    let heading = lines.next().map(cells).unwrap_or_default();
    let rows = lines.map(cells).filter(|row| row.len() == heading.len());
    let rows = rows.filter_map(|row| Some((row[0].parse().ok()?, row))).collect();
    Ok(Some((heading, rows)))
}

/// Differences of the last evaluation that both sides have made.
fn metric_differences(a: &Path, b: &Path) -> Result<Vec<Difference>> {
    let name = "evaluations.csv";
    let (Some((heading, a)), Some((_, b))) = (table(a, name)?, table(b, name)?) else {
        return Ok(Vec::new());
    };
    let common = a
        .iter()
        .rev()
        .find_map(|(step, row)| Some((step, row, b.get(step)?)));
    let Some((step, a, b)) = common else {
        return Ok(Vec::new());
    };
    let columns = heading.iter().zip(a.iter().zip(b)).skip(2);
    let differing = columns.filter(|(_, (a, b))| a != b);
    Ok(differing
        .map(|(name, (a, b))| (format!("{name} (step {step})"), a.clone(), b.clone()))
        .collect())
}

/// The first common step whose losses, norms or rates differ, and the number of common steps.
fn loss_difference(a: &Path, b: &Path) -> Result<Option<(Option<u64>, usize)>> {
    let name = "steps.csv";
    let (Some((heading, a)), Some((_, b))) = (table(a, name)?, table(b, name)?) else {
        return Ok(None);
    };
    let timed = ["seconds", "wait_s"];
    let numbers = |row: &[String]| -> Vec<String> {
        let cells = row
            .iter()
            .zip(&heading)
            .filter(|(_, name)| !timed.contains(&name.as_str()));
        cells.map(|(cell, _)| cell.clone()).collect()
    };
    let common: Vec<u64> = a.keys().filter(|step| b.contains_key(step)).copied().collect();
    let first = common.iter().find(|step| numbers(&a[step]) != numbers(&b[step]));
    Ok(Some((first.copied(), common.len())))
}

impl Comparison {
    fn is_exact(&self) -> bool {
        let losses = self.losses.is_none_or(|(first, _)| first.is_none());
        self.same_network && self.values.is_empty() && losses
    }

    fn print(&self, as_json: bool) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if as_json {
            let list = |differences: &[Difference]| -> Vec<Value> {
                let of = |(name, a, b): &Difference| json!({"name": name, "a": a, "b": b});
                differences.iter().map(of).collect()
            };
            let values: Vec<Value> = (self.values.iter())
                .map(|v| json!({"buffer": v.buffer, "variables": v.variables.0, "largest": v.largest, "worst": v.worst}))
                .collect();
            let losses = self
                .losses
                .map(|(first, common)| json!({"first_difference": first, "common_steps": common}));
            let report = json!({
                "a": self.names[0], "b": self.names[1], "exact": self.is_exact(), "same_network": self.same_network,
                "state": list(&self.state), "configuration": list(&self.configuration), "metrics": list(&self.metrics),
                "losses": losses, "values": values,
            });
            writeln!(out, "{report}")?;
            return Ok(());
        }
        writeln!(out, "a: {}\nb: {}", self.names[0], self.names[1])?;
        for (title, differences) in [
            ("state", &self.state),
            ("configuration", &self.configuration),
            ("last evaluation", &self.metrics),
        ] {
            if differences.is_empty() {
                writeln!(out, "{title}: the same")?;
                continue;
            }
            writeln!(out, "{title}:")?;
            for (name, a, b) in differences {
                writeln!(out, "  {name:<40} {a}  |  {b}")?;
            }
        }
        match self.losses {
            None => writeln!(out, "losses: not logged on both sides")?,
            Some((None, common)) => writeln!(out, "losses: the same in {common} common steps")?,
            Some((Some(step), common)) => {
                writeln!(
                    out,
                    "losses: they differ from step {step} on ({common} common steps)"
                )?;
            }
        }
        if !self.same_network {
            writeln!(out, "values: not comparable, the networks differ")?;
        } else if self.values.is_empty() {
            writeln!(out, "values: the same bits in weights, averages and optimiser")?;
        }
        for v in &self.values {
            writeln!(
                out,
                "values: {} differ in {} of {} variables, by {:e} at most ({})",
                v.buffer, v.variables.0, v.variables.1, v.largest, v.worst
            )?;
        }
        Ok(())
    }
}
