//! The command line as data: every command, option, alias and example.
//!
//! Nothing here touches the world; `commands` resolves these values against it.

mod augment;
mod data;
mod eval;
mod infer;
mod inspect;
mod launch;
mod ranks;
mod recipe;
mod runs;
mod train;

pub use augment::{AugmentArgs, Augmentation};
#[cfg(feature = "download")]
pub use data::DownloadSet;
pub use data::{ConvertFormat, DataArgs, DataCommand, DoctorArgs, DownloadArgs, ViewArgs};
pub use eval::EvalArgs;
pub use infer::InferArgs;
pub use inspect::{InspectArgs, InspectCommand};
pub use launch::LaunchArgs;
pub use ranks::RankArgs;
pub use recipe::{RecipeArgs, RecipeCommand, RecipeRun};
pub use runs::{CheckpointArgs, CheckpointCommand, CompareArgs};
pub use train::{
    BatchSize, CacheArgs, EngineArgs, ModelArgs, NonFinitePolicy, OnCorrupt, SourceArgs, StepMemory,
    TrainArgs,
};

use std::ffi::OsString;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

/// Reads a command line.
///
/// # Errors
/// clap's: usage and suggestions.
pub fn parse<I: IntoIterator<Item = T>, T: Into<OsString> + Clone>(arguments: I) -> Result<Cli, clap::Error> {
    let matches = Cli::command().try_get_matches_from(arguments)?;
    let mut cli = Cli::from_arg_matches(&matches)?;
    if let (Command::Train(train), Some(given)) = (&mut cli.command, matches.subcommand_matches("train")) {
        train.given = named(given);
    }
    Ok(cli)
}

/// The options that the command line names, be it with their default values.
fn named(matches: &ArgMatches) -> Vec<String> {
    let on_line = |id: &&clap::Id| matches.value_source(id.as_str()) == Some(ValueSource::CommandLine);
    matches
        .ids()
        .filter(on_line)
        .map(|id| id.as_str().to_owned())
        .collect()
}

/// EfficientDet object detection: train, evaluate, run and inspect, in one static binary.
#[derive(Debug, Parser)]
#[command(name = "effdet", version, propagate_version = true, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  effdet train                                   quickstart on a synthetic data set, nothing needed
  effdet train --data my_coco --model d0         train on a COCO or VOC folder, its layout is found
  effdet train --data my_coco --resume           go on where the last run of that folder stopped
  effdet eval --checkpoint runs/x --data my_coco AP table of the newest checkpoint
  effdet eval --results dets.json --ground-truth instances.json   score somebody else's detections
  effdet infer --checkpoint runs/x photos/       annotated images and JSON
  effdet inspect model --model d0                parameters and multiply-adds per stage";

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a detector; without arguments, the quickstart.
    Train(Box<TrainArgs>),
    /// Score a checkpoint, or a results JSON, with the COCO metric.
    Eval(Box<EvalArgs>),
    /// Detect objects in images and draw them.
    Infer(Box<InferArgs>),
    /// Look inside a model, a checkpoint or a forward pass.
    Inspect(InspectArgs),
    /// List, verify, clean up and compare the checkpoints of a run.
    Checkpoint(CheckpointArgs),
    /// What differs between two runs or checkpoints; with --exact, whether any bit does.
    Compare(CompareArgs),
    /// Convert, inspect and synthesise data sets.
    Data(DataArgs),
    /// Measure speed on this machine.
    Bench(BenchArgs),
    /// Run a command on several ranks and machines: mpirun under supervision, with restarts.
    Launch(LaunchArgs),
    /// Complete configurations by name: the reference's scripts and their counterparts for a CPU.
    Recipe(RecipeArgs),
    /// Print a shell completion script.
    Completions {
        /// Shell.
        shell: clap_complete::Shell,
    },
}

impl Command {
    /// Whether it is there for what it prints, and so has done its work where nobody reads on.
    pub fn prints_results(&self) -> bool {
        match self {
            Self::Train(train) => train.dry_run,
            Self::Launch(launch) => launch.dry_run,
            _ => true,
        }
    }
}

/// Options of `bench`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  effdet bench train --batch-size 4              training steps of D0 at 512x512
  effdet bench infer --batch-size 1 --threads 1 --json")]
pub struct BenchArgs {
    /// What to time.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// Benchmarks.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Training steps: forward, loss, backward, clipping, optimiser, moving average; fixed batch, no input pipeline.
    Train(BenchOptions),
    /// Network outputs.
    Infer(BenchOptions),
    /// From head outputs to detections: the best logits, decoding, suppression.
    Postprocess(PostprocessBenchOptions),
    /// Preparation of training samples on one core: decode, augment, assign.
    Data(Box<DataBenchOptions>),
    /// Steps and sums on 1, 2, 4 … of the ranks that mpirun started, and a model of more of them.
    Scale(ScaleOptions),
}

/// Options of `bench postprocess`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  effdet bench postprocess                                 D0's 49,104 anchors, 90 classes, 5,000 candidates
  effdet bench postprocess --method hard --inputs heads    the numbers in heads/cls.npy and heads/box.npy")]
pub struct PostprocessBenchOptions {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Folder with cls.npy [anchors, classes] and box.npy [anchors, 4]; none = made up.
    #[arg(long, value_name = "DIR", conflicts_with = "data")]
    pub inputs: Option<std::path::PathBuf>,
    /// What is made up: noise with 20 objects in it, or noise alone.
    #[arg(long, value_name = "clustered|random", default_value = "clustered", value_parser = ["clustered", "random"])]
    pub data: String,
    /// Suppression: hard, diou, linear or gaussian; default: the model's.
    #[arg(long)]
    pub method: Option<effdet_model::hparams::NmsMethod>,
    /// Candidates that take part.
    #[arg(long, value_name = "N", default_value_t = 5000)]
    pub candidates: usize,
    /// Detections at most.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub detections: usize,
    /// Steps that are not counted, first.
    #[arg(long, default_value_t = 5)]
    pub warmup: usize,
    /// Counted steps.
    #[arg(long, default_value_t = 100, alias = "iters")]
    pub steps: usize,
    /// Print one JSON line.
    #[arg(long)]
    pub json: bool,
}

/// Options of `bench data`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  effdet bench data --train-json instances_train2017.json --train-images train2017 --image-size 512")]
pub struct DataBenchOptions {
    #[command(flatten)]
    pub source: SourceArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Counted passes over the images, after one that is not counted.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub passes: u64,
    /// Only the first images.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    #[command(flatten)]
    pub cache: CacheArgs,
    #[command(flatten)]
    pub augmentation: AugmentArgs,
    /// Seed of the augmentation.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Print one JSON line.
    #[arg(long)]
    pub json: bool,
}

/// Options of `bench scale`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mpirun -np 4 effdet bench scale --batch-size 4
  effdet launch -n 16 --hostfile hosts -- bench scale --batch-size 16 --json")]
pub struct ScaleOptions {
    #[command(flatten)]
    pub bench: BenchOptions,
    #[command(flatten)]
    pub ranks: RankArgs,
}

/// Options of every benchmark.
#[derive(Debug, Args)]
pub struct BenchOptions {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Images per step.
    #[arg(long, short, default_value_t = 4, alias = "batch", alias = "batch_size")]
    pub batch_size: usize,
    /// Steps that are not counted, first.
    #[arg(long, default_value_t = 1)]
    pub warmup: usize,
    /// Counted steps.
    #[arg(long, default_value_t = 5, alias = "iters", alias = "bm_runs")]
    pub steps: usize,
    /// How training stores activations and gradients: fp32, fp16 or bf16.
    #[arg(long, value_name = "PRECISION")]
    pub precision: Option<train::PrecisionChoice>,
    /// Compute wide tensors again in the backward pass instead of keeping them.
    #[arg(long)]
    pub grad_checkpoint: bool,
    /// Print one JSON line.
    #[arg(long)]
    pub json: bool,
}

impl BenchOptions {
    /// What a training step keeps.
    pub fn step_memory(&self) -> StepMemory {
        StepMemory {
            precision: (self.precision).map_or_else(Default::default, train::PrecisionChoice::resolve),
            grad_checkpoint: self.grad_checkpoint,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::{Cli, Command, parse};

    #[test]
    fn options_on_the_line_are_known_even_with_their_default_values() {
        let cli = parse(["effdet", "train", "--seed", "0", "--data", "x"]).unwrap();
        let Command::Train(train) = cli.command else {
            panic!("{cli:?}")
        };
        for (option, given) in [
            ("seed", true),
            ("data", true),
            ("batch_size", false),
            ("keep", false),
        ] {
            assert_eq!(train.given.iter().any(|name| name == option), given, "{option}");
        }
    }

    #[test]
    fn options_and_aliases_do_not_clash() {
        Cli::command().debug_assert();
    }
}
