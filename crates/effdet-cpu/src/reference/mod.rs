//! The plain reference: what a step means, unfused, in f32 or f64.
//!
//! [`ops`] has one function per operation and one per gradient. [`Tape`] records the operations of a forward pass and walks
//! them back. [`network`] runs a [`Network`](effdet_model::network::Network) on it, and [`ReferenceEngine`] stands behind the
//! [`Engine`](effdet_model::engine::Engine) trait, so that a fast engine can be compared with it batch by batch.
#![forbid(unsafe_code)]

mod engine;
mod float;
pub mod network;
pub mod ops;
mod tape;
mod tensor;

pub use crate::stochastic_depth::DrawKeys;
pub use engine::ReferenceEngine;
pub use float::Float;
pub use tape::{Parameters, Tape, Value};
pub use tensor::Tensor;
