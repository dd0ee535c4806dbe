//! `effdet data`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::SourceArgs;

/// Options of `data`.
#[derive(Debug, Args)]
pub struct DataArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: DataCommand,
}

/// Target format of `data convert`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConvertFormat {
    /// TFRecord shards in the reference's schema, boxes included.
    Tfrecord,
    /// COCO instances JSON beside a folder of images.
    Coco,
    /// Pascal VOC: one XML per image, lists of splits.
    Voc,
    /// YOLO: one text file per image, data.yaml.
    Yolo,
}

/// Data commands.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Convert a data set to TFRecord shards, COCO JSON, VOC or YOLO.
    #[command(after_help = "\
Examples:
  effdet data convert --data bccd --to yolo --output bccd_yolo
  effdet data convert --data bccd --splits train,val --to tfrecord --output records --num-shards 4
  effdet data convert --data bccd --train-split train --to tfrecord --output records/train --num-shards 4
  effdet data convert --image_dir train2017 --object_annotations_file instances_train2017.json \\
                      --output_file_prefix coco/train --num_shards 256")]
    Convert {
        #[command(flatten)]
        source: SourceArgs,
        /// Folder of the images (the reference's flag).
        #[arg(
            long,
            value_name = "DIR",
            alias = "image_dir",
            requires = "object_annotations_file"
        )]
        image_dir: Option<PathBuf>,
        /// Instances JSON (the reference's flag).
        #[arg(
            long,
            value_name = "JSON",
            alias = "object_annotations_file",
            requires = "image_dir"
        )]
        object_annotations_file: Option<PathBuf>,
        /// Captions JSON; has no boxes, so it is refused with an explanation.
        #[arg(long, value_name = "JSON", alias = "caption_annotations_file", hide = true)]
        caption_annotations_file: Option<PathBuf>,
        /// Target format.
        #[arg(long, value_name = "FORMAT", default_value = "tfrecord")]
        to: ConvertFormat,
        /// Splits of --data to convert; default: every split, for TFRecord --train-split.
        #[arg(long, value_name = "NAME,…", value_delimiter = ',', requires = "data")]
        splits: Vec<String>,
        /// Folder to write to; of TFRecord without --splits, the prefix of the shards.
        #[arg(
            long,
            short,
            value_name = "PREFIX",
            alias = "output-file-prefix",
            alias = "output_file_prefix"
        )]
        output: PathBuf,
        /// TFRecord shards of each split.
        #[arg(long, value_name = "N", default_value_t = 32, alias = "num_shards")]
        num_shards: usize,
    },
    /// Images, boxes, classes and sizes of a data set.
    #[command(after_help = "Example:\n  effdet data inspect --data shape")]
    Inspect {
        #[command(flatten)]
        source: SourceArgs,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Render the synthetic data set into a COCO folder.
    #[command(after_help = "Example:\n  effdet data synth --output synthetic --images 600 --image-size 256")]
    Synth {
        /// Folder to create.
        #[arg(long, short, value_name = "DIR")]
        output: PathBuf,
        /// Training images.
        #[arg(long, default_value_t = 600)]
        images: usize,
        /// Held-out images.
        #[arg(long, default_value_t = 100)]
        val_images: usize,
        /// Side in pixels.
        #[arg(long, default_value_t = 256)]
        image_size: u32,
        /// Seed.
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
}
