//! The kernels against a scalar float64 reference, and against themselves on other instruction sets and thread counts.

use super::*;
use crate::arena::AlignedBuf;
use crate::storage::PassProducts;

/// Values in [−1, 1) from a counter.
fn values(len: usize, seed: u32) -> Vec<f32> {
    let value = |i: u32| {
        (i.wrapping_add(seed << 20).wrapping_mul(2_654_435_761) ^ 0x5bd1_e995).wrapping_mul(747_796_405)
    };
    (0..len as u32)
        .map(|i| (value(i) >> 8) as f32 / (1 << 23) as f32 - 1.0)
        .collect()
}

fn buffer(len: usize, seed: u32) -> AlignedBuf {
    AlignedBuf::from_slice(&values(len, seed))
}

/// One layer: its rows and its operands.
struct Layer {
    plan: RowPlan,
    segments: Vec<Segment>,
    inputs: usize,
    outputs: usize,
    stride: usize,
    weights: Vec<f32>,
    bias: Vec<f32>,
    raw: AlignedBuf,
    residual: AlignedBuf,
    scale: Vec<f32>,
    shift: Vec<f32>,
    gate: Vec<f32>,
    y: AlignedBuf,
    dz: AlignedBuf,
    affine: [Vec<f32>; 3],
    products: Products,
}

impl Layer {
    fn new(segments: &[Segment], inputs: usize, outputs: usize, stride: usize) -> Self {
        let plan = RowPlan::new(segments);
        let (rows, images, groups) = (plan.rows(), plan.image_count(), plan.group_count());
        Self {
            weights: values(inputs * outputs, 1),
            bias: values(outputs, 2),
            raw: buffer(rows * inputs, 3),
            residual: buffer(rows * inputs, 4),
            scale: values(groups * inputs, 5),
            shift: values(images * inputs, 6),
            gate: values(images * inputs, 7),
            y: buffer(rows * stride, 8),
            dz: buffer(rows * stride, 9),
            affine: [
                values(groups * outputs, 10),
                values(groups * outputs, 11),
                values(images * outputs, 12),
            ],
            segments: segments.to_vec(),
            products: Products::Single,
            plan,
            inputs,
            outputs,
            stride,
        }
    }

    /// The layer with operands of few digits, so that bfloat16 holds whatever is formed of them, and all sums are exact.
    fn of_quarters(mut self) -> Self {
        let tensors = [&mut self.raw, &mut self.residual, &mut self.y, &mut self.dz];
        let vectors = [
            &mut self.weights,
            &mut self.bias,
            &mut self.scale,
            &mut self.shift,
            &mut self.gate,
        ];
        let tensors = tensors.into_iter().flat_map(|values| values.iter_mut());
        let vectors = vectors.into_iter().chain(&mut self.affine).flatten();
        for value in tensors.chain(vectors) {
            *value = (*value * 4.0).round() / 4.0;
        }
        self
    }

    fn packed(&self, executor: &Executor) -> PackedWeights {
        let mut packed = PackedWeights::with_products(
            self.inputs,
            self.outputs,
            PassProducts {
                forward: self.products,
                backward: self.products,
            },
        );
        pack(
            executor,
            Packing::ForwardAndBackward,
            &mut [(&mut packed, &self.weights)],
        );
        packed
    }

    fn activated(&self, act: Act, gated: bool) -> Activated<'_> {
        Activated {
            raw: &self.raw,
            scale: ChannelVectors::per_group(&self.scale),
            shift: ChannelVectors::per_image(&self.shift),
            act,
            gate: gated.then_some(&self.gate),
        }
    }

    fn output_gradient(&self, normalized: bool) -> OutputGradient<'_> {
        if !normalized {
            return FullGradient::Plain {
                dy: &self.dz,
                stride: self.stride,
            };
        }
        OutputGradient::Normalized {
            dz: &self.dz,
            y: &self.y,
            a: ChannelVectors::per_group(&self.affine[0]),
            b: ChannelVectors::per_group(&self.affine[1]),
            c: ChannelVectors::per_image(&self.affine[2]),
            stride: self.stride,
        }
    }
}

fn segments(images: usize, levels: &[usize]) -> Vec<Segment> {
    let level = |(group, &rows): (usize, &usize)| {
        (0..images)
            .map(move |image| Segment { rows, image, group })
            .collect::<Vec<_>>()
    };
    levels.iter().enumerate().flat_map(level).collect()
}

/// Layers with awkward sizes.
fn layers() -> Vec<Layer> {
    vec![
        Layer::new(&segments(1, &[1]), 3, 8, 8),
        Layer::new(&segments(3, &[37]), 27, 32, 32),
        Layer::new(&segments(2, &[200]), 16, 96, 96),
        Layer::new(&segments(2, &[100]), 40, 24, 24),
        Layer::new(&segments(3, &[13, 5, 1]), 64, 36, 48),
        Layer::new(&segments(2, &[101, 20, 4]), 64, 819, 832),
        Layer::new(&segments(2, &[98]), 288, 40, 40),
        Layer::new(&segments(3, &[65]), 24, 500, 512),
    ]
}

/// Everything a kernel call writes.
#[derive(Debug, Clone, PartialEq, Default)]
struct Outputs {
    floats: Vec<f32>,
    x: Vec<f32>,
    sums: Vec<f64>,
    dw: Vec<f32>,
    db: Vec<f32>,
}

/// Scalar float64 versions of the kernels.
mod reference {
    use super::*;

    pub(super) type Rows = Vec<(usize, usize)>;

    /// Image and group of every row.
    pub(super) fn rows(layer: &Layer) -> Rows {
        layer
            .segments
            .iter()
            .flat_map(|s| std::iter::repeat_n((s.image, s.group), s.rows))
            .collect()
    }

    pub(super) fn normalized(layer: &Layer) -> Vec<f64> {
        let mut x = Vec::new();
        for (row, (image, group)) in rows(layer).into_iter().enumerate() {
            for i in 0..layer.inputs {
                let scale = f64::from(layer.scale[group * layer.inputs + i]);
                let shift = f64::from(layer.shift[image * layer.inputs + i]);
                x.push(scale * f64::from(layer.raw[row * layer.inputs + i]) + shift);
            }
        }
        x
    }

    /// Swish and its slope.
    pub(super) fn swish(z: f64) -> (f64, f64) {
        let s = 1.0 / (1.0 + (-z).exp());
        (z * s, s + z * s * (1.0 - s))
    }

    pub(super) fn gated(layer: &Layer) -> Vec<f64> {
        let rows = rows(layer);
        let gate =
            |i: usize| f64::from(layer.gate[rows[i / layer.inputs].0 * layer.inputs + i % layer.inputs]);
        normalized(layer)
            .into_iter()
            .enumerate()
            .map(|(i, z)| swish(z).0 * gate(i))
            .collect()
    }

    /// x·W, row-major without padding.
    pub(super) fn product(layer: &Layer, x: &[f64], bias: bool) -> Vec<f64> {
        let (k, n) = (layer.inputs, layer.outputs);
        let mut y = Vec::new();
        for x in x.chunks(k) {
            for j in 0..n {
                let dot: f64 = (0..k).map(|i| x[i] * f64::from(layer.weights[i * n + j])).sum();
                y.push(dot + if bias { f64::from(layer.bias[j]) } else { 0.0 });
            }
        }
        y
    }

    /// dY, row-major without padding.
    pub(super) fn output_gradient(layer: &Layer, normalized: bool) -> Vec<f64> {
        let n = layer.outputs;
        let [a, b, c] = &layer.affine;
        let mut dy = Vec::new();
        for (row, (image, group)) in rows(layer).into_iter().enumerate() {
            for j in 0..n {
                let (dz, y) = (
                    f64::from(layer.dz[row * layer.stride + j]),
                    f64::from(layer.y[row * layer.stride + j]),
                );
                let (a, b, c) = (
                    f64::from(a[group * n + j]),
                    f64::from(b[group * n + j]),
                    f64::from(c[image * n + j]),
                );
                dy.push(if normalized { dz * a + y * b + c } else { dz });
            }
        }
        dy
    }

    /// dY·Wᵀ.
    pub(super) fn input_gradient(layer: &Layer, dy: &[f64]) -> Vec<f64> {
        let (k, n) = (layer.inputs, layer.outputs);
        let dot = |dy: &[f64], i: usize| {
            (0..n)
                .map(|j| dy[j] * f64::from(layer.weights[i * n + j]))
                .sum::<f64>()
        };
        dy.chunks(n)
            .flat_map(|dy| (0..k).map(|i| dot(dy, i)).collect::<Vec<_>>())
            .collect()
    }

    /// xᵀ·dY.
    pub(super) fn weight_gradient(layer: &Layer, x: &[f64], dy: &[f64]) -> Vec<f64> {
        let (k, n) = (layer.inputs, layer.outputs);
        let mut dw = vec![0.0; k * n];
        for (x, dy) in x.chunks(k).zip(dy.chunks(n)) {
            for i in 0..k {
                for j in 0..n {
                    dw[i * n + j] += x[i] * dy[j];
                }
            }
        }
        dw
    }

    /// Sums of the terms of each row, `[owners, terms, channels]`.
    pub(super) fn sums<const T: usize>(
        channels: usize,
        owners: impl Iterator<Item = usize>,
        count: usize,
        terms: impl Fn(usize, usize) -> [f64; T],
    ) -> Vec<f64> {
        let mut sums = vec![0.0; count * T * channels];
        for (row, owner) in owners.enumerate() {
            for i in 0..channels {
                for (t, term) in terms(row, i).into_iter().enumerate() {
                    sums[(owner * T + t) * channels + i] += term;
                }
            }
        }
        sums
    }
}

/// Checks against float64, relative to the size of the largest value.
#[track_caller]
fn assert_close<T: Copy + Into<f64>>(actual: &[T], expected: &[f64], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let size = expected.iter().fold(1e-30, |size: f64, x| size.max(x.abs()));
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let a: f64 = a.into();
        assert!(
            (a - e).abs() < 2e-5 * size,
            "{what}[{i}] is {a}, {e} expected, largest {size}"
        );
    }
}

/// The values in the first `width` of every `stride` columns.
fn unpadded(values: &[f32], stride: usize, width: usize) -> Vec<f32> {
    values
        .chunks(stride)
        .flat_map(|row| row[..width].to_vec())
        .collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Operand {
    Plain,
    Activated,
    Normalized,
}

fn run_forward(executor: &Executor, layer: &Layer, operand: Operand, bias: bool, streaming: bool) -> Outputs {
    run_forward_with(executor, layer, (operand, Act::Swish), bias, streaming)
}

fn run_forward_with(
    executor: &Executor,
    layer: &Layer,
    (operand, act): (Operand, Act),
    bias: bool,
    streaming: bool,
) -> Outputs {
    let mut y = AlignedBuf::from_slice(&vec![f32::NAN; layer.plan.rows() * layer.stride]);
    let mut x = vec![f32::NAN; layer.plan.rows() * layer.inputs];
    let mut sums = vec![f64::NAN; layer.plan.group_count() * 2 * layer.outputs];
    let input = match operand {
        Operand::Plain => FullInput::Plain(&layer.raw),
        Operand::Activated => Input::Activated(layer.activated(act, true)),
        Operand::Normalized => FullInput::Normalized {
            raw: &layer.raw,
            scale: ChannelVectors::per_group(&layer.scale),
            shift: ChannelVectors::per_image(&layer.shift),
            residual: bias.then_some(&layer.residual),
            x: &mut x,
        },
    };
    let args = Forward {
        rows: &layer.plan,
        weights: &layer.packed(executor),
        input,
        bias: bias.then_some(&layer.bias),
        y: &mut y,
        stride: layer.stride,
        sums: Some(&mut sums),
        streaming,
    };
    forward(executor, args);
    Outputs {
        floats: y.to_vec(),
        x: if operand == Operand::Normalized {
            x
        } else {
            Vec::new()
        },
        sums,
        ..Outputs::default()
    }
}

#[test]
fn the_forward_pass_matches_float64() {
    let executor = Executor::new(2, Isa::detect());
    for layer in layers() {
        for operand in [Operand::Plain, Operand::Activated, Operand::Normalized] {
            for bias in [false, true] {
                let out = run_forward(&executor, &layer, operand, bias, true);
                let residual = |(z, r): (f64, &f32)| z + if bias { f64::from(*r) } else { 0.0 };
                let x: Vec<f64> = match operand {
                    Operand::Plain => layer.raw.iter().map(|&x| x.into()).collect(),
                    Operand::Activated => reference::gated(&layer),
                    Operand::Normalized => reference::normalized(&layer)
                        .into_iter()
                        .zip(layer.residual.iter())
                        .map(residual)
                        .collect(),
                };
                let n = layer.outputs;
                let y = reference::product(&layer, &x, bias);
                assert_close(&unpadded(&out.floats, layer.stride, n), &y, "y");
                assert!(
                    out.floats
                        .chunks(layer.stride)
                        .all(|row| row[n..].iter().all(|&pad| pad == 0.0))
                );
                if operand == Operand::Normalized {
                    assert_close(&out.x, &x, "x");
                }
                let groups = reference::rows(&layer).into_iter().map(|(_, group)| group);
                let terms = |row: usize, j: usize| [y[row * n + j], y[row * n + j].powi(2)];
                assert_close(
                    &out.sums,
                    &reference::sums(n, groups, layer.plan.group_count(), terms),
                    "sums",
                );
            }
        }
    }
}

fn run_backward(executor: &Executor, layer: &Layer, normalized: bool, extras: bool) -> Outputs {
    let (k, n) = (layer.inputs, layer.outputs);
    let mut dx = values(layer.plan.rows() * k, 20);
    let mut sums = vec![f64::NAN; layer.plan.group_count() * 2 * k];
    let (mut dw, mut db) = (values(k * n, 21), values(n, 22));
    let args = Backward {
        rows: &layer.plan,
        weights: &layer.packed(executor),
        output_gradient: layer.output_gradient(normalized),
        x: &layer.raw,
        input_gradient: Some(InputGradient {
            dx: &mut dx,
            accumulate: extras,
            addends: if extras {
                [Some(&layer.residual), Some(&layer.raw)]
            } else {
                [None, None]
            },
            sums: extras.then_some(GradientSums {
                y: &layer.residual,
                sums: &mut sums,
            }),
        }),
        weight_gradient: WeightGradient {
            dw: &mut dw,
            db: extras.then_some(&mut db),
            accumulate: extras,
        },
    };
    backward(executor, args);
    let (sums, db) = if extras {
        (sums, db)
    } else {
        (Vec::new(), Vec::new())
    };
    Outputs {
        floats: dx,
        sums,
        dw,
        db,
        ..Outputs::default()
    }
}

#[test]
fn the_backward_pass_matches_float64() {
    let executor = Executor::new(2, Isa::detect());
    for layer in layers() {
        let (k, n) = (layer.inputs, layer.outputs);
        for (normalized, extras) in [(false, false), (true, false), (true, true)] {
            let out = run_backward(&executor, &layer, normalized, extras);
            let dy = reference::output_gradient(&layer, normalized);
            let x: Vec<f64> = layer.raw.iter().map(|&x| x.into()).collect();
            let mut dx = reference::input_gradient(&layer, &dy);
            let mut dw = reference::weight_gradient(&layer, &x, &dy);
            let mut db = reference::sums(n, std::iter::repeat_n(0, dy.len() / n), 1, |row, j| {
                [dy[row * n + j]]
            });
            if extras {
                let before = values(dx.len(), 20);
                for (i, dx) in dx.iter_mut().enumerate() {
                    *dx += f64::from(before[i]) + f64::from(layer.residual[i]) + f64::from(layer.raw[i]);
                }
                dw.iter_mut()
                    .zip(values(k * n, 21))
                    .for_each(|(dw, before)| *dw += f64::from(before));
                db.iter_mut()
                    .zip(values(n, 22))
                    .for_each(|(db, before)| *db += f64::from(before));
                let groups = reference::rows(&layer).into_iter().map(|(_, group)| group);
                let terms = |row: usize, i: usize| {
                    let at = row * k + i;
                    [dx[at], dx[at] * f64::from(layer.residual[at])]
                };
                assert_close(
                    &out.sums,
                    &reference::sums(k, groups, layer.plan.group_count(), terms),
                    "sums",
                );
                assert_close(&out.db, &db, "db");
            }
            assert_close(&out.floats, &dx, "dx");
            assert_close(&out.dw, &dw, "dw");
        }
    }
}

fn run_backward_activated(
    executor: &Executor,
    layer: &Layer,
    act: Act,
    gated: bool,
    streaming: bool,
) -> Outputs {
    let (k, n) = (layer.inputs, layer.outputs);
    let mut da = AlignedBuf::from_slice(&vec![f32::NAN; layer.plan.rows() * k]);
    let mut sums = vec![f64::NAN; layer.plan.image_count() * 5 * k];
    let (mut dw, mut db) = (vec![f32::NAN; k * n], vec![f32::NAN; n]);
    let args = BackwardActivated {
        rows: &layer.plan,
        weights: &layer.packed(executor),
        output_gradient: layer.output_gradient(true),
        input: layer.activated(act, gated),
        da: &mut da,
        sums: &mut sums,
        streaming,
        weight_gradient: WeightGradient {
            dw: &mut dw,
            db: Some(&mut db),
            accumulate: false,
        },
    };
    backward_activated(executor, args);
    Outputs {
        floats: da.to_vec(),
        sums,
        dw,
        db,
        ..Outputs::default()
    }
}

#[test]
fn the_backward_pass_of_an_activated_input_matches_float64() {
    let executor = Executor::new(2, Isa::detect());
    for layer in layers() {
        let (k, n) = (layer.inputs, layer.outputs);
        let out = run_backward_activated(&executor, &layer, Act::Swish, true, true);
        let dy = reference::output_gradient(&layer, true);
        let da = reference::input_gradient(&layer, &dy);
        let z = reference::normalized(&layer);
        let terms = |row: usize, i: usize| {
            let at = row * k + i;
            let ((act, slope), raw) = (reference::swish(z[at]), f64::from(layer.raw[at]));
            [
                da[at] * act,
                da[at] * slope,
                da[at] * slope * raw,
                slope,
                slope * raw,
            ]
        };
        let images = reference::rows(&layer).into_iter().map(|(image, _)| image);
        let db = reference::sums(n, std::iter::repeat_n(0, dy.len() / n), 1, |row, j| {
            [dy[row * n + j]]
        });
        assert_close(&out.floats, &da, "da");
        assert_close(
            &out.sums,
            &reference::sums(k, images, layer.plan.image_count(), terms),
            "sums",
        );
        assert_close(
            &out.dw,
            &reference::weight_gradient(&layer, &reference::gated(&layer), &dy),
            "dw",
        );
        assert_close(&out.db, &db, "db");
    }
}

#[test]
fn all_passes_give_the_same_bits_for_any_instruction_set_and_number_of_threads() {
    let of_pairs = layers().into_iter().map(|layer| Layer {
        products: Products::Bf16Pairs,
        ..layer
    });
    for layer in layers().into_iter().chain(of_pairs) {
        let run = |isa, threads, streaming| {
            let executor = Executor::new(threads, isa);
            let mut out = vec![
                run_backward(&executor, &layer, true, true),
                run_backward(&executor, &layer, false, false),
            ];
            for operand in [Operand::Plain, Operand::Activated, Operand::Normalized] {
                out.push(run_forward(&executor, &layer, operand, true, streaming));
            }
            for (act, gated) in [(Act::Swish, true), (Act::Relu6, false)] {
                out.push(run_backward_activated(&executor, &layer, act, gated, streaming));
            }
            out
        };
        let expected = run(Isa::Portable, 1, false);
        for isa in Isa::available() {
            for threads in [1, 2, 3] {
                let out = run(isa, threads, threads > 1);
                assert!(
                    out == expected,
                    "{} to {} channels, {:?}, on {isa}, {threads} threads",
                    layer.inputs,
                    layer.outputs,
                    layer.products
                );
            }
        }
    }
}

#[test]
fn products_of_bfloat16_give_the_bits_of_f32_where_nothing_is_rounded() {
    let executor = Executor::new(2, Isa::detect());
    for layer in layers() {
        let run = |layer: &Layer| {
            let mut out = vec![
                run_backward(&executor, layer, true, true),
                run_backward(&executor, layer, true, false),
                run_backward(&executor, layer, false, false),
                run_backward_activated(&executor, layer, Act::Identity, true, true),
            ];
            for operand in [Operand::Plain, Operand::Activated, Operand::Normalized] {
                out.push(run_forward_with(
                    &executor,
                    layer,
                    (operand, Act::Identity),
                    true,
                    true,
                ));
            }
            out
        };
        let single = layer.of_quarters();
        let expected = run(&single);
        let pairs = Layer {
            products: Products::Bf16Pairs,
            ..single
        };
        assert!(
            run(&pairs) == expected,
            "{} to {} channels",
            pairs.inputs,
            pairs.outputs
        );
    }
}

#[test]
fn an_absent_gate_is_a_gate_of_one() {
    let executor = Executor::new(1, Isa::detect());
    let mut layer = layers().swap_remove(3);
    let without = run_backward_activated(&executor, &layer, Act::HSwish, false, false);
    layer.gate.fill(1.0);
    assert_eq!(
        run_backward_activated(&executor, &layer, Act::HSwish, true, false),
        without
    );
}

#[test]
#[should_panic(expected = "x holds 5 values, 6 expected")]
fn a_slice_of_the_wrong_size_is_refused() {
    let executor = Executor::new(1, Isa::Portable);
    let layer = Layer::new(&segments(1, &[2]), 3, 4, 4);
    let args = Forward {
        rows: &layer.plan,
        weights: &layer.packed(&executor),
        input: FullInput::Plain(&layer.raw[..5]),
        bias: None,
        y: &mut [0.0; 8],
        stride: 4,
        sums: None,
        streaming: false,
    };
    forward(&executor, args);
}
