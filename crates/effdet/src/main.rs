//! EfficientDet object detection: train, evaluate, run and inspect.
#![forbid(unsafe_code)]

fn main() {}
