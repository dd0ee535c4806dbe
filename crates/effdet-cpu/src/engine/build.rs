//! Layers with their buffers, planned and built for one batch size.

use effdet_model::network::Network;

use super::backbone::Backbone;
use super::bifpn::Pyramid;
use super::heads::Heads;
use super::pass::{Clock, Pass};
use super::timeline::{Step, Timeline};
use super::{Keep, LayerOptions, act_of};
use crate::arena::{AlignedBuf, Lifetime};
use crate::kernels::depthwise::DepthwisePlan;
use crate::kernels::pointwise::{PackedWeights, Packing, RowPlan};
use crate::memory::{Memory, OwnedBytes};
use crate::probe::Stage;
use crate::storage::{PassProducts, Storage};

/// All layers with their buffers for one batch size.
#[derive(Debug)]
pub(super) struct Layers<P: Storage> {
    pub(super) images: usize,
    pub(super) backbone: Backbone<P>,
    pub(super) pyramid: Pyramid,
    pub(super) heads: Heads,
    /// Input of the heads and the gradient by it, `[level][image][cell][F]`.
    pub(super) head_input: AlignedBuf,
    pub(super) head_gradient: AlignedBuf,
    pub(super) clock: Clock,
}

/// Memory of a training step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Activations and their gradients by what they are for; they share memory where their lifetimes allow.
    pub buffers: Vec<OwnedBytes>,
    /// Bytes of all buffers together.
    pub buffer_bytes: usize,
    /// Bytes of the weights as the kernels read them.
    pub packed_weight_bytes: usize,
    /// Bytes of the partial weight gradients.
    pub partial_bytes: usize,
}

impl MemoryEstimate {
    /// Bytes of everything.
    pub fn total_bytes(&self) -> usize {
        self.buffer_bytes + self.packed_weight_bytes + self.partial_bytes
    }
}

/// What convolutions need beside their buffers.
#[derive(Debug, Default)]
pub(super) struct Beside {
    pub(super) packed_weight_bytes: usize,
    pub(super) partial_bytes: usize,
}

impl Beside {
    pub(super) fn pointwise(&mut self, weights: &PackedWeights, rows: &RowPlan) {
        self.pointwise_in_parts(weights, [rows].into_iter());
    }

    /// A 1×1 convolution that works on the rows of one plan after the other.
    pub(super) fn pointwise_in_parts<'a>(
        &mut self,
        weights: &PackedWeights,
        parts: impl Iterator<Item = &'a RowPlan>,
    ) {
        self.packed_weight_bytes += weights.bytes();
        for rows in parts {
            self.partial_bytes = self.partial_bytes.max(weights.partial_bytes(rows));
        }
    }

    pub(super) fn depthwise(&mut self, plan: &DepthwisePlan) {
        self.partial_bytes = self.partial_bytes.max(plan.partial_bytes());
    }
}

/// What layers are built from and with.
pub(super) struct BuildContext<'a> {
    pub(super) images: usize,
    pub(super) keep: Keep,
    pub(super) products: PassProducts,
    pub(super) timeline: Timeline,
    pub(super) memory: &'a mut Memory,
}

impl BuildContext<'_> {
    pub(super) fn weights(&self, inputs: usize, outputs: usize) -> PackedWeights {
        PackedWeights::with_products(inputs, outputs, self.products)
    }

    /// A buffer that only training needs.
    pub(super) fn gradient(&mut self, owner: &'static str, len: usize, lifetime: Lifetime) -> AlignedBuf {
        self.memory
            .buffer(owner, if self.keep.training() { len } else { 0 }, lifetime)
    }
}

impl<P: Storage> Layers<P> {
    pub(super) fn new(network: &Network, images: usize, options: LayerOptions) -> Self {
        let (_, memory) = Self::plan(network, images, options);
        let mut memory = memory.allocate();
        Self::build(network, images, options, &mut memory)
    }

    /// Layers without memory, and what they ask for.
    pub(super) fn plan(network: &Network, images: usize, options: LayerOptions) -> (Self, Memory) {
        let mut memory = Memory::plan(options.keep.training());
        (Self::build(network, images, options, &mut memory), memory)
    }

    pub(super) fn training_memory(network: &Network, images: usize, options: LayerOptions) -> MemoryEstimate {
        let (layers, mut memory) = Self::plan(network, images, options);
        let mut beside = Beside::default();
        layers.backbone.count(&mut beside);
        layers.pyramid.count(&mut beside);
        layers.heads.count(&mut beside);
        let buffer_bytes = memory.place();
        MemoryEstimate {
            buffers: memory.by_owner(),
            buffer_bytes,
            packed_weight_bytes: beside.packed_weight_bytes,
            partial_bytes: beside.partial_bytes,
        }
    }

    pub(super) fn build(
        network: &Network,
        images: usize,
        options: LayerOptions,
        memory: &mut Memory,
    ) -> Self {
        let act = act_of(network.hparams.act_type);
        let timeline = Timeline::new(network);
        let len = Heads::input_len(network, images);
        let clock = Clock::new(timeline, memory.region());
        let mut context = BuildContext {
            images,
            keep: options.keep,
            products: options.products,
            timeline,
            memory,
        };
        Self {
            images,
            backbone: Backbone::new(network, act, &mut context),
            pyramid: Pyramid::new(network, act, &mut context),
            heads: Heads::new(network, act, &mut context),
            head_input: (context.memory).buffer(
                "heads: activations",
                len,
                timeline.span(Step::HeadInput, Step::BoxHead),
            ),
            head_gradient: context.gradient(
                "heads: gradients",
                len,
                timeline.span(Step::ClassHead, Step::HeadGradient),
            ),
            clock,
        }
    }

    /// Packs weights, runs backbone and pyramid and writes the input of the heads.
    pub(super) fn forward(&mut self, pass: &mut Pass<'_>, pixels: &[f32], packing: Packing) {
        pass.executor.enter(Stage::Weights);
        self.backbone.pack(pass, packing);
        self.pyramid.pack(pass, packing);
        self.heads.pack(pass, packing);
        self.backbone.forward(pass, pixels);
        self.pyramid.forward(pass, &self.backbone.level_outputs());
    }
}
