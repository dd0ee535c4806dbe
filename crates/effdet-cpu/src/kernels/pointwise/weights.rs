//! Weights in the order in which the products read them.

use super::super::Executor;
use super::super::gemm;
use super::super::row_plan::RowPlan;
use super::check;
use super::partials::{partial_stride, weight_tasks};
use crate::arena::{AlignedBuf, SharedPtr};
use crate::probe::{Kernel, Work};
use crate::storage::{PassProducts, Products};

/// The weights of a pointwise convolution in the layouts the kernels read.
#[derive(Debug, Clone)]
pub struct PackedWeights {
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) products: PassProducts,
    pub(super) forward: AlignedBuf,
    pub(super) backward: AlignedBuf,
}

impl PackedWeights {
    /// Zero weights from `inputs` to `outputs` channels, for products of f32.
    pub fn new(inputs: usize, outputs: usize) -> Self {
        Self::with_products(inputs, outputs, PassProducts::default())
    }

    /// Zero weights from `inputs` to `outputs` channels; the products that make outputs and gradients take their operands as
    /// `products` says, whatever the tensors are stored as.
    pub fn with_products(inputs: usize, outputs: usize, products: PassProducts) -> Self {
        Self {
            inputs,
            outputs,
            products,
            forward: AlignedBuf::default(),
            backward: AlignedBuf::default(),
        }
    }

    /// Number of input channels.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Number of output channels.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes that the weights take once packed for both passes.
    pub(crate) fn bytes(&self) -> usize {
        (self.forward_len() + self.backward_len()) * size_of::<f32>()
    }

    /// Bytes of the partial weight gradients of a backward pass.
    pub(crate) fn partial_bytes(&self, rows: &RowPlan) -> usize {
        let partials =
            weight_tasks(rows, self.inputs, self.outputs).len() * partial_stride(self.inputs, self.outputs);
        partials * size_of::<f32>()
    }

    pub(super) fn forward_len(&self) -> usize {
        gemm::packed_len(self.products.forward.lanes(self.inputs), self.outputs)
    }

    pub(super) fn backward_len(&self) -> usize {
        gemm::packed_len(self.products.backward.lanes(self.outputs), self.inputs)
    }

    pub(super) fn check_forward(&self) {
        assert!(self.forward.len() >= self.forward_len(), "weights are not packed");
    }

    pub(super) fn check_backward(&self) {
        assert!(
            self.backward.len() >= self.backward_len(),
            "weights are not packed for the backward pass"
        );
    }
}

/// What [`pack`] is to prepare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// What [`forward`](super::forward) reads.
    Forward,
    /// What [`forward`](super::forward) and the backward functions read.
    ForwardAndBackward,
}

/// Packs the weights of many layers, in parallel.
///
/// # Shapes
/// Each source: `[inputs, outputs]`, row-major, which is TensorFlow's `[1, 1, inputs, outputs]`.
///
/// # Panics
/// When a source has another size.
pub fn pack(executor: &Executor, packing: Packing, layers: &mut [(&mut PackedWeights, &[f32])]) {
    for (packed, source) in layers.iter() {
        check("weights", source.len(), packed.inputs * packed.outputs);
    }
    let values: usize = layers.iter().map(|(_, source)| source.len()).sum();
    let _report = executor.report(Kernel::Pack, Work::new(0, 2 * values));
    let jobs = SharedPtr::new(layers);
    executor.pool().run(layers.len(), &|task, _| {
        // SAFETY: each task has a layer to itself.
        let (packed, source) = unsafe { &mut *jobs.get().add(task) };
        let outputs = packed.outputs;
        if source.is_empty() {
            return;
        }
        packed.forward.grow(packed.forward_len());
        match packed.products.forward {
            Products::Single => gemm::pack(source, outputs, &mut packed.forward),
            // SAFETY: the executor's instruction set is available.
            Products::Bf16Pairs | Products::Bf16Tiles => unsafe {
                gemm::pack_pairs(executor.isa(), source, outputs, &mut packed.forward)
            },
        }
        if packing == Packing::ForwardAndBackward {
            packed.backward.grow(packed.backward_len());
            match packed.products.backward {
                Products::Single => gemm::pack_transposed(source, outputs, &mut packed.backward),
                // SAFETY: as above.
                Products::Bf16Pairs | Products::Bf16Tiles => unsafe {
                    gemm::pack_pairs_transposed(executor.isa(), source, outputs, &mut packed.backward)
                },
            }
        }
    });
}
