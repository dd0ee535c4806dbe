//! Training loop, schedules, optimiser, EMA, evaluation during training and event sinks.
#![forbid(unsafe_code)]
