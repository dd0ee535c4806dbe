//! Inference: a plan of its own, made once for a network and its weights.
//!
//! Batch norm is folded into the weights, which are packed once. Every MBConv block is two passes: expansion, depthwise
//! convolution and activation in one, where the wide tensor between them exists only as a ring of lines in the cache; and the
//! projection, whose weights carry the squeeze-and-excitation gate. A pyramid node or a layer of a head is a single pass.
//! Activations live in one arena, placed by lifetimes. Of a batch, every worker takes an image of its own as long as there is one
//! for each, in an arena of its own: workers then share nothing but the weights. What is left, all take together. So memory
//! stops growing at as many images as there are workers.
//!
//! # Determinism
//! The same bits for every instruction set and every number of threads, by the rules of the [kernels](crate::kernels).

mod activate;
mod bands;
mod build;
mod depthwise;
mod fingerprint;
mod fold;
mod fusion;
mod lifetimes;
mod pointwise;
mod product;
mod run;

use std::fmt;
use std::sync::Arc;

use effdet_model::engine::{EngineError, HeadOutputs, ImageBatch, LevelOutput};
use effdet_model::network::Network;
use effdet_model::weights::Weights;

use self::build::{Layout, Step, Task, Work};
use self::fingerprint::fingerprint;
use self::fold::{Constants, Variables};
use self::lifetimes::Placement;
use self::run::{Crew, Run};
use crate::arena::{AlignedBuf, SharedPtr};
use crate::engine::{CpuOptions, check_weights, executor};
use crate::kernels::Executor;
use crate::probe::{Kernel, Probe, Stage, Work as Cost};
use crate::simd::Isa;

/// Bytes of arenas from which on workers do not have one each.
const MOST_ARENAS_BYTES: usize = 1 << 30;

/// A network with fixed weights, ready to run.
///
/// # Determinism
/// The same images give the same bits whatever the number of threads and the instruction set.
#[derive(Debug)]
pub struct InferencePlan {
    network: Arc<Network>,
    executor: Executor,
    plan: Plan,
}

/// Memory that a plan takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanMemory {
    /// Folded and packed weights.
    pub weights_bytes: usize,
    /// The arenas of activations.
    pub activations_bytes: usize,
    /// Line buffers of all threads.
    pub scratch_bytes: usize,
}

impl PlanMemory {
    /// All of it.
    pub fn total_bytes(&self) -> usize {
        self.weights_bytes + self.activations_bytes + self.scratch_bytes
    }
}

impl InferencePlan {
    /// Folds and packs `weights`, which are not needed any more afterwards.
    ///
    /// # Errors
    /// [`EngineError::Shape`] for weights of another network, [`EngineError::Isa`] when the instruction set asked for is not
    /// available here.
    pub fn new(network: Arc<Network>, weights: &Weights, options: CpuOptions) -> Result<Self, EngineError> {
        check_weights(&network, weights)?;
        let executor = executor(options)?;
        let mut plan = Plan::new(&network);
        plan.fold(&network, &executor, weights);
        Ok(Self {
            network,
            executor,
            plan,
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

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.executor.pool().threads()
    }

    /// What the plan takes on a number of threads for batches of a number of images, beside these and the outputs.
    pub fn memory(&self, threads: usize, images: usize) -> PlanMemory {
        self.plan.memory(threads, images)
    }

    /// Runs the network on images.
    ///
    /// # Errors
    /// [`EngineError::Shape`] when the images do not fit the network.
    pub fn infer(&mut self, images: &ImageBatch<'_>, outputs: &mut HeadOutputs) -> Result<(), EngineError> {
        let size = self.network.hparams.image_size;
        images.check(size.height, size.width)?;
        self.plan.run(&self.network, &self.executor, images, outputs);
        Ok(())
    }

    /// Lets `probe` listen to every run that follows; none ends it.
    pub fn listen(&mut self, probe: Option<Arc<dyn Probe>>) {
        self.executor.listen(probe);
    }
}

/// Steps, constants and arena of a network; runs on anyone's threads.
pub(crate) struct Plan {
    steps: Vec<Step>,
    layout: Constants,
    constants: AlignedBuf,
    /// Fingerprint of the weights that the constants were made from.
    weights: u64,
    placement: Placement,
    /// One for each image that is at work.
    arenas: Vec<AlignedBuf>,
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan")
            .field("steps", &self.steps.len())
            .field("constants", &self.constants)
            .field("arenas", &self.arenas)
            .finish_non_exhaustive()
    }
}

impl Plan {
    /// The plan for a network, without weights.
    fn new(network: &Network) -> Self {
        let Layout {
            steps,
            constants: layout,
            lifetimes,
        } = build::build(network);
        let placement = lifetimes.place();
        Self {
            steps,
            constants: AlignedBuf::zeroed(layout.len()),
            layout,
            weights: 0,
            arenas: vec![AlignedBuf::zeroed(placement.len())],
            placement,
        }
    }

    /// The plan in `slot` for weights that fit the network: made where there is none, and given these weights where it has
    /// others.
    pub(crate) fn prepared<'a>(
        slot: &'a mut Option<Self>,
        network: &Network,
        executor: &Executor,
        weights: &Weights,
    ) -> &'a mut Self {
        let fingerprint = fingerprint(executor, weights);
        let is_new = slot.is_none();
        let plan = slot.get_or_insert_with(|| Self::new(network));
        if is_new || plan.weights != fingerprint {
            plan.fold(network, executor, weights);
            plan.weights = fingerprint;
        }
        plan
    }

    /// Takes the weights of the network.
    fn fold(&mut self, network: &Network, executor: &Executor, weights: &Weights) {
        let variables = Variables {
            table: &network.variables,
            trainable: &weights.trainable,
            statistics: &weights.statistics,
        };
        executor.enter(Stage::Weights);
        let _report = executor.report(Kernel::Pack, Cost::new(0, 2 * self.constants.len()));
        self.layout.write(executor, variables, &mut self.constants);
    }

    /// How many of `images` images go to one of `threads` threads each.
    fn images_alone(&self, threads: usize, images: usize) -> usize {
        let arenas = threads * self.placement.len() * size_of::<f32>();
        if threads == 1 || arenas > MOST_ARENAS_BYTES {
            return 0;
        }
        images - images % threads
    }

    fn memory(&self, threads: usize, images: usize) -> PlanMemory {
        let arenas = if self.images_alone(threads, images) > 0 {
            threads
        } else {
            1
        };
        let scratch = |step: &Step| match &step.work {
            Work::Bands(layers, tasks) => (tasks.iter())
                .map(|task| layers[task.layer].scratch_len(&task.part))
                .max()
                .unwrap_or(0),
            Work::Pointwise(layers, _) => layers.iter().map(|layer| layer.scratch_len()).max().unwrap_or(0),
            Work::Excite(_) | Work::Levels(_) => 0,
        };
        let scratch = self.steps.iter().map(scratch).max().unwrap_or(0);
        let bytes = |values: usize| values * size_of::<f32>();
        PlanMemory {
            weights_bytes: bytes(self.constants.len()),
            activations_bytes: bytes(self.placement.len()) * arenas,
            scratch_bytes: bytes(scratch) * threads,
        }
    }

    /// Runs images of the network's size.
    pub(crate) fn run(
        &mut self,
        network: &Network,
        executor: &Executor,
        images: &ImageBatch<'_>,
        outputs: &mut HeadOutputs,
    ) {
        outputs.batch = images.batch;
        outputs
            .levels
            .resize_with(network.levels.len(), LevelOutput::default);
        let class_channels = network.class_head.predict.pointwise.out_channels;
        let box_channels = network.box_head.predict.pointwise.out_channels;
        for (output, level) in outputs.levels.iter_mut().zip(&network.levels) {
            (output.height, output.width) = (level.map.height, level.map.width);
            let cells = images.batch * level.map.cells();
            output.class_logits.resize(cells * class_channels, 0.0);
            output.box_codes.resize(cells * box_channels, 0.0);
        }
        let outputs: Vec<Vec<[SharedPtr<f32>; 2]>> = (0..images.batch)
            .map(|image| {
                let of_level = |level: &mut LevelOutput| {
                    [&mut level.class_logits, &mut level.box_codes].map(|values| {
                        let len = values.len() / images.batch;
                        SharedPtr::new(&mut values[image * len..(image + 1) * len])
                    })
                };
                outputs.levels.iter_mut().map(of_level).collect()
            })
            .collect();
        let pool = executor.pool();
        let alone = self.images_alone(pool.threads(), images.batch);
        if alone > 0 {
            let len = self.placement.len();
            self.arenas
                .resize_with(pool.threads().max(self.arenas.len()), || AlignedBuf::zeroed(len));
        }
        let arenas: Vec<SharedPtr<f32>> = (self.arenas.iter_mut())
            .map(|arena| SharedPtr::new(arena))
            .collect();
        let pixels = images.height * images.width * 3;
        let run = |image: usize, crew: Crew| {
            let run = Run {
                executor,
                crew,
                placement: &self.placement,
                arena: match crew {
                    Crew::All => arenas[0],
                    Crew::One(worker) => arenas[worker],
                },
                constants: &self.constants,
                pixels: &images.pixels[image * pixels..(image + 1) * pixels],
                outputs: &outputs[image],
            };
            for step in &self.steps {
                run.enter(step.stage);
                let _report = run.report(step.kernel, step.cost);
                step.run(&run);
            }
        };
        pool.run(alone, &|image, worker| run(image, Crew::One(worker)));
        for image in alone..images.batch {
            run(image, Crew::All);
        }
    }
}

impl Step {
    fn run(&self, run: &Run<'_>) {
        // SAFETY: the layout places buffers so that what a step reads and writes is apart and was written by earlier steps; the
        // tasks of a step write disjoint parts; no other run has the arena or the outputs.
        match &self.work {
            Work::Bands(layers, tasks) => run.each(tasks.len(), |task| tasks[task].cost, &|task, worker| {
                let Task { layer, part, .. } = &tasks[task];
                // SAFETY: see above.
                unsafe { layers[*layer].run(run, part, worker) }
            }),
            Work::Pointwise(layers, tasks) => {
                run.each(tasks.len(), |task| tasks[task].cost, &|task, worker| {
                    let Task { layer, part, .. } = &tasks[task];
                    // SAFETY: see above.
                    unsafe { layers[*layer].run(run, part.clone(), worker) }
                })
            }
            // SAFETY: see above.
            Work::Excite(excitation) => unsafe { excitation.run(run) },
            Work::Levels(levels) => {
                for level in levels {
                    // SAFETY: see above.
                    unsafe { level.run(run) }
                }
            }
        }
    }
}
