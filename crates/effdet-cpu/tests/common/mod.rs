//! Shared by the integration tests of engines.

pub mod golden;
