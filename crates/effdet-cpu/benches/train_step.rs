//! Forward, losses and backward of one training step: `cargo bench -p effdet-cpu --bench train_step -- [model] [size] [batch] [threads] [isa] [steps] [precision]`.

use std::sync::Arc;
use std::time::Instant;

use effdet_cpu::engine::{CpuEngine, CpuOptions};
use effdet_model::engine::{Engine, HeadOutputs, ImageBatch, Precision, StepOptions, Targets, TrainBatch};
use effdet_model::hparams::{HParams, ImageSize};
use effdet_model::network::Network;
use effdet_model::rng::{Draws, Purpose};
use effdet_model::weights::Weights;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let arg = |i: usize, default: &str| args.get(i).map_or_else(|| default.to_owned(), Clone::clone);
    let number = |i: usize, default: &str| arg(i, default).parse::<usize>().unwrap();
    let mut hparams = HParams::preset(&arg(0, "d0")).unwrap();
    hparams.image_size = ImageSize::square(number(1, "512"));
    hparams.num_classes = 90;
    let (batch, threads, steps) = (number(2, "4"), number(3, "2"), number(5, "5"));
    let isa = args.get(4).map(|isa| isa.parse().unwrap());
    let network = Arc::new(Network::new(&hparams).unwrap());
    let options = CpuOptions {
        threads,
        isa,
        precision: arg(6, "fp32").parse().unwrap(),
        grad_checkpoint: false,
    };
    let loss_scale = if options.precision == Precision::Fp16 {
        32_768.0
    } else {
        1.0
    };
    let mut engine = CpuEngine::new(Arc::clone(&network), options).unwrap();
    let mut weights = Weights::init(&network.variables, 1);
    let mut draws = Draws::new(1, Purpose::Synthetic, 0, 0);
    let ImageSize { height, width } = hparams.image_size;
    let pixels: Vec<f32> = (0..batch * height * width * 3)
        .map(|_| draws.range(-2.0, 2.0))
        .collect();
    let anchors = network.num_anchors();
    let class_targets: Vec<i32> = (0..batch * anchors)
        .map(|_| {
            if draws.uniform() < 0.001 {
                draws.below(90) as i32
            } else {
                -1
            }
        })
        .collect();
    let box_targets: Vec<f32> = class_targets
        .iter()
        .flat_map(|&class| [if class >= 0 { 0.3 } else { 0.0 }; 4])
        .collect();
    let normalizer = class_targets.iter().filter(|&&class| class >= 0).count() as f32 + 1.0;
    let images = ImageBatch {
        pixels: &pixels,
        batch,
        height,
        width,
    };
    let targets = Targets {
        class_targets: &class_targets,
        box_targets: &box_targets,
        normalizer,
    };
    let keys: Vec<u64> = (0..batch as u64).collect();
    let train = TrainBatch {
        images,
        targets,
        draw_keys: &keys,
    };
    let step = StepOptions {
        loss_scale,
        ..StepOptions::default()
    };
    let mut gradients = vec![0.0; weights.trainable.len()];
    let mut outputs = HeadOutputs::default();
    let mut times: [Vec<f64>; 2] = Default::default();
    for _ in 0..=steps {
        let clock = Instant::now();
        engine
            .train_step(&mut weights, &train, &step, &mut gradients)
            .unwrap();
        times[0].push(clock.elapsed().as_secs_f64());
    }
    let hash = gradients
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, gradient| {
            (hash ^ u64::from(gradient.to_bits())).wrapping_mul(0x100_0000_01b3)
        });
    println!("gradients {hash:016x}");
    for _ in 0..=steps {
        let clock = Instant::now();
        engine.infer(&weights, &images, &mut outputs).unwrap();
        times[1].push(clock.elapsed().as_secs_f64());
    }
    for (name, times) in ["train", "infer"].iter().zip(&mut times) {
        // The first step also allocates.
        times.remove(0);
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        println!(
            "{} {height}x{width} batch {batch}, {} threads, {}, {name}: {:.1} ms/image, {:.2} images/s (best {:.2})",
            hparams.name,
            engine.threads(),
            engine.isa(),
            median / batch as f64 * 1e3,
            batch as f64 / median,
            batch as f64 / times[0],
        );
    }
}
