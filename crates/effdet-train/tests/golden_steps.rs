//! Schedule, optimiser and averages against three steps of the reference implementation.

use effdet_cpu::engine::{CpuEngine, CpuOptions};
use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::engine::{Engine, ImageBatch, StepOptions, TrainBatch};
use effdet_model::network::Network;
use effdet_train::schedule::Schedule;
use effdet_train::trainer::TrainState;

#[path = "../../effdet-cpu/tests/common"]
#[allow(dead_code, reason = "shared with the tests of engines, which use more of it")]
mod common {
    pub mod golden;
    pub mod worst;
}

use common::golden::{BATCH, SIDE, golden, labels, network, pixels, weights};
use common::worst::Worst;

/// Source: `golden.json`, `network_and_training.train_steps`: D0 at 128×128, batch 4, momentum 0.93, averages by 0.999.
#[test]
fn three_updates_are_those_of_the_reference() {
    let mut hparams = network().hparams.clone();
    (hparams.momentum, hparams.moving_average_decay) = (0.93, 0.999);
    (hparams.learning_rate, hparams.lr_warmup_init) = (2.2, 1e-4);
    (hparams.lr_warmup_epoch, hparams.num_epochs) = (25.0, 400.0);
    let network = Network::new(&hparams).unwrap();
    let schedule = Schedule::new(&hparams, 74);
    let mut state = TrainState::new(&network, weights(&network)).unwrap();
    let mut average = state.average.take().unwrap();
    let options = CpuOptions {
        threads: 2,
        isa: None,
        ..CpuOptions::default()
    };
    let mut engine = CpuEngine::new(network.clone().into(), options).unwrap();
    let labels = labels(&Anchors::new(&AnchorConfig::from(&hparams)).unwrap());
    let pixels = pixels();
    let mut gradients = vec![0.0; state.weights.trainable.len()];
    let mut logged = Worst::new("logged values (relative)", 1e-4);
    let mut probes = Worst::new("weights and averages (absolute)", 2e-5);

    for (step, expected) in golden()["train_steps"].as_array().unwrap().iter().enumerate() {
        let batch = TrainBatch {
            images: ImageBatch {
                pixels: &pixels,
                batch: BATCH,
                height: SIDE,
                width: SIDE,
            },
            targets: labels.targets(),
            draw_keys: &[0, 1, 2, 3],
        };
        let options = StepOptions::default();
        let losses = engine
            .train_step(&mut state.weights, &batch, &options, &mut gradients)
            .unwrap();
        let prepared = state.optimizer.prepare(&state.weights, &gradients);
        let report = prepared.report;
        let learning_rate = schedule.at(step as u64);
        state.optimizer.apply(
            &mut state.weights,
            Some(&mut average),
            (&gradients, &prepared),
            learning_rate,
            step as u64,
        );

        for (key, actual) in [
            ("reg_l2_loss", report.l2_loss),
            ("loss", losses.det_loss + report.l2_loss),
            ("learning_rate", learning_rate),
            ("gradient_norm", report.gradient_norm),
        ] {
            let at = format!("step {step} {key}");
            logged.relative(&at, f64::from(actual), expected[key].as_f64().unwrap());
        }
        for (name, expected) in expected["probe"].as_object().unwrap() {
            let variable = network.variables.find(name.strip_suffix(":0").unwrap()).unwrap();
            for (prefix, weights) in [("", &state.weights), ("ema_", &average)] {
                let values = weights.slice(variable.kind, variable.range());
                let number = |key: &str| expected[format!("{prefix}{key}")].as_f64().unwrap();
                let at = format!("step {step} {prefix}{name}");
                probes.absolute(&at, f64::from(values[0]), number("first"));
                let sum: f64 = values.iter().map(|&value| f64::from(value)).sum();
                probes.note(&at, (sum - number("sum")) / values.len() as f64);
            }
        }
    }
    logged.check();
    probes.check();
}
