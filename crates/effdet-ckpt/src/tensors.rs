//! Safetensors files: named tensors, weights and optimiser slots.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use effdet_model::network::{Variable, VariableKind, VariableTable};
use effdet_model::weights::Weights;
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView, View};

use crate::error::CkptError;
use crate::filesystem::{Disk, Filesystem, read_limited, write_synced};

/// Largest safetensors file that is read; the largest network of the family with two optimiser slots has 0.7 GB.
pub const MAX_TENSOR_FILE_BYTES: u64 = 4 << 30;

/// A named tensor's values, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Values.
    pub values: Vec<f32>,
}

/// The floating-point tensors of a safetensors file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Tensors {
    /// Where they come from, for messages.
    pub path: PathBuf,
    /// By name.
    pub by_name: BTreeMap<String, Tensor>,
    /// Names and types of tensors that hold no floating-point numbers, such as PyTorch's `num_batches_tracked`.
    pub not_float: Vec<(String, String)>,
}

/// Reads every tensor of a safetensors file as `f32`: F32 as it is, F16 and BF16 exactly, F64 rounded.
///
/// # Errors
/// [`CkptError::Io`], [`CkptError::TooLarge`], [`CkptError::BadTensorFile`].
pub fn load_tensors(path: &Path) -> Result<Tensors, CkptError> {
    let bytes = read_limited(path, MAX_TENSOR_FILE_BYTES)?;
    let file = parse(path, &bytes)?;
    let mut tensors = Tensors {
        path: path.to_owned(),
        ..Tensors::default()
    };
    for (name, view) in file.iter() {
        match to_f32(view.dtype(), view.data()) {
            Some(values) => {
                let shape = view.shape().to_vec();
                tensors.by_name.insert(name.to_owned(), Tensor { shape, values });
            }
            None => tensors
                .not_float
                .push((name.to_owned(), view.dtype().to_string())),
        }
    }
    tensors.not_float.sort_unstable();
    Ok(tensors)
}

/// Writes every variable under its name as F32, atomically: `path` holds the whole file or is as before.
///
/// # Errors
/// [`CkptError::Io`]; [`CkptError::WrongLength`] when `weights` are not those of `table`.
pub fn save_weights(path: &Path, table: &VariableTable, weights: &Weights) -> Result<(), CkptError> {
    write_file(path, &encode_weights(table, weights)?)
}

/// Tensors and notes as the bytes of a safetensors file.
///
/// # Errors
/// [`CkptError::InvalidState`] when a shape does not fit its values.
pub fn encode_tensors(
    tensors: &[(&str, &[usize], &[f32])],
    notes: BTreeMap<String, String>,
) -> Result<Vec<u8>, CkptError> {
    let slices = (tensors.iter()).map(|(name, shape, values)| ((*name).to_owned(), Slice { shape, values }));
    safetensors::serialize(slices, Some(notes.into_iter().collect())).map_err(|error| {
        CkptError::InvalidState {
            field: "tensors".to_owned(),
            reason: error.to_string(),
        }
    })
}

/// The notes of a safetensors file.
///
/// # Errors
/// As [`load_tensors`].
pub fn load_notes(path: &Path) -> Result<BTreeMap<String, String>, CkptError> {
    let bytes = read_limited(path, MAX_TENSOR_FILE_BYTES)?;
    parse(path, &bytes)?;
    let header = SafeTensors::read_metadata(&bytes).map_err(|error| CkptError::BadTensorFile {
        path: path.to_owned(),
        offset: 0,
        reason: error.to_string(),
    })?;
    let notes = header.1.metadata().clone().unwrap_or_default();
    Ok(notes.into_iter().collect())
}

/// Writes a file atomically: `path` holds all of `bytes` or is as before.
///
/// # Errors
/// [`CkptError::Io`], [`CkptError::NotDurable`].
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CkptError> {
    let name = path.file_name().ok_or_else(|| CkptError::Io {
        operation: "write",
        path: path.to_owned(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidInput, "the path has no file name"),
    })?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let temporary = parent.join(format!(".{}.tmp-{}", name.to_string_lossy(), std::process::id()));
    // What a killed process of the same id left.
    let _ = Disk.remove_file(&temporary);
    let committed = write_synced(&Disk, &temporary, bytes).and_then(|()| {
        Disk.rename(&temporary, path)
            .map_err(CkptError::io("rename a new file to", path))
    });
    if let Err(error) = committed {
        // The first failure is the one to report.
        let _ = Disk.remove_file(&temporary);
        return Err(error);
    }
    Disk.sync_dir(parent).map_err(|source| CkptError::NotDurable {
        path: path.to_owned(),
        source,
    })
}

/// A slice of values as a tensor of a file.
struct Slice<'a> {
    shape: &'a [usize],
    values: &'a [f32],
}

impl View for Slice<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        little_endian(self.values)
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

/// The bytes of values as files hold them.
pub(crate) fn little_endian(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(values))
    } else {
        Cow::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }
}

/// All variables as the bytes of a safetensors file.
pub(crate) fn encode_weights(table: &VariableTable, weights: &Weights) -> Result<Vec<u8>, CkptError> {
    check_length("trainable", weights.trainable.len(), table.trainable_len())?;
    check_length("statistics", weights.statistics.len(), table.statistics_len())?;
    encode(table.iter().map(|variable| {
        let values = weights.slice(variable.kind, variable.range());
        let shape = &variable.shape;
        (variable.name.clone(), Slice { shape, values })
    }))
}

/// Optimiser slots as the bytes of a safetensors file, tensors named `<slot>/<variable>`.
pub(crate) fn encode_slots(table: &VariableTable, slots: &[(&str, &[f32])]) -> Result<Vec<u8>, CkptError> {
    let mut tensors = Vec::new();
    for (index, (slot, values)) in slots.iter().enumerate() {
        let invalid = |reason: &str| CkptError::InvalidState {
            field: format!("optimiser slot {slot:?}"),
            reason: reason.to_owned(),
        };
        if slot.is_empty() || slot.contains('/') {
            return Err(invalid("its name is empty or contains a slash"));
        }
        if slots[..index].iter().any(|(other, _)| other == slot) {
            return Err(invalid("its name is given twice"));
        }
        check_length(slot, values.len(), table.trainable_len())?;
        tensors.extend(trainable(table).map(|variable| {
            let values = &values[variable.range()];
            let shape = &variable.shape;
            (format!("{slot}/{}", variable.name), Slice { shape, values })
        }));
    }
    encode(tensors)
}

fn encode<'a>(tensors: impl IntoIterator<Item = (String, Slice<'a>)>) -> Result<Vec<u8>, CkptError> {
    safetensors::serialize(tensors, None).map_err(|error| CkptError::InvalidState {
        field: "tensors".to_owned(),
        reason: error.to_string(),
    })
}

/// Exactly the variables of `table` from the bytes of a file.
pub(crate) fn decode_weights(path: &Path, bytes: &[u8], table: &VariableTable) -> Result<Weights, CkptError> {
    let file = parse(path, bytes)?;
    let mut weights = Weights::zeros(table);
    for variable in table {
        let view = find(path, &file, &variable.name)?;
        copy(
            path,
            &variable.name,
            variable,
            &view,
            weights.slice_mut(variable.kind, variable.range()),
        )?;
    }
    if file.len() > table.len() {
        return Err(unexpected(path, &file, |name| table.find(name).is_some()));
    }
    Ok(weights)
}

/// Complete optimiser slots over the trainable variables of `table`.
pub(crate) fn decode_slots(
    path: &Path,
    bytes: &[u8],
    table: &VariableTable,
) -> Result<BTreeMap<String, Vec<f32>>, CkptError> {
    let file = parse(path, bytes)?;
    let mut slots: BTreeMap<String, Vec<f32>> = file
        .names()
        .into_iter()
        .filter_map(|name| name.split_once('/'))
        .map(|(slot, _)| (slot.to_owned(), Vec::new()))
        .collect();
    let mut known = 0;
    for (slot, values) in &mut slots {
        // Every slot is complete or refused, so this allocates at most what the file holds.
        if let Some(first) = trainable(table).next() {
            find(path, &file, &format!("{slot}/{}", first.name))?;
        }
        *values = vec![0.0; table.trainable_len()];
        for variable in trainable(table) {
            let name = format!("{slot}/{}", variable.name);
            let view = find(path, &file, &name)?;
            copy(path, &name, variable, &view, &mut values[variable.range()])?;
            known += 1;
        }
    }
    if file.len() > known {
        let is_known = |name: &str| {
            name.split_once('/')
                .and_then(|(_, name)| table.find(name))
                .is_some_and(|variable| variable.kind == VariableKind::Trainable)
        };
        return Err(unexpected(path, &file, is_known));
    }
    Ok(slots)
}

fn trainable(table: &VariableTable) -> impl Iterator<Item = &Variable> {
    table
        .iter()
        .filter(|variable| variable.kind == VariableKind::Trainable)
}

fn check_length(what: &str, actual: usize, expected: usize) -> Result<(), CkptError> {
    if actual == expected {
        return Ok(());
    }
    Err(CkptError::WrongLength {
        what: what.to_owned(),
        expected,
        actual,
    })
}

fn find<'a>(path: &Path, file: &SafeTensors<'a>, name: &str) -> Result<TensorView<'a>, CkptError> {
    file.tensor(name).map_err(|_| CkptError::MissingTensor {
        path: path.to_owned(),
        tensor: name.to_owned(),
    })
}

fn copy(
    path: &Path,
    name: &str,
    variable: &Variable,
    view: &TensorView<'_>,
    values: &mut [f32],
) -> Result<(), CkptError> {
    if view.dtype() != Dtype::F32 {
        return Err(CkptError::UnsupportedType {
            path: path.to_owned(),
            tensor: name.to_owned(),
            dtype: view.dtype().to_string(),
        });
    }
    if view.shape() != variable.shape {
        return Err(CkptError::WrongShape {
            path: path.to_owned(),
            tensor: name.to_owned(),
            expected: variable.shape.clone(),
            actual: view.shape().to_vec(),
        });
    }
    for (value, bytes) in values.iter_mut().zip(view.data().as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*bytes);
    }
    Ok(())
}

/// The first tensor, by name, that is not known.
fn unexpected(path: &Path, file: &SafeTensors<'_>, is_known: impl Fn(&str) -> bool) -> CkptError {
    let tensor = file.names().into_iter().filter(|name| !is_known(name)).min();
    CkptError::UnexpectedTensor {
        path: path.to_owned(),
        tensor: tensor.unwrap_or_default().to_owned(),
    }
}

fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>, CkptError> {
    /// Bytes that hold the length of the header.
    const LENGTH: u64 = 8;
    SafeTensors::deserialize(bytes).map_err(|error| {
        let offset = match &error {
            SafeTensorError::HeaderTooSmall
            | SafeTensorError::HeaderTooLarge
            | SafeTensorError::InvalidHeaderLength => 0,
            SafeTensorError::InvalidHeader(error) => LENGTH + error.valid_up_to() as u64,
            SafeTensorError::InvalidHeaderDeserialization(error) => {
                LENGTH + error.column().saturating_sub(1) as u64
            }
            _ => LENGTH,
        };
        CkptError::BadTensorFile {
            path: path.to_owned(),
            offset,
            reason: error.to_string(),
        }
    })
}

fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let (halves, _) = bytes.as_chunks::<2>();
    Some(match dtype {
        Dtype::F32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        Dtype::F64 => bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| f64::from_le_bytes(*b) as f32)
            .collect(),
        Dtype::F16 => halves
            .iter()
            .map(|b| half_to_f32(u16::from_le_bytes(*b)))
            .collect(),
        Dtype::BF16 => halves
            .iter()
            .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16))
            .collect(),
        _ => return None,
    })
}

/// IEEE binary16 to binary32, exact.
fn half_to_f32(bits: u16) -> f32 {
    let sign = if bits >> 15 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(bits >> 10 & 31);
    let fraction = f32::from(bits & 1023);
    match exponent {
        0 => sign * fraction * 2f32.powi(-24),
        31 if fraction == 0.0 => sign * f32::INFINITY,
        31 => f32::NAN,
        _ => sign * (1.0 + fraction / 1024.0) * 2f32.powi(exponent - 15),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_is_read_exactly() {
        for (bits, value) in [
            (0x0000u16, 0.0f32),
            (0x8000, -0.0),
            (0x0001, 5.960_464_5e-8),
            (0x03ff, 6.097_555e-5),
            (0x0400, 6.103_515_6e-5),
            (0x3555, 0.333_251_95),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x7c00, f32::INFINITY),
            (0xfc00, f32::NEG_INFINITY),
        ] {
            assert_eq!(half_to_f32(bits).to_bits(), value.to_bits(), "{bits:#06x}");
        }
        assert!(half_to_f32(0x7e00).is_nan());
    }
}
