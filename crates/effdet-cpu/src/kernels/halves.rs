//! Kernels over tensors stored as halves give the bits of the f32 kernels on rounded values.

use effdet_model::network::MapSize;

use super::depthwise::{self, DepthwisePlan};
use super::elementwise::{Affine, Source};
use super::pointwise::{
    self, Activated, Backward, BackwardActivated, ChannelVectors, Forward, FullInput, InputGradient,
    OutputGradient, PackedWeights, Packing, RowPlan, WeightGradient,
};
use super::testing::{buffer, same_everywhere, values};
use super::{Executor, se, stem};
use crate::arena::AlignedBuf;
use crate::math::Act;
use crate::storage::{Bf16, F16, Stored};

const IMAGES: usize = 2;
/// No multiple of a vector.
const WIDE: usize = 37;
const NARROW: usize = 11;
const MAP: MapSize = MapSize { height: 9, width: 13 };
const ROWS: usize = IMAGES * 9 * 13;

fn stored<T: Stored>(values: &[f32]) -> AlignedBuf<T> {
    let mut out = AlignedBuf::zeroed(values.len());
    for (out, &value) in out.iter_mut().zip(values) {
        *out = T::from_f32(value);
    }
    out
}

/// The f32 values of a stored tensor.
fn plain<T: Stored>(values: &[T]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// Everything the kernels of a block compute from tensors of formats X and G.
#[derive(Debug, PartialEq)]
struct Results {
    expanded: Vec<f32>,
    convolved: Vec<f32>,
    sums: Vec<f64>,
    pooled: Vec<f32>,
    projected: Vec<f32>,
    da: Vec<f32>,
    activation_sums: Vec<f64>,
    dw: Vec<f32>,
    dz: Vec<f32>,
    dx: Vec<f32>,
    stem: Vec<f32>,
    stem_dw: Vec<f32>,
}

impl Results {
    /// With what is stored rounded to the formats.
    fn rounded<X: Stored, G: Stored>(mut self) -> Self {
        for values in [&mut self.expanded, &mut self.convolved, &mut self.stem] {
            *values = plain(&stored::<X>(values));
        }
        for values in [&mut self.da, &mut self.dz] {
            *values = plain(&stored::<G>(values));
        }
        self
    }
}

/// Tensors of formats X and G whose values formats RX and RG hold as well.
fn run<X: Stored, G: Stored, RX: Stored, RG: Stored>(executor: &Executor) -> Results {
    let rows = RowPlan::images(IMAGES, MAP.cells());
    let wide = |seed| stored::<X>(&plain(&stored::<RX>(&values(ROWS * WIDE, seed))));
    let (raw, y2) = (wide(1), wide(2));
    let incoming = stored::<G>(&plain(&stored::<RG>(&values(ROWS * WIDE, 16))));
    let (scale, shift) = (values(WIDE, 5), values(WIDE, 6));
    let affine = || Affine::per_group(&scale, &shift);
    let vector = |seed| values(WIDE, seed);
    let (a, b, c) = (vector(7), vector(8), vector(9));
    let gate = values(IMAGES * WIDE, 10);

    let mut expand = PackedWeights::new(NARROW, WIDE);
    let mut project = PackedWeights::new(WIDE, NARROW);
    let (expand_kernel, project_kernel) = (values(NARROW * WIDE, 11), values(NARROW * WIDE, 12));
    pointwise::pack(
        executor,
        Packing::ForwardAndBackward,
        &mut [(&mut expand, &expand_kernel), (&mut project, &project_kernel)],
    );
    let x = buffer(ROWS * NARROW, 13);
    let mut expanded = AlignedBuf::<X>::zeroed(ROWS * WIDE);
    let mut sums = vec![0.0; 2 * WIDE];
    pointwise::forward(
        executor,
        Forward {
            rows: &rows,
            weights: &expand,
            input: FullInput::Plain(&x),
            bias: None,
            y: &mut expanded[..],
            stride: WIDE,
            sums: Some(&mut sums),
            streaming: true,
        },
    );
    let plan = DepthwisePlan::new(IMAGES, &[MAP], WIDE, 5, 1);
    let taps = values(25 * WIDE, 14);
    let mut convolved = AlignedBuf::<X>::zeroed(ROWS * WIDE);
    depthwise::forward(
        executor,
        depthwise::Forward {
            plan: &plan,
            input: Source {
                raw: &raw[..],
                affine: Some(affine()),
                act: Act::Swish,
            },
            weights: &taps,
            y: &mut convolved[..],
            sums: None,
            streaming: true,
        },
    );
    let mut pooled = vec![0.0; IMAGES * WIDE];
    se::pool(
        executor,
        se::Pool {
            images: IMAGES,
            rows_per_image: MAP.cells(),
            channels: WIDE,
            source: Source {
                raw: &y2[..],
                affine: Some(affine()),
                act: Act::Swish,
            },
            mean: &mut pooled,
        },
    );
    let activated = Activated {
        raw: &y2[..],
        scale: ChannelVectors::per_group(&scale),
        shift: ChannelVectors::per_group(&shift),
        act: Act::Swish,
        gate: Some(&gate),
    };
    let mut projected = AlignedBuf::<f32>::zeroed(ROWS * NARROW);
    pointwise::forward(
        executor,
        Forward {
            rows: &rows,
            weights: &project,
            input: pointwise::Input::Activated(activated),
            bias: None,
            y: &mut projected[..],
            stride: NARROW,
            sums: None,
            streaming: false,
        },
    );

    let dy = buffer(ROWS * NARROW, 15);
    let mut da = AlignedBuf::<G>::zeroed(ROWS * WIDE);
    let mut activation_sums = vec![0.0; IMAGES * 5 * WIDE];
    let mut dw = vec![0.0; NARROW * WIDE];
    pointwise::backward_activated(
        executor,
        BackwardActivated {
            rows: &rows,
            weights: &project,
            output_gradient: pointwise::FullGradient::Plain {
                dy: &dy,
                stride: NARROW,
            },
            input: activated,
            da: &mut da[..],
            sums: &mut activation_sums,
            streaming: true,
            weight_gradient: WeightGradient {
                dw: &mut dw,
                db: None,
                accumulate: false,
            },
        },
    );
    let mut dz = AlignedBuf::<G>::zeroed(ROWS * WIDE);
    let mut tap_gradient = vec![0.0; taps.len()];
    depthwise::backward(
        executor,
        depthwise::Backward {
            plan: &plan,
            input: Source {
                raw: &raw[..],
                affine: Some(affine()),
                act: Act::Swish,
            },
            weights: &taps,
            output_gradient: depthwise::OutputGradient::Activated {
                da: &incoming[..],
                y: &y2[..],
                affine: affine(),
                act: Act::Swish,
                gain: ChannelVectors::per_image(&gate),
                offset: None,
                b: ChannelVectors::per_group(&b),
                c: ChannelVectors::per_group(&c),
            },
            input_gradient: depthwise::InputGradient {
                dz: &mut dz[..],
                accumulate: false,
                sums: None,
                streaming: true,
            },
            dw: &mut tap_gradient,
        },
    );
    let mut dx = AlignedBuf::<f32>::zeroed(ROWS * NARROW);
    let mut expand_gradient = vec![0.0; NARROW * WIDE];
    pointwise::backward(
        executor,
        Backward {
            rows: &rows,
            weights: &expand,
            output_gradient: OutputGradient::Normalized {
                dz: &incoming[..],
                y: &raw[..],
                a: ChannelVectors::per_group(&a),
                b: ChannelVectors::per_group(&b),
                c: ChannelVectors::per_group(&c),
                stride: WIDE,
            },
            x: &x,
            input_gradient: Some(InputGradient {
                dx: &mut dx,
                accumulate: false,
                addends: [None, None],
                sums: None,
            }),
            weight_gradient: WeightGradient {
                dw: &mut expand_gradient,
                db: None,
                accumulate: false,
            },
        },
    );
    dw.extend(tap_gradient);
    dw.extend(expand_gradient);

    let pixels = values(IMAGES * 18 * 26 * 3, 17);
    let input = stem::StemInput {
        pixels: &pixels,
        images: IMAGES,
        map: MapSize {
            height: 18,
            width: 26,
        },
        normalize: None,
    };
    let mut stem_y = AlignedBuf::<X>::zeroed(ROWS * WIDE);
    stem::forward(
        executor,
        stem::Forward {
            input,
            channels: WIDE,
            weights: &values(27 * WIDE, 18),
            y: &mut stem_y[..],
            sums: None,
            streaming: true,
        },
    );
    let mut stem_dw = vec![0.0; 27 * WIDE];
    stem::backward_weights(
        executor,
        stem::BackwardWeights {
            input,
            channels: WIDE,
            dz: &incoming[..],
            y: &raw[..],
            a: ChannelVectors::per_group(&a),
            b: ChannelVectors::per_group(&b),
            c: ChannelVectors::per_group(&c),
            dw: &mut stem_dw,
        },
    );
    Results {
        expanded: plain(&expanded),
        convolved: plain(&convolved),
        sums,
        pooled,
        projected: projected.to_vec(),
        da: plain(&da),
        activation_sums,
        dw,
        dz: plain(&dz),
        dx: dx.to_vec(),
        stem: plain(&stem_y),
        stem_dw,
    }
}

fn check<X: Stored, G: Stored>() {
    let full = same_everywhere(run::<f32, f32, X, G>);
    let halves = same_everywhere(run::<X, G, X, G>);
    assert_eq!(halves, full.rounded::<X, G>());
}

#[test]
fn float16_gives_the_bits_of_f32_on_rounded_values() {
    check::<F16, F16>();
}

#[test]
fn bfloat16_gradients_give_the_bits_of_f32_on_rounded_values() {
    check::<F16, Bf16>();
}
