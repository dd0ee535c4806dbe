//! Times every step of an inference plan: `cargo bench -p effdet-cpu --bench inference -- [preset] [threads] [runs] [isa]`.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use effdet_cpu::engine::CpuOptions;
use effdet_cpu::inference::InferencePlan;
use effdet_cpu::probe::{Kernel, Probe, Stage, Work};
use effdet_model::engine::{HeadOutputs, ImageBatch};
use effdet_model::hparams::HParams;
use effdet_model::network::Network;
use effdet_model::rng::{Draws, Purpose};
use effdet_model::weights::Weights;

fn main() {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with("--"))
        .collect();
    let argument = |index: usize| args.get(index).map(String::as_str);
    let preset = argument(0).unwrap_or("d0");
    let threads = argument(1).map_or(2, |text| text.parse().unwrap());
    let runs: usize = argument(2).map_or(50, |text| text.parse().unwrap());
    let isa = argument(3).map(|text| text.parse().unwrap());
    let network = Arc::new(Network::new(&HParams::preset(preset).unwrap()).unwrap());
    let weights = Weights::init(&network.variables, 0);
    let clock = Instant::now();
    let mut plan = InferencePlan::new(
        Arc::clone(&network),
        &weights,
        CpuOptions {
            threads,
            isa,
            ..CpuOptions::default()
        },
    )
    .unwrap();
    println!(
        "{preset}, {threads} threads, {}, made in {:.1} ms, {:?}",
        plan.isa(),
        1e3 * clock.elapsed().as_secs_f64(),
        plan.memory(threads, 1)
    );
    let size = network.hparams.image_size;
    let mut draws = Draws::new(0, Purpose::Synthetic, 0, 0);
    let pixels: Vec<f32> = (0..size.height * size.width * 3)
        .map(|_| draws.normal() as f32)
        .collect();
    let images = ImageBatch {
        pixels: &pixels,
        batch: 1,
        height: size.height,
        width: size.width,
    };
    let mut outputs = HeadOutputs::default();
    plan.infer(&images, &mut outputs).unwrap();
    let steps = Arc::new(Steps::default());
    plan.listen(Some(Arc::clone(&steps) as Arc<dyn Probe>));
    let mut totals = Vec::new();
    for _ in 0..runs {
        let start = Instant::now();
        steps.0.lock().unwrap().restart(start);
        plan.infer(&images, &mut outputs).unwrap();
        totals.push(start.elapsed().as_secs_f64());
    }
    for (name, flops, times) in &mut steps.0.lock().unwrap().steps {
        let time = median(times);
        println!(
            "{name:34} {:8.3} ms {:6.0} GFLOP/s",
            1e3 * time,
            1e-9 * *flops as f64 / time
        );
    }
    let macs: u64 = network.stage_costs().into_iter().map(|cost| cost.macs).sum();
    let total = median(&mut totals);
    println!(
        "median {:.2} ms, fastest {:.2} ms, {:.0} GFLOP/s",
        1e3 * total,
        1e3 * totals[0],
        2e-9 * macs as f64 / total
    );
}

/// Times of every kernel call in the order of a run.
#[derive(Debug, Default)]
struct Steps(Mutex<Times>);

#[derive(Debug, Default)]
struct Times {
    last: Option<Instant>,
    next: usize,
    stage: String,
    steps: Vec<(String, u64, Vec<f64>)>,
}

impl Times {
    fn restart(&mut self, start: Instant) {
        (self.last, self.next) = (Some(start), 0);
    }
}

impl Probe for Steps {
    fn enter(&self, stage: Stage) {
        self.0.lock().unwrap().stage = stage.to_string();
    }

    fn done(&self, kernel: Kernel, work: Work) {
        let times = &mut *self.0.lock().unwrap();
        let now = Instant::now();
        if times.steps.len() == times.next {
            times
                .steps
                .push((format!("{} {kernel}", times.stage), work.flops, Vec::new()));
        }
        if let Some(last) = times.last.replace(now) {
            times.steps[times.next].2.push((now - last).as_secs_f64());
        }
        times.next += 1;
    }
}

/// Sorts the times.
fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
