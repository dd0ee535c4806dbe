//! `effdet infer`.

use std::path::PathBuf;

use clap::Args;

use super::EngineArgs;

/// Options of `infer`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  effdet infer --checkpoint runs/shape photo.jpg
  effdet infer --checkpoint runs/shape 'photos/*.jpg' --score-threshold 0.5 --output-dir out
  effdet infer --checkpoint runs/shape photos/ --json --no-images > detections.json")]
pub struct InferArgs {
    /// Run folder (its newest checkpoint) or step folder.
    #[arg(long, short, value_name = "PATH", alias = "model-dir", alias = "model_dir")]
    pub checkpoint: PathBuf,
    /// Images, folders or globs.
    #[arg(value_name = "IMAGE", required_unless_present = "image_path")]
    pub inputs: Vec<String>,
    /// One image (the reference's flag).
    #[arg(long, value_name = "IMAGE", alias = "image_path", hide = true)]
    pub image_path: Option<String>,
    /// Where annotated images and detections.json go.
    #[arg(
        long,
        short,
        value_name = "DIR",
        default_value = "detections",
        alias = "output_dir"
    )]
    pub output_dir: PathBuf,
    /// Draw and report detections above this score.
    #[arg(
        long,
        value_name = "S",
        default_value_t = 0.4,
        alias = "min-score-thresh",
        alias = "min_score_thresh"
    )]
    pub score_threshold: f32,
    /// Detections per image, at most.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 100,
        alias = "max-boxes-to-draw",
        alias = "max_boxes_to_draw"
    )]
    pub max_detections: usize,
    /// NMS method: gaussian, linear, hard, diou.
    #[arg(long, value_name = "METHOD", alias = "nms_method")]
    pub nms_method: Option<effdet_model::hparams::NmsMethod>,
    /// Network input size: an integer or WxH (width first); default: the checkpoint's.
    #[arg(long, value_name = "SIZE")]
    pub image_size: Option<effdet_model::hparams::ImageSize>,
    /// Overrides of post-processing hyper-parameters, as in `train`.
    #[arg(long, value_name = "K=V,…", default_value = "")]
    pub hparams: String,
    /// Box line width in pixels.
    #[arg(long, value_name = "PX", default_value_t = 2)]
    pub line_thickness: u32,
    /// Use the raw weights instead of their moving averages.
    #[arg(long)]
    pub raw_weights: bool,
    /// Do not write annotated images.
    #[arg(long)]
    pub no_images: bool,
    /// Print the detections as one JSON object.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}
