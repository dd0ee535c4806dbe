//! CPU engine: fused kernels, execution plans and run-time ISA dispatch for EfficientDet.
//!
//! Only the kernel modules and the modules below them ([`pool`], [`arena`], [`memory`]), and the measurements of [`ceilings`], contain `unsafe` code.

pub mod arena;
pub mod ceilings;
pub mod engine;
pub mod inference;
pub mod kernels;
pub mod math;
pub mod memory;
pub mod pool;
pub mod probe;
pub mod reference;
pub mod simd;
pub mod stochastic_depth;
pub mod storage;
