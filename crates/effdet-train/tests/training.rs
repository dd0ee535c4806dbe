//! The training loop with an engine small enough to compute by hand: a linear model of image means.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use effdet_ckpt::{Checkpoint, CheckpointStore, load_notes, load_tensors};
use effdet_data::dataset::DetectionDataset;
use effdet_data::synthetic::{self, CLASS_NAMES, SyntheticConfig};
use effdet_dist::threads::run_ranks;
use effdet_dist::{ProcessGroup, SingleProcess};
use effdet_model::engine::{
    Engine, EngineError, HeadOutputs, ImageBatch, LevelOutput, Mode, Precision, StepLosses, StepOptions,
    TraceSink, TrainBatch,
};
use effdet_model::hparams::{HParams, ImageSize, OptimizerKind};
use effdet_model::label_map::LabelMap;
use effdet_model::network::Network;
use effdet_model::weights::Weights;
use effdet_train::error::TrainError;
use effdet_train::eval::Evaluator;
use effdet_train::events::{Event, EventSink};
use effdet_train::guard::OnNonFinite;
use effdet_train::modes::EvaluationRule;
use effdet_train::requests::Requests;
use effdet_train::trainer::{EarlyStop, Ending, Outcome, RunInputs, TrainConfig, TrainState, Trainer};

/// Training images: with updates of 4 an epoch has 3 updates and the next one begins within a pass over the data.
const IMAGES: u64 = 10;

/// Loss `½·mean((w·x − 1)²)` of the means x of each image's channels, on three trainable values of every hundred.
#[derive(Default)]
struct LinearModel {
    calls: usize,
    /// The call whose loss is no number.
    nan_at: Option<usize>,
    /// The first of all calls whose losses are no numbers.
    nan_from: Option<usize>,
    /// Where the gradient is no number as well.
    nan_in_gradient: bool,
    /// Loss scale above which gradients are no numbers.
    overflows_above: Option<f32>,
    anchors_per_cell: usize,
}

impl Engine for LinearModel {
    fn train_step(
        &mut self,
        weights: &mut Weights,
        batch: &TrainBatch<'_>,
        options: &StepOptions<'_>,
        gradients: &mut [f32],
    ) -> Result<StepLosses, EngineError> {
        self.calls += 1;
        gradients.fill(0.0);
        let pixels = batch.images.height * batch.images.width;
        let share = 1.0 / batch.images.batch as f32;
        let mut loss = 0.0;
        for image in batch.images.pixels.chunks_exact(3 * pixels) {
            let mean = |channel: usize| image.iter().skip(channel).step_by(3).sum::<f32>() / pixels as f32;
            let x = [mean(0), mean(1), mean(2)];
            let w = &weights.trainable;
            let error = (0..3).map(|i| w[100 * i] * x[i]).sum::<f32>() - 1.0;
            loss += share * 0.5 * error * error;
            for i in 0..3 {
                gradients[100 * i] += options.loss_scale * share * error * x[i];
            }
            for statistic in weights.statistics.iter_mut().take(3) {
                *statistic = 0.9 * *statistic + 0.1 * x[0];
            }
        }
        if self.overflows_above.is_some_and(|most| options.loss_scale > most) {
            gradients[200] = f32::INFINITY;
        }
        if self.nan_at == Some(self.calls) {
            match self.nan_in_gradient {
                true => gradients[100] = f32::NAN,
                false => loss = f32::NAN,
            }
        }
        if self.nan_from.is_some_and(|first| self.calls >= first) {
            loss = f32::NAN;
        }
        Ok(StepLosses {
            class_loss: loss,
            det_loss: loss,
            ..StepLosses::default()
        })
    }

    /// One level of one cell whose scores are those of the first values.
    fn infer(
        &mut self,
        weights: &Weights,
        images: &ImageBatch<'_>,
        outputs: &mut HeadOutputs,
    ) -> Result<(), EngineError> {
        let level = |cells: usize| LevelOutput {
            height: cells,
            width: cells,
            class_logits: vec![
                weights.trainable[0] - 3.0;
                images.batch * cells * cells * self.anchors_per_cell * CLASS_NAMES.len()
            ],
            box_codes: vec![0.0; images.batch * cells * cells * self.anchors_per_cell * 4],
        };
        outputs.batch = images.batch;
        outputs.levels = [8, 4, 2, 1, 1].map(level).into();
        Ok(())
    }

    fn trace(
        &mut self,
        _: &Weights,
        _: &ImageBatch<'_>,
        _: Mode,
        _: &mut TraceSink<'_>,
    ) -> Result<(), EngineError> {
        Ok(())
    }
}

/// Asks a run to stop after a step, and notes what it hears.
struct StopAfter {
    step: u64,
    requests: Arc<Requests>,
    stop_in_evaluation: bool,
    heard: Vec<String>,
}

impl EventSink for StopAfter {
    fn event(&mut self, event: &Event<'_>) -> Result<(), TrainError> {
        match event {
            Event::Step(record) => {
                self.heard.push(format!("step {}", record.step));
                if record.step == self.step {
                    self.requests.stop.store(true, Ordering::Relaxed);
                }
            }
            Event::Started {
                step, total_steps, ..
            } => {
                self.heard.push(format!("started {step}/{total_steps}"));
            }
            Event::Saved { step, .. } => self.heard.push(format!("saved {step}")),
            Event::Evaluated { step, .. } => self.heard.push(format!("evaluated {step}")),
            Event::Finished { step, .. } => self.heard.push(format!("finished {step}")),
            Event::LossScaled {
                step,
                scale,
                skipped_steps,
                ..
            } => {
                self.heard
                    .push(format!("scale {scale} after {step}, {skipped_steps} skipped"));
            }
            Event::Evaluating { .. } if self.stop_in_evaluation => {
                self.requests.stop.store(true, Ordering::Relaxed);
            }
            Event::Evaluating { .. } => {}
            Event::Warning(text) => self.heard.push(format!("warning: {text}")),
        }
        Ok(())
    }
}

/// A run to be: the smallest network, rendered images, 2 epochs of 3 updates of 2 micro-batches of 2 images.
struct Scene {
    network: Network,
    config: TrainConfig,
    data: Arc<DetectionDataset>,
    label_map: LabelMap,
    engine: LinearModel,
    evaluated_images: u64,
    stop_in_evaluation: bool,
    folder: tempfile::TempDir,
}

impl Scene {
    fn new(change: impl Fn(&mut HParams)) -> Self {
        let mut hparams = HParams::preset("efficientdet-lite0").unwrap();
        (hparams.num_classes, hparams.image_size) = (CLASS_NAMES.len(), ImageSize::square(64));
        (
            hparams.fpn_num_filters,
            hparams.fpn_cell_repeats,
            hparams.box_class_repeats,
        ) = (8, 1, 1);
        (hparams.num_epochs, hparams.lr_warmup_epoch) = (2.0, 0.5);
        (hparams.learning_rate, hparams.lr_warmup_init) = (0.1, 0.01);
        change(&mut hparams);
        hparams.validate().unwrap();
        Self {
            engine: LinearModel {
                anchors_per_cell: hparams.anchors_per_cell(),
                ..LinearModel::default()
            },
            network: Network::new(&hparams).unwrap(),
            config: TrainConfig {
                batch_size: 2,
                ranks: 1,
                half_gradients: false,
                sync_bn: false,
                accumulate: 2,
                num_examples_per_epoch: None,
                max_steps: None,
                checkpoint_period: 0,
                checkpoint_every_steps: None,
                keep_last: 2,
                rule: EvaluationRule::Never,
                early_stop: None,
                precision: Precision::Fp32,
                seed: 5,
                workers: 0,
                use_fake_data: false,
                on_nonfinite: OnNonFinite::Stop,
                schedule_shift: 0,
                keep_best: 1,
                keep_every: None,
            },
            data: images(0..IMAGES),
            label_map: LabelMap::from_names(CLASS_NAMES),
            evaluated_images: 0,
            stop_in_evaluation: false,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn start(&self) -> TrainState {
        TrainState::new(&self.network, Weights::init(&self.network.variables, 7)).unwrap()
    }

    fn run(&mut self, state: &mut TrainState, stop_after: u64) -> (Result<Outcome, TrainError>, Vec<String>) {
        self.run_as(&SingleProcess, state, stop_after)
    }

    fn run_as(
        &mut self,
        group: &dyn ProcessGroup,
        state: &mut TrainState,
        stop_after: u64,
    ) -> (Result<Outcome, TrainError>, Vec<String>) {
        let requests = Arc::new(Requests::default());
        let mut sink = StopAfter {
            step: stop_after,
            requests: Arc::clone(&requests),
            stop_in_evaluation: self.stop_in_evaluation,
            heard: Vec::new(),
        };
        let evaluator = (self.evaluated_images > 0).then(|| Evaluator {
            dataset: images(100..100 + self.evaluated_images),
            hparams: self.network.hparams.clone(),
            label_map: self.label_map.clone(),
            batch_size: 2,
            workers: 0,
            only_images_with_detections: false,
        });
        let mut inputs = RunInputs {
            network: &self.network,
            engine: &mut self.engine,
            train: Arc::clone(&self.data),
            cache: None,
            evaluator,
            label_map: self.label_map.clone(),
            group,
            checkpoints: self.folder.path().to_path_buf(),
            requests,
        };
        let trainer = Trainer::new(&self.config, &self.network, self.data.examples.len());
        let outcome = trainer.run(&mut inputs, state, &mut [&mut sink]);
        (outcome, sink.heard)
    }

    fn latest(&self) -> Checkpoint {
        let latest = CheckpointStore::new(self.folder.path()).load_latest(&self.network.variables);
        latest.unwrap().checkpoint.unwrap()
    }

    fn saved_steps(&self) -> Vec<u64> {
        let listing = CheckpointStore::new(self.folder.path()).list().unwrap();
        listing
            .complete
            .iter()
            .map(|reader| reader.state().step)
            .collect()
    }
}

fn images(range: std::ops::Range<u64>) -> Arc<DetectionDataset> {
    let config = SyntheticConfig {
        image_size: 64,
        ..SyntheticConfig::default()
    };
    Arc::new(synthetic::dataset(&config, range))
}

fn folder_bytes(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join("step-00000006").join(name)).unwrap()
}

fn a_cut_run_equals_a_whole_one(change: impl Fn(&mut HParams) + Copy, cuts: &[u64]) {
    let mut whole = Scene::new(change);
    let mut expected = whole.start();
    whole.run(&mut expected, u64::MAX).0.unwrap();
    assert_eq!((expected.step, expected.sample_position), (6, 24));
    for &cut in cuts {
        let mut scene = Scene::new(change);
        let mut state = scene.start();
        assert_eq!(scene.run(&mut state, cut).0.unwrap().ending, Ending::Interrupted);
        let checkpoint = scene.latest();
        assert_eq!(
            (checkpoint.state.step, checkpoint.state.sample_position),
            (cut, 4 * cut)
        );
        let mut resumed = TrainState::from_checkpoint(&scene.network, checkpoint).unwrap();
        assert_eq!(resumed, state, "a checkpoint holds the whole state, cut at {cut}");
        let outcome = scene.run(&mut resumed, u64::MAX).0.unwrap();
        assert_eq!(outcome.ending, Ending::Complete);
        assert_eq!(resumed, expected, "cut at {cut}");
        for name in [
            "weights.safetensors",
            "ema.safetensors",
            "momentum.safetensors",
            "manifest.json",
        ] {
            assert_eq!(
                folder_bytes(scene.folder.path(), name),
                folder_bytes(whole.folder.path(), name),
                "{name}, cut at {cut}"
            );
        }
    }
}

#[test]
fn a_run_cut_at_any_step_ends_with_the_bits_of_an_uninterrupted_one() {
    a_cut_run_equals_a_whole_one(|_| (), &[1, 3, 5]);
}

#[test]
fn the_same_holds_for_adam() {
    a_cut_run_equals_a_whole_one(|h| h.optimizer = OptimizerKind::Adam, &[4]);
}

#[test]
fn a_loss_scale_that_overflows_nothing_leaves_the_bits_alone() {
    let mut plain = Scene::new(|_| ());
    let mut scaled = Scene::new(|_| ());
    scaled.config.precision = Precision::Fp16;
    let (mut a, mut b) = (plain.start(), scaled.start());
    plain.run(&mut a, u64::MAX).0.unwrap();
    scaled.run(&mut b, u64::MAX).0.unwrap();
    assert_eq!(a.weights, b.weights);
    assert_eq!(a.average, b.average);
    let saved = scaled.latest().state.loss_scale.unwrap();
    assert_eq!(
        (saved.scale, saved.clean_steps, saved.skipped_steps),
        (32_768.0, 6, 0)
    );
    assert!(plain.latest().state.loss_scale.is_none());
}

#[test]
fn overflowing_updates_are_skipped_count_as_steps_and_halve_the_scale() {
    let mut scene = Scene::new(|_| ());
    scene.config.precision = Precision::Fp16;
    scene.engine.overflows_above = Some(8_192.0);
    let mut state = scene.start();
    let start = state.clone();
    let (_, heard) = scene.run(&mut state, 2);
    assert_eq!(state.weights, start.weights);
    assert_eq!(state.average, start.average);
    assert_eq!(state.optimizer, start.optimizer);
    assert_eq!((state.step, state.sample_position), (2, 8));
    assert!(
        heard.contains(&"scale 16384 after 1, 1 skipped".to_owned()),
        "{heard:?}"
    );
    assert!(
        heard.contains(&"scale 8192 after 2, 2 skipped".to_owned()),
        "{heard:?}"
    );

    let mut resumed = TrainState::from_checkpoint(&scene.network, scene.latest()).unwrap();
    assert_eq!(resumed, state);
    scene.run(&mut resumed, u64::MAX).0.unwrap();
    let mut whole = Scene::new(|_| ());
    whole.config.precision = Precision::Fp16;
    whole.engine.overflows_above = Some(8_192.0);
    let mut expected = whole.start();
    whole.run(&mut expected, u64::MAX).0.unwrap();
    assert_eq!(resumed, expected);
    assert_ne!(expected.weights, start.weights);
    let scale = expected.loss_scale.unwrap();
    assert_eq!((scale.scale(), scale.skipped_steps()), (8_192.0, 2));
}

#[test]
fn gradients_that_overflow_at_every_scale_end_the_run() {
    let mut scene = Scene::new(|h| h.num_epochs = 10.0);
    scene.config.precision = Precision::Fp16;
    scene.engine.overflows_above = Some(0.5);
    let mut state = scene.start();
    let error = scene.run(&mut state, u64::MAX).0.unwrap_err();
    assert!(
        matches!(&error, TrainError::NonFinite { found, .. } if found.step == 15),
        "{error}"
    );
}

#[test]
fn loader_threads_leave_the_bits_alone() {
    let mut one = Scene::new(|_| ());
    let mut two = Scene::new(|_| ());
    two.config.workers = 2;
    let (mut a, mut b) = (one.start(), two.start());
    one.run(&mut a, u64::MAX).0.unwrap();
    two.run(&mut b, u64::MAX).0.unwrap();
    assert_eq!(a, b);
}

#[test]
fn accumulated_micro_batches_equal_one_large_batch() {
    let mut micro = Scene::new(|_| ());
    let mut large = Scene::new(|_| ());
    (large.config.batch_size, large.config.accumulate) = (4, 1);
    let (mut a, mut b) = (micro.start(), large.start());
    micro.run(&mut a, u64::MAX).0.unwrap();
    large.run(&mut b, u64::MAX).0.unwrap();
    assert_eq!((a.step, micro.engine.calls, large.engine.calls), (b.step, 12, 6));
    let start = micro.start();
    for i in [0, 100, 200] {
        let (a, b, start) = (
            a.weights.trainable[i],
            b.weights.trainable[i],
            start.weights.trainable[i],
        );
        assert!((a - b).abs() < 1e-6, "{a} and {b}");
        assert!((a - start).abs() > 1e-3, "{start} moved to {a}");
    }
}

#[test]
fn a_loss_or_gradient_that_is_no_number_stops_the_run_before_the_update() {
    for nan_in_gradient in [false, true] {
        let mut scene = Scene::new(|_| ());
        // The second micro-batch of the third update.
        (scene.engine.nan_at, scene.engine.nan_in_gradient) = (Some(6), nan_in_gradient);
        let mut state = scene.start();
        let error = scene.run(&mut state, u64::MAX).0.unwrap_err();
        let TrainError::NonFinite { found, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!((found.step, found.images.len()), (2, 4));
        assert!(error.to_string().contains("learning rate"), "{error}");

        let mut expected = Scene::new(|_| ());
        let mut before = expected.start();
        expected.run(&mut before, 2).0.unwrap();
        assert_eq!(state, before);
    }
}

#[test]
fn a_step_that_is_no_number_leaves_its_batch_for_replay_and_the_state_before_it() {
    let mut scene = Scene::new(|_| ());
    scene.engine.nan_at = Some(6);
    let mut state = scene.start();
    let error = scene.run(&mut state, u64::MAX).0.unwrap_err().to_string();
    assert_eq!(scene.latest().state.step, 2, "saved before the run ended");
    let dumps = fs::read_dir(scene.folder.path()).unwrap();
    let dump = dumps
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .unwrap();
    assert!(error.contains(dump.to_str().unwrap()), "{error}");
    let (tensors, notes) = (load_tensors(&dump).unwrap(), load_notes(&dump).unwrap());
    assert_eq!(tensors.by_name["pixels"].shape, [2, 64, 64, 3]);
    // Of the four images of the update the two of the micro-batch that went wrong.
    assert_eq!(notes["image_ids"].split(' ').count(), 2);
    assert_eq!(notes["step"], "2");
}

#[test]
fn a_batch_that_is_no_number_is_skipped_and_the_schedule_waits_for_it() {
    let mut scene = Scene::new(|_| ());
    (scene.engine.nan_at, scene.config.on_nonfinite) = (Some(6), OnNonFinite::SkipStep);
    let mut state = scene.start();
    let (outcome, heard) = scene.run(&mut state, u64::MAX);
    assert_eq!(outcome.unwrap().step, 6);
    // Six updates of four images and the one that was left out.
    assert_eq!((state.sample_position, scene.engine.calls), (28, 14));
    assert!(state.weights.trainable.iter().all(|value| value.is_finite()));
    let average = state.average.as_ref().unwrap();
    assert!(
        average
            .trainable
            .iter()
            .chain(&average.statistics)
            .all(|v| v.is_finite())
    );
    assert_eq!(
        heard.iter().filter(|h| h.starts_with("warning: step 2")).count(),
        1
    );

    let mut hopeless = Scene::new(|_| ());
    (hopeless.engine.nan_from, hopeless.config.on_nonfinite) = (Some(1), OnNonFinite::SkipStep);
    let error = hopeless.run(&mut hopeless.start(), u64::MAX).0.unwrap_err();
    assert!(matches!(error, TrainError::NonFinite { .. }), "{error}");
}

#[test]
fn a_rewound_run_goes_on_from_its_checkpoint_behind_the_batch() {
    let mut scene = Scene::new(|_| ());
    (scene.engine.nan_at, scene.config.on_nonfinite) = (Some(10), OnNonFinite::Rewind);
    scene.config.checkpoint_every_steps = Some(2);
    let mut state = scene.start();
    let (outcome, heard) = scene.run(&mut state, u64::MAX);
    assert_eq!(outcome.unwrap().step, 6);
    // The fifth update fails; steps 5 and 6 follow from checkpoint 4 with what lies behind its samples.
    assert_eq!(state.sample_position, 4 * 7);
    let steps: Vec<&String> = heard.iter().filter(|h| h.starts_with("step")).collect();
    assert_eq!(steps.len(), 6, "{steps:?}");

    let mut without = Scene::new(|_| ());
    (without.engine.nan_at, without.config.on_nonfinite) = (Some(4), OnNonFinite::Rewind);
    let error = without.run(&mut without.start(), u64::MAX).0.unwrap_err();
    assert!(
        matches!(error, TrainError::NonFinite { .. }),
        "no checkpoint to go back to: {error}"
    );
}

#[test]
fn a_run_stopped_in_an_evaluation_makes_it_first_when_it_goes_on() {
    let evaluating = |stop| {
        let mut scene = Scene::new(|_| ());
        scene.evaluated_images = 6;
        scene.stop_in_evaluation = stop;
        scene.config.rule = EvaluationRule::Every(1);
        scene
    };
    let mut whole = evaluating(false);
    let mut expected = whole.start();
    let outcome = whole.run(&mut expected, u64::MAX).0.unwrap();

    let mut scene = evaluating(true);
    let mut state = scene.start();
    let (outcome_cut, heard) = scene.run(&mut state, u64::MAX);
    assert_eq!(outcome_cut.unwrap().ending, Ending::Interrupted);
    assert_eq!(heard[heard.len() - 3..], ["step 3", "saved 3", "finished 3"]);
    scene.stop_in_evaluation = false;
    let mut state = TrainState::from_checkpoint(&scene.network, scene.latest()).unwrap();
    assert!(state.evaluation_due);
    let (resumed, heard) = scene.run(&mut state, u64::MAX);
    assert_eq!(heard[..3], ["started 3/6", "evaluated 3", "saved 3"]);
    assert_eq!(state, expected);
    let stats = |outcome: Outcome| outcome.evaluation.unwrap().summary.stats;
    assert_eq!(stats(resumed.unwrap()), stats(outcome));
}

#[test]
fn another_batch_size_keeps_the_place_in_the_stream_and_in_the_schedule() {
    // Two epochs of five updates of two images.
    let mut scene = Scene::new(|_| ());
    scene.config.accumulate = 1;
    let mut state = scene.start();
    scene.run(&mut state, 4).0.unwrap();
    let mut state = TrainState::from_checkpoint(&scene.network, scene.latest()).unwrap();
    assert_eq!((state.step, state.sample_position), (4, 8));

    // Of five images: eight samples are one update and a part of the next.
    scene.config =
        scene
            .config
            .with_batch_size(5, scene.data.examples.len(), state.step, state.sample_position);
    assert_eq!(scene.config.schedule_shift, 3);
    let (outcome, heard) = scene.run(&mut state, u64::MAX);
    // One of the four updates of two epochs is made.
    assert_eq!((outcome.unwrap().step, state.sample_position), (7, 8 + 3 * 5));
    assert_eq!(heard[0], "started 4/7");
}

#[test]
fn events_come_in_the_order_of_the_run_and_checkpoints_as_configured() {
    let mut scene = Scene::new(|_| ());
    (
        scene.config.checkpoint_period,
        scene.config.checkpoint_every_steps,
    ) = (1, Some(2));
    let (outcome, heard) = {
        let mut state = scene.start();
        scene.run(&mut state, u64::MAX)
    };
    assert_eq!(outcome.unwrap().ending, Ending::Complete);
    let expected = [
        "started 0/6",
        "step 1",
        "step 2",
        "saved 2",
        "step 3",
        "saved 3",
        "step 4",
        "saved 4",
        "step 5",
        "step 6",
        "saved 6",
        "finished 6",
    ];
    assert_eq!(heard, expected);
    assert_eq!(scene.saved_steps(), [4, 6], "the last two are kept");
}

#[test]
fn a_run_stops_when_its_metric_does_not_improve_and_stays_stopped() {
    let mut scene = Scene::new(|h| h.num_epochs = 20.0);
    scene.evaluated_images = 2;
    scene.config.rule = EvaluationRule::Every(1);
    scene.config.keep_last = 1;
    scene.config.early_stop = Some(EarlyStop {
        metric: "AP50".into(),
        patience: 2,
    });
    let mut state = scene.start();
    // The model's scores are the same everywhere, so that the first evaluation is the best.
    let (outcome, heard) = scene.run(&mut state, u64::MAX);
    assert_eq!(outcome.unwrap().ending, Ending::EarlyStopped);
    let evaluated: Vec<&String> = heard.iter().filter(|text| text.starts_with("eval")).collect();
    assert_eq!(evaluated, ["evaluated 3", "evaluated 6", "evaluated 9"]);
    assert_eq!(scene.saved_steps(), [9]);

    let checkpoint = scene.latest();
    let mut resumed = TrainState::from_checkpoint(&scene.network, checkpoint).unwrap();
    let (outcome, heard) = scene.run(&mut resumed, u64::MAX);
    assert_eq!(outcome.unwrap().ending, Ending::EarlyStopped);
    assert_eq!(heard, ["started 9/60", "finished 9"]);
}

#[test]
fn the_number_of_steps_can_be_limited_without_changing_the_schedule() {
    let mut scene = Scene::new(|_| ());
    scene.config.max_steps = Some(2);
    let mut limited = scene.start();
    scene.run(&mut limited, u64::MAX).0.unwrap();
    let mut other = Scene::new(|_| ());
    let mut cut = other.start();
    other.run(&mut cut, 2).0.unwrap();
    assert_eq!(limited, cut);
}

#[test]
fn a_checkpoint_of_another_optimiser_is_refused() {
    let mut scene = Scene::new(|_| ());
    let mut state = scene.start();
    scene.run(&mut state, 1).0.unwrap();
    let adam = Scene::new(|h| h.optimizer = OptimizerKind::Adam);
    let error = TrainState::from_checkpoint(&adam.network, scene.latest())
        .unwrap_err()
        .to_string();
    assert!(error.contains("adam_m"), "{error}");
}

const DEADLINE: std::time::Duration = std::time::Duration::from_secs(60);

/// Runs one scene per rank; every rank's final state, events and saved steps.
fn on_ranks(size: usize, change: impl Fn(&mut TrainConfig) + Sync) -> Vec<(TrainState, Outcome, Vec<u64>)> {
    run_ranks(size, DEADLINE, |group| {
        let mut scene = Scene::new(|_| ());
        change(&mut scene.config);
        scene.evaluated_images = if scene.config.rule == EvaluationRule::Never {
            0
        } else {
            5
        };
        // What rank 0 starts from counts.
        let mut state = scene.start();
        state.weights.trainable[0] += group.rank() as f32;
        let outcome = scene.run_as(group, &mut state, u64::MAX).0.unwrap();
        (state, outcome, scene.saved_steps())
    })
}

#[test]
fn ranks_that_share_a_batch_compute_what_one_process_does_and_agree_in_every_bit() {
    let evaluated = EvaluationRule::Every(0);
    let alone = on_ranks(1, |config| config.rule = evaluated);
    // An even division, and batches of 2 on 2 ranks started as 1 each.
    for (size, batch_size, ranks) in [(2, 2, 1), (2, 1, 2)] {
        let together = on_ranks(size, |config| {
            (config.rule, config.batch_size, config.ranks) = (evaluated, batch_size, ranks);
        });
        let (state, outcome, saved) = &together[0];
        assert!(together.iter().all(|(other, ..)| other == state), "{size} ranks");
        assert_eq!(
            (saved, &together[1].2),
            (&alone[0].2, &vec![]),
            "rank 0 alone writes"
        );
        assert_eq!((state.step, state.sample_position), (6, 24));
        let reference = &alone[0].0;
        for i in [0, 100, 200] {
            let (a, b) = (state.weights.trainable[i], reference.weights.trainable[i]);
            assert!((a - b).abs() < 1e-6, "{a} and {b}");
        }
        let evaluation = outcome.evaluation.as_ref().unwrap();
        let (rows, expected) = (
            &evaluation.detections,
            &alone[0].1.evaluation.as_ref().unwrap().detections,
        );
        let ids =
            |rows: &[effdet_metrics::DetectionRow]| rows.iter().map(|row| row.image_id).collect::<Vec<_>>();
        assert_eq!(ids(rows), ids(expected), "every image once, in order");
    }
}

#[test]
fn batches_that_do_not_divide_weigh_every_image_the_same() {
    let change = |config: &mut TrainConfig| (config.batch_size, config.accumulate) = (3, 1);
    let (alone, three) = (on_ranks(1, change), on_ranks(2, change));
    for i in [0, 100, 200] {
        let (a, b) = (three[0].0.weights.trainable[i], alone[0].0.weights.trainable[i]);
        assert!((a - b).abs() < 1e-6, "{a} and {b}");
    }
    assert_eq!(three[0].0.sample_position, alone[0].0.sample_position);
}

#[test]
fn ranks_repeat_their_bits_from_run_to_run() {
    for half_gradients in [false, true] {
        let run = || {
            on_ranks(3, |config| {
                (config.batch_size, config.half_gradients) = (4, half_gradients)
            })
        };
        let (first, second) = (run(), run());
        assert!(first.iter().zip(&second).all(|(a, b)| a.0 == b.0));
    }
}

#[test]
fn more_ranks_than_images_of_a_batch_are_refused() {
    let errors = run_ranks(3, DEADLINE, |group| {
        let mut scene = Scene::new(|_| ());
        let mut state = scene.start();
        scene
            .run_as(group, &mut state, u64::MAX)
            .0
            .unwrap_err()
            .to_string()
    });
    assert!(
        errors.iter().all(|text| text.contains("at most 2 ranks")),
        "{errors:?}"
    );
}

#[test]
fn a_request_to_one_rank_stops_all_at_the_same_step_with_one_checkpoint() {
    let results = run_ranks(2, DEADLINE, |group| {
        let mut scene = Scene::new(|_| ());
        let mut state = scene.start();
        let stop_after = if group.rank() == 1 { 3 } else { u64::MAX };
        let outcome = scene.run_as(group, &mut state, stop_after).0.unwrap();
        (outcome.ending, outcome.step, scene.saved_steps())
    });
    assert_eq!(results[0], (Ending::Interrupted, 3, vec![3]));
    assert_eq!(results[1], (Ending::Interrupted, 3, vec![]));
}

#[test]
fn a_run_goes_on_with_fewer_ranks_at_the_right_sample() {
    let cut = run_ranks(2, DEADLINE, |group| {
        let mut scene = Scene::new(|_| ());
        (scene.config.batch_size, scene.config.ranks) = (1, 2);
        let mut state = scene.start();
        scene.run_as(group, &mut state, 3).0.unwrap();
        (group.rank() == 0).then(|| scene.latest())
    });
    let checkpoint = cut.into_iter().next().flatten().unwrap();
    let mut scene = Scene::new(|_| ());
    (scene.config.batch_size, scene.config.ranks) = (1, 2);
    let mut state = TrainState::from_checkpoint(&scene.network, checkpoint).unwrap();
    assert_eq!((state.step, state.sample_position), (3, 12));
    scene.run(&mut state, u64::MAX).0.unwrap();
    let alone = &on_ranks(1, |_| ())[0].0;
    assert_eq!(
        (state.step, state.sample_position),
        (alone.step, alone.sample_position)
    );
    for i in [0, 100, 200] {
        let (a, b) = (state.weights.trainable[i], alone.weights.trainable[i]);
        assert!((a - b).abs() < 1e-6, "{a} and {b}");
    }
}

#[test]
fn a_loss_of_one_rank_that_is_no_number_stops_all_with_the_images_of_all() {
    let errors = run_ranks(2, DEADLINE, |group| {
        let mut scene = Scene::new(|_| ());
        (scene.engine.nan_at, scene.engine.nan_in_gradient) = ((group.rank() == 1).then_some(3), false);
        let mut state = scene.start();
        scene.run_as(group, &mut state, u64::MAX).0.unwrap_err()
    });
    for error in errors {
        let TrainError::NonFinite { found, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!((found.step, found.images.len()), (1, 4));
    }
}
