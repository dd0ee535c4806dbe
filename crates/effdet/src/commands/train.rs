//! `effdet train`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use effdet_ckpt::{CheckpointStore, load_backbone, weights_hash};
use effdet_model::label_map::LabelMap;
use effdet_model::network::Network;
use effdet_model::weights::Weights;
use effdet_train::eval::Evaluator;
use effdet_train::events::EventSink;
use effdet_train::trainer::{Ending, Outcome, RunInputs, TrainState, Trainer};

use super::engine::cpu_engine;
use super::plan::plan;
use super::pretrained::{load_pretrained, print_match};
use super::ranks::{self, Job, from_root};
use super::run_config::{DataConfig, RunConfig, RunData, configure, label_map_of};
use super::terminal::Terminal;
use super::{doctor, quickstart, report, sources};
use crate::cli::TrainArgs;

/// Where runs go that were given no folder.
const RUNS: &str = "runs";
const CONFIG_FILE: &str = "config.toml";
/// Signals to a rank within this time are one request to stop.
const SAME_REQUEST: Duration = Duration::from_secs(5);

/// Runs the command.
pub fn run(args: &TrainArgs) -> Result<ExitCode> {
    if args.amp == Some(true) && !args.dry_run {
        bail!("--amp: half precision is not available on this engine yet; leave the option out");
    }
    ranks::run(&args.ranks, |job| match args.resume {
        true => resume(args, job),
        false => start(args, job),
    })
}

/// Starts a run.
fn start(args: &TrainArgs, job: &Job<'_>) -> Result<ExitCode> {
    let given = sources::is_given(&args.source);
    let planned = args.plan_ranks.filter(|_| args.dry_run);
    let ranks = planned.unwrap_or_else(|| job.group.size());
    let (config, data) = if given {
        configure(args, ranks)?
    } else {
        let config = quickstart::configure(args, ranks)?;
        let data = config.data.load(config.eval_samples)?;
        (config, data)
    };
    let label_map = label_map_of(&data.train)?;
    if given && !args.no_doctor {
        let pretrained = args.pretrained_ckpt.as_deref();
        doctor::before_training(&data, &config.hparams, pretrained, job.is_root())?;
    }
    ranks::verify(job, &config, &data, &label_map)?;
    if args.dry_run {
        if job.is_root() {
            let plan = plan(args, &config, &data)?;
            write!(std::io::stdout(), "{plan}{}", toml::to_string(&config)?)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let network = Arc::new(Network::new(&config.hparams)?);
    let mut weights = Weights::init(&network.variables, config.train.seed);
    // The other ranks receive what rank 0 has.
    if let Some(path) = args.backbone_init.as_ref().filter(|_| job.is_root()) {
        let report = load_backbone(path, &network.variables, &mut weights)?;
        print_match(&format!("backbone from {}", path.display()), &report);
    }
    if let Some(path) = args.pretrained_ckpt.as_ref().filter(|_| job.is_root()) {
        let report = load_pretrained(path, &network, &mut weights)?;
        print_match(&format!("weights from {}", path.display()), &report);
    }
    let state = TrainState::new(&network, weights)?;
    let name = if given { &config.hparams.name } else { "quickstart" };
    let run_dir = from_root(job, || {
        let run_dir = new_run_dir(args.run_dir.as_deref(), name)?;
        let file = run_dir.join(CONFIG_FILE);
        fs::write(&file, toml::to_string(&config)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        Ok(run_dir.to_string_lossy().into_owned().into_bytes())
    })?;
    let run_dir = PathBuf::from(String::from_utf8(run_dir)?);
    let ending = execute(args, job, &config, data, label_map, &network, state, &run_dir)?;
    if !given && ending == Ending::Complete && job.is_root() {
        quickstart::next_steps(&run_dir)?;
    }
    exit_code(ending, &run_dir)
}

fn exit_code(ending: Ending, run_dir: &Path) -> Result<ExitCode> {
    if ending == Ending::Interrupted {
        if ranks::speaks() {
            eprintln!(
                "interrupted; go on with: effdet train --resume --run-dir {}",
                run_dir.display()
            );
        }
        return Ok(ExitCode::from(130));
    }
    Ok(ExitCode::SUCCESS)
}

/// Goes on with a run by its own configuration.
fn resume(args: &TrainArgs, job: &Job<'_>) -> Result<ExitCode> {
    refuse_changes(args)?;
    // Rank 0 decides what is resumed, so that the others need not see its folder.
    let found = from_root(job, || {
        let run_dir = match &args.run_dir {
            Some(dir) => dir.clone(),
            None => newest_run(args)?,
        };
        let config = read_config(&run_dir)?;
        Ok(toml::to_string(&Found { run_dir, config })?.into_bytes())
    })?;
    let Found { run_dir, mut config } = toml::from_str(std::str::from_utf8(&found)?)?;
    // What may change without changing the numbers, or is asked for on purpose.
    if let Some(workers) = args.workers {
        config.train.workers = workers;
    }
    config.train.max_steps = args.max_steps;
    let data = config.data.load(config.eval_samples)?;
    let label_map = label_map_of(&data.train)?;
    ranks::verify(job, &config, &data, &label_map)?;
    let network = Arc::new(Network::new(&config.hparams)?);
    let state = match job.is_root() {
        true => load_state(&run_dir, &network, &data)?,
        // Rank 0 sends what it has.
        false => TrainState::new(&network, Weights::zeros(&network.variables))?,
    };
    let (started, ranks) = (config.train.ranks, job.group.size());
    if started != ranks && job.is_root() {
        eprintln!(
            "started with {started} ranks, going on with {ranks}: batches stay {} images, schedule and order of samples stay \
             as they are; sums of gradients round differently",
            config.train.global_batch() * config.train.accumulate
        );
    }
    let ending = execute(args, job, &config, data, label_map, &network, state, &run_dir)?;
    exit_code(ending, &run_dir)
}

/// What rank 0 tells the others about the run that goes on.
#[derive(serde::Serialize, serde::Deserialize)]
struct Found {
    run_dir: PathBuf,
    config: RunConfig,
}

/// The state of the newest complete checkpoint.
fn load_state(run_dir: &Path, network: &Network, data: &RunData) -> Result<TrainState> {
    let latest = CheckpointStore::new(run_dir).load_latest(&network.variables)?;
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
    Ok(TrainState::from_checkpoint(network, checkpoint)?)
}

fn read_config(run_dir: &Path) -> Result<RunConfig> {
    let file = run_dir.join(CONFIG_FILE);
    let text = fs::read_to_string(&file)
        .with_context(|| format!("cannot read {}: is this the folder of a run?", file.display()))?;
    toml::from_str(&text).with_context(|| file.display().to_string())
}

/// A resumed run goes by its own configuration; options that say otherwise would be ignored without a word.
fn refuse_changes(args: &TrainArgs) -> Result<()> {
    let given = [
        ("--model", args.model.model.is_some()),
        ("--hparams", !args.model.hparams.is_empty()),
        ("--image-size", args.model.image_size.is_some()),
        ("--profile", args.model.profile.is_some()),
        ("--num-classes", args.model.num_classes.is_some()),
        ("--batch-size", args.batch_size.is_some()),
        ("--accumulate", args.accumulate != 1),
        ("--epochs", args.epochs.is_some()),
        ("--num-examples-per-epoch", args.num_examples_per_epoch.is_some()),
        ("--lr", args.lr.is_some()),
        ("--warmup-value", args.warmup_value.is_some()),
        ("--warmup-epochs", args.warmup_epochs.is_some()),
        ("--training-mode", args.training_mode.is_some()),
        ("--eval-every", args.eval_every.is_some()),
        ("--eval-samples", args.eval_samples.is_some()),
        ("--early-stop", args.early_stop.is_some()),
        ("--pretrained-ckpt", args.pretrained_ckpt.is_some()),
        ("--backbone-init", args.backbone_init.is_some()),
        ("--freeze", args.freeze.is_some()),
        ("--seed", args.seed != 0),
    ];
    let named: Vec<&str> = (given.iter().filter(|(_, given)| *given).map(|(name, _)| *name)).collect();
    ensure!(
        named.is_empty(),
        "{}: a resumed run keeps its own configuration; leave these out, or start a new run with --pretrained-ckpt",
        named.join(", ")
    );
    Ok(())
}

/// The run in `runs/` on the same data that was started last.
fn newest_run(args: &TrainArgs) -> Result<PathBuf> {
    let wanted = sources::is_given(&args.source).then(|| sources::absolute(&args.source));
    let wanted = wanted.transpose()?;
    let mut newest = None;
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

/// Writes what was left out of the data into the run folder.
fn list_excluded(config: &RunConfig, data: &RunData, run_dir: &Path) -> Result<()> {
    if let DataConfig::Files(source) = &config.data {
        for origin in &data.origins {
            sources::list_excluded(source, origin.part, &origin.excluded, run_dir)?;
        }
    }
    Ok(())
}

/// Trains, reports and says where everything is.
#[expect(clippy::too_many_arguments, reason = "everything that makes a run")]
fn execute(
    args: &TrainArgs,
    job: &Job<'_>,
    config: &RunConfig,
    data: RunData,
    label_map: LabelMap,
    network: &Arc<Network>,
    mut state: TrainState,
    run_dir: &Path,
) -> Result<Ending> {
    if job.is_root() {
        list_excluded(config, &data, run_dir)?;
    }
    let mut engine_args = args.engine.clone();
    engine_args.threads = job.threads(args.engine.threads);
    let mut engine = cpu_engine(network, &engine_args)?;
    let trainer = Trainer::new(&config.train, network, data.train.examples.len());
    let quiet = args.quiet || !job.is_root();
    let ranks = job.group.size();
    if !quiet {
        eprintln!(
            "{} at {}, {} classes, {} trainable values; {} training and {} held-out images; {}batch {}, {} steps; {} threads, {}; {}",
            config.hparams.name,
            config.hparams.image_size,
            config.hparams.num_classes,
            network.variables.trainable_len(),
            data.train.examples.len(),
            data.val.as_ref().map_or(0, |val| val.examples.len()),
            if ranks > 1 {
                format!("{ranks} ranks; ")
            } else {
                String::new()
            },
            config.train.global_batch() * config.train.accumulate,
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
    let stop = stop_flag(ranks)?;
    let mut inputs = RunInputs {
        network,
        engine: &mut engine,
        train: data.train,
        evaluator,
        label_map: label_map.clone(),
        group: job.group,
        checkpoints: run_dir.to_path_buf(),
        stop,
    };
    let mut terminal = Terminal::new(quiet);
    let mut logs = match job.is_root() {
        true => report::logs(args, run_dir, state.step, ranks)?,
        false => Vec::new(),
    };
    let mut sinks: Vec<&mut dyn EventSink> = vec![&mut terminal];
    sinks.extend(logs.iter_mut().map(|sink| &mut **sink as &mut dyn EventSink));
    let outcome = trainer.run(&mut inputs, &mut state, &mut sinks)?;
    drop(inputs);
    if !job.is_root() {
        return Ok(outcome.ending);
    }
    if outcome.ending != Ending::Interrupted && config.train.rule.at_end() {
        if let Some(evaluation) = &outcome.evaluation {
            report::write_detections(&evaluation.detections, &run_dir.join("detections.json"))?;
        }
        if let Some(val) = &data.val {
            report::write_samples(
                &mut engine,
                network,
                state.evaluation_weights(),
                &label_map,
                val,
                &run_dir.join("samples"),
            )?;
        }
    }
    print_outcome(&outcome, &state, run_dir)?;
    Ok(outcome.ending)
}

/// The scores, the speed and what lies where.
fn print_outcome(outcome: &Outcome, state: &TrainState, run_dir: &Path) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if let Some(evaluation) = &outcome.evaluation {
        write!(out, "{}", evaluation.summary.table())?;
    }
    writeln!(
        out,
        "step {}: {:.2} images/s; weights {}, averages {}",
        outcome.step,
        outcome.images_per_second,
        &weights_hash(&state.weights)[..16],
        state.average.as_ref().map_or_else(
            || "off".to_owned(),
            |average| weights_hash(average)[..16].to_owned()
        ),
    )?;
    writeln!(out, "everything of this run is in {}:", run_dir.display())?;
    for (name, what) in [
        ("step-*", "checkpoints"),
        ("samples", "held-out images with detections drawn"),
        (
            "detections.json",
            "detections of the last evaluation, COCO results",
        ),
        ("curves.svg", "losses, learning rate and AP"),
        ("steps.csv, evaluations.csv, tensorboard", "the same as numbers"),
        (CONFIG_FILE, "the effective configuration"),
    ] {
        let there = name.contains(['*', ',']) || run_dir.join(name).exists();
        if there {
            writeln!(out, "  {name:<40} {what}")?;
        }
    }
    Ok(())
}

/// A flag that Ctrl-C and SIGTERM set; a second Ctrl-C leaves at once.
fn stop_flag(ranks: usize) -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    let mut first = None;
    ctrlc::set_handler(move || {
        let again = seen.swap(true, Ordering::Relaxed);
        let since = first.get_or_insert_with(Instant::now).elapsed();
        // One request can reach a rank directly and through mpirun.
        if again && (ranks == 1 || since > SAME_REQUEST) {
            std::process::exit(130);
        }
        if !again && ranks::speaks() {
            eprintln!("\nstopping after this step; once more to leave at once");
        }
    })
    .context("cannot listen for signals")?;
    // What a launcher sends to every rank: mpirun passes it on, where it would follow SIGTERM with SIGKILL.
    signal_hook::flag::register(signal_hook::consts::SIGUSR2, Arc::clone(&stop))
        .context("cannot listen for signals")?;
    Ok(stop)
}

/// Creates the folder of a new run: the given one, or the first of `runs/NAME-1`, `-2`, … that does not exist.
fn new_run_dir(given: Option<&Path>, name: &str) -> Result<PathBuf> {
    if let Some(dir) = given {
        let listing = CheckpointStore::new(dir).list();
        let used =
            listing.is_ok_and(|listing| !listing.complete.is_empty() || !listing.passed_over.is_empty());
        ensure!(
            !used,
            "{} holds checkpoints of an earlier run: go on with --resume, or choose another --run-dir",
            dir.display()
        );
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        return Ok(dir.to_owned());
    }
    fs::create_dir_all(RUNS).with_context(|| format!("cannot create {RUNS}/"))?;
    let name = name.trim_start_matches("efficientdet-");
    for number in 1u64.. {
        let dir = Path::new(RUNS).join(format!("{name}-{number}"));
        // Creating it takes it, so two runs started together get two folders.
        match fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("cannot create {}", dir.display())),
        }
    }
    bail!("{RUNS}/ is full: give --run-dir")
}
