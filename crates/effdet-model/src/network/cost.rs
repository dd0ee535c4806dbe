//! Parameters and multiply-adds per stage.

use super::*;

/// Part of the network a stage belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StageGroup {
    /// EfficientNet without its head.
    Backbone,
    /// Extra levels and BiFPN cells.
    Fpn,
    /// Class and box heads.
    Heads,
}

/// Size and work of one stage for one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageCost {
    /// Stage name: `stem`, `stack_0/block_0`, `resample_p6`, `fpn_cells/cell_0`, `class_net`, `box_net`.
    pub name: String,
    /// Part of the network.
    pub group: StageGroup,
    /// Trainable values.
    pub trainable: usize,
    /// Batch-norm statistics.
    pub statistics: usize,
    /// Multiply-adds of convolutions (pointwise, depthwise, squeeze-excite included); BN and activations are not counted.
    pub macs: u64,
    /// Output map.
    pub output: MapSize,
    /// Output channels.
    pub out_channels: usize,
}

impl Network {
    /// Cost of every stage at the network's image size, in order.
    pub fn stage_costs(&self) -> Vec<StageCost> {
        let mut costs = Vec::new();
        let mut push = |name: &str, group, macs: usize, output: MapSize, out_channels| {
            let (trainable, statistics) = self.values_under(name);
            costs.push(StageCost {
                name: name.to_owned(),
                group,
                trainable,
                statistics,
                macs: macs as u64,
                output,
                out_channels,
            });
        };
        let dense = |conv: &Conv, map: MapSize| {
            map.cells() * conv.size * conv.size * conv.in_channels * conv.out_channels
        };
        let depthwise = |conv: &Depthwise, map: MapSize| map.cells() * conv.size * conv.size * conv.channels;
        let separable = |conv: &SeparableConv, map: MapSize| {
            depthwise(&conv.depthwise, map) + dense(&conv.pointwise, map)
        };

        push(
            "stem",
            StageGroup::Backbone,
            dense(&self.stem.conv, self.stem.output),
            self.stem.output,
            self.stem.conv.out_channels,
        );
        for block in &self.blocks {
            let one = MapSize { height: 1, width: 1 };
            let macs = block.expand.map_or(0, |(conv, _)| dense(&conv, block.input))
                + depthwise(&block.depthwise, block.output)
                + block
                    .squeeze_excite
                    .map_or(0, |se| dense(&se.reduce, one) + dense(&se.expand, one))
                + dense(&block.project, block.output);
            push(
                &block.name,
                StageGroup::Backbone,
                macs,
                block.output,
                block.project.out_channels,
            );
        }
        let filters = self.hparams.fpn_num_filters;
        // Channel matching runs before pooling, at the larger map.
        let resample = |r: &Resample| r.channel_match.map_or(0, |matched| dense(&matched.conv, r.input));
        for extra in &self.extra_levels {
            push(
                &extra.name,
                StageGroup::Fpn,
                resample(&extra.resample),
                extra.resample.output,
                filters,
            );
        }
        for (index, cell) in self.cells.iter().enumerate() {
            let macs = (cell.nodes.iter())
                .map(|node| {
                    node.inputs
                        .iter()
                        .map(|input| resample(&input.resample))
                        .sum::<usize>()
                        + separable(&node.conv, node.map)
                })
                .sum();
            push(
                &format!("fpn_cells/cell_{index}"),
                StageGroup::Fpn,
                macs,
                self.levels[0].map,
                filters,
            );
        }
        for head in [&self.class_head, &self.box_head] {
            let macs = (self.levels.iter())
                .map(|level| {
                    head.layers
                        .iter()
                        .map(|layer| separable(&layer.conv, level.map))
                        .sum::<usize>()
                        + separable(&head.predict, level.map)
                })
                .sum();
            push(
                head.name,
                StageGroup::Heads,
                macs,
                self.levels[0].map,
                head.predict.pointwise.out_channels,
            );
        }
        costs
    }

    /// Trainable and statistic values of the variables of a stage.
    fn values_under(&self, stage: &str) -> (usize, usize) {
        let (slash, underscore) = (format!("{stage}/"), format!("{stage}_"));
        let belongs =
            |name: &str| name.starts_with(&slash) || (stage == "stem" && name.starts_with(&underscore));
        self.variables
            .iter()
            .filter(|variable| belongs(&variable.name))
            .fold((0, 0), |(t, s), variable| match variable.kind {
                VariableKind::Trainable => (t + variable.len, s),
                VariableKind::Statistic => (t, s + variable.len),
            })
    }
}
