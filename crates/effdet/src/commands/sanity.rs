//! `effdet train --sanity`: a handful of the user's images learnt by heart, or the reason why that does not work.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use effdet_ckpt::load_backbone;
use effdet_data::dataset::{DetectionDataset, Example};
use effdet_model::network::Network;
use effdet_model::weights::Weights;
use effdet_train::error::TrainError;
use effdet_train::eval::Evaluator;
use effdet_train::events::{Event, EventSink};
use effdet_train::modes::EvaluationRule;
use effdet_train::requests::Requests;
use effdet_train::trainer::{RunInputs, TrainState, Trainer};

use super::engine::cpu_engine;
use super::pretrained::load_pretrained;
use super::ranks::Job;
use super::run_config::{configure, label_map_of};
use super::terminal::Terminal;
use super::{doctor, memory, quickstart, sources};
use crate::cli::TrainArgs;

/// Images that are learnt by heart.
const IMAGES: usize = 8;
/// Updates, of all images each, after which it is given up; `--max-steps` says otherwise.
const STEPS: u64 = 2000;
/// Updates between two looks at the AP.
const LOOK_EVERY: u64 = 25;
/// AP on the images that shows that everything works together.
const ENOUGH: f64 = 0.9;
/// Sides of objects, in pixels of the network's input, below which the finest level has nothing to go by.
const SMALL_PX: f64 = 8.0;

/// Runs the command.
pub fn run(args: &TrainArgs, job: &Job<'_>) -> Result<ExitCode> {
    ensure!(job.group.size() == 1, "--sanity is a check of one process");
    let given = sources::is_given(&args.source);
    let (mut config, data) = if given {
        configure(args, 1)?
    } else {
        let config = quickstart::configure(args, 1)?;
        let data = config.data.load(None)?;
        (config, data)
    };
    if given && !args.no_doctor {
        doctor::before_training(&data, &config.hparams, args.pretrained_ckpt.as_deref(), true)?;
    }
    let label_map = label_map_of(&data.train)?;
    let subset = Arc::new(subset(&data.train));
    let images = subset.examples.len();

    let steps = args.max_steps.unwrap_or(STEPS).max(LOOK_EVERY);
    // Nothing that regularises: the images as they are, and the weights themselves.
    let hparams = &mut config.hparams;
    (hparams.jitter_min, hparams.jitter_max, hparams.input_rand_hflip) = (1.0, 1.0, false);
    (hparams.autoaugment_policy, hparams.grid_mask) = (None, false);
    (hparams.hsv_h, hparams.hsv_s, hparams.hsv_v) = (0.0, 0.0, 0.0);
    (hparams.mosaic, hparams.mixup, hparams.close_mosaic) = (0.0, 0.0, 0.0);
    (
        hparams.moving_average_decay,
        hparams.survival_prob,
        hparams.backbone_survival_prob,
    ) = (0.0, None, None);
    (hparams.num_epochs, hparams.lr_warmup_epoch) = (steps as f64, (steps / 20) as f64);
    let rate = args.lr.unwrap_or(0.15);
    (hparams.learning_rate, hparams.lr_warmup_init) = (rate, rate / 10.0);
    hparams.validate()?;
    let train = &mut config.train;
    (train.batch_size, train.accumulate) = (images, 1);
    (train.num_examples_per_epoch, train.max_steps) = (None, None);
    (train.checkpoint_period, train.checkpoint_every_steps) = (0, None);
    (train.rule, train.early_stop) = (EvaluationRule::Every(LOOK_EVERY), None);
    if let Some(text) = memory::check(args, &config)? {
        tell!("memory: {text}");
    }

    let network = Arc::new(Network::new(&config.hparams)?);
    let mut weights = Weights::init(&network.variables, config.train.seed);
    if let Some(path) = &args.backbone_init {
        load_backbone(path, &network.variables, &mut weights)?;
    }
    if let Some(path) = &args.pretrained_ckpt {
        load_pretrained(path, &network, &mut weights)?;
    }
    let scratch = tempfile::tempdir().context("cannot create a temporary folder")?;
    let mut engine = cpu_engine(&network, &args.engine, args.step_memory(config.train.precision))?;
    let requests = Arc::new(Requests::default());
    let mut inputs = RunInputs {
        network: &network,
        engine: &mut engine,
        train: Arc::clone(&subset),
        cache: None,
        evaluator: Some(Evaluator {
            dataset: Arc::clone(&subset),
            hparams: config.hparams.clone(),
            label_map: label_map.clone(),
            batch_size: images,
            workers: 1,
            only_images_with_detections: false,
        }),
        label_map,
        group: job.group,
        checkpoints: scratch.path().to_path_buf(),
        requests: Arc::clone(&requests),
    };
    tell!(
        "learning {images} images by heart: {} at {}",
        config.hparams.name,
        config.hparams.image_size
    );
    let mut terminal = Terminal::new(args.quiet);
    let mut watch = Watch {
        requests,
        first_loss: None,
        last_loss: f32::NAN,
        best: (0.0, 0.0),
        steps: 0,
    };
    let mut state = TrainState::new(&network, weights)?;
    let trainer = Trainer::new(&config.train, &network, images);
    trainer.run(&mut inputs, &mut state, &mut [&mut terminal, &mut watch])?;
    let (ap, ap50) = watch.best;
    let mut out = std::io::stdout().lock();
    if ap > ENOUGH {
        writeln!(
            out,
            "sanity: passed: AP {ap:.3} on the {images} images after {} steps; data, targets, losses, gradients, optimiser, decoding and \
             metric work together",
            watch.steps
        )?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(
        out,
        "sanity: failed: AP {ap:.3} (AP50 {ap50:.3}) on the {images} images after {} steps, more than {ENOUGH} expected",
        watch.steps
    )?;
    for reason in reasons(&watch, &subset, &config.hparams) {
        writeln!(out, "  {reason}")?;
    }
    Ok(ExitCode::FAILURE)
}

/// Images with objects, evenly spread over the data set.
fn subset(dataset: &DetectionDataset) -> DetectionDataset {
    let usable = |example: &&Example| example.objects.iter().any(|object| !object.is_crowd);
    let usable: Vec<&Example> = dataset.examples.iter().filter(usable).collect();
    let count = usable.len().min(IMAGES);
    DetectionDataset {
        examples: (0..count)
            .map(|i| usable[i * usable.len() / count].clone())
            .collect(),
        ..dataset.clone()
    }
}

/// What the run shows on its way.
struct Watch {
    requests: Arc<Requests>,
    first_loss: Option<f32>,
    last_loss: f32,
    /// The best AP and the AP50 of that time.
    best: (f64, f64),
    steps: u64,
}

impl EventSink for Watch {
    fn event(&mut self, event: &Event<'_>) -> Result<(), TrainError> {
        match event {
            Event::Step(record) => {
                self.first_loss.get_or_insert(record.det_loss);
                (self.last_loss, self.steps) = (record.det_loss, record.step);
            }
            Event::Evaluated { summary, .. } => {
                let ap50 = summary
                    .named()
                    .find(|(name, _)| *name == "AP50")
                    .map_or(0.0, |(_, v)| v);
                if summary.ap() > self.best.0 {
                    self.best = (summary.ap(), ap50);
                }
                if summary.ap() > ENOUGH {
                    self.requests.stop.store(true, Ordering::Relaxed);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// What may be the matter, likeliest first.
fn reasons(
    watch: &Watch,
    subset: &DetectionDataset,
    hparams: &effdet_model::hparams::HParams,
) -> Vec<String> {
    let mut reasons = Vec::new();
    let first = watch.first_loss.unwrap_or(f32::NAN);
    if watch.last_loss.is_nan() || watch.last_loss > 0.5 * first {
        reasons.push(format!(
            "the loss hardly fell, from {first:.3} to {:.3}: try another --lr; check --freeze and that --backbone-init is of this network",
            watch.last_loss
        ));
    }
    let side = |example: &Example, box_px: f64| {
        let longest = f64::from(example.width.max(example.height).max(1));
        let input = hparams.image_size.height.max(hparams.image_size.width) as f64;
        box_px * input / longest
    };
    let (mut objects, mut small) = (0, 0);
    for example in &subset.examples {
        for object in &example.objects {
            let [_, _, width, height] = object.box_xywh_px;
            objects += 1;
            small += usize::from(side(example, width.min(height)) < SMALL_PX);
        }
    }
    if small * 5 > objects {
        reasons.push(format!(
            "{small} of {objects} objects are narrower than {SMALL_PX} pixels of the {} input: a larger --image-size helps, or tiles of \
             the images",
            hparams.image_size
        ));
    }
    let (ap, ap50) = watch.best;
    if ap50 > 0.9 {
        reasons.push(format!(
            "objects are found (AP50 {ap50:.3}), but boxes are not exact enough for AP {ENOUGH}: more steps or a larger --image-size; \
             if boxes look shifted in `effdet data view`, the annotation is"
        ));
    } else if ap < 0.1 {
        reasons.push(
            "hardly anything is found: look at the boxes with `effdet data view` and at the findings of `effdet data doctor`".to_owned(),
        );
    }
    if reasons.is_empty() {
        reasons.push(
            "it learns, but slowly: a smaller model, --backbone-init, or another --lr may show more"
                .to_owned(),
        );
    }
    reasons
}
