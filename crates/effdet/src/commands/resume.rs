//! Going on with a run: what is asked against what it was started with.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use effdet_ckpt::{CheckpointStore, write_file};
use effdet_model::engine::Precision;
use effdet_model::network::Network;
use effdet_train::trainer::TrainState;

use super::model::{apply_augmentation, apply_overrides, resolve_hparams};
use super::ranks::flatten;
use super::run_config::{DataConfig, RunConfig, RunData, apply_schedule, early_stop};
use super::sources;
use super::train::{CONFIG_FILE, RUNS};
use crate::cli::TrainArgs;

/// The configuration that `args` ask for where they name an option, and that of the run everywhere else.
pub fn asked(args: &TrainArgs, own: &RunConfig) -> Result<RunConfig> {
    let named = |option: &str| args.given.iter().any(|given| given == option);
    let mut asked = own.clone();
    let hparams = &mut asked.hparams;
    if named("model") || named("profile") {
        let mut model = args.model.clone();
        model.hparams.clear();
        let preset = resolve_hparams(&model, &own.hparams.name)?;
        if preset.name != own.hparams.name || preset.profile != own.hparams.profile {
            bail!(
                "the run trains {} in the conventions of {:?}, not {} in those of {:?}: start a new run with --pretrained-ckpt",
                own.hparams.name,
                own.hparams.profile,
                preset.name,
                preset.profile
            );
        }
    }
    if let Some(size) = args.model.image_size {
        hparams.image_size = size;
    }
    if let Some(classes) = args.model.num_classes {
        hparams.num_classes = classes;
    }
    apply_overrides(hparams, &args.model.hparams)?;
    apply_schedule(args, hparams);
    apply_augmentation(&args.augmentation, hparams)?;
    hparams.validate()?;
    if sources::is_given(&args.source) {
        asked.data = DataConfig::Files(Box::new(sources::absolute(&args.source)?));
    }
    if let Some(batch_size) = args.batch_images() {
        // A run is its ranks together, whatever their number now.
        asked.train.batch_size = batch_size;
    }
    let own_precision = own.train.precision;
    let precision =
        (args.precision()).map_or_else(Precision::default, |choice| choice.resolve_for(own_precision));
    macro_rules! take {
        ($($option:literal => $field:expr, $value:expr;)*) => {
            $(if named($option) { $field = $value; })*
        };
    }
    take! {
        "eval_batch_size" => asked.eval_batch_size, args.eval_batch_size.unwrap_or(own.eval_batch_size);
        "eval_samples" => asked.eval_samples, args.eval_samples;
        "accumulate" => asked.train.accumulate, args.accumulate.max(1);
        "precision" => asked.train.precision, precision;
        "amp" => asked.train.precision, precision;
        "sync_bn" => asked.train.sync_bn, args.sync_bn;
        "half_gradients" => asked.train.half_gradients, args.half_gradients;
        "num_examples_per_epoch" => asked.train.num_examples_per_epoch, args.num_examples_per_epoch;
        "checkpoint_period" => asked.train.checkpoint_period, args.checkpoint_period;
        "checkpoint_every_steps" => asked.train.checkpoint_every_steps, args.checkpoint_every_steps;
        "keep" => asked.train.keep_last, args.keep;
        "keep_best" => asked.train.keep_best, args.keep_best;
        "keep_every" => asked.train.keep_every, args.keep_every;
        "on_nonfinite" => asked.train.on_nonfinite, args.on_nonfinite.into();
        "early_stop" => asked.train.early_stop, early_stop(args)?;
        "seed" => asked.train.seed, args.seed;
        "workers" => asked.train.workers, args.workers.unwrap_or(own.train.workers);
        "use_fake_data" => asked.train.use_fake_data, args.use_fake_data;
    }
    if named("eval_every") || named("training_mode") {
        asked.train.rule = super::run_config::rule(args)?;
    }
    asked.train.max_steps = args.max_steps;
    Ok(asked)
}

/// Settings that change no number of the run: what is kept, how it is loaded, when it is looked at.
const FREE: [&str; 13] = [
    "eval_batch_size",
    "eval_samples",
    "train.checkpoint_every_steps",
    "train.checkpoint_period",
    "train.early_stop",
    "train.keep_best",
    "train.keep_every",
    "train.keep_last",
    "train.max_steps",
    "train.on_nonfinite",
    "train.rule",
    "train.workers",
    "train.batch_size",
];

/// Refuses changes that would make another run of it, unless they are wanted.
pub fn check_changes(own: &RunConfig, asked: &RunConfig, allowed: bool) -> Result<()> {
    let flat = |config: &RunConfig| -> Result<Vec<(String, String)>> {
        let mut facts = Vec::new();
        flatten("", &toml::Value::try_from(config)?, &mut facts);
        Ok(facts)
    };
    let (before, after) = (flat(own)?, flat(asked)?);
    let value = |facts: &[(String, String)], name: &str| {
        let found = facts.iter().find(|(other, _)| other == name);
        found.map_or_else(|| "not set".to_owned(), |(_, value)| value.clone())
    };
    let mut names: Vec<&String> = before.iter().chain(&after).map(|(name, _)| name).collect();
    names.sort_unstable();
    names.dedup();
    let is_free = |name: &str| {
        FREE.iter()
            .any(|free| name == *free || name.starts_with(&format!("{free}.")))
    };
    let changes: Vec<String> = names
        .into_iter()
        .filter(|name| !is_free(name))
        .map(|name| (name, value(&before, name), value(&after, name)))
        .filter(|(_, before, after)| before != after)
        .map(|(name, before, after)| format!("  {name}: {before} in the run, {after} asked for"))
        .collect();
    if changes.is_empty() {
        return Ok(());
    }
    let table = changes.join("\n");
    ensure!(
        allowed,
        "the run was started with other options:\n{table}\nleave them out to go on as it was, add --allow-changes to go on with them, \
         or start a new run with --pretrained-ckpt"
    );
    tell!("going on with other options:\n{table}");
    Ok(())
}

/// The state of the newest complete checkpoint of a run.
///
/// With `strict`, a newer one that is damaged is an error instead of a warning.
pub fn load_state(run_dir: &Path, network: &Network, data: &RunData, strict: bool) -> Result<TrainState> {
    let latest = CheckpointStore::new(run_dir).load_latest(&network.variables)?;
    for bad in &latest.passed_over {
        ensure!(
            !strict,
            "{}: {}; without --strict the run goes on from an earlier one",
            bad.path.display(),
            bad.error
        );
        tell!("warning: passed over {}: {}", bad.path.display(), bad.error);
    }
    let checkpoint = latest.checkpoint.with_context(|| {
        format!(
            "{} has no complete checkpoint; start a new run without --resume",
            run_dir.display()
        )
    })?;
    if checkpoint.state.data_fingerprint != data.train.fingerprint() {
        bail!(
            "the training data is not that of the checkpoint (images, boxes or classes changed); start a new run with \
             --pretrained-ckpt {}",
            checkpoint.path.display()
        );
    }
    tell!("resuming {} at step {}", run_dir.display(), checkpoint.state.step);
    Ok(TrainState::from_checkpoint(network, checkpoint)?)
}

/// The configuration that a run was started with, or went on with last.
pub fn read_config(run_dir: &Path) -> Result<RunConfig> {
    let file = run_dir.join(CONFIG_FILE);
    let text = fs::read_to_string(&file)
        .with_context(|| format!("cannot read {}: is this the folder of a run?", file.display()))?;
    toml::from_str(&text).with_context(|| file.display().to_string())
}

/// Writes the configuration of a run; a kill leaves the old one or the new one.
pub fn write_config(run_dir: &Path, config: &RunConfig) -> Result<()> {
    Ok(write_file(
        &run_dir.join(CONFIG_FILE),
        toml::to_string(config)?.as_bytes(),
    )?)
}

/// The run in `runs/` on the same data that was started last.
pub fn newest_run(args: &TrainArgs) -> Result<PathBuf> {
    let wanted = sources::is_given(&args.source).then(|| sources::absolute(&args.source));
    let wanted = wanted.transpose()?;
    let mut newest: Option<(SystemTime, PathBuf)> = None;
    for entry in fs::read_dir(RUNS).into_iter().flatten().flatten() {
        let dir = entry.path();
        let Ok(config) = read_config(&dir) else {
            continue;
        };
        let started = fs::metadata(dir.join(CONFIG_FILE)).and_then(|metadata| metadata.modified());
        let fits = wanted.as_ref().is_none_or(|wanted| config.data.is_of(wanted));
        if let Ok(started) = started
            && fits
            && newest.as_ref().is_none_or(|(time, _)| started > *time)
        {
            newest = Some((started, dir));
        }
    }
    newest
        .map(|(_, dir)| dir)
        .with_context(|| format!("no run on this data in {RUNS}/: name its folder with --run-dir"))
}
