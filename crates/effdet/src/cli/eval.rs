//! `effdet eval`.

use std::path::PathBuf;

use clap::Args;

use super::{EngineArgs, RankArgs, SourceArgs};

/// Options of `eval`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  effdet eval --checkpoint runs/shape --data shape
  effdet eval --checkpoint runs/coco/step-00001234 --val-json instances_val2017.json --val-images val2017 --per-class
  effdet eval --results detections.json --ground-truth instances_val2017.json --json")]
pub struct EvalArgs {
    /// Run folder (its newest checkpoint) or step folder.
    #[arg(
        long,
        short,
        value_name = "PATH",
        alias = "ckpt-path",
        alias = "ckpt_path",
        conflicts_with = "results"
    )]
    pub checkpoint: Option<PathBuf>,
    /// Detections to score, COCO results JSON; no model is run.
    #[arg(long, value_name = "JSON", requires = "ground_truth")]
    pub results: Option<PathBuf>,
    /// Ground truth of --results, COCO instances JSON.
    #[arg(long, value_name = "JSON")]
    pub ground_truth: Option<PathBuf>,
    #[command(flatten)]
    pub source: SourceArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub ranks: RankArgs,
    /// Images per step and rank.
    #[arg(long, short, default_value_t = 8, alias = "batch_size")]
    pub batch_size: usize,
    /// Images to evaluate on, at most.
    #[arg(long, value_name = "N", alias = "eval_samples")]
    pub eval_samples: Option<usize>,
    /// Overrides of post-processing hyper-parameters, as in `train`.
    #[arg(long, value_name = "K=V,…", default_value = "")]
    pub hparams: String,
    /// Use the raw weights instead of their moving averages.
    #[arg(long)]
    pub raw_weights: bool,
    /// Score only the images that have detections, as the reference does.
    #[arg(long)]
    pub only_images_with_detections: bool,
    /// AP of every class.
    #[arg(long)]
    pub per_class: bool,
    /// Write the detections as COCO results JSON.
    #[arg(long, value_name = "JSON")]
    pub save_results: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}
