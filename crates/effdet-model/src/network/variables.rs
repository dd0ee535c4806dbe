//! The table of named variables: one row per variable, in the reference's order.

use std::ops::Range;

/// Position of a variable in the [`VariableTable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VariableId(pub usize);

/// Which flat buffer a variable lives in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VariableKind {
    /// Learned by gradient.
    Trainable,
    /// Moving statistic of a batch norm.
    Statistic,
}

/// How a variable starts.
///
/// Fans follow Keras for every kernel shape: `fan_in = shape[-2]·receptive`, `fan_out = shape[-1]·receptive`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Initializer {
    /// One value everywhere.
    Constant(f32),
    /// Truncated normal with σ = √(scale/fan_in), cut at ±2σ, variance corrected for the cut.
    TruncatedNormalFanIn {
        /// Variance scale.
        scale: f64,
    },
    /// Normal with σ = √(scale/fan_out), fan_out = kh·kw·out (automl's backbone).
    NormalFanOut {
        /// Variance scale.
        scale: f64,
    },
    /// Uniform in ±√(6/(fan_in + fan_out)).
    GlorotUniform,
    /// Normal with a fixed deviation.
    Normal {
        /// Standard deviation.
        deviation: f64,
    },
}

/// One variable.
#[derive(Debug, Clone, PartialEq)]
pub struct Variable {
    /// Name as in Keras, without `:0`.
    pub name: String,
    /// Shape in TensorFlow's layout; empty for a scalar.
    pub shape: Vec<usize>,
    /// Flat buffer.
    pub kind: VariableKind,
    /// First value in its flat buffer.
    pub offset: usize,
    /// Number of values.
    pub len: usize,
    /// Initial values.
    pub initializer: Initializer,
    /// Key in a TF2 object-based checkpoint, without the `/.ATTRIBUTES/VARIABLE_VALUE` suffix.
    pub object_key: String,
    /// Name in automl's checkpoints.
    pub upstream_name: String,
}

impl Variable {
    /// Its range in its flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }

    /// Keras fan-in and fan-out.
    pub fn fans(&self) -> (f64, f64) {
        match self.shape.as_slice() {
            [] => (1.0, 1.0),
            [n] => (*n as f64, *n as f64),
            [receptive @ .., fan_in, fan_out] => {
                let receptive = receptive.iter().product::<usize>() as f64;
                (*fan_in as f64 * receptive, *fan_out as f64 * receptive)
            }
        }
    }

    /// The last part of the name: `kernel`, `gamma`, `moving_mean` …
    pub fn leaf(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or(&self.name)
    }

    /// Whether the L2 term covers it: trainable and named `.*(kernel|weight):0`.
    pub fn is_regularized(&self) -> bool {
        self.kind == VariableKind::Trainable
            && (self.name.ends_with("kernel") || self.name.ends_with("weight"))
    }
}

/// All variables of a network.
///
/// The order is that of the reference's `model.variables`: the backbone in graph order, then per top-level module its trainable
/// variables followed by its statistics.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct VariableTable {
    variables: Vec<Variable>,
    trainable_len: usize,
    statistics_len: usize,
}

impl VariableTable {
    /// Lays the variables out in the flat buffers, in their order.
    pub fn new(mut variables: Vec<Variable>) -> Self {
        let (mut trainable_len, mut statistics_len) = (0, 0);
        for variable in &mut variables {
            let end = match variable.kind {
                VariableKind::Trainable => &mut trainable_len,
                VariableKind::Statistic => &mut statistics_len,
            };
            variable.offset = *end;
            *end += variable.len;
        }
        Self {
            variables,
            trainable_len,
            statistics_len,
        }
    }

    /// Rows in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Variable> {
        self.variables.iter()
    }

    /// Number of variables.
    pub fn len(&self) -> usize {
        self.variables.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.variables.is_empty()
    }

    /// Values in the trainable buffer.
    pub fn trainable_len(&self) -> usize {
        self.trainable_len
    }

    /// Values in the statistics buffer.
    pub fn statistics_len(&self) -> usize {
        self.statistics_len
    }

    /// The variable of that name.
    pub fn find(&self, name: &str) -> Option<&Variable> {
        self.variables.iter().find(|variable| variable.name == name)
    }
}

impl std::ops::Index<VariableId> for VariableTable {
    type Output = Variable;

    fn index(&self, id: VariableId) -> &Variable {
        &self.variables[id.0]
    }
}

impl<'a> IntoIterator for &'a VariableTable {
    type Item = &'a Variable;
    type IntoIter = std::slice::Iter<'a, Variable>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
