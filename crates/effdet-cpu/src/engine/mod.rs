//! The CPU engine: the whole network composed of the kernels, for training and tracing; inference has its own
//! [plan](crate::inference).
//!
//! A step runs backbone → pyramid → class head with its loss and backward pass → box head with its own → pyramid backward →
//! backbone backward. The heads share their buffers, so the logits of all classes exist once and become their own gradient.

mod backbone;
mod batch_norm;
mod bifpn;
mod gradients;
mod heads;
mod pass;
mod timeline;

use std::sync::Arc;
use std::sync::mpsc::Sender;

use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::assign::IGNORED;
use effdet_model::engine::{
    Engine, EngineError, HeadOutputs, ImageBatch, Mode, Precision, StepLosses, StepOptions, Targets,
    TraceSink, TrainBatch,
};
use effdet_model::hparams::{ActType, IouLossKind};
use effdet_model::loss::LossError;
use effdet_model::loss::iou::coded_loss;
use effdet_model::network::{Head, Network, RESCALE_MEAN_RGB, RESCALE_STDDEV_RGB, VariableId};
use effdet_model::weights::Weights;

use self::backbone::Backbone;
use self::bifpn::Pyramid;
use self::gradients::{GradientBuffer, Gradients, Parts};
use self::heads::{Heads, Which};
use self::pass::{Clock, Pass, Statistics};
use self::timeline::{Step, Timeline};
use crate::arena::{AlignedBuf, Lifetime};
use crate::inference::Plan;
use crate::kernels::Executor;
use crate::kernels::depthwise::DepthwisePlan;
use crate::kernels::loss::{self, Focal, HeadRows, Huber};
use crate::kernels::pointwise::{PackedWeights, Packing, RowPlan};
use crate::kernels::stem::Normalize;
use crate::math::Act;
use crate::memory::{Memory, OwnedBytes};
use crate::probe::{Probe, Stage};
use crate::simd::Isa;
use crate::stochastic_depth::DrawKeys;
use crate::storage::{Brain, Full, Half, PassProducts, Storage};

/// How a [`CpuEngine`] runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuOptions {
    /// Threads; 0 = one per processor.
    pub threads: usize,
    /// Instruction set; none = the fastest one here. All give the same bits.
    pub isa: Option<Isa>,
    /// How activations and gradients of a training step are stored.
    pub precision: Precision,
    /// Whether a training step keeps the inputs of MBConv blocks alone and computes what is wide in them again in the backward
    /// pass: less memory, more time, the same bits.
    pub grad_checkpoint: bool,
}

/// What layers keep of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// What the heads need.
    Outputs,
    /// What a backward pass needs, except the wide tensors of MBConv blocks, which it computes again.
    BlockInputs,
    /// What a backward pass needs.
    All,
}

impl Keep {
    fn training(self) -> bool {
        self != Self::Outputs
    }
}

/// Runs an EfficientDet on the CPU.
///
/// # Determinism
/// The same arguments give the same bits whatever the number of threads and the instruction set.
#[derive(Debug)]
pub struct CpuEngine {
    network: Arc<Network>,
    executor: Executor,
    anchors: Anchors,
    training: Training,
    /// What training steps keep.
    keep: Keep,
    /// Layers whose outputs can all be named.
    traced: Option<Box<Layers<Full>>>,
    inference: Option<Plan>,
}

/// The layers of training steps in the engine's precision.
#[derive(Debug)]
enum Training {
    Full(Option<Box<Layers<Full>>>),
    Half(Option<Box<Layers<Half>>>),
    Brain(Option<Box<Layers<Brain>>>),
}

/// All layers with their buffers for one batch size.
#[derive(Debug)]
struct Layers<P: Storage> {
    images: usize,
    backbone: Backbone<P>,
    pyramid: Pyramid,
    heads: Heads,
    /// Input of the heads and the gradient by it, `[level][image][cell][F]`.
    head_input: AlignedBuf,
    head_gradient: AlignedBuf,
    clock: Clock,
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
struct Beside {
    packed_weight_bytes: usize,
    partial_bytes: usize,
}

impl Beside {
    fn pointwise(&mut self, weights: &PackedWeights, rows: &RowPlan) {
        self.packed_weight_bytes += weights.bytes();
        self.partial_bytes = self.partial_bytes.max(weights.partial_bytes(rows));
    }

    fn depthwise(&mut self, plan: &DepthwisePlan) {
        self.partial_bytes = self.partial_bytes.max(plan.partial_bytes());
    }
}

/// What layers are built from and with.
struct BuildContext<'a> {
    images: usize,
    keep: Keep,
    products: PassProducts,
    timeline: Timeline,
    memory: &'a mut Memory,
}

impl BuildContext<'_> {
    fn weights(&self, inputs: usize, outputs: usize) -> PackedWeights {
        PackedWeights::with_products(inputs, outputs, self.products)
    }

    /// A buffer that only training needs.
    fn gradient(&mut self, owner: &'static str, len: usize, lifetime: Lifetime) -> AlignedBuf {
        self.memory
            .buffer(owner, if self.keep.training() { len } else { 0 }, lifetime)
    }
}

impl<P: Storage> Layers<P> {
    fn new(network: &Network, images: usize, keep: Keep) -> Self {
        let (_, memory) = Self::plan(network, images, keep);
        let mut memory = memory.allocate();
        Self::build(network, images, keep, &mut memory)
    }

    /// Layers without memory, and what they ask for.
    fn plan(network: &Network, images: usize, keep: Keep) -> (Self, Memory) {
        let mut memory = Memory::plan(keep.training());
        (Self::build(network, images, keep, &mut memory), memory)
    }

    fn training_memory(network: &Network, images: usize, keep: Keep) -> MemoryEstimate {
        let (layers, mut memory) = Self::plan(network, images, keep);
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

    fn build(network: &Network, images: usize, keep: Keep, memory: &mut Memory) -> Self {
        let act = act_of(network.hparams.act_type);
        let timeline = Timeline::new(network);
        let len = Heads::input_len(network, images);
        let clock = Clock::new(timeline, memory.region());
        let mut context = BuildContext {
            images,
            keep,
            products: P::PRODUCTS,
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
    fn forward(&mut self, pass: &mut Pass<'_>, pixels: &[f32], packing: Packing) {
        pass.executor.enter(Stage::Weights);
        self.backbone.pack(pass, packing);
        self.pyramid.pack(pass, packing);
        self.heads.pack(pass, packing);
        self.backbone.forward(pass, pixels);
        self.pyramid.forward(pass, &self.backbone.level_outputs());
    }
}

pub(crate) fn act_of(act: ActType) -> Act {
    match act {
        ActType::Swish => Act::Swish,
        ActType::Hswish => Act::HSwish,
        ActType::Relu => Act::Relu,
        ActType::Relu6 => Act::Relu6,
        ActType::Mish => Act::Mish,
        ActType::Srelu => Act::SRelu,
        ActType::Identity => Act::Identity,
    }
}

/// The threads and the instruction set that `options` ask for.
///
/// # Errors
/// [`EngineError::Isa`] when the instruction set is not available here.
pub(crate) fn executor(options: CpuOptions) -> Result<Executor, EngineError> {
    let isa = options.isa.unwrap_or_else(Isa::detect);
    if !isa.is_available() {
        let available: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
        return Err(EngineError::Isa {
            isa: isa.to_string(),
            available: available.join(", "),
        });
    }
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    Ok(Executor::new(threads, isa))
}

/// # Errors
/// [`EngineError::Shape`] for weights of another network.
pub(crate) fn check_weights(network: &Network, weights: &Weights) -> Result<(), EngineError> {
    let table = &network.variables;
    check_len(
        "trainable weights",
        weights.trainable.len(),
        table.trainable_len(),
        "use weights of this very network",
    )?;
    check_len(
        "batch-norm statistics",
        weights.statistics.len(),
        table.statistics_len(),
        "use weights of this very network",
    )
}

impl CpuEngine {
    /// An engine for `network`.
    ///
    /// # Errors
    /// [`EngineError::Isa`] when the instruction set asked for is not available here.
    pub fn new(network: Arc<Network>, options: CpuOptions) -> Result<Self, EngineError> {
        let executor = executor(options)?;
        let anchors = Anchors::new(&AnchorConfig::from(&network.hparams)).map_err(|error| {
            EngineError::Unsupported {
                feature: format!("these anchors ({error})"),
                remedy: "correct the anchor hyper-parameters",
            }
        })?;
        Ok(Self {
            network,
            executor,
            anchors,
            training: match options.precision {
                Precision::Fp32 => Training::Full(None),
                Precision::Fp16 => Training::Half(None),
                Precision::Bf16 => Training::Brain(None),
            },
            keep: match options.grad_checkpoint {
                true => Keep::BlockInputs,
                false => Keep::All,
            },
            traced: None,
            inference: None,
        })
    }

    /// The network it runs.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.executor.isa()
    }

    /// Lets `probe` listen to every pass that follows; none ends it.
    pub fn listen(&mut self, probe: Option<Arc<dyn Probe>>) {
        self.executor.listen(probe);
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.executor.pool().threads()
    }

    /// The memory that training on batches of `images` images takes, without taking it.
    ///
    /// Left out are the threads' scratch memory and vectors over channels, some megabytes, and what belongs to the caller:
    /// weights, gradients and the batch.
    pub fn training_memory(&self, images: usize) -> MemoryEstimate {
        let (network, keep) = (&self.network, self.keep);
        match self.training {
            Training::Full(_) => Layers::<Full>::training_memory(network, images, keep),
            Training::Half(_) => Layers::<Half>::training_memory(network, images, keep),
            Training::Brain(_) => Layers::<Brain>::training_memory(network, images, keep),
        }
    }

    fn normalize_input(&self) -> Option<Normalize> {
        let rescale = Normalize {
            mean: RESCALE_MEAN_RGB,
            stddev: RESCALE_STDDEV_RGB,
        };
        self.network.hparams.rescale_input.then_some(rescale)
    }

    fn fusion(&self) -> (effdet_model::hparams::FusionMethod, bool) {
        (self.network.hparams.fusion(), self.network.hparams.fusion_relu)
    }
}

fn check_len(
    what: &'static str,
    actual: usize,
    expected: usize,
    remedy: &'static str,
) -> Result<(), EngineError> {
    if actual == expected {
        Ok(())
    } else {
        Err(EngineError::Shape {
            what,
            actual,
            expected,
            remedy,
        })
    }
}

impl<P: Storage> Layers<P> {
    /// Forward, losses and backward; `pass` gets the layers' clock.
    fn step(
        &mut self,
        pass: Pass<'_>,
        network: &Network,
        anchors: &Anchors,
        batch: &TrainBatch<'_>,
        loss_scale: f32,
        mut gradients: Gradients<'_>,
    ) -> StepLosses {
        let hparams = &network.hparams;
        let clock = self.clock.clone();
        let mut pass = Pass {
            clock: Some(&clock),
            ..pass
        };
        self.forward(&mut pass, batch.images.pixels, Packing::ForwardAndBackward);
        let Layers {
            backbone,
            pyramid,
            heads,
            head_input,
            head_gradient,
            ..
        } = self;
        let last_cell = network.cells.len() - 1;
        pass.enter(Step::HeadInput);
        pyramid.write_outputs(&pass, last_cell, head_input);

        heads.forward(&mut pass, Which::Class, head_input);
        let (logits, rows) = heads.outputs(Which::Class);
        let focal = Focal {
            rows,
            classes: hparams.num_classes,
            alpha: hparams.alpha as f32,
            gamma: hparams.gamma as f32,
            label_smoothing: hparams.label_smoothing as f32,
            normalizer: batch.targets.normalizer / loss_scale,
            targets: batch.targets.class_targets,
            logits,
        };
        let class_loss = loss::focal(pass.executor, focal) / f64::from(loss_scale);
        heads.backward(
            &pass,
            Which::Class,
            head_input,
            head_gradient,
            false,
            &mut gradients,
        );

        heads.forward(&mut pass, Which::Box, head_input);
        let (codes, rows) = heads.outputs(Which::Box);
        let iou = (hparams.iou_loss_type).map(|kind| {
            IouGradients::new(
                kind,
                hparams.iou_loss_weight * f64::from(loss_scale),
                anchors,
                &rows,
                &batch.targets,
                codes,
            )
        });
        let huber = Huber {
            rows,
            delta: hparams.delta as f32,
            normalizer: batch.targets.normalizer,
            gradient_weight: hparams.box_loss_weight as f32 * loss_scale,
            targets: batch.targets.box_targets,
            codes,
        };
        let box_loss = loss::huber(pass.executor, huber);
        let box_iou_loss = iou.map_or(0.0, |iou| iou.add_to(heads.outputs(Which::Box).0));
        heads.backward(&pass, Which::Box, head_input, head_gradient, true, &mut gradients);

        gradients.finish_from(first_of(&network.class_head).min(first_of(&network.box_head)));
        pyramid.backward(&pass, &backbone.level_outputs(), head_gradient, &mut gradients);
        // The backbone comes first; its last block writes the gradients of its last batch norm later.
        let last = network
            .blocks
            .last()
            .map_or(&network.stem.bn, |block| &block.project_bn);
        gradients.finish_behind(last);
        backbone.backward(
            &pass,
            batch.images.pixels,
            &pyramid.level_gradients(&pass),
            &mut gradients,
        );
        let det_loss =
            class_loss + hparams.box_loss_weight * box_loss + hparams.iou_loss_weight * box_iou_loss;
        StepLosses {
            class_loss: class_loss as f32,
            box_loss: box_loss as f32,
            box_iou_loss: box_iou_loss as f32,
            det_loss: det_loss as f32,
        }
    }
}

/// Targets that no class output or division can take are the caller's mistake.
fn check_targets(targets: &Targets<'_>, anchors: usize, num_classes: usize) -> Result<(), EngineError> {
    let normalizer = targets.normalizer;
    if !(normalizer.is_finite() && normalizer > 0.0) {
        return Err(LossError::Normalizer { normalizer }.into());
    }
    let fits = |class: i32| class < num_classes as i32 && class >= IGNORED;
    match targets.class_targets.iter().position(|&class| !fits(class)) {
        None => Ok(()),
        Some(row) => {
            let class = targets.class_targets[row];
            Err(LossError::Class {
                image: row / anchors,
                anchor: row % anchors,
                class,
                num_classes,
            }
            .into())
        }
    }
}

/// The IoU loss of a batch, taken from the plain reference: it concerns matched anchors only, which are few.
struct IouGradients {
    loss: f64,
    /// First value of an anchor's code in the head's outputs, and the gradient by the code.
    gradients: Vec<(usize, [f64; 4])>,
}

impl IouGradients {
    fn new(
        kind: IouLossKind,
        weight: f64,
        anchors: &Anchors,
        rows: &HeadRows<'_>,
        targets: &Targets<'_>,
        codes: &[f32],
    ) -> Self {
        let per_positive = 1.0 / (4.0 * f64::from(targets.normalizer));
        let (mut loss, mut gradients) = (0.0, Vec::new());
        let targets = targets.box_targets.as_chunks::<4>().0;
        for image in 0..rows.images {
            let (mut anchor, mut first_row) = (0, 0);
            for &cells in rows.cells_per_level {
                for index in 0..cells * rows.anchors_per_cell {
                    let target = targets[image * anchors.len() + anchor];
                    if target != [0.0; 4] {
                        let (cell, in_cell) = (index / rows.anchors_per_cell, index % rows.anchors_per_cell);
                        let at = (first_row + image * cells + cell) * rows.stride + 4 * in_cell;
                        let code = std::array::from_fn(|i| codes[at + i]);
                        let term = coded_loss(kind, code, target, anchors.boxes_yxyx_px[anchor]);
                        loss += term.value * per_positive;
                        gradients.push((at, term.gradient.map(|g| g * weight * per_positive)));
                    }
                    anchor += 1;
                }
                first_row += cells * rows.images;
            }
        }
        Self { loss, gradients }
    }

    /// Adds the gradients to those of the box loss; gives the loss.
    fn add_to(&self, codes: &mut [f32]) -> f64 {
        for &(at, gradient) in &self.gradients {
            for (value, added) in codes[at..at + 4].iter_mut().zip(gradient) {
                *value = (f64::from(*value) + added) as f32;
            }
        }
        self.loss
    }
}

/// The layers for a batch size: those at hand, or new ones.
fn layers_for<'a, P: Storage>(
    slot: &'a mut Option<Box<Layers<P>>>,
    network: &Network,
    images: usize,
    keep: Keep,
) -> &'a mut Layers<P> {
    if slot.as_ref().is_some_and(|layers| layers.images != images) {
        // Freed first, so that two sets of buffers never exist at once.
        *slot = None;
    }
    slot.get_or_insert_with(|| Box::new(Layers::new(network, images, keep)))
}

/// The first variable of a head.
fn first_of(head: &Head) -> VariableId {
    let first = head.layers.first().map_or(&head.predict, |layer| &layer.conv);
    first.depthwise.kernel
}

impl CpuEngine {
    fn step(
        &mut self,
        weights: &mut Weights,
        batch: &TrainBatch<'_>,
        options: &StepOptions<'_>,
        gradients: &mut dyn GradientBuffer,
    ) -> Result<StepLosses, EngineError> {
        let hparams = &self.network.hparams;
        let images = batch.images.batch;
        batch
            .images
            .check(hparams.image_size.height, hparams.image_size.width)?;
        check_weights(&self.network, weights)?;
        let anchors = self.network.num_anchors();
        let remedy = "assign targets with the anchors of this network";
        check_len(
            "class targets",
            batch.targets.class_targets.len(),
            images * anchors,
            remedy,
        )?;
        check_len(
            "box targets",
            batch.targets.box_targets.len(),
            images * anchors * 4,
            remedy,
        )?;
        check_targets(&batch.targets, anchors, hparams.num_classes)?;
        check_len(
            "draw keys",
            batch.draw_keys.len(),
            images,
            "pass one key per image",
        )?;
        check_len(
            "gradients",
            gradients.values().len(),
            weights.trainable.len(),
            "pass a buffer like the trainable weights",
        )?;

        let (normalize_input, fusion) = (self.normalize_input(), self.fusion());
        let pass = Pass {
            executor: &self.executor,
            table: &self.network.variables,
            mode: Mode::Train,
            trainable: &weights.trainable,
            statistics: Statistics::Move(&mut weights.statistics),
            normalize_input,
            fusion,
            draws: Some(DrawKeys {
                seed: options.seed,
                epoch: options.epoch,
                images: batch.draw_keys,
            }),
            sync: options.sync,
            clock: None,
        };
        let gradients = Gradients {
            table: &self.network.variables,
            buffer: gradients,
        };
        let (network, anchors) = (&*self.network, &self.anchors);
        let (loss_scale, keep) = (options.loss_scale, self.keep);
        Ok(match &mut self.training {
            Training::Full(slot) => layers_for(slot, network, images, keep)
                .step(pass, network, anchors, batch, loss_scale, gradients),
            Training::Half(slot) => layers_for(slot, network, images, keep)
                .step(pass, network, anchors, batch, loss_scale, gradients),
            Training::Brain(slot) => layers_for(slot, network, images, keep)
                .step(pass, network, anchors, batch, loss_scale, gradients),
        })
    }
}

impl Engine for CpuEngine {
    fn train_step(
        &mut self,
        weights: &mut Weights,
        batch: &TrainBatch<'_>,
        options: &StepOptions<'_>,
        mut gradients: &mut [f32],
    ) -> Result<StepLosses, EngineError> {
        self.step(weights, batch, options, &mut gradients)
    }

    fn train_step_in_parts<'g>(
        &mut self,
        weights: &mut Weights,
        batch: &TrainBatch<'_>,
        options: &StepOptions<'_>,
        gradients: &'g mut [f32],
        finished: Sender<&'g mut [f32]>,
    ) -> Result<StepLosses, EngineError> {
        let rest = gradients;
        let mut parts = Parts { rest, finished };
        let losses = self.step(weights, batch, options, &mut parts)?;
        parts.finish_from(0);
        Ok(losses)
    }

    fn infer(
        &mut self,
        weights: &Weights,
        images: &ImageBatch<'_>,
        outputs: &mut HeadOutputs,
    ) -> Result<(), EngineError> {
        let size = self.network.hparams.image_size;
        images.check(size.height, size.width)?;
        check_weights(&self.network, weights)?;
        Plan::prepared(&mut self.inference, &self.network, &self.executor, weights).run(
            &self.network,
            &self.executor,
            images,
            outputs,
        );
        Ok(())
    }

    fn trace(
        &mut self,
        weights: &Weights,
        images: &ImageBatch<'_>,
        mode: Mode,
        sink: &mut TraceSink<'_>,
    ) -> Result<(), EngineError> {
        let network = Arc::clone(&self.network);
        let batch = images.batch;
        self.run(weights, images, mode, &mut |stage| {
            emit(&network, batch, stage, sink)
        })
    }
}

/// What has just been computed.
enum Computed<'a, 'b> {
    Body(&'a Backbone<Full>, &'a Pyramid, &'a Pass<'b>),
    Head(Which, &'a mut Heads),
}

impl CpuEngine {
    /// Runs the forward pass and shows each stage to `visit`.
    fn run(
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
        let layers = layers_for(&mut self.traced, &self.network, images.batch, Keep::Outputs);
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
fn emit(network: &Network, batch: usize, stage: &mut Computed<'_, '_>, sink: &mut TraceSink<'_>) {
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

#[cfg(test)]
mod tests;
