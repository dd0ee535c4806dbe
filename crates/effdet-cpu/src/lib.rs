//! CPU engine: fused kernels, execution plans and run-time ISA dispatch for EfficientDet.
