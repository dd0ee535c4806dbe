//! `effdet train`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use effdet_ckpt::{CheckpointStore, MatchReport, load_backbone, load_tensors, match_variables, weights_hash};
use effdet_data::dataset::DetectionDataset;
use effdet_data::synthetic::{self, SyntheticConfig};
use effdet_dist::SingleProcess;
use effdet_model::hparams::{HParams, Profile};
use effdet_model::label_map::{Indexing, LabelMap};
use effdet_model::network::Network;
use effdet_model::weights::Weights;
use effdet_train::eval::Evaluator;
use effdet_train::events::EventSink;
use effdet_train::modes::EvaluationRule;
use effdet_train::trainer::{EarlyStop, Ending, Outcome, RunInputs, TrainConfig, TrainState, Trainer};
use serde::{Deserialize, Serialize};

use super::engine::cpu_engine;
use super::model::{apply_overrides, resolve_hparams};
use super::terminal::Terminal;
use super::{checkpoint, quickstart, report, sources};
use crate::cli::{SourceArgs, TrainArgs};

/// The effective configuration of a run, saved beside its checkpoints; enough to repeat it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// How it trains.
    pub train: TrainConfig,
    /// Images per evaluation step.
    pub eval_batch_size: usize,
    /// Images to evaluate on, at most.
    pub eval_samples: Option<usize>,
    /// Where the data lies.
    pub data: DataConfig,
    /// Model and schedule.
    pub hparams: HParams,
}

/// Where the data of a run lies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataConfig {
    /// Rendered by the program.
    Synthetic {
        /// Training images.
        images: u64,
        /// Held-out images.
        val_images: u64,
        /// Side in pixels.
        image_size: u32,
    },
    /// Named on the command line.
    Files(SourceArgs),
}

/// Data of a run.
pub struct RunData {
    pub train: Arc<DetectionDataset>,
    pub val: Option<Arc<DetectionDataset>>,
}

impl DataConfig {
    pub fn load(&self, eval_samples: Option<usize>) -> Result<RunData> {
        let (train, mut val) = match self {
            Self::Synthetic {
                images,
                val_images,
                image_size,
            } => {
                let config = SyntheticConfig {
                    image_size: *image_size,
                    ..SyntheticConfig::default()
                };
                let train = synthetic::dataset(&config, 0..*images);
                (
                    train,
                    Some(synthetic::dataset(&config, *images..images + val_images)),
                )
            }
            Self::Files(args) => (
                sources::require(args, sources::Part::Train)?,
                sources::load(args, sources::Part::Val)?,
            ),
        };
        if let (Some(val), Some(limit)) = (&mut val, eval_samples) {
            val.examples.truncate(limit);
        }
        if train.examples.iter().all(|example| example.objects.is_empty()) {
            bail!(
                "{}: none of the {} images has an object; training would see background only. Check the annotation file \
                 (captions files have no boxes) and the split",
                train.name,
                train.examples.len()
            );
        }
        if let Some(val) = &val
            && val.categories != train.categories
        {
            bail!(
                "categories of the training data ({:?}) and of the held-out data ({:?}) differ; use one class map for both",
                train.categories,
                val.categories
            );
        }
        Ok(RunData {
            train: Arc::new(train),
            val: val.map(Arc::new),
        })
    }
}

/// The label map of a data set: COCO's own where ids and names are COCO's, otherwise one output per category.
pub fn label_map_of(dataset: &DetectionDataset) -> Result<LabelMap> {
    let coco = LabelMap::coco();
    let is_coco = dataset.categories.len() == coco.len()
        && dataset
            .categories
            .iter()
            .all(|category| coco.name(category.id) == Some(&category.name));
    if is_coco {
        return Ok(coco);
    }
    let categories = dataset
        .categories
        .iter()
        .map(|category| (category.id, category.name.clone()));
    Ok(LabelMap::new(Indexing::Contiguous, categories)?)
}

/// Runs the command.
pub fn run(args: &TrainArgs) -> Result<ExitCode> {
    if args.amp == Some(true) {
        bail!("--amp: half precision is not available on this engine yet; leave the option out");
    }
    if args.resume {
        return resume(args);
    }
    let given = sources::is_given(&args.source);
    let config = if given {
        configure(args)?
    } else {
        quickstart::configure(args)?
    };
    if args.dry_run {
        print!("{}", toml::to_string(&config)?);
        return Ok(ExitCode::SUCCESS);
    }
    let data = config.data.load(config.eval_samples)?;
    let label_map = label_map_of(&data.train)?;
    let network = Arc::new(Network::new(&config.hparams)?);
    let mut weights = Weights::init(&network.variables, config.train.seed);
    if let Some(path) = &args.backbone_init {
        let report = load_backbone(path, &network.variables, &mut weights)?;
        print_match(&format!("backbone from {}", path.display()), &report);
    }
    if let Some(path) = &args.pretrained_ckpt {
        let report = load_pretrained(path, &network, &mut weights)?;
        print_match(&format!("weights from {}", path.display()), &report);
    }
    let state = TrainState::new(&network, weights)?;
    let run_dir = match &args.run_dir {
        Some(dir) => {
            if CheckpointStore::new(dir)
                .list()
                .is_ok_and(|listing| !listing.complete.is_empty())
            {
                bail!(
                    "{} holds checkpoints of an earlier run: go on with --resume, or choose another --run-dir",
                    dir.display()
                );
            }
            dir.clone()
        }
        None => free_run_dir(if given { &config.hparams.name } else { "quickstart" })?,
    };
    fs::create_dir_all(&run_dir).with_context(|| format!("cannot create {}", run_dir.display()))?;
    let text = toml::to_string(&config)?;
    fs::write(run_dir.join("config.toml"), &text)
        .with_context(|| format!("cannot write {}", run_dir.join("config.toml").display()))?;
    let ending = execute(args, &config, data, label_map, &network, state, &run_dir)?;
    if !given && ending == Ending::Complete {
        quickstart::next_steps(&run_dir);
    }
    exit_code(ending, &run_dir)
}

fn exit_code(ending: Ending, run_dir: &Path) -> Result<ExitCode> {
    if ending == Ending::Interrupted {
        eprintln!(
            "interrupted; go on with: effdet train --resume --run-dir {}",
            run_dir.display()
        );
        return Ok(ExitCode::from(130));
    }
    Ok(ExitCode::SUCCESS)
}

/// Goes on with a run by its own configuration.
fn resume(args: &TrainArgs) -> Result<ExitCode> {
    let run_dir = args
        .run_dir
        .clone()
        .context("--resume needs the folder of the run: --run-dir DIR")?;
    let file = run_dir.join("config.toml");
    let text = fs::read_to_string(&file)
        .with_context(|| format!("cannot read {}: is this the folder of a run?", file.display()))?;
    let mut config: RunConfig = toml::from_str(&text).with_context(|| format!("{}", file.display()))?;
    // What may change without changing the numbers, or is asked for on purpose.
    if let Some(workers) = args.workers {
        config.train.workers = workers;
    }
    if args.max_steps.is_some() {
        config.train.max_steps = args.max_steps;
    }
    let data = config.data.load(config.eval_samples)?;
    let label_map = label_map_of(&data.train)?;
    let network = Arc::new(Network::new(&config.hparams)?);
    let latest = CheckpointStore::new(&run_dir).load_latest(&network.variables)?;
    for bad in &latest.passed_over {
        eprintln!("warning: passed over {}: {}", bad.path.display(), bad.error);
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
    eprintln!("resuming {} at step {}", run_dir.display(), checkpoint.state.step);
    let state = TrainState::from_checkpoint(&network, checkpoint)?;
    let ending = execute(args, &config, data, label_map, &network, state, &run_dir)?;
    exit_code(ending, &run_dir)
}

/// Trains, reports and says where everything is.
fn execute(
    args: &TrainArgs,
    config: &RunConfig,
    data: RunData,
    label_map: LabelMap,
    network: &Arc<Network>,
    mut state: TrainState,
    run_dir: &Path,
) -> Result<Ending> {
    let mut engine = cpu_engine(network, &args.engine)?;
    let trainer = Trainer::new(&config.train, network, data.train.examples.len(), 1);
    if !args.quiet {
        eprintln!(
            "{} at {}, {} classes, {} trainable values; {} training and {} held-out images; batch {}, {} steps; {} threads, {}; {}",
            config.hparams.name,
            config.hparams.image_size,
            config.hparams.num_classes,
            network.variables.trainable_len(),
            data.train.examples.len(),
            data.val.as_ref().map_or(0, |val| val.examples.len()),
            config.train.batch_size * config.train.accumulate,
            trainer.total_steps(),
            engine.threads(),
            engine.isa(),
            run_dir.display(),
        );
    }
    let evaluator = data.val.as_ref().map(|val| Evaluator {
        dataset: Arc::clone(val),
        hparams: config.hparams.clone(),
        label_map: label_map.clone(),
        batch_size: config.eval_batch_size,
        workers: config.train.workers.max(1),
        only_images_with_detections: false,
    });
    let stop = stop_flag()?;
    let mut inputs = RunInputs {
        network,
        engine: &mut engine,
        train: data.train,
        evaluator,
        label_map: label_map.clone(),
        group: &SingleProcess,
        checkpoints: run_dir.to_path_buf(),
        stop,
    };
    let mut terminal = Terminal::new(args.quiet);
    let mut logs = report::logs(args, run_dir, state.step)?;
    let mut sinks: Vec<&mut dyn EventSink> = vec![&mut terminal];
    sinks.extend(logs.iter_mut().map(|sink| &mut **sink as &mut dyn EventSink));
    let outcome = trainer.run(&mut inputs, &mut state, &mut sinks)?;
    drop(inputs);
    finish(
        &outcome,
        config,
        network,
        &state,
        &mut engine,
        &label_map,
        data.val.as_deref(),
        run_dir,
    )?;
    Ok(outcome.ending)
}

#[allow(clippy::too_many_arguments, reason = "everything a finished run has")]
fn finish(
    outcome: &Outcome,
    config: &RunConfig,
    network: &Arc<Network>,
    state: &TrainState,
    engine: &mut dyn effdet_model::engine::Engine,
    label_map: &LabelMap,
    val: Option<&DetectionDataset>,
    run_dir: &Path,
) -> Result<()> {
    if let Some(evaluation) = &outcome.evaluation {
        print!("{}", evaluation.summary.table());
        if config.train.rule.at_end() && outcome.ending != Ending::Interrupted {
            report::write_detections(&evaluation.detections, &run_dir.join("detections.json"))?;
        }
    }
    if let Some(val) = val
        && outcome.ending != Ending::Interrupted
    {
        report::write_samples(
            engine,
            network,
            state.evaluation_weights(),
            label_map,
            val,
            &run_dir.join("samples"),
        )?;
    }
    println!(
        "step {}: {:.2} images/s; weights {}, averages {}",
        outcome.step,
        outcome.images_per_second,
        &weights_hash(&state.weights)[..16],
        state.average.as_ref().map_or_else(
            || "off".to_owned(),
            |average| weights_hash(average)[..16].to_owned()
        ),
    );
    println!("checkpoints, logs, curves and pictures: {}", run_dir.display());
    Ok(())
}

/// A flag that Ctrl-C and SIGTERM set; a second Ctrl-C leaves at once.
fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping after this step; once more to leave at once");
    })
    .context("cannot listen for signals")?;
    Ok(stop)
}

/// Configuration of a run on the user's data.
fn configure(args: &TrainArgs) -> Result<RunConfig> {
    let mut hparams = resolve_hparams(&args.model, "d0")?;
    let data = DataConfig::Files(args.source.clone());
    let loaded = data.load(None)?;
    let label_map = label_map_of(&loaded.train)?;
    if args.model.num_classes.is_none() {
        let coco = label_map.indexing() == Indexing::IdMinusOne;
        hparams.num_classes = match (coco, hparams.profile) {
            (true, Profile::Seed) => 91,
            (true, Profile::Google) => 90,
            (false, _) => label_map.min_num_classes(),
        };
    }
    let batch_size = args.batch_size.unwrap_or(8);
    // The published rates are per 64 images.
    let rate = 0.08 * (batch_size * args.accumulate) as f64 / 64.0;
    (hparams.learning_rate, hparams.lr_warmup_init) = (rate, rate / 100.0);
    apply_overrides(&mut hparams, &args.model.hparams)?;
    apply_schedule(args, &mut hparams);
    hparams.validate()?;
    let rule = match (args.training_mode.as_deref(), args.eval_every) {
        (None, every) => EvaluationRule::Every(every.unwrap_or(0)),
        (Some("train"), _) => EvaluationRule::Train,
        (Some("traineval"), _) => EvaluationRule::TrainEval {
            period: args.checkpoint_period,
        },
        (Some("train300"), _) => EvaluationRule::Train300,
        (Some(other), _) => bail!("--training-mode {other:?}: known modes are train, traineval and train300"),
    };
    Ok(run_config(
        args,
        hparams,
        data,
        batch_size,
        if args.benchmark {
            EvaluationRule::Never
        } else {
            rule
        },
    ))
}

/// Dedicated options win over everything else.
pub fn apply_schedule(args: &TrainArgs, hparams: &mut HParams) {
    let set = |slot: &mut f64, value: Option<f64>| {
        if let Some(value) = value {
            *slot = value;
        }
    };
    set(&mut hparams.num_epochs, args.epochs);
    set(&mut hparams.learning_rate, args.lr);
    set(&mut hparams.lr_warmup_init, args.warmup_value);
    set(&mut hparams.lr_warmup_epoch, args.warmup_epochs);
    if args.freeze.is_some() {
        hparams.var_freeze_expr.clone_from(&args.freeze);
    }
}

/// The run that options and hyper-parameters describe.
pub fn run_config(
    args: &TrainArgs,
    hparams: HParams,
    data: DataConfig,
    batch_size: usize,
    rule: EvaluationRule,
) -> RunConfig {
    let patience = args.patience;
    RunConfig {
        train: TrainConfig {
            batch_size,
            accumulate: args.accumulate.max(1),
            num_examples_per_epoch: args.num_examples_per_epoch,
            max_steps: args.max_steps.or(args.benchmark.then_some(args.benchmark_steps)),
            checkpoint_period: args.checkpoint_period,
            checkpoint_every_steps: args.checkpoint_every_steps,
            keep_last: args.keep,
            rule,
            early_stop: args
                .early_stop
                .clone()
                .map(|metric| EarlyStop { metric, patience }),
            seed: args.seed,
            workers: args.workers.unwrap_or(1),
            use_fake_data: args.use_fake_data,
        },
        eval_batch_size: args.eval_batch_size.unwrap_or(batch_size),
        eval_samples: args.eval_samples,
        data,
        hparams,
    }
}

/// `runs/NAME-1`, `-2`, … : the first that does not exist.
fn free_run_dir(name: &str) -> Result<PathBuf> {
    let name = name.trim_start_matches("efficientdet-");
    (1..100_000)
        .map(|number| Path::new("runs").join(format!("{name}-{number}")))
        .find(|dir| !dir.exists())
        .context("runs/ is full; give --run-dir")
}

/// Weights of a checkpoint or a safetensors file, by name; what does not fit keeps its initial values.
fn load_pretrained(path: &Path, network: &Network, weights: &mut Weights) -> Result<MatchReport> {
    let file = if path.is_file() {
        path.to_path_buf()
    } else {
        let step = checkpoint::open(path)?.path().to_path_buf();
        let averages = step.join("ema.safetensors");
        if averages.is_file() {
            averages
        } else {
            step.join("weights.safetensors")
        }
    };
    Ok(match_variables(
        &network.variables,
        &load_tensors(&file)?,
        &[],
        weights,
    )?)
}

fn print_match(title: &str, report: &MatchReport) {
    eprintln!(
        "{title}: {} variables loaded, {} tensors of the file skipped, {} variables re-initialised",
        report.loaded.len(),
        report.skipped.len(),
        report.reinitialised.len()
    );
    for (what, names) in [
        ("skipped", format!("{:?}", report.skipped)),
        ("re-initialised", format!("{:?}", report.reinitialised)),
    ] {
        if names.len() > 2 {
            let short: String = names.chars().take(600).collect();
            eprintln!(
                "  {what}: {short}{}",
                if short.len() < names.len() { " …" } else { "" }
            );
        }
    }
}
