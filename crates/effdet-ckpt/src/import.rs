//! Weights from other files: by name, and EfficientNet backbones with PyTorch's names and layouts.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use effdet_model::network::{Variable, VariableTable};
use effdet_model::weights::Weights;

use crate::error::CkptError;
use crate::tensors::{Tensor, Tensors, load_tensors};

/// Replaces a prefix of tensor names: tensors named `from…` are looked up as `to…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rename {
    /// Prefix in the file.
    pub from: String,
    /// Prefix of the variables of the network.
    pub to: String,
}

/// A tensor of the file that was not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Its name in the file.
    pub tensor: String,
    /// Why.
    pub reason: String,
}

/// A variable that kept the value it had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reinitialised {
    /// Its name.
    pub variable: String,
    /// Why.
    pub reason: String,
}

/// What an import did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MatchReport {
    /// Variables that were given values, in the order of the table.
    pub loaded: Vec<String>,
    /// Tensors of the file without use, by name.
    pub skipped: Vec<Skipped>,
    /// Variables without a tensor of their shape, in the order of the table: they keep their initial values.
    pub reinitialised: Vec<Reinitialised>,
}

/// Copies every tensor whose name, after `renames`, and shape are those of a variable into `weights`; all else stays as it is.
///
/// The first rename whose prefix fits is applied to a name; of two tensors with the same new name the first by name counts. So a network with another number of classes takes everything but the last layer
/// of its class head from a checkpoint, and the report says so.
///
/// # Errors
/// [`CkptError::NothingMatched`] when no tensor fits; [`CkptError::WrongLength`] when `weights` are not those of `table`.
pub fn match_variables(
    table: &VariableTable,
    tensors: &Tensors,
    renames: &[Rename],
    weights: &mut Weights,
) -> Result<MatchReport, CkptError> {
    let renamed = |name: &str| {
        renames
            .iter()
            .find_map(|rename| {
                let tail = name.strip_prefix(&rename.from)?;
                Some(format!("{}{tail}", rename.to))
            })
            .unwrap_or_else(|| name.to_owned())
    };
    let mut by_variable: BTreeMap<String, (&str, &Tensor)> = BTreeMap::new();
    for (name, tensor) in &tensors.by_name {
        by_variable
            .entry(renamed(name))
            .or_insert((name.as_str(), tensor));
    }
    import(table, tensors, weights, |variable| {
        let &(name, tensor) = by_variable.get(&variable.name)?;
        Some((name, Cow::Borrowed(tensor)))
    })
}

/// Starts a network from a backbone: a safetensors file under this project's names, or an EfficientNet under PyTorch's.
///
/// PyTorch's names are those of the `efficientnet-pytorch` and `efficientnet-lite-pytorch` packages: `_conv_stem`, `_bn0`,
/// `_blocks.N.{_expand_conv, _bn0, _depthwise_conv, _bn1, _se_reduce, _se_expand, _project_conv, _bn2}`. Block N is the N-th
/// `stack_S/block_B` in order. Kernels `[out, in, kh, kw]` become `[kh, kw, in, out]`, depthwise kernels `[channels, 1, kh, kw]` become
/// `[kh, kw, channels, 1]`. The classifier of the file has no use here. Its batch norms are taken with their statistics.
///
/// # Errors
/// Those of [`load_tensors`] and [`match_variables`].
pub fn load_backbone(
    path: &Path,
    table: &VariableTable,
    weights: &mut Weights,
) -> Result<MatchReport, CkptError> {
    let tensors = load_tensors(path)?;
    if !tensors.by_name.contains_key("_conv_stem.weight") {
        return match_variables(table, &tensors, &[], weights);
    }
    let blocks = block_prefixes(table);
    import(table, &tensors, weights, |variable| {
        let name = pytorch_name(&variable.name, &blocks)?;
        let (name, tensor) = tensors.by_name.get_key_value(&name)?;
        Some((
            name.as_str(),
            Cow::Owned(to_tensorflow_layout(tensor, variable.leaf())?),
        ))
    })
}

/// Copies for each variable the tensor that `source_of` finds, if its shape fits.
fn import<'a>(
    table: &VariableTable,
    tensors: &'a Tensors,
    weights: &mut Weights,
    source_of: impl Fn(&Variable) -> Option<(&'a str, Cow<'a, Tensor>)>,
) -> Result<MatchReport, CkptError> {
    for (what, actual, expected) in [
        ("trainable", weights.trainable.len(), table.trainable_len()),
        ("statistics", weights.statistics.len(), table.statistics_len()),
    ] {
        if actual != expected {
            return Err(CkptError::WrongLength {
                what: what.to_owned(),
                expected,
                actual,
            });
        }
    }
    let mut report = MatchReport::default();
    let mut used = BTreeSet::new();
    let mut misfits = Vec::new();
    for variable in table {
        let reason = match source_of(variable) {
            None => "not in the file".to_owned(),
            Some((name, tensor)) if tensor.shape != variable.shape => {
                misfits.push(Skipped {
                    tensor: name.to_owned(),
                    reason: format!(
                        "its shape is {:?}, {} needs {:?}",
                        tensor.shape, variable.name, variable.shape
                    ),
                });
                used.insert(name);
                format!(
                    "the file has the shape {:?}, not {:?}",
                    tensor.shape, variable.shape
                )
            }
            Some((name, tensor)) => {
                weights
                    .slice_mut(variable.kind, variable.range())
                    .copy_from_slice(&tensor.values);
                used.insert(name);
                report.loaded.push(variable.name.clone());
                continue;
            }
        };
        report.reinitialised.push(Reinitialised {
            variable: variable.name.clone(),
            reason,
        });
    }
    if report.loaded.is_empty() {
        let first = |name: Option<&str>| name.unwrap_or("none").to_owned();
        return Err(CkptError::NothingMatched {
            path: tensors.path.clone(),
            count: tensors.by_name.len() + tensors.not_float.len(),
            example: first(tensors.by_name.keys().map(String::as_str).next()),
            wanted: first(table.iter().map(|variable| variable.name.as_str()).next()),
        });
    }
    report.skipped = misfits;
    for name in tensors
        .by_name
        .keys()
        .filter(|name| !used.contains(name.as_str()))
    {
        report.skipped.push(Skipped {
            tensor: name.clone(),
            reason: "the network has no variable for it".to_owned(),
        });
    }
    for (name, dtype) in &tensors.not_float {
        report.skipped.push(Skipped {
            tensor: name.clone(),
            reason: format!("it holds no floating-point numbers but {dtype}"),
        });
    }
    report.skipped.sort_by(|a, b| a.tensor.cmp(&b.tensor));
    Ok(report)
}

/// `stack_S/block_B` of every backbone block, in order.
fn block_prefixes(table: &VariableTable) -> Vec<&str> {
    let mut prefixes = Vec::new();
    for variable in table {
        if let Some((prefix, _)) = split_block(&variable.name)
            && prefixes.last() != Some(&prefix)
        {
            prefixes.push(prefix);
        }
    }
    prefixes
}

/// `stack_S/block_B` and the rest of a name.
fn split_block(name: &str) -> Option<(&str, &str)> {
    if !name.starts_with("stack_") {
        return None;
    }
    let block_end = name.match_indices('/').nth(1).map(|(index, _)| index)?;
    Some((&name[..block_end], &name[block_end + 1..]))
}

/// PyTorch's name of a backbone variable.
fn pytorch_name(name: &str, blocks: &[&str]) -> Option<String> {
    let (prefix, layer_and_leaf) = match split_block(name) {
        Some((block, rest)) => {
            let index = blocks.iter().position(|other| *other == block)?;
            (format!("_blocks.{index}."), rest)
        }
        None => (String::new(), name),
    };
    let (layer, leaf) = layer_and_leaf.split_once('/')?;
    let layer = match (prefix.is_empty(), layer) {
        (true, "stem_conv2d") => "_conv_stem",
        (true, "stem_bn") => "_bn0",
        (false, "expand_conv2d") => "_expand_conv",
        (false, "expand_bn") => "_bn0",
        (false, "depthwise_conv2d") => "_depthwise_conv",
        (false, "depthwise_bn") => "_bn1",
        (false, "se_reduce_conv2d") => "_se_reduce",
        (false, "se_expand_conv2d") => "_se_expand",
        (false, "project_conv2d") => "_project_conv",
        (false, "project_bn") => "_bn2",
        _ => return None,
    };
    let leaf = match leaf {
        "kernel" | "depthwise_kernel" | "gamma" => "weight",
        "beta" | "bias" => "bias",
        "moving_mean" => "running_mean",
        "moving_variance" => "running_var",
        _ => return None,
    };
    Some(format!("{prefix}{layer}.{leaf}"))
}

/// A PyTorch tensor in TensorFlow's layout; none when a kernel does not have four dimensions.
fn to_tensorflow_layout(tensor: &Tensor, leaf: &str) -> Option<Tensor> {
    // Axes of the source in the order of the result.
    let axes: [usize; 4] = match leaf {
        "kernel" => [2, 3, 1, 0],
        "depthwise_kernel" => [2, 3, 0, 1],
        _ => return Some(tensor.clone()),
    };
    let source: [usize; 4] = tensor.shape.as_slice().try_into().ok()?;
    let strides = [
        source[1] * source[2] * source[3],
        source[2] * source[3],
        source[3],
        1,
    ];
    let shape = axes.map(|axis| source[axis]);
    let step = axes.map(|axis| strides[axis]);
    let mut values = Vec::with_capacity(tensor.values.len());
    for a in 0..shape[0] {
        for b in 0..shape[1] {
            for c in 0..shape[2] {
                for d in 0..shape[3] {
                    values.push(tensor.values[a * step[0] + b * step[1] + c * step[2] + d * step[3]]);
                }
            }
        }
    }
    Some(Tensor {
        shape: shape.to_vec(),
        values,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_move_their_channels_to_the_end() {
        // [out 2, in 3, kh 1, kw 2], value = 100·out + 10·in + kw.
        let mut values = Vec::new();
        for out in 0..2 {
            for input in 0..3 {
                for x in 0..2 {
                    values.push((100 * out + 10 * input + x) as f32);
                }
            }
        }
        let tensor = Tensor {
            shape: vec![2, 3, 1, 2],
            values,
        };
        let moved = to_tensorflow_layout(&tensor, "kernel").unwrap();
        assert_eq!(moved.shape, [1, 2, 3, 2]);
        assert_eq!(
            moved.values,
            [0., 100., 10., 110., 20., 120., 1., 101., 11., 111., 21., 121.]
        );
    }

    #[test]
    fn depthwise_kernels_become_height_width_channels_one() {
        let tensor = Tensor {
            shape: vec![3, 1, 1, 2],
            values: vec![0., 1., 10., 11., 20., 21.],
        };
        let moved = to_tensorflow_layout(&tensor, "depthwise_kernel").unwrap();
        assert_eq!(moved.shape, [1, 2, 3, 1]);
        assert_eq!(moved.values, [0., 10., 20., 1., 11., 21.]);
    }

    #[test]
    fn a_kernel_without_four_dimensions_is_no_kernel() {
        let tensor = Tensor {
            shape: vec![6],
            values: vec![0.0; 6],
        };
        assert_eq!(to_tensorflow_layout(&tensor, "kernel"), None);
    }

    #[test]
    fn pytorch_names_follow_the_order_of_blocks() {
        let blocks = ["stack_0/block_0", "stack_1/block_0", "stack_1/block_1"];
        for (ours, theirs) in [
            ("stem_conv2d/kernel", Some("_conv_stem.weight")),
            ("stem_bn/moving_variance", Some("_bn0.running_var")),
            (
                "stack_0/block_0/depthwise_bn/gamma",
                Some("_blocks.0._bn1.weight"),
            ),
            (
                "stack_1/block_1/expand_conv2d/kernel",
                Some("_blocks.2._expand_conv.weight"),
            ),
            (
                "stack_1/block_0/se_reduce_conv2d/bias",
                Some("_blocks.1._se_reduce.bias"),
            ),
            ("stack_1/block_0/project_bn/beta", Some("_blocks.1._bn2.bias")),
            ("resample_p6/conv2d/kernel", None),
            ("class_net/class-0/bias", None),
            ("fpn_cells/cell_0/fnode0/WSM", None),
        ] {
            assert_eq!(pytorch_name(ours, &blocks).as_deref(), theirs, "{ours}");
        }
    }
}
