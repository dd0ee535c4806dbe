//! The work that kernels report is the work that the network description counts.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use effdet_cpu::engine::{CpuEngine, CpuOptions};
use effdet_cpu::probe::{Kernel, Probe, Stage, Work};
use effdet_model::engine::{Engine, ImageBatch, Mode, StepOptions, Targets, TrainBatch};
use effdet_model::hparams::{HParams, ImageSize};

use effdet_model::network::{Network, StageGroup};
use effdet_model::weights::Weights;

const SIDE: usize = 128;

/// Adds up operations per stage and remembers which kernels ran.
#[derive(Debug, Default)]
struct Ledger(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    stage: Option<Stage>,
    flops: BTreeMap<Stage, u64>,
    kernels: Vec<(Stage, Kernel)>,
}

impl Probe for Ledger {
    fn enter(&self, stage: Stage) {
        self.0.lock().unwrap().stage = Some(stage);
    }

    fn done(&self, kernel: Kernel, work: Work) {
        let mut entries = self.0.lock().unwrap();
        let stage = entries.stage.expect("a kernel ran before any stage was entered");
        *entries.flops.entry(stage).or_default() += work.flops;
        entries.kernels.push((stage, kernel));
        assert!(work.bytes > 0, "{stage}, {kernel} touched no tensor");
    }
}

fn network(model: &str) -> Arc<Network> {
    let mut hparams = HParams::preset(model).unwrap();
    hparams.image_size = ImageSize::square(SIDE);
    Arc::new(Network::new(&hparams).unwrap())
}

fn engine(network: &Arc<Network>, ledger: &Arc<Ledger>) -> CpuEngine {
    let options = CpuOptions {
        threads: 1,
        ..CpuOptions::default()
    };
    let mut engine = CpuEngine::new(Arc::clone(network), options).unwrap();
    engine.listen(Some(Arc::clone(ledger) as Arc<dyn Probe>));
    engine
}

fn images(pixels: &[f32]) -> ImageBatch<'_> {
    ImageBatch {
        pixels,
        batch: 1,
        height: SIDE,
        width: SIDE,
    }
}

#[test]
fn a_forward_pass_reports_the_multiply_adds_of_the_cost_table_stage_by_stage() {
    for model in ["d0", "lite0"] {
        let network = network(model);
        let ledger = Arc::new(Ledger::default());
        let weights = Weights::init(&network.variables, 1);
        let pixels = vec![0.5; SIDE * SIDE * 3];
        engine(&network, &ledger)
            .trace(&weights, &images(&pixels), Mode::Infer, &mut |_, _, _| {})
            .unwrap();
        let entries = ledger.0.lock().unwrap();

        let costs = network.stage_costs();
        let mut expected = BTreeMap::from([(Stage::Weights, 0), (Stage::Pyramid, 0)]);
        let mut blocks = 0;
        for cost in &costs {
            let stage = match (cost.group, cost.name.as_str()) {
                (StageGroup::Backbone, "stem") => Stage::Stem,
                (StageGroup::Backbone, _) => {
                    blocks += 1;
                    Stage::Block(blocks - 1)
                }
                (StageGroup::Fpn, _) => Stage::Pyramid,
                (StageGroup::Heads, "class_net") => Stage::ClassHead,
                (StageGroup::Heads, _) => Stage::BoxHead,
            };
            *expected.entry(stage).or_default() += 2 * cost.macs;
        }
        assert_eq!(entries.flops, expected, "{model}");
    }
}

#[test]
fn a_training_step_reports_backward_kernels_in_every_stage_that_has_convolutions() {
    let network = network("d0");
    let ledger = Arc::new(Ledger::default());
    let mut weights = Weights::init(&network.variables, 1);
    let anchors = network.num_anchors();
    let mut gradients = vec![0.0; weights.trainable.len()];
    let pixels = vec![0.5; SIDE * SIDE * 3];
    let batch = TrainBatch {
        images: images(&pixels),
        targets: Targets {
            class_targets: &vec![-1; anchors],
            box_targets: &vec![0.0; anchors * 4],
            normalizer: 1.0,
        },
        draw_keys: &[0],
    };
    let mut engine = engine(&network, &ledger);
    engine
        .train_step(&mut weights, &batch, &StepOptions::default(), &mut gradients)
        .unwrap();
    let reports = ledger.0.lock().unwrap().kernels.len();
    engine.listen(None);
    engine
        .train_step(&mut weights, &batch, &StepOptions::default(), &mut gradients)
        .unwrap();

    let entries = ledger.0.lock().unwrap();
    assert_eq!(entries.kernels.len(), reports, "reports after nobody listened");
    let ran = |stage, kernel| entries.kernels.contains(&(stage, kernel));
    assert!(ran(Stage::Stem, Kernel::StemBackward));
    let blocks = (0..network.blocks.len()).map(Stage::Block);
    for stage in blocks.chain([Stage::Pyramid, Stage::ClassHead, Stage::BoxHead]) {
        assert!(ran(stage, Kernel::PointwiseBackward), "{stage}");
        assert!(ran(stage, Kernel::DepthwiseBackward), "{stage}");
    }
    assert!(ran(Stage::ClassHead, Kernel::Loss) && ran(Stage::BoxHead, Kernel::Loss));
}
