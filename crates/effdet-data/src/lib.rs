//! Data sets, records, image decoding, augmentation and the prefetching loader.
#![forbid(unsafe_code)]

pub mod augment;
pub mod batch;
pub mod cache;
pub mod coco;
pub mod confine;
pub mod convert;
pub mod corrupt;
pub mod dataset;
pub mod decode;
pub mod doctor;
pub mod error;
mod folder;
pub mod header;
pub mod inspect;
pub mod jpeg;
pub mod layout;
pub mod loader;
pub mod preprocess;
pub mod report;
pub mod resize;
pub mod sidecar;
pub mod synthetic;
pub mod text;
pub mod tfrecord;
pub mod voc;
pub mod yolo;
