//! Whether a run fits into memory, before its first step.

use std::sync::Arc;

use anyhow::{Result, bail};
use effdet_cpu::engine::{CpuEngine, CpuOptions};
use effdet_cpu::inference::InferencePlan;
use effdet_model::engine::Precision;
use effdet_model::hparams::{HParams, ImageSize};
use effdet_model::network::Network;
use effdet_model::weights::Weights;

use super::engine::chosen_threads;
use super::host;
use super::run_config::RunConfig;
use crate::cli::{BatchSize, StepMemory, TrainArgs};

/// Program, threads' stacks, tables, one decoded image per loader thread.
const BASE_BYTES: u64 = 64 << 20;
/// Batches that exist at once: the one at work, those that wait, and the one that is looked at when a step goes wrong.
const BATCHES: u64 = 4;
/// Largest batch that is chosen automatically.
const LARGEST_BATCH: usize = 256;

/// What a rank does that decides how much memory it takes.
#[derive(Debug, Clone, Copy)]
pub struct Demand {
    /// Of a micro-batch.
    pub images: usize,
    /// Micro-batches of an update.
    pub accumulate: usize,
    /// Each evaluates an image of its own.
    pub threads: usize,
    /// What a step keeps.
    pub memory: StepMemory,
}

impl Demand {
    /// That of a run with this configuration; ranks that share a machine have fewer threads each and need less.
    pub fn of(args: &TrainArgs, config: &RunConfig) -> Self {
        Self {
            images: config.train.batch_size,
            accumulate: config.train.accumulate,
            threads: chosen_threads(&args.engine),
            memory: args.step_memory(config.train.precision),
        }
    }

    /// What a rank's training takes, evaluation included.
    ///
    /// The figure holds what grows with network and batch; images of the data set are read one by one.
    pub fn bytes(self, hparams: &HParams) -> Result<u64> {
        let Self {
            images,
            accumulate,
            threads,
            memory,
        } = self;
        let network = Arc::new(Network::new(hparams)?);
        let options = CpuOptions {
            threads: 1,
            precision: memory.precision,
            grad_checkpoint: memory.grad_checkpoint,
            ..CpuOptions::default()
        };
        let engine = CpuEngine::new(Arc::clone(&network), options)?;
        let table = &network.variables;
        let evaluation = InferencePlan::new(Arc::clone(&network), &Weights::zeros(table), options)?;
        let slots = match hparams.optimizer {
            effdet_model::hparams::OptimizerKind::Adam => 2,
            effdet_model::hparams::OptimizerKind::Sgd => 1,
        };
        let averages = u64::from(hparams.moving_average_decay > 0.0);
        let sums = u64::from(accumulate > 1);
        // Weights, gradients, slots, averages; a checkpoint is encoded in memory before it is written.
        let saved = 1 + slots + averages;
        let values = (2 + slots + averages + sums + saved) * table.trainable_len() as u64;
        let size = hparams.image_size;
        let of_image = (size.height * size.width * 3 + 5 * network.num_anchors()) as u64;
        let batches = BATCHES * images as u64 * of_image;
        let outputs = (images * network.num_anchors() * (hparams.num_classes + 4)) as u64;
        Ok(BASE_BYTES
            + engine.training_memory(images).total_bytes() as u64
            + evaluation.memory(threads, threads).total_bytes() as u64
            + 4 * (values + batches + outputs))
    }
}

/// Memory that a run may take and whose word that is; none where the system does not say.
pub fn allowed(limit: Option<u64>) -> Option<(u64, &'static str)> {
    if let Some(bytes) = limit {
        return Some((bytes, "allowed by --memory-limit"));
    }
    let machine = host::available_bytes().map(|bytes| (bytes, "free on this machine"));
    let group = host::cgroup_bytes().map(|bytes| (bytes, "left in this control group"));
    machine.into_iter().chain(group).min()
}

/// `2.9 GB`.
pub fn gb(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

/// The batch size of a run: the one given, `default`, or with `auto` the largest power of two that fits.
pub fn batch_size(args: &TrainArgs, hparams: &HParams, default: usize) -> Result<usize> {
    match args.batch_size {
        None => Ok(default),
        Some(BatchSize::Images(images)) => Ok(images),
        Some(BatchSize::Auto) => {
            let Some((bytes, whose)) = allowed(args.memory_limit) else {
                bail!(
                    "--batch-size auto: this system does not say how much memory is free: give --memory-limit"
                )
            };
            let accumulate = args.accumulate.max(1);
            let of_one = Demand {
                images: 1,
                accumulate,
                threads: chosen_threads(&args.engine),
                memory: args.step_memory(args.new_precision()),
            };
            let mut chosen = None;
            let mut images = 1;
            while images <= LARGEST_BATCH && (Demand { images, ..of_one }).bytes(hparams)? <= bytes {
                chosen = Some(images);
                images *= 2;
            }
            match chosen {
                Some(images) => {
                    if super::ranks::speaks() {
                        tell!(
                            "batch size {images}: the largest power of two within the {} {whose}",
                            gb(bytes)
                        );
                    }
                    Ok(images)
                }
                None => Err(refusal(hparams, of_one, bytes, whose)?),
            }
        }
    }
}

/// Says what a run needs; refuses one that does not fit, with what would.
pub fn check(args: &TrainArgs, config: &RunConfig) -> Result<Option<String>> {
    let Some((bytes, whose)) = allowed(args.memory_limit) else {
        return Ok(None);
    };
    let demand = Demand::of(args, config);
    let needed = demand.bytes(&config.hparams)?;
    if needed > bytes && !args.ignore_memory {
        return Err(refusal(&config.hparams, demand, bytes, whose)?);
    }
    Ok(Some(format!("needs {} of {} {whose}", gb(needed), gb(bytes))))
}

/// The message with the three cheapest remedies, cheapest in what they change.
fn refusal(hparams: &HParams, demand: Demand, bytes: u64, whose: &str) -> Result<anyhow::Error> {
    let Demand {
        images,
        accumulate,
        memory,
        ..
    } = demand;
    let with = |memory: StepMemory| Demand { memory, ..demand }.bytes(hparams);
    let needed = demand.bytes(hparams)?;
    let mut remedies = Vec::new();
    if !memory.grad_checkpoint {
        let again = StepMemory {
            grad_checkpoint: true,
            ..memory
        };
        let takes = with(again)?;
        if takes <= bytes {
            remedies.push(format!("--grad-checkpoint takes {}", gb(takes)));
        }
    }
    if memory.precision == Precision::Fp32 {
        let halves = StepMemory {
            precision: Precision::Fp16,
            ..memory
        };
        let takes = with(halves)?;
        if takes <= bytes {
            remedies.push(format!("--precision fp16 takes {}", gb(takes)));
        }
    }
    for smaller in (1..=images / 2)
        .rev()
        .filter(|smaller| images.is_multiple_of(*smaller))
    {
        let times = accumulate * (images / smaller);
        let batch = Demand {
            images: smaller,
            accumulate: times,
            ..demand
        };
        let takes = batch.bytes(hparams)?;
        if takes <= bytes {
            remedies.push(format!(
                "--batch-size {smaller} --accumulate {times} takes {} for updates of as many images",
                gb(takes)
            ));
            break;
        }
    }
    let step = 1 << hparams.max_level;
    let ImageSize { height, width } = hparams.image_size;
    for eighths in [7, 6, 5, 4, 3, 2] {
        let scaled = |side: usize| (side * eighths / 8 / step).max(1) * step;
        let image_size = ImageSize {
            height: scaled(height),
            width: scaled(width),
        };
        let takes = demand.bytes(&HParams {
            image_size,
            ..hparams.clone()
        })?;
        if takes <= bytes && image_size != hparams.image_size {
            remedies.push(format!("--image-size {image_size} takes {}", gb(takes)));
            break;
        }
    }
    for model in ["d4", "d3", "d2", "d1", "d0", "lite0"] {
        let mut other = HParams::preset(model)?;
        (other.image_size, other.num_classes) = (hparams.image_size, hparams.num_classes);
        let takes = demand.bytes(&other)?;
        if takes <= bytes && other.name != hparams.name && takes < needed {
            remedies.push(format!("--model {model} at this image size takes {}", gb(takes)));
            break;
        }
    }
    remedies.truncate(3);
    let remedies = match remedies.is_empty() {
        true => "no smaller batch, image or model fits: use a machine with more memory".to_owned(),
        false => remedies.join("; "),
    };
    Ok(anyhow::anyhow!(
        "training needs {}, more than the {} {whose}: {remedies}. --ignore-memory trains nevertheless",
        gb(needed),
        gb(bytes)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_does_not_fit_is_told_what_would() {
        let mut hparams = HParams::preset("d1").unwrap();
        hparams.image_size = ImageSize::square(256);
        let kept = StepMemory::default();
        let demand = |images, accumulate, memory| Demand {
            images,
            accumulate,
            threads: 2,
            memory,
        };
        let bytes = |images, accumulate, memory| demand(images, accumulate, memory).bytes(&hparams).unwrap();
        let needed = bytes(8, 1, kept);
        assert!(needed > bytes(4, 1, kept));
        let refused = |memory, bytes| {
            let error = refusal(&hparams, demand(8, 1, memory), bytes, "free").unwrap();
            error.to_string()
        };
        let again = StepMemory {
            grad_checkpoint: true,
            ..kept
        };
        let least = bytes(8, 1, again);
        let halved = bytes(4, 2, kept);
        let message = refused(kept, least.max(halved));
        for remedy in [
            "--grad-checkpoint takes",
            "--batch-size 4 --accumulate 2",
            "--image-size",
        ] {
            assert!(message.contains(remedy), "{message}");
        }
        let message = refused(again, bytes(4, 2, again));
        for remedy in ["--batch-size 4 --accumulate 2", "--image-size", "--model d0"] {
            assert!(message.contains(remedy), "{message}");
        }
        let hopeless = refused(kept, 1 << 20);
        assert!(hopeless.contains("more memory"), "{hopeless}");
    }
}
