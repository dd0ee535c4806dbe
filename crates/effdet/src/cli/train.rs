//! `effdet train`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use effdet_cpu::engine::fastest_bf16;
use effdet_model::engine::{Precision, UnknownPrecision};

use super::{AugmentArgs, RankArgs};

/// Which network.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Preset: d0 … d7x, lite0 … lite4, lite3x (also with the prefix efficientdet-).
    #[arg(long, short, value_name = "NAME", alias = "model-name", alias = "model_name")]
    pub model: Option<String>,
    /// Overrides: `k=v,k2=v2`, or a .toml or .yaml file; keys as in `effdet inspect model --hparams-only`.
    #[arg(long, value_name = "K=V,…|FILE", default_value = "")]
    pub hparams: String,
    /// Network input size: an integer or WxH (width first).
    #[arg(long, value_name = "SIZE", alias = "image_size")]
    pub image_size: Option<effdet_model::hparams::ImageSize>,
    /// Conventions of the weights: seed (NVIDIA) or google (automl).
    #[arg(long, value_name = "seed|google")]
    pub profile: Option<String>,
    /// Class outputs; derived from the data set when not given.
    #[arg(long, value_name = "N", alias = "num_classes")]
    pub num_classes: Option<usize>,
}

/// Where decoded images are kept for later passes; batches have the same bits with and without.
#[derive(Debug, Clone, Args)]
pub struct CacheArgs {
    /// Keep decoded training images: none, ram or disk. Images past the limit are decoded each time.
    #[arg(long, value_name = "none|ram|disk", default_value = "none", value_parser = ["none", "ram", "disk"])]
    pub cache: String,
    /// Bytes that the cache may take, such as 4GB; default: half of the memory that training leaves free, or no limit on disk.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub cache_limit: Option<u64>,
    /// Folder of the disk cache, which several runs may share; default: `cache` in the run folder, or here where there is none.
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
}

/// What a training step keeps of a forward pass, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepMemory {
    /// How wide tensors are stored.
    pub precision: Precision,
    /// Whether those of MBConv blocks are computed again instead.
    pub grad_checkpoint: bool,
}

/// Most threads of a kind that can be asked for.
pub const MOST_THREADS: u64 = 4096;

/// How to run it.
#[derive(Debug, Clone, Args)]
pub struct EngineArgs {
    /// Threads of the engine; default: all processors.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(..=MOST_THREADS))]
    pub threads: Option<usize>,
    /// Instruction set: portable, avx2, avx512, neon; default: the best one here. All give the same bits.
    #[arg(long, value_name = "ISA", env = "EFFDET_ISA")]
    pub isa: Option<String>,
}

/// Where the data lies.
#[derive(Debug, Clone, Default, PartialEq, Args, serde::Serialize, serde::Deserialize)]
pub struct SourceArgs {
    /// Data set folder, or data.yaml; COCO, VOC, YOLO or TFRecord layout is recognised.
    #[arg(long, short, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Training annotations (COCO JSON).
    #[arg(long, value_name = "JSON", requires = "train_images")]
    pub train_json: Option<PathBuf>,
    /// Folder of the training images.
    #[arg(long, value_name = "DIR", requires = "train_json")]
    pub train_images: Option<PathBuf>,
    /// Evaluation annotations (COCO JSON).
    #[arg(long, value_name = "JSON", alias = "val-json-file", alias = "val_json_file")]
    pub val_json: Option<PathBuf>,
    /// Folder of the evaluation images.
    #[arg(long, value_name = "DIR")]
    pub val_images: Option<PathBuf>,
    /// Training TFRecords (glob).
    #[arg(long, value_name = "GLOB", alias = "training_file_pattern")]
    pub training_file_pattern: Option<String>,
    /// Evaluation TFRecords (glob).
    #[arg(long, value_name = "GLOB", alias = "val_file_pattern")]
    pub val_file_pattern: Option<String>,
    /// Split to evaluate on when the folder has several.
    #[arg(long, value_name = "NAME", default_value = "val")]
    pub val_split: String,
    /// Split to train on when the folder has several.
    #[arg(long, value_name = "NAME", default_value = "train")]
    pub train_split: String,
    /// Follow links that leave the data folder.
    #[arg(long)]
    #[serde(default)]
    pub follow_links: bool,
    /// What to do about damaged samples: stop, leave them out, or leave them out and copy their bytes for inspection.
    #[arg(long, value_name = "POLICY", default_value = "fail")]
    #[serde(default)]
    pub on_corrupt: OnCorrupt,
    /// Most damaged samples that may be left out: a number, or a percentage of the split [default: 1%].
    #[arg(long, value_name = "N|P%", value_parser = cap)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_corrupt: Option<String>,
}

/// What to do about damaged samples.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum OnCorrupt {
    /// Stop at the first one.
    #[default]
    Fail,
    /// Find them before anything starts, leave them out and list them.
    Skip,
    /// As skip, and copy their bytes beside the list.
    Quarantine,
}

fn cap(text: &str) -> Result<String, String> {
    text.parse::<effdet_data::corrupt::Cap>().map(|_| text.to_owned())
}

/// Options of `train`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  effdet train
      quickstart: renders a synthetic data set, trains a small detector in a few minutes, evaluates it, draws its detections
  effdet train --data shape --image-size 256 --batch-size 8 --epochs 30
  effdet train --data bccd --model lite0 --backbone-init efficientnet_lite0_imagenet.safetensors
  effdet train --train-json instances_train2017.json --train-images train2017 \\
               --val-json instances_val2017.json --val-images val2017
  effdet train --data shape --augment randaugment --mosaic 0.5 --hsv
  effdet train --data shape --run-dir runs/shape --resume
  effdet train --data mine --pretrained-ckpt runs/coco --freeze '(stem|stack_)'")]
pub struct TrainArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub augmentation: AugmentArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub ranks: RankArgs,
    /// Where checkpoints, logs and pictures go; default: runs/NAME-N, never an existing one.
    #[arg(
        long,
        short = 'o',
        value_name = "DIR",
        alias = "model-dir",
        alias = "model_dir"
    )]
    pub run_dir: Option<PathBuf>,
    /// Go on from the newest checkpoint of --run-dir.
    #[arg(long)]
    pub resume: bool,
    /// Resume with options that differ from those of the run; they are listed.
    #[arg(long, requires = "resume")]
    pub allow_changes: bool,
    /// Resume from the very newest checkpoint or not at all, when it is damaged.
    #[arg(long, requires = "resume")]
    pub strict: bool,
    /// Images per step and rank; auto = the largest power of two that fits into memory.
    #[arg(long, short, value_name = "N|auto", alias = "batch_size")]
    pub batch_size: Option<BatchSize>,
    /// Images per evaluation step.
    #[arg(long, value_name = "N", alias = "eval_batch_size")]
    pub eval_batch_size: Option<usize>,
    /// Micro-batches whose gradients are added up before one update.
    #[arg(long, value_name = "K", default_value_t = 1)]
    pub accumulate: usize,
    /// Let ranks compute what one process with the whole batch would: batch norm and loss over the images of all.
    #[arg(long, alias = "sync_bn")]
    pub sync_bn: bool,
    /// Send gradients between ranks in half precision.
    #[arg(long)]
    pub half_gradients: bool,
    /// Length of the schedule in epochs.
    #[arg(long, value_name = "N", alias = "num-epochs", alias = "num_epochs")]
    pub epochs: Option<f64>,
    /// Stop after this many steps in all, wherever the schedule stands.
    #[arg(long, value_name = "N")]
    pub max_steps: Option<u64>,
    /// Samples that make an epoch; default: the data set's size.
    #[arg(long, value_name = "N", alias = "num_examples_per_epoch")]
    pub num_examples_per_epoch: Option<u64>,
    /// Base learning rate.
    #[arg(long, value_name = "LR")]
    pub lr: Option<f64>,
    /// Learning rate of the first step.
    #[arg(long, value_name = "LR", alias = "warmup_value")]
    pub warmup_value: Option<f64>,
    /// Length of the warm-up in epochs.
    #[arg(long, value_name = "N", alias = "warmup_epochs")]
    pub warmup_epochs: Option<f64>,
    /// When to evaluate and to stop: train, traineval or train300, by the reference's rules; default: user's epochs, evaluation by --eval-every.
    #[arg(long, value_name = "MODE", alias = "training_mode")]
    pub training_mode: Option<String>,
    /// Evaluate every N epochs (and at the end); 0 = only at the end.
    #[arg(long, value_name = "N")]
    pub eval_every: Option<u64>,
    /// Images to evaluate on, at most.
    #[arg(long, value_name = "N", alias = "eval_samples")]
    pub eval_samples: Option<usize>,
    /// Save every N epochs.
    #[arg(long, value_name = "N", default_value_t = 1, alias = "checkpoint_period")]
    pub checkpoint_period: u64,
    /// Save every N steps as well.
    #[arg(long, value_name = "N")]
    pub checkpoint_every_steps: Option<u64>,
    /// Newest checkpoints to keep.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub keep: usize,
    /// Checkpoints to keep that have the best metric.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub keep_best: usize,
    /// Keep every checkpoint whose step is a multiple of N.
    #[arg(long, value_name = "N")]
    pub keep_every: Option<u64>,
    /// When a loss, gradient or statistic is no number: end the run, leave the batch out, or go back to the newest checkpoint and on
    /// behind the batch.
    #[arg(long, value_name = "POLICY", default_value = "stop")]
    pub on_nonfinite: NonFinitePolicy,
    /// Start from these weights (run folder, step folder or .safetensors); what does not fit is initialised and listed.
    #[arg(long, value_name = "PATH", alias = "pretrained_ckpt")]
    pub pretrained_ckpt: Option<PathBuf>,
    /// Start the backbone from these weights (.safetensors).
    #[arg(long, value_name = "FILE", alias = "backbone_init")]
    pub backbone_init: Option<PathBuf>,
    /// Do not train variables whose name matches from its start.
    #[arg(long, value_name = "REGEX", alias = "var_freeze_expr")]
    pub freeze: Option<String>,
    /// Stop when this metric has not improved for --patience evaluations: AP, AP50, AP75, APs, APm, APl, AR100.
    #[arg(long, value_name = "METRIC")]
    pub early_stop: Option<String>,
    /// Evaluations without improvement that end the run.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub patience: u64,
    /// Seed of every random draw.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Loader threads beside the engine's; 0 = load on the training thread.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(..=MOST_THREADS))]
    pub workers: Option<usize>,
    /// Log every N steps.
    #[arg(long, value_name = "N", default_value_t = 1, alias = "log_steps")]
    pub log_steps: u64,
    /// DLLogger file inside the run folder.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "time_log.txt",
        alias = "log_filename"
    )]
    pub log_filename: String,
    /// A fixed number of steps, no evaluation, then images/s.
    #[arg(long)]
    pub benchmark: bool,
    /// Steps of --benchmark.
    #[arg(long, value_name = "N", default_value_t = 100, alias = "benchmark_steps")]
    pub benchmark_steps: u64,
    /// Train on the first batch over and over.
    #[arg(long, alias = "use_fake_data")]
    pub use_fake_data: bool,
    /// Overfit eight images of the data in a few minutes, or say what is wrong with them or with the configuration.
    #[arg(long, conflicts_with_all = ["resume", "dry_run", "benchmark"])]
    pub sanity: bool,
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Memory that the run may take, such as 2GB; default: what this machine has free.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub memory_limit: Option<u64>,
    /// Train even where memory will not do.
    #[arg(long)]
    pub ignore_memory: bool,
    /// Check data and memory, print the plan and the effective configuration, and stop.
    #[arg(long)]
    pub dry_run: bool,
    /// Ranks that a dry run plans for.
    #[arg(long, value_name = "N", hide = true)]
    pub plan_ranks: Option<usize>,
    /// Train without the quick form of `effdet data doctor` first.
    #[arg(long)]
    pub no_doctor: bool,
    /// How activations and gradients are stored: fp32, fp16 or bf16. The half precisions take less memory; sums, batch norm and
    /// weights stay float32. fp16 scales the loss dynamically; bf16 rounds what most 1x1 convolutions multiply to bfloat16, which
    /// is faster where the processor has instructions for it. There are two kinds of these, which add up in different orders: bf16
    /// means bf16-tiles on processors with AMX and bf16-pairs on others (`effdet inspect machine` tells), and a run keeps the order
    /// that it began with. Named in full, each gives the same bits on every processor.
    #[arg(long, value_name = "PRECISION")]
    pub precision: Option<PrecisionChoice>,
    /// Compute the wide tensors of MBConv blocks again in the backward pass instead of keeping them: less memory, more time, the
    /// same bits.
    #[arg(long)]
    pub grad_checkpoint: bool,
    /// The same as --precision fp16.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub amp: Option<bool>,
    /// Only warnings and the final table.
    #[arg(long, short)]
    pub quiet: bool,
    /// Options that the command line names.
    #[arg(skip)]
    pub given: Vec<String>,
}

impl TrainArgs {
    /// What a training step in `precision` keeps.
    pub fn step_memory(&self, precision: Precision) -> StepMemory {
        StepMemory {
            precision,
            grad_checkpoint: self.grad_checkpoint,
        }
    }

    /// The number of images that `--batch-size` names; none where it is left to the program.
    pub fn batch_images(&self) -> Option<usize> {
        match self.batch_size {
            Some(BatchSize::Images(images)) => Some(images),
            Some(BatchSize::Auto) | None => None,
        }
    }
}

/// Images per step and rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchSize {
    /// As many as memory allows.
    Auto,
    /// So many.
    Images(usize),
}

impl FromStr for BatchSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self::Auto),
            (_, Ok(images)) if images > 0 => Ok(Self::Images(images)),
            _ => Err("a number from 1, or auto".to_owned()),
        }
    }
}

/// What to do about numbers that are none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum NonFinitePolicy {
    /// Save the state before the step and end.
    #[default]
    Stop,
    /// Leave the batch out.
    SkipStep,
    /// Go back to the newest checkpoint and on behind the batch.
    Rewind,
}

/// A number of bytes: `1500000`, `800MB`, `2GB`, `1.5GiB`.
fn bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 7] = [
        ("GiB", 1073741824.0),
        ("MiB", 1048576.0),
        ("GB", 1e9),
        ("MB", 1e6),
        ("G", 1e9),
        ("M", 1e6),
        ("", 1.0),
    ];
    let parsed = UNITS.iter().find_map(|(unit, factor)| {
        let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
        Some(number * factor)
    });
    match parsed {
        Some(bytes) if bytes >= 1.0 && bytes.is_finite() => Ok(bytes as u64),
        _ => Err("a size such as 800MB or 2GB".to_owned()),
    }
}

/// What `--precision` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrecisionChoice {
    /// One by its name.
    Exactly(Precision),
    /// bfloat16, multiplied as this processor does best.
    Bf16,
}

impl FromStr for PrecisionChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "bf16" => Ok(Self::Bf16),
            _ => (name.parse().map(Self::Exactly)).map_err(|_: UnknownPrecision| {
                format!("unknown precision {name:?}: use fp32, fp16, bf16, bf16-pairs or bf16-tiles")
            }),
        }
    }
}

impl PrecisionChoice {
    /// The precision of a new run.
    pub fn resolve(self) -> Precision {
        match self {
            Self::Exactly(precision) => precision,
            Self::Bf16 => fastest_bf16(),
        }
    }

    /// The precision of a run that had `own`: `bf16` fits both kinds.
    pub fn resolve_for(self, own: Precision) -> Precision {
        match (self, own) {
            (Self::Bf16, Precision::Bf16Pairs | Precision::Bf16Tiles) => own,
            _ => self.resolve(),
        }
    }
}

impl TrainArgs {
    /// The precision that --precision and --amp ask for; none where both are left out.
    pub fn precision(&self) -> Option<PrecisionChoice> {
        let by_amp = self
            .amp
            .map(|amp| if amp { Precision::Fp16 } else { Precision::Fp32 });
        self.precision.or(by_amp.map(PrecisionChoice::Exactly))
    }

    /// The precision of a new run.
    pub fn new_precision(&self) -> Precision {
        self.precision()
            .map_or_else(Precision::default, PrecisionChoice::resolve)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_batch_sizes_are_read_with_their_units() {
        assert_eq!(bytes("2GB"), Ok(2_000_000_000));
        assert_eq!(bytes("1.5 GiB"), Ok(1_610_612_736));
        assert_eq!(bytes("700"), Ok(700));
        assert!(
            ["", "GB", "-1GB", "2TB", "inf"]
                .iter()
                .all(|text| bytes(text).is_err())
        );
        assert_eq!("auto".parse(), Ok(BatchSize::Auto));
        assert_eq!("16".parse(), Ok(BatchSize::Images(16)));
        assert!("0".parse::<BatchSize>().is_err() && "many".parse::<BatchSize>().is_err());
    }

    #[test]
    fn bf16_is_the_processors_kind_for_a_new_run_and_the_runs_own_for_an_old_one() {
        let bf16: PrecisionChoice = "bf16".parse().unwrap();
        assert_eq!(bf16.resolve(), fastest_bf16());
        for own in [Precision::Bf16Pairs, Precision::Bf16Tiles] {
            assert_eq!(bf16.resolve_for(own), own);
            let named: PrecisionChoice = own.to_string().parse().unwrap();
            assert_eq!(named.resolve_for(Precision::Bf16Pairs), own);
        }
        assert_eq!(bf16.resolve_for(Precision::Fp32), fastest_bf16());
        assert!(
            "bf8"
                .parse::<PrecisionChoice>()
                .unwrap_err()
                .contains("bf16-tiles")
        );
    }
}
