//! The EfficientDet family as data: presets, layers, variables, anchors, boxes, assignment, losses, decoding and NMS.
#![forbid(unsafe_code)]

pub mod anchors;
pub mod assign;
pub mod boxes;
pub mod detect;
pub mod engine;
pub mod hparams;
pub mod label_map;
pub mod loss;
pub mod network;
pub mod rng;
pub mod suggest;
pub mod weights;
