//! Where the time of a pass goes: stages and kernels report what they do, and whoever listens keeps the clock.
//!
//! Work is nominal, a function of the shapes: multiply-adds of convolutions count twice, other arithmetic not at all, and every
//! tensor counts once however often caches or recomputation touch it.
#![forbid(unsafe_code)]

use std::fmt;

/// A part of the network, in the order of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Packing of the weights for the kernels.
    Weights,
    /// The first convolution.
    Stem,
    /// The MBConv block of this index.
    Block(usize),
    /// Extra levels and BiFPN cells.
    Pyramid,
    /// Class head with its loss.
    ClassHead,
    /// Box head with its loss.
    BoxHead,
    /// Both heads, which inference runs together.
    Heads,
}

/// What a kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kernel {
    /// Weights into the order in which kernels read them.
    Pack,
    /// Stem convolution.
    Stem,
    /// Weight gradient of the stem convolution.
    StemBackward,
    /// 1×1 convolution.
    Pointwise,
    /// Both gradients of a 1×1 convolution.
    PointwiseBackward,
    /// Depthwise convolution.
    Depthwise,
    /// Both gradients of a depthwise convolution.
    DepthwiseBackward,
    /// Depthwise convolution with the layers before and after it, in one pass.
    FusedDepthwise,
    /// Pooling and gate of squeeze-and-excitation.
    SqueezeExcite,
    /// Its gradients.
    SqueezeExciteBackward,
    /// Resampling and weighted sum of a BiFPN node, and resampling alone.
    Fuse,
    /// Its gradients.
    FuseBackward,
    /// Batch norm, activation and residual written out, and sums over gradients.
    Elementwise,
    /// Focal and Huber loss with their gradients.
    Loss,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Weights => f.write_str("weights"),
            Self::Stem => f.write_str("stem"),
            Self::Block(index) => write!(f, "blocks_{index}"),
            Self::Pyramid => f.write_str("pyramid"),
            Self::ClassHead => f.write_str("class head"),
            Self::BoxHead => f.write_str("box head"),
            Self::Heads => f.write_str("heads"),
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pack => "packing",
            Self::Stem => "stem",
            Self::StemBackward => "stem, backward",
            Self::Pointwise => "pointwise",
            Self::PointwiseBackward => "pointwise, backward",
            Self::Depthwise => "depthwise",
            Self::DepthwiseBackward => "depthwise, backward",
            Self::FusedDepthwise => "depthwise, fused",
            Self::SqueezeExcite => "squeeze-excite",
            Self::SqueezeExciteBackward => "squeeze-excite, backward",
            Self::Fuse => "fusion",
            Self::FuseBackward => "fusion, backward",
            Self::Elementwise => "elementwise",
            Self::Loss => "loss",
        })
    }
}

/// Nominal work of a kernel call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// Floating-point operations of convolutions.
    pub flops: u64,
    /// Bytes of all tensors read and written, each once.
    pub bytes: u64,
}

impl Work {
    /// The work of `multiply_adds` on tensors of `values` f32 values in all.
    pub(crate) fn new(multiply_adds: usize, values: usize) -> Self {
        Self {
            flops: 2 * multiply_adds as u64,
            bytes: 4 * values as u64,
        }
    }

    /// The same work several times.
    pub(crate) fn times(self, times: usize) -> Self {
        Self {
            flops: self.flops * times as u64,
            bytes: self.bytes * times as u64,
        }
    }
}

/// Listens to a pass.
///
/// Calls come from the thread that drives the engine, in program order.
pub trait Probe: fmt::Debug + Send + Sync {
    /// The calls that follow belong to this stage.
    fn enter(&self, stage: Stage);

    /// A kernel has just finished.
    fn done(&self, kernel: Kernel, work: Work);
}
