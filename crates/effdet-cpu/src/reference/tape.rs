//! A record of the operations of one forward pass.

use effdet_model::hparams::ActType;
use effdet_model::network::{BatchNorm, Conv, Depthwise, MapSize, Network, VariableId, VariableTable};
use effdet_model::weights::Weights;

use super::ops::{self, Fusion, Moments};
use super::{Float, Tensor};

/// The values of all variables in the reference's number type, laid out as in [`Weights`].
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters<F> {
    /// Trainable variables.
    pub trainable: Vec<F>,
    /// Moving statistics.
    pub statistics: Vec<F>,
}

impl<F: Float> From<&Weights> for Parameters<F> {
    fn from(weights: &Weights) -> Self {
        let convert = |values: &[f32]| values.iter().map(|&value| F::from_f32(value)).collect();
        Self {
            trainable: convert(&weights.trainable),
            statistics: convert(&weights.statistics),
        }
    }
}

/// A value on a [`Tape`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Value(usize);

/// The operation that made a value, with what its gradient needs.
#[derive(Debug)]
enum Operation<F> {
    Input,
    Conv {
        x: Value,
        layer: Conv,
    },
    Depthwise {
        x: Value,
        layer: Depthwise,
    },
    BatchNorm {
        x: Value,
        layer: BatchNorm,
        moments: Moments<F>,
        of_batch: bool,
    },
    Activate {
        x: Value,
        act: ActType,
    },
    SpatialMean {
        x: Value,
    },
    Gate {
        x: Value,
        logits: Value,
    },
    DropConnect {
        x: Value,
        factors: Vec<F>,
    },
    Add {
        a: Value,
        b: Value,
    },
    Fuse {
        inputs: Vec<Value>,
        weights: Vec<VariableId>,
    },
    MaxPool {
        x: Value,
        winners: Vec<usize>,
    },
    Nearest {
        x: Value,
    },
}

/// The operations of one forward pass in order, each with its output; [`Tape::backward`] walks them back.
#[derive(Debug)]
pub struct Tape<'a, F> {
    network: &'a Network,
    parameters: &'a Parameters<F>,
    records: Vec<(Operation<F>, Tensor<F>)>,
}

impl<'a, F: Float> Tape<'a, F> {
    /// An empty tape.
    pub fn new(network: &'a Network, parameters: &'a Parameters<F>) -> Self {
        Self {
            network,
            parameters,
            records: Vec::new(),
        }
    }

    /// The tensor behind a value.
    pub fn value(&self, value: Value) -> &Tensor<F> {
        &self.records[value.0].1
    }

    /// Something that is not computed here.
    pub fn input(&mut self, x: Tensor<F>) -> Value {
        self.record(Operation::Input, x)
    }

    /// [`ops::conv2d`] of a layer.
    pub fn conv(&mut self, x: Value, layer: &Conv) -> Value {
        let bias = layer.bias.map(|id| self.trainable(id));
        let y = ops::conv2d(
            self.value(x),
            self.trainable(layer.kernel),
            bias,
            layer.size,
            layer.stride,
        );
        self.record(Operation::Conv { x, layer: *layer }, y)
    }

    /// [`ops::depthwise`] of a layer.
    pub fn depthwise(&mut self, x: Value, layer: &Depthwise) -> Value {
        let y = ops::depthwise(
            self.value(x),
            self.trainable(layer.kernel),
            layer.size,
            layer.stride,
        );
        self.record(Operation::Depthwise { x, layer: *layer }, y)
    }

    /// [`ops::batch_norm`] of a layer, with the moments of `x` itself.
    pub fn batch_norm_train(&mut self, x: Value, layer: &BatchNorm) -> Value {
        let moments = ops::moments(self.value(x));
        self.batch_norm(x, layer, moments, true)
    }

    /// [`ops::batch_norm`] of a layer, with the moving moments.
    pub fn batch_norm_infer(&mut self, x: Value, layer: &BatchNorm) -> Value {
        let moments = self.moving(layer);
        self.batch_norm(x, layer, moments, false)
    }

    /// [`ops::activate`].
    pub fn activate(&mut self, x: Value, act: ActType) -> Value {
        let y = ops::activate(self.value(x), act);
        self.record(Operation::Activate { x, act }, y)
    }

    /// [`ops::spatial_mean`].
    pub fn spatial_mean(&mut self, x: Value) -> Value {
        let y = ops::spatial_mean(self.value(x));
        self.record(Operation::SpatialMean { x }, y)
    }

    /// [`ops::gate`].
    pub fn gate(&mut self, x: Value, logits: Value) -> Value {
        let y = ops::gate(self.value(x), self.value(logits));
        self.record(Operation::Gate { x, logits }, y)
    }

    /// [`ops::drop_connect`].
    pub fn drop_connect(&mut self, x: Value, factors: Vec<F>) -> Value {
        let y = ops::drop_connect(self.value(x), &factors);
        self.record(Operation::DropConnect { x, factors }, y)
    }

    /// [`ops::add`].
    pub fn add(&mut self, a: Value, b: Value) -> Value {
        let y = ops::add(self.value(a), self.value(b));
        self.record(Operation::Add { a, b }, y)
    }

    /// [`ops::fuse`] by the network's method.
    pub fn fuse(&mut self, inputs: Vec<Value>, weights: Vec<VariableId>) -> Value {
        let y = ops::fuse(&self.values(&inputs), &self.trainables(&weights), self.fusion());
        self.record(Operation::Fuse { inputs, weights }, y)
    }

    /// [`ops::max_pool`].
    pub fn max_pool(&mut self, x: Value, strides: (usize, usize)) -> Value {
        let (y, winners) = ops::max_pool(self.value(x), strides);
        self.record(Operation::MaxPool { x, winners }, y)
    }

    /// [`ops::nearest`] by the network's rule.
    pub fn nearest(&mut self, x: Value, output: MapSize) -> Value {
        let y = ops::nearest(self.value(x), output, self.network.hparams.upsample_rule);
        self.record(Operation::Nearest { x }, y)
    }

    /// Gradient, by every trainable variable, of a scalar whose gradients by some values are given.
    ///
    /// # Shapes
    /// Result: as [`Parameters::trainable`].
    pub fn backward(&self, outputs: Vec<(Value, Tensor<F>)>) -> Vec<F> {
        let mut gradients = Gradients {
            table: &self.network.variables,
            values: self.records.iter().map(|_| None).collect(),
            trainable: vec![F::ZERO; self.parameters.trainable.len()],
        };
        for (value, dy) in outputs {
            gradients.add(value, dy);
        }
        for (index, (operation, _)) in self.records.iter().enumerate().rev() {
            if let Some(dy) = gradients.values[index].take() {
                self.step_back(operation, dy, &mut gradients);
            }
        }
        gradients.trainable
    }

    /// Adds the gradients by what one operation read, given the one by its output.
    fn step_back(&self, operation: &Operation<F>, dy: Tensor<F>, gradients: &mut Gradients<'_, F>) {
        match operation {
            Operation::Input => {}
            Operation::Conv { x, layer } => {
                let kernel = self.trainable(layer.kernel);
                let (dx, dkernel) =
                    ops::conv2d_backward(self.value(*x), kernel, layer.size, layer.stride, &dy);
                gradients.add_variable(layer.kernel, &dkernel);
                if let Some(bias) = layer.bias {
                    gradients.add_variable(bias, &ops::bias_backward(&dy));
                }
                gradients.add(*x, dx);
            }
            Operation::Depthwise { x, layer } => {
                let kernel = self.trainable(layer.kernel);
                let (dx, dkernel) =
                    ops::depthwise_backward(self.value(*x), kernel, layer.size, layer.stride, &dy);
                gradients.add_variable(layer.kernel, &dkernel);
                gradients.add(*x, dx);
            }
            Operation::BatchNorm {
                x,
                layer,
                moments,
                of_batch,
            } => {
                let backward = match of_batch {
                    true => ops::batch_norm_train_backward,
                    false => ops::batch_norm_infer_backward,
                };
                let (dx, dgamma, dbeta) = backward(self.value(*x), self.trainable(layer.gamma), moments, &dy);
                gradients.add_variable(layer.gamma, &dgamma);
                gradients.add_variable(layer.beta, &dbeta);
                gradients.add(*x, dx);
            }
            Operation::Activate { x, act } => {
                gradients.add(*x, ops::activate_backward(self.value(*x), *act, &dy));
            }
            Operation::SpatialMean { x } => {
                gradients.add(*x, ops::spatial_mean_backward(self.value(*x), &dy));
            }
            Operation::Gate { x, logits } => {
                let (dx, dlogits) = ops::gate_backward(self.value(*x), self.value(*logits), &dy);
                gradients.add(*x, dx);
                gradients.add(*logits, dlogits);
            }
            Operation::DropConnect { x, factors } => gradients.add(*x, ops::drop_connect(&dy, factors)),
            Operation::Add { a, b } => {
                gradients.add(*a, dy.clone());
                gradients.add(*b, dy);
            }
            Operation::Fuse { inputs, weights } => {
                let (tensors, variables) = (self.values(inputs), self.trainables(weights));
                let (dinputs, dweights) = ops::fuse_backward(&tensors, &variables, self.fusion(), &dy);
                for (&id, dweight) in weights.iter().zip(&dweights) {
                    gradients.add_variable(id, dweight);
                }
                for (&input, dx) in inputs.iter().zip(dinputs) {
                    gradients.add(input, dx);
                }
            }
            Operation::MaxPool { x, winners } => {
                gradients.add(*x, ops::max_pool_backward(self.value(*x), winners, &dy));
            }
            Operation::Nearest { x } => {
                let rule = self.network.hparams.upsample_rule;
                gradients.add(*x, ops::nearest_backward(self.value(*x), rule, &dy));
            }
        }
    }

    /// The moving statistics after this pass: those of every batch norm that used the moments of its batch have moved.
    ///
    /// # Shapes
    /// Result: as [`Parameters::statistics`].
    pub fn moved_statistics(&self) -> Vec<F> {
        let mut statistics = self.parameters.statistics.clone();
        for (operation, y) in &self.records {
            if let Operation::BatchNorm {
                layer,
                moments,
                of_batch: true,
                ..
            } = operation
            {
                let moved = ops::updated_moving(&self.moving(layer), moments, y.batch * y.map.cells());
                statistics[self.network.variables[layer.mean].range()].copy_from_slice(&moved.mean);
                statistics[self.network.variables[layer.variance].range()].copy_from_slice(&moved.variance);
            }
        }
        statistics
    }

    fn batch_norm(&mut self, x: Value, layer: &BatchNorm, moments: Moments<F>, of_batch: bool) -> Value {
        let (gamma, beta) = (self.trainable(layer.gamma), self.trainable(layer.beta));
        let y = ops::batch_norm(self.value(x), gamma, beta, &moments);
        let layer = *layer;
        self.record(
            Operation::BatchNorm {
                x,
                layer,
                moments,
                of_batch,
            },
            y,
        )
    }

    fn record(&mut self, operation: Operation<F>, y: Tensor<F>) -> Value {
        self.records.push((operation, y));
        Value(self.records.len() - 1)
    }

    fn values(&self, values: &[Value]) -> Vec<&Tensor<F>> {
        values.iter().map(|&value| self.value(value)).collect()
    }

    fn trainable(&self, id: VariableId) -> &'a [F] {
        &self.parameters.trainable[self.network.variables[id].range()]
    }

    fn trainables(&self, ids: &[VariableId]) -> Vec<&'a [F]> {
        ids.iter().map(|&id| self.trainable(id)).collect()
    }

    fn moving(&self, layer: &BatchNorm) -> Moments<F> {
        let statistic = |id| self.parameters.statistics[self.network.variables[id].range()].to_vec();
        Moments {
            mean: statistic(layer.mean),
            variance: statistic(layer.variance),
        }
    }

    fn fusion(&self) -> Fusion {
        Fusion {
            method: self.network.hparams.fusion(),
            relu: self.network.hparams.fusion_relu,
        }
    }
}

/// Gradients gathered so far on the way back.
struct Gradients<'a, F> {
    table: &'a VariableTable,
    /// By each value of the tape that something read.
    values: Vec<Option<Tensor<F>>>,
    trainable: Vec<F>,
}

impl<F: Float> Gradients<'_, F> {
    fn add(&mut self, value: Value, dx: Tensor<F>) {
        match &mut self.values[value.0] {
            Some(sum) => sum
                .data
                .iter_mut()
                .zip(&dx.data)
                .for_each(|(sum, &dx)| *sum += dx),
            empty => *empty = Some(dx),
        }
    }

    fn add_variable(&mut self, id: VariableId, gradient: &[F]) {
        let sums = &mut self.trainable[self.table[id].range()];
        sums.iter_mut()
            .zip(gradient)
            .for_each(|(sum, &gradient)| *sum += gradient);
    }
}
