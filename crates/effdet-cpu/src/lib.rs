//! CPU engine: fused kernels, execution plans and run-time ISA dispatch for EfficientDet.
//!
//! `unsafe` code is in [`kernels`] and [`inference`], what they are written in ([`simd`], [`math`], [`storage`]), the memory and threads they
//! run on ([`arena`], [`memory`], [`pool`]), the measurements of [`ceilings`], and where the engine goes from one step to the next.

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
