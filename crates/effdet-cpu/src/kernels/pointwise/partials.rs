//! Partial weight gradients, one per task of a backward pass, and their sum in the order of the tasks.

use super::super::Executor;
use super::super::gemm::padded;
use super::super::row_plan::{RowPlan, RowTask};
use super::super::row_sweeps::{ReducePartials, sweep};
use super::{WeightGradient, add, check};
use crate::arena::{Bump, SharedPtr};

/// Fewest and most tasks of a backward pass, each with its own partial dW, and how many values these may hold together.
///
/// More tasks would keep more than 16 threads busy, but adding up twice as many partial gradients costs two threads 2 % of a step.
const BACKWARD_TASKS: (usize, usize) = (4, 16);
const PARTIAL_VALUES: usize = 1 << 20;

/// The tasks of a backward pass.
pub(super) fn weight_tasks(plan: &RowPlan, inputs: usize, outputs: usize) -> Vec<RowTask> {
    let (fewest, most) = BACKWARD_TASKS;
    plan.tasks((PARTIAL_VALUES / (inputs * padded(outputs)).max(1)).clamp(fewest, most))
}

/// Values from one partial weight gradient to the next.
pub(super) fn partial_stride(inputs: usize, outputs: usize) -> usize {
    Bump::room(inputs * padded(outputs))
}

/// The partial weight gradients of a backward pass, one per task, and where their sum goes.
pub(super) struct WeightPartials<'a> {
    pub(super) tasks: Vec<RowTask>,
    inputs: usize,
    outputs: usize,
    target: WeightGradient<'a>,
}

impl<'a> WeightPartials<'a> {
    pub(super) fn new(plan: &RowPlan, inputs: usize, outputs: usize, target: WeightGradient<'a>) -> Self {
        check("dw", target.dw.len(), inputs * outputs);
        if let Some(db) = &target.db {
            check("db", db.len(), outputs);
        }
        Self {
            tasks: weight_tasks(plan, inputs, outputs),
            inputs,
            outputs,
            target,
        }
    }

    /// Values from one partial gradient to the next.
    pub(super) fn stride(&self) -> usize {
        partial_stride(self.inputs, self.outputs)
    }

    /// Values of all partial gradients.
    pub(super) fn len(&self) -> usize {
        self.tasks.len() * self.stride()
    }

    pub(super) fn has_bias(&self) -> bool {
        self.target.db.is_some()
    }

    /// Adds up the partial gradients in the order of the tasks.
    pub(super) fn reduce<'t>(
        self,
        executor: &Executor,
        partials: &[f32],
        bias_totals: impl Iterator<Item = &'t [f64]>,
    ) {
        let stride = self.stride();
        let (inputs, outputs) = (self.inputs, self.outputs);
        let WeightGradient { dw, db, accumulate } = self.target;
        let rows_per_task = (REDUCED_VALUES / padded(outputs).max(1)).max(1);
        let dw = SharedPtr::new(dw);
        executor.pool().run(inputs.div_ceil(rows_per_task), &|task, _| {
            let first = task * rows_per_task;
            // SAFETY: the partials hold `inputs` padded rows each, and tasks write disjoint rows of dW.
            unsafe {
                let pass = ReducePartials {
                    rows: rows_per_task.min(inputs - first),
                    columns: outputs,
                    partials: partials.as_ptr().add(first * padded(outputs)),
                    count: self.tasks.len(),
                    partial_stride: stride,
                    row_stride: padded(outputs),
                    out: dw.get().add(first * outputs),
                    accumulate,
                };
                sweep(executor.isa(), &pass);
            }
        });
        if let Some(db) = db {
            let mut sums = vec![0.0; outputs];
            bias_totals.for_each(|totals| add(&mut sums, totals));
            for (db, sum) in db.iter_mut().zip(sums) {
                *db = if accumulate { *db + sum as f32 } else { sum as f32 };
            }
        }
    }
}

/// Values of dW that a task of the reduction adds up.
pub(super) const REDUCED_VALUES: usize = 16 << 10;
