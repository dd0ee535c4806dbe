//! The effective configuration of a run: command line, preset and data put together.

use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use effdet_data::corrupt::Excluded;
use effdet_data::dataset::DetectionDataset;
use effdet_data::report::LoadReport;
use effdet_data::synthetic::{self, SyntheticConfig};
use effdet_metrics::METRIC_NAMES;
use effdet_model::hparams::{HParams, Profile};
use effdet_model::label_map::{Indexing, LabelMap};
use effdet_train::guard::OnNonFinite;
use effdet_train::modes::EvaluationRule;
use effdet_train::trainer::{EarlyStop, TrainConfig};
use serde::{Deserialize, Serialize};

use super::memory;
use super::model::{apply_augmentation, apply_overrides, resolve_hparams};
use super::sources;
use crate::cli::{NonFinitePolicy, SourceArgs, TrainArgs};

/// The effective configuration of a run, saved beside its checkpoints; enough to repeat it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// How it trains.
    pub train: TrainConfig,
    /// Images per evaluation step.
    pub eval_batch_size: usize,
    /// Images to evaluate on, at most.
    pub eval_samples: Option<usize>,
    /// Where the data lies.
    pub data: DataConfig,
    /// Model and schedule.
    pub hparams: HParams,
}

/// Where the data of a run lies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataConfig {
    /// Rendered by the program.
    Synthetic {
        /// Training images.
        images: u64,
        /// Held-out images.
        val_images: u64,
        /// Side in pixels.
        image_size: u32,
        /// Most objects of an image.
        max_objects: u64,
        /// Radius of the smallest objects as a fraction of the side.
        smallest_radius: f32,
    },
    /// Named on the command line.
    Files(Box<SourceArgs>),
}

/// Data of a run.
pub struct RunData {
    pub train: Arc<DetectionDataset>,
    pub val: Option<Arc<DetectionDataset>>,
    /// How the user's data were read; none for rendered data.
    pub origins: Vec<Origin>,
}

/// How one part of the user's data was read.
pub struct Origin {
    pub part: sources::Part,
    pub report: LoadReport,
    pub format: &'static str,
    pub place: String,
    pub excluded: Vec<Excluded>,
}

impl DataConfig {
    /// Whether it is the data that the command line names by `source`.
    pub fn is_of(&self, source: &SourceArgs) -> bool {
        matches!(self, Self::Files(own) if **own == *source)
    }

    /// Reads or renders the data.
    pub fn load(&self, eval_samples: Option<usize>) -> Result<RunData> {
        let mut origins = Vec::new();
        let (train, mut val) = match self {
            Self::Synthetic {
                images,
                val_images,
                image_size,
                max_objects,
                smallest_radius,
            } => {
                let config = SyntheticConfig {
                    image_size: *image_size,
                    max_objects: *max_objects,
                    smallest_radius: *smallest_radius,
                    ..SyntheticConfig::default()
                };
                let train = synthetic::dataset(&config, 0..*images);
                (
                    train,
                    Some(synthetic::dataset(&config, *images..images + val_images)),
                )
            }
            Self::Files(args) => {
                let mut take = |part, loaded: sources::Loaded| {
                    origins.push(Origin {
                        part,
                        report: loaded.report,
                        format: loaded.format,
                        place: loaded.place,
                        excluded: loaded.excluded,
                    });
                    loaded.dataset
                };
                let train = sources::require_part(args, sources::Part::Train)?;
                let train = take(sources::Part::Train, train);
                let val = sources::load_part(args, sources::Part::Val)?;
                (train, val.map(|val| take(sources::Part::Val, val)))
            }
        };
        if let (Some(val), Some(limit)) = (&mut val, eval_samples) {
            val.examples.truncate(limit);
        }
        if train.examples.iter().all(|example| example.objects.is_empty()) {
            bail!(
                "{}: none of the {} images has an object; training would see background only. Check the annotation file \
                 (captions files have no boxes) and the split",
                train.name,
                train.examples.len()
            );
        }
        if let Some(val) = &val
            && val.categories != train.categories
        {
            bail!(
                "categories of the training data ({:?}) and of the held-out data ({:?}) differ; use one class map for both",
                train.categories,
                val.categories
            );
        }
        Ok(RunData {
            train: Arc::new(train),
            val: val.map(Arc::new),
            origins,
        })
    }
}

/// The label map of a data set: COCO's own where ids and names are COCO's, otherwise one output per category.
pub fn label_map_of(dataset: &DetectionDataset) -> Result<LabelMap> {
    let coco = LabelMap::coco();
    let is_coco = dataset.categories.len() == coco.len()
        && dataset
            .categories
            .iter()
            .all(|category| coco.name(category.id) == Some(&category.name));
    if is_coco {
        return Ok(coco);
    }
    let categories = dataset
        .categories
        .iter()
        .map(|category| (category.id, category.name.clone()));
    Ok(LabelMap::new(Indexing::Contiguous, categories)?)
}

/// Class outputs of a model for these classes, where none are asked for.
pub fn class_outputs(label_map: &LabelMap, profile: Profile) -> usize {
    match (label_map.indexing(), profile) {
        (Indexing::IdMinusOne, Profile::Seed) => 91,
        (Indexing::IdMinusOne, Profile::Google) => 90,
        (Indexing::Contiguous, _) => label_map.min_num_classes(),
    }
}

const DEFAULT_BATCH: usize = 8;

/// Configuration of a run of `ranks` processes on the user's data, and that data.
pub fn configure(args: &TrainArgs, ranks: usize) -> Result<(RunConfig, RunData)> {
    let mut hparams = resolve_hparams(&args.model, "d0")?;
    let source = DataConfig::Files(Box::new(sources::absolute(&args.source)?));
    let data = source.load(args.eval_samples)?;
    let label_map = label_map_of(&data.train)?;
    if args.model.num_classes.is_none() {
        hparams.num_classes = class_outputs(&label_map, hparams.profile);
    }
    let batch_size = memory::batch_size(args, &hparams, DEFAULT_BATCH)?;
    // The published rates are per 64 images.
    let rate = 0.08 * (batch_size * args.accumulate.max(1) * ranks) as f64 / 64.0;
    (hparams.learning_rate, hparams.lr_warmup_init) = (rate, rate / 100.0);
    apply_overrides(&mut hparams, &args.model.hparams)?;
    apply_schedule(args, &mut hparams);
    apply_augmentation(&args.augmentation, &mut hparams)?;
    hparams.validate()?;
    ensure!(
        hparams.num_classes >= label_map.min_num_classes(),
        "num_classes = {}: the categories of {} need {}",
        hparams.num_classes,
        data.train.name,
        label_map.min_num_classes()
    );
    ensure!(
        data.val.is_some() || args.early_stop.is_none(),
        "--early-stop needs held-out data: give --val-split, or --val-json with --val-images"
    );
    let config = run_config(args, hparams, source, (batch_size, ranks), rule(args)?)?;
    Ok((config, data))
}

/// When a run evaluates and ends.
pub fn rule(args: &TrainArgs) -> Result<EvaluationRule> {
    // Stopping early takes evaluations on the way.
    let default_period = u64::from(args.early_stop.is_some());
    Ok(match args.training_mode.as_deref() {
        _ if args.benchmark => EvaluationRule::Never,
        None => EvaluationRule::Every(args.eval_every.unwrap_or(default_period)),
        Some("train") => EvaluationRule::Train,
        Some("traineval") => EvaluationRule::TrainEval {
            period: args.checkpoint_period,
        },
        Some("train300") => EvaluationRule::Train300,
        Some(other) => bail!("--training-mode {other:?}: known modes are train, traineval and train300"),
    })
}

/// Dedicated options win over everything else.
pub fn apply_schedule(args: &TrainArgs, hparams: &mut HParams) {
    let set = |slot: &mut f64, value: Option<f64>| {
        if let Some(value) = value {
            *slot = value;
        }
    };
    set(&mut hparams.num_epochs, args.epochs);
    set(&mut hparams.learning_rate, args.lr);
    set(&mut hparams.lr_warmup_init, args.warmup_value);
    set(&mut hparams.lr_warmup_epoch, args.warmup_epochs);
    if args.freeze.is_some() {
        hparams.var_freeze_expr.clone_from(&args.freeze);
    }
}

/// The run that options and hyper-parameters describe.
pub fn run_config(
    args: &TrainArgs,
    hparams: HParams,
    data: DataConfig,
    (batch_size, ranks): (usize, usize),
    rule: EvaluationRule,
) -> Result<RunConfig> {
    // As in the reference, a benchmark is one epoch of its steps, and the schedule goes by that.
    let benchmarked = args.benchmark_steps * (batch_size * args.accumulate.max(1) * ranks) as u64;
    let num_examples_per_epoch = match args.benchmark {
        true => Some(benchmarked),
        false => args.num_examples_per_epoch,
    };
    Ok(RunConfig {
        train: TrainConfig {
            batch_size,
            ranks,
            half_gradients: args.half_gradients,
            sync_bn: args.sync_bn,
            accumulate: args.accumulate.max(1),
            num_examples_per_epoch,
            max_steps: args.max_steps.or(args.benchmark.then_some(args.benchmark_steps)),
            checkpoint_period: args.checkpoint_period,
            checkpoint_every_steps: args.checkpoint_every_steps,
            keep_last: args.keep,
            keep_best: args.keep_best,
            keep_every: args.keep_every,
            on_nonfinite: args.on_nonfinite.into(),
            schedule_shift: 0,
            rule,
            early_stop: early_stop(args)?,
            precision: args.new_precision(),
            seed: args.seed,
            workers: args.workers.unwrap_or(1),
            use_fake_data: args.use_fake_data,
        },
        eval_batch_size: args.eval_batch_size.unwrap_or(batch_size),
        eval_samples: args.eval_samples,
        data,
        hparams,
    })
}

/// The rule of stopping early that is asked for.
pub fn early_stop(args: &TrainArgs) -> Result<Option<EarlyStop>> {
    let Some(wanted) = &args.early_stop else {
        return Ok(None);
    };
    // AR100 is short for the metric's own name ARmax100.
    let long = wanted.replace("ARmax", "AR").replace("AR", "ARmax");
    let known = METRIC_NAMES.iter().find(|name| *name == wanted || **name == long);
    match known {
        Some(metric) => Ok(Some(EarlyStop {
            metric: (*metric).to_owned(),
            patience: args.patience,
        })),
        None => bail!(
            "--early-stop {wanted:?}: known metrics are {}",
            METRIC_NAMES.join(", ")
        ),
    }
}

impl From<NonFinitePolicy> for OnNonFinite {
    fn from(policy: NonFinitePolicy) -> Self {
        match policy {
            NonFinitePolicy::Stop => Self::Stop,
            NonFinitePolicy::SkipStep => Self::SkipStep,
            NonFinitePolicy::Rewind => Self::Rewind,
        }
    }
}
