//! The forward pass stage by stage, for those who compare it with another implementation.

use effdet_model::engine::{EngineError, ImageBatch, Mode, TraceSink};
use effdet_model::network::Network;
use effdet_model::weights::Weights;

use super::backbone::Backbone;
use super::bifpn::Pyramid;
use super::build::Layers;
use super::heads::{Heads, Which};
use super::pass::{Pass, Statistics};
use super::timeline::Step;
use super::{CpuEngine, LayerOptions, check_weights, layers_for};
use crate::kernels::pointwise::Packing;
use crate::storage::Full;

/// What has just been computed.
pub(super) enum Computed<'a, 'b> {
    Body(&'a Backbone<Full>, &'a Pyramid, &'a Pass<'b>),
    Head(Which, &'a mut Heads),
}

impl CpuEngine {
    /// Runs the forward pass and shows each stage to `visit`.
    pub(super) fn run(
        &mut self,
        weights: &Weights,
        images: &ImageBatch<'_>,
        mode: Mode,
        visit: &mut dyn FnMut(&mut Computed<'_, '_>),
    ) -> Result<(), EngineError> {
        let size = self.network.hparams.image_size;
        images.check(size.height, size.width)?;
        check_weights(&self.network, weights)?;
        let (normalize_input, fusion) = (self.normalize_input(), self.fusion());
        // Batch statistics are made in training passes only, and a trace leaves the caller's alone.
        let mut moved = weights.statistics.clone();
        let layers = layers_for(
            &mut self.traced,
            &self.network,
            images.batch,
            LayerOptions::FORWARD,
        );
        let clock = layers.clock.clone();
        let mut pass = Pass {
            executor: &self.executor,
            table: &self.network.variables,
            mode,
            trainable: &weights.trainable,
            statistics: match mode {
                Mode::Infer => Statistics::Read(&weights.statistics),
                Mode::Train => Statistics::Move(&mut moved),
            },
            normalize_input,
            fusion,
            draws: None,
            sync: None,
            clock: Some(&clock),
        };
        layers.forward(&mut pass, images.pixels, Packing::Forward);
        let Layers {
            backbone,
            pyramid,
            heads,
            head_input,
            ..
        } = layers;
        visit(&mut Computed::Body(backbone, pyramid, &pass));
        pass.enter(Step::HeadInput);
        pyramid.write_outputs(&pass, self.network.cells.len() - 1, head_input);
        for which in [Which::Class, Which::Box] {
            heads.forward(&mut pass, which, head_input);
            visit(&mut Computed::Head(which, heads));
        }
        Ok(())
    }
}

/// Hands the named outputs of a stage to `sink`.
pub(super) fn emit(network: &Network, batch: usize, stage: &mut Computed<'_, '_>, sink: &mut TraceSink<'_>) {
    match stage {
        Computed::Body(backbone, pyramid, pass) => {
            let stem = &network.stem;
            let shape = [
                batch,
                stem.output.height,
                stem.output.width,
                stem.conv.out_channels,
            ];
            let mut values = vec![0.0; shape.iter().product()];
            backbone.write_stem(pass, &mut values);
            sink("stem", &shape, &values);
            for (index, block) in network.blocks.iter().enumerate() {
                let shape = [
                    batch,
                    block.output.height,
                    block.output.width,
                    block.project.out_channels,
                ];
                sink(&block.name, &shape, backbone.output(index));
                if let Some(reduction) = block.endpoint {
                    sink(&format!("backbone/r{reduction}"), &shape, backbone.output(index));
                }
            }
            let filters = network.hparams.fpn_num_filters;
            for (index, level) in network.extra_levels.iter().enumerate() {
                let (map, values) = pyramid.extra_level(index);
                sink(
                    &format!("level/p{}", level.level),
                    &[batch, map.height, map.width, filters],
                    values,
                );
            }
            let cells: usize = network.levels.iter().map(|level| level.map.cells()).sum();
            let mut outputs = vec![0.0; batch * cells * filters];
            for cell in 0..network.cells.len() {
                pyramid.write_outputs(pass, cell, &mut outputs);
                let mut rest = &outputs[..];
                for level in &network.levels {
                    let (values, tail) = rest.split_at(batch * level.map.cells() * filters);
                    rest = tail;
                    let shape = [batch, level.map.height, level.map.width, filters];
                    sink(&format!("cell_{cell}/p{}", level.level), &shape, values);
                }
            }
        }
        Computed::Head(which, heads) => {
            let (name, head) = match which {
                Which::Class => ("class", &network.class_head),
                Which::Box => ("box", &network.box_head),
            };
            let mut values = Vec::new();
            for (index, level) in network.levels.iter().enumerate() {
                heads.copy_level(*which, index, &mut values);
                let channels = head.predict.pointwise.out_channels;
                let shape = [batch, level.map.height, level.map.width, channels];
                sink(&format!("{name}/p{}", level.level), &shape, &values);
            }
        }
    }
}
