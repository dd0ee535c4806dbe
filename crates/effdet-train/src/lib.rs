//! Training loop, schedules, optimiser, EMA, evaluation during training and event sinks.
#![forbid(unsafe_code)]

pub mod error;
pub mod eval;
pub mod events;
pub mod guard;
pub mod loss_scale;
pub mod modes;
pub mod optimizer;
mod parallel;
mod ranks;
pub mod requests;
pub mod schedule;
pub mod sinks;
pub mod trainer;

pub use ranks::{Reduction, train_step_on_ranks};
