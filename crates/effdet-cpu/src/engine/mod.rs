//! The CPU engine: the whole network composed of the kernels, for training and tracing; inference has its own
//! [plan](crate::inference).
//!
//! A step runs backbone → pyramid → class head with its loss and backward pass → box head with its own → pyramid backward →
//! backbone backward. The heads share their buffers, so the logits of all classes exist once and become their own gradient.

mod backbone;
mod batch_norm;
mod bifpn;
mod build;
mod gradients;
mod heads;
mod pass;
mod step;
mod timeline;
mod trace;

use std::sync::Arc;
use std::sync::mpsc::Sender;

use effdet_model::anchors::{AnchorConfig, Anchors};
use effdet_model::engine::{
    Engine, EngineError, HeadOutputs, ImageBatch, Mode, Precision, StepLosses, StepOptions, TraceSink,
    TrainBatch, Workers,
};
use effdet_model::hparams::ActType;
use effdet_model::network::{Head, Network, RESCALE_MEAN_RGB, RESCALE_STDDEV_RGB, VariableId};
use effdet_model::weights::Weights;

use self::build::Layers;
use self::gradients::{GradientBuffer, Gradients, Parts};
use self::pass::{Pass, Statistics};
use self::step::check_targets;
use self::trace::emit;
use crate::inference::Plan;
use crate::kernels::Executor;
use crate::kernels::stem::Normalize;
use crate::math::Act;
use crate::probe::Probe;
use crate::simd::{Isa, has_tiles};
use crate::stochastic_depth::DrawKeys;
use crate::storage::{Brain, Full, Half, PassProducts, Storage};

pub use self::build::MemoryEstimate;

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

/// How layers are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LayerOptions {
    /// What they keep of a forward pass.
    keep: Keep,
    /// What their pointwise convolutions multiply.
    products: PassProducts,
}

impl LayerOptions {
    /// For a forward pass in f32 alone.
    const FORWARD: Self = Self {
        keep: Keep::Outputs,
        products: PassProducts::SINGLE,
    };
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
    /// How the layers of training steps are built.
    layer_options: LayerOptions,
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

/// The bfloat16 precision whose products this processor has instructions for; that of pairs where it has none.
pub fn fastest_bf16() -> Precision {
    match has_tiles(Isa::detect()) {
        true => Precision::Bf16Tiles,
        false => Precision::Bf16Pairs,
    }
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
                Precision::Bf16Pairs | Precision::Bf16Tiles => Training::Brain(None),
            },
            layer_options: LayerOptions {
                keep: match options.grad_checkpoint {
                    true => Keep::BlockInputs,
                    false => Keep::All,
                },
                products: PassProducts::of(options.precision),
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

    /// The threads, for work between steps: they are awake then, which threads of the caller's own would not be.
    pub fn workers(&self) -> Arc<dyn Workers> {
        Arc::clone(self.executor.pool()) as Arc<dyn Workers>
    }

    /// The memory that training on batches of `images` images takes, without taking it.
    ///
    /// Left out are the threads' scratch memory and vectors over channels, some megabytes, and what belongs to the caller:
    /// weights, gradients and the batch.
    pub fn training_memory(&self, images: usize) -> MemoryEstimate {
        let (network, options) = (&self.network, self.layer_options);
        match self.training {
            Training::Full(_) => Layers::<Full>::training_memory(network, images, options),
            Training::Half(_) => Layers::<Half>::training_memory(network, images, options),
            Training::Brain(_) => Layers::<Brain>::training_memory(network, images, options),
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

/// The layers for a batch size: those at hand, or new ones.
fn layers_for<'a, P: Storage>(
    slot: &'a mut Option<Box<Layers<P>>>,
    network: &Network,
    images: usize,
    options: LayerOptions,
) -> &'a mut Layers<P> {
    if slot.as_ref().is_some_and(|layers| layers.images != images) {
        // Freed first, so that two sets of buffers never exist at once.
        *slot = None;
    }
    slot.get_or_insert_with(|| Box::new(Layers::new(network, images, options)))
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
        let (loss_scale, layer_options) = (options.loss_scale, self.layer_options);
        Ok(match &mut self.training {
            Training::Full(slot) => layers_for(slot, network, images, layer_options)
                .step(pass, network, anchors, batch, loss_scale, gradients),
            Training::Half(slot) => layers_for(slot, network, images, layer_options)
                .step(pass, network, anchors, batch, loss_scale, gradients),
            Training::Brain(slot) => layers_for(slot, network, images, layer_options)
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

#[cfg(test)]
mod tests;
