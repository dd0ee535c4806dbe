//! Tests of the public interface on real files.

mod checkpoints;
mod common;
mod format;
mod import;
