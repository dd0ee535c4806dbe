//! The engine that the command line asks for.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use effdet_cpu::engine::{CpuEngine, CpuOptions};
use effdet_cpu::inference::InferencePlan;
use effdet_cpu::simd::Isa;
use effdet_model::network::Network;
use effdet_model::weights::Weights;

use crate::cli::{EngineArgs, StepMemory};

/// The CPU engine for `network` with the threads and the instruction set of the command line, which trains with `memory`.
pub fn cpu_engine(network: &Arc<Network>, args: &EngineArgs, memory: StepMemory) -> Result<CpuEngine> {
    Ok(CpuEngine::new(Arc::clone(network), cpu_options(args, memory)?)?)
}

/// The plan that runs `network` with these weights, with the threads and the instruction set of the command line.
pub fn inference_plan(network: &Arc<Network>, weights: &Weights, args: &EngineArgs) -> Result<InferencePlan> {
    let options = cpu_options(args, StepMemory::default())?;
    Ok(InferencePlan::new(Arc::clone(network), weights, options)?)
}

fn cpu_options(args: &EngineArgs, memory: StepMemory) -> Result<CpuOptions> {
    Ok(CpuOptions {
        threads: args.threads.unwrap_or(0),
        isa: Some(chosen_isa(args)?),
        precision: memory.precision,
        grad_checkpoint: memory.grad_checkpoint,
    })
}

/// The threads of the command line, else one per processor.
pub fn chosen_threads(args: &EngineArgs) -> usize {
    match args.threads.unwrap_or(0) {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}

/// The instruction set of the command line or of `EFFDET_ISA`, else the best one here.
pub fn chosen_isa(args: &EngineArgs) -> Result<Isa> {
    let Some(name) = &args.isa else {
        return Ok(Isa::detect());
    };
    let here: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
    let advice = || format!("--isa or EFFDET_ISA; this processor has {}", here.join(", "));
    let isa: Isa = name.parse().with_context(advice)?;
    ensure!(isa.is_available(), "{isa} is not available: {}", advice());
    Ok(isa)
}
