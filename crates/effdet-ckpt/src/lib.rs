//! Checkpoint directories committed by rename, and weight import.
#![forbid(unsafe_code)]
