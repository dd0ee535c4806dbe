//! `effdet inspect`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{EngineArgs, ModelArgs};

/// Options of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// What to look into.
    #[command(subcommand)]
    pub command: InspectCommand,
}

/// What can be inspected.
#[derive(Debug, Subcommand)]
pub enum InspectCommand {
    /// Parameters and multiply-adds per stage; with --variables the variable table.
    #[command(after_help = "\
Examples:
  effdet inspect model --model d0
  effdet inspect model --model lite2 --variables
  effdet inspect model --model d0 --hparams-only > d0.toml")]
    Model {
        #[command(flatten)]
        model: ModelArgs,
        /// List every variable.
        #[arg(long)]
        variables: bool,
        /// Print the hyper-parameters as TOML.
        #[arg(long)]
        hparams_only: bool,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Manifest, hashes and value ranges of a checkpoint.
    #[command(after_help = "Example:\n  effdet inspect checkpoint runs/shape")]
    Checkpoint {
        /// Run folder or step folder.
        path: PathBuf,
        /// List every variable with its mean, deviation and range.
        #[arg(long)]
        variables: bool,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Processor, caches, the chosen instruction set, and what they reach at most: multiply-adds, memory, fork and join.
    #[command(after_help = "\
Figures are the fastest of five measurements; run it on an idle machine.

Examples:
  effdet inspect machine
  EFFDET_ISA=avx2 effdet inspect machine --json")]
    Machine {
        #[command(flatten)]
        engine: EngineArgs,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// A batch that a run wrote when a number of its step was none: its images, and the step again.
    #[command(
        after_help = "Example:\n  effdet inspect batch runs/x/nonfinite-00000812-6512.safetensors --checkpoint runs/x"
    )]
    Batch {
        /// The file.
        file: PathBuf,
        /// Run folder or step folder whose weights the step is made with; none = look at the batch alone.
        #[arg(long, value_name = "PATH")]
        checkpoint: Option<PathBuf>,
        #[command(flatten)]
        engine: EngineArgs,
    },
    /// Every named output of a forward pass; with boxes also targets, losses and gradients.
    #[command(after_help = "\
The tool for comparing with any other implementation: weights under the variable names of `inspect model --variables`, one
input batch, and a safetensors file with everything that was computed.

Examples:
  effdet inspect trace --model d0 --weights w.safetensors --input batch.npy --out trace.safetensors
  effdet inspect trace --checkpoint runs/shape --input photo.jpg --out trace.safetensors
  effdet inspect trace --model d0 --weights w.safetensors --input batch.npy --boxes boxes.json --mode train --out t.safetensors")]
    Trace {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        engine: EngineArgs,
        /// Weights by variable name (.safetensors).
        #[arg(long, value_name = "FILE", conflicts_with = "checkpoint")]
        weights: Option<PathBuf>,
        /// Run folder or step folder instead of --model and --weights.
        #[arg(long, value_name = "PATH")]
        checkpoint: Option<PathBuf>,
        /// Input batch: .npy or .safetensors N×H×W×3 float32 (already normalised), or an image (goes through preprocessing).
        #[arg(long, value_name = "FILE")]
        input: PathBuf,
        /// Boxes: JSON, one list per image of {"box": [ymin, xmin, ymax, xmax] in input pixels, "class": 0-based index}.
        #[arg(long, value_name = "JSON")]
        boxes: Option<PathBuf>,
        /// Batch norm with moving statistics (infer) or the batch's own (train).
        #[arg(long, value_name = "infer|train", default_value = "infer")]
        mode: String,
        /// Compute with the plain reference instead of the fast kernels.
        #[arg(long)]
        reference: bool,
        /// Where the tensors go (.safetensors).
        #[arg(long, short, value_name = "FILE")]
        out: PathBuf,
    },
}
