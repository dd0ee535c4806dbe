//! The forward pass of a whole network.

use effdet_model::network::{
    BatchNorm, ChannelMatch, Head, MbConv, Network, Node, RESCALE_MEAN_RGB, RESCALE_STDDEV_RGB, Resample,
    ResizeKind, SeparableConv,
};

use super::{Float, Tape, Tensor, Value};
use crate::stochastic_depth::DrawKeys;

/// How a pass normalises and drops.
#[derive(Debug, Clone, Copy)]
pub enum Pass<'a> {
    /// Moving statistics, nothing dropped.
    Infer,
    /// Batch statistics; stochastic depth by these keys, without them nothing is dropped.
    Train(Option<DrawKeys<'a>>),
}

/// What [`forward`] puts on the tape under a name or as an output.
#[derive(Debug, Clone, PartialEq)]
pub struct Forward {
    /// Stage outputs in network order: `stem`, `stack_S/block_B`, `backbone/rN` (the endpoint at 1/2ᴺ of the image),
    /// `level/pL` (levels above the backbone's), `cell_C/pL`, `class/pL`, `box/pL`.
    pub named: Vec<(String, Value)>,
    /// Class logits of every level, finest first.
    pub class_logits: Vec<Value>,
    /// Box codes of every level, finest first.
    pub box_codes: Vec<Value>,
}

/// Runs `network` on loader-normalised `images`.
///
/// # Shapes
/// `images`: `[batch, height, width, 3]`, RGB.
pub fn forward<F: Float>(
    tape: &mut Tape<'_, F>,
    network: &Network,
    images: Tensor<F>,
    pass: Pass<'_>,
) -> Forward {
    let mut walk = Walk {
        tape,
        network,
        pass,
        layers: 0,
        named: Vec::new(),
    };
    let mut features = walk.backbone(images);
    for extra in &network.extra_levels {
        let from = features[features.len() - 1];
        let level = walk.resample(from, &extra.resample);
        features.push(walk.name(format!("level/p{}", extra.level), level));
    }
    for (index, cell) in network.cells.iter().enumerate() {
        for node in &cell.nodes {
            let output = walk.node(node, &features);
            features.push(output);
        }
        features = cell.outputs.iter().map(|&feature| features[feature]).collect();
        for (level, &feature) in network.levels.iter().zip(&features) {
            walk.name(format!("cell_{index}/p{}", level.level), feature);
        }
    }
    let class_logits = walk.head(&network.class_head, "class", &features);
    let box_codes = walk.head(&network.box_head, "box", &features);
    Forward {
        named: walk.named,
        class_logits,
        box_codes,
    }
}

struct Walk<'w, 'a, F> {
    tape: &'w mut Tape<'a, F>,
    network: &'w Network,
    pass: Pass<'w>,
    /// Layers that may have a residual branch so far, see [`DrawKeys::branch_factors`].
    layers: u64,
    named: Vec<(String, Value)>,
}

impl<F: Float> Walk<'_, '_, F> {
    /// Stem and blocks; gives the backbone's pyramid levels, finest first.
    fn backbone(&mut self, images: Tensor<F>) -> Vec<Value> {
        let network = self.network;
        let images = if network.hparams.rescale_input {
            rescale(images)
        } else {
            images
        };
        let images = self.tape.input(images);
        let stem = self.tape.conv(images, &network.stem.conv);
        let stem = self.batch_norm_act(stem, &network.stem.bn);
        let mut x = self.name("stem".into(), stem);
        let mut outputs = Vec::with_capacity(network.blocks.len());
        for block in &network.blocks {
            x = self.block(x, block);
            self.name(block.name.clone(), x);
            if let Some(reduction) = block.endpoint {
                self.name(format!("backbone/r{reduction}"), x);
            }
            outputs.push(x);
        }
        network
            .backbone_levels
            .iter()
            .map(|&block| outputs[block])
            .collect()
    }

    /// expand → depthwise → squeeze-and-excite → project (+ skip).
    fn block(&mut self, input: Value, block: &MbConv) -> Value {
        let mut x = input;
        if let Some((conv, bn)) = &block.expand {
            x = self.tape.conv(x, conv);
            x = self.batch_norm_act(x, bn);
        }
        x = self.tape.depthwise(x, &block.depthwise);
        x = self.batch_norm_act(x, &block.depthwise_bn);
        if let Some(se) = &block.squeeze_excite {
            let squeezed = self.tape.spatial_mean(x);
            let narrow = self.tape.conv(squeezed, &se.reduce);
            let narrow = self.tape.activate(narrow, self.network.hparams.act_type);
            let logits = self.tape.conv(narrow, &se.expand);
            x = self.tape.gate(x, logits);
        }
        x = self.tape.conv(x, &block.project);
        x = self.batch_norm(x, &block.project_bn);
        let layer = self.next_layer();
        if block.skip {
            self.residual(x, input, block.survival, layer)
        } else {
            x
        }
    }

    /// resample → fuse → activation → separable convolution → BN.
    fn node(&mut self, node: &Node, features: &[Value]) -> Value {
        let inputs = node
            .inputs
            .iter()
            .map(|input| self.resample(features[input.feature], &input.resample));
        let inputs = inputs.collect();
        let fused = self.tape.fuse(inputs, node.fusion_weights.clone());
        let active = self.tape.activate(fused, self.network.hparams.act_type);
        let mixed = self.separable(active, &node.conv);
        self.batch_norm(mixed, &node.bn)
    }

    fn resample(&mut self, mut x: Value, resample: &Resample) -> Value {
        if let Some(ChannelMatch { conv, bn }) = &resample.channel_match {
            x = self.tape.conv(x, conv);
            if let Some(bn) = bn {
                x = self.batch_norm(x, bn);
            }
        }
        match resample.resize {
            ResizeKind::Same => x,
            ResizeKind::MaxPool { stride_y, stride_x } => self.tape.max_pool(x, (stride_y, stride_x)),
            ResizeKind::Nearest => self.tape.nearest(x, resample.output),
        }
    }

    /// One head on all levels: convolutions are shared, batch norms are not.
    fn head(&mut self, head: &Head, kind: &str, features: &[Value]) -> Vec<Value> {
        let mut outputs = Vec::with_capacity(features.len());
        for (index, (&feature, level)) in features.iter().zip(&self.network.levels).enumerate() {
            let mut x = feature;
            for (repeat, layer) in head.layers.iter().enumerate() {
                let y = self.separable(x, &layer.conv);
                let y = self.batch_norm_act(y, &layer.bns[index]);
                let number = self.next_layer();
                // Without a survival probability the heads have no skip connections either.
                x = match self.network.hparams.survival_prob {
                    Some(survival) if repeat > 0 => self.residual(y, x, survival as f32, number),
                    _ => y,
                };
            }
            let output = self.separable(x, &head.predict);
            outputs.push(self.name(format!("{kind}/p{}", level.level), output));
        }
        outputs
    }

    fn separable(&mut self, x: Value, conv: &SeparableConv) -> Value {
        let x = self.tape.depthwise(x, &conv.depthwise);
        self.tape.conv(x, &conv.pointwise)
    }

    fn batch_norm(&mut self, x: Value, bn: &BatchNorm) -> Value {
        match self.pass {
            Pass::Train(_) => self.tape.batch_norm_train(x, bn),
            Pass::Infer => self.tape.batch_norm_infer(x, bn),
        }
    }

    fn batch_norm_act(&mut self, x: Value, bn: &BatchNorm) -> Value {
        let x = self.batch_norm(x, bn);
        self.tape.activate(x, self.network.hparams.act_type)
    }

    /// Number of the next layer that may have a residual branch.
    fn next_layer(&mut self) -> u64 {
        self.layers += 1;
        self.layers - 1
    }

    /// `branch + skip` with stochastic depth on the branch.
    fn residual(&mut self, mut branch: Value, skip: Value, survival: f32, layer: u64) -> Value {
        if let Pass::Train(Some(draws)) = self.pass
            && survival < 1.0
        {
            let factors = draws.branch_factors(survival, layer).into_iter().map(F::from_f32);
            branch = self.tape.drop_connect(branch, factors.collect());
        }
        self.tape.add(branch, skip)
    }

    fn name(&mut self, name: String, value: Value) -> Value {
        self.named.push((name, value));
        value
    }
}

/// The second normalisation inside the seed's backbone: `(x − mean)/stddev` per channel.
fn rescale<F: Float>(mut images: Tensor<F>) -> Tensor<F> {
    let (mean, stddev) = (
        RESCALE_MEAN_RGB.map(F::from_f32),
        RESCALE_STDDEV_RGB.map(F::from_f32),
    );
    for pixel in images.data.as_chunks_mut::<3>().0 {
        for (channel, value) in pixel.iter_mut().enumerate() {
            *value = (*value - mean[channel]) / stddev[channel];
        }
    }
    images
}

#[cfg(test)]
mod tests {
    use effdet_model::hparams::{FusionMethod, HParams, ImageSize, UpsampleRule};
    use effdet_model::network::VariableKind;
    use effdet_model::rng::{Draws, Purpose};
    use effdet_model::weights::Weights;

    use super::super::Parameters;
    use super::super::ops::gradient_check::noise_tensor;
    use super::*;

    const BATCH: usize = 2;
    const STEP: f64 = 1e-6;

    /// A network with every kind of layer, as small as the family allows.
    fn small(change: impl Fn(&mut HParams)) -> Network {
        let mut hparams = HParams::preset("efficientdet-d0").unwrap();
        hparams.image_size = ImageSize {
            height: 96,
            width: 64,
        };
        hparams.max_level = 6;
        hparams.num_classes = 2;
        hparams.fpn_num_filters = 8;
        hparams.fpn_cell_repeats = 2;
        hparams.box_class_repeats = 2;
        change(&mut hparams);
        Network::new(&hparams).unwrap()
    }

    /// Initial weights with noise on everything, so that no gradient is small by symmetry; more of it on depthwise kernels,
    /// whose initial values let activations fade.
    fn parameters(network: &Network) -> Parameters<f64> {
        let mut parameters = Parameters::from(&Weights::init(&network.variables, 1));
        let mut draws = Draws::new(1, Purpose::Init, 1, 0);
        for variable in &network.variables {
            let values = match variable.kind {
                VariableKind::Trainable => &mut parameters.trainable[variable.range()],
                VariableKind::Statistic => &mut parameters.statistics[variable.range()],
            };
            let deviation = if variable.leaf() == "depthwise_kernel" {
                0.4
            } else {
                0.05
            };
            values
                .iter_mut()
                .for_each(|value| *value += deviation * draws.normal());
        }
        parameters
    }

    fn outputs(network: &Network, parameters: &Parameters<f64>, pass: Pass<'_>) -> Vec<Tensor<f64>> {
        let mut tape = Tape::new(network, parameters);
        let forward = forward(&mut tape, network, images(network), pass);
        let values = forward.class_logits.into_iter().chain(forward.box_codes);
        values.map(|value| tape.value(value).clone()).collect()
    }

    fn images(network: &Network) -> Tensor<f64> {
        noise_tensor(0, BATCH, network.stem.input, 3)
    }

    /// Directional derivatives of a random linear function of the head outputs, one direction per part of the network.
    fn check_gradients(network: &Network, pass: Pass<'_>) {
        let base = parameters(network);
        let mut tape = Tape::new(network, &base);
        let forward = forward(&mut tape, network, images(network), pass);
        let values = forward.class_logits.into_iter().chain(forward.box_codes);
        let seeds: Vec<(Value, Tensor<f64>)> = (values.enumerate())
            .map(|(key, value)| {
                let y = tape.value(value);
                (value, noise_tensor(1 + key as u64, y.batch, y.map, y.channels))
            })
            .collect();
        let gradient = tape.backward(seeds.clone());
        let scalar = |parameters: &Parameters<f64>| -> f64 {
            let outputs = outputs(network, parameters, pass);
            let pairs = outputs.iter().zip(&seeds);
            pairs
                .map(|(y, (_, dy))| y.zip_values(dy, |y, dy| y * dy).data.iter().sum::<f64>())
                .sum()
        };

        let mut parts: Vec<String> = network
            .variables
            .iter()
            .map(|variable| part(&variable.name))
            .collect();
        parts.sort();
        parts.dedup();
        for wanted in parts {
            let mut draws = Draws::new(2, Purpose::Init, 0, 0);
            let (mut above, mut below) = (base.clone(), base.clone());
            let mut analytic = 0.0;
            let trainable = network
                .variables
                .iter()
                .filter(|v| v.kind == VariableKind::Trainable);
            for variable in trainable.filter(|variable| part(&variable.name) == wanted) {
                for i in variable.range() {
                    let direction = draws.normal();
                    analytic += direction * gradient[i];
                    above.trainable[i] += STEP * direction;
                    below.trainable[i] -= STEP * direction;
                }
            }
            let numeric = (scalar(&above) - scalar(&below)) / (2.0 * STEP);
            let error = ((numeric - analytic) / numeric).abs();
            assert!(
                error < 1e-5,
                "{wanted}: analytic {analytic}, numeric {numeric}, relative error {error:e}"
            );
        }
    }

    /// Stack, cell or head of a variable.
    fn part(name: &str) -> String {
        let mut parts = name.split('/');
        let first = parts.next().unwrap_or(name);
        match (first, parts.next()) {
            ("fpn_cells", Some(cell)) => format!("{first}/{cell}"),
            _ => first.to_owned(),
        }
    }

    #[test]
    fn gradients_of_a_whole_network_match_finite_differences_in_training() {
        let network = small(|hparams| {
            hparams.survival_prob = Some(0.7);
            hparams.backbone_survival_prob = Some(0.6);
        });
        let draws = DrawKeys {
            seed: 5,
            epoch: 1,
            images: &[3, 4],
        };
        check_gradients(&network, Pass::Train(Some(draws)));
    }

    #[test]
    fn gradients_of_a_whole_network_match_finite_differences_in_inference() {
        let network = small(|hparams| {
            hparams.fpn_weight_method = Some(FusionMethod::ChannelAttn);
            hparams.upsample_rule = UpsampleRule::Legacy;
            hparams.rescale_input = false;
            hparams.apply_bn_for_resampling = false;
        });
        check_gradients(&network, Pass::Infer);
    }

    #[test]
    fn stochastic_depth_changes_training_only() {
        let with = small(|hparams| hparams.backbone_survival_prob = Some(0.5));
        let without = small(|_| {});
        let parameters = parameters(&with);
        let keys = |images| {
            Pass::Train(Some(DrawKeys {
                seed: 5,
                epoch: 1,
                images,
            }))
        };
        let run = |network: &Network, pass| outputs(network, &parameters, pass);
        assert_eq!(run(&with, Pass::Infer), run(&without, Pass::Infer));
        assert_eq!(run(&with, Pass::Train(None)), run(&without, Pass::Train(None)));
        assert_ne!(run(&with, keys(&[1, 2])), run(&with, Pass::Train(None)));
    }
}
