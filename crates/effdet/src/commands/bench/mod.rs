//! `effdet bench`.

mod data;
mod distribution;
mod postprocess;
mod random_batch;
mod scale;
mod stages;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use effdet_cpu::engine::{CpuEngine, MemoryEstimate};
use effdet_cpu::inference::InferencePlan;
use effdet_cpu::kernels::Executor;
use effdet_cpu::probe::Probe;
use effdet_cpu::simd::Isa;
use effdet_cpu::storage::PassProducts;
use effdet_model::engine::{Engine, HeadOutputs, Precision, StepOptions};
use effdet_model::network::Network;
use effdet_model::weights::Weights;
use effdet_train::optimizer::Optimizer;
use serde_json::json;

use self::distribution::Distribution;
use self::random_batch::RandomBatch;
pub use self::stages::Peaks;
use self::stages::StageClock;
use super::ceilings::peaks;
use super::engine::{cpu_engine, inference_plan};
use super::host::{ForeignLoad, cpu_name, peak_rss_mib, write_foreign};
use super::model::resolve_hparams;
use super::ranks;
use crate::cli::{BenchCommand, BenchOptions};

/// Times training steps or inference on a fixed random batch and prints the distribution.
pub fn run(command: &BenchCommand) -> Result<ExitCode> {
    let done = |()| ExitCode::SUCCESS;
    match command {
        BenchCommand::Train(options) => time("train", options).map(done),
        BenchCommand::Infer(options) => time("infer", options).map(done),
        BenchCommand::Postprocess(options) => postprocess::run(options).map(done),
        BenchCommand::Data(options) => data::run(options).map(done),
        BenchCommand::Scale(options) => ranks::run(&options.ranks, |job| scale::run(options, job).map(done)),
    }
}

fn time(kind: &str, options: &BenchOptions) -> Result<()> {
    let training = kind == "train";
    ensure!(
        options.steps > 0 && options.batch_size > 0,
        "--steps and --batch-size must be at least 1"
    );
    let network = Arc::new(Network::new(&resolve_hparams(&options.model, "d0")?)?);
    let batch = RandomBatch::new(&network, options.batch_size)?;
    let load = ForeignLoad::start();
    let clock = Arc::new(StageClock::new());
    let Timing {
        isa,
        threads,
        times_s,
        memory,
        predicted_bytes,
        beside_bytes,
    } = match training {
        true => time_training(&network, &batch, options, &clock)?,
        false => time_inference(&network, &batch, options, &clock)?,
    };
    let foreign_cores = load.cores();
    let predicted_mib = predicted_bytes as f64 / f64::from(1 << 20);
    // Before anything else takes memory.
    let peak_rss_mib = peak_rss_mib();
    let peaks = measured_peaks((isa, threads), training, options);
    let table = clock.table(options.batch_size, Some(peaks));

    let distribution = Distribution::new(&times_s);
    let img_s = options.batch_size as f64 / distribution.percentile_s(50);
    let mut out = std::io::stdout().lock();
    if options.json {
        let mut report = json!({
            "bench": kind, "model": network.hparams.name, "image_size": network.hparams.image_size,
            "batch": options.batch_size, "threads": threads, "isa": isa.to_string(), "cpu": cpu_name(),
            "img_s": img_s, "times_s": times_s,
            "peak_rss_mb": peak_rss_mib, "predicted_mb": predicted_mib, "foreign_cores": foreign_cores,
        });
        distribution.add_to(&mut report, options.batch_size);
        report["stages"] = table.json();
        writeln!(out, "{report}")?;
        return Ok(());
    }
    writeln!(
        out,
        "{kind} {}, input {}, batch {}, {threads} threads, {isa}, {}",
        network.hparams.name,
        network.hparams.image_size,
        options.batch_size,
        cpu_name().as_deref().unwrap_or("unknown processor")
    )?;
    distribution.print(&mut out, options.batch_size)?;
    if let Some(mib) = peak_rss_mib {
        writeln!(
            out,
            "  peak memory {mib:.0} MiB, {predicted_mib:.0} MiB predicted"
        )?;
    }
    if let Some(memory) = &memory {
        write_memory(&mut out, memory, beside_bytes)?;
    }
    table.print(&mut out)?;
    write_foreign(&mut out, foreign_cores)?;
    Ok(())
}

/// The ceilings of what was timed.
fn measured_peaks((isa, threads): (Isa, usize), training: bool, options: &BenchOptions) -> Peaks {
    let precision = match training {
        true => options.step_memory().precision,
        false => Precision::Fp32,
    };
    peaks(&Executor::new(threads, isa), PassProducts::of(precision).backward)
}

/// The table of the engine's buffers by owner.
fn write_memory(out: &mut impl Write, memory: &MemoryEstimate, beside_bytes: usize) -> Result<()> {
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    writeln!(out, "  {:<32} {:>10} {:>10}", "memory, MiB", "all", "at peak")?;
    for owned in &memory.buffers {
        writeln!(
            out,
            "    {:<30} {:>10.1} {:>10.1}",
            owned.owner,
            mib(owned.bytes),
            mib(owned.at_peak)
        )?;
    }
    for (name, bytes) in [
        ("activations and gradients", memory.buffer_bytes),
        ("packed weights", memory.packed_weight_bytes),
        ("partial weight gradients", memory.partial_bytes),
        ("parameters and batch", beside_bytes),
    ] {
        writeln!(out, "    {name:<30} {:>21.1}", mib(bytes))?;
    }
    Ok(())
}

/// What was measured, and on what.
struct Timing {
    isa: Isa,
    threads: usize,
    times_s: Vec<f64>,
    /// Memory of a training step.
    memory: Option<MemoryEstimate>,
    predicted_bytes: usize,
    /// The part of it that belongs to the loop around the engine.
    beside_bytes: usize,
}

fn time_training(
    network: &Arc<Network>,
    batch: &RandomBatch,
    options: &BenchOptions,
    clock: &Arc<StageClock>,
) -> Result<Timing> {
    let mut engine = cpu_engine(network, &options.engine, options.step_memory())?;
    let mut weights = Weights::init(&network.variables, 0);
    let mut average = Weights::zeros(&network.variables);
    let mut optimizer = Optimizer::new(&network.hparams, &network.variables)?;
    optimizer.use_workers(engine.workers());
    let mut gradients = vec![0.0; weights.trainable.len()];
    let mut step = 0;
    let listen = |engine: &mut CpuEngine, probe| engine.listen(probe);
    let times_s = time_steps(&mut engine, options, clock, listen, |engine| {
        engine.train_step(
            &mut weights,
            &batch.training(),
            &StepOptions::default(),
            &mut gradients,
        )?;
        let prepared = optimizer.prepare(&weights, &gradients);
        let learning_rate = network.hparams.lr_warmup_init as f32;
        optimizer.apply(
            &mut weights,
            Some(&mut average),
            (&gradients, &prepared),
            learning_rate,
            step,
        );
        step += 1;
        Ok(())
    })?;
    let memory = engine.training_memory(options.batch_size);
    // Weights, gradients, momentum and averages, and the batch, belong to the training loop.
    let beside_bytes = 4 * 4 * network.variables.trainable_len() + batch.bytes();
    Ok(Timing {
        isa: engine.isa(),
        threads: engine.threads(),
        times_s,
        predicted_bytes: memory.total_bytes() + beside_bytes,
        memory: Some(memory),
        beside_bytes,
    })
}

fn time_inference(
    network: &Arc<Network>,
    batch: &RandomBatch,
    options: &BenchOptions,
    clock: &Arc<StageClock>,
) -> Result<Timing> {
    let mut plan = inference_plan(network, &Weights::init(&network.variables, 0), &options.engine)?;
    let mut outputs = HeadOutputs::default();
    let listen = |plan: &mut InferencePlan, probe| plan.listen(probe);
    let times_s = time_steps(&mut plan, options, clock, listen, |plan| {
        Ok(plan.infer(&batch.images(), &mut outputs)?)
    })?;
    let outputs = (outputs.levels.iter())
        .map(|level| level.class_logits.len() + level.box_codes.len())
        .sum::<usize>();
    // Start weights are gone, but a peak counts them.
    let values = network.variables.trainable_len() + network.variables.statistics_len();
    let beside_bytes = 4 * (outputs + values) + batch.bytes();
    Ok(Timing {
        isa: plan.isa(),
        threads: plan.threads(),
        times_s,
        memory: None,
        predicted_bytes: plan.memory(plan.threads(), options.batch_size).total_bytes() + beside_bytes,
        beside_bytes,
    })
}

/// Seconds of each counted step, whose stages `clock` follows.
fn time_steps<E>(
    engine: &mut E,
    options: &BenchOptions,
    clock: &Arc<StageClock>,
    listen: impl Fn(&mut E, Option<Arc<dyn Probe>>),
    mut step: impl FnMut(&mut E) -> Result<()>,
) -> Result<Vec<f64>> {
    for _ in 0..options.warmup {
        step(engine)?;
    }
    listen(engine, Some(Arc::clone(clock) as Arc<dyn Probe>));
    let mut times_s = Vec::with_capacity(options.steps);
    for _ in 0..options.steps {
        let begin = Instant::now();
        clock.start_step();
        step(engine)?;
        clock.end_step();
        times_s.push(begin.elapsed().as_secs_f64());
    }
    listen(engine, None);
    Ok(times_s)
}
