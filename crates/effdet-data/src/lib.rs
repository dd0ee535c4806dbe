//! Data sets, records, image decoding, augmentation and the prefetching loader.
#![forbid(unsafe_code)]

pub mod decode;
pub mod preprocess;
pub mod synthetic;
