//! Lays a network out as steps, buffers and constants.

use std::ops::Range;

use effdet_model::network::{
    Conv, MbConv, Network, RESCALE_MEAN_RGB, RESCALE_STDDEV_RGB, Resample, ResizeKind, SeparableConv,
};

use super::bands::{BandLayer, BandTask, Feature, LevelLayer, Source, Target};
use super::depthwise::{Geometry, LANE_GROUP};
use super::fold::Constants;
use super::lifetimes::{Lifetimes, Slot};
use super::pointwise::{Excitation, Gate, PointwiseLayer};
use super::run::Output;
use crate::engine::act_of;
use crate::kernels::resample::Resampler;
use crate::math::Act;
use crate::probe::{Kernel, Stage, Work as Cost};

/// Layers that run at the same time.
#[derive(Debug)]
pub(super) struct Step {
    pub stage: Stage,
    pub kernel: Kernel,
    /// Nominal.
    pub cost: Cost,
    pub work: Work,
}

#[derive(Debug)]
pub(super) enum Work {
    Bands(Vec<BandLayer>, Vec<Task<BandTask>>),
    Pointwise(Vec<PointwiseLayer>, Vec<Task<Range<usize>>>),
    Excite(Excitation),
    Levels(Vec<LevelLayer>),
}

/// A part of one of a step's layers.
#[derive(Debug)]
pub(super) struct Task<P> {
    /// Index of the layer.
    pub layer: usize,
    pub part: P,
    /// Multiply-adds.
    pub cost: u64,
}

/// Everything about a plan that the network alone decides.
#[derive(Debug)]
pub(super) struct Layout {
    pub steps: Vec<Step>,
    pub constants: Constants,
    pub lifetimes: Lifetimes,
}

pub(super) fn build(network: &Network) -> Layout {
    let mut builder = Builder {
        network,
        act: act_of(network.hparams.act_type),
        steps: Vec::new(),
        constants: Constants::default(),
        lifetimes: Lifetimes::default(),
    };
    let backbone = builder.backbone();
    let features = builder.pyramid(&backbone);
    builder.heads(&features);
    builder.finish()
}

/// Multiply-adds and values of several layers.
fn sum(costs: impl Iterator<Item = (usize, usize)>) -> (usize, usize) {
    costs.fold((0, 0), |(macs, values), cost| (macs + cost.0, values + cost.1))
}

/// Tasks in order of where they start on their maps, each given as `(start, length of the map)`.
///
/// Workers take tasks in equal shares. In this order a worker has the same part of all maps in one step after the other, whose
/// lines are still in its cache.
fn from_top_to_bottom<P>(
    tasks: impl Iterator<Item = Task<P>>,
    place: impl Fn(&Task<P>) -> (usize, usize),
) -> Vec<Task<P>> {
    let mut tasks: Vec<_> = tasks.collect();
    tasks.sort_by(|a, b| {
        let ((a, of_a), (b, of_b)) = (place(a), place(b));
        (a * of_b).cmp(&(b * of_a))
    });
    tasks
}

struct Builder<'a> {
    network: &'a Network,
    act: Act,
    steps: Vec<Step>,
    constants: Constants,
    lifetimes: Lifetimes,
}

impl Builder<'_> {
    /// A buffer that the next step writes.
    fn define(&mut self, len: usize) -> Slot {
        self.lifetimes.define(len, self.steps.len() as u32)
    }

    /// Notes that the next step reads a buffer.
    fn read(&mut self, slot: Slot) -> Slot {
        self.lifetimes.read(slot, self.steps.len() as u32);
        slot
    }

    fn push(&mut self, stage: Stage, kernel: Kernel, cost: (usize, usize), work: Work) {
        self.steps.push(Step {
            stage,
            kernel,
            cost: Cost::new(cost.0, cost.1),
            work,
        });
    }

    fn push_bands(&mut self, stage: Stage, layers: Vec<BandLayer>) {
        let cost = sum(layers.iter().map(BandLayer::cost));
        let tasks = (layers.iter().enumerate()).flat_map(|(index, layer)| {
            let task = move |part: BandTask| Task {
                layer: index,
                cost: layer.task_cost(&part),
                part,
            };
            layer.tasks().into_iter().map(task)
        });
        let tasks = from_top_to_bottom(tasks, |task| {
            (task.part.top, layers[task.layer].geometry.output.height)
        });
        self.push(stage, Kernel::FusedDepthwise, cost, Work::Bands(layers, tasks));
    }

    fn push_pointwise(&mut self, stage: Stage, layers: Vec<PointwiseLayer>) {
        let cost = sum(layers.iter().map(PointwiseLayer::cost));
        let tasks = (layers.iter().enumerate()).flat_map(|(index, layer)| {
            let task = move |rows: Range<usize>| Task {
                layer: index,
                cost: layer.row_cost() * rows.len() as u64,
                part: rows,
            };
            layer.tasks().into_iter().map(task)
        });
        let tasks = from_top_to_bottom(tasks, |task| (task.part.start, layers[task.layer].rows));
        self.push(stage, Kernel::Pointwise, cost, Work::Pointwise(layers, tasks));
    }

    /// Stem and blocks; gives the outputs of the backbone's levels, finest first.
    fn backbone(&mut self) -> Vec<Slot> {
        let network = self.network;
        let mut outputs = Vec::with_capacity(network.blocks.len());
        for (index, block) in network.blocks.iter().enumerate() {
            let input = outputs.last().copied();
            outputs.push(self.block(Stage::Block(index), block, input));
        }
        network
            .backbone_levels
            .iter()
            .map(|&block| outputs[block])
            .collect()
    }

    /// One block; without input it is the first one, which takes the image through the stem.
    fn block(&mut self, stage: Stage, block: &MbConv, input: Option<Slot>) -> Slot {
        let act = self.act;
        let channels = block.depthwise.channels;
        let source = match (input, &block.expand) {
            (None, expand) => {
                assert!(expand.is_none(), "the first block does not expand");
                self.stem()
            }
            (Some(input), Some((conv, norm))) => Source::Expand {
                input: self.read(input),
                conv: self.constants.dense(conv, Some(*norm)),
                act,
            },
            (Some(input), None) => Source::Features {
                inputs: vec![self.same(input, block.input)],
                factors: None,
                act: Act::Identity,
            },
        };
        let cells = block.output.cells();
        let wide = self.define(cells * channels);
        let mut layer = BandLayer {
            source,
            depthwise: self
                .constants
                .depthwise(&block.depthwise, Some(block.depthwise_bn)),
            geometry: Geometry::new(block.input, block.depthwise.size, block.depthwise.stride),
            channels,
            target: Target::Tensor {
                act,
                out: wide,
                sums: None,
            },
            zeros: 0,
        };
        let bands = layer.bands();
        let sums = (block.squeeze_excite).map(|_| self.define(bands * channels.next_multiple_of(LANE_GROUP)));
        layer.target = Target::Tensor { act, out: wide, sums };
        self.push_bands(stage, vec![layer]);

        let project = self.constants.dense(&block.project, Some(block.project_bn));
        let mut gate = Gate::None;
        if let Some((layer, sums)) = block.squeeze_excite.zip(sums) {
            let table = &self.network.variables;
            let bias = |conv: &Conv| conv.bias.expect("squeeze-and-excitation has biases");
            gate = if Gate::belongs_to_rows(cells, &project) {
                Gate::Rows(self.define(channels))
            } else {
                Gate::Weights(self.define(project.packed_len()))
            };
            let work = Work::Excite(Excitation {
                sums: self.read(sums),
                bands,
                channels,
                pixels: cells,
                reduce_kernel: self.constants.copy(table, layer.reduce.kernel),
                reduce_bias: self.constants.copy(table, bias(&layer.reduce)),
                expand_kernel: self.constants.copy(table, layer.expand.kernel),
                expand_bias: self.constants.copy(table, bias(&layer.expand)),
                act,
                project,
                gate,
            });
            let values = 2 * project.packed_len();
            self.push(stage, Kernel::Pack, (0, values), work);
        }
        if let Gate::Rows(slot) | Gate::Weights(slot) = gate {
            self.read(slot);
        }
        let layer = PointwiseLayer {
            dense: project,
            gate,
            input: self.read(wide),
            residual: input.filter(|_| block.skip).map(|slot| self.read(slot)),
            out: self.define(cells * project.outputs),
            rows: cells,
        };
        let out = layer.out;
        self.push_pointwise(stage, vec![layer]);
        out
    }

    fn stem(&mut self) -> Source {
        let stem = &self.network.stem;
        let rescale = |colour: usize| {
            let (mean, stddev) = (RESCALE_MEAN_RGB[colour], RESCALE_STDDEV_RGB[colour]);
            if self.network.hparams.rescale_input {
                (1.0 / stddev, -mean / stddev)
            } else {
                (1.0, 0.0)
            }
        };
        Source::Stem {
            image: Geometry::of_image(stem.input, stem.conv.size, stem.conv.stride),
            normalize: std::array::from_fn(rescale),
            conv: self.constants.dense(&stem.conv, Some(stem.bn)),
            act: self.act,
        }
    }

    /// A feature that is read as it is.
    fn same(&mut self, slot: Slot, map: effdet_model::network::MapSize) -> Feature {
        let rule = self.network.hparams.upsample_rule;
        Feature {
            slot: self.read(slot),
            resampler: Resampler::new(map, map, ResizeKind::Same, rule),
        }
    }

    fn resampled(&mut self, slot: Slot, resample: &Resample) -> Feature {
        let rule = self.network.hparams.upsample_rule;
        Feature {
            slot: self.read(slot),
            resampler: Resampler::new(resample.input, resample.output, resample.resize, rule),
        }
    }

    /// Extra levels and cells; gives the last cell's outputs, finest first.
    fn pyramid(&mut self, backbone: &[Slot]) -> Vec<Slot> {
        let network = self.network;
        let filters = network.hparams.fpn_num_filters;
        // All channel matches read the backbone, so they run at once.
        let mut matches = Vec::new();
        let levels =
            (network.extra_levels.iter()).map(|extra| (&extra.resample, network.backbone_levels.len() - 1));
        let inputs = (network.cells.iter().take(1).flat_map(|cell| &cell.nodes))
            .flat_map(|node| node.inputs.iter().map(|input| (&input.resample, input.feature)));
        for (resample, feature) in levels.chain(inputs) {
            let Some(matched) = &resample.channel_match else {
                continue;
            };
            let rows = resample.input.cells();
            matches.push(PointwiseLayer {
                dense: self.constants.dense(&matched.conv, matched.bn),
                gate: Gate::None,
                input: self.read(backbone[feature]),
                residual: None,
                out: self.define(rows * filters),
                rows,
            });
        }
        let mut matched: std::collections::VecDeque<Slot> = matches.iter().map(|layer| layer.out).collect();
        if !matches.is_empty() {
            self.push_pointwise(Stage::Pyramid, matches);
        }
        let mut take = |resample: &Resample, otherwise: Slot| match resample.channel_match {
            Some(_) => matched.pop_front().expect("every channel match has run"),
            None => otherwise,
        };

        let mut features = backbone.to_vec();
        for extra in &network.extra_levels {
            let from = take(&extra.resample, features[features.len() - 1]);
            let layer = LevelLayer {
                input: self.resampled(from, &extra.resample),
                channels: filters,
                out: self.define(extra.resample.output.cells() * filters),
            };
            features.push(layer.out);
            let values = (extra.resample.input.cells() + extra.resample.output.cells()) * filters;
            self.push(
                Stage::Pyramid,
                Kernel::Fuse,
                (0, values),
                Work::Levels(vec![layer]),
            );
        }
        for cell in &network.cells {
            for node in &cell.nodes {
                let inputs = (node.inputs.iter())
                    .map(|input| {
                        let from = take(&input.resample, features[input.feature]);
                        self.resampled(from, &input.resample)
                    })
                    .collect();
                let fusion = (network.hparams.fusion(), network.hparams.fusion_relu);
                let source = Source::Features {
                    inputs,
                    factors: self.constants.fusion(fusion, &node.fusion_weights, filters),
                    act: self.act,
                };
                let out = self.define(node.map.cells() * filters);
                let layer = self.separable(
                    source,
                    &node.conv,
                    Some(node.bn),
                    node.map,
                    (Act::Identity, Output::Slot(out)),
                );
                self.push_bands(Stage::Pyramid, vec![layer]);
                features.push(out);
            }
            features = cell.outputs.iter().map(|&feature| features[feature]).collect();
        }
        features
    }

    fn separable(
        &mut self,
        source: Source,
        conv: &SeparableConv,
        norm: Option<effdet_model::network::BatchNorm>,
        map: effdet_model::network::MapSize,
        (act, out): (Act, Output),
    ) -> BandLayer {
        BandLayer {
            source,
            depthwise: self.constants.depthwise(&conv.depthwise, None),
            geometry: Geometry::new(map, conv.depthwise.size, conv.depthwise.stride),
            channels: conv.depthwise.channels,
            target: Target::Pointwise {
                conv: self.constants.dense(&conv.pointwise, norm),
                act,
                out,
                residual: None,
            },
            zeros: 0,
        }
    }

    /// Both heads on all levels, layer by layer.
    fn heads(&mut self, features: &[Slot]) {
        let network = self.network;
        let heads = [&network.class_head, &network.box_head];
        let mut inputs = [features.to_vec(), features.to_vec()];
        for index in 0..network.class_head.layers.len() {
            let mut layers = Vec::new();
            for (inputs, head) in inputs.iter_mut().zip(heads) {
                let layer = &head.layers[index];
                for ((input, level), norm) in inputs.iter_mut().zip(&network.levels).zip(&layer.bns) {
                    let source = self.plain(*input, level.map);
                    let out = self.define(level.map.cells() * layer.conv.pointwise.out_channels);
                    let target = (self.act, Output::Slot(out));
                    let mut made = self.separable(source, &layer.conv, Some(*norm), level.map, target);
                    if let Target::Pointwise { residual, .. } = &mut made.target {
                        // Without a survival probability the heads have no skip connections.
                        *residual = (network.hparams.survival_prob.filter(|_| index > 0)).map(|_| *input);
                    }
                    layers.push(made);
                    *input = out;
                }
            }
            self.push_bands(Stage::Heads, layers);
        }
        let mut layers = Vec::new();
        for ((inputs, head), output) in inputs.iter().zip(heads).zip([Output::Class, Output::Box]) {
            for (index, (&input, level)) in inputs.iter().zip(&network.levels).enumerate() {
                let source = self.plain(input, level.map);
                let target = (Act::Identity, output(index));
                layers.push(self.separable(source, &head.predict, None, level.map, target));
            }
        }
        self.push_bands(Stage::Heads, layers);
    }

    fn plain(&mut self, input: Slot, map: effdet_model::network::MapSize) -> Source {
        Source::Features {
            inputs: vec![self.same(input, map)],
            factors: None,
            act: Act::Identity,
        }
    }

    fn finish(mut self) -> Layout {
        let layers = (self.steps.iter_mut()).flat_map(|step| match &mut step.work {
            Work::Bands(layers, _) => layers.iter_mut(),
            _ => [].iter_mut(),
        });
        let layers: Vec<&mut BandLayer> = layers.collect();
        let longest = layers.iter().map(|layer| layer.zeros_len()).max().unwrap_or(0);
        let zeros = self.constants.zeros(longest);
        for layer in layers {
            layer.zeros = zeros;
        }
        Layout {
            steps: self.steps,
            constants: self.constants,
            lifetimes: self.lifetimes,
        }
    }
}
