//! Speed of the pointwise convolutions of EfficientDet-D0 at 512 × 512.
//!
//! ```text
//! cargo bench -p effdet-cpu --bench pointwise -- [threads] [isa] [part of a layer's name] [precision of the products]
//! ```
//!
//! Prints, per layer, the best time of a forward and of a backward pass over a batch of four images, and the products'
//! GFLOP/s in it.

use std::time::{Duration, Instant};

use effdet_cpu::arena::AlignedBuf;
use effdet_cpu::kernels::Executor;
use effdet_cpu::kernels::pointwise::*;
use effdet_cpu::math::Act;
use effdet_cpu::simd::Isa;
use effdet_cpu::storage::PassProducts;
use effdet_model::engine::Precision;

const IMAGES: usize = 4;
const TIME_PER_KERNEL: Duration = Duration::from_millis(150);

#[derive(Clone, Copy, PartialEq)]
enum Role {
    /// Normalised input, wide output: first convolution of an MBConv block.
    Expand,
    /// Activated and gated input, narrow output: last convolution of an MBConv block.
    Project,
    /// Stored input with bias, over all pyramid levels.
    Head,
}

/// Role, side of the feature map in pixels, input and output channels.
const LAYERS: [(Role, usize, usize, usize); 18] = [
    (Role::Project, 256, 32, 16),
    (Role::Expand, 256, 16, 96),
    (Role::Project, 128, 96, 24),
    (Role::Expand, 128, 24, 144),
    (Role::Project, 128, 144, 24),
    (Role::Project, 64, 144, 40),
    (Role::Expand, 64, 40, 240),
    (Role::Project, 64, 240, 40),
    (Role::Expand, 32, 80, 480),
    (Role::Project, 32, 480, 80),
    (Role::Project, 32, 480, 112),
    (Role::Expand, 32, 112, 672),
    (Role::Project, 32, 672, 112),
    (Role::Expand, 16, 192, 1152),
    (Role::Project, 16, 1152, 192),
    (Role::Project, 16, 1152, 320),
    (Role::Head, 0, 64, 64),
    (Role::Head, 0, 64, 810),
];

fn buffer(len: usize) -> AlignedBuf {
    let mut buffer = AlignedBuf::zeroed(len);
    for (i, x) in buffer.iter_mut().enumerate() {
        *x = ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32 - 0.5;
    }
    buffer
}

/// Best time of a call in seconds.
fn best(mut call: impl FnMut()) -> f64 {
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < TIME_PER_KERNEL || best.is_infinite() {
        let call_start = Instant::now();
        call();
        best = best.min(call_start.elapsed().as_secs_f64());
    }
    best
}

/// Times of a forward and a backward pass in seconds.
fn time_layer(
    executor: &Executor,
    products: PassProducts,
    plan: &RowPlan,
    role: Role,
    (inputs, outputs): (usize, usize),
) -> (f64, f64) {
    let rows = plan.rows();
    let stride = if role == Role::Head {
        outputs.next_multiple_of(16)
    } else {
        outputs
    };
    let weights = buffer(inputs * outputs);
    let mut packed = PackedWeights::with_products(inputs, outputs, products);
    pack(
        executor,
        Packing::ForwardAndBackward,
        &mut [(&mut packed, &weights)],
    );
    let (raw, mut x, mut dx) = (
        buffer(rows * inputs),
        buffer(rows * inputs),
        buffer(rows * inputs),
    );
    let (mut y, dz) = (buffer(rows * stride), buffer(rows * stride));
    let vectors = buffer(plan.group_count() * inputs.max(outputs));
    let (below, above) = (
        &vectors[..plan.group_count() * inputs],
        &vectors[..plan.group_count() * outputs],
    );
    let (scale, shift) = (ChannelVectors::per_group(below), ChannelVectors::per_group(below));
    let gate = buffer(IMAGES * inputs);
    let bias = buffer(outputs);
    let activated = Activated {
        raw: &raw,
        scale,
        shift,
        act: Act::Swish,
        gate: Some(&gate),
    };
    let mut sums = vec![0.0; plan.group_count() * 2 * outputs];
    let mut sums_below = vec![0.0; plan.group_count() * 2 * inputs];
    let mut activation_sums = vec![0.0; IMAGES * 5 * inputs];
    let mut dw = vec![0.0; inputs * outputs];
    let mut db = vec![0.0; outputs];

    let forward_time = best(|| {
        let input = match role {
            Role::Expand => FullInput::Normalized {
                raw: &raw,
                scale,
                shift,
                residual: None,
                x: &mut x,
            },
            Role::Project => Input::Activated(activated),
            Role::Head => FullInput::Plain(&x),
        };
        let head = role == Role::Head;
        let args = Forward {
            rows: plan,
            weights: &packed,
            input,
            bias: head.then_some(&bias),
            y: &mut y,
            stride,
            sums: (!head).then_some(&mut sums),
            streaming: outputs > inputs,
        };
        forward(executor, args);
    });
    let backward_time = best(|| {
        let output_gradient = match role {
            Role::Head => FullGradient::Plain { dy: &dz, stride },
            Role::Expand | Role::Project => {
                let vectors = ChannelVectors::per_group(above);
                OutputGradient::Normalized {
                    dz: &dz,
                    y: &y,
                    a: vectors,
                    b: vectors,
                    c: vectors,
                    stride,
                }
            }
        };
        let db = (role == Role::Head).then_some(&mut db[..]);
        let weight_gradient = WeightGradient {
            dw: &mut dw,
            db,
            accumulate: false,
        };
        if role == Role::Project {
            let args = BackwardActivated {
                rows: plan,
                weights: &packed,
                output_gradient,
                input: activated,
                da: &mut dx,
                sums: &mut activation_sums,
                streaming: true,
                weight_gradient,
            };
            backward_activated(executor, args);
        } else {
            let sums = (role == Role::Expand).then_some(GradientSums {
                y: &raw,
                sums: &mut sums_below,
            });
            let input_gradient = InputGradient {
                dx: &mut dx,
                accumulate: false,
                addends: [None, None],
                sums,
            };
            let args = Backward {
                rows: plan,
                weights: &packed,
                output_gradient,
                x: &x,
                input_gradient: Some(input_gradient),
                weight_gradient,
            };
            backward(executor, args);
        }
    });
    (forward_time, backward_time)
}

fn main() {
    // `cargo bench` adds `--bench`.
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with("--"))
        .collect();
    let threads = args.first().map_or(1, |arg| {
        arg.parse().expect("the first argument is a number of threads")
    });
    let isa = args.get(1).map_or_else(Isa::detect, |arg| {
        arg.parse().expect("the second argument is an instruction set")
    });
    let filter = args.get(2).cloned().unwrap_or_default();
    let precision = args.get(3).map_or_else(Precision::default, |arg| {
        arg.parse().expect("the fourth argument is a precision")
    });
    let products = PassProducts::of(precision);
    let executor = Executor::new(threads, isa);
    println!("{isa}, {threads} threads, {IMAGES} images, products of {precision}");
    println!(
        "{:28} {:>9} {:>9} {:>9} {:>9}",
        "layer", "fwd ms", "GFLOP/s", "bwd ms", "GFLOP/s"
    );
    let (mut total_forward, mut total_backward) = (0.0, 0.0);
    for (role, side, inputs, outputs) in LAYERS {
        let (name, plan) = match role {
            Role::Expand => (
                format!("expand {inputs} to {outputs} at {side}²"),
                RowPlan::images(IMAGES, side * side),
            ),
            Role::Project => (
                format!("project {inputs} to {outputs} at {side}²"),
                RowPlan::images(IMAGES, side * side),
            ),
            Role::Head => {
                let levels = [64, 32, 16, 8, 4].map(|side| side * side);
                (
                    format!("head {inputs} to {outputs}"),
                    RowPlan::levels(IMAGES, &levels),
                )
            }
        };
        if !name.contains(&filter) {
            continue;
        }
        let (forward, backward) = time_layer(&executor, products, &plan, role, (inputs, outputs));
        let gflop = 2e-9 * (plan.rows() * inputs * outputs) as f64;
        println!(
            "{name:28} {:9.3} {:9.1} {:9.3} {:9.1}",
            forward * 1e3,
            gflop / forward,
            backward * 1e3,
            2.0 * gflop / backward
        );
        total_forward += forward;
        total_backward += backward;
    }
    println!(
        "{:28} {:9.3} {:>9} {:9.3}",
        "sum",
        total_forward * 1e3,
        "",
        total_backward * 1e3
    );
}
