//! `effdet train`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use effdet_ckpt::{CheckpointStore, RunLock, load_backbone, weights_hash};
use effdet_model::engine::Precision;
use effdet_model::label_map::LabelMap;
use effdet_model::network::Network;
use effdet_model::weights::Weights;
use effdet_train::eval::Evaluator;
use effdet_train::events::EventSink;
use effdet_train::trainer::{Ending, Outcome, RunInputs, TrainState, Trainer};

use super::cache::image_cache;
use super::engine::{chosen_isa, cpu_engine};
use super::plan::plan;
use super::pretrained::{load_pretrained, print_match};
use super::ranks::{self, Job, from_root};
use super::resume::{asked, check_changes, load_state, newest_run, read_config, write_config};
use super::run_config::{DataConfig, RunConfig, RunData, configure, label_map_of};
use super::signals::Control;
use super::terminal::Terminal;
use super::{doctor, memory, quickstart, report, sanity, sources};
use crate::cli::TrainArgs;

/// Where runs go that were given no folder.
pub const RUNS: &str = "runs";
pub const CONFIG_FILE: &str = "config.toml";
/// Runs the command.
pub fn run(args: &TrainArgs) -> Result<ExitCode> {
    if let (Some(choice), Some(amp)) = (args.precision, args.amp) {
        let precision = choice.resolve();
        ensure!(
            amp == (precision != Precision::Fp32),
            "--amp {amp} contradicts --precision {precision}: leave --amp out"
        );
    }
    ranks::run(&args.ranks, |job| {
        let control = Control::listen(job.group.size())?;
        match args.resume {
            _ if args.sanity => sanity::run(args, job),
            true => resume(args, job, &control),
            false => start(args, job, &control),
        }
    })
}

/// Starts a run.
fn start(args: &TrainArgs, job: &Job<'_>, control: &Control) -> Result<ExitCode> {
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
    let memory = memory::check(args, &config)?;
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
        write_config(&run_dir, &config)?;
        Ok(run_dir.to_string_lossy().into_owned().into_bytes())
    })?;
    let run_dir = PathBuf::from(String::from_utf8(run_dir)?);
    let _lock = lock(job, &run_dir)?;
    let run = Run {
        config: &config,
        label_map,
        network: &network,
        run_dir: &run_dir,
        memory,
    };
    let ending = execute(args, job, control, run, data, state)?;
    if !given && ending == Ending::Complete && job.is_root() {
        quickstart::next_steps(&run_dir)?;
    }
    exit_code(ending, control, &run_dir)
}

fn exit_code(ending: Ending, control: &Control, run_dir: &Path) -> Result<ExitCode> {
    if ending == Ending::Interrupted {
        if ranks::speaks() {
            tell!(
                "interrupted; go on with: effdet train --resume --run-dir {}",
                run_dir.display()
            );
        }
        return Ok(ExitCode::from(control.exit_code()));
    }
    Ok(ExitCode::SUCCESS)
}

/// Goes on with a run by its own configuration.
fn resume(args: &TrainArgs, job: &Job<'_>, control: &Control) -> Result<ExitCode> {
    // Rank 0 decides what is resumed, so that the others need not see its folder.
    let mut lock_of_root = None;
    let found = from_root(job, || {
        let run_dir = match &args.run_dir {
            Some(dir) => dir.clone(),
            None => newest_run(args)?,
        };
        let own = read_config(&run_dir)?;
        lock_of_root = lock(job, &run_dir)?;
        let config = asked(args, &own)?;
        check_changes(&own, &config, args.allow_changes)?;
        let variables = |config: &RunConfig| Ok::<_, anyhow::Error>(Network::new(&config.hparams)?.variables);
        ensure!(
            variables(&own)? == variables(&config)?,
            "these options make another network, which cannot go on with this run's weights: start a new run with --pretrained-ckpt {}",
            run_dir.display()
        );
        Ok(toml::to_string(&Found { run_dir, own, config })?.into_bytes())
    })?;
    let Found {
        run_dir,
        own,
        mut config,
    } = toml::from_str(std::str::from_utf8(&found)?)?;
    let data = config.data.load(config.eval_samples)?;
    let label_map = label_map_of(&data.train)?;
    ranks::verify(job, &config, &data, &label_map)?;
    let network = Arc::new(Network::new(&config.hparams)?);
    let state = match job.is_root() {
        true => load_state(&run_dir, &network, &data, args.strict)?,
        // Rank 0 sends what it has.
        false => TrainState::new(&network, Weights::zeros(&network.variables))?,
    };
    if own.train.batch_size != config.train.batch_size {
        let batch_size = config.train.batch_size;
        config.train.batch_size = own.train.batch_size;
        // All ranks go by the place of rank 0.
        let place = from_root(job, || {
            Ok(format!("{} {}", state.step, state.sample_position).into_bytes())
        })?;
        let place = String::from_utf8(place)?;
        let (step, position) = place
            .split_once(' ')
            .context("the place of rank 0 was not understood")?;
        let images = data.train.examples.len();
        config.train = (config.train).with_batch_size(batch_size, images, step.parse()?, position.parse()?);
        if job.is_root() {
            tell!(
                "going on with batches of {batch_size} images instead of {} per rank: samples and schedule stay where they are, the \
                 learning rate is not scaled",
                own.train.batch_size
            );
        }
    }
    let memory = memory::check(args, &config)?;
    chosen_isa(&args.engine)?;
    // Nothing is refused from here on.
    if job.is_root() {
        write_config(&run_dir, &config)?;
    }
    let (started, ranks) = (config.train.ranks, job.group.size());
    if started != ranks && job.is_root() {
        tell!(
            "started with {started} ranks, going on with {ranks}: batches stay {} images, schedule and order of samples stay \
             as they are; sums of gradients round differently",
            config.train.global_batch() * config.train.accumulate
        );
    }
    let run = Run {
        config: &config,
        label_map,
        network: &network,
        run_dir: &run_dir,
        memory,
    };
    let ending = execute(args, job, control, run, data, state)?;
    exit_code(ending, control, &run_dir)
}

/// What rank 0 tells the others about the run that goes on.
#[derive(serde::Serialize, serde::Deserialize)]
struct Found {
    run_dir: PathBuf,
    /// The configuration so far, and the one to go on with.
    own: RunConfig,
    config: RunConfig,
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

/// Takes the run folder for this process; the other ranks of its run leave that to rank 0.
fn lock(job: &Job<'_>, run_dir: &Path) -> Result<Option<RunLock>> {
    if !job.is_root() {
        return Ok(None);
    }
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let holder = format!("process {} on {}", std::process::id(), host.trim());
    Ok(Some(RunLock::acquire(run_dir, &holder)?))
}

/// A run that is about to begin or to go on.
struct Run<'a> {
    config: &'a RunConfig,
    label_map: LabelMap,
    network: &'a Arc<Network>,
    run_dir: &'a Path,
    /// What it needs, in words.
    memory: Option<String>,
}

/// Trains, reports and says where everything is.
fn execute(
    args: &TrainArgs,
    job: &Job<'_>,
    control: &Control,
    run: Run<'_>,
    data: RunData,
    mut state: TrainState,
) -> Result<Ending> {
    let Run {
        config,
        label_map,
        network,
        run_dir,
        memory,
    } = run;
    if job.is_root() {
        list_excluded(config, &data, run_dir)?;
    }
    let mut engine_args = args.engine.clone();
    engine_args.threads = job.threads(args.engine.threads);
    let mut engine = cpu_engine(network, &engine_args, args.step_memory(config.train.precision))?;
    state.optimizer.use_workers(engine.workers());
    let trainer = Trainer::new(&config.train, network, data.train.examples.len());
    let quiet = args.quiet || !job.is_root();
    let ranks = job.group.size();
    if !quiet {
        tell!(
            "{} at {}, {} classes, {} trainable values; {} training and {} held-out images; {}batch {}, {} steps; {}, {} threads, {}; {}",
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
            config.train.precision,
            engine.threads(),
            engine.isa(),
            run_dir.display(),
        );
        if let Some(memory) = memory {
            tell!("memory: {memory}");
        }
    }
    let needed = memory::Demand::of(args, config).bytes(&config.hparams)?;
    let cache = image_cache(
        &args.cache,
        &config.hparams,
        &data.train,
        memory::allowed(args.memory_limit).map_or(0, |(bytes, _)| bytes.saturating_sub(needed)),
        &run_dir.join("cache"),
    )?;
    if let Some((_, line)) = cache.as_ref().filter(|_| !quiet) {
        tell!("{line}");
    }
    let evaluator = data.val.as_ref().map(|val| Evaluator {
        dataset: Arc::clone(val),
        hparams: config.hparams.clone(),
        label_map: label_map.clone(),
        batch_size: config.eval_batch_size,
        workers: config.train.workers.max(1),
        only_images_with_detections: false,
    });
    let mut inputs = RunInputs {
        network,
        engine: &mut engine,
        train: data.train,
        cache: cache.as_ref().map(|(cache, _)| Arc::clone(cache)),
        evaluator,
        label_map: label_map.clone(),
        group: job.group,
        checkpoints: run_dir.to_path_buf(),
        requests: Arc::clone(&control.requests),
    };
    let mut terminal = Terminal::new(quiet);
    let mut logs = match job.is_root() {
        true => report::logs(args, run_dir, state.step, ranks)?,
        false => Vec::new(),
    };
    let mut sinks: Vec<&mut dyn EventSink> = vec![&mut terminal];
    sinks.extend(logs.iter_mut().map(|sink| &mut **sink as &mut dyn EventSink));
    control.training_begins();
    let outcome = trainer.run(&mut inputs, &mut state, &mut sinks)?;
    drop(inputs);
    if let Some(reason) = cache.as_ref().and_then(|(cache, _)| cache.closed()) {
        tell!("warning: the cache keeps no more images, which are decoded each time: {reason}");
    }
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
    match print_outcome(&outcome, &state, run_dir) {
        // Everything is in the run folder; a reader that has left changes nothing about how the run ended.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(outcome.ending),
    }
}

/// The scores, the speed and what lies where.
fn print_outcome(outcome: &Outcome, state: &TrainState, run_dir: &Path) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if let Some(evaluation) = &outcome.evaluation {
        write!(out, "{}", evaluation.summary.table())?;
    }
    writeln!(
        out,
        "step {}: {:.2} images/s, {}; weights {}, averages {}",
        outcome.step,
        outcome.images_per_second,
        outcome.data_time,
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
