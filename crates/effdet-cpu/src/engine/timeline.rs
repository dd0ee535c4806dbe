//! The steps of a training pass in their order, by which buffers live.

use effdet_model::network::Network;

use crate::arena::Lifetime;
use crate::probe::Stage;

/// A step of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Stem,
    Block(usize),
    /// The last block's output is formed.
    BackboneOutput,
    ExtraLevel(usize),
    /// BiFPN nodes are numbered on through all cells.
    Node(usize),
    HeadInput,
    ClassHead,
    BoxHead,
    /// The gradient by the heads' input reaches the last cell's outputs.
    HeadGradient,
    NodeBackward(usize),
    ExtraLevelBackward(usize),
    BlockBackward(usize),
    StemBackward,
}

/// Numbers the steps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timeline {
    blocks: usize,
    extra_levels: usize,
    nodes: usize,
}

impl Timeline {
    pub(super) fn new(network: &Network) -> Self {
        Self {
            blocks: network.blocks.len(),
            extra_levels: network.extra_levels.len(),
            nodes: network.cells.iter().map(|cell| cell.nodes.len()).sum(),
        }
    }

    /// The number of a step; later steps have larger ones.
    pub(super) fn number(&self, step: Step) -> u32 {
        let Self {
            blocks,
            extra_levels,
            nodes,
        } = *self;
        let heads = 2 + blocks + extra_levels + nodes;
        let backward = heads + 4;
        let number = match step {
            Step::Stem => 0,
            Step::Block(index) => 1 + index,
            Step::BackboneOutput => 1 + blocks,
            Step::ExtraLevel(index) => 2 + blocks + index,
            Step::Node(index) => 2 + blocks + extra_levels + index,
            Step::HeadInput => heads,
            Step::ClassHead => heads + 1,
            Step::BoxHead => heads + 2,
            Step::HeadGradient => heads + 3,
            Step::NodeBackward(index) => backward + (nodes - 1 - index),
            Step::ExtraLevelBackward(index) => backward + nodes + (extra_levels - 1 - index),
            Step::BlockBackward(index) => backward + nodes + extra_levels + (blocks - 1 - index),
            Step::StemBackward => backward + nodes + extra_levels + blocks,
        };
        number as u32
    }

    /// The part of the network that a step belongs to.
    pub(super) fn stage(&self, step: Step) -> Stage {
        match step {
            Step::Stem | Step::StemBackward => Stage::Stem,
            Step::Block(index) | Step::BlockBackward(index) => Stage::Block(index),
            Step::BackboneOutput => Stage::Block(self.blocks - 1),
            Step::ClassHead => Stage::ClassHead,
            Step::BoxHead => Stage::BoxHead,
            Step::ExtraLevel(_)
            | Step::Node(_)
            | Step::HeadInput
            | Step::HeadGradient
            | Step::NodeBackward(_)
            | Step::ExtraLevelBackward(_) => Stage::Pyramid,
        }
    }

    /// Number of MBConv blocks.
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// From one step to another, both included.
    pub(super) fn span(&self, first: Step, last: Step) -> Lifetime {
        Lifetime {
            first: self.number(first),
            last: self.number(last),
        }
    }

    /// One step alone.
    pub(super) fn during(&self, step: Step) -> Lifetime {
        self.span(step, step)
    }
}

#[cfg(test)]
mod tests {
    use effdet_model::hparams::HParams;

    use super::*;

    #[test]
    fn steps_ascend_in_the_order_of_a_pass() {
        let network = Network::new(&HParams::preset("d0").unwrap()).unwrap();
        let timeline = Timeline::new(&network);
        let (blocks, nodes) = (network.blocks.len(), 24);
        let mut steps = vec![Step::Stem];
        steps.extend((0..blocks).map(Step::Block));
        steps.push(Step::BackboneOutput);
        steps.extend((0..network.extra_levels.len()).map(Step::ExtraLevel));
        steps.extend((0..nodes).map(Step::Node));
        steps.extend([
            Step::HeadInput,
            Step::ClassHead,
            Step::BoxHead,
            Step::HeadGradient,
        ]);
        steps.extend((0..nodes).rev().map(Step::NodeBackward));
        steps.extend(
            (0..network.extra_levels.len())
                .rev()
                .map(Step::ExtraLevelBackward),
        );
        steps.extend((0..blocks).rev().map(Step::BlockBackward));
        steps.push(Step::StemBackward);
        let numbers: Vec<u32> = steps.iter().map(|&step| timeline.number(step)).collect();
        assert_eq!(numbers, (0..steps.len() as u32).collect::<Vec<_>>());
    }
}
