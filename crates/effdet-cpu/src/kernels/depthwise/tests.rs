//! The kernels against a scalar float64 reference, and against themselves on other instruction sets and thread counts.

use effdet_model::network::MapSize;

use super::super::testing::{activation, assert_close, buffer, same_everywhere, values};
use super::*;
use crate::arena::AlignedBuf;

struct Layer {
    plan: DepthwisePlan,
    input: AlignedBuf,
    act: Act,
    scale: Vec<f32>,
    shift: Vec<f32>,
    weights: Vec<f32>,
    /// da, y.
    upstream: [AlignedBuf; 2],
    upstream_affine: [Vec<f32>; 2],
    /// gain, offset, b, c.
    upstream_vectors: [Vec<f32>; 4],
}

impl Layer {
    fn new(
        images: usize,
        maps: &[(usize, usize)],
        channels: usize,
        k: usize,
        stride: usize,
        act: Act,
    ) -> Self {
        let maps: Vec<_> = maps
            .iter()
            .map(|&(height, width)| MapSize { height, width })
            .collect();
        let plan = DepthwisePlan::new(images, &maps, channels, k, stride);
        let (inputs, outputs) = (plan.input_rows() * channels, plan.output_rows() * channels);
        let groups = maps.len() * channels;
        Self {
            input: buffer(inputs, 1),
            act,
            scale: values(groups, 2),
            shift: values(images * channels, 3),
            weights: values(k * k * channels, 4),
            upstream: [buffer(outputs, 5), buffer(outputs, 6)],
            upstream_affine: [values(groups, 7), values(groups, 8)],
            upstream_vectors: [
                values(images * channels, 9),
                values(images * channels, 10),
                values(groups, 11),
                values(groups, 12),
            ],
            plan,
        }
    }

    fn source(&self, affine: bool) -> Source<'_> {
        let affine = affine.then_some(Affine {
            scale: ChannelVectors::per_group(&self.scale),
            shift: ChannelVectors::per_image(&self.shift),
        });
        Source {
            raw: &self.input,
            affine,
            act: self.act,
        }
    }

    fn gradient(&self, activated: bool) -> OutputGradient<'_> {
        if !activated {
            return OutputGradient::Plain(&self.upstream[0]);
        }
        let [gain, offset, b, c] = &self.upstream_vectors;
        OutputGradient::Activated {
            da: &self.upstream[0],
            y: &self.upstream[1],
            affine: Affine::per_group(&self.upstream_affine[0], &self.upstream_affine[1]),
            act: self.act,
            gain: ChannelVectors::per_image(gain),
            offset: Some(ChannelVectors::per_image(offset)),
            b: ChannelVectors::per_group(b),
            c: ChannelVectors::per_group(c),
        }
    }
}

/// Layers with awkward sizes: single pixels, odd maps, partial vectors, several maps, bands, tiles and channel blocks.
fn layers() -> Vec<Layer> {
    vec![
        Layer::new(1, &[(1, 1)], 3, 3, 1, Act::Swish),
        Layer::new(1, &[(1, 1)], 3, 5, 2, Act::Swish),
        Layer::new(2, &[(7, 5)], 8, 3, 2, Act::Identity),
        Layer::new(2, &[(8, 6)], 24, 5, 2, Act::Swish),
        Layer::new(1, &[(2, 3), (5, 4), (1, 2)], 40, 3, 1, Act::Swish),
        Layer::new(2, &[(6, 9), (3, 5)], 88, 5, 1, Act::Relu6),
        Layer::new(1, &[(5, 13)], 300, 5, 1, Act::Swish),
        Layer::new(1, &[(4, 50)], 16, 3, 2, Act::Swish),
        Layer::new(1, &[(70, 3)], 20, 3, 1, Act::Swish),
        Layer::new(1, &[(82, 3)], 5, 5, 2, Act::Swish),
        Layer::new(1, &[(3, 840)], 33, 5, 1, Act::Identity),
        Layer::new(1, &[(3, 1701)], 40, 3, 2, Act::Identity),
    ]
}

/// Calls `f(map, image, oy, ox, iy, ix, tap)` for every pair of output and input pixel.
fn taps(plan: &DepthwisePlan, mut f: impl FnMut(usize, usize, usize, usize, usize)) {
    for (m, map) in plan.maps.iter().enumerate() {
        for image in 0..plan.images {
            for (oy, ox) in (0..map.output.cells()).map(|i| (i / map.output.width, i % map.output.width)) {
                for tap in 0..plan.kernel_size * plan.kernel_size {
                    let iy = (oy * plan.stride + tap / plan.kernel_size).wrapping_sub(map.pad_top);
                    let ix = (ox * plan.stride + tap % plan.kernel_size).wrapping_sub(map.pad_left);
                    if iy < map.input.height && ix < map.input.width {
                        let output =
                            map.first_output + image * map.output.cells() + oy * map.output.width + ox;
                        let input = map.first_input + image * map.input.cells() + iy * map.input.width + ix;
                        f(m, image, output, input, tap);
                    }
                }
            }
        }
    }
}

/// Map and image of every row.
fn owners(plan: &DepthwisePlan, cells: impl Fn(&plan::MapGeometry) -> usize) -> Vec<(usize, usize)> {
    let of_map = |(m, map): (usize, &plan::MapGeometry)| {
        let cells = cells(map);
        (0..plan.images * cells)
            .map(|row| (m, row / cells))
            .collect::<Vec<_>>()
    };
    plan.maps.iter().enumerate().flat_map(of_map).collect()
}

/// Activation and slope of every input value.
fn activated(layer: &Layer, affine: bool) -> Vec<(f64, f64)> {
    let channels = layer.plan.channels;
    let rows = owners(&layer.plan, |map| map.input.cells());
    let value = |(i, &raw): (usize, &f32)| {
        let ((map, image), c) = (rows[i / channels], i % channels);
        let (scale, shift) = (
            f64::from(layer.scale[map * channels + c]),
            f64::from(layer.shift[image * channels + c]),
        );
        let raw = f64::from(raw);
        activation(layer.act, if affine { scale * raw + shift } else { raw })
    };
    layer.input.iter().enumerate().map(value).collect()
}

fn reference_forward(layer: &Layer, affine: bool) -> Vec<f64> {
    let channels = layer.plan.channels;
    let x = activated(layer, affine);
    let mut y = vec![0.0; layer.plan.output_rows() * channels];
    taps(&layer.plan, |_, _, output, input, tap| {
        for c in 0..channels {
            y[output * channels + c] +=
                x[input * channels + c].0 * f64::from(layer.weights[tap * channels + c]);
        }
    });
    y
}

/// `Σ values` and `Σ values·factors` over the rows of each map.
fn reference_sums(channels: usize, rows: &[(usize, usize)], values: &[f64], factors: &[f64]) -> Vec<f64> {
    let maps = rows.last().map_or(0, |(map, _)| map + 1);
    let mut sums = vec![0.0; maps * 2 * channels];
    for (i, (value, factor)) in values.iter().zip(factors).enumerate() {
        let at = rows[i / channels].0 * 2 * channels + i % channels;
        sums[at] += value;
        sums[at + channels] += value * factor;
    }
    sums
}

#[test]
fn the_forward_pass_matches_float64_and_itself_everywhere() {
    for layer in layers() {
        let plan = &layer.plan;
        for affine in [true, false] {
            let run = |streaming: bool| {
                same_everywhere(|executor| {
                    let mut y = AlignedBuf::from_slice(&vec![f32::NAN; plan.output_rows() * plan.channels]);
                    let mut sums = vec![f64::NAN; plan.maps.len() * 2 * plan.channels];
                    let args = Forward {
                        plan,
                        input: layer.source(affine),
                        weights: &layer.weights,
                        y: &mut y,
                        sums: Some(&mut sums),
                        streaming,
                    };
                    forward(executor, args);
                    (y.to_vec(), sums)
                })
            };
            let (y, sums) = run(false);
            assert!(
                run(true) == (y.clone(), sums.clone()),
                "streaming changes nothing"
            );
            let expected = reference_forward(&layer, affine);
            assert_close("y", &y, &expected, 1e-6);
            let rows = owners(plan, |map| map.output.cells());
            assert_close(
                "sums",
                &sums,
                &reference_sums(plan.channels, &rows, &expected, &expected),
                2e-6,
            );
        }
    }
}

struct Gradients {
    dz: Vec<f64>,
    sums: Vec<f64>,
    dw: Vec<f64>,
}

fn reference_backward(layer: &Layer, affine: bool, upstream_activated: bool) -> Gradients {
    let (plan, channels) = (&layer.plan, layer.plan.channels);
    let rows = owners(plan, |map| map.output.cells());
    let x = activated(layer, affine);
    let dy: Vec<f64> = (0..plan.output_rows() * channels)
        .map(|i| {
            let ((map, image), c) = (rows[i / channels], i % channels);
            let (da, y) = (f64::from(layer.upstream[0][i]), f64::from(layer.upstream[1][i]));
            let per_map = |v: &[f32]| f64::from(v[map * channels + c]);
            let per_image = |v: &[f32]| f64::from(v[image * channels + c]);
            let [scale, shift] = &layer.upstream_affine;
            let [gain, offset, b, cc] = &layer.upstream_vectors;
            let slope = activation(layer.act, per_map(scale) * y + per_map(shift)).1;
            let formed = slope * (per_image(gain) * da + per_image(offset)) + per_map(b) * y + per_map(cc);
            if upstream_activated { formed } else { da }
        })
        .collect();
    let mut dz = vec![0.0; plan.input_rows() * channels];
    let mut dw = vec![0.0; layer.weights.len()];
    taps(plan, |_, _, output, input, tap| {
        for c in 0..channels {
            let dy = dy[output * channels + c];
            dz[input * channels + c] += dy * f64::from(layer.weights[tap * channels + c]);
            dw[tap * channels + c] += dy * x[input * channels + c].0;
        }
    });
    for (dz, (_, slope)) in dz.iter_mut().zip(&x) {
        *dz *= slope;
    }
    let raw: Vec<f64> = layer.input.iter().map(|&x| f64::from(x)).collect();
    let sums = reference_sums(channels, &owners(plan, |map| map.input.cells()), &dz, &raw);
    Gradients { dz, sums, dw }
}

#[test]
fn the_backward_pass_matches_float64_and_itself_everywhere() {
    for layer in layers() {
        let plan = &layer.plan;
        for (affine, activated) in [(true, true), (false, false)] {
            let run = |accumulate: bool, streaming: bool| {
                same_everywhere(|executor| {
                    let start = if accumulate { 0.5 } else { f32::NAN };
                    let mut dz = AlignedBuf::from_slice(&vec![start; plan.input_rows() * plan.channels]);
                    let mut sums = vec![f64::NAN; plan.maps.len() * 2 * plan.channels];
                    let mut dw = vec![f32::NAN; layer.weights.len()];
                    let args = Backward {
                        plan,
                        input: layer.source(affine),
                        weights: &layer.weights,
                        output_gradient: layer.gradient(activated),
                        input_gradient: InputGradient {
                            dz: &mut dz,
                            accumulate,
                            sums: (!accumulate).then_some(&mut sums),
                            streaming,
                        },
                        dw: &mut dw,
                    };
                    backward(executor, args);
                    (dz.to_vec(), (!accumulate).then_some(sums), dw)
                })
            };
            let plain = run(false, false);
            assert!(run(false, true) == plain, "streaming changes nothing");
            let (added, _, _) = run(true, false);
            let (dz, sums, dw) = plain;
            let expected = reference_backward(&layer, affine, activated);
            assert_close("dz", &dz, &expected.dz, 1e-6);
            assert_close("sums", &sums.unwrap(), &expected.sums, 2e-6);
            assert_close("dw", &dw, &expected.dw, 3e-6);
            for (added, dz) in added.iter().zip(&dz) {
                assert_eq!(*added, 0.5 + dz);
            }
        }
    }
}

#[test]
fn the_reference_gradients_are_the_slopes_of_the_reference() {
    let mut layer = Layer::new(2, &[(4, 5)], 3, 3, 2, Act::Swish);
    let upstream: Vec<f64> = layer.upstream[0].iter().map(|&x| f64::from(x)).collect();
    let loss = |layer: &Layer| -> f64 {
        reference_forward(layer, true)
            .iter()
            .zip(&upstream)
            .map(|(y, dy)| y * dy)
            .sum()
    };
    let expected = reference_backward(&layer, true, false);
    let h = 1.0 / 1024.0;
    let channels = layer.plan.channels;
    for i in 0..layer.weights.len() {
        let old = layer.weights[i];
        layer.weights[i] = old + h;
        let above = loss(&layer);
        layer.weights[i] = old - h;
        let slope = (above - loss(&layer)) / (2.0 * f64::from(h));
        layer.weights[i] = old;
        assert!((slope - expected.dw[i]).abs() < 1e-3, "dw[{i}]");
    }
    for i in 0..layer.input.len() {
        let old = layer.input[i];
        layer.input[i] = old + h;
        let above = loss(&layer);
        layer.input[i] = old - h;
        let slope = (above - loss(&layer)) / (2.0 * f64::from(h));
        layer.input[i] = old;
        // The input is scaled before z.
        let scale = f64::from(layer.scale[i % channels]);
        assert!((slope - scale * expected.dz[i]).abs() < 1e-3, "dz[{i}]");
    }
}
