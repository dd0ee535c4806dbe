//! `effdet data`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{AugmentArgs, ModelArgs, SourceArgs};

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
    /// Find what is wrong with a data set before training does.
    Doctor(Box<DoctorArgs>),
    /// Fetch a public data set.
    Download(DownloadArgs),
    /// Draw images with their boxes.
    View(Box<ViewArgs>),
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

/// Options of `data doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit code 1 when there are errors, or with --strict warnings.

Examples:
  effdet data doctor --data bccd
  effdet data doctor --data shape --model d0 --image-size 256 --html doctor.html
  effdet data doctor --data mine --checkpoint runs/d0-1 --json
  effdet data doctor --training_file_pattern 'records/train-*' --val_file_pattern 'records/val-*' \\
                     --val-json instances_val2017.json")]
pub struct DoctorArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Splits of --data to examine; default: every split.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', requires = "data")]
    pub splits: Vec<String>,
    /// Compare the class map with that of a run or step folder, and take its anchors.
    #[arg(long, value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,
    /// Open some images only, and do not look for copies.
    #[arg(long)]
    pub quick: bool,
    /// Fail on warnings, too.
    #[arg(long)]
    pub strict: bool,
    /// Write a page with the worst examples drawn.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Data sets that can be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DownloadSet {
    /// 118,287 training and 5,000 held-out images, 80 categories, 20 GB.
    Coco2017,
    /// 9,963 images, 20 categories, 0.9 GB.
    Voc2007,
    /// 17,125 images, 20 categories, 2 GB.
    Voc2012,
}

/// Options of `data download`.
#[derive(Debug, Args)]
#[command(after_help = "\
A download that was broken off goes on where it stopped. Checksums are always compared, those of mirrors, too.

Examples:
  effdet data download voc2007 --output voc
  effdet data download coco2017 --parts val,annotations --output coco
  effdet data download coco2017 --output coco --base-url https://mirror.example/coco")]
pub struct DownloadArgs {
    /// Which one.
    pub set: DownloadSet,
    /// Folder to put it in.
    #[arg(long, short, value_name = "DIR")]
    pub output: PathBuf,
    /// Archives to fetch; default: all. COCO: annotations, val, train; VOC: trainval, test.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub parts: Vec<String>,
    /// A mirror with the same paths below this address.
    #[arg(long, value_name = "URL")]
    pub base_url: Option<String>,
    /// Refuse archives of more bytes.
    #[arg(long, value_name = "N", default_value_t = 25_000_000_000)]
    pub max_bytes: u64,
    /// Leave the archives there after unpacking.
    #[arg(long)]
    pub keep_archives: bool,
}

/// Options of `data view`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  effdet data view --data shape --split val --output sheet.png
  effdet data view --data bccd --category WBC --count 24 --seed 1 --output wbc.html
  effdet data view --data bccd --augment autoaugment-v2 --mosaic 0.5 --output augmented.png")]
pub struct ViewArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub augmentation: AugmentArgs,
    /// Show what training sees: augmented, at the size of the network's input; the options of augmentation imply it.
    #[arg(long)]
    pub augmented: bool,
    /// Pass over the data set that --augmented shows.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub pass: u64,
    /// Split of --data.
    #[arg(long, value_name = "NAME", default_value = "train")]
    pub split: String,
    /// What to write: a contact sheet (.png, .jpg) or a page (.html).
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    /// Images.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub count: usize,
    /// Side of an image on the sheet in pixels.
    #[arg(long, value_name = "PX", default_value_t = 320)]
    pub tile: u32,
    /// Images of a row of the sheet.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub columns: usize,
    /// Only images with an object of this category.
    #[arg(long, value_name = "NAME")]
    pub category: Option<String>,
    /// Choose at random by this seed instead of evenly.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}
