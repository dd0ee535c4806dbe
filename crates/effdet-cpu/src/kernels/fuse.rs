//! BiFPN's weighted fusion of two or three resampled features in one pass.

use effdet_model::hparams::FusionMethod;
use effdet_model::network::MapSize;

use super::Executor;
use super::elementwise::{Affine, AffineVectors};
use super::gemm::padded;
use super::pointwise::{add, check, flush_rows, part};
use super::resample::{
    BackwardLine, Combine, Dots, ForwardLine, Resampler, backward_line, for_line_tasks, for_lines,
    forward_line, line_tasks,
};
use crate::arena::{Bump, SharedPtr};
use crate::probe::{Kernel, Work};

/// Added to the sum of the weights by the fast methods.
const EPSILON: f32 = 1e-4;

/// The weights of a fusion, ready for use: input `i` counts `x·w_i/total`.
#[derive(Debug, Clone)]
pub struct FusionWeights {
    method: FusionMethod,
    inputs: usize,
    channels: usize,
    /// w per input and channel: `[inputs, channels]`.
    weights: Vec<f32>,
    /// Per channel.
    total: Vec<f32>,
    /// Slope of the rectifier on the variables: `[inputs, channels]`.
    slopes: Vec<f32>,
}

impl FusionWeights {
    /// Prepares the trainable weights of one node; `relu` clips them at 0 first, in the fast methods.
    ///
    /// # Shapes
    /// `variables`: one slice per input, a single value or `channels` values as `method` asks; ignored for
    /// [`FusionMethod::Sum`].
    ///
    /// # Panics
    /// When a slice has another size.
    pub fn new(
        method: FusionMethod,
        relu: bool,
        inputs: usize,
        channels: usize,
        variables: &[&[f32]],
    ) -> Self {
        let mut this = Self {
            method,
            inputs,
            channels,
            weights: vec![1.0; inputs * channels],
            total: vec![1.0; channels],
            slopes: vec![1.0; inputs * channels],
        };
        if method == FusionMethod::Sum {
            return this;
        }
        check("variables", variables.len(), inputs);
        for (variable, weights) in variables.iter().zip(this.weights.chunks_exact_mut(channels)) {
            check("a fusion weight", variable.len(), variable_len(method, channels));
            for (weight, &value) in weights.iter_mut().zip(variable.iter().cycle()) {
                *weight = value;
            }
        }
        for c in 0..channels {
            let of_channel = |i: usize| i * channels + c;
            match method {
                FusionMethod::Attn | FusionMethod::ChannelAttn => {
                    let largest = (0..inputs)
                        .map(|i| this.weights[of_channel(i)])
                        .fold(f32::MIN, f32::max);
                    let exps: Vec<_> = (0..inputs)
                        .map(|i| f64::from(this.weights[of_channel(i)] - largest).exp())
                        .collect();
                    for (i, exp) in exps.iter().enumerate() {
                        this.weights[of_channel(i)] = (exp / exps.iter().sum::<f64>()) as f32;
                    }
                }
                FusionMethod::FastAttn | FusionMethod::ChannelFastAttn => {
                    let mut total = 0.0;
                    for i in (0..inputs).map(of_channel) {
                        if relu && this.weights[i] <= 0.0 {
                            (this.weights[i], this.slopes[i]) = (0.0, 0.0);
                        }
                        total += this.weights[i];
                    }
                    this.total[c] = total + EPSILON;
                }
                FusionMethod::Sum => {}
            }
        }
        this
    }

    /// Turns Σ df·x of every input and channel into the gradients by the variables.
    ///
    /// # Shapes
    /// `dots`: `[inputs, channels]`, of [`backward`]; `gradients`: shaped as the variables, overwritten; none for
    /// [`FusionMethod::Sum`].
    ///
    /// # Panics
    /// When sizes do not agree.
    pub fn gradients(&self, dots: &[f64], gradients: &mut [&mut [f32]]) {
        if self.method == FusionMethod::Sum {
            return;
        }
        check("dots", dots.len(), self.inputs * self.channels);
        check("gradients", gradients.len(), self.inputs);
        let mut sums = vec![0.0; gradients.iter().map(|gradient| gradient.len()).sum()];
        let len = variable_len(self.method, self.channels);
        for (i, gradient) in gradients.iter().enumerate() {
            check("a gradient", gradient.len(), len);
            for c in 0..self.channels {
                // Both kinds of weights w'/total have the slope (δ_ij − w'_j/total)·k_i.
                let weighed =
                    |j: usize| f64::from(self.weights[j * self.channels + c]) / f64::from(self.total[c]);
                let mean: f64 = (0..self.inputs)
                    .map(|j| weighed(j) * dots[j * self.channels + c])
                    .sum();
                let factor = match self.method {
                    FusionMethod::Attn | FusionMethod::ChannelAttn => weighed(i),
                    _ => f64::from(self.slopes[i * self.channels + c]) / f64::from(self.total[c]),
                };
                sums[i * len + c % len] += factor * (dots[i * self.channels + c] - mean);
            }
        }
        for (gradient, sums) in gradients.iter_mut().zip(sums.chunks_exact(len)) {
            for (gradient, &sum) in gradient.iter_mut().zip(sums) {
                *gradient = sum as f32;
            }
        }
    }

    /// `w_i/total` of every input and channel: `[inputs, channels]`.
    pub(crate) fn factors(&self) -> Vec<f32> {
        let factor = |(i, weight): (usize, &f32)| weight / self.total[i % self.channels];
        self.weights.iter().enumerate().map(factor).collect()
    }

    #[track_caller]
    fn check(&self, inputs: usize, channels: usize) {
        assert!(
            (self.inputs, self.channels) == (inputs, channels),
            "the weights are for {} inputs of {} channels, not {inputs} of {channels}",
            self.inputs,
            self.channels
        );
    }

    /// Weight and total of an input, none where both are 1.
    fn vectors(&self, input: usize) -> Option<(&[f32], &[f32])> {
        let weights = &self.weights[input * self.channels..][..self.channels];
        (self.method != FusionMethod::Sum).then_some((weights, &self.total))
    }

    fn combine(&self, input: usize) -> Combine {
        match (self.vectors(input), input) {
            (None, 0) => Combine::Copy,
            (None, _) => Combine::Add,
            (Some((weights, total)), 0) => Combine::Weigh(weights.as_ptr(), total.as_ptr()),
            (Some((weights, total)), _) => Combine::AddWeighed(weights.as_ptr(), total.as_ptr()),
        }
    }
}

/// Values of one variable.
fn variable_len(method: FusionMethod, channels: usize) -> usize {
    match method {
        FusionMethod::ChannelAttn | FusionMethod::ChannelFastAttn => channels,
        FusionMethod::Attn | FusionMethod::FastAttn => 1,
        FusionMethod::Sum => 0,
    }
}

/// One input of [`forward`].
#[derive(Debug)]
pub struct FuseInput<'a> {
    /// What is stored of the feature: `[images, input height, input width, channels]`.
    pub raw: &'a [f32],
    /// Batch norm on it, one group.
    pub affine: Option<Affine<'a>>,
    /// To the node's map.
    pub resampler: &'a Resampler,
    /// As in [`resample::Forward`](super::resample::Forward).
    pub argmax: Option<&'a mut [f32]>,
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// Number of images.
    pub images: usize,
    /// Number of channels.
    pub channels: usize,
    /// Weights.
    pub weights: &'a FusionWeights,
    /// Features in order.
    pub inputs: &'a mut [FuseInput<'a>],
    /// Overwritten with `Σ_i R_i(scale_i·raw_i + shift_i)·w_i/total`, added in order: `[images, height, width, channels]`.
    pub out: &'a mut [f32],
}

/// Fuses features.
///
/// # Panics
/// When a slice does not have the size its documentation gives.
pub fn forward(executor: &Executor, args: Forward<'_>) {
    let Forward {
        images,
        channels,
        weights,
        inputs,
        out,
    } = args;
    let values: usize = inputs.iter().map(|input| input.raw.len()).sum();
    let _report = executor.report(Kernel::Fuse, Work::new(0, values + out.len()));
    weights.check(inputs.len(), channels);
    let map = node_map(inputs.iter().map(|input| input.resampler));
    check("out", out.len(), images * map.cells() * channels);
    let inputs: Vec<_> = inputs
        .iter_mut()
        .map(|input| {
            let cells = input.resampler.input().cells();
            check("a feature", input.raw.len(), images * cells * channels);
            let affine = AffineVectors::new(input.affine, (1, images, channels));
            let argmax = input.argmax.as_deref_mut().map(|argmax| {
                check("argmax", argmax.len(), out.len());
                SharedPtr::new(argmax)
            });
            (input.raw, input.resampler, affine, argmax)
        })
        .collect();
    let out = SharedPtr::new(out);
    for_lines(executor, images, map, channels, &|image, y| {
        let at = (image * map.height + y) * map.width * channels;
        for (i, (raw, resampler, affine, argmax)) in inputs.iter().enumerate() {
            // SAFETY: the sizes are checked above, and lines are disjoint.
            unsafe {
                let line = ForwardLine {
                    resampler,
                    y,
                    channels,
                    raw: raw[image * resampler.input().cells() * channels..].as_ptr(),
                    scale: affine.scale.at(0, image, channels, 0),
                    shift: affine.shift.at(0, image, channels, 0),
                    argmax: argmax.map_or(std::ptr::null_mut(), |argmax| argmax.get().add(at)),
                    combine: weights.combine(i),
                    out: out.get().add(at),
                };
                forward_line(executor.isa(), &line);
            }
        }
    });
}

/// The map that all inputs are resampled to.
///
/// # Panics
/// When there are none, or they disagree.
#[track_caller]
fn node_map<'a>(mut resamplers: impl Iterator<Item = &'a Resampler>) -> MapSize {
    let map = resamplers.next().expect("a node has inputs").output();
    assert!(
        resamplers.all(|resampler| resampler.output() == map),
        "all inputs of a node are resampled to its map {map:?}"
    );
    map
}

/// One input of [`backward`].
#[derive(Debug)]
pub struct FuseGradient<'a> {
    /// As in the forward pass.
    pub raw: &'a [f32],
    /// As in the forward pass.
    pub affine: Option<Affine<'a>>,
    /// As in the forward pass.
    pub resampler: &'a Resampler,
    /// Of the forward pass.
    pub argmax: Option<&'a [f32]>,
    /// Overwritten with the gradient by the feature, `w_i/total · R_iᵀ·df`: shaped as `raw`.
    pub dx: &'a mut [f32],
    /// Whether it is added to what `dx` holds instead.
    pub accumulate: bool,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// Number of images.
    pub images: usize,
    /// Number of channels.
    pub channels: usize,
    /// Weights.
    pub weights: &'a FusionWeights,
    /// Gradient by the fused feature: `[images, height, width, channels]`.
    pub df: &'a [f32],
    /// Features in order.
    pub inputs: &'a mut [FuseGradient<'a>],
    /// Overwritten with Σ df·x over all cells, x the resampled feature, for [`FusionWeights::gradients`]:
    /// `[inputs, channels]`.
    pub dots: Option<&'a mut [f64]>,
}

/// The backward pass of [`forward`].
///
/// # Panics
/// When a slice does not have the size its documentation gives.
///
/// # Determinism
/// The same bits for any number of threads and any instruction set.
pub fn backward(executor: &Executor, args: Backward<'_>) {
    let Backward {
        images,
        channels,
        weights,
        df,
        inputs,
        mut dots,
    } = args;
    let values: usize = inputs.iter().map(|input| 2 * input.raw.len()).sum();
    let _report = executor.report(Kernel::FuseBackward, Work::new(0, values + df.len()));
    weights.check(inputs.len(), channels);
    let map = node_map(inputs.iter().map(|input| input.resampler));
    check("df", df.len(), images * map.cells() * channels);
    if let Some(dots) = &dots {
        check("dots", dots.len(), inputs.len() * channels);
    }
    for (i, input) in inputs.iter_mut().enumerate() {
        let dots = dots
            .as_deref_mut()
            .map(|dots| &mut dots[i * channels..][..channels]);
        backward_input(executor, (images, channels), weights.vectors(i), df, input, dots);
    }
}

/// The gradient of one input, gathered line by line.
fn backward_input(
    executor: &Executor,
    (images, channels): (usize, usize),
    weight: Option<(&[f32], &[f32])>,
    df: &[f32],
    input: &mut FuseGradient<'_>,
    dots: Option<&mut [f64]>,
) {
    let resampler = input.resampler;
    let map = resampler.input();
    check("a feature", input.raw.len(), images * map.cells() * channels);
    check("dx", input.dx.len(), input.raw.len());
    let affine = AffineVectors::new(input.affine, (1, images, channels));
    let argmax = resampler.argmax(input.argmax, df.len());
    let (isa, pool) = (executor.isa(), executor.pool());
    let (raw, accumulate) = (input.raw, input.accumulate);
    let dx = SharedPtr::new(input.dx);
    let tasks = line_tasks(images, map, channels);
    let mut workspace = executor.workspace();
    let totals = workspace.totals(tasks * channels);
    let task_totals = SharedPtr::new(totals);
    let with_dots = dots.is_some();
    for_line_tasks(executor, images, map, channels, &|task, worker, lines| {
        // SAFETY: inside the task, with its worker, once; the totals at `task` belong to it alone.
        let (mut scratch, totals) = unsafe {
            (
                Bump::new(pool.scratch(worker, Bump::room(padded(channels)))),
                part(task_totals, task, channels),
            )
        };
        let sums = scratch.take_zeroed(padded(channels));
        totals.fill(0.0);
        for line in lines {
            let (image, y) = (line / map.height, line % map.height);
            let at = line * map.width * channels;
            let output = image * resampler.output().cells() * channels;
            // SAFETY: the sizes are checked above, and lines are disjoint.
            unsafe {
                let line = BackwardLine {
                    resampler,
                    y,
                    channels,
                    dout: df.as_ptr().add(output),
                    argmax: argmax[output.min(argmax.len())..].as_ptr(),
                    weight: weight.map_or(std::ptr::null(), |(weight, _)| weight.as_ptr()),
                    total: weight.map_or(std::ptr::null(), |(_, total)| total.as_ptr()),
                    dx: dx.get().add(at),
                    accumulate,
                    dots: with_dots.then(|| Dots {
                        raw: raw.as_ptr().add(at),
                        scale: affine.scale.at(0, image, channels, 0),
                        shift: affine.shift.at(0, image, channels, 0),
                        sums,
                    }),
                };
                backward_line(isa, &line);
                if with_dots {
                    flush_rows(isa, sums, padded(channels), totals, channels);
                }
            }
        }
    });
    if let Some(dots) = dots {
        dots.fill(0.0);
        totals.chunks_exact(channels).for_each(|totals| add(dots, totals));
    }
}

#[cfg(test)]
mod tests {
    use effdet_model::hparams::UpsampleRule;
    use effdet_model::network::ResizeKind;

    use super::super::resample::reference;
    use super::super::testing::{assert_close, same_everywhere, values};
    use super::*;

    const METHODS: [FusionMethod; 5] = [
        FusionMethod::Attn,
        FusionMethod::FastAttn,
        FusionMethod::Sum,
        FusionMethod::ChannelAttn,
        FusionMethod::ChannelFastAttn,
    ];

    /// A node of a map of 4×6 cells.
    struct Node {
        images: usize,
        channels: usize,
        kinds: Vec<(MapSize, ResizeKind)>,
        resamplers: Vec<Resampler>,
        raw: Vec<Vec<f32>>,
        scale: Vec<f32>,
        shift: Vec<f32>,
        df: Vec<f32>,
    }

    const MAP: MapSize = MapSize { height: 4, width: 6 };

    impl Node {
        fn new(images: usize, channels: usize, inputs: usize) -> Self {
            let pool = ResizeKind::MaxPool {
                stride_y: 2,
                stride_x: 2,
            };
            let kinds = [
                (MAP, ResizeKind::Same),
                (MapSize { height: 2, width: 3 }, ResizeKind::Nearest),
                (MapSize { height: 7, width: 12 }, pool),
            ];
            let kinds: Vec<_> = kinds.into_iter().cycle().skip(3 - inputs).take(inputs).collect();
            Self {
                resamplers: kinds
                    .iter()
                    .map(|&(map, kind)| Resampler::new(map, MAP, kind, UpsampleRule::HalfPixel))
                    .collect(),
                raw: kinds
                    .iter()
                    .enumerate()
                    .map(|(i, (map, _))| values(images * map.cells() * channels, i as u32))
                    .collect(),
                scale: values(channels, 10),
                shift: values(channels, 11),
                df: values(images * MAP.cells() * channels, 12),
                images,
                channels,
                kinds,
            }
        }

        /// The resampled inputs in float64.
        fn resampled(&self, input: usize) -> Vec<f64> {
            let (map, kind) = self.kinds[input];
            (0..self.df.len())
                .map(|i| {
                    let (cell, c) = (i / self.channels, i % self.channels);
                    let (image, cell) = (cell / MAP.cells(), cell % MAP.cells());
                    let value = |cell: usize| {
                        let raw = self.raw[input][(image * map.cells() + cell) * self.channels + c];
                        f64::from(raw) * f64::from(self.scale[c]) + f64::from(self.shift[c])
                    };
                    let place = (cell / MAP.width, cell % MAP.width);
                    value(reference::source(
                        kind,
                        UpsampleRule::HalfPixel,
                        (map, MAP),
                        place,
                        value,
                    ))
                })
                .collect()
        }

        /// The share of every input and channel in float64.
        fn shares(&self, method: FusionMethod, variables: &[Vec<f64>]) -> Vec<Vec<f64>> {
            let at = |i: usize, c: usize| variables[i][c % variables[i].len()];
            let inputs = self.kinds.len();
            let share = |i: usize, c: usize| match method {
                FusionMethod::Sum => 1.0,
                FusionMethod::Attn | FusionMethod::ChannelAttn => {
                    at(i, c).exp() / (0..inputs).map(|j| at(j, c).exp()).sum::<f64>()
                }
                _ => at(i, c) / ((0..inputs).map(|j| at(j, c)).sum::<f64>() + 1e-4),
            };
            (0..inputs)
                .map(|i| (0..self.channels).map(|c| share(i, c)).collect())
                .collect()
        }

        fn fused(&self, shares: &[Vec<f64>]) -> Vec<f64> {
            let mut out = vec![0.0; self.df.len()];
            for (i, shares) in shares.iter().enumerate() {
                for (at, (out, x)) in out.iter_mut().zip(self.resampled(i)).enumerate() {
                    *out += x * shares[at % self.channels];
                }
            }
            out
        }
    }

    #[test]
    fn fusions_and_their_gradients_match_float64_and_themselves_everywhere() {
        for (images, channels, inputs) in [(1, 3, 2), (2, 40, 3), (2, 64, 2), (1, 88, 3)] {
            let node = Node::new(images, channels, inputs);
            for method in METHODS {
                let variables: Vec<Vec<f32>> = (0..inputs)
                    .map(|i| {
                        values(variable_len(method, channels), 20 + i as u32)
                            .iter()
                            .map(|x| x + 1.5)
                            .collect()
                    })
                    .collect();
                let (out, dx, gradients) =
                    same_everywhere(|executor| run(&node, method, &variables, executor));

                let variables: Vec<Vec<f64>> = variables
                    .iter()
                    .map(|v| v.iter().map(|&x| f64::from(x)).collect())
                    .collect();
                let shares = node.shares(method, &variables);
                assert_close("out", &out, &node.fused(&shares), 2e-6);
                let loss = |shares: &[Vec<f64>]| -> f64 {
                    node.fused(shares)
                        .iter()
                        .zip(&node.df)
                        .map(|(out, &df)| out * f64::from(df))
                        .sum()
                };
                let h = 1e-5;
                for i in 0..inputs {
                    for k in 0..variables[i].len() {
                        let slope = |h: f64| {
                            let mut moved = variables.clone();
                            moved[i][k] += h;
                            loss(&node.shares(method, &moved))
                        };
                        let expected = (slope(h) - slope(-h)) / (2.0 * h);
                        assert!(
                            (f64::from(gradients[i][k]) - expected).abs() < 2e-5,
                            "{method:?} {i} {k}"
                        );
                    }
                    let (map, kind) = node.kinds[i];
                    let mut expected = vec![0.0; dx[i].len()];
                    for (at, &df) in node.df.iter().enumerate() {
                        let (cell, c) = (at / channels, at % channels);
                        let (image, cell) = (cell / MAP.cells(), cell % MAP.cells());
                        let input = |cell: usize| (image * map.cells() + cell) * channels + c;
                        let value =
                            |cell: usize| f64::from(node.raw[i][input(cell)]) * f64::from(node.scale[c]);
                        let place = (cell / MAP.width, cell % MAP.width);
                        let from = reference::source(kind, UpsampleRule::HalfPixel, (map, MAP), place, value);
                        expected[input(from)] += f64::from(df) * shares[i][c];
                    }
                    // The first input is accumulated on ones.
                    expected
                        .iter_mut()
                        .for_each(|x| *x += if i == 0 { 1.0 } else { 0.0 });
                    assert_close("dx", &dx[i], &expected, 2e-6);
                }
            }
        }
    }

    type Results = (Vec<f32>, Vec<Vec<f32>>, Vec<Vec<f32>>);

    fn run(node: &Node, method: FusionMethod, variables: &[Vec<f32>], executor: &Executor) -> Results {
        let (images, channels, inputs) = (node.images, node.channels, node.kinds.len());
        let slices: Vec<&[f32]> = variables.iter().map(|v| v.as_slice()).collect();
        let weights = FusionWeights::new(method, false, inputs, channels, &slices);
        let affine = Some(Affine::per_group(&node.scale, &node.shift));
        let mut argmax = vec![vec![f32::NAN; node.df.len()]; inputs];
        let mut out = vec![f32::NAN; node.df.len()];
        let mut features: Vec<_> = (node.raw.iter().zip(&node.resamplers).zip(&mut argmax))
            .map(|((raw, resampler), argmax)| FuseInput {
                raw,
                affine,
                resampler,
                argmax: resampler.needs_argmax().then_some(argmax),
            })
            .collect();
        let args = Forward {
            images,
            channels,
            weights: &weights,
            inputs: &mut features,
            out: &mut out,
        };
        forward(executor, args);
        let mut dx: Vec<_> = node.raw.iter().map(|raw| vec![1.0; raw.len()]).collect();
        let mut dots = vec![f64::NAN; inputs * channels];
        let mut features: Vec<_> = (node.raw.iter().zip(&node.resamplers).zip(&argmax).zip(&mut dx))
            .enumerate()
            .map(|(i, (((raw, resampler), argmax), dx))| FuseGradient {
                raw,
                affine,
                resampler,
                argmax: Some(argmax),
                dx,
                accumulate: i == 0,
            })
            .collect();
        let args = Backward {
            images,
            channels,
            weights: &weights,
            df: &node.df,
            inputs: &mut features,
            dots: Some(&mut dots),
        };
        backward(executor, args);
        let mut gradients = variables.to_vec();
        let mut slices: Vec<&mut [f32]> = gradients.iter_mut().map(|v| v.as_mut_slice()).collect();
        weights.gradients(&dots, &mut slices);
        (out, dx, gradients)
    }

    #[test]
    fn rectified_weights_below_zero_count_and_learn_nothing() {
        let weights = FusionWeights::new(FusionMethod::FastAttn, true, 2, 3, &[&[-1.0], &[2.0]]);
        assert_eq!(weights.weights, [0.0, 0.0, 0.0, 2.0, 2.0, 2.0]);
        assert_eq!(weights.total, [2.0001; 3]);
        let (mut first, mut second) = ([f32::NAN], [f32::NAN]);
        weights.gradients(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &mut [&mut first, &mut second]);
        assert_eq!(first, [0.0]);
        assert!(second[0] > 0.0);
    }
}
