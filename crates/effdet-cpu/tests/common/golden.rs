//! The numbers of `golden.json`, section `network_and_training`, and what an engine must do to reproduce them.
//!
//! They were measured on the reference implementation (D0, 91 classes, 128×128, batch 4). Inputs and weights come from a hash of
//! their indices, see [`hashed`]. Each check prints the largest error of each group of numbers.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::assign::Assigner;
use effdet_model::engine::{
    Engine, HeadOutputs, ImageBatch, Mode, StepLosses, StepOptions, Targets, TrainBatch,
};
use effdet_model::hparams::{HParams, ImageSize};
use effdet_model::loss::{HeadSlices, LossConfig, detection_loss, normalizer};
use effdet_model::network::{Network, Variable, VariableKind};
use effdet_model::weights::Weights;
use serde_json::Value;

use super::worst::Worst;

/// Images of the golden batch.
pub const BATCH: usize = 4;
/// Side of the golden images in pixels.
pub const SIDE: usize = 128;

/// Index that stands for the images in [`hashed`].
const IMAGE_KEY: u64 = 99_999;
const WEIGHT_DECAY: f64 = 4e-5;
const CLIP_NORM: f64 = 10.0;

/// Defines one test per group of golden numbers for the engine that a closure over `Arc<Network>` makes.
#[macro_export]
macro_rules! golden_tests {
    ($make:expr) => {
        mod golden {
            use effdet_model::engine::Engine;

            use super::*;
            use $crate::common::golden;

            fn engine() -> impl Engine {
                #[allow(clippy::redundant_closure_call)]
                ($make)(golden::network())
            }

            #[test]
            fn stage_outputs_in_inference_are_those_of_the_reference() {
                golden::check_inference(&mut engine());
            }

            #[test]
            fn head_outputs_in_training_are_those_of_the_reference() {
                golden::check_training_forward(&mut engine());
            }

            #[test]
            fn losses_of_inference_outputs_are_those_of_the_reference() {
                golden::check_losses(&mut engine());
            }

            #[test]
            fn gradients_are_those_of_the_reference_in_float64() {
                golden::check_gradients(&mut engine());
            }

            #[test]
            fn three_optimiser_steps_are_those_of_the_reference() {
                golden::check_steps(&mut engine());
            }
        }
    };
}

/// The section of the golden file.
pub fn golden() -> &'static Value {
    static GOLDEN: LazyLock<Value> = LazyLock::new(|| {
        let text = include_str!("../../../../tests/golden/golden.json");
        serde_json::from_str(text).expect("golden.json is valid JSON")
    });
    &GOLDEN["network_and_training"]
}

/// D0 with 91 classes at 128×128.
pub fn network() -> Arc<Network> {
    let mut hparams = HParams::preset("efficientdet-d0").unwrap();
    hparams.image_size = ImageSize::square(SIDE);
    Arc::new(Network::new(&hparams).unwrap())
}

/// The deterministic number in [−1, 1) of element `element` of tensor `key`.
pub fn hashed(key: u64, element: usize) -> f64 {
    let mut x = (key as u32)
        .wrapping_mul(1_000_003)
        .wrapping_add((element as u32).wrapping_mul(7919))
        .wrapping_add(12_345);
    x = x.wrapping_mul(2_654_435_761);
    x ^= x >> 16;
    x = x.wrapping_mul(2_246_822_519);
    x ^= x >> 13;
    2.0 * f64::from(x) / 4_294_967_296.0 - 1.0
}

/// Weights by [`hashed`], scaled so that activations keep their size through the network.
pub fn weights(network: &Network) -> Weights {
    let mut weights = Weights::zeros(&network.variables);
    for (index, variable) in network.variables.iter().enumerate() {
        let values = weights.slice_mut(variable.kind, variable.range());
        for (element, value) in values.iter_mut().enumerate() {
            *value = initial(variable, hashed(index as u64, element)) as f32;
        }
    }
    weights
}

fn initial(variable: &Variable, s: f64) -> f64 {
    let shape = &variable.shape;
    match variable.leaf() {
        "depthwise_kernel" => s * 1.35 * (3.0 / (shape[0] * shape[1]) as f64).sqrt(),
        "kernel" | "pointwise_kernel" => {
            let gain = if variable.name.contains("project") {
                1.45
            } else {
                1.3
            };
            s * gain * (3.0 / (shape[0] * shape[1] * shape[2]) as f64).sqrt()
        }
        "gamma" => 1.0 + 0.1 * s,
        "beta" | "moving_mean" => 0.1 * s,
        "moving_variance" => 1.0 + 0.5 * s,
        "bias" if variable.name.contains("class-predict") => 0.1 * s - 99f64.ln(),
        "bias" => 0.1 * s,
        leaf => {
            assert!(leaf.starts_with("WSM"), "no formula for {}", variable.name);
            1.0 + 0.5 * s
        }
    }
}

/// The golden images.
pub fn pixels() -> Vec<f32> {
    (0..BATCH * SIDE * SIDE * 3)
        .map(|element| hashed(IMAGE_KEY, element) as f32)
        .collect()
}

fn images(pixels: &[f32]) -> ImageBatch<'_> {
    ImageBatch {
        pixels,
        batch: BATCH,
        height: SIDE,
        width: SIDE,
    }
}

/// Targets of the golden batch.
pub struct Labels {
    class_targets: Vec<i32>,
    box_targets: Vec<f32>,
    positives: Vec<usize>,
}

impl Labels {
    /// As an engine takes them.
    pub fn targets(&self) -> Targets<'_> {
        Targets {
            class_targets: &self.class_targets,
            box_targets: &self.box_targets,
            normalizer: normalizer(self.positives.iter().sum()),
        }
    }
}

/// Assigns the golden boxes to `anchors`.
pub fn labels(anchors: &Anchors) -> Labels {
    // Boxes and data-set ids (class index + 1) of each image.
    let objects: [(&[[f32; 4]], &[i32]); BATCH] = [
        (
            &[
                [10.0, 20.0, 60.0, 90.0],
                [5.5, 3.25, 20.0, 25.0],
                [64.0, 64.0, 127.0, 127.0],
                [100.0, 2.0, 104.0, 6.0],
            ],
            &[1, 18, 90, 3],
        ),
        (&[[0.0, 0.0, 127.0, 127.0], [30.0, 30.0, 62.0, 62.0]], &[7, 44]),
        (&[], &[]),
        (
            &[
                [16.0, 32.0, 48.0, 64.0],
                [16.0, 32.0, 48.0, 64.0],
                [70.0, 10.0, 73.0, 120.0],
            ],
            &[2, 5, 61],
        ),
    ];
    let assigner = Assigner::new(anchors);
    let mut labels = Labels {
        class_targets: vec![0; BATCH * anchors.len()],
        box_targets: vec![0.0; 4 * BATCH * anchors.len()],
        positives: Vec::new(),
    };
    let rows = labels.class_targets.chunks_exact_mut(anchors.len());
    let rows = rows.zip(labels.box_targets.chunks_exact_mut(4 * anchors.len()));
    for ((boxes, ids), (class_targets, box_targets)) in objects.into_iter().zip(rows) {
        let classes: Vec<i32> = ids.iter().map(|id| id - 1).collect();
        labels
            .positives
            .push(assigner.assign(boxes, &classes, class_targets, box_targets));
    }
    let expected = numbers(&golden()["labels"]["num_positives"]);
    let positives: Vec<f64> = labels.positives.iter().map(|&n| n as f64).collect();
    assert_eq!(positives, expected, "positive anchors per image");
    labels
}

fn anchors(network: &Network) -> Anchors {
    Anchors::new(&AnchorConfig::from(&network.hparams)).unwrap()
}

fn numbers(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(number).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

/// Compares one tensor with its golden summary.
fn compare(
    summary: &Value,
    name: &str,
    shape: &[usize],
    values: &[f32],
    single: &mut Worst,
    sums: &mut Worst,
) {
    let expected_shape: Vec<usize> = numbers(&summary["shape"]).iter().map(|&n| n as usize).collect();
    assert_eq!(shape, expected_shape, "shape of {name}");
    assert_eq!(values.len(), shape.iter().product::<usize>(), "values of {name}");
    let at = |what: &str| format!("{name} {what}");
    let value = |index: usize| f64::from(values[index]);
    for (index, expected) in numbers(&summary["first4"]).into_iter().enumerate() {
        single.absolute(&at("first4"), value(index), expected);
    }
    single.absolute(&at("mid"), value(values.len() / 2), number(&summary["mid"]));
    single.absolute(&at("last"), value(values.len() - 1), number(&summary["last"]));
    let extreme = |pick: fn(f32, f32) -> f32| f64::from(values.iter().copied().reduce(pick).unwrap());
    single.absolute(&at("max"), extreme(f32::max), number(&summary["max"]));
    single.absolute(&at("min"), extreme(f32::min), number(&summary["min"]));

    let sum: f64 = values.iter().map(|&v| f64::from(v)).sum();
    let magnitude: f64 = values.iter().map(|&v| f64::from(v.abs())).sum();
    let abs_mean = number(&summary["abs_mean"]);
    sums.relative(&at("abs_mean"), magnitude / values.len() as f64, abs_mean);
    sums.note(
        &at("sum"),
        (sum - number(&summary["sum"])) / (abs_mean * values.len() as f64),
    );
}

/// Outputs of the stages the golden file knows, by golden key.
fn stages(network: &Network) -> Vec<(&'static str, Vec<String>)> {
    let levels = |prefix: &str| {
        network
            .levels
            .iter()
            .map(|l| format!("{prefix}/p{}", l.level))
            .collect()
    };
    let backbone = [5, 1, 2, 3, 4, 5]
        .map(|reduction| format!("backbone/r{reduction}"))
        .to_vec();
    vec![
        ("fwd_backbone", backbone),
        ("fwd_p6p7", vec!["level/p6".into(), "level/p7".into()]),
        ("fwd_fpn", levels(&format!("cell_{}", network.cells.len() - 1))),
        ("fwd_cls", levels("class")),
        ("fwd_box", levels("box")),
    ]
}

type Trace = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn trace(engine: &mut dyn Engine, network: &Network, mode: Mode) -> Trace {
    let mut outputs = Trace::new();
    engine
        .trace(
            &weights(network),
            &images(&pixels()),
            mode,
            &mut |name, shape, values| {
                let earlier = outputs.insert(name.to_owned(), (shape.to_vec(), values.to_vec()));
                assert!(earlier.is_none(), "{name} is traced twice");
            },
        )
        .unwrap();
    outputs
}

fn compare_stage(outputs: &Trace, label: &str, summaries: &Value, names: &[String]) {
    let mut single = Worst::new(format!("{label} single values (absolute)"), 1e-3);
    let mut sums = Worst::new(format!("{label} sums (relative to Σ|x|)"), 1e-4);
    let summaries = summaries.as_array().unwrap();
    assert_eq!(summaries.len(), names.len(), "{label}");
    for (summary, name) in summaries.iter().zip(names) {
        let (shape, values) = outputs
            .get(name)
            .unwrap_or_else(|| panic!("{name} is not traced"));
        compare(summary, name, shape, values, &mut single, &mut sums);
    }
    single.check();
    sums.check();
}

/// `w_first` and `img_first`: whether the generator here is the one of the golden file.
pub fn check_generator() {
    let network = network();
    let weights = weights(&network);
    for (name, expected) in golden()["w_first"].as_object().unwrap() {
        let variable = network.variables.find(name.strip_suffix(":0").unwrap()).unwrap();
        let values = &weights.slice(variable.kind, variable.range())[..3];
        let values: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
        assert_eq!(values, numbers(expected), "{name}");
    }
    let first: Vec<f64> = pixels()[..4].iter().map(|&v| f64::from(v)).collect();
    assert_eq!(first, numbers(&golden()["img_first"]));
}

/// `fwd_*`: every stage in inference, both as `trace` shows it and as `infer` gives it.
pub fn check_inference(engine: &mut dyn Engine) {
    let network = network();
    let mut outputs = trace(engine, &network, Mode::Infer);
    for (key, names) in stages(&network) {
        compare_stage(&outputs, key, &golden()[key], &names);
    }

    let mut heads = HeadOutputs::default();
    engine
        .infer(&weights(&network), &images(&pixels()), &mut heads)
        .unwrap();
    assert_eq!(heads.batch, BATCH);
    assert_eq!(heads.levels.len(), network.levels.len());
    for (level, output) in network.levels.iter().zip(heads.levels) {
        let size = (output.height, output.width);
        assert_eq!(size, (level.map.height, level.map.width), "level {}", level.level);
        for (kind, values) in [("class", output.class_logits), ("box", output.box_codes)] {
            let traced = outputs.get_mut(&format!("{kind}/p{}", level.level)).unwrap();
            assert_eq!(traced.1.len(), values.len(), "{kind} of level {}", level.level);
            traced.1 = values;
        }
    }
    for (key, names) in stages(&network) {
        compare_stage(&outputs, key, &golden()[key], &names);
    }
}

/// `fwd_train_*`: head outputs with batch statistics.
pub fn check_training_forward(engine: &mut dyn Engine) {
    let network = network();
    let outputs = trace(engine, &network, Mode::Train);
    for (key, names) in stages(&network) {
        if let Some(kind) = key
            .strip_prefix("fwd_")
            .filter(|&kind| kind == "cls" || kind == "box")
        {
            let key = format!("fwd_train_{kind}");
            compare_stage(&outputs, &key, &golden()[&key], &names);
        }
    }
}

/// `loss_inference_mode`: losses of the inference outputs.
pub fn check_losses(engine: &mut dyn Engine) {
    let network = network();
    let anchors = anchors(&network);
    let mut heads = HeadOutputs::default();
    engine
        .infer(&weights(&network), &images(&pixels()), &mut heads)
        .unwrap();
    // [image][level] blocks in the order of anchors.
    let flatten = |pick: fn(&effdet_model::engine::LevelOutput) -> &Vec<f32>| -> Vec<f32> {
        let blocks = (0..BATCH).flat_map(|image| {
            heads.levels.iter().flat_map(move |level| {
                let values = pick(level);
                let len = values.len() / BATCH;
                &values[image * len..][..len]
            })
        });
        blocks.copied().collect()
    };
    let losses = detection_loss(
        &LossConfig::from(&network.hparams),
        &anchors,
        &HeadSlices {
            class_logits: &flatten(|level| &level.class_logits),
            box_codes: &flatten(|level| &level.box_codes),
            num_classes: network.hparams.num_classes,
        },
        &labels(&anchors).targets(),
        None,
    )
    .unwrap();
    let mut worst = Worst::new("loss_inference_mode (relative)", 1e-4);
    compare_losses(&mut worst, "inference", losses, &golden()["loss_inference_mode"]);
    worst.check();
}

fn compare_losses(worst: &mut Worst, at: &str, losses: StepLosses, expected: &Value) {
    let pairs = [
        ("cls_loss", losses.class_loss),
        ("box_loss", losses.box_loss),
        ("det_loss", losses.det_loss),
    ];
    for (key, actual) in pairs {
        worst.relative(&format!("{at} {key}"), f64::from(actual), number(&expected[key]));
    }
}

/// A training run on the golden batch.
struct Run<'a> {
    engine: &'a mut dyn Engine,
    network: Arc<Network>,
    weights: Weights,
    labels: Labels,
    pixels: Vec<f32>,
}

impl<'a> Run<'a> {
    fn new(engine: &'a mut dyn Engine) -> Self {
        let network = network();
        let weights = weights(&network);
        let labels = labels(&anchors(&network));
        Self {
            engine,
            network,
            weights,
            labels,
            pixels: pixels(),
        }
    }

    /// Losses, L2 term and gradients of `det_loss + L2` at the present weights; moves the statistics.
    fn differentiate(&mut self) -> (StepLosses, f64, Vec<f32>) {
        let mut gradients = vec![f32::NAN; self.weights.trainable.len()];
        let batch = TrainBatch {
            images: images(&self.pixels),
            targets: self.labels.targets(),
            draw_keys: &[0, 1, 2, 3],
        };
        let options = StepOptions::default();
        let losses = self
            .engine
            .train_step(&mut self.weights, &batch, &options, &mut gradients)
            .unwrap();
        let mut l2 = 0.0;
        for variable in self
            .network
            .variables
            .iter()
            .filter(|variable| variable.is_regularized())
        {
            let range = variable.range();
            let pairs = gradients[range.clone()]
                .iter_mut()
                .zip(&self.weights.trainable[range]);
            for (gradient, &weight) in pairs {
                l2 += 0.5 * WEIGHT_DECAY * f64::from(weight).powi(2);
                *gradient += (WEIGHT_DECAY * f64::from(weight)) as f32;
            }
        }
        (losses, l2, gradients)
    }

    fn trainables(&self) -> impl Iterator<Item = &Variable> {
        self.network
            .variables
            .iter()
            .filter(|variable| variable.kind == VariableKind::Trainable)
    }
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

/// `train_fwd_grads`, against the reference run in float64 throughout.
pub fn check_gradients(engine: &mut dyn Engine) {
    // Source: golden.md, "Gradients: what float32 can and cannot reproduce".
    const NORMS: [(&str, f64); 6] = [
        ("stem_conv2d/kernel", 299.27713),
        ("stack_3/block_1/depthwise_conv2d/depthwise_kernel", 42.753_218),
        ("resample_p6/conv2d/kernel", 90.692_673),
        ("class_net/class-predict/bias", 0.550_235_03),
        ("box_net/box-predict/bias", 0.417_726_85),
        ("fpn_cells/cell_0/fnode0/WSM", 0.126_142_35),
    ];
    let mut run = Run::new(engine);
    let (losses, l2, gradients) = run.differentiate();

    let mut total = Worst::new("train_fwd_grads total loss (relative)", 1e-4);
    total.relative("total", f64::from(losses.det_loss) + l2, 14.670_829);
    total.check();

    let mut norms = Worst::new("train_fwd_grads norms (relative)", 3e-4);
    norms.relative("raw_global_norm", norm(&gradients), 1207.3320);
    let largest = run
        .trainables()
        .map(|v| norm(&gradients[v.range()]))
        .fold(0.0, f64::max);
    norms.relative("max_var_norm", largest, 358.8830);
    let mut fusion = Worst::new("train_fwd_grads fusion weights (relative)", 5e-3);
    for (name, expected) in NORMS {
        let variable = run.network.variables.find(name).unwrap();
        let group = if name.ends_with("WSM") {
            &mut fusion
        } else {
            &mut norms
        };
        group.relative(name, norm(&gradients[variable.range()]), expected);
    }
    norms.check();
    fusion.check();

    let clipped = run
        .trainables()
        .filter(|v| norm(&gradients[v.range()]) > CLIP_NORM)
        .count();
    assert_eq!(
        clipped as f64,
        number(&golden()["train_fwd_grads"]["nvars_norm_gt10"])
    );
}

/// `train_steps`: three steps of the reference's optimiser.
pub fn check_steps(engine: &mut dyn Engine) {
    const MOMENTUM: f32 = 0.93;
    const EMA_DECAY: f64 = 0.999;
    let mut run = Run::new(engine);
    let mut momentum = vec![0.0f32; run.weights.trainable.len()];
    let mut average = Weights::zeros(&run.network.variables);
    let mut logged = Worst::new("train_steps logged values (relative)", 1e-4);
    let mut probes = Worst::new("train_steps probes, single values (absolute)", 2e-5);
    let mut sums = Worst::new("train_steps probes, sums (absolute per value)", 2e-5);

    for (step, expected) in golden()["train_steps"].as_array().unwrap().iter().enumerate() {
        let rate = learning_rate(step);
        let (losses, l2, mut gradients) = run.differentiate();
        for variable in run.trainables() {
            clip(&mut gradients[variable.range()]);
        }
        clip(&mut gradients);
        for ((weight, momentum), gradient) in run
            .weights
            .trainable
            .iter_mut()
            .zip(&mut momentum)
            .zip(&gradients)
        {
            *momentum = MOMENTUM * *momentum - rate * gradient;
            *weight += *momentum;
        }
        let updates = (step + 1) as f64;
        let keep = EMA_DECAY.min((1.0 + updates) / (10.0 + updates));
        let take = (1.0 - keep) as f32;
        let pairs = (average.trainable.iter_mut().chain(&mut average.statistics))
            .zip(run.weights.trainable.iter().chain(&run.weights.statistics));
        for (average, &weight) in pairs {
            *average -= take * (*average - weight);
        }

        let at = |what: &str| format!("step {step} {what}");
        compare_losses(&mut logged, &at(""), losses, expected);
        let l2 = [("reg_l2_loss", l2), ("loss", f64::from(losses.det_loss) + l2)];
        let others = [
            ("learning_rate", f64::from(rate)),
            ("gradient_norm", norm(&gradients)),
        ];
        for (key, actual) in l2.into_iter().chain(others) {
            logged.relative(&at(key), actual, number(&expected[key]));
        }
        for (name, expected) in expected["probe"].as_object().unwrap() {
            let variable = run
                .network
                .variables
                .find(name.strip_suffix(":0").unwrap())
                .unwrap();
            for (prefix, weights) in [("", &run.weights), ("ema_", &average)] {
                let values = weights.slice(variable.kind, variable.range());
                let first = number(&expected[&format!("{prefix}first")]);
                probes.absolute(&at(&format!("{name} {prefix}first")), f64::from(values[0]), first);
                let sum: f64 = values.iter().map(|&v| f64::from(v)).sum();
                let error = sum - number(&expected[&format!("{prefix}sum")]);
                sums.note(&at(&format!("{name} {prefix}sum")), error / values.len() as f64);
            }
        }
    }
    logged.check();
    probes.check();
    sums.check();
}

/// Warm-up of the golden run: 25 epochs of 74 steps from 1e-4 to 2.2.
fn learning_rate(step: usize) -> f32 {
    let (init, base, warm_up) = (1e-4f32, 2.2f32, 25.0 * 74.0f32);
    init + step as f32 / warm_up * (base - init)
}

fn clip(gradients: &mut [f32]) {
    let factor = (CLIP_NORM / norm(gradients).max(CLIP_NORM)) as f32;
    gradients.iter_mut().for_each(|gradient| *gradient *= factor);
}
