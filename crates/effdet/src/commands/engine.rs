//! The engine that the command line asks for.

use std::sync::Arc;

use anyhow::{Context, Result};
use effdet_cpu::engine::{CpuEngine, CpuOptions};
use effdet_cpu::simd::Isa;
use effdet_model::network::Network;

use crate::cli::EngineArgs;

/// The CPU engine for `network` with the threads and the instruction set of the command line.
pub fn cpu_engine(network: &Arc<Network>, args: &EngineArgs) -> Result<CpuEngine> {
    let isa = args
        .isa
        .as_deref()
        .map(|name| name.parse::<Isa>().context("--isa"))
        .transpose()?;
    let options = CpuOptions {
        threads: args.threads.unwrap_or(0),
        isa,
    };
    Ok(CpuEngine::new(Arc::clone(network), options)?)
}
